// Products on the tile registers of AMX: 16 rows of codes by up to 48 columns, the limbs of 16 rows of `x`.
#pragma once

#include "cpu_native_few.h"

// Bytes of the columns of `count` rows of `x`: for each half of a tile of channels, 64 of them by 16 columns at a time.
inline int64_t column_tiles(int64_t count) { return (LIMBS * count + 15) / 16; }
inline int64_t columns_size(const Linear& w, int64_t count) { return w.tiles() * 2 * column_tiles(count) * 1024; }

// Writes the columns of some rows of `input`: column `3 m + limb`, four channels of which are neighbours.
inline void write_columns(const Linear& w, const Input& input, const int64_t* inputs, int64_t count, int8_t* out) {
    auto* words = reinterpret_cast<int32_t*>(out);
    const int64_t parts = w.tiles() * 2, blocks = column_tiles(count);
    std::memset(out, 0, columns_size(w, count));
    for (int64_t part = 0; part < parts; ++part) {
        for (int64_t column = 0; column < LIMBS * count; ++column) {
            const int8_t* row = input.limbs + inputs[column / LIMBS] * w.tiles() * Input::TILE_BYTES;
            const int8_t* limb = row + part / 2 * Input::TILE_BYTES + column % LIMBS * TILE + part % 2 * 64;
            int32_t* block = words + (part * blocks + column / 16) * 256 + column % 16;
            for (int word = 0; word < 16; ++word) std::memcpy(block + 16 * word, limb + 4 * word, 4);
        }
    }
}

#if defined(__AMX_TILE__) && defined(__AMX_INT8__)
constexpr bool HAS_TILES = true;

// GCC does not know that tile instructions read and write memory.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

inline void configure_tiles() {
    alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}

inline void release_tiles() { _tile_release(); }

// Products of 16 rows' codes `(2, 16, 64)` with `B` blocks of columns: tiles 0 to 2 are sums, 3 and 4 codes, 5 to 7
// columns.
template <int B>
inline void multiply_block(const uint8_t* codes, const int8_t* columns, int32_t* product) {
    compiler_barrier();
    _tile_zero(0);
    if constexpr (B > 1) _tile_zero(1);
    if constexpr (B > 2) _tile_zero(2);
    _tile_loadd(3, codes, 64);
    _tile_loadd(5, columns, 64);
    _tile_dpbusd(0, 3, 5);
    if constexpr (B > 1) _tile_loadd(6, columns + 1024, 64);
    if constexpr (B > 1) _tile_dpbusd(1, 3, 6);
    if constexpr (B > 2) _tile_loadd(7, columns + 2048, 64);
    if constexpr (B > 2) _tile_dpbusd(2, 3, 7);
    _tile_loadd(4, codes + 1024, 64);
    _tile_loadd(5, columns + B * 1024, 64);
    _tile_dpbusd(0, 4, 5);
    if constexpr (B > 1) _tile_loadd(6, columns + (B + 1) * 1024, 64);
    if constexpr (B > 1) _tile_dpbusd(1, 4, 6);
    if constexpr (B > 2) _tile_loadd(7, columns + (B + 2) * 1024, 64);
    if constexpr (B > 2) _tile_dpbusd(2, 4, 7);
    _tile_stored(0, product, 64 * B);
    if constexpr (B > 1) _tile_stored(1, product + 16, 64 * B);
    if constexpr (B > 2) _tile_stored(2, product + 32, 64 * B);
    compiler_barrier();
}

// Adds the products of all channels to the sums, by tiles.
template <int P, int B>
void multiply_tiles(const Linear& w, const Task& task, const Scratch& scratch) {
    constexpr int ROWS = 16;
    const int64_t rows = w.out_features, tiles = w.tiles(), groups = round_up(w.groups, 8);
    const int64_t blocks = (task.last - task.first + ROWS - 1) / ROWS;
    const int16_t* planes = w.planes_of(task.expert);
    float* sums = scratch.sums;
    alignas(64) uint8_t codes[2][2][ROWS][64] = {};
    alignas(64) int32_t product[ROWS][B][16];
    std::memset(sums, 0, sizeof(float) * CHUNK * B * 16);
    const auto unpack = [&](int64_t step) {
        const int64_t tile = step / blocks, begin = task.first + step % blocks * ROWS;
        for (int64_t row = begin; row < begin + ROWS && row < task.last; row += 2) {
            const Codes<P> both = load_codes<P>(planes, tile, row, rows, row + 1 == rows);
            for (int field = 0; field < FIELDS; ++field) {
                uint8_t* at = &codes[step % 2][field / 2][row - begin][field % 2 * 32];
                _mm256_store_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(both.field[field]));
                _mm256_store_si256(reinterpret_cast<__m256i*>(at + 64),
                                   _mm512_extracti64x4_epi64(both.field[field], 1));
            }
            const int16_t* next = planes + ((tile + 1 < tiles ? (tile + 1) * P * rows : CHUNK) + row) * HALF_WORDS;
            for (int plane = 0; plane < P; ++plane)
                _mm_prefetch(reinterpret_cast<const char*>(next + plane * rows * HALF_WORDS), _MM_HINT_T0);
        }
    };
    unpack(0);
    for (int64_t step = 0; step < tiles * blocks; ++step) {  // while 16 rows are multiplied, the next are unpacked
        const int64_t tile = step / blocks, begin = step % blocks * ROWS;
        multiply_block<B>(&codes[step % 2][0][0][0], task.columns + tile * 2 * B * 1024, &product[0][0][0]);
        if (step + 1 < tiles * blocks) unpack(step + 1);
        const int64_t group = tile * TILE / w.group_size;
        for (int row = 0; row < ROWS; ++row) {
            const int64_t pair = (begin + row) / 2;
            const __m512 scale =
                _mm512_set1_ps(scratch.scale[2 * (pair * groups + (group & ~int64_t{7})) + 8 * (row % 2) + group % 8]);
            for (int b = 0; b < B; ++b) {
                float* sum = sums + ((begin + row) * B + b) * 16;
                const __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(product[row][b]));
                _mm512_store_ps(sum, _mm512_fmadd_ps(value, scale, _mm512_load_ps(sum)));
            }
        }
    }
    for (int64_t row = 0; row < task.last - task.first; ++row) {
        const float* sum = sums + row * B * 16;
        for (int64_t m = 0; m < task.count; ++m)
            scratch.total[(row / 2 * task.count + m) * 16 + row % 2 * 8] +=
                sum[3 * m] + 256 * sum[3 * m + 1] + 65536 * sum[3 * m + 2];
    }
}

template <int P>
void multiply_tiles(const Linear& w, const Task& task, const Scratch& scratch) {
    switch (column_tiles(task.count)) {
        case 1: return multiply_tiles<P, 1>(w, task, scratch);
        case 2: return multiply_tiles<P, 2>(w, task, scratch);
        default: return multiply_tiles<P, 3>(w, task, scratch);
    }
}
#else
constexpr bool HAS_TILES = false;

inline void configure_tiles() {}
inline void release_tiles() {}

template <int P>
void multiply_tiles(const Linear&, const Task&, const Scratch&) {}
#endif

// Dequantized weights.
#pragma once

#include "cpu_native.h"

// Numbers as bfloat16 or float32.
inline void store_numbers(uint16_t* at, __m512 numbers) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), to_bfloat(numbers));
}
inline void store_numbers(float* at, __m512 numbers) { _mm512_storeu_ps(at, numbers); }

inline void add_number(uint16_t& to, float number) {
    const __m512 sum = _mm512_add_ps(from_bfloat(_mm256_set1_epi16(to)), _mm512_set1_ps(number));
    to = static_cast<uint16_t>(_mm256_extract_epi16(to_bfloat(sum), 0));
}
inline void add_number(float& to, float number) { to += number; }

// Writes the weights of one row at one tile of channels as bfloat16 or float32: those of position `j` to `target(j)`.
// `codes` are those of two rows, of which it is the first or the second.
template <int P, typename Target>
inline void write_weights(const Linear& w, int64_t expert, int64_t row, int64_t tile, int second, const Codes<P>& codes,
                          const Target& target) {
    const int64_t at = (expert * w.out_features + row) * w.groups + tile * TILE / w.group_size;
    const float scale = half(w.scale[at]);
    const __m512 factor = _mm512_set1_ps(scale),
                 offset = _mm512_set1_ps(-scale * w.zero_point[at] * ZERO_POINT_UNIT[P]);
    const auto write = [&](int position, __m512i code) {
        store_numbers(target(position), _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), factor, offset));
    };
    for (int field = 0; field < FIELDS; ++field) {
        const __m512i both = codes.field[field];
        const __m512i words =
            _mm512_cvtepu16_epi32(second ? _mm512_extracti64x4_epi64(both, 1) : _mm512_castsi512_si256(both));
        write(field, _mm512_and_si512(words, _mm512_set1_epi32(0xFF)));
        write(FIELDS + field, _mm512_srli_epi32(words, 8));
    }
}

// Rows `first` up to `last` of one expert's weight as bfloat16 or float32, with the pool's channels, not its directions.
template <int P, typename T>
void dense(const Linear& w, int64_t expert, int64_t first, int64_t last, T* out, int64_t stride) {
    const int64_t rows = w.out_features, tiles = w.tiles();
    const int16_t* planes = w.planes_of(expert);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t row = first; row < last; row += 2) {
            const bool single = row + 1 == rows;
            const Codes<P> codes = load_codes<P>(planes, tile, row, rows, single);
            for (int i = 0; i < (single ? 1 : 2); ++i) {
                T* mine = out + (row + i) * stride + tile * TILE;
                write_weights<P>(w, expert, row + i, tile, i, codes,
                                 [mine](int position) { return mine + HALF_WORDS * position; });
            }
        }
    }
    for (int64_t slot = w.pool_offset[expert]; slot < w.pool_offset[expert + 1]; ++slot) {
        const int64_t index = w.pool_index[slot];
        if (index >= w.in_features) continue;
        for (int64_t row = first; row < last; ++row)
            add_number(out[row * stride + index], w.pool_scale[slot] * w.pool_value[slot * rows + row]);
    }
}

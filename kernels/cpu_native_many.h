// Products of one expert's weight with many rows of `x`, on the tile registers of AMX: some rows of the weight at a
// time become bfloat16, stay in the cache, and are multiplied with all rows of `x`.
#pragma once

#include "cpu_native_layer.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
constexpr bool HAS_BFLOAT_TILES = true;
#else
constexpr bool HAS_BFLOAT_TILES = false;
#endif

// A weight `(N, K)` of one expert, and `count` rows of inputs as tiles of 16 rows by 32 channels. The pool's slots are
// channels more: an input's channel or direction times the scale, by numbers of eight bits.
class DenseProduct {
public:
    static constexpr int BLOCK = 16, STEP = 32, TILE_NUMBERS = 512;  // rows and channels of a tile

    DenseProduct(const Linear& linear, int64_t expert, int64_t count)
        : w(linear),
          expert(expert),
          count(count),
          steps(w.tiles() * (TILE / STEP) + (w.slots(expert) + STEP - 1) / STEP),
          inputs(allocate<uint16_t>(blocks() * steps * TILE_NUMBERS)),
          result(allocate<float>(blocks() * BLOCK * w.out_features)) {}

    // Writes the rows of one block of inputs; `x(r)` is row `r`.
    template <typename Rows>
    void prepare(int64_t block, const Rows& x) {
        uint16_t* out = &inputs[block * steps * TILE_NUMBERS];
        std::memset(out, 0, 2 * steps * TILE_NUMBERS);
        std::vector<float> slots(w.slots(expert));
        for (int64_t r = block * BLOCK; r < count && r < (block + 1) * BLOCK; ++r) {
            const Numbers row = x(r);
            uint16_t* mine = out + r % BLOCK * 2;
            alignas(32) uint16_t numbers[16];
            const auto write = [&](int64_t channel, __m512 values) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(numbers), to_bfloat(values));
                uint16_t* at = mine + channel / STEP * TILE_NUMBERS + channel % STEP / 2 * 2 * BLOCK;
                for (int pair = 0; pair < 8; ++pair) std::memcpy(at + pair * 2 * BLOCK, numbers + 2 * pair, 4);
            };
            for (int64_t k = 0; k < w.in_features; k += 16) write(k, row.load(k, first_lanes(w.in_features - k)));
            prepare_slots(row, w, expert, slots.data());
            for (int64_t s = 0; s < w.slots(expert); s += 16) {
                const __mmask16 mask = first_lanes(w.slots(expert) - s);
                write(w.tiles() * TILE + s, _mm512_maskz_loadu_ps(mask, slots.data() + s));
            }
        }
    }

    // Rows `first` up to `first + 32` of the weight, by all inputs. `weights` holds `weights_size` numbers.
    void multiply(int64_t first, uint16_t* weights) {
        with_planes(w.num_planes(expert), [&](auto planes) { unpack<planes>(first, weights); });
        int64_t block = 0;
        for (; block + 2 <= blocks(); block += 2) multiply_blocks<2>(first, block, weights);
        if (block < blocks()) multiply_blocks<1>(first, block, weights);
    }

    int64_t blocks() const { return (count + BLOCK - 1) / BLOCK; }
    int64_t weights_size() const { return 2 * steps * TILE_NUMBERS; }
    const float* row(int64_t r) const { return &result[r * w.out_features]; }

private:
    template <int P>
    void unpack(int64_t first, uint16_t* weights) {
        const int64_t rows = w.out_features, last = first + 2 * BLOCK < rows ? first + 2 * BLOCK : rows;
        std::memset(weights + 2 * w.tiles() * (TILE / STEP) * TILE_NUMBERS, 0,
                    4 * (steps - w.tiles() * (TILE / STEP)) * TILE_NUMBERS);
        if (last < first + 2 * BLOCK) std::memset(weights, 0, 2 * weights_size());
        const auto place = [&](int64_t step, int64_t row) {
            return weights + (2 * step + (row - first) / BLOCK) * TILE_NUMBERS + (row - first) % BLOCK * STEP;
        };
        for (int64_t tile = 0; tile < w.tiles(); ++tile) {
            for (int64_t row = first; row < last; row += 2) {
                const bool single = row + 1 == rows;
                const Codes<P> codes = load_codes<P>(w.planes_of(expert), tile, row, rows, single);
                for (int i = 0; i < (single ? 1 : 2); ++i)
                    write_weights<P>(w, expert, row + i, tile, i, codes, [&](int position) {
                        return place(tile * (TILE / STEP) + position / 2, row + i) + position % 2 * 16;
                    });
            }
        }
        // Numbers of eight bits: the upper half of the float is the bfloat16. Two slots' make one word.
        const __m512i places = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(2 * STEP));
        const int8_t* values = w.pool_value + w.first_slot(expert) * rows;
        for (int64_t s = 0; s < w.slots(expert); s += 2) {
            for (int64_t row = first; row < last; row += BLOCK) {
                const __mmask16 mask = first_lanes(last - row), second = s + 1 < w.slots(expert) ? mask : 0;
                const auto bits = [&](int64_t slot, __mmask16 lanes) {
                    const __m128i bytes = _mm_maskz_loadu_epi8(lanes, values + slot * rows + row);
                    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
                };
                const __m512i words = _mm512_or_si512(_mm512_srli_epi32(bits(s, mask), 16), bits(s + 1, second));
                uint16_t* at = place(w.tiles() * (TILE / STEP) + s / STEP, row) + s % STEP;
                _mm512_mask_i32scatter_epi32(at, mask, places, words, 1);
            }
        }
    }

    // Products of 32 rows of the weight with `B` blocks of inputs.
    template <int B>
    void multiply_blocks(int64_t first, int64_t block, const uint16_t* weights) {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
        alignas(64) float product[2][B][BLOCK][BLOCK];
        const uint16_t* x = &inputs[block * steps * TILE_NUMBERS];
        const int64_t next = steps * TILE_NUMBERS;
        compiler_barrier();
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (B > 1) _tile_zero(2);
        if constexpr (B > 1) _tile_zero(3);
        for (int64_t step = 0; step < steps; ++step) {
            _tile_loadd(4, weights + 2 * step * TILE_NUMBERS, 64);
            _tile_loadd(6, x + step * TILE_NUMBERS, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, weights + (2 * step + 1) * TILE_NUMBERS, 64);
            _tile_dpbf16ps(1, 5, 6);
            if constexpr (B > 1) {
                _tile_loadd(7, x + next + step * TILE_NUMBERS, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        _tile_stored(0, product[0][0], 64);
        _tile_stored(1, product[1][0], 64);
        if constexpr (B > 1) _tile_stored(2, product[0][1], 64);
        if constexpr (B > 1) _tile_stored(3, product[1][1], 64);
        compiler_barrier();
        const __m512i column = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(BLOCK));
        for (int half = 0; half < 2; ++half) {
            const int64_t row = first + half * BLOCK;
            const __mmask16 mask = first_lanes(w.out_features - row);
            for (int b = 0; b < B; ++b)
                for (int r = 0; r < BLOCK; ++r)
                    _mm512_mask_storeu_ps(&result[((block + b) * BLOCK + r) * w.out_features + row], mask,
                                          _mm512_i32gather_ps(column, &product[half][b][0][r], 4));
        }
#endif
    }

    const Linear& w;
    const int64_t expert, count, steps;
    const Memory<uint16_t> inputs;
    const Memory<float> result;
};

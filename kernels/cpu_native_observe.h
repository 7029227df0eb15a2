// Sums over rows, by expert and channel: what an observer keeps of a linear's inputs.
#pragma once

#include "cpu_native.h"

// Adds `Σ_r first[r] · |x_r|` and `Σ_r second[r] · x_r²` over some rows to two sums of float64, for up to 128 channels
// from `channel` on. `row(r)` is row `r` of the inputs. Up to 64 rows are summed up in float32.
template <typename Rows>
void add_rows(int64_t count, const Rows& row, const float* first, const float* second, int64_t channel,
              int64_t channels, double* absolute, double* square) {
    constexpr int PARTS = 8;
    constexpr int64_t AT_ONCE = 64;
    __mmask16 mask[PARTS];
    for (int part = 0; part < PARTS; ++part) mask[part] = first_lanes(channels - channel - 16 * part);
    for (int64_t begin = 0; begin < count; begin += AT_ONCE) {
        __m512 sums[PARTS], squares[PARTS];
        for (int part = 0; part < PARTS; ++part) sums[part] = squares[part] = _mm512_setzero_ps();
        for (int64_t r = begin; r < count && r < begin + AT_ONCE; ++r) {
            const Numbers numbers = row(r);
            const __m512 a = _mm512_set1_ps(first[r]), b = _mm512_set1_ps(second[r]);
            for (int part = 0; part < PARTS; ++part) {
                const __m512 x = numbers.load(channel + 16 * part, mask[part]);
                sums[part] = _mm512_fmadd_ps(a, _mm512_abs_ps(x), sums[part]);
                squares[part] = _mm512_fmadd_ps(b, _mm512_mul_ps(x, x), squares[part]);
            }
        }
        for (int part = 0; part < PARTS; ++part) {
            alignas(64) float values[2][16];
            _mm512_store_ps(values[0], sums[part]);
            _mm512_store_ps(values[1], squares[part]);
            for (int64_t i = channel + 16 * part; i < channels && i < channel + 16 * (part + 1); ++i) {
                absolute[i] += values[0][(i - channel) % 16];
                square[i] += values[1][(i - channel) % 16];
            }
        }
    }
}

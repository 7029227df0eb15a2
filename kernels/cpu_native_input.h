// Inputs as integers: a row of `x` is `unit · v` with integers `|v| <= 2**22`, each as three signed bytes, its limbs:
// `v = 65536 · limb[2] + 256 · limb[1] + limb[0]`. The unit is a power of two, so that numbers of bfloat16 and float16
// are exact down to 2**-14 and 2**-11 of the largest one of their row.
#pragma once

#include <cmath>
#include <limits>

#include "cpu_native.h"

// Rows of inputs `(R, K)` as integers.
struct Input {
    int8_t* limbs;  // `(R, tiles, limbs, fields, 32)`, the channels of a field in the order of `Codes`
    float* unit;    // `(R,)`
    float* sums;    // `(R, groups up to the next multiple of 8)`, sums of the integers, zero in the padding

    static constexpr int64_t TILE_BYTES = LIMBS * TILE;
};

// Writes row `r` of `input`. A row with NaN or infinity gets the unit NaN.
inline void prepare_row(const Numbers& x, const Linear& w, int64_t r, const Input& input) {
    const int64_t channels = w.in_features, tiles = w.tiles(), groups = round_up(w.groups, 8);
    __m512 most = _mm512_setzero_ps();
    __mmask16 broken = 0;
    for (int64_t k = 0; k < channels; k += 16) {
        const __m512 values = x.load(k, first_lanes(channels - k));
        most = _mm512_max_ps(most, _mm512_abs_ps(values));
        broken |= _mm512_fpclass_ps_mask(values, 0x99);  // NaN and infinity
    }
    int exponent = 0;
    std::frexp(_mm512_reduce_max_ps(most), &exponent);
    if (exponent < -100) exponent = -100;
    input.unit[r] = broken ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, exponent - 22);
    const __m512 factor = _mm512_set1_ps(std::ldexp(1.0f, 22 - exponent));
    const __m512i shift = _mm512_set1_epi32(0x808080), byte = _mm512_set1_epi32(0xFF);
    int8_t* limbs = input.limbs + r * tiles * Input::TILE_BYTES;
    float* sums = input.sums + r * groups;
    for (int64_t group = 0; group < groups; ++group) sums[group] = 0;
    for (int64_t tile = 0; tile < tiles; ++tile, limbs += Input::TILE_BYTES) {
        __m512i total = _mm512_setzero_si512();
        for (int field = 0; field < FIELDS; ++field) {
            __m512i digits[2];
            for (int upper = 0; upper < 2; ++upper) {
                const int64_t k = tile * TILE + HALF_WORDS * (FIELDS * upper + field);
                const __m512 values = _mm512_mul_ps(x.load(k, first_lanes(channels - k)), factor);
                const __m512i integers = _mm512_maskz_cvtps_epi32(broken ? 0 : 0xFFFF, values);
                total = _mm512_add_epi32(total, integers);
                // bytes from -128 to 127: what `shift` adds to each makes it unsigned, and the exclusive or signed
                // again
                digits[upper] = _mm512_xor_si512(_mm512_add_epi32(integers, shift), shift);
            }
            for (int limb = 0; limb < LIMBS; ++limb) {
                const __m512i low = _mm512_and_si512(_mm512_srli_epi32(digits[0], 8 * limb), byte);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi32(digits[1], 8 * limb), byte);
                const __m256i both = _mm512_cvtepi32_epi16(_mm512_or_si512(low, _mm512_slli_epi32(high, 8)));
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(limbs + limb * TILE + field * 32), both);
            }
        }
        sums[tile * TILE / w.group_size] += static_cast<float>(_mm512_reduce_add_epi32(total));
    }
}

// What each of the expert's pool slots takes from a row of `x`, times its scale.
inline void prepare_slots(const Numbers& x, const Linear& w, int64_t expert, float* slots) {
    const int64_t begin = w.first_slot(expert), end = begin + w.slots(expert);
    for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t index = w.pool_index[slot];
        float value = 0;
        if (index < w.in_features) {
            value = _mm512_cvtss_f32(x.load(index, 1));
        } else {
            const int8_t* direction = w.pool_direction + (index - w.in_features) * w.in_features;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = 0; k < w.in_features; k += 16) {
                const __mmask16 mask = first_lanes(w.in_features - k);
                const __m512 factor =
                    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, direction + k)));
                sum = _mm512_fmadd_ps(factor, x.load(k, mask), sum);
            }
            value = _mm512_reduce_add_ps(sum);
        }
        slots[slot - begin] = w.pool_scale[slot] * value;
    }
}

// Adds the columns of COUNT slots times `slots` to the rows `begin` up to `end` of a result, or begins them so.
// `columns` are of `rows` rows each.
template <int COUNT>
inline void add_columns(const int8_t* columns, int64_t rows, const float* slots, bool first, int64_t begin, int64_t end,
                        float* out) {
    __m512 factor[COUNT];
    for (int i = 0; i < COUNT; ++i) factor[i] = _mm512_set1_ps(slots[i]);
    for (int64_t row = begin; row < end; row += 16) {
        const __mmask16 mask = first_lanes(end - row);
        __m512 sum = first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, out + row);
        for (int i = 0; i < COUNT; ++i) {
            const __m128i column = _mm_maskz_loadu_epi8(mask, columns + i * rows + row);
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(column)), factor[i], sum);
        }
        _mm512_mask_storeu_ps(out + row, mask, sum);
    }
}

// Begins the rows from `begin` up to `end` of `count` results with what the expert's pool slots give: their columns
// times `slots`. Long runs of memory one after the other. Without slots nothing is written.
inline void start_results(const Linear& w, int64_t expert, int64_t count, const float* const* slots, int64_t begin,
                          int64_t end, float* const* out) {
    constexpr int STEP = 4;
    const int64_t last = w.slots(expert), rows = w.out_features;
    const int8_t* columns = w.pool_value + w.first_slot(expert) * rows;
    int64_t slot = 0;
    for (; slot + STEP <= last; slot += STEP)
        for (int64_t m = 0; m < count; ++m)
            add_columns<STEP>(columns + slot * rows, rows, slots[m] + slot, slot == 0, begin, end, out[m]);
    for (; slot < last; ++slot)
        for (int64_t m = 0; m < count; ++m)
            add_columns<1>(columns + slot * rows, rows, slots[m] + slot, slot == 0, begin, end, out[m]);
}

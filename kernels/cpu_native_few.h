// Products of some rows of a packed weight with a few rows of `x` as integers: exact within a group of channels, then
// multiplied with the scale and added up in float32.
#pragma once

#include "cpu_native_input.h"

// Rows `first` up to `last` of one expert's weight, and the rows of `x` that take this expert.
struct Task {
    int64_t expert, first, last, count;
    const int64_t* inputs;  // which rows of `Input`
    const int8_t* columns;  // those rows for the tile registers, or null where vectors are to multiply
    float* const* out;      // where the result's row begins for each
};

// Memory of one thread.
struct Scratch {
    float* scale;  // `(CHUNK / 2, groups up to the next multiple of 8, 2)`, eight groups of two rows after each other
    float* total;  // `(CHUNK / 2, rows of x, 16)`: sums over eight lanes for each of two rows

    float* sums;  // `(CHUNK, 48)`: sums of the tile registers' columns

    static int64_t scale_size(const Linear& w) { return CHUNK * round_up(w.groups, 8); }
    static constexpr int64_t TOTAL_SIZE = CHUNK / 2 * MAX_ROWS * 16, SUMS_SIZE = CHUNK * 48;
};

inline __m128i load_pair(const uint8_t* first, const uint8_t* second, __mmask16 mask) {
    return _mm_unpacklo_epi64(_mm_maskz_loadu_epi8(mask, first),
                              second ? _mm_maskz_loadu_epi8(mask, second) : _mm_setzero_si128());
}

inline __m256i load_pair(const uint16_t* first, const uint16_t* second, __mmask8 mask) {
    return _mm256_set_m128i(second ? _mm_maskz_loadu_epi16(mask, second) : _mm_setzero_si128(),
                            _mm_maskz_loadu_epi16(mask, first));
}

// Writes the scales of a task, and starts its sums with what the zero points take off.
template <int P>
void start(const Linear& w, const Task& task, const Input& input, const Scratch& scratch) {
    const int64_t groups = round_up(w.groups, 8);
    for (int64_t row = task.first; row < task.last; row += 2) {
        const int64_t pair = (row - task.first) / 2, at = (task.expert * w.out_features + row) * w.groups;
        const bool single = row + 1 == w.out_features;
        float* totals = scratch.total + pair * task.count * 16;
        for (int64_t m = 0; m < task.count; ++m) _mm512_store_ps(totals + 16 * m, _mm512_setzero_ps());
        for (int64_t group = 0; group < groups; group += 8) {
            const __mmask8 mask = static_cast<__mmask8>(first_lanes(w.groups - group));
            const uint16_t* scales = w.scale + at + group;
            const uint8_t* zero_points = w.zero_point + at + group;
            const __m512 scale = _mm512_cvtph_ps(load_pair(scales, single ? nullptr : scales + w.groups, mask));
            const __m128i zero = load_pair(zero_points, single ? nullptr : zero_points + w.groups, mask);
            const __m512 unit = _mm512_mul_ps(scale, _mm512_set1_ps(-ZERO_POINT_UNIT[P]));
            const __m512 offset = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zero)), unit);
            _mm512_store_ps(scratch.scale + 2 * (pair * groups + group), scale);
            for (int64_t m = 0; m < task.count; ++m) {
                const __m256 sums = _mm256_loadu_ps(input.sums + task.inputs[m] * groups + group);
                const __m512 total = _mm512_load_ps(totals + 16 * m);
                _mm512_store_ps(totals + 16 * m, _mm512_fmadd_ps(offset, _mm512_broadcast_f32x8(sums), total));
            }
        }
    }
}

// Adds the products of one tile of channels to the sums of `2 · PAIRS` rows from `row` on.
template <int P, int PAIRS>
inline void multiply_tile(const Linear& w, const Task& task, const Input& input, const Scratch& scratch, int64_t tile,
                          int64_t row, const int8_t* const* limbs) {
    const int64_t rows = w.out_features, groups = round_up(w.groups, 8), group = tile * TILE / w.group_size;
    const int64_t first_pair = (row - task.first) / 2;
    // which of eight groups' scales: the first row's in eight lanes, the second's in the others
    const __m512i lanes = _mm512_inserti64x4(_mm512_set1_epi32(group % 8), _mm256_set1_epi32(8 + group % 8), 1);
    __m512i codes[PAIRS][FIELDS];
    __m512 scale[PAIRS];
    for (int pair = 0; pair < PAIRS; ++pair) {
        const int64_t at = row + 2 * pair;
        const Codes<P> loaded = load_codes<P>(w.planes_of(task.expert), tile, at, rows, at + 1 == rows);
        for (int field = 0; field < FIELDS; ++field) codes[pair][field] = loaded.field[field];
        const float* scales = scratch.scale + 2 * ((first_pair + pair) * groups + (group & ~int64_t{7}));
        scale[pair] = _mm512_permutexvar_ps(lanes, _mm512_load_ps(scales));
    }
    for (int64_t m = 0; m < task.count; ++m) {
        __m512i sum[PAIRS][LIMBS] = {};
        for (int field = 0; field < FIELDS; ++field) {
            for (int limb = 0; limb < LIMBS; ++limb) {
                const auto* at =
                    reinterpret_cast<const __m256i*>(limbs[m] + tile * Input::TILE_BYTES + limb * TILE + field * 32);
                const __m512i both = _mm512_broadcast_i64x4(_mm256_load_si256(at));
                for (int pair = 0; pair < PAIRS; ++pair)
                    sum[pair][limb] = _mm512_dpbusd_epi32(sum[pair][limb], codes[pair][field], both);
            }
        }
        for (int pair = 0; pair < PAIRS; ++pair) {
            const __m512 lower = _mm512_cvtepi32_ps(_mm512_add_epi32(sum[pair][0], _mm512_slli_epi32(sum[pair][1], 8)));
            const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[pair][2]), _mm512_set1_ps(65536), lower);
            float* total = scratch.total + ((first_pair + pair) * task.count + m) * 16;
            _mm512_store_ps(total, _mm512_fmadd_ps(value, scale[pair], _mm512_load_ps(total)));
        }
    }
}

// Adds the products of all channels to the sums, by vectors of bytes.
template <int P>
void multiply_vectors(const Linear& w, const Task& task, const Input& input, const Scratch& scratch) {
    const int64_t rows = w.out_features, tiles = w.tiles();
    const int16_t* planes = w.planes_of(task.expert);
    const int8_t* limbs[MAX_ROWS];
    for (int64_t m = 0; m < task.count; ++m) limbs[m] = input.limbs + task.inputs[m] * tiles * Input::TILE_BYTES;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        // Every tile is another run of memory: it is fetched while the one before is in work.
        const int16_t* next = planes + (tile + 1 < tiles ? (tile + 1) * P * rows : CHUNK) * HALF_WORDS;
        const auto fetch = [&](int64_t row) {
            for (int plane = 0; plane < P; ++plane)
                _mm_prefetch(reinterpret_cast<const char*>(next + (plane * rows + row) * HALF_WORDS), _MM_HINT_T0);
        };
        int64_t row = task.first;
        for (; row + 4 <= task.last; row += 4) {
            fetch(row);
            fetch(row + 2);
            multiply_tile<P, 2>(w, task, input, scratch, tile, row, limbs);
        }
        for (; row < task.last; row += 2) {
            fetch(row);
            multiply_tile<P, 1>(w, task, input, scratch, tile, row, limbs);
        }
    }
}

// Eight sums over lanes for each of two rows: 16 numbers in the order of the rows.
inline __m512 add_lanes(const __m512* pairs) {
    __m512 two[4], four[2];
    for (int i = 0; i < 4; ++i)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(pairs[2 * i], pairs[2 * i + 1]),
                               _mm512_unpackhi_ps(pairs[2 * i], pairs[2 * i + 1]));
    for (int i = 0; i < 2; ++i) {
        const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 sums =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xDD));
    const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    return _mm512_permutexvar_ps(order, sums);
}

// Writes the rows of the result: the sums in the input's unit, and what the pool has put there.
inline void finish(const Linear& w, const Task& task, const Input& input, const Scratch& scratch) {
    const bool has_slots = w.slots(task.expert) > 0;
    for (int64_t row = task.first; row < task.last; row += 16) {
        const __mmask16 mask = first_lanes(task.last - row);
        for (int64_t m = 0; m < task.count; ++m) {
            __m512 pairs[8];
            for (int i = 0; i < 8; ++i)
                pairs[i] = _mm512_load_ps(scratch.total + (((row - task.first) / 2 + i) * task.count + m) * 16);
            float* out = task.out[m] + row;
            const __m512 pool = has_slots ? _mm512_maskz_loadu_ps(mask, out) : _mm512_setzero_ps();
            const __m512 unit = _mm512_set1_ps(input.unit[task.inputs[m]]);
            _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(add_lanes(pairs), unit, pool));
        }
    }
}

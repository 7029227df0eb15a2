// What the native CPU kernels share: a packed linear, its codes as bytes, and small conversions.
//
// The 16 half words of two neighbouring rows are one register of 64 bytes. A byte holds four digits, of four positions:
// those of its field `f` in all bytes are 32 channels of each row. The digits of several planes are put together to
// codes, which are unsigned bytes as they stand.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

constexpr int TILE = 128, HALF_WORDS = 16, FIELDS = 4, LIMBS = 3, MAX_ROWS = 16;
constexpr int CHUNK = 128;  // rows of a weight that are computed together
constexpr float ZERO_POINT_UNIT[5] = {0, 1.0f / 64, 1.0f / 16, 1.0f / 4, 1};

// A packed linear `(N, K)` of several experts; see `moe_compiler.kernels.packed`.
struct Linear {
    const int16_t* planes;
    const int32_t* table;
    const uint16_t* scale;
    const uint8_t* zero_point;
    const int32_t* pool_offset;
    const int32_t* pool_index;
    const int8_t* pool_value;
    const float* pool_scale;
    const int8_t* pool_direction;
    int64_t out_features, in_features, groups, group_size;

    int64_t tiles() const { return (in_features + TILE - 1) / TILE; }
    int num_planes(int64_t expert) const { return table[2 * expert]; }
    int64_t first_slot(int64_t expert) const { return pool_offset[expert]; }
    int64_t slots(int64_t expert) const {
        const int64_t count = pool_offset[expert + 1] - pool_offset[expert];
        return count > 0 ? count : 0;
    }
    const int16_t* planes_of(int64_t expert) const {
        return planes + static_cast<int64_t>(table[2 * expert + 1]) * TILE;
    }
};

inline int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

inline float half(uint16_t value) { return _cvtsh_ss(value); }

inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

inline __m256i to_bfloat(__m512 values) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(values);
#else
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
#endif
}

inline __m512 from_bfloat(__m256i values) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

enum class Dtype : int64_t { float32, float16, bfloat16 };

// Numbers of one of three types.
struct Numbers {
    const void* at;
    Dtype dtype;

    Numbers from(int64_t index) const {
        const int64_t bytes = dtype == Dtype::float32 ? 4 : 2;
        return {static_cast<const char*>(at) + bytes * index, dtype};
    }

    __m512 load(int64_t index, __mmask16 mask) const {
        if (dtype == Dtype::float32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(at) + index);
        const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(at) + index);
        return dtype == Dtype::float16 ? _mm512_cvtph_ps(bits) : from_bfloat(bits);
    }
};

// Writes the nearest numbers of a type.
inline void store(void* out, Dtype dtype, int64_t index, __mmask16 mask, __m512 values) {
    if (dtype == Dtype::float32) return _mm512_mask_storeu_ps(static_cast<float*>(out) + index, mask, values);
    const __m256i bits = dtype == Dtype::bfloat16
                             ? to_bfloat(values)
                             : _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + index, mask, bits);
}

// The nearest numbers of that type.
inline __m512 rounded(__m512 values, Dtype dtype) {
    if (dtype == Dtype::float32) return values;
    if (dtype == Dtype::bfloat16) return from_bfloat(to_bfloat(values));
    return _mm512_cvtph_ps(_mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// `mask ? a : b`, bit by bit.
inline __m512i select(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi64(mask, a, b, 0xCA); }

// The low four bits of every byte, and the high ones.
inline __m512i low_nibbles(__m512i words) { return _mm512_and_si512(words, _mm512_set1_epi8(0x0F)); }
inline __m512i high_nibbles(__m512i words) { return low_nibbles(_mm512_srli_epi16(words, 4)); }

// The digits of two planes as nibbles: in `even` those of fields 0 and 2, in `odd` those of 1 and 3.
struct Nibbles {
    __m512i even, odd;

    Nibbles(__m512i high, __m512i low) {
        const __m512i mask = _mm512_set1_epi8(0x33);
        even = select(mask, low, _mm512_slli_epi16(high, 2));
        odd = select(mask, _mm512_srli_epi16(low, 2), high);
    }
};

// The codes of two rows at 128 channels: `field[f]` has those of channels `16 f + i` and `16 (4 + f) + i` of the first
// row in its bytes `2 i` and `2 i + 1`, and 32 bytes on those of the second.
template <int P>
struct Codes {
    __m512i field[FIELDS];

    explicit Codes(const __m512i* plane) {
        if constexpr (P == 1) {
            const __m512i digit = _mm512_set1_epi8(3);
            field[0] = _mm512_and_si512(plane[0], digit);
            field[1] = _mm512_and_si512(_mm512_srli_epi16(plane[0], 2), digit);
            field[2] = _mm512_and_si512(_mm512_srli_epi16(plane[0], 4), digit);
            field[3] = _mm512_and_si512(_mm512_srli_epi16(plane[0], 6), digit);
        } else if constexpr (P == 2) {
            nibbles(Nibbles(plane[0], plane[1]));
        } else if constexpr (P == 3) {
            const __m512i mask = _mm512_set1_epi8(0x30);
            nibbles(Nibbles(plane[1], plane[2]));
            field[0] = select(mask, _mm512_slli_epi16(plane[0], 4), field[0]);
            field[1] = select(mask, _mm512_slli_epi16(plane[0], 2), field[1]);
            field[2] = select(mask, plane[0], field[2]);
            field[3] = select(mask, _mm512_srli_epi16(plane[0], 2), field[3]);
        } else {
            const __m512i mask = _mm512_set1_epi8(0x0F);
            const Nibbles high(plane[0], plane[1]), low(plane[2], plane[3]);
            field[0] = select(mask, low.even, _mm512_slli_epi16(high.even, 4));
            field[1] = select(mask, low.odd, _mm512_slli_epi16(high.odd, 4));
            field[2] = select(mask, _mm512_srli_epi16(low.even, 4), high.even);
            field[3] = select(mask, _mm512_srli_epi16(low.odd, 4), high.odd);
        }
    }

private:
    void nibbles(const Nibbles& both) {
        field[0] = low_nibbles(both.even);
        field[1] = low_nibbles(both.odd);
        field[2] = high_nibbles(both.even);
        field[3] = high_nibbles(both.odd);
    }
};

// The codes of `row` and the row after it, which is nothing where `single`.
template <int P>
inline Codes<P> load_codes(const int16_t* planes, int64_t tile, int64_t row, int64_t rows, bool single) {
    __m512i words[P];
    for (int plane = 0; plane < P; ++plane) {
        const int16_t* at = planes + ((tile * P + plane) * rows + row) * HALF_WORDS;
        words[plane] = single ? _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
                              : _mm512_loadu_si512(at);
    }
    return Codes<P>(words);
}

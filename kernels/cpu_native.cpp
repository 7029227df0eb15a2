// Packed expert linears for x86 CPUs with AVX512-BF16, and AMX where they have it; see `moe_compiler.kernels.cpu_native`,
// which compiles this file.
//
// The 16 half words of two neighbouring rows are one register of 32 16-bit lanes. A digit, or the code that the digits
// of several planes make up, is shifted to the top of a bfloat16's mantissa under a constant exponent, which makes it
// the number `bias + code`, exactly; it is multiplied with the 16 channels that the digit's position stands for.
// What the bias and the zero point add is taken off once per row and group, by the sums of `x`.
#include <immintrin.h>

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int TILE = 128, HALF_WORDS = 16, CHUNK = 32, MAX_ROWS = 16, MAX_VECTOR_ROWS = 4;
constexpr int POSITIONS = TILE / HALF_WORDS, ONE_POSITION = HALF_WORDS * MAX_ROWS;
constexpr int AND_OR = 0xEA;  // (a & b) | c

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
};

template <int AMOUNT>
inline __m512i shift_right(__m512i words) {
    if constexpr (AMOUNT > 0) return _mm512_srli_epi16(words, AMOUNT);
    else if constexpr (AMOUNT < 0) return _mm512_slli_epi16(words, -AMOUNT);
    else return words;
}

// The field of `words` that starts at bit FROM, moved to bit TO, under `rest`.
template <int FROM, int TO, int MASK>
inline __m512i place(__m512i words, __m512i rest) {
    return _mm512_ternarylogic_epi64(shift_right<FROM - TO>(words), _mm512_set1_epi16(MASK), rest, AND_OR);
}

// Two planes merged to nibbles: those of the even positions, and those of the odd ones.
struct Nibbles {
    __m512i even, odd;
};

inline Nibbles merge(__m512i high, __m512i low) {
    const __m512i mask = _mm512_set1_epi16(0x3333);
    const __m512i inverse = _mm512_set1_epi16(static_cast<short>(0xCCCC));
    Nibbles out;
    out.even = _mm512_ternarylogic_epi64(low, mask, _mm512_slli_epi16(_mm512_and_si512(high, mask), 2), AND_OR);
    out.odd = _mm512_ternarylogic_epi64(high, inverse, _mm512_and_si512(_mm512_srli_epi16(low, 2), mask), AND_OR);
    return out;
}

template <int POSITION>
inline __m512i nibble_of(const Nibbles& nibbles) {
    return POSITION % 2 ? nibbles.odd : nibbles.even;
}

// The words of two rows, ready to take codes out.
template <int P>
struct Words {
    __m512i first;
    Nibbles high, low;

    explicit Words(const __m512i* plane) {
        if constexpr (P == 1) first = plane[0];
        if constexpr (P == 2) low = merge(plane[0], plane[1]);
        if constexpr (P == 3) first = plane[0], low = merge(plane[1], plane[2]);
        if constexpr (P == 4) high = merge(plane[0], plane[1]), low = merge(plane[2], plane[3]);
    }

    // `bias + code` as bfloat16; of eight bits the upper or the lower four.
    template <int POSITION, bool UPPER = false>
    inline __m512i codes() const {
        constexpr int NIBBLE = POSITION / 2 * 4;
        if constexpr (P == 1) return place<2 * POSITION, 5, 0x60>(first, _mm512_set1_epi16(0x4080));
        if constexpr (P == 2) return place<NIBBLE, 3, 0x78>(nibble_of<POSITION>(low), _mm512_set1_epi16(0x4180));
        if constexpr (P == 3) {
            const __m512i lower = place<NIBBLE, 1, 0x1E>(nibble_of<POSITION>(low), _mm512_set1_epi16(0x4280));
            return place<2 * POSITION, 5, 0x60>(first, lower);
        }
        const Nibbles& nibbles = UPPER ? high : low;
        return place<NIBBLE, 3, 0x78>(nibble_of<POSITION>(nibbles), _mm512_set1_epi16(0x4180));
    }
};

template <int P>
constexpr float BIAS = P == 1 ? 4 : P == 2 ? 16 : P == 3 ? 64 : 17 * 16;
constexpr float ZERO_POINT_UNIT[5] = {0, 1.0f / 64, 1.0f / 16, 1.0f / 4, 1};

inline float half(uint16_t value) { return _cvtsh_ss(value); }

inline float bfloat(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// One number for the lanes of the first row, another for those of the second.
inline __m512 pair(float first, float second) {
    return _mm512_insertf32x8(_mm512_set1_ps(first), _mm256_set1_ps(second), 1);
}

template <int P, int M, int POSITION>
inline void multiply(const Words<P>& words, const uint16_t* const* x, int64_t k, __m512* upper, __m512* sum) {
    if constexpr (POSITION < 8) {
        const __m512bh code = (__m512bh)words.template codes<POSITION>();
        __m512bh code_upper = code;
        if constexpr (P == 4) code_upper = (__m512bh)words.template codes<POSITION, true>();
        for (int m = 0; m < M; ++m) {
            const __m256i channels = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[m] + k + 16 * POSITION));
            const __m512bh both = (__m512bh)_mm512_broadcast_i64x4(channels);
            sum[m] = _mm512_dpbf16_ps(sum[m], code, both);
            if constexpr (P == 4) upper[m] = _mm512_dpbf16_ps(upper[m], code_upper, both);
        }
        multiply<P, M, POSITION + 1>(words, x, k, upper, sum);
    }
}

template <int P>
inline Words<P> load(const int16_t* planes, int64_t tile, int64_t row, int64_t rows, bool single) {
    __m512i words[P];
    for (int plane = 0; plane < P; ++plane) {
        const int16_t* at = planes + ((tile * P + plane) * rows + row) * HALF_WORDS;
        words[plane] = single ? _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)))
                              : _mm512_loadu_si512(at);
    }
    return Words<P>(words);
}

// Rows `first` up to `last` of one expert, biases included, for M rows of `x`: `result[n - first][m]`.
template <int P, int M>
void few(const Linear& w, int64_t expert, int64_t first, int64_t last, const uint16_t* const* x,
         float (*result)[MAX_ROWS]) {
    const int64_t rows = w.out_features, tiles = (w.in_features + TILE - 1) / TILE;
    const int16_t* planes = w.planes + static_cast<int64_t>(w.table[2 * expert + 1]) * TILE;
    const uint16_t* scale = w.scale + expert * rows * w.groups;
    const int64_t tiles_of_group = w.group_size / TILE;
    __m512 total[CHUNK / 2][M];
    for (auto& one : total)
        for (auto& value : one) value = _mm512_setzero_ps();
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t group = tile / tiles_of_group;
        for (int64_t row = first; row < last; row += 2) {
            const bool single = row + 1 == rows;
            const Words<P> words = load<P>(planes, tile, row, rows, single);
            __m512 sum[M], upper[M];
            for (int m = 0; m < M; ++m) sum[m] = upper[m] = _mm512_setzero_ps();
            multiply<P, M, 0>(words, x, tile * TILE, upper, sum);
            const uint16_t* own = scale + row * w.groups + group;
            const __m512 factor = pair(half(own[0]), single ? 0.0f : half(own[w.groups]));
            for (int m = 0; m < M; ++m) {
                if constexpr (P == 4) sum[m] = _mm512_fmadd_ps(upper[m], _mm512_set1_ps(16), sum[m]);
                __m512& all = total[(row - first) / 2][m];
                all = _mm512_fmadd_ps(sum[m], factor, all);
            }
        }
    }
    for (int64_t row = first; row < last; ++row) {
        for (int m = 0; m < M; ++m) {
            const __m512 both = total[(row - first) / 2][m];
            const __m256 lanes = (row - first) % 2 ? _mm512_extractf32x8_ps(both, 1) : _mm512_castps512_ps256(both);
            float values[8], sum = 0;
            _mm256_storeu_ps(values, lanes);
            for (float value : values) sum += value;
            result[row - first][m] = sum;
        }
    }
}

// Takes off what biases and zero points added, adds the pool and writes `out[m][n]`.
template <int P>
void finish(int count, const Linear& w, int64_t expert, int64_t first, int64_t last, const float (*total)[MAX_ROWS],
            const float* sums, const float* const* slots, float* const* out) {
    const int64_t rows = w.out_features;
    const uint16_t* scale = w.scale + expert * rows * w.groups;
    const uint8_t* zero_point = w.zero_point + expert * rows * w.groups;
    for (int64_t row = first; row < last; ++row) {
        __m512 value = _mm512_load_ps(total[row - first]);
        for (int64_t group = 0; group < w.groups; ++group) {
            const int64_t at = row * w.groups + group;
            const float factor = half(scale[at]) * (BIAS<P> + zero_point[at] * ZERO_POINT_UNIT[P]);
            value = _mm512_fnmadd_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(sums + group * MAX_ROWS), value);
        }
        alignas(64) float values[MAX_ROWS];
        _mm512_store_ps(values, value);
        for (int m = 0; m < count; ++m) out[m][row] = values[m];
    }
    const int64_t begin = w.pool_offset[expert], end = w.pool_offset[expert + 1];
    for (int64_t slot = begin; slot < end; ++slot) {
        const int8_t* value = w.pool_value + slot * rows;
        for (int m = 0; m < count; ++m) {
            const float factor = slots[m][slot - begin];
            float* target = out[m];
            for (int64_t row = first; row < last; ++row) target[row] += factor * value[row];
        }
    }
}

#ifdef __AMX_BF16__
constexpr bool AMX = true;

// GCC does not know that tile instructions read and write memory.
inline void compiler_barrier() { asm volatile("" ::: "memory"); }

// The codes of two rows at every position: rows of a tile of weights, 16 numbers each.
template <int P, int POSITION>
inline void store_codes(const Words<P>& words, uint16_t* low, uint16_t* high) {
    if constexpr (POSITION < POSITIONS) {
        constexpr int at = POSITION * CHUNK * HALF_WORDS;
        _mm512_store_si512(low + at, words.template codes<POSITION>());
        if constexpr (P == 4) _mm512_store_si512(high + at, words.template codes<POSITION, true>());
        store_codes<P, POSITION + 1>(words, low, high);
    }
}

// As `few`, for up to 16 rows of `x`, which `x_tiles` holds as `(tiles, positions, channels / 2, rows, 2)`.
template <int P>
void few_amx(const Linear& w, int64_t expert, int64_t first, int64_t last, const uint16_t* x_tiles,
             float (*total)[MAX_ROWS]) {
    const int64_t rows = w.out_features, tiles = (w.in_features + TILE - 1) / TILE;
    const int16_t* planes = w.planes + static_cast<int64_t>(w.table[2 * expert + 1]) * TILE;
    const uint16_t* scale = w.scale + expert * rows * w.groups;
    const int64_t tiles_of_group = w.group_size / TILE;
    constexpr int BUFFER = POSITIONS * CHUNK * HALF_WORDS, PAIRS_A_STEP = CHUNK / 2 / POSITIONS;
    alignas(64) uint16_t low[2][BUFFER], high[2][P == 4 ? BUFFER : 32];
    alignas(64) float product[2 * CHUNK][MAX_ROWS];
    // The codes of two tiles are in flight: while one is multiplied, the next is unpacked, a few rows at a time.
    const auto unpack = [&](int64_t tile, int step) {
        for (int64_t row = first + 2 * PAIRS_A_STEP * step; row < first + 2 * PAIRS_A_STEP * (step + 1); row += 2) {
            if (row >= last) return;
            const int64_t at = (row - first) * HALF_WORDS;
            store_codes<P, 0>(load<P>(planes, tile, row, rows, row + 1 == rows), low[tile % 2] + at, high[tile % 2] + at);
        }
    };
    for (int step = 0; step < POSITIONS; ++step) unpack(0, step);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        compiler_barrier();
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (P == 4) {
            _tile_zero(5);
            _tile_zero(6);
        }
        for (int position = 0; position < POSITIONS; ++position) {
            const int at = position * CHUNK * HALF_WORDS, half_way = at + CHUNK / 2 * HALF_WORDS;
            _tile_loadd(4, x_tiles + (tile * POSITIONS + position) * ONE_POSITION, 64);
            _tile_loadd(2, low[tile % 2] + at, 32);
            _tile_dpbf16ps(0, 2, 4);
            _tile_loadd(3, low[tile % 2] + half_way, 32);
            _tile_dpbf16ps(1, 3, 4);
            if constexpr (P == 4) {
                _tile_loadd(2, high[tile % 2] + at, 32);
                _tile_dpbf16ps(5, 2, 4);
                _tile_loadd(3, high[tile % 2] + half_way, 32);
                _tile_dpbf16ps(6, 3, 4);
            }
            if (tile + 1 < tiles) unpack(tile + 1, position);
        }
        _tile_stored(0, product[0], 64);
        _tile_stored(1, product[CHUNK / 2], 64);
        if constexpr (P == 4) {
            _tile_stored(5, product[CHUNK], 64);
            _tile_stored(6, product[CHUNK + CHUNK / 2], 64);
        }
        compiler_barrier();
        const uint16_t* own = scale + first * w.groups + tile / tiles_of_group;
        for (int64_t row = 0; row < last - first; ++row) {
            __m512 sum = _mm512_load_ps(product[row]);
            if constexpr (P == 4) sum = _mm512_fmadd_ps(_mm512_load_ps(product[CHUNK + row]), _mm512_set1_ps(16), sum);
            const __m512 factor = _mm512_set1_ps(half(own[row * w.groups]));
            _mm512_store_ps(total[row], _mm512_fmadd_ps(sum, factor, _mm512_load_ps(total[row])));
        }
    }
}

// Tiles 0, 1, 5, 6: 16 rows of the result; 2, 3: 16 rows of weights by 16 channels; 4: 8 pairs of channels by 16 rows of x.
inline void configure_tiles() {
    alignas(64) struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 32, 32, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 8, 16, 16};
    } config;
    _tile_loadconfig(&config);
}
#else
constexpr bool AMX = false;
#endif

// Rows `first` up to `last` of one expert for up to 16 rows of `x`.
template <int P>
void few_rows(int count, const Linear& w, int64_t expert, int64_t first, int64_t last, const uint16_t* const* x,
              const uint16_t* x_tiles, const float* sums, const float* const* slots, float* const* out) {
    alignas(64) float total[CHUNK][MAX_ROWS] = {};
    for (int64_t slot = w.pool_offset[expert]; slot < w.pool_offset[expert + 1]; ++slot)
        _mm_prefetch(reinterpret_cast<const char*>(w.pool_value + slot * w.out_features + first), _MM_HINT_T0);
#ifdef __AMX_BF16__
    few_amx<P>(w, expert, first, last, x_tiles, total);
#else
    for (int m = 0; m < count; m += MAX_VECTOR_ROWS) {
        auto* result = reinterpret_cast<float(*)[MAX_ROWS]>(&total[0][m]);
        switch (count - m) {
        case 1: few<P, 1>(w, expert, first, last, x + m, result); break;
        case 2: few<P, 2>(w, expert, first, last, x + m, result); break;
        case 3: few<P, 3>(w, expert, first, last, x + m, result); break;
        default: few<P, MAX_VECTOR_ROWS>(w, expert, first, last, x + m, result);
        }
    }
#endif
    finish<P>(count, w, expert, first, last, total, sums, slots, out);
}

template <int P, int POSITION>
inline void expand(const Words<P>& words, const __m512* factor, const __m512* offset, uint16_t* const* out, bool single) {
    if constexpr (POSITION < 8) {
        const __m512i code = words.template codes<POSITION>();
        __m512i code_upper = code;
        if constexpr (P == 4) code_upper = words.template codes<POSITION, true>();
        for (int row = 0; row < (single ? 1 : 2); ++row) {
            const auto wide = [row](__m512i values) {
                const __m256i mine = row ? _mm512_extracti64x4_epi64(values, 1) : _mm512_castsi512_si256(values);
                return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(mine), 16));
            };
            __m512 value = wide(code);
            if constexpr (P == 4) value = _mm512_fmadd_ps(wide(code_upper), _mm512_set1_ps(16), value);
            const __m512 weight = _mm512_fmadd_ps(value, factor[row], offset[row]);
            const __m256i result = (__m256i)_mm512_cvtneps_pbh(weight);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[row] + 16 * POSITION), result);
        }
        expand<P, POSITION + 1>(words, factor, offset, out, single);
    }
}

template <int P>
void dense(const Linear& w, int64_t expert, int64_t first, int64_t last, uint16_t* out, int64_t stride) {
    const int64_t rows = w.out_features, tiles = (w.in_features + TILE - 1) / TILE;
    const int16_t* planes = w.planes + static_cast<int64_t>(w.table[2 * expert + 1]) * TILE;
    const int64_t tiles_of_group = w.group_size / TILE;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t row = first; row < last; row += 2) {
            const bool single = row + 1 == rows;
            __m512 factor[2], offset[2];
            uint16_t* target[2];
            for (int i = 0; i < (single ? 1 : 2); ++i) {
                const int64_t at = (expert * rows + row + i) * w.groups + tile / tiles_of_group;
                const float scale = half(w.scale[at]);
                factor[i] = _mm512_set1_ps(scale);
                offset[i] = _mm512_set1_ps(-scale * (BIAS<P> + w.zero_point[at] * ZERO_POINT_UNIT[P]));
                target[i] = out + (row + i) * stride + tile * TILE;
            }
            expand<P, 0>(load<P>(planes, tile, row, rows, single), factor, offset, target, single);
        }
    }
    for (int64_t slot = w.pool_offset[expert]; slot < w.pool_offset[expert + 1]; ++slot) {
        const int64_t index = w.pool_index[slot];
        if (index >= w.in_features) continue;
        for (int64_t row = first; row < last; ++row) {
            uint16_t& weight = out[row * stride + index];
            weight = rounded(bfloat(weight) + w.pool_scale[slot] * w.pool_value[slot * rows + row]);
        }
    }
}

}  // namespace

// Asks the operating system for the tile registers; 0 if there are none to be had.
extern "C" int prepare() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return !AMX || syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Rows of `x` in blocks of one expert each. `blocks` `(B, 3)`: expert, first row, number of rows (1 to 16). `x`
// `(R, stride)` bfloat16 with zeros past the input features, `stride` a multiple of 128. Scratch: `x_tiles` `(B, 16,
// stride)`; `sums` `(B, groups, 16)`; `slots` `(R, most)`, `most` the largest number of slots of an expert. `out`
// `(R, N)` float32.
extern "C" void packed_rows(const Linear* linear, const int64_t* blocks, int64_t num_blocks, const uint16_t* x,
                            int64_t stride, uint16_t* x_tiles, float* sums, float* slots, int64_t most, float* out,
                            int64_t threads) {
    const Linear& w = *linear;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t expert = blocks[3 * block], begin = w.pool_offset[expert], end = w.pool_offset[expert + 1];
        for (int64_t r = blocks[3 * block + 1]; r < blocks[3 * block + 1] + blocks[3 * block + 2]; ++r) {
            const uint16_t* row = x + r * stride;
            if (AMX) {
                uint16_t* mine = x_tiles + block * MAX_ROWS * stride + 2 * (r - blocks[3 * block + 1]);
                for (int64_t k = 0; k < stride; k += 2) std::memcpy(mine + k * MAX_ROWS, row + k, 4);
            }
            for (int64_t group = 0; group < w.groups; ++group) {
                const int64_t last = (group + 1) * w.group_size < stride ? (group + 1) * w.group_size : stride;
                float sum = 0;
                for (int64_t k = group * w.group_size; k < last; ++k) sum += bfloat(row[k]);
                sums[(block * w.groups + group) * MAX_ROWS + r - blocks[3 * block + 1]] = sum;
            }
            for (int64_t slot = begin; slot < end; ++slot) {
                const int64_t index = w.pool_index[slot];
                float value = 0;
                if (index < w.in_features) {
                    value = bfloat(row[index]);
                } else {
                    const int8_t* direction = w.pool_direction + (index - w.in_features) * w.in_features;
                    for (int64_t k = 0; k < w.in_features; ++k) value += direction[k] * bfloat(row[k]);
                }
                slots[r * most + slot - begin] = w.pool_scale[slot] * value;
            }
        }
    }
    const int64_t chunks = (w.out_features + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads)
    {
#ifdef __AMX_BF16__
    configure_tiles();
#endif
#pragma omp for schedule(static)
    for (int64_t task = 0; task < num_blocks * chunks; ++task) {
        const int64_t* block = blocks + 3 * (task / chunks);
        const int64_t first = task % chunks * CHUNK;
        const int64_t last = first + CHUNK < w.out_features ? first + CHUNK : w.out_features;
        const uint16_t* rows[MAX_ROWS];
        const float* row_slots[MAX_ROWS];
        float* target[MAX_ROWS];
        for (int64_t m = 0; m < block[2]; ++m) {
            const int64_t r = block[1] + m;
            rows[m] = x + r * stride;
            row_slots[m] = slots + r * most;
            target[m] = out + r * w.out_features;
        }
        const int count = static_cast<int>(block[2]);
        const uint16_t* own = x_tiles + task / chunks * MAX_ROWS * stride;
        const float* own_sums = sums + task / chunks * w.groups * MAX_ROWS;
        switch (w.table[2 * block[0]]) {
        case 1: few_rows<1>(count, w, block[0], first, last, rows, own, own_sums, row_slots, target); break;
        case 2: few_rows<2>(count, w, block[0], first, last, rows, own, own_sums, row_slots, target); break;
        case 3: few_rows<3>(count, w, block[0], first, last, rows, own, own_sums, row_slots, target); break;
        default: few_rows<4>(count, w, block[0], first, last, rows, own, own_sums, row_slots, target);
        }
    }
#ifdef __AMX_BF16__
    _tile_release();
#endif
    }
}

// The weight of one expert with the pool's channels, not its directions, `(N, stride)` bfloat16; `stride` is a multiple of 128, and what is
// past the input features has no meaning.
extern "C" void dequantize(const Linear* linear, int64_t expert, uint16_t* out, int64_t stride, int64_t threads) {
    const Linear& w = *linear;
    const int64_t chunks = (w.out_features + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = chunk * CHUNK;
        const int64_t last = first + CHUNK < w.out_features ? first + CHUNK : w.out_features;
        switch (w.table[2 * expert]) {
        case 1: dense<1>(w, expert, first, last, out, stride); break;
        case 2: dense<2>(w, expert, first, last, out, stride); break;
        case 3: dense<3>(w, expert, first, last, out, stride); break;
        default: dense<4>(w, expert, first, last, out, stride);
        }
    }
}

// Packed experts for x86 CPUs with AVX512-VNNI; see `moe_compiler.kernels.cpu_native`, which compiles this file.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "cpu_native_activation.h"
#include "cpu_native_dense.h"
#include "cpu_native_many.h"
#include "cpu_native_observe.h"

namespace {

// Whether the operating system lends this process the tile registers; asks once.
bool may_use_tiles() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = HAS_TILES && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
}

// Biases `(E, N)`, or none.
struct Bias {
    Numbers numbers;
    int64_t out_features;

    __m512 add(__m512 values, int64_t expert, int64_t row, __mmask16 mask) const {
        return numbers.at ? _mm512_add_ps(values, numbers.load(expert * out_features + row, mask)) : values;
    }
};

// Hidden states that the caller wants as well, `(R, I)`, or none.
struct Kept {
    void* at;
    Dtype dtype;
    int64_t intermediate;

    void keep(int64_t row, int64_t i, __mmask16 mask, __m512 values) const {
        if (at) store(at, dtype, row * intermediate + i, mask, values);
    }
};

// The hidden state of one row, rounded to `dtype`, from its gate and up projections; it is kept as row `row`.
void gate(const float* gate_up, const Bias& bias, int64_t expert, int64_t intermediate, Activation activation,
          Dtype dtype, float* out, const Kept& kept, int64_t row) {
    for (int64_t i = 0; i < intermediate; i += 16) {
        const __mmask16 mask = first_lanes(intermediate - i);
        const __m512 gate = bias.add(_mm512_maskz_loadu_ps(mask, gate_up + i), expert, i, mask);
        const int64_t at = intermediate + i;
        const __m512 up = bias.add(_mm512_maskz_loadu_ps(mask, gate_up + at), expert, at, mask);
        const __m512 hidden = rounded(_mm512_mul_ps(activated(gate, activation), up), dtype);
        _mm512_mask_storeu_ps(out + i, mask, hidden);
        kept.keep(row, i, mask, hidden);
    }
}

}  // namespace

// Rows of experts' linears: `out` `(R, N)` float32, zero for ids of `E` or more.
//
// `ids` `(R,)`, `num_experts` `E`; `x` `(R / repeat, K)`, of which row `r` reads row `r / repeat`; `bias` `(E, N)` or
// null.
extern "C" void packed_linear(const Linear* linear, const int64_t* ids, int64_t rows, int64_t num_experts,
                              const void* x, int64_t dtype, int64_t repeat, const void* bias, int64_t bias_dtype,
                              float* out, int64_t threads) {
    const Linear& w = *linear;
    const Plan plan(ids, rows, num_experts);
    const Numbers inputs{x, static_cast<Dtype>(dtype)};
    const Bias biases{{bias, static_cast<Dtype>(bias_dtype)}, w.out_features};
    std::vector<int64_t> source;
    for (const int64_t row : plan.order) source.push_back(row / repeat);
    Product product(w, plan, rows / repeat, std::move(source), may_use_tiles());
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        product.prepare([&](int64_t r) { return inputs.from(r * w.in_features); });
        product.multiply();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t n = 0; n < w.out_features; n += 16) {
                const __mmask16 mask = first_lanes(w.out_features - n);
                __m512 value = _mm512_setzero_ps();
                if (plan.place[r] >= 0)
                    value = biases.add(_mm512_maskz_loadu_ps(mask, product.row(plan.place[r]) + n), ids[r], n, mask);
                _mm512_mask_storeu_ps(out + r * w.out_features + n, mask, value);
            }
        }
    }
}

// All experts of a layer: `out` `(T, H)` from `x` `(T, H)`, `ids` and `weights` `(T, k)`. `hidden_out`, if not null, is
// given the hidden states `(R, I)` in the type of `x`, but for ids of `E` or more.
extern "C" void packed_experts(const Linear* gate_up, const Linear* down, const int64_t* ids, const float* weights,
                               int64_t tokens, int64_t top_k, int64_t num_experts, const void* x, int64_t dtype,
                               const void* gate_up_bias, int64_t gate_up_bias_dtype, const void* down_bias,
                               int64_t down_bias_dtype, int64_t activation, void* hidden_out, void* out,
                               int64_t out_dtype, int64_t threads) {
    const Plan plan(ids, tokens * top_k, num_experts);
    const int64_t hidden_size = gate_up->in_features, intermediate = down->in_features;
    const auto type = static_cast<Dtype>(dtype);
    const Numbers inputs{x, type};
    const Bias first_bias{{gate_up_bias, static_cast<Dtype>(gate_up_bias_dtype)}, 2 * intermediate};
    const Bias second_bias{{down_bias, static_cast<Dtype>(down_bias_dtype)}, hidden_size};
    const Kept kept{hidden_out, type, intermediate};
    std::vector<int64_t> token, place;
    for (int64_t p = 0; p < plan.rows(); ++p) {
        token.push_back(plan.order[p] / top_k);
        place.push_back(p);
    }
    Product first(*gate_up, plan, tokens, std::move(token), may_use_tiles());
    Product second(*down, plan, plan.rows(), std::move(place), may_use_tiles());
    const auto hidden = allocate<float>(plan.rows() * intermediate);
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
        first.prepare([&](int64_t r) { return inputs.from(r * hidden_size); });
        first.multiply();
#pragma omp for schedule(static)
        for (int64_t p = 0; p < plan.rows(); ++p) {
            gate(first.row(p), first_bias, ids[plan.order[p]], intermediate, static_cast<Activation>(activation), type,
                 &hidden[p * intermediate], kept, plan.order[p]);
        }
        second.prepare([&](int64_t p) { return Numbers{hidden.get() + p * intermediate, Dtype::float32}; });
        second.multiply();
        constexpr int64_t PART = 256;  // columns that a thread adds up at a time
        const int64_t parts = (hidden_size + PART - 1) / PART;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tokens * parts; ++task) {
            const int64_t t = task / parts, begin = task % parts * PART;
            for (int64_t n = begin; n < begin + PART && n < hidden_size; n += 16) {
                const __mmask16 mask = first_lanes(hidden_size - n);
                __m512 sum = _mm512_setzero_ps();
                for (int64_t r = t * top_k; r < (t + 1) * top_k; ++r) {
                    if (plan.place[r] < 0) continue;
                    const __m512 value = _mm512_maskz_loadu_ps(mask, second.row(plan.place[r]) + n);
                    sum = _mm512_fmadd_ps(second_bias.add(value, ids[r], n, mask), _mm512_set1_ps(weights[r]), sum);
                }
                store(out, static_cast<Dtype>(out_dtype), t * hidden_size + n, mask, sum);
            }
        }
    }
}

// Whether `packed_experts_many` can be called.
extern "C" int64_t has_many() { return HAS_BFLOAT_TILES && may_use_tiles(); }

// Adds experts with many rows to the layer's output `out` `(T, H)` float32. `blocks` `(B, 3)`: expert, and the first
// and the number of its rows in `order`, whose entries are places in `weights` `(T, k)`. `x` `(T, H)` is bfloat16, as
// are the hidden states that `hidden_out` `(R, I)` is given, if it is not null.
extern "C" void packed_experts_many(const Linear* gate_up, const Linear* down, const int64_t* blocks,
                                    int64_t num_blocks, const int64_t* order, const float* weights, int64_t top_k,
                                    const void* x, const void* gate_up_bias, int64_t gate_up_bias_dtype,
                                    const void* down_bias, int64_t down_bias_dtype, int64_t activation,
                                    void* hidden_out, float* out, int64_t threads) {
    constexpr int64_t ROWS = 2 * DenseProduct::BLOCK;
    const int64_t hidden_size = gate_up->in_features, intermediate = down->in_features;
    const Numbers inputs{x, Dtype::bfloat16};
    const Bias first_bias{{gate_up_bias, static_cast<Dtype>(gate_up_bias_dtype)}, 2 * intermediate};
    const Bias second_bias{{down_bias, static_cast<Dtype>(down_bias_dtype)}, hidden_size};
    const Kept kept{hidden_out, Dtype::bfloat16, intermediate};
    for (const int64_t* block = blocks; block < blocks + 3 * num_blocks; block += 3) {
        const int64_t expert = block[0], count = block[2], *rows = order + block[1];
        DenseProduct first(*gate_up, expert, count), second(*down, expert, count);
        const auto hidden = allocate<float>(count * intermediate);
#pragma omp parallel num_threads(static_cast<int>(threads))
        {
            const auto scratch = allocate<uint16_t>(std::max(first.weights_size(), second.weights_size()));
            configure_tiles();
#pragma omp for schedule(static)
            for (int64_t b = 0; b < first.blocks(); ++b)
                first.prepare(b, [&](int64_t r) { return inputs.from(rows[r] / top_k * hidden_size); });
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < gate_up->out_features; row += ROWS) first.multiply(row, scratch.get());
#pragma omp for schedule(static)
            for (int64_t b = 0; b < second.blocks(); ++b) {
                for (int64_t r = b * DenseProduct::BLOCK; r < count && r < (b + 1) * DenseProduct::BLOCK; ++r)
                    gate(first.row(r), first_bias, expert, intermediate, static_cast<Activation>(activation),
                         Dtype::bfloat16, &hidden[r * intermediate], kept, rows[r]);
                second.prepare(b, [&](int64_t r) { return Numbers{&hidden[r * intermediate], Dtype::float32}; });
            }
#pragma omp for schedule(dynamic)
            for (int64_t row = 0; row < down->out_features; row += ROWS) second.multiply(row, scratch.get());
            release_tiles();
#pragma omp for schedule(static)
            for (int64_t n = 0; n < hidden_size; n += 16) {  // a thread has its own columns: rows may be of one token
                const __mmask16 mask = first_lanes(hidden_size - n);
                for (int64_t r = 0; r < count; ++r) {
                    float* sum = out + rows[r] / top_k * hidden_size + n;
                    const __m512 value =
                        second_bias.add(_mm512_maskz_loadu_ps(mask, second.row(r) + n), expert, n, mask);
                    const __m512 before = _mm512_maskz_loadu_ps(mask, sum);
                    _mm512_mask_storeu_ps(sum, mask, _mm512_fmadd_ps(value, _mm512_set1_ps(weights[rows[r]]), before));
                }
            }
        }
    }
}

namespace {

template <typename T>
void dequantize_to(const Linear& w, int64_t expert, T* out, int64_t stride, int64_t threads) {
    constexpr int64_t ROWS = 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < w.out_features; first += ROWS) {
        const int64_t last = first + ROWS < w.out_features ? first + ROWS : w.out_features;
        with_planes(w.num_planes(expert), [&](auto planes) { dense<planes>(w, expert, first, last, out, stride); });
    }
}

}  // namespace

// The weight of one expert with the pool's channels, not its directions, `(N, stride)` bfloat16 or float32; `stride` is
// a multiple of 128, and what is past the input features has no meaning.
extern "C" void dequantize(const Linear* linear, int64_t expert, void* out, int64_t dtype, int64_t stride,
                           int64_t threads) {
    if (static_cast<Dtype>(dtype) == Dtype::bfloat16)
        dequantize_to(*linear, expert, static_cast<uint16_t*>(out), stride, threads);
    else
        dequantize_to(*linear, expert, static_cast<float*>(out), stride, threads);
}

// What an original weight `(N, stride)` exceeds that of one expert by, all of it bfloat16; as `dequantize`.
extern "C" void subtract_weight(const Linear* linear, int64_t expert, const uint16_t* original, uint16_t* out,
                                int64_t stride, int64_t threads) {
    const Linear& w = *linear;
    constexpr int64_t ROWS = 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < w.out_features; first += ROWS) {
        const int64_t last = first + ROWS < w.out_features ? first + ROWS : w.out_features;
        with_planes(w.num_planes(expert), [&](auto planes) { dense<planes>(w, expert, first, last, out, stride); });
        const Numbers left{original, Dtype::bfloat16}, base{out, Dtype::bfloat16};
        for (int64_t i = first * stride; i < last * stride; i += 16)
            store(out, Dtype::bfloat16, i, 0xFFFF, _mm512_sub_ps(left.load(i, 0xFFFF), base.load(i, 0xFFFF)));
    }
}

// Adds to `absolute` and `square` `(E, K)` what `add_rows` does. `x` is `(R / repeat, K)`, of which row `r` reads row
// `r / repeat`; `order` holds the rows of expert 0, 1, ..., those of expert `e` from `starts[e]` up to `starts[e + 1]`,
// and `first` and `second` are in that order.
extern "C" void observe(const void* x, int64_t dtype, int64_t channels, int64_t repeat, const int64_t* order,
                        const int64_t* starts, int64_t num_experts, const float* first, const float* second,
                        double* absolute, double* square, int64_t threads) {
    constexpr int64_t PART = 128;
    const Numbers inputs{x, static_cast<Dtype>(dtype)};
    const int64_t parts = (channels + PART - 1) / PART;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < num_experts * parts; ++task) {
        const int64_t expert = task / parts, start = starts[expert];
        const auto row = [&](int64_t r) { return inputs.from(order[start + r] / repeat * channels); };
        add_rows(starts[expert + 1] - start, row, first + start, second + start, task % parts * PART, channels,
                 absolute + expert * channels, square + expert * channels);
    }
}

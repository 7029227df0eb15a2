// `act(gate) · up` by vectors; see `moe_compiler.kernels.activation`.
#pragma once

#include <cmath>
#include <initializer_list>

#include "cpu_native.h"

enum class Activation : int64_t { silu, gelu, gelu_tanh, relu };

// To about one unit in the last place: `2**n · e**r`, `|r| <= log(2) / 2`, and a Taylor polynomial for the latter.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-104), _mm512_min_ps(_mm512_set1_ps(104), x));  // NaN stays NaN
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(sum, n);
}

// `x / (1 + e**-y)`
inline __m512 times_sigmoid(__m512 x, __m512 y) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), y))));
}

inline __m512 activated(__m512 x, Activation activation) {
    if (activation == Activation::relu) return _mm512_max_ps(_mm512_setzero_ps(), x);
    if (activation == Activation::silu) return times_sigmoid(x, x);
    if (activation == Activation::gelu_tanh) {  // (1 + tanh(y / 2)) / 2 is the logistic function of y
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
        const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
        return times_sigmoid(x, _mm512_mul_ps(inner, _mm512_set1_ps(1.59576912f)));
    }
    alignas(64) float values[16];
    _mm512_store_ps(values, x);
    for (float& value : values) value = 0.5f * value * (1 + std::erf(value * 0.70710678f));
    return _mm512_load_ps(values);
}

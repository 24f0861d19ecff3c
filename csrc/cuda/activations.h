/* activations.h: functions of one number, for `unary` and for the ends of other kernels.
 * Reference: pyengine/ops/elementwise.py: activation. */
#ifndef PE_CUDA_ACTIVATIONS_H
#define PE_CUDA_ACTIVATIONS_H

#include "cuda.h"

namespace pe {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* x Phi(x) in its tanh form: (1 + tanh u) / 2 = 1 / (1 + e^-2u), 2u = x (1.59576912 + 0.0713548163 x^2). */
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = x * fmaf(x * x, 0.0713548163f, 1.59576912f);
  return x / (1.0f + expf(-u));
}

/* One of PE_UNARY_KIND_*, which must be a constant. A NaN stays a NaN. */
template <int KIND>
__device__ __forceinline__ float activate(float x) {
  const float positive = x < 0.0f ? 0.0f : x; /* in this form NaN stays NaN */
  switch (KIND) {
    case PE_UNARY_KIND_SILU: return x / (1.0f + expf(-x));
    case PE_UNARY_KIND_GELU_TANH: return gelu_tanh(x);
    case PE_UNARY_KIND_GELU: return fmaf(0.5f * x, erff(x * 0.707106781f), 0.5f * x);
    case PE_UNARY_KIND_RELU: return positive;
    case PE_UNARY_KIND_QUICK_GELU: return x / (1.0f + expf(-1.702f * x));
    case PE_UNARY_KIND_RELU2: return positive * positive;
    case PE_UNARY_KIND_SIGMOID: return sigmoid(x);
    case PE_UNARY_KIND_TANH: return tanhf(x);
    case PE_UNARY_KIND_EXP: return expf(x);
    case PE_UNARY_KIND_LOG: return logf(x);
    case PE_UNARY_KIND_SQRT: return sqrtf(x);
    case PE_UNARY_KIND_NEG: return -x;
    case PE_UNARY_KIND_SQUARE: return x * x;
    default: return x;
  }
}

} // namespace pe

#endif

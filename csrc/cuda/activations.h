/* activations.h: functions of one number, for `unary` and for the ends of other kernels.
 * Reference: pyengine/ops/elementwise.py: activation.
 *
 * Formulas, polynomials and the order of operations are those of csrc/cpu/simd.h, so results are the CPU's to the bit: what is rounded to
 * 8 bits next is the same number on both. e^x takes 15 instructions. */
#ifndef PE_CUDA_ACTIVATIONS_H
#define PE_CUDA_ACTIVATIONS_H

#include "cuda.h"

namespace pe {

/* a + b x + .. + g x^6 */
__device__ __forceinline__ float poly5(float x, float a, float b, float c, float d, float e) {
  return fmaf(fmaf(fmaf(fmaf(e, x, d), x, c), x, b), x, a);
}
__device__ __forceinline__ float poly7(float x, float a, float b, float c, float d, float e, float f, float g) {
  return fmaf(fmaf(poly5(x, c, d, e, f, g), x, b), x, a);
}

/* e^x: relative error < 1.2e-7; 0 below -86.9, inf above 88.72, NaN for NaN. x = n ln 2 + r. */
__device__ __forceinline__ float exp_of(float x) {
  float t = x > 89.0f ? 89.0f : x;
  t = t < -88.0f ? -88.0f : t;
  const int n = __float2int_rn(t * 1.44269504f);
  const float part = static_cast<float>(n), r = fmaf(part, 2.12194440e-4f, fmaf(part, -0.693359375f, t));
  const float y = fmaf(r * r, poly5(r, 0.5f, 0.166665129f, 0.0416661873f, 0.00836959841f, 0.00139517172f), r);
  const float scale = __int_as_float((n + 126) << 23), half = fmaf(y, scale, scale);
  return x < -86.9f ? 0.0f : half + half;
}

/* An odd polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere. */
__device__ __forceinline__ float tanh_of(float x) {
  const float a = fabsf(x), z = x * x;
  if (a < 0.64f) return fmaf(x * z, poly5(z, -0.333332718f, 0.133311452f, -0.0537134628f, 0.0205496037f, -0.00560155155f), x);
  return copysignf(1.0f - 2.0f / (exp_of(a + a) + 1.0f), x);
}

/* Absolute error < 2e-7: an odd polynomial below 0.95, 1 - e^(-x p(x)) up to 4, 1 beyond. */
__device__ __forceinline__ float erf_of(float x) {
  const float a = fabsf(x), t = a > 4.0f ? 4.0f : a;
  if (a < 0.95f)
    return x * poly7(x * x, 1.12837917f, -0.376126271f, 0.112836002f, -0.0268544446f, 0.00518953534f, -0.000802084128f, 7.88911952e-05f);
  return copysignf(1.0f - exp_of(-(t * poly7(t, 1.12864097f, 0.63518149f, 0.106187626f, -0.0237201998f, 0.00362292567f,
                                             -0.000318061476f, 1.07633607e-05f))), x);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }
__device__ __forceinline__ float capped(float x, float cap) { return cap * tanh_of(x / cap); }

/* x Phi(x) in its tanh form: (1 + tanh u) / 2 = 1 / (1 + e^-2u), 2u = x (1.59576912 + 0.0713548163 x^2). */
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = x * fmaf(x * x, 0.0713548163f, 1.59576912f);
  return x / (1.0f + exp_of(-u));
}

/* log(1 + x) for 0 <= x <= 1 without losing the digits of a small x: log(u) x / (u - 1) for u = 1 + x as it is rounded (Kahan). */
__device__ __forceinline__ float log_of_one_and(float x) {
  const float u = 1.0f + x;
  return u == 1.0f ? x : logf(u) * (x / (u - 1.0f));
}

/* One of PE_UNARY_KIND_*, which must be a constant. A NaN stays a NaN. */
template <int KIND>
__device__ __forceinline__ float activate(float x) {
  const float positive = x < 0.0f ? 0.0f : x; /* in this form NaN stays NaN */
  switch (KIND) {
    case PE_UNARY_KIND_SILU: return x / (1.0f + exp_of(-x));
    case PE_UNARY_KIND_GELU_TANH: return gelu_tanh(x);
    case PE_UNARY_KIND_GELU: return fmaf(0.5f * x, erf_of(x * 0.707106781f), 0.5f * x);
    case PE_UNARY_KIND_RELU: return positive;
    case PE_UNARY_KIND_QUICK_GELU: return x / (1.0f + exp_of(x * -1.702f));
    case PE_UNARY_KIND_RELU2: return positive * positive;
    case PE_UNARY_KIND_SIGMOID: return sigmoid(x);
    case PE_UNARY_KIND_TANH: return tanh_of(x);
    case PE_UNARY_KIND_EXP: return exp_of(x);
    case PE_UNARY_KIND_LOG: return logf(x);
    case PE_UNARY_KIND_SQRT: return sqrtf(x);
    case PE_UNARY_KIND_NEG: return -x;
    case PE_UNARY_KIND_SQUARE: return x * x;
    case PE_UNARY_KIND_SOFTPLUS: return positive + log_of_one_and(exp_of(-fabsf(x)));
    default: return x;
  }
}

} // namespace pe

#endif

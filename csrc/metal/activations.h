/* activations.h: functions of one number, for elementwise.metal and for products that end in them.
 *
 * Formulas and polynomials are those of csrc/cpu/simd.h, so that both backends round alike up to Metal's exp (4 ulp) and tanh (5 ulp; MSL
 * specification, section 7.4). None of them loses digits: silu and both forms of gelu that have a sigmoid are x / (1 + e^-u).
 */
#ifndef PE_METAL_ACTIVATIONS_H
#define PE_METAL_ACTIVATIONS_H

#include "common.h"

/* In the order of the choices of `unary`; the first five are those of `glu`. */
enum {
  ACT_NONE, ACT_SILU, ACT_GELU_TANH, ACT_GELU, ACT_RELU, ACT_QUICK_GELU, ACT_RELU2, ACT_SIGMOID, ACT_TANH, ACT_EXP, ACT_LOG, ACT_SQRT,
  ACT_NEG, ACT_SQUARE
};

static inline float poly7(float x, float a, float b, float c, float d, float e, float f, float g) {
  return fma(fma(fma(fma(fma(fma(g, x, f), x, e), x, d), x, c), x, b), x, a);
}

/* erf, within 2e-7: x times a polynomial of x^2 near zero, 1 - e^(-t p(t)) beyond. */
static inline float erf_of(float x) {
  const float t = min(4.0f, fabs(x));
  if (fabs(x) < 0.95f)
    return x * poly7(x * x, 1.12837917f, -0.376126271f, 0.112836002f, -0.0268544446f, 0.00518953534f, -0.000802084128f, 7.88911952e-05f);
  const float big = 1.0f - exp(-t * poly7(t, 1.12864097f, 0.63518149f, 0.106187626f, -0.0237201998f, 0.00362292567f, -0.000318061476f,
                                          1.07633607e-05f));
  return isnan(x) ? x : copysign(big, x);
}

static inline float activated(int kind, float x) {
  switch (kind) {
    case ACT_SILU: return x / (1.0f + exp(-x));
    case ACT_GELU_TANH: return x / (1.0f + exp(-x * fma(x * x, 0.0713548163f, 1.59576912f)));
    case ACT_GELU: return fma(0.5f * x, erf_of(0.707106781f * x), 0.5f * x);
    case ACT_RELU: return x < 0.0f ? 0.0f : x;
    case ACT_QUICK_GELU: return x / (1.0f + exp(-1.702f * x));
    case ACT_RELU2: return x < 0.0f ? 0.0f : x * x;
    case ACT_SIGMOID: return 1.0f / (1.0f + exp(-x));
    case ACT_TANH: return tanh(x);
    case ACT_EXP: return exp(x);
    case ACT_LOG: return log(x);
    case ACT_SQRT: return sqrt(x);
    case ACT_NEG: return -x;
    case ACT_SQUARE: return x * x;
    default: return x;
  }
}

static inline float capped(float x, float cap) { return cap * tanh(x / cap); }

#endif

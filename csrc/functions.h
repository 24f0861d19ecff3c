/* functions.h: functions of one number, as CUDA and Metal compute them: for `unary`, and for the ends of other kernels.
 * Reference: pyengine/ops/elementwise.py: activation.
 *
 * Formulas, polynomials and the order of operations are those of csrc/cpu/simd.h, so results are the CPU's to the bit: what is rounded to
 * 8 bits next is the same number everywhere. Only log and sqrt are the device's. None loses digits: silu and both forms of gelu that have a
 * sigmoid are x / (1 + e^-u). A NaN stays a NaN. The file that includes this one says PE_FUNCTION, what stands before a function, and has
 * nearest(x), the integer nearest to a float (any for NaN), and float_of(bits).
 */

/* In the order of the choices of `unary`; the first five are those of `glu`. */
enum {
  ACT_NONE, ACT_SILU, ACT_GELU_TANH, ACT_GELU, ACT_RELU, ACT_QUICK_GELU, ACT_RELU2, ACT_SIGMOID, ACT_TANH, ACT_EXP, ACT_LOG, ACT_SQRT,
  ACT_NEG, ACT_SQUARE, ACT_SOFTPLUS
};

/* a + b x + .. + g x^6 */
PE_FUNCTION float poly5(float x, float a, float b, float c, float d, float e) { return fma(fma(fma(fma(e, x, d), x, c), x, b), x, a); }
PE_FUNCTION float poly7(float x, float a, float b, float c, float d, float e, float f, float g) {
  return fma(fma(poly5(x, c, d, e, f, g), x, b), x, a);
}

/* e^x: relative error < 1.2e-7; 0 below -86.9, inf above 88.72. x = n ln 2 + r. */
PE_FUNCTION float exp_of(float x) {
  float t = x > 89.0f ? 89.0f : x;
  t = t < -88.0f ? -88.0f : t;
  const int n = nearest(t * 1.44269504f);
  const float part = (float)n, r = fma(part, 2.12194440e-4f, fma(part, -0.693359375f, t));
  const float y = fma(r * r, poly5(r, 0.5f, 0.166665129f, 0.0416661873f, 0.00836959841f, 0.00139517172f), r);
  const float scale = float_of((n + 126) << 23), half_ = fma(y, scale, scale);
  return x < -86.9f ? 0.0f : half_ + half_;
}

/* An odd polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere. */
PE_FUNCTION float tanh_of(float x) {
  const float a = fabs(x), z = x * x;
  if (a < 0.64f) return fma(x * z, poly5(z, -0.333332718f, 0.133311452f, -0.0537134628f, 0.0205496037f, -0.00560155155f), x);
  return copysign(1.0f - 2.0f / (exp_of(a + a) + 1.0f), x);
}

/* Absolute error < 2e-7: an odd polynomial below 0.95, 1 - e^(-x p(x)) up to 4, 1 beyond. */
PE_FUNCTION float erf_of(float x) {
  const float a = fabs(x), t = a > 4.0f ? 4.0f : a;
  if (a < 0.95f)
    return x * poly7(x * x, 1.12837917f, -0.376126271f, 0.112836002f, -0.0268544446f, 0.00518953534f, -0.000802084128f, 7.88911952e-05f);
  return copysign(1.0f - exp_of(-(t * poly7(t, 1.12864097f, 0.63518149f, 0.106187626f, -0.0237201998f, 0.00362292567f, -0.000318061476f,
                                            1.07633607e-05f))), x);
}

/* log(1 + x) for 0 <= x <= 1 without losing the digits of a small x: log(u) x / (u - 1) for u = 1 + x as it is rounded (Kahan). */
PE_FUNCTION float log_of_one_and(float x) {
  const float u = 1.0f + x;
  return u == 1.0f ? x : log(u) * (x / (u - 1.0f));
}

PE_FUNCTION float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }
PE_FUNCTION float capped(float x, float cap) { return cap * tanh_of(x / cap); }

/* One of ACT_*, mostly a constant. The tanh form of gelu: (1 + tanh u) / 2 = 1 / (1 + e^-2u), 2u = x (1.59576912 + 0.0713548163 x^2). */
PE_FUNCTION float activated(int kind, float x) {
  const float positive = x < 0.0f ? 0.0f : x; /* in this form NaN stays NaN */
  switch (kind) {
    case ACT_SILU: return x / (1.0f + exp_of(-x));
    case ACT_GELU_TANH: return x / (1.0f + exp_of(-(x * fma(x * x, 0.0713548163f, 1.59576912f))));
    case ACT_GELU: return fma(0.5f * x, erf_of(x * 0.707106781f), 0.5f * x);
    case ACT_RELU: return positive;
    case ACT_QUICK_GELU: return x / (1.0f + exp_of(x * -1.702f));
    case ACT_RELU2: return positive * positive;
    case ACT_SIGMOID: return sigmoid(x);
    case ACT_TANH: return tanh_of(x);
    case ACT_EXP: return exp_of(x);
    case ACT_LOG: return log(x);
    case ACT_SQRT: return sqrt(x);
    case ACT_NEG: return -x;
    case ACT_SQUARE: return x * x;
    case ACT_SOFTPLUS: return positive + log_of_one_and(exp_of(-fabs(x)));
    default: return x;
  }
}

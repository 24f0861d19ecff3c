/* weight.h: what a logit weighs in a softmax, and in which order logits stand: the same bits in C, CUDA and Metal, since they are made of
 * additions, multiplications and comparisons in one order, without libm. The sampler (host/sampling.c) and the kernels of `top_k` use it.
 *
 * Sums of weights: logits are taken in chunks of 4096; of a chunk there are 16 sums in float, of logits i with the same i % 16, ascending.
 * A chunk's is that of the 16 in double, in order, and the whole is that of the chunks.
 */
#ifndef PE_WEIGHT_H
#define PE_WEIGHT_H

#include "quants.h"

enum { PE_WEIGHT_END = -87, PE_WEIGHT_LANES = 16, PE_WEIGHT_CHUNK = 4096 }; /* weights are 0 from exp(-87) down, where normal floats end */

PE_QUANT_FN float pe_weight_clamp(float x) { return x > (float)PE_WEIGHT_END ? x : (float)PE_WEIGHT_END; }

/* exp(x) for PE_WEIGHT_END <= x <= 0 within 2 units in the last place.
 * 2^n * exp(f), |f| <= ln(2) / 2, Taylor to the seventh power (the eighth is below 2^-27). */
PE_QUANT_FN float pe_weight_exp(float x) {
  int32_t n = (int32_t)(x * 1.44269504f - 0.5f);
  float f = x - (float)n * 0.693359375f; /* ln(2) in two parts, the first exact in 9 bits */
  f = f - (float)n * -2.12194440e-4f;
  float y = 1.0f / 5040;
  y = y * f + 1.0f / 720;
  y = y * f + 1.0f / 120;
  y = y * f + 1.0f / 24;
  y = y * f + 1.0f / 6;
  y = y * f + 0.5f;
  y = y * f + 1.0f;
  y = y * f + 1.0f;
  return (y + y) * pe_float_from_bits((uint32_t)(n + 126) << 23); /* 2^(n - 1), and 0 for n = -126 */
}

/* A key whose ascending order is that of logits; -0 and 0 are equal, and what is no logit, NaN and inf, comes last, all alike. */
PE_QUANT_FN uint32_t pe_logit_key(float x) {
#if defined(__METAL_VERSION__)
  const uint32_t bits = as_type<uint32_t>(x + 0.0f);
#else
  union { float f; uint32_t u; } v;
  v.f = x + 0.0f;
  const uint32_t bits = v.u;
#endif
  if (!(x <= 3.402823466e38f)) return 0xffffffffu;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

#endif

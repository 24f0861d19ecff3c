/* codes.h: floats as codes of 8 bits, symmetric: x ~ scale * code, scale = max |x| / 127, codes to nearest even. Rows of activations
 * (linear.c) and queries, keys and values of products="int8" (attention_int8.c) are rounded so. Blocks of caches follow gguf-py
 * instead: cells.h. */
#ifndef PE_CODES_H
#define PE_CODES_H

#include "cpu.h"

/* |x| as bits, so that a NaN is the largest. */
PE_INLINE v16i magnitude(v16f x) { return v16i_and(v16f_bits(x), v16i_set1(0x7fffffff)); }

/* What a code is worth where `most` holds the largest magnitudes, and the inverse of that. A NaN makes the scale NaN. */
PE_INLINE float code_scale(v16i most, float *inverse) {
  const int32_t bits = v16i_hmax(most);
  float amax;
  memcpy(&amax, &bits, 4);
  *inverse = amax > 0 ? 127.0f / amax : 0.0f;
  if (*inverse > 3e38f) return *inverse = 0.0f; /* amax so small that its inverse overflows */
  return amax / 127.0f;
}

/* The same for 16 at once, each a lane; where one is NaN, so is its inverse. */
PE_INLINE v16f code_scales(v16i most, v16f *inverse) {
  const v16f amax = v16i_as_f(most), full = v16f_set1(127.0f), end = v16f_set1(3e38f), none = v16f_zero(), y = v16f_div(full, amax);
  *inverse = v16f_select_lt(end, y, none, y);
  return v16f_select_lt(end, y, none, v16f_div(amax, full));
}

PE_INLINE v16i codes_of(v16f x, float inverse) { return v16f_to_i(v16f_mul(x, v16f_set1(inverse))); }

/* Codes of x [n, a multiple of 16], whose magnitudes are at most `most`; returns their scale. */
PE_INLINE float to_codes(const float *x, v16i most, int64_t n, int8_t *to) {
  float inverse;
  const float scale = code_scale(most, &inverse);
  for (int64_t i = 0; i < n; i += 16) v16i_store_i8(to + i, codes_of(v16f_load(x + i), inverse));
  return scale;
}

#endif

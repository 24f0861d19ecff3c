/* numbers.h: functions of one number by IEEE arithmetic alone, in one order: the same bits on every machine, which libm does not promise. */
#ifndef PE_NUMBERS_H
#define PE_NUMBERS_H

#include <float.h>
#include <math.h>
#include <stdint.h>

#define PE_LN2 0.693147180559945309417

/* ln(x) for normal x > 0, within some units in the last place: ln(m) = 2 artanh((m - 1) / (m + 1)) for m near 1. */
static inline double pe_ln(double x) {
  union { double d; uint64_t u; } v = {x};
  int64_t e = (int64_t)(v.u >> 52) - 1023;
  v.u = (v.u & 0xfffffffffffffu) | 0x3ff0000000000000u;
  if (v.d > 1.4142135623730951) v.d *= 0.5, e++;
  double s = (v.d - 1) / (v.d + 1), y = 0;
  for (int k = 23; k > 0; k -= 2) y = y * (s * s) + 1.0 / k;
  return (double)e * PE_LN2 + 2 * s * y;
}

/* e^x, within some units in the last place; 0 and about 1e304 beyond the ends. */
static inline double pe_power_of_e(double x) {
  x = x < 700 ? x : 700;
  if (!(x > -700)) return 0;
  int64_t n = (int64_t)(x / PE_LN2 + (x < 0 ? -0.5 : 0.5));
  double f = x - (double)n * 0.693147180369123816490;   /* ln(2) in two parts, the first exact in 33 bits */
  f -= (double)n * 1.90821492927058770002e-10;
  double y = 1;
  for (int k = 14; k > 0; k--) y = 1 + y * f / k;
  union { uint64_t u; double d; } two = {(uint64_t)(n + 1023) << 52};
  return y * two.d;
}

/* The least float that is not below x. */
static inline float pe_float_above(double x) {
  if (!(x > -FLT_MAX)) return -FLT_MAX;
  if (x > FLT_MAX) return INFINITY;
  float f = (float)x;
  return (double)f < x ? nextafterf(f, INFINITY) : f;
}

#endif

/* angles.h: cosine and sine of a float angle without doubles, nearly always the float that is nearest to the exact one, as on the CPU.
 *
 * x = k pi/2 + r with k = round(x 2/pi). pi/2 comes as three floats. k times the first, subtracted by one fma, is exact: |r| < 1 is a
 * multiple of 2^-23 wherever x and the product are. The rest is carried as a second float (Dekker 1971, Cody and Waite 1980), so that r has
 * its digits where it is small. From 2^22 on, far beyond a position of a million, x 2/pi mod 4 comes from the bits of 2/pi (Payne and
 * Hanek 1983) in integers.
 * Polynomials are Taylor's on [-pi/4, pi/4], to 2^-42 of the result; some 200 operations for both.
 */
#ifndef PE_METAL_ANGLES_H
#define PE_METAL_ANGLES_H

#include "common.h"

struct two_floats { float high, low; };

/* high + low = a + b, |a| >= |b| */
static inline two_floats quick_sum(float a, float b) {
  const float s = a + b;
  return two_floats{s, b - (s - a)};
}

/* (high + low) * scale, rounded once */
static inline float scaled(two_floats v, float scale) {
  const float p = v.high * scale;
  return p + fma(v.low, scale, fma(v.high, scale, -p));
}

/* Of |a| >= |b| where they are added. Relative errors are some 2^-46. */
static inline two_floats added(two_floats a, two_floats b) {
  const two_floats s = quick_sum(a.high, b.high);
  return quick_sum(s.high, s.low + (a.low + b.low));
}
static inline two_floats times(two_floats a, two_floats b) {
  const float p = a.high * b.high;
  return quick_sum(p, fma(a.high, b.high, -p) + fma(a.high, b.low, a.low * b.high));
}

/* Taylor's series: the first terms in pairs of floats, of the rest a float is enough. */
static inline two_floats sine_near_zero(two_floats r, two_floats z) {
  const float rest = fma(z.high, fma(z.high, 1.6059044e-10f, -2.5052108e-8f), 2.7557319e-6f);
  two_floats p = added(two_floats{-0.000198412701f, 2.72559687e-12f}, times(z, two_floats{rest, 0.0f}));
  p = added(two_floats{0.00833333377f, -4.34617203e-10f}, times(z, p));
  p = added(two_floats{-0.166666672f, 4.96705388e-09f}, times(z, p));
  return added(r, times(times(r, z), p));
}

static inline two_floats cosine_near_zero(two_floats z) {
  const float rest = fma(z.high, fma(z.high, 2.0876757e-9f, -2.7557319e-7f), 2.4801587e-5f);
  two_floats p = added(two_floats{-0.00138888892f, 3.36310944e-11f}, times(z, two_floats{rest, 0.0f}));
  p = added(two_floats{0.0416666679f, -1.24176347e-09f}, times(z, p));
  p = added(two_floats{-0.5f, 0.0f}, times(z, p));
  return added(two_floats{1.0f, 0.0f}, times(z, p));
}

/* r of |x| below 2^22, and k mod 4 */
static inline two_floats small_remainder(float x, thread int &quarter) {
  const float k = rint(x * 0.63661977f);
  const float first = fma(-k, 1.57079637e+0f, x);               /* exact */
  const float p = k * -4.37113883e-8f, e = fma(k, -4.37113883e-8f, -p);
  const float high = first - p, back = high - first;            /* Knuth's sum of two: no order of sizes is known */
  const float low = ((first - (high - back)) + (-p - back)) - e - k * -1.71512451e-15f;
  quarter = (int)k & 3;
  return quick_sum(high, low);
}

constant uint TWO_OVER_PI[9] = {0, 0xa2f9836eu, 0x4e441529u, 0xfc2757d1u, 0xf534ddc0u, 0xdb629599u, 0x3c439041u, 0xfe5163abu,
                                  0xdebbc561u};

/* r of a finite |x| from 2^22 on. x = m 2^e; 96 bits of 2/pi, those whose weights times 2^e are 2 and less, times m. */
static inline two_floats large_remainder(float x, thread int &quarter) {
  const uint bits = as_type<uint>(x), m = (bits & 0x7fffffu) | 0x800000u;
  const int e = (int)(bits >> 23 & 255u) - 150, at = (e + 30) / 32;
  const uint shift = (uint)(e + 30) % 32;
  uint w[3];
  for (int i = 0; i < 3; i++) w[i] = shift ? TWO_OVER_PI[at + i] << shift | TWO_OVER_PI[at + i + 1] >> (32 - shift) : TWO_OVER_PI[at + i];
  const ulong low = ((ulong)w[1] << 32 | w[2]) * m;             /* mod 2^64; what it carries into the upper word: */
  const uint carry = (uint)((((ulong)w[2] * m >> 32) + (ulong)w[1] * m) >> 32);
  ulong turn = (ulong)(w[0] * m + carry) << 32 | low >> 32;     /* 2 bits of quarters, 62 behind the point */
  if (x < 0.0f) turn = 0 - turn;
  quarter = (int)((turn + 0x2000000000000000ul) >> 62);
  const long rest = (long)(turn - ((ulong)quarter << 62));
  const float high = (float)rest, more = (float)(rest - (long)high);
  const float h = high * 2.16840434e-19f, l = more * 2.16840434e-19f, p = h * 1.57079637e+0f;    /* 2^-62 */
  return quick_sum(p, fma(h, 1.57079637e+0f, -p) + h * -4.37113883e-8f + l * 1.57079637e+0f);
}

static inline void cosine_and_sine(float x, thread two_floats &cosine, thread two_floats &sine) {
  int q;
  const two_floats r = fabs(x) < 4194304.0f ? small_remainder(x, q) : large_remainder(x, q);
  const two_floats z = times(r, r), s = sine_near_zero(r, z), c = cosine_near_zero(z);
  const float cs = q == 1 || q == 2 ? -1.0f : 1.0f, ss = q >= 2 ? -1.0f : 1.0f;
  cosine = q & 1 ? s : c;
  sine = q & 1 ? c : s;
  if (!isfinite(x)) cosine = sine = two_floats{NAN, 0.0f};
  cosine.high *= cs, cosine.low *= cs;
  sine.high *= ss, sine.low *= ss;
}

#endif

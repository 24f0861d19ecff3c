/* angles.h: cosine and sine of a float angle, within an ulp or so of the exact ones, without doubles.
 *
 * x = k pi/2 + r with k = round(x 2/pi). pi/2 comes as three floats. k times the first, subtracted by one fma, is exact: |r| < 1 is a
 * multiple of 2^-23 wherever x and the product are. The rest is carried as a second float (Dekker 1971, Cody and Waite 1980), so that r has
 * its digits where it is small. Holds for |x| below 2^23; positions of a million times the largest frequency, 1, are far below.
 * Polynomials are Taylor's on [-pi/4, pi/4]: their errors are below 2^-27.
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

static inline two_floats sine_near_zero(float r, float rest, float z) {
  const float p = fma(z, fma(z, fma(z, 2.7557319e-6f, -1.9841270e-4f), 8.3333333e-3f), -0.16666667f);
  return quick_sum(r, fma(r * z, p, rest));
}

static inline two_floats cosine_near_zero(float r, float rest, float z) {
  const float p = fma(z, fma(z, fma(z, -2.7557319e-7f, 2.4801587e-5f), -1.3888889e-3f), 4.1666667e-2f);
  const float half_ = 0.5f * z, w = 1.0f - half_, lost = fma(r, r, -z); /* 1 - r^2/2 and what rounding took from it */
  return quick_sum(w, ((1.0f - w) - half_) + fma(z * z, p, -fma(r, rest, 0.5f * lost)));
}

static inline void cosine_and_sine(float x, thread two_floats &cosine, thread two_floats &sine) {
  const float k = rint(x * 0.63661977f);
  const float first = fma(-k, 1.57079637e+0f, x);               /* exact */
  const float p = k * -4.37113883e-8f, e = fma(k, -4.37113883e-8f, -p);
  const float high = first - p;
  const float back = high - first;                              /* Knuth's sum of two: no order of sizes is known */
  const float low = ((first - (high - back)) + (-p - back)) - e - k * -1.71512451e-15f;
  const two_floats r = quick_sum(high, low);
  const float z = r.high * r.high;
  const two_floats s = sine_near_zero(r.high, r.low, z), c = cosine_near_zero(r.high, r.low, z);
  const int q = (int)k & 3;
  const float cs = q == 1 || q == 2 ? -1.0f : 1.0f, ss = q >= 2 ? -1.0f : 1.0f;
  cosine = q & 1 ? s : c;
  sine = q & 1 ? c : s;
  cosine.high *= cs, cosine.low *= cs;
  sine.high *= ss, sine.low *= ss;
}

#endif

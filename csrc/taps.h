/* taps.h: which of `size` pixels in a row make pixel i of `to`, and how much each counts: for resize2d on every device.
 * Reference: pyengine/ops/pooling.py: _taps.
 *
 * Where a pixel falls is a fraction of whole numbers, so that nothing is lost before the weights, which are float. Kinds are those of
 * resize2d. For C, C++, CUDA and Metal: PE_TAPS is what stands before a function there.
 */
#ifndef PE_TAPS_H
#define PE_TAPS_H

#ifndef PE_TAPS
#define PE_TAPS static inline
#endif

/* How an axis is resized. */
typedef struct pe_axis {
  int size, to;
  int kind;      /* 0: nearest, 1: bilinear, 2: bicubic */
  int corners;   /* the outermost centres stay */
  int antialias;
} pe_axis;

/* Pixels first .. first + count - 1; beyond the picture they are those at its edge. Weights are to be divided by their sum where antialias. */
typedef struct pe_range { int first, count; } pe_range;

PE_TAPS long pe_floor_div(long a, long b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

/* Where the centre of pixel i falls: numerator / denominator, in pixels of `size` from the first one's centre. */
PE_TAPS long pe_tap_numerator(pe_axis a, int i) {
  if (a.corners) return a.to > 1 ? (long)i * (a.size - 1) : 0;
  const long n = (2 * (long)i + 1) * a.size - a.to;
  return a.kind == 1 && !a.antialias && n < 0 ? 0 : n;
}
PE_TAPS long pe_tap_denominator(pe_axis a) { return a.corners ? (a.to > 1 ? a.to - 1 : 1) : 2 * (long)a.to; }

PE_TAPS pe_range pe_taps_of(pe_axis a, int i) {
  pe_range r = {0, 1};
  const int taps = a.kind == 2 ? 4 : 2;
  if (a.kind == 0) {
    r.first = (int)((long)i * a.size / a.to);
  } else if (a.antialias) { /* centre - reach + 1/2 and centre + reach + 1/2, of pixels' edges */
    const long wide = a.size > a.to ? a.size : a.to, centre = (2 * (long)i + 1) * a.size, below = 2 * (long)a.to;
    const long begin = pe_floor_div(centre - taps * wide + a.to, below), end = pe_floor_div(centre + taps * wide + a.to, below);
    r.first = begin > 0 ? (int)begin : 0;
    r.count = (int)(end < a.size ? end : a.size) - r.first;
  } else {
    r.first = (int)pe_floor_div(pe_tap_numerator(a, i), pe_tap_denominator(a)) - taps / 2 + 1;
    r.count = taps;
  }
  return r;
}

/* The cubic of Keys with parameter p, at distance t >= 0. */
PE_TAPS float pe_cubic(float t, float p) {
  if (t < 1.0f) return ((p + 2.0f) * t - (p + 3.0f)) * t * t + 1.0f;
  return t < 2.0f ? p * (((t - 5.0f) * t + 8.0f) * t - 4.0f) : 0.0f;
}

/* What pixel j counts in pixel i, j as pe_taps_of has them. */
PE_TAPS float pe_tap_weight(pe_axis a, int i, int j) {
  if (a.kind == 0) return 1.0f;
  long n, d;
  if (a.antialias) {
    n = (2 * (long)j + 1) * a.to - (2 * (long)i + 1) * a.size;
    d = 2 * (long)(a.size > a.to ? a.size : a.to);
  } else {
    d = pe_tap_denominator(a);
    n = pe_tap_numerator(a, i) - j * d;
  }
  const float t = (float)(n < 0 ? -n : n) / (float)d;
  if (a.kind == 2) return pe_cubic(t, a.antialias ? -0.5f : -0.75f);
  return t < 1.0f ? 1.0f - t : 0.0f;
}

#endif

/* encode_blocks.c: float32 into blocks, 16 blocks (of K formats: sub-blocks) at once, one in each lane of a vector. What a block gets
 * is the outcome of a search for the least sum of squared differences, unweighted:
 *
 *   scale     x ~ d q. For codes q the best scale is sum(xq) / sum(qq), and it explains sum(xq)^2 / sum(qq) of sum(xx). Codes come
 *             from rounding x / d, so a grid of d near max|x| / (number of levels) is tried, and the best of it improved by
 *             rounding and fitting in turn (Lloyd's iteration: neither step can increase the error).
 *   line      x ~ d q + o: the same with a straight line for fixed codes, by its normal equations.
 *   K formats  the scales of the sub-blocks are themselves whole numbers times one float16 (and the minima so, too). These are
 *             rounded, each sub-block then tries its neighbours, and the float16 numbers are fitted again to all codes.
 *
 * Where a format has one scale, the plain choice max / levels is tried last with float16 rounding and all; so the error never
 * exceeds that of the plain quantizer (ggml's quantize_row_*_ref). Q8_0 is the plain quantizer: its bytes are ggml's.
 * The idea to search scales is ggml's (make_qx_quants, make_qkx2_quants; I. Kawrakow), with other weights and no refit.
 */
#include <string.h>

#include "../quants.h"
#include "cpu.h"

enum { LANES = 16 };
static const float iq4_values[16] = PE_IQ4_NL_VALUES;

/* ---- lanes ---- */

PE_INLINE v16f set(float x) { return v16f_set1(x); }
PE_INLINE v16f square(v16f x) { return v16f_mul(x, x); }

/* To the nearest whole number, ties to even; |x| < 2^22. */
PE_INLINE v16f nearest(v16f x) { return v16f_sub(v16f_add(x, set(12582912.0f)), set(12582912.0f)); }
PE_INLINE v16f clamp(v16f x, v16f lo, v16f hi) { return v16f_min(v16f_max(x, lo), hi); }

/* 1 / x, and 0 where |x| is too small for that. */
PE_INLINE v16f inverse(v16f x) { return v16f_select_lt(set(1e-30f), v16f_abs(x), v16f_div(set(1.0f), x), v16f_zero()); }

PE_INLINE v16f half(v16f x) {
  uint16_t h[LANES];
  v16f_store_f16(h, x);
  return v16f_load_f16(h);
}

PE_INLINE int all_finite(v16f x) { return v16i_hmax(v16i_and(v16f_bits(x), v16i_set1(0x7fffffff))) < 0x7f800000; }

/* ---- one scale ---- */

/* What codes stand for: whole numbers lo .. hi, or the sixteen values of IQ4_NL. */
typedef struct {
  float lo, hi;
  int curved;
} levels;

PE_INLINE v16f to_level(v16f y, levels l) {
  if (!l.curved) return nearest(clamp(y, set(l.lo), set(l.hi)));
  v16f v = set(iq4_values[0]);
  for (int k = 1; k < 16; k++) {
    v16f middle = set(0.5f * (iq4_values[k - 1] + iq4_values[k]));
    v = v16f_select_lt(middle, y, set(iq4_values[k]), v);
  }
  return v;
}

PE_INLINE v16f scale_error(const v16f *x, int n, v16f d, levels l) {
  v16f inv = inverse(d), e = v16f_zero();
  for (int i = 0; i < n; i++) e = v16f_add(e, square(v16f_sub(x[i], v16f_mul(d, to_level(v16f_mul(x[i], inv), l)))));
  return e;
}

PE_INLINE void scale_moments(const v16f *x, int n, v16f inv, levels l, v16f *xq, v16f *qq) {
  *xq = *qq = v16f_zero();
  for (int i = 0; i < n; i++) {
    v16f q = to_level(v16f_mul(x[i], inv), l);
    *xq = v16f_fma(x[i], q, *xq);
    *qq = v16f_fma(q, q, *qq);
  }
}

/* The element of largest magnitude, with its sign. */
PE_INLINE v16f extreme(const v16f *x, int n) {
  v16f lo = x[0], hi = x[0];
  for (int i = 1; i < n; i++) lo = v16f_min(x[i], lo), hi = v16f_max(x[i], hi);
  return v16f_select_lt(hi, v16f_neg(lo), lo, hi);
}

/* Where a search begins: the outermost element goes to the outermost level + first + t * step, t = 0 .. n - 1. Above 0 it is cut
 * off and the levels lie closer; below 0 the outer levels stay unused. The numbers in use are where finer or wider grids gained
 * less than 0.1% on normal and on Student-t numbers. */
typedef struct {
  float first, step;
  int n;
} grid;

/* The scale d of x ~ d q, `big` being the extreme element: it goes to lo, with every second step of curved levels to hi. */
PE_INLINE v16f fit_scale(const v16f *x, int n, levels l, v16f big, grid g) {
  v16f unit = inverse(big), best = v16f_zero(), d = v16f_zero(), xq, qq;
  for (int t = 0; t <= g.n; t++) { /* the last: one round of Lloyd's iteration */
    float beyond = g.first + g.step * (float)t, level = l.curved && t % 2 ? l.hi + beyond : l.lo - beyond;
    v16f inv = t < g.n ? v16f_mul(set(level), unit) : inverse(d);
    scale_moments(x, n, inv, l, &xq, &qq);
    v16f fit = v16f_div(xq, qq), explained = v16f_mul(fit, xq); /* NaN where all codes are 0: never better */
    d = v16f_select_lt(best, explained, fit, d);
    best = v16f_select_lt(best, explained, explained, best);
  }
  return d;
}

/* ---- a line ---- */

typedef struct {
  v16f d, o;
} line;

PE_INLINE v16f line_code(v16f x, line f, v16f inv, float top) {
  return nearest(clamp(v16f_mul(v16f_sub(x, f.o), inv), v16f_zero(), set(top)));
}

PE_INLINE v16f line_error(const v16f *x, int n, line f, float top) {
  v16f inv = inverse(f.d), e = v16f_zero();
  for (int i = 0; i < n; i++) {
    v16f q = line_code(x[i], f, inv, top);
    e = v16f_add(e, square(v16f_sub(v16f_sub(x[i], f.o), v16f_mul(f.d, q))));
  }
  return e;
}

/* The line of x ~ d q + o, q = 0 .. top; with `below`, o <= 0. */
PE_INLINE line fit_line(const v16f *x, int n, float top, int below, grid s) {
  v16f lo = x[0], hi = x[0], y[32], sum = v16f_zero(), squares = v16f_zero();
  for (int i = 1; i < n; i++) lo = v16f_min(x[i], lo), hi = v16f_max(x[i], hi);
  if (below) lo = v16f_min(lo, v16f_zero());
  for (int i = 0; i < n; i++) { /* seen from the lowest, so that sums of squares lose no digits */
    y[i] = v16f_sub(x[i], lo);
    sum = v16f_add(sum, y[i]);
    squares = v16f_fma(y[i], y[i], squares);
  }
  v16f range = v16f_sub(hi, lo), unit = inverse(range), count = set((float)n), cap = v16f_neg(lo), best = set(3e38f);
  line f = {v16f_mul(range, set(1.0f / top)), v16f_zero()};
  for (int t = 0; t <= s.n; t++) { /* the last: one round of Lloyd's iteration */
    line start = {v16f_zero(), t < s.n ? v16f_zero() : f.o};
    v16f inv = t < s.n ? v16f_mul(set(top + s.first + s.step * (float)t), unit) : inverse(f.d);
    v16f q1 = v16f_zero(), q2 = v16f_zero(), yq = v16f_zero();
    for (int i = 0; i < n; i++) {
      v16f q = line_code(y[i], start, inv, top);
      q1 = v16f_add(q1, q);
      q2 = v16f_fma(q, q, q2);
      yq = v16f_fma(y[i], q, yq);
    }
    v16f det = v16f_sub(v16f_mul(count, q2), square(q1));
    line g;
    g.d = v16f_div(v16f_sub(v16f_mul(count, yq), v16f_mul(sum, q1)), det);
    g.o = v16f_div(v16f_sub(sum, v16f_mul(g.d, q1)), count);
    if (below) {
      v16f through = v16f_div(v16f_sub(yq, v16f_mul(cap, q1)), q2);   /* the best slope of a line through 0 */
      v16f inside = v16f_select_lt(g.o, cap, set(1.0f), v16f_zero()); /* 0 for NaN, where all codes are equal */
      g.d = v16f_select_lt(v16f_zero(), inside, g.d, through);
      g.o = v16f_select_lt(v16f_zero(), inside, g.o, cap);
    }
    /* sum (y - d q - o)^2 */
    v16f e = v16f_sub(squares, v16f_mul(set(2.0f), v16f_fma(g.d, yq, v16f_mul(g.o, sum))));
    e = v16f_add(e, v16f_fma(square(g.d), q2, v16f_mul(g.o, v16f_fma(set(2.0f), v16f_mul(g.d, q1), v16f_mul(count, g.o)))));
    f.d = v16f_select_lt(e, best, g.d, f.d);
    f.o = v16f_select_lt(e, best, g.o, f.o);
    best = v16f_select_lt(e, best, e, best);
  }
  f.o = v16f_add(f.o, lo);
  return f;
}

/* ---- codes of 16 lanes, lane after lane ---- */

typedef struct {
  uint8_t q[512];
} codes;

/* Lane b's code i to q[n b + i]; `rows` holds code i of all lanes in 16 bytes. */
static void by_lane(codes *c, const int8_t (*rows)[LANES], int n) {
  for (int b = 0; b < LANES; b++)
    for (int i = 0; i < n; i++) c->q[n * b + i] = (uint8_t)rows[i][b];
}

/* Codes counted from 0: the number of the level. */
PE_INLINE void scale_codes(codes *c, const v16f *x, int n, v16f d, levels l) {
  int8_t rows[32][LANES];
  v16f inv = inverse(d);
  for (int i = 0; i < n; i++) {
    v16f q = to_level(v16f_mul(x[i], inv), l);
    if (l.curved) {
      v16f value = q;
      q = v16f_zero();
      for (int k = 1; k < 16; k++) q = v16f_add(q, v16f_select_lt(value, set(iq4_values[k]), v16f_zero(), set(1.0f)));
    } else {
      q = v16f_sub(q, set(l.lo));
    }
    v16i_store_i8(rows[i], v16f_to_i(q));
  }
  by_lane(c, (const int8_t(*)[LANES])rows, n);
}

PE_INLINE void line_codes(codes *c, const v16f *x, int n, line f, float top) {
  int8_t rows[32][LANES];
  v16f inv = inverse(f.d);
  for (int i = 0; i < n; i++) v16i_store_i8(rows[i], v16f_to_i(line_code(x[i], f, inv, top)));
  by_lane(c, (const int8_t(*)[LANES])rows, n);
}

static void pack_nibbles(uint8_t *qs, const uint8_t *q) {
  for (int i = 0; i < 16; i++) qs[i] = (uint8_t)((q[i] & 15) | q[i + 16] << 4);
}

static void pack_fifth(uint8_t *qh, const uint8_t *q) {
  memset(qh, 0, 4);
  for (int i = 0; i < 32; i++) qh[i / 8] |= (uint8_t)((q[i] >> 4 & 1) << (i % 8));
}

/* The order of block_q2_K: fields of two bits. */
static void pack_two_bits(uint8_t *qs, const uint8_t *q) {
  for (int i = 0; i < 64; i++) {
    const uint8_t *p = q + i / 32 * 128 + i % 32;
    qs[i] = (uint8_t)((p[0] & 3) | (p[32] & 3) << 2 | (p[64] & 3) << 4 | (p[96] & 3) << 6);
  }
}

/* ---- formats of 32: 16 blocks ---- */

static pe_status q8_0(const v16f *x, int n_blocks, void *to) {
  block_q8_0 *out = to;
  v16f big = v16f_abs(extreme(x, 32)), d = v16f_div(big, set(127.0f)), inv = inverse(d);
  uint16_t bits[LANES];
  int8_t rows[32][LANES];
  codes c;
  for (int i = 0; i < 32; i++) {
    v16f y = v16f_mul(x[i], inv), a = v16f_abs(y), r = nearest(a);
    r = v16f_select_lt(v16f_sub(a, r), set(0.5f), r, v16f_add(r, set(1.0f))); /* ties away from zero */
    v16i_store_i8(rows[i], v16f_to_i(v16f_copysign(r, y)));
  }
  by_lane(&c, (const int8_t(*)[LANES])rows, 32);
  if (!all_finite(half(d))) return PE_BAD_VALUE;
  v16f_store_f16(bits, d);
  for (int b = 0; b < n_blocks; b++) {
    out[b].d = bits[b];
    memcpy(out[b].qs, c.q + 32 * b, 32);
  }
  return PE_OK;
}

/* Q4_0, Q5_0, IQ4_NL */
PE_INLINE pe_status one_scale(const v16f *x, levels l, grid g, codes *c, uint16_t *bits) {
  v16f big = extreme(x, 32), plain = half(v16f_div(big, set(l.lo)));
  v16f d = half(fit_scale(x, 32, l, big, g));
  d = v16f_select_lt(scale_error(x, 32, d, l), scale_error(x, 32, plain, l), d, plain);
  if (!all_finite(d)) return PE_BAD_VALUE;
  scale_codes(c, x, 32, d, l);
  v16f_store_f16(bits, d);
  return PE_OK;
}

static pe_status q4_0(const v16f *x, int n_blocks, void *to) {
  block_q4_0 *out = to;
  codes c;
  uint16_t d[LANES];
  if (one_scale(x, (levels){-8, 7, 0}, (grid){-1.5f, 0.3f, 10}, &c, d)) return PE_BAD_VALUE;
  for (int b = 0; b < n_blocks; b++) out[b].d = d[b], pack_nibbles(out[b].qs, c.q + 32 * b);
  return PE_OK;
}

static pe_status q5_0(const v16f *x, int n_blocks, void *to) {
  block_q5_0 *out = to;
  codes c;
  uint16_t d[LANES];
  if (one_scale(x, (levels){-16, 15, 0}, (grid){-2.4f, 0.4f, 12}, &c, d)) return PE_BAD_VALUE;
  for (int b = 0; b < n_blocks; b++) {
    out[b].d = d[b];
    pack_nibbles(out[b].qs, c.q + 32 * b);
    pack_fifth(out[b].qh, c.q + 32 * b);
  }
  return PE_OK;
}

static pe_status iq4_nl(const v16f *x, int n_blocks, void *to) {
  block_iq4_nl *out = to;
  codes c;
  uint16_t d[LANES];
  if (one_scale(x, (levels){-127, 113, 1}, (grid){-24, 2, 28}, &c, d)) return PE_BAD_VALUE;
  for (int b = 0; b < n_blocks; b++) out[b].d = d[b], pack_nibbles(out[b].qs, c.q + 32 * b);
  return PE_OK;
}

/* Q4_1, Q5_1 */
PE_INLINE pe_status one_line(const v16f *x, float top, grid g, codes *c, uint16_t *d, uint16_t *m) {
  v16f lo = x[0], hi = x[0], rest = v16f_zero();
  for (int i = 1; i < 32; i++) lo = v16f_min(x[i], lo), hi = v16f_max(x[i], hi);
  line plain = {half(v16f_div(v16f_sub(hi, lo), set(top))), half(lo)};
  line f = fit_line(x, 32, top, 0, g);
  f.d = half(f.d);
  v16f inv = inverse(f.d);
  for (int i = 0; i < 32; i++) rest = v16f_add(rest, v16f_sub(x[i], v16f_mul(f.d, line_code(x[i], f, inv, top))));
  f.o = half(v16f_mul(rest, set(1.0f / 32)));
  v16f e = line_error(x, 32, f, top), plain_e = line_error(x, 32, plain, top);
  f.d = v16f_select_lt(e, plain_e, f.d, plain.d);
  f.o = v16f_select_lt(e, plain_e, f.o, plain.o);
  if (!all_finite(f.d) || !all_finite(f.o)) return PE_BAD_VALUE;
  line_codes(c, x, 32, f, top);
  v16f_store_f16(d, f.d);
  v16f_store_f16(m, f.o);
  return PE_OK;
}

static pe_status q4_1(const v16f *x, int n_blocks, void *to) {
  block_q4_1 *out = to;
  codes c;
  uint16_t d[LANES], m[LANES];
  if (one_line(x, 15, (grid){-1, 0.2f, 10}, &c, d, m)) return PE_BAD_VALUE;
  for (int b = 0; b < n_blocks; b++) out[b].d = d[b], out[b].m = m[b], pack_nibbles(out[b].qs, c.q + 32 * b);
  return PE_OK;
}

static pe_status q5_1(const v16f *x, int n_blocks, void *to) {
  block_q5_1 *out = to;
  codes c;
  uint16_t d[LANES], m[LANES];
  if (one_line(x, 31, (grid){-3, 0.4f, 10}, &c, d, m)) return PE_BAD_VALUE;
  for (int b = 0; b < n_blocks; b++) {
    out[b].d = d[b], out[b].m = m[b];
    pack_nibbles(out[b].qs, c.q + 32 * b);
    pack_fifth(out[b].qh, c.q + 32 * b);
  }
  return PE_OK;
}

/* ---- K formats: sub-blocks in lanes, super-blocks of `subs` = 8 or 16 lanes ---- */

/* Each lane gets the sum, or the largest, over the lanes of its super-block. */
PE_INLINE v16f over_super(v16f v, int subs, int largest) {
  float t[LANES], r[LANES];
  v16f_store(t, v);
  for (int s = 0; s < LANES; s += subs) {
    float a = t[s];
    for (int j = 1; j < subs; j++) a = largest ? (t[s + j] > a ? t[s + j] : a) : a + t[s + j];
    for (int j = 0; j < subs; j++) r[s + j] = a;
  }
  return v16f_load(r);
}

typedef struct {
  v16f d, scale, dmin, min; /* d and dmin are float16 values, the same in all lanes of a super-block */
} k_scales;

/* The largest scale starts as the largest whole number, then as ones below; after each start d is fitted once more. Several starts
 * matter where few numbers are quantized (constant rows: all depends on how d rounds to float16); else they gain 0.1%. */
enum { K_STARTS = 2 };

/* x ~ (d scale) q with scale = s_lo .. s_hi: Q3_K and Q6_K, sub-blocks of 16. */
PE_INLINE pe_status fit_k_scale(const v16f *x, levels l, float s_lo, float s_hi, grid g, k_scales *out) {
  v16f big = extreme(x, 16), sub = fit_scale(x, 16, l, big, g);
  v16f top = over_super(sub, 16, 1), bottom = v16f_neg(over_super(v16f_neg(sub), 16, 1));
  v16f largest = v16f_select_lt(top, v16f_neg(bottom), bottom, top), d = v16f_zero(), best = set(3e38f);
  *out = (k_scales){v16f_zero(), v16f_zero(), v16f_zero(), v16f_zero()};
  for (int round = 0; round < 2 * K_STARTS; round++) {
    d = half(round % 2 ? d : v16f_div(largest, set(s_lo + (float)(round / 2))));
    if (!all_finite(d)) return PE_BAD_VALUE;
    v16f guess = nearest(clamp(v16f_mul(sub, inverse(d)), set(s_lo), set(s_hi))), scale = guess, least = set(3e38f);
    for (int near = -1; near <= 1; near++) {
      v16f s = clamp(v16f_add(guess, set((float)near)), set(s_lo), set(s_hi)), e = scale_error(x, 16, v16f_mul(d, s), l);
      scale = v16f_select_lt(e, least, s, scale);
      least = v16f_select_lt(e, least, e, least);
    }
    v16f total = over_super(least, 16, 0), xq, qq;
    out->d = v16f_select_lt(total, best, d, out->d);
    out->scale = v16f_select_lt(total, best, scale, out->scale);
    best = v16f_select_lt(total, best, total, best);
    scale_moments(x, 16, inverse(v16f_mul(d, scale)), l, &xq, &qq);
    d = v16f_mul(over_super(v16f_mul(scale, xq), 16, 0), inverse(over_super(v16f_mul(square(scale), qq), 16, 0)));
  }
  return PE_OK;
}

/* x ~ (d scale) q - dmin min with scale, min = 0 .. s_top: Q2_K, Q4_K and Q5_K, sub-blocks of n. */
PE_INLINE pe_status fit_k_line(const v16f *x, int n, float top, float s_top, grid s, k_scales *out) {
  int subs = 256 / n;
  line f = fit_line(x, n, top, 1, s);
  v16f sub = v16f_max(f.d, v16f_zero()), sub_min = v16f_neg(f.o), zero = v16f_zero(), sum = zero, best = set(3e38f);
  v16f largest = over_super(sub, subs, 1), largest_min = over_super(sub_min, subs, 1), d = zero, dmin = zero;
  for (int i = 0; i < n; i++) sum = v16f_add(sum, x[i]);
  *out = (k_scales){zero, zero, zero, zero};
  for (int round = 0; round < 2 * K_STARTS; round++) {
    v16f whole = set(s_top - (float)(round / 2));
    d = half(round % 2 ? d : v16f_div(largest, whole)), dmin = half(round % 2 ? dmin : v16f_div(largest_min, whole));
    if (!all_finite(d) || !all_finite(dmin)) return PE_BAD_VALUE;
    v16f guess = nearest(clamp(v16f_mul(sub, inverse(d)), zero, set(s_top))), per_min = inverse(dmin);
    v16f scale = guess, min = zero, least = set(3e38f);
    for (int near = -1; near <= 1; near++) {
      v16f s = clamp(v16f_add(guess, set((float)near)), zero, set(s_top)), q1 = zero;
      line g = {v16f_mul(d, s), v16f_neg(sub_min)};
      v16f inv = inverse(g.d);
      for (int i = 0; i < n; i++) q1 = v16f_add(q1, line_code(x[i], g, inv, top));
      v16f wanted = v16f_mul(v16f_sub(v16f_mul(g.d, q1), sum), set(1.0f / (float)n)); /* the best minimum for these codes */
      v16f m = nearest(clamp(v16f_mul(wanted, per_min), zero, set(s_top)));
      g.o = v16f_neg(v16f_mul(dmin, m));
      v16f e = line_error(x, n, g, top);
      scale = v16f_select_lt(e, least, s, scale);
      min = v16f_select_lt(e, least, m, min);
      least = v16f_select_lt(e, least, e, least);
    }
    v16f total = over_super(least, subs, 0);
    out->d = v16f_select_lt(total, best, d, out->d);
    out->dmin = v16f_select_lt(total, best, dmin, out->dmin);
    out->scale = v16f_select_lt(total, best, scale, out->scale);
    out->min = v16f_select_lt(total, best, min, out->min);
    best = v16f_select_lt(total, best, total, best);
    /* d and dmin again, all codes kept: the normal equations of x ~ d (scale q) - dmin min */
    line g = {v16f_mul(d, scale), v16f_neg(v16f_mul(dmin, min))};
    v16f inv = inverse(g.d), q1 = zero, q2 = zero, xq = zero;
    for (int i = 0; i < n; i++) {
      v16f q = line_code(x[i], g, inv, top);
      q1 = v16f_add(q1, q);
      q2 = v16f_fma(q, q, q2);
      xq = v16f_fma(x[i], q, xq);
    }
    v16f a = over_super(v16f_mul(square(scale), q2), subs, 0), b = over_super(v16f_mul(v16f_mul(scale, min), q1), subs, 0);
    v16f c = over_super(v16f_mul(square(min), set((float)n)), subs, 0);
    v16f u = over_super(v16f_mul(scale, xq), subs, 0), v = over_super(v16f_neg(v16f_mul(min, sum)), subs, 0);
    v16f det = v16f_sub(v16f_mul(a, c), square(b)), solvable = v16f_mul(set(1e-5f), v16f_mul(a, c));
    v16f per_det = inverse(det);
    v16f both_d = v16f_mul(v16f_add(v16f_mul(c, u), v16f_mul(b, v)), per_det);
    v16f both_min = v16f_mul(v16f_add(v16f_mul(a, v), v16f_mul(b, u)), per_det);
    v16f alone = v16f_mul(v16f_add(u, v16f_mul(b, dmin)), inverse(a)); /* dmin as it is */
    d = v16f_select_lt(solvable, det, both_d, alone);
    dmin = v16f_select_lt(solvable, det, both_min, dmin);
    d = v16f_max(d, zero), dmin = v16f_max(dmin, zero);
  }
  return PE_OK;
}

typedef struct {
  uint16_t d[LANES], dmin[LANES];
  int8_t scale[LANES], min[LANES];
} k_bits;

static k_bits k_store(const k_scales *k) {
  k_bits b;
  v16f_store_f16(b.d, k->d);
  v16f_store_f16(b.dmin, k->dmin);
  v16i_store_i8(b.scale, v16f_to_i(k->scale));
  v16i_store_i8(b.min, v16f_to_i(k->min));
  return b;
}

PE_INLINE line k_line(const k_scales *k) { return (line){v16f_mul(k->d, k->scale), v16f_neg(v16f_mul(k->dmin, k->min))}; }

/* The twelve bytes of block_q4_K and block_q5_K. */
static void pack_k4_scales(uint8_t *out, const int8_t *scale, const int8_t *min) {
  for (int j = 0; j < 4; j++) {
    out[j] = (uint8_t)(scale[j] | scale[j + 4] >> 4 << 6);
    out[j + 4] = (uint8_t)(min[j] | min[j + 4] >> 4 << 6);
    out[j + 8] = (uint8_t)((scale[j + 4] & 15) | min[j + 4] << 4);
  }
}

static pe_status q2_k(const v16f *x, int n_lanes, void *to) {
  block_q2_K *out = to;
  (void)n_lanes;
  codes c;
  k_scales k;
  if (fit_k_line(x, 16, 3, 15, (grid){-0.8f, 0.1f, 14}, &k)) return PE_BAD_VALUE;
  k_bits b = k_store(&k);
  line_codes(&c, x, 16, k_line(&k), 3);
  for (int j = 0; j < 16; j++) out->scales[j] = (uint8_t)(b.scale[j] | b.min[j] << 4);
  pack_two_bits(out->qs, c.q);
  out->d = b.d[0], out->dmin = b.dmin[0];
  return PE_OK;
}

static pe_status q3_k(const v16f *x, int n_lanes, void *to) {
  block_q3_K *out = to;
  (void)n_lanes;
  codes c;
  k_scales k;
  levels l = {-4, 3, 0};
  if (fit_k_scale(x, l, -32, 31, (grid){-1.2f, 0.2f, 14}, &k)) return PE_BAD_VALUE;
  k_bits b = k_store(&k);
  scale_codes(&c, x, 16, v16f_mul(k.d, k.scale), l);
  memset(out->hmask, 0, sizeof out->hmask);
  for (int i = 0; i < 256; i++) out->hmask[i % 32] |= (uint8_t)((c.q[i] >> 2) << (i / 32));
  pack_two_bits(out->qs, c.q);
  memset(out->scales, 0, sizeof out->scales);
  for (int j = 0; j < 16; j++) {
    int s = b.scale[j] + 32;
    out->scales[j % 8] |= (uint8_t)((s & 15) << (j / 8 * 4));
    out->scales[8 + j % 4] |= (uint8_t)((s >> 4) << (j / 4 * 2));
  }
  out->d = b.d[0];
  return PE_OK;
}

static pe_status q4_k(const v16f *x, int n_lanes, void *to) {
  block_q4_K *out = to;
  codes c;
  k_scales k;
  if (fit_k_line(x, 32, 15, 63, (grid){-1.2f, 0.2f, 12}, &k)) return PE_BAD_VALUE;
  k_bits b = k_store(&k);
  line_codes(&c, x, 32, k_line(&k), 15);
  for (int s = 0; s < n_lanes / 8; s++) {
    const uint8_t *q = c.q + 256 * s;
    out[s].d = b.d[8 * s], out[s].dmin = b.dmin[8 * s];
    pack_k4_scales(out[s].scales, b.scale + 8 * s, b.min + 8 * s);
    for (int i = 0; i < 128; i++) out[s].qs[i] = (uint8_t)(q[i / 32 * 64 + i % 32] | q[i / 32 * 64 + 32 + i % 32] << 4);
  }
  return PE_OK;
}

static pe_status q5_k(const v16f *x, int n_lanes, void *to) {
  block_q5_K *out = to;
  codes c;
  k_scales k;
  if (fit_k_line(x, 32, 31, 63, (grid){-3, 0.25f, 16}, &k)) return PE_BAD_VALUE;
  k_bits b = k_store(&k);
  line_codes(&c, x, 32, k_line(&k), 31);
  for (int s = 0; s < n_lanes / 8; s++) {
    const uint8_t *q = c.q + 256 * s;
    out[s].d = b.d[8 * s], out[s].dmin = b.dmin[8 * s];
    pack_k4_scales(out[s].scales, b.scale + 8 * s, b.min + 8 * s);
    for (int i = 0; i < 128; i++)
      out[s].qs[i] = (uint8_t)((q[i / 32 * 64 + i % 32] & 15) | q[i / 32 * 64 + 32 + i % 32] << 4);
    memset(out[s].qh, 0, sizeof out[s].qh);
    for (int i = 0; i < 256; i++) out[s].qh[i % 32] |= (uint8_t)((q[i] >> 4) << (i / 32));
  }
  return PE_OK;
}

static pe_status q6_k(const v16f *x, int n_lanes, void *to) {
  block_q6_K *out = to;
  (void)n_lanes;
  codes c;
  k_scales k;
  levels l = {-32, 31, 0};
  if (fit_k_scale(x, l, -128, 127, (grid){-6, 0.3f, 30}, &k)) return PE_BAD_VALUE;
  k_bits b = k_store(&k);
  scale_codes(&c, x, 16, v16f_mul(k.d, k.scale), l);
  for (int h = 0; h < 2; h++) {
    const uint8_t *q = c.q + 128 * h;
    for (int i = 0; i < 64; i++) out->ql[64 * h + i] = (uint8_t)((q[i] & 15) | q[i + 64] << 4);
    for (int i = 0; i < 32; i++)
      out->qh[32 * h + i] = (uint8_t)(q[i] >> 4 | q[i + 32] >> 4 << 2 | q[i + 64] >> 4 << 4 | q[i + 96] >> 4 << 6);
  }
  memcpy(out->scales, b.scale, 16);
  out->d = b.d[0];
  return PE_OK;
}

/* ---- tensors ---- */

/* Lane b gets x[n b .. n b + n - 1]; lanes from n_lanes on are 0. Returns whether all are numbers of a size whose squares add up. */
static int load_lanes(const float *src, int n_lanes, int n, v16f *x) {
  float t[32][LANES] = {{0}};
  v16i largest = v16i_zero();
  for (int b = 0; b < n_lanes; b++)
    for (int i = 0; i < n; i++) t[i][b] = src[n * b + i];
  for (int i = 0; i < n; i++) {
    x[i] = v16f_load(t[i]);
    largest = v16i_max(largest, v16i_and(v16f_bits(x[i]), v16i_set1(0x7fffffff)));
  }
  return v16i_hmax(largest) < 0x5d5e0b6b; /* 1e18 */
}

/* F16, BF16: no blocks. */
static pe_status narrow(int32_t dtype, const float *src, uint16_t *dst, int64_t n) {
  int finite = 1;
  for (int64_t i = 0; i < n; i += LANES) {
    int64_t m = pe_min(LANES, n - i);
    v16f v = v16f_load_n(src + i, m);
    if (dtype == PE_F16) v16f_store_f16_n(dst + i, v, m), finite &= all_finite(half(v));
    else v16f_store_bf16_n(dst + i, v, m), finite &= all_finite(v16f_load_bf16_n(dst + i, m));
  }
  return finite ? PE_OK : PE_BAD_VALUE;
}

static const struct {
  int32_t dtype, in_lane, in_block, bytes;
  pe_status (*quantize)(const v16f *x, int n_lanes, void *out);
} formats[] = {
#define ENCODER(name, in_lane, quantize) {PE_##name, in_lane, PE_BLOCK_##name, PE_BYTES_##name, quantize}
  ENCODER(Q8_0, 32, q8_0), ENCODER(Q4_0, 32, q4_0), ENCODER(Q4_1, 32, q4_1), ENCODER(Q5_0, 32, q5_0), ENCODER(Q5_1, 32, q5_1),
  ENCODER(IQ4_NL, 32, iq4_nl), ENCODER(Q2_K, 16, q2_k), ENCODER(Q3_K, 16, q3_k), ENCODER(Q4_K, 32, q4_k), ENCODER(Q5_K, 32, q5_k),
  ENCODER(Q6_K, 16, q6_k),
#undef ENCODER
};

pe_status PE_NAME(quantize)(int32_t dtype, const float *src, void *dst, int64_t n) {
  v16f x[32];
  if (n < 0) return PE_BAD_SHAPE;
  if (dtype == PE_F16 || dtype == PE_BF16) return narrow(dtype, src, dst, n);
  for (size_t f = 0; f < sizeof formats / sizeof formats[0]; f++) {
    if (formats[f].dtype != dtype) continue;
    int in_lane = formats[f].in_lane;
    if (n % formats[f].in_block) return PE_BAD_SHAPE;
    for (int64_t i = 0; i < n; i += in_lane * LANES) {
      int n_lanes = (int)pe_min(LANES, (n - i) / in_lane);
      if (!load_lanes(src + i, n_lanes, in_lane, x)) return PE_BAD_VALUE;
      pe_status status = formats[f].quantize(x, n_lanes, (char *)dst + i / formats[f].in_block * formats[f].bytes);
      if (status) return status;
    }
    return PE_OK;
  }
  return PE_BAD_DTYPE;
}

/* linear_neon.h: what linear_few.c and linear_tiles.c multiply with where a register holds 4 lanes (NEON, i8mm).
 *
 * A step of 16 rows x 32 of k is 32 registers, and there are 32: so weights are opened and multiplied a part of 4 rows at a time,
 * 8 registers of codes. x comes 16 bytes a load, of which `sdot` takes the 4 that it needs. Sums of integers are exact in any
 * order and the floats' order is that of linear_few.c, so the bits are the same.
 *
 * With i8mm (PE_I8MM) a tile takes `smmla`: 2 rows x 8 of k of the weights times 2 rows of x, twice the products of an `sdot`.
 * Pairs of vectors are interleaved where a panel is unpacked, so the packed layout is that of every instruction set.
 */
#ifndef PE_LINEAR_NEON_H
#define PE_LINEAR_NEON_H

#include "linear_parts.h"

/* acc[l] += dot product of bytes 4l .. 4l + 3 of w and bytes 4 lane .. 4 lane + 3 of x; `lane` is a constant. */
PE_INLINE int32x4_t dot_lane(int32x4_t acc, int8x16_t w, int8x16_t x, int lane) {
  switch (lane) {
    case 0: return vdotq_laneq_s32(acc, w, x, 0);
    case 1: return vdotq_laneq_s32(acc, w, x, 1);
    case 2: return vdotq_laneq_s32(acc, w, x, 2);
    default: return vdotq_laneq_s32(acc, w, x, 3);
  }
}

/* a * x[lane] + c */
PE_INLINE float32x4_t fma_lane(float32x4_t c, float32x4_t a, float32x4_t x, int lane) {
  switch (lane) {
    case 0: return vfmaq_laneq_f32(c, a, x, 0);
    case 1: return vfmaq_laneq_f32(c, a, x, 1);
    case 2: return vfmaq_laneq_f32(c, a, x, 2);
    default: return vfmaq_laneq_f32(c, a, x, 3);
  }
}

PE_INLINE int32x4_t all_lanes(int32x4_t x, int lane) {
  switch (lane) {
    case 0: return vdupq_laneq_s32(x, 0);
    case 1: return vdupq_laneq_s32(x, 1);
    case 2: return vdupq_laneq_s32(x, 2);
    default: return vdupq_laneq_s32(x, 3);
  }
}

/* What a step of up to 4 rows of x is multiplied with beside codes, lane i of row i. d: scale. Of each half: dsum, for the offsets;
 * start: what its sum of products begins with, which is what the zero point takes off (it wraps for codes of NaN). */
typedef struct step_scales { float32x4_t d, dsum[2]; int32x4_t start[2]; } step_scales;

PE_INLINE step_scales scales_of(int rows, int halves, int offsets, int zero, const char *x, int64_t ld, int64_t s) {
  step_scales y = {vdupq_n_f32(0), {vdupq_n_f32(0), vdupq_n_f32(0)}, {vdupq_n_s32(0), vdupq_n_s32(0)}};
PE_UNROLL(4)
  for (int i = 0; i < rows; i++) {
    const linear_step *a = linear_step_of(x, ld, i, s);
    y.d[i] = a->d;
PE_UNROLL(2)
    for (int h = 0; h < halves; h++) {
      if (offsets) y.dsum[h][i] = halves == 2 ? a->dsum2[h] : a->dsum;
      if (zero) y.start[h][i] = halves == 2 ? a->sum2[h] : a->sum;
    }
  }
PE_UNROLL(2)
  for (int h = 0; h < halves; h++)
    if (zero) y.start[h] = vmulq_n_s32(y.start[h], -zero);
  return y;
}

/* Codes as signed bytes; those with the zero point 128 less 128. */
PE_INLINE int8x16_t signed_codes(pe_traits t, pe_pb u) { return (int8x16_t)(t.zero == 128 ? u ^ (uint8_t)0x80 : u); }

/* ---- few rows ---- */

/* A part of a step times a row of x, number i of its tile, added to 4 sums. */
PE_INLINE float32x4_t decode_part(pe_traits t, const pe_step_part *w, const linear_step *a, int i, const step_scales *f,
                                  float32x4_t sum) {
  const int8x16_t x[2] = {vld1q_s8(a->q), vld1q_s8(a->q + 16)};
PE_UNROLL(2)
  for (int h = 0; h < t.halves; h++) {
    int32x4_t p = all_lanes(f->start[h], i);
PE_UNROLL(8)
    for (int g = 8 / t.halves * h; g < 8 / t.halves * (h + 1); g++) p = dot_lane(p, signed_codes(t, w->u[g]), x[g / 4], g % 4);
    sum = fma_lane(sum, vcvtq_f32_s32(p) * (float32x4_t)w->s[h], f->d, i);
    if (t.offsets) sum = fma_lane(sum, (float32x4_t)w->o[h], f->dsum[h], i);
  }
  return sum;
}

/* out[i][lane] = row `lane` of the group times row i of x. `next` is the memory that the thread will read after the group. */
PE_INLINE void decode_rows(int id, int rows, const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x,
                           int64_t ld, float *out) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32, zero = t.zero == 128 ? 0 : t.zero, step_bytes = (t.head + t.body) / steps;
  const int64_t blocks = k / t.k, slice = linear_slice(k) * 32 / t.k;
  float32x4_t acc[ROWS_FEW][4];
PE_UNROLL(16)
  for (int i = 0; i < 4 * rows; i++) acc[i / 4][i % 4] = vdupq_n_f32(0);
  for (int64_t b = 0, end = slice; b < blocks; b++) {
    const uint8_t *head = pe_block_head(t, group, b), *body = pe_block_body(t, group, b);
PE_UNROLL_STEPS
    for (int j = 0; j < steps; j++) {
      decode_fetch(group, next, bytes, body - group + (int64_t)j * step_bytes, step_bytes);
      const step_scales f = scales_of(rows, t.halves, t.offsets, zero, x, ld, b * steps + j);
PE_UNROLL(4)
      for (int part = 0; part < 4; part++) {
        pe_step_part w;
        pe_unpack_part(id, head, body, j, part, &w);
PE_UNROLL(8)
        for (int i = 0; i < rows; i++)
          acc[i][part] = decode_part(t, &w, linear_step_of(x, ld, i, b * steps + j), i, &f, acc[i][part]);
      }
    }
    if (b + 1 < end && b + 1 < blocks) continue;
PE_UNROLL(16)
    for (int i = 0; i < 4 * rows; i++) {
      const float32x4_t sum = acc[i / 4][i % 4];
      vst1q_f32(out + 4 * i, end == slice ? sum : vld1q_f32(out + 4 * i) + sum);
      acc[i / 4][i % 4] = vdupq_n_f32(0);
    }
    end += slice;
  }
}

/* ---- panels ---- */

/* A part of an unpacked step: 8 vectors of signed codes, then scales, then offsets. i8mm multiplies 2 rows x 8 of k: vector 2c holds
 * rows 0 and 1 at k 8c .. 8c + 7, the next one rows 2 and 3; scales and offsets are vectors of rows 0, 1, 0, 1 and 2, 3, 2, 3. */
PE_INLINE uint8_t *store_floats(float32x4_t v, uint8_t *to) {
#if defined(PE_I8MM)
  const float64x2_t two = vreinterpretq_f64_f32(v);
  vst1q_f64((double *)to, vdupq_laneq_f64(two, 0));
  vst1q_f64((double *)(to + 16), vdupq_laneq_f64(two, 1));
  return to + 32;
#else
  vst1q_f32((float *)to, v);
  return to + 16;
#endif
}

PE_INLINE uint8_t *store_part(pe_traits t, const pe_step_part *w, uint8_t *to) {
PE_UNROLL(4)
  for (int g = 0; g < 8; g += 2) {
    const int8x16_t u[2] = {signed_codes(t, w->u[g]), signed_codes(t, w->u[g + 1])};
#if defined(PE_I8MM)
    const int32x4_t a = vreinterpretq_s32_s8(u[0]), b = vreinterpretq_s32_s8(u[1]);
    vst1q_s8((int8_t *)to + 16 * g, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
    vst1q_s8((int8_t *)to + 16 * g + 16, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
#else
    vst1q_s8((int8_t *)to + 16 * g, u[0]);
    vst1q_s8((int8_t *)to + 16 * g + 16, u[1]);
#endif
  }
  to += 128;
PE_UNROLL(2)
  for (int h = 0; h < t.halves; h++) to = store_floats((float32x4_t)w->s[h], to);
PE_UNROLL(2)
  for (int h = 0; h < t.halves * t.offsets; h++) to = store_floats((float32x4_t)w->o[h], to);
  return to;
}

/* Steps s0 .. s0 + count - 1 of a group. */
PE_INLINE void unpack_panel(int id, const uint8_t *const group[PANEL_GROUPS], int64_t s0, int64_t count, uint8_t *to) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32;
  for (int64_t b = s0 / steps; b < (s0 + count) / steps; b++) {
    const uint8_t *head = pe_block_head(t, group[0], b), *body = pe_block_body(t, group[0], b);
PE_UNROLL_STEPS
    for (int j = 0; j < steps; j++) {
PE_UNROLL(4)
      for (int part = 0; part < 4; part++) {
        pe_step_part w;
        pe_unpack_part(id, head, body, j, part, &w);
        to = store_part(t, &w, to);
      }
    }
  }
}

/* ---- tiles ---- */

#if defined(PE_I8MM)
/* How often a tile of `count` steps calls fetch_ahead. */
PE_INLINE int64_t tile_fetches(int64_t count) { return count; }

/* Columns 8c .. 8c + 7 of a step of 2 rows of x, for c = 0 .. 3. */
typedef struct step_pair { int8x16_t c[4]; } step_pair;

PE_INLINE step_pair pair_of(const linear_step *a, const linear_step *b) {
  step_pair y;
PE_UNROLL(2)
  for (int c = 0; c < 2; c++) {
    const int64x2_t p = vreinterpretq_s64_s8(vld1q_s8(a->q + 16 * c)), q = vreinterpretq_s64_s8(vld1q_s8(b->q + 16 * c));
    y.c[2 * c] = vreinterpretq_s8_s64(vzip1q_s64(p, q));
    y.c[2 * c + 1] = vreinterpretq_s8_s64(vzip2q_s64(p, q));
  }
  return y;
}

/* Lanes 2i, 2i, 2i + 1, 2i + 1. */
PE_INLINE float32x4_t twice_f(float32x4_t x, int i) { return i ? vzip2q_f32(x, x) : vzip1q_f32(x, x); }
PE_INLINE int32x4_t twice_i(int32x4_t x, int i) { return i ? vzip2q_s32(x, x) : vzip1q_s32(x, x); }

/* Halves 0 of a and b, or halves 1: rows of sums to pairs of rows, and back. */
PE_INLINE float32x4_t halves_of(float32x4_t a, float32x4_t b, int half) {
  const float64x2_t p = vreinterpretq_f64_f32(a), q = vreinterpretq_f64_f32(b);
  return vreinterpretq_f32_f64(half ? vzip2q_f64(p, q) : vzip1q_f64(p, q));
}

/* Panel times row i of x, for `rows` <= INT_TILE_ROWS rows and `count` steps. Sums are of 2 rows of x and 2 of the panel;
 * the last of an odd number of rows is multiplied twice. */
PE_INLINE void tile_rows(int rows, int halves, int offsets, int z128, int run, int zero, const uint8_t *panel, int64_t count,
                         const char *x, int64_t ld, panel_ahead *ahead, const linear_target *to) {
  enum { PAIRS = INT_TILE_ROWS / 2 };
  const int pairs = (rows + 1) / 2;
  float32x4_t sum[PAIRS][8];
  (void)z128, (void)run; /* a panel's codes are signed, and sdot sums in 32 bits */
PE_UNROLL(2)
  for (int i = 0; i < pairs; i++) {
    float a[16], b[16];
    v16f_store(a, linear_begin(to, 32 * i));
    v16f_store(b, linear_begin(to, 16 * (2 * i + 1 < rows ? 2 * i + 1 : 2 * i)));
PE_UNROLL(8)
    for (int n = 0; n < 8; n++) sum[i][n] = halves_of(vld1q_f32(a + n / 2 * 4), vld1q_f32(b + n / 2 * 4), n % 2);
  }
  for (int64_t s = 0; s < count; s++) {
    fetch_ahead(ahead);
    const step_scales f = scales_of(rows, halves, offsets, zero, x, ld, s);
    step_pair q[PAIRS];
PE_UNROLL(2)
    for (int i = 0; i < pairs; i++)
      q[i] = pair_of(linear_step_of(x, ld, 2 * i, s), linear_step_of(x, ld, 2 * i + 1 < rows ? 2 * i + 1 : 2 * i, s));
PE_UNROLL(8)
    for (int n = 0; n < 8; n++) { /* rows 2n and 2n + 1 of the panel */
      const int8_t *w = (const int8_t *)panel + 16 * (n % 2);
      const float *g = (const float *)(panel + 128) + 4 * (n % 2);
PE_UNROLL(2)
      for (int h = 0; h < halves; h++)
PE_UNROLL(2)
        for (int i = 0; i < pairs; i++) {
          int32x4_t dot = twice_i(f.start[h], i);
PE_UNROLL(4)
          for (int c = 4 / halves * h; c < 4 / halves * (h + 1); c++) dot = vmmlaq_s32(dot, q[i].c[c], vld1q_s8(w + 32 * c));
          sum[i][n] = vfmaq_f32(sum[i][n], vcvtq_f32_s32(dot) * vld1q_f32(g + 8 * h), twice_f(f.d, i));
          if (offsets) sum[i][n] = vfmaq_f32(sum[i][n], vld1q_f32(g + 8 * (halves + h)), twice_f(f.dsum[h], i));
        }
      if (n % 2) panel += panel_step_bytes(halves, offsets) / 4;
    }
  }
PE_UNROLL(2)
  for (int i = 0; i < pairs; i++)
PE_UNROLL(2)
    for (int r = 0; r < 2; r++) {
      const float32x4_t *y = sum[i];
      if (2 * i + r < rows)
        linear_end(to, 16 * (2 * i + r), (v16f){(pe_pf)halves_of(y[0], y[1], r), (pe_pf)halves_of(y[2], y[3], r),
                                                (pe_pf)halves_of(y[4], y[5], r), (pe_pf)halves_of(y[6], y[7], r)});
    }
}
#else
PE_INLINE int64_t tile_fetches(int64_t count) {
  (void)count;
  return 4; /* once a part */
}

/* Panel times row i of x, for `rows` <= INT_TILE_ROWS rows and `count` <= PANEL_STEPS steps, a part after the other. */
PE_INLINE void tile_rows(int rows, int halves, int offsets, int z128, int run, int zero, const uint8_t *panel, int64_t count,
                         const char *x, int64_t ld, panel_ahead *ahead, const linear_target *to) {
  step_scales scales[PANEL_STEPS];
  float sums[INT_TILE_ROWS][16];
  (void)z128, (void)run; /* a panel's codes are signed, and sdot sums in 32 bits */
  for (int64_t s = 0; s < count; s++) scales[s] = scales_of(rows, halves, offsets, zero, x, ld, s);
PE_UNROLL(4)
  for (int i = 0; i < rows; i++) v16f_store(sums[i], linear_begin(to, 16 * i));
PE_UNROLL(1)
  for (int part = 0; part < 4; part++) {
    const uint8_t *w = panel + part * (panel_step_bytes(halves, offsets) / 4);
    float32x4_t sum[INT_TILE_ROWS];
    fetch_ahead(ahead);
PE_UNROLL(4)
    for (int i = 0; i < rows; i++) sum[i] = vld1q_f32(sums[i] + 4 * part);
PE_UNROLL(1)
    for (int64_t s = 0; s < count; s++, w += panel_step_bytes(halves, offsets)) {
      const step_scales *f = scales + s;
      const float *g = (const float *)(w + 128);
PE_UNROLL(2)
      for (int h = 0; h < halves; h++) {
        int32x4_t dot[INT_TILE_ROWS];
PE_UNROLL(4)
        for (int i = 0; i < rows; i++) dot[i] = all_lanes(f->start[h], i);
PE_UNROLL(8)
        for (int v = 8 / halves * h; v < 8 / halves * (h + 1); v++)
PE_UNROLL(4)
          for (int i = 0; i < rows; i++)
            dot[i] = dot_lane(dot[i], vld1q_s8((const int8_t *)w + 16 * v),
                              vld1q_s8(linear_step_of(x, ld, i, s)->q + v / 4 * 16), v % 4);
PE_UNROLL(4)
        for (int i = 0; i < rows; i++) {
          sum[i] = fma_lane(sum[i], vcvtq_f32_s32(dot[i]) * vld1q_f32(g + 4 * h), f->d, i);
          if (offsets) sum[i] = fma_lane(sum[i], vld1q_f32(g + 4 * (halves + h)), f->dsum[h], i);
        }
      }
    }
PE_UNROLL(4)
    for (int i = 0; i < rows; i++) vst1q_f32(sums[i] + 4 * part, sum[i]);
  }
PE_UNROLL(4)
  for (int i = 0; i < rows; i++) linear_end(to, 16 * i, v16f_load(sums[i]));
}
#endif

#endif

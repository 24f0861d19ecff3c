/* linear_neon.h: what linear_few.c and linear_tiles.c multiply with where a register holds 4 lanes (NEON, i8mm), or 8 (SVE of 256 bits).
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

/* ---- one register: lanes of 4 rows, or of 8 with vectors of 256 bits; 16 bytes of x lie in it once, or twice ---- */

#if defined(PE_SVE256)
PE_INLINE pe_pf twice_in(float32x4_t x) { return (pe_pf)(sv_f)svdup_neonq_f32(x); }
PE_INLINE pe_pi twice_in_i(int32x4_t x) { return (pe_pi)(sv_i)svdup_neonq_s32(x); }
PE_INLINE pe_pb sixteen(const int8_t *p) { return (pe_pb)(sv_s)svld1rq_s8(svptrue_b8(), p); }
#define DOT_LANE(lane) (pe_pi)(sv_i)svdot_lane_s32((sv_i)acc, (sv_s)w, (sv_s)x, lane)
#define FMA_LANE(lane) (pe_pf)(sv_f)svmla_lane_f32((sv_f)c, (sv_f)a, (sv_f)x, lane)
#define ALL_LANES(lane) (pe_pi)(sv_i)svdup_n_s32(vgetq_lane_s32(x, lane))
enum { LANE_STARTS = 0 }; /* starts of sums by themselves: clang 22 ends with a fault where those of 2 rows become lanes of a vector */
#else
PE_INLINE pe_pf twice_in(float32x4_t x) { return (pe_pf)x; }
PE_INLINE pe_pi twice_in_i(int32x4_t x) { return (pe_pi)x; }
PE_INLINE pe_pb sixteen(const int8_t *p) { return (pe_pb)vld1q_s8(p); }
#define DOT_LANE(lane) (pe_pi)vdotq_laneq_s32((int32x4_t)acc, (int8x16_t)w, (int8x16_t)x, lane)
#define FMA_LANE(lane) (pe_pf)vfmaq_laneq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)x, lane)
#define ALL_LANES(lane) (pe_pi)vdupq_laneq_s32(x, lane)
enum { LANE_STARTS = 1 };
#endif

#define OF_LANE(f) switch (lane) { case 0: return f(0); case 1: return f(1); case 2: return f(2); default: return f(3); }
/* acc[l] += dot product of bytes 4l .. 4l + 3 of w and bytes 4 lane .. 4 lane + 3 of x; `lane` is a constant. */
PE_INLINE pe_pi dot_lane(pe_pi acc, pe_pb w, pe_pb x, int lane) { OF_LANE(DOT_LANE) }
PE_INLINE pe_pf fma_lane(pe_pf c, pe_pf a, pe_pf x, int lane) { OF_LANE(FMA_LANE) } /* a * x[lane] + c */
PE_INLINE pe_pi all_lanes(int32x4_t x, int lane) { OF_LANE(ALL_LANES) }

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
PE_INLINE pe_pb signed_codes(pe_traits t, pe_pb u) { return t.zero == 128 ? u ^ (uint8_t)0x80 : u; }

/* ---- few rows ---- */

/* A part of a step times a row of x, number i of its tile, added to its sums. */
PE_INLINE pe_pf decode_part(pe_traits t, const pe_step_part *w, const linear_step *a, int i, const step_scales *f, pe_pf sum) {
  const pe_pb x[2] = {sixteen(a->q), sixteen(a->q + 16)};
PE_UNROLL(2)
  for (int h = 0; h < t.halves; h++) {
    const int32_t codes = t.halves == 2 ? a->sum2[h] : a->sum, zero = t.zero == 128 ? 0 : t.zero;
    pe_pi p = LANE_STARTS ? all_lanes(f->start[h], i) : all_lanes(vdupq_n_s32((int32_t)((uint32_t)-zero * (uint32_t)codes)), 0);
PE_UNROLL(8)
    for (int g = 8 / t.halves * h; g < 8 / t.halves * (h + 1); g++) p = dot_lane(p, signed_codes(t, w->u[g]), x[g / 4], g % 4);
    sum = fma_lane(sum, p_to_f(p) * w->s[h], twice_in(f->d), i);
    if (t.offsets) sum = fma_lane(sum, w->o[h], twice_in(f->dsum[h]), i);
  }
  return sum;
}

/* out[i][lane] = row `lane` of the group times row i of x. `next` is the memory that the thread will read after the group. */
PE_INLINE void decode_rows(int id, int rows, const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x,
                           int64_t ld, float *out) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32, zero = t.zero == 128 ? 0 : t.zero, step_bytes = (t.head + t.body) / steps;
  const int64_t blocks = k / t.k, slice = linear_slice(k) * 32 / t.k;
  pe_pf acc[ROWS_FEW][PE_PARTS];
PE_UNROLL(16)
  for (int i = 0; i < PE_PARTS * rows; i++) acc[i / PE_PARTS][i % PE_PARTS] = (pe_pf){0};
  for (int64_t b = 0, end = slice; b < blocks; b++) {
    const uint8_t *head = pe_block_head(t, group, b), *body = pe_block_body(t, group, b);
PE_UNROLL_STEPS
    for (int j = 0; j < steps; j++) {
      decode_fetch(group, next, bytes, body - group + (int64_t)j * step_bytes, step_bytes);
      const step_scales f = scales_of(rows, t.halves, t.offsets, LANE_STARTS ? zero : 0, x, ld, b * steps + j);
PE_UNROLL(4)
      for (int part = 0; part < PE_PARTS; part++) {
        pe_step_part w;
        pe_unpack_part(id, head, body, j, part, &w);
PE_UNROLL(8)
        for (int i = 0; i < rows; i++)
          acc[i][part] = decode_part(t, &w, linear_step_of(x, ld, i, b * steps + j), i, &f, acc[i][part]);
      }
    }
    if (b + 1 < end && b + 1 < blocks) continue;
PE_UNROLL(16)
    for (int i = 0; i < PE_PARTS * rows; i++) {
      const pe_pf sum = acc[i / PE_PARTS][i % PE_PARTS];
      pe_pf_mem *const to = (pe_pf_mem *)(out + PE_PART_LANES * i);
      *to = end == slice ? sum : (pe_pf)*to + sum;
      acc[i / PE_PARTS][i % PE_PARTS] = (pe_pf){0};
    }
    end += slice;
  }
}

/* ---- panels ---- */

/* A part of an unpacked step: 8 vectors of signed codes, then scales, then offsets. i8mm multiplies 2 rows x 8 of k: in each 16 bytes of
 * vector 2c are rows 0 and 1 at k 8c .. 8c + 7, in those of the next one rows 2 and 3; scales and offsets are vectors of rows 0, 1, 0, 1 and
 * 2, 3, 2, 3. With vectors of 256 bits the second 16 bytes are the next 2 rows: the two vectors have rows 0 .. 3 and 4 .. 7. */
#if defined(PE_SVE256)
typedef svfloat64_t sv_d __attribute__((arm_sve_vector_bits(256)));
PE_INLINE pe_pb zip_low(pe_pb a, pe_pb b) { return (pe_pb)(sv_i)svzip1_s32((sv_i)a, (sv_i)b); }
PE_INLINE pe_pb zip_high(pe_pb a, pe_pb b) { return (pe_pb)(sv_i)svzip2_s32((sv_i)a, (sv_i)b); }
PE_INLINE pe_pf pairs_low(pe_pf a, pe_pf b) { return (pe_pf)(sv_d)svzip1_f64((sv_d)a, (sv_d)b); }
PE_INLINE pe_pf pairs_high(pe_pf a, pe_pf b) { return (pe_pf)(sv_d)svzip2_f64((sv_d)a, (sv_d)b); }
PE_INLINE pe_pf pairs_even(pe_pf a, pe_pf b) { return (pe_pf)(sv_d)svuzp1_f64((sv_d)a, (sv_d)b); }
PE_INLINE pe_pf pairs_odd(pe_pf a, pe_pf b) { return (pe_pf)(sv_d)svuzp2_f64((sv_d)a, (sv_d)b); }
PE_INLINE pe_pi mat(pe_pi acc, pe_pb x, pe_pb w) { return (pe_pi)(sv_i)svmmla_s32((sv_i)acc, (sv_s)x, (sv_s)w); }
#elif defined(PE_I8MM)
PE_INLINE pe_pb zip_low(pe_pb a, pe_pb b) { return (pe_pb)vzip1q_s32((int32x4_t)a, (int32x4_t)b); }
PE_INLINE pe_pb zip_high(pe_pb a, pe_pb b) { return (pe_pb)vzip2q_s32((int32x4_t)a, (int32x4_t)b); }
PE_INLINE pe_pf pairs_low(pe_pf a, pe_pf b) { return (pe_pf)vzip1q_f64((float64x2_t)a, (float64x2_t)b); }
PE_INLINE pe_pf pairs_high(pe_pf a, pe_pf b) { return (pe_pf)vzip2q_f64((float64x2_t)a, (float64x2_t)b); }
PE_INLINE pe_pf pairs_even(pe_pf a, pe_pf b) { return pairs_low(a, b); }
PE_INLINE pe_pf pairs_odd(pe_pf a, pe_pf b) { return pairs_high(a, b); }
PE_INLINE pe_pi mat(pe_pi acc, pe_pb x, pe_pb w) { return (pe_pi)vmmlaq_s32((int32x4_t)acc, (int8x16_t)x, (int8x16_t)w); }
#endif

PE_INLINE uint8_t *store_floats(pe_pf v, uint8_t *to) {
#if defined(PE_I8MM)
  *(pe_pf_mem *)to = pairs_low(v, v);
  *(pe_pf_mem *)(to + PE_PART_BYTES) = pairs_high(v, v);
  return to + 2 * PE_PART_BYTES;
#else
  *(pe_pf_mem *)to = v;
  return to + PE_PART_BYTES;
#endif
}

PE_INLINE void store_codes(pe_pb v, uint8_t *to) { *(pe_pi_mem *)to = (pe_pi)v; }

PE_INLINE uint8_t *store_part(pe_traits t, const pe_step_part *w, uint8_t *to) {
PE_UNROLL(4)
  for (int g = 0; g < 8; g += 2, to += 2 * PE_PART_BYTES) {
    const pe_pb a = signed_codes(t, w->u[g]), b = signed_codes(t, w->u[g + 1]);
#if defined(PE_I8MM)
    store_codes(zip_low(a, b), to);
    store_codes(zip_high(a, b), to + PE_PART_BYTES);
#else
    store_codes(a, to);
    store_codes(b, to + PE_PART_BYTES);
#endif
  }
PE_UNROLL(2)
  for (int h = 0; h < t.halves; h++) to = store_floats(w->s[h], to);
PE_UNROLL(2)
  for (int h = 0; h < t.halves * t.offsets; h++) to = store_floats(w->o[h], to);
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
      for (int part = 0; part < PE_PARTS; part++) {
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
typedef struct step_pair { pe_pb c[4]; } step_pair;

PE_INLINE step_pair pair_of(const linear_step *a, const linear_step *b) {
  step_pair y;
PE_UNROLL(2)
  for (int c = 0; c < 2; c++) {
    const pe_pf p = (pe_pf)sixteen(a->q + 16 * c), q = (pe_pf)sixteen(b->q + 16 * c);
#if defined(PE_SVE256)
    y.c[2 * c] = (pe_pb)(sv_d)svtrn1_f64((sv_d)p, (sv_d)q);
    y.c[2 * c + 1] = (pe_pb)(sv_d)svtrn2_f64((sv_d)p, (sv_d)q);
#else
    y.c[2 * c] = (pe_pb)pairs_low(p, q);
    y.c[2 * c + 1] = (pe_pb)pairs_high(p, q);
#endif
  }
  return y;
}

/* Lanes 2i, 2i, 2i + 1, 2i + 1. */
PE_INLINE pe_pf twice_f(float32x4_t x, int i) { return twice_in(i ? vzip2q_f32(x, x) : vzip1q_f32(x, x)); }
PE_INLINE pe_pi twice_i(int32x4_t x, int i) { return twice_in_i(i ? vzip2q_s32(x, x) : vzip1q_s32(x, x)); }

/* Panel times row i of x, for `rows` <= INT_TILE_ROWS rows and `count` steps. A sum is of 2 rows of x and 2 of the panel, or twice 2; the last
 * of an odd number of rows is multiplied twice. */
PE_INLINE void tile_rows(int rows, int halves, int offsets, int z128, int run, int zero, const uint8_t *panel, int64_t count,
                         const char *x, int64_t ld, panel_ahead *ahead, const linear_target *to) {
  enum { PAIRS = INT_TILE_ROWS / 2, SUMS = 2 * PE_PARTS };
  const int pairs = (rows + 1) / 2;
  pe_pf sum[PAIRS][SUMS];
  (void)z128, (void)run; /* a panel's codes are signed, and sdot sums in 32 bits */
PE_UNROLL(2)
  for (int i = 0; i < pairs; i++) {
    float a[16], b[16];
    v16f_store(a, linear_begin(to, 32 * i));
    v16f_store(b, linear_begin(to, 16 * (2 * i + 1 < rows ? 2 * i + 1 : 2 * i)));
PE_UNROLL(8)
    for (int n = 0; n < SUMS; n++) {
      const pe_pf p = ((const pe_pf_mem *)a)[n / 2], q = ((const pe_pf_mem *)b)[n / 2];
      sum[i][n] = n % 2 ? pairs_high(p, q) : pairs_low(p, q);
    }
  }
  for (int64_t s = 0; s < count; s++) {
    fetch_ahead(ahead);
    const step_scales f = scales_of(rows, halves, offsets, zero, x, ld, s);
    step_pair q[PAIRS];
PE_UNROLL(2)
    for (int i = 0; i < pairs; i++)
      q[i] = pair_of(linear_step_of(x, ld, 2 * i, s), linear_step_of(x, ld, 2 * i + 1 < rows ? 2 * i + 1 : 2 * i, s));
PE_UNROLL(8)
    for (int n = 0; n < SUMS; n++) { /* vector n % 2 of part n / 2 */
      const uint8_t *w = panel + PE_PART_BYTES * (n % 2);
      const pe_pf_mem *g = (const pe_pf_mem *)(panel + 8 * PE_PART_BYTES) + n % 2;
PE_UNROLL(2)
      for (int h = 0; h < halves; h++)
PE_UNROLL(2)
        for (int i = 0; i < pairs; i++) {
          pe_pi dot = twice_i(f.start[h], i);
PE_UNROLL(4)
          for (int c = 4 / halves * h; c < 4 / halves * (h + 1); c++) dot = mat(dot, q[i].c[c], pe_codes(w + 2 * PE_PART_BYTES * c, 0, 0));
          sum[i][n] = p_fma(p_to_f(dot) * (pe_pf)g[2 * h], twice_f(f.d, i), sum[i][n]);
          if (offsets) sum[i][n] = p_fma((pe_pf)g[2 * (halves + h)], twice_f(f.dsum[h], i), sum[i][n]);
        }
      if (n % 2) panel += panel_step_bytes(halves, offsets) / PE_PARTS;
    }
  }
PE_UNROLL(2)
  for (int i = 0; i < pairs; i++)
PE_UNROLL(2)
    for (int r = 0; r < 2; r++) {
      const pe_pf *y = sum[i];
#define ROWS_OF(n) r ? pairs_odd(y[2 * (n)], y[2 * (n) + 1]) : pairs_even(y[2 * (n)], y[2 * (n) + 1])
      if (2 * i + r < rows) linear_end(to, 16 * (2 * i + r), (v16f)PE_MAP0(ROWS_OF));
#undef ROWS_OF
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
    pe_pf sum[INT_TILE_ROWS];
    fetch_ahead(ahead);
PE_UNROLL(4)
    for (int i = 0; i < rows; i++) sum[i] = ((const pe_pf_mem *)sums[i])[part];
PE_UNROLL(1)
    for (int64_t s = 0; s < count; s++, w += panel_step_bytes(halves, offsets)) {
      const step_scales *f = scales + s;
      const pe_pf_mem *g = (const pe_pf_mem *)(w + 128);
PE_UNROLL(2)
      for (int h = 0; h < halves; h++) {
        pe_pi dot[INT_TILE_ROWS];
PE_UNROLL(4)
        for (int i = 0; i < rows; i++) dot[i] = all_lanes(f->start[h], i);
PE_UNROLL(8)
        for (int v = 8 / halves * h; v < 8 / halves * (h + 1); v++)
PE_UNROLL(4)
          for (int i = 0; i < rows; i++)
            dot[i] = dot_lane(dot[i], pe_codes(w + 16 * v, 0, 0), sixteen(linear_step_of(x, ld, i, s)->q + v / 4 * 16), v % 4);
PE_UNROLL(4)
        for (int i = 0; i < rows; i++) {
          sum[i] = fma_lane(sum[i], p_to_f(dot[i]) * (pe_pf)g[h], (pe_pf)f->d, i);
          if (offsets) sum[i] = fma_lane(sum[i], (pe_pf)g[halves + h], (pe_pf)f->dsum[h], i);
        }
      }
    }
PE_UNROLL(4)
    for (int i = 0; i < rows; i++) ((pe_pf_mem *)sums[i])[part] = sum[i];
  }
PE_UNROLL(4)
  for (int i = 0; i < rows; i++) linear_end(to, 16 * i, v16f_load(sums[i]));
}
#endif

#endif

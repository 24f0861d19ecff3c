/* linear.c: one to four weight matrices times the same rows, with everything fused that touches those rows.
 * Reference: pyengine/ops/matmul.py: linear.
 *
 *   h = rms_norm(x, norm) if norm else x                  x F32 [m, k]
 *   y_i = h w_i^T + bias_i                                w_i [n_i, k]: packed (pack.h), or in the file's layout
 *   out_0 = act(y_0) * y_1 if glu, else out_i = y_i (+ residual), then the soft cap
 *
 * Work.  A panel is NR groups of 16 rows of one matrix, a strip 1 to 4 panels; an item is a strip times a block of up to 256
 * rows of x. Threads claim runs of items, so a matrix is read once for each block of rows, in order. With glu an item is the
 * strips of both matrices.
 *
 * Quantized weights.  h becomes int8, symmetric, one scale for 32 of k; products are exact in int32 and enter one float
 * accumulator an output, k ascending:  acc += (isum * s) * d;  acc += o * (d * sum of x).  All paths do exactly this, so
 * the bits of an output depend neither on the number of rows nor on the number of threads.
 *   to 16 rows: `decode_*` keeps a step of 16 rows x 32 of k in registers and multiplies it with up to 4 rows of x. It must
 *               read the weights' bytes once, and does 8 dot products for each row and 9 to 24 instructions of unpacking on
 *               16 x 32 weights (e.g. 288 bytes of Q4_0): memory is the limit.
 *   many rows:  a panel of 256 of k is unpacked once into L1 (12 KB of codes, 1.5 to 6 KB of scales) and `tile_*` takes
 *               4 rows of x times NR vectors, 12 integer and 12 float accumulators in 32 registers.
 * Float weights, and any format that is not packed, become float panels of 128 of k; x stays float; fma in k order.
 *
 * Scratch: quantized rows (shared, or each thread's own where rows are few), and for each thread its panel and the sums
 * of a strip [panel][rows of a block][16 NR].
 */
#include "../host/dequant.h"
#include "codes.h"
#include "linear.h"
#include "unpack.h"
#include "vec.h"

#if defined(PE_AVX512)
enum { MR = 4, MRF = 8, MRD = 8 }; /* rows of an integer and of a float tile, and of the decode kernel: MRD or FEW at once */
#else
enum { MR = 4, MRF = 4, MRD = 4 };
#endif
enum {
  STEPS = 8,          /* steps of 32 of k in an unpacked panel */
  KF = 128,           /* k of a float panel */
  KD = 256,           /* k of a panel that is dequantized from the file's layout: a whole number of any format's blocks */
  AHEAD = 8192,       /* bytes of weights that the decode kernels prefetch */
};

/* ---- rows of x as int8 ---- */

/* 32 of k of one row: one cache line. A row is k / 32 of them, and one more that is never read, so that rows of a power of two
 * do not share cache sets. */
typedef struct xstep {
  int8_t q[32];
  float d, dsum, dsum2[2];        /* scale; scale * sum of codes, of all and of each half */
  int32_t sum, sum2[2], not_used; /* sum of codes, of all and of each half */
} xstep;
_Static_assert(sizeof(xstep) == 64, "a step of x is a cache line");

static void quantize_row(const float *x, int64_t k, xstep *to) {
  for (int64_t b = 0; b < k / 32; b++, to++) {
    const v16f x0 = v16f_load(x + 32 * b), x1 = v16f_load(x + 32 * b + 16);
    float inverse;
    const float d = code_scale(v16i_max(magnitude(x0), magnitude(x1)), &inverse);
    const v16i q0 = codes_of(x0, inverse), q1 = codes_of(x1, inverse);
    v16i_store_i8(to->q, q0);
    v16i_store_i8(to->q + 16, q1);
    const int32_t s0 = v16i_sum(q0), s1 = v16i_sum(q1);
    to->d = d;
    to->dsum = d * (float)(s0 + s1);
    to->dsum2[0] = d * (float)s0;
    to->dsum2[1] = d * (float)s1;
    to->sum = s0 + s1;
    to->sum2[0] = s0;
    to->sum2[1] = s1;
  }
}

/* ---- quantized weights, few rows ---- */

#define STEP(i, s) ((const xstep *)(x + (i) * ld) + (s)) /* x: bytes, rows ld bytes apart */

/* out[i][lane] = row `lane` of the group times row i of x. `next` is the memory that the thread will read after the group. */
PE_INLINE void decode_rows(int id, int rows, const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x,
                           int64_t ld, float *out) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32, z128 = t.zero == 128, zero = z128 ? 128 - PE_DOT_ZERO : t.zero;
  const int64_t blocks = k / t.k;
  v16f acc[MRD];
PE_UNROLL(8)
  for (int i = 0; i < rows; i++) acc[i] = v16f_zero();
  for (int64_t b = 0; b < blocks; b++) {
    const uint8_t *head = pe_block_head(t, group, b), *body = pe_block_body(t, group, b);
    const int64_t at = body - group;
PE_UNROLL_STEPS
    for (int j = 0; j < steps; j++) {
      pe_step w;
      pe_unpack(id, head, body, j, &w);
      int64_t s = b * steps + j;
      {
        const int step_bytes = (t.head + t.body) / steps;
        int64_t ahead = at + AHEAD + (int64_t)j * step_bytes;
        const uint8_t *p = ahead < bytes ? group + ahead : next + (ahead - bytes);
PE_UNROLL(9)
        for (int c = 0; c < (step_bytes + 63) / 64; c++) pe_prefetch(p + 64 * c);
      }
PE_UNROLL(8)
      for (int i = 0; i < rows; i++) {
        const xstep *a = STEP(i, s);
PE_UNROLL(2)
        for (int h = 0; h < t.halves; h++) {
          int32_t sum = zero ? t.halves == 2 ? a->sum2[h] : a->sum : 0;
          v16i p0 = v16i_set1(-zero * sum), p1 = v16i_zero();
PE_UNROLL(8)
          for (int g = 8 / t.halves * h; g < 8 / t.halves * (h + 1); g += 2) {
            v64u x0 = v64u_set4(a->q + 4 * g), x1 = v64u_set4(a->q + 4 * g + 4);
            p0 = z128 ? dot_z128(p0, w.u[g], x0) : dot_u7(p0, w.u[g], x0);
            p1 = z128 ? dot_z128(p1, w.u[g + 1], x1) : dot_u7(p1, w.u[g + 1], x1);
          }
          v16f y = v16f_mul(v16i_to_f(v16i_add(p0, p1)), w.s[h]);
          acc[i] = v16f_fma(y, v16f_set1(a->d), acc[i]);
          if (t.offsets) acc[i] = v16f_fma(w.o[h], v16f_set1(t.halves == 2 ? a->dsum2[h] : a->dsum), acc[i]);
        }
      }
    }
  }
PE_UNROLL(8)
  for (int i = 0; i < rows; i++) v16f_store(out + 16 * i, acc[i]);
}

typedef void decode_fn(const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x, int64_t ld,
                       float *out);

/* ---- quantized weights, many rows ---- */

/* A step of an unpacked panel: codes of vector g of group v at 64 (NR g + v); then scales, then offsets, one float vector for
 * each half and group. */
PE_INLINE int64_t panel_step_bytes(int halves, int offsets) { return 64 * NR * (8 + halves * (1 + offsets)); }

/* Steps s0 .. s0 + count - 1 of NR groups. ahead[v]: what will be unpacked next in place of this part of group v. */
PE_INLINE void unpack_panel(int id, const uint8_t *const group[NR], const uint8_t *const ahead[NR], int64_t s0, int64_t count,
                            uint8_t *to) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32;
  const int64_t step = panel_step_bytes(t.halves, t.offsets);
  for (int64_t b = s0 / steps; b < (s0 + count) / steps; b++) {
    for (int v = 0; v < NR; v++) {
      const uint8_t *head = pe_block_head(t, group[v], b), *body = pe_block_body(t, group[v], b);
      const uint8_t *fetch = ahead[v] + (body - pe_block_head(t, group[v], s0 / steps));
PE_UNROLL_STEPS
      for (int j = 0; j < steps; j++) {
        pe_step w;
        pe_unpack(id, head, body, j, &w);
        const int step_bytes = (t.head + t.body) / steps;
PE_UNROLL(9)
        for (int c = 0; c < (step_bytes + 63) / 64; c++) pe_prefetch(fetch + j * step_bytes + 64 * c);
        uint8_t *p = to + (b * steps + j - s0) * step;
PE_UNROLL(8)
        for (int g = 0; g < 8; g++) v64u_store(p + 64 * (NR * g + v), w.u[g]);
        float *f = (float *)(p + 64 * NR * 8) + 16 * v;
PE_UNROLL(2)
        for (int h = 0; h < t.halves; h++) {
          v16f_store(f + 16 * NR * h, w.s[h]);
          if (t.offsets) v16f_store(f + 16 * NR * (t.halves + h), w.o[h]);
        }
      }
    }
  }
}

/* acc[i][16 NR] += panel times row i of x, for `rows` <= MR rows and `count` steps from s0 on. */
PE_INLINE void tile_rows(int rows, int halves, int offsets, int z128, int zero, const uint8_t *panel, int64_t s0, int64_t count,
                         const char *x, int64_t ld, float *acc) {
  v16f sum[MR][NR];
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) sum[i][v] = v16f_load(acc + 16 * (NR * i + v));
  for (int64_t s = s0; s < s0 + count; s++) {
    const float *f = (const float *)(panel + 64 * NR * 8);
PE_UNROLL(2)
    for (int h = 0; h < halves; h++) {
      v16i dot[MR][NR];
PE_UNROLL(8)
      for (int i = 0; i < rows; i++) {
        int32_t n = zero ? -zero * (halves == 2 ? STEP(i, s)->sum2[h] : STEP(i, s)->sum) : 0;
PE_UNROLL(8)
        for (int v = 0; v < NR; v++) dot[i][v] = v16i_set1(n);
      }
PE_UNROLL(8)
      for (int g = 8 / halves * h; g < 8 / halves * (h + 1); g++) {
        v64u w[NR];
PE_UNROLL(8)
        for (int v = 0; v < NR; v++) w[v] = v64u_load(panel + 64 * (NR * g + v));
PE_UNROLL(8)
        for (int i = 0; i < rows; i++) {
          v64u q = v64u_set4(STEP(i, s)->q + 4 * g);
PE_UNROLL(8)
          for (int v = 0; v < NR; v++) dot[i][v] = z128 ? dot_z128(dot[i][v], w[v], q) : dot_u7(dot[i][v], w[v], q);
        }
      }
PE_UNROLL(8)
      for (int i = 0; i < rows; i++) {
        v16f d = v16f_set1(STEP(i, s)->d);
PE_UNROLL(8)
        for (int v = 0; v < NR; v++)
          sum[i][v] = v16f_fma(v16f_mul(v16i_to_f(dot[i][v]), v16f_load(f + 16 * (NR * h + v))), d, sum[i][v]);
        if (offsets) {
          v16f ds = v16f_set1(halves == 2 ? STEP(i, s)->dsum2[h] : STEP(i, s)->dsum);
PE_UNROLL(8)
          for (int v = 0; v < NR; v++) sum[i][v] = v16f_fma(v16f_load(f + 16 * (NR * (halves + h) + v)), ds, sum[i][v]);
        }
      }
    }
    panel += panel_step_bytes(halves, offsets);
  }
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) v16f_store(acc + 16 * (NR * i + v), sum[i][v]);
}

typedef void tile_fn(int zero, const uint8_t *panel, int64_t s0, int64_t count, const char *x, int64_t ld, int64_t m, float *acc);

#define TILE(name, halves, offsets, z128)                                                                              \
  static void tile_##name(int zero, const uint8_t *panel, int64_t s0, int64_t count, const char *x, int64_t ld,        \
                          int64_t m, float *acc) {                                                                     \
    for (; m >= MR; m -= MR, x += MR * ld, acc += MR * NR * 16)                                                        \
      tile_rows(MR, halves, offsets, z128, zero, panel, s0, count, x, ld, acc);                                        \
    if (m == 3) tile_rows(3, halves, offsets, z128, zero, panel, s0, count, x, ld, acc);                               \
    if (m == 2) tile_rows(2, halves, offsets, z128, zero, panel, s0, count, x, ld, acc);                               \
    if (m == 1) tile_rows(1, halves, offsets, z128, zero, panel, s0, count, x, ld, acc);                               \
  }
TILE(zero, 1, 0, 0)
TILE(zero128, 1, 0, 1)
TILE(offset, 1, 1, 0)
TILE(halves_zero, 2, 0, 0)
TILE(halves_offset, 2, 1, 0)

/* ---- the table of formats ---- */

typedef void unpack_fn(const uint8_t *const group[NR], const uint8_t *const ahead[NR], int64_t s0, int64_t count, uint8_t *to);

typedef struct format {
  decode_fn *decode[FEW], *decode_most; /* for 1 .. FEW rows of x, and for MRD; or NULL */
  unpack_fn *unpack;
  tile_fn *tile;
} format;

#if defined(PE_GENERIC) /* too few registers for the decode kernel */
#define DECODES(id)
#define DECODE_TABLE(id) {0}, 0
#else
#define DECODE(id, rows)                                                                                               \
  static void decode_##id##_##rows(const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x, \
                                   int64_t ld, float *out) {                                                           \
    decode_rows(PE_##id, rows, group, next, bytes, k, x, ld, out);                                                     \
  }
#if defined(PE_AVX512)
#define DECODE_MOST(id) DECODE(id, 8)
#define DECODE_MOST_ENTRY(id) decode_##id##_8
#else
#define DECODE_MOST(id)
#define DECODE_MOST_ENTRY(id) decode_##id##_4
#endif
#define DECODES(id) DECODE(id, 1) DECODE(id, 2) DECODE(id, 3) DECODE(id, 4) DECODE_MOST(id)
#define DECODE_TABLE(id) {decode_##id##_1, decode_##id##_2, decode_##id##_3, decode_##id##_4}, DECODE_MOST_ENTRY(id)
#endif
#define FORMAT(id, blocks, head, body, kind, ...)                                                                      \
  DECODES(id)                                                                                                          \
  static void unpack_##id(const uint8_t *const group[NR], const uint8_t *const ahead[NR], int64_t s0, int64_t count,   \
                          uint8_t *to) {                                                                               \
    unpack_panel(PE_##id, group, ahead, s0, count, to);                                                                \
  }                                                                                                                    \
  static const format format_##id = {DECODE_TABLE(id), unpack_##id, tile_##kind};
PE_PACKED_BLOCKS(FORMAT)

static const format *format_of(int32_t dtype) { /* NULL: no quantized kernel, go through floats */
  switch (dtype - PE_PACKED) {
#define CASE(name, ...) case PE_##name: return &format_##name;
    PE_PACKED_BLOCKS(CASE)
#undef CASE
    default: return 0;
  }
}

/* ---- float weights ---- */

/* acc[i][16 NR] += panel [count][16 NR] times `rows` <= MRF rows of x. */
PE_INLINE void float_rows(int rows, const float *panel, int64_t count, const float *x, int64_t ld, float *acc) {
  v16f sum[MRF][NR];
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) sum[i][v] = v16f_load(acc + 16 * (NR * i + v));
  for (int64_t k = 0; k < count; k++, panel += 16 * NR) {
    v16f w[NR];
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) w[v] = v16f_load(panel + 16 * v);
PE_UNROLL(8)
    for (int i = 0; i < rows; i++) {
      v16f a = v16f_set1(x[i * ld + k]);
PE_UNROLL(8)
      for (int v = 0; v < NR; v++) sum[i][v] = v16f_fma(w[v], a, sum[i][v]);
    }
  }
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) v16f_store(acc + 16 * (NR * i + v), sum[i][v]);
}

/* ahead[v]: `lines` cache lines of group v that the next panel is made of; each tile asks for its share of them. */
static void tile_float(const float *panel, int64_t count, const uint8_t *const ahead[NR], int64_t lines, const float *x, int64_t ld,
                       int64_t m, float *acc) {
  const int64_t share = (lines * MRF + m - 1) / m;
  for (int64_t asked = 0; m >= MRF; m -= MRF, x += MRF * ld, acc += MRF * NR * 16) {
    for (const int64_t stop = pe_min(lines, asked + share); asked < stop; asked++)
      for (int v = 0; v < NR; v++) pe_prefetch(ahead[v] + 64 * asked);
    float_rows(MRF, panel, count, x, ld, acc);
  }
#define PART(n)                                                                                                        \
  if (m >= n) {                                                                                                        \
    float_rows(n, panel, count, x, ld, acc);                                                                           \
    m -= n;                                                                                                            \
    x += n * ld;                                                                                                       \
    acc += n * NR * 16;                                                                                                \
  }
#if defined(PE_AVX512)
  PART(4)
#endif
  PART(2)
  PART(1)
#undef PART
}

PE_INLINE v16f load_float(int id, const uint8_t *p) {
  return id == PE_F32 ? v16f_load((const float *)p) : id == PE_F16 ? v16f_load_f16(p) : v16f_load_bf16(p);
}

/* Few rows: acc[i][16 NR] = a panel of packed floats times row i of x, straight from memory. */
PE_INLINE void stream_rows(int id, int rows, const uint8_t *const group[NR], int64_t count, const float *x, int64_t ld,
                           float *acc) {
  const int size = id == PE_F32 ? 64 : 32, lines = 64 / size; /* k of a cache line */
  v16f sum[FEW][NR];
PE_UNROLL(4)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) sum[i][v] = v16f_zero();
  for (int64_t k = 0; k < count; k++) {
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) {
      v16f w = load_float(id, group[v] + size * k);
      if (lines == 1 || k % 2 == 0) pe_prefetch(group[v] + size * k + AHEAD / 2);
PE_UNROLL(4)
      for (int i = 0; i < rows; i++) sum[i][v] = v16f_fma(w, v16f_set1(x[i * ld + k]), sum[i][v]);
    }
  }
PE_UNROLL(4)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < NR; v++) v16f_store(acc + 16 * (NR * i + v), sum[i][v]);
}

static void stream(int id, int64_t m, const uint8_t *const group[NR], int64_t count, const float *x, int64_t ld, float *acc) {
#define STREAM(id_, rows)                                                                                              \
  if (id == PE_##id_ && m == rows) stream_rows(PE_##id_, rows, group, count, x, ld, acc);
  STREAM(F32, 1) STREAM(F32, 2) STREAM(F32, 3) STREAM(F32, 4)
  STREAM(F16, 1) STREAM(F16, 2) STREAM(F16, 3) STREAM(F16, 4)
  STREAM(BF16, 1) STREAM(BF16, 2) STREAM(BF16, 3) STREAM(BF16, 4)
#undef STREAM
}

/* Columns k0 .. k0 + count - 1 of the groups of a panel, as floats [count][16 NR]. `rows` is room for [16][KD] floats. */
static pe_status float_panel(const pe_tensor *w, int64_t g0, int64_t k0, int64_t count, float *panel, float *rows) {
  const int64_t n = w->shape[0], k = w->shape[1], last = (n - 1) / 16;
  for (int v = 0; v < NR; v++) {
    const int64_t g = pe_min(g0 + v, last);
    if (w->dtype >= PE_PACKED) {
      const int32_t id = w->dtype - PE_PACKED;
      const uint8_t *from = (const uint8_t *)w->data + g * pe_pack_group_bytes(id, k) + k0 * 16 * pe_format_of(id).bytes;
      float *to = panel + 16 * v;
#define WIDEN(id_, size)                                                                                               \
  if (id == id_)                                                                                                       \
    for (int64_t i = 0; i < count; i++) v16f_store(to + 16 * NR * i, load_float(id_, from + size * i));
      WIDEN(PE_F32, 64) WIDEN(PE_F16, 32) WIDEN(PE_BF16, 32)
#undef WIDEN
      continue;
    }
    const int64_t block = pe_format_of(w->dtype).elements;
    if (!block) return PE_BAD_DTYPE;
    for (int64_t r = 0; r < 16; r++) {
      const char *from = (const char *)w->data + pe_min(16 * g + r, n - 1) * w->stride[0] + k0 / block * w->stride[1];
      pe_status status = pe_dequantize_row(w->dtype, from, rows + KD * r, count);
      if (status) return status;
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t r = 0; r < 16; r++) panel[16 * (NR * i + v) + r] = rows[KD * r + i];
  }
  return PE_OK;
}

/* ---- what is done with sums ---- */

PE_INLINE v16f activate(v16f y, int32_t glu) {
  switch (glu) {
    case PE_LINEAR_GLU_SILU: return v16f_silu(y);
    case PE_LINEAR_GLU_GELU_TANH: return v16f_gelu_tanh(y);
    case PE_LINEAR_GLU_GELU: return v16f_gelu_erf(y);
    case PE_LINEAR_GLU_RELU: return v16f_max(v16f_zero(), y);
    default: return y;
  }
}

/* Sums of one group of 16 outputs to memory. a, b: [rows] with `ld` floats between rows; b only with glu. */
static void finish(const linear_job *t, int set, int64_t g, int64_t row0, int64_t rows, const float *a, const float *b,
                   int64_t ld) {
  const pe_tensor *out = t->out[set];
  const int64_t c = 16 * g, n = pe_min(16, t->w[set]->shape[0] - c);
  v16f bias0 = v16f_zero(), bias1 = v16f_zero();
  if (t->bias) {
    bias0 = v16f_load_n((const float *)t->bias[set]->data + c, n);
    if (b) bias1 = v16f_load_n((const float *)t->bias[1]->data + c, n);
  }
  for (int64_t i = 0; i < rows; i++) {
    v16f y = v16f_load(a + i * ld);
    if (t->bias) y = v16f_add(y, bias0);
    if (b) {
      v16f u = v16f_load(b + i * ld);
      if (t->bias) u = v16f_add(u, bias1);
      y = v16f_mul(activate(y, t->p.glu), u);
    }
    if (t->residual) {
      const float *add = (const float *)((const char *)t->residual->data + (row0 + i) * t->residual->stride[0]) + c;
      y = v16f_add(y, n == 16 ? v16f_load(add) : v16f_load_n(add, n));
    }
    if (t->p.softcap != 0.0f) {
      v16f cap = v16f_set1(t->p.softcap);
      y = v16f_mul(cap, v16f_tanh(v16f_div(y, cap)));
    }
    float *to = (float *)((char *)out->data + (t->order ? t->order[row0 + i] : row0 + i) * out->stride[0]) + c;
    if (n == 16) v16f_store(to, y);
    else v16f_store_n(to, y, n);
  }
}

/* ---- memory ---- */

linear_places linear_memory(int64_t m, int64_t k, int quantized, int floats, int normed) {
  linear_places y = {0, 0, 0, 0, 0, 0, 0};
  const int64_t row = quantized ? linear_row(k) : 0, hrow = normed ? linear_float_row(k) : 0;
  y.h = m > FEW ? m * row : 0;
  y.shared = y.h + (m > FEW && floats ? m * hrow : 0);
  y.own_h = FEW * row;
  y.panel = y.own_h + FEW * hrow; /* a normed row on its way to int8 also stays here */
  y.rows = y.panel + pe_max(quantized ? STEPS * panel_step_bytes(2, 1) : 0, floats ? 64 * NR * KD : 0);
  y.acc = y.rows + (floats ? 64 * KD : 0);
  y.own = y.acc + linear_block(m) * 64 * NR * WIDE; /* with glu, half as wide and twice */
  return y;
}

int linear_is_float(const pe_tensor *w) { return !format_of(w->dtype); }

PE_SCRATCH(cpu, linear)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  const pe_tensor *x = a->t[a->start[0]];
  int quantized = 0, floats = 0;
  for (int i = 0; i < a->count[1]; i++) {
    if (linear_is_float(a->t[a->start[1] + i])) floats = 1;
    else quantized = 1;
  }
  linear_places y = linear_memory(x->shape[0], x->shape[1], quantized, floats, a->count[3] > 0);
  return y.shared + n_threads * y.own;
}

/* ---- the kernel ---- */

void linear_prepare(const pe_tensor *x, const pe_tensor *norm, float eps, int64_t i, int64_t k, char *q, float *h) {
  const float *row = (const float *)((const char *)x->data + i * x->stride[0]);
  if (norm) {
    scale_row(row, h, k, 0.0f, inverse_rms(row, k, eps), norm->data, 0);
    row = h;
  } else if (h) {
    memcpy(h, row, (size_t)k * sizeof(float));
  }
  if (q) quantize_row(row, k, (xstep *)q);
}

/* acc[panel][rows][16 NR] = `panels` panels from group g0 of matrix w on, times rows row0 .. row0 + rows - 1 of x. */
static pe_status multiply(const linear_job *t, const pe_tensor *w, int64_t g0, int64_t panels, const uint8_t *next, int64_t row0,
                          int64_t rows, char *panel, float *dequantized, float *acc) {
  const int packed = w->dtype >= PE_PACKED;
  const int32_t id = packed ? w->dtype - PE_PACKED : w->dtype;
  const int64_t k = t->k, groups = (w->shape[0] + 15) / 16, bytes = packed ? pe_pack_group_bytes(id, k) : 0;
  const int64_t ld = linear_row(k), sums = rows * 16 * NR;
  const char *q = t->q + row0 * ld;
  const float *h = t->h + row0 * t->ldh;
  const format *f = format_of(w->dtype);
  const int zero = f && pe_traits_of(id).zero == 128 ? 128 - PE_DOT_ZERO : f ? pe_traits_of(id).zero : 0;
  const int few = packed && (f ? rows <= SOME && f->decode[0] : rows <= FEW);
  const int64_t chunk = few ? k : f ? 32 * STEPS : packed ? KF : KD;

  if (!few) memset(acc, 0, (size_t)(panels * sums) * sizeof(float));
  for (int64_t at = 0; at < k; at += chunk) {
    const int64_t count = pe_min(chunk, k - at);
    for (int64_t p = 0; p < panels; p++) {
      float *to = acc + p * sums;
      const uint8_t *group[NR]; /* beyond the last group, that one again: nobody reads the sums */
      for (int v = 0; v < NR; v++) group[v] = (const uint8_t *)w->data + pe_min(g0 + NR * p + v, groups - 1) * bytes;
      if (few && f) {
        for (int v = 0; v < NR && g0 + NR * p + v < groups; v++) {
          const int more = v + 1 < NR && g0 + NR * p + v + 1 < groups;
          for (int64_t i0 = 0, n; i0 < rows; i0 += n) {
            const int64_t left = rows - i0;
            n = left >= MRD ? MRD : left > FEW ? (left + 1) / 2 : left; /* 5 rows are 3 and 2 */
            float y[MRD * 16];
            (n > FEW ? f->decode_most : f->decode[n - 1])(group[v], more ? group[v] + bytes : next, bytes, k, q + i0 * ld, ld, y);
            for (int64_t i = 0; i < n; i++) v16f_store(to + 16 * (NR * (i0 + i) + v), v16f_load(y + 16 * i));
          }
        }
      } else if (few) {
        stream(id, rows, group, k, h, t->ldh, to);
      } else if (f) {
        const pe_traits c = pe_traits_of(id);
        const uint8_t *ahead[NR]; /* these 256 of k of the next panel; after the last, the next 256 of the first */
        for (int v = 0; v < NR; v++)
          ahead[v] = p + 1 < panels   ? pe_block_head(c, group[v] + NR * bytes, at / c.k)
                     : at + count < k ? pe_block_head(c, group[v] - NR * p * bytes, (at + count) / c.k)
                                      : next + v * bytes;
        f->unpack(group, ahead, at / 32, count / 32, (uint8_t *)panel);
        f->tile(zero, (const uint8_t *)panel, at / 32, count / 32, q, ld, rows, to);
      } else {
        pe_status status = float_panel(w, g0 + NR * p, at, count, (float *)panel, dequantized);
        if (status) return status;
        const int64_t size = 16 * pe_format_of(id).bytes, later = p + 1 < panels ? at : at + count; /* k where the next panel begins */
        const uint8_t *ahead[NR];
        for (int v = 0; v < NR; v++)
          ahead[v] = !packed ? 0 : p + 1 < panels ? group[v] + NR * bytes + size * at
                     : later < k ? group[v] - NR * p * bytes + size * later : next + v * bytes;
        tile_float((const float *)panel, count, ahead, packed ? count * size / 64 : 0, h + at, t->ldh, rows, to);
      }
    }
  }
  return PE_OK;
}

/* Strip number `strip` of all sets: which set, and its first group. */
static int locate(const linear_job *t, int64_t strip, int64_t *g0) {
  int set = 0;
  while (set + 1 < t->n_sets && strip >= linear_strips(t->w[set], t->wide)) strip -= linear_strips(t->w[set++], t->wide);
  *g0 = strip * NR * t->wide;
  return set;
}

const uint8_t *linear_strip_bytes(const pe_tensor *w, int64_t k, int64_t g0) {
  int64_t bytes = w->dtype >= PE_PACKED ? pe_pack_group_bytes(w->dtype - PE_PACKED, k) : 16 * w->stride[0];
  return (const uint8_t *)w->data + g0 * bytes;
}

pe_status linear_strip(const linear_job *t, int set, int64_t g0, const uint8_t *next, int64_t row0, int64_t rows, char *own,
                       const linear_places *y) {
  const int glu = t->p.glu != PE_LINEAR_GLU_NONE;
  const int64_t count = pe_min(NR * t->wide, linear_groups(t->w[set]) - g0), panels = (count + NR - 1) / NR;
  char *panel = own + y->panel;
  float *dequantized = (float *)(own + y->rows), *acc = (float *)(own + y->acc), *acc1 = acc + t->rows * 16 * NR * (WIDE / 2);
  const uint8_t *after = glu ? linear_strip_bytes(t->w[1], t->k, g0) : next;
  pe_status status = multiply(t, t->w[set], g0, panels, after, row0, rows, panel, dequantized, acc);
  if (!status && glu) status = multiply(t, t->w[1], g0, panels, next, row0, rows, panel, dequantized, acc1);
  if (status) return status;
  for (int64_t r = 0; r < rows; r += MRF) /* a strip's columns lie side by side in the result */
    for (int64_t g = 0; g < count; g++) {
      const int64_t from = ((g / NR * rows + r) * NR + g % NR) * 16;
      finish(t, set, g0 + g, row0 + r, pe_min(MRF, rows - r), acc + from, glu ? acc1 + from : 0, 16 * NR);
    }
  return PE_OK;
}

static pe_status check(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, int32_t n_bias, const pe_tensor *residual,
                       int32_t n_out, const pe_linear_params *p, pe_stream *s) {
  const int glu = p->glu != PE_LINEAR_GLU_NONE;
  if (n_w < 1 || n_w > 4 || (n_bias && n_bias != n_w) || n_out != (glu ? 1 : n_w))
    return pe_fail(s, PE_BAD_SHAPE, "linear: %d weights, %d biases, %d outputs", n_w, n_bias, n_out);
  if ((glu && (n_w != 2 || w[0]->shape[0] != w[1]->shape[0])) || (residual && (glu || n_w != 1)))
    return pe_fail(s, PE_BAD_SHAPE, "linear: glu takes two equal weights and no residual, a residual one weight");
  for (int i = 0; i < n_w; i++) {
    if (w[i]->shape[1] != x->shape[1])
      return pe_fail(s, PE_BAD_SHAPE, "linear: x has %lld columns, weight %d has %lld", (long long)x->shape[1], i,
                     (long long)w[i]->shape[1]);
    int packed = w[i]->dtype >= PE_PACKED;
    if (packed && w[i]->shape[0] && !pe_pack_bytes(w[i]->dtype - PE_PACKED, w[i]->shape[0], w[i]->shape[1]))
      return pe_fail(s, PE_NO_KERNEL, "linear: no packed form of format %d", w[i]->dtype - PE_PACKED);
  }
  return PE_OK;
}

PE_KERNEL(cpu, linear)(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, const pe_tensor *const *bias, int32_t n_bias,
                  const pe_tensor *norm, const pe_tensor *residual, const pe_tensor *const *out, int32_t n_out,
                  const pe_linear_params *p, pe_stream *s) {
  const int64_t m = x->shape[0], k = x->shape[1];
  const int glu = p->glu != PE_LINEAR_GLU_NONE;
  pe_status status = check(x, w, n_w, n_bias, residual, n_out, p, s);
  if (status || m == 0 || k == 0) return status;

  linear_job t = {w, n_bias ? bias : 0, out, residual, *p, n_w, glu ? 1 : n_w, m, k, linear_block(m), 1, 0, 0, 0, 0, 0};
  int quantized = 0, floats = 0;
  for (int i = 0; i < n_w; i++) {
    if (linear_is_float(w[i])) floats = 1;
    else quantized = 1;
  }
  const linear_places y = linear_memory(m, k, quantized, floats, norm != 0);
  if (s->scratch_bytes < y.shared + s->nth * y.own)
    return pe_fail(s, PE_NO_MEMORY, "linear: %lld bytes of scratch, needs %lld", (long long)s->scratch_bytes,
                   (long long)(y.shared + s->nth * y.own));
  char *own = s->scratch + y.shared + s->ith * y.own;

  /* Rows of x: few are prepared by every thread for itself, many by all threads together. */
  const int64_t xrow = linear_row(k), hrow = linear_float_row(k);
  if (m <= FEW) {
    for (int64_t i = 0; i < m && (quantized || norm); i++)
      linear_prepare(x, norm, p->norm_eps, i, k, quantized ? own + i * xrow : 0, norm ? (float *)(own + y.own_h + i * hrow) : 0);
    t.q = own;
    t.h = (const float *)(own + y.own_h);
  } else {
    if (quantized || norm) {
      for (int64_t c; (c = 4 * pe_next(s, 0)) < m;)
        for (int64_t i = c; i < pe_min(c + 4, m); i++)
          linear_prepare(x, norm, p->norm_eps, i, k, quantized ? s->scratch + i * xrow : 0,
                         norm ? (float *)(floats ? s->scratch + y.h + i * hrow : own + y.own_h) : 0);
      pe_barrier(s);
    }
    t.q = s->scratch;
    t.h = (const float *)(s->scratch + y.h);
  }
  t.ldh = hrow / 4;
  if (!norm) {
    t.h = x->data;
    t.ldh = x->stride[0] / 4;
  }

  /* Items: blocks of rows, and in each block all strips. A claim is a run of strips of one block. Many rows share a strip as
   * wide as leaves 8 claims for each thread. */
  const int64_t blocks = (m + t.rows - 1) / t.rows;
  t.wide = m > SOME ? glu ? WIDE / 2 : WIDE : 1;
  for (;; t.wide /= 2) {
    t.strips = 0;
    for (int i = 0; i < t.n_sets; i++) t.strips += linear_strips(w[i], t.wide);
    if (t.wide == 1 || blocks * t.strips >= 8 * s->nth) break;
  }
  const int64_t run = m > SOME ? 1 : pe_max(1, t.strips / (16 * s->nth)), runs = (t.strips + run - 1) / run;
  for (int64_t claim = pe_next(s, 1), ahead; claim < blocks * runs; claim = ahead) {
    ahead = pe_next(s, 1);
    const int64_t row0 = claim / runs * t.rows, rows = pe_min(t.rows, m - row0);
    const int64_t first = claim % runs * run, end = pe_min(first + run, t.strips);
    for (int64_t i = first; i < end; i++) {
      int64_t g0, next_g0, after = i + 1 < end ? i + 1 : ahead < blocks * runs ? ahead % runs * run : i;
      const int set = locate(&t, i, &g0), next_set = locate(&t, after, &next_g0);
      const uint8_t *next = linear_strip_bytes(w[next_set], k, next_g0);
      status = linear_strip(&t, set, g0, next, row0, rows, own, &y);
      if (status) return pe_fail(s, PE_NO_KERNEL, "linear: format %d cannot be read", w[set]->dtype);
    }
  }
  return PE_OK;
}

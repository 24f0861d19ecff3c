/* linear_few.c: `linear` with packed blocks and few rows of x: linear.c says what the whole is.
 * Reference: pyengine/ops/matmul.py: linear.
 *
 * A step of 16 rows of the matrix x 32 of k stays in registers and is multiplied with up to ROWS_FEW rows of x. The weights'
 * bytes are read once, in order; 8 dot products for each row and 9 to 24 instructions of unpacking go on 16 x 32 weights (e.g. 288 bytes
 * of Q4_0): memory is the limit. With more rows each product's own load of x would be: tiles share it among vectors of weights.
 */
#include "dots.h"
#include "linear_parts.h"

#if defined(PE_GENERIC) /* too few registers */
int PE_NAME(linear_most_few)(void) { return 0; }
void PE_NAME(linear_few)(const linear_product *t) { (void)t; }
#else
#if defined(PE_NEON)
#include "linear_neon.h"
enum { MOST_FEW = 2 }; /* a panel that is unpacked and tiled takes fewer instructions for 3 rows and more: docs/portability.md */
#else
enum { MOST_FEW = ROWS_FEW };
/* sum + products of `count` vectors of codes, from u on, with x. run: of how many, where runs save something; else 1, and two sums wait less
 * for each other. */
PE_INLINE v16i products(int z128, int run, int count, const v64u *u, const int8_t *x, v16i sum) {
  v16i part = v16i_zero();
PE_UNROLL(8)
  for (int g = 0; g < count; g += 2) {
    const v64u x0 = v64u_set4(x + 4 * g), x1 = v64u_set4(x + 4 * g + 4);
    if (run > 1) {
      part = dot_run_add(g % run ? dot_run_add(part, u[g], x0) : dot_run_begin(sum, u[g], x0), u[g + 1], x1);
      if ((g + 2) % run == 0) sum = dot_run_end(sum, part);
    } else {
      sum = z128 ? dot_z128(sum, u[g], x0) : dot_u7(sum, u[g], x0);
      part = z128 ? dot_z128(part, u[g + 1], x1) : dot_u7(part, u[g + 1], x1);
    }
  }
  return run > 1 ? sum : v16i_add(sum, part);
}

/* out[i][lane] = row `lane` of the group times row i of x. `next` is the memory that the thread will read after the group. */
PE_INLINE void decode_rows(int id, int rows, const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x,
                           int64_t ld, float *out) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32, z128 = t.zero == 128, zero = z128 ? 128 - PE_DOT_ZERO : t.zero;
  const int count = 8 / t.halves, run = z128 || PE_RUN(255) > 1 ? 1 : (int)pe_min(PE_RUN(pe_most_code(t)), count);
  const int step_bytes = (t.head + t.body) / steps;
  const int64_t blocks = k / t.k, slice = linear_slice(k) * 32 / t.k;
  v16f acc[ROWS_FEW];
PE_UNROLL(8)
  for (int i = 0; i < rows; i++) acc[i] = v16f_zero();
  for (int64_t b = 0, end = slice; b < blocks; b++) {
    const uint8_t *head = pe_block_head(t, group, b), *body = pe_block_body(t, group, b);
PE_UNROLL_STEPS
    for (int j = 0; j < steps; j++) {
      pe_step w;
      pe_unpack(id, head, body, j, &w);
      int64_t s = b * steps + j;
      decode_fetch(group, next, bytes, body - group + (int64_t)j * step_bytes, step_bytes);
PE_UNROLL(8)
      for (int i = 0; i < rows; i++) {
        const linear_step *a = linear_step_of(x, ld, i, s);
PE_UNROLL(2)
        for (int h = 0; h < t.halves; h++) {
          int32_t sum = zero ? t.halves == 2 ? a->sum2[h] : a->sum : 0;
          v16i dot = v16i_set1((int32_t)((uint32_t)-zero * (uint32_t)sum)); /* wraps for codes of NaN */
          dot = products(z128, run, count, w.u + count * h, a->q + 4 * count * h, dot);
          v16f y = v16f_mul(v16i_to_f(dot), w.s[h]);
          acc[i] = v16f_fma(y, v16f_set1(a->d), acc[i]);
          if (t.offsets) acc[i] = v16f_fma(w.o[h], v16f_set1(t.halves == 2 ? a->dsum2[h] : a->dsum), acc[i]);
        }
      }
    }
    if (b + 1 < end && b + 1 < blocks) continue;
PE_UNROLL(8)
    for (int i = 0; i < rows; i++) {
      v16f_store(out + 16 * i, end == slice ? acc[i] : v16f_add(v16f_load(out + 16 * i), acc[i]));
      acc[i] = v16f_zero();
    }
    end += slice;
  }
}
#endif

typedef void decode_fn(const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x, int64_t ld,
                       float *out);

/* A function for 1 .. MOST_FEW rows for each format. */
#define DECODE(id, rows)                                                                                               \
  static void decode_##id##_##rows(const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t k, const char *x, \
                                   int64_t ld, float *out) {                                                           \
    decode_rows(PE_##id, rows, group, next, bytes, k, x, ld, out);                                                     \
  }
#if defined(PE_NEON)
#define DECODE_FORMAT(id, ...) DECODE(id, 1) DECODE(id, 2)
#define DECODERS(id) {{decode_##id##_1, decode_##id##_2}}
#else
#define DECODE_FORMAT(id, ...) DECODE(id, 1) DECODE(id, 2) DECODE(id, 3) DECODE(id, 4)
#define DECODERS(id) {{decode_##id##_1, decode_##id##_2, decode_##id##_3, decode_##id##_4}}
#endif
PE_PACKED_BLOCKS(DECODE_FORMAT)

typedef struct decoder { decode_fn *rows[ROWS_FEW]; } decoder;

static const decoder *decoder_of(int32_t id) {
  switch (id) {
#define DECODER(id, ...)                                                                                               \
  case PE_##id: {                                                                                                      \
    static const decoder d = DECODERS(id);                                                                             \
    return &d;                                                                                                         \
  }
    PE_PACKED_BLOCKS(DECODER)
#undef DECODER
    default: return 0;
  }
}

int PE_NAME(linear_most_few)(void) { return MOST_FEW; }

void PE_NAME(linear_few)(const linear_product *t) {
  decode_fn *const decode = decoder_of(t->id)->rows[t->rows - 1];
  for (int64_t p = 0; p < t->panels; p++) {
    float *to = t->acc + p * linear_sums(t);
    for (int v = 0; v < PANEL_GROUPS && t->g0 + PANEL_GROUPS * p + v < t->groups; v++) {
      const int more = v + 1 < PANEL_GROUPS && t->g0 + PANEL_GROUPS * p + v + 1 < t->groups;
      const uint8_t *group = linear_group(t, p, v), *next = more ? group + t->bytes : t->next;
      _Alignas(64) float y[ROWS_FEW * 16];
      decode(group, next, t->bytes, t->k, t->q, t->ldq, y);
      for (int64_t i = 0; i < t->rows; i++) v16f_store(to + 16 * (PANEL_GROUPS * i + v), v16f_load(y + 16 * i));
    }
  }
}
#endif

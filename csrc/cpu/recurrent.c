/* recurrent.c: causal_conv, gated_delta_rule: layers with a state of fixed size for each conversation.
 * Reference: pyengine/ops/recurrent.py: causal_conv, gated_delta_rule.
 *
 * Rows of a step are walked in order, because each needs the state that the one before it left; what a thread owns is a part of the
 * state that no other part touches: CHANNELS of the convolution, or COLUMNS columns of one head's matrix. Sums: over taps in
 * their order; over the e rows of a matrix in four sums, of every fourth row, added as (0 + 1) + (2 + 3). So an element's bits depend
 * on the conversation's rows alone.
 *
 * A matrix's columns stay in the first cache (e x 32 floats: 16 KiB for e = 128) while all rows of a step pass over them. A row takes
 * 7 e f operations a head, in two passes: e f loads, then e f loads and stores. From memory: q, k once for each 32 columns, v and out
 * once, the state twice a step. One row a step is bound by the state: 8 e f bytes a head and row.
 */
#include "vec.h"

enum { VECTORS = 2, COLUMNS = 16 * VECTORS, CHANNELS = 256, FOLLOWS = -2 };

/* Cells of all rows; all threads alike. */
static pe_status check_rows(const char *op, const pe_tensor *state, const pe_tensor *before, const pe_tensor *after, pe_stream *s) {
  const int64_t m = before->shape[0], n = state->shape[1];
  const int32_t *b = before->data, *a = after->data;
  for (int64_t i = 0; i < m; i++) {
    const int wrong = b[i] < (i ? FOLLOWS : -1) || b[i] >= n;
    if (wrong || a[i] >= n)
      return pe_fail(s, PE_BAD_VALUE, "%s: a row reads or writes cell %d of %lld", op, wrong ? b[i] : a[i], (long long)n);
  }
  return PE_OK;
}

/* Where head g of a cell's state lies. */
PE_INLINE float *cell_of(const pe_tensor *state, int64_t g, int32_t cell) {
  return (float *)((char *)state->data + g * state->stride[0] + cell * state->stride[1]);
}

/* ---- convolution ---- */

PE_KERNEL(cpu, causal_conv)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *state, const pe_tensor *before,
                            const pe_tensor *after, const pe_tensor *out0, const pe_tensor *out1, const pe_causal_conv_params *p,
                            pe_stream *s) {
  (void)p;
  (void)out1; /* the state itself */
  const int64_t m = x->shape[0], d = x->shape[1], taps = weight->shape[0];
  const float *in = x->data, *w = weight->data;
  const int32_t *from = before->data, *to = after->data;
  const pe_status bad = check_rows("causal_conv", state, before, after, s);
  if (bad) return bad;
  for (int64_t c0; (c0 = pe_next(s, 0) * CHANNELS) < d;) {
    int64_t start = 0; /* the first row that goes on from the state in `cell` */
    int32_t cell = -1;
    for (int64_t i = 0; i < m; i++) {
      if (from[i] != FOLLOWS) start = i, cell = from[i];
      for (int64_t c = c0; c < pe_min(d, c0 + CHANNELS); c += 16) {
        v16f sum = v16f_zero();
        for (int64_t j = 0; j < taps; j++) {
          const int64_t row = i - taps + 1 + j;
          v16f v = v16f_zero();
          if (row >= start) v = load_some(in + row * d + c, d - c);
          else if (cell >= 0) v = load_some(cell_of(state, row - start + taps - 1, cell) + c, d - c);
          sum = v16f_fma(load_some(w + j * d + c, d - c), v, sum);
        }
        store_some((float *)out0->data + i * d + c, sum, d - c);
        for (int64_t j = 0; to[i] >= 0 && j < taps - 1; j++) {
          const int64_t row = i - taps + 2 + j;
          v16f v = v16f_zero();
          if (row >= start) v = load_some(in + row * d + c, d - c);
          else if (cell >= 0) v = load_some(cell_of(state, row - start + taps - 1, cell) + c, d - c);
          store_some(cell_of(state, j, to[i]) + c, v, d - c);
        }
      }
    }
  }
  return PE_OK;
}

/* ---- the delta rule ---- */

/* One row over the columns in t [e][COLUMNS]: changes them, and gives out [COLUMNS]. v and out have `left` columns. */
PE_INLINE void delta_row(float *t, int64_t e, const float *q, const float *k, const float *v, float *out, int64_t left, float log_decay,
                         float beta) {
  const v16f decay = v16f_exp(v16f_set1(log_decay)), b = v16f_set1(beta);
  v16f sum[4][VECTORS], change[VECTORS];
#pragma GCC unroll 4
  for (int u = 0; u < 4; u++)
#pragma GCC unroll 2
    for (int c = 0; c < VECTORS; c++) sum[u][c] = v16f_zero();
  int64_t i = 0;
  for (; i + 4 <= e; i += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
      const v16f y = v16f_set1(k[i + u]);
#pragma GCC unroll 2
      for (int c = 0; c < VECTORS; c++) sum[u][c] = v16f_fma(y, v16f_load(t + (i + u) * COLUMNS + 16 * c), sum[u][c]);
    }
  for (int u = 0; i + u < e; u++)
#pragma GCC unroll 2
    for (int c = 0; c < VECTORS; c++)
      sum[u][c] = v16f_fma(v16f_set1(k[i + u]), v16f_load(t + (i + u) * COLUMNS + 16 * c), sum[u][c]);
#pragma GCC unroll 2
  for (int c = 0; c < VECTORS; c++) {
    const v16f seen = v16f_add(v16f_add(sum[0][c], sum[1][c]), v16f_add(sum[2][c], sum[3][c]));
    const v16f new = 16 * c < left ? load_some(v + 16 * c, left - 16 * c) : v16f_zero();
    change[c] = v16f_mul(b, v16f_sub(new, v16f_mul(seen, decay)));
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) sum[u][c] = v16f_zero();
  }
#define PE_DELTA_STEP(at, u)                                                                                           \
  do {                                                                                                                 \
    const v16f y_ = v16f_set1(k[at]), z_ = v16f_set1(q[at]);                                                           \
    _Pragma("GCC unroll 2") for (int c = 0; c < VECTORS; c++) {                                                        \
      float *here_ = t + (at) * COLUMNS + 16 * c;                                                                      \
      const v16f w_ = v16f_fma(y_, change[c], v16f_mul(v16f_load(here_), decay));                                      \
      v16f_store(here_, w_);                                                                                           \
      sum[u][c] = v16f_fma(z_, w_, sum[u][c]);                                                                         \
    }                                                                                                                  \
  } while (0)
  for (i = 0; i + 4 <= e; i += 4)
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) PE_DELTA_STEP(i + u, u);
  for (int u = 0; i + u < e; u++) PE_DELTA_STEP(i + u, u);
#undef PE_DELTA_STEP
#pragma GCC unroll 2
  for (int c = 0; c < VECTORS; c++)
    if (16 * c < left)
      store_some(out + 16 * c, v16f_add(v16f_add(sum[0][c], sum[1][c]), v16f_add(sum[2][c], sum[3][c])), left - 16 * c);
}

/* Columns of a cell's matrix [e, f] to t [e][COLUMNS], zeros where there are none, and back. */
static void read_columns(const float *from, float *t, int64_t e, int64_t f, int64_t left) {
  for (int64_t i = 0; i < e; i++)
    for (int64_t c = 0; c < COLUMNS; c += 16)
      v16f_store(t + i * COLUMNS + c, from && c < left ? load_some(from + i * f + c, left - c) : v16f_zero());
}
static void write_columns(const float *t, float *to, int64_t e, int64_t f, int64_t left) {
  for (int64_t i = 0; i < e; i++)
    for (int64_t c = 0; c < COLUMNS && c < left; c += 16) store_some(to + i * f + c, v16f_load(t + i * COLUMNS + c), left - c);
}

/* Columns of one matrix a thread. */
PE_SCRATCH(cpu, gated_delta_rule)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  return n_threads * pe_arg(a, 1)->shape[2] * COLUMNS * 4;
}

PE_KERNEL(cpu, gated_delta_rule)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *log_decay,
                                 const pe_tensor *beta, const pe_tensor *state, const pe_tensor *before, const pe_tensor *after,
                                 const pe_tensor *out0, const pe_tensor *out1, const pe_gated_delta_rule_params *p, pe_stream *s) {
  (void)out1; /* the state itself */
  const int64_t m = v->shape[0], h = v->shape[1], f = v->shape[2], g = k->shape[1], e = k->shape[2];
  const int64_t blocks = (f + COLUMNS - 1) / COLUMNS;
  const int32_t *from = before->data, *to = after->data;
  float *t = (float *)(s->scratch + s->ith * e * COLUMNS * 4);
  const pe_status bad = check_rows("gated_delta_rule", state, before, after, s);
  if (bad) return bad;
  if (g == 0 || h % g) return pe_fail(s, PE_BAD_SHAPE, "gated_delta_rule: %lld heads share %lld keys", (long long)h, (long long)g);
  for (int64_t unit; (unit = pe_next(s, 0)) < h * blocks;) {
    const int64_t head = unit / blocks, first = unit % blocks * COLUMNS, left = f - first, shared = p->tiled ? head % g : head / (h / g);
    for (int64_t i = 0; i < m; i++) {
      const float *row = (const float *)v->data + (i * h + head) * f + first;
      const int64_t at = (i * g + shared) * e;
      if (from[i] != FOLLOWS) read_columns(from[i] >= 0 ? cell_of(state, head, from[i]) + first : 0, t, e, f, left);
      delta_row(t, e, (const float *)q->data + at, (const float *)k->data + at, row, (float *)out0->data + (i * h + head) * f + first, left,
                ((const float *)log_decay->data)[i * h + head], ((const float *)beta->data)[i * h + head]);
      if (to[i] >= 0) write_columns(t, cell_of(state, head, to[i]) + first, e, f, left);
    }
  }
  return PE_OK;
}

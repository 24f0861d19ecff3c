/* linear.c: one to four weight matrices times the same rows, with everything fused that touches those rows.
 * Reference: pyengine/ops/matmul.py: linear.
 *
 *   h = rms_norm(x, norm) if norm else x                  x F32 [m, k]
 *   y_i = h w_i^T + bias_i                                w_i [n_i, k]: packed (pack.h), or in the file's layout
 *   out_0 = act(y_0) * y_1 if glu, else out_i = y_i (+ residual), then the soft cap
 *
 * Work.  A panel is PANEL_GROUPS groups of 16 rows of one matrix, a strip 1 to 4 panels; an item is a strip times a block of up to
 * 256 rows of x. Threads claim runs of items, so a matrix is read once for each block of rows, in order. With glu an item is the
 * strips of both matrices.
 *
 * Quantized weights.  h becomes int8, symmetric, one scale for 32 of k; products are exact in int32 and enter one float
 * accumulator an output, k ascending:  acc += (isum * s) * d;  acc += o * (d * sum of x).  Few rows (linear_few.c) and many
 * (linear_tiles.c) do exactly this, so the bits of an output depend neither on the number of rows nor on the number of threads.
 * Float weights, and formats that have no packed form: x stays float; fma in k order (linear_float.c). Either way k is cut into at most
 * 16 slices, each with an accumulator of its own (linear_parts.h).
 *
 * Weights in the file's layout whose format has a packed form are packed panel by panel into a thread's own memory and multiplied
 * there, so they give the bits of packed ones. With one row, packing takes longer than the product; among 256 rows a
 * twentieth of it (2026-11, Zen 5).
 *
 * Scratch: quantized rows (shared, or each thread's own where rows are few), and for each thread its panel, the sums
 * of a strip [panel][rows of a block][16 PANEL_GROUPS], as many of slices where those are longer than a panel, a packed copy of the panel where weights are in the file's layout, and for SME
 * a panel's k of the rows, turned.
 */
#include "codes.h"
#include "linear_parts.h"
#include "vec.h"

/* ---- rows of x ---- */

static void fill_step(const int8_t codes[32], const int32_t sums[8], float d, linear_step *to) {
  const int32_t s0 = sums[0] + sums[1] + sums[2] + sums[3], s1 = sums[4] + sums[5] + sums[6] + sums[7];
  memcpy(to->q, codes, 32);
  to->d = d;
  to->dsum = d * (float)(s0 + s1);
  to->dsum2[0] = d * (float)s0;
  to->dsum2[1] = d * (float)s1;
  to->sum = s0 + s1;
  to->sum2[0] = s0;
  to->sum2[1] = s1;
}

void linear_quantize(const float *x, int64_t k, char *q) {
  enum { TOGETHER = 16 }; /* steps whose scales are divided at once; two are summed at once */
  linear_step *to = (linear_step *)q;
  for (int64_t left = k / 32; left > 0; left -= TOGETHER, x += 32 * TOGETHER, to += TOGETHER) {
    const int n = (int)pe_min(TOGETHER, left);
    int32_t most[TOGETHER] = {0}, sums[TOGETHER][8];
    int8_t codes[TOGETHER][32];
    float d[TOGETHER], inverse[TOGETHER];
    v16f inverses;
    for (int i = 0; i < n; i++)
      most[i] = v16i_hmax(v16i_max(magnitude(v16f_load(x + 32 * i)), magnitude(v16f_load(x + 32 * i + 16))));
    v16f_store(d, code_scales(v16i_load(most), &inverses));
    v16f_store(inverse, inverses);
    for (int i = 0; i < n; i++) {
      v16i_store_i8(codes[i], codes_of(v16f_load(x + 32 * i), inverse[i]));
      v16i_store_i8(codes[i] + 16, codes_of(v16f_load(x + 32 * i + 16), inverse[i]));
    }
    if (n % 2) memset(codes[n], 0, 32);
    for (int i = 0; i < n; i += 2) v16i_store(sums[i], dot_u7(v16i_zero(), v64u_set1(1), v64u_load(codes[i])));
    for (int i = 0; i < n; i++) fill_step(codes[i], sums[i], d[i], to + i);
  }
}

/* ---- what is done with sums ---- */

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
      y = v16f_mul(linear_activate(y, t->p.glu), u);
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

static int32_t format_of(const pe_tensor *w) { return w->dtype >= PE_PACKED ? w->dtype - PE_PACKED : w->dtype; }

/* Bytes of a packed group of a matrix, or of each of an expert's, in whichever layout it is; 0: its format has no packed form. */
static int64_t group_bytes(const pe_tensor *w) { return pe_pack_group_bytes(format_of(w), w->shape[w->ndim - 1]); }

int linear_is_float(const pe_tensor *w) { return pe_format_of(format_of(w)).elements == 1 || !group_bytes(w); }

linear_needs linear_needs_of(const pe_tensor *const *w, int32_t n_w) {
  linear_needs y = {0, 0, 0};
  for (int32_t i = 0; i < n_w; i++) {
    if (linear_is_float(w[i])) y.floats = 1;
    else y.quantized = 1;
    if (w[i]->dtype < PE_PACKED) y.copy = pe_max(y.copy, PANEL_GROUPS * group_bytes(w[i]));
  }
  return y;
}

void linear_own_memory(linear_places *y, int64_t at, int64_t rows, int64_t k, linear_needs needs) {
  const int quantized = needs.quantized, floats = needs.floats;
  y->panel = at;
  y->rows = at + pe_max(quantized ? PANEL_STEPS * panel_step_bytes(2, 1) : 0, floats ? 64 * PANEL_GROUPS * FILE_PANEL_DEPTH : 0);
  y->acc = y->rows + (floats ? 64 * FILE_PANEL_DEPTH : 0);
  y->part = y->acc + rows * 64 * PANEL_GROUPS * STRIP_PANELS; /* with glu, half as wide and twice */
  y->copy = y->part + (floats || linear_slice(k) > PANEL_STEPS ? y->part - y->acc : 0);
  y->turned = y->copy + needs.copy;
  y->own = y->turned + pe_round_up(rows, 16) * TURNED_ROW;
}

linear_places linear_memory(int64_t m, int64_t k, linear_needs needs, int normed) {
  const int quantized = needs.quantized, floats = needs.floats;
  linear_places y = {0};
  const int64_t row = quantized ? linear_row(k) : 0, hrow = normed ? linear_float_row(k) : 0;
  y.h = m > ROWS_FEW ? m * row : 0;
  y.shared = y.h + (m > ROWS_FEW && floats ? m * hrow : 0);
  y.own_h = ROWS_FEW * row;
  linear_own_memory(&y, y.own_h + ROWS_FEW * hrow, linear_block(m), k, needs); /* a normed row on its way to int8 stays before it */
  return y;
}

PE_SCRATCH(cpu, linear)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  const pe_tensor *x = a->t[a->start[0]];
  linear_places y = linear_memory(x->shape[0], x->shape[1], linear_needs_of(a->t + a->start[1], a->count[1]), a->count[3] > 0);
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
  if (q) linear_quantize(row, k, q);
}

static pe_status product(const linear_product *p) {
  if (linear_is_float(p->w)) {
    if (!p->packed || p->rows > ROWS_FEW || p->gather) return PE_NAME(linear_floats)(p);
    PE_NAME(linear_few_floats)(p);
  } else if (p->rows <= PE_NAME(linear_most_few)() && !p->gather) {
    PE_NAME(linear_few)(p);
  } else {
    PE_NAME(linear_tiles)(p);
  }
  return PE_OK;
}

/* A product with a matrix in the file's layout: each panel is packed into `copy` on its way. */
static pe_status packing_product(const linear_product *t, char *copy) {
  const int64_t row = t->k / pe_format_of(t->id).elements * pe_format_of(t->id).bytes, n = t->w->shape[0];
  pe_tensor held = *t->w;
  held.data = copy;
  held.dtype = PE_PACKED + t->id;
  linear_product p = *t;
  p.w = &held;
  p.packed = 1;
  p.panels = 1;
  p.g0 = 0;
  p.next = (const uint8_t *)copy;
  for (int64_t i = 0; i < t->panels; i++) {
    const int64_t g = t->g0 + PANEL_GROUPS * i;
    p.groups = pe_min(PANEL_GROUPS, t->groups - g);
    p.acc = t->acc + i * linear_sums(t);
    held.shape[0] = 16 * p.groups;
    pe_status status = pe_pack_groups(t->id, (const char *)t->w->data + 16 * g * row, n - 16 * g, t->k, 0, p.groups, copy);
    if (!status) status = product(&p);
    if (status) return status;
  }
  return PE_OK;
}

pe_status linear_multiply(const linear_job *t, const pe_tensor *w, int64_t g0, int64_t panels, const uint8_t *next, int64_t row0,
                          int64_t rows, char *own, const linear_places *y, float *acc) {
  const int packed = w->dtype >= PE_PACKED;
  const linear_product p = {.w = w, .id = format_of(w), .packed = packed, .k = t->k, .groups = linear_groups(w), .g0 = g0,
                            .panels = panels, .bytes = group_bytes(w), .next = next, .rows = rows,
                            .ldq = linear_row(t->k), .q = t->q + row0 * linear_row(t->k), .ldh = t->ldh, .h = t->h + row0 * t->ldh,
                            .panel = own + y->panel, .dequantized = (float *)(own + y->rows), .acc = acc,
                            .part = (float *)(own + y->part), .turned = own + y->turned, .thread = t->thread, .gather = t->gather, .row0 = row0};
  return packed || !p.bytes ? product(&p) : packing_product(&p, own + y->copy);
}

/* Strip number `strip` of all sets: which set, and its first group. */
static int locate(const linear_job *t, int64_t strip, int64_t *g0) {
  int set = 0;
  while (set + 1 < t->n_sets && strip >= linear_strips(t->w[set], t->wide)) strip -= linear_strips(t->w[set++], t->wide);
  *g0 = strip * PANEL_GROUPS * t->wide;
  return set;
}

const uint8_t *linear_strip_bytes(const pe_tensor *w, int64_t k, int64_t g0) {
  int64_t bytes = w->dtype >= PE_PACKED ? pe_pack_group_bytes(w->dtype - PE_PACKED, k) : 16 * w->stride[0];
  return (const uint8_t *)w->data + g0 * bytes;
}

pe_status linear_strip(const linear_job *t, int set, int64_t g0, const uint8_t *next, int64_t row0, int64_t rows, char *own,
                       const linear_places *y) {
  const int glu = t->p.glu != PE_LINEAR_GLU_NONE;
  const int64_t count = pe_min(PANEL_GROUPS * t->wide, linear_groups(t->w[set]) - g0);
  const int64_t panels = (count + PANEL_GROUPS - 1) / PANEL_GROUPS;
  float *acc = (float *)(own + y->acc);
  float *acc1 = acc + t->rows * 16 * PANEL_GROUPS * (STRIP_PANELS / 2);
  const uint8_t *after = glu ? linear_strip_bytes(t->w[1], t->k, g0) : next;
  pe_status status = linear_multiply(t, t->w[set], g0, panels, after, row0, rows, own, y, acc);
  if (!status && glu) status = linear_multiply(t, t->w[1], g0, panels, next, row0, rows, own, y, acc1);
  if (status) return status;
  for (int64_t r = 0; r < rows; r += FLOAT_TILE_ROWS) /* a strip's columns lie side by side in the result */
    for (int64_t g = 0; g < count; g++) {
      const int64_t from = ((g / PANEL_GROUPS * rows + r) * PANEL_GROUPS + g % PANEL_GROUPS) * 16;
      finish(t, set, g0 + g, row0 + r, pe_min(FLOAT_TILE_ROWS, rows - r), acc + from, glu ? acc1 + from : 0, 16 * PANEL_GROUPS);
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

  linear_job t = {w, n_bias ? bias : 0, out, residual, *p, n_w, glu ? 1 : n_w, m, k, linear_block(m), 1, 0, 0, 0, 0, 0, 0, s->ith};
  const linear_needs needs = linear_needs_of(w, n_w);
  const int quantized = needs.quantized, floats = needs.floats;
  const linear_places y = linear_memory(m, k, needs, norm != 0);
  if (s->scratch_bytes < y.shared + s->nth * y.own)
    return pe_fail(s, PE_NO_MEMORY, "linear: %lld bytes of scratch, needs %lld", (long long)s->scratch_bytes,
                   (long long)(y.shared + s->nth * y.own));
  char *own = s->scratch + y.shared + s->ith * y.own;

  /* Rows of x: few are prepared by every thread for itself, many by all threads together. */
  const int64_t xrow = linear_row(k), hrow = linear_float_row(k);
  if (m <= ROWS_FEW) {
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
  t.wide = m > ROWS_SOME ? glu ? STRIP_PANELS / 2 : STRIP_PANELS : 1;
  for (;; t.wide /= 2) {
    t.strips = 0;
    for (int i = 0; i < t.n_sets; i++) t.strips += linear_strips(w[i], t.wide);
    if (t.wide == 1 || blocks * t.strips >= 8 * s->nth) break;
  }
  const int64_t run = m > ROWS_SOME ? 1 : pe_max(1, t.strips / (16 * s->nth)), runs = (t.strips + run - 1) / run;
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

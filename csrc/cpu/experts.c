/* experts.c: expert_linear, the products of rows with the weights of the experts that they chose.
 * Reference: pyengine/ops/experts.py: expert_linear.
 *
 * A pair is a row and one of its experts; p = m u of them. Every thread sorts the pairs by expert (counting: 8 bytes a pair, 4 an
 * expert). Rows of x are prepared once as `linear` does, int8 or float32, and laid down in that order, so that the rows of one
 * expert lie side by side: an expert is then a product of `linear`, by the same code and with the same bits (linear.h).
 * Items are strips of one expert's matrices times up to 256 of its rows; threads claim them in the order of experts. Experts
 * that no row chose are not read.
 *   one row    reads u experts' bytes once, in order; 2 u n k operations for u n k weights: memory is the limit.
 *   many rows  each expert's strip is unpacked once for its r rows of a block: 9 to 24 instructions for 16 x 32 weights against
 *              8 dot products for each row, so unpacking takes half of the time at r = 2 and a tenth at r = 20. The whole
 *              reads at most e n k weights, writes p rows of 4 n bytes, and does 2 p n k operations.
 */
#include "linear.h"
#include "pack.h"

#define SAME(glu) _Static_assert((int)PE_EXPERT_LINEAR_GLU_##glu == (int)PE_LINEAR_GLU_##glu, "as in linear");
SAME(NONE) SAME(SILU) SAME(GELU_TANH) SAME(GELU) SAME(RELU)
#undef SAME

/* Working memory: `linear`'s for p rows, and behind each thread's part its order of pairs, their places in it, and the ends of
 * experts. Float rows are always copied, so they count as normed. */
typedef struct places {
  linear_places y;
  int64_t order, place, ends, own;
} places;

static places places_of(const pe_tensor *const *w, int32_t n_w, int64_t pairs) {
  const linear_needs needs = linear_needs_of(w, n_w);
  places t = {linear_memory(pairs, w[0]->shape[2], needs, needs.floats), 0, 0, 0, 0};
  t.order = pe_round_up(t.y.own, 64);
  t.place = t.order + pe_round_up(4 * pairs, 64);
  t.ends = t.place + pe_round_up(4 * pairs, 64);
  t.own = t.ends + pe_round_up(4 * w[0]->shape[0], 64);
  return t;
}

PE_SCRATCH(cpu, expert_linear)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  const pe_tensor *chosen = a->t[a->start[2]];
  places t = places_of(a->t + a->start[1], a->count[1], chosen->shape[0] * chosen->shape[1]);
  return t.y.shared + n_threads * t.own;
}

/* order[i]: the i-th pair when sorted by expert; place[pair]: that i; ends[e]: the number of pairs of experts 0 .. e. */
static pe_status sort_pairs(const pe_tensor *chosen, int64_t experts, int32_t *order, int32_t *place, int32_t *ends, pe_stream *s) {
  const int64_t m = chosen->shape[0], used = chosen->shape[1];
  memset(ends, 0, (size_t)experts * 4);
  for (int64_t i = 0; i < m; i++)
    for (int64_t u = 0; u < used; u++) {
      const int64_t id = ((const int32_t *)((const char *)chosen->data + i * chosen->stride[0]))[u];
      if (id < 0 || id >= experts)
        return pe_fail(s, PE_BAD_VALUE, "expert_linear: expert %lld of %lld", (long long)id, (long long)experts);
      if (id + 1 < experts) ends[id + 1]++; /* first the begins, which filling moves to the ends */
    }
  for (int64_t e = 1; e < experts; e++) ends[e] += ends[e - 1];
  for (int64_t i = 0; i < m; i++)
    for (int64_t u = 0; u < used; u++) {
      const int32_t at = ends[((const int32_t *)((const char *)chosen->data + i * chosen->stride[0]))[u]]++;
      order[at] = (int32_t)(i * used + u);
      place[i * used + u] = at;
    }
  return PE_OK;
}

static pe_status check_experts(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, const pe_tensor *chosen,
                               const pe_tensor *out, const pe_expert_linear_params *p, pe_stream *s) {
  const int64_t m = chosen->shape[0], pairs = m * chosen->shape[1];
  if (n_w != 1 + (p->glu != PE_EXPERT_LINEAR_GLU_NONE))
    return pe_fail(s, PE_BAD_SHAPE, "expert_linear: %d weights; one, or two with glu", n_w);
  if (pairs > INT32_MAX || (x->shape[0] != m && x->shape[0] != pairs) || out->shape[0] != pairs)
    return pe_fail(s, PE_BAD_SHAPE, "expert_linear: %lld rows for %lld x %lld experts", (long long)x->shape[0], (long long)m,
                   (long long)chosen->shape[1]);
  for (int i = 0; i < n_w; i++) {
    if (w[i]->shape[0] != w[0]->shape[0] || w[i]->shape[1] != out->shape[1] || w[i]->shape[2] != x->shape[1])
      return pe_fail(s, PE_BAD_SHAPE, "expert_linear: weight %d does not fit", i);
    if (w[i]->dtype >= PE_PACKED && !pe_pack_bytes(w[i]->dtype - PE_PACKED, w[i]->shape[1], w[i]->shape[2]))
      return pe_fail(s, PE_NO_KERNEL, "expert_linear: no packed form of format %d", w[i]->dtype - PE_PACKED);
  }
  return PE_OK;
}

/* The matrix of expert e. */
static pe_tensor expert_of(const pe_tensor *w, int64_t e) {
  const int64_t n = w->shape[1], k = w->shape[2];
  const int64_t bytes = w->dtype >= PE_PACKED ? pe_pack_bytes(w->dtype - PE_PACKED, n, k) : w->stride[0];
  pe_tensor t = {(char *)w->data + e * bytes, w->dtype, 2, {n, k}, {w->stride[1], w->stride[2]}};
  return t;
}

/* How the strips of experts are dealt out. Experts with more than ROWS_SOME rows: a claim is a strip of `wide` panels and a block of
 * rows. Others: a run of strips of one panel. */
typedef struct deal {
  int64_t wide, strips;        /* of an expert with many rows */
  int64_t run, single, claims; /* of one with few: strips in a run, of all its matrix, and runs */
} deal;

static int64_t blocks_of(int64_t rows) { return (rows + ROWS_BLOCK - 1) / ROWS_BLOCK; }
static int64_t claims_of(const deal *d, int64_t rows) {
  return rows > ROWS_SOME ? blocks_of(rows) * d->strips : rows ? d->claims : 0;
}

/* As in `linear`: strips as wide as leave 8 claims for each thread, runs that leave 16. */
static deal deal_out(const pe_tensor *w, int glu, const int32_t *ends, int64_t experts, int64_t threads) {
  int64_t blocks = 0, few = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t rows = ends[e] - (e ? ends[e - 1] : 0);
    if (rows > ROWS_SOME) blocks += blocks_of(rows);
    else few += rows > 0;
  }
  deal d = {glu ? STRIP_PANELS / 2 : STRIP_PANELS, 0, 1, linear_strips(w, 1), 0};
  for (;; d.wide /= 2) {
    d.strips = linear_strips(w, d.wide);
    if (d.wide == 1 || blocks * d.strips + few * d.single >= 8 * threads) break;
  }
  d.run = pe_min(d.single, pe_max(1, (few * d.single + blocks * d.strips) / (16 * threads)));
  d.claims = (d.single + d.run - 1) / d.run;
  return d;
}

/* A claim: strips first .. end - 1 of expert e, times `rows` pairs from number row0 on. e == experts: there is none. */
typedef struct claim {
  int64_t e, begun;            /* claims of experts before e */
  int64_t row0, rows, wide, first, end;
} claim;

/* Claim number i, searched for from an earlier one on. */
static claim claim_of(claim c, int64_t i, const deal *d, const int32_t *ends, int64_t experts) {
  for (; c.e < experts; c.e++) {
    const int64_t row0 = c.e ? ends[c.e - 1] : 0, rows = ends[c.e] - row0, n = claims_of(d, rows), at = i - c.begun;
    if (at >= n) {
      c.begun += n;
      continue;
    }
    const int many = rows > ROWS_SOME;
    c.row0 = row0 + (many ? at / d->strips * ROWS_BLOCK : 0);
    c.rows = many ? pe_min(ROWS_BLOCK, row0 + rows - c.row0) : rows;
    c.wide = many ? d->wide : 1;
    c.first = many ? at % d->strips : at * d->run;
    c.end = many ? c.first + 1 : pe_min(d->single, c.first + d->run);
    break;
  }
  return c;
}

PE_KERNEL(cpu, expert_linear)(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, const pe_tensor *chosen,
                         const pe_tensor *out, const pe_expert_linear_params *p, pe_stream *s) {
  pe_status status = check_experts(x, w, n_w, chosen, out, p, s);
  const int64_t m = chosen->shape[0], used = chosen->shape[1], pairs = m * used, experts = w[0]->shape[0], k = x->shape[1];
  if (status || pairs == 0 || k == 0 || out->shape[1] == 0) return status;
  const places y = places_of(w, n_w, pairs);
  if (s->scratch_bytes < y.y.shared + s->nth * y.own)
    return pe_fail(s, PE_NO_MEMORY, "expert_linear: %lld bytes of scratch, needs %lld", (long long)s->scratch_bytes,
                   (long long)(y.y.shared + s->nth * y.own));
  char *own = s->scratch + y.y.shared + s->ith * y.own;
  int32_t *order = (int32_t *)(own + y.order), *place = (int32_t *)(own + y.place), *ends = (int32_t *)(own + y.ends);
  status = sort_pairs(chosen, experts, order, place, ends, s);
  if (status) return status;

  /* Rows of x, in the order of pairs: few are prepared by every thread for itself, many by all threads together. */
  const int64_t qrow = linear_row(k), hrow = linear_float_row(k), each = x->shape[0] == m ? used : 1;
  const int floats = linear_is_float(w[0]) || linear_is_float(w[n_w - 1]), alone = pairs <= ROWS_FEW;
  const int quantized = !linear_is_float(w[0]) || !linear_is_float(w[n_w - 1]);
  char *q = alone ? own : s->scratch, *h = alone ? own + y.y.own_h : s->scratch + y.y.h;
  for (int64_t i = 0; (i = alone ? i : pe_next(s, 0)) < x->shape[0]; i++) {
    const int64_t first = place[i * each];
    linear_prepare(x, 0, 0, i, k, quantized ? q + first * qrow : 0, floats ? (float *)(h + first * hrow) : 0);
    for (int64_t j = 1; j < each; j++) { /* the same row for its other experts */
      const int64_t to = place[i * each + j];
      if (quantized) memcpy(q + to * qrow, q + first * qrow, (size_t)qrow - 64);
      if (floats) memcpy(h + to * hrow, h + first * hrow, (size_t)k * 4);
    }
  }
  if (!alone) pe_barrier(s);

  pe_tensor one[2], next_one[2];
  const pe_tensor *matrices[2] = {&one[0], &one[1]};
  linear_job t = {.w = matrices, .out = &out, .n_w = n_w, .n_sets = 1, .m = pairs, .k = k, .rows = linear_block(pairs),
                  .q = q, .h = (const float *)h, .ldh = hrow / 4, .order = order, .thread = s->ith};
  t.p.glu = p->glu;
  one[0] = expert_of(w[0], 0);
  const deal d = deal_out(&one[0], n_w > 1, ends, experts, s->nth);
  claim c = {0, 0, 0, 0, 0, 0, 0}, ahead;
  for (c = claim_of(c, pe_next(s, 1), &d, ends, experts); c.e < experts; c = ahead) {
    ahead = claim_of(c, pe_next(s, 1), &d, ends, experts);
    for (int i = 0; i < n_w; i++) {
      one[i] = expert_of(w[i], c.e);
      next_one[i] = expert_of(w[i], ahead.e < experts ? ahead.e : c.e);
    }
    t.wide = c.wide;
    for (int64_t i = c.first; i < c.end; i++) {
      const int more = i + 1 < c.end;
      const int64_t next = PANEL_GROUPS * (more ? c.wide * (i + 1) : ahead.e < experts ? ahead.wide * ahead.first : c.wide * i);
      const uint8_t *bytes = linear_strip_bytes(more ? &one[0] : &next_one[0], k, next);
      status = linear_strip(&t, 0, PANEL_GROUPS * c.wide * i, bytes, c.row0, c.rows, own, &y.y);
      if (status) return pe_fail(s, PE_NO_KERNEL, "expert_linear: format %d cannot be read", w[0]->dtype);
    }
  }
  return PE_OK;
}

/* attention.c: softmax(scale q k^T) v over an interval of keys for each query.
 * Reference: pyengine/ops/attention.py: attention.
 *
 * One path serves prompts, single tokens and encoders. Here are units and their schedule; attention_keys.h and attention_tiles.h have what is
 * done with a tile, attention_softmax.h what is kept of a query. Work is cut as
 *
 *   unit    up to UNIT_FLOATS' worth of queries (rows x heads of the group) of one sequence and one key/value head
 *   chunk   CHUNK_KEYS keys, aligned in the LOGICAL numbers of the keys; online softmax starts afresh in each, giving a partial
 *           (top, largest score, sum[16], acc[f]) per query; partials are merged in ascending order
 *   tile    TILE_KEYS keys, aligned likewise: K is converted to float and transposed to kt[e][64], V to v[64][f] once,
 *           and all queries of the unit that see the tile use them, six at a time in registers (vec.h: tile).
 *           For few queries (decoding) floats in memory would be most of the work: there V is read where it lies, and avx512
 *           transposes K as it is, 16 bits wide; both are converted in registers, to the same floats in the same order.
 *           K in blocks stays in codes, 4 bytes of a key to a word: queries are rounded to 8 bits, with one scale a head, and
 *           multiplied with them as integers; the sum of each block times its scale is added to the score in float
 *
 * Blocks hold mixed elements (cells.h): queries are mixed before they are rounded, results are mixed back.
 *
 * What happens to a query (fma by fma: e ascending in a score, keys ascending in acc, 16 lanes of keys in sum) follows from its
 * interval alone: neither other rows, nor the unit's size, nor threads can change a bit. Tiles and keys outside its interval are
 * not touched, so that a masked key contributes nothing, not even a NaN.
 *
 * A thread claims units, one key/value head after the other. Where there are few units (decoding) it
 * claims (unit, chunk) pairs, partials go to scratch, and the thread that finishes last merges them all.
 * All sums are float. Bytes: each unit reads its keys' K and V once from the cache in the cache's dtype; operations: 2 (e + f) a
 * query and key. Shared by the unit's queries: a load, a conversion, 4 shuffles and a store per 16 elements of K, less without the
 * shuffles of V; for few queries on avx512 a store, 2 shuffles and a conversion of K, a conversion of V. A block of Q8_0 keys takes
 * 8 integer products of 16 keys, a conversion and an fma.
 */
#include "attention_softmax.h"
#include "attention_sums.h"
#include "attention_tiles.h"

enum { CHUNK_KEYS = 256 };
/* A unit's queries and sums stay in the second cache (512 KB: 496 queries of width 72, 163 of 256); each tile is converted once for
 * them. */
enum { UNIT_FLOATS = 1 << 17 };
enum { SPLIT_BYTES = 4 << 20 }; /* at most this much scratch for partials; work that would need more is not split */

static int64_t unit_queries(const pe_tensor *q, const pe_tensor *v) {
  return UNIT_FLOATS / (q->shape[2] + 2 * (pe_round_up(v->shape[2], 16) + 16));
}

/* ---- scratch: per thread [starts of blocks][queries][partial of a chunk][running total][kt][v], then partials ---- */

static int64_t thread_floats(const job *w) {
  const int64_t n = w->rows * w->group;
  return pe_round_up(w->m + 1, 16) + pe_round_up(n * w->e, 16) + 2 * partial_floats(n, w->fp) + (w->ep + w->fp) * TILE_KEYS;
}

PE_SCRATCH(cpu, attention)(const pe_args *a, const void *params, int32_t n_threads) {
  const pe_tensor *q = pe_arg(a, 0), *k = pe_arg(a, 1), *v = pe_arg(a, 2);
  if (((const pe_attention_params *)params)->products == PE_ATTENTION_PRODUCTS_INT8)
    return PE_NAME(attention_int8_scratch)(q, k, v, n_threads);
  const job w = job_of(q, k, v, unit_queries(q, v), n_threads);
  const int64_t chunks = k->shape[1] / CHUNK_KEYS + 2;
  const int64_t split = 4 * partial_floats(pe_max(1, w.m) * w.h, w.fp) * chunks;
  return n_threads * 4 * thread_floats(&w) + (n_threads > 1 ? pe_min(split, SPLIT_BYTES) : 0);
}

/* Scores of keys a .. b - 1 of the tile at `first` get what their distance from a query adds; distances beyond the ends are those of the ends. */
static void add_bias(const job *w, int64_t row, int64_t head, int64_t first, int a, int b, float *p) {
  const float *bias = w->bias + head * (2 * w->reach + 1);
  const int64_t from = first - (w->at ? w->at[row] : w->hi[row] - 1) + w->reach;      /* column of key 0 of the tile */
  const int inner = (int)pe_max(a, pe_min(b, -from)), outer = (int)pe_max(inner, pe_min(b, 2 * w->reach + 1 - from));
  for (int j = a; j < inner; j++) p[j] += bias[0];
  for (int j = inner; j < outer; j += 16)
    store_some(p + j, v16f_add(load_some(p + j, outer - j), load_some(bias + from + j, outer - j)), outer - j);
  for (int j = outer; j < b; j++) p[j] += bias[2 * w->reach];
}

/* n queries, side by side in q and in the partial, see keys a .. b - 1 of the tile at `first`; the first is that of row `row` and head `head`. */
static void attend(const job *w, int64_t row, int64_t head, int64_t first, const float *q, int64_t n, int a, int b, const loaded *t, partial s,
                   const kept *keeps, int64_t at) {
  const int most = t->form != FLOATS && t->direct ? FEW_ROWS : TILE_ROWS; /* queries at once */
  ahead k = ahead_of(t->next->k, cell_bytes(w->k)), v = ahead_of(t->next->v, cell_bytes(w->v));
  const int v0 = a / 16, v1 = (b + 15) / 16;
  float own[FEW_ROWS][TILE_KEYS], factor[FEW_ROWS], *place = kept_place(keeps, at, first);
  int64_t done = 0;
  for (int64_t tiles = (n + most - 1) / most; n; tiles--) {
    const int r = (int)((n + tiles - 1) / tiles); /* as even as they can be: 7 queries are 4 + 3 */
    float *const p = place ? place + done * TILE_KEYS : own[0];
    scores_of(t->form, w->k->dtype, r, q, w->e, t->kt, v0, v1, &k, p);
    for (int i = 0; w->bias && i < r; i++)
      add_bias(w, row + (done + i) / w->group, head + (done + i) % w->group, first, a, b, p + i * TILE_KEYS);
    if (a == 0 && b == TILE_KEYS)
      for (int i = 0; i < r; i++) factor[i] = soften(p + i * TILE_KEYS, 0, TILE_KEYS, 0, TILE_KEYS / 16, w->softcap, s.top + i, s.most + i, s.sum + 16 * i);
    else
      for (int i = 0; i < r; i++) factor[i] = soften(p + i * TILE_KEYS, a, b, v0, v1, w->softcap, s.top + i, s.most + i, s.sum + 16 * i);
    if (place) keep_tops(keeps, at + done, first, r, s.top);
    done += r;
    if (t->direct) direct_values(w->v->dtype, r, p + a, t->cells->v + a, &v, w->f, s.acc, b - a, factor);
    else tile(r, (int)(w->fp / 16), p + a, TILE_KEYS, t->v + a * w->fp, w->fp, s.acc, w->fp, b - a, factor);
    q += r * w->e;
    s.top += r;
    s.most += r;
    s.sum += 16 * r;
    s.acc += r * w->fp;
    n -= r;
  }
}

/* ---- units ---- */

typedef struct buffers { float *q, *kt, *v; } buffers;

/* Does a row see a key of the chunk? */
static int sees(const job *w, int64_t row, int64_t chunk) {
  return w->lo[row] < (chunk + 1) * CHUNK_KEYS && w->hi[row] > chunk * CHUNK_KEYS && !sees_nothing(w, row);
}

/* The first chunk from `chunk` on of which any row of the unit sees a key, or -1. */
static int64_t next_chunk(const job *w, const unit *u, int64_t chunk) {
  int64_t best = -1;
  for (int64_t r = u->row; r < u->row + u->n_rows; r++) {
    if (sees_nothing(w, r) || (w->hi[r] - 1) / CHUNK_KEYS < chunk) continue;
    int64_t c = pe_max(chunk, w->lo[r] / CHUNK_KEYS);
    best = best < 0 ? c : pe_min(best, c);
  }
  return best;
}

/* Scaled queries [e] side by side. */
static void load_queries(const job *w, const unit *u, float *to) {
  for (int64_t r = u->row; r < u->row + u->n_rows; r++)
    for (int64_t i = 0; i < w->group; i++, to += w->e) load_query(w, r, u->head * w->group + i, to);
}

/* Part of the tile at key `first` that a row sees: *a <= j < *b; 0 if none. */
static int visible(const job *w, int64_t row, int64_t first, int *a, int *b) {
  const int64_t x = pe_max(w->lo[row], first), y = pe_min(w->hi[row], first + TILE_KEYS);
  *a = (int)(x - first);
  *b = (int)(y - first);
  return x < y;
}

/* Keys of the tile at `first` that any row of the unit sees, one bit each. */
static uint64_t wanted_keys(const job *w, const unit *u, int64_t first) {
  uint64_t wanted = 0;
  int a, b;
  for (int64_t r = u->row; r < u->row + u->n_rows; r++)
    if (visible(w, r, first, &a, &b)) wanted |= ~(uint64_t)0 >> (TILE_KEYS - (b - a)) << a;
  return wanted;
}

/* One chunk for all queries of a unit, whose scaled queries are in t->q. Keys before `limit` will be needed by this thread. */
static pe_status run_chunk(const job *w, const unit *u, int64_t chunk, int64_t limit, const buffers *t, partial p, const kept *keeps, pe_stream *s) {
  const int64_t end = u->row + u->n_rows, first_key = chunk * CHUNK_KEYS;
  const int32_t sequence = w->cells && w->seq ? w->seq[u->row] : 0;
  cells_of cells[2]; /* of this tile and of the next */
  uint64_t wanted = wanted_keys(w, u, first_key), later;
  pe_status bad = wanted ? find_cells(w, u->head, sequence, first_key, wanted, &cells[0], s) : PE_OK;
  if (bad) return bad;
  start(w, u, p);
  for (int64_t i = 0; i < CHUNK_KEYS / TILE_KEYS; i++, wanted = later) {
    const int64_t first = first_key + i * TILE_KEYS, next = first + TILE_KEYS;
    later = next < limit ? wanted_keys(w, u, next) : 0;
    if (later && (bad = find_cells(w, u->head, sequence, next, later, &cells[(i + 1) % 2], s))) return bad;
    if (!wanted) continue;
    const loaded tile = load_tile(w, &cells[i % 2], &cells[later ? (i + 1) % 2 : i % 2], wanted, u->n_rows * w->group, t->kt, t->v);
    int a, b;
    for (int64_t r = u->row, n; r < end; r += n) { /* runs of rows that see the same part */
      n = 1;
      if (!visible(w, r, first, &a, &b)) continue;
      for (int c, d; r + n < end && visible(w, r + n, first, &c, &d) && c == a && d == b;) n++;
      const int64_t at = (r - u->row) * w->group;
      attend(w, r, u->head * w->group, first, t->q + at * w->e, n * w->group, a, b, &tile, (partial){p.top + at, p.most + at, p.sum + 16 * at, p.acc + w->fp * at},
             keeps, at);
    }
  }
  return PE_OK;
}

/* total += part, for the rows that see the chunk; factors of 16 queries at once. */
static void merge(const job *w, const unit *u, int64_t chunk, partial total, partial part) {
  for (int64_t r = 0; r < u->n_rows; r++)
    if (sees(w, u->row + r, chunk))
      for (int64_t first = r * w->group, end = first + w->group; first < end; first += 16)
        merge_queries(total, part, first, pe_min(16, end - first), w->fp);
}

/* stats = (the largest logit, sum of exp(logit - it)) of a query whose sum is relative to `top`. */
static void tell(float top, float most, float sum, const float *sink, float *stats) {
  const float largest = sink && *sink > most ? *sink : most;
  float total = sum * first_lane(v16f_exp(v16f_set1(top - largest)));
  if (sink) total += first_lane(v16f_exp(v16f_set1(*sink - largest)));
  stats[0] = largest;
  stats[1] = total;
}

/* out = acc / sum; a sink joins the sum only. keeps: what is kept of the queries, if anything. */
static void finish(const job *w, const unit *u, partial total, const kept *keeps) {
  for (int64_t r = 0; r < u->n_rows; r++)
    for (int64_t i = 0; i < w->group; i++) {
      const int64_t at = r * w->group + i, head = u->head * w->group + i;
      float *out = w->out + ((u->row + r) * w->h + head) * w->f, *acc = total.acc + w->fp * at;
      float sum = total.sum[16 * at];
      v16f shrink = v16f_set1(1.0f);
      float *stats = w->stats ? w->stats + 2 * ((u->row + r) * w->h + head) : 0;
      if (sees_nothing(w, u->row + r)) {
        memset(out, 0, (size_t)w->f * 4);
        if (stats) stats[0] = stats[1] = 0.0f;
        continue;
      }
      if (stats) tell(total.top[at], total.most[at], sum, w->sinks ? w->sinks + head : 0, stats);
      if (keeps) {
        float own[2];
        tell(total.top[at], total.most[at], sum, w->sinks ? w->sinks + head : 0, own);
        keeps->largest[at] = own[0], keeps->total[at] = own[1];
      }
      if (w->sinks) {
        const float x = total.top[at], y = w->sinks[head], now = y > x ? y : x;
        shrink = v16f_exp(v16f_set1(x - now));
        sum = sum * first_lane(shrink) + first_lane(v16f_exp(v16f_set1(y - now)));
      }
      for (int64_t j = 0; j < w->f; j += 16)
        store_some(out + j, v16f_div(v16f_mul(v16f_load(acc + j), shrink), v16f_set1(sum)), w->f - j);
      if (in_blocks(w->v)) mix(out, w->f);
    }
}

/* Cut the rows into blocks of one sequence each; returns their number. starts: [m + 1]. */
static int64_t cut_by_sequence(const job *w, int32_t *starts) {
  int64_t n = 0;
  for (int64_t r = 0; r < w->m; r++) {
    const int fresh = r == 0 || r - starts[n - 1] == w->rows || (w->cells && w->seq && w->seq[r] != w->seq[r - 1]);
    if (fresh) starts[n++] = (int32_t)r;
  }
  starts[n] = (int32_t)w->m;
  return n;
}

/* Unit i: heads one after the other, so that a head's keys stay in the shared cache; the last rows, which see most, first. */
static unit unit_at(const int32_t *starts, int64_t n_blocks, int64_t i) {
  const int64_t b = n_blocks - 1 - i % n_blocks;
  return (unit){starts[b], starts[b + 1] - starts[b], i / n_blocks};
}

/* ---- the kernel ---- */

/* Where claim number `claim` of n pairs begins: runs of a thread's own, so that what is fetched ahead is mostly for itself, and
 * ever shorter, so that threads end together. */
static int64_t claim_at(int64_t claim, int64_t n, int64_t n_threads) {
  int64_t at = 0;
  for (; claim > 0 && at < n; claim--) at += pe_max(1, (n - at) / (2 * n_threads));
  return at;
}

/* What one thread has in scratch. */
typedef struct room { int32_t *starts; buffers t; partial part, total; float *end; } room;

static room room_at(const job *w, float *mine) {
  const int64_t n = w->rows * w->group;
  room r = {.starts = (int32_t *)mine, .t.q = mine + pe_round_up(w->m + 1, 16)};
  r.part = partial_at(r.t.q + pe_round_up(n * w->e, 16), n);
  r.total = partial_at(r.part.acc + n * w->fp, n);
  r.t.kt = r.total.acc + n * w->fp;
  r.t.v = r.t.kt + w->ep * TILE_KEYS;
  r.end = r.t.v + w->fp * TILE_KEYS;
  return r;
}

static pe_status run(const job *w, pe_stream *s) {
  const int64_t own = thread_floats(w), n = w->rows * w->group;
  const int64_t left = s->scratch_bytes / 4 - own * s->nth;
  if (left < 0) return pe_fail(s, PE_NO_MEMORY, "attention: scratch is too small");
  const room r = room_at(w, (float *)s->scratch + own * s->ith);
  float *shared = (float *)s->scratch + own * s->nth;
  const int32_t *starts = r.starts;
  pe_status bad;

  const int64_t n_blocks = cut_by_sequence(w, r.starts), n_units = n_blocks * w->g, slot = partial_floats(n, w->fp);
  int64_t n_pairs = 0; /* (unit, chunk) pairs, where units are too few for the threads */
  if (s->nth > 1 && n_units < 2 * s->nth)
    for (int64_t i = 0; i < n_units && n_pairs * slot <= left; i++) {
      const unit u = unit_at(starts, n_blocks, i);
      for (int64_t c = 0; (c = next_chunk(w, &u, c)) >= 0 && n_pairs * slot <= left; c++) n_pairs++;
    }

  if (n_pairs <= n_units || n_pairs * slot > left) {
    for (int64_t i; (i = pe_next(s, 0)) < n_units;) {
      const unit u = unit_at(starts, n_blocks, i);
      load_queries(w, &u, r.t.q);
      start(w, &u, r.total);
      for (int64_t c = 0; (c = next_chunk(w, &u, c)) >= 0; c++) {
        if ((bad = run_chunk(w, &u, c, INT64_MAX, &r.t, r.part, 0, s))) return bad;
        merge(w, &u, c, r.total, r.part);
      }
      finish(w, &u, r.total, 0);
    }
    return PE_OK;
  }

  int64_t claim = pe_next(s, 0), at = 0, loaded = -1, done = 0;
  int64_t begin = claim_at(claim, n_pairs, s->nth), end = claim_at(claim + 1, n_pairs, s->nth);
  for (int64_t i = 0; i < n_units; i++) {
    const unit u = unit_at(starts, n_blocks, i);
    for (int64_t c = 0; (c = next_chunk(w, &u, c)) >= 0; c++, at++) {
      if (at < begin) continue;
      if (loaded != i) load_queries(w, &u, r.t.q), loaded = i;
      const int64_t limit = (c + end - at) * CHUNK_KEYS;
      if ((bad = run_chunk(w, &u, c, limit, &r.t, partial_at(shared + at * slot, n), 0, s))) return bad;
      done = __atomic_add_fetch(&s->counters[1], 1, __ATOMIC_ACQ_REL);
      if (at + 1 < end) continue;
      claim = pe_next(s, 0);
      begin = claim_at(claim, n_pairs, s->nth), end = claim_at(claim + 1, n_pairs, s->nth);
    }
  }
  if (done != n_pairs) return PE_OK; /* another thread is last */
  at = 0;
  for (int64_t i = 0; i < n_units; i++) {
    const unit u = unit_at(starts, n_blocks, i);
    start(w, &u, r.total);
    for (int64_t c = 0; (c = next_chunk(w, &u, c)) >= 0; c++, at++)
      merge(w, &u, c, r.total, partial_at(shared + at * slot, n));
    finish(w, &u, r.total, 0);
  }
  return PE_OK;
}

/* The job of a node, checked. */
static pe_status begin(const char *op, job *w, const pe_tensor *cells, const pe_tensor *seq, const pe_tensor *sinks, pe_stream *s) {
  if (w->g == 0 || w->h % w->g) return pe_fail(s, PE_BAD_SHAPE, "%s: %lld heads share %lld", op, (long long)w->h, (long long)w->g);
  if (cells) w->cells = cells->data, w->cells_stride = cells->stride[0], w->l = cells->shape[1];
  if (seq) w->seq = seq->data;
  if (sinks) w->sinks = sinks->data;
  const int by_channel = channel_format(w->k->dtype) != PE_F32;
  const pe_status bad = by_channel ? check_channels(op, "k", w->k, s) : check_cells(op, "k", w->k, 0, s);
  if (!bad && w->k->dtype == PE_Q2_1) return pe_fail(s, PE_NO_KERNEL, "%s: 'k' in blocks of 2 bits: only by channel", op);
  return bad ? bad : check_cells(op, "v", w->v, 0, s);
}

PE_KERNEL(cpu, attention)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo, const pe_tensor *hi,
                     const pe_tensor *cells, const pe_tensor *seq, const pe_tensor *sinks, const pe_tensor *bias, const pe_tensor *numbers,
                     const pe_tensor *out, const pe_tensor *stats, const pe_attention_params *p, pe_stream *s) {
  job w = job_of(q, k, v, unit_queries(q, v), s->nth);
  w.lo = lo->data, w.hi = hi->data, w.scale = p->scale, w.softcap = p->softcap, w.out = out->data;
  if (w.m == 0 || w.h == 0) return PE_OK;
  if (stats) w.stats = stats->data;
  if (bias) w.bias = bias->data, w.reach = bias->shape[1] / 2, w.at = numbers ? numbers->data : 0;
  pe_status bad = begin("attention", &w, cells, seq, sinks, s);
  if (bad) return bad;
  if (p->products == PE_ATTENTION_PRODUCTS_INT8) {
    if (cells || seq || sinks || bias || p->softcap != 0.0f || in_blocks(k) || in_blocks(v) || channel_format(k->dtype) != PE_F32)
      return pe_fail(s, PE_NO_KERNEL, "attention: products of int8 take neither cells nor blocks nor sinks nor a bias nor a soft cap");
    return PE_NAME(attention_int8)(q, k, v, lo, hi, out, p->scale, s);
  }
  bad = check_rows("attention", &w, pe_min(k->shape[1], v->shape[1]), cells ? cells->shape[0] : 1, s);
  return bad ? bad : run(&w, s);
}

/* ---- with sums of what keys get ---- */

/* Rows are cut finer: what is kept of a unit is for its rows times all keys. */
static job summed(job w, int64_t l) {
  const int64_t most = KEPT_FLOATS / (pe_max(1, w.group) * kept_keys(l));
  w.rows = pe_max(1, pe_min(w.rows, pe_max(LEAST_ROWS, pe_min(most, SUM_ROWS))));
  return w;
}

static int64_t summed_floats(const job *w, int64_t l) { return thread_floats(w) + kept_floats(w->rows * w->group, kept_keys(l)); }

PE_SCRATCH(cpu, attention_sums)(const pe_args *a, const void *params, int32_t n_threads) {
  const pe_tensor *q = pe_arg(a, 0), *k = pe_arg(a, 1), *v = pe_arg(a, 2);
  const int64_t l = pe_arg(a, 5)->shape[1];
  const job w = summed(job_of(q, k, v, unit_queries(q, v), n_threads), l);
  const pe_attention_params plain = {0};
  (void)params;
  return pe_max(PE_NAME(attention_scratch)(a, &plain, n_threads), 4 * (n_threads * summed_floats(&w, l) + pe_round_up(w.g, 16)));
}

/* One unit, and what it gives to keys: in its turn. */
static pe_status run_unit(const job *w, const unit *u, int64_t number, int32_t *turn, const room *r, pe_stream *s) {
  const int counts = unit_counts(w, u);
  const kept keeps = counts ? kept_at(w, u, r->end) : (kept){0};
  load_queries(w, u, r->t.q);
  start(w, u, r->total);
  for (int64_t c = 0; (c = next_chunk(w, u, c)) >= 0; c++) {
    const pe_status bad = run_chunk(w, u, c, INT64_MAX, &r->t, r->part, counts ? &keeps : 0, s);
    if (bad) return bad;
    merge(w, u, c, r->total, r->part);
  }
  finish(w, u, r->total, counts ? &keeps : 0);
  if (!await_turn(turn, (int32_t)number)) return PE_OK; /* another thread has failed, and says so */
  if (counts) add_unit(w, u, &keeps, visible);
  __atomic_store_n(turn, (int32_t)number + 1, __ATOMIC_RELEASE);
  return PE_OK;
}

static pe_status run_summed(const job *w, pe_stream *s) {
  const int64_t own = summed_floats(w, w->l);
  if (s->scratch_bytes / 4 < own * s->nth + pe_round_up(w->g, 16)) return pe_fail(s, PE_NO_MEMORY, "attention_sums: scratch is too small");
  const room r = room_at(w, (float *)s->scratch + own * s->ith);
  int32_t *turns = (int32_t *)((float *)s->scratch + own * s->nth); /* of each head: the number of its unit that may add now */
  if (s->ith == 0) memset(turns, 0, (size_t)w->g * 4);
  pe_barrier(s);
  const int64_t n_blocks = cut_by_sequence(w, r.starts);
  for (int64_t i; (i = pe_next(s, 0)) < n_blocks * w->g;) {
    const int64_t block = i % n_blocks;
    const unit u = {r.starts[block], r.starts[block + 1] - r.starts[block], i / n_blocks};
    const pe_status bad = run_unit(w, &u, block, turns + u.head, &r, s);
    for (int64_t head = 0; bad && head < w->g; head++) __atomic_store_n(turns + head, ABANDONED, __ATOMIC_RELEASE);
    if (bad) return bad;
  }
  return PE_OK;
}

PE_KERNEL(cpu, attention_sums)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo, const pe_tensor *hi,
                          const pe_tensor *cells, const pe_tensor *seq, const pe_tensor *sinks, const pe_tensor *sums, const pe_tensor *weights,
                          const pe_tensor *out, const pe_tensor *changed, const pe_attention_sums_params *p, pe_stream *s) {
  job w = job_of(q, k, v, unit_queries(q, v), s->nth);
  w.lo = lo->data, w.hi = hi->data, w.scale = p->scale, w.softcap = p->softcap, w.out = out->data;
  w.sums = changed->data, w.weights = weights->data, w.kinds = p->kinds, w.sum_keys = sums->shape[1], w.channels = sums->shape[2];
  if (w.m == 0 || w.h == 0) return PE_OK;
  if (w.channels > CHANNELS) return pe_fail(s, PE_NO_KERNEL, "attention_sums: %lld channels; at most %d are possible", (long long)w.channels, CHANNELS);
  pe_status bad = begin("attention_sums", &w, cells, seq, sinks, s);
  if (!bad) bad = check_rows("attention_sums", &w, pe_min(k->shape[1], v->shape[1]), cells->shape[0], s);
  if (bad) return bad;
  for (int64_t r = 0; r < w.m; r++)
    if (w.hi[r] > w.l) return pe_fail(s, PE_BAD_VALUE, "attention_sums: row %lld reads key %d of a sequence of %lld cells", (long long)r, w.hi[r] - 1, (long long)w.l);
  const unit all = {0, w.m, 0};
  if (!unit_counts(&w, &all)) return run(&w, s);
  w = summed(w, w.l);
  return run_summed(&w, s);
}

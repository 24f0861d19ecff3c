/* key_sums.c: what the queries of an attention give to each key, added to the key's sums.
 * Reference: pyengine/ops/attention.py: key_sums.
 *
 * attention has found each query's largest logit and total, so a probability takes one score and one exp. Rows without weights are
 * left out first; the scaled queries of the others are made ready once, [kv head][row][head of the group][e], in memory that threads share.
 * Then a thread claims (sequence, kv head, TILE_KEYS places in the sequence's cells), and owns their sums: keys that lie in one cell share
 * its sums, so two tasks never meet. It loads the keys and walks the queries in order, several at once for the scores only: an element is
 * added to query after query, fma by fma, and its bits depend on neither threads nor other rows nor how a prompt is cut.
 *
 * Operations: 2 e a query and key. Bytes: K is read once, queries once a task.
 */
#include "attention_keys.h"

enum { CLAIMED_ROWS = 16 };

typedef struct sums_job {
  job w;
  const float *stats;
  int64_t n_sequences;
} sums_job;

/* Rows that count, sequence after sequence, in their order: starts [sequences + 1]; of each its number, the place of its first key, and the
 * number of its keys. */
typedef struct rows { int32_t *starts, *row, *first, *n; int64_t count; } rows;

static int64_t row_ints(int64_t m, int64_t sequences) { return pe_round_up(sequences + 2 + 3 * m, 16); }

/* Floats of all threads, then of one. */
static int64_t query_floats(const job *w) { return pe_round_up(w->m * w->h * w->e, 16); }
static int64_t own_floats(const job *w, int64_t sequences) { return row_ints(w->m, sequences) + w->ep * TILE_KEYS; }

PE_SCRATCH(cpu, key_sums)(const pe_args *a, const void *params, int32_t n_threads) {
  const pe_tensor *q = pe_arg(a, 1), *k = pe_arg(a, 2);
  const job w = job_of(q, k, k, LEAST_QUERIES, n_threads);
  (void)params;
  return 4 * (query_floats(&w) + n_threads * own_floats(&w, pe_arg(a, 5)->shape[0]));
}

static rows find_rows(const sums_job *t, int32_t *memory) {
  const job *w = &t->w;
  rows r = {memory, memory + t->n_sequences + 2, 0, 0, 0};
  r.first = r.row + w->m, r.n = r.first + w->m;
  memset(r.starts, 0, (size_t)(t->n_sequences + 2) * 4);
  for (int64_t i = 0; i < w->m; i++)
    if (row_counts(w, i)) r.starts[(w->seq ? w->seq[i] : 0) + 2]++;
  for (int64_t n = 0; n < t->n_sequences; n++) r.starts[n + 2] += r.starts[n + 1];
  for (int64_t i = 0; i < w->m; i++) {
    if (!row_counts(w, i)) continue;
    const int32_t at = r.starts[(w->seq ? w->seq[i] : 0) + 1]++; /* becomes the next sequence's start */
    r.row[at] = (int32_t)i;
    r.first[at] = (int32_t)(w->lo[i] % w->l);
    r.n[at] = w->hi[i] - w->lo[i];
  }
  r.count = r.starts[t->n_sequences];
  return r;
}

/* Places a .. b - 1 of the tile at place `first` that a row sees; the keys go round in the cells, so there may be two such runs: 0 and 1. */
PE_INLINE int visible(const sums_job *t, const rows *r, int64_t i, int64_t first, int which, int *a, int *b) {
  const int64_t end = (int64_t)r->first[i] + r->n[i], l = t->w.l;
  const int64_t x = pe_max(which ? 0 : r->first[i], first), y = pe_min(which ? end - l : pe_min(end, l), first + TILE_KEYS);
  *a = (int)(x - first);
  *b = (int)(y - first);
  return x < y;
}

/* Places of the tile that any row begin .. end - 1 sees, one bit each. */
static uint64_t wanted_places(const sums_job *t, const rows *r, int64_t begin, int64_t end, int64_t first) {
  uint64_t wanted = 0;
  int a, b;
  for (int64_t i = begin; i < end && ~wanted; i++)
    for (int which = 0; which < 2; which++)
      if (visible(t, r, i, first, which, &a, &b)) wanted |= ~(uint64_t)0 >> (TILE_KEYS - (b - a)) << a;
  return wanted;
}

/* Addresses of the cells; a wanted one stands for those that are not. */
static pe_status find_keys(const sums_job *t, int64_t head, int64_t sequence, int64_t first, uint64_t wanted, const char **to, pe_stream *s) {
  const pe_tensor *k = t->w.k;
  const int32_t *map = (const int32_t *)((const char *)t->w.cells + sequence * t->w.cells_stride) + first;
  const int any = __builtin_ctzll(wanted);
  for (int j = 0; j < TILE_KEYS; j++) {
    const int at = wanted >> j & 1 ? j : any;
    if (map[at] < 0 || map[at] >= k->shape[1])
      return pe_fail(s, PE_BAD_VALUE, "key_sums: place %lld of sequence %lld lies in cell %d of %lld", (long long)(first + at),
                     (long long)sequence, map[at], (long long)k->shape[1]);
    to[j] = (const char *)k->data + head * k->stride[0] + map[at] * k->stride[1];
  }
  return PE_OK;
}

/* Add what one query gives the keys a .. b - 1, whose scores are p. */
PE_INLINE void add_query(const sums_job *t, const float *p, int a, int b, const float *stats, const float *weights, float acc[CHANNELS][TILE_KEYS]) {
  const v16f top = v16f_set1(stats[0]), inverse = v16f_set1(1.0f / stats[1]), none = v16f_zero();
  const v16f start = v16f_set1((float)a), end = v16f_set1((float)b), cap = v16f_set1(t->w.softcap), uncap = v16f_set1(1.0f / t->w.softcap);
  for (int i = a / 16 * 16; i < b; i += 16) {
    v16f x = v16f_load(p + i);
    if (t->w.softcap != 0.0f) x = v16f_mul(v16f_tanh(v16f_mul(x, uncap)), cap);
    v16f less = v16f_sub(x, top), power = v16f_exp(less);
    if (i < a || i + 16 > b) {
      static const float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const v16f lane = v16f_add(v16f_load(lanes), v16f_set1((float)i));
      less = v16f_select_lt(lane, start, none, v16f_select_lt(lane, end, less, none));
      power = v16f_select_lt(lane, start, none, v16f_select_lt(lane, end, power, none));
    }
    const v16f share = v16f_mul(power, inverse);
    for (int64_t c = 0; c < t->w.channels; c++) {
      if (weights[c] == 0.0f) continue;
      v16f y = share;
      if (t->w.kinds[c] == SQUARE) y = v16f_mul(share, share);
      else if (t->w.kinds[c] == LARGE_SHARE) y = v16f_select_lt(power, v16f_set1(LARGE), none, v16f_set1(1.0f));
      else if (t->w.kinds[c] == ENTROPY) y = v16f_mul(share, v16f_sub(v16f_set1(__builtin_logf(stats[1])), less));
      v16f_store(acc[c] + i, v16f_fma(v16f_set1(weights[c]), y, v16f_load(acc[c] + i)));
    }
  }
}

/* Scores of n rows from number `at` on, of all heads of the group, and what they add. */
static void add_rows(const sums_job *t, const rows *r, int64_t at, int64_t n, int64_t head, int64_t first, enum form form, const float *q,
                     const float *kt, const char *const *next, float acc[CHANNELS][TILE_KEYS]) {
  const job *w = &t->w;
  const int most = form != FLOATS ? FEW_ROWS : TILE_ROWS;
  ahead k = ahead_of(next, cell_bytes(w->k));
  float p[FEW_ROWS][TILE_KEYS];
  int a, b;
  for (int64_t i = at * w->group, left = n * w->group; left > 0;) {
    const int some = (int)pe_min(most, left);
    scores_of(form, w->k->dtype, some, q + i * w->e, w->e, kt, 0, TILE_KEYS / 16, &k, p[0]);
    for (int j = 0; j < some; j++, i++) {
      const int64_t row = r->row[i / w->group];
      const float *stats = t->stats + 2 * (row * w->h + head * w->group + i % w->group);
      for (int which = 0; which < 2; which++)
        if (visible(t, r, i / w->group, first, which, &a, &b)) add_query(t, p[j], a, b, stats, t->w.weights + row * t->w.channels, acc);
    }
    left -= some;
  }
}

/* One task: the rows of a sequence, a kv head whose queries are q, the tile at place `first`. */
static pe_status run_task(const sums_job *t, const rows *r, int64_t sequence, int64_t head, int64_t first, const float *q, float *kt, pe_stream *s) {
  const job *w = &t->w;
  const int64_t begin = r->starts[sequence], end = r->starts[sequence + 1];
  const uint64_t wanted = wanted_places(t, r, begin, end, first);
  if (!wanted) return PE_OK;
  const char *cells[TILE_KEYS];
  const pe_status bad = find_keys(t, head, sequence, first, wanted, cells, s);
  if (bad) return bad;
  float acc[CHANNELS][TILE_KEYS] = {{0}}, *sums = w->sums + (head * t->w.sum_keys + sequence * w->l + first) * t->w.channels;
  move_sums(sums, t->w.channels, wanted, acc, 0);
  const enum form form = load_keys(w->k, cells, cells, wanted, (end - begin) * w->group, kt);
  int a, b;
  for (int64_t i = begin, n; i < end; i += n) { /* runs of rows that see something */
    for (n = 0; i + n < end && (visible(t, r, i + n, first, 0, &a, &b) || visible(t, r, i + n, first, 1, &a, &b)); n++) {}
    if (n) add_rows(t, r, i, n, head, first, form, q, kt, cells, acc);
    else n = 1;
  }
  move_sums(sums, t->w.channels, wanted, acc, 1);
  return PE_OK;
}

static pe_status check(const sums_job *t, const pe_tensor *k, pe_stream *s) {
  const job *w = &t->w;
  if (w->g == 0 || w->h % w->g) return pe_fail(s, PE_BAD_SHAPE, "key_sums: %lld heads share %lld", (long long)w->h, (long long)w->g);
  if (t->w.channels > CHANNELS) return pe_fail(s, PE_NO_KERNEL, "key_sums: %lld channels; at most %d are possible", (long long)t->w.channels, CHANNELS);
  const pe_status bad = channel_format(k->dtype) != PE_F32 ? check_channels("key_sums", "k", k, s) : check_cells("key_sums", "k", k, 0, s);
  return bad ? bad : check_rows("key_sums", w, k->shape[1], t->n_sequences, s);
}

PE_KERNEL(cpu, key_sums)(const pe_tensor *sums, const pe_tensor *q, const pe_tensor *k, const pe_tensor *lo, const pe_tensor *hi,
                    const pe_tensor *cells, const pe_tensor *seq, const pe_tensor *stats, const pe_tensor *weights, const pe_tensor *out,
                    const pe_key_sums_params *p, pe_stream *s) {
  sums_job t = {.w = job_of(q, k, k, LEAST_QUERIES, s->nth), .stats = stats->data};
  job *w = &t.w;
  w->lo = lo->data, w->hi = hi->data, w->scale = p->scale, w->softcap = p->softcap;
  w->cells = cells->data, w->cells_stride = cells->stride[0], w->l = cells->shape[1];
  w->seq = seq ? seq->data : 0;
  w->weights = weights->data, w->sums = out->data, w->kinds = p->kinds, w->sum_keys = sums->shape[1], w->channels = sums->shape[2];
  t.n_sequences = cells->shape[0];
  if (w->m == 0 || w->h == 0) return PE_OK;
  const pe_status wrong = check(&t, k, s);
  if (wrong) return wrong;
  if (s->scratch_bytes < 4 * (query_floats(w) + s->nth * own_floats(w, t.n_sequences)))
    return pe_fail(s, PE_NO_MEMORY, "key_sums: scratch is too small");
  float *queries = (float *)s->scratch, *mine = queries + query_floats(w) + s->ith * own_floats(w, t.n_sequences);
  const rows r = find_rows(&t, (int32_t *)mine);
  if (r.count == 0) return PE_OK;

  const int64_t parts = (r.count + CLAIMED_ROWS - 1) / CLAIMED_ROWS, ld = r.count * w->group * w->e; /* floats of a kv head */
  for (int64_t i; (i = pe_next(s, 0)) < parts * w->g;)
    for (int64_t n = i % parts * CLAIMED_ROWS, head = i / parts, end = pe_min(r.count, n + CLAIMED_ROWS); n < end; n++)
      for (int64_t j = 0; j < w->group; j++) load_query(w, r.row[n], head * w->group + j, queries + head * ld + (n * w->group + j) * w->e);
  pe_barrier(s);

  const int64_t tiles = (w->l + TILE_KEYS - 1) / TILE_KEYS, each = tiles * w->g;
  int64_t i = pe_next(s, 1), passed = 0;
  for (int64_t sequence = 0; sequence < t.n_sequences; sequence++) {
    if (r.starts[sequence] == r.starts[sequence + 1]) continue;
    for (; i < passed + each; i = pe_next(s, 1)) {
      const int64_t head = (i - passed) / tiles, tile = (i - passed) % tiles;
      const pe_status bad = run_task(&t, &r, sequence, head, tile * TILE_KEYS, queries + head * ld, mine + row_ints(w->m, t.n_sequences), s);
      if (bad) return bad;
    }
    passed += each;
  }
  return PE_OK;
}

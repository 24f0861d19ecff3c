/* attention_sums.h: what the queries of a unit give to each key, added to the key's sums from the probabilities that attention has computed.
 * attention.c includes it. Reference: pyengine/ops/attention.py: attention_sums.
 *
 * A probability is known when its query's last key was seen: until then the unit keeps those of each tile as they are, relative to the top
 * that the query had there. Then a share is probability * exp(top - largest) / total: one exp for a tile, not for a key, and no score.
 * Units of one key/value head add theirs in the order of their rows: a thread waits for the unit before. So an element is added to query after
 * query, and its bits depend on neither threads nor units nor how a prompt is cut.
 *
 * Bytes: 4 a query and key are written and read again (SUM_ROWS rows x heads of the group x keys: they stay in the second and third cache). The
 * probabilities of a tile lie side by side: attention makes them there, and reading them is one run of memory.
 */
#ifndef PE_ATTENTION_SUMS_H
#define PE_ATTENTION_SUMS_H

#include "../host/system.h"
#include "attention_softmax.h"

/* Rows of a unit: what is kept of them takes at most 16 MiB, but for contexts of which even LEAST_ROWS take more. */
enum { SUM_ROWS = 64, LEAST_ROWS = 4, KEPT_FLOATS = 1 << 22, SPIN_TURN = 1 << 11, ABANDONED = 1 << 30 };

/* Of one thread: probabilities [tiles][queries][TILE_KEYS], tops [tiles][queries], the largest logit and the total of each query; power: of a
 * tile's tops to those. base: the first key. */
typedef struct kept { float *p, *tops, *largest, *total, *power; int64_t base, keys, queries; } kept;

static int64_t kept_keys(int64_t l) { return pe_round_up(l, TILE_KEYS) + TILE_KEYS; }
static int64_t kept_floats(int64_t queries, int64_t keys) { return pe_round_up(queries, 16) * (keys + keys / TILE_KEYS + 3); }

static int unit_counts(const job *w, const unit *u) {
  for (int64_t r = u->row; r < u->row + u->n_rows; r++)
    if (row_counts(w, r)) return 1;
  return 0;
}

/* Room for the keys that a unit's counting rows see. */
static kept kept_at(const job *w, const unit *u, float *memory) {
  int64_t lo = INT64_MAX, hi = 0;
  for (int64_t r = u->row; r < u->row + u->n_rows; r++)
    if (row_counts(w, r)) lo = pe_min(lo, w->lo[r]), hi = pe_max(hi, w->hi[r]);
  kept t = {.p = memory, .base = lo / TILE_KEYS * TILE_KEYS, .queries = pe_round_up(u->n_rows * w->group, 16)};
  t.keys = pe_round_up(hi - t.base, TILE_KEYS);
  t.tops = t.p + t.queries * t.keys;
  t.largest = t.tops + t.queries * (t.keys / TILE_KEYS);
  t.total = t.largest + t.queries;
  t.power = t.total + t.queries;
  return t;
}

/* Where the scores of query `at` of the unit for the tile at `first` become probabilities that stay, those of further queries behind them; 0:
 * no row that counts sees the tile. */
PE_INLINE float *kept_place(const kept *t, int64_t at, int64_t first) {
  if (!t || first < t->base || first >= t->base + t->keys) return 0;
  return t->p + ((first - t->base) * t->queries + at * TILE_KEYS);
}

/* Note the tops that n queries from `at` on have in the tile at `first`. */
PE_INLINE void keep_tops(const kept *t, int64_t at, int64_t first, int n, const float *tops) {
  float *to = t->tops + (first - t->base) / TILE_KEYS * t->queries + at;
  for (int i = 0; i < n; i++) to[i] = tops[i];
}

/* Add what one query gives the keys of 16 i0 .. 16 i1 - 1; keys that it does not see have p = 0. power: of its top to the largest. */
PE_INLINE void add_shares(const job *w, const float *p, int i0, int i1, float power, float total, const float *weights, float acc[CHANNELS][TILE_KEYS]) {
  const v16f share = v16f_set1(power / total), shrink = v16f_set1(power), none = v16f_zero();
  for (int64_t c = 0; c < w->channels; c++) {
    if (weights[c] == 0.0f) continue;
    const v16f weight = v16f_set1(weights[c]);
    for (int i = i0; i < i1; i++) {
      const v16f x = v16f_load(p + 16 * i), old = v16f_load(acc[c] + 16 * i);
      v16f y = v16f_mul(x, share);
      if (w->kinds[c] == SQUARE) y = v16f_mul(y, y);
      else if (w->kinds[c] == LARGE_SHARE) y = v16f_select_lt(v16f_mul(x, shrink), v16f_set1(LARGE), none, v16f_set1(1.0f));
      v16f_store(acc[c] + 16 * i, v16f_fma(weight, y, old));
    }
  }
}

/* The same for one channel, SUM, whose sums of a tile are in registers. */
PE_INLINE void add_share(const float *p, int i0, int i1, float share, float weight, v16f acc[TILE_KEYS / 16]) {
  const v16f x = v16f_set1(share), w = v16f_set1(weight);
#pragma GCC unroll 4
  for (int i = 0; i < TILE_KEYS / 16; i++)
    if (i >= i0 && i < i1) acc[i] = v16f_fma(w, v16f_mul(v16f_load(p + 16 * i), x), acc[i]);
}

/* Add what the queries of a unit give to keys of the tile at `first`. */
PE_INLINE void add_tile(const job *w, const unit *u, const kept *t, int64_t first, int (*seen)(const job *, int64_t, int64_t, int *, int *),
                        const int one, float acc[CHANNELS][TILE_KEYS]) {
  v16f sum[TILE_KEYS / 16];
  int a, b;
  for (int i = 0; one && i < TILE_KEYS / 16; i++) sum[i] = v16f_load(acc[0] + 16 * i);
  for (int64_t r = u->row; r < u->row + u->n_rows; r++) {
    if (!row_counts(w, r) || !seen(w, r, first, &a, &b)) continue;
    const float *weights = w->weights + r * w->channels, *p = kept_place(t, (r - u->row) * w->group, first);
    for (int64_t at = (r - u->row) * w->group, end = at + w->group; at < end; at++, p += TILE_KEYS) {
      if (one) add_share(p, a / 16, (b + 15) / 16, t->power[at] / t->total[at], weights[0], sum);
      else add_shares(w, p, a / 16, (b + 15) / 16, t->power[at], t->total[at], weights, acc);
    }
  }
  for (int i = 0; one && i < TILE_KEYS / 16; i++) v16f_store(acc[0] + 16 * i, sum[i]);
}

/* Add what a unit's queries give to the sums of their keys; `seen` says which keys a row sees of a tile. */
static void add_unit(const job *w, const unit *u, const kept *t, int (*seen)(const job *, int64_t, int64_t, int *, int *)) {
  float *sums = w->sums + (u->head * w->sum_keys + (w->seq ? w->seq[u->row] : 0) * w->l) * w->channels;
  for (int64_t first = t->base; first < t->base + t->keys; first += TILE_KEYS) {
    float acc[CHANNELS][TILE_KEYS] = {{0}};
    const float *tops = t->tops + (first - t->base) / TILE_KEYS * t->queries;
    uint64_t wanted = 0;
    int a, b;
    for (int64_t r = u->row; r < u->row + u->n_rows; r++)
      if (row_counts(w, r) && seen(w, r, first, &a, &b)) wanted |= ~(uint64_t)0 >> (TILE_KEYS - (b - a)) << a;
    if (!wanted) continue;
    move_sums(sums + first * w->channels, w->channels, wanted, acc, 0);
    for (int64_t at = 0; at < t->queries; at += 16)
      v16f_store(t->power + at, v16f_exp(v16f_sub(v16f_load(tops + at), v16f_load(t->largest + at))));
    if (w->channels == 1 && w->kinds[0] == SUM) add_tile(w, u, t, first, seen, 1, acc);
    else add_tile(w, u, t, first, seen, 0, acc);
    move_sums(sums + first * w->channels, w->channels, wanted, acc, 1);
  }
}

/* Wait until `turn` is number n; 0 if another thread has failed. */
static int await_turn(const int32_t *turn, int32_t n) {
  for (int32_t i = 0, now; (now = __atomic_load_n(turn, __ATOMIC_ACQUIRE)) != n; i++) {
    if (now == ABANDONED) return 0;
    if (i >= SPIN_TURN) pe_thread_yield();
  }
  return 1;
}

#endif

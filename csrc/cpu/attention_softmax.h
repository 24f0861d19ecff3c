/* attention_softmax.h: online softmax over tiles and chunks of keys: what is kept of a query, and how it is renewed and merged.
 * attention.c includes it. */
#ifndef PE_ATTENTION_SOFTMAX_H
#define PE_ATTENTION_SOFTMAX_H

#include "attention.h"

/* A query's top moves only when a score passes it by so much: what is summed stays below CHUNK_KEYS e^8, and most tiles need no
 * shrinking of the sums so far. */
static const float SLACK = 8.0f;

/* Online softmax of the queries of a unit: top [n], largest score [n], sum [n][16], acc [n][fp]. */
typedef struct partial { float *top, *most, *sum, *acc; } partial;

static int64_t partial_floats(int64_t n, int64_t fp) { return 2 * pe_round_up(n, 16) + n * 16 + n * fp; }
static partial partial_at(float *p, int64_t n) {
  const int64_t tops = pe_round_up(n, 16);
  return (partial){p, p + tops, p + 2 * tops, p + 2 * tops + n * 16};
}

/* No key seen yet. */
static void start(const job *w, const unit *u, partial p) {
  const int64_t n = u->n_rows * w->group;
  for (int64_t i = 0; i < n; i++) p.top[i] = p.most[i] = -__builtin_inff();
  memset(p.sum, 0, (size_t)n * 16 * 4);
  memset(p.acc, 0, (size_t)(n * w->fp) * 4);
}

PE_INLINE float first_lane(v16f v) { return v.a[0]; }

static const float LANE[TILE_KEYS] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

/* Scores p[16 v0 .. 16 v1 - 1] of one query become probabilities relative to its new top; keys outside [a, b) become 0.
 * Returns the factor by which sums so far must shrink. */
PE_INLINE float soften(float *p, int a, int b, int v0, int v1, float softcap, float *top, float *most, float *sum) {
  const v16f none = v16f_set1(-__builtin_inff()), first = v16f_set1((float)a), end = v16f_set1((float)b);
  const int whole = a == 16 * v0 && b == 16 * v1;
  v16f x[TILE_KEYS / 16], best = none;
  for (int i = v0; i < v1; i++) {
    v16f z = v16f_load(p + 16 * i);
    if (softcap != 0.0f) z = v16f_mul(v16f_tanh(v16f_mul(z, v16f_set1(1.0f / softcap))), v16f_set1(softcap));
    if (!whole) {
      v16f lane = v16f_load(LANE + 16 * i);
      z = v16f_select_lt(lane, first, none, v16f_select_lt(lane, end, z, none));
    }
    x[i] = z;
    best = v16f_max(z, best);
  }
  const float old = *top, peak = v16f_hmax(best);
  const int moves = peak > old + SLACK; /* always so at a query's first tile of a chunk, where old = -inf and the factor 0 */
  v16f total = v16f_load(sum);
  float factor = 1.0f;
  *most = peak > *most ? peak : *most;
  if (moves) {
    v16f r = v16f_exp(v16f_set1(old - peak));
    factor = first_lane(r);
    total = v16f_mul(total, r);
    *top = peak;
  }
  const v16f shift = v16f_set1(*top);
  for (int i = v0; i < v1; i++) {
    v16f y = v16f_exp(v16f_sub(x[i], shift));
    v16f_store(p + 16 * i, y);
    total = v16f_add(total, y);
  }
  v16f_store(sum, total);
  return factor;
}

/* total += part of the queries first .. first + n - 1, n at most 16: both are relative to their own tops. A part's sum is that of its 16
 * lanes; all lanes of a total hold the same. */
static void merge_queries(partial total, partial part, int64_t first, int64_t n, int64_t fp) {
  const v16f x = load_some(total.top + first, n), y = load_some(part.top + first, n), now = v16f_max(y, x);
  float mine[16], new[16];
  v16f_store(mine, v16f_exp(v16f_sub(x, now)));
  v16f_store(new, v16f_exp(v16f_sub(y, now)));
  store_some(total.top + first, now, n);
  store_some(total.most + first, v16f_max(load_some(part.most + first, n), load_some(total.most + first, n)), n);
  for (int64_t i = first; i < first + n; i++) {
    const v16f fx = v16f_set1(mine[i - first]), fy = v16f_set1(new[i - first]);
    float *sum = total.sum + 16 * i, *acc = total.acc + fp * i;
    v16f_store(sum, v16f_fma(v16f_set1(v16f_sum(v16f_load(part.sum + 16 * i))), fy, v16f_mul(v16f_load(sum), fx)));
    for (int64_t j = 0; j < fp; j += 16)
      v16f_store(acc + j, v16f_fma(v16f_load(part.acc + fp * i + j), fy, v16f_mul(v16f_load(acc + j), fx)));
  }
}

#endif

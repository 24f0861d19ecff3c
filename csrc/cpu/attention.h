/* attention.h: what both forms of attention share, floats (attention.c) and bytes (attention_int8.c): the job of a node, and the
 * units that threads claim. */
#ifndef PE_ATTENTION_H
#define PE_ATTENTION_H

#include "cells.h"

enum { TILE_KEYS = 64 };
/* A unit has not fewer queries than LEAST_QUERIES where there would not be SHARES units for each thread. */
enum { LEAST_QUERIES = 128, SHARES = 8 };

/* Everything that threads and units share. Strides are in bytes. */
typedef struct job {
  const pe_tensor *q, *k, *v;
  const int32_t *lo, *hi, *seq, *cells;
  int64_t cells_stride, l;              /* bytes between sequences in `cells`; its number of cells */
  const float *sinks, *bias;            /* bias: [h][2 reach + 1], by the distance from a query to a key */
  const int32_t *at;                    /* numbers of queries among the keys, or NULL: hi - 1 */
  int64_t reach;
  float *out, *stats;                   /* stats: [m][h][2], or NULL */
  float *sums;                          /* of keys: [g][sum_keys][channels]; weights: [m][channels], or NULL where nothing is summed */
  const float *weights;
  const int32_t *kinds;
  int64_t sum_keys, channels;
  float scale, softcap;
  int64_t m, h, g, group, e, f, ep, fp; /* group: query heads of a key/value head; ep, fp: e and f rounded up to whole vectors */
  int64_t rows;                         /* of a unit, at most */
} job;

/* Rows of one key/value head; head: of keys and values. */
typedef struct unit { int64_t row, n_rows, head; } unit;

/* most: queries of a unit that a thread's cache holds. */
static inline job job_of(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, int64_t most, int64_t n_threads) {
  job w = {.q = q, .k = k, .v = v};
  w.m = q->shape[0], w.h = q->shape[1], w.e = q->shape[2], w.g = k->shape[0], w.f = v->shape[2];
  w.ep = pe_round_up(w.e, 16), w.fp = pe_round_up(w.f, 16);
  w.group = w.h / pe_max(1, w.g);
  const int64_t fair = w.m * w.h / (SHARES * n_threads);
  w.rows = pe_max(1, pe_min(w.m, pe_max(LEAST_QUERIES, pe_min(most, fair)) / pe_max(1, w.group)));
  return w;
}

static inline int sees_nothing(const job *w, int64_t row) { return w->hi[row] <= w->lo[row]; }

/* ---- sums of what keys get: numbers of pyengine/ops/attention.py: SUMS ---- */

enum { CHANNELS = 6 };
enum { SUM, SQUARE, LARGE_SHARE, ENTROPY };
static const float LARGE = 0.01f; /* of a row's largest probability */

/* Does a row count in any channel? */
static inline int row_counts(const job *w, int64_t row) {
  for (int64_t c = 0; c < w->channels && !sees_nothing(w, row); c++)
    if (w->weights[row * w->channels + c] != 0.0f) return 1;
  return 0;
}

/* Sums of the wanted keys of a tile, channel by channel, from where they lie or back there. */
static inline void move_sums(float *sums, int64_t channels, uint64_t wanted, float acc[CHANNELS][TILE_KEYS], int back) {
  for (; wanted; wanted &= wanted - 1) {
    const int j = __builtin_ctzll(wanted);
    for (int64_t c = 0; c < channels; c++) {
      if (back) sums[j * channels + c] = acc[c][j];
      else acc[c][j] = sums[j * channels + c];
    }
  }
}

/* The form of attention that multiplies bytes: attention.c hands over to it where products="int8". */
int64_t PE_NAME(attention_int8_scratch)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, int32_t n_threads);
pe_status PE_NAME(attention_int8)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo,
                                  const pe_tensor *hi, const pe_tensor *out, float scale, pe_stream *s);

#endif

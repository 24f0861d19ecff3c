/* attention_tiles.h: one tile of keys and values: found in the cache and loaded for all queries of a unit, and sums of V read where it
 * lies. Keys alone: attention_keys.h. attention.c includes it; how tiles and units are cut stands there.
 *
 *   cache of V           few queries: direct_values                    many: convert_values, tile
 *
 * Inner functions are named as in attention_keys.h. Vectors of 16 columns by rows, on avx512; elsewhere it is one vector and up to 6 rows:
 *
 *   rows      1  2  3  4  5  6  7  8
 *   values    4  4  4  4  4  4  2  2     sums; 2 or 1 for the columns that are left
 */
#ifndef PE_ATTENTION_TILES_H
#define PE_ATTENTION_TILES_H

#include "attention_keys.h"

/* ---- V as floats ---- */

/* v[j][i] = element i of the value of key j, for the wanted keys; 0 for i >= f. */
PE_INLINE void convert_values(const int dtype, const char *const *cell, const char *const *next, int64_t bytes, uint64_t wanted,
                              int64_t f, int64_t stride, int plain, float *v) {
  const int64_t fp = pe_round_up(f, 16);
  for (int j = 0; j < TILE_KEYS; j++) {
    for (int64_t i = 0; i < lines_of(bytes); i++) fetch(next[j], i, bytes);
    if (!(wanted >> j & 1)) continue;
    int64_t i = 0;
    for (; plain && i + 16 <= f; i += 16) v16f_store(v + j * fp + i, load_cell(dtype, cell[j], i));
    for (; i < f; i += 16) v16f_store(v + j * fp + i, load_cell_n(dtype, cell[j], stride, i, pe_min(16, f - i)));
  }
}

/* Cells of a tile: addresses in K and V. A wanted one stands for those that are not wanted. */
typedef struct cells_of { const char *k[TILE_KEYS], *v[TILE_KEYS]; } cells_of;

/* Find the cells of a tile of which something is wanted; only the wanted ones are looked up in the map. */
static pe_status find_cells(const job *w, int64_t head, int32_t sequence, int64_t first, uint64_t wanted, cells_of *t,
                            pe_stream *s) {
  const int32_t *map = w->cells ? (const int32_t *)((const char *)w->cells + sequence * w->cells_stride) : 0;
  const char *k = (const char *)w->k->data + head * w->k->stride[0], *v = (const char *)w->v->data + head * w->v->stride[0];
  const int64_t dk = w->k->stride[1], dv = w->v->stride[1], slot = map ? first % w->l : 0;
  const uint64_t n = (uint64_t)pe_min(w->k->shape[1], w->v->shape[1]);
  const int any = __builtin_ctzll(wanted);
  int32_t list[TILE_KEYS];
  const int32_t *cell = list;
  if (map && !~wanted && slot + TILE_KEYS <= w->l) cell = map + slot;
  else
    for (int j = 0; j < TILE_KEYS; j++) {
      const int64_t key = first + (wanted >> j & 1 ? j : any);
      list[j] = map ? map[key % w->l] : (int32_t)key;
    }
  int outside = 0;
  for (int j = 0; j < TILE_KEYS; j++) {
    const int64_t at = cell[j];
    outside |= (uint64_t)at >= n; /* negative numbers are large */
    t->k[j] = k + at * dk;
    t->v[j] = v + at * dv;
  }
  for (int j = any; outside && j < TILE_KEYS; j++)
    if ((uint64_t)(int64_t)cell[j] >= n)
      return pe_fail(s, PE_BAD_VALUE, "attention: key %lld of sequence %d lies in cell %d of %lld", (long long)(first + j),
                     sequence, cell[j], (long long)n);
  for (int j = any; channel_format(w->k->dtype) != PE_F32 && j < TILE_KEYS; j++)
    if (wanted >> j & 1 && (cell[j] % GROUP_KEYS != j % GROUP_KEYS || (j % GROUP_KEYS && wanted >> (j - 1) & 1 && cell[j] != cell[j - 1] + 1)))
      return pe_fail(s, PE_BAD_VALUE, "attention: key %lld of sequence %d lies in cell %d, but keys %lld .. are a group of %d cells",
                     (long long)(first + j), sequence, cell[j], (long long)(first + j / GROUP_KEYS * GROUP_KEYS), GROUP_KEYS);
  return PE_OK;
}

/* A tile as `attend` reads it: K transposed, as floats, 16 bits wide, or as codes of blocks; V as floats [64][fp], or (direct) where
 * it lies in the cache. */
typedef struct loaded { const float *kt, *v; const cells_of *cells, *next; enum form form; int direct; } loaded;

/* ---- few queries: V is read where it lies and becomes floats on its way to the fma ---- */

/* c[r][j] = factor[r] c[r][j] + sum over t of p[r][t] v[t][j] for 16 * vectors columns from `first` on; n values at `cell`. */
PE_INLINE void values_body(const int dtype, const int rows, const int vectors, const float *p, const char *const *cell,
                           ahead *next, int64_t share, int64_t first, float *c, int64_t ldc, int64_t n, const float *factor) {
  const int block = cell_format_of(dtype).elements;
  const int64_t at = cell_offset(dtype, first / block * block), within = vectors == 1 ? first % block : 0;
  ahead a = *next;
  v16f acc[FEW_ROWS][TILE_VECTORS], y[TILE_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_mul(v16f_load(c + r * ldc + 16 * j), v16f_set1(factor[r]));
  for (int64_t t = 0; t < n; t++) {
    ask(&a, share);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) y[j] = load_cell(dtype, cell[t] + at, within + 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const v16f x = v16f_set1(p[r * TILE_KEYS + t]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) acc[r][j] = v16f_fma(x, y[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) v16f_store(c + r * ldc + 16 * j, acc[r][j]);
  *next = a;
}

PE_INLINE void values_any(const int dtype, int rows, const int vectors, const float *p, const char *const *cell, ahead *next,
                          int64_t share, int64_t first, float *c, int64_t ldc, int64_t n, const float *factor) {
  switch (rows) {
    case 1: values_body(dtype, 1, vectors, p, cell, next, share, first, c, ldc, n, factor); break;
    case 2: values_body(dtype, 2, vectors, p, cell, next, share, first, c, ldc, n, factor); break;
    case 3: values_body(dtype, 3, vectors, p, cell, next, share, first, c, ldc, n, factor); break;
    case 4: values_body(dtype, 4, vectors, p, cell, next, share, first, c, ldc, n, factor); break;
    case 5: values_body(dtype, 5, vectors, p, cell, next, share, first, c, ldc, n, factor); break;
#if PE_PARTS == 1 /* 7 and 8 rows have 2 vectors or 1 */
    case 7: if (vectors <= 2) values_body(dtype, 7, vectors, p, cell, next, share, first, c, ldc, n, factor); break;
    case 8: if (vectors <= 2) values_body(dtype, 8, vectors, p, cell, next, share, first, c, ldc, n, factor); break;
#endif
    default: values_body(dtype, 6, vectors, p, cell, next, share, first, c, ldc, n, factor);
  }
}

PE_INLINE void values_columns(const int dtype, int rows, int64_t vectors, const float *p, const char *const *cell, ahead *next,
                              int64_t share, int64_t first, float *c, int64_t ldc, int64_t n, const float *factor) {
#if PE_PARTS == 1
  if (vectors == 4) values_any(dtype, rows, 4, p, cell, next, share, first, c, ldc, n, factor);
  else if (vectors == 2) values_any(dtype, rows, 2, p, cell, next, share, first, c, ldc, n, factor);
  else
#endif
    values_any(dtype, rows, 1, p, cell, next, share, first, c, ldc, n, factor);
  (void)vectors;
}

static __attribute__((noinline)) void direct_values(int dtype, int rows, const float *p, const char *const *cell, ahead *next,
                                                    int64_t f, float *c, int64_t n, const float *factor) {
  const int64_t width = TILE_VECTORS == 1 ? 16 : rows <= 6 ? 64 : 32, steps = (f + width - 1) / width * n;
  const int64_t share = (lines_ahead(next) + steps - 1) / steps;
  for (int64_t first = 0, v; first < f; first += 16 * v, c += 16 * v) {
    const int64_t left = (f - first) / 16;
    v = TILE_VECTORS == 1 ? 1 : left >= 4 && rows <= 6 ? 4 : left >= 2 ? 2 : 1; /* even until the last: whole blocks */
#define VALUES(d) values_columns(d, rows, v, p, cell, next, share, first, c, f, n, factor)
    PE_EACH_CELL_FORMAT(dtype, VALUES)
#undef VALUES
  }
}

/* ---- loading ---- */

static loaded load_tile(const job *w, const cells_of *t, const cells_of *next, uint64_t wanted, int64_t queries, float *kt,
                        float *v) {
  const pe_tensor *b = w->v;
  const int64_t vb = cell_bytes(b);
  const int direct = queries <= FEW_QUERIES && vb > 0 && w->f == w->fp;
  const enum form form = load_keys(w->k, t->k, next->k, wanted, queries, kt);
  if (!direct) {
#define CONVERT(d) convert_values(d, t->v, next->v, vb, wanted, w->f, b->stride[2], vb > 0, v)
    PE_EACH_CELL_FORMAT(b->dtype, CONVERT)
  }
  return (loaded){kt, v, t, next, form, direct};
}

#endif

/* attention.c: softmax(scale q k^T) v over an interval of keys for each query.
 *
 * One path serves prompts, single tokens and encoders. Work is cut as
 *
 *   unit    up to UNIT_FLOATS' worth of queries (rows x heads of the group) of one sequence and one key/value head
 *   chunk   CHUNK_KEYS keys, aligned in the LOGICAL numbers of the keys; online softmax starts afresh in each, giving a partial
 *           (top, sum[16], acc[f]) per query; partials are merged in ascending order
 *   tile    TILE_KEYS keys, aligned likewise: K is converted to float and transposed to kt[e][64], V to v[64][f] once,
 *           and all queries of the unit that see the tile use them, six at a time in registers (vec.h: tile).
 *           For few queries (decoding) floats in memory would be most of the work: there V is read where it lies, and avx512
 *           transposes K as it is, 16 bits wide; both are converted in registers, to the same floats in the same order
 *
 * What happens to a query (fma by fma: e ascending in a score, keys ascending in acc, 16 lanes of keys in sum) follows from its
 * interval alone: neither other rows, nor the unit's size, nor threads can change a bit. Tiles and keys outside its interval are
 * not touched, so that a masked key contributes nothing, not even a NaN.
 *
 * A thread claims units, one key/value head after the other. Where there are few units (decoding) it
 * claims (unit, chunk) pairs, partials go to scratch, and the thread that finishes last merges them all.
 * All sums are float. Bytes: each unit reads its keys' K and V once from the cache in the cache's dtype; operations: 2 (e + f) a
 * query and key. Shared by the unit's queries: a load, a conversion, 4 shuffles and a store per 16 elements of K, less without the
 * shuffles of V; for few queries on avx512 a store, 2 shuffles and a conversion (3 instructions where Q8_0) of K, a conversion of V.
 */
#include "../quants.h"
#include "vec.h"

enum { TILE_KEYS = 64, CHUNK_KEYS = 256 };
/* A unit's queries and sums stay in the second cache (512 KB: 496 queries of width 72, 163 of 256); each tile is converted once for
 * them. Fewer, but not less than LEAST_QUERIES, where there would not be SHARES units for each thread. */
enum { UNIT_FLOATS = 1 << 17, LEAST_QUERIES = 128, SHARES = 8 };
/* A query's top moves only when a score passes it by so much: what is summed stays below CHUNK_KEYS e^8, and most tiles need no
 * shrinking of the sums so far. */
static const float SLACK = 8.0f;
/* Up to so many queries, K and V go from the cache straight to the fma: two register tiles convert them twice, which is less than
 * to store floats and load them again. */
enum { FEW_ROWS = PE_PARTS == 1 ? 8 : TILE_ROWS, FEW_QUERIES = 2 * FEW_ROWS };
enum { SPLIT_BYTES = 4 << 20 }; /* at most this much scratch for partials; work that would need more is not split */

/* Everything that threads and units share. Strides are in bytes. */
typedef struct job {
  const pe_tensor *q, *k, *v;
  const int32_t *lo, *hi, *seq, *cells;
  int64_t cells_stride, l;              /* bytes between sequences in `cells`; its number of cells */
  const float *sinks;
  float *out;
  float scale, softcap;
  int64_t m, h, g, group, e, f, fp;     /* fp: f rounded up to whole vectors */
  int64_t rows;                         /* rows in a unit */
} job;

/* Online softmax of the queries of a unit: top [n], sum [n][16], acc [n][fp]. */
typedef struct partial { float *top, *sum, *acc; } partial;

static int64_t partial_floats(int64_t n, int64_t fp) { return pe_round_up(n, 16) + n * 16 + n * fp; }
static partial partial_at(float *p, int64_t n) {
  return (partial){p, p + pe_round_up(n, 16), p + pe_round_up(n, 16) + n * 16};
}

static int64_t unit_rows(int64_t m, int64_t h, int64_t group, int64_t e, int64_t fp, int64_t n_threads) {
  const int64_t most = UNIT_FLOATS / (e + 2 * (fp + 16)), fair = m * h / (SHARES * n_threads);
  return pe_max(1, pe_min(m, pe_max(LEAST_QUERIES, pe_min(most, fair)) / pe_max(1, group)));
}

/* ---- scratch: per thread [starts of blocks][queries][partial of a chunk][running total][kt][v], then partials ---- */

static int64_t thread_floats(int64_t m, int64_t h, int64_t group, int64_t e, int64_t f, int64_t n_threads) {
  const int64_t fp = pe_round_up(f, 16), n = unit_rows(m, h, group, e, fp, n_threads) * group;
  return pe_round_up(m + 1, 16) + pe_round_up(n * e, 16) + 2 * partial_floats(n, fp) + pe_round_up(e, 16) * TILE_KEYS + TILE_KEYS * fp;
}

PE_SCRATCH(attention)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  const pe_tensor *q = pe_arg(a, 0), *k = pe_arg(a, 1), *v = pe_arg(a, 2);
  const int64_t m = q->shape[0], h = q->shape[1], group = h / pe_max(1, k->shape[0]), f = v->shape[2];
  const int64_t chunks = k->shape[1] / CHUNK_KEYS + 2;
  const int64_t split = 4 * partial_floats(pe_max(1, m) * h, pe_round_up(f, 16)) * chunks;
  return n_threads * 4 * thread_floats(m, h, group, q->shape[2], f, n_threads) + (n_threads > 1 ? pe_min(split, SPLIT_BYTES) : 0);
}

/* ---- K and V as floats ---- */

PE_INLINE float half_to_float(const void *p) {
  uint16_t h;
  memcpy(&h, p, 2);
#if defined(PE_AVX512) || defined(PE_AVX2)
  return _cvtsh_ss(h);
#else
  return pe_f16_to_f32(h);
#endif
}

/* Elements i .. i + 15 of a cell whose elements lie side by side. */
PE_INLINE v16f load_cell(const int dtype, const char *cell, int64_t i) {
  if (dtype == PE_F32) return v16f_load((const float *)cell + i);
  if (dtype == PE_F16) return v16f_load_f16(cell + 2 * i);
  const char *block = cell + i / 32 * 34;
  return v16f_mul(v16i_to_f(v16i_load_i8(block + 2 + i % 32)), v16f_set1(half_to_float(block)));
}

/* The same for n <= 16 elements at any distance; the other lanes are 0. */
PE_INLINE v16f load_cell_n(int dtype, const char *cell, int64_t stride, int64_t i, int64_t n) {
  float t[16] = {0};
  if (dtype == PE_Q8_0) return load_cell(PE_Q8_0, cell, i); /* whole blocks side by side: checked before */
  if (dtype == PE_F32 && stride == 4) return v16f_load_n((const float *)cell + i, n);
  if (dtype == PE_F16 && stride == 2) return v16f_load_f16_n(cell + 2 * i, n);
  for (int64_t j = 0; j < n; j++) {
    const char *p = cell + (i + j) * stride;
    if (dtype == PE_F32) memcpy(&t[j], p, 4);
    else t[j] = half_to_float(p);
  }
  return v16f_load(t);
}

/* Cache lines that n bytes touch; where n is no multiple of 64 they may begin anywhere in a line. */
PE_INLINE int64_t lines_of(int64_t n) { return (n + 63) / 64 + (n % 64 != 0); }

/* Ask for line i of the n bytes at p, which will be read soon. */
PE_INLINE void fetch(const char *p, int64_t i, int64_t n) { __builtin_prefetch(p + pe_min(64 * i, n - 1), 0, 2); }

/* kt[i][j] = element i of key j, for the groups of 16 keys that hold a wanted one. On the way it asks for `bytes` of each of the
 * next tile's cells: the order of reading here, 16 rows side by side, is none that the hardware foresees. */
PE_INLINE void transpose_keys(const int dtype, const char *const *cell, const char *const *next, int64_t bytes, uint64_t wanted,
                              int64_t e, int64_t stride, int plain, float *kt) {
  for (int j = 0; j < TILE_KEYS; j += 16) {
    const int64_t lines = lines_of(bytes) * 16, share = (lines * 16 + e - 1) / pe_max(1, e); /* of 16 rows; for a step of i */
    int64_t asked = 0, i = 0;
    if (!(wanted >> j & 0xffff)) {
      for (; asked < lines; asked++) fetch(next[j + asked % 16], asked / 16, bytes);
      continue;
    }
    for (; plain && i + 16 <= e; i += 16) {
      v16f x[16];
      for (const int64_t stop = pe_min(lines, asked + share); asked < stop; asked++)
        fetch(next[j + asked % 16], asked / 16, bytes);
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) x[r] = load_cell(dtype, cell[j + r], i);
      transpose16(x, kt + i * TILE_KEYS + j, TILE_KEYS);
    }
    for (; i < e; i += 16) {
      v16f x[16];
      for (int r = 0; r < 16; r++) x[r] = load_cell_n(dtype, cell[j + r], stride, i, pe_min(16, e - i));
      transpose16(x, kt + i * TILE_KEYS + j, TILE_KEYS);
    }
  }
}

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
  return PE_OK;
}

/* Bytes of one cell, for fetching ahead; 0 where its elements are spread. */
static int64_t cell_bytes(const pe_tensor *t) {
  const int64_t n = t->shape[2];
  if (t->dtype == PE_Q8_0) return n / 32 * 34;
  return t->dtype == PE_F32 && t->stride[2] == 4 ? n * 4 : t->dtype == PE_F16 && t->stride[2] == 2 ? n * 2 : 0;
}

/* A tile as `attend` reads it: K transposed, as floats or (narrow) as 16-bit numbers; V as floats [64][fp], or (direct) where it
 * lies in the cache. */
typedef struct loaded { const float *kt, *v; const cells_of *cells, *next; int narrow, direct; } loaded;

/* What is left to ask for of a tile's K or V, cell after cell; `cell` is `end` where nothing is. Lines are asked for a few at a time
 * between the fmas: a burst would fill the queue of misses, and loads wait behind it. */
typedef struct ahead { const char *const *cell, *const *end; int64_t bytes, at; } ahead;

PE_INLINE void ask(ahead *a, int64_t lines) {
  for (; lines > 0 && a->cell != a->end; lines--) {
    __builtin_prefetch(*a->cell + a->at, 0, 3);
    a->at += 64;
    if (a->at >= a->bytes) a->at = 0, a->cell++;
  }
}

/* ---- few queries: K is transposed as 16-bit numbers, V is read where it lies, both become floats on their way to the fma ---- */

#if defined(PE_AVX512) /* elsewhere 16-bit numbers save nothing: K goes through floats */
/* to[i][j] = 16-bit element i of x[j]: 32 x 16, rows of the result ld bytes apart. */
PE_INLINE void transpose_u16(const __m512i x[16], char *to, int64_t ld) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  __m512i r[16], t[16];
#pragma GCC unroll 2
  for (int h = 0; h < 16; h += 8) { /* 8 x 8 in each quarter of 8 registers */
#pragma GCC unroll 4
    for (int i = h; i < h + 8; i += 2) {
      r[i] = _mm512_unpacklo_epi16(x[i], x[i + 1]);
      r[i + 1] = _mm512_unpackhi_epi16(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = h; i < h + 8; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        t[i + 2 * j] = _mm512_unpacklo_epi32(r[i + j], r[i + j + 2]);
        t[i + 2 * j + 1] = _mm512_unpackhi_epi32(r[i + j], r[i + j + 2]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* r[h + c]: element 8 q + c of rows h .. h + 7 in quarter q */
      r[h + 2 * i] = _mm512_unpacklo_epi64(t[h + i], t[h + i + 4]);
      r[h + 2 * i + 1] = _mm512_unpackhi_epi64(t[h + i], t[h + i + 4]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < 8; c++) {
    const __m512i a = _mm512_permutex2var_epi64(r[c], low, r[c + 8]), b = _mm512_permutex2var_epi64(r[c], high, r[c + 8]);
    _mm256_storeu_si256((__m256i *)(to + c * ld), _mm512_castsi512_si256(a));
    _mm256_storeu_si256((__m256i *)(to + (8 + c) * ld), _mm512_extracti64x4_epi64(a, 1));
    _mm256_storeu_si256((__m256i *)(to + (16 + c) * ld), _mm512_castsi512_si256(b));
    _mm256_storeu_si256((__m256i *)(to + (24 + c) * ld), _mm512_extracti64x4_epi64(b, 1));
  }
}

/* Narrow kt: [e][64] halves, or integers followed by the blocks' scales [e / 32][64]. */
PE_INLINE void transpose_narrow(const int dtype, const char *const *cell, int64_t e, char *kt) {
  enum { LD = 2 * TILE_KEYS };
  uint16_t *scale = (uint16_t *)(kt + e * LD);
  for (int j = 0; j < TILE_KEYS; j += 16)
    for (int64_t i = 0; i < e; i += 32) {
      const int64_t at = dtype == PE_F16 ? 2 * i : i / 32 * 34;
      __m512i x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) {
        const char *p = cell[j + r] + at;
        if (dtype == PE_F16) {
          x[r] = e - i >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, (unsigned)(e - i)), p);
        } else {
          x[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p + 2)));
          memcpy(scale + i / 32 * TILE_KEYS + j + r, p, 2);
        }
      }
      transpose_u16(x, kt + i * LD + 2 * j, LD);
    }
}
static int can_narrow(const pe_tensor *k) {
  return k->shape[2] > 0 && (k->dtype == PE_Q8_0 || (k->dtype == PE_F16 && k->stride[2] == 2));
}

PE_INLINE v16i load_i16(const char *p) { return (v16i){(pe_pi)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)p))}; }

/* p[r][j] = dot of query r and key j of 16 * vectors, e ascending. */
PE_INLINE void scores_body(const int dtype, const int rows, const int vectors, const float *q, int64_t e, const char *kt,
                           const char *scale, ahead *next, int64_t share, float *p) {
  enum { LD = 2 * TILE_KEYS };
  ahead a = *next;
  v16f acc[FEW_ROWS][4], d[4], y[4];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_zero();
  for (int64_t begin = 0, end; begin < e; begin = end, scale += LD) {
    end = dtype == PE_F16 ? e : begin + 32;
    if (dtype == PE_Q8_0)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) d[j] = v16f_load_f16(scale + 32 * j);
    for (int64_t i = begin; i < end; i++, kt += LD) {
      ask(&a, share);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++)
        y[j] = dtype == PE_F16 ? v16f_load_f16(kt + 32 * j) : v16f_mul(v16i_to_f(load_i16(kt + 32 * j)), d[j]);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) {
        const v16f x = v16f_set1(q[r * e + i]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) acc[r][j] = v16f_fma(x, y[j], acc[r][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) v16f_store(p + r * TILE_KEYS + 16 * j, acc[r][j]);
  *next = a;
}

#define SCORES(d, r, v)                                                                                                \
  for (int j = 0; j < 4; j += v)                                                                                       \
    scores_body(d, r, v, q, e, (const char *)kt + 32 * j, scale + 32 * j, next, share, p + 16 * j)
#define SCORES_ROWS(d)                                                                                                 \
  switch (rows) {                                                                                                      \
    case 1: SCORES(d, 1, 4); break;                                                                                    \
    case 2: SCORES(d, 2, 4); break;                                                                                    \
    case 3: SCORES(d, 3, 4); break;                                                                                    \
    case 4: SCORES(d, 4, 4); break;                                                                                    \
    case 5: SCORES(d, 5, 4); break;                                                                                    \
    case 6: SCORES(d, 6, 4); break;                                                                                    \
    case 7: SCORES(d, 7, 2); break;                                                                                    \
    default: SCORES(d, 8, 2);                                                                                          \
  }
static __attribute__((noinline)) void narrow_scores(int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next,
                                                    float *p) {
  const char *scale = (const char *)kt + e * 2 * TILE_KEYS;
  const int64_t steps = rows > 6 ? 2 * e : e, share = ((next->bytes + 63) / 64 * TILE_KEYS + steps - 1) / steps;
  if (dtype == PE_F16) SCORES_ROWS(PE_F16)
  else SCORES_ROWS(PE_Q8_0)
}
#else
PE_INLINE void transpose_narrow(const int dtype, const char *const *cell, int64_t e, char *kt) {
  (void)dtype, (void)cell, (void)e, (void)kt;
}
static void narrow_scores(int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next, float *p) {
  (void)dtype, (void)rows, (void)q, (void)e, (void)kt, (void)next, (void)p;
}
static int can_narrow(const pe_tensor *k) { (void)k; return 0; }
#endif

/* c[r][j] = factor[r] c[r][j] + sum over t of p[r][t] v[t][j] for 16 * vectors columns from `first` on; n values at `cell`. */
PE_INLINE void values_body(const int dtype, const int rows, const int vectors, const float *p, const char *const *cell,
                           ahead *next, int64_t first, float *c, int64_t ldc, int64_t n, const float *factor) {
  const int64_t at = dtype == PE_F32 ? 4 * first : dtype == PE_F16 ? 2 * first : first / 32 * 34;
  const int64_t within = dtype == PE_Q8_0 && vectors == 1 ? first % 32 : 0;
  const int lines = ((dtype == PE_F32 ? 64 : dtype == PE_F16 ? 32 : 17) * vectors + 63) / 64;
  ahead a = *next;
  v16f acc[FEW_ROWS][TILE_VECTORS], y[TILE_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_mul(v16f_load(c + r * ldc + 16 * j), v16f_set1(factor[r]));
  for (int64_t t = 0; t < n; t++) {
    ask(&a, lines);
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

#define VALUES(d, r, v) values_body(d, r, v, p, cell, next, first, c, f, n, factor)
#define VALUES_ROWS(d, v)                                                                                              \
  switch (rows) {                                                                                                      \
    case 1: VALUES(d, 1, v); break;                                                                                    \
    case 2: VALUES(d, 2, v); break;                                                                                    \
    case 3: VALUES(d, 3, v); break;                                                                                    \
    case 4: VALUES(d, 4, v); break;                                                                                    \
    case 5: VALUES(d, 5, v); break;                                                                                    \
    default: VALUES(d, 6, v);                                                                                          \
  }
#if PE_PARTS == 1
#define VALUES_ALL(d)                                                                                                  \
  if (v == 4) VALUES_ROWS(d, 4)                                                                                        \
  else if (rows == 7 && v == 2) VALUES(d, 7, 2);                                                                       \
  else if (rows == 7) VALUES(d, 7, 1);                                                                                 \
  else if (rows == 8 && v == 2) VALUES(d, 8, 2);                                                                       \
  else if (rows == 8) VALUES(d, 8, 1);                                                                                 \
  else if (v == 2) VALUES_ROWS(d, 2)                                                                                   \
  else VALUES_ROWS(d, 1)
#else
#define VALUES_ALL(d) VALUES_ROWS(d, 1)
#endif
static __attribute__((noinline)) void direct_values(int dtype, int rows, const float *p, const char *const *cell, ahead *next,
                                                    int64_t f, float *c, int64_t n, const float *factor) {
  for (int64_t first = 0, v; first < f; first += 16 * v, c += 16 * v) {
    const int64_t left = (f - first) / 16;
    v = TILE_VECTORS == 1 ? 1 : left >= 4 && rows <= 6 ? 4 : left >= 2 ? 2 : 1; /* even until the last: whole Q8_0 blocks */
    if (dtype == PE_F32) VALUES_ALL(PE_F32)
    else if (dtype == PE_F16) VALUES_ALL(PE_F16)
    else VALUES_ALL(PE_Q8_0)
  }
}

/* ---- loading ---- */

static loaded load_tile(const job *w, const cells_of *t, const cells_of *next, uint64_t wanted, int64_t queries, float *kt,
                        float *v) {
  const pe_tensor *a = w->k, *b = w->v;
  const int64_t kb = cell_bytes(a), vb = cell_bytes(b);
  const int few = queries <= FEW_QUERIES, narrow = few && can_narrow(a), direct = few && vb > 0 && w->f == w->fp;
  if (narrow) {
    if (a->dtype == PE_F16) transpose_narrow(PE_F16, t->k, w->e, (char *)kt);
    else transpose_narrow(PE_Q8_0, t->k, w->e, (char *)kt);
  } else {
    switch (a->dtype) {
      case PE_F32: transpose_keys(PE_F32, t->k, next->k, kb, wanted, w->e, a->stride[2], kb > 0, kt); break;
      case PE_F16: transpose_keys(PE_F16, t->k, next->k, kb, wanted, w->e, a->stride[2], kb > 0, kt); break;
      default: transpose_keys(PE_Q8_0, t->k, next->k, kb, wanted, w->e, a->stride[2], 1, kt);
    }
  }
  if (!direct) {
    switch (b->dtype) {
      case PE_F32: convert_values(PE_F32, t->v, next->v, vb, wanted, w->f, b->stride[2], vb > 0, v); break;
      case PE_F16: convert_values(PE_F16, t->v, next->v, vb, wanted, w->f, b->stride[2], vb > 0, v); break;
      default: convert_values(PE_Q8_0, t->v, next->v, vb, wanted, w->f, b->stride[2], 1, v);
    }
  }
  return (loaded){kt, v, t, next, narrow, direct};
}

/* ---- online softmax ---- */

PE_INLINE float first_lane(v16f v) { return v.a[0]; }

static const float LANE[TILE_KEYS] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

/* Scores p[16 v0 .. 16 v1 - 1] of one query become probabilities relative to its new top; keys outside [a, b) become 0.
 * Returns the factor by which sums so far must shrink. */
PE_INLINE float soften(float *p, int a, int b, int v0, int v1, float softcap, float *top, float *sum) {
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

/* n queries, side by side in q and in the partial, see keys a .. b - 1 of the tile. */
static void attend(const job *w, const float *q, int64_t n, int a, int b, const loaded *t, partial s) {
  const int most = t->narrow && t->direct ? FEW_ROWS : TILE_ROWS; /* queries at once */
  ahead k = {t->next->k, t->next->k + TILE_KEYS, cell_bytes(w->k), 0};
  ahead v = {t->next->v, t->next->v + TILE_KEYS, cell_bytes(w->v), 0};
  const int v0 = a / 16, v1 = (b + 15) / 16;
  float p[FEW_ROWS][TILE_KEYS], factor[FEW_ROWS];
  for (int64_t tiles = (n + most - 1) / most; n; tiles--) {
    const int r = (int)((n + tiles - 1) / tiles); /* as even as they can be: 7 queries are 4 + 3 */
    if (t->narrow) narrow_scores(w->k->dtype, r, q, w->e, t->kt, &k, p[0]);
    else tile(r, v1 - v0, q, w->e, t->kt + 16 * v0, TILE_KEYS, p[0] + 16 * v0, TILE_KEYS, w->e, 0);
    if (a == 0 && b == TILE_KEYS)
      for (int i = 0; i < r; i++) factor[i] = soften(p[i], 0, TILE_KEYS, 0, TILE_KEYS / 16, w->softcap, s.top + i, s.sum + 16 * i);
    else
      for (int i = 0; i < r; i++) factor[i] = soften(p[i], a, b, v0, v1, w->softcap, s.top + i, s.sum + 16 * i);
    if (t->direct) direct_values(w->v->dtype, r, p[0] + a, t->cells->v + a, &v, w->f, s.acc, b - a, factor);
    else tile(r, (int)(w->fp / 16), p[0] + a, TILE_KEYS, t->v + a * w->fp, w->fp, s.acc, w->fp, b - a, factor);
    q += r * w->e;
    s.top += r;
    s.sum += 16 * r;
    s.acc += r * w->fp;
    n -= r;
  }
}

/* ---- units ---- */

typedef struct unit { int64_t row, n_rows, head; } unit; /* head: of keys and values */

typedef struct buffers { float *q, *kt, *v; } buffers;

static int empty(const job *w, int64_t row) { return w->hi[row] <= w->lo[row]; }

/* Does a row see a key of the chunk? */
static int sees(const job *w, int64_t row, int64_t chunk) {
  return w->lo[row] < (chunk + 1) * CHUNK_KEYS && w->hi[row] > chunk * CHUNK_KEYS && !empty(w, row);
}

/* The first chunk from `chunk` on of which any row of the unit sees a key, or -1. */
static int64_t next_chunk(const job *w, const unit *u, int64_t chunk) {
  int64_t best = -1;
  for (int64_t r = u->row; r < u->row + u->n_rows; r++) {
    if (empty(w, r) || (w->hi[r] - 1) / CHUNK_KEYS < chunk) continue;
    int64_t c = pe_max(chunk, w->lo[r] / CHUNK_KEYS);
    best = best < 0 ? c : pe_min(best, c);
  }
  return best;
}

static void load_queries(const job *w, const unit *u, float *to) {
  const v16f scale = v16f_set1(w->scale);
  for (int64_t r = u->row; r < u->row + u->n_rows; r++)
    for (int64_t i = 0; i < w->group; i++, to += w->e) {
      const char *q = (const char *)w->q->data + r * w->q->stride[0] + (u->head * w->group + i) * w->q->stride[1];
      for (int64_t j = 0; j < w->e; j += 16) {
        const int64_t left = w->e - j;
        v16f x = w->q->stride[2] == 4 ? load_some((const float *)q + j, left)
                                      : load_cell_n(PE_F32, q, w->q->stride[2], j, pe_min(16, left));
        store_some(to + j, v16f_mul(x, scale), left);
      }
    }
}

/* Part of the tile at key `first` that a row sees: *a <= j < *b; 0 if none. */
PE_INLINE int visible(const job *w, int64_t row, int64_t first, int *a, int *b) {
  const int64_t x = pe_max(w->lo[row], first), y = pe_min(w->hi[row], first + TILE_KEYS);
  *a = (int)(x - first);
  *b = (int)(y - first);
  return x < y;
}

/* No key seen yet. */
static void start(const job *w, const unit *u, partial p) {
  const int64_t n = u->n_rows * w->group;
  for (int64_t i = 0; i < n; i++) p.top[i] = -__builtin_inff();
  memset(p.sum, 0, (size_t)n * 16 * 4);
  memset(p.acc, 0, (size_t)(n * w->fp) * 4);
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
static pe_status run_chunk(const job *w, const unit *u, int64_t chunk, int64_t limit, const buffers *t, partial p, pe_stream *s) {
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
      attend(w, t->q + at * w->e, n * w->group, a, b, &tile, (partial){p.top + at, p.sum + 16 * at, p.acc + w->fp * at});
    }
  }
  return PE_OK;
}

/* total += part, for the rows that see the chunk. */
static void merge(const job *w, const unit *u, int64_t chunk, partial total, partial part) {
  for (int64_t r = 0; r < u->n_rows; r++) {
    if (!sees(w, u->row + r, chunk)) continue;
    for (int64_t i = r * w->group; i < (r + 1) * w->group; i++) {
      const float x = total.top[i], y = part.top[i], now = y > x ? y : x;
      const v16f fx = v16f_exp(v16f_set1(x - now)), fy = v16f_exp(v16f_set1(y - now));
      float *sum = total.sum + 16 * i, *acc = total.acc + w->fp * i;
      v16f_store(sum, v16f_fma(v16f_load(part.sum + 16 * i), fy, v16f_mul(v16f_load(sum), fx)));
      for (int64_t j = 0; j < w->fp; j += 16)
        v16f_store(acc + j, v16f_fma(v16f_load(part.acc + w->fp * i + j), fy, v16f_mul(v16f_load(acc + j), fx)));
      total.top[i] = now;
    }
  }
}

/* out = acc / sum; a sink joins the sum only. */
static void finish(const job *w, const unit *u, partial total) {
  for (int64_t r = 0; r < u->n_rows; r++)
    for (int64_t i = 0; i < w->group; i++) {
      const int64_t at = r * w->group + i, head = u->head * w->group + i;
      float *out = w->out + ((u->row + r) * w->h + head) * w->f, *acc = total.acc + w->fp * at;
      float sum = v16f_sum(v16f_load(total.sum + 16 * at));
      v16f shrink = v16f_set1(1.0f);
      if (empty(w, u->row + r)) {
        memset(out, 0, (size_t)w->f * 4);
        continue;
      }
      if (w->sinks) {
        const float x = total.top[at], y = w->sinks[head], now = y > x ? y : x;
        shrink = v16f_exp(v16f_set1(x - now));
        sum = sum * first_lane(shrink) + first_lane(v16f_exp(v16f_set1(y - now)));
      }
      for (int64_t j = 0; j < w->f; j += 16)
        store_some(out + j, v16f_div(v16f_mul(v16f_load(acc + j), shrink), v16f_set1(sum)), w->f - j);
    }
}

/* Cut the rows into blocks of one sequence each; returns their number. starts: [m + 1]. */
static int64_t find_blocks(const job *w, int32_t *starts) {
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

/* ---- arguments ---- */

static pe_status check_cache(const char *name, const pe_tensor *t, pe_stream *s) {
  if (t->dtype != PE_F32 && t->dtype != PE_F16 && t->dtype != PE_Q8_0)
    return pe_fail(s, PE_NO_KERNEL, "attention: '%s' has dtype %d; F32, F16 and Q8_0 are possible", name, t->dtype);
  if (t->dtype == PE_Q8_0 && (t->shape[2] % 32 || t->stride[2] != 34))
    return pe_fail(s, PE_NO_KERNEL, "attention: '%s' must hold whole Q8_0 blocks side by side", name);
  return PE_OK;
}

static pe_status check_rows(const job *w, int64_t n_sequences, pe_stream *s) {
  const int64_t n_cells = pe_min(w->k->shape[1], w->v->shape[1]);
  for (int64_t r = 0; r < w->m; r++) {
    const int64_t lo = w->lo[r], hi = w->hi[r];
    if (lo >= hi) continue;
    if (lo < 0 || (!w->cells && hi > n_cells))
      return pe_fail(s, PE_BAD_VALUE, "attention: row %lld reads keys %lld to %lld of %lld", (long long)r, (long long)lo,
                     (long long)hi, (long long)n_cells);
    if (!w->cells) continue;
    if (hi - lo > w->l)
      return pe_fail(s, PE_BAD_VALUE, "attention: row %lld reads %lld keys, but a sequence has %lld cells", (long long)r,
                     (long long)(hi - lo), (long long)w->l);
    const int64_t n = w->seq ? w->seq[r] : 0;
    if (n < 0 || n >= n_sequences)
      return pe_fail(s, PE_BAD_VALUE, "attention: row %lld belongs to sequence %lld of %lld", (long long)r, (long long)n,
                     (long long)n_sequences);
  }
  return PE_OK;
}

PE_KERNEL(attention)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo, const pe_tensor *hi,
                     const pe_tensor *cells, const pe_tensor *seq, const pe_tensor *sinks, const pe_tensor *out,
                     const pe_attention_params *p, pe_stream *s) {
  job w = {.q = q, .k = k, .v = v, .lo = lo->data, .hi = hi->data, .scale = p->scale, .softcap = p->softcap, .out = out->data};
  w.m = q->shape[0], w.h = q->shape[1], w.e = q->shape[2], w.g = k->shape[0], w.f = v->shape[2], w.fp = pe_round_up(w.f, 16);
  if (w.m == 0 || w.h == 0) return PE_OK;
  if (w.g == 0 || w.h % w.g) return pe_fail(s, PE_BAD_SHAPE, "attention: %lld heads share %lld", (long long)w.h, (long long)w.g);
  w.group = w.h / w.g;
  w.rows = unit_rows(w.m, w.h, w.group, w.e, w.fp, s->nth);
  if (cells) w.cells = cells->data, w.cells_stride = cells->stride[0], w.l = cells->shape[1];
  if (seq) w.seq = seq->data;
  if (sinks) w.sinks = sinks->data;
  pe_status bad = check_cache("k", k, s);
  if (!bad) bad = check_cache("v", v, s);
  if (!bad) bad = check_rows(&w, cells ? cells->shape[0] : 1, s);
  if (bad) return bad;

  const int64_t own = thread_floats(w.m, w.h, w.group, w.e, w.f, s->nth), n = w.rows * w.group;
  const int64_t left = s->scratch_bytes / 4 - own * s->nth;
  if (left < 0) return pe_fail(s, PE_NO_MEMORY, "attention: scratch is too small");
  float *mine = (float *)s->scratch + own * s->ith, *shared = (float *)s->scratch + own * s->nth;
  int32_t *starts = (int32_t *)mine;
  buffers t = {.q = mine + pe_round_up(w.m + 1, 16)};
  partial part = partial_at(t.q + pe_round_up(n * w.e, 16), n);
  partial total = partial_at(part.acc + n * w.fp, n);
  t.kt = total.acc + n * w.fp;
  t.v = t.kt + pe_round_up(w.e, 16) * TILE_KEYS;

  const int64_t n_blocks = find_blocks(&w, starts), n_units = n_blocks * w.g, slot = partial_floats(n, w.fp);
  int64_t n_pairs = 0; /* (unit, chunk) pairs, where units are too few for the threads */
  if (s->nth > 1 && n_units < 2 * s->nth)
    for (int64_t i = 0; i < n_units && n_pairs * slot <= left; i++) {
      const unit u = unit_at(starts, n_blocks, i);
      for (int64_t c = 0; (c = next_chunk(&w, &u, c)) >= 0 && n_pairs * slot <= left; c++) n_pairs++;
    }

  if (n_pairs <= n_units || n_pairs * slot > left) {
    for (int64_t i; (i = pe_next(s, 0)) < n_units;) {
      const unit u = unit_at(starts, n_blocks, i);
      load_queries(&w, &u, t.q);
      start(&w, &u, total);
      for (int64_t c = 0; (c = next_chunk(&w, &u, c)) >= 0; c++) {
        if ((bad = run_chunk(&w, &u, c, INT64_MAX, &t, part, s))) return bad;
        merge(&w, &u, c, total, part);
      }
      finish(&w, &u, total);
    }
    return PE_OK;
  }

  /* A claim is a run of pairs, so that what is fetched ahead is mostly one's own. */
  const int64_t run = pe_max(1, n_pairs / (4 * s->nth));
  int64_t begin = pe_next(s, 0) * run, at = 0, loaded = -1, done = 0;
  for (int64_t i = 0; i < n_units; i++) {
    const unit u = unit_at(starts, n_blocks, i);
    for (int64_t c = 0; (c = next_chunk(&w, &u, c)) >= 0; c++, at++) {
      if (at < begin) continue;
      if (loaded != i) load_queries(&w, &u, t.q), loaded = i;
      const int64_t limit = (c + begin + run - at) * CHUNK_KEYS;
      if ((bad = run_chunk(&w, &u, c, limit, &t, partial_at(shared + at * slot, n), s))) return bad;
      done = __atomic_add_fetch(&s->counters[1], 1, __ATOMIC_ACQ_REL);
      if (at + 1 == begin + run) begin = pe_next(s, 0) * run;
    }
  }
  if (done != n_pairs) return PE_OK; /* another thread is last */
  at = 0;
  for (int64_t i = 0; i < n_units; i++) {
    const unit u = unit_at(starts, n_blocks, i);
    start(&w, &u, total);
    for (int64_t c = 0; (c = next_chunk(&w, &u, c)) >= 0; c++, at++)
      merge(&w, &u, c, total, partial_at(shared + at * slot, n));
    finish(&w, &u, total);
  }
  return PE_OK;
}

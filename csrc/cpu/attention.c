/* attention.c: softmax(scale q k^T) v over an interval of keys for each query.
 * Reference: pyengine/ops/attention.py: attention.
 *
 * One path serves prompts, single tokens and encoders. Work is cut as
 *
 *   unit    up to UNIT_FLOATS' worth of queries (rows x heads of the group) of one sequence and one key/value head
 *   chunk   CHUNK_KEYS keys, aligned in the LOGICAL numbers of the keys; online softmax starts afresh in each, giving a partial
 *           (top, sum[16], acc[f]) per query; partials are merged in ascending order
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
#include "attention_int8.h"
#include "cells.h"

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

PE_SCRATCH(cpu, attention)(const pe_args *a, const void *params, int32_t n_threads) {
  const pe_tensor *q = pe_arg(a, 0), *k = pe_arg(a, 1), *v = pe_arg(a, 2);
  if (((const pe_attention_params *)params)->products == PE_ATTENTION_PRODUCTS_INT8)
    return PE_NAME(attention_int8_scratch)(q, k, v, n_threads);
  const int64_t m = q->shape[0], h = q->shape[1], group = h / pe_max(1, k->shape[0]), f = v->shape[2];
  const int64_t chunks = k->shape[1] / CHUNK_KEYS + 2;
  const int64_t split = 4 * partial_floats(pe_max(1, m) * h, pe_round_up(f, 16)) * chunks;
  return n_threads * 4 * thread_floats(m, h, group, q->shape[2], f, n_threads) + (n_threads > 1 ? pe_min(split, SPLIT_BYTES) : 0);
}

/* ---- K and V as floats ---- */

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
  return t->stride[2] == cell_format_of(t->dtype).bytes ? cell_offset(t->dtype, t->shape[2]) : 0;
}

/* A tile as `attend` reads it: K transposed, as floats, 16 bits wide, or as codes of blocks; V as floats [64][fp], or (direct) where
 * it lies in the cache. */
enum form { FLOATS, NARROW, CODES };
typedef struct loaded { const float *kt, *v; const cells_of *cells, *next; enum form form; int direct; } loaded;

/* What is left to ask for of a tile's K or V: the run of bytes at `at`, then the cells from `cell` on. Lines are asked for a few at
 * a time between the fmas: a burst would fill the queue of misses, and loads wait behind it. */
typedef struct ahead { const char *at, *end, *const *cell, *const *last; int64_t bytes; } ahead;

/* Cells that lie one behind the other, as those of a conversation alone do, are one run. */
static ahead ahead_of(const char *const *cell, int64_t bytes) {
  const int64_t whole = bytes * TILE_KEYS;
  int one = 1;
  for (int j = 1; j < TILE_KEYS; j++) one &= cell[j] == cell[j - 1] + bytes;
  return (ahead){cell[0], cell[0] + (one ? whole : bytes), cell + (one ? TILE_KEYS : 1), cell + TILE_KEYS, bytes};
}

/* Lines in all, for spreading them. */
static int64_t lines_ahead(const ahead *a) { return lines_of(a->end - a->at) + lines_of(a->bytes) * (a->last - a->cell); }

PE_INLINE void ask(ahead *a, int64_t lines) {
  for (; lines > 0; lines--) {
    __builtin_prefetch(a->at, 0, 3);
    a->at += 64;
    if (__builtin_expect(a->at >= a->end, 0)) {
      if (a->cell == a->last) a->at = a->end;
      else a->at = *a->cell++, a->end = a->at + a->bytes;
    }
  }
}

/* ---- few queries: K is transposed as it is, V is read where it lies, both become floats on their way to the fma ---- */

enum { WORD_ROW = 4 * TILE_KEYS }; /* bytes of a row of transposed words, 4 bytes each: one of each key */

#if defined(PE_AVX512) /* elsewhere it saves nothing: K goes through floats */
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

/* Four rows: to[i][r] = word i of the 16 bytes at x[r] + at, for 16 keys, all bytes exclusive-or `flip`. */
PE_INLINE void transpose_words(const char *const *x, int64_t at, int flip, char *to) {
  __m512i r[4], t[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) { /* key 4 q + i in quarter q */
    r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(x[i] + at)));
    r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(x[i + 4] + at)), 1);
    r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(x[i + 8] + at)), 2);
    r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i *)(x[i + 12] + at)), 3);
    if (flip) r[i] = _mm512_xor_si512(r[i], _mm512_set1_epi8((char)flip));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    _mm512_storeu_si512(to + 2 * i * WORD_ROW, _mm512_unpacklo_epi64(t[i], t[i + 2]));
    _mm512_storeu_si512(to + (2 * i + 1) * WORD_ROW, _mm512_unpackhi_epi64(t[i], t[i + 2]));
  }
}

/* Narrow kt: F16 [e][64] halves; BF16 [e / 2][64] words of two. */
PE_INLINE void transpose_narrow(const int dtype, const char *const *cell, int64_t e, char *kt) {
  for (int j = 0; j < TILE_KEYS; j += 16) {
    char *to = kt + (dtype == PE_F16 ? 2 : 4) * j;
    if (dtype == PE_F16) {
      for (int64_t i = 0; i < e; i += 32, to += 32 * 2 * TILE_KEYS) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
          const char *p = cell[j + r] + 2 * i;
          x[r] = e - i >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(_bzhi_u32(~0u, (unsigned)(e - i)), p);
        }
        transpose_u16(x, to, 2 * TILE_KEYS);
      }
    } else {
      for (int64_t i = 0; i < e; i += 8, to += 4 * WORD_ROW) transpose_words(cell + j, 2 * i, 0, to);
    }
  }
}

static int can_narrow(const pe_tensor *k) {
  return (k->dtype == PE_F16 || (k->dtype == PE_BF16 && k->shape[2] % 8 == 0)) && k->shape[2] > 0 && k->stride[2] == 2;
}

/* One element of each key: acc[r][j] += q[r * e] * y[j]. */
PE_INLINE void score_step(const int rows, const int vectors, const float *q, int64_t e, const v16f *y, v16f acc[FEW_ROWS][4]) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
    const v16f x = v16f_set1(q[r * e]);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_fma(x, y[j], acc[r][j]);
  }
}

/* p[r][j] = dot of query r and key j of 16 * vectors, e ascending. */
PE_INLINE void scores_body(const int dtype, const int rows, const int vectors, const float *q, int64_t e, const char *kt,
                           ahead *next, int64_t share, float *p) {
  ahead a = *next;
  v16f acc[FEW_ROWS][4], y[4];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_zero();
  if (dtype == PE_F16) {
    for (int64_t i = 0; i < e; i++, kt += 2 * TILE_KEYS) {
      ask(&a, share);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) y[j] = v16f_load_f16(kt + 32 * j);
      score_step(rows, vectors, q + i, e, y, acc);
    }
  } else {
    for (int64_t i = 0; i < e; i += 2, kt += WORD_ROW) {
      ask(&a, share);
#pragma GCC unroll 2
      for (int n = 0; n < 2; n++) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
          const v16i x = v16i_load(kt + 64 * j);
          y[j] = v16i_as_f(n ? v16i_and(x, v16i_set1((int32_t)0xffff0000)) : v16i_shl(x, 16));
        }
        score_step(rows, vectors, q + i + n, e, y, acc);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) v16f_store(p + r * TILE_KEYS + 16 * j, acc[r][j]);
  *next = a;
}

/* Rows x vectors fill the registers: up to 24 sums. */
#define SCORES(d, r, v)                                                                                                \
  for (int j = 0; j < 4; j += v) scores_body(d, r, v, q, e, (const char *)kt + j * (d == PE_F16 ? 32 : 64), next, share, p + 16 * j)
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
  const int64_t steps = (dtype == PE_F16 ? e : e / 2) * (rows > 6 ? 2 : 1), share = (lines_ahead(next) + steps - 1) / steps;
  if (dtype == PE_F16) SCORES_ROWS(PE_F16)
  else SCORES_ROWS(PE_BF16)
}
#else
PE_INLINE void transpose_narrow(const int dtype, const char *const *cell, int64_t e, char *kt) {
  (void)dtype, (void)cell, (void)e, (void)kt;
}
static void narrow_scores(int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next, float *p) {
  (void)dtype, (void)rows, (void)q, (void)e, (void)kt, (void)next, (void)p;
}
static int can_narrow(const pe_tensor *k) { (void)k; return 0; }
/* Four rows: to[i][r] = word i of the 16 bytes at x[r] + at, for 16 keys, all bytes exclusive-or `flip`. */
PE_INLINE void transpose_words(const char *const *x, int64_t at, int flip, char *to) {
  for (int r = 0; r < 16; r++)
    for (int i = 0; i < 4; i++) {
      uint32_t word;
      memcpy(&word, x[r] + at + 4 * i, 4);
      word ^= 0x01010101u * (uint32_t)flip;
      memcpy(to + i * WORD_ROW + 4 * r, &word, 4);
    }
}
#endif

/* ---- keys in blocks: their codes are multiplied as integers with queries of 8 bits ---- */

#define PE_EACH_BLOCK_FORMAT(dtype, f)                                                                                 \
  switch (dtype) {                                                                                                     \
    case PE_Q8_0: f(PE_Q8_0); break;                                                                                   \
    case PE_Q4_0: f(PE_Q4_0); break;                                                                                   \
    default: f(PE_Q4_1);                                                                                               \
  }

/* A query x [e] of floats, replaced by what lies in its first bytes: codes = x / d rounded [e], their sums over 32 [e / 32],
 * d = max |x| / 127. */
static void round_query(float *x, int64_t e) {
  int8_t *codes = (int8_t *)x;
  v16f most = v16f_zero();
  for (int64_t i = 0; i < e; i += 16) most = v16f_max(v16f_abs(v16f_load(x + i)), most);
  const float d = v16f_hmax(most) / 127.0f;
  const v16f inv = v16f_set1(inverse(d));
  for (int64_t i = 0; i < e; i += 16) v16i_store_i8(codes + i, v16f_to_i(v16f_mul(v16f_load(x + i), inv)));
  for (int64_t b = 0; b < e / 32; b++) {
    int32_t sum = 0;
    for (int i = 0; i < 32; i++) sum += codes[32 * b + i];
    memcpy(codes + e + 4 * b, &sum, 4);
  }
  memcpy(codes + e + e / 8, &d, 4);
}

/* kt: for each block a row of scales (64 d, then 64 m, as halves), then rows of words of codes, Q8_0's with 128 added. */
PE_INLINE void transpose_blocks(const int dtype, const char *const *cell, int64_t e, char *kt) {
  const pe_format form = cell_format_of(dtype);
  const int head = form.bytes - (dtype == PE_Q8_0 ? 32 : 16);
  for (int j = 0; j < TILE_KEYS; j += 16) {
    char *to = kt;
    for (int64_t at = 0; at < cell_offset(dtype, e); at += form.bytes) {
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) {
        memcpy(to + 2 * (j + r), cell[j + r] + at, 2);
        if (dtype == PE_Q4_1) memcpy(to + WORD_ROW / 2 + 2 * (j + r), cell[j + r] + at + 2, 2);
      }
      to += WORD_ROW;
      for (int i = head; i < form.bytes; i += 16, to += 4 * WORD_ROW)
        transpose_words(cell + j, at + i, dtype == PE_Q8_0 ? 0x80 : 0, to + 4 * j);
    }
  }
}

/* p[r][j] = dot of query r, `ld` bytes after the one before, and key j of 16 * vectors, blocks ascending. */
PE_INLINE void codes_body(const int dtype, const int rows, const int vectors, const int8_t *q, int64_t ld, int64_t e, const char *kt,
                          int first, ahead *next, int64_t share, float *p) {
  const int words = dtype == PE_Q8_0 ? 8 : 4, halves = dtype == PE_Q8_0 ? 1 : 2;
  const int zero = dtype == PE_Q8_0 ? 128 - PE_DOT_ZERO : dtype == PE_Q4_0 ? 8 : 0; /* of the codes, as the products see them */
  ahead a = *next;
  v16f acc[FEW_ROWS][4];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_zero();
  for (int64_t b = 0; b < e / 32; b++, kt += (1 + words) * WORD_ROW) {
    int32_t sum[FEW_ROWS];
    v16i dot[FEW_ROWS][4];
    v64u x[4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      memcpy(&sum[r], q + r * ld + e + 4 * b, 4);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) dot[r][j] = v16i_set1(-zero * sum[r]);
    }
#pragma GCC unroll 2
    for (int h = 0; h < halves; h++)
#pragma GCC unroll 8
      for (int w = 0; w < words; w++) {
        ask(&a, share);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
          x[j] = v64u_load(kt + (1 + w) * WORD_ROW + 4 * first + 64 * j);
          if (halves == 2) x[j] = v64u_and(h ? v64u_shr16(x[j], 4) : x[j], v64u_set1(15));
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
          const v64u y = v64u_set4(q + r * ld + 32 * b + 4 * (h * words + w));
#pragma GCC unroll 4
          for (int j = 0; j < vectors; j++)
            dot[r][j] = dtype == PE_Q8_0 ? dot_z128(dot[r][j], x[j], y) : dot_u7(dot[r][j], x[j], y);
        }
      }
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      const v16f d = v16f_load_f16(kt + 2 * first + 32 * j);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) acc[r][j] = v16f_fma(v16i_to_f(dot[r][j]), d, acc[r][j]);
      if (dtype != PE_Q4_1) continue;
      const v16f m = v16f_load_f16(kt + WORD_ROW / 2 + 2 * first + 32 * j);
#pragma GCC unroll 8
      for (int r = 0; r < rows; r++) acc[r][j] = v16f_fma(v16f_set1((float)sum[r]), m, acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
    float d;
    memcpy(&d, q + r * ld + e + e / 8, 4);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) v16f_store(p + r * TILE_KEYS + 16 * j, v16f_mul(acc[r][j], v16f_set1(d)));
  }
  *next = a;
}

/* Both sums of rows x vectors in registers; 7 and 8 rows come with avx512 only (FEW_ROWS). */
#define CODE_SCORES(d, r, v)                                                                                           \
  for (int j = 0; j < TILE_KEYS; j += 16 * v)                                                                          \
    codes_body(d, r, v, (const int8_t *)q, 4 * e, e, (const char *)kt, j, next, share, p + j)
#if PE_PARTS == 1
#define CODES_SEVEN(d)                                                                                                 \
    case 7: CODE_SCORES(d, 7, CODES_FEW); break;                                                                       \
    case 8: CODE_SCORES(d, 8, 1); break;
#else
#define CODES_SEVEN(d)
#endif
#define CODES_ROWS(d)                                                                                                  \
  switch (rows) {                                                                                                      \
    case 1: CODE_SCORES(d, 1, CODES_MANY); break;                                                                      \
    case 2: CODE_SCORES(d, 2, CODES_MANY); break;                                                                      \
    case 3: CODE_SCORES(d, 3, CODES_MANY); break;                                                                      \
    case 4: CODE_SCORES(d, 4, CODES_FEW); break;                                                                       \
    case 5: CODE_SCORES(d, 5, CODES_FEW); break;                                                                       \
    CODES_SEVEN(d)                                                                                                     \
    default: CODE_SCORES(d, 6, CODES_FEW);                                                                             \
  }
enum { CODES_MANY = PE_PARTS == 1 ? 4 : 1, CODES_FEW = PE_PARTS == 1 ? 2 : 1 };
static __attribute__((noinline)) void block_scores(int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next,
                                                   float *p) {
  const int vectors = rows <= 3 ? CODES_MANY : rows < 8 ? CODES_FEW : 1;
  const int64_t steps = e / 4 * (4 / vectors), share = (lines_ahead(next) + steps - 1) / steps;
  PE_EACH_BLOCK_FORMAT(dtype, CODES_ROWS)
}

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

#define VALUES(d, r, v) values_body(d, r, v, p, cell, next, share, first, c, f, n, factor)
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
  const int64_t width = TILE_VECTORS == 1 ? 16 : rows <= 6 ? 64 : 32, steps = (f + width - 1) / width * n;
  const int64_t share = (lines_ahead(next) + steps - 1) / steps;
  for (int64_t first = 0, v; first < f; first += 16 * v, c += 16 * v) {
    const int64_t left = (f - first) / 16;
    v = TILE_VECTORS == 1 ? 1 : left >= 4 && rows <= 6 ? 4 : left >= 2 ? 2 : 1; /* even until the last: whole blocks */
    PE_EACH_CELL_FORMAT(dtype, VALUES_ALL)
  }
}

/* ---- loading ---- */

static loaded load_tile(const job *w, const cells_of *t, const cells_of *next, uint64_t wanted, int64_t queries, float *kt,
                        float *v) {
  const pe_tensor *a = w->k, *b = w->v;
  const int64_t kb = cell_bytes(a), vb = cell_bytes(b);
  const int few = queries <= FEW_QUERIES, direct = few && vb > 0 && w->f == w->fp;
  const enum form form = in_blocks(a) ? CODES : few && can_narrow(a) ? NARROW : FLOATS;
  if (form == CODES) {
#define TRANSPOSE_BLOCKS(d) transpose_blocks(d, t->k, w->e, (char *)kt)
    PE_EACH_BLOCK_FORMAT(a->dtype, TRANSPOSE_BLOCKS)
  } else if (form == NARROW) {
    if (a->dtype == PE_F16) transpose_narrow(PE_F16, t->k, w->e, (char *)kt);
    else transpose_narrow(PE_BF16, t->k, w->e, (char *)kt);
  } else {
#define TRANSPOSE(d) transpose_keys(d, t->k, next->k, kb, wanted, w->e, a->stride[2], kb > 0, kt)
    if (a->dtype == PE_F32) TRANSPOSE(PE_F32);
    else if (a->dtype == PE_F16) TRANSPOSE(PE_F16);
    else TRANSPOSE(PE_BF16);
  }
  if (!direct) {
#define CONVERT(d) convert_values(d, t->v, next->v, vb, wanted, w->f, b->stride[2], vb > 0, v)
    PE_EACH_CELL_FORMAT(b->dtype, CONVERT)
  }
  return (loaded){kt, v, t, next, form, direct};
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
  const int most = t->form != FLOATS && t->direct ? FEW_ROWS : TILE_ROWS; /* queries at once */
  ahead k = ahead_of(t->next->k, cell_bytes(w->k)), v = ahead_of(t->next->v, cell_bytes(w->v));
  const int v0 = a / 16, v1 = (b + 15) / 16;
  float p[FEW_ROWS][TILE_KEYS], factor[FEW_ROWS];
  for (int64_t tiles = (n + most - 1) / most; n; tiles--) {
    const int r = (int)((n + tiles - 1) / tiles); /* as even as they can be: 7 queries are 4 + 3 */
    if (t->form == CODES) block_scores(w->k->dtype, r, q, w->e, t->kt, &k, p[0]);
    else if (t->form == NARROW) narrow_scores(w->k->dtype, r, q, w->e, t->kt, &k, p[0]);
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

/* Scaled queries [e] side by side; where K is in blocks, mixed and rounded. */
static void load_queries(const job *w, const unit *u, float *to) {
  const v16f scale = v16f_set1(w->scale);
  const int blocks = in_blocks(w->k);
  for (int64_t r = u->row; r < u->row + u->n_rows; r++)
    for (int64_t i = 0; i < w->group; i++, to += w->e) {
      const char *q = (const char *)w->q->data + r * w->q->stride[0] + (u->head * w->group + i) * w->q->stride[1];
      for (int64_t j = 0; j < w->e; j += 16) {
        const int64_t left = w->e - j;
        v16f x = w->q->stride[2] == 4 ? load_some((const float *)q + j, left)
                                      : load_cell_n(PE_F32, q, w->q->stride[2], j, pe_min(16, left));
        store_some(to + j, v16f_mul(x, scale), left);
      }
      if (blocks) {
        mix(to, w->e);
        round_query(to, w->e);
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

/* total += part, for the rows that see the chunk; factors of 16 queries at once. */
static void merge(const job *w, const unit *u, int64_t chunk, partial total, partial part) {
  for (int64_t r = 0; r < u->n_rows; r++) {
    if (!sees(w, u->row + r, chunk)) continue;
    for (int64_t first = r * w->group, end = first + w->group; first < end; first += 16) {
      const int64_t n = pe_min(16, end - first);
      const v16f x = load_some(total.top + first, n), y = load_some(part.top + first, n), now = v16f_max(y, x);
      float mine[16], new[16];
      v16f_store(mine, v16f_exp(v16f_sub(x, now)));
      v16f_store(new, v16f_exp(v16f_sub(y, now)));
      store_some(total.top + first, now, n);
      for (int64_t i = first; i < first + n; i++) {
        const v16f fx = v16f_set1(mine[i - first]), fy = v16f_set1(new[i - first]);
        float *sum = total.sum + 16 * i, *acc = total.acc + w->fp * i;
        v16f_store(sum, v16f_fma(v16f_load(part.sum + 16 * i), fy, v16f_mul(v16f_load(sum), fx)));
        for (int64_t j = 0; j < w->fp; j += 16)
          v16f_store(acc + j, v16f_fma(v16f_load(part.acc + w->fp * i + j), fy, v16f_mul(v16f_load(acc + j), fx)));
      }
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
      if (in_blocks(w->v)) mix(out, w->f);
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

/* Where claim number `claim` of n pairs begins: runs of a thread's own, so that what is fetched ahead is mostly for itself, and
 * ever shorter, so that threads end together. */
static int64_t claim_at(int64_t claim, int64_t n, int64_t n_threads) {
  int64_t at = 0;
  for (; claim > 0 && at < n; claim--) at += pe_max(1, (n - at) / (2 * n_threads));
  return at;
}

PE_KERNEL(cpu, attention)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo, const pe_tensor *hi,
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
  pe_status bad = check_cells("attention", "k", k, 0, s);
  if (!bad) bad = check_cells("attention", "v", v, 0, s);
  if (!bad && p->products == PE_ATTENTION_PRODUCTS_INT8) {
    if (cells || seq || sinks || p->softcap != 0.0f || cell_format_of(k->dtype).elements > 1 || cell_format_of(v->dtype).elements > 1)
      return pe_fail(s, PE_NO_KERNEL, "attention: products of int8 take neither cells nor blocks nor sinks nor a soft cap");
    return PE_NAME(attention_int8)(q, k, v, lo, hi, out, p->scale, s);
  }
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

  int64_t claim = pe_next(s, 0), at = 0, loaded = -1, done = 0;
  int64_t begin = claim_at(claim, n_pairs, s->nth), end = claim_at(claim + 1, n_pairs, s->nth);
  for (int64_t i = 0; i < n_units; i++) {
    const unit u = unit_at(starts, n_blocks, i);
    for (int64_t c = 0; (c = next_chunk(&w, &u, c)) >= 0; c++, at++) {
      if (at < begin) continue;
      if (loaded != i) load_queries(&w, &u, t.q), loaded = i;
      const int64_t limit = (c + end - at) * CHUNK_KEYS;
      if ((bad = run_chunk(&w, &u, c, limit, &t, partial_at(shared + at * slot, n), s))) return bad;
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
    start(&w, &u, total);
    for (int64_t c = 0; (c = next_chunk(&w, &u, c)) >= 0; c++, at++)
      merge(&w, &u, c, total, partial_at(shared + at * slot, n));
    finish(&w, &u, total);
  }
  return PE_OK;
}

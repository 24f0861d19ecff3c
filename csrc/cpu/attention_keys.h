/* attention_keys.h: keys of one tile: loaded from the cache for several queries, and scores. attention.c and key_sums.c include it.
 *
 *   cache of K           few queries                                  many
 *   F32                  floats: transpose_keys, then vec.h's tile     the same
 *   F16, BF16 (avx512)   transpose_narrow, narrow_scores               transpose_keys, tile
 *   blocks               transpose_blocks, block_scores                the same
 *   by channel           channel_scores, where it lies                 load_channels, tile
 *
 * A score has the same bits in all of them, but for keys in blocks, whose queries are rounded.
 * Names of inner functions: X_body is the loop over a tile for constant rows and vectors, in registers; X_rows walks the tile with
 * it; X_any picks the number of rows. All are inlined into one function for each X. Vectors of 16 keys by rows, on avx512; elsewhere
 * it is one vector and up to 6 rows:
 *
 *   rows      1  2  3  4  5  6  7  8
 *   scores    4  4  4  4  4  4  2  2     sums
 *   codes     4  4  4  2  2  2  2  1     sums of integers and of floats
 *   channels  4  4  4  4  4  4  2  2     sums
 */
#ifndef PE_ATTENTION_KEYS_H
#define PE_ATTENTION_KEYS_H

#include "attention.h"

/* Up to so many queries, K and V go from the cache straight to the fma: two register tiles convert them twice, which is less than
 * to store floats and load them again. */
enum { FEW_ROWS = PE_PARTS == 1 ? 8 : TILE_ROWS, FEW_QUERIES = 2 * FEW_ROWS };

/* How a tile of K is held: floats [e][64], 16 bits wide, codes of blocks, or (GROUPS) the addresses of its two groups. */
enum form { FLOATS, NARROW, CODES, GROUPS };

/* ---- K as floats ---- */

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

/* Bytes of one cell, for fetching ahead; 0 where its elements are spread. */
static int64_t cell_bytes(const pe_tensor *t) {
  if (channel_format(t->dtype) != PE_F32) return t->stride[1];
  return t->stride[2] == cell_format_of(t->dtype).bytes ? cell_offset(t->dtype, t->shape[2]) : 0;
}

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

/* One element of each key: acc[r][j] += q[r * e] * y[j]. */
PE_INLINE void score_step(const int rows, const int vectors, const float *q, int64_t e, const v16f *y, v16f acc[FEW_ROWS][4]) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++) {
    const v16f x = v16f_set1(q[r * e]);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_fma(x, y[j], acc[r][j]);
  }
}

/* ---- few queries: K is transposed as it is and becomes floats on its way to the fma ---- */

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
          PE_READS(p, 2 * (e - i < 32 ? e - i : 32));
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

/* All keys of a tile, as many vectors at a time as leave room in registers: up to 24 sums. */
PE_INLINE void scores_rows(const int dtype, const int rows, const int vectors, const float *q, int64_t e, const float *kt,
                           ahead *next, int64_t share, float *p) {
  for (int j = 0; j < TILE_KEYS / 16; j += vectors)
    scores_body(dtype, rows, vectors, q, e, (const char *)kt + j * (dtype == PE_F16 ? 32 : 64), next, share, p + 16 * j);
}

PE_INLINE void scores_any(const int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next, int64_t share,
                          float *p) {
  switch (rows) {
    case 1: scores_rows(dtype, 1, 4, q, e, kt, next, share, p); break;
    case 2: scores_rows(dtype, 2, 4, q, e, kt, next, share, p); break;
    case 3: scores_rows(dtype, 3, 4, q, e, kt, next, share, p); break;
    case 4: scores_rows(dtype, 4, 4, q, e, kt, next, share, p); break;
    case 5: scores_rows(dtype, 5, 4, q, e, kt, next, share, p); break;
    case 6: scores_rows(dtype, 6, 4, q, e, kt, next, share, p); break;
    case 7: scores_rows(dtype, 7, 2, q, e, kt, next, share, p); break;
    default: scores_rows(dtype, 8, 2, q, e, kt, next, share, p);
  }
}

static __attribute__((noinline)) void narrow_scores(int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next,
                                                    float *p) {
  const int64_t steps = (dtype == PE_F16 ? e : e / 2) * (rows > 6 ? 2 : 1), share = (lines_ahead(next) + steps - 1) / steps;
  if (dtype == PE_F16) scores_any(PE_F16, rows, q, e, kt, next, share, p);
  else scores_any(PE_BF16, rows, q, e, kt, next, share, p);
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

/* Vectors of keys at a time for so many rows: both sums of rows x vectors in registers. 7 and 8 rows come with avx512 only
 * (FEW_ROWS). */
PE_INLINE int codes_vectors(const int rows) { return PE_PARTS > 1 ? 1 : rows <= 3 ? 4 : rows < 8 ? 2 : 1; }

PE_INLINE void codes_rows(const int dtype, const int rows, const float *q, int64_t e, const float *kt, ahead *next, int64_t share,
                          float *p) {
  const int vectors = codes_vectors(rows);
  for (int j = 0; j < TILE_KEYS; j += 16 * vectors)
    codes_body(dtype, rows, vectors, (const int8_t *)q, 4 * e, e, (const char *)kt, j, next, share, p + j);
}

PE_INLINE void codes_any(const int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next, int64_t share,
                         float *p) {
  switch (rows) {
    case 1: codes_rows(dtype, 1, q, e, kt, next, share, p); break;
    case 2: codes_rows(dtype, 2, q, e, kt, next, share, p); break;
    case 3: codes_rows(dtype, 3, q, e, kt, next, share, p); break;
    case 4: codes_rows(dtype, 4, q, e, kt, next, share, p); break;
    case 5: codes_rows(dtype, 5, q, e, kt, next, share, p); break;
#if PE_PARTS == 1
    case 7: codes_rows(dtype, 7, q, e, kt, next, share, p); break;
    case 8: codes_rows(dtype, 8, q, e, kt, next, share, p); break;
#endif
    default: codes_rows(dtype, 6, q, e, kt, next, share, p);
  }
}

static __attribute__((noinline)) void block_scores(int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next,
                                                   float *p) {
  const int64_t steps = e / 4 * (4 / codes_vectors(rows)), share = (lines_ahead(next) + steps - 1) / steps;
#define CODES(d) codes_any(d, rows, q, e, kt, next, share, p)
  PE_EACH_BLOCK_FORMAT(dtype, CODES)
#undef CODES
}

/* ---- loading ---- */

/* ---- keys by channel: a block holds one channel of 32 keys, so nothing is transposed; both ways give the same floats ---- */

/* Where the group of 32 keys begins that holds the wanted ones among keys 32 h .. of a tile; another one's where none is wanted. */
PE_INLINE const char *group_at(const pe_tensor *k, const char *const *cell, uint64_t wanted, int h) {
  const uint64_t own = wanted & (uint64_t)0xffffffff << GROUP_KEYS * h;
  const int j = __builtin_ctzll(own ? own : wanted);
  return cell[j] - j % GROUP_KEYS * k->stride[1];
}

/* kt[i][j] = element i of key j, for groups that hold a wanted one; what they hold in the next tile is asked for. */
PE_INLINE void load_channels(const int format, const pe_tensor *k, const char *const *cell, const char *const *next, uint64_t wanted, float *kt) {
  const int64_t bytes = cell_format_of(format).bytes;
  for (int h = 0; h < TILE_KEYS / GROUP_KEYS; h++) {
    const char *block = group_at(k, cell, wanted, h), *later = next[GROUP_KEYS * h];
    if (!(wanted >> GROUP_KEYS * h & 0xffffffff)) continue;
    for (int64_t i = 0; i < k->shape[2]; i++, block += bytes, later += bytes) {
      const block_values t = values_of(format, v16f_set1(half_to_float(block)), v16f_set1(half_to_float(block + 2)));
      pe_prefetch(later);
      for (int j = 0; j < 2; j++) v16f_store(kt + i * TILE_KEYS + GROUP_KEYS * h + 16 * j, value_of(format, t, block_codes(format, block, j)));
    }
  }
}

/* p[r][j] = dot of query r and key j of 16 * vectors, from key `first` on, e ascending. */
PE_INLINE void channels_body(const int format, const int rows, const int vectors, const float *q, int64_t e, const char *const *group,
                             int first, ahead *next, int64_t share, float *p) {
  const int64_t bytes = cell_format_of(format).bytes;
  const char *block[2] = {group[first / GROUP_KEYS], group[(first + 16 * vectors - 1) / GROUP_KEYS]};
  ahead a = *next;
  v16f acc[FEW_ROWS][4], y[4];
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[r][j] = v16f_zero();
  for (int64_t i = 0; i < e; i++, block[0] += bytes, block[1] += bytes) {
    ask(&a, share);
    block_values t[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++)
      t[h] = values_of(format, v16f_set1(half_to_float(block[h])), v16f_set1(half_to_float(block[h] + 2)));
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++)
      y[j] = value_of(format, t[j / 2], block_codes(format, block[j / 2], vectors == 1 ? first / 16 % 2 : j % 2));
    score_step(rows, vectors, q + i, e, y, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) v16f_store(p + r * TILE_KEYS + 16 * j, acc[r][j]);
  *next = a;
}

PE_INLINE void channels_rows(const int format, const int rows, const int vectors, const float *q, int64_t e, const char *const *group,
                             ahead *next, int64_t share, float *p) {
  for (int j = 0; j < TILE_KEYS; j += 16 * vectors) channels_body(format, rows, vectors, q, e, group, j, next, share, p + j);
}

PE_INLINE void channels_any(const int format, int rows, const float *q, int64_t e, const char *const *group, ahead *next, int64_t share,
                            float *p) {
  enum { WIDE = PE_PARTS == 1 ? 4 : 1 };
  switch (rows) {
    case 1: channels_rows(format, 1, WIDE, q, e, group, next, share, p); break;
    case 2: channels_rows(format, 2, WIDE, q, e, group, next, share, p); break;
    case 3: channels_rows(format, 3, WIDE, q, e, group, next, share, p); break;
    case 4: channels_rows(format, 4, WIDE, q, e, group, next, share, p); break;
    case 5: channels_rows(format, 5, WIDE, q, e, group, next, share, p); break;
#if PE_PARTS == 1
    case 7: channels_rows(format, 7, 2, q, e, group, next, share, p); break;
    case 8: channels_rows(format, 8, 2, q, e, group, next, share, p); break;
#endif
    default: channels_rows(format, 6, WIDE, q, e, group, next, share, p);
  }
}

static __attribute__((noinline)) void channel_scores(int dtype, int rows, const float *q, int64_t e, const float *kt, ahead *next,
                                                     float *p) {
  const int64_t steps = e * (PE_PARTS > 1 ? 4 : rows > 6 ? 2 : 1), share = (lines_ahead(next) + steps - 1) / steps;
  const char *group[2];
  memcpy(group, kt, sizeof group);
  if (channel_format(dtype) == PE_Q4_1) channels_any(PE_Q4_1, rows, q, e, group, next, share, p);
  else channels_any(PE_Q2_1, rows, q, e, group, next, share, p);
}

/* ---- a tile ---- */

/* Load a tile of which keys are `wanted`, for so many queries; `next`: the cells that will be read then. */
static enum form load_keys(const pe_tensor *k, const char *const *cell, const char *const *next, uint64_t wanted, int64_t queries, float *kt) {
  const int64_t e = k->shape[2], bytes = cell_bytes(k);
  const int32_t by_channel = channel_format(k->dtype);
  const int few = queries <= FEW_QUERIES;
  const enum form form = in_blocks(k) ? CODES : by_channel != PE_F32 ? few ? GROUPS : FLOATS : few && can_narrow(k) ? NARROW : FLOATS;
  if (form == GROUPS) {
    const char *group[2] = {group_at(k, cell, wanted, 0), group_at(k, cell, wanted, 1)};
    memcpy(kt, group, sizeof group);
  } else if (by_channel == PE_Q4_1) {
    load_channels(PE_Q4_1, k, cell, next, wanted, kt);
  } else if (by_channel == PE_Q2_1) {
    load_channels(PE_Q2_1, k, cell, next, wanted, kt);
  } else if (form == CODES) {
#define TRANSPOSE_BLOCKS(d) transpose_blocks(d, cell, e, (char *)kt)
    PE_EACH_BLOCK_FORMAT(k->dtype, TRANSPOSE_BLOCKS)
#undef TRANSPOSE_BLOCKS
  } else if (form == NARROW) {
    if (k->dtype == PE_F16) transpose_narrow(PE_F16, cell, e, (char *)kt);
    else transpose_narrow(PE_BF16, cell, e, (char *)kt);
  } else {
#define TRANSPOSE(d) transpose_keys(d, cell, next, bytes, wanted, e, k->stride[2], bytes > 0, kt)
    if (k->dtype == PE_F32) TRANSPOSE(PE_F32);
    else if (k->dtype == PE_F16) TRANSPOSE(PE_F16);
    else TRANSPOSE(PE_BF16);
#undef TRANSPOSE
  }
  return form;
}

/* p[r][j] = score of query r and key j of a loaded tile, for the keys 16 v0 .. 16 v1 - 1 at least. */
PE_INLINE void scores_of(enum form form, int32_t dtype, int rows, const float *q, int64_t e, const float *kt, int v0, int v1, ahead *next, float *p) {
  if (form == CODES) block_scores(dtype, rows, q, e, kt, next, p);
  else if (form == NARROW) narrow_scores(dtype, rows, q, e, kt, next, p);
  else if (form == GROUPS) channel_scores(dtype, rows, q, e, kt, next, p);
  else tile(rows, v1 - v0, q, e, kt + 16 * v0, TILE_KEYS, p + 16 * v0, TILE_KEYS, e, 0);
}

/* ---- queries ---- */

/* A scaled query [e] of one row and head; where K is in blocks, mixed and rounded. */
static void load_query(const job *w, int64_t row, int64_t head, float *to) {
  const v16f scale = v16f_set1(w->scale);
  const char *q = (const char *)w->q->data + row * w->q->stride[0] + head * w->q->stride[1];
  for (int64_t j = 0; j < w->e; j += 16) {
    const int64_t left = w->e - j;
    v16f x = w->q->stride[2] == 4 ? load_some((const float *)q + j, left)
                                  : load_cell_n(PE_F32, q, w->q->stride[2], j, pe_min(16, left));
    store_some(to + j, v16f_mul(x, scale), left);
  }
  if (in_blocks(w->k)) {
    mix(to, w->e);
    round_query(to, w->e);
  }
}

/* Intervals and sequences of all rows are within what there is: n_cells where there is no table of cells. */
static pe_status check_rows(const char *op, const job *w, int64_t n_cells, int64_t n_sequences, pe_stream *s) {
  for (int64_t r = 0; r < w->m; r++) {
    const int64_t lo = w->lo[r], hi = w->hi[r];
    if (lo >= hi) continue;
    if (lo < 0 || (!w->cells && hi > n_cells))
      return pe_fail(s, PE_BAD_VALUE, "%s: row %lld reads keys %lld to %lld of %lld", op, (long long)r, (long long)lo, (long long)hi,
                     (long long)n_cells);
    if (!w->cells) continue;
    if (hi - lo > w->l)
      return pe_fail(s, PE_BAD_VALUE, "%s: row %lld reads %lld keys, but a sequence has %lld cells", op, (long long)r,
                     (long long)(hi - lo), (long long)w->l);
    const int64_t n = w->seq ? w->seq[r] : 0;
    if (n < 0 || n >= n_sequences)
      return pe_fail(s, PE_BAD_VALUE, "%s: row %lld belongs to sequence %lld of %lld", op, (long long)r, (long long)n,
                     (long long)n_sequences);
  }
  return PE_OK;
}

#endif

/* vec.h: what several kernel files share beyond simd.h: ends of rows, norms, 16 x 16 transposes, and the register tile that matmul
 * and attention are made of. */
#ifndef PE_VEC_H
#define PE_VEC_H

#include "cpu.h"

/* The next 16 elements, or those that are left (0 in the other lanes). */
PE_INLINE v16f load_some(const float *p, int64_t left) { return left >= 16 ? v16f_load(p) : v16f_load_n(p, left); }
PE_INLINE void store_some(float *p, v16f v, int64_t left) {
  if (left >= 16) v16f_store(p, v);
  else v16f_store_n(p, v, left);
}

/* ---- sums over a row ----
 * 1024 sums: element i joins number i % 1024, in the order of the row; then the sums are folded in halves, i with i + 512, i + 256 .. i + 1.
 * GPUs add in this order too (csrc/cuda/sums.h, csrc/metal/team.h), so that what becomes a code of 8 bits next is the same number there. */

enum { ROW_SUMS = 64 }; /* vectors */

PE_INLINE float fold_sums(v16f *sum, int n) {
  for (int half = ROW_SUMS / 2; half; half /= 2)
    for (int j = 0; j < half && j + half < n; j++) sum[j] = v16f_add(sum[j], sum[j + half]);
  return v16f_sum(sum[0]);
}

PE_INLINE int clear_sums(v16f *sum, int64_t d) {
  const int n = (int)pe_max(1, pe_min(ROW_SUMS, (d + 15) / 16));
  for (int j = 0; j < n; j++) sum[j] = v16f_zero();
  return n;
}

static __attribute__((unused)) float sum_of(const float *x, int64_t d) {
  v16f sum[ROW_SUMS];
  const int n = clear_sums(sum, d);
  for (int64_t i = 0; i < d; i += 16) {
    v16f *s = sum + i / 16 % ROW_SUMS;
    *s = v16f_add(*s, load_some(x + i, d - i));
  }
  return fold_sums(sum, n);
}

/* Sum of (x - centre)^2. Lanes beyond the row add 0. */
static __attribute__((unused)) float sum_of_squares(const float *x, int64_t d, float centre) {
  v16f sum[ROW_SUMS], c = v16f_set1(centre);
  const int n = clear_sums(sum, d);
  for (int64_t i = 0; i < d; i += 16) {
    v16f v = v16f_sub(load_some(x + i, d - i), c), *s = sum + i / 16 % ROW_SUMS;
    if (d - i < 16) v = v16f_first_n(v, d - i, 0.0f);
    *s = v16f_fma(v, v, *s);
  }
  return fold_sums(sum, n);
}

/* ---- norms: kernels that norm a row (rms_norm, rope_append, linear) do it by these two functions, so with the same bits ---- */

/* 1 / sqrt(mean of x^2 + eps) */
static __attribute__((unused)) float inverse_rms(const float *x, int64_t d, float eps) {
  return 1.0f / __builtin_sqrtf(sum_of_squares(x, d, 0.0f) / (float)d + eps);
}

/* y = (x - centre) * inv * weight + add, where weight and add may be absent. `add` is a residual or a bias. */
PE_INLINE void scale_row(const float *x, float *y, int64_t d, float centre, float inv, const float *weight, const float *add) {
  v16f c = v16f_set1(centre), s = v16f_set1(inv);
  for (int64_t i = 0; i < d; i += 16) {
    v16f v = v16f_mul(v16f_sub(load_some(x + i, d - i), c), s);
    if (weight) v = v16f_mul(v, load_some(weight + i, d - i));
    if (add) v = v16f_add(v, load_some(add + i, d - i));
    store_some(y + i, v, d - i);
  }
}

/* ---- transpose: dst[i * ld + j] = lane i of x[j] ----
 * Square blocks of L lanes, by log2(L) rounds of interleaving pairs of registers. */

#if defined(PE_AVX512)
PE_INLINE void transpose16(const v16f x[16], float *dst, int64_t ld) {
  __m512 r[16], t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) { /* pairs of rows: a0 b0 a1 b1 | a4 b4 a5 b5 | ... and a2 b2 a3 b3 | ... */
    t[i] = _mm512_unpacklo_ps((__m512)x[i].a, (__m512)x[i + 1].a);
    t[i + 1] = _mm512_unpackhi_ps((__m512)x[i].a, (__m512)x[i + 1].a);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) /* r[i + c]: column 4 q + c of rows i .. i + 3 in quarter q */
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
      r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + j], (__m512d)t[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) { /* quarters of four registers change places */
    __m512 a = _mm512_shuffle_f32x4(r[c], r[c + 4], 0x44), b = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0x44);
    __m512 d = _mm512_shuffle_f32x4(r[c], r[c + 4], 0xee), e = _mm512_shuffle_f32x4(r[c + 8], r[c + 12], 0xee);
    _mm512_storeu_ps(dst + c * ld, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(dst + (c + 4) * ld, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(dst + (c + 8) * ld, _mm512_shuffle_f32x4(d, e, 0x88));
    _mm512_storeu_ps(dst + (c + 12) * ld, _mm512_shuffle_f32x4(d, e, 0xdd));
  }
}
#elif defined(PE_AVX2)
PE_INLINE void transpose8(const __m256 x[8], float *dst, int64_t ld) {
  __m256 r[8], t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = (__m256)_mm256_unpacklo_pd((__m256d)t[i + j], (__m256d)t[i + j + 2]);
      r[i + 2 * j + 1] = (__m256)_mm256_unpackhi_pd((__m256d)t[i + j], (__m256d)t[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    _mm256_storeu_ps(dst + c * ld, _mm256_permute2f128_ps(r[c], r[c + 4], 0x20));
    _mm256_storeu_ps(dst + (c + 4) * ld, _mm256_permute2f128_ps(r[c], r[c + 4], 0x31));
  }
}
PE_INLINE void transpose16(const v16f x[16], float *dst, int64_t ld) {
  for (int j = 0; j < 16; j += 8) {
    __m256 top[8], bottom[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) top[i] = (__m256)x[j + i].a;
    transpose8(top, dst + j, ld);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) bottom[i] = (__m256)x[j + i].b;
    transpose8(bottom, dst + 8 * ld + j, ld);
  }
}
#elif !defined(PE_SVE256) /* whose kernels transpose nothing */
PE_INLINE void transpose4(pe_pf a, pe_pf b, pe_pf c, pe_pf d, float *dst, int64_t ld) {
  pe_pf ac = __builtin_shufflevector(a, c, 0, 4, 1, 5), AC = __builtin_shufflevector(a, c, 2, 6, 3, 7);
  pe_pf bd = __builtin_shufflevector(b, d, 0, 4, 1, 5), BD = __builtin_shufflevector(b, d, 2, 6, 3, 7);
  *(pe_pf_mem *)(dst) = __builtin_shufflevector(ac, bd, 0, 4, 1, 5);
  *(pe_pf_mem *)(dst + ld) = __builtin_shufflevector(ac, bd, 2, 6, 3, 7);
  *(pe_pf_mem *)(dst + 2 * ld) = __builtin_shufflevector(AC, BD, 0, 4, 1, 5);
  *(pe_pf_mem *)(dst + 3 * ld) = __builtin_shufflevector(AC, BD, 2, 6, 3, 7);
}
PE_INLINE void transpose16(const v16f x[16], float *dst, int64_t ld) {
  for (int j = 0; j < 16; j += 4) {
    transpose4(x[j].a, x[j + 1].a, x[j + 2].a, x[j + 3].a, dst + j, ld);
    transpose4(x[j].b, x[j + 1].b, x[j + 2].b, x[j + 3].b, dst + 4 * ld + j, ld);
    transpose4(x[j].c, x[j + 1].c, x[j + 2].c, x[j + 3].c, dst + 8 * ld + j, ld);
    transpose4(x[j].d, x[j + 1].d, x[j + 2].d, x[j + 3].d, dst + 12 * ld + j, ld);
  }
}
#endif

/* ---- the register tile ----
 *
 *   c[r][j] = (factor ? factor[r] * c[r][j] : 0) + sum over t = 0 .. n-1 of a[r * lda + t] * b[t * ldb + j]
 *
 * r < rows (at most TILE_ROWS), j < 16 * vectors. One fma a step and one accumulator for each element, t ascending: an
 * element's value depends neither on how many rows and columns the tile has nor on its place in it. Rows x vectors fill the
 * registers: 6 x 4 of avx512's 32, and 6 x 1 elsewhere (12 of avx2's 16, 24 of neon's 32). */

enum { TILE_ROWS = 6, TILE_VECTORS = PE_PARTS == 1 ? 4 : 1 };

PE_INLINE void tile_body(const int rows, const int vectors, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                         int64_t ldc, int64_t n, const float *factor) {
  v16f acc[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++)
      acc[r][j] = factor ? v16f_mul(v16f_load(c + r * ldc + 16 * j), v16f_set1(factor[r])) : v16f_zero();
  for (int64_t t = 0; t < n; t++) {
    v16f y[TILE_VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) y[j] = v16f_load(b + t * ldb + 16 * j);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      v16f x = v16f_set1(a[r * lda + t]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) acc[r][j] = v16f_fma(x, y[j], acc[r][j]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) v16f_store(c + r * ldc + 16 * j, acc[r][j]);
}

#define PE_TILE_ROWS(v)                                                                                                \
  switch (rows) {                                                                                                      \
    case 1: tile_body(1, v, a, lda, b, ldb, c, ldc, n, factor); break;                                                 \
    case 2: tile_body(2, v, a, lda, b, ldb, c, ldc, n, factor); break;                                                 \
    case 3: tile_body(3, v, a, lda, b, ldb, c, ldc, n, factor); break;                                                 \
    case 4: tile_body(4, v, a, lda, b, ldb, c, ldc, n, factor); break;                                                 \
    case 5: tile_body(5, v, a, lda, b, ldb, c, ldc, n, factor); break;                                                 \
    default: tile_body(6, v, a, lda, b, ldb, c, ldc, n, factor);                                                       \
  }

/* Any number of columns, 16 * vectors: in tiles as even as they can be (5 vectors are 3 + 2). */
static __attribute__((unused, noinline)) void tile(int rows, int vectors, const float *a, int64_t lda, const float *b, int64_t ldb,
                                                   float *c, int64_t ldc, int64_t n, const float *factor) {
  for (int tiles = (vectors + TILE_VECTORS - 1) / TILE_VECTORS; vectors; tiles--) {
    int v = (vectors + tiles - 1) / tiles;
#if PE_PARTS == 1
    if (v == 4) PE_TILE_ROWS(4)
    else if (v == 3) PE_TILE_ROWS(3)
    else if (v == 2) PE_TILE_ROWS(2)
    else
#endif
      PE_TILE_ROWS(1)
    vectors -= v;
    b += 16 * v;
    c += 16 * v;
  }
}

#endif

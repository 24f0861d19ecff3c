/* cells.h: what one cell of a key/value cache holds, one head of one token: plain numbers (F32, F16, BF16), or blocks of 32 as
 * csrc/quants.h draws them (Q8_0, Q4_0, Q4_1). Writing rounds as gguf-py's quantizers do, bit for bit; reading is exact but for
 * Q4_1's sum. In an array of plain numbers the elements of a cell may lie at any distance, blocks lie side by side.
 *
 * Blocks hold mixed elements, H x of a key or value x: a few channels are much larger than the rest, and would coarsen the
 * scales of their blocks. H is orthogonal, so q k = (H q)(H k), and sums of values are turned back once (Ashkboos et al. 2024,
 * arXiv:2404.00456). */
#ifndef PE_CELLS_H
#define PE_CELLS_H

#include "../quants.h"
#include "vec.h"

/* The block of a format that caches may have; no elements where none has it. Asked for every tile, so its switch is short. */
PE_INLINE pe_format cell_format_of(int32_t dtype) {
  switch (dtype) {
#define CELL(name) case PE_##name: return (pe_format){PE_BLOCK_##name, PE_BYTES_##name};
    CELL(F32) CELL(F16) CELL(BF16) CELL(Q8_0) CELL(Q4_0) CELL(Q4_1)
#undef CELL
    default: return (pe_format){0, 0};
  }
}

/* Call f(dtype) with a constant. */
#define PE_EACH_CELL_FORMAT(dtype, f)                                                                                  \
  switch (dtype) {                                                                                                     \
    case PE_F32: f(PE_F32); break;                                                                                     \
    case PE_F16: f(PE_F16); break;                                                                                     \
    case PE_BF16: f(PE_BF16); break;                                                                                   \
    case PE_Q8_0: f(PE_Q8_0); break;                                                                                   \
    case PE_Q4_0: f(PE_Q4_0); break;                                                                                   \
    default: f(PE_Q4_1);                                                                                               \
  }

/* Bytes before element i of a cell whose elements lie side by side; i is a multiple of the block. */
PE_INLINE int64_t cell_offset(int32_t dtype, int64_t i) {
  const pe_format f = cell_format_of(dtype);
  return i / f.elements * f.bytes;
}

static __attribute__((unused)) pe_status check_cells(const char *op, const char *name, const pe_tensor *t, int side_by_side,
                                                     pe_stream *s) {
  const pe_format f = cell_format_of(t->dtype);
  if (!f.elements)
    return pe_fail(s, PE_NO_KERNEL, "%s: '%s' has dtype %d; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 are possible", op, name, t->dtype);
  if (t->shape[2] % f.elements)
    return pe_fail(s, PE_BAD_SHAPE, "%s: %lld elements of '%s' are no whole blocks", op, (long long)t->shape[2], name);
  if ((side_by_side || f.elements > 1) && t->stride[2] != f.bytes)
    return pe_fail(s, PE_NO_KERNEL, "%s: the elements of '%s' do not lie side by side", op, name);
  return PE_OK;
}

PE_INLINE int in_blocks(const pe_tensor *t) { return cell_format_of(t->dtype).elements > 1; }

/* ---- mixing ---- */

static const float SIGNS[16][16] = { /* Hadamard's matrix of 16 */
    { 1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1,  1},
    { 1, -1,  1, -1,  1, -1,  1, -1,  1, -1,  1, -1,  1, -1,  1, -1},
    { 1,  1, -1, -1,  1,  1, -1, -1,  1,  1, -1, -1,  1,  1, -1, -1},
    { 1, -1, -1,  1,  1, -1, -1,  1,  1, -1, -1,  1,  1, -1, -1,  1},
    { 1,  1,  1,  1, -1, -1, -1, -1,  1,  1,  1,  1, -1, -1, -1, -1},
    { 1, -1,  1, -1, -1,  1, -1,  1,  1, -1,  1, -1, -1,  1, -1,  1},
    { 1,  1, -1, -1, -1, -1,  1,  1,  1,  1, -1, -1, -1, -1,  1,  1},
    { 1, -1, -1,  1, -1,  1,  1, -1,  1, -1, -1,  1, -1,  1,  1, -1},
    { 1,  1,  1,  1,  1,  1,  1,  1, -1, -1, -1, -1, -1, -1, -1, -1},
    { 1, -1,  1, -1,  1, -1,  1, -1, -1,  1, -1,  1, -1,  1, -1,  1},
    { 1,  1, -1, -1,  1,  1, -1, -1, -1, -1,  1,  1, -1, -1,  1,  1},
    { 1, -1, -1,  1,  1, -1, -1,  1, -1,  1,  1, -1, -1,  1,  1, -1},
    { 1,  1,  1,  1, -1, -1, -1, -1, -1, -1, -1, -1,  1,  1,  1,  1},
    { 1, -1,  1, -1, -1,  1, -1,  1, -1,  1, -1,  1,  1, -1,  1, -1},
    { 1,  1, -1, -1, -1, -1,  1,  1, -1, -1,  1,  1,  1,  1, -1, -1},
    { 1, -1, -1,  1, -1,  1,  1, -1, -1,  1,  1, -1,  1, -1, -1,  1},
};

/* x = H x, n elements, a multiple of 32. H: for each run of s elements, the largest power of two that divides n, Sylvester's
 * Hadamard matrix over sqrt(s), which is its own inverse. Within 16 elements it is a product, j ascending; beyond, butterflies. */
static __attribute__((unused)) void mix(float *x, int64_t n) {
  const int64_t s = n & -n;
  const v16f shrink = v16f_set1((float)(1.0 / __builtin_sqrt((double)s)));
  for (int64_t i = 0; i < n; i += 16) {
    v16f y = v16f_zero();
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) y = v16f_fma(v16f_set1(x[i + j]), v16f_load(SIGNS[j]), y);
    v16f_store(x + i, y);
  }
  for (int64_t h = 16; h < s; h *= 2)
    for (int64_t i = 0; i < n; i += 2 * h)
      for (int64_t j = i; j < i + h; j += 16) {
        const v16f a = v16f_load(x + j), b = v16f_load(x + j + h);
        v16f_store(x + j, v16f_add(a, b));
        v16f_store(x + j + h, v16f_sub(a, b));
      }
  for (int64_t i = 0; i < n; i += 16) v16f_store(x + i, v16f_mul(v16f_load(x + i), shrink));
}

/* ---- writing ---- */

/* To the nearest integer, halves away from zero; |x| < 2^22. */
PE_INLINE v16i round_away(v16f x) {
  v16f a = v16f_abs(x), n = v16i_to_f(v16f_to_i(a));
  n = v16f_select_lt(v16f_sub(a, n), v16f_set1(0.5f), n, v16f_add(n, v16f_set1(1.0f))); /* a tie that went down to an even n */
  return v16f_to_i(v16f_copysign(n, x));
}

/* The integer part of 0 <= x < 2^22, at most 15. */
PE_INLINE v16i nibbles_of(v16f x) {
  v16f n = v16i_to_f(v16f_to_i(x));
  n = v16f_select_lt(x, n, v16f_sub(n, v16f_set1(1.0f)), n);
  return v16f_to_i(v16f_min(n, v16f_set1(15.0f)));
}

PE_INLINE void store_nibbles(uint8_t *p, v16i low, v16i high) {
  v16i x = v16i_or(low, v16i_shl(high, 4));
  v16i_store_i8(p, v16i_shr(v16i_shl(x, 24), 24)); /* as signed bytes, which the store takes */
}

PE_INLINE void store_half(uint8_t *p, float x) { v16f_store_f16_n(p, v16f_set1(x), 1); }
PE_INLINE float inverse(float d) { return d != 0 ? 1.0f / d : 0.0f; }

/* d = max |x| / 127, codes x / d. */
static __attribute__((unused)) void store_q8_0(uint8_t *block, const float *x) {
  v16f a = v16f_load(x), b = v16f_load(x + 16);
  const float d = v16f_hmax(v16f_max(v16f_abs(a), v16f_abs(b))) / 127.0f;
  const v16f inv = v16f_set1(inverse(d));
  store_half(block, d);
  v16i_store_i8(block + 2, round_away(v16f_mul(a, inv)));
  v16i_store_i8(block + 18, round_away(v16f_mul(b, inv)));
}

/* d = the first x with the largest |x|, over -8: that one becomes 0, which stands for -8. Codes are x / d + 8.5 cut to an integer,
 * rounded once to float as gguf-py does (through double, so that it is the same without fma). */
static __attribute__((unused)) void store_q4_0(uint8_t *block, const float *x) {
  v16f a = v16f_load(x), b = v16f_load(x + 16);
  const float most = v16f_hmax(v16f_max(a, b)), least = v16f_hmax(v16f_max(v16f_neg(a), v16f_neg(b)));
  float top = most > least ? most : -least, y[32];
  for (int i = 0; most == least && i < 32; i++)
    if (__builtin_fabsf(x[i]) == most) {
      top = x[i];
      break;
    }
  const float d = top / -8.0f, inv = inverse(d);
  for (int i = 0; i < 32; i++) y[i] = (float)((double)x[i] * (double)inv + 8.5);
  store_half(block, d);
  store_nibbles(block + 2, nibbles_of(v16f_load(y)), nibbles_of(v16f_load(y + 16)));
}

/* m = min x, d = (max x - m) / 15, codes (x - m) / d + 0.5 cut to an integer. */
static __attribute__((unused)) void store_q4_1(uint8_t *block, const float *x) {
  v16f a = v16f_load(x), b = v16f_load(x + 16);
  const float m = -v16f_hmax(v16f_max(v16f_neg(a), v16f_neg(b))), d = (v16f_hmax(v16f_max(a, b)) - m) / 15.0f;
  const v16f inv = v16f_set1(inverse(d)), least = v16f_set1(m), half = v16f_set1(0.5f);
  store_half(block, d);
  store_half(block + 2, m);
  store_nibbles(block + 4, nibbles_of(v16f_add(v16f_mul(v16f_sub(a, least), inv), half)),
                nibbles_of(v16f_add(v16f_mul(v16f_sub(b, least), inv), half)));
}

/* Write n elements into a cell where they lie side by side. */
static __attribute__((unused)) void store_cell(char *cell, int32_t dtype, const float *x, int64_t n) {
  uint8_t *p = (uint8_t *)cell;
  switch (dtype) {
    case PE_F32: memcpy(p, x, (size_t)n * 4); break;
    case PE_F16:
      for (int64_t i = 0; i < n; i += 16) {
        if (n - i >= 16) v16f_store_f16(p + 2 * i, v16f_load(x + i));
        else v16f_store_f16_n(p + 2 * i, v16f_load_n(x + i, n - i), n - i);
      }
      break;
    case PE_BF16:
      for (int64_t i = 0; i < n; i += 16) {
        if (n - i >= 16) v16f_store_bf16(p + 2 * i, v16f_load(x + i));
        else v16f_store_bf16_n(p + 2 * i, v16f_load_n(x + i, n - i), n - i);
      }
      break;
    case PE_Q8_0:
      for (int64_t i = 0; i < n; i += 32, p += PE_BYTES_Q8_0) store_q8_0(p, x + i);
      break;
    case PE_Q4_0:
      for (int64_t i = 0; i < n; i += 32, p += PE_BYTES_Q4_0) store_q4_0(p, x + i);
      break;
    default:
      for (int64_t i = 0; i < n; i += 32, p += PE_BYTES_Q4_1) store_q4_1(p, x + i);
  }
}

/* ---- reading ---- */

PE_INLINE float half_to_float(const void *p) {
  uint16_t h;
  memcpy(&h, p, 2);
#if defined(PE_AVX512) || defined(PE_AVX2)
  return _cvtsh_ss(h);
#else
  return pe_f16_to_f32(h);
#endif
}

/* Elements i .. i + 15 of a cell whose elements lie side by side; i is a multiple of 16 in blocks. */
PE_INLINE v16f load_cell(const int dtype, const char *cell, int64_t i) {
  if (dtype == PE_F32) return v16f_load((const float *)cell + i);
  if (dtype == PE_F16) return v16f_load_f16(cell + 2 * i);
  if (dtype == PE_BF16) return v16f_load_bf16(cell + 2 * i);
  const char *block = cell + cell_offset(dtype, i / 32 * 32);
  const v16f d = v16f_set1(half_to_float(block));
  if (dtype == PE_Q8_0) return v16f_mul(v16i_to_f(v16i_load_i8(block + 2 + i % 32)), d);
  const v16i pair = v16i_load_i8(block + (dtype == PE_Q4_0 ? 2 : 4)), low = v16i_set1(15);
#if defined(PE_AVX512) /* the sixteen values in a register, picked by the low 4 bits of each lane */
  const v16i lane = {(pe_pi)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  const v16f values = dtype == PE_Q4_0 ? v16f_mul(v16i_to_f(v16i_sub(lane, v16i_set1(8))), d)
                                       : v16f_fma(v16i_to_f(lane), d, v16f_set1(half_to_float(block + 2)));
  (void)low;
  return (v16f){(pe_pf)_mm512_permutexvar_ps((__m512i)(i % 32 ? v16i_shr(pair, 4) : pair).a, (__m512)values.a)};
#else
  const v16i code = v16i_and(i % 32 ? v16i_shr(pair, 4) : pair, low);
  if (dtype == PE_Q4_0) return v16f_mul(v16i_to_f(v16i_sub(code, v16i_set1(8))), d);
  return v16f_fma(v16i_to_f(code), d, v16f_set1(half_to_float(block + 2))); /* code * d is exact */
#endif
}

/* The same for n <= 16 elements at any distance; the other lanes are 0. */
PE_INLINE v16f load_cell_n(const int dtype, const char *cell, int64_t stride, int64_t i, int64_t n) {
  const pe_format form = cell_format_of(dtype);
  float t[16] = {0};
  if (form.elements > 1) return load_cell(dtype, cell, i); /* whole blocks side by side: checked before */
  if (dtype == PE_F32 && stride == 4) return v16f_load_n((const float *)cell + i, n);
  if (dtype == PE_F16 && stride == 2) return v16f_load_f16_n(cell + 2 * i, n);
  if (dtype == PE_BF16 && stride == 2) return v16f_load_bf16_n(cell + 2 * i, n);
  for (int64_t j = 0; j < n; j++) {
    const char *p = cell + (i + j) * stride;
    if (dtype == PE_F32) memcpy(&t[j], p, 4);
    else if (dtype == PE_F16) t[j] = half_to_float(p);
    else {
      uint16_t h;
      memcpy(&h, p, 2);
      t[j] = pe_bf16_to_f32(h);
    }
  }
  return v16f_load(t);
}

#endif

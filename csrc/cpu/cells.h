/* cells.h: what one cell of a key/value cache holds, one head of one token: plain numbers (F32, F16, BF16), or blocks of 32 as
 * csrc/quants.h draws them (Q8_0, Q4_0, Q4_1, Q2_1). Writing rounds as gguf-py's quantizers do, bit for bit, but for Q2_1, whose scale
 * is searched for; reading is exact but for the sums of Q4_1 and Q2_1. In an array of plain numbers the elements of a cell may lie at any distance, blocks lie side by side.
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
    CELL(F32) CELL(F16) CELL(BF16) CELL(Q8_0) CELL(Q4_0) CELL(Q4_1) CELL(Q2_1)
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
    case PE_Q2_1: f(PE_Q2_1); break;                                                                                   \
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
    return pe_fail(s, PE_NO_KERNEL, "%s: '%s' has dtype %d; F32, F16, BF16, Q8_0, Q4_0, Q4_1 and Q2_1 are possible", op, name, t->dtype);
  if (t->shape[2] % f.elements)
    return pe_fail(s, PE_BAD_SHAPE, "%s: %lld elements of '%s' are no whole blocks", op, (long long)t->shape[2], name);
  if ((side_by_side || f.elements > 1) && t->stride[2] != f.bytes)
    return pe_fail(s, PE_NO_KERNEL, "%s: the elements of '%s' do not lie side by side", op, name);
  return PE_OK;
}

/* The format of a channel's blocks where keys are quantized by channel, in groups of GROUP_KEYS cells; PE_F32 where they are not. */
enum { GROUP_KEYS = 32 };
PE_INLINE int32_t channel_format(int32_t dtype) {
  return dtype == PE_Q4_1_CHANNELS ? PE_Q4_1 : dtype == PE_Q2_1_CHANNELS ? PE_Q2_1 : PE_F32;
}

static __attribute__((unused)) pe_status check_channels(const char *op, const char *name, const pe_tensor *t, pe_stream *s) {
  const int64_t bytes = cell_format_of(channel_format(t->dtype)).bytes;
  if (t->shape[2] % 32 || t->shape[1] % GROUP_KEYS || t->stride[2] != bytes || t->stride[1] != t->shape[2] / 32 * bytes)
    return pe_fail(s, PE_BAD_SHAPE, "%s: '%s' is no groups of %d cells, which lie side by side, of %lld elements", op, name, GROUP_KEYS,
                   (long long)t->shape[2]);
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

PE_INLINE float half_to_float(const void *p) {
  uint16_t h;
  memcpy(&h, p, 2);
#if defined(PE_AVX512) || defined(PE_AVX2)
  return _cvtsh_ss(h);
#else
  return pe_f16_to_f32(h);
#endif
}

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

/* Round to a half and back. */
PE_INLINE float half_of(float x) {
#if defined(PE_AVX512) || defined(PE_AVX2)
  return _cvtsh_ss(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint8_t h[2];
  store_half(h, x);
  return half_to_float(h);
#endif
}

/* Of 2 bits a code, m and d decide much, so they are searched for: from the range, and from 3/4 of it, the codes that are nearest, and twice
 * the line through the elements by least squares. What gives the least sum of squares stays. No fma: all machines write the same bytes. */
static __attribute__((unused)) void store_q2_1(uint8_t *block, const float *x) {
  const v16f a = v16f_load(x), b = v16f_load(x + 16), zero = v16f_zero(), half = v16f_set1(0.5f), most = v16f_set1(3.0f);
  const float low = -v16f_hmax(v16f_max(v16f_neg(a), v16f_neg(b))), high = v16f_hmax(v16f_max(a, b));
  const float middle = (low + high) * 0.5f, mean = v16f_sum(v16f_add(a, b)) * (1.0f / 32);
  float best = __builtin_inff();
  int32_t code[32];
  for (int from = 0; from < 2; from++) {
    float reach = (high - low) * (from ? 0.375f : 0.5f), m = middle - reach, d = reach * (2.0f / 3);
    for (int i = 0; i < 3; i++) {
      const float dh = half_of(d), mh = half_of(m);
      const v16f inv = v16f_set1(inverse(dh)), scale = v16f_set1(dh), least = v16f_set1(mh);
      v16f q[2], error = zero;
      for (int h = 0; h < 2; h++) {
        const v16f z = h ? b : a, u = v16f_max(v16f_add(v16f_mul(v16f_sub(z, least), inv), half), zero);
        const v16f n = v16i_to_f(v16f_to_i(v16f_min(u, most)));
        q[h] = v16f_select_lt(v16f_min(u, most), n, v16f_sub(n, v16f_set1(1.0f)), n);
        const v16f off = v16f_sub(v16f_add(v16f_mul(q[h], scale), least), z);
        error = v16f_add(error, v16f_mul(off, off));
      }
      const float sum = v16f_sum(error);
      if (!(sum >= best)) { /* so too where it is no number */
        best = sum;
        store_half(block, dh);
        store_half(block + 2, mh);
        v16i_store(code, v16f_to_i(q[0]));
        v16i_store(code + 16, v16f_to_i(q[1]));
      }
      const v16f centre = v16f_set1(v16f_sum(v16f_add(q[0], q[1])) * (1.0f / 32)), p = v16f_sub(q[0], centre), r = v16f_sub(q[1], centre);
      const float spread = v16f_sum(v16f_add(v16f_mul(p, p), v16f_mul(r, r)));
      if (!(spread > 0)) break;
      d = v16f_sum(v16f_add(v16f_mul(p, v16f_sub(a, v16f_set1(mean))), v16f_mul(r, v16f_sub(b, v16f_set1(mean))))) / spread;
      m = mean - d * v16f_sum(v16f_add(q[0], q[1])) * (1.0f / 32);
    }
  }
  for (int h = 0; h < 2; h++) {
    uint32_t word = 0;
    for (int i = 0; i < 16; i++) word |= (uint32_t)code[16 * h + i] << 2 * i;
    memcpy(block + 4 + 4 * h, &word, 4);
  }
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
    case PE_Q2_1:
      for (int64_t i = 0; i < n; i += 32, p += PE_BYTES_Q2_1) store_q2_1(p, x + i);
      break;
    default:
      for (int64_t i = 0; i < n; i += 32, p += PE_BYTES_Q4_1) store_q4_1(p, x + i);
  }
}

/* ---- reading ---- */

/* Codes 16 half .. of a block of Q4_0, Q4_1 or Q2_1 as numbers. */
PE_INLINE v16i block_codes(const int dtype, const char *block, int half) {
  if (dtype == PE_Q2_1) {
    static const int32_t PLACE[16] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    uint32_t word;
    memcpy(&word, block + 4 + 4 * half, 4);
    return v16i_shru_each(v16i_set1((int32_t)word), v16i_load(PLACE)); /* of which the lowest 2 bits count */
  }
  const v16i pair = v16i_load_i8(block + (dtype == PE_Q4_0 ? 2 : 4));
  return half ? v16i_shr(pair, 4) : pair;                             /* the lowest 4 bits */
}

#if defined(PE_AVX512) /* the values of a block by the low 4 bits of each lane's index: codes need no mask */
typedef struct { __m512 a; } block_values;
PE_INLINE block_values values_of(const int dtype, v16f d, v16f m) {
  const v16i lane = {(pe_pi)_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  if (dtype == PE_Q4_0) return (block_values){(__m512)v16f_mul(v16i_to_f(v16i_sub(lane, v16i_set1(8))), d).a};
  return (block_values){(__m512)v16f_fma(v16i_to_f(dtype == PE_Q2_1 ? v16i_and(lane, v16i_set1(3)) : lane), d, m).a};
}
PE_INLINE v16f value_of(const int dtype, block_values t, v16i code) {
  (void)dtype;
  return (v16f){(pe_pf)_mm512_permutexvar_ps((__m512i)code.a, t.a)};
}
#else
typedef struct { v16f d, m; } block_values;
PE_INLINE block_values values_of(const int dtype, v16f d, v16f m) { (void)dtype; return (block_values){d, m}; }
PE_INLINE v16f value_of(const int dtype, block_values t, v16i code) {
  const v16i c = v16i_and(code, v16i_set1(dtype == PE_Q2_1 ? 3 : 15));
  if (dtype == PE_Q4_0) return v16f_mul(v16i_to_f(v16i_sub(c, v16i_set1(8))), t.d);
  return v16f_fma(v16i_to_f(c), t.d, t.m); /* code * d is exact */
}
#endif

/* Elements i .. i + 15 of a cell whose elements lie side by side; i is a multiple of 16 in blocks. */
PE_INLINE v16f load_cell(const int dtype, const char *cell, int64_t i) {
  if (dtype == PE_F32) return v16f_load((const float *)cell + i);
  if (dtype == PE_F16) return v16f_load_f16(cell + 2 * i);
  if (dtype == PE_BF16) return v16f_load_bf16(cell + 2 * i);
  const char *block = cell + cell_offset(dtype, i / 32 * 32);
  const v16f d = v16f_set1(half_to_float(block));
  if (dtype == PE_Q8_0) return v16f_mul(v16i_to_f(v16i_load_i8(block + 2 + i % 32)), d);
  const v16f m = dtype == PE_Q4_0 ? v16f_zero() : v16f_set1(half_to_float(block + 2));
  return value_of(dtype, values_of(dtype, d, m), block_codes(dtype, block, (int)(i % 32 / 16)));
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

/* store_cells.h: what one cell of a key/value cache holds, written by a simdgroup. Formats, rounding and mixing are those of
 * csrc/cpu/cells.h, bit for bit: gguf-py's quantizers; blocks hold H x instead of x (Sylvester's Hadamard matrix, arXiv:2404.00456).
 */
#ifndef PE_METAL_STORE_CELLS_H
#define PE_METAL_STORE_CELLS_H

#include "cells.h"

/* x = H x for n elements (a multiple of 32) in threadgroup memory, with room for n more at y; returns where the result is. H: for each run
 * of `run` elements, the largest power of two that divides n, a Hadamard matrix over sqrt(run), whose inverse is `shrink`. A product within
 * 16 elements, j ascending, then butterflies. All lanes of a simdgroup take part. */
static inline threadgroup float *mixed(threadgroup float *x, threadgroup float *y, int n, int run, float shrink, int lane) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = lane; i < n; i += 32) {
    threadgroup const float *from = x + (i & ~15);
    float sum = 0.0f;
    for (int j = 0; j < 16; j++) sum += popcount((uint)(i & j & 15)) & 1u ? -from[j] : from[j];
    y[i] = sum;
  }
  for (int h = 16; h < run; h *= 2) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int p = lane; p < n / 2; p += 32) {
      const int j = p / h * 2 * h + p % h;
      const float a = y[j], b = y[j + h];
      y[j] = a + b;
      y[j + h] = a - b;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = lane; i < n; i += 32) y[i] *= shrink;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  return y;
}

static inline ushort bf16_of(float x) {
  const uint u = as_type<uint>(x);
  if (isnan(x)) return (ushort)(u >> 16 | 0x40u);
  return (ushort)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

/* To the nearest integer, halves away from zero. */
static inline int round_away(float x) {
  const float a = fabs(x), n = floor(a);
  const float r = a - n < 0.5f ? n : n + 1.0f;
  return (int)(x < 0.0f ? -r : r);
}

/* In the order of v16f_sum of csrc/cpu/simd.h, of the sums of elements i and i + 16. */
static inline float lanes_sum(float x) {
  for (ushort apart = 16; apart > 0; apart /= 2) x += simd_shuffle_xor(x, apart);
  return x;
}

static inline float inverse_of(float d) { return d != 0.0f ? 1.0f / d : 0.0f; }

static inline void store_nibbles(device uchar *to, int code, int lane) {
  const int high = simd_shuffle(code, (ushort)((lane + 16) & 31));
  if (lane < 16) to[lane] = (uchar)(code | high << 4);
}

/* d = max |x| / 127, codes x / d */
static inline void store_q8_0(device uchar *to, float x, int lane) {
  const float d = simd_max(fabs(x)) / 127.0f;
  if (lane == 0) *(device half *)to = (half)d;
  to[2 + lane] = (uchar)round_away(x * inverse_of(d));
}

/* d = the first x with the largest |x|, over -8; codes x / d + 8.5 cut to an integer */
static inline void store_q4_0(device uchar *to, float x, int lane) {
  const float most = simd_max(x), least = simd_max(-x);
  float top = most > least ? most : -least;
  if (most == least) { /* both signs have it: the first lane's */
    const ulong equal = (ulong)simd_ballot(fabs(x) == most);
    top = simd_shuffle(x, (ushort)(equal ? ctz((uint)equal) : 0u));
  }
  const float d = top / -8.0f, y = fma(x, inverse_of(d), 8.5f);
  if (lane == 0) *(device half *)to = (half)d;
  store_nibbles(to + 2, min(15, (int)y), lane);
}

/* m = min x, d = (max x - m) / 15, codes (x - m) / d + 0.5 cut to an integer */
static inline void store_q4_1(device uchar *to, float x, int lane) {
  const float m = -simd_max(-x), d = (simd_max(x) - m) / 15.0f;
  const float scaled = (x - m) * inverse_of(d);
  if (lane == 0) {
    *(device half *)to = (half)d;
    *(device half *)(to + 2) = (half)m;
  }
  store_nibbles(to + 4, min(15, (int)(scaled + 0.5f)), lane);
}

/* m and d are searched for: what csrc/cpu/cells.h (store_q2_1) does, operation by operation */
static inline void store_q2_1(device uchar *to, float x, int lane) {
  const float low = -simd_max(-x), high = simd_max(x), middle = (low + high) * 0.5f, mean = lanes_sum(x) * (1.0f / 32);
  float best = INFINITY, scale = 0.0f, least = 0.0f;
  uint code = 0;
  for (int from = 0; from < 2; from++) {
    const float reach = (high - low) * (from ? 0.375f : 0.5f);
    float m = middle - reach, d = reach * (2.0f / 3);
    for (int i = 0; i < 3; i++) {
      const float dh = (float)(half)d, mh = (float)(half)m;
      const float q = floor(min(max((x - mh) * inverse_of(dh) + 0.5f, 0.0f), 3.0f)), off = q * dh + mh - x;
      const float sum = lanes_sum(off * off), all = lanes_sum(q), p = q - all * (1.0f / 32), spread = lanes_sum(p * p);
      if (!(sum >= best)) best = sum, scale = dh, least = mh, code = (uint)q; /* so too where it is no number */
      if (!(spread > 0.0f)) break;
      d = lanes_sum(p * (x - mean)) / spread;
      m = mean - d * all * (1.0f / 32);
    }
  }
  code <<= 2 * (lane % 16);
  for (ushort apart = 8; apart > 0; apart /= 2) code |= simd_shuffle_xor(code, apart);
  if (lane % 16 == 0) {
    *(device ushort *)(to + 4 + lane / 4) = (ushort)code;
    *(device ushort *)(to + 6 + lane / 4) = (ushort)(code >> 16);
  }
  if (lane == 0) {
    *(device half *)to = (half)scale;
    *(device half *)(to + 2) = (half)least;
  }
}

/* n elements of x in threadgroup memory -> a cell whose elements lie side by side. Blocks: n is a multiple of 32. */
static inline void store_cell(int format, device uchar *cell, threadgroup const float *x, int n, int lane) {
  for (int i = lane; i < (n + 31) / 32 * 32; i += 32) { /* in blocks all lanes go on together */
    const int block = i / 32;
    switch (format) {
      case PE_F32: if (i < n) ((device float *)cell)[i] = x[i]; break;
      case PE_F16: if (i < n) ((device half *)cell)[i] = (half)x[i]; break;
      case PE_BF16: if (i < n) ((device ushort *)cell)[i] = bf16_of(x[i]); break;
      case PE_Q8_0: store_q8_0(cell + block * PE_BYTES_Q8_0, x[i], lane); break;
      case PE_Q4_0: store_q4_0(cell + block * PE_BYTES_Q4_0, x[i], lane); break;
      case PE_Q2_1: store_q2_1(cell + block * PE_BYTES_Q2_1, x[i], lane); break;
      default: store_q4_1(cell + block * PE_BYTES_Q4_1, x[i], lane);
    }
  }
}


#endif

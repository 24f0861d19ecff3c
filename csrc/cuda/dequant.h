/* dequant.h: weights in the file's layout as floats, bit for bit as host/dequant.c computes them, eight elements a call.
 *
 *   pe::file_block<PE_Q4_K>::get8(block, i, books, y)      y[0..7] = elements i .. i + 7 of the block, i a multiple of 8
 *
 * csrc/quants.h draws the blocks. Eight elements share a scale in every format, and are two words of codes, or one row of a codebook
 * (IQ3: two). Neighbouring threads that take neighbouring eights read neighbouring bytes. A block has the alignment of its size (18
 * bytes: 2), so words come in pieces of 4, 2 or 1 bytes. Products and sums are rounded one by one, in dequant.c's order.
 */
#ifndef PE_CUDA_DEQUANT_H
#define PE_CUDA_DEQUANT_H

#include "cuda.h"
#include "../quants.h"

/* The codebooks of IQ1 to IQ3, in global memory: lanes of a warp look up different rows, which constant memory would serve one by
 * one. As many rows as an index has values. */
typedef struct pe_codebooks {
  int8_t iq2_xxs[256][8], iq2_xs[512][8], iq2_s[1024][8];
  int8_t iq3_xxs[256][4], iq3_s[512][4];
  int8_t iq1[2048][8];
} pe_codebooks;

namespace pe {

/* ---- loads ---- */

__device__ __forceinline__ uint32_t read_u16(const void *p) { return *(const uint16_t *)p; }

/* Four bytes of a block whose size is a multiple of ALIGN. */
template <int ALIGN>
__device__ __forceinline__ uint32_t read_word(const uint8_t *p) {
  if constexpr (ALIGN % 4 == 0) return *(const uint32_t *)p;
  else if constexpr (ALIGN % 2 == 0) return read_u16(p) | read_u16(p + 2) << 16;
  else return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

__device__ __forceinline__ float half_from_bits(uint32_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half((unsigned short)h));
#else
  return pe_f16_to_f32((uint16_t)h);
#endif
}

__device__ __forceinline__ float read_half(const void *p) { return half_from_bits(read_u16(p)); }

/* Byte j of two words. */
__device__ __forceinline__ int byte_of(const uint32_t w[2], int j) { return w[j / 4] >> (8 * (j % 4)) & 255u; }

/* ---- what formats share ---- */

/* y[j] = scale * (code j - zero) */
__device__ __forceinline__ void put_scaled(float *y, float scale, const uint32_t codes[2], int zero) {
#pragma unroll
  for (int j = 0; j < 8; j++) y[j] = __fmul_rn(scale, (float)(byte_of(codes, j) - zero));
}

/* y[j] = scale * code j + offset */
__device__ __forceinline__ void put_shifted(float *y, float scale, const uint32_t codes[2], float offset) {
#pragma unroll
  for (int j = 0; j < 8; j++) y[j] = __fadd_rn(__fmul_rn(scale, (float)byte_of(codes, j)), offset);
}

/* Eight nibbles from eight bytes, the low or the high ones. */
template <int ALIGN>
__device__ __forceinline__ void read_nibbles(const uint8_t *p, int high, uint32_t codes[2]) {
#pragma unroll
  for (int k = 0; k < 2; k++) codes[k] = read_word<ALIGN>(p + 4 * k) >> (4 * high) & 0x0f0f0f0fu;
}

/* Add bit j of `bits` to code j, at bit `to`. */
__device__ __forceinline__ void or_bits(uint32_t codes[2], uint32_t bits, int to) {
#pragma unroll
  for (int j = 0; j < 8; j++) codes[j / 4] |= (bits >> j & 1u) << (8 * (j % 4) + to);
}

/* Level number `code` of the sixteen of IQ4_NL and of E2M1 (doubled): a word of four levels by the code's high bits, then a byte. */
__device__ __forceinline__ int level_iq4(int code) {
  const uint32_t w = code & 8 ? (code & 4 ? 0x71594535u : 0x26190d01u) : (code & 4 ? 0xf6eaddcfu : 0xbfad9881u);
  return (int8_t)(w >> (8 * (code & 3)));
}
__device__ __forceinline__ int level_e2m1(int code) {
  const int magnitude = (code & 4 ? 0x0c080604u : 0x03020100u) >> (8 * (code & 3)) & 255u;
  return code & 8 ? -magnitude : magnitude;
}
__device__ __forceinline__ void put_levels_iq4(float *y, float scale, const uint32_t codes[2]) {
#pragma unroll
  for (int j = 0; j < 8; j++) y[j] = __fmul_rn(scale, (float)level_iq4(byte_of(codes, j)));
}
__device__ __forceinline__ void put_levels_e2m1(float *y, float scale, const uint32_t codes[2]) {
#pragma unroll
  for (int j = 0; j < 8; j++) y[j] = __fmul_rn(scale, (float)level_e2m1(byte_of(codes, j)));
}

/* Eight two-bit codes, elements i .. i + 7 of 256 in the order that block_q2_K draws. */
template <int ALIGN>
__device__ __forceinline__ void read_pairs(const uint8_t *qs, int i, uint32_t codes[2]) {
#pragma unroll
  for (int k = 0; k < 2; k++)
    codes[k] = read_word<ALIGN>(qs + i / 128 * 32 + i % 32 + 4 * k) >> (i % 128 / 32 * 2) & 0x03030303u;
}

/* Scale and minimum number j of 8 in the twelve bytes of block_q4_K and block_q5_K. */
__device__ __forceinline__ void read_scale_min(const uint8_t *s, int j, float *scale, float *min) {
  const int low = j < 4;
  const uint32_t a = s[low ? j : j + 4], b = s[low ? j + 4 : j], c = s[low ? j : j - 4];
  *scale = (float)(int)(low ? a & 63u : (a & 15u) | (c >> 6) << 4);
  *min = (float)(int)(low ? b & 63u : a >> 4 | (b >> 6) << 4);
}

/* ---- codebooks ---- */

/* Seven stored sign bits and the eighth, which makes the number of minus signs even. */
__device__ __forceinline__ uint32_t even_signs(uint32_t seven) { return seven | (uint32_t)(__popc(seven) & 1) << 7; }

/* y[j] = scale * grid[j], negated where bit j of signs is set; N elements of one row. */
template <int N>
__device__ __forceinline__ void put_signed(float *y, float scale, const int8_t *grid, uint32_t signs) {
#pragma unroll
  for (int j = 0; j < N; j++) {
    const int8_t g = (int8_t)(*(const uint32_t *)(grid + j / 4 * 4) >> (8 * (j % 4)));
    const float v = __fmul_rn(scale, (float)g);
    y[j] = signs >> j & 1u ? -v : v;
  }
}

__device__ __forceinline__ void put_iq1(float *y, float scale, const pe_codebooks *books, uint32_t index, uint32_t minus) {
  const float delta = minus ? -0.125f : 0.125f;
  const uint32_t *row = (const uint32_t *)books->iq1[index];
#pragma unroll
  for (int j = 0; j < 8; j++)
    y[j] = __fmul_rn(scale, __fadd_rn((float)(int8_t)(row[j / 4] >> (8 * (j % 4))), delta));
}

/* d * (0.5 + q) * k, in dequant.c's order. */
__device__ __forceinline__ float iq_scale(float d, uint32_t q, float k) {
  return __fmul_rn(__fmul_rn(d, __fadd_rn(0.5f, (float)(int)q)), k);
}

/* ---- the formats ---- */

#define PE_FILE_BLOCK(name)                                                                                                  \
  template <>                                                                                                                \
  struct file_block<PE_##name> {                                                                                             \
    static constexpr int elements = PE_BLOCK_##name, bytes = PE_BYTES_##name;                                                \
    __device__ __forceinline__ static void get8(const uint8_t *p, int i, const pe_codebooks *books, float *y) {              \
      (void)books;
#define PE_FILE_BLOCK_END                                                                                                    \
    }                                                                                                                        \
  };

template <int FORMAT>
struct file_block { static constexpr int elements = 0, bytes = 0; };

PE_FILE_BLOCK(Q4_0) {
  uint32_t codes[2];
  read_nibbles<2>(p + 2 + i % 16, i / 16, codes);
  put_scaled(y, read_half(p), codes, 8);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q4_1) {
  uint32_t codes[2];
  read_nibbles<4>(p + 4 + i % 16, i / 16, codes);
  put_shifted(y, read_half(p), codes, read_half(p + 2));
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q5_0) {
  uint32_t codes[2];
  read_nibbles<2>(p + 6 + i % 16, i / 16, codes);
  or_bits(codes, p[2 + i / 8], 4);
  put_scaled(y, read_half(p), codes, 16);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q5_1) {
  uint32_t codes[2];
  read_nibbles<4>(p + 8 + i % 16, i / 16, codes);
  or_bits(codes, p[4 + i / 8], 4);
  put_shifted(y, read_half(p), codes, read_half(p + 2));
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q8_0) {
  const float d = read_half(p);
  const uint32_t codes[2] = {read_word<2>(p + 2 + i), read_word<2>(p + 6 + i)};
#pragma unroll
  for (int j = 0; j < 8; j++) y[j] = __fmul_rn((float)(int8_t)byte_of(codes, j), d);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ4_NL) {
  uint32_t codes[2];
  read_nibbles<2>(p + 2 + i % 16, i / 16, codes);
  put_levels_iq4(y, read_half(p), codes);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(MXFP4) {
  uint32_t codes[2];
  read_nibbles<1>(p + 1 + i % 16, i / 16, codes);
  put_levels_e2m1(y, pe_e8m0_half_to_f32(p[0]), codes);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(NVFP4) {
  uint32_t codes[2];
  read_nibbles<4>(p + 4 + 8 * (i / 16), i / 8 % 2, codes);
  put_levels_e2m1(y, pe_e4m3_half_to_f32(p[i / 16]), codes);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q2_K) {
  uint32_t codes[2];
  read_pairs<4>(p + 16, i, codes);
  const uint32_t s = p[i / 16];
  const float scale = __fmul_rn(read_half(p + 80), (float)(int)(s & 15u)), min = __fmul_rn(read_half(p + 82), (float)(int)(s >> 4));
  put_shifted(y, scale, codes, -min);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q3_K) {
  const int n = i / 16;
  const uint32_t low = p[96 + n % 8] >> (n / 8 * 4) & 15u, high = p[104 + n % 4] >> (n / 4 * 2) & 3u;
  const float scale = __fmul_rn(read_half(p + 108), (float)((int)(low | high << 4) - 32));
  uint32_t codes[2];
  read_pairs<2>(p + 32, i, codes);
#pragma unroll
  for (int k = 0; k < 2; k++) codes[k] |= (read_word<2>(p + i % 32 + 4 * k) >> (i / 32) & 0x01010101u) << 2;
  put_scaled(y, scale, codes, 4);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q4_K) {
  float scale, min;
  uint32_t codes[2];
  read_scale_min(p + 4, i / 32, &scale, &min);
  read_nibbles<4>(p + 16 + i / 64 * 32 + i % 32, i / 32 % 2, codes);
  put_shifted(y, __fmul_rn(read_half(p), scale), codes, -__fmul_rn(read_half(p + 2), min));
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q5_K) {
  float scale, min;
  uint32_t codes[2];
  read_scale_min(p + 4, i / 32, &scale, &min);
  read_nibbles<4>(p + 48 + i / 64 * 32 + i % 32, i / 32 % 2, codes);
#pragma unroll
  for (int k = 0; k < 2; k++) codes[k] |= (read_word<4>(p + 16 + i % 32 + 4 * k) >> (i / 32) & 0x01010101u) << 4;
  put_shifted(y, __fmul_rn(read_half(p), scale), codes, -__fmul_rn(read_half(p + 2), min));
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(Q6_K) {
  const int half = i / 128, r = i % 128;
  const float scale = __fmul_rn(read_half(p + 208), (float)(int8_t)p[192 + i / 16]);
  uint32_t codes[2];
  read_nibbles<2>(p + 64 * half + r % 64, r / 64, codes);
#pragma unroll
  for (int k = 0; k < 2; k++) codes[k] |= (read_word<2>(p + 128 + 32 * half + r % 32 + 4 * k) >> (r / 32 * 2) & 0x03030303u) << 4;
  put_scaled(y, scale, codes, 32);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ2_XXS) {
  const uint8_t *q = p + 2 + i / 32 * 8; /* a word of indices, a word of signs and scale */
  const int g = i / 8 % 4;
  const uint32_t rest = read_word<2>(q + 4);
  put_signed<8>(y, iq_scale(read_half(p), rest >> 28, 0.25f), books->iq2_xxs[q[g]], even_signs(rest >> (7 * g) & 127u));
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ2_XS) {
  const int j = i / 8;
  const uint32_t q = read_u16(p + 2 + 2 * j), scale = p[66 + j / 4] >> (j / 2 % 2 * 4) & 15u;
  put_signed<8>(y, iq_scale(read_half(p), scale, 0.25f), books->iq2_xs[q & 511u], even_signs(q >> 9));
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ2_S) {
  const int j = i / 8;
  const uint32_t scale = p[74 + j / 4] >> (j / 2 % 2 * 4) & 15u, high = p[66 + j / 4] >> (j % 4 * 2) & 3u;
  put_signed<8>(y, iq_scale(read_half(p), scale, 0.25f), books->iq2_s[p[2 + j] | high << 8], p[34 + j]);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ3_XXS) {
  const int j = i / 4;
  const uint32_t aux = read_word<2>(p + 66 + i / 32 * 4), signs = even_signs(aux >> (i / 8 % 4 * 7) & 127u);
  const float scale = iq_scale(read_half(p), aux >> 28, 0.5f);
  put_signed<4>(y, scale, books->iq3_xxs[p[2 + j]], signs);
  put_signed<4>(y + 4, scale, books->iq3_xxs[p[3 + j]], signs >> 4);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ3_S) {
  const int j = i / 4;
  const uint32_t signs = p[74 + i / 8], qh = p[66 + i / 32] >> (j % 8), q = p[106 + i / 64] >> (i / 32 % 2 * 4) & 15u;
  const float scale = __fmul_rn(read_half(p), (float)(int)(1 + 2 * q));
  put_signed<4>(y, scale, books->iq3_s[p[2 + j] | (qh & 1u) << 8], signs);
  put_signed<4>(y + 4, scale, books->iq3_s[p[3 + j] | (qh >> 1 & 1u) << 8], signs >> 4);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ1_S) {
  const int j = i / 8;
  const uint32_t qh = read_u16(p + 34 + j / 4 * 2);
  const float scale = __fmul_rn(read_half(p), (float)(int)(2u * (qh >> 12 & 7u) + 1u));
  put_iq1(y, scale, books, p[2 + j] | (qh >> (j % 4 * 3) & 7u) << 8, qh >> 15);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ1_M) {
  const int j = i / 8;
  uint32_t d = 0;
#pragma unroll
  for (int k = 0; k < 4; k++) d |= read_u16(p + 48 + 2 * k) >> 12 << (4 * k);
  const uint32_t qh = p[32 + j / 2] >> (j % 2 * 4), q = read_u16(p + 48 + j / 8 * 2) >> (j / 2 % 4 * 3) & 7u;
  put_iq1(y, __fmul_rn(half_from_bits(d), (float)(int)(2u * q + 1u)), books, p[j] | (qh & 7u) << 8, qh & 8u);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(IQ4_XS) {
  const int j = i / 32;
  const uint32_t low = p[4 + j / 2] >> (j % 2 * 4) & 15u, high = read_u16(p + 2) >> (2 * j) & 3u;
  uint32_t codes[2];
  read_nibbles<4>(p + 8 + 16 * j + i % 16, i / 16 % 2, codes);
  put_levels_iq4(y, __fmul_rn(read_half(p), (float)((int)(low | high << 4) - 32)), codes);
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(TQ1_0) {
  const float d = read_half(p + 52);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int e = i + j; /* digit n of byte b: three places where elements lie */
    const int n = e < 160 ? e / 32 : e < 240 ? (e - 160) / 16 : (e - 240) / 4;
    const int b = e < 160 ? e % 32 : e < 240 ? 32 + (e - 160) % 16 : 48 + (e - 240) % 4;
    const uint32_t power = n == 0 ? 1u : n == 1 ? 3u : n == 2 ? 9u : n == 3 ? 27u : 81u;
    y[j] = __fmul_rn(d, (float)((int)((p[b] * power & 255u) * 3u >> 8) - 1));
  }
} PE_FILE_BLOCK_END

PE_FILE_BLOCK(TQ2_0) {
  uint32_t codes[2];
  read_pairs<2>(p, i, codes);
  put_scaled(y, read_half(p + 64), codes, 1);
} PE_FILE_BLOCK_END

#undef PE_FILE_BLOCK
#undef PE_FILE_BLOCK_END

/* Every format above; those of the second list need codebooks. */
#define PE_FILE_BLOCKS(X)                                                                                                    \
  X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(IQ4_NL) X(MXFP4) X(NVFP4) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_XS)      \
  X(TQ1_0) X(TQ2_0)
#define PE_FILE_BLOCKS_OF_CODEBOOKS(X) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S) X(IQ1_S) X(IQ1_M)

} // namespace pe

#endif

/* dequant.h: weights in the file's layout as floats, bit for bit as csrc/host/dequant.c computes them, eight elements a call.
 *
 *   file_values(format, block, i, books, y)      y[0..7] = elements i .. i + 7 of a block, i a multiple of 8
 *
 * csrc/quants.h draws the blocks. Eight elements share a scale in every format, and are two words of codes, or one row of a codebook
 * (IQ3: two). Threads side by side that take eights side by side read bytes side by side. A block has the alignment of its size, so words
 * come in pieces of 4, 2 or 1 bytes. `format` is a function constant where this is called: the switch folds away.
 */
#ifndef PE_METAL_DEQUANT_H
#define PE_METAL_DEQUANT_H

#include "common.h"

/* The codebooks of IQ1 to IQ3, in the order of pyengine/backends/cuda/codebooks.py; as many rows as an index has values. A buffer named
 * `books` is bound by the program, null where no weight needs it. */
struct codebooks {
  char iq2_xxs[256][8], iq2_xs[512][8], iq2_s[1024][8];
  char iq3_xxs[256][4], iq3_s[512][4];
  char iq1[2048][8];
};

struct codes8 { uint w[2]; };      /* eight codes, a byte each */

/* ---- loads ---- */

static inline uint read_u16(device const uchar *p) { return *(device const ushort *)p; }
static inline float read_half(device const uchar *p) { return (float)*(device const half *)p; }

/* Four bytes of a block whose size is a multiple of `align`. */
static inline uint read_word(int align, device const uchar *p) {
  if (align == 4) return *(device const uint *)p;
  if (align == 2) return read_u16(p) | read_u16(p + 2) << 16;
  return p[0] | (uint)p[1] << 8 | (uint)p[2] << 16 | (uint)p[3] << 24;
}

static inline int code_of(codes8 c, int j) { return (int)(c.w[j / 4] >> (8 * (j % 4)) & 255u); }

/* ---- what formats share ---- */

/* y[j] = scale * (code j - zero) */
static inline void put_scaled(thread float *y, float scale, codes8 c, int zero) {
  for (int j = 0; j < 8; j++) y[j] = scale * (float)(code_of(c, j) - zero);
}

/* y[j] = scale * code j + offset, rounded twice */
static inline void put_shifted(thread float *y, float scale, codes8 c, float offset) {
  for (int j = 0; j < 8; j++) y[j] = scale * (float)code_of(c, j) + offset;
}

static inline codes8 read_nibbles(int align, device const uchar *p, int high) {
  codes8 c;
  for (int k = 0; k < 2; k++) c.w[k] = read_word(align, p + 4 * k) >> (4 * high) & 0x0f0f0f0fu;
  return c;
}

/* Bit j of `bits` into code j, at bit `to`. */
static inline codes8 with_bits(codes8 c, uint bits, int to) {
  for (int j = 0; j < 8; j++) c.w[j / 4] |= (bits >> j & 1u) << (8 * (j % 4) + to);
  return c;
}

/* Level number `code` of the sixteen of IQ4_NL, or of E2M1 (doubled): a word of four levels by the code's high bits, then a byte. */
static inline int level_iq4(int code) {
  const uint w = code & 8 ? (code & 4 ? 0x71594535u : 0x26190d01u) : (code & 4 ? 0xf6eaddcfu : 0xbfad9881u);
  return (int)(char)(w >> (8 * (code & 3)));
}
static inline int level_e2m1(int code) {
  const int magnitude = (int)((code & 4 ? 0x0c080604u : 0x03020100u) >> (8 * (code & 3)) & 255u);
  return code & 8 ? -magnitude : magnitude;
}
static inline void put_levels_iq4(thread float *y, float scale, codes8 c) {
  for (int j = 0; j < 8; j++) y[j] = scale * (float)level_iq4(code_of(c, j));
}
static inline void put_levels_e2m1(thread float *y, float scale, codes8 c) {
  for (int j = 0; j < 8; j++) y[j] = scale * (float)level_e2m1(code_of(c, j));
}

/* Eight codes of two bits, elements i .. i + 7 of 256 in the order that block_q2_K draws. */
static inline codes8 read_pairs(int align, device const uchar *qs, int i) {
  codes8 c;
  for (int k = 0; k < 2; k++) c.w[k] = read_word(align, qs + i / 128 * 32 + i % 32 + 4 * k) >> (i % 128 / 32 * 2) & 0x03030303u;
  return c;
}

/* (scale, minimum) number j of 8 in the twelve bytes of block_q4_K and block_q5_K. */
static inline float2 read_scale_min(device const uchar *s, int j) {
  const bool low = j < 4;
  const uint a = s[low ? j : j + 4], b = s[low ? j + 4 : j], c = s[low ? j : j - 4];
  return float2((float)(low ? a & 63u : (a & 15u) | (c >> 6) << 4), (float)(low ? b & 63u : a >> 4 | (b >> 6) << 4));
}

/* ---- codebooks ---- */

/* Seven stored sign bits and the eighth, which makes the number of minus signs even. */
static inline uint even_signs(uint seven) { return seven | (popcount(seven) & 1u) << 7; }

/* y[j] = scale * grid[j], negated where bit j of signs is set; n elements of one row. */
static inline void put_signed(thread float *y, int n, float scale, device const char *grid, uint signs) {
  for (int j = 0; j < n; j++) {
    const float v = scale * (float)grid[j];
    y[j] = signs >> j & 1u ? -v : v;
  }
}

static inline void put_iq1(thread float *y, float scale, device const char *grid, uint minus) {
  const float delta = minus ? -0.125f : 0.125f;
  for (int j = 0; j < 8; j++) y[j] = scale * ((float)grid[j] + delta);
}

/* d * (0.5 + q) * k, in dequant.c's order. */
static inline float iq_scale(float d, uint q, float k) { return d * (0.5f + (float)q) * k; }

/* ---- the formats ---- */

static inline void values_of_32(int format, device const uchar *p, int i, thread float *y) {
  switch (format) {
    case PE_Q4_0: return put_scaled(y, read_half(p), read_nibbles(2, p + 2 + i % 16, i / 16), 8);
    case PE_Q4_1: return put_shifted(y, read_half(p), read_nibbles(4, p + 4 + i % 16, i / 16), read_half(p + 2));
    case PE_Q5_0: return put_scaled(y, read_half(p), with_bits(read_nibbles(2, p + 6 + i % 16, i / 16), p[2 + i / 8], 4), 16);
    case PE_Q5_1: return put_shifted(y, read_half(p), with_bits(read_nibbles(4, p + 8 + i % 16, i / 16), p[4 + i / 8], 4), read_half(p + 2));
    case PE_Q8_0:
      for (int j = 0; j < 8; j++) y[j] = (float)(char)p[2 + i + j] * read_half(p);
      return;
    case PE_IQ4_NL: return put_levels_iq4(y, read_half(p), read_nibbles(2, p + 2 + i % 16, i / 16));
    case PE_MXFP4: return put_levels_e2m1(y, pe_e8m0_half_to_f32(p[0]), read_nibbles(1, p + 1 + i % 16, i / 16));
    default: /* NVFP4 */
      return put_levels_e2m1(y, pe_e4m3_half_to_f32(p[i / 16]), read_nibbles(4, p + 4 + 8 * (i / 16), i / 8 % 2));
  }
}

static inline void values_of_k(int format, device const uchar *p, int i, thread float *y) {
  codes8 c;
  switch (format) {
    case PE_Q2_K:
      return put_shifted(y, read_half(p + 80) * (float)(p[i / 16] & 15), read_pairs(4, p + 16, i), -(read_half(p + 82) * (float)(p[i / 16] >> 4)));
    case PE_Q3_K: {
      const int n = i / 16;
      const uint low = p[96 + n % 8] >> (n / 8 * 4) & 15u, high = p[104 + n % 4] >> (n / 4 * 2) & 3u;
      c = read_pairs(2, p + 32, i);
      for (int k = 0; k < 2; k++) c.w[k] |= (read_word(2, p + i % 32 + 4 * k) >> (i / 32) & 0x01010101u) << 2;
      return put_scaled(y, read_half(p + 108) * (float)((int)(low | high << 4) - 32), c, 4);
    }
    case PE_Q4_K: {
      const float2 s = read_scale_min(p + 4, i / 32);
      return put_shifted(y, read_half(p) * s.x, read_nibbles(4, p + 16 + i / 64 * 32 + i % 32, i / 32 % 2), -(read_half(p + 2) * s.y));
    }
    case PE_Q5_K: {
      const float2 s = read_scale_min(p + 4, i / 32);
      c = read_nibbles(4, p + 48 + i / 64 * 32 + i % 32, i / 32 % 2);
      for (int k = 0; k < 2; k++) c.w[k] |= (read_word(4, p + 16 + i % 32 + 4 * k) >> (i / 32) & 0x01010101u) << 4;
      return put_shifted(y, read_half(p) * s.x, c, -(read_half(p + 2) * s.y));
    }
    default: { /* Q6_K */
      const int half_ = i / 128, r = i % 128;
      c = read_nibbles(2, p + 64 * half_ + r % 64, r / 64);
      for (int k = 0; k < 2; k++) c.w[k] |= (read_word(2, p + 128 + 32 * half_ + r % 32 + 4 * k) >> (r / 32 * 2) & 0x03030303u) << 4;
      return put_scaled(y, read_half(p + 208) * (float)(char)p[192 + i / 16], c, 32);
    }
  }
}

static inline void values_of_iq2(int format, device const uchar *p, int i, device const codebooks *books, thread float *y) {
  const int j = i / 8;
  if (format == PE_IQ2_XXS) {
    device const uchar *q = p + 2 + i / 32 * 8; /* a word of indices, a word of signs and scale */
    const uint rest = read_word(2, q + 4);
    put_signed(y, 8, iq_scale(read_half(p), rest >> 28, 0.25f), books->iq2_xxs[q[j % 4]], even_signs(rest >> (7 * (j % 4)) & 127u));
  } else if (format == PE_IQ2_XS) {
    const uint q = read_u16(p + 2 + 2 * j), scale = p[66 + j / 4] >> (j / 2 % 2 * 4) & 15u;
    put_signed(y, 8, iq_scale(read_half(p), scale, 0.25f), books->iq2_xs[q & 511u], even_signs(q >> 9));
  } else {
    const uint scale = p[74 + j / 4] >> (j / 2 % 2 * 4) & 15u, high = p[66 + j / 4] >> (j % 4 * 2) & 3u;
    put_signed(y, 8, iq_scale(read_half(p), scale, 0.25f), books->iq2_s[p[2 + j] | high << 8], p[34 + j]);
  }
}

static inline void values_of_iq3(int format, device const uchar *p, int i, device const codebooks *books, thread float *y) {
  const int j = i / 4;
  if (format == PE_IQ3_XXS) {
    const uint aux = read_word(2, p + 66 + i / 32 * 4), signs = even_signs(aux >> (i / 8 % 4 * 7) & 127u);
    const float scale = iq_scale(read_half(p), aux >> 28, 0.5f);
    put_signed(y, 4, scale, books->iq3_xxs[p[2 + j]], signs);
    put_signed(y + 4, 4, scale, books->iq3_xxs[p[3 + j]], signs >> 4);
  } else {
    const uint signs = p[74 + i / 8], qh = p[66 + i / 32] >> (j % 8), q = p[106 + i / 64] >> (i / 32 % 2 * 4) & 15u;
    const float scale = read_half(p) * (float)(1u + 2u * q);
    put_signed(y, 4, scale, books->iq3_s[p[2 + j] | (qh & 1u) << 8], signs);
    put_signed(y + 4, 4, scale, books->iq3_s[p[3 + j] | (qh >> 1 & 1u) << 8], signs >> 4);
  }
}

static inline void values_of_iq1(int format, device const uchar *p, int i, device const codebooks *books, thread float *y) {
  const int j = i / 8;
  if (format == PE_IQ1_S) {
    const uint qh = read_u16(p + 34 + j / 4 * 2);
    put_iq1(y, read_half(p) * (float)(2u * (qh >> 12 & 7u) + 1u), books->iq1[p[2 + j] | (qh >> (j % 4 * 3) & 7u) << 8], qh >> 15);
  } else {
    uint d = 0;
    for (int k = 0; k < 4; k++) d |= read_u16(p + 48 + 2 * k) >> 12 << (4 * k);
    const uint qh = p[32 + j / 2] >> (j % 2 * 4), q = read_u16(p + 48 + j / 8 * 2) >> (j / 2 % 4 * 3) & 7u;
    put_iq1(y, pe_f16_to_f32((ushort)d) * (float)(2u * q + 1u), books->iq1[p[j] | (qh & 7u) << 8], qh & 8u);
  }
}

static inline void values_of_iq4_xs(device const uchar *p, int i, thread float *y) {
  const int j = i / 32;
  const uint low = p[4 + j / 2] >> (j % 2 * 4) & 15u, high = read_u16(p + 2) >> (2 * j) & 3u;
  put_levels_iq4(y, read_half(p) * (float)((int)(low | high << 4) - 32), read_nibbles(4, p + 8 + 16 * j + i % 16, i / 16 % 2));
}

static inline void values_of_tq1(device const uchar *p, int i, thread float *y) {
  for (int e = i; e < i + 8; e++) { /* digit n of byte b: three places where elements lie */
    const int n = e < 160 ? e / 32 : e < 240 ? (e - 160) / 16 : (e - 240) / 4;
    const int b = e < 160 ? e % 32 : e < 240 ? 32 + (e - 160) % 16 : 48 + (e - 240) % 4;
    const uint power = n == 0 ? 1u : n == 1 ? 3u : n == 2 ? 9u : n == 3 ? 27u : 81u;
    y[e - i] = read_half(p + 52) * (float)((int)((p[b] * power & 255u) * 3u >> 8) - 1);
  }
}

static inline void file_values(int format, device const uchar *p, int i, device const codebooks *books, thread float *y) {
  switch (format) {
    case PE_F32: for (int j = 0; j < 8; j++) y[j] = ((device const float *)p)[i + j]; return;
    case PE_F16: for (int j = 0; j < 8; j++) y[j] = (float)((device const half *)p)[i + j]; return;
    case PE_BF16: for (int j = 0; j < 8; j++) y[j] = pe_bf16_to_f32(((device const ushort *)p)[i + j]); return;
    case PE_Q2_K: case PE_Q3_K: case PE_Q4_K: case PE_Q5_K: case PE_Q6_K: return values_of_k(format, p, i, y);
    case PE_IQ2_XXS: case PE_IQ2_XS: case PE_IQ2_S: return values_of_iq2(format, p, i, books, y);
    case PE_IQ3_XXS: case PE_IQ3_S: return values_of_iq3(format, p, i, books, y);
    case PE_IQ1_S: case PE_IQ1_M: return values_of_iq1(format, p, i, books, y);
    case PE_IQ4_XS: return values_of_iq4_xs(p, i, y);
    case PE_TQ1_0: return values_of_tq1(p, i, y);
    case PE_TQ2_0: return put_scaled(y, read_half(p + 64), read_pairs(2, p, i), 1);
    default: return values_of_32(format, p, i, y);
  }
}

#endif

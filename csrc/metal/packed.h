/* packed.h: packed matrices (csrc/cpu/pack.h draws them) in a simdgroup: the codes and scales of one row for one step of 32 of k.
 *
 * A group is 16 rows side by side, so two halves of a simdgroup share a step: lane r + 16 h reads row r, and of the step's eight vectors
 * (vector g holds k = 4 g .. 4 g + 3, a word of 4 bytes a row) those with g % 2 == h. The 32 lanes of a load then touch two neighbouring
 * vectors of 64 bytes, and a step is read once, in order, whatever the format.
 *
 * `format` is a function constant where these functions are called: the switches fold away when a pipeline is made.
 */
#ifndef PE_METAL_PACKED_H
#define PE_METAL_PACKED_H

#include "common.h"

/* k of a block, blocks of a unit, bytes of 16 rows of a block; scales of a step (2: one for each 16 of k), whether there are offsets,
 * and the zero point of the codes: w = s * (u - zero), or s * u + o. */
struct packed_form {
  int k, blocks, head, body, halves, offsets, zero;
};

static inline packed_form packed_form_of(int format) {
  packed_form f = {32, 1, 0, 0, 1, 0, 0};
  switch (format) {
#define PE_FORM(name, blocks_, head_, body_, steps, halves_, offsets_, zero_)                                          \
  case PE_##name:                                                                                                      \
    f.k = PE_BLOCK_##name, f.blocks = blocks_, f.head = head_, f.body = body_;                                          \
    f.halves = halves_, f.offsets = offsets_, f.zero = zero_;                                                           \
    break;
    PE_PACKED_BLOCKS(PE_FORM)
#undef PE_FORM
    default: break;
  }
  return f;
}

/* Head and body of block b of a group. */
static inline device const uchar *packed_head(packed_form f, device const uchar *group, int b) {
  return group + (long)(b / f.blocks) * (f.blocks * (f.head + f.body)) + b % f.blocks * f.head;
}
static inline device const uchar *packed_body(packed_form f, device const uchar *group, int b) {
  return group + (long)(b / f.blocks) * (f.blocks * (f.head + f.body)) + f.blocks * f.head + b % f.blocks * f.body;
}

/* ---- codes ---- */

constant uchar IQ4_CODES[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}; /* + 128 */
constant uchar E2M1_CODES[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};              /* 2 x + 12 */

/* The word of row r in vector v of an area. */
static inline uint packed_word(device const uchar *area, int v, int r) { return *(device const uint *)(area + 64 * v + 4 * r); }

struct step_codes {
  uint u[4]; /* word i: codes of k = 4 g .. 4 g + 3, g = h + 2 i; words 0 and 1 are the first 16 of k */
};

static inline step_codes nibble_codes(device const uchar *body, int r, int h) {
  const uint a = packed_word(body, h, r), b = packed_word(body, h + 2, r);
  step_codes c;
  c.u[0] = a & 0x0f0f0f0fu;
  c.u[1] = b & 0x0f0f0f0fu;
  c.u[2] = a >> 4 & 0x0f0f0f0fu;
  c.u[3] = b >> 4 & 0x0f0f0f0fu;
  return c;
}

/* One more bit of each code, at bit `to`: bit g of a byte of the plane. */
static inline void add_plane1(thread step_codes &c, device const uchar *plane, int to, int r, int h) {
  const uint p = packed_word(plane, 0, r);
  for (int i = 0; i < 4; i++) c.u[i] |= (p >> (h + 2 * i) & 0x01010101u) << to;
}

/* Two more bits, from bit `to` on: bits 2 t, 2 t + 1 of vector g / 4 of the plane, t = g % 4. */
static inline void add_plane2(thread step_codes &c, device const uchar *plane, int to, int r, int h) {
  const uint a = packed_word(plane, 0, r), b = packed_word(plane, 1, r);
  for (int i = 0; i < 4; i++) c.u[i] |= ((i < 2 ? a : b) >> 2 * (h + 2 * (i & 1)) & 0x03030303u) << to;
}

static inline void look_up(thread step_codes &c, constant uchar *table) {
  for (int i = 0; i < 4; i++) {
    const uint u = c.u[i];
    c.u[i] = (uint)table[u & 15u] | (uint)table[u >> 8 & 15u] << 8 | (uint)table[u >> 16 & 15u] << 16 | (uint)table[u >> 24 & 15u] << 24;
  }
}

/* Codes of row r, half h, of step j of a block. */
static inline step_codes codes_of_step(int format, device const uchar *body, int j, int r, int h) {
  step_codes c;
  for (int i = 0; i < 4; i++) c.u[i] = 0;
  switch (format) {
    case PE_Q4_0:
    case PE_Q4_1: c = nibble_codes(body, r, h); break;
    case PE_Q5_0:
    case PE_Q5_1:
      c = nibble_codes(body, r, h);
      add_plane1(c, body + 256, 4, r, h);
      break;
    case PE_Q8_0:
      for (int i = 0; i < 4; i++) c.u[i] = packed_word(body, h + 2 * i, r);
      break;
    case PE_IQ4_NL:
    case PE_IQ4_XS:
      c = nibble_codes(body + 256 * j, r, h);
      look_up(c, IQ4_CODES);
      break;
    case PE_MXFP4:
      c = nibble_codes(body, r, h);
      look_up(c, E2M1_CODES);
      break;
    case PE_Q2_K: add_plane2(c, body + 128 * j, 0, r, h); break;
    case PE_Q3_K:
      add_plane2(c, body + 192 + 192 * j, 0, r, h);
      add_plane1(c, body + 192 + 192 * j + 128, 2, r, h);
      break;
    case PE_Q4_K: c = nibble_codes(body + 256 * j, r, h); break;
    case PE_Q5_K:
      c = nibble_codes(body + 320 * j, r, h);
      add_plane1(c, body + 320 * j + 256, 4, r, h);
      break;
    case PE_Q6_K:
      c = nibble_codes(body + 256 + 384 * j, r, h);
      add_plane2(c, body + 256 + 384 * j + 256, 4, r, h);
      break;
    default: break;
  }
  return c;
}

/* Codes as numbers without a conversion: 0x6400 + u are the bits of the half 1024 + u. Bytes 0 and 2 of a word, and 1 and 3. */
static inline half2 even_codes(uint u) { return as_type<half2>((u & 0x00ff00ffu) | 0x64006400u); }
static inline half2 odd_codes(uint u) { return as_type<half2>((u >> 8 & 0x00ff00ffu) | 0x64006400u); }
enum { CODE_BIAS = 1024 };

/* ---- scales ---- */

struct step_scales {
  float s[2], o[2]; /* of each 16 of k; where a step has one scale, s[0] and o[0] */
};

/* What a row's scales of a block are made of: the words of a block are read once, and serve its steps. */
struct block_scales {
  float d, m;    /* d, and dmin or m */
  uint words[4]; /* the row's bytes of scales, as the file has them */
};

static inline float packed_half(device const uchar *area, int r) { return (float)*(device const half *)(area + 2 * r); }

static inline block_scales scales_of_block(int format, device const uchar *head, device const uchar *body, int r) {
  block_scales b;
  b.d = 0.0f, b.m = 0.0f;
  for (int i = 0; i < 4; i++) b.words[i] = 0;
  if (format == PE_MXFP4) b.d = pe_e8m0_half_to_f32(head[r]);
  else b.d = packed_half(head, r);
  switch (format) {
    case PE_Q4_1:
    case PE_Q5_1: b.m = packed_half(head + 32, r); break;
    case PE_Q2_K:
      b.m = packed_half(head + 32, r);
      for (int i = 0; i < 4; i++) b.words[i] = packed_word(head + 64, i, r);
      break;
    case PE_Q3_K:
      for (int i = 0; i < 3; i++) b.words[i] = packed_word(body, i, r);
      break;
    case PE_Q4_K:
    case PE_Q5_K:
      b.m = packed_half(head + 32, r);
      for (int i = 0; i < 3; i++) b.words[i] = packed_word(head + 64, i, r);
      break;
    case PE_Q6_K:
      for (int i = 0; i < 4; i++) b.words[i] = packed_word(body, i, r);
      break;
    case PE_IQ4_XS:
      b.words[0] = packed_word(head + 64, 0, r);
      b.words[1] = (uint)*(device const ushort *)(head + 32 + 2 * r);
      break;
    default: break;
  }
  return b;
}

static inline float byte_of(uint word, int i) { return (float)(word >> 8 * i & 255u); }

/* The scales of step j of a block. csrc/quants.h draws the bytes. */
static inline step_scales scales_of_step(int format, thread const block_scales &b, int j) {
  step_scales y;
  y.s[0] = y.s[1] = b.d;
  y.o[0] = y.o[1] = b.m;
  switch (format) {
    case PE_Q2_K: {
      const uint w = b.words[j / 2];
      for (int h = 0; h < 2; h++) {
        y.s[h] = b.d * byte_of(w & 0x0f0f0f0fu, 2 * (j % 2) + h);
        y.o[h] = -(b.m * byte_of(w >> 4 & 0x0f0f0f0fu, 2 * (j % 2) + h));
      }
      break;
    }
    case PE_Q3_K: {
      const int q = j / 2;
      const uint low = b.words[q % 2] >> 4 * (q / 2) & 0x0f0f0f0fu, high = b.words[2] >> 2 * q & 0x03030303u;
      for (int h = 0; h < 2; h++) y.s[h] = b.d * (byte_of(low | high << 4, 2 * (j % 2) + h) - 32.0f);
      break;
    }
    case PE_Q4_K:
    case PE_Q5_K: {
      uint s = b.words[0] & 0x3f3f3f3fu, m = b.words[1] & 0x3f3f3f3fu;
      if (j >= 4) {
        s = (b.words[2] & 0x0f0f0f0fu) | (b.words[0] >> 2 & 0x30303030u);
        m = (b.words[2] >> 4 & 0x0f0f0f0fu) | (b.words[1] >> 2 & 0x30303030u);
      }
      y.s[0] = b.d * byte_of(s, j % 4);
      y.o[0] = -(b.m * byte_of(m, j % 4));
      break;
    }
    case PE_Q6_K:
      for (int h = 0; h < 2; h++) y.s[h] = b.d * (float)((int)(b.words[j / 2] << (24 - 8 * (2 * (j % 2) + h))) >> 24);
      break;
    case PE_IQ4_XS:
      y.s[0] = b.d * ((float)((b.words[0] >> 4 * j & 15u) | (b.words[1] >> 2 * j & 3u) << 4) - 32.0f);
      break;
    default: break;
  }
  return y;
}

#endif

/* unpack.h: one step (16 rows x 32 of k) of a packed matrix in registers; pack.h draws the layout.
 *
 * `id` is a format and must be a constant where these functions are called: the switches then fold away, and one text serves
 * the decode kernel, the prompt kernel and `rows`.
 */
#ifndef PE_UNPACK_H
#define PE_UNPACK_H

#include "../quants.h"
#include "pack.h"
#include "simd.h"

/* Loops over registers must be unrolled to stay in registers; portable C has too few of them, so there it would only grow. The
 * steps of a block are unrolled where shift counts are cheapest as constants. */
#if defined(PE_GENERIC)
#define PE_UNROLL(n) _Pragma("GCC unroll 1")
#else
#define PE_UNROLL(n) PE_UNROLL_(GCC unroll n)
#define PE_UNROLL_(text) _Pragma(#text)
#endif
#if defined(PE_AVX512)
#define PE_UNROLL_STEPS PE_UNROLL(8)
#else
#define PE_UNROLL_STEPS _Pragma("GCC unroll 1")
#endif

/* u: codes, vector g = k 4g .. 4g + 3.   w = s[h] * (u - zero), or s[h] * u + o[h], h = 0, or g / 4 where halves differ */
typedef struct pe_step {
  v64u u[8];
  v16f s[2], o[2];
} pe_step;

/* The same of one part of the 16 rows: what a register holds (simd.h). */
typedef struct pe_step_part {
  pe_pb u[8];
  pe_pf s[2], o[2];
} pe_step_part;

typedef struct pe_traits {
  int k, blocks, head, body; /* elements of a block, blocks of a unit, bytes of 16 rows of a block */
  int halves;                /* scales a step: 2 where they change every 16 of k */
  int offsets;               /* w has an offset `o`, and no zero point */
  int zero;                  /* the zero point; codes are below 128 unless it is 128 */
} pe_traits;

PE_INLINE pe_traits pe_traits_of(int id) {
  switch (id) {
#define PE_TRAITS(name, blocks, head, body, steps, halves, offsets, zero)                                              \
  case PE_##name: return (pe_traits){PE_BLOCK_##name, blocks, head, body, halves, offsets, zero};
    PE_PACKED_BLOCKS(PE_TRAITS)
#undef PE_TRAITS
    default: return (pe_traits){0, 0, 0, 0, 1, 0, 0};
  }
}

/* No code of a format is larger. */
PE_INLINE int pe_most_code(pe_traits t) {
  return t.zero ? pe_min(255, 2 * t.zero) : (1 << 8 * t.body / (16 * t.k)) - 1; /* the body has whole bits, and less for scales */
}

/* Head and body of block b of a group. */
PE_INLINE const uint8_t *pe_block_head(pe_traits t, const uint8_t *group, int64_t b) {
  return group + b / t.blocks * (t.blocks * (t.head + t.body)) + b % t.blocks * t.head;
}
PE_INLINE const uint8_t *pe_block_body(pe_traits t, const uint8_t *group, int64_t b) {
  return group + b / t.blocks * (t.blocks * (t.head + t.body)) + t.blocks * t.head + b % t.blocks * t.body;
}

/* ---- codes of a part ---- */

/* Bytes of vector v at p that belong to a part. */
PE_INLINE pe_pb pe_codes(const uint8_t *p, int v, int part) {
  return (pe_pb) * (const pe_pi_mem *)(p + 64 * v + PE_PART_BYTES * part);
}
PE_INLINE pe_pi pe_words(const uint8_t *p, int part) { return (pe_pi)pe_codes(p, 0, part); }

/* Bits move by 16-bit lanes, those that come from the byte beside are for the caller to mask. */
PE_INLINE pe_pb pe_move(pe_pb w, int from, int to) {
  return from < to ? (pe_pb)((pe_ph)w << (to - from)) : (pe_pb)((pe_ph)w >> (from - to));
}

PE_INLINE void pe_nibbles(const uint8_t *p, int part, pe_pb u[8]) {
PE_UNROLL(4)
  for (int v = 0; v < 4; v++) {
    const pe_pb w = pe_codes(p, v, part);
    u[v] = w & 15;
    u[v + 4] = p_high_nibbles(w);
  }
}

/* Bit g of the plane's byte to bit `to` of vector g, which is 0 there. */
PE_INLINE void pe_or_plane1(const uint8_t *p, int part, int to, pe_pb u[8]) {
  const pe_pb w = pe_codes(p, 0, part);
PE_UNROLL(8)
  for (int g = 0; g < 8; g++) u[g] = p_insert(u[g], pe_move(w, g, to), (uint8_t)(1 << to));
}

/* Bits 2t, 2t + 1 of plane i to bits `to`, `to` + 1 of vector 4i + t, which are 0 there. */
PE_INLINE pe_pb pe_or_plane2(const uint8_t *p, int part, int g, int to, pe_pb u) {
  return p_insert(u, pe_move(pe_codes(p, g / 4, part), 2 * (g % 4), to), (uint8_t)(3 << to));
}

/* ---- scales of a part ---- */

PE_INLINE pe_pi pe_bits(pe_pi w, int shift, int32_t mask) { return (pe_pi)((pe_pw)w >> shift) & mask; }
PE_INLINE pe_pf pe_byte(pe_pi words, int i) { return p_to_f(pe_bits(words, 8 * i, 255)); }
PE_INLINE pe_pf pe_half(const uint8_t *p, int part) { return p_f16(p + 2 * PE_PART_LANES * part); }

/* Q4_K, Q5_K: scale and min j of 8, six bits each, in bytes of 4 lanes' words; block_q4_K draws them. */
PE_INLINE void pe_scales_6bit(const uint8_t *p, int part, int j, pe_pf *scale, pe_pf *min) {
  const pe_pi a = pe_words(p, part), b = pe_words(p + 64, part), c = pe_words(p + 128, part);
  pe_pi s = a & 0x3f3f3f3f, m = b & 0x3f3f3f3f;
  if (j >= 4) {
    s = (c & 0x0f0f0f0f) | pe_bits(a, 2, 0x30303030);
    m = pe_bits(c, 4, 0x0f0f0f0f) | pe_bits(b, 2, 0x30303030);
  }
  *scale = pe_byte(s, j % 4);
  *min = pe_byte(m, j % 4);
}

/* A part of step j of a block. */
PE_INLINE void pe_unpack_part(int id, const uint8_t *head, const uint8_t *body, int j, int part, pe_step_part *o) {
  static const uint8_t iq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}; /* + 128 */
  static const uint8_t e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};            /* 2 x + 12 */
  const pe_pb none = {0};
  switch (id) {
    case PE_Q4_0:
    case PE_Q4_1:
    case PE_Q5_0:
    case PE_Q5_1:
      o->s[0] = pe_half(head, part);
      if (id == PE_Q4_1 || id == PE_Q5_1) o->o[0] = pe_half(head + 32, part);
      pe_nibbles(body, part, o->u);
      if (id == PE_Q5_0 || id == PE_Q5_1) pe_or_plane1(body + 256, part, 4, o->u);
      break;
    case PE_Q8_0:
      o->s[0] = pe_half(head, part);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = pe_codes(body, g, part);
      break;
    case PE_IQ4_NL:
      o->s[0] = pe_half(head, part);
      pe_nibbles(body, part, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = p_table(iq4, o->u[g]);
      break;
    case PE_MXFP4: {
      /* 2^(e-128): exponent e - 1, and below 2^-126 the denormals 2^-128, 2^-127; the larger of the two as integers */
      const pe_pi e = p_i8(head + PE_PART_LANES * part) & 255;
      o->s[0] = (pe_pf)p_maxi((pe_pi)((pe_pw)(e - 1) << 23), (e + 1) << 21);
      pe_nibbles(body, part, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = p_table(e2m1, o->u[g]);
      break;
    }
    case PE_Q2_K: {
      const pe_pf d = pe_half(head, part), dmin = pe_half(head + 32, part);
      const pe_pi w = pe_words(head + 64 + 64 * (j / 2), part), scale = w & 0x0f0f0f0f, min = pe_bits(w, 4, 0x0f0f0f0f);
PE_UNROLL(2)
      for (int h = 0; h < 2; h++) {
        o->s[h] = d * pe_byte(scale, 2 * (j % 2) + h);
        o->o[h] = -(dmin * pe_byte(min, 2 * (j % 2) + h));
      }
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = pe_or_plane2(body + 128 * j, part, g, 0, none);
      break;
    }
    case PE_Q3_K: {
      /* scale 4 q + i: low bits in nibble q / 2 of byte i of word q % 2, high bits at 2 q of byte i of word 2 */
      const pe_pf d = pe_half(head, part);
      const int q = j / 2;
      const pe_pi scale = pe_bits(pe_words(body + 64 * (q % 2), part), 4 * (q / 2), 0x0f0f0f0f) |
                          pe_bits(pe_words(body + 128, part), 2 * q, 0x03030303) << 4;
PE_UNROLL(2)
      for (int h = 0; h < 2; h++) o->s[h] = d * (pe_byte(scale, 2 * (j % 2) + h) - 32.0f);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = pe_or_plane2(body + 192 + 192 * j, part, g, 0, none);
      pe_or_plane1(body + 192 + 192 * j + 128, part, 2, o->u);
      break;
    }
    case PE_Q4_K:
    case PE_Q5_K: {
      pe_pf scale, min;
      pe_scales_6bit(head + 64, part, j, &scale, &min);
      o->s[0] = pe_half(head, part) * scale;
      o->o[0] = -(pe_half(head + 32, part) * min);
      pe_nibbles(body + (id == PE_Q5_K ? 320 : 256) * j, part, o->u);
      if (id == PE_Q5_K) pe_or_plane1(body + 320 * j + 256, part, 4, o->u);
      break;
    }
    case PE_Q6_K: {
      const pe_pf d = pe_half(head, part);
      const pe_pi w = pe_words(body + 64 * (j / 2), part);
PE_UNROLL(2)
      for (int h = 0; h < 2; h++) /* signed bytes */
        o->s[h] = d * p_to_f((pe_pi)((pe_pw)w << (24 - 8 * (2 * (j % 2) + h))) >> 24);
      pe_nibbles(body + 256 + 384 * j, part, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = pe_or_plane2(body + 256 + 384 * j + 256, part, g, 4, o->u[g]);
      break;
    }
    case PE_IQ4_XS: {
      const pe_pi low = pe_bits(pe_words(head + 64, part), 4 * j, 15);
      const pe_pi high = pe_bits(p_u16(head + 32 + 2 * PE_PART_LANES * part), 2 * j, 3);
      o->s[0] = pe_half(head, part) * p_to_f((low | high << 4) - 32);
      pe_nibbles(body + 256 * j, part, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = p_table(iq4, o->u[g]);
      break;
    }
    default: break;
  }
}

/* Step j of a block: all parts. */
PE_INLINE void pe_unpack(int id, const uint8_t *head, const uint8_t *body, int j, pe_step *o) {
  const pe_traits t = pe_traits_of(id);
  pe_step_part of[PE_PARTS];
PE_UNROLL(4)
  for (int part = 0; part < PE_PARTS; part++) pe_unpack_part(id, head, body, j, part, &of[part]);
#define PE_P_CODES(i) of[i].u[g]
#define PE_P_SCALE(i) of[i].s[h]
#define PE_P_OFFSET(i) of[i].o[h]
PE_UNROLL(8)
  for (int g = 0; g < 8; g++) o->u[g] = (v64u)PE_MAP0(PE_P_CODES);
PE_UNROLL(2)
  for (int h = 0; h < t.halves; h++) {
    o->s[h] = (v16f)PE_MAP0(PE_P_SCALE);
    if (t.offsets) o->o[h] = (v16f)PE_MAP0(PE_P_OFFSET);
  }
}

#endif

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

/* ---- codes ---- */

PE_INLINE void pe_nibbles(const uint8_t *p, v64u u[8]) {
  const v64u low = v64u_set1(15);
PE_UNROLL(4)
  for (int v = 0; v < 4; v++) {
    v64u w = v64u_load(p + 64 * v);
    u[v] = v64u_and(w, low);
    u[v + 4] = v64u_and(v64u_shr16(w, 4), low);
  }
}

/* Bit g of the plane's byte to bit `to` of vector g. */
PE_INLINE void pe_or_plane1(const uint8_t *p, int to, v64u u[8]) {
  const v64u bit = v64u_set1((uint8_t)(1 << to)), w = v64u_load(p);
PE_UNROLL(8)
  for (int g = 0; g < 8; g++)
    u[g] = v64u_or(u[g], v64u_and(g < to ? v64u_shl16(w, to - g) : v64u_shr16(w, g - to), bit));
}

/* Bits 2t, 2t + 1 of plane i to bits `to`, `to` + 1 of vector 4i + t. */
PE_INLINE v64u pe_plane2(const uint8_t *p, int g, int to) {
  v64u w = v64u_load(p + 64 * (g / 4));
  int at = 2 * (g % 4);
  return v64u_and(at < to ? v64u_shl16(w, to - at) : v64u_shr16(w, at - to), v64u_set1((uint8_t)(3 << to)));
}

/* ---- scales ---- */

PE_INLINE v16f pe_byte(v16i words, int i) { return v16i_to_f(v16i_and(v16i_shru(words, 8 * i), v16i_set1(255))); }
PE_INLINE v16i pe_bits(v16i w, int shift, int32_t mask) { return v16i_and(v16i_shru(w, shift), v16i_set1(mask)); }

/* Q4_K, Q5_K: scale and min j of 8, six bits each, in bytes of 4 lanes' words; block_q4_K draws them. */
PE_INLINE void pe_scales_6bit(const uint8_t *p, int j, v16f *scale, v16f *min) {
  v16i a = v16i_load(p), b = v16i_load(p + 64), c = v16i_load(p + 128);
  v16i s = pe_bits(a, 0, 0x3f3f3f3f), m = pe_bits(b, 0, 0x3f3f3f3f);
  if (j >= 4) {
    s = v16i_or(pe_bits(c, 0, 0x0f0f0f0f), pe_bits(a, 2, 0x30303030));
    m = v16i_or(pe_bits(c, 4, 0x0f0f0f0f), pe_bits(b, 2, 0x30303030));
  }
  *scale = pe_byte(s, j % 4);
  *min = pe_byte(m, j % 4);
}

/* Step j of a block. */
PE_INLINE void pe_unpack(int id, const uint8_t *head, const uint8_t *body, int j, pe_step *o) {
  static const uint8_t iq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}; /* + 128 */
  static const uint8_t e2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};            /* 2 x + 12 */
  switch (id) {
    case PE_Q4_0:
    case PE_Q4_1:
    case PE_Q5_0:
    case PE_Q5_1:
      o->s[0] = v16f_load_f16(head);
      if (id == PE_Q4_1 || id == PE_Q5_1) o->o[0] = v16f_load_f16(head + 32);
      pe_nibbles(body, o->u);
      if (id == PE_Q5_0 || id == PE_Q5_1) pe_or_plane1(body + 256, 4, o->u);
      break;
    case PE_Q8_0:
      o->s[0] = v16f_load_f16(head);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = v64u_load(body + 64 * g);
      break;
    case PE_IQ4_NL:
      o->s[0] = v16f_load_f16(head);
      pe_nibbles(body, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = v64u_table(iq4, o->u[g]);
      break;
    case PE_MXFP4: {
      /* 2^(e-128): exponent e - 1, and below 2^-126 the denormals 2^-128, 2^-127; the larger of the two as integers */
      v16i e = v16i_and(v16i_load_i8(head), v16i_set1(255));
      v16i normal = v16i_shl(v16i_sub(e, v16i_set1(1)), 23), denormal = v16i_shl(v16i_add(e, v16i_set1(1)), 21);
      o->s[0] = v16i_as_f(v16i_max(normal, denormal));
      pe_nibbles(body, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = v64u_table(e2m1, o->u[g]);
      break;
    }
    case PE_Q2_K: {
      v16f d = v16f_load_f16(head), dmin = v16f_load_f16(head + 32);
      v16i w = v16i_load(head + 64 + 64 * (j / 2)), scale = pe_bits(w, 0, 0x0f0f0f0f), min = pe_bits(w, 4, 0x0f0f0f0f);
PE_UNROLL(2)
      for (int h = 0; h < 2; h++) {
        o->s[h] = v16f_mul(d, pe_byte(scale, 2 * (j % 2) + h));
        o->o[h] = v16f_neg(v16f_mul(dmin, pe_byte(min, 2 * (j % 2) + h)));
      }
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = pe_plane2(body + 128 * j, g, 0);
      break;
    }
    case PE_Q3_K: {
      /* scale 4 q + i: low bits in nibble q / 2 of byte i of word q % 2, high bits at 2 q of byte i of word 2 */
      v16f d = v16f_load_f16(head);
      int q = j / 2;
      v16i scale = v16i_or(pe_bits(v16i_load(body + 64 * (q % 2)), 4 * (q / 2), 0x0f0f0f0f),
                           v16i_shl(pe_bits(v16i_load(body + 128), 2 * q, 0x03030303), 4));
PE_UNROLL(2)
      for (int h = 0; h < 2; h++)
        o->s[h] = v16f_mul(d, v16f_sub(pe_byte(scale, 2 * (j % 2) + h), v16f_set1(32.0f)));
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = pe_plane2(body + 192 + 192 * j, g, 0);
      pe_or_plane1(body + 192 + 192 * j + 128, 2, o->u);
      break;
    }
    case PE_Q4_K:
    case PE_Q5_K: {
      v16f scale, min;
      pe_scales_6bit(head + 64, j, &scale, &min);
      o->s[0] = v16f_mul(v16f_load_f16(head), scale);
      o->o[0] = v16f_neg(v16f_mul(v16f_load_f16(head + 32), min));
      pe_nibbles(body + (id == PE_Q5_K ? 320 : 256) * j, o->u);
      if (id == PE_Q5_K) pe_or_plane1(body + 320 * j + 256, 4, o->u);
      break;
    }
    case PE_Q6_K: {
      v16f d = v16f_load_f16(head);
      v16i w = v16i_load(body + 64 * (j / 2));
PE_UNROLL(2)
      for (int h = 0; h < 2; h++) /* signed bytes */
        o->s[h] = v16f_mul(d, v16i_to_f(v16i_shr(v16i_shl(w, 24 - 8 * (2 * (j % 2) + h)), 24)));
      pe_nibbles(body + 256 + 384 * j, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = v64u_or(o->u[g], pe_plane2(body + 256 + 384 * j + 256, g, 4));
      break;
    }
    case PE_IQ4_XS: {
      v16i low = pe_bits(v16i_load(head + 64), 4 * j, 15), high = pe_bits(v16i_load_u16(head + 32), 2 * j, 3);
      v16i scale = v16i_sub(v16i_or(low, v16i_shl(high, 4)), v16i_set1(32));
      o->s[0] = v16f_mul(v16f_load_f16(head), v16i_to_f(scale));
      pe_nibbles(body + 256 * j, o->u);
PE_UNROLL(8)
      for (int g = 0; g < 8; g++) o->u[g] = v64u_table(iq4, o->u[g]);
      break;
    }
    default: break;
  }
}

#endif

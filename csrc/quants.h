/* quants.h: the block formats of GGUF, shared by C, C++, CUDA and Metal.
 *
 * A row of a quantized tensor is a run of blocks; each block holds QK consecutive elements (32, or 256 for the K, IQ
 * and TQ families). Everything is little-endian. In the drawings one box is one byte, its most significant bits on
 * the left; `x[i]` is element i of the block and `q[i]` its integer code. Names and sizes are ggml's; the sizes and
 * the arithmetic agree with gguf-py 0.19 (constants.py:GGML_QUANT_SIZES, quants.py), which tests/kernels/test_dequant.py
 * checks bit by bit.
 *
 * Blocks of a file are aligned to their own size only, so a pointer to one may be odd (block_mxfp4 is 17 bytes long).
 */
#ifndef PE_QUANTS_H
#define PE_QUANTS_H

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
using namespace metal;
#else
#include <stdint.h>
#endif

#if defined(__CUDACC__)
#define PE_QUANT_FN static __host__ __device__ __forceinline__
#else
#define PE_QUANT_FN static inline
#endif

#include "gen/formats.h"

#if defined(__cplusplus) || defined(__METAL_VERSION__)
#define PE_BLOCK_SIZE(type, name) static_assert(sizeof(type) == PE_BYTES_##name, #type " has padding")
#else
#define PE_BLOCK_SIZE(type, name) _Static_assert(sizeof(type) == PE_BYTES_##name, #type " has padding")
#endif

/* ---- blocks of 32 ---------------------------------------------------------------------------------------------- */

#define PE_QK 32

/* The nibble order of every 32-block: byte i holds element i below and element i + 16 above.
 *
 *   qs[0]          qs[1]                qs[15]
 *   [q16 : q0 ]    [q17 : q1 ]   ...    [q31 : q15]
 */

/* x[i] = d * (q[i] - 8) */
typedef struct {
  uint16_t d;       /* f16 */
  uint8_t qs[16];   /* nibbles */
} block_q4_0;
PE_BLOCK_SIZE(block_q4_0, Q4_0);

/* x[i] = d * q[i] + m */
typedef struct {
  uint16_t d;       /* f16 */
  uint16_t m;       /* f16 */
  uint8_t qs[16];   /* nibbles */
} block_q4_1;
PE_BLOCK_SIZE(block_q4_1, Q4_1);

/* x[i] = d * q[i] + m, 2 bits a code; only caches have it. Bits 2 j of qs[h] hold q[16 h + j]. */
typedef struct {
  uint16_t d;       /* f16 */
  uint16_t m;       /* f16 */
  uint32_t qs[2];
} block_q2_1;
PE_BLOCK_SIZE(block_q2_1, Q2_1);

/* Q4_1_CHANNELS, Q2_1_CHANNELS: keys of 32 neighbouring cells of a head are e blocks of Q4_1 or Q2_1, one for each channel with its 32
 * elements. A cell's own bytes are a thirty-second part of them, and mean nothing alone. */

/* x[i] = d * (q[i] - 16), where q[i] = bit i of qh << 4 | nibble
 *
 *   qh[0]                        qh[3]
 *   [q7 q6 q5 q4 q3 q2 q1 q0] .. [q31 q30 q29 q28 q27 q26 q25 q24]     the fifth bits, one each
 */
typedef struct {
  uint16_t d;       /* f16 */
  uint8_t qh[4];    /* fifth bits; a little-endian uint32 whose bit i belongs to element i */
  uint8_t qs[16];   /* nibbles */
} block_q5_0;
PE_BLOCK_SIZE(block_q5_0, Q5_0);

/* x[i] = d * q[i] + m, codes as in block_q5_0 */
typedef struct {
  uint16_t d;       /* f16 */
  uint16_t m;       /* f16 */
  uint8_t qh[4];    /* fifth bits */
  uint8_t qs[16];   /* nibbles */
} block_q5_1;
PE_BLOCK_SIZE(block_q5_1, Q5_1);

/* x[i] = d * qs[i] */
typedef struct {
  uint16_t d;       /* f16 */
  int8_t qs[32];
} block_q8_0;
PE_BLOCK_SIZE(block_q8_0, Q8_0);

/* x[i] = d * qs[i]; s = d * sum(qs). An intermediate of dot products, never a weight: gguf-py has its size and no
 * dequantizer. (ggml itself has since made d and s f16: 36 bytes.) */
typedef struct {
  float d;
  float s;
  int8_t qs[32];
} block_q8_1;
PE_BLOCK_SIZE(block_q8_1, Q8_1);

/* x[i] = d * iq4_nl_values[nibble]: sixteen levels, denser around zero */
typedef struct {
  uint16_t d;       /* f16 */
  uint8_t qs[16];   /* nibbles */
} block_iq4_nl;
PE_BLOCK_SIZE(block_iq4_nl, IQ4_NL);

/* x[i] = 2^(e - 127) * e2m1(nibble), OCP Microscaling Formats v1.0. The codebook holds twice the e2m1 values, so that
 * it is integer; pe_e8m0_half_to_f32 takes the half back. */
typedef struct {
  uint8_t e;        /* e8m0 */
  uint8_t qs[16];   /* nibbles */
} block_mxfp4;
PE_BLOCK_SIZE(block_mxfp4, MXFP4);

/* Four sub-blocks of 16, each with a scale and its own nibble order: sub-block s owns d[s] and qs[8 s .. 8 s + 7].
 *
 *   qs[8 s]        qs[8 s + 1]          qs[8 s + 7]
 *   [q8  : q0 ]    [q9  : q1 ]   ...    [q15 : q7 ]          elements of sub-block s
 *
 * x[i] = e4m3(d[i / 16]) * e2m1(nibble), with the doubled codebook of mxfp4. */
typedef struct {
  uint8_t d[4];     /* e4m3, unsigned */
  uint8_t qs[32];   /* nibbles */
} block_nvfp4;
PE_BLOCK_SIZE(block_nvfp4, NVFP4);

/* 128 elements, one bit each: bit i % 8 of qs[i / 8]. gguf-py has its size and no dequantizer. */
typedef struct {
  uint16_t d;       /* f16 */
  uint8_t qs[16];
} block_q1_0;
PE_BLOCK_SIZE(block_q1_0, Q1_0);

/* ---- blocks of 256: K formats ---------------------------------------------------------------------------------- */

#define PE_QK_K 256

/* 16 sub-blocks of 16 elements, 2 bits each.
 *
 *   scales[j] = [ min j : scale j ]
 *   qs[0..31]    [q96  q64  q32  q0 ]  [q97  q65  q33  q1 ]  ...  [q127 q95  q63  q31 ]     elements   0..127
 *   qs[32..63]   [q224 q192 q160 q128] [q225 q193 q161 q129] ...  [q255 q223 q191 q159]     elements 128..255
 *
 * x[i] = (d * scale[i / 16]) * q[i] - dmin * min[i / 16] */
typedef struct {
  uint8_t scales[16];
  uint8_t qs[64];
  uint16_t d;         /* f16 */
  uint16_t dmin;      /* f16 */
} block_q2_K;
PE_BLOCK_SIZE(block_q2_K, Q2_K);

/* 16 sub-blocks of 16 elements, 3 bits each: low two in qs (order of block_q2_K), the third in hmask.
 *
 *   hmask[l]   bit k belongs to element 32 k + l;  a *clear* bit subtracts 4
 *   scales     16 six-bit scales A..P, biased by 32; capitals hold the low four bits, small letters the high two
 *     [IIII AAAA] [JJJJ BBBB] [KKKK CCCC] [LLLL DDDD] [MMMM EEEE] [NNNN FFFF] [OOOO GGGG] [PPPP HHHH]
 *     [mm ii ee aa] [nn jj ff bb] [oo kk gg cc] [pp ll hh dd]
 *
 * x[i] = (d * (scale[i / 16] - 32)) * (q[i] - (hbit[i] ? 0 : 4)) */
typedef struct {
  uint8_t hmask[32];
  uint8_t qs[64];
  uint8_t scales[12];
  uint16_t d;         /* f16 */
} block_q3_K;
PE_BLOCK_SIZE(block_q3_K, Q3_K);

/* 8 sub-blocks of 32 elements, 4 bits each.
 *
 *   scales     8 six-bit scales A..H and 8 six-bit mins S..Z; capitals hold the low bits, small letters the high two
 *     [ee AAAAAA] [ff BBBBBB] [gg CCCCCC] [hh DDDDDD]
 *     [ww SSSSSS] [xx TTTTTT] [yy UUUUUU] [zz VVVVVV]
 *     [WWWW EEEE] [XXXX FFFF] [YYYY GGGG] [ZZZZ HHHH]
 *   qs[32 k + l] = [ q[64 k + 32 + l] : q[64 k + l] ]       k = 0..3, l = 0..31
 *
 * x[i] = (d * scale[i / 32]) * q[i] - dmin * min[i / 32] */
typedef struct {
  uint16_t d;         /* f16 */
  uint16_t dmin;      /* f16 */
  uint8_t scales[12];
  uint8_t qs[128];
} block_q4_K;
PE_BLOCK_SIZE(block_q4_K, Q4_K);

/* block_q4_K and a fifth bit: bit k of qh[l] belongs to element 32 k + l. */
typedef struct {
  uint16_t d;         /* f16 */
  uint16_t dmin;      /* f16 */
  uint8_t scales[12];
  uint8_t qh[32];
  uint8_t qs[128];
} block_q5_K;
PE_BLOCK_SIZE(block_q5_K, Q5_K);

/* 16 sub-blocks of 16 elements, 6 bits each, in two halves h of 128 elements; l = 0..31, r = 128 h + l:
 *
 *   ql[64 h + l]      = [ q[r + 64] : q[r     ] ]           low four bits
 *   ql[64 h + 32 + l] = [ q[r + 96] : q[r + 32] ]
 *   qh[32 h + l]      = [ q[r + 96] q[r + 64] q[r + 32] q[r] ]   high two bits
 *
 * x[i] = (d * scales[i / 16]) * (q[i] - 32) */
typedef struct {
  uint8_t ql[128];
  uint8_t qh[64];
  int8_t scales[16];
  uint16_t d;         /* f16 */
} block_q6_K;
PE_BLOCK_SIZE(block_q6_K, Q6_K);

/* x[i] = d * qs[i]; bsums[j] = sum of sub-block j of 16. An intermediate of dot products, as block_q8_1. */
typedef struct {
  float d;
  int8_t qs[256];
  int16_t bsums[16];
} block_q8_K;
PE_BLOCK_SIZE(block_q8_K, Q8_K);

/* ---- blocks of 256: codebook formats ------------------------------------------------------------------------------
 *
 * An index selects a row of a codebook ("grid"): 8 elements for IQ1 and IQ2, 4 for IQ3. Elements are positive in IQ2
 * and IQ3 and carry their signs separately: eight bits, bit i = 1 for a negative element i, or the first seven of
 * such eight bits, the last being their parity (the number of minus signs is even). The codebooks are data:
 * pe_set_codebook in host/dequant.h. */

/* 8 sub-blocks of 32 elements, each two little-endian uint32 in qs[4 j .. 4 j + 3]:
 *
 *   first    [index 3 ][index 2 ][index 1 ][index 0 ]       8 bits each, 8 elements each
 *   second   [ scale:4 | signs 3:7 | signs 2:7 | signs 1:7 | signs 0:7 ]
 *
 * x = d * (0.5 + scale) * 0.25 * grid * sign */
typedef struct {
  uint16_t d;         /* f16 */
  uint16_t qs[32];
} block_iq2_xxs;
PE_BLOCK_SIZE(block_iq2_xxs, IQ2_XXS);

/* qs[j] = [ signs:7 | index:9 ], 8 elements; scales[j] = [ scale 2 j + 1 : scale 2 j ], 16 elements each. */
typedef struct {
  uint16_t d;         /* f16 */
  uint16_t qs[32];
  uint8_t scales[8];
} block_iq2_xs;
PE_BLOCK_SIZE(block_iq2_xs, IQ2_XS);

/* Group j of 8 elements: index = [ bits 2 (j % 4) of qh[j / 4] : qs[j] ], 10 bits; signs[j]; scales as in iq2_xs. */
typedef struct {
  uint16_t d;         /* f16 */
  uint8_t qs[32];
  uint8_t signs[32];
  uint8_t qh[8];
  uint8_t scales[8];
} block_iq2_s;
PE_BLOCK_SIZE(block_iq2_s, IQ2_S);

/* Group j of 4 elements: index qs[j]. Sub-block k of 32 elements: a little-endian uint32 at aux[4 k],
 * [ scale:4 | signs 3:7 | signs 2:7 | signs 1:7 | signs 0:7 ]. x = d * (0.5 + scale) * 0.5 * grid * sign */
typedef struct {
  uint16_t d;         /* f16 */
  uint8_t qs[64];
  uint8_t aux[32];
} block_iq3_xxs;
PE_BLOCK_SIZE(block_iq3_xxs, IQ3_XXS);

/* Group j of 4 elements: index = [ bit j % 8 of qh[j / 8] : qs[j] ], 9 bits; signs[j / 2], low nibble for even j.
 * scales[k] = [ scale 2 k + 1 : scale 2 k ], 32 elements each. x = d * (1 + 2 * scale) * grid * sign */
typedef struct {
  uint16_t d;         /* f16 */
  uint8_t qs[64];
  uint8_t qh[8];
  uint8_t signs[32];
  uint8_t scales[4];
} block_iq3_s;
PE_BLOCK_SIZE(block_iq3_s, IQ3_S);

/* 8 sub-blocks of 32 elements; group g of sub-block k: index = [ high g : qs[4 k + g] ], 11 bits.
 *
 *   qh[k] = [ delta:1 | scale:3 | high 3:3 | high 2:3 | high 1:3 | high 0:3 ]
 *
 * x = d * (2 * scale + 1) * (grid + (delta ? -1/8 : 1/8)); the grid holds -1, 0 and 1 */
typedef struct {
  uint16_t d;         /* f16 */
  uint8_t qs[32];
  uint16_t qh[8];
} block_iq1_s;
PE_BLOCK_SIZE(block_iq1_s, IQ1_S);

/* 32 groups of 8 elements. Group j: index = [ high : qs[j] ], where nibble j % 2 of qh[j / 2] = [ delta:1 | high:3 ].
 * 16 scales of three bits, 16 elements each, and one f16 d share scales, read as four little-endian uint16:
 *
 *   word k = [ d bits 4 k .. 4 k + 3 | scale 4 k + 3 | scale 4 k + 2 | scale 4 k + 1 | scale 4 k ]
 *
 * x as in block_iq1_s */
typedef struct {
  uint8_t qs[32];
  uint8_t qh[16];
  uint8_t scales[8];
} block_iq1_m;
PE_BLOCK_SIZE(block_iq1_m, IQ1_M);

/* 8 sub-blocks of 32 elements, each in the codebook and nibble order of block_iq4_nl: sub-block k owns qs[16 k ..+15].
 * scale k = [ bits 2 k of scales_h : nibble k % 2 of scales_l[k / 2] ], biased by 32. x = (d * (scale - 32)) * value */
typedef struct {
  uint16_t d;         /* f16 */
  uint16_t scales_h;
  uint8_t scales_l[4];
  uint8_t qs[128];
} block_iq4_xs;
PE_BLOCK_SIZE(block_iq4_xs, IQ4_XS);

/* ---- blocks of 256: ternary formats ---------------------------------------------------------------------------- */

/* Five base-3 digits a byte (four in qh), the byte being ceil(number * 256 / 243): digit n of byte b is
 * ((uint8_t)(b * 3^n) * 3) >> 8. Element order is digit-major inside each run of bytes:
 *
 *   qs[0..31]    x[32 n + l],        n = 0..4, l = 0..31
 *   qs[32..47]   x[160 + 16 n + l],  n = 0..4, l = 0..15
 *   qh[0..3]     x[240 + 4 n + l],   n = 0..3, l = 0..3
 *
 * x[i] = d * (digit - 1) */
typedef struct {
  uint8_t qs[48];
  uint8_t qh[4];
  uint16_t d;         /* f16 */
} block_tq1_0;
PE_BLOCK_SIZE(block_tq1_0, TQ1_0);

/* x[i] = d * (q[i] - 1), two bits each in the order of block_q2_K. */
typedef struct {
  uint8_t qs[64];
  uint16_t d;         /* f16 */
} block_tq2_0;
PE_BLOCK_SIZE(block_tq2_0, TQ2_0);

/* ---- sixteen-level codebooks: initialisers, because C, CUDA and Metal keep constants in different places ------- */

#define PE_IQ4_NL_VALUES {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113}

/* Twice the values of e2m1: sign, two exponent bits, one mantissa bit. */
#define PE_E2M1_X2_VALUES {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}

/* ---- scalar conversions: exact for every input, whatever the flush-to-zero mode -------------------------------- */

PE_QUANT_FN float pe_float_from_bits(uint32_t bits) {
#if defined(__METAL_VERSION__)
  return as_type<float>(bits);
#else
  union { uint32_t u; float f; } v;
  v.u = bits;
  return v.f;
#endif
}

/* IEEE binary16. A NaN stays a NaN with its payload. */
PE_QUANT_FN float pe_f16_to_f32(uint16_t h) {
  uint32_t magnitude = h & 0x7fffu;
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
  if (magnitude < 0x0400u) {            /* zero and subnormal: m * 2^-24, a normal float32 */
    float v = (float)(int32_t)magnitude * 5.9604644775390625e-8f;
    return sign ? -v : v;
  }
  /* exponent bias 15 -> 127; an all-ones exponent stays all ones */
  return pe_float_from_bits(sign | ((magnitude << 13) + (magnitude < 0x7c00u ? 0x38000000u : 0x70000000u)));
}

/* The upper half of a float32. */
PE_QUANT_FN float pe_bf16_to_f32(uint16_t h) { return pe_float_from_bits((uint32_t)h << 16); }

/* 2^(e - 128): half an e8m0 scale, to be multiplied by a doubled e2m1 value. The NaN 255 reads as 2^127, as in ggml. */
PE_QUANT_FN float pe_e8m0_half_to_f32(uint8_t e) {
  return pe_float_from_bits(e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23);
}

/* Half an unsigned e4m3 scale (bias 7), to be multiplied by a doubled e2m1 value. Bit 7 is ignored and the NaN 0x7f
 * reads as 0, as in gguf-py. */
PE_QUANT_FN float pe_e4m3_half_to_f32(uint8_t x) {
  uint32_t exponent = (x >> 3) & 15u, mantissa = x & 7u;
  if (x == 0x7f) return 0.0f;
  if (exponent == 0) return (float)(int32_t)mantissa * 0.0009765625f;   /* m * 2^-9 / 2 */
  return pe_float_from_bits(((exponent + 119u) << 23) | (mantissa << 20));   /* 2^(exponent - 7) / 2 */
}

#endif

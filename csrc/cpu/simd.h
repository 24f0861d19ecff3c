/* simd.h: vectors of 16 lanes, the same on every instruction set.
 *
 *   v16f  16 float          v16i  16 int32          v64u  64 bytes, seen as 16 lanes of 4
 *
 * avx512 holds one in 1 register, avx2 and sve256 in 2, neon and generic in 4: the struct members a, b, c, d are those parts. What the
 * compiler's vector operators can say (+ - * & | ^ << >>) is written once for all; each instruction set adds the rest as
 * functions of one part. Loads and stores need no alignment. The order of operations inside a function is the same everywhere,
 * so machines with a fused multiply-add agree bit for bit; generic rounds the product of v16f_fma first.
 */
#ifndef PE_SIMD_H
#define PE_SIMD_H

#include <stdint.h>
#include <string.h>

#include "../guard.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define PE_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PE_AVX2 1
#if defined(__AVXVNNI__)
#define PE_AVXVNNI 1
#endif
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#define PE_NEON 1
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define PE_I8MM 1
#endif
#if defined(__ARM_FEATURE_SME)
#define PE_SME 1
#endif
#if defined(__ARM_FEATURE_SVE_BITS) && __ARM_FEATURE_SVE_BITS == 256
#define PE_SVE256 1
#endif
#include <arm_neon.h>
#else
#define PE_GENERIC 1
#endif

#define PE_INLINE static inline __attribute__((always_inline, unused))

/* ---- parts ---- */

#if defined(PE_AVX512)
#define PE_PARTS 1
#elif defined(PE_AVX2) || defined(PE_SVE256)
#define PE_PARTS 2
#else
#define PE_PARTS 4
#endif
#define PE_PART_BYTES (64 / PE_PARTS)
#define PE_PART_LANES (16 / PE_PARTS)

typedef float pe_pf __attribute__((vector_size(PE_PART_BYTES)));
typedef int32_t pe_pi __attribute__((vector_size(PE_PART_BYTES)));
typedef uint32_t pe_pw __attribute__((vector_size(PE_PART_BYTES)));
typedef uint16_t pe_ph __attribute__((vector_size(PE_PART_BYTES)));
typedef uint8_t pe_pb __attribute__((vector_size(PE_PART_BYTES)));
typedef int8_t pe_ps __attribute__((vector_size(PE_PART_BYTES)));
typedef float pe_pf_mem __attribute__((vector_size(PE_PART_BYTES), aligned(1), may_alias));
typedef int32_t pe_pi_mem __attribute__((vector_size(PE_PART_BYTES), aligned(1), may_alias));

/* PE_MAPn(f, x, ..., o): {f(part 0 of x, ..., 0), f(part 1 of x, ..., 1), ...}; `o` lets f find its place in memory. */
#if PE_PARTS == 1
typedef struct { pe_pf a; } v16f;
typedef struct { pe_pi a; } v16i;
typedef struct { pe_pb a; } v64u;
#define PE_MAP0(f) {f(0)}
#define PE_MAP1(f, x) {f((x).a)}
#define PE_MAP2(f, x, y) {f((x).a, (y).a)}
#define PE_MAP3(f, x, y, z) {f((x).a, (y).a, (z).a)}
#define PE_MAP4(f, x, y, z, w) {f((x).a, (y).a, (z).a, (w).a)}
#define PE_EACH1(f, x) do { f(0, (x).a); } while (0)
#elif PE_PARTS == 2
typedef struct { pe_pf a, b; } v16f;
typedef struct { pe_pi a, b; } v16i;
typedef struct { pe_pb a, b; } v64u;
#define PE_MAP0(f) {f(0), f(1)}
#define PE_MAP1(f, x) {f((x).a), f((x).b)}
#define PE_MAP2(f, x, y) {f((x).a, (y).a), f((x).b, (y).b)}
#define PE_MAP3(f, x, y, z) {f((x).a, (y).a, (z).a), f((x).b, (y).b, (z).b)}
#define PE_MAP4(f, x, y, z, w) {f((x).a, (y).a, (z).a, (w).a), f((x).b, (y).b, (z).b, (w).b)}
#define PE_EACH1(f, x) do { f(0, (x).a); f(1, (x).b); } while (0)
#else
typedef struct { pe_pf a, b, c, d; } v16f;
typedef struct { pe_pi a, b, c, d; } v16i;
typedef struct { pe_pb a, b, c, d; } v64u;
#define PE_MAP0(f) {f(0), f(1), f(2), f(3)}
#define PE_MAP1(f, x) {f((x).a), f((x).b), f((x).c), f((x).d)}
#define PE_MAP2(f, x, y) {f((x).a, (y).a), f((x).b, (y).b), f((x).c, (y).c), f((x).d, (y).d)}
#define PE_MAP3(f, x, y, z)                                                                                            \
  {f((x).a, (y).a, (z).a), f((x).b, (y).b, (z).b), f((x).c, (y).c, (z).c), f((x).d, (y).d, (z).d)}
#define PE_MAP4(f, x, y, z, w)                                                                                         \
  {f((x).a, (y).a, (z).a, (w).a), f((x).b, (y).b, (z).b, (w).b), f((x).c, (y).c, (z).c, (w).c), f((x).d, (y).d, (z).d, (w).d)}
#define PE_EACH1(f, x) do { f(0, (x).a); f(1, (x).b); f(2, (x).c); f(3, (x).d); } while (0)
#endif

/* ---- what an instruction set adds, one part at a time ----
 * p_fma(a, b, c) = a*b + c     p_min, p_max: the second operand when either is NaN (x86's rule)
 * p_select_lt(a, b, x, y) = a < b ? x : y     p_round: float to int32, nearest even     p_table: 16 bytes, index < 16
 * p_f16 / p_to_f16, p_i8: from and to memory     p_insert: bits of another vector where a mask has them and the first has
 *   none     p_high_nibbles: of bytes
 * p_dot_u7(acc, w, x): acc[l] += sum over 4 bytes of w[l] (unsigned, <= 127) * x[l] (signed, >= -127)
 * p_dot_z128(acc, w, x): the same for any unsigned w, less PE_DOT_ZERO times the sum of x: VNNI multiplies unsigned bytes
 *   (PE_DOT_ZERO 0: the caller takes off 128 * sum), the others take off the zero point 128 themselves (PE_DOT_ZERO 128). */

#if defined(PE_AVX512)
#define PE_DOT_ZERO 0
PE_INLINE pe_pf p_fma(pe_pf a, pe_pf b, pe_pf c) { return (pe_pf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
PE_INLINE pe_pf p_min(pe_pf a, pe_pf b) { return (pe_pf)_mm512_min_ps((__m512)a, (__m512)b); }
PE_INLINE pe_pf p_max(pe_pf a, pe_pf b) { return (pe_pf)_mm512_max_ps((__m512)a, (__m512)b); }
PE_INLINE pe_pf p_sqrt(pe_pf a) { return (pe_pf)_mm512_sqrt_ps((__m512)a); }
PE_INLINE pe_pf p_select_lt(pe_pf a, pe_pf b, pe_pf x, pe_pf y) {
  return (pe_pf)_mm512_mask_blend_ps(_mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ), (__m512)y, (__m512)x);
}
PE_INLINE pe_pi p_round(pe_pf a) { return (pe_pi)_mm512_cvtps_epi32((__m512)a); }
PE_INLINE pe_pf p_to_f(pe_pi a) { return (pe_pf)_mm512_cvtepi32_ps((__m512i)a); }
PE_INLINE pe_pi p_maxi(pe_pi a, pe_pi b) { return (pe_pi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
PE_INLINE pe_pf p_f16(const void *p) { return (pe_pf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
PE_INLINE void p_to_f16(void *p, pe_pf v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PE_INLINE pe_pi p_u16(const void *p) { return (pe_pi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
PE_INLINE pe_pi p_i8(const void *p) { return (pe_pi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
PE_INLINE void p_to_u16(void *p, pe_pi v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)v)); }
PE_INLINE void p_to_i8(void *p, pe_pi v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8((__m512i)v)); }
PE_INLINE pe_pb p_table(const uint8_t t[16], pe_pb i) {
  return (pe_pb)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)t)), (__m512i)i);
}
PE_INLINE pe_pi p_dot_u7(pe_pi acc, pe_pb w, pe_pb x) {
  return (pe_pi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}
PE_INLINE pe_pi p_dot_z128(pe_pi acc, pe_pb w, pe_pb x) { return p_dot_u7(acc, w, x); }

#elif defined(PE_AVX2)
PE_INLINE pe_pf p_fma(pe_pf a, pe_pf b, pe_pf c) { return (pe_pf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
PE_INLINE pe_pf p_min(pe_pf a, pe_pf b) { return (pe_pf)_mm256_min_ps((__m256)a, (__m256)b); }
PE_INLINE pe_pf p_max(pe_pf a, pe_pf b) { return (pe_pf)_mm256_max_ps((__m256)a, (__m256)b); }
PE_INLINE pe_pf p_sqrt(pe_pf a) { return (pe_pf)_mm256_sqrt_ps((__m256)a); }
PE_INLINE pe_pf p_select_lt(pe_pf a, pe_pf b, pe_pf x, pe_pf y) {
  return (pe_pf)_mm256_blendv_ps((__m256)y, (__m256)x, _mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ));
}
PE_INLINE pe_pi p_round(pe_pf a) { return (pe_pi)_mm256_cvtps_epi32((__m256)a); }
PE_INLINE pe_pf p_to_f(pe_pi a) { return (pe_pf)_mm256_cvtepi32_ps((__m256i)a); }
PE_INLINE pe_pi p_maxi(pe_pi a, pe_pi b) { return (pe_pi)_mm256_max_epi32((__m256i)a, (__m256i)b); }
PE_INLINE pe_pf p_f16(const void *p) { return (pe_pf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
PE_INLINE void p_to_f16(void *p, pe_pf v) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PE_INLINE pe_pi p_u16(const void *p) { return (pe_pi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
PE_INLINE pe_pi p_i8(const void *p) { return (pe_pi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
PE_INLINE void p_to_u16(void *p, pe_pi v) {
  __m256i w = _mm256_packus_epi32((__m256i)v, (__m256i)v); /* the caller's values fit 16 bits */
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(w, 0x08)));
}
PE_INLINE void p_to_i8(void *p, pe_pi v) {
  __m128i w = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(w, w));
}
PE_INLINE pe_pb p_table(const uint8_t t[16], pe_pb i) {
  return (pe_pb)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)t)), (__m256i)i);
}
/* A sum stays one chain: GCC would make a tree of it, and keep all its terms in memory. */
PE_INLINE pe_pi p_chain(pe_pi sum) {
  __asm__("" : "+x"(sum));
  return sum;
}
PE_INLINE pe_pi p_pairs(pe_pb w, pe_pb x) { return (pe_pi)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
PE_INLINE pe_pi p_widen(pe_pi acc, pe_pi pairs) { /* acc[l] += both halves of pairs[l] */
  return p_chain(acc + (pe_pi)_mm256_madd_epi16((__m256i)pairs, _mm256_set1_epi16(1)));
}
#if defined(PE_AVXVNNI)
#define PE_DOT_ZERO 0
PE_INLINE pe_pi p_dot_u7(pe_pi acc, pe_pb w, pe_pb x) {
  return (pe_pi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
}
PE_INLINE pe_pi p_dot_z128(pe_pi acc, pe_pb w, pe_pb x) { return p_dot_u7(acc, w, x); }
#else
#define PE_DOT_ZERO 128
/* 127 * 127 * 2 and 128 * 127 * 2 both fit the 16 bits of vpmaddubsw. */
PE_INLINE pe_pi p_dot_u7(pe_pi acc, pe_pb w, pe_pb x) { return p_widen(acc, p_pairs(w, x)); }
PE_INLINE pe_pi p_dot_z128(pe_pi acc, pe_pb w, pe_pb x) {
  __m256i s = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8((char)0x80));
  return p_dot_u7(acc, (pe_pb)_mm256_abs_epi8(s), (pe_pb)_mm256_sign_epi8((__m256i)x, s));
}
#endif

#elif defined(PE_SVE256)
#include "simd_sve.h"

#elif defined(PE_NEON)
#include "simd_neon.h"

#else
#define PE_DOT_ZERO 128
PE_INLINE float p_half_to_float(uint16_t h) {
  /* Put exponent and mantissa in place with the wrong bias, then multiply by 2^112: denormals come out exact. */
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float f, scale = 0x1p112f;
  memcpy(&f, &bits, 4);
  f *= scale;
  memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits = 0x7f800000u | (uint32_t)(h & 0x3ff) << 13 | (h & 0x3ff ? 0x400000u : 0);
  bits |= (uint32_t)(h & 0x8000) << 16;
  memcpy(&f, &bits, 4);
  return f;
}
PE_INLINE uint16_t p_float_to_half(float f) {
  uint32_t bits, sign;
  memcpy(&bits, &f, 4);
  sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* 65520 and more round to infinity */
  if (bits < 0x38800000u) {                                  /* below 2^-14: the sum's last bit is worth 2^-24 */
    float g, half = 0.5f;
    memcpy(&g, &bits, 4);
    g += half;
    memcpy(&bits, &g, 4);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return (uint16_t)(sign | ((bits - 0x38000000u) >> 13));
}
#define PE_FOR4 for (int i = 0; i < 4; i++)
PE_INLINE pe_pf p_fma(pe_pf a, pe_pf b, pe_pf c) { return a * b + c; }
PE_INLINE pe_pf p_select_lt(pe_pf a, pe_pf b, pe_pf x, pe_pf y) {
  pe_pi m = a < b;
  return (pe_pf)((m & (pe_pi)x) | (~m & (pe_pi)y));
}
PE_INLINE pe_pf p_min(pe_pf a, pe_pf b) { return p_select_lt(a, b, a, b); }
PE_INLINE pe_pf p_max(pe_pf a, pe_pf b) { return p_select_lt(b, a, a, b); }
PE_INLINE pe_pf p_sqrt(pe_pf a) { PE_FOR4 a[i] = __builtin_sqrtf(a[i]); return a; }
PE_INLINE pe_pf p_to_f(pe_pi a) { pe_pf r; PE_FOR4 r[i] = (float)a[i]; return r; }
/* Adding 1.5 * 2^23 leaves the integer, rounded to nearest even, in the low bits; good for |a| < 2^22, saturates beyond. */
PE_INLINE pe_pi p_round(pe_pf a) {
  const pe_pf big = (pe_pf){} + 4194303.0f, magic = (pe_pf){} + 12582912.0f;
  a = p_max(p_min(a, big), -big);
  return (pe_pi)(a + magic) - (pe_pi)magic;
}
PE_INLINE pe_pi p_maxi(pe_pi a, pe_pi b) {
  pe_pi m = a > b;
  return (m & a) | (~m & b);
}
PE_INLINE pe_pf p_f16(const void *p) {
  uint16_t h[4];
  pe_pf r;
  memcpy(h, p, 8);
  PE_FOR4 r[i] = p_half_to_float(h[i]);
  return r;
}
PE_INLINE void p_to_f16(void *p, pe_pf v) {
  uint16_t h[4];
  PE_FOR4 h[i] = p_float_to_half(v[i]);
  memcpy(p, h, 8);
}
PE_INLINE pe_pi p_u16(const void *p) {
  uint16_t h[4];
  pe_pi r;
  memcpy(h, p, 8);
  PE_FOR4 r[i] = h[i];
  return r;
}
PE_INLINE pe_pi p_i8(const void *p) {
  int8_t h[4];
  pe_pi r;
  memcpy(h, p, 4);
  PE_FOR4 r[i] = h[i];
  return r;
}
PE_INLINE void p_to_u16(void *p, pe_pi v) {
  uint16_t h[4];
  PE_FOR4 h[i] = (uint16_t)v[i];
  memcpy(p, h, 8);
}
PE_INLINE void p_to_i8(void *p, pe_pi v) {
  int8_t h[4];
  PE_FOR4 h[i] = (int8_t)(v[i] > 127 ? 127 : v[i] < -128 ? -128 : v[i]);
  memcpy(p, h, 4);
}
PE_INLINE pe_pb p_table(const uint8_t t[16], pe_pb x) {
  for (int i = 0; i < 16; i++) x[i] = t[x[i] & 15];
  return x;
}
/* Even and odd bytes as 16-bit lanes: two products of 16 bits, then pairs of those are added as 32 bits. */
PE_INLINE pe_pi p_dot_s(pe_pi acc, pe_pb w, pe_pb x) {
  typedef int16_t ph __attribute__((vector_size(16)));
  ph lo = ((ph)w << 8 >> 8) * ((ph)x << 8 >> 8), hi = ((ph)w >> 8) * ((ph)x >> 8);
  return acc + (((pe_pi)lo << 16) >> 16) + ((pe_pi)lo >> 16) + (((pe_pi)hi << 16) >> 16) + ((pe_pi)hi >> 16);
}
PE_INLINE pe_pi p_dot_u7(pe_pi acc, pe_pb w, pe_pb x) { return p_dot_s(acc, w, x); }
PE_INLINE pe_pi p_dot_z128(pe_pi acc, pe_pb w, pe_pb x) { return p_dot_s(acc, w ^ (uint8_t)0x80, x); }
#endif

#if !defined(PE_NEON) || defined(PE_SVE256) /* NEON has an instruction for each */
PE_INLINE pe_pb p_insert(pe_pb a, pe_pb b, uint8_t mask) { return a | (b & mask); }
PE_INLINE pe_pb p_high_nibbles(pe_pb a) { return (pe_pb)((pe_ph)a >> 4) & 15; }
#endif

/* ---- loads and stores; the _n forms touch n <= 16 lanes only, loads give 0 for the rest ---- */

#define PE_P_LOAD(o) (pe_pf)((const pe_pf_mem *)p)[o]
#define PE_P_LOADI(o) (pe_pi)((const pe_pi_mem *)p)[o]
#define PE_P_LOADB(o) (pe_pb)((const pe_pi_mem *)p)[o]
#define PE_P_STORE(o, x) ((pe_pf_mem *)p)[o] = (x)
#define PE_P_STOREI(o, x) ((pe_pi_mem *)p)[o] = (pe_pi)(x)
#define PE_P_SET1(o) (pe_pf){} + x
#define PE_P_SET1I(o) (pe_pi){} + x
#define PE_P_SET1B(o) (pe_pb){} + x

PE_INLINE v16f v16f_load(const float *p) { return (v16f)PE_MAP0(PE_P_LOAD); }
PE_INLINE void v16f_store(float *p, v16f v) { PE_EACH1(PE_P_STORE, v); }
PE_INLINE v16i v16i_load(const void *p) { return (v16i)PE_MAP0(PE_P_LOADI); }
PE_INLINE void v16i_store(void *p, v16i v) { PE_EACH1(PE_P_STOREI, v); }
PE_INLINE v64u v64u_load(const void *p) { return (v64u)PE_MAP0(PE_P_LOADB); }
PE_INLINE void v64u_store(void *p, v64u v) { PE_EACH1(PE_P_STOREI, v); }

#if defined(PE_AVX512)
PE_INLINE v16f v16f_set1(float x) { return (v16f){(pe_pf)_mm512_set1_ps(x)}; }
PE_INLINE v16i v16i_set1(int32_t x) { return (v16i){(pe_pi)_mm512_set1_epi32(x)}; }
PE_INLINE v64u v64u_set1(uint8_t x) { return (v64u){(pe_pb)_mm512_set1_epi8((char)x)}; }
#elif defined(PE_AVX2)
PE_INLINE v16f v16f_set1(float x) { pe_pf v = (pe_pf)_mm256_set1_ps(x); return (v16f){v, v}; }
PE_INLINE v16i v16i_set1(int32_t x) { pe_pi v = (pe_pi)_mm256_set1_epi32(x); return (v16i){v, v}; }
PE_INLINE v64u v64u_set1(uint8_t x) { pe_pb v = (pe_pb)_mm256_set1_epi8((char)x); return (v64u){v, v}; }
#elif !defined(PE_SVE256)
PE_INLINE v16f v16f_set1(float x) { pe_pf v = {x, x, x, x}; return (v16f){v, v, v, v}; }
PE_INLINE v16i v16i_set1(int32_t x) { pe_pi v = {x, x, x, x}; return (v16i){v, v, v, v}; }
PE_INLINE v64u v64u_set1(uint8_t x) {
  pe_pb v = {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
  return (v64u){v, v, v, v};
}
#endif
PE_INLINE v16f v16f_zero(void) { return v16f_set1(0.0f); }
PE_INLINE v16i v16i_zero(void) { return v16i_set1(0); }

PE_INLINE v16f v16f_load_n(const float *p, int64_t n) {
#if defined(PE_AVX512)
  PE_READS(p, n * 4);
  return (v16f){(pe_pf)_mm512_maskz_loadu_ps((__mmask16)_bzhi_u32(0xffff, (unsigned)n), p)};
#else
  float t[16] = {0};
  memcpy(t, p, (size_t)n * 4);
  return v16f_load(t);
#endif
}
PE_INLINE void v16f_store_n(float *p, v16f v, int64_t n) {
#if defined(PE_AVX512)
  PE_WRITES(p, n * 4);
  _mm512_mask_storeu_ps(p, (__mmask16)_bzhi_u32(0xffff, (unsigned)n), (__m512)v.a);
#else
  float t[16];
  v16f_store(t, v);
  memcpy(p, t, (size_t)n * 4);
#endif
}

#define PE_P_F16(o) p_f16((const char *)p + (o) * PE_PART_LANES * 2)
#define PE_P_TO_F16(o, x) p_to_f16((char *)p + (o) * PE_PART_LANES * 2, x)
#define PE_P_U16(o) p_u16((const char *)p + (o) * PE_PART_LANES * 2)
#define PE_P_TO_U16(o, x) p_to_u16((char *)p + (o) * PE_PART_LANES * 2, x)
#define PE_P_I8(o) p_i8((const char *)p + (o) * PE_PART_LANES)
#define PE_P_TO_I8(o, x) p_to_i8((char *)p + (o) * PE_PART_LANES, x)

PE_INLINE v16f v16f_load_f16(const void *p) { return (v16f)PE_MAP0(PE_P_F16); }
PE_INLINE void v16f_store_f16(void *p, v16f v) { PE_EACH1(PE_P_TO_F16, v); }       /* to nearest even */
PE_INLINE v16i v16i_load_u16(const void *p) { return (v16i)PE_MAP0(PE_P_U16); }
PE_INLINE void v16i_store_u16(void *p, v16i v) { PE_EACH1(PE_P_TO_U16, v); }       /* values 0 .. 65535 */
PE_INLINE v16i v16i_load_i8(const void *p) { return (v16i)PE_MAP0(PE_P_I8); }
PE_INLINE void v16i_store_i8(void *p, v16i v) { PE_EACH1(PE_P_TO_I8, v); }         /* saturates */

/* ---- arithmetic ---- */

#define PE_P_ADD(x, y) (x) + (y)
#define PE_P_SUB(x, y) (x) - (y)
#define PE_P_MUL(x, y) (x) * (y)
#define PE_P_DIV(x, y) (x) / (y)
#define PE_P_ADDI(x, y) (pe_pi)((pe_pw)(x) + (pe_pw)(y)) /* these wrap: codes of NaN are the least int */
#define PE_P_SUBI(x, y) (pe_pi)((pe_pw)(x) - (pe_pw)(y))
#define PE_P_MULI(x, y) (pe_pi)((pe_pw)(x) * (pe_pw)(y))
#define PE_P_AND(x, y) (x) & (y)
#define PE_P_OR(x, y) (x) | (y)
#define PE_P_XOR(x, y) (x) ^ (y)
#define PE_P_NEG(x) -(x)
#define PE_P_ABS(x) (pe_pf)((pe_pi)(x) & 0x7fffffff)
#define PE_P_BITS(x) (pe_pi)(x)
#define PE_P_FLOAT(x) (pe_pf)(x)
#define PE_P_SHL(x) (pe_pi)((pe_pw)(x) << n)
#define PE_P_SHR(x) (x) >> n
#define PE_P_SHRU_EACH(x, n) (pe_pi)((pe_pw)(x) >> (pe_pw)(n))
#define PE_P_SHRU(x) (pe_pi)((pe_pw)(x) >> n)
#define PE_P_SHLB(x) (pe_pb)((pe_ph)(x) << n)
#define PE_P_SHRB(x) (pe_pb)((pe_ph)(x) >> n)
#define PE_P_TABLE(x) p_table(t, x)
#define PE_P_SIGN(x, y) (pe_pf)(((pe_pi)(x) & 0x7fffffff) | ((pe_pi)(y) & (int32_t)0x80000000))

PE_INLINE v16f v16f_add(v16f x, v16f y) { return (v16f)PE_MAP2(PE_P_ADD, x, y); }
PE_INLINE v16f v16f_sub(v16f x, v16f y) { return (v16f)PE_MAP2(PE_P_SUB, x, y); }
PE_INLINE v16f v16f_mul(v16f x, v16f y) { return (v16f)PE_MAP2(PE_P_MUL, x, y); }
PE_INLINE v16f v16f_div(v16f x, v16f y) { return (v16f)PE_MAP2(PE_P_DIV, x, y); }
PE_INLINE v16f v16f_fma(v16f x, v16f y, v16f z) { return (v16f)PE_MAP3(p_fma, x, y, z); }      /* x*y + z */
PE_INLINE v16f v16f_min(v16f x, v16f y) { return (v16f)PE_MAP2(p_min, x, y); }  /* y when either is NaN */
PE_INLINE v16f v16f_max(v16f x, v16f y) { return (v16f)PE_MAP2(p_max, x, y); }  /* y when either is NaN */
PE_INLINE v16f v16f_neg(v16f x) { return (v16f)PE_MAP1(PE_P_NEG, x); }
PE_INLINE v16f v16f_abs(v16f x) { return (v16f)PE_MAP1(PE_P_ABS, x); }
PE_INLINE v16f v16f_sqrt(v16f x) { return (v16f)PE_MAP1(p_sqrt, x); }
PE_INLINE v16f v16f_copysign(v16f x, v16f sign) { return (v16f)PE_MAP2(PE_P_SIGN, x, sign); }
/* x < y ? t : f, lane by lane; false when either is NaN. */
PE_INLINE v16f v16f_select_lt(v16f x, v16f y, v16f t, v16f f) { return (v16f)PE_MAP4(p_select_lt, x, y, t, f); }

PE_INLINE v16i v16i_add(v16i x, v16i y) { return (v16i)PE_MAP2(PE_P_ADDI, x, y); }
PE_INLINE v16i v16i_sub(v16i x, v16i y) { return (v16i)PE_MAP2(PE_P_SUBI, x, y); }
PE_INLINE v16i v16i_mul(v16i x, v16i y) { return (v16i)PE_MAP2(PE_P_MULI, x, y); }
PE_INLINE v16i v16i_and(v16i x, v16i y) { return (v16i)PE_MAP2(PE_P_AND, x, y); }
PE_INLINE v16i v16i_or(v16i x, v16i y) { return (v16i)PE_MAP2(PE_P_OR, x, y); }
PE_INLINE v16i v16i_max(v16i x, v16i y) { return (v16i)PE_MAP2(p_maxi, x, y); }
PE_INLINE v16i v16i_shl(v16i x, int n) { return (v16i)PE_MAP1(PE_P_SHL, x); }
PE_INLINE v16i v16i_shr(v16i x, int n) { return (v16i)PE_MAP1(PE_P_SHR, x); }       /* keeps the sign */
PE_INLINE v16i v16i_shru(v16i x, int n) { return (v16i)PE_MAP1(PE_P_SHRU, x); }
PE_INLINE v16i v16i_shru_each(v16i x, v16i n) { return (v16i)PE_MAP2(PE_P_SHRU_EACH, x, n); } /* each lane by its own number */
PE_INLINE v16f v16i_to_f(v16i x) { return (v16f)PE_MAP1(p_to_f, x); }
PE_INLINE v16i v16f_to_i(v16f x) { return (v16i)PE_MAP1(p_round, x); }              /* nearest even */
PE_INLINE v16i v16f_bits(v16f x) { return (v16i)PE_MAP1(PE_P_BITS, x); }
PE_INLINE v16f v16i_as_f(v16i x) { return (v16f)PE_MAP1(PE_P_FLOAT, x); }

PE_INLINE v64u v64u_and(v64u x, v64u y) { return (v64u)PE_MAP2(PE_P_AND, x, y); }
PE_INLINE v64u v64u_or(v64u x, v64u y) { return (v64u)PE_MAP2(PE_P_OR, x, y); }
PE_INLINE v64u v64u_xor(v64u x, v64u y) { return (v64u)PE_MAP2(PE_P_XOR, x, y); }
PE_INLINE v64u v64u_add(v64u x, v64u y) { return (v64u)PE_MAP2(PE_P_ADD, x, y); }
PE_INLINE v64u v64u_shl16(v64u x, int n) { return (v64u)PE_MAP1(PE_P_SHLB, x); }    /* by 16-bit lanes: mask afterwards */
PE_INLINE v64u v64u_shr16(v64u x, int n) { return (v64u)PE_MAP1(PE_P_SHRB, x); }
PE_INLINE v64u v64u_table(const uint8_t t[16], v64u x) { return (v64u)PE_MAP1(PE_P_TABLE, x); } /* t[x], x < 16 */
PE_INLINE v16i v64u_lanes(v64u x) { return (v16i)PE_MAP1(PE_P_BITS, x); }
#define PE_P_BYTES(x) (pe_pb)(x)
PE_INLINE v64u v16i_bytes(v16i x) { return (v64u)PE_MAP1(PE_P_BYTES, x); }

/* ---- dot products of bytes: acc[l] += sum of w[4l..4l+3] * x[4l..4l+3]; |x| <= 127 ---- */

PE_INLINE v64u v64u_set4(const int8_t x[4]) { /* the same 4 signed bytes in every lane */
  int32_t w;
  memcpy(&w, x, 4);
  return v16i_bytes(v16i_set1(w));
}
PE_INLINE v16i dot_u7(v16i acc, v64u w, v64u x) { return (v16i)PE_MAP3(p_dot_u7, acc, w, x); }
PE_INLINE v16i dot_z128(v16i acc, v64u w, v64u x) { return (v16i)PE_MAP3(p_dot_z128, acc, w, x); }

/* ---- bfloat16 ---- */

PE_INLINE v16f v16f_load_bf16(const void *p) { return v16i_as_f(v16i_shl(v16i_load_u16(p), 16)); }
PE_INLINE void v16f_store_bf16(void *p, v16f v) { /* to nearest even; NaN stays NaN */
  v16i b = v16f_bits(v), high = v16i_shru(b, 16);
  v16i up = v16i_shru(v16i_add(b, v16i_add(v16i_set1(0x7fff), v16i_and(high, v16i_set1(1)))), 16);
  v16i nan = v16i_shr(v16i_sub(v16i_set1(0x7f800000), v16i_and(b, v16i_set1(0x7fffffff))), 31); /* all ones where NaN */
  v16i_store_u16(p, v16i_or(v16i_and(nan, v16i_or(high, v16i_set1(0x40))), v16i_sub(up, v16i_and(nan, up))));
}

/* Tails of 2-byte floats. */
PE_INLINE v16f v16f_load_f16_n(const void *p, int64_t n) {
  uint16_t t[16] = {0};
  memcpy(t, p, (size_t)n * 2);
  return v16f_load_f16(t);
}
PE_INLINE v16f v16f_load_bf16_n(const void *p, int64_t n) {
  uint16_t t[16] = {0};
  memcpy(t, p, (size_t)n * 2);
  return v16f_load_bf16(t);
}
PE_INLINE void v16f_store_f16_n(void *p, v16f v, int64_t n) {
  uint16_t t[16];
  v16f_store_f16(t, v);
  memcpy(p, t, (size_t)n * 2);
}
PE_INLINE void v16f_store_bf16_n(void *p, v16f v, int64_t n) {
  uint16_t t[16];
  v16f_store_bf16(t, v);
  memcpy(p, t, (size_t)n * 2);
}
/* Lanes n and beyond become `fill`. */
PE_INLINE v16f v16f_first_n(v16f v, int64_t n, float fill) {
  static const float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return v16f_select_lt(v16f_load(lane), v16f_set1((float)n), v, v16f_set1(fill));
}

/* ---- across lanes, the same tree everywhere: lane i with i + 8, then i + 4, i + 2, i + 1 ---- */

#if PE_PARTS == 1
#define PE_FOLD(v, f)                                                                                                  \
  __m256 h = f##256(_mm512_castps512_ps256((__m512)(v).a), _mm512_extractf32x8_ps((__m512)(v).a, 1));                  \
  __m128 q = f##128(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#elif defined(PE_SVE256)
#define PE_FOLD(v, f)                                                                                                  \
  const pe_pf h = f##256((v).a, (v).b);                                                                                \
  const float32x4_t q = f##128(SV_LOW(h), SV_HIGH(h));
#elif PE_PARTS == 2
#define PE_FOLD(v, f)                                                                                                  \
  __m256 h = f##256((__m256)(v).a, (__m256)(v).b);                                                                     \
  __m128 q = f##128(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#else
#define PE_FOLD(v, f) pe_pf q = f##128(f##128((v).a, (v).c), f##128((v).b, (v).d));
#endif
#if defined(PE_SVE256)
#define pe_add256(x, y) ((x) + (y))
#define pe_max256(x, y) p_max(x, y)
#define pe_add128(x, y) ((x) + (y))
#define pe_max128(x, y) vbslq_f32(vcltq_f32(y, x), x, y)
#elif PE_PARTS <= 2
#define pe_add256(x, y) _mm256_add_ps(x, y)
#define pe_max256(x, y) _mm256_max_ps(x, y)
#define pe_add128(x, y) _mm_add_ps(x, y)
#define pe_max128(x, y) _mm_max_ps(x, y)
#else
#define pe_add128(x, y) ((x) + (y))
#define pe_max128(x, y) p_max(x, y)
#endif
PE_INLINE float v16f_sum(v16f v) {
  PE_FOLD(v, pe_add)
  return (q[0] + q[2]) + (q[1] + q[3]);
}
PE_INLINE float v16f_hmax(v16f v) { /* of numbers; what it gives for NaN is not said */
  PE_FOLD(v, pe_max)
  float x = q[0] > q[2] ? q[0] : q[2], y = q[1] > q[3] ? q[1] : q[3];
  return x > y ? x : y;
}

/* Largest and sum of 16 integers: any order gives the same. For |x| as bits, the largest is NaN where x holds one. */
PE_INLINE int32_t v16i_hmax(v16i v) {
#if defined(PE_AVX512)
  return _mm512_reduce_max_epi32((__m512i)v.a);
#elif defined(PE_SVE256)
  return svmaxv_s32(SV_ALL, (sv_i)p_maxi(v.a, v.b));
#else
#if defined(PE_AVX2)
  __m256i h = _mm256_max_epi32((__m256i)v.a, (__m256i)v.b);
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  typedef int32_t four __attribute__((vector_size(16)));
  four m = (four)q;
#else
  pe_pi m = p_maxi(p_maxi(v.a, v.c), p_maxi(v.b, v.d));
#endif
  int32_t x = m[0] > m[2] ? m[0] : m[2], y = m[1] > m[3] ? m[1] : m[3];
  return x > y ? x : y;
#endif
}
PE_INLINE int32_t v16i_sum(v16i v) {
#if defined(PE_AVX512)
  return _mm512_reduce_add_epi32((__m512i)v.a);
#else
  int32_t t[16], sum = 0;
  v16i_store(t, v);
  for (int i = 0; i < 16; i++) sum += t[i];
  return sum;
#endif
}

PE_INLINE void pe_prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }

/* ---- functions; coefficients are minimax fits made for this file ---- */

PE_INLINE v16f v16f_poly(v16f x, const float *c, int n) { /* c[0] + c[1] x + ... + c[n-1] x^(n-1) */
  v16f y = v16f_set1(c[n - 1]);
  for (int i = n - 2; i >= 0; i--) y = v16f_fma(y, x, v16f_set1(c[i]));
  return y;
}

/* e^x: relative error < 1.2e-7; 0 below -86.9 (also at -inf), inf above 88.72, NaN for NaN.
 * x = n ln 2 + r, e^x = 2 * 2^(n-1) * (1 + r + r^2 p(r)): n - 1 keeps the exponent in range up to n = 128. */
PE_INLINE v16f v16f_exp(v16f x) {
  static const float c[5] = {0.5f, 0.166665129f, 0.0416661873f, 0.00836959841f, 0.00139517172f};
  v16f t = v16f_max(v16f_set1(-88.0f), v16f_min(v16f_set1(89.0f), x));
  v16i n = v16f_to_i(v16f_mul(t, v16f_set1(1.44269504f)));
  v16f nf = v16i_to_f(n);
  v16f r = v16f_fma(nf, v16f_set1(-0.693359375f), t); /* 0.693359375 has 10 bits: nf times it is exact */
  r = v16f_fma(nf, v16f_set1(2.12194440e-4f), r);
  v16f y = v16f_fma(v16f_mul(r, r), v16f_poly(r, c, 5), r);
  v16f scale = v16i_as_f(v16i_shl(v16i_add(n, v16i_set1(126)), 23));
  y = v16f_fma(y, scale, scale);
  return v16f_select_lt(x, v16f_set1(-86.9f), v16f_zero(), v16f_add(y, y));
}

PE_INLINE v16f v16f_sigmoid(v16f x) { /* 1 / (1 + e^-x) */
  v16f one = v16f_set1(1.0f);
  return v16f_div(one, v16f_add(one, v16f_exp(v16f_neg(x))));
}
PE_INLINE v16f v16f_silu(v16f x) { return v16f_div(x, v16f_add(v16f_set1(1.0f), v16f_exp(v16f_neg(x)))); }

/* Relative error < 2e-7: an odd polynomial near 0, 1 - 2 / (e^2x + 1) elsewhere. */
PE_INLINE v16f v16f_tanh(v16f x) {
  static const float c[5] = {-0.333332718f, 0.133311452f, -0.0537134628f, 0.0205496037f, -0.00560155155f};
  v16f a = v16f_abs(x), z = v16f_mul(x, x), one = v16f_set1(1.0f);
  v16f small = v16f_fma(v16f_mul(x, z), v16f_poly(z, c, 5), x);
  v16f e = v16f_exp(v16f_add(a, a));
  v16f big = v16f_copysign(v16f_sub(one, v16f_div(v16f_set1(2.0f), v16f_add(e, one))), x);
  return v16f_select_lt(a, v16f_set1(0.64f), small, big);
}

/* Absolute error < 2e-7: an odd polynomial below 1, 1 - e^(-x p(x)) up to 4, 1 beyond. */
PE_INLINE v16f v16f_erf(v16f x) {
  static const float near[7] = {1.12837917f,    -0.376126271f,    0.112836002f,   -0.0268544446f,
                                0.00518953534f, -0.000802084128f, 7.88911952e-05f};
  static const float far[7] = {1.12864097f,    0.63518149f,      0.106187626f,  -0.0237201998f,
                               0.00362292567f, -0.000318061476f, 1.07633607e-05f};
  v16f a = v16f_abs(x), one = v16f_set1(1.0f), t = v16f_min(v16f_set1(4.0f), a), z = v16f_mul(x, x);
  v16f small = v16f_mul(x, v16f_poly(z, near, 7));
  v16f big = v16f_sub(one, v16f_exp(v16f_neg(v16f_mul(t, v16f_poly(t, far, 7)))));
  return v16f_select_lt(a, v16f_set1(0.95f), small, v16f_copysign(big, x));
}

/* x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)) */
PE_INLINE v16f v16f_gelu_tanh(v16f x) {
  v16f z = v16f_mul(x, x);
  v16f u = v16f_mul(x, v16f_fma(z, v16f_set1(0.0713548163f), v16f_set1(1.59576912f)));
  return v16f_div(x, v16f_add(v16f_set1(1.0f), v16f_exp(v16f_neg(u))));
}
PE_INLINE v16f v16f_gelu_erf(v16f x) { /* x (1 + erf(x / sqrt 2)) / 2 */
  v16f half = v16f_mul(x, v16f_set1(0.5f));
  return v16f_fma(half, v16f_erf(v16f_mul(x, v16f_set1(0.707106781f))), half);
}
PE_INLINE v16f v16f_gelu_quick(v16f x) { /* x sigmoid(1.702 x) */
  return v16f_div(x, v16f_add(v16f_set1(1.0f), v16f_exp(v16f_mul(x, v16f_set1(-1.702f)))));
}

#endif

/* dots.h: dot products of bytes in runs, and from integers to floats, for kernels where both count.
 *
 *   acc = dot_start(...)                                      an integer to begin with
 *   run = dot_run_begin(acc, w, x); run = dot_run_add(run, w, x) ...; acc = dot_run_end(acc, run)
 *   y = dot_scaled(acc, s, dot_base(s))                       s times the integer, as a float
 *
 * A run is PE_RUN(most) products of 4 bytes at most, where no w is above `most` and |x| <= 127. avx2 multiplies bytes into 16 bits, two
 * products each, and widens them at a run's end; the others sum in 32 bits. */
#ifndef PE_DOTS_H
#define PE_DOTS_H

#include "simd.h"

#if defined(PE_AVX2) && !defined(PE_AVXVNNI)
#define PE_RUN(most) ((most) <= 16 ? 8 : (most) <= 32 ? 4 : (most) <= 64 ? 2 : 1) /* most * 127 * 2 * PE_RUN(most) < 2^15 */
PE_INLINE pe_pi p_run_begin(pe_pi acc, pe_pb w, pe_pb x) { (void)acc; return p_pairs(w, x); }
PE_INLINE pe_pi p_run_add(pe_pi run, pe_pb w, pe_pb x) {
  return p_chain((pe_pi)_mm256_add_epi16((__m256i)run, (__m256i)p_pairs(w, x)));
}
PE_INLINE pe_pi p_run_end(pe_pi acc, pe_pi run) { return p_widen(acc, run); }
#else
#define PE_RUN(most) 8
PE_INLINE pe_pi p_run_begin(pe_pi acc, pe_pb w, pe_pb x) { return p_dot_u7(acc, w, x); }
PE_INLINE pe_pi p_run_add(pe_pi run, pe_pb w, pe_pb x) { return p_dot_u7(run, w, x); }
PE_INLINE pe_pi p_run_end(pe_pi acc, pe_pi run) { (void)acc; return run; }
#endif
PE_INLINE v16i dot_run_begin(v16i acc, v64u w, v64u x) { return (v16i)PE_MAP3(p_run_begin, acc, w, x); }
PE_INLINE v16i dot_run_add(v16i run, v64u w, v64u x) { return (v16i)PE_MAP3(p_run_add, run, w, x); }
PE_INLINE v16i dot_run_end(v16i acc, v16i run) { return (v16i)PE_MAP2(p_run_end, acc, run); }

/* Integers n as bits PE_DOT_BASE + n, |n| < 2^22: those of the float 1.5 * 2^23 + n. Times s it is n s with one rounding, where dot_base(s) is
 * exact (s of at most 22 bits, and not near the largest float): an fma in place of a conversion and a product. generic has no fma. */
#if defined(PE_GENERIC)
#define PE_DOT_BASE 0
PE_INLINE v16f dot_base(v16f s) { (void)s; return v16f_zero(); }
PE_INLINE v16f dot_scaled(v16i dot, v16f s, v16f base) { (void)base; return v16f_mul(v16i_to_f(dot), s); }
#else
#define PE_DOT_BASE 0x4b400000
PE_INLINE v16f dot_base(v16f s) { return v16f_mul(s, v16f_set1(-12582912.0f)); }
PE_INLINE v16f dot_scaled(v16i dot, v16f s, v16f base) { return v16f_fma(v16i_as_f(dot), s, base); }
#endif

/* PE_DOT_BASE + n * by in every lane, where n and by fit 16 bits; otherwise what wraps, and the same everywhere where `by` is even. x86 does
 * with a load and a product what would take a product and two moves between kinds of registers. */
PE_INLINE v16i dot_start(int32_t n, int32_t by) {
#if defined(PE_AVX512)
  return (v16i){(pe_pi)_mm512_dpwssd_epi32(_mm512_set1_epi32(PE_DOT_BASE), _mm512_set1_epi32(n), _mm512_set1_epi32(by & 0xffff))};
#elif defined(PE_AVX2)
  const __m256i v = _mm256_madd_epi16(_mm256_set1_epi32(n), _mm256_set1_epi32(by & 0xffff));
  const pe_pi start = (pe_pi)_mm256_add_epi32(v, _mm256_set1_epi32(PE_DOT_BASE));
  return (v16i){start, start};
#else
  return v16i_set1((int32_t)(PE_DOT_BASE + (uint32_t)n * (uint32_t)by));
#endif
}

#endif

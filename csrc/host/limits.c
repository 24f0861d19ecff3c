/* limits.c: see limits.h. Compiled once: functions for other instruction sets than the build's carry their target. */
#include "limits.h"

#include <string.h>

#include "x86.h"

/* KEEP(v): the compiler must have v in a register here and knows nothing about its value afterwards. */
#if defined(__x86_64__)
#include <immintrin.h>
#define KEEP(v) __asm__ volatile("" : "+v"(v))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define KEEP(v) __asm__ volatile("" : "+w"(v))
#else
#define KEEP(v) __asm__ volatile("" : "+m"(v))
#endif
#define TARGET(t) __attribute__((target(t)))

/* 12 chains: enough for 2 instructions a cycle with a latency of up to 6, and 12 sums, 2 factors and a temporary fit 16 registers.
 * Named variables, because compilers leave an array in memory. x is kept in every step, lest products be taken only once. */
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
enum { CHAINS = 12 };
#define ZERO(i) v##i = {0},
#define ADVANCE(i) KEEP(x); v##i = STEP(v##i, x, y); KEEP(v##i);

#define LOOP(name, attributes, vector, ops)                 \
  attributes static double name(int64_t rounds) {           \
    vector EACH(ZERO) x = {0}, y;                           \
    y = x = x + 1;                                          \
    for (int64_t r = 0; r < rounds; r++) { EACH(ADVANCE) }  \
    return (double)rounds * CHAINS * (ops);                 \
  }

typedef float f4 __attribute__((vector_size(16)));
typedef int16_t s8 __attribute__((vector_size(16)));
#define STEP(a, x, y) a + x * y /* what portable vectors can say: for bytes, products of 16 bits */
LOOP(fp32_generic, , f4, 8)
LOOP(int8_generic, , s8, 16)
#undef STEP

#if defined(__x86_64__)
#define STEP(a, x, y) _mm256_fmadd_ps(x, y, a)
LOOP(fp32_avx2, TARGET("avx2,fma"), __m256, 16)
#undef STEP
#define STEP(a, x, y) _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), y))
LOOP(int8_avx2, TARGET("avx2"), __m256i, 64)
#undef STEP
#if __has_include(<avxvnniintrin.h>) /* GCC 11, clang 12 */
#define STEP(a, x, y) _mm256_dpbusd_avx_epi32(a, x, y)
LOOP(int8_avxvnni, TARGET("avx2,avxvnni"), __m256i, 64)
#undef STEP
static int has_avxvnni(void) { return pe_x86_ask().avxvnni; }
#endif
#define STEP(a, x, y) _mm512_fmadd_ps(x, y, a)
LOOP(fp32_avx512, TARGET("avx512f"), __m512, 32)
#undef STEP
#define STEP(a, x, y) _mm512_dpbusd_epi32(a, x, y)
LOOP(int8_avx512, TARGET("avx512f,avx512vnni"), __m512i, 128)
static int has_avx2(void) { return pe_x86_ask().avx2; }
static int has_avx512(void) { return pe_x86_ask().avx512; }
#elif defined(__aarch64__)
#include "../cpu/isa.h" /* what the machine has is asked there */
#define STEP(a, x, y) vfmaq_f32(a, x, y)
LOOP(fp32_neon, , float32x4_t, 8)
#undef STEP
#define STEP(a, x, y) vdotq_s32(a, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y))
LOOP(int8_neon, TARGET("arch=armv8.2-a+dotprod"), int32x4_t, 32)
#undef STEP
#define STEP(a, x, y) vmmlaq_s32(a, vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(y))
LOOP(int8_i8mm, TARGET("arch=armv8.2-a+dotprod+i8mm"), int32x4_t, 64)
static int has(const char *name) {
  for (const pe_isa *i = pe_isas; i->name; i++)
    if (!strcmp(i->name, name)) return i->supported();
  return 0;
}
static int has_neon(void) { return has("neon"); }
static int has_i8mm(void) { return has("i8mm"); }
static int has_sme(void) { return has("sme"); }
static int has_sve256(void) { return has("sve256"); }
#endif
static int always(void) { return 1; }

static const struct {
  const char *isa;
  int (*supported)(void);
  double (*int8)(int64_t), (*fp32)(int64_t);
} loops[] = {
#if defined(__x86_64__)
  {"avx512", has_avx512, int8_avx512, fp32_avx512},
#if __has_include(<avxvnniintrin.h>)
  {"avxvnni", has_avxvnni, int8_avxvnni, fp32_avx2},
#endif
  {"avx2", has_avx2, int8_avx2, fp32_avx2},
#elif defined(__aarch64__)
  {"sme", has_sme, int8_i8mm, fp32_neon}, /* what a core has for itself: the unit of outer products is shared */
  {"sve256", has_sve256, int8_i8mm, fp32_neon}, /* whose vectors are twice as long, and half as many at once */
  {"i8mm", has_i8mm, int8_i8mm, fp32_neon},
  {"neon", has_neon, int8_neon, fp32_neon},
#endif
  {"generic", always, int8_generic, fp32_generic},
};
enum { N_LOOPS = sizeof loops / sizeof loops[0] };

double pe_limit_int8(const char *isa, int64_t rounds) {
  for (int i = 0; i < N_LOOPS; i++)
    if (!strcmp(isa, loops[i].isa)) return loops[i].supported() ? loops[i].int8(rounds) : 0;
  return 0;
}

double pe_limit_fp32(const char *isa, int64_t rounds) {
  for (int i = 0; i < N_LOOPS; i++)
    if (!strcmp(isa, loops[i].isa)) return loops[i].supported() ? loops[i].fp32(rounds) : 0;
  return 0;
}

typedef uint64_t u64x2 __attribute__((vector_size(16), aligned(16), may_alias));

/* Prefetching 4 KiB ahead reads 8 to 15% faster than none on a Zen 5 core (36 to 40 GB/s); 2 KiB less so, 8 KiB the same. */
enum { AHEAD = 4096 };

uint64_t pe_limit_read(const void *data, int64_t n) {
  u64x2 sum[4] = {{0}};
  const char *p = data;
  for (int64_t at = 0; at < n; at += 64) {
    __builtin_prefetch(p + at + AHEAD, 0, 3);
    for (int i = 0; i < 4; i++) sum[i] += *(const u64x2 *)(p + at + 16 * i);
  }
  u64x2 all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return all[0] + all[1];
}

/* isa.c: see isa.h. A build defines PE_HAVE_<ISA> for each instruction set that it compiled. */
#include "isa.h"

#include "../host/x86.h"

#include <string.h>

#if defined(PE_HAVE_avx512)
extern const pe_kernel_entry pe_avx512_kernels[];
extern pe_status pe_avx512_quantize(int32_t, const float *, void *, int64_t);
extern pe_status pe_avx512_nearest(const pe_nearest_input *, void *, int32_t *, double *);
static int has_avx512(void) { return pe_x86_ask().avx512; }
#endif

#if defined(PE_HAVE_avx2)
extern const pe_kernel_entry pe_avx2_kernels[];
extern pe_status pe_avx2_quantize(int32_t, const float *, void *, int64_t);
extern pe_status pe_avx2_nearest(const pe_nearest_input *, void *, int32_t *, double *);
static int has_avx2(void) { return pe_x86_ask().avx2; }
#endif

#if defined(PE_HAVE_avxvnni)
extern const pe_kernel_entry pe_avxvnni_kernels[];
static int has_avxvnni(void) { return pe_x86_ask().avxvnni; }
#endif

#if defined(PE_HAVE_sme)
extern const pe_kernel_entry pe_sme_kernels[];
#endif

#if defined(PE_HAVE_sve256)
extern const pe_kernel_entry pe_sve256_kernels[];
#endif

#if defined(PE_HAVE_i8mm)
extern const pe_kernel_entry pe_i8mm_kernels[];
extern pe_status pe_i8mm_quantize(int32_t, const float *, void *, int64_t);
extern pe_status pe_i8mm_nearest(const pe_nearest_input *, void *, int32_t *, double *);
#endif

#if defined(PE_HAVE_neon)
extern const pe_kernel_entry pe_neon_kernels[];
extern pe_status pe_neon_quantize(int32_t, const float *, void *, int64_t);
extern pe_status pe_neon_nearest(const pe_nearest_input *, void *, int32_t *, double *);
#if defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#define HWCAP_ASIMDHP (1 << 10)
#endif
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
static int has_neon(void) {
  unsigned long caps = getauxval(AT_HWCAP);
  return (caps & HWCAP_ASIMDDP) && (caps & HWCAP_ASIMDHP);
}
static int has_i8mm(void) { return has_neon() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }
#if defined(PE_HAVE_sve256)
static int has_sve256(void) {
  uint64_t bytes;
  if (!has_i8mm() || !(getauxval(AT_HWCAP) & 1ul << 22) || !(getauxval(AT_HWCAP2) & 1ul << 9)) return 0; /* HWCAP_SVE, HWCAP2_SVEI8MM */
  __asm__(".inst 0x04bf5020\n\tmov %0, x0" : "=r"(bytes) : : "x0");                                   /* rdvl x0, #1 */
  return bytes == 32;
}
#endif
#if defined(PE_HAVE_sme)
static int has_outer_products(void) {
  const unsigned long all = 1ul << 23 | 1ul << 26 | 1ul << 29; /* HWCAP2_SME, HWCAP2_SME_I8I32, HWCAP2_SME_F32F32 */
  return (getauxval(AT_HWCAP2) & all) == all;
}
#endif
#else
#if defined(PE_HAVE_sve256)
static int has_sve256(void) { return 0; }
#endif
static int has_neon(void) { return 1; } /* every Apple and Windows arm64 machine has dot products */
#if defined(__APPLE__)
#include <sys/sysctl.h>
static int says(const char *name) {
  int has = 0;
  size_t size = sizeof has;
  return !sysctlbyname(name, &has, &size, 0, 0) && has;
}
static int has_i8mm(void) { return says("hw.optional.arm.FEAT_I8MM"); } /* M2 and later */
#if defined(PE_HAVE_sme)
static int has_outer_products(void) { /* M4 and later */
  return says("hw.optional.arm.FEAT_SME") && says("hw.optional.arm.SME_I8I32") && says("hw.optional.arm.SME_F32F32");
}
#endif
#else
static int has_i8mm(void) { return 0; } /* Windows has no word for it that all its versions know */
#if defined(PE_HAVE_sme)
static int has_outer_products(void) { return 0; }
#endif
#endif
#endif
#if defined(PE_HAVE_sme)
/* Kernels are written for vectors of 64 bytes in streaming mode. Linux gives a process 32 where nobody asks for more (sme_default_vector_length). */
static int has_sme(void) {
  uint64_t bytes;
  if (!has_i8mm() || !has_outer_products()) return 0;
  __asm__(".inst 0x04bf5820\n\tmov %0, x0" : "=r"(bytes) : : "x0"); /* rdsvl x0, #1 */
  return bytes == 64;
}
#endif
#endif

extern const pe_kernel_entry pe_generic_kernels[];
extern pe_status pe_generic_quantize(int32_t, const float *, void *, int64_t);
extern pe_status pe_generic_nearest(const pe_nearest_input *, void *, int32_t *, double *);
static int always(void) { return 1; }

const pe_isa pe_isas[] = {
#if defined(PE_HAVE_avx512)
  {"avx512", pe_avx512_kernels, 0, has_avx512, pe_avx512_quantize, pe_avx512_nearest},
#endif
#if defined(PE_HAVE_avxvnni)
  {"avxvnni", pe_avxvnni_kernels, pe_avx2_kernels, has_avxvnni, pe_avx2_quantize, pe_avx2_nearest},
#endif
#if defined(PE_HAVE_avx2)
  {"avx2", pe_avx2_kernels, 0, has_avx2, pe_avx2_quantize, pe_avx2_nearest},
#endif
#if defined(PE_HAVE_sme)
  {"sme", pe_sme_kernels, pe_i8mm_kernels, has_sme, pe_i8mm_quantize, pe_i8mm_nearest},
#endif
#if defined(PE_HAVE_sve256)
  {"sve256", pe_sve256_kernels, pe_i8mm_kernels, has_sve256, pe_i8mm_quantize, pe_i8mm_nearest},
#endif
#if defined(PE_HAVE_i8mm)
  {"i8mm", pe_i8mm_kernels, 0, has_i8mm, pe_i8mm_quantize, pe_i8mm_nearest},
#endif
#if defined(PE_HAVE_neon)
  {"neon", pe_neon_kernels, 0, has_neon, pe_neon_quantize, pe_neon_nearest},
#endif
  {"generic", pe_generic_kernels, 0, always, pe_generic_quantize, pe_generic_nearest},
  {0, 0, 0, 0, 0, 0}};

static const pe_kernel_entry *find(const pe_kernel_entry *k, const char *op) {
  for (; k && k->name; k++)
    if (!strcmp(k->name, op)) return k;
  return 0;
}

const pe_kernel_entry *pe_isa_kernel(const pe_isa *isa, const char *op) {
  const pe_kernel_entry *own = find(isa->kernels, op);
  return own ? own : find(isa->others, op);
}

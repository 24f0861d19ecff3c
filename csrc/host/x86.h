/* x86.h: what an x86-64 processor can do and the operating system saves for it, asked with cpuid itself: the words of compilers for it
 * (__builtin_cpu_supports) need a library that not all of them link. Numbers of bits are those of Intel's manual, volume 2, CPUID. */
#ifndef PE_X86_H
#define PE_X86_H

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>

typedef struct pe_x86 { int avx2, avxvnni, avx512; } pe_x86;

static inline pe_x86 pe_x86_ask(void) {
  enum { FMA = 1 << 12, OSXSAVE = 1 << 27, F16C = 1 << 29 };                        /* leaf 1, ecx */
  enum { AVX2 = 1 << 5, BMI2 = 1 << 8, F = 1 << 16, DQ = 1 << 17, BW = 1 << 30 };   /* leaf 7, ebx */
  const uint32_t VL = 1u << 31, VNNI = 1u << 11;                                    /* leaf 7, ebx and ecx */
  enum { YMM = 0x6, ZMM = 0xe6 };                                                   /* registers that are saved */
  const uint32_t base = FMA | OSXSAVE | F16C, two = AVX2 | BMI2, five = F | DQ | BW | VL;
  enum { AVXVNNI = 1 << 4 };                                                        /* leaf 7, 1, eax */
  pe_x86 has = {0, 0, 0};
  uint32_t eax, ebx, ecx, edx, saved, high;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & base) != base) return has;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if ((saved & YMM) != YMM || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return has;
#if defined(__APPLE__)
  saved |= ZMM; /* macOS saves them from a thread's first use on */
#endif
  has.avx2 = (ebx & two) == two;
  has.avx512 = has.avx2 && (ebx & five) == five && (ecx & VNNI) && (saved & ZMM) == ZMM;
  has.avxvnni = has.avx2 && eax >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & AVXVNNI);
  return has;
}

#endif
#endif

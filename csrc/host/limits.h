/* limits.h: loops that do nothing but what the hardware limits: reading memory, int8 dot products, fp32 multiply-adds. The
 * benchmarks time them in the run that they report, so that a kernel's speed can be given as a share of what is possible.
 * setup.py reads these declarations for cffi, so they stay plain. */
#ifndef PE_LIMITS_H
#define PE_LIMITS_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Read n bytes (a multiple of 64, 16-byte aligned) from first to last, once; returns the sum of their 64-bit words. */
PE_API uint64_t pe_limit_read(const void *data, int64_t n);

/* Execute `rounds` x some independent multiply-adds in registers, with the best instructions of an instruction set
 * ("avx512", "avxvnni", "avx2", "sme", "sve256", "i8mm", "neon", "generic"). Returns the operations done, a product and a sum counting 2; 0 if this machine
 * does not have the instruction set. pe_limit_int8: bytes into 32-bit sums. pe_limit_fp32: float. */
PE_API double pe_limit_int8(const char *isa, int64_t rounds);
PE_API double pe_limit_fp32(const char *isa, int64_t rounds);

#ifdef __cplusplus
}
#endif
#endif

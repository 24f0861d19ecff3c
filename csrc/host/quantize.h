/* quantize.h: float32 into the formats of GGUF files. setup.py reads these declarations for cffi, so they stay plain. */
#ifndef PE_QUANTIZE_H
#define PE_QUANTIZE_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Write the n elements at src as whole blocks to dst: F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q2_K to Q6_K. A block
 * depends on its own elements only, so a tensor may be cut anywhere between blocks. `isa` is "avx512", "avxvnni", "avx2", "sme", "sve256", "i8mm", "neon" or
 * "generic", NULL for the machine's best; the first three give the same bytes. dst is aligned to 2 bytes.
 * PE_BAD_DTYPE: no such quantizer. PE_BAD_SHAPE: n is negative or no whole number of blocks. PE_NO_KERNEL: no such instruction
 * set here. PE_BAD_VALUE: a NaN, an infinity, or a value too large for the format; dst is then partly written. */
PE_API pe_status pe_quantize(const char *isa, int32_t dtype, const float *src, void *dst, int64_t n);

#ifdef __cplusplus
}
#endif
#endif

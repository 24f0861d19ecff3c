/* isa.h: the instruction sets that this library was built for, and which of them the machine can run. */
#ifndef PE_ISA_H
#define PE_ISA_H

#include "../host/nearest.h"
#include "../table.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pe_isa {
  const char *name;
  const pe_kernel_entry *kernels;
  const pe_kernel_entry *others; /* of a set that differs from another one in some kernels: that one's; else null */
  int (*supported)(void);
  pe_status (*quantize)(int32_t dtype, const float *src, void *dst, int64_t n); /* ../host/quantize.h */
  pe_status (*nearest)(const pe_nearest_input *in, void *scratch, int32_t *nearest, double *cosine); /* ../host/nearest.h */
} pe_isa;

extern const pe_isa pe_isas[]; /* best first; ends with a null name */

/* The kernel of an op; null: there is none. */
const pe_kernel_entry *pe_isa_kernel(const pe_isa *isa, const char *op);

#ifdef __cplusplus
}
#endif
#endif

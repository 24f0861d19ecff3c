/* quantize.c: finds the quantizers of an instruction set. They are in csrc/cpu/encode_blocks.c. */
#include "quantize.h"

#include <string.h>

#include "../cpu/isa.h"

pe_status pe_quantize(const char *isa, int32_t dtype, const float *src, void *dst, int64_t n) {
  for (const pe_isa *i = pe_isas; i->name; i++)
    if ((!isa || !strcmp(isa, i->name)) && i->supported()) return i->quantize(dtype, src, dst, n);
  return PE_NO_KERNEL;
}

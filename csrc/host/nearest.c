/* nearest.c: finds the search of an instruction set. They are in csrc/cpu/nearest_rows.c. */
#include "nearest.h"

#include <string.h>

#include "../cpu/isa.h"
#include "../cpu/nearest_rows.h"

int64_t pe_nearest_scratch(int64_t n_kept, int64_t width) {
  return n_kept < 1 || width < 1 ? 0 : nearest_memory(0, 0, n_kept, width);
}

pe_status pe_nearest(const char *isa, const pe_nearest_input *input, void *scratch, int32_t *nearest, double *cosine) {
  if (input->n_kept < 1 || input->width < 1 || input->n_evicted < 0) return PE_BAD_SHAPE;
  for (const pe_isa *i = pe_isas; i->name; i++)
    if ((!isa || !strcmp(isa, i->name)) && i->supported()) return i->nearest(input, scratch, nearest, cosine);
  return PE_NO_KERNEL;
}

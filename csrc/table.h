/* table.h: what a backend's table (gen/<backend>/table.c) says about each of its kernels. */
#ifndef PE_TABLE_H
#define PE_TABLE_H

#include "pe.h"

typedef struct pe_kernel_entry {
  const char *name;
  pe_kernel run;
  int64_t (*scratch)(const pe_args *args, const void *params, int32_t n_threads); /* may be null: none needed */
} pe_kernel_entry;

#endif

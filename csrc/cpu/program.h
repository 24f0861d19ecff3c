/* program.h: a compiled graph: a flat list of kernels over tensors whose run-time axes are filled in before each run. */
#ifndef PE_PROGRAM_H
#define PE_PROGRAM_H

#include "pool.h"
#include "../table.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A number that is `scale`, or `scale` x the value of run-time axis `dim` (dim >= 0). */
typedef struct pe_axis { int64_t scale; int32_t dim; } pe_axis;

typedef struct pe_program_tensor {
  int32_t base;                 /* number of the memory that it lies in; pe_program_bind gives the address */
  int64_t offset;
  int32_t dtype, ndim;
  pe_axis shape[PE_MAX_DIMS], stride[PE_MAX_DIMS];
} pe_program_tensor;

typedef struct pe_program_node {
  pe_kernel run;
  pe_args args;                 /* points into the program's own arrays */
  const void *params;
  int64_t scratch_offset, scratch_bytes; /* in memory 0, the arena */
  double seconds;               /* accumulated while profiling */
} pe_program_node;

typedef struct pe_memory { char *start; int64_t bytes; } pe_memory;

typedef struct pe_program {
  pe_program_tensor *spec;
  pe_tensor *tensors;
  int32_t n_tensors;
  pe_program_node *nodes;
  int32_t n_nodes;
  char **bases;
  int32_t n_bases;
  const pe_memory *memories;    /* under the address sanitizer: each kernel may touch only what its arguments have of these */
  int32_t n_memories;
  int64_t *counters;            /* [n_nodes][PE_COUNTER_STRIDE] */
  int32_t profile;
  /* of the run that is going on */
  pe_pool *pool;
  int32_t first_node, status, failed_node;
  char message[PE_MAX_MESSAGE];
} pe_program;

enum { PE_COUNTER_STRIDE = 8 };  /* one cache line a node */

/* Run the nodes from first_node on. dims[i] is the value of run-time axis i. Returns a pe_status; `message` and `failed_node` say more. */
int32_t pe_program_run(pe_program *program, pe_pool *pool, const int64_t *dims, int32_t first_node);

#ifdef __cplusplus
}
#endif
#endif

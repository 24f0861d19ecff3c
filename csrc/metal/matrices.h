/* matrices.h: which elements of a simdgroup matrix a lane holds. The language does not say; a matrix of the numbers 0 .. 63 does. */
#ifndef PE_METAL_MATRICES_H
#define PE_METAL_MATRICES_H

#include "common.h"

/* Matrices stay in registers where every index is known: loops over them are unrolled. */
#if defined(__METAL_VERSION__)
#define PE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define PE_UNROLL
#endif

/* Rows and columns of the two elements of a float matrix that the lane holds. numbers: 64 floats of shared memory. All threads of the
 * threadgroup, at least 64, take part; afterwards the memory may be used again behind a barrier. */
static inline void find_places(threadgroup float *numbers, int index, thread int *row, thread int *column) {
  if (index < 64) numbers[index] = (float)index;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_float8x8 held;
  simdgroup_load(held, numbers, 8);
  for (int e = 0; e < 2; e++) {
    const int at = (int)held.thread_elements()[e];
    row[e] = at / 8;
    column[e] = at % 8;
  }
}

#endif

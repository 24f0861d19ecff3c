/* common.h: what every .metal file includes.
 *
 * A file is compiled where it is used: on a Mac from its text, by Metal's own compiler; elsewhere as C++ by the emulator (csrc/emulate/metal.h).
 * pyengine/backends/metal/sources.py reads three things from the text, which therefore stand there plainly, made by no macro:
 *
 *   struct norm_args { int rows, width; float eps; };              a struct whose name ends in _args: what a launch is told, by value.
 *                                                                  Fields are int, uint, float or long, or arrays of them.
 *   PE_CONSTANT(bool, HAS_WEIGHT, 0);                              a function constant: a kernel is compiled for each set of values
 *   kernel void norm_rows(constant norm_args &a [[buffer(0)]],     a kernel: buffers by number; those that a launch leaves out are null.
 *                         device const float *x [[buffer(1)]],
 *                         threadgroup float *sums [[threadgroup(0)]],              all threadgroup memory comes this way
 *                         uint3 group [[threadgroup_position_in_grid]],
 *                         uint at [[thread_index_in_threadgroup]])                       (`thread` is a word of MSL)
 *
 * Each file is a library of its own, so numbers of function constants count from 0 in each. Sizes that change from run to run (rows)
 * stand in the arguments, which are written once for each set of run-time axes; nothing is dispatched for no rows.
 * Floating point is not reassociated (fast math is off), and a product and a sum are fused where a kernel says fma, nowhere else.
 */
#ifndef PE_METAL_COMMON_H
#define PE_METAL_COMMON_H

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
using namespace metal;
#pragma METAL fp contract(off)
#define PE_CONSTANT(type, name, index) constant type name [[function_constant(index)]]
#endif

#include "../quants.h"

/* What a kernel finds wrong in numbers that only it sees; one for each step of a program, zero while all is well. Its words are those of
 * csrc/cuda/cuda.h. A kernel that may find something has a buffer named `fault`. */
struct pe_fault {
  atomic_int status;
  int reserved;
  long value, limit;            /* "value is not below limit" */
};

enum { FAULT_BAD_VALUE = 3 };   /* pe_status of csrc/pe.h */

/* Note a fault; the first thread that does so is heard. */
static inline void raise_fault(device pe_fault *fault, int status, long value, long limit) {
  int none = 0;
  while (none == 0)
    if (atomic_compare_exchange_weak_explicit(&fault->status, &none, status, memory_order_relaxed, memory_order_relaxed)) {
      fault->value = value;
      fault->limit = limit;
      return;
    }
}

#endif

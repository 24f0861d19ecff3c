/* speed.metal: what a GPU can do at most, for `make metal-check`: copies and reads of memory, and products of 8 x 8 matrices in registers.
 *
 * copy_quads, read_quads   A thread owns every n-th 16 bytes; each is read once (and written once).
 * multiply_floats,         A simdgroup multiplies eight independent pairs of matrices again and again, from registers: 8 x 2 x 8^3 operations
 * multiply_halves          a turn, nothing from memory but the first load and the last store.
 */
#include "common.h"

struct quads_args { int n, threads; };

kernel void copy_quads(constant quads_args &a [[buffer(0)]], device const uint4 *x [[buffer(1)]], device uint4 *out [[buffer(2)]],
                       uint at [[thread_position_in_grid]]) {
  for (int i = (int)at; i < a.n; i += a.threads) out[i] = x[i];
}

kernel void read_quads(constant quads_args &a [[buffer(0)]], device const uint4 *x [[buffer(1)]], device uint *out [[buffer(2)]],
                       uint at [[thread_position_in_grid]]) {
  uint4 sum = uint4(0u);
  for (int i = (int)at; i < a.n; i += a.threads) sum = sum ^ x[i];
  const uint all = sum.x ^ sum.y ^ sum.z ^ sum.w;
  if (all == 0x9e3779b9u) out[0] = all; /* so that nothing can be left out */
}

struct turns_args { int turns; };

enum { CHAINS = 8 };

template <class T> static inline void multiply_again(int turns, device float *out, threadgroup T *memory, uint group, uint number) {
  if (number < 64) memory[number] = (T)(number % 9 == 0 ? 1.0f : 0.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<T, 8, 8> one;
  simdgroup_float8x8 sum[CHAINS];
  simdgroup_load(one, memory, 8);
  for (int c = 0; c < CHAINS; c++) sum[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int t = 0; t < turns; t++)
    for (int c = 0; c < CHAINS; c++) simdgroup_multiply_accumulate(sum[c], one, one, sum[c]);
  for (int c = 1; c < CHAINS; c++) simdgroup_multiply_accumulate(sum[0], one, one, sum[c]);
  simdgroup_store(sum[0], out + 64 * group, 8);
}

kernel void multiply_floats(constant turns_args &a [[buffer(0)]], device float *out [[buffer(1)]], threadgroup float *memory [[threadgroup(0)]],
                            uint3 group [[threadgroup_position_in_grid]], uint number [[thread_index_in_threadgroup]]) {
  multiply_again<float>(a.turns, out, memory, group.x, number);
}

kernel void multiply_halves(constant turns_args &a [[buffer(0)]], device float *out [[buffer(1)]], threadgroup half *memory [[threadgroup(0)]],
                            uint3 group [[threadgroup_position_in_grid]], uint number [[thread_index_in_threadgroup]]) {
  multiply_again<half>(a.turns, out, memory, group.x, number);
}

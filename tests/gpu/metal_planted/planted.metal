/* planted.metal: kernels that are wrong on purpose; tests/gpu/test_metal_words.py expects the emulator to say so, with the line. */
#include "common.h"

struct planted_args { int n; };

kernel void no_barrier(device float *out [[buffer(0)]], threadgroup float *memory [[threadgroup(0)]],
                       uint at [[thread_index_in_threadgroup]]) {
  memory[at] = (float)at;
  out[at] = memory[(at + 32) % 64];                         /* PLANTED: no_barrier */
}

kernel void early_return_before_a_barrier(device float *out [[buffer(0)]], uint at [[thread_index_in_threadgroup]]) {
  if (at < 32) return;
  out[at] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

kernel void a_barrier_beside_a_collective(device float *out [[buffer(0)]], uint at [[thread_index_in_threadgroup]]) {
  if (at % 2) threadgroup_barrier(mem_flags::mem_threadgroup); /* PLANTED: a_barrier_beside_a_collective */
  else out[at] = simd_sum(1.0f);
}

kernel void a_collective_of_half_a_simdgroup(device float *out [[buffer(0)]], uint at [[thread_index_in_threadgroup]]) {
  float x = 0.0f;
  if (at % 2) x = simd_sum(1.0f);                           /* PLANTED: a_collective_of_half_a_simdgroup */
  else x = simd_max(2.0f);
  out[at] = x;
}

kernel void one_too_far(constant planted_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                        uint at [[thread_index_in_threadgroup]]) {
  if ((int)at <= a.n) out[at % 64] = x[at];                 /* PLANTED: one_too_far */
}

kernel void never_written(device float *out [[buffer(0)]], threadgroup float *memory [[threadgroup(0)]],
                          uint at [[thread_index_in_threadgroup]]) {
  if (at < 63) memory[at] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[at] = memory[at];                                     /* PLANTED: never_written */
}

kernel void beyond_threadgroup_memory(device float *out [[buffer(0)]], threadgroup float *memory [[threadgroup(0)]],
                                      uint at [[thread_index_in_threadgroup]]) {
  memory[at + 1] = 1.0f;                                    /* PLANTED: beyond_threadgroup_memory */
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[at] = 1.0f;
}

kernel void a_race_of_groups(device float *out [[buffer(0)]], uint at [[thread_index_in_threadgroup]],
                             uint3 group [[threadgroup_position_in_grid]]) {
  out[at] = (float)group.x;                                 /* PLANTED: a_race_of_groups */
}

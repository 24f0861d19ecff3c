/* words.metal: one kernel for each group of words of the language that csrc/emulate/metal.h stands for, for tests/gpu/test_metal_words.py. */
#include "common.h"

struct words_args { int n; };

/* 32 lanes, ten numbers each */
kernel void collectives(device const int *x [[buffer(0)]], device int *out [[buffer(1)]], uint lane [[thread_index_in_simdgroup]],
                        uint at [[thread_position_in_grid]]) {
  device int *y = out + 10 * at;
  y[0] = simd_sum(x[at]);
  y[1] = simd_max(x[at]);
  y[2] = simd_min(x[at]);
  y[3] = simd_shuffle(x[at], (ushort)(31 - lane));
  y[4] = simd_shuffle_xor(x[at], (ushort)5);
  y[5] = simd_prefix_exclusive_sum(x[at]);
  y[6] = simd_prefix_inclusive_sum(x[at]);
  y[7] = (int)(uint)(ulong)simd_ballot(x[at] > 0);
  y[8] = simd_broadcast_first(x[at]);
  y[9] = (simd_any(x[at] > 90) ? 2 : 0) + (simd_all(x[at] > -100) ? 1 : 0);
}

/* Numbers of threads, groups and simdgroups, as the attributes say them */
kernel void indices(device int *out [[buffer(0)]], uint3 at [[thread_position_in_grid]], uint3 group [[threadgroup_position_in_grid]],
                    uint3 thread_ [[thread_position_in_threadgroup]], uint3 threads [[threads_per_threadgroup]],
                    uint3 groups [[threadgroups_per_grid]], uint number [[thread_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]]) {
  device int *y = out + 8 * (at.x + threads.x * groups.x * at.y);
  y[0] = (int)group.x, y[1] = (int)group.y, y[2] = (int)thread_.x, y[3] = (int)thread_.y;
  y[4] = (int)number, y[5] = (int)lane, y[6] = (int)simdgroup, y[7] = (int)simdgroups;
}

/* out = a b + c b^T of 8 x 8, a as halves in threadgroup memory */
kernel void matrices(device const float *a [[buffer(0)]], device const float *b [[buffer(1)]], device const float *c [[buffer(2)]],
                     device float *out [[buffer(3)]], threadgroup half *memory [[threadgroup(0)]], uint lane [[thread_index_in_simdgroup]]) {
  for (uint i = lane; i < 64; i += 32) memory[i / 8 * 12 + i % 8] = (half)a[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_half8x8 left;
  simdgroup_float8x8 right, turned, third, sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  simdgroup_load(left, memory, 12);
  simdgroup_load(right, b, 8);
  simdgroup_load(turned, b, 8, ulong2(0), true);
  simdgroup_load(third, c, 8);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_multiply_accumulate(sum, third, turned, sum);
  simdgroup_store(sum, out, 8);
}

/* Floats to halves and back, halves to floats */
kernel void narrow(constant words_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device half *y [[buffer(2)]],
                   device const half *h [[buffer(3)]], device float *z [[buffer(4)]], uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.n) return;
  y[at] = (half)x[at];
  z[at] = (float)h[at];
}

/* Vectors: loads, parts, arithmetic, bits */
kernel void vectors(device const float4 *x [[buffer(0)]], device const packed_float3 *p [[buffer(1)]], device float4 *out [[buffer(2)]],
                    uint at [[thread_position_in_grid]]) {
  const float3 three = p[at];
  const float4 v = fma(x[at], float4(2.0f), float4(three, 1.0f));
  out[3 * at] = v;
  out[3 * at + 1] = float4(v.zw, v.xy) * 0.5f;
  out[3 * at + 2] = float4(float2(as_type<half2>(as_type<uint>(half2((half)v.x, (half)v.y)))), dot(v, v), max(v, float4(1.0f)).z);
}

/* Sums of a block in threadgroup memory, of the grid by atomics */
kernel void sums(constant words_args &a [[buffer(0)]], device const int *x [[buffer(1)]], device atomic_int *out [[buffer(2)]],
                 device atomic_uint *most [[buffer(3)]], threadgroup int *memory [[threadgroup(0)]], uint at [[thread_position_in_grid]],
                 uint number [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]]) {
  memory[number] = (int)at < a.n ? x[at] : 0;
  for (uint step = threads / 2; step; step /= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (number < step) memory[number] += memory[number + step];
  }
  if (number == 0) atomic_fetch_add_explicit(out, memory[0], memory_order_relaxed);
  if ((int)at < a.n) atomic_fetch_max_explicit(most, (uint)max(0, x[at]), memory_order_relaxed);
}

/* sums.h: sums over a row in the order of csrc/cpu/vec.h, so that they have the same bits: 1024 sums, element i in number i % 1024, in the
 * order of the row, which are folded in halves: i with i + 512, i + 256 .. i + 1. A sum is given as f(element, sum so far).
 *
 * A warp's row: lane l has numbers l, l + 32 ... A block's row: thread t, one of up to 256, has numbers 4 t .. 4 t + 3.
 */
#ifndef PE_CUDA_SUMS_H
#define PE_CUDA_SUMS_H

#include "cuda.h"
#include "device.h"

namespace pe {

constexpr int ROW_SUMS = 1024;

/* Numbers l + 32 J, l + 32 (J + STEP) .. of MOST, folded. */
template <int MOST, int J, int STEP, class F> __device__ __forceinline__ float fold_lane(int n, F f) {
  if constexpr (STEP < MOST) {
    return fold_lane<MOST, J, 2 * STEP>(n, f) + fold_lane<MOST, J + STEP, 2 * STEP>(n, f);
  } else {
    float sum = 0.0f;
    for (int i = threadIdx.x % 32 + 32 * J; i < n; i += ROW_SUMS) sum = f(i, sum);
    return sum;
  }
}

/* All lanes get the sum over 0 .. n - 1 of f(i, sum). */
template <class F> __device__ __forceinline__ float sum_of_warp(int n, F f) {
  return warp_sum(n <= 256 ? fold_lane<8, 0, 1>(n, f) : fold_lane<32, 0, 1>(n, f));
}

/* What folds a block's sums: 4 KB. */
struct BlockSums {
  float4 part[ROW_SUMS / 4];
};

__device__ __forceinline__ float4 add4(const float4 &a, const float4 &b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

/* The fours of a warp's lanes, folded. */
__device__ __forceinline__ float fold_fours(const float4 &v) {
  return (warp_sum(v.x) + warp_sum(v.z)) + (warp_sum(v.y) + warp_sum(v.w));
}

/* All threads get the fold of all fours; one barrier. */
__device__ __forceinline__ float fold_block(BlockSums &sh, const float (&s)[4]) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  sh.part[threadIdx.x] = make_float4(s[0], s[1], s[2], s[3]);
  __syncthreads();
  float4 of[8];
#pragma unroll
  for (int i = 0; i < 8; i++) of[i] = i < warps ? sh.part[lane + 32 * i] : make_float4(0, 0, 0, 0);
  return fold_fours(add4(add4(add4(of[0], of[4]), add4(of[2], of[6])), add4(add4(of[1], of[5]), add4(of[3], of[7]))));
}

} // namespace pe

#endif

/* linear_parts.h: the ends of products: sums of warps that a block adds up, and sums that a warp has whole. A lane's sums are those of
 * unpack.h: 4 neighbouring rows of weights (quad q of group h of the pair) times columns 2t and 2t + 1 of each tile of x.
 */
#ifndef PE_CUDA_LINEAR_PARTS_H
#define PE_CUDA_LINEAR_PARTS_H

#include "linear.h"

namespace pe {

/* The part of a lane in a pair of groups: see unpack.h. */
struct Lane {
  int h, q, t;
  __device__ __forceinline__ Lane() {
    const int lane = threadIdx.x % 32;
    h = lane / 16, q = lane / 4 % 4, t = lane % 4;
  }
};

/* ---- few rows: a warp has the sums of a slice ---- */

constexpr int SUM_ROW = 36; /* floats from one row of x to the next in the sums of a warp */

struct FewSums {
  float part[SLICES][TILE_ROWS][SUM_ROW];
};

/* Add up the warps' sums of a tile in order, and finish them: a thread for each row of weights and of x. */
__device__ __forceinline__ void reduce(const Product &p, const FewSums &sh, const Span &span, int slot) {
  const Matrix &w = p.w[span.matrix];
  const int warps = blockDim.x / 32, width = p.glu ? 16 : 32, first = (p.glu ? 16 : 32) * span.pair;
  for (int e = threadIdx.x; e < width * TILE_ROWS; e += blockDim.x) {
    const int r = e % width, column = e / width, n = first + r, row = result_row(p, slot + column);
    if (row < 0 || n >= w.n) continue;
    float y = 0.0f, y1 = 0.0f;
    for (int i = 0; i < warps; i++) y += sh.part[i][column][r];
    if (p.glu)
      for (int i = 0; i < warps; i++) y1 += sh.part[i][column][16 + r];
    w.out[row * w.out_stride + n] = finished(p, w, n, row, slot + column, y, y1);
  }
}

/* All tiles of a block of few rows, one after the other, with N buffers in turns: with two, a warp that writes one has passed the barrier
 * behind which all had left it. */
template <int T, int N>
__device__ __forceinline__ void finish_few(const Product &p, FewSums (&sums)[N], int &turn, const Span &span, const Part &part, int warp,
                                           const Lane &l, const float (&acc)[T][4][2]) {
#pragma unroll
  for (int tile = 0; tile < T; tile++) {
    if (tile >= part.tiles) break;
    FewSums &sh = sums[N == 1 ? 0 : turn];
    turn ^= 1;
    if (N == 1) __syncthreads();
#pragma unroll
    for (int column = 0; column < 2; column++)
      *reinterpret_cast<float4 *>(&sh.part[warp][2 * l.t + column][16 * l.h + 4 * l.q]) =
          make_float4(acc[tile][0][column], acc[tile][1][column], acc[tile][2][column], acc[tile][3][column]);
    __syncthreads();
    reduce(p, sh, span, TILE_ROWS * (part.first_tile + tile));
  }
}

/* ---- many rows: a warp has whole sums ---- */

/* A slice is at its end: its sums join those of the slices before. */
template <int MT> __device__ __forceinline__ void add_slice(float (&sum)[MT][4][2], float (&acc)[MT][4][2]) {
#pragma unroll
  for (int i = 0; i < 8 * MT; i++) {
    sum[i / 8][i / 2 % 4][i % 2] += acc[i / 8][i / 2 % 4][i % 2];
    acc[i / 8][i / 2 % 4][i % 2] = 0.0f;
  }
}

/* Four neighbouring results of a row. */
__device__ __forceinline__ void store4(const Product &p, const Matrix &w, int n, int slot, const float (&y)[4], const float (&y1)[4]) {
  const int row = result_row(p, slot);
  if (row < 0 || n >= w.n) return;
  float *out = w.out + row * w.out_stride + n;
  float done[4];
#pragma unroll
  for (int i = 0; i < 4; i++) done[i] = n + i < w.n ? finished(p, w, n + i, row, slot, y[i], y1[i]) : 0.0f;
  if (n + 4 <= w.n && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    *reinterpret_cast<float4 *>(out) = make_float4(done[0], done[1], done[2], done[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (n + i < w.n) out[i] = done[i];
}

/* A warp's sums of a pair times MT tiles to memory. With glu the lane 16 further has the second matrix' sums of the same rows. */
template <int MT>
__device__ __forceinline__ void store(const Product &p, const Span &span, const Part &part, int pair, int first_tile, const Lane &l,
                                      const float (&sum)[MT][4][2]) {
  const Matrix &w = p.w[span.matrix];
  const int n = p.glu ? 16 * (span.pair + pair) + 4 * l.q : 32 * (span.pair + pair) + 16 * l.h + 4 * l.q;
#pragma unroll
  for (int tile = 0; tile < MT; tile++)
#pragma unroll
    for (int column = 0; column < 2; column++) {
      float y[4], y1[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        y[i] = sum[tile][i][column];
        y1[i] = p.glu ? __shfl_xor_sync(ALL, y[i], 16) : 0.0f;
      }
      if (first_tile + tile >= part.tiles || (p.glu && l.h)) continue;
      store4(p, w, n, TILE_ROWS * (part.first_tile + first_tile + tile) + 2 * l.t + column, y, y1);
    }
}

} // namespace pe

#endif

/* linear_float.cu: weights that are multiplied as float32: F32, and all that lies in the file's layout, dequantized on its way (dequant.h).
 * linear.h says what the whole is and in which order it sums: here one fused product after the other, k ascending, so results are exact to
 * float32's rounding. No tensor cores: three bf16 products for each would be faster only where rows are many, and F32 weights are the few
 * of routers and small encoders.
 *
 * Few rows: a block is 32 rows of weights times up to 8 T rows of x, each warp a slice of k and each lane a row. F32 is packed: a warp's
 * load is 2 runs of 64 bytes, 16 of k ahead (2 KB in flight). Weights of the file are dequantized 16 of k at a time to shared memory,
 * [k][33] for each warp; neighbouring lanes take neighbouring eights of a row. x comes from L1, the same for all lanes.
 * Many rows: a block of 256 threads is 64 x 64 results, a thread 4 x 4; it goes through k by 32: weights [k][68], x [k][68] in shared
 * memory, so that a thread reads its rows and columns by 16 bytes each. 16 KB for 64 x 64 x 32 x 2 operations from the second cache: 16 a
 * byte.
 * Roofline: weights once, 4 n k bytes (fewer for blocks), or n k m fused products on the fp32 pipes, about half of whose peak is reached.
 */
#include "dequant.h"
#include "linear_parts.h"

namespace pe {
namespace {

constexpr int FEW_DEPTH = 16, DEPTH = 32, PITCH = 68, SIDE = 64;

/* w[k .. k + 7] of a row of plain numbers; zeros behind its end. */
template <int F> __device__ __forceinline__ void load_plain(const uint8_t *row, int k, int end, float (&w)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (k + i >= end) w[i] = 0.0f;
    else if (F == PE_F32) w[i] = reinterpret_cast<const float *>(row)[k + i];
    else if (F == PE_F16) w[i] = half_from_bits(reinterpret_cast<const uint16_t *>(row)[k + i]);
    else w[i] = __uint_as_float(static_cast<uint32_t>(reinterpret_cast<const uint16_t *>(row)[k + i]) << 16);
  }
}

/* The same of any format, in the file's layout. All threads take the same way through the switch, which costs less than kernels for each
 * format would: their compilation took minutes. */
__device__ __forceinline__ void load8(int format, const uint8_t *row, int k, int end, const pe_codebooks *books, float (&w)[8]) {
  if (format == PE_F32) return load_plain<PE_F32>(row, k, end, w);
  if (format == PE_F16) return load_plain<PE_F16>(row, k, end, w);
  if (format == PE_BF16) return load_plain<PE_BF16>(row, k, end, w);
  if (k >= end) {
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = 0.0f;
    return;
  }
  switch (format) {
#define FILE_FORMAT(name)                                                                                                      \
    case PE_##name:                                                                                                            \
      file_block<PE_##name>::get8(row + k / PE_BLOCK_##name * PE_BYTES_##name, k % PE_BLOCK_##name, books, w);                 \
      break;
    PE_FILE_BLOCKS(FILE_FORMAT)
    PE_FILE_BLOCKS_OF_CODEBOOKS(FILE_FORMAT)
#undef FILE_FORMAT
    default: break;
  }
}

/* Row r (0..31) of a pair in the file's layout; beyond the last it is that one again. */
__device__ __forceinline__ const uint8_t *row_of(const Product &p, const Span &s, int pair, int r, int expert) {
  const Matrix &w = p.w[p.glu ? r / 16 : s.matrix];
  const int n = p.glu ? 16 * (s.pair + pair) + r % 16 : 32 * (s.pair + pair) + r;
  return w.data + expert * w.expert_bytes + min(n, w.n - 1) * w.group_bytes;
}

/* ---- few rows ---- */

template <bool PACKED> struct FloatShared {
  FewSums sums;
  float w[PACKED ? 1 : SLICES][PACKED ? 1 : FEW_DEPTH][33];
};

/* w[i] = element k0 + i of the lane's row. Where it lies in each of the formats is worked out anew: kept for all of them it would spill. */
template <bool PACKED>
__device__ __forceinline__ void load_weights(const Product &p, const uint8_t *group, const Span &span, int expert, int k0,
                                             float (&scratch)[PACKED ? 1 : FEW_DEPTH][33], float (&w)[FEW_DEPTH]) {
  const int lane = threadIdx.x % 32;
  if constexpr (PACKED) {
#pragma unroll
    for (int i = 0; i < FEW_DEPTH; i++)
      w[i] = k0 + i < p.k ? __uint_as_float(ld_global_4(group + 64 * static_cast<int64_t>(k0 + i) + 4 * (lane % 16))) : 0.0f;
  } else {
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
      const int r = 16 * i + lane / 2, k = 8 * (lane % 2);
      float eight[8];
      load8(p.format, row_of(p, span, 0, r, expert), again(k0 + k), p.k, p.codebooks, eight);
#pragma unroll
      for (int j = 0; j < 8; j++) scratch[k + j][r] = eight[j];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < FEW_DEPTH; i++) w[i] = scratch[i][lane];
  }
}

/* One block of 512 threads to a multiprocessor, so 128 registers a thread: left to itself the compiler takes 64 on some targets, and spills. */
template <bool PACKED, int T> __global__ void __launch_bounds__(512, 1) few_float(const Product p) {
  auto &sh = shared<FloatShared<PACKED>>();
  Part part;
  if (!part_of<T>(p, part)) return;
  const Span span = span_of<1>(p, blockIdx.y);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = min(p.chosen ? 1 : p.order ? TILE_ROWS * T : p.m - TILE_ROWS * part.first_tile, TILE_ROWS * part.tiles);
  const uint8_t *group = PACKED ? group_of(p, span, 0, lane / 16, part.expert) : nullptr;
  const uint8_t *x = p.x + static_cast<int64_t>(TILE_ROWS) * part.first_tile * p.x_stride;
  float acc[TILE_ROWS * T] = {};
  const int begin = 32 * warp * p.slice, end = min(begin + 32 * p.slice, p.k);
  for (int k = begin; k < end; k += FEW_DEPTH) {
    float w[FEW_DEPTH];
    load_weights<PACKED>(p, group, span, part.expert, k, sh.w[PACKED ? 0 : warp], w);
#pragma unroll
    for (int row = 0; row < TILE_ROWS * T; row++) {
      if (row >= rows) break;
#pragma unroll
      for (int i = 0; i < FEW_DEPTH; i += 4) {
        const float4 v = __ldg(reinterpret_cast<const float4 *>(x + row * p.x_stride + 4 * static_cast<int64_t>(k + i)));
        acc[row] = fmaf(w[i], v.x, acc[row]), acc[row] = fmaf(w[i + 1], v.y, acc[row]);
        acc[row] = fmaf(w[i + 2], v.z, acc[row]), acc[row] = fmaf(w[i + 3], v.w, acc[row]);
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < T; tile++) {
    if (tile >= part.tiles) break;
    if (tile) __syncthreads();
#pragma unroll
    for (int i = 0; i < TILE_ROWS; i++) sh.sums.part[warp][i][lane] = acc[TILE_ROWS * tile + i];
    __syncthreads();
    reduce(p, sh.sums, span, TILE_ROWS * (part.first_tile + tile));
  }
}

/* ---- many rows ---- */

struct FloatTile {
  float w[DEPTH][PITCH], x[DEPTH][PITCH];
};

template <bool PACKED>
__device__ __forceinline__ void fill(FloatTile &to, const Product &p, const Span &span, const Part &part, int k0) {
  if constexpr (PACKED) {
    for (int i = threadIdx.x; i < DEPTH * 16; i += 256) {
      const int quad = i % 16, k = i / 16, g = quad / 4;
      const float4 v = k0 + k < p.k ? *reinterpret_cast<const float4 *>(group_of(p, span, g / 2, g % 2, part.expert) +
                                                                        64 * static_cast<int64_t>(k0 + k) + 16 * (quad % 4))
                                    : make_float4(0, 0, 0, 0);
      *reinterpret_cast<float4 *>(&to.w[k][4 * quad]) = v;
    }
  } else {
    const int r = threadIdx.x / 4, k = 8 * (threadIdx.x % 4);
    float eight[8];
    load8(p.format, row_of(p, span, r / 32, r % 32, part.expert), k0 + k, p.k, p.codebooks, eight);
#pragma unroll
    for (int j = 0; j < 8; j++) to.w[k + j][r] = eight[j];
  }
  for (int i = threadIdx.x; i < SIDE * DEPTH / 4; i += 256) {
    const int row = i % SIDE, k = i / SIDE * 4;
    float4 v = make_float4(0, 0, 0, 0);
    if (row < TILE_ROWS * part.tiles)
      v = *reinterpret_cast<const float4 *>(p.x + (static_cast<int64_t>(TILE_ROWS) * part.first_tile + row) * p.x_stride + 4 * (k0 + k));
    to.x[k][row] = v.x, to.x[k + 1][row] = v.y, to.x[k + 2][row] = v.z, to.x[k + 3][row] = v.w;
  }
}

template <bool PACKED> __global__ void __launch_bounds__(256) tiles_float(const Product p) {
  auto &sh = shared<FloatTile>();
  Part part;
  if (!part_of<SIDE / TILE_ROWS>(p, part)) return;
  const Span span = span_of<2>(p, blockIdx.y);
  const Lane l;
  const int warp = threadIdx.x / 32, pair = warp / 4, column = 16 * (warp % 4) + 4 * l.t, rows = 32 * pair + 16 * l.h + 4 * l.q;
  float acc[4][4] = {}, sum[4][4] = {}; /* [column][row] */
  for (int s = 0; s < p.steps; s++) {
    __syncthreads();
    fill<PACKED>(sh, p, span, part, DEPTH * s);
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < DEPTH; k++) {
      const float4 w = *reinterpret_cast<const float4 *>(&sh.w[k][rows]), x = *reinterpret_cast<const float4 *>(&sh.x[k][column]);
      const float ws[4] = {w.x, w.y, w.z, w.w}, xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int i = 0; i < 16; i++) acc[i / 4][i % 4] = fmaf(ws[i % 4], xs[i / 4], acc[i / 4][i % 4]);
    }
    if ((s + 1) % p.slice && s + 1 < p.steps) continue;
#pragma unroll
    for (int i = 0; i < 16; i++) sum[i / 4][i % 4] += acc[i / 4][i % 4], acc[i / 4][i % 4] = 0.0f;
  }
  const Matrix &w = p.w[span.matrix];
  const int n = p.glu ? 16 * (span.pair + pair) + 4 * l.q : 32 * span.pair + rows;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float y1[4];
#pragma unroll
    for (int j = 0; j < 4; j++) y1[j] = p.glu ? __shfl_xor_sync(ALL, sum[i][j], 16) : 0.0f;
    if ((p.glu && l.h) || column + i >= TILE_ROWS * part.tiles) continue;
    store4(p, w, n, TILE_ROWS * part.first_tile + column + i, sum[i], y1);
  }
}

} // namespace

pe_status multiply_floats(int32_t dtype, Product p, int tiles, dim3 grid, cudaStream_t stream) {
  const dim3 warps(32 * ((p.steps + p.slice - 1) / p.slice));
  p.format = dtype;
  switch (dtype) {
    case PE_PACKED + PE_F32:
      if (tiles == 1) launch(stream, few_float<true, 1>, grid, warps, sizeof(FloatShared<true>), p);
      else if (tiles == 4) launch(stream, few_float<true, 4>, grid, warps, sizeof(FloatShared<true>), p);
      else launch(stream, tiles_float<true>, grid, dim3(256), sizeof(FloatTile), p);
      return PE_OK;
#define FILE_FORMAT(name) case PE_##name:
    PE_FILE_BLOCKS_OF_CODEBOOKS(FILE_FORMAT)
      if (!p.codebooks) return PE_NO_KERNEL;
      [[fallthrough]];
    PE_FILE_BLOCKS(FILE_FORMAT)
#undef FILE_FORMAT
    case PE_F32:
    case PE_F16:
    case PE_BF16:
      if (tiles == 1) launch(stream, few_float<false, 1>, grid, warps, sizeof(FloatShared<false>), p);
      else if (tiles == 4) launch(stream, few_float<false, 4>, grid, warps, sizeof(FloatShared<false>), p);
      else launch(stream, tiles_float<false>, grid, dim3(256), sizeof(FloatTile), p);
      return PE_OK;
    default: return PE_NO_KERNEL;
  }
}

} // namespace pe

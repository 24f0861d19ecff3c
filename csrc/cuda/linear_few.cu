/* linear_few.cu: packed blocks times few rows (1 to 32): generation. linear.h says what the whole is and in which order it sums.
 *
 * A block owns a pair: 32 rows of weights (two groups of 16; with glu a group of each matrix), times a unit of up to 8 T rows of x. Each of
 * its warps owns a slice of k, up to 16; the warps' sums are added in order through shared memory: [warp][row of x 8][36], the 32 sums of
 * a row of x side by side, 36 apart so that a quarter warp's 16-byte stores touch all banks. 18 KB for 16 warps, a tile after the other.
 *
 * Weights go from memory to registers in operand order (unpack.h) by 16-byte loads that pass L1 by, 4 or 8 steps ahead of their use: 2 to 6
 * KB in flight a warp, 32 to 96 KB a multiprocessor (an H200 needs 33: 4.3 TB/s x 1 us / 132). x comes through L1, where the blocks of a
 * multiprocessor share it: 96 bytes a step for one row, 320 for eight.
 *
 * Roofline, for n rows and k columns: reads n k x (0.33 to 1.06) bytes of weights, once, and 4 m (n + k) of the rest. A step of a pair (1024
 * weights, 576 bytes of Q4_K) takes 2 mma a tile, 16 to 24 fma, and 12 to 40 instructions of unpacking that T tiles share: for one row
 * 0.11 to 0.16 instructions a byte and lane; an H200 has 0.21 (4 x 1.75 GHz x 132 / 4.3 TB/s).
 */
#include "linear_parts.h"
#include "unpack.h"

#include <type_traits>

namespace pe {
namespace {

/* Steps of which a warp holds the codes: each is loaded anew as soon as it is used, so many steps ahead. */
template <int F, int T> constexpr int ring_steps = (code_pieces<F> == 1 ? 8 : 4) / (T == 4 ? 2 : 1);

/* Codes of a step on their way, and the scales of formats of 32. */
struct NoScales {};
template <int F> struct Step {
  Codes<F> codes;
  std::conditional_t<is_k<F>, NoScales, Scales<F>> scales;
};

/* Where block `block` of a group lies. */
template <int F> struct Block {
  int head, body;
  __device__ __forceinline__ explicit Block(int block) {
    constexpr int unit = Packed<F>::unit;
    const int at = block / unit * unit_bytes<F>;
    head = at + block % unit * Packed<F>::head, body = at + unit * Packed<F>::head + block % unit * Packed<F>::body;
  }
};

/* Load step s of a group. */
template <int F> __device__ __forceinline__ void fetch(Step<F> &to, const GlobalBytes &from, int s, const Lane &l) {
  constexpr int steps = Packed<F>::block_steps;
  const Block<F> block(s / steps);
  load_codes<F>(to.codes, from, block.body + body_scales<F> + s % steps * step_bytes<F>, l);
  if constexpr (!is_k<F>) load_scales<F>(to.scales, from, block.head, 0, l);
}
template <int F> __device__ __forceinline__ void fetch_scales(Scales<F> &to, const GlobalBytes &from, int s, const Lane &l) {
  const Block<F> block(s / 8);
  load_scales<F>(to, from, block.head, words_at<F>(block.head, block.body), l);
}

/* The rows of x that a warp reads. */
template <int T> struct Columns {
  const uint8_t *tile;  /* first record of the first tile */
  int64_t tile_bytes;
  int record, tiles, rows; /* rows: codes of others are not read */
};

/* A step of the pair times all columns; j: the step's number in its block of 256. */
template <int F, int T>
__device__ __forceinline__ void use(const Codes<F> &codes, const Scales<F> &scales, int s, int j, const Columns<T> &x, const Lane &l,
                                    float (&acc)[T][4][2]) {
  const int lane = threadIdx.x % 32;
  uint32_t a[2][4];
  StepScales<F> w;
  to_operands<F>(codes, l, a);
  to_scales<F>(scales, j, w);
#pragma unroll
  for (int tile = 0; tile < T; tile++) {
    if (tile >= x.tiles) continue;
    const uint8_t *at = x.tile + tile * x.tile_bytes + static_cast<int64_t>(s) * x.record;
    uint2 b = make_uint2(0, 0);
    if (8 * tile + lane / 4 < x.rows) b = __ldg(reinterpret_cast<const uint2 *>(at + 8 * lane));
    const uint32_t operand[2] = {b.x, b.y};
    const float4 d = __ldg(reinterpret_cast<const float4 *>(at + CODES_BYTES + 16 * l.t));
    float4 parts = d;
    if constexpr (F == PE_Q2_K) parts = __ldg(reinterpret_cast<const float4 *>(at + CODES_BYTES + 64 + 16 * l.t));
    multiply_step<F>(a, w, operand, d, parts, acc[tile]);
  }
}

template <int F, int T> __global__ void __launch_bounds__(512) few(const Product p) {
  auto &sh = shared<FewSums>();
  Part part;
  if (!part_of<T>(p, part)) return;
  const Span span = span_of<1>(p);
  const Lane l;
  const int warp = threadIdx.x / 32;
  const GlobalBytes from = {group_of(p, span, 0, l.h, part.expert)};
  const int64_t tile_bytes = static_cast<int64_t>(p.steps) * p.record;
  const int rows = p.chosen ? 1 : p.order ? TILE_ROWS * T : p.m - TILE_ROWS * part.first_tile;
  const Columns<T> x = {p.x + part.first_tile * tile_bytes, tile_bytes, p.record, part.tiles, rows};
  float acc[T][4][2] = {};

  constexpr int R = ring_steps<F, T>;
  const int begin = warp * p.slice, end = min(begin + p.slice, p.steps);
  Step<F> ring[R];
  Scales<F> scales, coming;
#pragma unroll
  for (int i = 0; i < R; i++)
    if (begin + i < end) fetch<F>(ring[i], from, begin + i, l);
  if constexpr (is_k<F>) fetch_scales<F>(coming, from, begin, l);
  for (int s = begin; s < end; s += 8) { /* a slice begins with a block of 256 */
    if constexpr (is_k<F>) scales = coming;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (s + i >= end) break;
      if constexpr (is_k<F>) {
        if (i == 8 - R && s + 8 < end) fetch_scales<F>(coming, from, s + 8, l);
        use<F, T>(ring[i % R].codes, scales, s + i, i, x, l, acc);
      } else {
        use<F, T>(ring[i % R].codes, ring[i % R].scales, s + i, 0, x, l, acc);
      }
      if (s + i + R < end) fetch<F>(ring[i % R], from, s + i + R, l);
    }
  }
  finish_few<T>(p, sh, span, part, warp, l, acc);
}

template <int F> void launch_few(const Product &p, int tiles, dim3 grid, cudaStream_t stream) {
  const int warps = (p.steps + p.slice - 1) / p.slice;
  const size_t bytes = sizeof(FewSums);
  if (tiles == 1) launch(stream, few<F, 1>, grid, dim3(32 * warps), bytes, p);
  else if (tiles == 2) launch(stream, few<F, 2>, grid, dim3(32 * warps), bytes, p);
  else launch(stream, few<F, 4>, grid, dim3(32 * warps), bytes, p);
}

} // namespace

pe_status multiply_few(int32_t format, const Product &p, int tiles, dim3 grid, cudaStream_t stream) {
  switch (format) {
#define FEW(name, ...) case PE_##name: launch_few<PE_##name>(p, tiles, grid, stream); return PE_OK;
    PE_PACKED_BLOCKS(FEW)
#undef FEW
    default: return PE_NO_KERNEL;
  }
}

} // namespace pe

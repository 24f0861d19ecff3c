/* linear_tiles.cu: packed blocks times many rows: prompts. linear.h says what the whole is and in which order it sums.
 *
 * A block owns WN pairs (32 WN rows of weights; with glu half of them of each matrix) times a unit of WM MT tiles of 8 rows of x: 128 x 128
 * by 8 warps, or 64 x 64 by 4. A warp owns a pair times MT tiles: 8 MT sums a thread, and as many for the slices before.
 *
 * Shared memory: a ring of 2 or 3 stages of 4 steps, filled by cp.async, each warp a group and two tiles; weights as they are packed:
 *   weights  for each of 2 WN groups: [head][scales of parts][4 steps]; formats of 32: whole units. Bit 5 of an offset is flipped by bit 7
 *            (unpack.h: SharedBytes), so the 16-byte loads of operands meet no bank twice.
 *   x        for each tile: 4 records, as in memory; a warp reads 256 bytes in a row, and 64 bytes of scales as a broadcast.
 *   scales   of each warp's pair, for the stage, as in linear_few.cu
 *
 * Roofline, n rows of weights x k times m rows: 2 n k m operations, int8. Weights are read m / 128 times, x n / 128 times, from the second
 * cache. A step of a warp (32 x 32 of weights x 64 rows) is 16 mma, and for each of them 8 (with offsets 12) fma that apply scales: the
 * fp32 pipes are the limit, 8 to 12 cycles a mma of 4096 products on a quarter of a multiprocessor that could do one in 4 (H200), 8 (A100)
 * or 16 (RTX 3090). All instructions of the loop, from the SASS for sm_90a (2026-11): 16.4 a mma for Q8_0, 21.2 for Q4_K, so at most 0.24
 * and 0.19 of an H200's int8 peak, which is 0.49 and 0.38 of its bf16 peak; of a 3090's int8 peak 1 and 0.75. Shared memory: 40 passes a
 * step of a warp, of the 64 cycles that its 16 mma take at least.
 */
#include "linear_parts.h"
#include "unpack.h"

namespace pe {
namespace {

constexpr int STAGE_STEPS = 4;

/* Bytes of a group in a stage: head and scales of parts, and where its steps begin. */
template <int F> constexpr int head_bytes = is_k<F> ? Packed<F>::unit * Packed<F>::head : 0;
template <int F> constexpr int stage_head = is_k<F> ? head_bytes<F> + body_scales<F> : 0;
template <int F>
constexpr int group_stage = is_k<F> ? stage_head<F> + STAGE_STEPS * step_bytes<F> : STAGE_STEPS / Packed<F>::unit * unit_bytes<F>;
template <int F> constexpr int record_bytes = F == PE_Q2_K ? CODES_BYTES + 128 : CODES_BYTES + 64; /* what is copied of a record */

/* The two groups of a pair lie 64 bytes apart modulo 128, so that 4 bytes of each of their 32 rows touch all banks. */
template <int F> constexpr int group_pitch = group_stage<F> + (group_stage<F> % 128 ? 0 : 64);

template <int F, int WN, int WM, int MT> struct Stage {
  uint8_t w[2 * WN][group_pitch<F>];
  uint8_t x[WM * MT][STAGE_STEPS][record_bytes<F>];
};

/* Stages that fit, with the scales of the warps, into 99 KB, what a block can have on sm_86, 89 and 120 (sm_75: 64 KB, and blocks are 64
 * x 64). */
template <int F, int WN, int WM, int MT>
constexpr int stages = 3 * sizeof(Stage<F, WN, WM, MT>) + WN * WM * sizeof(WarpScales<F>) <= 99 * 1024 ? 3 : 2;
template <int F, int WN, int WM, int MT> struct Ring {
  Stage<F, WN, WM, MT> stage[stages<F, WN, WM, MT>];
  WarpScales<F> scales[WN * WM];
};

/* Where piece `offset` of a group's stage lies in the group, from the unit on in which the stage's step s begins. */
template <int F> __device__ __forceinline__ int stage_source(int s, int offset) {
  constexpr int unit = Packed<F>::unit;
  if constexpr (!is_k<F>) return offset;
  const int body = unit * Packed<F>::head + s / 8 % unit * Packed<F>::body;
  if (offset < head_bytes<F>) return offset;
  if (offset < stage_head<F>) return body + offset - head_bytes<F>;
  return body + body_scales<F> + s % 8 * step_bytes<F> + offset - stage_head<F>;
}

/* What a warp copies of each stage: a group of weights, and x of MT / WN tiles. */
template <int F, int WN, int WM, int MT> struct Source {
  static_assert(WM == 2 && MT % WN == 0, "as many warps as groups, and a whole number of tiles for each");
  const uint8_t *group, *x;
  int bytes, tiles;      /* of the group; of the warp's tiles those that are there */
  int64_t tile_bytes;
  __device__ __forceinline__ Source(const Product &p, const Span &span, const Part &part) {
    const int warp = threadIdx.x / 32, first = warp * (MT / WN);
    group = group_of(p, span, warp / 2, warp % 2, part.expert);
    bytes = static_cast<int>(p.w[0].group_bytes);
    tiles = part.tiles - first;
    tile_bytes = static_cast<int64_t>(p.steps) * RECORD;
    x = p.x + (part.first_tile + (tiles > 0 ? first : 0)) * tile_bytes;
  }
};

template <int F, int WN, int WM, int MT>
__device__ __forceinline__ void fill(Stage<F, WN, WM, MT> &to, const Source<F, WN, WM, MT> &from, int s, int steps) {
  const int lane = again(threadIdx.x % 32), warp = threadIdx.x / 32, at = s / Packed<F>::block_steps / Packed<F>::unit * unit_bytes<F>;
#pragma unroll
  for (int offset = 16 * lane; offset < group_stage<F>; offset += 512) {
    const int source = at + stage_source<F>(s, offset);
    const bool inside = source + 16 <= from.bytes;
    cp_async16(&to.w[warp][swizzled(offset)], from.group + (inside ? source : 0), inside);
  }
  constexpr int pieces = record_bytes<F> / 16;
#pragma unroll
  for (int tile = 0; tile < MT / WN; tile++) {
    const uint8_t *x = from.x + (tile < from.tiles ? tile * from.tile_bytes : 0) + static_cast<int64_t>(s) * RECORD;
#pragma unroll
    for (int i = lane; i < STAGE_STEPS * pieces; i += 32) {
      const bool inside = s + i / pieces < steps && tile < from.tiles;
      const uint8_t *piece = x + i / pieces * RECORD + i % pieces * 16;
      cp_async16(&to.x[MT / WN * warp + tile][i / pieces][i % pieces * 16], inside ? piece : from.x, inside);
    }
  }
}

/* The stage that begins with step s: `count` steps of a pair times MT tiles. */
template <int F, int WN, int WM, int MT>
__device__ __forceinline__ void multiply_stage(const Stage<F, WN, WM, MT> &from, WarpScales<F> &expanded, int s, int count, int pair,
                                               int first_tile, const Lane &l, float (&acc)[MT][4][2]) {
  constexpr int unit = Packed<F>::unit;
  const int lane = threadIdx.x % 32;
  const SharedBytes w = {from.w[2 * pair + l.h]};
  RowScales<F> scales;
  if constexpr (is_k<F>) {
    const int head = s / 8 % unit * Packed<F>::head;
    load_scales<F>(scales, w, head, body_scales<F> ? head_bytes<F> : head + 64);
  } else {
    load_scales_of_32<F>(scales, w, 0, count);
  }
  expand_scales<F>(scales, s / STAGE_STEPS % 2, count, expanded);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < STAGE_STEPS; i++) {
    if (i >= count) break;
    const int at = i / unit * unit_bytes<F>;
    Codes<F> codes;
    uint32_t a[2][4];
    StepScales<F> factors;
    load_codes<F>(codes, w, is_k<F> ? stage_head<F> + i * step_bytes<F> : at + unit * Packed<F>::head + i % unit * Packed<F>::body, l);
    read_scales<F>(expanded, i, l, factors);
    to_operands<F>(codes, l, a);
#pragma unroll
    for (int tile = 0; tile < MT; tile++) {
      const uint8_t *x = from.x[first_tile + tile][i];
      const uint2 b = *reinterpret_cast<const uint2 *>(x + 8 * lane);
      const uint32_t operand[2] = {b.x, b.y};
      float4 d;
      if constexpr (Packed<F>::offsets) {
        d = *reinterpret_cast<const float4 *>(x + CODES_BYTES + 16 * l.t);
      } else {
        const float2 two = *reinterpret_cast<const float2 *>(x + CODES_BYTES + 16 * l.t);
        d = make_float4(two.x, two.y, 0.0f, 0.0f);
      }
      float4 parts = d;
      if constexpr (F == PE_Q2_K) parts = *reinterpret_cast<const float4 *>(x + CODES_BYTES + 64 + 16 * l.t);
      multiply_step<F>(a, factors, operand, d, parts, acc[tile]);
    }
  }
  __syncwarp(); /* the scales are read before the next stage's are written */
}

template <int F, int WN, int WM, int MT> __global__ void __launch_bounds__(32 * WN * WM, 1) tiles(const Product p) {
  constexpr int S = stages<F, WN, WM, MT>;
  auto &ring = shared<Ring<F, WN, WM, MT>>();
  Part part;
  if (!part_of<WM * MT>(p, part)) return;
  const Span span = span_of<WN>(p, blockIdx.y);
  const Lane l;
  const int warp = threadIdx.x / 32, pair = warp / WM, first_tile = warp % WM * MT;
  const Source<F, WN, WM, MT> from(p, span, part);
  float acc[MT][4][2] = {}, sum[MT][4][2] = {};

#pragma unroll
  for (int i = 0; i < S - 1; i++) {
    if (i * STAGE_STEPS < p.steps) fill<F, WN, WM, MT>(ring.stage[i], from, i * STAGE_STEPS, p.steps);
    cp_async_commit();
  }
  for (int s = 0, at = 0, slice = 0; s < p.steps; s += STAGE_STEPS) {
    cp_async_wait<S - 2>();
    __syncthreads(); /* the stage is there for all, and all are done with the one that is filled now */
    const int later = s + (S - 1) * STAGE_STEPS;
    if (later < p.steps) fill<F, WN, WM, MT>(ring.stage[at == 0 ? S - 1 : at - 1], from, later, p.steps);
    cp_async_commit();
    multiply_stage<F, WN, WM, MT>(ring.stage[at], ring.scales[warp], s, min(STAGE_STEPS, p.steps - s), pair, first_tile, l, acc);
    at = at + 1 == S ? 0 : at + 1;
    slice += STAGE_STEPS;
    if (slice < p.slice && s + STAGE_STEPS < p.steps) continue;
    slice = 0;
    add_slice<MT>(sum, acc);
  }
  store<MT>(p, span, part, pair, first_tile, l, sum);
}

template <int F> void launch_tiles(const Product &p, int n_tiles, dim3 grid, cudaStream_t stream) {
  if (n_tiles == 16) launch(stream, tiles<F, 4, 2, 8>, grid, dim3(256), sizeof(Ring<F, 4, 2, 8>), p);
  else launch(stream, tiles<F, 2, 2, 4>, grid, dim3(128), sizeof(Ring<F, 2, 2, 4>), p);
}

} // namespace

pe_status multiply_tiles(int32_t format, const Product &p, int tiles, dim3 grid, cudaStream_t stream) {
  switch (format) {
#define TILES(name, ...) case PE_##name: launch_tiles<PE_##name>(p, tiles, grid, stream); return PE_OK;
    PE_PACKED_BLOCKS(TILES)
#undef TILES
    default: return PE_NO_KERNEL;
  }
}

} // namespace pe

/* linear_half.cu: F16 and BF16 weights times rows of x in the same numbers, summed in float32 by mma.m16n8k16. linear.h says what the whole
 * is and in which order it sums; within 16 of k the order is the instruction's, in all kernels the same. For F16 x is rounded to 2^-12 of
 * each element (its rows are scaled, so that none overflows). A bf16 holds too little for that (2^-9): x is two of them, what is rounded
 * and what is left, 2^-17, and each step two products into the same sum, so BF16 prompts run at half of the tensor cores' speed.
 *
 * Operands.  Packed, 16 rows lie side by side for each of k. Lane l = 16 h + 4 q + t of a warp takes, of a pair of groups and 16 of k, the
 * quad 4q .. 4q+3 of group h at k = t, t+4, t+8, t+12: four loads of 8 bytes, a warp's load being 4 x 2 runs of 32. Products may take k in
 * any order that x takes too; the pairs of neighbours along k that the operand wants are made by 8 byte permutations.
 *
 * Few rows: a block is a pair times up to 8 T rows of x, each warp a slice of k; 2 KB in flight a warp. Reads 2 n k bytes of weights once;
 * a step (32 x 16 weights, 1 KB) is 4 loads, 8 permutations and 2 mma a tile: 0.02 instructions a byte and lane. Memory is the limit.
 * Many rows: a block is WN pairs times WM MT tiles (128 x 128 or 64 x 64), a warp a pair times MT tiles, as in linear_tiles.cu. A ring of 3
 * stages of 32 of k by cp.async: weights [group][k][16 rows], x [tile][2 records], both as in memory, and free of bank conflicts so: 16
 * lanes read 4 of k x 32 bytes. 2 n k m operations on tensor cores; a step of a warp reads 4 + 8 times 256 bytes for 16 mma, 24 cycles of
 * shared memory for 16 x 4096 products: 83 % of what an H200's tensor cores could do in that time, all that an A100's and a 3090's can.
 */
#include "linear_parts.h"

namespace pe {
namespace {

constexpr int HALF_STEP = 16, GROUP_STEP = 32 * HALF_STEP; /* of k; bytes of a group */
template <int F> constexpr int parts = F == PE_BF16 ? 2 : 1;
template <int F> constexpr int half_record = parts<F> * CODES_BYTES; /* 16 of k of 8 rows of x */

/* Words of the quad at k = t, t + 4, t + 8, t + 12: two rows each. */
struct QuadStep { uint2 k[4]; };

__device__ __forceinline__ void to_operands(const QuadStep &w, uint32_t (&a)[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const uint32_t k0 = j ? w.k[0].y : w.k[0].x, k1 = j ? w.k[1].y : w.k[1].x, k2 = j ? w.k[2].y : w.k[2].x, k3 = j ? w.k[3].y : w.k[3].x;
    a[j][0] = __byte_perm(k0, k1, 0x5410u), a[j][1] = __byte_perm(k0, k1, 0x7632u);
    a[j][2] = __byte_perm(k2, k3, 0x5410u), a[j][3] = __byte_perm(k2, k3, 0x7632u);
  }
}

template <int F> __device__ __forceinline__ void multiply_half_step(const uint32_t (&a)[2][4], const uint2 &b, float (&acc)[4][2]) {
  const uint32_t operand[2] = {b.x, b.y};
#pragma unroll
  for (int j = 0; j < 2; j++) {
    float d[4] = {acc[2 * j][0], acc[2 * j][1], acc[2 * j + 1][0], acc[2 * j + 1][1]};
    if constexpr (F == PE_F16) mma_f16(d, a[j], operand);
    else mma_bf16(d, a[j], operand);
    acc[2 * j][0] = d[0], acc[2 * j][1] = d[1], acc[2 * j + 1][0] = d[2], acc[2 * j + 1][1] = d[3];
  }
}

/* ---- few rows ---- */

constexpr int AHEAD = 2; /* steps of 16 that are loaded at once */

/* AHEAD steps of a group; from: the lane's first quad of them, which is of `first` of k. Zeros from `limit` on. */
__device__ __forceinline__ void fetch(QuadStep (&w)[AHEAD], const uint8_t *from, int first, int limit) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int at = HALF_STEP * i + 4 * j;
      w[i].k[j] = first + at < limit ? ld_global_8(from + 32 * at) : make_uint2(0, 0);
    }
}

/* Those of them that are there, `left`, times columns; x: of each tile, where the lane's part of the first step's record is. */
template <int F, int T>
__device__ __forceinline__ void use(const QuadStep (&w)[AHEAD], const uint8_t *const (&x)[T], int tiles, int left, float (&acc)[T][4][2]) {
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    if (i >= left) continue;
    uint32_t a[2][4];
    to_operands(w[i], a);
#pragma unroll
    for (int tile = 0; tile < T; tile++) {
      if (tile >= tiles) continue;
#pragma unroll
      for (int part = 0; part < parts<F>; part++)
        multiply_half_step<F>(a, __ldg(reinterpret_cast<const uint2 *>(x[tile] + i * half_record<F> + CODES_BYTES * part)), acc[tile]);
    }
  }
}

struct FewHalf { FewSums sums[1]; };

template <int F, int T> __global__ void __launch_bounds__(512, F == PE_F16 && T == 1 ? 2 : 1) few_half(const Product p) {
  auto &sh = shared<FewHalf>();
  Part part;
  if (!part_of<T>(p, part)) return;
  const Span span = span_of<1>(p, blockIdx.y);
  const Lane l;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rows = p.chosen ? 1 : p.order ? TILE_ROWS * T : p.m - TILE_ROWS * part.first_tile;
  const int begin = 2 * warp * p.slice, end = min(begin + 2 * p.slice, (p.k + HALF_STEP - 1) / HALF_STEP), limit = min(p.k, HALF_STEP * end);
  const uint8_t *from = group_of(p, span, 0, l.h, part.expert) + static_cast<int64_t>(begin) * GROUP_STEP + 32 * l.t + 8 * l.q, *x[T];
#pragma unroll
  for (int tile = 0; tile < T; tile++) { /* where there is no row, another: nobody stores its sums */
    const int row = min(lane / 4, max(0, rows - 1 - TILE_ROWS * tile));
    x[tile] = p.x + (static_cast<int64_t>(part.first_tile + tile) * 2 * p.steps + begin) * half_record<F> + 32 * row + 8 * (lane % 4);
  }
  float acc[T][4][2] = {};
  QuadStep even[AHEAD], odd[AHEAD];
  fetch(even, from, HALF_STEP * begin + l.t, limit);
  for (int s = begin; s < end; s += 2 * AHEAD) {
    const int first = HALF_STEP * s + l.t;
    fetch(odd, from + AHEAD * GROUP_STEP, first + AHEAD * HALF_STEP, limit);
    use<F, T>(even, x, part.tiles, end - s, acc);
    from += 2 * AHEAD * GROUP_STEP;
    fetch(even, from, first + 2 * AHEAD * HALF_STEP, limit);
#pragma unroll
    for (int tile = 0; tile < T; tile++) x[tile] += AHEAD * half_record<F>;
    use<F, T>(odd, x, part.tiles, end - s - AHEAD, acc);
#pragma unroll
    for (int tile = 0; tile < T; tile++) x[tile] += AHEAD * half_record<F>;
  }
  int turn = 0;
  finish_few<T>(p, sh.sums, turn, span, part, warp, l, acc);
}

/* ---- many rows ---- */

template <int F, int WN, int WM, int MT> struct HalfStage {
  uint8_t w[2 * WN][2 * GROUP_STEP];
  uint8_t x[WM * MT][2 * half_record<F>];
};
constexpr int HALF_STAGES = 3;
template <int F, int WN, int WM, int MT> struct HalfRing { HalfStage<F, WN, WM, MT> stage[HALF_STAGES]; };

/* What a warp copies of each stage: a group of weights, and x of MT / WN tiles. */
template <int F, int WN, int WM, int MT> struct HalfSource {
  static_assert(WM == 2 && MT % WN == 0, "as many warps as groups, and a whole number of tiles for each");
  const uint8_t *group, *x;
  int tiles;             /* of the warp's tiles those that are there */
  int64_t tile_bytes;
  __device__ __forceinline__ HalfSource(const Product &p, const Span &span, const Part &part) {
    const int warp = threadIdx.x / 32, first = warp * (MT / WN);
    group = group_of(p, span, warp / 2, warp % 2, part.expert);
    tiles = part.tiles - first;
    tile_bytes = static_cast<int64_t>(p.steps) * 2 * half_record<F>;
    x = p.x + (part.first_tile + (tiles > 0 ? first : 0)) * tile_bytes;
  }
};

/* Step s of 32 of k. */
template <int F, int WN, int WM, int MT>
__device__ __forceinline__ void fill(HalfStage<F, WN, WM, MT> &to, const HalfSource<F, WN, WM, MT> &from, int k, int s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 16 * lane; offset < 2 * GROUP_STEP; offset += 512) {
    const bool inside = 32 * s + offset / 32 < k;
    cp_async16(&to.w[warp][offset], inside ? from.group + static_cast<int64_t>(s) * 2 * GROUP_STEP + offset : from.group, inside);
  }
#pragma unroll
  for (int tile = 0; tile < MT / WN; tile++) {
    const uint8_t *x = from.x + (tile < from.tiles ? tile * from.tile_bytes : 0) + static_cast<int64_t>(s) * 2 * half_record<F>;
#pragma unroll
    for (int offset = 16 * lane; offset < 2 * half_record<F>; offset += 512)
      cp_async16(&to.x[MT / WN * warp + tile][offset], x + offset, tile < from.tiles);
  }
}

template <int F, int WN, int WM, int MT>
__device__ __forceinline__ void multiply_half_stage(const HalfStage<F, WN, WM, MT> &from, int pair, int first_tile, const Lane &l,
                                                    float (&acc)[MT][4][2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    QuadStep w;
    uint32_t a[2][4];
#pragma unroll
    for (int j = 0; j < 4; j++)
      w.k[j] = *reinterpret_cast<const uint2 *>(&from.w[2 * pair + l.h][GROUP_STEP * i + 32 * (4 * j + l.t) + 8 * l.q]);
    to_operands(w, a);
#pragma unroll
    for (int tile = 0; tile < MT; tile++)
#pragma unroll
      for (int part = 0; part < parts<F>; part++) {
        const uint2 b = *reinterpret_cast<const uint2 *>(&from.x[first_tile + tile][half_record<F> * i + CODES_BYTES * part + 8 * lane]);
        multiply_half_step<F>(a, b, acc[tile]);
      }
  }
}

template <int F, int WN, int WM, int MT> __global__ void __launch_bounds__(32 * WN * WM) tiles_half(const Product p) {
  constexpr int S = HALF_STAGES;
  auto &ring = shared<HalfRing<F, WN, WM, MT>>();
  Part part;
  if (!part_of<WM * MT>(p, part)) return;
  const Span span = span_of<WN>(p, blockIdx.y);
  const Lane l;
  const int warp = threadIdx.x / 32, pair = warp / WM, first_tile = warp % WM * MT;
  const HalfSource<F, WN, WM, MT> from(p, span, part);
  float acc[MT][4][2] = {}, sum[MT][4][2] = {};
#pragma unroll
  for (int i = 0; i < S - 1; i++) {
    if (i < p.steps) fill<F, WN, WM, MT>(ring.stage[i], from, p.k, i);
    cp_async_commit();
  }
  for (int s = 0, at = 0, slice = 0; s < p.steps; s++) {
    cp_async_wait<S - 2>();
    __syncthreads();
    if (s + S - 1 < p.steps) fill<F, WN, WM, MT>(ring.stage[at == 0 ? S - 1 : at - 1], from, p.k, s + S - 1);
    cp_async_commit();
    multiply_half_stage<F, WN, WM, MT>(ring.stage[at], pair, first_tile, l, acc);
    at = at + 1 == S ? 0 : at + 1;
    if (++slice < p.slice && s + 1 < p.steps) continue;
    slice = 0;
    add_slice<MT>(sum, acc);
  }
  store<MT>(p, span, part, pair, first_tile, l, sum);
}

template <int F> void launch_half(const Product &p, int n, dim3 grid, cudaStream_t stream) {
  const dim3 warps(32 * ((p.steps + p.slice - 1) / p.slice));
  if (n == 1) launch(stream, few_half<F, 1>, grid, warps, sizeof(FewHalf), p);
  else if (n == 2) launch(stream, few_half<F, 2>, grid, warps, sizeof(FewHalf), p);
  else if (n == 8) launch(stream, tiles_half<F, 2, 2, 4>, grid, dim3(128), sizeof(HalfRing<F, 2, 2, 4>), p);
  else launch(stream, tiles_half<F, 4, 2, 8>, grid, dim3(256), sizeof(HalfRing<F, 4, 2, 8>), p);
}

} // namespace

pe_status multiply_half(int32_t format, const Product &p, int tiles, dim3 grid, cudaStream_t stream) {
  if (format == PE_F16) launch_half<PE_F16>(p, tiles, grid, stream);
  else if (format == PE_BF16) launch_half<PE_BF16>(p, tiles, grid, stream);
  else return PE_NO_KERNEL;
  return PE_OK;
}

} // namespace pe

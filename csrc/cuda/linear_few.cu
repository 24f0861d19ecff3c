/* linear_few.cu: packed blocks times few rows (1 to 32): generation. linear.h says what the whole is and in which order it sums.
 *
 * A block owns a pair: 32 rows of weights (two groups of 16; with glu a group of each matrix), times a unit of up to 8 T rows of x. Each of
 * its warps owns a slice of k, up to 16 of them; the warps' sums are added in order through shared memory, [warp][row of x 8][36]: the 32
 * sums of a row of x side by side, 36 apart, so that a quarter warp's 16-byte stores touch all banks. With T = 1 a block goes on to further
 * pairs, and its loads run ahead into the next one, so memory does not rest while sums are added. Shared memory: 18 KB of sums, twice, and
 * 0.5 to 2 KB of scales for each warp (unpack.h), whose scales each row's own lane works out for 4 steps at a time.
 *
 * Weights go from memory to registers in operand order (unpack.h) by 16-byte loads that pass L1 by, R steps ahead of their use: 2 to 4 KB
 * in flight a warp, 32 to 64 KB a multiprocessor (an H200 needs 33: 4.3 TB/s x 1 us / 132). x comes through L1, where it stays: 96 bytes a
 * step for one row, 320 for eight.
 *
 * Roofline, for n rows and k columns: reads n k x (0.33 to 1.06) bytes of weights, once, and 4 m (n + k) of the rest. A step of a pair is
 * 1024 weights, of Q4_K 576 bytes. An H200 has 0.215 instructions a byte (4 x 1.75 GHz x 132 / 4.3 TB/s), an RTX 4090 0.84. What a
 * step takes, from the SASS for sm_90a (2026-11):
 *              Q4_0  Q8_0  Q5_K  Q4_K  Q6_K  Q3_K  IQ4_XS  Q2_K
 *   one row    81    68    83    64    121   121   121     104       instructions of a warp, 2 of them mma, 4 where scales change every 16
 *   a byte     0.14  0.06  0.12  0.11  0.14  0.28  0.22    0.31      so Q3_K, IQ4_XS and Q2_K wait for instructions on an H200, others
 *                                                                    for memory. 2 to 8 rows: 10 to 19 more; a second tile some 50
 */
#include "linear_parts.h"
#include "unpack.h"

namespace pe {
namespace {

/* Steps of which a warp holds the codes: each is loaded anew as soon as it is used, so many steps ahead. */
template <int F, int T, int C> __host__ __device__ constexpr int ring_steps() {
  if (code_pieces<F> == 1) return T == 1 ? (is_k<F> ? 4 : 8) : is_k<F> ? 2 : 4;
  if (T == 1) return code_pieces<F> == 3 || F == PE_Q5_K || (F == PE_Q2_K && C == 2) ? 2 : 4;
  return Packed<F>::halves == 2 ? 1 : 2;
}

/* Where 8 steps from s on begin in a group (of formats of 256: the body of their block), and step j from there on. */
template <int F> __device__ __forceinline__ int eight_at(int s) {
  constexpr int unit = Packed<F>::unit;
  if constexpr (is_k<F>) return s / 8 / unit * unit_bytes<F> + unit * Packed<F>::head + s / 8 % unit * Packed<F>::body;
  else return s / unit * unit_bytes<F>;
}
template <int F> __host__ __device__ constexpr int step_at(int j) {
  constexpr int unit = Packed<F>::unit;
  return is_k<F> ? body_scales<F> + j * step_bytes<F> : j / unit * unit_bytes<F> + unit * Packed<F>::head + j % unit * Packed<F>::body;
}

/* Scales of steps s .. s + 3; of a block of 256, if s begins one. */
template <int F> __device__ __forceinline__ void fetch_scales(RowScales<F> &to, const uint8_t *group, int s, int end) {
  constexpr int unit = Packed<F>::unit;
  if constexpr (is_k<F>) {
    const int at = s / 8 / unit * unit_bytes<F>, head = s / 8 % unit * Packed<F>::head;
    const int body = unit * Packed<F>::head + s / 8 % unit * Packed<F>::body;
    load_scales<F>(to, GlobalBytes{group + at}, head, words_at<F>(head, body));
  } else {
    load_scales_of_32<F>(to, GlobalBytes{group + s / unit * unit_bytes<F>}, 0, min(SCALED_STEPS, end - s));
  }
}

template <int F> struct FewShared {
  FewSums sums[F == PE_Q2_K ? 1 : 2]; /* in turns, so that a barrier for each tile is enough; with one of them two (sm_75 has 64 KB) */
  WarpScales<F> scales[SLICES];
};

/* The rows of x that a warp reads: the lane's codes and its columns' scales in the first record of each tile. Of columns without a row the
 * codes are those of the last row, so that they cost nothing; nobody stores their sums. */
template <int T> struct Columns {
  const uint8_t *scales;  /* of the first tile */
  int codes, codes1, tile; /* from there: to codes of each tile; to the scales of the second tile, or of the first where there is one */
  __device__ __forceinline__ Columns(const Product &p, const Part &part, const Lane &l) {
    const int64_t tile_bytes = static_cast<int64_t>(p.steps) * RECORD;
    scales = p.x + part.first_tile * tile_bytes + CODES_BYTES + 16 * l.t;
    tile = part.tiles > 1 ? static_cast<int>(tile_bytes) : 0;
    const int rows = p.chosen ? 1 : p.order ? T * TILE_ROWS : p.m - TILE_ROWS * part.first_tile, row = threadIdx.x % 32 / 4;
    codes = 32 * min(row, max(0, rows - 1)) - 8 * l.t - CODES_BYTES;
    codes1 = tile + 32 * min(row, max(0, rows - 1 - (tile ? TILE_ROWS : 0))) - 8 * l.t - CODES_BYTES;
  }
};

/* A step of the pair times all columns, of which a lane sums C of its two: 1 where x is one row. */
template <int F, int T, int C>
__device__ __forceinline__ void use(const Codes<F> &codes, const StepScales<F> &w, const uint8_t *x, const Columns<T> &columns,
                                    const Lane &l, float (&acc)[T][4][2]) {
  uint32_t a[2][4];
  to_operands<F>(codes, l, a);
#pragma unroll
  for (int tile = 0; tile < T; tile++) {
    const uint2 b = __ldg(reinterpret_cast<const uint2 *>(x + (tile ? columns.codes1 : columns.codes)));
    const uint32_t operand[2] = {b.x, b.y};
    const float4 d = __ldg(reinterpret_cast<const float4 *>(x + tile * columns.tile));
    float4 parts = d;
    if constexpr (F == PE_Q2_K) parts = __ldg(reinterpret_cast<const float4 *>(x + tile * columns.tile + 64));
    multiply_step<F, C>(a, w, operand, d, parts, acc[tile]);
  }
}

/* What a warp reads next: codes of the first steps and scales. */
template <int F, int R> struct Ahead {
  Codes<F> ring[R];
  RowScales<F> scales;
  __device__ __forceinline__ void start(const uint8_t *group, int begin, int end, const Lane &l) {
#pragma unroll
    for (int i = 0; i < R; i++)
      if (is_k<F> || begin + i < end) load_codes<F>(ring[i], GlobalBytes{group + eight_at<F>(begin)}, step_at<F>(i), l);
    fetch_scales<F>(scales, group, begin, end);
  }
};

/* Scales of halves for two columns take the registers that places of later loads would be kept in: those of codes, or of scales, are
 * worked out where they stand then, at 4 to 7 in a hundred more instructions. */
template <int F, int T, int C> constexpr bool late_codes = C == 2 && (T == 1 ? F == PE_Q6_K : F == PE_Q2_K || F == PE_Q3_K);
template <int F, int T, int C> constexpr bool late_scales = C == 2 && T == 1 && F == PE_Q3_K;

/* A slice of a pair. Towards its end loads go on with the block's next pair, `next`, unless that is null. */
template <int F, int T, int C, int R>
__device__ __forceinline__ void slice_of(Ahead<F, R> &w, const uint8_t *group, const uint8_t *next, int begin, int end,
                                         WarpScales<F> &scales, const Columns<T> &x, const Lane &l, float (&acc)[T][4][2]) {
  for (int s = begin; s < end; s += 8) { /* a slice begins with a block of 256, and of formats of 256 it has whole ones */
    const bool more = s + 8 < end;
    const uint8_t *here = group + eight_at<F>(s), *after = more ? group + eight_at<F>(s + 8) : next + eight_at<F>(begin);
    const uint8_t *record = x.scales + static_cast<int64_t>(s) * RECORD;
#pragma unroll(T == 1 && (code_pieces<F> < 3 || (F == PE_Q6_K && C == 2)) ? 2 : 1)
    for (int late = 0; late < 2; late++) {
      const int first = SCALED_STEPS * late, left = is_k<F> ? SCALED_STEPS : end - s - first;
      if (left <= 0) break;
      expand_scales<F>(w.scales, late, left, scales);
      __syncwarp();
      constexpr bool worked_out = late_scales<F, T, C>;
      if (is_k<F> ? late && more : left > SCALED_STEPS)
        fetch_scales<F>(w.scales, group, (worked_out ? again(s) : s) + first + SCALED_STEPS, end);
      else if ((!is_k<F> || late) && next)
        fetch_scales<F>(w.scales, next, worked_out ? again(begin) : begin, end);
#pragma unroll
      for (int i = 0; i < SCALED_STEPS; i++) {
        if (i >= left) break;
        StepScales<F> factors;
        read_scales<F>(scales, i, l, factors);
        use<F, T, C>(w.ring[(first + i) % R], factors, record + (first + i) * RECORD, x, l, acc);
        const int ahead = first + i + R;
        if (ahead < 8 ? is_k<F> || s + ahead < end : more ? is_k<F> || s + ahead < end : next != nullptr) {
          const uint8_t *from = ahead < 8              ? here
                                : !late_codes<F, T, C> ? after
                                : more                 ? group + eight_at<F>(again(s) + 8)
                                                       : next + eight_at<F>(again(begin));
          load_codes<F>(w.ring[(first + i) % R], GlobalBytes{from}, step_at<F>(ahead % 8), l);
        }
      }
      __syncwarp();
    }
  }
}

/* With one tile a block walks through pairs, as many blocks for each unit as fill the card once, and loads never pause. With two, registers
 * are short of that: a block has one pair. */
template <int F, int T, int C> __global__ void __launch_bounds__(512) few(const Product p) {
  constexpr int R = ring_steps<F, T, C>();
  auto &sh = shared<FewShared<F>>();
  Part part;
  if (!part_of<T>(p, part)) return;
  const Lane l;
  const int warp = threadIdx.x / 32, begin = warp * p.slice, end = min(begin + p.slice, p.steps);
  const Columns<T> x(p, part, l);
  Ahead<F, R> w;
  const uint8_t *group = group_of(p, span_of<1>(p, blockIdx.y), 0, l.h, part.expert);
  w.start(group, begin, end, l);
  for (int item = blockIdx.y, turn = 0; item < p.blocks; item += gridDim.y) {
    const int following = item + gridDim.y;
    const uint8_t *next = nullptr;
    if (T == 1 && following < p.blocks) next = group_of(p, span_of<1>(p, following), 0, l.h, part.expert);
    float acc[T][4][2] = {};
    slice_of<F, T, C, R>(w, group, next, begin, end, sh.scales[warp], x, l, acc);
    if (!is_k<F> && (end - begin) % 8 && next) w.start(next, begin, end, l); /* steps of the next pair are not where they belong */
    finish_few<T>(p, sh.sums, turn, span_of<1>(p, item), part, warp, l, acc);
    group = next;
    if (T > 1) break;
  }
}

template <int F> void launch_few(const Product &p, int tiles, dim3 grid, cudaStream_t stream) {
  const int warps = (p.steps + p.slice - 1) / p.slice;
  const bool single = p.chosen || (p.m == 1 && !p.order);
  if (tiles == 1 && single) launch(stream, few<F, 1, 1>, grid, dim3(32 * warps), sizeof(FewShared<F>), p);
  else if (tiles == 1) launch(stream, few<F, 1, 2>, grid, dim3(32 * warps), sizeof(FewShared<F>), p);
  else launch(stream, few<F, 2, 2>, grid, dim3(32 * warps), sizeof(FewShared<F>), p);
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

/* attention_few.cu: attention of few queries of each sequence (generation), 16 queries of a group at a time on tensor cores.
 *
 * Block (x, y, z) has four warps and owns unit x (then x + gridDim.x ...) of key/value head y, and of the chunks that the unit sees those
 * number z, z + gridDim.z ... For a tile warp i makes the scores of keys 16 i .. 16 i + 15, exchanges peaks and probabilities with
 * the others through shared memory, and sums values in blocks of 32 columns i, i + 4 .. Where the chunks of a unit are spread over
 * blocks, each chunk's sums go to scratch and attention.cu merges them; else this block merges them in its part of `out`.
 *
 * Shared memory: queries; stages of a tile of K and of V as they lie in the cache, copied asynchronously while those before are used
 * (blocks are unpacked in registers: each byte of K and V is wanted by one warp only; keys by channel into halves beside them, 2 x 64 e bytes,
 * with a barrier more); [4][16] peaks; probabilities as A fragments
 * [4][32 lanes][16 bytes], behind them what they leave of the probabilities.
 * Per tile: 64 (e + f) elements of the cache, each byte read once for all heads of the group; 4 (e + f) * 64 * 16 operations on tensor
 * cores (each operand is two halves), of which 16 / group are of use; 8 powers a lane. At 4.8 TB/s (H200) and heads of 128 in F16 tensor cores
 * are busy 16% of the time: it is bound by the cache's bytes. Three barriers a tile; two or three blocks on a multiprocessor hide them.
 * Where a card has no room for a tile of both (64 KB on sm_75, heads of 256), V is loaded into the place of K when that has been used.
 */
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace {

using namespace pe;

enum { OWN = 2 /* groups of 8 keys of a warp in a tile */, STEPS = TILE_KEYS / 16 };

/* What a warp sums in a chunk: N blocks of columns. */
template <int N>
struct Sums {
  float acc[N][4][4], sums[4];
  Rows rows;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int b = 0; b < N; b++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[b][i][0] = acc[b][i][1] = acc[b][i][2] = acc[b][i][3] = 0.0f;
    sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
    rows.top[0] = rows.top[1] = PE_NONE;
  }
  __device__ __forceinline__ void shrink_all(const float (&factor)[2]) {
    if (!__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int b = 0; b < N; b++) shrink(acc[b], factor[0], factor[1]);
    sums[0] *= factor[0], sums[1] *= factor[0], sums[2] *= factor[1], sums[3] *= factor[1];
  }
};

/* The block's queries see a tile: scores, and probabilities as the A of four mma into shared memory. Ends with a barrier. */
template <int N>
__device__ __forceinline__ void weigh_tile(const Job &w, const Unit &u, int tile, const char *k, Sums<N> &x) {
  const int warp = warp_of(), g = lane_of() / 4;
  float s[OWN][4], peak[2], factor[2];
  float *peaks = area<float>(w.at.peaks);
  uint4 *p = area<uint4>(w.at.p);
  const PackedKeys blocks = {k, w.at.k_pitch, cell_format_of(w.k.dtype).bytes, w.k.dtype};
  if (w.k_form == BLOCKS) scores_of_codes<OWN>(w, 0, FEW_QUERIES, blocks, OWN * warp, s);
  else scores_of_halves<OWN>(w, 0, FEW_QUERIES, k, OWN * warp, s);
  if (w.bias) add_bias<OWN>(w, u, 0, tile * TILE_KEYS + 16 * warp, s);
  to_logits<OWN>(w.softcap, x.rows, tile * TILE_KEYS + 16 * warp, s, peak);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    peak[r] = peak_of_lanes(peak[r]);
    if (lane_of() % 4 == 0) peaks[warp * FEW_QUERIES + g + 8 * r] = peak[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float *all = peaks + g + 8 * r;
    const float most = fmaxf(fmaxf(all[0], all[FEW_QUERIES]), fmaxf(all[2 * FEW_QUERIES], all[3 * FEW_QUERIES]));
    factor[r] = move_top(most, x.rows.top[r]);
    if (w.stats && threadIdx.x % 4 == 0 && warp == 0) note_peak(w, g + 8 * r, most);
  }
  x.shrink_all(factor);
  uint32_t own[4], less[4];
  probabilities(s[0], s[1], x.rows.top, own, less);
  p[warp * 32 + lane_of()] = make_uint4(own[0], own[1], own[2], own[3]);
  p[(STEPS + warp) * 32 + lane_of()] = make_uint4(less[0], less[1], less[2], less[3]);
  __syncthreads();
}

/* Values by their probabilities. */
template <int N, bool FINE>
__device__ __forceinline__ void add_tile(const Job &w, const char *v, Sums<N> &x) {
  const int warp = warp_of();
  const uint4 *p = area<uint4>(w.at.p);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const uint4 all = p[step * 32 + lane_of()], rest = p[(STEPS + step) * 32 + lane_of()];
    const uint32_t a[4] = {all.x, all.y, all.z, all.w}, less[4] = {rest.x, rest.y, rest.z, rest.w};
    add_sums<FINE>(a, less, x.sums);
#pragma unroll
    for (int b = 0; b < N; b++) {
      const int own = warp + FEW_WARPS * b;
      if (own >= w.nf) continue;
      if (w.v_form == BLOCKS) add_blocks(a, less, v + own * cell_format_of(w.v.dtype).bytes, w.at.v_pitch, w.v.dtype, step, x.acc[b]);
      else add_values<FINE>(a, less, v + own * HALF_TILE, step, x.acc[b]);
    }
  }
}

template <int N>
__device__ __forceinline__ void attend_unit(const Job &w, const Unit &u) {
  const Seen seen = load_intervals(w, u, FEW_QUERIES);
  const int first = lane_of() / 4;
  Sums<N> x;
  Total total[2];
  load_queries(w, u, FEW_QUERIES);
#pragma unroll
  for (int r = 0; r < 2; r++) x.rows.seen[r] = area<Interval>(w.at.rows)[first + 8 * r];
  Walk now = {0, 0};
  now.enter(w, u, seen, 0, blockIdx.z, gridDim.z);
  if (now.more()) {
    Loader<false> loader;
    loader.begin(w, u, seen, now);
    forget_peaks(w, FEW_QUERIES);
    x.clear();
    while (now.more()) {
      const char *k, *v;
      const int chunk = now.chunk();
      loader.next(w, u, seen, k, v);
      weigh_tile<N>(w, u, now.tile, k, x);
      if (w.at.one) v = loader.load_values(w, u, seen);
      if (w.fine) add_tile<N, true>(w, v, x);
      else add_tile<N, false>(w, v, x);
      if (!now.step(w, u, seen, blockIdx.z, gridDim.z)) continue;
#pragma unroll
      for (int r = 0; r < 2; r++)
        settle<N>(w, u, first + 8 * r, chunk, x.rows.seen[r], x.acc, r, Total{x.rows.top[r], x.sums[2 * r]}, total[r], warp_of(),
                  FEW_WARPS);
      x.clear();
    }
  }
  __syncthreads();
  if (w.partials) return;
  for (int i = warp_of(); i < queries_of(u); i += FEW_WARPS)
    finish_query(w, w.out + ((int64_t)row_of(u, i) * w.h + head_of(u, i)) * w.f, area<Interval>(w.at.rows)[i],
                 area<float>(w.at.mixing) + warp_of() * max(w.e, w.f));
  __syncthreads();
}

/* Does a unit of one row have a result that is no finite number? By all threads. */
__device__ __forceinline__ bool is_spoilt(const Job &w, const Unit &u) {
  const float *out = w.out + ((int64_t)u.row * w.h + u.head) * w.f;
  float *found = area<float>(w.at.peaks);
  bool bad = false;
  for (int i = threadIdx.x; i < u.n_heads * w.f; i += blockDim.x) bad |= !(fabsf(out[i]) < INFINITY);
  bad = __any_sync(0xffffffffu, bad);
  if (lane_of() == 0) found[warp_of()] = bad ? 1.0f : 0.0f;
  __syncthreads();
  const bool any = found[0] + found[1] + found[2] + found[3] > 0.0f;
  __syncthreads();
  return any;
}

/* alone: block (x, y) looks at row x of key/value head y, whose results are there. A key that another row of the unit saw may have held
 * infinities or NaN, which times a probability of 0 is NaN: such a row is made again, and then holds what it holds without neighbours. */
template <int N>
__global__ void __launch_bounds__(32 * FEW_WARPS, N > 1 ? 2 : 3) attend_few_kernel(const Job w, bool alone) {
  for (int at = blockIdx.x;; at += gridDim.x) {
    Unit u;
    if (alone) {
      const int first = at / w.m * FEW_QUERIES, row = at % w.m;
      if (first >= w.group) return;
      u = Unit{row, 1, (int)blockIdx.y * w.group + first, min((int)FEW_QUERIES, w.group - first), blockIdx.y,
               w.seq && w.cells ? w.seq[row] : 0};
      if (is_anothers(interval_of(w, row, false)) || !is_spoilt(w, u)) continue;
    } else {
      u = unit_at(w, at, blockIdx.y);
      if (u.n_rows == 0) return;
    }
    attend_unit<N>(w, u);
  }
}

void start(const Job &w, dim3 grid, bool alone, cudaStream_t stream) {
  const dim3 block(32 * FEW_WARPS);
  if constexpr (!PE_ONE_INSTANCE)
    if (w.nf <= FEW_WARPS) return launch(stream, attend_few_kernel<1>, grid, block, w.at.bytes, w, alone);
  launch(stream, attend_few_kernel<2>, grid, block, w.at.bytes, w, alone);
}

} // namespace

void pe::attend_few(const Job &w, dim3 grid, cudaStream_t stream) { start(w, grid, false, stream); }
void pe::repair(const Job &w, cudaStream_t stream) { start(w, dim3(w.m, w.g), true, stream); }

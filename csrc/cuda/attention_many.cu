/* attention_many.cu: attention of prompts and encoders on tensor cores, up to 128 queries of a group and sequence at a time.
 *
 * Block (x, y) has a warp for every 16 queries and owns unit x (then x + gridDim.x ...) of key/value head y; units whose rows come
 * last, and see most, begin first. All warps share each tile; a warp makes the scores, probabilities and sums of its own 16 queries:
 * probabilities go from the accumulators of one product straight into the A fragments of the next. Chunks are merged in the block's part
 * of `out`, which is read and written once in 512 keys. Tiles outside of a warp's intervals are skipped; those inside need no mask.
 *
 * Shared memory: queries [blocks of 32 columns][queries][32]; stages of a tile of K and V, the next on its way while one is used; one
 * unpacked tile of each where they are blocks. Registers: 16 a block of 32 columns of V, 32 for scores.
 * Per 16 queries and tile, heads of 128, F16: 264 mma of 4096 operations, half of them by what halves leave of queries and probabilities; 48
 * loads of 16 and 64 of 8 bytes of shared memory a lane, 32 powers. K and V are read from L2 once for 128 queries, 256 operations a byte:
 * bound by tensor cores. A causal prompt of 8192, 32 heads of 128, is 5.5e11 operations as it is written and 1.1e12 of tensor cores: by
 * docs/gpu-kernels.md at least 1.8 ms on an H200 through mma.sync, 3.5 on an A100, 6.7 on an RTX 4090. So the
 * rate that can be seen is at most half of mma.sync's, on an H200 a third of the peak of halves.
 */
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace {

using namespace pe;

enum { GROUPS = TILE_KEYS / 8, STEPS = TILE_KEYS / 16 };

/* Logits of a tile become probabilities, and sums of values. */
template <int N, bool FINE>
__device__ __forceinline__ void add_tile(const Job &w, const char *v, const Rows &rows, const float (&s)[GROUPS][4], float (&acc)[N][4][4],
                                         float (&sums)[4]) {
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    uint32_t p[4], less[4];
    probabilities(s[2 * step], s[2 * step + 1], rows.top, p, less);
    add_sums<FINE>(p, less, sums);
#pragma unroll
    for (int b = 0; b < N; b++) {
      if (b >= w.nf) continue;
      add_values<FINE>(p, less, v + b * HALF_TILE, step, acc[b]);
      if (FINE && w.v_form == BLOCKS) add_values<false>(p, less, v + (w.nf + b) * HALF_TILE, step, acc[b]);
    }
  }
}

/* Read the intervals of the warp's queries; not kept while there are better uses for registers, but read once more. */
__device__ __forceinline__ void see(const Job &w, Rows &rows) {
#pragma unroll
  for (int r = 0; r < 2; r++) rows.seen[r] = area<Interval>(w.at.rows)[16 * warp_of() + lane_of() / 4 + 8 * r];
}

/* The warp's queries see a tile. */
template <int N>
__device__ __forceinline__ void attend_tile(const Job &w, const Unit &u, int tile, const char *k, const char *v, Rows &rows, float (&acc)[N][4][4],
                                            float (&sums)[4]) {
  float s[GROUPS][4], peak[2], factor[2];
  see(w, rows);
  if (!__any_sync(0xffffffffu, meets(rows.seen[0], tile * TILE_KEYS, TILE_KEYS) || meets(rows.seen[1], tile * TILE_KEYS, TILE_KEYS)))
    return;
  if (w.k_form == BLOCKS) scores_of_codes<GROUPS>(w, 16 * warp_of(), blockDim.x / 2, UnpackedKeys(w), 0, s);
  else scores_of_halves<GROUPS>(w, 16 * warp_of(), blockDim.x / 2, k, 0, s);
  asm volatile("" ::: "memory");                           /* else the compiler keeps what was read */
  see(w, rows);
  if (w.bias) add_bias<GROUPS>(w, u, 16 * warp_of(), tile * TILE_KEYS, s);
  to_logits<GROUPS>(w.softcap, rows, tile * TILE_KEYS, s, peak);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    peak[r] = peak_of_lanes(peak[r]);
    factor[r] = move_top(peak[r], rows.top[r]);
    if (w.stats && lane_of() % 4 == 0) note_peak(w, 16 * warp_of() + lane_of() / 4 + 8 * r, peak[r]);
  }
  if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
    for (int b = 0; b < N; b++) shrink(acc[b], factor[0], factor[1]);
    sums[0] *= factor[0], sums[1] *= factor[0], sums[2] *= factor[1], sums[3] *= factor[1];
  }
  if (w.fine) add_tile<N, true>(w, v, rows, s, acc, sums);
  else add_tile<N, false>(w, v, rows, s, acc, sums);
}

template <int N>
__device__ __forceinline__ void clear(Rows &rows, float (&acc)[N][4][4], float (&sums)[4]) {
#pragma unroll
  for (int b = 0; b < N; b++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[b][i][0] = acc[b][i][1] = acc[b][i][2] = acc[b][i][3] = 0.0f;
  sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
  rows.top[0] = rows.top[1] = PE_NONE;
}

/* The chunk is done: what it gave joins the queries' totals, which are in shared memory. */
template <int N>
__device__ __forceinline__ void settle_both(const Job &w, const Unit &u, int chunk, const Rows &rows, const float (&acc)[N][4][4],
                                            const float (&sums)[4]) {
  const int first = 16 * warp_of() + lane_of() / 4;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const Interval seen = area<Interval>(w.at.rows)[first + 8 * r];
    Total total = area<Total>(w.at.totals)[first + 8 * r];
    settle<N>(w, u, first + 8 * r, chunk, seen, acc, r, Total{rows.top[r], sums[2 * r]}, total, 0, 1);
    __syncwarp();
    if (lane_of() % 4 == 0) area<Total>(w.at.totals)[first + 8 * r] = total;
  }
  __syncwarp();
}

template <int N>
__device__ __forceinline__ void attend_unit(const Job &w, const Task &task) {
  const unsigned n = blockDim.x / 2;
  const Unit &u = task.unit;
  Walk now = {0, 0};
  load_queries(w, u, n);
  if (threadIdx.x < n) area<Total>(w.at.totals)[threadIdx.x] = Total{PE_NONE, 0.0f};
  forget_peaks(w, (int)n);
  now.enter(w, u, task.seen, 0, 0, 1);
  if (now.more()) {
    float acc[N][4][4], sums[4];
    Rows rows;
    Loader<true> loader;
    loader.begin(w, u, task.seen, now);
    clear<N>(rows, acc, sums);
    while (now.more()) {
      const char *k, *v;
      loader.next(w, u, task.seen, k, v);
      attend_tile<N>(w, u, now.tile, k, v, rows, acc, sums);
      const int chunk = now.chunk();
      if (!now.step(w, u, task.seen, 0, 1)) continue;
      settle_both<N>(w, u, chunk, rows, acc, sums);
      clear<N>(rows, acc, sums);
    }
  }
  __syncwarp();
  for (int i = 16 * warp_of(); i < min(16 * warp_of() + 16, queries_of(u)); i++)
    finish_query(w, w.out + ((int64_t)row_of(u, i) * w.h + head_of(u, i)) * w.f, area<Interval>(w.at.rows)[i],
                 area<float>(w.at.mixing) + warp_of() * max(w.e, w.f));
  __syncthreads();
}

/* N: blocks of 32 columns of V, at most. */
template <int N>
__global__ void __launch_bounds__(N > 4 ? 128 : 256, 1) attend_many_kernel(const Job w) {
  Task &task = *area<Task>(w.at.task);
  for (int at = gridDim.x - 1 - blockIdx.x;; at = task.at + gridDim.x) {
    const Unit u = unit_at(w, at, blockIdx.y);
    if (u.n_rows == 0) return;
    const Seen seen = load_intervals(w, u, blockDim.x / 2);
    if (threadIdx.x == 0) task = Task{u, seen, at};
    __syncthreads();
    attend_unit<N>(w, task);
  }
}

} // namespace

void pe::attend_many(const Job &w, int queries, dim3 grid, cudaStream_t stream) {
  const dim3 block(2 * queries);
  if constexpr (!PE_ONE_INSTANCE) {
    if (w.nf <= 2) return launch(stream, attend_many_kernel<2>, grid, block, w.at.bytes, w);
    if (w.nf <= 4) return launch(stream, attend_many_kernel<4>, grid, block, w.at.bytes, w);
  }
  launch(stream, attend_many_kernel<8>, grid, block, w.at.bytes, w);
}

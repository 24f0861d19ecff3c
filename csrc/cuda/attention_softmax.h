/* attention_softmax.h: online softmax over tiles and chunks of keys: what a warp keeps of its 16 queries, how it is renewed and merged.
 *
 * Lane (g, t) keeps two queries, g and g + 8. Logits are in powers of 2, and in those of e where attention is of floats (NATURAL). Sums
 * of probabilities are an mma with a column of ones: of the same rounded probabilities in the same order as sums of values, in every
 * kernel. */
#ifndef PE_CUDA_ATTENTION_SOFTMAX_H
#define PE_CUDA_ATTENTION_SOFTMAX_H

#include "activations.h"
#include "attention.h"

namespace pe {

/* A query's top moves only when a score passes it by so many powers of 2: probabilities stay below 2^11 (a half holds 2^15), and most
 * tiles need no shrinking of the sums so far. */
#define PE_SLACK 11.0f
#define PE_LOG2_E 1.44269504f
#define PE_NONE (-INFINITY)

/* 2^x; 0 below 2^-126. */
__device__ __forceinline__ float power2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

/* Chunks so far: sums are relative to 2^top. */
struct Total { float top, sum; };

/* What a block works on; in shared memory where registers are short. */
struct Task {
  Unit unit;
  Seen seen;
  int at; /* the unit's number */
};

/* The queries g and g + 8 of a lane within one chunk. */
struct Rows {
  Interval seen[2];
  float top[2];
};

/* Scores of keys 8 j + 2 t, 8 j + 2 t + 1 from `first` on, of queries g (0, 1) and g + 8 (2, 3), become logits; those of keys outside
 * the interval -inf. Gives the largest of each query that this lane has. */
template <int KEYS>
__device__ __forceinline__ void to_logits(float softcap, const Rows &rows, int first, float (&s)[KEYS][4], float (&peak)[2]) {
  const float over = softcap != 0.0f ? __fdiv_rn(1.0f, softcap) : 0.0f, factor = softcap != 0.0f ? softcap * PE_LOG2_E : PE_LOG2_E;
  const bool inside = rows.seen[0].lo <= first && rows.seen[0].hi - first >= 8 * KEYS && rows.seen[1].lo <= first &&
                      rows.seen[1].hi - first >= 8 * KEYS;
  const int column = again(2 * (lane_of() % 4));
  peak[0] = peak[1] = PE_NONE;
#pragma unroll
  for (int j = 0; j < KEYS; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x = s[j][i];
      if (softcap != 0.0f) x = tanhf(x * over);
      x *= factor;
      const int key = first + 8 * j + column + i % 2; /* first + 63 is at most 2^31 - 1 */
      if (!inside && (key < rows.seen[i / 2].lo || key >= rows.seen[i / 2].hi)) x = PE_NONE;
      s[j][i] = x;
      peak[i / 2] = fmaxf(peak[i / 2], x);
    }
}

/* The same scores, of the unit's queries from `query` on, get what distances add. */
template <int KEYS>
__device__ __forceinline__ void add_bias(const Job &w, const Unit &u, int query, int first, float (&s)[KEYS][4]) {
#pragma unroll 1
  for (int high = 0; high < 2; high++) {
    const int i = query + lane_of() / 4 + 8 * high;
    if (i >= queries_of(u)) continue;
#pragma unroll
    for (int j = 0; j < KEYS; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const float more = bias_of(w, u, i, first + 8 * j + 2 * (lane_of() % 4) + c);
        if (high) s[j][2 + c] += more;
        else s[j][c] += more;
      }
  }
}

/* The largest over the four lanes of a query. */
__device__ __forceinline__ float peak_of_lanes(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/* A tile's peak: perhaps the top moves. Returns what sums so far must be multiplied by. */
__device__ __forceinline__ float move_top(float peak, float &top) {
  if (!(peak > top + PE_SLACK)) return 1.0f; /* always moves at the first key seen, where top = -inf and the factor 0 */
  const float factor = power2(top - peak);
  top = peak;
  return factor;
}

/* Probabilities of 16 keys, which are scores j and j + 1, as the A of an mma; less: what halves leave of them, as another. */
__device__ __forceinline__ void probabilities(const float (&x)[4], const float (&y)[4], const float (&top)[2], uint32_t (&p)[4], uint32_t (&less)[4]) {
  const float a = top[0] == PE_NONE ? 0.0f : top[0], b = top[1] == PE_NONE ? 0.0f : top[1];
  split_halves(power2(x[0] - a), power2(x[1] - a), p[0], less[0]);
  split_halves(power2(x[2] - b), power2(x[3] - b), p[1], less[1]);
  split_halves(power2(y[0] - a), power2(y[1] - a), p[2], less[2]);
  split_halves(power2(y[2] - b), power2(y[3] - b), p[3], less[3]);
}

/* sums[0] += of query g, sums[2] += of query g + 8 */
template <bool FINE> __device__ __forceinline__ void add_sums(const uint32_t (&p)[4], const uint32_t (&less)[4], float (&sums)[4]) {
  const uint32_t ones[2] = {0x3c003c00u, 0x3c003c00u};
  mma_f16(sums, p, ones);
  if (FINE) mma_f16(sums, less, ones);
}

__device__ __forceinline__ void shrink(float (&acc)[4][4], float low, float high) {
#pragma unroll
  for (int i = 0; i < 4; i++) acc[i][0] *= low, acc[i][1] *= low, acc[i][2] *= high, acc[i][3] *= high;
}

template <bool NATURAL> __device__ __forceinline__ float power(float x) { return NATURAL ? exp_of(x) : power2(x); }

/* total += part; both are relative to their tops. before, now: what their sums must be multiplied by. */
template <bool NATURAL>
__device__ __forceinline__ void merge_tops(Total &total, Total part, float &before, float &now) {
  const float top = fmaxf(total.top, part.top);
  before = power<NATURAL>(total.top - top);
  now = power<NATURAL>(part.top - top);
  total.sum = fmaf(part.sum, now, total.sum * before);
  total.top = top;
}
__device__ __forceinline__ float merged(float total, float part, float before, float now) { return fmaf(part, now, total * before); }

/* A sink joins the sum only; gives what sums of values must be multiplied by before they are divided by total.sum. */
template <bool NATURAL>
__device__ __forceinline__ float join_sink(const float *sinks, int head, Total &total) {
  if (!sinks) return 1.0f;
  const float y = sinks[head] * (NATURAL ? 1.0f : PE_LOG2_E), top = fmaxf(total.top, y), factor = power<NATURAL>(total.top - top);
  total.sum = __fadd_rn(__fmul_rn(total.sum, factor), power<NATURAL>(y - top));
  return factor;
}
__device__ __forceinline__ float finished(float acc, float factor, float sum) { return __fdiv_rn(acc * factor, sum); }

/* ---- what is said of a query's softmax, where it is wanted: its largest logit, and the sum of exp(logit - it), with the sink ---- */

/* A tile's peak joins the largest logit of query i, in shared memory; by one lane. */
__device__ __forceinline__ void note_peak(const Job &w, int i, float peak) {
  float &most = area<float>(w.at.most)[i];
  most = fmaxf(most, peak);
}
__device__ __forceinline__ void forget_peaks(const Job &w, int n) {
  if (w.stats && (int)threadIdx.x < n) area<float>(w.at.most)[threadIdx.x] = PE_NONE;
}

/* total: all its chunks, without the sink. */
template <bool NATURAL> __device__ __forceinline__ void tell(const Job &w, int64_t query, Total total, float most) {
  const float unit = NATURAL ? 1.0f : PE_LOG2_E, sink = w.sinks ? w.sinks[query % w.h] * unit : PE_NONE, largest = fmaxf(most, sink);
  const float sum = __fmul_rn(total.sum, power<NATURAL>(total.top - largest));
  w.stats[2 * query] = __fdiv_rn(largest, unit);
  w.stats[2 * query + 1] = w.sinks ? __fadd_rn(sum, power<NATURAL>(sink - largest)) : sum;
}
__device__ __forceinline__ void tell_nothing(const Job &w, int64_t query) { w.stats[2 * query] = w.stats[2 * query + 1] = 0.0f; }

/* ---- the end of a chunk ---- */

/* Eight neighbouring elements of one query: those of acc with i in {0, 1} (high = 0) or {2, 3} (high = 1). */
__device__ __forceinline__ void take_eight(const float (&acc)[4][4], int high, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = acc[i][2 * high], x[4 + i] = acc[i][2 * high + 1];
}

__device__ __forceinline__ void store_eight(float *to, int n, const float (&x)[8]) {
  if (n >= 8 && ((uintptr_t)to & 15) == 0) {
    *(float4 *)to = make_float4(x[0], x[1], x[2], x[3]);
    *(float4 *)(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < n) to[i] = x[i];
}

__device__ __forceinline__ void read_eight(const float *from, int n, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = i < n ? from[i] : 0.0f;
}

/* Query i has seen a chunk, with sums acc over blocks of columns first, first + step ...; what was before it lies in `out`, not yet
 * divided. high: which of the lane's two. */
template <int N>
__device__ __forceinline__ void settle(const Job &w, const Unit &u, int i, int chunk, Interval seen, const float (&acc)[N][4][4],
                                       int high, Total part, Total &total, int first, int step) {
  if (i >= queries_of(u) || !meets(seen, chunk * CHUNK_KEYS, CHUNK_KEYS)) return;
  const int row = row_of(u, i), head = head_of(u, i), column = again(8 * (lane_of() % 4));
  float x[8], old[8];
  if (w.partials) {
    const int64_t slot = ((int64_t)row * w.h + head) * w.chunks + chunk - first_chunk(seen);
#pragma unroll
    for (int b = 0; b < N; b++) {
      const int at = (first + b * step) * COLUMNS + column;
      take_eight(acc[b], high, x);
      if (first + b * step < w.nf) store_eight(w.partials + slot * w.nf * COLUMNS + at, 8, x);
    }
    if (first == 0 && column == 0) {
      w.tops[2 * slot] = part.top, w.tops[2 * slot + 1] = part.sum;
      if (w.stats) w.mosts[slot] = area<float>(w.at.most)[i];
    }
    return;
  }
  float before = 0.0f, now = 1.0f, factor = 1.0f;
  const bool fresh = chunk == first_chunk(seen), last = chunk == last_chunk(seen);
  if (fresh) total = part;
  else merge_tops<false>(total, part, before, now);
  if (last && w.stats && first == 0 && column == 0) tell<false>(w, (int64_t)row * w.h + head, total, area<float>(w.at.most)[i]);
  if (last) factor = join_sink<false>(w.sinks, head, total);
  float *out = w.out + ((int64_t)row * w.h + head) * w.f;
#pragma unroll
  for (int b = 0; b < N; b++) {
    const int at = (first + b * step) * COLUMNS + column, n = w.f - at;
    if (n <= 0) continue;
    take_eight(acc[b], high, x);
    if (!fresh) {
      read_eight(out + at, n, old);
#pragma unroll
      for (int c = 0; c < 8; c++) x[c] = merged(old[c], x[c], before, now);
    }
#pragma unroll
    for (int c = 0; c < 8; c++)
      if (last) x[c] = finished(x[c], factor, total.sum);
    store_eight(out + at, n, x);
  }
}

/* ---- the end of a unit: by a warp, for one of its queries, after its results are in `out` ---- */

/* Zeros where nothing is seen; results of values in blocks are mixed back. x: room for f floats in shared memory. */
__device__ __forceinline__ void finish_query(const Job &w, float *out, Interval seen, float *x) {
  if (is_anothers(seen)) return;
  if (empty(seen)) {
    for (int j = lane_of(); j < w.f; j += 32) out[j] = 0.0f;
    if (w.stats && lane_of() == 0) tell_nothing(w, (out - w.out) / w.f);
  } else if (in_blocks(w.v)) {
    for (int j = lane_of(); j < w.f; j += 32) x[j] = out[j];
    __syncwarp();
    mix(x, w.f);
    for (int j = lane_of(); j < w.f; j += 32) out[j] = x[j];
    __syncwarp();
  }
}

} // namespace pe

#endif

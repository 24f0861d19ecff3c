/* top.metal: the k largest of each row, at most 256, and sums of weights.
 * Reference: pyengine/ops/top.py: top_k; csrc/weight.h. Method: csrc/cuda/top.cu.
 *
 * pick_largest  A threadgroup of 256 owns a row; threadgroup memory: 8 runs of 256 keys of 64 bits, 16 KB. It takes 7 runs at a time, and
 *               keeps the 256 largest so far beside them.
 * weigh_rows    Threadgroup (c, r) owns 4096 numbers of row r; threadgroup memory: their weights, 16 KB.
 * Rows are read twice, 8 n bytes; sorting in threadgroup memory takes most of the time.
 */
#include "common.h"
#include "../weight.h"

enum { RUN = 256, FRESH_RUNS = 7, TOP_THREADS = 256 };

struct top_args { int n, k, width, sums; };

static inline ulong key_of(float x, int at) { return (ulong)pe_logit_key(x) << 32 | (ulong)(uint)~at; }

/* Compare keys that are `apart`, pair by pair; the larger first where bit `up` of the place is 0. */
static inline void exchange(threadgroup ulong *key, int pairs, int apart, int up, int number) {
  for (int i = number; i < pairs; i += TOP_THREADS) {
    const int low = 2 * i - (i & (apart - 1)), high = low + apart;
    const ulong a = key[low], b = key[high];
    if ((a < b) == !(low & up)) {
      key[low] = b;
      key[high] = a;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

/* Sorted runs to the largest of all, in the first run. */
static inline void join_runs(threadgroup ulong *key, int runs, int number) {
  while (runs > 1) {
    const int half_ = (runs + 1) / 2, joined = (runs - half_) * RUN;
    for (int i = number; i < joined; i += TOP_THREADS) {
      const ulong other = key[half_ * RUN + i / RUN * RUN + RUN - 1 - i % RUN];
      if (other > key[i]) key[i] = other;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int apart = RUN / 2; apart; apart /= 2) exchange(key, joined / 2, apart, 0, number);
    runs = half_;
  }
}

kernel void pick_largest(constant top_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *values [[buffer(2)]],
                         device int *ids [[buffer(3)]], threadgroup ulong *key [[threadgroup(0)]],
                         uint3 group [[threadgroup_position_in_grid]], uint number_ [[thread_index_in_threadgroup]]) {
  const int number = (int)number_;
  device const float *row = x + (long)group.x * a.width;
  for (int i = number; i < RUN; i += TOP_THREADS) key[i] = 0;
  for (int from = 0; from < a.n; from += FRESH_RUNS * RUN) {
    const int fresh = (min(FRESH_RUNS * RUN, a.n - from) + RUN - 1) / RUN;
    for (int i = number; i < fresh * RUN; i += TOP_THREADS) key[RUN + i] = from + i < a.n ? key_of(row[from + i], from + i) : 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int size = 2; size <= RUN; size *= 2)
      for (int apart = size / 2; apart; apart /= 2) exchange(key + RUN, fresh * RUN / 2, apart, size < RUN ? size : 0, number);
    join_runs(key, 1 + fresh, number);
  }
  for (int i = number; i < a.k; i += TOP_THREADS) {
    const int at = (int)~(uint)key[i];
    ids[(long)group.x * a.k + i] = at;
    values[(long)group.x * a.k + i] = row[at];
  }
}

kernel void weigh_rows(constant top_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device const float *values [[buffer(2)]],
                       device float *sums [[buffer(3)]], threadgroup float *weight [[threadgroup(0)]],
                       uint3 group [[threadgroup_position_in_grid]], uint number_ [[thread_index_in_threadgroup]]) {
  const int number = (int)number_, first = (int)group.x * PE_WEIGHT_CHUNK;
  device const float *row = x + (long)group.y * a.width + first;
  const float top = values[(long)group.y * a.k];
  for (int i = number; i < PE_WEIGHT_CHUNK; i += TOP_THREADS)
    weight[i] = first + i < a.n ? pe_weight_exp(pe_weight_clamp(row[i] - top)) : 0.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (number >= PE_WEIGHT_LANES) return;
  float sum = 0.0f;
  for (int i = number; i < PE_WEIGHT_CHUNK; i += PE_WEIGHT_LANES) sum += weight[i];
  sums[(long)group.y * a.sums + (long)group.x * PE_WEIGHT_LANES + number] = sum;
}

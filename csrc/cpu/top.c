/* top.c: the k largest of each row, and sums of weights.
 * Reference: pyengine/ops/top.py: top_k; csrc/weight.h.
 *
 * A thread claims single rows. The k largest so far are a heap whose root is the least of them, so that most numbers cost one comparison;
 * taken from it one by one they are in order. Sums: 16 in the order of the row, chunk by chunk.
 */
#include "../weight.h"
#include "cpu.h"

PE_SCRATCH(cpu, top_k)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)a;
  return n_threads * pe_round_up(8 * (int64_t)((const pe_top_k_params *)params)->k, 64);
}

/* The larger number is before, of equals the lower place. */
static uint64_t rank_of(float x, int64_t at) { return (uint64_t)pe_logit_key(x) << 32 | (uint32_t)~at; }

/* Put `rank` in the place of the root of a heap of n. */
static void sift(uint64_t *heap, int64_t n, uint64_t rank) {
  int64_t at = 0;
  for (int64_t child; (child = 2 * at + 1) < n; at = child) {
    child += child + 1 < n && heap[child + 1] < heap[child];
    if (heap[child] >= rank) break;
    heap[at] = heap[child];
  }
  heap[at] = rank;
}

static void sum_weights(const float *x, int64_t n, float top, float *sums) {
  for (int64_t i = 0; i < n; i++) {
    float *lane = sums + i / PE_WEIGHT_CHUNK * PE_WEIGHT_LANES + i % PE_WEIGHT_LANES;
    const float weight = pe_weight_exp(pe_weight_clamp(x[i] - top));
    *lane = i % PE_WEIGHT_CHUNK < PE_WEIGHT_LANES ? weight : *lane + weight;
  }
}

PE_KERNEL(cpu, top_k)(const pe_tensor *x, const pe_tensor *out0, const pe_tensor *out1, const pe_tensor *out2, const pe_top_k_params *p,
                      pe_stream *s) {
  const int64_t m = x->shape[0], n = p->n, k = p->k, n_sums = out2->shape[1];
  if (k < 1 || k > n || n > x->shape[1]) return pe_fail(s, PE_BAD_SHAPE, "top_k: %lld of %lld", (long long)k, (long long)n);
  uint64_t *heap = (uint64_t *)(s->scratch + s->ith * pe_round_up(8 * k, 64));
  for (int64_t row; (row = pe_next(s, 0)) < m;) {
    const float *in = (const float *)((const char *)x->data + row * x->stride[0]);
    float *values = (float *)out0->data + row * k, *sums = (float *)out2->data + row * n_sums;
    int32_t *ids = (int32_t *)out1->data + row * k;
    for (int64_t i = 0; i < k; i++) heap[i] = 0; /* before all ranks */
    for (int64_t i = 0; i < n; i++) {
      const uint64_t rank = rank_of(in[i], i);
      if (rank > heap[0]) sift(heap, k, rank);
    }
    for (int64_t left = k; left > 0; left--) {
      ids[left - 1] = (int32_t)~(uint32_t)heap[0];
      values[left - 1] = in[ids[left - 1]];
      sift(heap, left - 1, heap[left - 1]);
    }
    for (int64_t i = 0; i < n_sums; i++) sums[i] = 0.0f;
    sum_weights(in, n, values[0], sums);
  }
  return PE_OK;
}

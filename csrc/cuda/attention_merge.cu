/* attention_merge.cu: what attention gave for the same queries and several sets of keys, as one softmax.
 * Reference: pyengine/ops/groups.py: merge_attention.
 *
 * A warp owns one head of one row, a lane every 32nd element of it; a block has 8 warps. Parts are added in their order, and a head's
 * result depends on its own parts only. Nothing is shared. n parts of 4 bytes an element are read and 4 written, 128 bytes a request; with
 * 2 operations a part it is bound by memory, in a step of few rows by the launch.
 */
#include "activations.h"

namespace {

using namespace pe;

enum { WARPS = 8, MOST_PARTS = 8 };

struct Merge {
  const float *parts[MOST_PARTS], *stats[MOST_PARTS]; /* stats: the largest logit and the sum of each head */
  float *out, *together;
  int64_t heads; /* of all rows */
  int n, d;      /* elements of a head */
};

__global__ void __launch_bounds__(32 * WARPS) merge_attention_kernel(const Merge w) {
  const int64_t head = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (head >= w.heads) return;
  float weight[MOST_PARTS], top = -INFINITY, total = 0.0f;
  int only = -1; /* the only part that has keys is the result, bit for bit */
#pragma unroll
  for (int i = 0; i < MOST_PARTS; i++)
    if (i < w.n && w.stats[i][2 * head + 1] > 0.0f) top = fmaxf(top, w.stats[i][2 * head]);
#pragma unroll
  for (int i = 0; i < MOST_PARTS; i++) {
    if (i >= w.n) break;
    const float sum = w.stats[i][2 * head + 1];
    weight[i] = sum > 0.0f ? __fmul_rn(sum, exp_of(__fsub_rn(w.stats[i][2 * head], top))) : __fmul_rn(0.0f, sum);
    total = __fadd_rn(total, weight[i]);
  }
#pragma unroll
  for (int i = MOST_PARTS - 1; i >= 0; i--)
    if (i < w.n && weight[i] == total && total > 0.0f) only = i;
  if (w.together && lane == 0) w.together[2 * head] = total != 0.0f ? top : 0.0f, w.together[2 * head + 1] = total;
  for (int j = lane; j < w.d; j += 32) {
    const int64_t at = head * w.d + j;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MOST_PARTS; i++) {
      if (i >= w.n) break;
      if (weight[i] != 0.0f && only < 0) sum = fmaf(w.parts[i][at], weight[i], sum);
      if (i == only) sum = w.parts[i][at];
    }
    w.out[at] = total != 0.0f && only < 0 ? __fdiv_rn(sum, total) : sum;
  }
}

} // namespace

PE_KERNEL(cuda, merge_attention)(const pe_tensor *const *parts, int32_t n_parts, const pe_tensor *const *stats, int32_t n_stats,
                                 const pe_tensor *out, const pe_tensor *together, const pe_merge_attention_params *p, pe_stream *s) {
  (void)p;
  if (n_parts != n_stats || n_parts > MOST_PARTS)
    return pe_fail(s, PE_NO_KERNEL, "merge_attention: %d results and %d stats; %d of each at most", n_parts, n_stats, (int)MOST_PARTS);
  Merge w = {};
  for (int i = 0; i < n_parts; i++)
    w.parts[i] = (const float *)parts[i]->data, w.stats[i] = (const float *)stats[i]->data;
  w.out = (float *)out->data, w.together = together ? (float *)together->data : nullptr;
  w.heads = out->shape[0] * stats[0]->shape[1], w.n = n_parts;
  if (w.heads == 0) return PE_OK;
  w.d = (int)(out->shape[1] / stats[0]->shape[1]);
  launch(stream(s), merge_attention_kernel, dim3((unsigned)((w.heads + WARPS - 1) / WARPS)), dim3(32 * WARPS), 0, w);
  return PE_OK;
}

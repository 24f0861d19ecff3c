/* routing.cu: mixtures of experts, around the products: the choice of experts for each row, and the sum of what they give.
 * Reference: pyengine/ops/experts.py: top_experts, sum_experts.
 *
 * top_experts  A warp owns a row; a block has up to four. Lane l owns scores l, l + 32 ...: their keys (as integers in the same order)
 *              and gates lie in shared memory, 8 n bytes a row, at its own lane's bank. Each lane knows the best of its own keys; a
 *              butterfly of shuffles picks the best of all, and only the lane that had it looks again. Reads 4 n bytes, writes 8 u;
 *              bound by latency: u butterflies of five steps.
 * sum_experts  A thread owns four neighbouring columns of a row. It reads 4 (u + 1) bytes for each 4 it writes; one fma an expert, in
 *              the order of the choice.
 */
#include <cmath>

#include "activations.h"
#include "strides.h"
#include "sums.h"

namespace {

enum { WARP = 32, ROWS = 4, THREADS = 256, MOST_SHARED = 48 * 1024 };

struct Choice {
  const char *scores;
  const float *bias;
  char *chosen, *gates;
  int64_t scores_stride, chosen_stride, gates_stride, m;
  int n, used, softmax, normed;
  float scale;
};

/* A float as an integer in the same order: NaN is 1, -inf 0x800000, and what is taken 0. -0 and 0 are equal. */
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return 1;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Best { uint32_t key; int at; };

/* The larger key, of equals the lower number. */
__device__ __forceinline__ Best better(Best a, Best b) { return b.key > a.key || (b.key == a.key && b.at < a.at) ? b : a; }

__device__ __forceinline__ Best best_of_lane(const uint32_t *key, int n, int lane) {
  Best best = {0, n};
  for (int j = lane; j < n; j += WARP)
    if (key[j] > best.key) best = {key[j], j}; /* ascending: the first of equals stays */
  return best;
}

/* g[j] = softmax or sigmoid of a row's scores; a lane its own. */
__device__ __forceinline__ void gates_of(const float *x, float *g, int n, int softmax, int lane) {
  if (!softmax) {
    for (int j = lane; j < n; j += WARP) g[j] = pe::sigmoid(x[j]);
    return;
  }
  float top = -INFINITY;
  for (int j = lane; j < n; j += WARP) top = fmaxf(x[j], top);
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
  for (int j = lane; j < n; j += WARP) g[j] = pe::exp_of(x[j] - top);
  const float sum = pe::sum_of_warp(n, [=](int i, float so_far) { return so_far + g[i]; }); /* of this lane's own */
  for (int j = lane; j < n; j += WARP) g[j] /= sum;
}

/* Shared memory: for each row keys [width], then gates [width]; width = n rounded up to 32. */
struct ChoiceShared { uint32_t first; };

__global__ void __launch_bounds__(WARP * ROWS) top_experts_kernel(Choice c, int width) {
  uint32_t *words = &pe::shared<ChoiceShared>().first;
  const int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  const int lane = threadIdx.x;
  if (row >= c.m) return; /* a whole warp; there are no barriers of blocks */
  uint32_t *key = words + 2 * width * threadIdx.y;
  float *g = (float *)(key + width);
  const float *x = (const float *)(c.scores + row * c.scores_stride);
  int *chosen = (int *)(c.chosen + row * c.chosen_stride);
  float *gates = (float *)(c.gates + row * c.gates_stride);
  gates_of(x, g, c.n, c.softmax, lane);
  for (int j = lane; j < c.n; j += WARP) key[j] = ordered(c.bias ? g[j] + c.bias[j] : x[j]);
  Best mine = best_of_lane(key, c.n, lane);
  float total = 0, kept = 0; /* kept: the gate of the expert that this lane gave last */
  for (int u = 0; u < c.used; u++) {
    Best best = mine;
#pragma unroll
    for (int d = WARP / 2; d; d /= 2)
      best = better(best, Best{__shfl_xor_sync(0xffffffffu, best.key, d), __shfl_xor_sync(0xffffffffu, best.at, d)});
    if (best.at % WARP == lane) {
      kept = g[best.at];
      key[best.at] = 0;
      mine = best_of_lane(key, c.n, lane);
      chosen[u] = best.at;
      gates[u] = kept * c.scale;
    }
    total += __shfl_sync(0xffffffffu, kept, best.at % WARP);
  }
  if (!c.normed) return;
  __syncwarp();
  for (int u = lane; u < c.used; u += WARP) gates[u] = g[chosen[u]] / (total + 1e-20f) * c.scale;
}

struct Summed {
  const char *y, *gates, *residual;
  char *out;
  int64_t y_stride, gates_stride, residual_stride, out_stride, n;
  int used;
};

__global__ void __launch_bounds__(THREADS) sum_experts_kernel(Summed q, unsigned quads, unsigned total) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= total) return;
  const int64_t row = i / quads, start = 4 * (int64_t)(i % quads);
  const int count = (int)min((int64_t)4, q.n - start);
  const float *g = q.gates ? (const float *)(q.gates + row * q.gates_stride) : nullptr;
  const char *in = q.y + row * q.used * q.y_stride + 4 * start;
  float sum[4], v[4];
  pe::load4((const float *)in, 1, count, sum);
  for (int j = 0; g && j < 4; j++) sum[j] *= g[0];
  for (int u = 1; u < q.used; u++) {
    pe::load4((const float *)(in + u * q.y_stride), 1, count, v);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] = g ? fmaf(v[j], g[u], sum[j]) : sum[j] + v[j];
  }
  if (q.residual) {
    pe::load4((const float *)(q.residual + row * q.residual_stride) + start, 1, count, v);
#pragma unroll
    for (int j = 0; j < 4; j++) sum[j] = __fadd_rn(sum[j], v[j]);
  }
  pe::store4((float *)(q.out + row * q.out_stride) + start, count, sum);
}

} // namespace

PE_KERNEL(cuda, top_experts)(const pe_tensor *scores, const pe_tensor *bias, const pe_tensor *out0, const pe_tensor *out1,
                             const pe_top_experts_params *p, pe_stream *s) {
  const int64_t n = scores->shape[1], width = pe::round_up(n, WARP), bytes = 8 * width;
  Choice c = {};
  c.scores = (const char *)scores->data;
  c.bias = bias ? (const float *)bias->data : nullptr;
  c.chosen = (char *)out0->data;
  c.gates = (char *)out1->data;
  c.scores_stride = scores->stride[0];
  c.chosen_stride = out0->stride[0];
  c.gates_stride = out1->stride[0];
  c.m = scores->shape[0];
  c.n = (int)n;
  c.used = p->n_used;
  c.softmax = p->gate == PE_TOP_EXPERTS_GATE_SOFTMAX;
  c.normed = p->normed;
  c.scale = p->scale;
  if (p->n_used < 1 || p->n_used > n) return pe_fail(s, PE_BAD_SHAPE, "top_experts: %d of %lld", p->n_used, (long long)n);
  if (bytes > MOST_SHARED) return pe_fail(s, PE_NO_KERNEL, "top_experts: %lld experts", (long long)n);
  if (c.m == 0) return PE_OK;
  const int rows = ROWS * bytes <= MOST_SHARED ? ROWS : 1;
  pe::launch(pe::stream(s), top_experts_kernel, dim3((unsigned)((c.m + rows - 1) / rows)), dim3(WARP, rows), (size_t)(rows * bytes), c, (int)width);
  return PE_OK;
}

PE_KERNEL(cuda, sum_experts)(const pe_tensor *y, const pe_tensor *gates, const pe_tensor *residual, const pe_tensor *out,
                             const pe_sum_experts_params *p, pe_stream *s) {
  const int64_t m = out->shape[0], n = out->shape[1], used = p->n_used, quads = (n + 3) / 4;
  if (used < 1 || y->shape[0] != m * used || (gates && (gates->shape[0] != m || gates->shape[1] != used)))
    return pe_fail(s, PE_BAD_SHAPE, "sum_experts: %lld rows for %lld x %lld", (long long)y->shape[0], (long long)m, (long long)used);
  if (!pe::counts_in_31_bits(m * quads)) return pe_fail(s, PE_NO_KERNEL, "sum_experts: more than 2^31 runs of four elements");
  if (m * n == 0) return PE_OK;
  Summed q = {};
  q.y = (const char *)y->data;
  q.gates = gates ? (const char *)gates->data : nullptr;
  q.residual = residual ? (const char *)residual->data : nullptr;
  q.out = (char *)out->data;
  q.y_stride = y->stride[0];
  q.gates_stride = gates ? gates->stride[0] : 0;
  q.residual_stride = residual ? residual->stride[0] : 0;
  q.out_stride = out->stride[0];
  q.n = n;
  q.used = (int)used;
  const int64_t total = m * quads;
  pe::launch(pe::stream(s), sum_experts_kernel, dim3((unsigned)((total + THREADS - 1) / THREADS)), dim3(THREADS), 0, q, (unsigned)quads, (unsigned)total);
  return PE_OK;
}

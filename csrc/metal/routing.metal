/* routing.metal: mixtures of experts, around the products: the choice of experts for each row, and the sum of what they give.
 * Reference: pyengine/ops/experts.py: top_experts, sum_experts.
 *
 * pick_experts   A simdgroup owns a row of n scores, up to four rows a threadgroup. An expert is picked by a maximum over the lanes, then a
 *                minimum of numbers; the lane whose own it is (i, i + 32 ..) marks it as taken. Threadgroup memory: n floats a row, the
 *                gates, which are not negative; -1 is taken. n scores are read once for each expert picked, from the cache after the first.
 * add_experts    A thread owns one element of the sum; it reads 4 (u + 1) bytes for each 4 it writes.
 */
#include "activations.h"
#include "team.h"

PE_CONSTANT(bool, SIGMOID, 0);
PE_CONSTANT(bool, NORMED, 1);

struct pick_args { int rows, n, used; float scale; };

kernel void pick_experts(constant pick_args &a [[buffer(0)]], device const float *scores [[buffer(1)]], device const float *bias [[buffer(2)]],
                         device int *chosen [[buffer(3)]], device float *gates [[buffer(4)]], threadgroup float *memory [[threadgroup(0)]],
                         uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint simdgroups [[simdgroups_per_threadgroup]], uint lane_ [[thread_index_in_simdgroup]]) {
  const int row = (int)(group.x * simdgroups + simdgroup), lane = (int)lane_;
  if (row >= a.rows) return;
  threadgroup float *g = memory + (int)simdgroup * a.n;
  device const float *x = scores + (long)row * a.n;
  float top = -INFINITY;
  if (SIGMOID) {
    for (int i = lane; i < a.n; i += 32) g[i] = activated(ACT_SIGMOID, x[i]);
  } else {
    for (int i = lane; i < a.n; i += 32) top = max(top, x[i]);
    top = simd_max(top);
    for (int i = lane; i < a.n; i += 32) g[i] = exp_of(x[i] - top);
    const float sum = simdgroup_row_sum(g, a.n, false, 0.0f, lane); /* of numbers that this lane has written */
    for (int i = lane; i < a.n; i += 32) g[i] /= sum;
  }
  float total = 0.0f;
  for (int u = 0; u < a.used; u++) {
    float best = -INFINITY;
    int who = a.n;                   /* of what is left: the largest, the first of equals; a NaN counts as the least */
    for (int i = lane; i < a.n; i += 32) {
      const float key = bias ? g[i] + bias[i] : x[i];
      if (g[i] < 0.0f) continue;
      if (who == a.n || key > best) {
        best = isnan(key) ? -INFINITY : key;
        who = i;
      }
    }
    const float most = simd_max(best);
    const int winner = simd_min(who < a.n && best == most ? who : a.n);
    float gate = 0.0f;
    if (winner % 32 == lane) gate = g[winner], g[winner] = -1.0f;
    gate = simd_shuffle(gate, (ushort)(winner % 32));
    total += gate;
    if (lane == 0) {
      chosen[(long)row * a.used + u] = winner;
      gates[(long)row * a.used + u] = gate;
    }
  }
  if (lane != 0) return;
  for (int u = 0; u < a.used; u++) {
    device float *gate = gates + (long)row * a.used + u;
    *gate = (NORMED ? *gate / (total + 1e-20f) : *gate) * a.scale;
  }
}

struct add_args { int rows, width, used; };

kernel void add_experts(constant add_args &a [[buffer(0)]], device const float *y [[buffer(1)]], device const float *gates [[buffer(2)]],
                        device const float *residual [[buffer(3)]], device float *out [[buffer(4)]], uint3 at [[thread_position_in_grid]]) {
  const int j = (int)at.x, row = (int)at.y;
  if (j >= a.width) return;
  device const float *in = y + (long)row * a.used * a.width + j;
  float sum = gates ? in[0] * gates[(long)row * a.used] : in[0];
  for (int u = 1; u < a.used; u++) {
    const float v = in[(long)u * a.width];
    sum = gates ? fma(v, gates[(long)row * a.used + u], sum) : sum + v;
  }
  if (residual) sum += residual[(long)row * a.width + j];
  out[(long)row * a.width + j] = sum;
}

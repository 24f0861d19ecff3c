/* routing.c: mixtures of experts, around the products: the choice of experts for each row, and the sum of what they give.
 * Reference: pyengine/ops/experts.py: top_experts, sum_experts.
 *
 * top_experts  A thread claims single rows: n scores are read once, and gone over once more for every expert that is picked.
 * sum_experts  A thread claims blocks of 512 columns of a row; it reads 4 (u + 1) bytes for each 4 it writes. One fma an expert, in
 *              the order of the choice.
 */
#include "vec.h"

/* ---- the choice ---- */

PE_SCRATCH(cpu, top_experts)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  return n_threads * 3 * pe_round_up(4 * a->t[a->start[0]]->shape[1], 64);
}

PE_KERNEL(cpu, top_experts)(const pe_tensor *scores, const pe_tensor *bias, const pe_tensor *out0, const pe_tensor *out1,
                       const pe_top_experts_params *p, pe_stream *s) {
  const int64_t m = scores->shape[0], n = scores->shape[1], width = pe_round_up(4 * n, 64), used = p->n_used;
  if (used < 1 || used > n) return pe_fail(s, PE_BAD_SHAPE, "top_experts: %lld of %lld", (long long)used, (long long)n);
  float *g = (float *)(s->scratch + s->ith * 3 * width), *key = g + width / 4;
  int32_t *taken = (int32_t *)(key + width / 4);
  for (int64_t i; (i = pe_next(s, 0)) < m;) {
    const float *x = (const float *)((const char *)scores->data + i * scores->stride[0]);
    int32_t *chosen = (int32_t *)((char *)out0->data + i * out0->stride[0]);
    float *gates = (float *)((char *)out1->data + i * out1->stride[0]);
    if (p->gate == PE_TOP_EXPERTS_GATE_SOFTMAX) {
      v16f top = v16f_set1(-__builtin_inff());
      for (int64_t j = 0; j < n; j += 16) top = v16f_max(v16f_first_n(load_some(x + j, n - j), n - j, -__builtin_inff()), top);
      top = v16f_set1(v16f_hmax(top));
      for (int64_t j = 0; j < n; j += 16) {
        store_some(g + j, v16f_exp(v16f_sub(load_some(x + j, n - j), top)), n - j);
      }
      const v16f sum = v16f_set1(sum_of(g, n));
      for (int64_t j = 0; j < n; j += 16) store_some(g + j, v16f_div(load_some(g + j, n - j), sum), n - j);
    } else {
      for (int64_t j = 0; j < n; j += 16) store_some(g + j, v16f_sigmoid(load_some(x + j, n - j)), n - j);
    }
    for (int64_t j = 0; j < n; j++) {
      key[j] = bias ? g[j] + ((const float *)bias->data)[j] : x[j];
      taken[j] = 0;
    }
    float total = 0;
    for (int64_t u = 0; u < used; u++) {
      int64_t best = -1;
      for (int64_t j = 0; j < n; j++)
        if (!taken[j] && (best < 0 || key[j] > key[best])) best = j;
      taken[best] = 1;
      chosen[u] = (int32_t)best;
      gates[u] = g[best];
      total += g[best];
    }
    for (int64_t u = 0; u < used; u++) gates[u] = (p->normed ? gates[u] / (total + 1e-20f) : gates[u]) * p->scale;
  }
  return PE_OK;
}

/* ---- the sum ---- */

enum { COLUMNS = 512 };

PE_KERNEL(cpu, sum_experts)(const pe_tensor *y, const pe_tensor *gates, const pe_tensor *residual, const pe_tensor *out,
                       const pe_sum_experts_params *p, pe_stream *s) {
  const int64_t m = out->shape[0], n = out->shape[1], used = p->n_used, blocks = (n + COLUMNS - 1) / COLUMNS;
  if (used < 1 || y->shape[0] != m * used || (gates && (gates->shape[0] != m || gates->shape[1] != used)))
    return pe_fail(s, PE_BAD_SHAPE, "sum_experts: %lld rows for %lld x %lld", (long long)y->shape[0], (long long)m,
                   (long long)used);
  for (int64_t i; (i = pe_next(s, 0)) < m * blocks;) {
    const int64_t row = i / blocks, from = i % blocks * COLUMNS, to = pe_min(n, from + COLUMNS);
    const float *g = gates ? (const float *)((const char *)gates->data + row * gates->stride[0]) : 0;
    const float *add = residual ? (const float *)((const char *)residual->data + row * residual->stride[0]) : 0;
    const char *in = (const char *)y->data + row * used * y->stride[0];
    for (int64_t j = from; j < to; j += 16) {
      v16f sum = load_some((const float *)in + j, to - j);
      if (g) sum = v16f_mul(sum, v16f_set1(g[0]));
      for (int64_t u = 1; u < used; u++) {
        v16f v = load_some((const float *)(in + u * y->stride[0]) + j, to - j);
        sum = g ? v16f_fma(v, v16f_set1(g[u]), sum) : v16f_add(sum, v);
      }
      if (add) sum = v16f_add(sum, load_some(add + j, to - j));
      store_some((float *)((char *)out->data + row * out->stride[0]) + j, sum, to - j);
    }
  }
  return PE_OK;
}

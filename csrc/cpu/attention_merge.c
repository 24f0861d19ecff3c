/* attention_merge.c: what attention gave for the same queries and several sets of keys, as one softmax.
 * Reference: pyengine/ops/groups.py: merge_attention.
 *
 * A thread claims chunks of whole rows. Parts are added in their order; a head's result depends on its own parts only.
 */
#include "vec.h"

enum { MOST_PARTS = 8 };

/* One head: out = sum of w x / sum of w, w = total exp(top - the largest top). stats: (top, total) of each part; together: of all, or NULL.
 * The only part that has keys is the result, bit for bit. */
static void merge_head(int n, const float *const *x, const float *const *stats, float *out, float *together, int64_t d) {
  float w[MOST_PARTS], top = -__builtin_inff(), total = 0.0f;
  for (int i = 0; i < n; i++)
    if (stats[i][1] > 0.0f && stats[i][0] > top) top = stats[i][0];
  for (int i = 0; i < n; i++) {
    w[i] = stats[i][1] > 0.0f ? stats[i][1] * v16f_exp(v16f_set1(stats[i][0] - top)).a[0] : 0.0f * stats[i][1];
    total += w[i];
  }
  if (together) together[0] = total != 0.0f ? top : 0.0f, together[1] = total;
  for (int i = 0; i < n; i++)
    if (w[i] == total && total > 0.0f) {
      memcpy(out, x[i], (size_t)d * 4);
      return;
    }
  const v16f all = v16f_set1(total);
  for (int64_t j = 0; j < d; j += 16) {
    v16f sum = v16f_zero();
    for (int i = 0; i < n; i++)
      if (w[i] != 0.0f) sum = v16f_fma(load_some(x[i] + j, d - j), v16f_set1(w[i]), sum);
    store_some(out + j, total != 0.0f ? v16f_div(sum, all) : sum, d - j);
  }
}

PE_KERNEL(cpu, merge_attention)(const pe_tensor *const *parts, int32_t n_parts, const pe_tensor *const *stats, int32_t n_stats,
                                const pe_tensor *out, const pe_tensor *together, const pe_merge_attention_params *p, pe_stream *s) {
  (void)p;
  const int64_t m = out->shape[0], d = out->shape[1], h = stats[0]->shape[1], step = pe_max(1, 16384 / pe_max(1, d));
  if (n_parts != n_stats || n_parts > MOST_PARTS)
    return pe_fail(s, PE_NO_KERNEL, "merge_attention: %d results and %d stats; %d of each at most", n_parts, n_stats, MOST_PARTS);
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < m;)
    for (int64_t i = i0; i < pe_min(m, i0 + step); i++)
      for (int64_t j = 0; j < h; j++) {
        const float *x[MOST_PARTS], *t[MOST_PARTS];
        for (int q = 0; q < n_parts; q++) {
          x[q] = (const float *)parts[q]->data + i * d + j * (d / h);
          t[q] = (const float *)stats[q]->data + 2 * (i * h + j);
        }
        merge_head(n_parts, x, t, (float *)out->data + i * d + j * (d / h), together ? (float *)together->data + 2 * (i * h + j) : 0, d / h);
      }
  return PE_OK;
}

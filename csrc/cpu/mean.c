/* mean.c: out[i] = the mean of rows lo[i] .. hi[i] - 1 of x, which are contiguous.
 * Reference: pyengine/ops/norm.py: mean_rows.
 *
 * A thread claims single rows of `out`, and owns 16 elements of one at a time: the rows are added in order, so that a text's mean does not
 * depend on what else is in a run. Reads x once, 4 bytes an element.
 */
#include "vec.h"

PE_KERNEL(cpu, mean_rows)(const pe_tensor *x, const pe_tensor *lo, const pe_tensor *hi, const pe_tensor *out, const pe_mean_rows_params *p,
                          pe_stream *s) {
  (void)p;
  const int64_t n = x->shape[0], d = x->shape[1], m = lo->shape[0];
  for (int64_t i; (i = pe_next(s, 0)) < m;) {
    const int64_t first = ((const int32_t *)lo->data)[i], end = ((const int32_t *)hi->data)[i];
    if (first < 0 || end > n) return pe_fail(s, PE_BAD_VALUE, "mean_rows: rows %lld to %lld of %lld", (long long)first, (long long)end, (long long)n);
    const float *in = (const float *)x->data;
    float *y = (float *)out->data + i * d;
    const v16f many = v16f_set1(end > first ? (float)(end - first) : 1.0f);
    for (int64_t at = 0; at < d; at += 16) {
      v16f sum = v16f_set1(0.0f);
      for (int64_t j = first; j < end; j++) sum = v16f_add(sum, load_some(in + j * d + at, d - at));
      store_some(y + at, v16f_div(sum, many), d - at);
    }
  }
  return PE_OK;
}

/* mean.cu: out[i] = the mean of rows lo[i] .. hi[i] - 1 of x, which are contiguous.
 * Reference: pyengine/ops/norm.py: mean_rows.
 *
 * Block (b, i) has 128 threads; a thread owns one element of row i of `out` and adds its column in the order of the rows, as the CPU does.
 * Neighbouring threads read neighbouring elements: 4 bytes an element of x, once. No shared memory.
 */
#include "cuda.h"
#include "strides.h"

namespace {

enum { THREADS = 128 };

struct Means {
  const float *x;
  const int32_t *lo, *hi;
  float *out;
  int64_t n, d;
  pe_fault *fault;
};

__global__ void __launch_bounds__(THREADS) mean_kernel(Means p, unsigned pieces) {
  const unsigned i = blockIdx.x / pieces;
  const int64_t at = (int64_t)(blockIdx.x % pieces) * THREADS + threadIdx.x;
  const int first = p.lo[i], end = p.hi[i];
  if (first < 0 || end > p.n) {
    if (at == 0) pe::raise(p.fault, PE_BAD_VALUE, first < 0 ? first : end, p.n);
    return;
  }
  if (at >= p.d) return;
  float sum = 0.0f;
  for (int j = first; j < end; j++) sum += p.x[j * p.d + at];
  p.out[i * p.d + at] = sum / (float)(end > first ? end - first : 1);
}

} // namespace

PE_KERNEL(cuda, mean_rows)(const pe_tensor *x, const pe_tensor *lo, const pe_tensor *hi, const pe_tensor *out, const pe_mean_rows_params *,
                           pe_stream *s) {
  Means p;
  p.x = (const float *)x->data;
  p.lo = (const int32_t *)lo->data;
  p.hi = (const int32_t *)hi->data;
  p.out = (float *)out->data;
  p.n = x->shape[0];
  p.d = x->shape[1];
  p.fault = pe::fault(s);
  const int64_t m = lo->shape[0], pieces = (p.d + THREADS - 1) / THREADS;
  if (m == 0 || p.d == 0) return PE_OK;
  if (!pe::counts_in_31_bits(m * pieces)) return pe_fail(s, PE_NO_KERNEL, "mean_rows: %lld rows", (long long)m);
  pe::launch(pe::stream(s), mean_kernel, dim3((unsigned)(m * pieces)), dim3(THREADS), 0, p, (unsigned)pieces);
  return PE_OK;
}

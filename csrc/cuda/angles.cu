/* angles.cu: rope_table, temperature.
 * Reference: pyengine/ops/rope.py: rope_table, temperature.
 *
 * rope_table   A block has 128 threads; a thread owns one frequency of one row, and writes its cosine and its sine. No shared memory. The
 *              angle is a float32 product, as transformers takes it; what follows is in double and rounded once, about 60 operations.
 *              It runs once a step of the model: even where double precision has 1/64 of float's rate (0.6 TFLOP/s of an RTX 3090),
 *              512 rows of 64 frequencies take 3 us. Writes 8 bytes a thread, neighbours side by side.
 * temperature  A thread owns one row.
 */
#include <cmath>

#include "cuda.h"

namespace {

enum { THREADS = 128 };

/* Cosine and sine of x, |x| < 2^30, by the operations of csrc/cpu/rope.c. With k = round(x / (pi/2)) and r = x - k pi/2, |r| <= pi/4, they are +-cos(r) and +-sin(r), in
 * this or the other order. pi/2 comes in three pieces of which the first two have 22 bits, so that their products with k are exact
 * (Cody & Waite, Software Manual for the Elementary Functions, 1980); the Taylor series' error, r^14/14!, is below 4e-13. */
__device__ __forceinline__ void cos_sin(double x, double *cosine, double *sine) {
  const double k = rint(x * 0x1.45f306dc9c883p-1);
  const int q = (int)k;
  const double r = ((x - k * 0x1.921fb00000000p+0) - k * 0x1.5110b00000000p-22) - k * 0x1.18469898cc517p-44, z = r * r;
  const double c = 1 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
  const double s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800)))));
  *cosine = q & 1 ? s : c;
  *sine = q & 1 ? c : s;
  if ((q + 1) & 2) *cosine = -*cosine;
  if (q & 2) *sine = -*sine;
}

struct Table {
  const int *positions, *axis;
  const float *inv_freq;
  float *out;
  int64_t m, f, n_axes;
  float scale;
  pe_fault *fault;
};

__global__ void __launch_bounds__(THREADS) rope_table_kernel(Table t) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= t.m * t.f) return;
  const int64_t row = i / t.f, j = i % t.f;
  const int axis = t.axis ? t.axis[j] : 0;
  if (axis < 0 || axis >= t.n_axes) {
    pe::raise(t.fault, PE_BAD_VALUE, axis, t.n_axes);
    return;
  }
  const float angle = __fmul_rn((float)t.positions[axis * t.m + row], t.inv_freq[j]);
  double c, s;
  if (fabsf(angle) < 1073741824.0f) {
    cos_sin((double)angle, &c, &s);
  } else {
    c = cos((double)angle);
    s = sin((double)angle);
  }
  t.out[row * 2 * t.f + j] = (float)(c * (double)t.scale);
  t.out[row * 2 * t.f + t.f + j] = (float)(s * (double)t.scale);
}

__global__ void __launch_bounds__(THREADS) temperature_kernel(const int *positions, float *out, int64_t m, int floor, float scale, int offset) {
  const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= m) return;
  const int64_t steps = max((int64_t)0, (int64_t)positions[i] + offset) / floor;
  out[i] = (float)(1.0 + (double)scale * log1p((double)steps));
}

} // namespace

PE_KERNEL(cuda, rope_table)(const pe_tensor *positions, const pe_tensor *inv_freq, const pe_tensor *axis, const pe_tensor *out,
                            const pe_rope_table_params *p, pe_stream *s) {
  Table t = {};
  t.positions = (const int *)positions->data;
  t.axis = axis ? (const int *)axis->data : nullptr;
  t.inv_freq = (const float *)inv_freq->data;
  t.out = (float *)out->data;
  t.n_axes = positions->shape[0];
  t.m = positions->shape[1];
  t.f = inv_freq->shape[0];
  t.scale = p->scale;
  t.fault = pe::fault(s);
  if (t.n_axes < 1) return pe_fail(s, PE_BAD_SHAPE, "rope_table: positions has no rows");
  const int64_t blocks = (t.m * t.f + THREADS - 1) / THREADS;
  if (blocks >= int64_t{1} << 31) return pe_fail(s, PE_NO_KERNEL, "rope_table: %lld rows of %lld", (long long)t.m, (long long)t.f);
  if (blocks) pe::launch(pe::stream(s), rope_table_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, t);
  return PE_OK;
}

PE_KERNEL(cuda, temperature)(const pe_tensor *positions, const pe_tensor *out, const pe_temperature_params *p, pe_stream *s) {
  const int64_t m = positions->shape[1];
  if (positions->shape[0] < 1) return pe_fail(s, PE_BAD_SHAPE, "temperature: positions has no rows");
  if (p->floor < 1) return pe_fail(s, PE_BAD_VALUE, "temperature: a floor of %lld", (long long)p->floor);
  if (m)
    pe::launch(pe::stream(s), temperature_kernel, dim3((unsigned)((m + THREADS - 1) / THREADS)), dim3(THREADS), 0, (const int *)positions->data,
               (float *)out->data, m, (int)p->floor, p->scale, (int)p->offset);
  return PE_OK;
}

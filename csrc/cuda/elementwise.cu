/* elementwise.cu: binary, unary, scale, softcap.
 * Reference: pyengine/ops/elementwise.py: binary, unary, scale, softcap.
 *
 * A block has 256 threads; a thread owns four neighbouring elements of the result and nothing else. No shared memory. Bound by memory:
 * `binary` moves 12 bytes an element (less where an operand is broadcast and stays in caches), the others 8, all by 16-byte
 * accesses of whole warps where rows are multiples of four; 2048 threads of a multiprocessor keep 32 KB on the way, which is
 * what hides the latency of HBM. out may be x.
 */
#include "activations.h"
#include "strides.h"

namespace {

enum { THREADS = 256 };

/* As np.maximum and np.minimum: NaN where either is one. */
template <int KIND>
__device__ __forceinline__ float combine(float a, float b) {
  switch (KIND) {
    case PE_BINARY_KIND_ADD: return a + b;
    case PE_BINARY_KIND_SUB: return a - b;
    case PE_BINARY_KIND_MUL: return a * b;
    case PE_BINARY_KIND_DIV: return a / b;
    case PE_BINARY_KIND_MAX: return a > b || a != a ? a : b;
    default: return a < b || a != a ? a : b;
  }
}

/* Row r, elements 4 q .. 4 q + 3; thread = r * quads + q. */
template <int KIND>
__global__ void __launch_bounds__(THREADS) binary_kernel(pe::Walk w, const float *x, const float *y, float *out, unsigned quads, unsigned n) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= n) return;
  const unsigned row = i / quads;
  const int64_t start = 4 * (int64_t)(i - row * quads), sx = w.x[w.ndim - 1], sy = w.y[w.ndim - 1];
  const int count = (int)min((int64_t)4, w.inner - start);
  int64_t ax, ay;
  pe::row_start(w, row, &ax, &ay);
  float a[4], b[4];
  pe::load4(x + ax + start * sx, sx, count, a);
  pe::load4(y + ay + start * sy, sy, count, b);
#pragma unroll
  for (int j = 0; j < 4; j++) a[j] = combine<KIND>(a[j], b[j]);
  pe::store4(out + row * w.inner + start, count, a);
}

/* A function of one number, as the kernels below take it. */
template <int KIND>
struct Activation {
  __device__ __forceinline__ float operator()(float v) const { return pe::activated(KIND, v); }
};
struct Scale {
  float factor, offset;
  __device__ __forceinline__ float operator()(float v) const { return __fadd_rn(__fmul_rn(v, factor), offset); }
};
struct SoftCap {
  float cap;
  __device__ __forceinline__ float operator()(float v) const { return pe::capped(v, cap); }
};

template <class F>
__global__ void __launch_bounds__(THREADS) each_kernel(F f, const float *x, float *out, int64_t n) {
  const int64_t i = 4 * ((int64_t)blockIdx.x * THREADS + threadIdx.x);
  if (i >= n) return;
  const int count = (int)min((int64_t)4, n - i);
  float v[4];
  pe::load4(x + i, 1, count, v);
#pragma unroll
  for (int j = 0; j < 4; j++) v[j] = f(v[j]);
  pe::store4(out + i, count, v);
}

pe_status too_large(const char *op, pe_stream *s) { return pe_fail(s, PE_NO_KERNEL, "%s: more than 2^31 runs of four elements", op); }

template <class F>
pe_status each(const char *op, F f, const pe_tensor *x, const pe_tensor *out, pe_stream *s) {
  const int64_t n = pe::count_elements(x), blocks = (n + 4 * THREADS - 1) / (4 * THREADS);
  if (!pe::counts_in_31_bits(blocks)) return too_large(op, s);
  if (n) pe::launch(pe::stream(s), each_kernel<F>, dim3((unsigned)blocks), dim3(THREADS), 0, f, (const float *)x->data, (float *)out->data, n);
  return PE_OK;
}

template <int KIND>
void launch_binary(const pe::Walk &w, const pe_tensor *x, const pe_tensor *y, const pe_tensor *out, pe_stream *s) {
  const unsigned quads = (unsigned)((w.inner + 3) / 4), n = quads * (unsigned)w.rows;
  pe::launch(pe::stream(s), binary_kernel<KIND>, dim3((n + THREADS - 1) / THREADS), dim3(THREADS), 0, w, (const float *)x->data,
             (const float *)y->data, (float *)out->data, quads, n);
}

} // namespace

PE_KERNEL(cuda, binary)(const pe_tensor *x, const pe_tensor *y, const pe_tensor *out, const pe_binary_params *p, pe_stream *s) {
  if (pe::count_elements(out) == 0) return PE_OK;
  const pe::Walk w = pe::make_walk(x, y, out);
  if (!pe::counts_in_31_bits((w.inner + 3) / 4 * w.rows)) return too_large("binary", s);
  switch (p->kind) {
#define KIND(name) case PE_BINARY_KIND_##name: launch_binary<PE_BINARY_KIND_##name>(w, x, y, out, s); return PE_OK
    KIND(ADD);
    KIND(SUB);
    KIND(MUL);
    KIND(DIV);
    KIND(MAX);
    KIND(MIN);
#undef KIND
    default: return pe_fail(s, PE_BAD_VALUE, "binary: kind %d is not known", p->kind);
  }
}

PE_KERNEL(cuda, unary)(const pe_tensor *x, const pe_tensor *out, const pe_unary_params *p, pe_stream *s) {
  switch (p->kind) {
#define KIND(name) case PE_UNARY_KIND_##name: return each("unary", Activation<PE_UNARY_KIND_##name>(), x, out, s)
    KIND(NONE);
    KIND(SILU);
    KIND(GELU_TANH);
    KIND(GELU);
    KIND(RELU);
    KIND(QUICK_GELU);
    KIND(RELU2);
    KIND(SIGMOID);
    KIND(TANH);
    KIND(EXP);
    KIND(LOG);
    KIND(SQRT);
    KIND(NEG);
    KIND(SQUARE);
    KIND(SOFTPLUS);
#undef KIND
    default: return pe_fail(s, PE_BAD_VALUE, "unary: kind %d is not known", p->kind);
  }
}

PE_KERNEL(cuda, scale)(const pe_tensor *x, const pe_tensor *out, const pe_scale_params *p, pe_stream *s) {
  return each("scale", Scale{p->factor, p->offset}, x, out, s);
}

PE_KERNEL(cuda, softcap)(const pe_tensor *x, const pe_tensor *out, const pe_softcap_params *p, pe_stream *s) {
  return each("softcap", SoftCap{p->cap}, x, out, s);
}

/* strides.h: operands with any strides, for elementwise.cu and layout.cu. Axes are merged on the host where all operands run through
 * memory without a gap; a kernel then sees rows of `inner` elements, which its threads take by fours. */
#ifndef PE_CUDA_STRIDES_H
#define PE_CUDA_STRIDES_H

#include "cuda.h"

namespace pe {

/* Axes of the result, merged; strides in elements of 4 bytes, 0 where an operand is broadcast. The last axis is the inner one. */
struct Walk {
  int ndim;
  int64_t shape[PE_MAX_DIMS], x[PE_MAX_DIMS], y[PE_MAX_DIMS];
  int64_t rows, inner; /* product of the other axes, and the last one */
};

/* Stride of `t` along axis i of `out`, axes aligned at the end. */
inline int64_t stride_of(const pe_tensor *t, const pe_tensor *out, int i) {
  const int axis = i - (out->ndim - t->ndim);
  return axis < 0 || t->shape[axis] == 1 ? 0 : t->stride[axis] / 4;
}

inline Walk make_walk(const pe_tensor *x, const pe_tensor *y, const pe_tensor *out) {
  Walk w = {};
  w.rows = 1;
  for (int i = 0; i < out->ndim; i++) {
    const int64_t n = out->shape[i], sx = stride_of(x, out, i), sy = y ? stride_of(y, out, i) : 0;
    if (n == 1) continue;
    const int last = w.ndim - 1;
    if (last >= 0 && w.x[last] == n * sx && (!y || w.y[last] == n * sy)) { /* the outer axis steps over exactly one inner run */
      w.shape[last] *= n;
      w.x[last] = sx;
      w.y[last] = sy;
    } else {
      w.shape[w.ndim] = n;
      w.x[w.ndim] = sx;
      w.y[w.ndim++] = sy;
    }
  }
  if (w.ndim == 0) {
    w.ndim = 1;
    w.shape[0] = w.x[0] = w.y[0] = 1;
  }
  w.inner = w.shape[w.ndim - 1];
  for (int i = 0; i + 1 < w.ndim; i++) w.rows *= w.shape[i];
  return w;
}

inline int64_t count_elements(const pe_tensor *x) {
  int64_t n = 1;
  for (int i = 0; i < x->ndim; i++) n *= x->shape[i];
  return n;
}

/* Numbers of threads, and of rows times fours, stay below 2^31, so that kernels divide in 32 bits. */
inline bool counts_in_31_bits(int64_t n) { return n < (int64_t{1} << 31); }

/* Element offsets of row `row` in x and y. */
__device__ __forceinline__ void row_start(const Walk &w, unsigned row, int64_t *x, int64_t *y) {
  *x = *y = 0;
  for (int a = w.ndim - 2; a >= 0; a--) {
    const unsigned n = (unsigned)w.shape[a], at = row % n;
    row /= n;
    *x += at * w.x[a];
    *y += at * w.y[a];
  }
}

__device__ __forceinline__ bool aligned16(const void *p) { return ((uintptr_t)p & 15) == 0; }

/* v[0..n-1] = elements 0 .. n-1 (at most 4) of an operand; the others are 0. One 16-byte load where they lie so. */
__device__ __forceinline__ void load4(const float *p, int64_t stride, int n, float v[4]) {
  if (stride == 1 && n == 4 && aligned16(p)) {
    const float4 q = *(const float4 *)p;
    v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = i < n ? p[i * stride] : 0.0f;
}

__device__ __forceinline__ void store4(float *p, int n, const float v[4]) {
  if (n == 4 && aligned16(p)) {
    *(float4 *)p = make_float4(v[0], v[1], v[2], v[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < n) p[i] = v[i];
}

} // namespace pe

#endif

/* elementwise.metal: arithmetic with broadcasting, activations, scale, soft cap.
 * Reference: pyengine/ops/elementwise.py: binary, unary, scale, softcap.
 *
 * A thread owns one element of the result (binary) or four that lie side by side (the others, whose tensors are contiguous). Nothing is
 * shared. Each reads its arguments and writes its result once: 8 bytes of traffic an element with one argument, 12 with two; the
 * arithmetic is far below what the memory gives time for. Results may lie where an argument does.
 */
#include "common.h"
#include "activations.h"

struct binary_args {
  int n;
  int shape[6];                  /* of the result, slowest axis first; 1 before the first */
  int x_stride[6], y_stride[6];  /* in elements, 0 along an axis that is stretched */
};

PE_CONSTANT(int, KIND, 0);

enum { KIND_ADD, KIND_SUB, KIND_MUL, KIND_DIV, KIND_MAX, KIND_MIN };

static inline float combine(float x, float y) {
  switch (KIND) {
    case KIND_ADD: return x + y;
    case KIND_SUB: return x - y;
    case KIND_MUL: return x * y;
    case KIND_DIV: return x / y;
    case KIND_MAX: return x > y || isnan(x) ? x : y; /* a NaN of either stays, as in NumPy */
    default: return x < y || isnan(x) ? x : y;
  }
}

kernel void combine_elements(constant binary_args &a [[buffer(0)]], device const float *x [[buffer(1)]],
                             device const float *y [[buffer(2)]], device float *out [[buffer(3)]],
                             uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.n) return;
  int rest = (int)at;
  long from_x = 0, from_y = 0;
  for (int d = 5; d >= 0; d--) {
    const int i = rest % a.shape[d];
    rest /= a.shape[d];
    from_x += (long)i * a.x_stride[d];
    from_y += (long)i * a.y_stride[d];
  }
  out[at] = combine(x[from_x], y[from_y]);
}

struct each_args { int n; };

/* x is padded to no more than n: the last thread takes what is left one by one. */
kernel void apply_activation(constant each_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                             uint at [[thread_position_in_grid]]) {
  for (int i = 4 * (int)at; i < min(a.n, 4 * (int)at + 4); i++) out[i] = activated(KIND, x[i]);
}

struct scale_args { int n; float factor, offset; };

kernel void scale_elements(constant scale_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                           uint at [[thread_position_in_grid]]) {
  for (int i = 4 * (int)at; i < min(a.n, 4 * (int)at + 4); i++) out[i] = x[i] * a.factor + a.offset;
}

struct cap_args { int n; float cap; };

kernel void cap_elements(constant cap_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                         uint at [[thread_position_in_grid]]) {
  for (int i = 4 * (int)at; i < min(a.n, 4 * (int)at + 4); i++) out[i] = capped(x[i], a.cap);
}

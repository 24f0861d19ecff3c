/* layout.metal: contiguous, concat.
 * Reference: pyengine/ops/layout.py: contiguous, concat.
 *
 * A thread owns one element of x and writes it to its place. Nothing is shared; 8 bytes of traffic an element. Where x is a transpose, a
 * simdgroup reads 32 different lines; the elements beside them are read by the threadgroups that come next, out of the cache.
 */
#include "common.h"

struct copy_args {
  int n;                         /* elements of x */
  int shape[6];                  /* of x, slowest axis first; 1 before the first */
  int x_stride[6], out_stride[6];
};

kernel void copy_elements(constant copy_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                          uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.n) return;
  int rest = (int)at;
  long from = 0, to = 0;
  for (int d = 5; d >= 0; d--) {
    const int i = rest % a.shape[d];
    rest /= a.shape[d];
    from += (long)i * a.x_stride[d];
    to += (long)i * a.out_stride[d];
  }
  out[to] = x[from];
}

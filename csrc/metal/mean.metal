/* mean.metal: out[i] = the mean of rows lo[i] .. hi[i] - 1 of x, which are contiguous.
 * Reference: pyengine/ops/norm.py: mean_rows.
 *
 * A thread owns one element of row i of `out` and adds its column in the order of the rows, as the CPU does. Neighbouring threads read
 * neighbouring elements: 4 bytes an element of x, once. No threadgroup memory.
 */
#include "common.h"

struct mean_args { int n, width; };

kernel void mean_of_rows(constant mean_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device const int *lo [[buffer(2)]],
                         device const int *hi [[buffer(3)]], device float *out [[buffer(4)]], device pe_fault *fault [[buffer(5)]],
                         uint3 place [[thread_position_in_grid]]) {
  const int at = (int)place.x, i = (int)place.y, first = lo[i], end = hi[i];
  if (first < 0 || end > a.n) {
    if (at == 0) raise_fault(fault, FAULT_BAD_VALUE, first < 0 ? first : end, a.n);
    return;
  }
  if (at >= a.width) return;
  float sum = 0.0f;
  for (int j = first; j < end; j++) sum += x[(long)j * a.width + at];
  out[(long)i * a.width + at] = sum / (float)(end > first ? end - first : 1);
}

/* conv.metal: conv2d: the window around each place of a picture times a weight.
 * Reference: pyengine/ops/convolution.py: conv2d.
 *
 * gather_windows    A thread owns one number of a window's row. Rows of up to 32 MB are gathered at a time, and the kernels of linear.metal or
 *                   linear_floats.metal multiply them. 8 k bytes a window for 2 k o operations: of few outputs bound by memory.
 * convolve_places   A thread owns one output, whose group is smaller than a product's 16 rows (by channel: one). Neighbouring threads have
 *                   neighbouring outputs of a place, so that pixels and weights are read in runs. 2 k operations.
 * Neither has threadgroup memory. Sums ascend with y, x and channel; a product's are linear's. Pixels beyond the picture are zeros, or left out.
 */
#include "activations.h"

PE_CONSTANT(int, FORMAT, 0);    /* of the weight, whose numbers are plain */
PE_CONSTANT(bool, PACKED, 1);   /* 16 rows interleaved, or row after row */
PE_CONSTANT(int, KIND, 2);      /* what follows */

struct window_args {
  int height, width, c, rows, columns, o;      /* the picture, the result */
  int kh, kw, sy, sx, top, left, dy, dx;
  int cg, og, k;                               /* channels and outputs of a group; numbers of a window */
  int group, row0, count;                      /* windows that are gathered; or outputs */
  long group_bytes;                            /* of 16 packed rows of the weight, or of one */
};

kernel void gather_windows(constant window_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *to [[buffer(2)]],
                           uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.count * a.k) return;
  const int place = a.row0 + (int)at / a.k, tap = (int)at % a.k / a.cg, c = (int)at % a.k % a.cg;
  const int y = place / a.columns % a.rows * a.sy - a.top + tap / a.kw * a.dy, column = place % a.columns * a.sx - a.left + tap % a.kw * a.dx;
  const bool inside = y >= 0 && y < a.height && column >= 0 && column < a.width;
  const long picture = place / a.columns / a.rows;
  to[at] = inside ? x[((picture * a.height + y) * a.width + column) * a.c + a.group * a.cg + c] : 0.0f;
}

static inline float plain_weight(device const uchar *weight, constant window_args &a, int row, int k) {
  const long at = PACKED ? 16 * k + row % 16 : k;
  device const uchar *p = weight + (PACKED ? row / 16 : row) * a.group_bytes;
  if (FORMAT == PE_F32) return ((device const float *)p)[at];
  if (FORMAT == PE_F16) return (float)((device const half *)p)[at];
  return pe_bf16_to_f32(((device const ushort *)p)[at]);
}

kernel void convolve_places(constant window_args &a [[buffer(0)]], device const float *x [[buffer(1)]],
                            device const uchar *weight [[buffer(2)]], device const float *bias [[buffer(3)]],
                            device float *out [[buffer(4)]], uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.count) return;
  const int o = (int)at % a.o, place = (int)at / a.o;
  const int y0 = place / a.columns % a.rows * a.sy - a.top, x0 = place % a.columns * a.sx - a.left;
  device const float *picture = x + (long)(place / a.columns / a.rows) * a.height * a.width * a.c + o / a.og * a.cg;
  float sum = 0.0f;
  for (int ky = 0; ky < a.kh; ky++)
    for (int kx = 0; kx < a.kw; kx++) {
      const int y = y0 + ky * a.dy, column = x0 + kx * a.dx;
      if (y < 0 || y >= a.height || column < 0 || column >= a.width) continue;
      device const float *pixel = picture + ((long)y * a.width + column) * a.c;
      for (int c = 0; c < a.cg; c++) sum = fma(pixel[c], plain_weight(weight, a, o, (ky * a.kw + kx) * a.cg + c), sum);
    }
  out[at] = activated(KIND, bias ? sum + bias[o] : sum);
}

/* pooling.metal: pool2d, adaptive_pool2d, resize2d: windows of pixels to one, channel by channel.
 * Reference: pyengine/ops/pooling.py: pool2d, adaptive_pool2d, resize2d.
 *
 * A thread owns one number of the result; neighbouring threads have neighbouring channels, so that pixels are read in runs. Nothing is shared.
 * 4 bytes of memory a number read and written; what windows share comes from caches. Resizing works out a pixel's weights in each
 * thread. Operations are those of csrc/cpu/pooling.c in their order.
 */
#include "common.h"
#include "../taps.h"

PE_CONSTANT(bool, MEAN, 0);
PE_CONSTANT(bool, EVEN, 1);      /* windows divide the picture, else they are strided */

struct pool_args {
  int n;                         /* numbers of the result */
  int h, w, c, rows, columns;
  int kh, kw, sy, sx, top, bottom, left, right, count_padding;
};

kernel void pool_windows(constant pool_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                         uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.n) return;
  const int c = (int)at % a.c, place = (int)at / a.c, column = place % a.columns, row = place / a.columns % a.rows;
  const int top = row * a.sy - a.top, left = column * a.sx - a.left;
  int y0 = max(0, top), y1 = min(a.h, top + a.kh), x0 = max(0, left), x1 = min(a.w, left + a.kw), of = (y1 - y0) * (x1 - x0);
  if (a.count_padding) of = (min(top + a.kh, a.h + a.bottom) - top) * (min(left + a.kw, a.w + a.right) - left);
  if (EVEN) {
    y0 = row * a.h / a.rows, y1 = ((row + 1) * a.h + a.rows - 1) / a.rows;
    x0 = column * a.w / a.columns, x1 = ((column + 1) * a.w + a.columns - 1) / a.columns;
    of = (y1 - y0) * (x1 - x0);
  }
  device const float *picture = x + (long)(place / a.columns / a.rows) * a.h * a.w * a.c + c;
  float found = MEAN ? 0.0f : -INFINITY;
  for (int y = y0; y < y1; y++)
    for (int i = x0; i < x1; i++) {
      const float v = picture[((long)y * a.w + i) * a.c];
      if (MEAN) found = found + v;
      else found = found > v || isnan(found) ? found : v;  /* NaN is the largest, as in NumPy */
    }
  out[at] = MEAN ? found / (float)of : found;
}

struct resize_args { int n, h, w, c, rows, columns, kind, corners, antialias; };

static inline pe_axis axis_of(constant resize_args &a, int size, int to) {
  pe_axis y;
  y.size = size, y.to = to, y.kind = a.kind, y.corners = a.corners, y.antialias = a.antialias;
  return y;
}

static inline float total_of(pe_axis a, int i, pe_range r) {
  float sum = 0.0f;
  for (int j = r.first; j < r.first + r.count; j++) sum = sum + pe_tap_weight(a, i, j);
  return a.antialias ? sum : 1.0f;
}

kernel void resize_pixels(constant resize_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                          uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.n) return;
  const int place = (int)at / a.c, column = place % a.columns, row = place / a.columns % a.rows;
  const pe_axis down = axis_of(a, a.h, a.rows), across = axis_of(a, a.w, a.columns);
  const pe_range ys = pe_taps_of(down, row), xs = pe_taps_of(across, column);
  const float of_y = total_of(down, row, ys), of_x = total_of(across, column, xs);
  device const float *picture = x + (long)(place / a.columns / a.rows) * a.h * a.w * a.c + (int)at % a.c;
  float found = 0.0f;
  for (int i = 0; i < xs.count; i++) {
    const int from = max(0, min(a.w - 1, xs.first + i));
    float sum = 0.0f;
    for (int j = 0; j < ys.count; j++) {
      const float w = pe_tap_weight(down, row, ys.first + j) / of_y;
      const float v = picture[((long)max(0, min(a.h - 1, ys.first + j)) * a.w + from) * a.c];
      sum = j ? fma(v, w, sum) : v * w;
    }
    const float w = pe_tap_weight(across, column, xs.first + i) / of_x;
    found = i ? fma(sum, w, found) : sum * w;
  }
  out[at] = found;
}

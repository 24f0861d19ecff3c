/* pooling.cu: pool2d, adaptive_pool2d, resize2d: windows of pixels to one, channel by channel.
 * Reference: pyengine/ops/pooling.py: pool2d, adaptive_pool2d, resize2d.
 *
 * A thread owns one number of the result and what lies THREADS x blocks further; neighbouring threads have neighbouring channels, so that
 * pixels are read in runs. Nothing is shared. 4 bytes of memory a number read and written; what windows share comes from L1 and L2. Resizing
 * works out a pixel's weights in each thread: about ten operations a tap, which are few beside what is waited for.
 * Operations are those of csrc/cpu/pooling.c in their order.
 */
#include "cuda.h"
#include "strides.h"

#define PE_TAPS static __device__ __forceinline__
#include "../taps.h"

namespace {

using namespace pe;

enum { THREADS = 256, MOST_BLOCKS = 65535, RESIZE_BLOCKS = 4 }; /* the last of a multiprocessor: 64 registers a thread */

/* The picture, the result, and how windows stand: `even` divides the picture, else they are strided. */
struct Pool {
  const float *x;
  float *out;
  int64_t n, h, w, c, rows, columns;
  int64_t kh, kw, sy, sx, top, bottom, left, right;
  bool mean, even, count_padding;
};

Pool pool_of(const pe_tensor *x, const pe_tensor *out) {
  Pool t = {};
  t.x = static_cast<const float *>(x->data), t.out = static_cast<float *>(out->data);
  t.n = x->shape[0], t.h = x->shape[1], t.w = x->shape[2], t.c = x->shape[3], t.rows = out->shape[1], t.columns = out->shape[2];
  return t;
}

__global__ void __launch_bounds__(THREADS) pool_kernel(Pool t, int64_t count) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
    const int64_t c = i % t.c, place = i / t.c, column = place % t.columns, row = place / t.columns % t.rows;
    const int64_t y = row * t.sy - t.top, x = column * t.sx - t.left;
    int64_t y0 = max((int64_t)0, y), y1 = min(t.h, y + t.kh), x0 = max((int64_t)0, x), x1 = min(t.w, x + t.kw), of = (y1 - y0) * (x1 - x0);
    if (t.count_padding) of = (min(y + t.kh, t.h + t.bottom) - y) * (min(x + t.kw, t.w + t.right) - x);
    if (t.even) {
      y0 = row * t.h / t.rows, y1 = ((row + 1) * t.h + t.rows - 1) / t.rows;
      x0 = column * t.w / t.columns, x1 = ((column + 1) * t.w + t.columns - 1) / t.columns;
      of = (y1 - y0) * (x1 - x0);
    }
    const float *picture = t.x + place / t.columns / t.rows * t.h * t.w * t.c + c;
    float found = t.mean ? 0.0f : -INFINITY;
    for (int64_t a = y0; a < y1; a++)
      for (int64_t b = x0; b < x1; b++) {
        const float v = picture[(a * t.w + b) * t.c];
        if (t.mean) found = found + v;
        else found = found > v || found != found ? found : v; /* NaN is the largest */
      }
    t.out[i] = t.mean ? found / (float)of : found;
  }
}

struct Resize {
  const float *x;
  float *out;
  int64_t c;
  pe_axis down, across;
};

__device__ __forceinline__ float total_of(pe_axis a, int i, pe_range r) {
  float sum = 0.0f;
  for (int j = r.first; j < r.first + r.count; j++) sum = sum + pe_tap_weight(a, i, j);
  return a.antialias ? sum : 1.0f;
}

__global__ void __launch_bounds__(THREADS, RESIZE_BLOCKS) resize_kernel(Resize t, int64_t count) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
    const int64_t place = i / t.c, line = place / t.across.to, image = line / t.down.to;
    const int column = (int)(place - line * t.across.to), row = (int)(line - image * t.down.to);
    const float *picture = t.x + image * t.down.size * t.across.size * t.c + (i - place * t.c);
    const int64_t pitch = t.across.size * t.c;
    const pe_range y = pe_taps_of(t.down, row), x = pe_taps_of(t.across, column);
    const float of_y = total_of(t.down, row, y), of_x = total_of(t.across, column, x);
    float found = 0.0f;
    for (int b = 0; b < x.count; b++) {
      const float *pixels = picture + max(0, min(t.across.size - 1, x.first + b)) * t.c;
      float sum = 0.0f;
      for (int a = 0; a < y.count; a++) {
        const float w = pe_tap_weight(t.down, row, y.first + a) / of_y, v = pixels[max(0, min(t.down.size - 1, y.first + a)) * pitch];
        sum = a ? fmaf(v, w, sum) : v * w;
      }
      const float w = pe_tap_weight(t.across, column, x.first + b) / of_x;
      found = b ? fmaf(sum, w, found) : sum * w;
    }
    t.out[i] = found;
  }
}

template <class T>
pe_status start(void (*kernel)(T, int64_t), const T &t, const pe_tensor *out, pe_stream *s) {
  const int64_t n = count_elements(out), blocks = (n + THREADS - 1) / THREADS;
  if (n) launch(stream(s), kernel, dim3(static_cast<unsigned>(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS)), dim3(THREADS), 0, t, n);
  return PE_OK;
}

} // namespace

PE_KERNEL(cuda, pool2d)(const pe_tensor *x, const pe_tensor *out, const pe_pool2d_params *p, pe_stream *s) {
  Pool t = pool_of(x, out);
  const int four = p->n_padding == 4;
  t.kh = p->kernel[0], t.kw = p->kernel[p->n_kernel - 1], t.sy = p->stride[0], t.sx = p->stride[p->n_stride - 1];
  t.top = p->padding[0], t.bottom = p->padding[four], t.left = p->padding[four ? 2 : p->n_padding - 1], t.right = p->padding[p->n_padding - 1];
  t.mean = p->kind == PE_POOL2D_KIND_MEAN, t.count_padding = p->count_padding;
  return start(pool_kernel, t, out, s);
}

PE_KERNEL(cuda, adaptive_pool2d)(const pe_tensor *x, const pe_tensor *out, const pe_adaptive_pool2d_params *p, pe_stream *s) {
  Pool t = pool_of(x, out);
  t.mean = p->kind == PE_ADAPTIVE_POOL2D_KIND_MEAN, t.even = true;
  return start(pool_kernel, t, out, s);
}

PE_KERNEL(cuda, resize2d)(const pe_tensor *x, const pe_tensor *out, const pe_resize2d_params *p, pe_stream *s) {
  auto axis = [&](int i) { return pe_axis{(int)x->shape[i], (int)out->shape[i], p->kind, p->align_corners, p->antialias}; };
  const Resize t = {static_cast<const float *>(x->data), static_cast<float *>(out->data), x->shape[3], axis(1), axis(2)};
  return start(resize_kernel, t, out, s);
}

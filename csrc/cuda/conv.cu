/* conv.cu: conv2d: the window around each place of a picture times a weight.
 * Reference: pyengine/ops/convolution.py: conv2d.
 *
 * gather_kernel  A thread owns one number of a window's row and what lies THREADS x blocks further; windows of up to GATHER_BYTES are
 *                copied into scratch at a time, and linear's kernels multiply them. 8 k bytes a window, most of them from and to L2, for 2 k o
 *                operations: of few outputs bound by memory, else by the product.
 * direct_kernel  A thread owns one output, whose group is smaller than a product's 16 rows (by channel: one). Neighbouring threads have
 *                neighbouring outputs of a place, so that pixels and weights are read in runs. 2 k operations; bound by L1.
 * Neither has shared memory. Sums ascend with y, x and channel; a product's are linear's. Pixels beyond the picture are zeros, or left out.
 */
#include "linear.h"
#include "strides.h"

namespace {

using namespace pe;

enum { THREADS = 256, MOST_BLOCKS = 65535, GATHER_BYTES = 32 << 20 };

struct Conv {
  const float *x, *bias;
  float *out;
  int64_t n, height, width, c, rows, columns, o;
  int64_t kh, kw, sy, sx, top, left, dy, dx, groups, cg, og, k;
  int activation;
};

Conv conv_of(const pe_tensor *x, const pe_tensor *out, const pe_conv2d_params *p) {
  Conv t = {};
  t.x = static_cast<const float *>(x->data), t.out = static_cast<float *>(out->data);
  t.n = x->shape[0], t.height = x->shape[1], t.width = x->shape[2], t.c = x->shape[3];
  t.rows = out->shape[1], t.columns = out->shape[2], t.o = out->shape[3];
  t.kh = p->kernel[0], t.kw = p->kernel[p->n_kernel - 1], t.sy = p->stride[0], t.sx = p->stride[p->n_stride - 1];
  t.top = p->padding[0], t.left = p->padding[p->n_padding == 4 ? 2 : p->n_padding - 1];
  t.dy = p->dilation[0], t.dx = p->dilation[p->n_dilation - 1];
  t.groups = p->groups, t.cg = t.c / t.groups, t.og = t.o / t.groups, t.k = t.kh * t.kw * t.cg, t.activation = p->activation;
  return t;
}

/* Whether linear's kernels multiply: rows of the weight that are a group's lie by themselves. */
bool is_product(const Conv &t, const pe_tensor *w) { return t.groups == 1 || t.og % 16 == 0 || pe_format_of(format_of(w)).elements > 1; }

/* Windows that are gathered at a time. */
int64_t rows_together(const Conv &t) {
  const int64_t m = t.n * t.rows * t.columns, most = GATHER_BYTES / (4 * (t.k > 0 ? t.k : 1)) / 128 * 128;
  return m < most ? m : most > 128 ? most : 128;
}

__global__ void __launch_bounds__(THREADS) gather_kernel(const Conv t, int64_t group, int64_t row0, int64_t count, float *to) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count * t.k; i += step) {
    const int64_t place = row0 + i / t.k, tap = i % t.k / t.cg, c = i % t.cg;
    const int64_t y = place / t.columns % t.rows * t.sy - t.top + tap / t.kw * t.dy, x = place % t.columns * t.sx - t.left + tap % t.kw * t.dx;
    const bool inside = y >= 0 && y < t.height && x >= 0 && x < t.width;
    to[i] = inside ? t.x[((place / t.columns / t.rows * t.height + y) * t.width + x) * t.c + group * t.cg + c] : 0.0f;
  }
}

/* A weight of floats: groups of 16 rows interleaved, or row after row. */
struct Weight {
  const uint8_t *data;
  int64_t group_bytes;
  int format, size;
  bool packed;

  __device__ __forceinline__ float at(int64_t row, int64_t k) const {
    const uint8_t *p = packed ? data + row / 16 * group_bytes + (16 * k + row % 16) * size : data + row * group_bytes + k * size;
    if (format == PE_F32) return *reinterpret_cast<const float *>(p);
    const uint16_t bits = *reinterpret_cast<const uint16_t *>(p);
    return format == PE_F16 ? unpack_half2(bits).x : unpack_bf162(bits).x;
  }
};

__global__ void __launch_bounds__(THREADS) direct_kernel(const Conv t, const Weight w, int64_t count) {
  const int64_t step = (int64_t)gridDim.x * THREADS;
  for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
    const int64_t place = i / t.o, line = place / t.columns, picture = line / t.rows;
    const int o = static_cast<int>(i - place * t.o), y0 = static_cast<int>((line - picture * t.rows) * t.sy - t.top);
    const int x0 = static_cast<int>((place - line * t.columns) * t.sx - t.left), c0 = o / static_cast<int>(t.og) * static_cast<int>(t.cg);
    const int kh = static_cast<int>(t.kh), kw = static_cast<int>(t.kw), cg = static_cast<int>(t.cg);
    float sum = 0.0f;
    for (int ky = 0, k = 0; ky < kh; ky++)
      for (int kx = 0; kx < kw; kx++, k += cg) {
        const int y = y0 + ky * static_cast<int>(t.dy), x = x0 + kx * static_cast<int>(t.dx);
        if (y < 0 || y >= t.height || x < 0 || x >= t.width) continue;
        const float *pixel = t.x + ((picture * t.height + y) * t.width + x) * t.c + c0;
        for (int c = 0; c < cg; c++) sum = fmaf(pixel[c], w.at(o, k + c), sum);
      }
    t.out[i] = glu_of(t.activation, t.bias ? sum + t.bias[o] : sum);
  }
}

unsigned blocks_of(int64_t n) {
  const int64_t blocks = (n + THREADS - 1) / THREADS;
  return static_cast<unsigned>(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS);
}

pe_tensor matrix(void *data, int32_t dtype, int64_t rows, int64_t columns, int64_t stride, int64_t element) {
  pe_tensor t = {};
  t.data = data, t.dtype = dtype, t.ndim = 2;
  t.shape[0] = rows, t.shape[1] = columns, t.stride[0] = stride, t.stride[1] = element;
  return t;
}

/* The rows of a weight that are one group's. */
pe_tensor rows_of_group(const Conv &t, const pe_tensor *w, const pe_tensor *out, int64_t group) {
  const int64_t bytes = matrix_of(w, nullptr, out).group_bytes, first = group * t.og;
  pe_tensor part = *w;
  part.data = static_cast<char *>(w->data) + (w->dtype >= PE_PACKED ? first / 16 : first) * bytes;
  part.shape[0] = t.og;
  return part;
}

int64_t patch_bytes(const Conv &t) { return round_up(4 * rows_together(t) * t.k, 256); }

pe_status multiply_windows(const Conv &t, const pe_tensor *w, const pe_tensor *bias, const pe_tensor *out, pe_stream *s) {
  const int64_t m = t.n * t.rows * t.columns, most = rows_together(t), room = patch_bytes(t);
  pe_stream rest = *s; /* linear's part of scratch */
  rest.scratch += room, rest.scratch_bytes -= room;
  pe_linear_params plain = {};
  for (int64_t group = 0; group < t.groups; group++) {
    const pe_tensor part = rows_of_group(t, w, out, group);
    pe_tensor own_bias = {};
    if (bias) own_bias = *bias, own_bias.data = static_cast<float *>(bias->data) + group * t.og, own_bias.shape[0] = t.og;
    for (int64_t row = 0; row < m; row += most) {
      const int64_t count = m - row < most ? m - row : most;
      launch(stream(s), gather_kernel, dim3(blocks_of(count * t.k)), dim3(THREADS), 0, t, group, row, count, (float *)s->scratch);
      const pe_tensor x = matrix(s->scratch, PE_F32, count, t.k, 4 * t.k, 4);
      const pe_tensor y = matrix(t.out + row * t.o + group * t.og, PE_F32, count, t.og, 4 * t.o, 4);
      const pe_tensor *weights[] = {&part}, *biases[] = {&own_bias}, *results[] = {&y};
      const pe_status bad = PE_NAME(linear)(&x, weights, 1, biases, bias ? 1 : 0, nullptr, nullptr, results, 1, &plain, &rest);
      if (bad) return bad;
    }
  }
  if (t.activation == PE_CONV2D_ACTIVATION_NONE) return PE_OK;
  pe_unary_params kind = {};
  kind.kind = t.activation;
  return PE_NAME(unary)(out, out, &kind, s);
}

#define SAME(name) ((int)PE_CONV2D_ACTIVATION_##name == (int)PE_LINEAR_GLU_##name && (int)PE_CONV2D_ACTIVATION_##name == (int)PE_UNARY_KIND_##name)
static_assert(SAME(NONE) && SAME(SILU) && SAME(GELU_TANH) && SAME(GELU) && SAME(RELU), "activations have the numbers of linear's and unary's");
#undef SAME

} // namespace

PE_SCRATCH(cuda, conv2d)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)n_threads;
  const pe_tensor *w = pe_arg(a, 1);
  const Conv t = conv_of(pe_arg(a, 0), pe_arg(a, 3), static_cast<const pe_conv2d_params *>(params));
  if (!is_product(t, w)) return 0;
  return patch_bytes(t) + places_of(&w, 1, round_up(rows_together(t), TILE_ROWS), t.k).bytes;
}

PE_KERNEL(cuda, conv2d)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *bias, const pe_tensor *out, const pe_conv2d_params *p,
                        pe_stream *s) {
  Conv t = conv_of(x, out, p);
  const int64_t n = count_elements(out);
  if (n == 0) return PE_OK;
  if (is_product(t, weight)) return multiply_windows(t, weight, bias, out, s);
  t.bias = bias ? static_cast<const float *>(bias->data) : nullptr;
  const int32_t format = format_of(weight);
  const Weight w = {static_cast<const uint8_t *>(weight->data), matrix_of(weight, nullptr, out).group_bytes, format, pe_format_of(format).bytes,
                    weight->dtype >= PE_PACKED};
  launch(stream(s), direct_kernel, dim3(blocks_of(n)), dim3(THREADS), 0, t, w, n);
  return PE_OK;
}

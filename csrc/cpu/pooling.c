/* pooling.c: pool2d, adaptive_pool2d, resize2d: windows of pixels to one, channel by channel.
 * Reference: pyengine/ops/pooling.py: pool2d, adaptive_pool2d, resize2d.
 *
 * Pooling.   A thread claims runs of results, each a pixel's 256 channels; 16 channels at a time walk over their window, rows first. A pixel is
 *            read as often as windows hold it, from caches; memory is read and written once: 4 bytes a pixel and 4 a result, bound by that.
 * Resizing.  A thread claims rows of the result: the picture's rows that make it become one row (in scratch, [width][c]), whose pixels make
 *            those of the result. 2 (taps w + taps ow) c operations a row, and 4 bytes read from a cache for each of the first.
 * Sums ascend with the pixels. A result depends on its own window only.
 */
#include "../taps.h"
#include "codes.h"
#include "vec.h"

enum { CHANNELS = 256, RUN = 16384 /* numbers read that are worth claiming */ };

/* ---- pooling ---- */

typedef struct pool { const float *x; float *out; int64_t n, h, w, c, rows, columns; int mean; } pool;

/* Pixels y0 .. y1 - 1 by x0 .. x1 - 1; a mean is of `count`. */
typedef struct pool_window { int64_t y0, y1, x0, x1; float count; } pool_window;

static pool pool_of(const pe_tensor *x, const pe_tensor *out, int mean) {
  return (pool){x->data, out->data, x->shape[0], x->shape[1], x->shape[2], x->shape[3], out->shape[1], out->shape[2], mean};
}

/* Channels c0 .. c1 - 1 of a window of picture i. A NaN is the largest, as in NumPy. */
static void pool_pixels(const pool *t, int64_t i, pool_window a, int64_t c0, int64_t c1, float *to) {
  for (int64_t c = c0; c < c1; c += 16) {
    v16f y = v16f_set1(t->mean ? 0.0f : -__builtin_inff());
    v16i bits = v16i_zero(); /* of the largest magnitude: beyond those of infinity where one is NaN */
    for (int64_t row = a.y0; row < a.y1; row++)
      for (int64_t column = a.x0; column < a.x1; column++) {
        const v16f v = load_some(t->x + ((i * t->h + row) * t->w + column) * t->c + c, c1 - c);
        if (t->mean) {
          y = v16f_add(y, v);
        } else {
          y = v16f_max(v, y);
          bits = v16i_max(bits, magnitude(v));
        }
      }
    if (t->mean) y = v16f_div(y, v16f_set1(a.count));
    else y = v16i_as_f(v16i_or(v16f_bits(y), v16i_shr(v16i_sub(v16i_set1(0x7f800000), bits), 31)));
    store_some(to + c, y, c1 - c);
  }
}

/* All results; window_of says which pixels make one. */
typedef pool_window window_fn(const pool *t, const void *how, int64_t row, int64_t column);
static void pool_all(const pool *t, window_fn *window_of, const void *how, pe_stream *s) {
  const int64_t parts = (t->c + CHANNELS - 1) / CHANNELS, n = t->n * t->rows * t->columns * parts;
  const int64_t each = pe_max(1, t->h * t->w / pe_max(1, t->rows * t->columns)) * pe_min(t->c, CHANNELS), run = pe_max(1, RUN / pe_max(1, each));
  for (int64_t from; (from = run * pe_next(s, 0)) < n;)
    for (int64_t item = from; item < pe_min(n, from + run); item++) {
      const int64_t place = item / parts, column = place % t->columns, row = place / t->columns % t->rows;
      const int64_t c0 = item % parts * CHANNELS;
      pool_pixels(t, place / t->columns / t->rows, window_of(t, how, row, column), c0, pe_min(t->c, c0 + CHANNELS), t->out + place * t->c);
    }
}

static pool_window strided_window(const pool *t, const void *how, int64_t row, int64_t column) {
  const pe_pool2d_params *p = how;
  const int64_t kh = p->kernel[0], kw = p->kernel[p->n_kernel - 1], four = p->n_padding == 4;
  const int64_t top = p->padding[0], bottom = p->padding[four], left = p->padding[four ? 2 : p->n_padding - 1];
  const int64_t right = p->padding[p->n_padding - 1];
  const int64_t y = row * p->stride[0] - top, x = column * p->stride[p->n_stride - 1] - left;
  pool_window a = {pe_max(0, y), pe_min(t->h, y + kh), pe_max(0, x), pe_min(t->w, x + kw), 0.0f};
  a.count = (float)(p->count_padding ? (pe_min(y + kh, t->h + bottom) - y) * (pe_min(x + kw, t->w + right) - x) : (a.y1 - a.y0) * (a.x1 - a.x0));
  return a;
}

static pool_window even_window(const pool *t, const void *how, int64_t row, int64_t column) {
  (void)how;
  pool_window a = {row * t->h / t->rows, ((row + 1) * t->h + t->rows - 1) / t->rows, column * t->w / t->columns,
                   ((column + 1) * t->w + t->columns - 1) / t->columns, 0.0f};
  a.count = (float)((a.y1 - a.y0) * (a.x1 - a.x0));
  return a;
}

PE_KERNEL(cpu, pool2d)(const pe_tensor *x, const pe_tensor *out, const pe_pool2d_params *p, pe_stream *s) {
  const pool t = pool_of(x, out, p->kind == PE_POOL2D_KIND_MEAN);
  pool_all(&t, strided_window, p, s);
  return PE_OK;
}

PE_KERNEL(cpu, adaptive_pool2d)(const pe_tensor *x, const pe_tensor *out, const pe_adaptive_pool2d_params *p, pe_stream *s) {
  const pool t = pool_of(x, out, p->kind == PE_ADAPTIVE_POOL2D_KIND_MEAN);
  pool_all(&t, even_window, p, s);
  return PE_OK;
}

/* ---- resizing ---- */

_Static_assert(PE_RESIZE2D_KIND_NEAREST == 0 && PE_RESIZE2D_KIND_BILINEAR == 1 && PE_RESIZE2D_KIND_BICUBIC == 2, "kinds of taps.h");

static pe_axis axis_of(int64_t size, int64_t to, const pe_resize2d_params *p) {
  return (pe_axis){(int)size, (int)to, p->kind, p->align_corners, p->antialias};
}

/* What the weights of a pixel are divided by. */
static float total_of(pe_axis a, int i, pe_range r) {
  float sum = 0.0f;
  for (int j = r.first; j < r.first + r.count; j++) sum += pe_tap_weight(a, i, j);
  return a.antialias ? sum : 1.0f;
}

PE_SCRATCH(cpu, resize2d)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  const pe_tensor *x = pe_arg(a, 0);
  return n_threads * pe_round_up(4 * x->shape[2] * x->shape[3], 64);
}

/* to[i] += w * from[i], or = where it is the first. */
PE_INLINE void add_row(float *to, const float *from, float w, int64_t n, int first) {
  const v16f f = v16f_set1(w);
  for (int64_t i = 0; i < n; i += 16) {
    const v16f v = load_some(from + i, n - i);
    store_some(to + i, first ? v16f_mul(v, f) : v16f_fma(v, f, load_some(to + i, n - i)), n - i);
  }
}

/* A pixel of the result from those of a row [width][c]. */
static void resize_pixel(const float *row, int64_t c, pe_axis a, int i, float *to) {
  const pe_range r = pe_taps_of(a, i);
  const float total = total_of(a, i, r);
  for (int j = 0; j < r.count; j++) {
    const int64_t at = pe_max(0, pe_min(a.size - 1, r.first + j));
    add_row(to, row + at * c, pe_tap_weight(a, i, r.first + j) / total, c, j == 0);
  }
}

PE_KERNEL(cpu, resize2d)(const pe_tensor *x, const pe_tensor *out, const pe_resize2d_params *p, pe_stream *s) {
  const int64_t h = x->shape[1], w = x->shape[2], c = x->shape[3], rows = out->shape[1], columns = out->shape[2];
  const pe_axis down = axis_of(h, rows, p), across = axis_of(w, columns, p);
  const int64_t own = pe_round_up(4 * w * c, 64);
  if (s->scratch_bytes < s->nth * own) return pe_fail(s, PE_NO_MEMORY, "resize2d: scratch is too small");
  float *line = (float *)(s->scratch + s->ith * own);
  for (int64_t item; (item = pe_next(s, 0)) < x->shape[0] * rows;) {
    const float *picture = (const float *)x->data + item / rows * h * w * c;
    const int i = (int)(item % rows);
    const pe_range r = pe_taps_of(down, i);
    const float total = total_of(down, i, r);
    for (int j = 0; j < r.count; j++)
      add_row(line, picture + pe_max(0, pe_min(h - 1, r.first + j)) * w * c, pe_tap_weight(down, i, r.first + j) / total, w * c, j == 0);
    for (int column = 0; column < columns; column++)
      resize_pixel(line, c, across, column, (float *)out->data + (item * columns + column) * c);
  }
  return PE_OK;
}

/* elementwise.c: binary, unary, scale, softcap, contiguous, concat.
 * Reference: pyengine/ops/elementwise.py: binary, unary, scale, softcap; pyengine/ops/layout.py: contiguous, concat.
 *
 * A thread claims chunks of CHUNK elements; one result element depends on its own operands only. Memory-bound: each kernel
 * reads its operands and writes out once. Only binary and contiguous take strides: their axes are first merged where all
 * operands run through memory without a gap, so that the inner loop is as long as it can be.
 */
#include <math.h>

#include "vec.h"

enum { CHUNK = 16384 };

static int64_t count_elements(const pe_tensor *x) {
  int64_t n = 1;
  for (int i = 0; i < x->ndim; i++) n *= x->shape[i];
  return n;
}

/* ---- strided operands ---- */

/* Axes of the result, merged; strides in elements of 4 bytes, 0 where an operand is broadcast. The last axis is the inner loop. */
typedef struct walk {
  int ndim;
  int64_t shape[PE_MAX_DIMS], x[PE_MAX_DIMS], y[PE_MAX_DIMS];
  int64_t rows, inner; /* product of the other axes, and the last one */
} walk;

/* Stride of `t` along axis i of `out`, axes aligned at the end. */
static int64_t stride_of(const pe_tensor *t, const pe_tensor *out, int i) {
  int axis = i - (out->ndim - t->ndim);
  return axis < 0 || t->shape[axis] == 1 ? 0 : t->stride[axis] / 4;
}

static walk make_walk(const pe_tensor *x, const pe_tensor *y, const pe_tensor *out) {
  walk w = {.ndim = 0, .rows = 1, .inner = 1};
  for (int i = 0; i < out->ndim; i++) {
    int64_t n = out->shape[i], sx = stride_of(x, out, i), sy = y ? stride_of(y, out, i) : 0;
    if (n == 1) continue;
    int last = w.ndim - 1;
    if (last >= 0 && w.x[last] == n * sx && w.y[last] == n * sy) { /* the outer axis steps over exactly one inner run */
      w.shape[last] *= n;
      w.x[last] = sx;
      w.y[last] = sy;
    } else {
      w.shape[w.ndim] = n;
      w.x[w.ndim] = sx;
      w.y[w.ndim++] = sy;
    }
  }
  if (w.ndim == 0) w = (walk){.ndim = 1, .shape = {1}, .x = {1}, .y = {1}, .rows = 1};
  w.inner = w.shape[w.ndim - 1];
  for (int i = 0; i + 1 < w.ndim; i++) w.rows *= w.shape[i];
  return w;
}

/* Element offsets of row `i` in x and y. */
static void row_start(const walk *w, int64_t i, int64_t *x, int64_t *y) {
  *x = *y = 0;
  for (int a = w->ndim - 2; a >= 0; a--) {
    int64_t at = i % w->shape[a];
    i /= w->shape[a];
    *x += at * w->x[a];
    *y += at * w->y[a];
  }
}

/* A chunk is a run of whole rows, or a piece of one. */
typedef struct span { int64_t row, n_rows, start, n; } span;

static int next_span(const walk *w, pe_stream *s, span *out) {
  int64_t pieces = (w->inner + CHUNK - 1) / CHUNK, step = pieces > 1 ? 1 : pe_max(1, CHUNK / pe_max(1, w->inner));
  int64_t i = pe_next(s, 0);
  if (pieces == 0 || i / pieces * step >= w->rows) return 0;
  out->row = i / pieces * step;
  out->n_rows = pe_min(step, w->rows - out->row);
  out->start = i % pieces * CHUNK;
  out->n = pe_min(CHUNK, w->inner - out->start);
  return 1;
}

/* Elements 0 .. n-1 (at most 16) of an operand with any stride. */
PE_INLINE v16f gather(const float *p, int64_t stride, int64_t n) {
  float t[16] = {0};
  if (stride == 1) return load_some(p, n);
  if (stride == 0) return v16f_set1(*p);
  for (int64_t i = 0; i < pe_min(n, 16); i++) t[i] = p[i * stride];
  return v16f_load(t);
}

/* ---- binary ---- */

/* v16f_max and v16f_min give their second operand when either is NaN. Both orders agree on numbers, so the union of their bits
 * is the result, and a NaN wherever there was one, as in NumPy. */
PE_INLINE v16f both(v16f a, v16f b) { return v16i_as_f(v16i_or(v16f_bits(a), v16f_bits(b))); }

PE_INLINE v16f combine(const int kind, v16f a, v16f b) {
  switch (kind) {
    case PE_BINARY_KIND_ADD: return v16f_add(a, b);
    case PE_BINARY_KIND_SUB: return v16f_sub(a, b);
    case PE_BINARY_KIND_MUL: return v16f_mul(a, b);
    case PE_BINARY_KIND_DIV: return v16f_div(a, b);
    case PE_BINARY_KIND_MAX: return both(v16f_max(a, b), v16f_max(b, a));
    default: return both(v16f_min(a, b), v16f_min(b, a));
  }
}

PE_INLINE void combine_all(const int kind, const walk *w, const float *x, const float *y, float *out, pe_stream *s) {
  const int64_t sx = w->x[w->ndim - 1], sy = w->y[w->ndim - 1];
  for (span c; next_span(w, s, &c);)
    for (int64_t r = c.row; r < c.row + c.n_rows; r++) {
      int64_t ax, ay;
      row_start(w, r, &ax, &ay);
      const float *a = x + ax + c.start * sx, *b = y + ay + c.start * sy;
      float *o = out + r * w->inner + c.start;
      int64_t i = 0;
      if (sx == 1 && sy == 1)
        for (; i + 16 <= c.n; i += 16) v16f_store(o + i, combine(kind, v16f_load(a + i), v16f_load(b + i)));
      for (; i < c.n; i += 16)
        store_some(o + i, combine(kind, gather(a + i * sx, sx, c.n - i), gather(b + i * sy, sy, c.n - i)), c.n - i);
    }
}

PE_KERNEL(cpu, binary)(const pe_tensor *x, const pe_tensor *y, const pe_tensor *out, const pe_binary_params *p, pe_stream *s) {
  const walk w = make_walk(x, y, out);
  const float *a = x->data, *b = y->data;
  float *o = out->data;
  switch (p->kind) {
    case PE_BINARY_KIND_ADD: combine_all(PE_BINARY_KIND_ADD, &w, a, b, o, s); break;
    case PE_BINARY_KIND_SUB: combine_all(PE_BINARY_KIND_SUB, &w, a, b, o, s); break;
    case PE_BINARY_KIND_MUL: combine_all(PE_BINARY_KIND_MUL, &w, a, b, o, s); break;
    case PE_BINARY_KIND_DIV: combine_all(PE_BINARY_KIND_DIV, &w, a, b, o, s); break;
    case PE_BINARY_KIND_MAX: combine_all(PE_BINARY_KIND_MAX, &w, a, b, o, s); break;
    case PE_BINARY_KIND_MIN: combine_all(PE_BINARY_KIND_MIN, &w, a, b, o, s); break;
    default: return pe_fail(s, PE_BAD_VALUE, "binary: kind %d is not known", p->kind);
  }
  return PE_OK;
}

PE_KERNEL(cpu, contiguous)(const pe_tensor *x, const pe_tensor *out, const pe_contiguous_params *p, pe_stream *s) {
  (void)p;
  const walk w = make_walk(x, 0, out);
  const int64_t sx = w.x[w.ndim - 1];
  for (span c; next_span(&w, s, &c);)
    for (int64_t r = c.row; r < c.row + c.n_rows; r++) {
      int64_t ax, ay;
      row_start(&w, r, &ax, &ay);
      const float *a = (const float *)x->data + ax + c.start * sx;
      float *o = (float *)out->data + r * w.inner + c.start;
      if (sx == 1) memcpy(o, a, (size_t)c.n * 4);
      else for (int64_t i = 0; i < c.n; i++) o[i] = a[i * sx];
    }
  return PE_OK;
}

/* ---- one operand ---- */

/* out[i] = expression of v for every element v of x; all variables of the expression are the caller's. */
#define PE_FOR_EACH(expression)                                                                                        \
  do {                                                                                                                 \
    const int64_t n_ = count_elements(x);                                                                              \
    const float *x_ = x->data;                                                                                         \
    float *o_ = out->data;                                                                                             \
    for (int64_t i0; (i0 = pe_next(s, 0) * CHUNK) < n_;) {                                                             \
      const int64_t i1 = pe_min(n_, i0 + CHUNK);                                                                       \
      for (int64_t i = i0; i < i1; i += 16) {                                                                          \
        v16f v = load_some(x_ + i, i1 - i);                                                                            \
        store_some(o_ + i, expression, i1 - i);                                                                        \
      }                                                                                                                \
    }                                                                                                                  \
  } while (0)

static v16f log_lanes(v16f v) { /* no model takes logarithms of much: libm's */
  float t[16];
  v16f_store(t, v);
  for (int i = 0; i < 16; i++) t[i] = logf(t[i]);
  return v16f_load(t);
}
PE_INLINE v16f relu(v16f v) { return v16f_max(v16f_zero(), v); } /* in this order NaN stays NaN */
/* log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|, as log(u) y / (u - 1) for u = 1 + y as it is rounded (Kahan): no digits of a small y
 * are lost. */
static v16f softplus_lanes(v16f v) {
  float t[16];
  v16f_store(t, v16f_exp(v16f_neg(v16f_abs(v))));
  for (int i = 0; i < 16; i++) {
    const float u = 1.0f + t[i];
    if (u != 1.0f) t[i] = logf(u) * (t[i] / (u - 1.0f));
  }
  return v16f_add(relu(v), v16f_load(t));
}

PE_KERNEL(cpu, unary)(const pe_tensor *x, const pe_tensor *out, const pe_unary_params *p, pe_stream *s) {
  switch (p->kind) {
    case PE_UNARY_KIND_NONE: PE_FOR_EACH(v); break;
    case PE_UNARY_KIND_SILU: PE_FOR_EACH(v16f_silu(v)); break;
    case PE_UNARY_KIND_GELU_TANH: PE_FOR_EACH(v16f_gelu_tanh(v)); break;
    case PE_UNARY_KIND_GELU: PE_FOR_EACH(v16f_gelu_erf(v)); break;
    case PE_UNARY_KIND_RELU: PE_FOR_EACH(relu(v)); break;
    case PE_UNARY_KIND_QUICK_GELU: PE_FOR_EACH(v16f_gelu_quick(v)); break;
    case PE_UNARY_KIND_RELU2: PE_FOR_EACH(v16f_mul(relu(v), relu(v))); break;
    case PE_UNARY_KIND_SIGMOID: PE_FOR_EACH(v16f_sigmoid(v)); break;
    case PE_UNARY_KIND_TANH: PE_FOR_EACH(v16f_tanh(v)); break;
    case PE_UNARY_KIND_EXP: PE_FOR_EACH(v16f_exp(v)); break;
    case PE_UNARY_KIND_LOG: PE_FOR_EACH(log_lanes(v)); break;
    case PE_UNARY_KIND_SQRT: PE_FOR_EACH(v16f_sqrt(v)); break;
    case PE_UNARY_KIND_NEG: PE_FOR_EACH(v16f_neg(v)); break;
    case PE_UNARY_KIND_SQUARE: PE_FOR_EACH(v16f_mul(v, v)); break;
    case PE_UNARY_KIND_SOFTPLUS: PE_FOR_EACH(softplus_lanes(v)); break;
    default: return pe_fail(s, PE_BAD_VALUE, "unary: kind %d is not known", p->kind);
  }
  return PE_OK;
}

PE_KERNEL(cpu, scale)(const pe_tensor *x, const pe_tensor *out, const pe_scale_params *p, pe_stream *s) {
  const v16f factor = v16f_set1(p->factor), offset = v16f_set1(p->offset);
  PE_FOR_EACH(v16f_add(v16f_mul(v, factor), offset));
  return PE_OK;
}

PE_KERNEL(cpu, softcap)(const pe_tensor *x, const pe_tensor *out, const pe_softcap_params *p, pe_stream *s) {
  const v16f cap = v16f_set1(p->cap);
  PE_FOR_EACH(v16f_mul(cap, v16f_tanh(v16f_div(v, cap))));
  return PE_OK;
}

/* ---- concat ---- */

/* The result is `outer` rows; each holds one run of every part. A chunk is a range of these rows. */
PE_KERNEL(cpu, concat)(const pe_tensor *const *parts, int32_t n_parts, const pe_tensor *out, const pe_concat_params *p, pe_stream *s) {
  int64_t outer = 1, width = 1;
  for (int i = 0; i < p->axis; i++) outer *= out->shape[i];
  for (int i = p->axis; i < out->ndim; i++) width *= out->shape[i];
  const int64_t step = pe_max(1, CHUNK / pe_max(1, width));
  for (int64_t r0; (r0 = pe_next(s, 0) * step) < outer;)
    for (int64_t r = r0; r < pe_min(outer, r0 + step); r++) {
      float *to = (float *)out->data + r * width;
      for (int32_t i = 0; i < n_parts; i++) {
        int64_t n = 1;
        for (int a = p->axis; a < parts[i]->ndim; a++) n *= parts[i]->shape[a];
        memcpy(to, (const float *)parts[i]->data + r * n, (size_t)n * 4);
        to += n;
      }
    }
  return PE_OK;
}

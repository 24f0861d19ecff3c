/* norm.c: rms_norm, layer_norm, l2_norm, softmax, reduce over the last axis, which is contiguous; group_norm over pictures.
 * Reference: pyengine/ops/norm.py: rms_norm, layer_norm, l2_norm, softmax, reduce, group_norm.
 *
 * A thread claims chunks of whole rows. Sums are those of vec.h, so a row's result depends on that row alone. Each kernel reads x two or three times (once from memory, then from cache) and writes
 * out once: 8 bytes of traffic an element, far below what the arithmetic needs. out may be x (or the residual).
 *
 * group_norm: a thread claims a group of a picture's channels, and passes over its places three times: 16 lanes of channels, places
 * ascending, in sums of PLACES places each that are added in their order.
 */
#include "vec.h"

/* Rows of one chunk: about 16k elements (64 KiB), so that a chunk is worth claiming; tiny work is one chunk on one thread. */
static int64_t rows_per_chunk(int64_t d) { return pe_max(1, 16384 / pe_max(1, d)); }

static int64_t count_rows(const pe_tensor *x) {
  int64_t n = 1;
  for (int i = 0; i + 1 < x->ndim; i++) n *= x->shape[i];
  return n;
}

static const float *data_or_null(const pe_tensor *t) { return t ? (const float *)t->data : 0; }

PE_KERNEL(cpu, rms_norm)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *residual, const pe_tensor *out,
                    const pe_rms_norm_params *p, pe_stream *s) {
  const int64_t d = x->shape[x->ndim - 1], n = count_rows(x), step = rows_per_chunk(d);
  const float *in = x->data, *w = data_or_null(weight), *r = data_or_null(residual);
  float *y = out->data;
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < n;)
    for (int64_t i = i0; i < pe_min(n, i0 + step); i++) {
      scale_row(in + i * d, y + i * d, d, 0.0f, inverse_rms(in + i * d, d, p->eps), w, r ? r + i * d : 0);
    }
  return PE_OK;
}

PE_KERNEL(cpu, layer_norm)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *bias, const pe_tensor *out,
                      const pe_layer_norm_params *p, pe_stream *s) {
  const int64_t d = x->shape[x->ndim - 1], n = count_rows(x), step = rows_per_chunk(d);
  const float *in = x->data, *w = data_or_null(weight), *b = data_or_null(bias);
  float *y = out->data;
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < n;)
    for (int64_t i = i0; i < pe_min(n, i0 + step); i++) {
      float mean = sum_of(in + i * d, d) / (float)d;
      float inv = 1.0f / __builtin_sqrtf(sum_of_squares(in + i * d, d, mean) / (float)d + p->eps);
      scale_row(in + i * d, y + i * d, d, mean, inv, w, b);
    }
  return PE_OK;
}

PE_KERNEL(cpu, l2_norm)(const pe_tensor *x, const pe_tensor *out, const pe_l2_norm_params *p, pe_stream *s) {
  const int64_t d = x->shape[x->ndim - 1], n = count_rows(x), step = rows_per_chunk(d);
  const float *in = x->data;
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < n;)
    for (int64_t i = i0; i < pe_min(n, i0 + step); i++) {
      const float length = __builtin_sqrtf(sum_of_squares(in + i * d, d, 0.0f));
      scale_row(in + i * d, (float *)out->data + i * d, d, 0.0f, 1.0f / (length > p->eps || length != length ? length : p->eps), 0, 0);
    }
  return PE_OK;
}

/* ---- groups of channels of a picture ---- */

enum { PLACES = 64 };

/* Sum of x - centre, or of its squares, over c channels of m places, `ld` apart. */
static float sum_of_group(const float *x, int64_t m, int64_t c, int64_t ld, float centre, int squares) {
  const v16f middle = v16f_set1(centre);
  v16f all = v16f_zero();
  for (int64_t i0 = 0; i0 < m; i0 += PLACES) {
    v16f sum = v16f_zero();
    for (int64_t i = i0; i < pe_min(m, i0 + PLACES); i++)
      for (int64_t j = 0; j < c; j += 16) {
        v16f v = v16f_sub(load_some(x + i * ld + j, c - j), middle);
        if (c - j < 16) v = v16f_first_n(v, c - j, 0.0f);
        sum = squares ? v16f_fma(v, v, sum) : v16f_add(sum, v);
      }
    all = v16f_add(all, sum);
  }
  return v16f_sum(all);
}

PE_KERNEL(cpu, group_norm)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *bias, const pe_tensor *out,
                      const pe_group_norm_params *p, pe_stream *s) {
  const int64_t n = x->shape[0], d = x->shape[x->ndim - 1], c = d / p->groups, m = n ? count_rows(x) / n : 0;
  const float *w = data_or_null(weight), *b = data_or_null(bias);
  if (m == 0) return PE_OK;
  for (int64_t item; (item = pe_next(s, 0)) < n * p->groups;) {
    const int64_t first = item % p->groups * c, at = item / p->groups * m * d + first;
    const float *in = (const float *)x->data + at, count = (float)(m * c), mean = sum_of_group(in, m, c, d, 0.0f, 0) / count;
    const float inv = 1.0f / __builtin_sqrtf(sum_of_group(in, m, c, d, mean, 1) / count + p->eps);
    float *y = (float *)out->data + at;
    for (int64_t i = 0; i < m; i++) scale_row(in + i * d, y + i * d, c, mean, inv, w ? w + first : 0, b ? b + first : 0);
  }
  return PE_OK;
}

static float max_of(const float *x, int64_t d, float scale) {
  v16f top = v16f_set1(-__builtin_inff()), k = v16f_set1(scale);
  for (int64_t i = 0; i < d; i += 16) {
    v16f v = v16f_mul(load_some(x + i, d - i), k);
    top = v16f_max(d - i < 16 ? v16f_first_n(v, d - i, -__builtin_inff()) : v, top);
  }
  return v16f_hmax(top);
}

PE_KERNEL(cpu, softmax)(const pe_tensor *x, const pe_tensor *out, const pe_softmax_params *p, pe_stream *s) {
  const int64_t d = x->shape[x->ndim - 1], n = count_rows(x), step = pe_max(1, rows_per_chunk(d) / 4);
  const v16f k = v16f_set1(p->scale);
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < n;)
    for (int64_t i = i0; i < pe_min(n, i0 + step); i++) {
      const float *in = (const float *)x->data + i * d;
      float *y = (float *)out->data + i * d;
      const v16f top = v16f_set1(max_of(in, d, p->scale));
      for (int64_t j = 0; j < d; j += 16) {
        const v16f e = v16f_exp(v16f_sub(v16f_mul(load_some(in + j, d - j), k), top));
        store_some(y + j, e, d - j);
      }
      const v16f inv = v16f_set1(1.0f / sum_of(y, d));
      for (int64_t j = 0; j < d; j += 16) store_some(y + j, v16f_mul(load_some(y + j, d - j), inv), d - j);
    }
  return PE_OK;
}

/* The largest or smallest element as NumPy has it: NaN where the row holds one. */
static float extreme_of(const float *x, int64_t d, float sign) {
  float top = sign * x[0];
  for (int64_t i = 1; i < d; i++) {
    float v = sign * x[i];
    top = v > top || v != v ? v : top;
    if (top != top) break;
  }
  return sign * top;
}

PE_KERNEL(cpu, reduce)(const pe_tensor *x, const pe_tensor *out, const pe_reduce_params *p, pe_stream *s) {
  const int64_t d = x->shape[x->ndim - 1], n = count_rows(x), step = rows_per_chunk(d);
  const int extreme = p->kind == PE_REDUCE_KIND_MAX || p->kind == PE_REDUCE_KIND_MIN;
  if (extreme && d == 0 && n) return pe_fail(s, PE_BAD_SHAPE, "reduce: max and min need at least one element");
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < n;)
    for (int64_t i = i0; i < pe_min(n, i0 + step); i++) {
      const float *in = (const float *)x->data + i * d;
      float y;
      if (extreme) y = extreme_of(in, d, p->kind == PE_REDUCE_KIND_MAX ? 1.0f : -1.0f);
      else y = p->kind == PE_REDUCE_KIND_SUM ? sum_of(in, d) : sum_of(in, d) / (float)d;
      ((float *)out->data)[i] = y;
    }
  return PE_OK;
}

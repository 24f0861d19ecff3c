/* rope.c: rope_table, temperature, rope, cache_append, rope_append.
 * Reference: pyengine/ops/rope.py: rope_table, temperature, rope, cache_append, rope_append.
 *
 * A thread claims chunks of whole rows (tokens), about 16k elements each; every element depends on its own row only. The table
 * is computed in double and rounded once; rotations and norms in float. Traffic: q, k and v are read once, q written once, and
 * the caches' cells once, in the caches' dtype. Everything but the caches is contiguous; a cache's heads and cells may lie at
 * any distance, its elements side by side.
 */
#include <math.h>

#include "cells.h"

enum { CHUNK = 16384 };

/* ---- the table of angles ---- */

typedef double d8 __attribute__((vector_size(64)));
typedef int64_t i8x __attribute__((vector_size(64)));
typedef float f8 __attribute__((vector_size(32)));
typedef float f8_mem __attribute__((vector_size(32), aligned(4), may_alias));

/* cos and sin of 8 angles below 2^30, times `scale`. With k = round(x / (pi/2)) and r = x - k pi/2, |r| <= pi/4, they are
 * +-cos(r) and +-sin(r), in this or the other order. pi/2 comes in three pieces of which the first two have 22 bits, so that
 * their products with k are exact; the Taylor series' error, r^14/14!, is below 4e-13. */
PE_INLINE void cos_sin8(const float *x, double scale, float *cos_out, float *sin_out) {
  const double magic = 0x1.8p52; /* adding it rounds to an integer, which stands in the low bits */
  d8 a = __builtin_convertvector(*(const f8_mem *)x, d8);
  d8 shifted = a * 0x1.45f306dc9c883p-1 + magic, k = shifted - magic;
  i8x q = (i8x)shifted;
  d8 r = ((a - k * 0x1.921fb00000000p+0) - k * 0x1.5110b00000000p-22) - k * 0x1.18469898cc517p-44, z = r * r;
  d8 c = 1 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800 + z * (1.0 / 479001600))))));
  d8 s = r + r * z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880 + z * (-1.0 / 39916800)))));
  i8x odd = -(q & 1), cos_sign = ((q + 1) & 2) << 62, sin_sign = (q & 2) << 62;
  d8 y = (d8)((((i8x)s & odd) | ((i8x)c & ~odd)) ^ cos_sign);
  d8 w = (d8)((((i8x)c & odd) | ((i8x)s & ~odd)) ^ sin_sign);
  *(f8_mem *)cos_out = __builtin_convertvector(y * scale, f8);
  *(f8_mem *)sin_out = __builtin_convertvector(w * scale, f8);
}

PE_KERNEL(cpu, rope_table)(const pe_tensor *positions, const pe_tensor *inv_freq, const pe_tensor *axis, const pe_tensor *out,
                      const pe_rope_table_params *p, pe_stream *s) {
  const int64_t n_axes = positions->shape[0], m = positions->shape[1], f = inv_freq->shape[0];
  const int32_t *pos = positions->data, *which = axis ? axis->data : 0;
  const float *freq = inv_freq->data;
  const int64_t step = pe_max(1, CHUNK / 8 / pe_max(1, f));
  for (int64_t j = 0; which && j < f; j++)
    if (which[j] < 0 || which[j] >= n_axes)
      return pe_fail(s, PE_BAD_VALUE, "rope_table: axis %d of %lld rows of positions", which[j], (long long)n_axes);
  if (n_axes < 1) return pe_fail(s, PE_BAD_SHAPE, "rope_table: positions has no rows");
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < m;)
    for (int64_t i = i0; i < pe_min(m, i0 + step); i++) {
      float *row = (float *)out->data + i * 2 * f;
      for (int64_t j = 0; j < f; j += 8) {
        float angle[8] = {0}, c[8], sn[8];
        const int n = (int)pe_min(8, f - j);
        int small = 1;
        for (int l = 0; l < n; l++) {
          angle[l] = (float)pos[(which ? which[j + l] : 0) * m + i] * freq[j + l];
          small &= fabsf(angle[l]) < 0x1p30f;
        }
        if (small) cos_sin8(angle, p->scale, c, sn);
        else
          for (int l = 0; l < n; l++) {
            c[l] = (float)(cos(angle[l]) * (double)p->scale);
            sn[l] = (float)(sin(angle[l]) * (double)p->scale);
          }
        memcpy(row + j, c, (size_t)n * 4);
        memcpy(row + f + j, sn, (size_t)n * 4);
      }
    }
  return PE_OK;
}

PE_KERNEL(cpu, temperature)(const pe_tensor *positions, const pe_tensor *out, const pe_temperature_params *p, pe_stream *s) {
  const int64_t m = positions->shape[1];
  const int32_t *pos = positions->data;
  if (positions->shape[0] < 1) return pe_fail(s, PE_BAD_SHAPE, "temperature: positions has no rows");
  if (p->floor < 1) return pe_fail(s, PE_BAD_VALUE, "temperature: a floor of %lld", (long long)p->floor);
  for (int64_t i0; (i0 = pe_next(s, 0) * 1024) < m;)
    for (int64_t i = i0; i < pe_min(m, i0 + 1024); i++) {
      const int64_t steps = pe_max(0, (int64_t)pos[i] + p->offset) / p->floor;
      ((float *)out->data)[i] = (float)(1.0 + (double)p->scale * log1p((double)steps));
    }
  return PE_OK;
}

/* ---- rotation of one head ---- */

/* y = the first 2 f elements of x rotated, the rest as they are, all first multiplied by inv * weight where there is a weight.
 * y may be x. t: cosines [f], sines [f]. */
PE_INLINE void rotate_head(const float *x, float *y, int64_t e, const float *t, int64_t f, int interleaved, const float *weight,
                           float inv) {
  const float *cosines = t, *sines = t + f;
  const v16f k = v16f_set1(inv);
  if (interleaved) {
    for (int64_t i = 0; i < f; i++) {
      float a = x[2 * i], b = x[2 * i + 1], c = cosines[i], s = sines[i];
      if (weight) a = a * inv * weight[2 * i], b = b * inv * weight[2 * i + 1];
      y[2 * i] = a * c - b * s;
      y[2 * i + 1] = b * c + a * s;
    }
  } else {
    for (int64_t i = 0; i < f; i += 16) {
      const int64_t n = f - i;
      v16f a = load_some(x + i, n), b = load_some(x + f + i, n), c = load_some(cosines + i, n), s = load_some(sines + i, n);
      if (weight) {
        a = v16f_mul(v16f_mul(a, k), load_some(weight + i, n));
        b = v16f_mul(v16f_mul(b, k), load_some(weight + f + i, n));
      }
      store_some(y + i, v16f_sub(v16f_mul(a, c), v16f_mul(b, s)), n);
      store_some(y + f + i, v16f_add(v16f_mul(b, c), v16f_mul(a, s)), n);
    }
  }
  for (int64_t i = 2 * f; i < e; i += 16) {
    v16f v = load_some(x + i, e - i);
    if (weight) v = v16f_mul(v16f_mul(v, k), load_some(weight + i, e - i));
    store_some(y + i, v, e - i);
  }
}

PE_KERNEL(cpu, rope)(const pe_tensor *x, const pe_tensor *table, const pe_tensor *out, const pe_rope_params *p, pe_stream *s) {
  const int64_t m = x->shape[0], h = x->shape[1], e = x->shape[2], t = table->shape[1];
  const int64_t step = pe_max(1, CHUNK / pe_max(1, h * e));
  if (t > e || t % 2) return pe_fail(s, PE_BAD_SHAPE, "rope: a table of %lld for heads of %lld", (long long)t, (long long)e);
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < m;)
    for (int64_t i = i0; i < pe_min(m, i0 + step); i++)
      for (int64_t j = 0; j < h; j++) {
        const int64_t at = (i * h + j) * e;
        rotate_head((const float *)x->data + at, (float *)out->data + at, e, (const float *)table->data + i * t, t / 2,
                    p->interleaved, 0, 1.0f);
      }
  return PE_OK;
}

/* ---- caches ---- */

static char *cell_of(const pe_tensor *cache, int64_t head, int32_t cell) {
  return (char *)cache->data + head * cache->stride[0] + cell * cache->stride[1];
}

/* Can this kernel write to the cache, and do all cells lie in it? */
static pe_status check_cache(const char *op, const char *name, const pe_tensor *cache, const pe_tensor *cells, pe_stream *s) {
  const int32_t *c = cells->data;
  const pe_status bad = check_cells(op, name, cache, 1, s);
  if (bad) return bad;
  for (int64_t i = 0; i < cells->shape[0]; i++)
    if (c[i] >= cache->shape[1])
      return pe_fail(s, PE_BAD_VALUE, "%s: row %lld goes to cell %d of %lld", op, (long long)i, c[i], (long long)cache->shape[1]);
  return PE_OK;
}

/* y = x - offset. */
static void subtract(const float *x, const float *offset, float *y, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store_some(y + i, v16f_sub(load_some(x + i, n - i), load_some(offset + i, n - i)), n - i);
}

/* Write one head; `head` is room for its elements, where it may be already. */
static void append(const pe_tensor *cache, int64_t g, int32_t cell, const float *x, const float *offset, float *head) {
  const int64_t e = cache->shape[2];
  if (offset) subtract(x, offset, head, e), x = head;
  if (in_blocks(cache)) {
    if (x != head) memcpy(head, x, (size_t)e * 4);
    mix(head, e);
    x = head;
  }
  store_cell(cell_of(cache, g, cell), cache->dtype, x, e);
}

/* One head a thread. */
PE_SCRATCH(cpu, cache_append)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  return n_threads * pe_round_up(pe_arg(a, 1)->shape[2] * 4, 64);
}

PE_KERNEL(cpu, cache_append)(const pe_tensor *cache, const pe_tensor *x, const pe_tensor *cells, const pe_tensor *offset,
                        const pe_tensor *out, const pe_cache_append_params *p, pe_stream *s) {
  (void)p;
  const int64_t m = x->shape[0], g = x->shape[1], e = x->shape[2], step = pe_max(1, CHUNK / pe_max(1, g * e));
  const int32_t *c = cells->data;
  float *head = (float *)(s->scratch + s->ith * pe_round_up(e * 4, 64));
  (void)out; /* the cache itself */
  const pe_status bad = check_cache("cache_append", "cache", cache, cells, s);
  if (bad) return bad;
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < m;)
    for (int64_t i = i0; i < pe_min(m, i0 + step); i++)
      for (int64_t j = 0; c[i] >= 0 && j < g; j++)
        append(cache, j, c[i], (const float *)x->data + (i * g + j) * e, offset ? (const float *)offset->data + j * e : 0, head);
  return PE_OK;
}

/* One head of k or v a thread. */
static int64_t head_bytes(const pe_tensor *k, const pe_tensor *v) { return pe_round_up(pe_max(k->shape[2], v->shape[2]) * 4, 64); }

PE_SCRATCH(cpu, rope_append)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  return n_threads * head_bytes(pe_arg(a, 1), pe_arg(a, 2));
}

PE_KERNEL(cpu, rope_append)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *table,
                       const pe_tensor *k_cache, const pe_tensor *v_cache, const pe_tensor *cells, const pe_tensor *q_norm,
                       const pe_tensor *k_norm, const pe_tensor *k_offset, const pe_tensor *out0, const pe_tensor *out1,
                       const pe_tensor *out2, const pe_rope_append_params *p, pe_stream *s) {
  (void)out1; /* the caches themselves */
  (void)out2;
  const int64_t m = q->shape[0], h = q->shape[1], g = k->shape[1], e = q->shape[2], ev = v->shape[2], t = table->shape[1];
  const int64_t step = pe_max(1, CHUNK / pe_max(1, h * e + g * (e + ev)));
  const int32_t *c = cells->data;
  const float *qw = q_norm ? q_norm->data : 0, *kw = k_norm ? k_norm->data : 0;
  float *head = (float *)(s->scratch + s->ith * head_bytes(k, v));
  pe_status bad = check_cache("rope_append", "k_cache", k_cache, cells, s);
  if (!bad) bad = check_cache("rope_append", "v_cache", v_cache, cells, s);
  if (bad) return bad;
  if (t > e || t % 2) return pe_fail(s, PE_BAD_SHAPE, "rope_append: a table of %lld for heads of %lld", (long long)t, (long long)e);
  for (int64_t i0; (i0 = pe_next(s, 0) * step) < m;)
    for (int64_t i = i0; i < pe_min(m, i0 + step); i++) {
      const float *angles = (const float *)table->data + i * t;
      for (int64_t j = 0; j < h; j++) {
        const float *x = (const float *)q->data + (i * h + j) * e;
        rotate_head(x, (float *)out0->data + (i * h + j) * e, e, angles, t / 2, p->interleaved, qw,
                    qw ? inverse_rms(x, e, p->eps) : 1.0f);
      }
      for (int64_t j = 0; c[i] >= 0 && j < g; j++) {
        const float *x = (const float *)k->data + (i * g + j) * e;
        rotate_head(x, head, e, angles, t / 2, p->interleaved, kw, kw ? inverse_rms(x, e, p->eps) : 1.0f);
        append(k_cache, j, c[i], head, k_offset ? (const float *)k_offset->data + j * e : 0, head);
        append(v_cache, j, c[i], (const float *)v->data + (i * g + j) * ev, 0, head);
      }
    }
  return PE_OK;
}

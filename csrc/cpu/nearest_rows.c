/* nearest_rows.c: the search of ../host/nearest.h.
 *
 * Kept rows lie in panels of 64 columns, which stay in the first cache while NEAREST_ROWS evicted rows are multiplied with them; the
 * scores of these rows with all kept ones stay in the second. Products are those of vec.h's `tile`: one fma a step, in order, so a score
 * of rows of length 1 is wrong by at most (width + 2) * 2^-24, rounding of the rows included. Doubles are summed in 8 lanes, in the same
 * order on every instruction set.
 */
#include <math.h>

#include "../host/nearest.h"
#include "nearest_rows.h"
#include "vec.h"

enum { LANES = 8 };

static double product(const double *x, const double *y, int64_t n) {
  double sum[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int l = 0; l < LANES; l++) sum[l] += x[i + l] * y[i + l];
  for (int l = 0; i + l < n; l++) sum[l] += x[i + l] * y[i + l];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

/* 1 / |x|, 0 for a row of zeros, NaN where the length is not finite. */
static double inverse_length(const double *x, int64_t n) {
  const double square = product(x, x, n);
  if (!(square <= 1.7976931348623157e308)) return NAN;
  return square > 0 ? 1 / sqrt(square) : 0;
}

/* The kept rows in panels; columns behind the last are 0. */
static pe_status pack(const pe_nearest_input *in, const nearest_work *w) {
  for (int64_t c = 0; c < w->n_panels * NEAREST_PANEL; c++) {
    float *to = w->panels + c / NEAREST_PANEL * NEAREST_PANEL * in->width + c % NEAREST_PANEL;
    const double *from = c < in->n_kept ? in->keys + in->kept[c] * in->width : 0;
    const double inverse = from ? inverse_length(from, in->width) : 0;
    if (isnan(inverse)) return PE_BAD_VALUE;
    if (from) w->inverse[c] = inverse;
    for (int64_t i = 0; i < in->width; i++) to[i * NEAREST_PANEL] = from ? (float)(from[i] * inverse) : 0.0f;
  }
  return PE_OK;
}

/* The scores of n evicted rows with all kept ones, by panels; those behind the last are below all others. */
static void multiply(const pe_nearest_input *in, const nearest_work *w, int64_t n) {
  const int64_t ld = w->n_panels * NEAREST_PANEL;
  for (int64_t p = 0; p < w->n_panels; p++)
    for (int64_t r = 0; r < n; r += TILE_ROWS)
      tile((int)pe_min(TILE_ROWS, n - r), NEAREST_PANEL / 16, w->rows + r * in->width, in->width, w->panels + p * NEAREST_PANEL * in->width,
           NEAREST_PANEL, w->scores + r * ld + p * NEAREST_PANEL, ld, in->width, 0);
  for (int64_t r = 0; r < n; r++)
    for (int64_t c = in->n_kept; c < ld; c++) w->scores[r * ld + c] = -2.0f;
}

/* The best of the columns whose scores are within `margin` of the largest. */
static int32_t decide(const pe_nearest_input *in, const nearest_work *w, const double *x, const float *scores, float margin, double *best) {
  float most = -2.0f;
  for (int64_t p = 0; p < w->n_panels; p++) {
    v16f v = v16f_load(scores + p * NEAREST_PANEL);
    for (int j = 16; j < NEAREST_PANEL; j += 16) v = v16f_max(v, v16f_load(scores + p * NEAREST_PANEL + j));
    w->largest[p] = v16f_hmax(v);
    if (w->largest[p] > most) most = w->largest[p];
  }
  int32_t at = -1;
  for (int64_t p = 0; p < w->n_panels; p++) {
    if (w->largest[p] < most - margin) continue;
    for (int64_t c = p * NEAREST_PANEL; c < pe_min((p + 1) * NEAREST_PANEL, in->n_kept); c++) {
      if (scores[c] < most - margin) continue;
      const double cosine = product(x, in->keys + in->kept[c] * in->width, in->width) * w->inverse[c];
      if (at < 0 || cosine > *best) *best = cosine, at = (int32_t)c;
    }
  }
  return at;
}

pe_status PE_NAME(nearest)(const pe_nearest_input *in, void *scratch, int32_t *nearest, double *cosine) {
  nearest_work w;
  nearest_memory(&w, scratch, in->n_kept, in->width);
  const float bound = (float)(in->width + 2) * 0x1p-23f, margin = bound > 1e-5f ? bound : 1e-5f;
  pe_status status = pack(in, &w);
  for (int64_t first = 0; first < in->n_evicted && !status; first += NEAREST_ROWS) {
    const int64_t n = pe_min(NEAREST_ROWS, in->n_evicted - first);
    double inverse[NEAREST_ROWS];
    for (int64_t r = 0; r < n; r++) {
      const double *x = in->keys + in->evicted[first + r] * in->width;
      inverse[r] = inverse_length(x, in->width);
      if (isnan(inverse[r])) return PE_BAD_VALUE;
      for (int64_t i = 0; i < in->width; i++) w.rows[r * in->width + i] = (float)(x[i] * inverse[r]);
    }
    multiply(in, &w, n);
    for (int64_t r = 0; r < n; r++) {
      const double *x = in->keys + in->evicted[first + r] * in->width;
      double best = 0;
      nearest[first + r] = decide(in, &w, x, w.scores + r * w.n_panels * NEAREST_PANEL, margin, &best);
      cosine[first + r] = best * inverse[r];
    }
  }
  return status;
}

/* conv_few.c: conv2d of pictures with few channels, weights in floats: the first layers of VGG16 (27 numbers a window) and DaViT (147).
 * Reference: pyengine/ops/convolution.py: conv2d.
 *
 * An item is a row of results. The kh lines of the picture that it sees are copied with the zeros beside them, so that a window's row is a run of
 * kw c floats, whose next one is sx c floats on. Then 6 places times 64 outputs are in registers, for all numbers of the window: 4 loads of weights
 * and 6 of pixels for 24 fma. Weights become floats [64 outputs][kh kw c] before, which all threads read: 7 KB of VGG16's, 38 KB of DaViT's at a time.
 * The order of sums is that of products in one slice: the bits are those of conv.c.
 *
 *   operations   2 k a place and output; VGG16's: 173 M
 *   copied       kh lines for each row of results: 1/70 of the loads of VGG16's
 *   bytes        12.8 MB of results of VGG16's, once: 13 operations a byte: bound by writing. Those of DaViT are 18.9 MB, 73 operations a byte.
 */
#include "conv.h"

enum {
  MOST_CHANNELS = 8, MOST_WINDOW = 160,
  PLACES = 6,                                  /* of a row at once */
#if defined(PE_AVX512)
  GROUPS = 4,                                  /* of 16 outputs */
#else
  GROUPS = 1,
#endif
};

/* It depends on the size of pictures in nothing. */
int PE_NAME(conv_few_fits)(const conv *t) {
  return t->groups == 1 && t->c <= MOST_CHANNELS && t->k <= MOST_WINDOW && t->dx == 1 && pe_format_of(conv_format(t->w)).elements == 1;
}

typedef struct few {
  const conv *t;
  int64_t strips, line;   /* of up to GROUPS groups; floats of a copied line */
  float *taps, *lines;    /* [strip][k][16 GROUPS]; [kh][line] of a thread */
} few;

static few few_of(const conv *t) {
  few y = {.t = t, .strips = (t->o + 16 * GROUPS - 1) / (16 * GROUPS)};
  y.line = pe_round_up(((t->columns - 1) * t->sx + t->kw) * t->c, 16);
  return y;
}
static int64_t taps_floats(const few *w) { return w->strips * w->t->k * 16 * GROUPS; }

int64_t PE_NAME(conv_few_bytes)(const conv *t, int64_t n_threads) {
  const few w = few_of(t);
  return 4 * (taps_floats(&w) + n_threads * t->kh * w.line);
}

/* What row `row` of a picture's results sees. */
static void copy_lines(const few *w, int64_t picture, int64_t row) {
  const conv *t = w->t;
  const int64_t most = t->width * t->c, before = pe_min(w->line, t->left * t->c), count = pe_min(most, w->line - before);
  for (int64_t ky = 0; ky < t->kh; ky++) {
    const int64_t y = row * t->sy - t->top + ky * t->dy;
    float *to = w->lines + ky * w->line;
    if (y < 0 || y >= t->height) {
      memset(to, 0, (size_t)w->line * sizeof(float));
      continue;
    }
    memset(to, 0, (size_t)before * sizeof(float));
    memcpy(to + before, (const float *)t->x->data + (picture * t->height + y) * most, (size_t)count * sizeof(float));
    memset(to + before + count, 0, (size_t)(w->line - before - count) * sizeof(float));
  }
}

/* `places` places from x on, of the lines, times `groups` groups of 16 outputs; to: the first output of the first place, of which `left` are there. */
PE_INLINE void few_places(const few *w, int places, int groups, const float *x, const float *taps, const float *bias, int64_t left, float *to) {
  const conv *t = w->t;
  const int64_t run = t->kw * t->c, step = t->sx * t->c;
  v16f sum[PLACES * GROUPS];
PE_UNROLL(32)
  for (int i = 0; i < places * groups; i++) sum[i] = v16f_zero();
  for (int64_t ky = 0; ky < t->kh; ky++, x += w->line)
    for (int64_t k = 0; k < run; k++, taps += 16 * GROUPS) {
      v16f tap[GROUPS];
PE_UNROLL(8)
      for (int g = 0; g < groups; g++) tap[g] = v16f_load(taps + 16 * g);
PE_UNROLL(8)
      for (int i = 0; i < places; i++) {
        const v16f pixel = v16f_set1(x[i * step + k]);
PE_UNROLL(8)
        for (int g = 0; g < groups; g++) sum[i * groups + g] = v16f_fma(tap[g], pixel, sum[i * groups + g]);
      }
    }
  conv_finish(t, places, groups, sum, bias, left, to, t->o);
}

/* A row of results of one strip. Its last places are computed together with some before them, a second time, where 6 do not divide them. */
PE_INLINE void few_row(const few *w, int groups, int64_t strip, float *to) {
  const conv *t = w->t;
  const int64_t o = strip * 16 * GROUPS, step = t->sx * t->c;
  const float *taps = w->taps + strip * t->k * 16 * GROUPS, *bias = t->bias ? (const float *)t->bias->data + o : 0;
  if (t->columns < PLACES) {
    for (int64_t x = 0; x < t->columns; x++) few_places(w, 1, groups, w->lines + x * step, taps, bias, t->o - o, to + x * t->o + o);
    return;
  }
  for (int64_t next = 0; next < t->columns; next += PLACES) {
    const int64_t x = pe_min(next, t->columns - PLACES);
    few_places(w, PLACES, groups, w->lines + x * step, taps, bias, t->o - o, to + x * t->o + o);
  }
}

pe_status PE_NAME(conv_few)(const conv *t, pe_stream *s) {
  few w = few_of(t);
  w.taps = (float *)s->scratch;
  w.lines = w.taps + taps_floats(&w) + s->ith * t->kh * w.line;
  const int64_t groups = (t->o + 15) / 16;
  for (int64_t g; (g = pe_next(s, 0)) < groups;) {
    const conv_weights from = conv_weights_of(t, g);
    float *to = w.taps + g / GROUPS * t->k * 16 * GROUPS + g % GROUPS * 16;
    for (int64_t k = 0; k < t->k; k++, to += 16 * GROUPS) v16f_store(to, conv_tap(&from, k));
  }
  pe_barrier(s);
  for (int64_t row; (row = pe_next(s, 1)) < t->n * t->rows;) {
    copy_lines(&w, row / t->rows, row % t->rows);
    float *to = (float *)t->out->data + row * t->columns * t->o;
    for (int64_t strip = 0; strip < w.strips; strip++) {
      switch (pe_min(GROUPS, groups - strip * GROUPS)) {
#if defined(PE_AVX512)
        case 4: few_row(&w, 4, strip, to); break;
        case 3: few_row(&w, 3, strip, to); break;
        case 2: few_row(&w, 2, strip, to); break;
#endif
        default: few_row(&w, 1, strip, to);
      }
    }
  }
  conv_stored(t);
  return PE_OK;
}

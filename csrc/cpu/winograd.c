/* winograd.c: conv2d of small windows with fewer products, for weights that are floats (Lavin and Gray 2016, arXiv:1509.09308).
 * Reference: pyengine/ops/convolution.py: conv2d.
 *
 * A tile of `side` x `side` results comes from 6 x 6 pixels, Y = A' [sum over channels of (G g G') * (B' d B)] A: B' d B are the values of the
 * pixels' polynomial at 0, +-1/sqrt 2, +-sqrt 2 and infinity, G g G' those of the window's, and A' makes results of their products. These
 * points are twice as exact as 0, +-1, +-2; sums are cut into slices of 32 or 64 channels, each from zero: errors are those of plain sums.
 *
 *   window      taps  side  products a result
 *   3 x 3        3     4     2.25 instead of 9
 *   2 x 2        2     5     1.44 instead of 4
 *
 * Windows with a stride are left to products: as taps over squares of pixels they gained 5 to 15%, and had errors of 1.7e-6.
 *
 * An item is a strip of up to 96 outputs times up to TILES tiles. For each chunk of channels a thread makes the pixels' values (V) and the
 * weights' (U), and adds 36 products of [tiles, chunk] and [chunk, outputs], by linear_float.c's tiles, to the sums (M); then come the results.
 * Weights stay in memory as they are: their values would take 4 to 16 times as much, and are made faster than they could be read from there.
 *
 *   operations   for 16 channels of a tile and 96 outputs: 3456 fma, 144 operations to V, 1/64 of 96 x 70 to U; for 16 results of a tile 90
 *   bytes        V, U and M are 2.4 MB; a chunk writes and reads each once, 5 bytes for each fma of 16 lanes, from the second and third cache
 */
#include "conv.h"

enum {
  SPAN = 6, POINTS = SPAN * SPAN,
  TILES = 64,                                  /* of an item */
  STRIP = 6 / PANEL_GROUPS,                    /* panels of an item: 96 outputs */
  WIDE = 16 * PANEL_GROUPS,
  APART = 16,                                  /* floats between points: multiples of a page would share cache sets */
  M_POINT = STRIP * TILES * WIDE + APART,      /* floats from point to point */
  LEAST_SIDE = 7,                              /* of a picture's results: below, U costs more than it saves */
};
#define HALF_ROOT 0.70710678118654752f
#define ROOT 1.41421356237309505f

typedef struct winograd {
  const conv *t;
  int64_t taps, side;
  int64_t chunk;                /* channels whose products are added up before they join the sums */
  int64_t v_point, u_point;     /* floats from point to point */
  int64_t down, across, tiles;  /* tiles of a picture, and of all */
} winograd;

static winograd winograd_of(const conv *t) {
  const int64_t side = SPAN + 1 - t->kh;
  winograd y = {.t = t, .taps = t->kh, .side = side, .down = (t->rows + side - 1) / side, .across = (t->columns + side - 1) / side};
  y.tiles = t->n * y.down * y.across;
  y.chunk = t->c <= 64 ? 64 : 32; /* on Zen 4: 64 where V costs most, 32 where U does */
  y.v_point = TILES * y.chunk + APART;
  y.u_point = STRIP * y.chunk * WIDE + APART;
  return y;
}

/* It depends on the number of pictures in nothing, and a smaller picture is never taken where a larger one is not. */
int PE_NAME(winograd_fits)(const conv *t) {
  if (t->sy != 1 || t->sx != 1 || t->groups != 1 || t->dy != 1 || t->dx != 1 || t->kh != t->kw || t->kh < 2 || t->kh > 3) return 0;
  return pe_format_of(conv_format(t->w)).elements == 1 && pe_min(t->rows, t->columns) >= LEAST_SIDE;
}

static int64_t own_floats(const winograd *w) { return POINTS * (w->v_point + w->u_point + M_POINT); }

int64_t PE_NAME(winograd_bytes)(const conv *t, int64_t n_threads) {
  const winograd w = winograd_of(t);
  return n_threads * 4 * own_floats(&w);
}

/* ---- the three transforms, of one axis ---- */

typedef struct six { v16f a, b, c, d, e, f; } six; /* values, so that they stay in registers: arrays would not */
#define SIX(at) (six){at(0), at(1), at(2), at(3), at(4), at(5)}
PE_INLINE six load_six(const float *p, int64_t step) {
#define AT(i) v16f_load(p + i * step)
  return SIX(AT);
#undef AT
}
PE_INLINE void store_six(float *p, int64_t step, six y) {
  v16f_store(p, y.a), v16f_store(p + step, y.b), v16f_store(p + 2 * step, y.c);
  v16f_store(p + 3 * step, y.d), v16f_store(p + 4 * step, y.e), v16f_store(p + 5 * step, y.f);
}

/* B' d */
PE_INLINE six pixel_values(six x) {
  const v16f middle = v16f_set1(-2.5f), two = v16f_set1(-2.0f), half = v16f_set1(-0.5f);
  const v16f even_a = v16f_fma(two, x.c, x.e), odd_a = v16f_mul(v16f_set1(HALF_ROOT), v16f_fma(two, x.b, x.d));
  const v16f even_b = v16f_fma(half, x.c, x.e), odd_b = v16f_mul(v16f_set1(ROOT), v16f_fma(half, x.b, x.d));
  return (six){v16f_fma(middle, x.c, v16f_add(x.a, x.e)), v16f_add(even_a, odd_a), v16f_sub(even_a, odd_a), v16f_add(even_b, odd_b),
               v16f_sub(even_b, odd_b), v16f_fma(middle, x.d, v16f_add(x.b, x.f))};
}

/* G g, of two taps or three */
PE_INLINE six weight_values(v16f g0, v16f g1, v16f g2, int taps) {
  const v16f by_a = v16f_set1(-2.0f / 3), by_b = v16f_set1(1.0f / 6), last = taps == 3 ? g2 : g1;
  const v16f even_a = taps == 3 ? v16f_fma(v16f_set1(0.5f), g2, g0) : g0, odd_a = v16f_mul(v16f_set1(HALF_ROOT), g1);
  const v16f even_b = taps == 3 ? v16f_fma(v16f_set1(2.0f), g2, g0) : g0, odd_b = v16f_mul(v16f_set1(ROOT), g1);
  return (six){g0, v16f_mul(by_a, v16f_add(even_a, odd_a)), v16f_mul(by_a, v16f_sub(even_a, odd_a)), v16f_mul(by_b, v16f_add(even_b, odd_b)),
               v16f_mul(by_b, v16f_sub(even_b, odd_b)), last};
}

/* A' m: four results or five; the sixth is not used */
PE_INLINE six results_of(six m, int side) {
  const v16f sum_a = v16f_add(m.b, m.c), sum_b = v16f_add(m.d, m.e), half = v16f_set1(0.5f), two = v16f_set1(2.0f);
  const v16f odd_a = v16f_mul(v16f_set1(HALF_ROOT), v16f_sub(m.b, m.c)), odd_b = v16f_mul(v16f_set1(ROOT), v16f_sub(m.d, m.e));
  const v16f fourth = v16f_fma(half, odd_a, v16f_mul(two, odd_b));
  const v16f fifth = v16f_add(v16f_fma(v16f_set1(0.25f), sum_a, v16f_mul(v16f_set1(4.0f), sum_b)), m.f);
  return (six){v16f_add(m.a, v16f_add(sum_a, sum_b)), v16f_add(odd_a, odd_b), v16f_fma(half, sum_a, v16f_mul(two, sum_b)),
               side == 4 ? v16f_add(fourth, m.f) : fourth, fifth, m.f};
}

/* ---- weights ---- */

/* U of `count` channels from q on, for one group. */
PE_INLINE void group_values(const winograd *w, int taps, const conv_weights *g, int64_t q, int64_t count, float *u) {
  float half[POINTS * 16];
  for (int64_t i = 0; i < count; i++, u += WIDE) {
    for (int64_t b = 0; b < taps; b++) {
#define TAP(a) conv_tap(g, ((a) * w->t->kw + b) * w->t->c + q + i)
      store_six(half + 16 * b, 16 * SPAN, weight_values(TAP(0), TAP(1), taps == 3 ? TAP(2) : v16f_zero(), taps));
#undef TAP
    }
    for (int64_t p = 0; p < SPAN; p++) {
      const float *from = half + 16 * SPAN * p;
      const v16f third = taps == 3 ? v16f_load(from + 32) : v16f_zero();
      store_six(u + p * SPAN * w->u_point, w->u_point, weight_values(v16f_load(from), v16f_load(from + 16), third, taps));
    }
  }
}

/* The same for all groups from g0 to end - 1: [panel][count][WIDE] of each point. */
static void weights(const winograd *w, int64_t g0, int64_t end, int64_t q, int64_t count, float *u) {
  for (int64_t g = g0; g < end; g++) {
    float *to = u + (g - g0) / PANEL_GROUPS * w->chunk * WIDE + (g - g0) % PANEL_GROUPS * 16;
    const conv_weights from = conv_weights_of(w->t, g);
    if (w->taps == 3) group_values(w, 3, &from, q, count, to);
    else group_values(w, 2, &from, q, count, to);
  }
}

/* ---- pixels, products, results ---- */

typedef struct spot { int64_t picture, y, x; } spot; /* a tile's first result */
static spot spot_of(const winograd *w, int64_t tile) {
  const int64_t y = tile / w->across;
  return (spot){y / w->down, y % w->down * w->side, tile % w->across * w->side};
}

/* 16 floats of a line of a picture, of which those outside of it are 0. line: NULL is outside as a whole. */
static v16f line_floats(const float *line, int64_t first, int64_t length) {
  const int64_t begin = pe_max(0, -first), end = pe_min(16, length - first);
  if (!line || begin >= end) return v16f_zero();
  float some[16] = {0};
  memcpy(some + begin, line + first + begin, (size_t)(end - begin) * sizeof(float));
  return v16f_load(some);
}

/* The values of 16 channels of a tile's pixels. lines: the 6 of the picture; first: of the first pixel there; step: to the next one. */
PE_INLINE void spread_pixels(int inside, const float *const lines[SPAN], int64_t first, int64_t step, int64_t length, float *to, int64_t point) {
  float half[POINTS * 16];
  for (int64_t j = 0, x = first; j < SPAN; j++, x += step) {
#define AT(i) (inside ? v16f_load(lines[i] + x) : line_floats(lines[i], x, length))
    store_six(half + 16 * j, 16 * SPAN, pixel_values(SIX(AT)));
#undef AT
  }
  for (int64_t i = 0; i < SPAN; i++) store_six(to + i * SPAN * point, point, pixel_values(load_six(half + 16 * SPAN * i, 16)));
}

/* V of `count` channels from q on, for tiles first .. first + n - 1. */
static void pixels(const winograd *w, int64_t first, int64_t n, int64_t q, int64_t count, float *v) {
  const conv *t = w->t;
  const int64_t length = t->width * t->c;
  for (int64_t i = 0; i < n; i++, v += w->chunk) {
    const spot at = spot_of(w, first + i);
    const float *lines[SPAN];
    int inside = 1;
    for (int a = 0; a < SPAN; a++) {
      const int64_t y = at.y + a - t->top, in = y >= 0 && y < t->height;
      lines[a] = in ? (const float *)t->x->data + (at.picture * t->height + y) * length : 0;
      inside &= (int)in;
    }
    const int64_t begin = (at.x - t->left) * t->c + q;
    for (int64_t c = 0, x = begin; c < count; c += 16, x += 16)
      if (inside && x >= 0 && x + (SPAN - 1) * t->c + 16 <= length) spread_pixels(1, lines, x, t->c, length, v + c, w->v_point);
      else spread_pixels(0, lines, x, t->c, length, v + c, w->v_point);
  }
}

/* M of n tiles and groups g0 to end - 1 (+)= V times U of a chunk. */
static void multiply(const winograd *w, int64_t n, int64_t g0, int64_t end, int64_t q, int64_t count, const float *v,
                     const float *u, float *m) {
  const uint8_t *none[PANEL_GROUPS] = {0};
  for (int64_t p = 0; p < POINTS; p++)
    for (int64_t b = 0; g0 + b * PANEL_GROUPS < end; b++) {
      float *to = m + p * M_POINT + b * TILES * WIDE;
      const linear_target target = {.opens = 1, .closes = q > 0, .part = to, .acc = to};
      PE_NAME(linear_float_tile)(pe_min(PANEL_GROUPS, end - g0 - b * PANEL_GROUPS), u + p * w->u_point + b * w->chunk * WIDE, count, none, 0,
                                 v + p * w->v_point, w->chunk, n, target);
    }
}

/* 16 results from output c on of a tile, of which m has the sums. */
PE_INLINE void finish_tile(const winograd *w, int side, spot at, int64_t c, const float *m) {
  const conv *t = w->t;
  const int64_t left = t->o - c, rows = pe_min(side, t->rows - at.y), columns = pe_min(side, t->columns - at.x);
  const v16f bias = t->bias ? load_some((const float *)t->bias->data + c, left) : v16f_zero();
  float half[POINTS * 16], row[SPAN * 16];
  for (int64_t j = 0; j < SPAN; j++) store_six(half + 16 * j, 16 * SPAN, results_of(load_six(m + j * M_POINT, SPAN * M_POINT), side));
  for (int64_t i = 0; i < rows; i++) {
    float *to = (float *)t->out->data + (((at.picture * t->rows + at.y + i) * t->columns + at.x) * t->o + c);
    store_six(row, 16, results_of(load_six(half + 16 * SPAN * i, 16), side));
    for (int64_t j = 0; j < columns; j++) {
      const v16f y = v16f_load(row + 16 * j);
      conv_store(t, to + j * t->o, linear_activate(t->bias ? v16f_add(y, bias) : y, t->activation), left);
    }
  }
}

/* Item: groups g0 to end - 1 times tiles first .. first + n - 1. own: of the thread; held: the first group of U that is there as a whole. */
static void tiles_item(const winograd *w, int64_t g0, int64_t end, int64_t first, int64_t n, float *own, int64_t *held) {
  float *v = own, *u = v + POINTS * w->v_point, *m = u + POINTS * w->u_point;
  const int64_t c = w->t->c;
  for (int64_t q = 0; q < c; q += w->chunk) {
    const int64_t count = pe_min(w->chunk, c - q);
    pixels(w, first, n, q, count, v);
    if (c > w->chunk || *held != g0) weights(w, g0, end, q, count, u);
    *held = g0;
    multiply(w, n, g0, end, q, count, v, u, m);
  }
  for (int64_t i = 0; i < n; i++) {
    const spot at = spot_of(w, first + i);
    for (int64_t g = g0; g < end; g++) {
      const float *from = m + ((g - g0) / PANEL_GROUPS * TILES + i) * WIDE + (g - g0) % PANEL_GROUPS * 16;
      if (w->side == 4) finish_tile(w, 4, at, 16 * g, from);
      else finish_tile(w, 5, at, 16 * g, from);
    }
  }
}

pe_status PE_NAME(winograd)(const conv *t, pe_stream *s) {
  const winograd w = winograd_of(t);
  const int64_t groups = (t->o + 15) / 16, strip = STRIP * PANEL_GROUPS, strips = (groups + strip - 1) / strip;
  float *own = (float *)(s->scratch + s->ith * 4 * own_floats(&w));
  int64_t n = t->c <= 16 ? 16 : TILES, held = -1; /* tiles of an item, as even as they can be; few where M costs more than products */
  while (n > 8 && (w.tiles + n - 1) / n * strips < 4 * s->nth) n /= 2;
  const int64_t blocks = (w.tiles + n - 1) / n;
  n = pe_min(n, pe_round_up((w.tiles + blocks - 1) / blocks, 8));
  for (int64_t item; (item = pe_next(s, 0)) < strips * blocks;) {
    const int64_t first = item % blocks * n, g0 = item / blocks * strip;
    if (first < w.tiles) tiles_item(&w, g0, pe_min(groups, g0 + strip), first, pe_min(n, w.tiles - first), own, &held);
  }
  conv_stored(t);
  return PE_OK;
}

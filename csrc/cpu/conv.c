/* conv.c: conv2d: the window around each place of a picture times a weight.
 * Reference: pyengine/ops/convolution.py: conv2d.
 *
 * conv_few.c takes pictures with few channels, winograd.c small windows, both with weights in floats; here are the other two ways.
 *
 * As a product (conv2d in general).  Windows are rows of k = kh kw c / groups floats, `rows` of them a block; nobody builds those of the whole
 * picture: linear's kernels ask for 128 (of bytes 256) of k of a block at a time (linear.h: linear_gather), which are copied from
 * the picture in runs of a pixel's channels, or of a window's row. An item is a strip of up to 33 groups of 16 outputs times a block of up to
 * 256 windows of one picture or several; threads claim items. The order of sums is linear's, so the bits are those of a product over such rows.
 *
 *   operations   2 k a window and output
 *   copied       4 k bytes a window and strip: 1/64 of a load for each fma of 16 lanes, for 512 outputs
 *   read         weights once for each block: 128 operations a byte of F32, from the shared cache; the picture about once a strip
 *
 * With 64 channels and outputs, 224 x 224 (VGG16's second layer, in blocks): 3.7 G operations, 29 MB of picture and result: 128 operations a
 * byte: bound by fma. Weights in blocks: the picture is rounded to 8 bits once, before, where a pixel's channels are whole blocks of 32, else each window as it is copied.
 *
 * By channel (groups = channels = outputs, weights in floats).  Four places of a row times 16 channels in registers, windows ascending y, then x;
 * pixels beyond the picture are left out. 2 kh kw operations for 8 bytes of memory: 3 x 3 is bound by memory. Windows of 3 x 3 without stride
 * take two rows of four places at once, 24 loads of pixels for 72 fma; lines beyond the picture are zeros there.
 */
#include "../host/dequant.h"
#include "conv.h"

enum { PLACES = 4 /* of a row, by channel */, MOST_PANELS = 33 / PANEL_GROUPS /* of a strip */ };

_Static_assert((int)PE_CONV2D_ACTIVATION_SILU == (int)PE_LINEAR_GLU_SILU && (int)PE_CONV2D_ACTIVATION_RELU == (int)PE_LINEAR_GLU_RELU,
               "conv2d's activations have the numbers of linear's");

static conv conv_of(const pe_tensor *x, const pe_tensor *w, const pe_tensor *out, const pe_conv2d_params *p) {
#define LAST(a, n) (int64_t)p->a[(n) - 1] /* one number is for both axes */
  conv t = {.x = x, .w = w, .out = out, .n = x->shape[0], .height = x->shape[1], .width = x->shape[2], .c = x->shape[3],
            .rows = out->shape[1], .columns = out->shape[2], .o = out->shape[3], .kh = p->kernel[0], .kw = LAST(kernel, p->n_kernel),
            .sy = p->stride[0], .sx = LAST(stride, p->n_stride), .top = p->padding[0],
            .left = p->padding[p->n_padding == 4 ? 2 : p->n_padding - 1], .dy = p->dilation[0], .dx = LAST(dilation, p->n_dilation),
            .groups = p->groups, .activation = p->activation};
#undef LAST
  t.cg = t.c / t.groups, t.og = t.o / t.groups, t.k = t.kh * t.kw * t.cg;
  return t;
}

/* Whether each channel has a window of its own, whose weights are floats. */
static int by_channel(const conv *t) { return t->groups == t->c && t->o == t->c && pe_format_of(conv_format(t->w)).elements == 1; }

/* ---- as a product ---- */

typedef struct window_rows {
  linear_gather gather;
  const conv *t;
  int64_t group;
  const char *codes;   /* the picture as int8: t->c / 32 steps a pixel; or NULL */
} window_rows;

PE_INLINE void copy_floats(float *to, const float *from, int64_t n) {
  for (; n >= 16; n -= 16, to += 16, from += 16) v16f_store(to, v16f_load(from));
  if (n) v16f_store_n(to, v16f_load_n(from, n), n);
}
PE_INLINE void clear_floats(float *to, int64_t n) {
  for (; n >= 16; n -= 16, to += 16) v16f_store(to, v16f_zero());
  if (n) v16f_store_n(to, v16f_zero(), n);
}

/* Where a window begins: its picture, and its first pixel, which may lie before the picture. */
typedef struct place { int64_t picture, y, x; } place;
PE_INLINE place place_of(const conv *t, int64_t row) {
  const int64_t y = row / t->columns;
  return (place){y / t->rows, y % t->rows * t->sy - t->top, row % t->columns * t->sx - t->left};
}

/* The windows from `row` on, one after the other. */
typedef struct places { place at; int64_t column, row; } places;
PE_INLINE places places_from(const conv *t, int64_t row) { return (places){place_of(t, row), row % t->columns, row / t->columns % t->rows}; }
PE_INLINE void next_place(const conv *t, places *p) {
  p->at.x += t->sx;
  if (++p->column < t->columns) return;
  p->column = 0, p->at.x = -t->left, p->at.y += t->sy;
  if (++p->row < t->rows) return;
  p->row = 0, p->at.y = -t->top, p->at.picture++;
}

/* n floats of a line of a picture, of which those outside of it are 0. */
PE_INLINE void copy_line(const float *line, int64_t from, int64_t n, int64_t length, float *to) {
  const int64_t begin = pe_min(n, pe_max(0, -from)), end = pe_max(begin, pe_min(n, length - from));
  clear_floats(to, begin);
  copy_floats(to + begin, line + from + begin, end - begin);
  clear_floats(to + end, n - end);
}

/* Floats k0 .. k0 + count - 1 of windows, run by run: a pixel's channels, or, where they lie side by side, a row of the window. Of windows that
 * are `AHEAD` further on they are asked for: runs are too short for a processor to see that they come. */
static void gather_floats(const linear_gather *g, int64_t row0, int64_t rows, int64_t k0, int64_t count, float *to, int64_t ld) {
  enum { AHEAD = 6 };
  const window_rows *w = (const window_rows *)g;
  const conv *t = w->t;
  const int joined = t->groups == 1 && t->dx == 1;
  const int64_t run = joined ? t->kw * t->cg : t->cg, length = t->width * t->c;
  for (int64_t n; count > 0; to += n, k0 += n, count -= n) {
    const int64_t number = k0 / run, first = k0 % run;
    n = pe_min(count, run - first);
    const int64_t ky = joined ? number : number / t->kw, kx = joined ? 0 : number % t->kw;
    const int64_t group = joined ? 0 : w->group * t->cg;
    places p = places_from(t, row0);
    for (int64_t i = 0; i < rows; i++, next_place(t, &p)) {
      const int64_t y = p.at.y + ky * t->dy, x = p.at.x + kx * t->dx, from = x * t->c + group + first;
      if (y < 0 || y >= t->height || (!joined && (x < 0 || x >= t->width))) {
        clear_floats(to + i * ld, n);
        continue;
      }
      const float *line = (const float *)t->x->data + (p.at.picture * t->height + y) * length;
      for (int64_t k = 0; k < n; k += 16) pe_prefetch(line + from + AHEAD * t->sx * t->c + k);
      if (from >= 0 && from + n <= length) copy_floats(to + i * ld, line + from, n);
      else copy_line(line, from, n, length, to + i * ld);
    }
  }
}

/* Steps of 32 of k: a line of 64 bytes each, of the picture that was rounded before. */
static void gather_codes(const linear_gather *g, int64_t row0, int64_t rows, int64_t k0, int64_t count, char *to, int64_t ld) {
  const window_rows *w = (const window_rows *)g;
  const conv *t = w->t;
  const int64_t steps = t->cg / 32;
  for (int64_t i = 0; i < rows; i++) {
    const place at = place_of(t, row0 + i);
    for (int64_t s = k0 / 32; s < (k0 + count) / 32; s++) {
      const int64_t pixel = s / steps, y = at.y + pixel / t->kw * t->dy, x = at.x + pixel % t->kw * t->dx;
      v64u *line = (v64u *)(to + i * ld) + (s - k0 / 32);
      const int inside = y >= 0 && y < t->height && x >= 0 && x < t->width;
      const int64_t from = ((at.picture * t->height + y) * t->width + x) * (t->c / 32) + w->group * steps + s % steps;
      v64u_store(line, inside ? v64u_load(w->codes + 64 * from) : v64u_set1(0));
    }
  }
}

/* Outputs lo .. hi - 1 of the strip that begins with output c0, of which acc has the sums, to the result. */
static void finish(const conv *t, int64_t c0, int64_t lo, int64_t hi, int64_t row0, int64_t rows, const float *acc) {
  for (int64_t c = lo / 16 * 16; c < hi; c += 16) {
    const int64_t g = (c - c0) / 16, first = pe_max(lo, c), n = pe_min(hi, c + 16) - first;
    const float *from = acc + g / PANEL_GROUPS * rows * 16 * PANEL_GROUPS + g % PANEL_GROUPS * 16;
    v16f bias = v16f_zero();
    if (t->bias) bias = load_some((const float *)t->bias->data + c, t->o - c);
    for (int64_t i = 0; i < rows; i++, from += 16 * PANEL_GROUPS) {
      v16f y = v16f_load(from);
      if (t->bias) y = v16f_add(y, bias);
      y = linear_activate(y, t->activation);
      float *to = (float *)t->out->data + (row0 + i) * t->o + first;
      if (n == 16) {
        conv_store(t, to, y, 16);
      } else if (first == c) {
        v16f_store_n(to, y, n);
      } else { /* a group of channels that begins within 16 outputs */
        float part[16];
        v16f_store(part, y);
        memcpy(to, part + (first - c), (size_t)n * sizeof(float));
      }
    }
  }
}

/* Windows of a block: as even as they can be, in whole eights. */
static int64_t block_rows(const conv *t) {
  const int64_t m = pe_max(1, t->n * t->rows * t->columns), blocks = (m + ROWS_BLOCK - 1) / ROWS_BLOCK;
  return pe_min(ROWS_BLOCK, pe_round_up((m + blocks - 1) / blocks, 8));
}

/* The most that a block has with these windows or fewer, of which blocks may be larger: memory is for all numbers up to the largest. */
static int64_t most_rows(const conv *t) { return pe_min(ROWS_BLOCK, pe_round_up(pe_max(1, t->n * t->rows * t->columns), 8)); }

/* Whether the picture is rounded to int8 before: its weights ask for it, and blocks do not reach over a pixel. */
static int rounds_first(const conv *t, linear_needs needs) { return needs.quantized && t->cg % 32 == 0; }

typedef struct conv_places { linear_places y; int64_t gather, codes; } conv_places; /* bytes: of a thread, then of all */

/* Panels of a group's outputs: they lie in 16s of the weight's rows, the first and last of which they may share with other groups. */
static int64_t group_panels(const conv *t) { return ((t->og + 30) / 16 + PANEL_GROUPS - 1) / PANEL_GROUPS; }

static conv_places conv_memory(const conv *t, int64_t rows) {
  const linear_needs needs = linear_needs_of(&t->w, 1);
  conv_places y = {.gather = 0};
  const int64_t gather = linear_gather_bytes(rows, needs.quantized);
  y.y.own_h = 0;
  /* linear's strips have STRIP_PANELS: sums of as many rows as make up for it */
  linear_own_memory(&y.y, pe_round_up(gather, 64), rows / STRIP_PANELS * pe_min(MOST_PANELS, group_panels(t)), t->k, needs);
  y.y.own = pe_round_up(y.y.own, 64);
  y.codes = rounds_first(t, needs) ? t->n * t->height * t->width * (t->c / 32) * 64 : 0;
  return y;
}

static pe_status multiply_windows(const conv *t, const conv_places *y, pe_stream *s) {
  const linear_needs needs = linear_needs_of(&t->w, 1);
  const int64_t m = t->n * t->rows * t->columns, size = block_rows(t), blocks = (m + size - 1) / size;
  char *own = s->scratch + y->codes + s->ith * y->y.own;
  window_rows rows = {.gather = {.floats = gather_floats, .room = (float *)own}, .t = t};
  if (rounds_first(t, needs)) {
    const int64_t pixels = t->n * t->height * t->width;
    for (int64_t at; (at = 64 * pe_next(s, 0)) < pixels;)
      for (int64_t i = at; i < pe_min(pixels, at + 64); i++)
        linear_quantize((const float *)t->x->data + i * t->c, t->c, s->scratch + i * (t->c / 32) * 64);
    pe_barrier(s);
    rows.codes = s->scratch;
    rows.gather.codes = gather_codes;
  }
  const linear_job job = {.w = &t->w, .n_w = 1, .n_sets = 1, .m = m, .k = t->k, .rows = size, .gather = &rows.gather};
  const int64_t panels = group_panels(t);
  int64_t most = MOST_PANELS, strips;
  for (;; most = (most + 1) / 2) {
    strips = (panels + most - 1) / most;
    if (most == 1 || blocks * t->groups * strips >= 8 * s->nth) break;
  }
  const int64_t wide = (panels + strips - 1) / strips; /* as even as they can be */
  for (int64_t item; (item = pe_next(s, 1)) < blocks * t->groups * strips;) {
    const int64_t row0 = item / strips / t->groups * size, n = pe_min(size, m - row0);
    rows.group = item / strips % t->groups;
    const int64_t lo = rows.group * t->og, hi = lo + t->og, g0 = lo / 16 + item % strips * PANEL_GROUPS * wide;
    const int64_t count = pe_min(PANEL_GROUPS * wide, (hi + 15) / 16 - g0);
    if (count <= 0) continue;
    float *acc = (float *)(own + y->y.acc);
    const pe_status bad = linear_multiply(&job, t->w, g0, (count + PANEL_GROUPS - 1) / PANEL_GROUPS, t->w->data, row0, n, own, &y->y, acc);
    if (bad) return bad;
    finish(t, 16 * g0, pe_max(lo, 16 * g0), pe_min(hi, 16 * (g0 + count)), row0, n, acc);
  }
  conv_stored(t);
  return PE_OK;
}

/* ---- by channel ---- */

/* Bytes of the weights as floats [kh kw][c rounded up to 16], which threads share; of each thread's room for 16 rows of
 * them, and for pixels that lie outside of a picture. */
static int64_t taps_bytes(const conv *t) { return pe_round_up(4 * t->kh * t->kw * pe_round_up(t->c, 16), 64); }
static int64_t rows_own(const conv *t) { return pe_round_up(4 * 16 * t->kh * t->kw, 64); }
static int64_t taps_own(const conv *t) { return rows_own(t) + pe_round_up(4 * (PLACES + 2) * t->c, 64); }

/* The weights of channels 16 g .. 16 g + 15. */
static pe_status load_taps(const conv *t, int64_t g, float *taps, float *room) {
  const int64_t n = t->kh * t->kw, cp = pe_round_up(t->c, 16);
  const int32_t id = conv_format(t->w);
  if (t->w->dtype >= PE_PACKED) {
    const char *from = (const char *)t->w->data + g * pe_pack_group_bytes(id, n);
    for (int64_t i = 0; i < n; i++) {
      const char *p = from + 16 * i * pe_format_of(id).bytes;
      v16f_store(taps + i * cp + 16 * g, id == PE_F32 ? v16f_load((const float *)p) : id == PE_F16 ? v16f_load_f16(p) : v16f_load_bf16(p));
    }
    return PE_OK;
  }
  for (int64_t r = 0; r < 16; r++) {
    const int64_t row = pe_min(16 * g + r, t->c - 1);
    const pe_status bad = pe_dequantize_row(id, (const char *)t->w->data + row * t->w->stride[0], room, n);
    if (bad) return bad;
    for (int64_t i = 0; i < n; i++) taps[i * cp + 16 * g + r] = room[i];
  }
  return PE_OK;
}

PE_INLINE const float *bias_from(const conv *t, int64_t c) { return t->bias ? (const float *)t->bias->data + c : 0; }

/* `count` places from (y, x) on of a picture, in 16 channels from c0 on. Rows and columns of the window that lie in the picture for all of
 * them: y0 .. y1 - 1, x0 .. x1 - 1. */
typedef struct inside { int64_t y0, y1, x0, x1; } inside;
PE_INLINE void channel_places(const conv *t, int count, const float *x, const float *taps, inside in, int64_t c0, float *to) {
  const int64_t left = t->c - c0, cp = pe_round_up(t->c, 16), step = t->sx * t->c;
  v16f sum[PLACES];
#pragma GCC unroll 4
  for (int i = 0; i < count; i++) sum[i] = v16f_zero();
  for (int64_t ky = in.y0; ky < in.y1; ky++)
    for (int64_t kx = in.x0; kx < in.x1; kx++) {
      const v16f w = v16f_load(taps + (ky * t->kw + kx) * cp + c0);
      const float *from = x + (ky * t->dy * t->width + kx * t->dx) * t->c + c0;
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) sum[i] = v16f_fma(load_some(from + i * step, left), w, sum[i]);
    }
  conv_finish(t, count, 1, sum, bias_from(t, c0), left, to + c0, t->c);
}

/* Two rows of PLACES places, of windows of 3 x 3 without stride or dilation: 4 lines of PLACES + 2 pixels, each loaded once. `edge` says which
 * pixels of a line are there: SQUARE_ANY those that `in` says, of any number of channels and for `rows` and `columns` of the places only. Lines
 * that lie outside of the picture point to zeros. */
typedef enum square_edge { SQUARE_INSIDE, SQUARE_LEFT, SQUARE_RIGHT, SQUARE_ANY } square_edge;
typedef struct square {
  const float *lines[4]; /* at the first pixel, which may lie before the picture */
  int64_t x0, x1;        /* pixels in the picture: x0 .. x1 - 1 */
  int64_t rows, columns;
} square;
PE_INLINE void channel_square(const conv *t, square_edge edge, const square *in, const float *taps, int64_t c0, float *to) {
  const int64_t cp = pe_round_up(t->c, 16), left = edge == SQUARE_ANY ? t->c - c0 : 16;
  v16f sum[2][PLACES];
#pragma GCC unroll 4
  for (int i = 0; i < PLACES; i++) sum[0][i] = sum[1][i] = v16f_zero();
#pragma GCC unroll 4
  for (int y = 0; y < 4; y++) {
    const float *from = in->lines[y] + c0;
#pragma GCC unroll 8
    for (int j = 0; j < PLACES + 2; j++) {
      if ((edge == SQUARE_LEFT && j == 0) || (edge == SQUARE_RIGHT && j == PLACES + 1)) continue;
      if (edge == SQUARE_ANY && (j < in->x0 || j >= in->x1)) continue;
      const v16f pixel = load_some(from + j * t->c, left);
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++)
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; kx++)
          if (y >= r && y < r + 3 && j >= kx && j < kx + PLACES)
            sum[r][j - kx] = v16f_fma(pixel, v16f_load(taps + (3 * (y - r) + kx) * cp + c0), sum[r][j - kx]);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; r++, to += t->columns * t->c) {
    if (edge != SQUARE_ANY) {
      conv_finish(t, PLACES, 1, sum[r], bias_from(t, c0), left, to + c0, t->c);
      continue;
    }
#pragma GCC unroll 4
    for (int i = 0; i < PLACES; i++)
      if (r < in->rows && i < in->columns) conv_finish(t, 1, 1, &sum[r][i], bias_from(t, c0), left, to + i * t->c + c0, 0);
  }
}

/* The same for channels c0 to end - 1. */
PE_INLINE void channel_squares(const conv *t, square_edge edge, const square *in, const float *taps, int64_t c0, int64_t end, float *to) {
  for (; c0 + 16 <= end; c0 += 16) channel_square(t, edge, in, taps, c0, to);
  if (c0 < end) channel_square(t, SQUARE_ANY, in, taps, c0, to);
}

/* Rows row and row + 1 of a picture's results by squares. Channels are taken 256 at a time, whose weights stay in the first cache. The last
 * square of a row begins where it ends with the row: some results are made twice. zeros: a line of PLACES + 2 pixels. */
static void convolve_squares(const conv *t, const float *taps, const float *zeros, int64_t picture, int64_t row) {
  const int64_t y = row - t->top, last = pe_max(0, t->columns - PLACES);
  for (int64_t block = 0; block < t->c; block += 256)
    for (int64_t next = 0; next < t->columns; next += PLACES) {
      const int64_t column = pe_min(next, last), x = column - t->left, end = pe_min(t->c, block + 256);
      square in = {.x0 = pe_max(0, -x), .x1 = pe_min(PLACES + 2, t->width - x), .rows = t->rows - row, .columns = t->columns - column};
      for (int64_t i = 0; i < 4; i++) {
        const int inside = y + i >= 0 && y + i < t->height;
        in.lines[i] = inside ? (const float *)t->x->data + ((picture * t->height + y + i) * t->width + x) * t->c : zeros;
      }
      float *to = (float *)t->out->data + ((picture * t->rows + row) * t->columns + column) * t->c;
      const int whole = in.rows >= 2 && in.columns >= PLACES, cut = PLACES + 2 - (int)in.x1;
      if (whole && in.x0 == 0 && cut == 0) channel_squares(t, SQUARE_INSIDE, &in, taps, block, end, to);
      else if (whole && in.x0 == 1 && cut == 0) channel_squares(t, SQUARE_LEFT, &in, taps, block, end, to);
      else if (whole && in.x0 == 0 && cut == 1) channel_squares(t, SQUARE_RIGHT, &in, taps, block, end, to);
      else for (int64_t c0 = block; c0 < end; c0 += 16) channel_square(t, SQUARE_ANY, &in, taps, c0, to);
    }
}

/* Of a window that begins at `at`: from the first row (column) in the picture to behind the last. */
PE_INLINE int64_t first_inside(int64_t at, int64_t step, int64_t window) { return pe_min(window, at >= 0 ? 0 : (-at + step - 1) / step); }
PE_INLINE int64_t end_inside(int64_t at, int64_t step, int64_t window, int64_t size) {
  return pe_max(0, pe_min(window, at >= size ? 0 : (size - at + step - 1) / step));
}

static void convolve_row(const conv *t, const float *taps, int64_t row) {
  for (int64_t column = 0, count; column < t->columns; column += count) {
    const place at = place_of(t, row * t->columns + column);
    count = pe_min(PLACES, t->columns - column);
    inside in = {first_inside(at.y, t->dy, t->kh), end_inside(at.y, t->dy, t->kh, t->height), 0, t->kw};
    if (count < PLACES || at.x < 0 || at.x + (PLACES - 1) * t->sx + (t->kw - 1) * t->dx >= t->width) {
      count = 1;
      in.x0 = first_inside(at.x, t->dx, t->kw), in.x1 = end_inside(at.x, t->dx, t->kw, t->width);
    }
    const float *x = (const float *)t->x->data + ((at.picture * t->height + at.y) * t->width + at.x) * t->c;
    float *to = (float *)t->out->data + (row * t->columns + column) * t->c;
    for (int64_t c0 = 0; c0 < t->c; c0 += 16)
      if (count == PLACES) channel_places(t, PLACES, x, taps, in, c0, to);
      else channel_places(t, 1, x, taps, in, c0, to);
  }
}

static pe_status convolve_channels(const conv *t, pe_stream *s) {
  const int64_t groups = (t->c + 15) / 16;
  float *taps = (float *)s->scratch, *room = (float *)(s->scratch + taps_bytes(t) + s->ith * taps_own(t));
  for (int64_t g; (g = pe_next(s, 0)) < groups;) {
    const pe_status bad = load_taps(t, g, taps, room);
    if (bad) return bad;
  }
  pe_barrier(s);
  if (t->kh == 3 && t->kw == 3 && t->sy == 1 && t->sx == 1 && t->dy == 1 && t->dx == 1) {
    const int64_t pairs = (t->rows + 1) / 2;
    float *zeros = room + rows_own(t) / 4;
    memset(zeros, 0, (size_t)((PLACES + 2) * t->c) * sizeof(float));
    for (int64_t pair; (pair = pe_next(s, 1)) < t->n * pairs;) convolve_squares(t, taps, zeros, pair / pairs, pair % pairs * 2);
  } else {
    for (int64_t row; (row = pe_next(s, 1)) < t->n * t->rows;) convolve_row(t, taps, row);
  }
  conv_stored(t);
  return PE_OK;
}

/* ---- the kernel ---- */

PE_SCRATCH(cpu, conv2d)(const pe_args *a, const void *params, int32_t n_threads) {
  const conv t = conv_of(pe_arg(a, 0), pe_arg(a, 1), pe_arg(a, 3), params);
  if (by_channel(&t)) return taps_bytes(&t) + n_threads * taps_own(&t);
  if (PE_NAME(conv_few_fits)(&t)) return PE_NAME(conv_few_bytes)(&t, n_threads);
  const conv_places y = conv_memory(&t, most_rows(&t));
  const int64_t product = y.codes + n_threads * y.y.own; /* which smaller pictures may take */
  return PE_NAME(winograd_fits)(&t) ? pe_max(product, PE_NAME(winograd_bytes)(&t, n_threads)) : product;
}

PE_KERNEL(cpu, conv2d)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *bias, const pe_tensor *out, const pe_conv2d_params *p,
                       pe_stream *s) {
  conv t = conv_of(x, weight, out, p);
  t.bias = bias;
  t.past = conv_stores_past(&t);
  if (t.n * t.rows * t.columns == 0 || t.o == 0) return PE_OK;
  if (by_channel(&t)) {
    if (s->scratch_bytes < taps_bytes(&t) + s->nth * taps_own(&t)) return pe_fail(s, PE_NO_MEMORY, "conv2d: scratch is too small");
    return convolve_channels(&t, s);
  }
  if (PE_NAME(conv_few_fits)(&t)) {
    if (s->scratch_bytes < PE_NAME(conv_few_bytes)(&t, s->nth)) return pe_fail(s, PE_NO_MEMORY, "conv2d: scratch is too small");
    return PE_NAME(conv_few)(&t, s);
  }
  if (PE_NAME(winograd_fits)(&t)) {
    if (s->scratch_bytes < PE_NAME(winograd_bytes)(&t, s->nth)) return pe_fail(s, PE_NO_MEMORY, "conv2d: scratch is too small");
    return PE_NAME(winograd)(&t, s);
  }
  const conv_places y = conv_memory(&t, block_rows(&t));
  if (s->scratch_bytes < y.codes + s->nth * y.y.own) return pe_fail(s, PE_NO_MEMORY, "conv2d: scratch is too small");
  return multiply_windows(&t, &y, s);
}

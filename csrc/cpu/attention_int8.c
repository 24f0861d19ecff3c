/* attention_int8.c: attention with products="int8", for encoders: both of its products are of bytes, summed exactly in int32.
 * Reference: pyengine/ops/attention.py: attend_int8.
 *
 *   q   x scale log2(e), one scale a query
 *   k   less a centre, which adds the same to all scores of a query, one scale a key (SageAttention, Zhang et al. 2024,
 *       arXiv:2410.02367, does both)
 *   p   of a query and a tile of 64 keys: 255 * 2^(score - peak of the tile), to the nearest integer; the integers are summed as
 *       the divisor
 *   v   less a centre, which the result gets back, one scale for each element in a tile
 *
 * Everything is relative to a row's own interval: tiles are counted from `lo`, a centre is the mean of up to 64 keys spread over
 * the interval, scales are of keys within it. So a row's bits follow from its query, its interval and the keys in it; neither other
 * rows nor threads can change them, and keys outside are never read. Rows that share an interval share its bytes, which is
 * what makes this fast: in an encoder a picture's rows do, or a window's.
 *
 * A thread claims units: rows of one interval (as many as the second cache holds) and one key/value head. For TILES tiles at a time
 * it makes the bytes of K [e / 4][64 keys][4] and V [16][f][4 keys], then passes all queries by, ROWS at once. Vector
 * instructions of a query and a tile: e + f dot products, 26 loads of their bytes, about 75 for the softmax, f / 4 to add the
 * tile to the sums; of a key in each unit about 100. Bytes: a unit reads its keys' K and V once, and its queries.
 */
#include "attention.h"
#include "codes.h"

enum { KEYS = TILE_KEYS, TILES = 4, ROWS = PE_PARTS == 2 ? 4 : 6, VECTORS = PE_PARTS == 1 ? 4 : 1 };
enum { UNIT_BYTES = 512 << 10 }; /* what is kept of a unit's queries fits the second cache */
/* A query's top moves only when a tile's peak passes it by so many powers of 2, so sums are seldom shrunk by much. */
static const float SLACK = 8.0f, LOG2_E = 1.44269504f, LN_2 = 0.693147181f, LOG2_255 = 7.99435344f;

typedef struct bytes_tile {
  uint8_t *k;     /* [words, rounded up to 16][64][4]: codes + 128 of key j */
  float *ks;      /* [64] */
  int8_t *v;      /* [16][fp][4]: codes of keys l, l + 16, l + 32, l + 48 */
  float *vs;      /* [fp] */
  int32_t *v_sum; /* [fp]: sums of codes */
  int n;          /* keys; the others are zeros */
  float poison;   /* NaN where a scale of K is, else 0 */
} bytes_tile;

/* A thread's scratch; `top`, `sum` and `acc` are of the tiles so far: relative to 2^top, sum in 16 lanes. */
typedef struct buffers {
  int32_t *starts;            /* [m + 1]: first rows of blocks */
  float *k_centre, *v_centre; /* [ep], [fp] */
  float *cell, *cells;        /* [ep]; [64][fp] */
  int8_t *codes;              /* [16][words rounded up to 16][4] */
  bytes_tile tiles[TILES];
  int8_t *q;                  /* [n][ep] */
  float *qs;                  /* [n + 16] */
  int32_t *zero;              /* [n]: takes off the 128 of K's bytes */
  float *top, *sum, *acc;     /* [n + 16], [n][16], [n][fp] */
} buffers;

/* 4 elements of k each. */
static int64_t words_of(const job *w) { return (w->e + 3) / 4; }

static void *take(char *base, int64_t *at, int64_t bytes) {
  char *p = base ? base + *at : 0;
  *at += pe_round_up(bytes, 64);
  return p;
}

/* Put everything behind `base`; returns the bytes of one thread. */
static int64_t lay_out(const job *w, char *base, buffers *b) {
  const int64_t n = pe_round_up(w->rows * w->group, ROWS), words = pe_round_up(words_of(w), 16);
  int64_t at = 0;
  b->starts = take(base, &at, 4 * (w->m + 1));
  b->k_centre = take(base, &at, 4 * w->ep);
  b->v_centre = take(base, &at, 4 * w->fp);
  b->cell = take(base, &at, 4 * w->ep);
  b->cells = take(base, &at, 4 * KEYS * w->fp);
  b->codes = take(base, &at, 16 * 4 * words);
  for (int i = 0; i < TILES; i++) {
    bytes_tile *t = &b->tiles[i];
    t->k = take(base, &at, 4 * KEYS * words);
    t->ks = take(base, &at, 4 * KEYS);
    t->v = take(base, &at, KEYS * w->fp);
    t->vs = take(base, &at, 4 * w->fp);
    t->v_sum = take(base, &at, 4 * w->fp);
  }
  b->q = take(base, &at, n * w->ep);
  b->qs = take(base, &at, 4 * (n + 16));
  b->zero = take(base, &at, 4 * n);
  b->top = take(base, &at, 4 * (n + 16));
  b->sum = take(base, &at, 4 * 16 * n);
  b->acc = take(base, &at, 4 * n * w->fp);
  return at;
}

static int64_t unit_queries(const pe_tensor *q, const pe_tensor *v) {
  return UNIT_BYTES / (pe_round_up(q->shape[2], 16) + 4 * pe_round_up(v->shape[2], 16) + 76);
}

int64_t PE_NAME(attention_int8_scratch)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, int32_t n_threads) {
  buffers none;
  const job w = job_of(q, k, v, unit_queries(q, v), n_threads);
  return n_threads * lay_out(&w, 0, &none);
}

/* ---- cells of K and V ---- */

static const char *cell_at(const pe_tensor *t, int64_t head, int64_t key) {
  return (const char *)t->data + head * t->stride[0] + key * t->stride[1];
}
static int side_by_side(const pe_tensor *t) { return t->stride[2] == cell_format_of(t->dtype).bytes; }

/* Elements i .. i + 15 of a cell of n, 0 beyond. */
PE_INLINE v16f load_part(const int dtype, const char *cell, int plain, int64_t stride, int64_t i, int64_t n) {
  return plain && i + 16 <= n ? load_cell(dtype, cell, i) : load_cell_n(dtype, cell, stride, i, pe_min(16, n - i));
}

/* Ask for a cell; rows of a picture's keys lie so far apart that the hardware does not foresee them. */
PE_INLINE void fetch_cell(const pe_tensor *t, int64_t head, int64_t key) {
  const char *p = cell_at(t, head, key);
  for (int64_t i = 0, n = cell_offset(t->dtype, t->shape[2]); i < n; i += 64) __builtin_prefetch(p + i, 0, 3);
}

/* The cells of an interval of n keys that stand for it: all, or KEYS that are spread evenly. */
PE_INLINE int64_t sample(int64_t i, int64_t n) { return n <= KEYS ? i : i * n / KEYS; }

/* centre [elements rounded up to 16]: the mean of the cells that stand for lo .. hi - 1, added in their order. */
static void centre_of(const pe_tensor *t, int64_t head, int64_t lo, int64_t hi, float *to) {
  const int64_t n = t->shape[2], keys = pe_min(KEYS, hi - lo);
  const int plain = side_by_side(t);
  for (int64_t j = 0; j < keys; j++) fetch_cell(t, head, lo + sample(j, hi - lo));
#define MEAN(d)                                                                                                        \
  for (int64_t i = 0; i < n; i += 16) {                                                                                \
    v16f sum = v16f_zero();                                                                                            \
    for (int64_t j = 0; j < keys; j++)                                                                                 \
      sum = v16f_add(sum, load_part(d, cell_at(t, head, lo + sample(j, hi - lo)), plain, t->stride[2], i, n));         \
    v16f_store(to + i, v16f_mul(sum, v16f_set1(1.0f / (float)keys)));                                                  \
  }
  PE_EACH_CELL_FORMAT(t->dtype, MEAN)
}

/* One cell less the centre, 0 up to a multiple of 16; returns its largest magnitudes. */
static v16i read_cell(const pe_tensor *t, const char *cell, const float *centre, float *to) {
  const int64_t n = t->shape[2];
  const int plain = side_by_side(t);
  v16i most = v16i_zero();
#define READ(d)                                                                                                        \
  for (int64_t i = 0; i < n; i += 16) {                                                                                \
    const v16f x = v16f_sub(load_part(d, cell, plain, t->stride[2], i, n), v16f_load(centre + i));                     \
    v16f_store(to + i, x);                                                                                             \
    most = v16i_max(most, magnitude(x));                                                                               \
  }
  PE_EACH_CELL_FORMAT(t->dtype, READ)
  return most;
}

enum { AHEAD = 16 }; /* cells */

/* K of keys first .. first + t->n - 1; of those before hi, the next ones are asked for. */
static void quantize_keys(const job *w, int64_t head, int64_t first, int64_t hi, const buffers *b, bytes_tile *t) {
  const int64_t words = words_of(w), ld = 4 * pe_round_up(words, 16);
  t->poison = 0.0f;
  for (int j = 0; j < KEYS; j += 16) {
    memset(b->codes, 0, (size_t)(16 * ld));
    for (int r = j; r < j + 16; r++) {
      t->ks[r] = 0.0f;
      if (r >= t->n) continue;
      fetch_cell(w->k, head, pe_min(first + r + AHEAD, hi - 1));
      const v16i most = read_cell(w->k, cell_at(w->k, head, first + r), b->k_centre, b->cell);
      t->ks[r] = to_codes(b->cell, most, w->ep, b->codes + (r - j) * ld);
      t->poison += 0.0f * t->ks[r];
    }
    for (int64_t i = 0; i < words; i += 16) {
      v16f x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) x[r] = v16i_as_f(v64u_lanes(v64u_xor(v64u_load(b->codes + r * ld + 4 * i), v64u_set1(0x80))));
      transpose16(x, (float *)t->k + i * KEYS + j, KEYS);
    }
  }
}

/* V likewise. */
static void quantize_values(const job *w, int64_t head, int64_t first, int64_t hi, const buffers *b, bytes_tile *t) {
  for (int j = 0; j < t->n; j++) {
    fetch_cell(w->v, head, pe_min(first + j + AHEAD, hi - 1));
    read_cell(w->v, cell_at(w->v, head, first + j), b->v_centre, b->cells + j * w->fp);
  }
  memset(b->cells + t->n * w->fp, 0, (size_t)((KEYS - t->n) * w->fp) * 4);
  for (int64_t i = 0; i < w->fp; i += 16) {
    v16i most = v16i_zero(), sum = v16i_zero();
    for (int j = 0; j < t->n; j++) most = v16i_max(most, magnitude(v16f_load(b->cells + j * w->fp + i)));
    v16f inverse;
    v16f_store(t->vs + i, code_scales(most, &inverse));
    for (int l = 0; l < 16; l++) {
      v16i word = v16i_zero();
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const v16i c = v16f_to_i(v16f_mul(v16f_load(b->cells + (l + 16 * k) * w->fp + i), inverse));
        sum = v16i_add(sum, c);
        word = v16i_or(word, v16i_shl(v16i_and(c, v16i_set1(255)), 8 * k));
      }
      v16i_store(t->v + 4 * (l * w->fp + i), word);
    }
    v16i_store(t->v_sum + i, sum);
  }
}

/* ---- ROWS queries and a tile ---- */

/* u[r][j] = score of query r and key j, over the query's scale. */
static void scores(const job *w, const bytes_tile *t, const int8_t *q, const int32_t *zero, float u[ROWS][KEYS]) {
  const int64_t words = words_of(w);
  for (int first = 0; first < KEYS / 16; first += VECTORS) {
    v16i dot[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) dot[r][j] = v16i_set1(zero[r]);
    for (int64_t g = 0; g < words; g++) {
      v64u k[VECTORS];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++) k[j] = v64u_load(t->k + 4 * KEYS * g + 64 * (first + j));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const v64u x = v64u_set4(q + r * w->ep + 4 * g);
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) dot[r][j] = dot_z128(dot[r][j], k[j], x);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; j++)
        v16f_store(u[r] + 16 * (first + j), v16f_mul(v16i_to_f(dot[r][j]), v16f_load(t->ks + 16 * (first + j))));
  }
}

/* 2^x to the nearest integer for x < 8.1, within 0.02 before rounding; 0 for NaN. */
PE_INLINE v16i power_code(v16f x) {
  static const float c[4] = {0.999928057f, 0.693260968f, 0.242611125f, 0.0551716685f}; /* of 2^r, |r| <= 1/2: within 7.5e-5 */
  const v16f big = v16f_set1(12582912.0f);                                             /* 1.5 * 2^23: bits end with the integer */
  const v16f y = v16f_max(x, v16f_set1(-10.0f)), n = v16f_add(y, big);
  const v16f p = v16f_poly(v16f_sub(y, v16f_sub(n, big)), c, 4);
  return v16f_to_i(v16i_as_f(v16i_add(v16f_bits(p), v16i_shl(v16f_bits(n), 23))));
}

/* p: word l holds the codes of keys l, l + 16, l + 32, l + 48. Returns their sum in 16 lanes. */
PE_INLINE v16i probabilities(const float u[KEYS], float scale, float peak, uint8_t p[KEYS]) {
  const v16f factor = v16f_set1(scale), shift = v16f_set1(LOG2_255 - peak);
  v16i sum = v16i_zero(), word = v16i_zero();
#pragma GCC unroll 4
  for (int j = 0; j < KEYS / 16; j++) {
    const v16i c = power_code(v16f_fma(v16f_load(u + 16 * j), factor, shift));
    sum = v16i_add(sum, c);
    word = v16i_or(word, v16i_shl(c, 8 * j));
  }
  v16i_store(p, word);
  return sum;
}

/* acc[r][i] = factor[r] acc[r][i] + weight[r] vs[i] (codes of query r . codes of element i), 16 * vectors of i. */
PE_INLINE void values_body(const int vectors, const bytes_tile *t, int64_t first, int64_t fp, uint8_t p[ROWS][KEYS],
                           const float *factor, const float *weight, float *acc) {
  v16i dot[ROWS][VECTORS];
#pragma GCC unroll 4
  for (int j = 0; j < vectors; j++) {
    const v16i start = v16i_mul(v16i_load(t->v_sum + first + 16 * j), v16i_set1(PE_DOT_ZERO));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) dot[r][j] = start;
  }
  for (int l = 0; l < 16; l++) {
    v64u v[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) v[j] = v64u_load(t->v + 4 * (l * fp + first + 16 * j));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      const v64u x = v64u_set4((const int8_t *)p[r] + 4 * l);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) dot[r][j] = dot_z128(dot[r][j], x, v[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      float *a = acc + r * fp + first + 16 * j;
      const v16f y = v16f_mul(v16i_to_f(dot[r][j]), v16f_load(t->vs + first + 16 * j));
      v16f_store(a, v16f_fma(y, v16f_set1(weight[r]), v16f_mul(v16f_load(a), v16f_set1(factor[r]))));
    }
}

static void values(const bytes_tile *t, int64_t fp, uint8_t p[ROWS][KEYS], const float *factor, const float *weight, float *acc) {
  int64_t left = fp / 16;
  for (int64_t tiles = (left + VECTORS - 1) / VECTORS, first = 0, v; left; tiles--, left -= v, first += 16 * v) {
    v = (left + tiles - 1) / tiles; /* as even as they can be: 5 vectors are 3 + 2 */
#if PE_PARTS == 1
    if (v == 4) values_body(4, t, first, fp, p, factor, weight, acc);
    else if (v == 3) values_body(3, t, first, fp, p, factor, weight, acc);
    else if (v == 2) values_body(2, t, first, fp, p, factor, weight, acc);
    else
#endif
      values_body(1, t, first, fp, p, factor, weight, acc);
  }
}

/* Queries i .. i + ROWS - 1 see a tile. */
static void attend(const job *w, const bytes_tile *t, const buffers *b, int64_t i) {
  float u[ROWS][KEYS], peak[16] = {0}, factor[16], weight[16];
  uint8_t p[ROWS][KEYS];
  v16i sum[ROWS];
  scores(w, t, b->q + i * w->ep, b->zero + i, u);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    v16f best = v16f_set1(-__builtin_inff());
    for (int j = 0; t->n < KEYS && j < KEYS; j += 16)
      v16f_store(u[r] + j, v16f_first_n(v16f_load(u[r] + j), pe_min(16, pe_max(0, t->n - j)), -__builtin_inff()));
#pragma GCC unroll 4
    for (int j = 0; j < KEYS; j += 16) best = v16f_max(v16f_load(u[r] + j), best);
    peak[r] = v16f_hmax(best) * b->qs[i + r];
  }
  const v16f old = v16f_load(b->top + i), new = v16f_load(peak);
  const v16f top = v16f_select_lt(v16f_add(old, v16f_set1(SLACK)), new, new, old); /* -inf before the first tile: factor 0 */
  const v16f nan = v16f_fma(v16f_load(b->qs + i), v16f_zero(), v16f_set1(t->poison));
  v16f_store(factor, v16f_exp(v16f_mul(v16f_sub(old, top), v16f_set1(LN_2))));
  v16f_store(weight, v16f_add(v16f_exp(v16f_mul(v16f_sub(new, top), v16f_set1(LN_2))), nan));
  v16f_store_n(b->top + i, top, ROWS);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) sum[r] = probabilities(u[r], b->qs[i + r], peak[r], p[r]);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++) {
    float *s = b->sum + 16 * (i + r);
    v16f_store(s, v16f_fma(v16i_to_f(sum[r]), v16f_set1(weight[r]), v16f_mul(v16f_load(s), v16f_set1(factor[r]))));
  }
  values(t, w->fp, p, factor, weight, b->acc + i * w->fp);
}

/* ---- units ---- */

/* Queries of the unit as codes, and zeros up to a multiple of ROWS; no key seen yet. */
static void start(const job *w, const unit *u, const buffers *b) {
  const int64_t n = u->n_rows * w->group, padded = pe_round_up(n, ROWS);
  const v16f factor = v16f_set1(w->scale * LOG2_E);
  for (int64_t i = 0; i < n; i++) {
    const int64_t row = u->row + i / w->group, head = u->head * w->group + i % w->group;
    const char *q = (const char *)w->q->data + row * w->q->stride[0] + head * w->q->stride[1];
    v16i most = v16i_zero(), sum = v16i_zero();
    for (int64_t j = 0; j < w->e; j += 16) {
      const v16f x = v16f_mul(load_part(PE_F32, q, w->q->stride[2] == 4, w->q->stride[2], j, w->e), factor);
      v16f_store(b->cell + j, x);
      most = v16i_max(most, magnitude(x));
    }
    b->qs[i] = to_codes(b->cell, most, w->ep, b->q + i * w->ep);
    for (int64_t j = 0; j < w->ep; j += 16) sum = v16i_add(sum, v16i_load_i8(b->q + i * w->ep + j));
    b->zero[i] = -(128 - PE_DOT_ZERO) * v16i_sum(sum);
  }
  memset(b->q + n * w->ep, 0, (size_t)((padded - n) * w->ep));
  for (int64_t i = n; i < padded; i++) b->qs[i] = 0.0f, b->zero[i] = 0;
  for (int64_t i = 0; i < padded; i++) b->top[i] = -__builtin_inff();
  memset(b->sum, 0, (size_t)padded * 16 * 4);
  memset(b->acc, 0, (size_t)(padded * w->fp) * 4);
}

/* out = mean of v + acc / sum; zeros where the interval is empty. */
static void finish(const job *w, const unit *u, const buffers *b, int empty) {
  for (int64_t i = 0; i < u->n_rows * w->group; i++) {
    const int64_t row = u->row + i / w->group, head = u->head * w->group + i % w->group;
    float *out = w->out + (row * w->h + head) * w->f;
    if (empty) {
      memset(out, 0, (size_t)w->f * 4);
      continue;
    }
    const v16f sum = v16f_set1(v16f_sum(v16f_load(b->sum + 16 * i)));
    for (int64_t j = 0; j < w->f; j += 16)
      store_some(out + j, v16f_add(v16f_div(v16f_load(b->acc + i * w->fp + j), sum), v16f_load(b->v_centre + j)), w->f - j);
  }
}

static void run_unit(const job *w, const unit *u, buffers *b) {
  const int64_t lo = w->lo[u->row], hi = w->hi[u->row], n = u->n_rows * w->group;
  if (hi > lo) {
    centre_of(w->k, u->head, lo, hi, b->k_centre);
    centre_of(w->v, u->head, lo, hi, b->v_centre);
    start(w, u, b);
  }
  for (int64_t first = lo; first < hi; first += TILES * KEYS) {
    int count = 0;
    for (int64_t key = first; count < TILES && key < hi; key += KEYS, count++) {
      bytes_tile *t = &b->tiles[count];
      t->n = (int)pe_min(KEYS, hi - key);
      quantize_keys(w, u->head, key, hi, b, t);
      quantize_values(w, u->head, key, hi, b, t);
    }
    for (int64_t i = 0; i < n; i += ROWS)
      for (int c = 0; c < count; c++) attend(w, &b->tiles[c], b, i);
  }
  finish(w, u, b, hi <= lo);
}

static int same_interval(const job *w, int64_t a, int64_t b) { return w->lo[a] == w->lo[b] && w->hi[a] == w->hi[b]; }

/* Cut the rows into blocks of one interval each, as even as they can be; returns their number. starts: [m + 1]. */
static int64_t cut_by_interval(const job *w, int32_t *starts) {
  int64_t n = 0;
  for (int64_t r = 0, end; r < w->m; r = end) {
    for (end = r + 1; end < w->m && same_interval(w, r, end);) end++;
    const int64_t parts = (end - r + w->rows - 1) / w->rows, size = (end - r + parts - 1) / parts;
    for (int64_t at = r; at < end; at += size) starts[n++] = (int32_t)at;
  }
  starts[n] = (int32_t)w->m;
  return n;
}

pe_status PE_NAME(attention_int8)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo,
                                  const pe_tensor *hi, const pe_tensor *out, float scale, pe_stream *s) {
  job w = job_of(q, k, v, unit_queries(q, v), s->nth);
  w.lo = lo->data, w.hi = hi->data, w.out = out->data, w.scale = scale;
  const int64_t n_cells = pe_min(k->shape[1], v->shape[1]);
  for (int64_t r = 0; r < w.m; r++)
    if (w.lo[r] < w.hi[r] && (w.lo[r] < 0 || w.hi[r] > n_cells))
      return pe_fail(s, PE_BAD_VALUE, "attention: row %lld reads keys %d to %d of %lld", (long long)r, w.lo[r], w.hi[r],
                     (long long)n_cells);
  buffers b;
  const int64_t own = lay_out(&w, 0, &b);
  if (own * s->nth > s->scratch_bytes) return pe_fail(s, PE_NO_MEMORY, "attention: scratch is too small");
  lay_out(&w, s->scratch + own * s->ith, &b);
  const int64_t n_blocks = cut_by_interval(&w, b.starts);
  /* Units: interval by interval, so that rows of memory are used whole; in it heads, so that a head's keys stay in a cache. */
  int64_t first = 0, count = 0, before = 0; /* the interval's first block, their number, units before */
  for (int64_t i; (i = pe_next(s, 0)) < n_blocks * w.g;) {
    while (i >= before + count * w.g) {
      before += count * w.g, first += count;
      for (count = 1; first + count < n_blocks && same_interval(&w, b.starts[first], b.starts[first + count]);) count++;
    }
    const int64_t block = first + (i - before) % count;
    const unit u = {b.starts[block], b.starts[block + 1] - b.starts[block], (i - before) / count};
    run_unit(&w, &u, &b);
  }
  return PE_OK;
}

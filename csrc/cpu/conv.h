/* conv.h: what the files of conv2d share: conv.c says which of them computes what. */
#ifndef PE_CONV_H
#define PE_CONV_H

#include "linear_parts.h"
#include "vec.h"

typedef struct conv {
  const pe_tensor *x, *w, *bias, *out;
  int64_t n, height, width, c;    /* the pictures */
  int64_t rows, columns, o;       /* the results */
  int64_t kh, kw, sy, sx, top, left, dy, dx, groups;
  int64_t cg, og, k;              /* channels and outputs of a group; k of a window */
  int32_t activation;
  int past;                       /* whether results are stored past the caches: see conv_store */
} conv;

static inline int32_t conv_format(const pe_tensor *w) { return w->dtype >= PE_PACKED ? w->dtype - PE_PACKED : w->dtype; }

/* Results that are larger than a second cache leave it before anybody reads them. Stored past the caches, their lines are not read before. */
enum { PAST_BYTES = 2 << 20, CONV_MOST_SUMS = 24 /* vectors of results in registers */ };
static inline int conv_stores_past(const conv *t) {
#if defined(PE_AVX512) || defined(PE_AVX2)
  return 4 * t->n * t->rows * t->columns * t->o >= PAST_BYTES && t->o % 16 == 0 && (uintptr_t)t->out->data % 64 == 0;
#else
  return (void)t, 0;
#endif
}

PE_INLINE void store_past(float *to, v16f y) {
#if defined(PE_AVX512)
  _mm512_stream_ps(to, (__m512)y.a);
#elif defined(PE_AVX2)
  _mm256_stream_ps(to, (__m256)y.a), _mm256_stream_ps(to + 8, (__m256)y.b);
#else
  v16f_store(to, y);
#endif
}

/* Up to 16 results. */
PE_INLINE void conv_store(const conv *t, float *to, v16f y, int64_t left) {
  if (t->past) store_past(to, y);
  else store_some(to, y, left);
}

/* Activations that take more than an instruction, of n vectors. */
static __attribute__((noinline, unused)) void conv_curve(float *y, int n, int32_t kind) {
  for (int i = 0; i < n; i++) v16f_store(y + 16 * i, linear_activate(v16f_load(y + 16 * i), kind));
}

/* Sums in registers, y[place][group of 16 outputs], with bias (or NULL) and activation to results: those of a place are `apart` floats behind
 * those of the one before, and `left` of each are there. What is done is asked once and not for each vector: among 27 numbers a window that costs
 * a fifth of the time. */
PE_INLINE void conv_finish(const conv *t, int places, int groups, v16f *y, const float *bias, int64_t left, float *to, int64_t apart) {
  const int n = places * groups;
  if (bias)
PE_UNROLL(8)
    for (int g = 0; g < groups; g++) {
      const v16f b = load_some(bias + 16 * g, left - 16 * g);
PE_UNROLL(8)
      for (int i = 0; i < places; i++) y[i * groups + g] = v16f_add(y[i * groups + g], b);
    }
  if (t->activation == PE_CONV2D_ACTIVATION_RELU) {
PE_UNROLL(32)
    for (int i = 0; i < n; i++) y[i] = v16f_max(v16f_zero(), y[i]);
  } else if (t->activation != PE_CONV2D_ACTIVATION_NONE) {
    float room[16 * CONV_MOST_SUMS];
PE_UNROLL(32)
    for (int i = 0; i < n; i++) v16f_store(room + 16 * i, y[i]);
    conv_curve(room, n, t->activation);
PE_UNROLL(32)
    for (int i = 0; i < n; i++) y[i] = v16f_load(room + 16 * i);
  }
#define STORE(how)                                                                                                     \
PE_UNROLL(8)                                                                                                           \
  for (int i = 0; i < places; i++)                                                                                     \
PE_UNROLL(8)                                                                                                           \
    for (int g = 0; g < groups; g++) how(to + i * apart + 16 * g, y[i * groups + g]);
#define SOME(to, y) store_some(to, y, left - 16 * g)
  if (t->past) { STORE(store_past) }
  else if (left >= 16 * groups) { STORE(v16f_store) }
  else { STORE(SOME) }
#undef SOME
#undef STORE
}

/* At the end of a thread's share of them: what was stored past the caches is there for all. */
PE_INLINE void conv_stored(const conv *t) {
#if defined(PE_AVX512) || defined(PE_AVX2)
  if (t->past) _mm_sfence();
#endif
  (void)t;
}

/* Weights of one group of 16 outputs: packed, or rows of which the last counts again where there are less than 16. */
typedef struct conv_weights { int32_t id; int packed; int64_t size; const uint8_t *at[16]; } conv_weights;
PE_INLINE conv_weights conv_weights_of(const conv *t, int64_t g) {
  const int32_t id = conv_format(t->w);
  conv_weights y = {.id = id, .packed = t->w->dtype >= PE_PACKED, .size = pe_format_of(id).bytes};
  for (int64_t r = 0; r < 16; r++)
    y.at[r] = (const uint8_t *)t->w->data + (y.packed ? g * pe_pack_group_bytes(id, t->k) : pe_min(16 * g + r, t->o - 1) * t->w->stride[0]);
  return y;
}

/* Number k of each of their windows. */
PE_INLINE v16f conv_tap(const conv_weights *g, int64_t k) {
  if (g->packed) return linear_floats_of(g->id, g->at[0] + 16 * k * g->size);
  uint8_t rows[64];
  for (int r = 0; r < 16; r++) memcpy(rows + r * g->size, g->at[r] + k * g->size, (size_t)g->size);
  return linear_floats_of(g->id, rows);
}

/* conv_few.c: the same three of pictures with few channels. */
int PE_NAME(conv_few_fits)(const conv *t);
int64_t PE_NAME(conv_few_bytes)(const conv *t, int64_t n_threads);
pe_status PE_NAME(conv_few)(const conv *t, pe_stream *s);

/* winograd.c: whether it takes a convolution, the scratch that it needs, and the kernel. */
int PE_NAME(winograd_fits)(const conv *t);
int64_t PE_NAME(winograd_bytes)(const conv *t, int64_t n_threads);
pe_status PE_NAME(winograd)(const conv *t, pe_stream *s);

#endif

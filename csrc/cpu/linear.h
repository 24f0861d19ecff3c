/* linear.h: what linear.c offers to other kernels that multiply rows by weights (experts.c): rows of x as int8, and one strip of a
 * matrix times a block of such rows. linear.c says how; results have the same bits whoever calls.
 */
#ifndef PE_LINEAR_H
#define PE_LINEAR_H

#include "cpu.h"

#define linear_needs_of PE_NAME(linear_needs_of)
#define linear_memory PE_NAME(linear_memory)
#define linear_prepare PE_NAME(linear_prepare)
#define linear_strip PE_NAME(linear_strip)
#define linear_strip_bytes PE_NAME(linear_strip_bytes)
#define linear_is_float PE_NAME(linear_is_float)

#if defined(PE_AVX512)
enum { PANEL_GROUPS = 3 }; /* groups of 16 rows of a matrix in a panel */
#else
enum { PANEL_GROUPS = 1 };
#endif
enum {
  ROWS_FEW = 4,     /* rows that each thread quantizes for itself */
  ROWS_SOME = 16,   /* rows that take the kernels for few rows */
  ROWS_BLOCK = 256, /* rows of x in a block: 256 of their k (128 KB) and the sums of a strip (192 KB) fit the second cache */
  STRIP_PANELS = 4, /* panels in a strip; 2 of each matrix with glu */
};

/* Bytes of one prepared row of x: as int8 with scales, and as float32. Rows lie so far apart. */
static inline int64_t linear_row(int64_t k) { return k / 32 * 64 + 64; }
static inline int64_t linear_float_row(int64_t k) { return pe_round_up(4 * k, 64); }

/* Rows of x that are multiplied at once, of m. */
static inline int64_t linear_block(int64_t m) { return pe_min(pe_round_up(m, 8), ROWS_BLOCK); }

typedef struct linear_job {
  const pe_tensor *const *w, *const *bias, *const *out;
  const pe_tensor *residual;
  pe_linear_params p;
  int32_t n_w;          /* matrices */
  int32_t n_sets;       /* lists of panels: n_w, or 1 with glu */
  int64_t m, k;
  int64_t rows;         /* rows of x in a block */
  int64_t wide;         /* panels in a strip */
  int64_t strips;       /* of all sets */
  const char *q;        /* quantized rows, linear_row apart */
  const float *h;       /* float rows */
  int64_t ldh;          /* floats */
  const int32_t *order; /* the row of the results that belongs to each row of x; NULL: the same */
} linear_job;

/* Offsets of working memory for m rows at once. What the threads share comes first: quantized rows at 0, float rows at h. */
typedef struct linear_places {
  int64_t h, shared;
  int64_t own_h, panel, rows, acc, part, copy, own;  /* offsets in the own part of a thread, and its size */
} linear_places;

/* What the formats of a product's weights ask for: rows of x as int8, rows as floats, bytes for a panel that is packed on its way. */
typedef struct linear_needs { int quantized, floats; int64_t copy; } linear_needs;
linear_needs linear_needs_of(const pe_tensor *const *w, int32_t n_w);

linear_places linear_memory(int64_t m, int64_t k, linear_needs needs, int normed);

/* Whether products with this weight take float32 rows of x; else they take int8. */
int linear_is_float(const pe_tensor *w);

/* Row i of x, normed where `norm` is given: as int8 to q, and as float32 to h. q may be NULL; h only without a norm. */
void linear_prepare(const pe_tensor *x, const pe_tensor *norm, float eps, int64_t i, int64_t k, char *q, float *h);

/* The strip of a set that begins with group g0, times rows row0 .. row0 + rows - 1 of x, finished into the results. `own`: the
 * thread's working memory, laid out as y says; `next`: the weights that this thread will read afterwards, to prefetch. */
pe_status linear_strip(const linear_job *t, int set, int64_t g0, const uint8_t *next, int64_t row0, int64_t rows, char *own,
                       const linear_places *y);

/* Where group g0 of a matrix begins, for prefetching only. */
const uint8_t *linear_strip_bytes(const pe_tensor *w, int64_t k, int64_t g0);

static inline int64_t linear_groups(const pe_tensor *w) { return (w->shape[0] + 15) / 16; }
static inline int64_t linear_strips(const pe_tensor *w, int64_t wide) {
  return (linear_groups(w) + PANEL_GROUPS * wide - 1) / (PANEL_GROUPS * wide);
}

#endif

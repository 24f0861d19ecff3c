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
#define linear_own_memory PE_NAME(linear_own_memory)
#define linear_quantize PE_NAME(linear_quantize)
#define linear_multiply PE_NAME(linear_multiply)

#if defined(PE_AVX512)
enum { PANEL_GROUPS = 3 }; /* groups of 16 rows of a matrix in a panel */
#else
enum { PANEL_GROUPS = 1 };
#endif
enum {
  ROWS_FEW = 4,     /* rows that take the kernels for few rows, and that each thread quantizes for itself */
  ROWS_SOME = 16,   /* rows that take strips of one panel: memory bounds them */
  ROWS_BLOCK = 256, /* rows of x in a block: 256 of their k (128 KB) and the sums of a strip (192 KB) fit the second cache */
  STRIP_PANELS = 4, /* panels in a strip; 2 of each matrix with glu */
};

/* Bytes of one prepared row of x: as int8 with scales, and as float32. Rows lie so far apart. */
static inline int64_t linear_row(int64_t k) { return k / 32 * 64 + 64; }
static inline int64_t linear_float_row(int64_t k) { return pe_round_up(4 * k, 64); }

/* Rows of x that are multiplied at once, of m. */
static inline int64_t linear_block(int64_t m) { return pe_min(pe_round_up(m, 8), ROWS_BLOCK); }

/* Rows of x that are made where they are multiplied, a part of k at a time, because all of them would not fit a cache (conv.c). */
typedef struct linear_gather {
  /* k0 .. k0 + count - 1 of rows row0 .. row0 + rows - 1, `ld` floats apart */
  void (*floats)(const struct linear_gather *g, int64_t row0, int64_t rows, int64_t k0, int64_t count, float *to, int64_t ld);
  /* the same as int8, `ld` bytes apart; NULL: as linear_quantize has them */
  void (*codes)(const struct linear_gather *g, int64_t row0, int64_t rows, int64_t k0, int64_t count, char *to, int64_t ld);
  float *room;          /* of a thread: linear_gather_bytes for the rows of a block */
} linear_gather;

enum { GATHER_DEPTH = 256, GATHER_FLOATS = GATHER_DEPTH + 16, GATHER_CODES = GATHER_DEPTH / 32 * 64 + 64 }; /* k; floats, bytes from row to row */
static inline int64_t linear_gather_bytes(int64_t rows, int quantized) { return rows * (4 * GATHER_FLOATS + (quantized ? GATHER_CODES : 0)); }

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
  const linear_gather *gather; /* in place of q and h, or NULL */
  int32_t thread;       /* the number of this one */
} linear_job;

/* Offsets of working memory for m rows at once. What the threads share comes first: quantized rows at 0, float rows at h. */
typedef struct linear_places {
  int64_t h, shared;
  int64_t own_h, panel, rows, acc, part, copy, turned, own;  /* offsets in the own part of a thread, and its size */
} linear_places;

/* What the formats of a product's weights ask for: rows of x as int8, rows as floats, bytes for a panel that is packed on its way. */
typedef struct linear_needs { int quantized, floats; int64_t copy; } linear_needs;
linear_needs linear_needs_of(const pe_tensor *const *w, int32_t n_w);

linear_places linear_memory(int64_t m, int64_t k, linear_needs needs, int normed);

/* Lay out the own part of a thread from `at` on, without its rows of x, for blocks of so many rows. Sets panel to own. */
void linear_own_memory(linear_places *y, int64_t at, int64_t rows, int64_t k, linear_needs needs);

/* Whether products with this weight take float32 rows of x; else they take int8. */
int linear_is_float(const pe_tensor *w);

/* Row i of x, normed where `norm` is given: as int8 to q, and as float32 to h. q may be NULL; h only without a norm. */
void linear_prepare(const pe_tensor *x, const pe_tensor *norm, float eps, int64_t i, int64_t k, char *q, float *h);

/* The strip of a set that begins with group g0, times rows row0 .. row0 + rows - 1 of x, finished into the results. `own`: the
 * thread's working memory, laid out as y says; `next`: the weights that this thread will read afterwards, to prefetch. */
pe_status linear_strip(const linear_job *t, int set, int64_t g0, const uint8_t *next, int64_t row0, int64_t rows, char *own,
                       const linear_places *y);

/* acc[panel][rows][16 PANEL_GROUPS] = `panels` panels from group g0 of matrix w on, times rows row0 .. row0 + rows - 1 of x. */
pe_status linear_multiply(const linear_job *t, const pe_tensor *w, int64_t g0, int64_t panels, const uint8_t *next, int64_t row0,
                          int64_t rows, char *own, const linear_places *y, float *acc);

/* k floats as int8: k / 32 cache lines with codes, scale and sums. */
void linear_quantize(const float *x, int64_t k, char *to);

/* What follows a product, by the number of the word in `linear`'s glu. */
PE_INLINE v16f linear_activate(v16f y, int32_t kind) {
  switch (kind) {
    case PE_LINEAR_GLU_SILU: return v16f_silu(y);
    case PE_LINEAR_GLU_GELU_TANH: return v16f_gelu_tanh(y);
    case PE_LINEAR_GLU_GELU: return v16f_gelu_erf(y);
    case PE_LINEAR_GLU_RELU: return v16f_max(v16f_zero(), y);
    default: return y;
  }
}

/* Where group g0 of a matrix begins, for prefetching only. */
const uint8_t *linear_strip_bytes(const pe_tensor *w, int64_t k, int64_t g0);

static inline int64_t linear_groups(const pe_tensor *w) { return (w->shape[0] + 15) / 16; }
static inline int64_t linear_strips(const pe_tensor *w, int64_t wide) {
  return (linear_groups(w) + PANEL_GROUPS * wide - 1) / (PANEL_GROUPS * wide);
}

#endif

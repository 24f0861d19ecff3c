/* linear_parts.h: what the files of linear share: the sizes of tiles, rows of x as int8, and the three ways to multiply a strip.
 *
 *   linear_few.c    up to ROWS_FEW rows times packed blocks: weights stay in registers
 *   linear_tiles.c  more rows times packed blocks: panels are unpacked once, then tiled
 *   linear_float.c  weights that are floats, or become floats
 *   linear_sme.c    tiles of both kinds by outer products, where there is SME
 *   linear.c        says which, and does what is left: rows of x before, sums after
 */
#ifndef PE_LINEAR_PARTS_H
#define PE_LINEAR_PARTS_H

#include "linear.h"
#include "unpack.h"

enum {
  INT_TILE_ROWS = 4,                       /* rows of x in a tile of integers */
  FLOAT_TILE_ROWS = PE_PARTS == 1 ? 8 : 4, /* and of floats */
  PANEL_STEPS = 8,         /* steps of 32 of k in an unpacked panel */
  FLOAT_PANEL_DEPTH = 128, /* k of a float panel */
  FILE_PANEL_DEPTH = 256,  /* k of a panel that is dequantized from the file's layout: a whole number of any format's blocks */
  DECODE_AHEAD = 8192,     /* bytes of weights that kernels for few rows prefetch */
  SME_ROWS = 16,           /* rows that fill a tile of SME; fewer take the others' */
};

#if defined(PE_SME)
enum { TURNED_ROW = 4 * FILE_PANEL_DEPTH }; /* bytes of a panel's k of a row of x, turned: floats are longer than int8 */
#else
enum { TURNED_ROW = 0 };
#endif

/* 32 of k of one row: one cache line. A row is k / 32 of them, and one more that is never read, so that rows of a power of two
 * do not share cache sets. */
typedef struct linear_step {
  int8_t q[32];
  float d, dsum, dsum2[2];        /* scale; scale * sum of codes, of all and of each half */
  int32_t sum, sum2[2], not_used; /* sum of codes, of all and of each half */
} linear_step;
_Static_assert(sizeof(linear_step) == 64, "a step of x is a cache line");

/* Step s of row i of x; rows lie ld bytes apart. */
PE_INLINE const linear_step *linear_step_of(const char *x, int64_t ld, int64_t i, int64_t s) {
  return (const linear_step *)(x + i * ld) + s;
}

/* A strip of one matrix times rows of x: acc [panel][rows][16 PANEL_GROUPS]. */
typedef struct linear_product {
  const pe_tensor *w;
  int32_t id;                /* format of the weights */
  int packed;
  int64_t k, groups, bytes;  /* groups of the matrix; bytes of one, if packed */
  int64_t g0, panels;        /* first group of the strip, and its panels */
  const uint8_t *next;       /* what this thread will read afterwards, to prefetch */
  int64_t rows;              /* of x */
  const char *q;             /* the rows as int8, ldq bytes apart */
  const float *h;            /* and as floats, ldh floats apart */
  int64_t ldq, ldh;
  char *panel;               /* room for one panel */
  float *dequantized;        /* room for [16][FILE_PANEL_DEPTH] */
  float *acc, *part;         /* part: sums of a slice that is not at its end, where slices are longer than a panel */
  char *turned;              /* SME: room for a panel's k of the rows, TURNED_ROW bytes each */
  int32_t thread;            /* the number of this one */
  const linear_gather *gather; /* in place of q and h, or NULL */
  int64_t row0;              /* the number of the first row there */
} linear_product;

/* Steps of 32 of k in a slice: whole panels, at most 16 slices. A sum over k is made slice by slice, each from zero, and slices are added in
 * order: on a GPU each is another warp's, and the bits are the same. */
PE_INLINE int64_t linear_slice(int64_t k) { return (k + 4095) / 4096 * PANEL_STEPS; }


/* Group v of a panel. Beyond the last group it is that one again: nobody reads the sums. */
PE_INLINE const uint8_t *linear_group(const linear_product *t, int64_t panel, int64_t v) {
  return (const uint8_t *)t->w->data + pe_min(t->g0 + PANEL_GROUPS * panel + v, t->groups - 1) * t->bytes;
}

/* Bytes of a step of an unpacked panel: codes of vector g of group v at 64 (PANEL_GROUPS g + v); then scales, dot_base of scales, and offsets,
 * one float vector for each half and group. On Arm linear_neon.h says where what lies: no dot_base, and i8mm has floats twice. */
#if defined(PE_NEON)
enum { PANEL_SCALES = 1 };
#else
enum { PANEL_SCALES = 2 };
#endif
#if defined(PE_I8MM)
enum { PANEL_FLOATS = 2 };
#else
enum { PANEL_FLOATS = 1 };
#endif
PE_INLINE int64_t panel_step_bytes(int halves, int offsets) {
  return 64 * PANEL_GROUPS * (8 + PANEL_FLOATS * halves * (PANEL_SCALES + offsets));
}

PE_INLINE int64_t linear_sums(const linear_product *t) { return t->rows * 16 * PANEL_GROUPS; } /* of a panel */

/* Where sums of a part of k go, whether a slice begins with it, and whether one ends that is added to those before. */
typedef struct linear_target { int opens, closes; float *part, *acc; } linear_target;

/* Of a panel's elements begin .. end - 1 of k. The first slice is made where all slices are summed. */
PE_INLINE linear_target linear_target_of(const linear_product *t, int64_t panel, int64_t begin, int64_t end) {
  const int64_t slice = 32 * linear_slice(t->k), at = panel * linear_sums(t);
  const int first = begin < slice;
  return (linear_target){begin % slice == 0, !first && (end % slice == 0 || end == t->k), (first ? t->acc : t->part) + at, t->acc + at};
}

/* 16 sums from zero or from what their slice has so far; and to there, or into those of all slices. */
PE_INLINE v16f linear_begin(const linear_target *t, int64_t i) { return t->opens ? v16f_zero() : v16f_load(t->part + i); }
PE_INLINE void linear_end(const linear_target *t, int64_t i, v16f sum) {
  if (t->closes) v16f_store(t->acc + i, v16f_add(v16f_load(t->acc + i), sum));
  else v16f_store(t->part + i, sum);
}

/* The target of rows behind the first `rows`. */
PE_INLINE void linear_skip(linear_target *t, int64_t rows) {
  t->part += rows * 16 * PANEL_GROUPS;
  t->acc += rows * 16 * PANEL_GROUPS;
}

/* 16 numbers of a format of floats. */
PE_INLINE v16f linear_floats_of(int id, const uint8_t *p) {
  return id == PE_F32 ? v16f_load((const float *)p) : id == PE_F16 ? v16f_load_f16(p) : v16f_load_bf16(p);
}

/* What will be unpacked after a panel: from byte `at` of its groups on, and behind their end that of those that come next. While the panel
 * is multiplied, `lines` cache lines of each group are asked for, in so many `steps`: memory works while tiles compute. */
typedef struct panel_ahead {
  const uint8_t *group[PANEL_GROUPS], *next[PANEL_GROUPS];
  int64_t at, end;
  int64_t lines, steps, due; /* steps: calls of fetch_ahead; due: what is left of `lines` for each of them so far */
} panel_ahead;

PE_INLINE void fetch_ahead(panel_ahead *t) {
  for (t->due += t->lines; t->due >= t->steps; t->due -= t->steps, t->at += 64)
PE_UNROLL(8)
    for (int v = 0; v < PANEL_GROUPS; v++) pe_prefetch(t->at < t->end ? t->group[v] + t->at : t->next[v] + (t->at - t->end));
}

/* Ask for the step of so many bytes that lies DECODE_AHEAD behind place `at` of a group: of this one, or of what is read next. */
PE_INLINE void decode_fetch(const uint8_t *group, const uint8_t *next, int64_t bytes, int64_t at, int step_bytes) {
  const int64_t ahead = at + DECODE_AHEAD;
  const uint8_t *p = ahead < bytes ? group + ahead : next + (ahead - bytes);
PE_UNROLL(9)
  for (int c = 0; c < (step_bytes + 63) / 64; c++) pe_prefetch(p + 64 * c);
}

/* Steps s0 .. s0 + count - 1 of PANEL_GROUPS groups, unpacked; and so many steps of m rows of x times them. */
typedef void linear_unpack(const uint8_t *const group[PANEL_GROUPS], int64_t s0, int64_t count, uint8_t *to);
typedef void linear_tile(int zero, const uint8_t *panel, int64_t count, const char *x, int64_t ld, int64_t m, panel_ahead *ahead,
                         linear_target to);
typedef struct linear_tiler { linear_unpack *unpack; linear_tile *tile; } linear_tiler;

#if defined(PE_SME)
/* linear_sme.c. x of its tiles is turned: `words` words of each row, `ld` bytes apart. */
int PE_NAME(linear_sme_is_free)(void);
void PE_NAME(linear_sme_turn)(const void *x, int64_t ld, int64_t words, int64_t rows, void *to);
linear_tiler PE_NAME(linear_sme_tiler)(int32_t id);
void PE_NAME(linear_sme_floats)(const float *panel, int64_t step, int64_t count, const float *x, int64_t rows, linear_target to);
#endif

int PE_NAME(linear_most_few)(void);                        /* rows that linear_few takes at most; 0: too few registers for any */
void PE_NAME(linear_few)(const linear_product *t);         /* packed blocks, up to so many rows */
void PE_NAME(linear_tiles)(const linear_product *t);       /* packed blocks, any rows */
void PE_NAME(linear_few_floats)(const linear_product *t);  /* packed floats, up to ROWS_FEW rows */
pe_status PE_NAME(linear_floats)(const linear_product *t); /* all other weights */

/* A panel of floats [count][16 PANEL_GROUPS], of whose groups the first `groups` count, times m rows of x, ld floats apart. ahead[v]: `lines`
 * cache lines of what the next panel's group v is made of, to prefetch. */
void PE_NAME(linear_float_tile)(int64_t groups, const float *panel, int64_t count, const uint8_t *const ahead[PANEL_GROUPS], int64_t lines,
                                const float *x, int64_t ld, int64_t m, linear_target to);

#endif

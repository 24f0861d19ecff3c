/* linear.h: what the kernels of linear and expert_linear share: their arguments, which output a threadgroup owns, how k is cut, and what
 * is done with sums. The including file says nothing else: function constants are declared here.
 *
 * A launch multiplies rows of x by up to four matrices of one format (sets; with glu set 0 is a pair). Columns of a result are rows of a
 * matrix; blocks of columns of all sets are counted through along x of the grid, blocks of rows along y. With experts a block of rows
 * is a tile of the table that experts.metal makes: rows of one expert, in sorted order; `order` says where each row's result goes.
 *
 * Every sum over k is cut into at most 16 slices of whole 256s, each summed from zero, and slices are added in order. The cut follows from k
 * alone and is the CPU's (csrc/cpu/linear_parts.h), so one row and many rows, whoever multiplies them, add up the same numbers in the same order.
 */
#ifndef PE_METAL_LINEAR_H
#define PE_METAL_LINEAR_H

#include "activations.h"
#include "common.h"

PE_CONSTANT(int, FORMAT, 0);    /* of the weights: ggml's number */
PE_CONSTANT(int, ROWS, 1);      /* few: rows of x in a block, 1 .. 8; tiles: 16 or 32 */
PE_CONSTANT(int, GLU, 2);       /* an activation, 0 for none */
PE_CONSTANT(bool, BIASED, 3);
PE_CONSTANT(bool, ADDED, 4);    /* there is a residual */
PE_CONSTANT(bool, EXPERTS, 5);
PE_CONSTANT(bool, PACKED, 6);   /* else the file's layout */
PE_CONSTANT(bool, GIVEN, 7);    /* glu: the second product is there already, in place of a residual */

#define PAIR (GLU && !GIVEN)    /* both matrices of a glu are multiplied */

enum { SIMDGROUPS = 4, GROUP = 16, TILE_COLUMNS = 64 };

struct linear_args {
  int rows, k, sets;
  int x_stride;                 /* floats, or codes, between rows of x as they were prepared */
  int n[4];                     /* rows of each set's matrix */
  int ends[4];                  /* blocks of columns up to the end of each set */
  int out_stride[4];            /* floats between rows of a result */
  int residual_stride;
  float softcap;
  long group_bytes;             /* packed: of a group; else of a row */
  long expert_bytes;            /* of one expert's matrix */
};

/* What a threadgroup owns: columns from `column` on of a set, rows first .. first + count - 1 of x. */
struct owned {
  int set, column, first, count, expert;
};

static inline owned owned_by(constant linear_args &a, uint3 group, int columns, int rows, device const int *tiles) {
  owned y = {0, 0, 0, 0, 0};
  int block = (int)group.x;
  while (y.set + 1 < a.sets && block >= a.ends[y.set]) y.set++;
  if (y.set) block -= a.ends[y.set - 1];
  y.column = block * columns;
  if (EXPERTS) {
    device const int *tile = tiles + 3 * (int)group.y;
    y.expert = tile[0], y.first = tile[1], y.count = tile[2];
  } else {
    y.first = rows * (int)group.y;
    y.count = min(rows, a.rows - y.first);
  }
  return y;
}

/* Elements of k in a slice. */
static inline int slice_of(int k) { return (k + 4095) / 4096 * 256; }

/* One of four buffers. */
#define PE_OF_SET(name, set) ((set) == 0 ? name##0 : (set) == 1 ? name##1 : (set) == 2 ? name##2 : name##3)

/* Buffers of a result, after a set is chosen. */
struct results {
  device const float *bias, *bias1, *residual;
  device float *out;
  device const int *order;
};

/* One output: the sum of `column` for row `row` of x; y1: the second matrix's with glu. */
static inline void finish(constant linear_args &a, owned own, results to, int row, int column, float y, float y1) {
  if (BIASED) y += to.bias[column];
  const long at = EXPERTS ? to.order[row] : row;
  if (PAIR) {
    if (BIASED) y1 += to.bias1[column];
    y = activated(GLU, y) * y1;
  } else if (GIVEN) {
    y = activated(GLU, y) * to.residual[at * a.residual_stride + column];
  }
  if (ADDED) y += to.residual[at * a.residual_stride + column];
  if (a.softcap != 0.0f) y = capped(y, a.softcap);
  to.out[at * a.out_stride[own.set] + column] = y;
}

#endif

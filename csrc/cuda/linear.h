/* linear.h: what the kernels of `linear` and `expert_linear` share: how a product is described to the device, how rows of x are prepared,
 * and in which order sums are formed. Reference: pyengine/ops/matmul.py, experts.py; csrc/cpu/linear.c.
 *
 * Order of sums.  k is cut into slices of linear_slice(k) steps of 32, at most 16 of them, a function of k alone. Within a slice a sum
 * runs over k, ascending; slices are added in order, from zero. Kernels for few rows give each warp a slice; those for many rows add up
 * theirs where a slice ends. So all kernels of a format give the same bits for a row, whatever stands beside it.
 *
 * Prepared rows.  Kernels read x in tiles of 8 rows, the columns of a product:
 *   int8     a record for each 32 of k: [row 8][t 4][k 4t .. 4t+3, 16+4t .. 16+4t+3] codes, 256 bytes: lane 4 g + t of a warp reads the 8
 *            bytes that are its B operand. Then for t = 0..3, rows 2t and 2t+1: d, d, dsum, dsum: scale, and scale * sum of codes. 64
 *            bytes. Then dsum, dsum of the first half, and of the second, for Q2_K: 64 bytes, written where a weight asks for them.
 *   16-bit   a record for each 16 of k: [row 8][t 4][k t, t+4, t+8, t+12], 256 bytes. f16: times a power of two that brings the row's
 *            largest below 2^15, so that none overflows. bf16: a record of what a bf16 holds, and one of what it leaves
 *   float    [row][k] as x, normed
 * A tile is k / 32 (k / 16) records, one after the other. Rows that are not there are zeros.
 */
#ifndef PE_CUDA_LINEAR_H
#define PE_CUDA_LINEAR_H

#include "activations.h"
#include "cuda.h"

namespace pe {

constexpr int SLICES = 16, TILE_ROWS = 8, CODES_BYTES = 256, RECORD = CODES_BYTES + 128;
constexpr int NO_ROW = -1, NO_TILE = -2; /* in an order: nothing, in a tile that is in use and in one that is not */

/* Steps of 32 of k in a slice, a whole number of blocks of 256. */
inline int linear_slice(int64_t k) { return static_cast<int>((k + 256 * SLICES - 1) / (256 * SLICES)) * 8; }

/* One weight matrix [n, k], or one for each expert. */
struct Matrix {
  const uint8_t *data;
  int64_t group_bytes;     /* of 16 packed rows; in the file's layout, of a row */
  int64_t expert_bytes;
  const float *bias;       /* or null */
  float *out;
  int64_t out_stride;      /* floats */
  int n;
  int blocks_before;       /* blocks of a launch that work on matrices before this one */
};

/* Experts: `tiles` tiles of prepared rows from first_tile on, and whose they are. */
struct Unit { int32_t expert, first_tile, tiles, reserved; };

/* A product of matrices of one format with prepared rows. Blocks: x over units of tiles of
 * x, y over pairs of groups of the matrices: blocks of the same weights run side by side, so memory is read once for all units. */
struct Product {
  Matrix w[4];
  int n_w;                 /* with glu 2, and a pair is a group of each */
  int glu;
  float softcap;
  const float *residual;
  int64_t residual_stride; /* floats */
  int blocks;              /* of all matrices */
  int k, steps, slice;     /* steps of 32 of k */
  int m, tiles;            /* rows of x, and tiles of them */
  const uint8_t *x;        /* prepared rows */
  int64_t x_stride;        /* float rows: bytes from one to the next */
  const float *x_unit;     /* what a prepared row's numbers are worth, or null: 1 */
  const int32_t *order;    /* of each prepared row: the row of the result; null: the same */
  const Unit *units;       /* null: unit i is tiles i u .. i u + u - 1 */
  const int32_t *n_units;
  const int32_t *chosen;   /* null, or the expert of unit i, which is one row: the first of tile i, or of tile 0 if shared */
  int experts, shared;
  int format;              /* of weights in the file's layout */
  const pe_codebooks *codebooks;
  pe_fault *fault;
};

/* Which rows of x, and which expert's weights, a block works on. */
struct Part {
  int expert, first_tile, tiles;
};
template <int TILES> __device__ __forceinline__ bool part_of(const Product &p, Part &part) {
  const int unit = blockIdx.x;
  if (p.units) {
    if (unit >= *p.n_units) return false;
    const Unit u = p.units[unit];
    part = {u.expert, u.first_tile, u.tiles};
    return true;
  }
  part = {0, unit * TILES, min(TILES, p.tiles - unit * TILES)};
  if (p.chosen) {
    part = {p.chosen[unit], p.shared ? 0 : unit, 1};
    if (part.expert < 0 || part.expert >= p.experts) {
      if (threadIdx.x == 0) raise(p.fault, PE_BAD_VALUE, part.expert, p.experts);
      return false;
    }
  }
  return true;
}

/* Of a block's rows of weights: which matrix, and where its first pair lies in it. PAIRS to a block. Grids may be smaller than blocks. */
struct Span {
  int matrix, pair;
};
template <int PAIRS> __device__ __forceinline__ Span span_of(const Product &p, int block) {
  int i = 0;
  if (!p.glu)
    while (i + 1 < p.n_w && block >= p.w[i + 1].blocks_before) i++;
  return {i, (block - p.w[i].blocks_before) * PAIRS};
}

/* Group h of a pair. Beyond the last group it is that one again, and nobody stores what comes of it. */
__device__ __forceinline__ const uint8_t *group_of(const Product &p, const Span &s, int pair, int h, int expert) {
  const Matrix &w = p.w[p.glu ? h : s.matrix];
  const int last = (w.n - 1) / 16, g = min(p.glu ? s.pair + pair : 2 * (s.pair + pair) + h, last);
  return w.data + expert * w.expert_bytes + g * w.group_bytes;
}

__device__ __forceinline__ float glu_of(int kind, float y) {
  switch (kind) {
    case PE_LINEAR_GLU_SILU: return activated(ACT_SILU, y);
    case PE_LINEAR_GLU_GELU_TANH: return activated(ACT_GELU_TANH, y);
    case PE_LINEAR_GLU_GELU: return activated(ACT_GELU, y);
    case PE_LINEAR_GLU_RELU: return activated(ACT_RELU, y);
    default: return y;
  }
}

/* The row of the result that prepared row `slot` belongs to, or -1. */
__device__ __forceinline__ int result_row(const Product &p, int slot) {
  if (p.chosen) return slot % TILE_ROWS ? -1 : static_cast<int>(blockIdx.x);
  if (p.order) return p.order[slot];
  return slot < p.m ? slot : -1;
}

/* What is done with a sum: column n of a matrix, row of the result, prepared row `slot`. y1: of the second matrix, with glu. */
__device__ __forceinline__ float finished(const Product &p, const Matrix &w, int n, int row, int slot, float y, float y1) {
  if (p.x_unit) y *= p.x_unit[slot], y1 *= p.x_unit[slot];
  if (w.bias) y += w.bias[n];
  if (p.glu) {
    if (p.w[1].bias) y1 += p.w[1].bias[n];
    y = glu_of(p.glu, y) * y1;
  }
  if (p.residual) y += p.residual[row * p.residual_stride + n];
  if (p.softcap != 0.0f) y = capped(y, p.softcap);
  return y;
}

/* ---- for the host ---- */

/* What a format is multiplied as. */
enum Kind { KIND_NONE, KIND_BLOCKS, KIND_HALF, KIND_FLOAT };

inline int32_t format_of(const pe_tensor *w) { return w->dtype >= PE_PACKED ? w->dtype - PE_PACKED : w->dtype; }
Kind kind_of(const pe_tensor *w);

/* Where rows are kept in scratch, for `rows` prepared rows, as far as weights ask for them. */
struct Places {
  int64_t codes, bf16, f16, f16_unit, floats, bytes;
  bool halves; /* int8: also sums of halves */
};
Places places_of(const pe_tensor *const *w, int32_t n_w, int64_t rows, int64_t k); /* offsets, -1: not asked for */
Matrix matrix_of(const pe_tensor *w, const float *bias, const pe_tensor *out);

/* x [.., k] to prepared rows. order: of each prepared row, `each` times the row of x
 * it is (NO_ROW: zeros); null: the same. spread:
 * a tile for each row. */
struct Preparation {
  const float *x, *norm;
  int64_t x_stride;        /* floats */
  float eps;
  int m, k, each, spread, halves;
  const int32_t *order;
  uint8_t *codes, *bf16, *f16;
  float *f16_unit, *floats;
};
void place(Preparation &t, const Places &y, char *scratch);
void prepare(const Preparation &p, int rows, cudaStream_t stream);

/* Tiles of 8 rows in a unit: 1, 2 (float32: 4) take the kernels for few rows, 8 and 16 those for many. All give the same bits. */
int unit_tiles(Kind kind, int64_t rows, int64_t n, const Queue &queue);

/* Launch a product of matrices of one dtype with `units` units of at most `tiles` tiles. */
pe_status multiply(int32_t dtype, const Preparation &x, Product &p, int tiles, int units, const Queue &queue);

/* out of w = glu(out) * up, m rows. */
void combine_glu(const Matrix &w, const float *up, int64_t m, int glu, float softcap, cudaStream_t stream);

pe_status multiply_few(int32_t format, const Product &p, int tiles, dim3 grid, cudaStream_t stream);   /* linear_few.cu */
pe_status multiply_tiles(int32_t format, const Product &p, int tiles, dim3 grid, cudaStream_t stream); /* linear_tiles.cu */
pe_status multiply_half(int32_t format, const Product &p, int tiles, dim3 grid, cudaStream_t stream);  /* linear_half.cu */
pe_status multiply_floats(int32_t dtype, Product p, int tiles, dim3 grid, cudaStream_t stream); /* linear_float.cu */

} // namespace pe

#endif

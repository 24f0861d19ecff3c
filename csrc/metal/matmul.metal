/* matmul.metal: x @ y^T over the last two axes, both factors activations with any strides.
 * Reference: pyengine/ops/matmul.py: matmul.
 *
 * A threadgroup of four simdgroups owns 32 x 32 elements of one result, a simdgroup 16 x 16 of them as 2 x 2 matrices of 8 x 8. In steps of
 * 32 of k both factors' tiles are copied to threadgroup memory, x [32][36] and y [32][36] floats (rows 4 apart in banks); the result's tile
 * [32][36] takes the place of the first behind the last step. Sums run over k ascending, whatever m and n are.
 * Each factor is read ceil(n / 32) or ceil(m / 32) times: 64 operations for each 4 bytes that a tile reads, so what limits is arithmetic.
 */
#include "common.h"

struct matmul_args {
  int m, n, k;
  int batch[4];                                  /* leading axes, slowest first; 1 before the first */
  int x_batch[4], y_batch[4];                    /* their strides in elements */
  int x_row, x_column, y_row, y_column;
};

enum { TILE = 32, PITCH = 36 };

/* Element (i, j) of a tile from row `row` and column `column` on; 0 beyond the matrix. */
static inline void load_tile(threadgroup float *tile, device const float *from, int row, int rows, int column, int columns, int row_step,
                             int column_step, int number) {
  for (int at = number; at < TILE * TILE; at += 128) {
    const int i = at / TILE, j = at % TILE;
    const bool inside = row + i < rows && column + j < columns;
    tile[i * PITCH + j] = inside ? from[(long)(row + i) * row_step + (long)(column + j) * column_step] : 0.0f;
  }
}

kernel void multiply_rows(constant matmul_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device const float *y [[buffer(2)]],
                          device float *out [[buffer(3)]], threadgroup float *memory [[threadgroup(0)]],
                          uint3 group [[threadgroup_position_in_grid]], uint number [[thread_index_in_threadgroup]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  threadgroup float *xs = memory, *ys = memory + TILE * PITCH;
  const int row = TILE * (int)group.y, column = TILE * (int)group.x;
  const int top = 16 * ((int)simdgroup / 2), left = 16 * ((int)simdgroup % 2);
  int rest = (int)group.z;
  out += (long)rest * a.m * a.n;
  for (int d = 3; d >= 0; d--) {
    const int i = rest % a.batch[d];
    rest /= a.batch[d];
    x += (long)i * a.x_batch[d];
    y += (long)i * a.y_batch[d];
  }
  simdgroup_float8x8 sum[2][2], part[2], other;
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) sum[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int k = 0; k < a.k; k += TILE) {
    load_tile(xs, x, row, a.m, k, a.k, a.x_row, a.x_column, (int)number);
    load_tile(ys, y, column, a.n, k, a.k, a.y_row, a.y_column, (int)number);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = 0; s < TILE; s += 8) {
      for (int i = 0; i < 2; i++) simdgroup_load(part[i], xs + (top + 8 * i) * PITCH + s, PITCH);
      for (int j = 0; j < 2; j++) {
        simdgroup_load(other, ys + (left + 8 * j) * PITCH + s, PITCH, ulong2(0), true);
        for (int i = 0; i < 2; i++) simdgroup_multiply_accumulate(sum[i][j], part[i], other, sum[i][j]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) simdgroup_store(sum[i][j], xs + (top + 8 * i) * PITCH + left + 8 * j, PITCH);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int at = (int)number; at < TILE * TILE; at += 128) {
    const int i = row + at / TILE, j = column + at % TILE;
    if (i < a.m && j < a.n) out[(long)i * a.n + j] = xs[at / TILE * PITCH + at % TILE];
  }
}

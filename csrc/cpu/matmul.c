/* matmul.c: out = x y^T over the last two axes; both factors are float activations with any strides.
 * Reference: pyengine/ops/matmul.py: matmul.
 *
 * A thread claims a block of ROWS x COLUMNS of one product. For each DEPTH of k it transposes its columns of y to yt[k][64]
 * and, where the elements of x do not lie side by side, copies its rows of x; the register tile of vec.h does the rest. One
 * float accumulator an element, k ascending, whatever the block: a row's result does not depend on the other rows.
 * A block moves 4 (ROWS + COLUMNS) k bytes for 2 ROWS COLUMNS k operations: 21 a byte.
 */
#include "vec.h"

enum { ROWS = 126, COLUMNS = 64, DEPTH = 256 }; /* ROWS is a multiple of TILE_ROWS; yt fills 64 KiB, x 126 KiB: half of L2 */

enum { YT = DEPTH * COLUMNS, XS = ROWS * DEPTH, CS = ROWS * COLUMNS };

PE_SCRATCH(cpu, matmul)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)a, (void)params;
  return (int64_t)n_threads * 4 * (YT + XS + CS);
}

PE_INLINE v16f load_strided(const char *p, int64_t stride, int64_t n) { /* n elements, at most 16 */
  if (stride == 4) return load_some((const float *)p, n);
  float t[16] = {0};
  for (int64_t i = 0; i < pe_min(n, 16); i++) memcpy(&t[i], p + i * stride, 4);
  return v16f_load(t);
}

/* yt[i][j] = y[j][i], i < depth, j < columns; other columns up to a multiple of 16 repeat the last. */
static void transpose_columns(const char *y, int64_t row_stride, int64_t stride, int64_t columns, int64_t depth, float *yt) {
  for (int64_t j = 0; j < columns; j += 16)
    for (int64_t i = 0; i < depth; i += 16) {
      v16f x[16];
      for (int r = 0; r < 16; r++) x[r] = load_strided(y + pe_min(j + r, columns - 1) * row_stride + i * stride, stride, depth - i);
      transpose16(x, yt + i * COLUMNS + j, COLUMNS);
    }
}

PE_KERNEL(cpu, matmul)(const pe_tensor *x, const pe_tensor *y, const pe_tensor *out, const pe_matmul_params *p, pe_stream *s) {
  (void)p;
  const int d = x->ndim;
  const int64_t m = x->shape[d - 2], n = y->shape[d - 2], k = x->shape[d - 1], xs = x->stride[d - 1];
  const int64_t row_blocks = (m + ROWS - 1) / ROWS, column_blocks = (n + COLUMNS - 1) / COLUMNS;
  const float ones[TILE_ROWS] = {1, 1, 1, 1, 1, 1};
  float *yt = (float *)s->scratch + (int64_t)s->ith * (YT + XS + CS), *xc = yt + YT, *c = xc + XS;
  int64_t batches = 1;
  for (int i = 0; i < d - 2; i++) batches *= x->shape[i];
  for (int64_t i; (i = pe_next(s, 0)) < batches * row_blocks * column_blocks;) {
    const int64_t batch = i / (row_blocks * column_blocks), m0 = i / column_blocks % row_blocks * ROWS;
    const int64_t n0 = i % column_blocks * COLUMNS, rows = pe_min(ROWS, m - m0), columns = pe_min(COLUMNS, n - n0);
    const char *xb = (const char *)x->data + m0 * x->stride[d - 2], *yb = (const char *)y->data + n0 * y->stride[d - 2];
    for (int64_t a = d - 3, rest = batch; a >= 0; a--) {
      xb += rest % x->shape[a] * x->stride[a];
      yb += rest % x->shape[a] * y->stride[a];
      rest /= x->shape[a];
    }
    if (k == 0) memset(c, 0, CS * 4);
    for (int64_t k0 = 0; k0 < k; k0 += DEPTH) {
      const int64_t depth = pe_min(DEPTH, k - k0);
      const float *a = (const float *)(xb + k0 * xs);
      int64_t lda = x->stride[d - 2] / 4;
      transpose_columns(yb + k0 * y->stride[d - 1], y->stride[d - 2], y->stride[d - 1], columns, depth, yt);
      if (xs != 4) {
        for (int64_t r = 0; r < rows; r++)
          for (int64_t j = 0; j < depth; j += 16)
            store_some(xc + r * DEPTH + j, load_strided(xb + r * x->stride[d - 2] + (k0 + j) * xs, xs, depth - j), depth - j);
        a = xc;
        lda = DEPTH;
      }
      for (int64_t r = 0; r < rows; r += TILE_ROWS)
        tile((int)pe_min(TILE_ROWS, rows - r), (int)((columns + 15) / 16), a + r * lda, lda, yt, COLUMNS, c + r * COLUMNS, COLUMNS,
             depth, k0 ? ones : 0);
    }
    for (int64_t r = 0; r < rows; r++)
      memcpy((float *)out->data + ((batch * m + m0 + r) * n + n0), c + r * COLUMNS, (size_t)columns * 4);
  }
  return PE_OK;
}

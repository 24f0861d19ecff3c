/* matmul.cu: out = x y^T over the last two axes; both factors are float activations with any strides.
 * Reference: pyengine/ops/matmul.py: matmul.
 *
 * A block of 256 threads owns 64 x 64 elements of one product, a thread 4 x 4 of them. It goes through k in steps of 16: while one
 * step is multiplied from shared memory, the next comes from global memory into registers (four elements of x and four of y a
 * thread) and is stored to the other of two buffers, so one barrier a step is enough. Shared memory: [2][x, y][16 of k][64 + 4], k
 * outermost, so that a thread reads its four rows and its four columns with one 16-byte load each. A step is stored without bank
 * conflicts: a warp holds 16 rows x 8 of k where k lies side by side, and 64 rows x 2 of k where rows do; the pitch of 68 floats
 * shifts neighbouring fours of k by 16 banks.
 * In float32 exactly (no tensor cores): one fused accumulator an element, k ascending, whatever the block: a row's bits depend on that row
 * alone. A step moves 8 KB for 131072 operations, 16 a byte, mostly from L2; the peak of float32 (67 TFLOP/s of an H200, 36 of a
 * 3090) is approached to about a half, because a step of k costs two shared loads for 16 fused products.
 */
#include "strides.h"

namespace {

enum { THREADS = 256, TILE = 64, DEPTH = 16, PITCH = TILE + 4 };

/* One factor: rows of k elements; strides in elements. */
struct Factor {
  const float *data;
  int64_t row, k, rows; /* strides of a row and of k; how many rows */
  int64_t batch[PE_MAX_DIMS];
};

struct Product {
  Factor x, y;
  float *out;
  int64_t k, shape[PE_MAX_DIMS];
  int batch_dims;
  unsigned row_tiles, column_tiles;
};

struct MatmulShared { float x[2][DEPTH][PITCH], y[2][DEPTH][PITCH]; };

/* Four elements of a step that a thread brings: along k (row fixed) where BY_K, else along rows (k fixed). */
template <int BY_K>
struct Piece {
  int row, k;
  float v[4];

  __device__ __forceinline__ Piece() {
    const int t = threadIdx.x;
    row = BY_K ? t / 32 % 4 * 16 + t % 32 / 2 : t % 16 * 4;
    k = BY_K ? 4 * (t % 2 + t / 128 * 2) : t / 16;
  }
  __device__ __forceinline__ void load(const Factor &f, const float *data, int64_t first_row, int64_t first_k, int64_t depth) {
    const int64_t r = first_row + row, at = first_k + k;
    const int64_t left = BY_K ? (r < f.rows ? depth - at : 0) : (at < depth ? f.rows - r : 0);
    const int n = (int)max((int64_t)0, min((int64_t)4, left));
    pe::load4(data + (n ? r * f.row + at * f.k : 0), BY_K ? f.k : f.row, n, v);
  }
  __device__ __forceinline__ void store(float (*to)[PITCH]) const {
    if (BY_K) {
#pragma unroll
      for (int j = 0; j < 4; j++) to[k + j][row] = v[j];
    } else {
      *(float4 *)&to[k][row] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
};

template <int X_BY_K, int Y_BY_K>
__global__ void __launch_bounds__(THREADS, 2) matmul_kernel(Product p) {
  auto &sh = pe::shared<MatmulShared>();
  unsigned tile = blockIdx.x;
  const unsigned column_tile = tile % p.column_tiles, row_tile = tile / p.column_tiles % p.row_tiles;
  const int64_t batch = tile / p.column_tiles / p.row_tiles, m0 = (int64_t)row_tile * TILE, n0 = (int64_t)column_tile * TILE;
  const float *x = p.x.data, *y = p.y.data;
  int64_t rest = batch;
  for (int a = p.batch_dims - 1; a >= 0; a--) {
    const int64_t at = rest % p.shape[a];
    rest /= p.shape[a];
    x += at * p.x.batch[a];
    y += at * p.y.batch[a];
  }
  const int column = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 4;
  Piece<X_BY_K> px;
  Piece<Y_BY_K> py;
  float acc[4][4] = {};
  px.load(p.x, x, m0, 0, p.k);
  py.load(p.y, y, n0, 0, p.k);
  px.store(sh.x[0]);
  py.store(sh.y[0]);
  for (int64_t k0 = 0, turn = 0; k0 < p.k; k0 += DEPTH, turn ^= 1) {
    __syncthreads();
    const bool more = k0 + DEPTH < p.k;
    if (more) {
      px.load(p.x, x, m0, k0 + DEPTH, p.k);
      py.load(p.y, y, n0, k0 + DEPTH, p.k);
    }
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
      const float4 a = *(const float4 *)&sh.x[turn][k][row], b = *(const float4 *)&sh.y[turn][k][column];
      const float u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = fmaf(u[i], v[j], acc[i][j]);
    }
    if (more) {
      px.store(sh.x[turn ^ 1]);
      py.store(sh.y[turn ^ 1]);
    }
  }
  float *out = p.out + (batch * p.x.rows + m0 + row) * p.y.rows + n0 + column;
  const int columns = (int)max((int64_t)0, min((int64_t)4, p.y.rows - n0 - column));
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (m0 + row + i < p.x.rows && columns) pe::store4(out + i * p.y.rows, columns, acc[i]);
}

Factor factor(const pe_tensor *t) {
  const int d = t->ndim;
  Factor f = {};
  f.data = (const float *)t->data;
  f.rows = t->shape[d - 2];
  f.row = t->stride[d - 2] / 4;
  f.k = t->stride[d - 1] / 4;
  for (int a = 0; a < d - 2; a++) f.batch[a] = t->stride[a] / 4;
  return f;
}

template <int X_BY_K, int Y_BY_K>
void launch(const Product &p, unsigned blocks, pe_stream *s) {
  pe::launch(pe::stream(s), matmul_kernel<X_BY_K, Y_BY_K>, dim3(blocks), dim3(THREADS), sizeof(MatmulShared), p);
}

} // namespace

PE_KERNEL(cuda, matmul)(const pe_tensor *x, const pe_tensor *y, const pe_tensor *out, const pe_matmul_params *params, pe_stream *s) {
  (void)params;
  Product p = {};
  p.x = factor(x);
  p.y = factor(y);
  p.out = (float *)out->data;
  p.k = x->shape[x->ndim - 1];
  p.batch_dims = x->ndim - 2;
  int64_t batches = 1;
  for (int a = 0; a < p.batch_dims; a++) batches *= p.shape[a] = x->shape[a];
  const int64_t row_tiles = (p.x.rows + TILE - 1) / TILE, column_tiles = (p.y.rows + TILE - 1) / TILE, blocks = batches * row_tiles * column_tiles;
  if (!pe::counts_in_31_bits(blocks)) return pe_fail(s, PE_NO_KERNEL, "matmul: %lld tiles", (long long)blocks);
  if (blocks == 0) return PE_OK;
  p.row_tiles = (unsigned)row_tiles;
  p.column_tiles = (unsigned)column_tiles;
  const int x_by_k = p.x.row != 1 || p.x.k == 1, y_by_k = p.y.row != 1 || p.y.k == 1;
  if (x_by_k && y_by_k) launch<1, 1>(p, (unsigned)blocks, s);
  else if (x_by_k) launch<1, 0>(p, (unsigned)blocks, s);
  else if (y_by_k) launch<0, 1>(p, (unsigned)blocks, s);
  else launch<0, 0>(p, (unsigned)blocks, s);
  return PE_OK;
}

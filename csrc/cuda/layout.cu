/* layout.cu: contiguous, concat.
 * Reference: pyengine/ops/layout.py: contiguous, concat.
 *
 * Bound by memory, 8 bytes an element.
 *
 * copy_kernel       A thread owns four neighbouring elements of the result, as in elementwise.cu; where the operand's innermost axis lies
 *                   side by side both accesses are of 16 bytes.
 * transpose_kernel  For an operand whose innermost axis is another one. A block of 32 x 8 threads owns a tile of 32 x 32 elements, which it
 *                   reads along the operand's axis and writes along the result's; between, it lies in shared memory [32][33], whose
 *                   odd pitch keeps both directions free of bank conflicts. A warp reads and writes 128 bytes in a run.
 * concat_kernel     Row y of the grid is a part, whose threads take four elements of it each.
 */
#include <cstring>

#include "strides.h"

namespace {

enum { THREADS = 256, TILE = 32, TILE_ROWS = 8, PARTS = 16 };

__global__ void __launch_bounds__(THREADS) copy_kernel(pe::Walk w, const float *x, float *out, unsigned quads, unsigned n) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= n) return;
  const unsigned row = i / quads;
  const int64_t start = 4 * (int64_t)(i - row * quads), sx = w.x[w.ndim - 1];
  const int count = (int)min((int64_t)4, w.inner - start);
  int64_t ax, ay;
  float v[4];
  pe::row_start(w, row, &ax, &ay);
  pe::load4(x + ax + start * sx, sx, count, v);
  pe::store4(out + row * w.inner + start, count, v);
}

/* Matrices of `rows` x `columns` of the result; element (r, c) of matrix b lies at b's place + r + c * pitch in x. */
struct Transposed {
  int ndim;                                     /* of the other axes */
  int64_t shape[PE_MAX_DIMS], x[PE_MAX_DIMS], out[PE_MAX_DIMS];
  int64_t rows, columns, pitch, out_pitch;
};

struct TransposeShared { float tile[TILE][TILE + 1]; };

__global__ void __launch_bounds__(TILE * TILE_ROWS) transpose_kernel(Transposed t, const float *x, float *out) {
  auto &sh = pe::shared<TransposeShared>();
  unsigned b = blockIdx.z;
  for (int a = t.ndim - 1; a >= 0; a--) {
    const unsigned n = (unsigned)t.shape[a], at = b % n;
    b /= n;
    x += at * t.x[a];
    out += at * t.out[a];
  }
  const int64_t r0 = (int64_t)blockIdx.y * TILE, c0 = (int64_t)blockIdx.x * TILE;
  for (int j = threadIdx.y; j < TILE; j += TILE_ROWS)
    if (r0 + threadIdx.x < t.rows && c0 + j < t.columns) sh.tile[j][threadIdx.x] = x[r0 + threadIdx.x + (c0 + j) * t.pitch];
  __syncthreads();
  for (int j = threadIdx.y; j < TILE; j += TILE_ROWS)
    if (r0 + j < t.rows && c0 + threadIdx.x < t.columns) out[(r0 + j) * t.out_pitch + c0 + threadIdx.x] = sh.tile[threadIdx.x][j];
}

/* The axis of w that lies side by side in x while the innermost does not; -1 if none does. */
int fast_axis(const pe::Walk &w) {
  for (int a = 0; w.x[w.ndim - 1] != 1 && a < w.ndim - 1; a++)
    if (w.x[a] == 1 && w.shape[a] >= TILE / 2 && w.inner >= TILE / 2) return a;
  return -1;
}

/* Launch the transposing kernel for axis `fast`; false where the grid cannot be so large. */
bool transpose(const pe::Walk &w, int fast, const pe_tensor *x, const pe_tensor *out, pe_stream *s) {
  Transposed t = {};
  int64_t batches = 1, step = 1;
  for (int a = w.ndim - 1; a >= 0; step *= w.shape[a--]) {
    if (a == w.ndim - 1) continue;
    if (a == fast) {
      t.out_pitch = step;
      continue;
    }
    t.shape[t.ndim] = w.shape[a];
    t.x[t.ndim] = w.x[a];
    t.out[t.ndim++] = step;
    batches *= w.shape[a];
  }
  t.rows = w.shape[fast];
  t.columns = w.inner;
  t.pitch = w.x[w.ndim - 1];
  const int64_t row_tiles = (t.rows + TILE - 1) / TILE, column_tiles = (t.columns + TILE - 1) / TILE;
  if (batches > 65535 || row_tiles > 65535 || !pe::counts_in_31_bits(column_tiles)) return false;
  pe::launch(pe::stream(s), transpose_kernel, dim3((unsigned)column_tiles, (unsigned)row_tiles, (unsigned)batches), dim3(TILE, TILE_ROWS),
             sizeof(TransposeShared), t, (const float *)x->data, (float *)out->data);
  return true;
}

/* Parts of one launch; `at` is where a part begins in a row of the result. */
struct Parts {
  const float *from[PARTS];
  int64_t width[PARTS], at[PARTS];
  int64_t outer, width_out;
};

__global__ void __launch_bounds__(THREADS) concat_kernel(Parts p, float *out) {
  const int part = blockIdx.y;
  const int64_t width = p.width[part];
  const unsigned quads = (unsigned)((width + 3) / 4), i = blockIdx.x * THREADS + threadIdx.x;
  if (quads == 0 || i >= quads * (unsigned)p.outer) return;
  const unsigned row = i / quads;
  const int64_t start = 4 * (int64_t)(i - row * quads);
  const int count = (int)min((int64_t)4, width - start);
  float v[4];
  pe::load4(p.from[part] + row * width + start, 1, count, v);
  pe::store4(out + row * p.width_out + p.at[part] + start, count, v);
}

} // namespace

PE_KERNEL(cuda, contiguous)(const pe_tensor *x, const pe_tensor *out, const pe_contiguous_params *p, pe_stream *s) {
  (void)p;
  if (pe::count_elements(out) == 0) return PE_OK;
  const pe::Walk w = pe::make_walk(x, nullptr, out);
  const int fast = fast_axis(w);
  if (fast >= 0 && transpose(w, fast, x, out, s)) return PE_OK;
  const int64_t quads = (w.inner + 3) / 4, n = quads * w.rows;
  if (!pe::counts_in_31_bits(n)) return pe_fail(s, PE_NO_KERNEL, "contiguous: more than 2^31 runs of four elements");
  pe::launch(pe::stream(s), copy_kernel, dim3((unsigned)((n + THREADS - 1) / THREADS)), dim3(THREADS), 0, w, (const float *)x->data,
             (float *)out->data, (unsigned)quads, (unsigned)n);
  return PE_OK;
}

/* The result is `outer` rows; each holds one run of every part. */
PE_KERNEL(cuda, concat)(const pe_tensor *const *parts, int32_t n_parts, const pe_tensor *out, const pe_concat_params *p, pe_stream *s) {
  Parts q = {};
  q.outer = q.width_out = 1;
  for (int i = 0; i < p->axis; i++) q.outer *= out->shape[i];
  for (int i = p->axis; i < out->ndim; i++) q.width_out *= out->shape[i];
  int64_t at = 0;
  for (int32_t first = 0; first < n_parts; first += PARTS) {
    const int32_t count = n_parts - first < PARTS ? n_parts - first : PARTS;
    int64_t most = 0;
    for (int32_t i = 0; i < count; i++) {
      const pe_tensor *t = parts[first + i];
      q.from[i] = (const float *)t->data;
      q.width[i] = 1;
      for (int a = p->axis; a < t->ndim; a++) q.width[i] *= t->shape[a];
      q.at[i] = at;
      at += q.width[i];
      const int64_t n = (q.width[i] + 3) / 4 * q.outer;
      most = n > most ? n : most;
    }
    if (!pe::counts_in_31_bits(most)) return pe_fail(s, PE_NO_KERNEL, "concat: more than 2^31 runs of four elements");
    if (most)
      pe::launch(pe::stream(s), concat_kernel, dim3((unsigned)((most + THREADS - 1) / THREADS), (unsigned)count), dim3(THREADS), 0, q,
                 (float *)out->data);
  }
  return PE_OK;
}

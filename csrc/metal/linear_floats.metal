/* linear_floats.metal: rows of x times weights that are floats, or become floats: F32, F16 and BF16, packed or not, and block formats that
 * have no packed form. Reference: pyengine/ops/matmul.py: linear, pyengine/ops/experts.py: expert_linear.
 *
 * x stays float32, as on the CPU; weights become float32 in threadgroup memory, and matrices of 8 x 8 multiply both. Few rows take them
 * too, 8 at once: the order in which a matrix adds up 8 of k is the GPU's own, so only a kernel that multiplies in the same way gives a
 * row the same bits. 8 rows make 16 operations of a weight of 2 bytes: 3.2 TFLOP/s at 400 GB/s, of the 14 that an M3 Max has. Sums are
 * cut as linear.h says.
 */
#include "dequant.h"
#include "linear.h"
#include "matrices.h"

enum { FEW_STRIDE = 24, FLOAT_W_STRIDE = 72, FLOAT_X_STRIDE = 36 };

/* Where a matrix of 16 columns begins, and what is known of it. */
struct float_columns {
  device const uchar *w;          /* of the matrix, or of the expert's */
  int column, n, k;
  long bytes;                     /* of a packed group; of a row in the file's layout */
};

/* Four numbers of a plain format that lie side by side. */
static inline float4 load_plain4(device const uchar *p) {
  if (FORMAT == PE_F32) return *(device const float4 *)p;
  if (FORMAT == PE_F16) {
    const half4 x = *(device const half4 *)p;
    return float4(x);
  }
  const ushort4 bits = *(device const ushort4 *)p;
  return float4(pe_bf16_to_f32(bits.x), pe_bf16_to_f32(bits.y), pe_bf16_to_f32(bits.z), pe_bf16_to_f32(bits.w));
}

/* One number of a plain format. */
static inline float load_plain(device const uchar *p, int k) {
  if (FORMAT == PE_F32) return ((device const float *)p)[k];
  if (FORMAT == PE_F16) return (float)((device const half *)p)[k];
  return pe_bf16_to_f32(((device const ushort *)p)[k]);
}

/* Elements and bytes of a block of a format; a plain number is a block of one. */
struct file_form {
  int elements, bytes;
};
static inline file_form file_form_of(int format) {
  switch (format) {
#define PE_FILE_FORM(name, id, elements, bytes) case id: return file_form{elements, bytes};
    PE_FORMATS(PE_FILE_FORM)
#undef PE_FILE_FORM
    default: return file_form{1, 4};
  }
}

/* 16 columns x 32 of k, from `step` on, by the 32 lanes of a simdgroup to `to`, [k][stride]. Zero beyond the matrix.
 * Packed: a lane loads 4 rows of one k, 32 lanes 256 to 512 bytes side by side. Plain numbers in the file's layout: a lane is one k of a
 * row after the other. Blocks: a lane takes 8 of k of a row, four lanes all 32, twice. */
static inline void load_columns(float_columns m, int step, device const codebooks *books, threadgroup float *to, int stride, int lane) {
  const file_form form = file_form_of(FORMAT);
  if (PACKED) {
    device const uchar *group = m.w + min(m.column, m.n - 1) / GROUP * m.bytes;
    PE_UNROLL
    for (int i = 0; i < 4; i++) {
      const int at = 4 * (lane + 32 * i), k = at / GROUP, r = at % GROUP;
      float4 y = float4(0.0f);
      if (step + k < m.k) y = load_plain4(group + ((long)(step + k) * GROUP + r) * form.bytes);
      *(threadgroup float4 *)(to + k * stride + r) = y;
    }
  } else if (form.elements == 1) {
    for (int r = 0; r < GROUP; r++) {
      const bool there = m.column + r < m.n && step + lane < m.k;
      to[lane * stride + r] = there ? load_plain(m.w + (m.column + r) * m.bytes, step + lane) : 0.0f;
    }
  } else {
    PE_UNROLL
    for (int i = 0; i < 2; i++) {
      const int r = lane / 4 + 8 * i, at = 8 * (lane % 4), k = step + at;
      float y[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      device const uchar *block = m.w + (m.column + r) * m.bytes + k / form.elements * form.bytes;
      if (m.column + r < m.n) file_values(FORMAT, block, k % form.elements, books, y);
      for (int j = 0; j < 8; j++) to[(at + j) * stride + r] = y[j];
    }
  }
}

/* ---- few rows ----
 *
 * A threadgroup of 4 simdgroups owns 16 columns (of both matrices with glu) for up to 8 rows; simdgroup p owns slices p, p + 4 .. of k, and two
 * matrices of sums. Rows of x are loaded from the cache as they are.
 * Shared memory, 16.6 KB: numbers 0 .. 63, the simdgroups' weights [4][32 of k][24], sums of 4 slices [slice][matrix][row of x][16].
 * Roofline: the weights, once; 16 operations for each.
 */

enum { AT_FEW_W = 64, AT_SLICES = AT_FEW_W + SIMDGROUPS * 32 * FEW_STRIDE };

kernel void linear_floats_few(constant linear_args &a [[buffer(0)]], device const float *h [[buffer(1)]],
                              device const codebooks *books [[buffer(2)]], device const uchar *w0 [[buffer(4)]],
                              device const uchar *w1 [[buffer(5)]], device const uchar *w2 [[buffer(6)]],
                              device const uchar *w3 [[buffer(7)]], device const float *bias0 [[buffer(8)]],
                              device const float *bias1 [[buffer(9)]], device const float *bias2 [[buffer(10)]],
                              device const float *bias3 [[buffer(11)]], device const float *residual [[buffer(12)]],
                              device float *out0 [[buffer(13)]], device float *out1 [[buffer(14)]],
                              device float *out2 [[buffer(15)]], device float *out3 [[buffer(16)]],
                              device const int *order [[buffer(17)]], device const int *tiles [[buffer(18)]],
                              threadgroup float *shared [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                              uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                              uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const owned own = owned_by(a, group, GROUP, 8, tiles);
  if (own.count <= 0) return;
  int r[2], c[2];
  find_places(shared, (int)index, r, c);
  threadgroup float *w = shared + AT_FEW_W + (int)simdgroup * 32 * FEW_STRIDE;
  device const float *x = h + (long)own.first * a.x_stride;
  const int slice = slice_of(a.k), i = (int)index / GROUP, column = own.column + (int)index % GROUP;
  float y = 0.0f, y1 = 0.0f;
  for (int first = 0; first < a.k; first += SIMDGROUPS * slice) {
    const int begin = first + (int)simdgroup * slice;
    if (first) threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int which = 0; which < (PAIR ? 2 : 1); which++) {
      device const uchar *matrix = (which ? w1 : PE_OF_SET(w, own.set)) + own.expert * a.expert_bytes;
      const float_columns m = {matrix, own.column, a.n[own.set], a.k, a.group_bytes};
      simdgroup_float8x8 sum[2];
      PE_UNROLL
      for (int j = 0; j < 2; j++) sum[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (int step = begin; step < min(a.k, begin + slice); step += 32) {
        simdgroup_barrier(mem_flags::mem_threadgroup);
        load_columns(m, step, books, w, FEW_STRIDE, (int)lane);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int k = 0; k < 32; k += 8) {
          simdgroup_float8x8 left, right;
          simdgroup_load(left, x + step + k, a.x_stride);
          PE_UNROLL
          for (int j = 0; j < 2; j++) {
            simdgroup_load(right, w + k * FEW_STRIDE + 8 * j, FEW_STRIDE);
            simdgroup_multiply_accumulate(sum[j], left, right, sum[j]);
          }
        }
      }
      PE_UNROLL
      for (int j = 0; j < 2; j++)
        for (int e = 0; e < 2; e++)
          shared[AT_SLICES + (((int)simdgroup * 2 + which) * 8 + r[e]) * GROUP + 8 * j + c[e]] = sum[j].thread_elements()[e];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = 0; s < SIMDGROUPS && first + s * slice < a.k; s++) {
      y += shared[AT_SLICES + (s * 2 * 8 + i) * GROUP + (int)index % GROUP];
      if (PAIR) y1 += shared[AT_SLICES + ((s * 2 + 1) * 8 + i) * GROUP + (int)index % GROUP];
    }
  }
  if (i >= own.count || column >= a.n[own.set]) return;
  const results to = {PE_OF_SET(bias, own.set), bias1, residual, PE_OF_SET(out, own.set), order};
  finish(a, own, to, own.first + i, column, y, y1);
}

/* ---- many rows ----
 *
 * A threadgroup of 4 simdgroups owns 64 columns (of both matrices, one after the other, with glu) for ROWS = 16 or 32 rows of x; a
 * simdgroup loads 16 of the columns and multiplies 32 of them with half of the rows, as 4 x ROWS / 16 matrices.
 * Shared memory, 14 KB: numbers 0 .. 63, weights [32 of k][72], x [ROWS][36].
 * Roofline: of each byte of F16, 16 rows make 16 operations and 32 make 32 (F32: half as many), where an M3 Max has time for 35; more rows
 * find the weights in the cache, and products are the limit.
 */

enum { AT_FLOAT_W = 64, AT_FLOAT_X = AT_FLOAT_W + 32 * FLOAT_W_STRIDE };

/* acc += the products of a step; acc: matrix (i, j) is rows 8 i and columns 8 j of the simdgroup's own. */
static inline void multiply_floats(threadgroup const float *w, threadgroup const float *x, thread simdgroup_float8x8 (&acc)[2][4]) {
  for (int k = 0; k < 32; k += 8) {
    simdgroup_float8x8 left[2], right;
    PE_UNROLL
    for (int i = 0; i < ROWS / 16; i++) simdgroup_load(left[i], x + 8 * i * FLOAT_X_STRIDE + k, FLOAT_X_STRIDE);
    PE_UNROLL
    for (int j = 0; j < 4; j++) {
      simdgroup_load(right, w + k * FLOAT_W_STRIDE + 8 * j, FLOAT_W_STRIDE);
      PE_UNROLL
      for (int i = 0; i < ROWS / 16; i++) simdgroup_multiply_accumulate(acc[i][j], left[i], right, acc[i][j]);
    }
  }
}

kernel void linear_floats_tiles(constant linear_args &a [[buffer(0)]], device const float *h [[buffer(1)]],
                                device const codebooks *books [[buffer(2)]], device const uchar *w0 [[buffer(4)]],
                                device const uchar *w1 [[buffer(5)]], device const uchar *w2 [[buffer(6)]],
                                device const uchar *w3 [[buffer(7)]], device const float *bias0 [[buffer(8)]],
                                device const float *bias1 [[buffer(9)]], device const float *bias2 [[buffer(10)]],
                                device const float *bias3 [[buffer(11)]], device const float *residual [[buffer(12)]],
                                device float *out0 [[buffer(13)]], device float *out1 [[buffer(14)]],
                                device float *out2 [[buffer(15)]], device float *out3 [[buffer(16)]],
                                device const int *order [[buffer(17)]], device const int *tiles [[buffer(18)]],
                                threadgroup float *shared [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                                uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                                uint warp [[simdgroup_index_in_threadgroup]]) {
  const owned own = owned_by(a, group, TILE_COLUMNS, ROWS, tiles);
  if (own.count <= 0) return;
  int r[2], c[2];
  find_places(shared, (int)index, r, c);
  const int row0 = (int)(warp / 2) * (ROWS / 2), column0 = (int)(warp % 2) * 32, mine = GROUP * (int)warp;
  threadgroup float *w = shared + AT_FLOAT_W, *x = shared + AT_FLOAT_X;
  float total[2][4][2], gate[2][4][2];
  for (int which = 0; which < (PAIR ? 2 : 1); which++) {
    device const uchar *matrix = (which ? w1 : PE_OF_SET(w, own.set)) + own.expert * a.expert_bytes;
    const float_columns m = {matrix, own.column + mine, a.n[own.set], a.k, a.group_bytes};
    PE_UNROLL
    for (int i = 0; i < 2; i++)
      PE_UNROLL
      for (int j = 0; j < 4; j++)
        for (int e = 0; e < 2; e++) {
          if (which) gate[i][j][e] = total[i][j][e];
          total[i][j][e] = 0.0f;
        }
    for (int begin = 0; begin < a.k; begin += slice_of(a.k)) {
      simdgroup_float8x8 acc[2][4];
      PE_UNROLL
      for (int i = 0; i < 2; i++)
        PE_UNROLL
        for (int j = 0; j < 4; j++) acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (int step = begin; step < min(a.k, begin + slice_of(a.k)); step += 32) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        load_columns(m, step, books, w + mine, FLOAT_W_STRIDE, (int)lane);
        for (int at = (int)index; at < 8 * ROWS; at += 128) /* a float4 each */
          *(threadgroup float4 *)(x + at / 8 * FLOAT_X_STRIDE + at % 8 * 4) =
              *(device const float4 *)(h + (long)(own.first + at / 8) * a.x_stride + step + at % 8 * 4);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        multiply_floats(w + column0, x + row0 * FLOAT_X_STRIDE, acc);
      }
      PE_UNROLL
      for (int i = 0; i < 2; i++)
        PE_UNROLL
        for (int j = 0; j < 4; j++)
          for (int e = 0; e < 2; e++) total[i][j][e] += acc[i][j].thread_elements()[e];
    }
  }
  const results to = {PE_OF_SET(bias, own.set), bias1, residual, PE_OF_SET(out, own.set), order};
  PE_UNROLL
  for (int i = 0; i < ROWS / 16; i++)
    PE_UNROLL
    for (int j = 0; j < 4; j++)
      for (int e = 0; e < 2; e++) {
        const int row = row0 + 8 * i + r[e], at = own.column + column0 + 8 * j + c[e];
        if (row >= own.count || at >= a.n[own.set]) continue;
        if (PAIR) finish(a, own, to, own.first + row, at, gate[i][j][e], total[i][j][e]);
        else finish(a, own, to, own.first + row, at, total[i][j][e], 0.0f);
      }
}

/* linear.metal: rows of x times packed matrices of blocks, for few rows and for many; and rows of x made ready for that.
 * Reference: pyengine/ops/matmul.py: linear, pyengine/ops/experts.py: expert_linear. What surrounds the sums is in linear.h, the packed
 * form in packed.h.
 *
 * Rows of x become codes of 8 bits with one scale for 32 of k, exactly as on the CPU (csrc/cpu/codes.h), so that both backends
 * multiply the same numbers. A GPU of Apple's has no product of bytes, but whole numbers below 2^24 are exact in float, whatever the
 * order of a sum: 32 products of a code below 2^11 and one below 2^7 are. So a step's sum has the same bits from a lane's fma and
 * from a simdgroup_matrix, and what follows is the same in both kernels, and on the CPU:
 *     acc = fma(sum * s, d, acc);  acc = fma(o, d * sum of x, acc);  each 32 (or 16) of k in order; slices of k added in order
 * A row therefore has the same bits alone, beside others, and in a prompt however it is cut.
 */
#include "linear.h"
#include "matrices.h"
#include "packed.h"
#include "team.h"

/* ---- rows of x ----
 *
 * A threadgroup of 8 simdgroups owns 64 blocks of 32 of k of one row; a lane owns one element at a time. With a norm each threadgroup
 * sums the squares of the whole row for itself, in one team or in each simdgroup (team.h). Roofline: 4 bytes read and 2.4 written for
 * each element (4 more as floats); for one row of 4096 that is 26 KB, so the launch itself is the cost. Shared memory: 256 floats, for
 * that sum.
 */

PE_CONSTANT(bool, NORMED, 8);
PE_CONSTANT(bool, QUANTIZED, 9);   /* codes, scales and sums are wanted */
PE_CONSTANT(bool, FLOATS, 10);      /* x as floats is wanted, h_stride apart, zeros behind k */

struct prepare_args {
  int k, rows, x_stride, h_stride;
  int each;                        /* experts: rows of `order` that share a row of x */
  int team;                        /* threads that sum the squares of a row: 32 or 256 */
  float eps;
};

enum { PREPARE_BLOCKS = 64 };

/* 1 / root mean square of a row, in every thread: summed as norm.metal does, so that a fused norm has the bits of rms_norm. */
static inline float inverse_rms(team t, device const float *x, int k, float eps) {
  return 1.0f / sqrt(row_sum(t, x, k, true, 0.0f, 0) / (float)k + eps);
}

kernel void prepare_rows(constant prepare_args &a [[buffer(0)]], device const float *x [[buffer(1)]],
                         device const float *norm [[buffer(2)]], device half *codes [[buffer(3)]],
                         device float *scales [[buffer(4)]], device float *sums [[buffer(5)]], device float *h [[buffer(6)]],
                         device const int *order [[buffer(7)]], threadgroup float *parts [[threadgroup(0)]],
                         uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]], uint warp [[simdgroup_index_in_threadgroup]]) {
  const int row = (int)group.y, there = row < a.rows, blocks = (a.k + 31) / 32;
  const long from = !there ? 0 : EXPERTS ? order[row] / a.each : row;
  float shrink = 1.0f;
  if (NORMED && there) shrink = inverse_rms(team_of(a.team, index, lane, warp, parts), x + from * a.x_stride, a.k, a.eps);
  const int first = PREPARE_BLOCKS * (int)group.x;
  for (int b = first + (int)warp; b < min(first + PREPARE_BLOCKS, blocks); b += 8) {
    const int i = 32 * b + (int)lane;
    float y = there && i < a.k ? x[from * a.x_stride + i] : 0.0f;
    if (NORMED && i < a.k) y = y * shrink * norm[i];
    if (FLOATS) h[(long)row * a.h_stride + i] = y;
    if (!QUANTIZED) continue;
    const float most = as_type<float>(simd_max(as_type<uint>(y) & 0x7fffffffu)); /* as bits: a NaN is the largest */
    float inverse = most > 0.0f ? 127.0f / most : 0.0f, d = most / 127.0f;
    if (inverse > 3e38f) inverse = 0.0f, d = 0.0f;   /* so small that its inverse overflows */
    const float code = inverse != 0.0f ? rint(y * inverse) : 0.0f;
    codes[(long)row * a.k + i] = (half)code;
    float sum = code;                                /* of 16 lanes; whole numbers, so any order */
    for (ushort step = 1; step < 16; step *= 2) sum += simd_shuffle_xor(sum, step);
    if (lane == 0) scales[(long)row * blocks + b] = d;
    if (lane % 16 == 0) sums[((long)row * blocks + b) * 2 + lane / 16] = sum;
  }
}

/* ---- few rows ----
 *
 * A threadgroup of 4 simdgroups owns 16 GROUPS columns (of both matrices with glu) for up to 8 rows; simdgroup p owns slices p, p + 4 .. of k. A lane
 * owns a row of each group and half of each step (packed.h): 2 to 6 loads of weights, 128 bytes a simdgroup, and 7 of x for each row of
 * x, from the cache, which two groups share where rows are many. Codes become halfs by and and or, 1024 too large, which one fma a step
 * takes back. Shared memory: sums of 16 slices, or for more than 2 rows of 4, [slice][matrix][row of x][column], 8 KB.
 * Roofline: the weights, once: n k 0.5625 bytes for Q4_0, at 400 GB/s 711 weights a nanosecond; for one row about 2.6 instructions a
 * weight, a quarter of what an M3 Max has; for 8 rows 10, all of it.
 */

PE_CONSTANT(int, GROUPS, 11);      /* of 16 columns in a threadgroup: 1 or 2 */

enum { FEW_ROWS = 8, FEW_GROUPS = 2 };

struct few_sums {
  float e[FEW_GROUPS][FEW_ROWS];
};

static inline float dot_codes(uint u, half4 x, float sum) {
  const half2 even = even_codes(u), odd = odd_codes(u);
  sum = fma((float)even.x, (float)x.x, sum);
  sum = fma((float)odd.x, (float)x.y, sum);
  sum = fma((float)even.y, (float)x.z, sum);
  return fma((float)odd.y, (float)x.w, sum);
}

/* A step's sums into the accumulator of one row of x: both of its halves, where the step has two scales. */
static inline float add_step(packed_form f, float acc, float low, float high, thread const step_scales &w, float d,
                             device const float *sums) {
  low += simd_shuffle_xor(low, 16);
  high += simd_shuffle_xor(high, 16);
  const float bias = -(float)(CODE_BIAS + f.zero);
  if (f.halves == 2) {
    acc = fma(fma(bias, sums[0], low) * w.s[0], d, acc);
    if (f.offsets) acc = fma(w.o[0], d * sums[0], acc);
    acc = fma(fma(bias, sums[1], high) * w.s[1], d, acc);
    if (f.offsets) acc = fma(w.o[1], d * sums[1], acc);
    return acc;
  }
  const float all = sums[0] + sums[1];
  acc = fma(fma(bias, all, low + high) * w.s[0], d, acc);
  return f.offsets ? fma(w.o[0], d * all, acc) : acc;
}

/* Scales of block b of a group. MXFP4: heads of two blocks are one sector, which the halves of the simdgroup read together. */
static inline block_scales scales_of_few(packed_form f, device const uchar *group, int b, uint lane, thread uint &exponents) {
  device const uchar *head = packed_head(f, group, b);
  if (FORMAT != PE_MXFP4) return scales_of_block(FORMAT, head, packed_body(f, group, b), (int)lane & 15);
  block_scales y;
  if (b % 2 == 0) exponents = head[lane];
  y.d = pe_e8m0_half_to_f32((uchar)simd_shuffle(exponents, (ushort)((lane & 15u) + (uint)(b % 2) * 16u)));
  y.m = 0.0f;
  return y;
}

/* Steps begin / 32 .. end / 32 - 1 of groups `bytes` apart, for ROWS rows of x. */
static inline few_sums multiply_few(constant linear_args &a, device const uchar *group, long bytes, int begin, int end,
                                    device const half *codes, device const float *scales, device const float *sums, int first, uint lane) {
  const packed_form f = packed_form_of(FORMAT);
  const int r = (int)lane & 15, h = (int)lane >> 4, steps = f.k / 32, all = a.k / 32;
  few_sums acc;
  block_scales held[FEW_GROUPS];
  uint exponents[FEW_GROUPS] = {0, 0};
  PE_UNROLL
  for (int g = 0; g < FEW_GROUPS; g++)
    PE_UNROLL
    for (int i = 0; i < FEW_ROWS; i++) acc.e[g][i] = 0.0f;
  for (int b = begin / f.k; b < end / f.k; b++) {
    PE_UNROLL
    for (int g = 0; g < GROUPS; g++) held[g] = scales_of_few(f, group + g * bytes, b, lane, exponents[g]);
    for (int j = 0; j < steps; j++) {
      step_codes c[FEW_GROUPS];
      step_scales w[FEW_GROUPS];
      PE_UNROLL
      for (int g = 0; g < GROUPS; g++) {
        c[g] = codes_of_step(FORMAT, packed_body(f, group + g * bytes, b), j, r, h);
        w[g] = scales_of_step(FORMAT, held[g], j);
      }
      const int step = b * steps + j;
      PE_UNROLL
      for (int i = 0; i < ROWS; i++) {
        device const half4 *x = (device const half4 *)(codes + (long)(first + i) * a.k + 32 * step) + h;
        const half4 x0 = x[0], x1 = x[2], x2 = x[4], x3 = x[6];
        const long at = (long)(first + i) * all + step;
        PE_UNROLL
        for (int g = 0; g < GROUPS; g++) {
          const float low = dot_codes(c[g].u[1], x1, dot_codes(c[g].u[0], x0, 0.0f));
          const float high = dot_codes(c[g].u[3], x3, dot_codes(c[g].u[2], x2, 0.0f));
          acc.e[g][i] = add_step(f, acc.e[g][i], low, high, w[g], scales[at], sums + 2 * at);
        }
      }
    }
  }
  return acc;
}

kernel void linear_few(constant linear_args &a [[buffer(0)]], device const half *codes [[buffer(1)]],
                       device const float *scales [[buffer(2)]], device const float *sums [[buffer(3)]],
                       device const uchar *w0 [[buffer(4)]], device const uchar *w1 [[buffer(5)]], device const uchar *w2 [[buffer(6)]],
                       device const uchar *w3 [[buffer(7)]], device const float *bias0 [[buffer(8)]],
                       device const float *bias1 [[buffer(9)]], device const float *bias2 [[buffer(10)]],
                       device const float *bias3 [[buffer(11)]], device const float *residual [[buffer(12)]],
                       device float *out0 [[buffer(13)]], device float *out1 [[buffer(14)]], device float *out2 [[buffer(15)]],
                       device float *out3 [[buffer(16)]], device const int *order [[buffer(17)]],
                       device const int *tiles [[buffer(18)]], threadgroup float *shared [[threadgroup(0)]],
                       uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                       uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const owned own = owned_by(a, group, GROUP * GROUPS, ROWS, tiles);
  if (own.count <= 0) return;
  const int g = own.column / GROUP, last = (a.n[own.set] - 1) / GROUP;
  const long from = own.expert * a.expert_bytes + g * a.group_bytes, bytes = g < last ? a.group_bytes : 0; /* none beyond the last */
  const int kept = ROWS > 2 ? SIMDGROUPS : 4 * SIMDGROUPS, width = GROUP * GROUPS, each = ROWS * width, slice = slice_of(a.k);
  float y[2] = {0.0f, 0.0f}, y1[2] = {0.0f, 0.0f};                 /* outputs index and index + 128 */
  for (int first = 0; first < a.k; first += kept * slice) {
    const int end = min(a.k, first + kept * slice);
    if (first) threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int s = (int)simdgroup; first + s * slice < end; s += SIMDGROUPS)
      for (int which = 0; which < (PAIR ? 2 : 1); which++) {
        device const uchar *w = which ? w1 : PE_OF_SET(w, own.set);
        const int begin = first + s * slice;
        const few_sums acc = multiply_few(a, w + from, bytes, begin, min(end, begin + slice), codes, scales, sums, own.first, lane);
        PE_UNROLL
        for (int j = 0; j < GROUPS; j++)
          PE_UNROLL
          for (int i = 0; i < ROWS; i++)
            if (lane < GROUP) shared[(2 * s + which) * each + i * width + GROUP * j + (int)lane] = acc.e[j][i];
      }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    PE_UNROLL
    for (int i = 0; i < 2; i++) {
      if ((int)index + 128 * i >= each) continue;
      for (int s = 0; first + s * slice < end; s++) {
        y[i] += shared[2 * s * each + (int)index + 128 * i];
        if (PAIR) y1[i] += shared[(2 * s + 1) * each + (int)index + 128 * i];
      }
    }
  }
  const results to = {PE_OF_SET(bias, own.set), bias1, residual, PE_OF_SET(out, own.set), order};
  PE_UNROLL
  for (int i = 0; i < 2; i++) {
    const int row = ((int)index + 128 * i) / width, column = own.column + ((int)index + 128 * i) % width;
    if (row < min(own.count, ROWS) && column < a.n[own.set]) finish(a, own, to, own.first + row, column, y[i], y1[i]);
  }
}

/* ---- many rows ----
 *
 * A threadgroup of 4 simdgroups owns 64 columns (of both matrices, one after the other, with glu) for ROWS = 16 or 32 rows of x; a
 * simdgroup 32 columns of them and half of the rows, as 4 x ROWS / 16 matrices of 8 x 8. Each step of 32 of k is unpacked once: a
 * simdgroup unpacks 16 columns as in the kernel for few rows. Codes are whole halfs, so their sums are exact in a float matrix; after 32
 * of k (or 16) they are scaled into the accumulators. A lane finds out which elements of a matrix it holds from a matrix of numbers.
 * Shared memory, 11 KB: codes of the weights [32 of k][72], codes of x [ROWS][40], scales and offsets [2][64] each, x's scales [ROWS] and
 * sums times scales [2][ROWS], and the numbers 0 .. 63. Rows are padded so that the 8 rows of a matrix lie in different banks. Roofline:
 * each step 4096 ROWS operations against 1152 bytes of Q4_0, 57 a byte for 16 rows where an M3 Max has time for 35 (400 GB/s, 14 TFLOP/s):
 * products are the limit. Unpacking is 40 instructions a thread and step, beside 16 ROWS cycles of products.
 */

/* Halfs between rows of codes; floats of the shared memory before each area. */
enum {
  W_STRIDE = 72,
  X_STRIDE = 40,
  TILE_ROWS_MOST = 32,
  AT_PLACES = 0,
  AT_S = 64,
  AT_O = AT_S + 2 * TILE_COLUMNS,
  AT_D = AT_O + 2 * TILE_COLUMNS,
  AT_SUMS = AT_D + TILE_ROWS_MOST,
  AT_W = AT_SUMS + 2 * TILE_ROWS_MOST,
  AT_X = AT_W + 32 * W_STRIDE / 2
};

/* Sums of a simdgroup: matrix (x, c) is rows 8 x and columns 8 c of its own; two elements a lane. */
struct tile_sums {
  float e[2][4][2];
};

static inline void clear(thread tile_sums &t) {
  PE_UNROLL
  for (int x = 0; x < 2; x++)
    for (int c = 0; c < 4; c++) t.e[x][c][0] = t.e[x][c][1] = 0.0f;
}

/* Codes and scales of a thread's column for step j of a block. */
static inline void unpack_step(packed_form f, device const uchar *group, int b, int j, int column, int h, thread block_scales &held,
                               threadgroup float *shared) {
  threadgroup half *w = (threadgroup half *)(shared + AT_W) + column;
  device const uchar *body = packed_body(f, group, b);
  const step_codes c = codes_of_step(FORMAT, body, j, column & 15, h);
  const half zero = (half)(float)(CODE_BIAS + f.zero);
  PE_UNROLL
  for (int i = 0; i < 4; i++) {
    const half2 even = even_codes(c.u[i]), odd = odd_codes(c.u[i]);
    threadgroup half *to = w + 4 * (h + 2 * i) * W_STRIDE;
    to[0] = even.x - zero;
    to[W_STRIDE] = odd.x - zero;
    to[2 * W_STRIDE] = even.y - zero;
    to[3 * W_STRIDE] = odd.y - zero;
  }
  if (h) return;
  if (j == 0) held = scales_of_block(FORMAT, packed_head(f, group, b), body, column & 15);
  const step_scales y = scales_of_step(FORMAT, held, j);
  PE_UNROLL
  for (int i = 0; i < f.halves; i++) {
    shared[AT_S + TILE_COLUMNS * i + column] = y.s[i];
    if (f.offsets) shared[AT_O + TILE_COLUMNS * i + column] = y.o[i];
  }
}

/* A step of ROWS rows of x. */
static inline void load_step(packed_form f, constant linear_args &a, int first, int step, device const half *codes,
                             device const float *scales, device const float *sums, threadgroup float *shared, int index) {
  threadgroup half *x = (threadgroup half *)(shared + AT_X);
  if (index < 4 * ROWS) {
    const int row = index / 4, part = index % 4;
    device const half *from = codes + (long)(first + row) * a.k + 32 * step + 8 * part;
    *(threadgroup uint4 *)(x + row * X_STRIDE + 8 * part) = *(device const uint4 *)from;
  }
  if (index < ROWS) {
    const long at = (long)(first + index) * (a.k / 32) + step;
    const float d = scales[at];
    shared[AT_D + index] = d;
    if (f.offsets && f.halves == 2) {
      shared[AT_SUMS + index] = d * sums[2 * at];
      shared[AT_SUMS + TILE_ROWS_MOST + index] = d * sums[2 * at + 1];
    } else if (f.offsets) {
      shared[AT_SUMS + index] = d * (sums[2 * at] + sums[2 * at + 1]);
    }
  }
}

/* acc += the products of a step. row0, column0: the simdgroup's own within the tile; r, c: where in a matrix the lane's elements are. */
static inline void multiply_step(packed_form f, threadgroup const float *shared, int row0, int column0, thread const int *r,
                                 thread const int *c, thread tile_sums &acc) {
  threadgroup const half *w = (threadgroup const half *)(shared + AT_W) + column0;
  threadgroup const half *x = (threadgroup const half *)(shared + AT_X) + row0 * X_STRIDE;
  simdgroup_float8x8 sum[2][4];
  PE_UNROLL
  for (int half_ = 0; half_ < 2; half_++) {
    if (half_ == 0 || f.halves == 2)
      PE_UNROLL
      for (int i = 0; i < ROWS / 16; i++)
        PE_UNROLL
        for (int j = 0; j < 4; j++) sum[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 16 * half_; k < 16 * half_ + 16; k += 8) {
      simdgroup_half8x8 left[2], right;
      PE_UNROLL
      for (int i = 0; i < ROWS / 16; i++) simdgroup_load(left[i], x + 8 * i * X_STRIDE + k, X_STRIDE);
      PE_UNROLL
      for (int j = 0; j < 4; j++) {
        simdgroup_load(right, w + k * W_STRIDE + 8 * j, W_STRIDE);
        PE_UNROLL
        for (int i = 0; i < ROWS / 16; i++) simdgroup_multiply_accumulate(sum[i][j], left[i], right, sum[i][j]);
      }
    }
    if (half_ == 0 && f.halves == 1) continue;
    const int at = f.halves == 2 ? half_ : 0;
    PE_UNROLL
    for (int i = 0; i < ROWS / 16; i++)
      PE_UNROLL
      for (int j = 0; j < 4; j++)
        for (int e = 0; e < 2; e++) {
          const int row = row0 + 8 * i + r[e], column = column0 + 8 * j + c[e];
          float y = fma(sum[i][j].thread_elements()[e] * shared[AT_S + TILE_COLUMNS * at + column], shared[AT_D + row], acc.e[i][j][e]);
          if (f.offsets) y = fma(shared[AT_O + TILE_COLUMNS * at + column], shared[AT_SUMS + TILE_ROWS_MOST * at + row], y);
          acc.e[i][j][e] = y;
        }
  }
}

kernel void linear_tiles(constant linear_args &a [[buffer(0)]], device const half *codes [[buffer(1)]],
                         device const float *scales [[buffer(2)]], device const float *sums [[buffer(3)]],
                         device const uchar *w0 [[buffer(4)]], device const uchar *w1 [[buffer(5)]],
                         device const uchar *w2 [[buffer(6)]], device const uchar *w3 [[buffer(7)]],
                         device const float *bias0 [[buffer(8)]], device const float *bias1 [[buffer(9)]],
                         device const float *bias2 [[buffer(10)]], device const float *bias3 [[buffer(11)]],
                         device const float *residual [[buffer(12)]], device float *out0 [[buffer(13)]],
                         device float *out1 [[buffer(14)]], device float *out2 [[buffer(15)]], device float *out3 [[buffer(16)]],
                         device const int *order [[buffer(17)]], device const int *tiles [[buffer(18)]],
                         threadgroup float *shared [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                         uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                         uint warp [[simdgroup_index_in_threadgroup]]) {
  const owned own = owned_by(a, group, TILE_COLUMNS, ROWS, tiles);
  if (own.count <= 0) return;
  const packed_form f = packed_form_of(FORMAT);
  const int row0 = (int)(warp / 2) * (ROWS / 2), column0 = (int)(warp % 2) * 32, steps = f.k / 32;
  int r[2], c[2];
  find_places(shared + AT_PLACES, (int)index, r, c);

  const int column = GROUP * (int)warp + (int)lane % GROUP, h = (int)lane / GROUP; /* that the thread unpacks */
  const int g = min(own.column + column, a.n[own.set] - 1) / GROUP; /* beyond the matrix its last group again: nobody reads the sums */
  const long from = own.expert * a.expert_bytes + g * a.group_bytes;
  tile_sums total, gate, acc;
  block_scales held;
  for (int which = 0; which < (PAIR ? 2 : 1); which++) {
    device const uchar *w = (which ? w1 : PE_OF_SET(w, own.set)) + from;
    if (which) gate = total;
    clear(total);
    for (int begin = 0; begin < a.k; begin += slice_of(a.k)) {
      clear(acc);
      for (int step = begin / 32; step < min(a.k, begin + slice_of(a.k)) / 32; step++) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        unpack_step(f, w, step / steps, step % steps, column, h, held, shared);
        load_step(f, a, own.first, step, codes, scales, sums, shared, (int)index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        multiply_step(f, shared, row0, column0, r, c, acc);
      }
      PE_UNROLL
      for (int i = 0; i < 2; i++)
        PE_UNROLL
        for (int j = 0; j < 4; j++)
          for (int e = 0; e < 2; e++) total.e[i][j][e] += acc.e[i][j][e];
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
        if (PAIR) finish(a, own, to, own.first + row, at, gate.e[i][j][e], total.e[i][j][e]);
        else finish(a, own, to, own.first + row, at, total.e[i][j][e], 0.0f);
      }
}

/* rope.metal: rope_table, temperature, rope, cache_append, rope_append.
 * Reference: pyengine/ops/rope.py: rope_table, temperature, rope, cache_append, rope_append.
 *
 * angles         A thread owns one angle of a row: two floats written, a few dozen operations each (angles.h).
 * sharpness      A thread owns a row.
 * rotate_pairs   A thread owns a pair of elements that turn together, or one of those behind that stay: 8 bytes an element. out may be x.
 * append_heads   A simdgroup owns one head of one row: of q, which it norms, turns and writes back, or of k or v, which goes to its cell.
 *                Four simdgroups a threadgroup, with 2 x width floats each of threadgroup memory: the head, and room to mix it. q, k and
 *                v are read once, q and the cells written once; arithmetic is hidden behind that.
 */
#include "angles.h"
#include "store_cells.h"
#include "team.h"

struct angles_args {
  int rows, axes, n;             /* rows of positions, n frequencies */
  float scale;
};

kernel void angles(constant angles_args &a [[buffer(0)]], device const int *positions [[buffer(1)]],
                   device const float *frequencies [[buffer(2)]], device const int *axis [[buffer(3)]], device float *out [[buffer(4)]],
                   device pe_fault *fault [[buffer(5)]], uint3 at [[thread_position_in_grid]]) {
  const int j = (int)at.x, row = (int)at.y;
  if (j >= a.n) return;
  const int which = axis ? axis[j] : 0;
  if (which < 0 || which >= a.axes) return raise_fault(fault, FAULT_BAD_VALUE, which, a.axes);
  two_floats cosine, sine;
  cosine_and_sine((float)positions[(long)which * a.rows + row] * frequencies[j], cosine, sine);
  out[(long)row * 2 * a.n + j] = scaled(cosine, a.scale);
  out[(long)row * 2 * a.n + a.n + j] = scaled(sine, a.scale);
}

struct sharpness_args { int rows, floor; float scale; int offset; };

kernel void sharpness(constant sharpness_args &a [[buffer(0)]], device const int *positions [[buffer(1)]], device float *out [[buffer(2)]],
                      uint at [[thread_position_in_grid]]) {
  if ((int)at >= a.rows) return;
  const long sum = (long)positions[at] + a.offset;
  const int steps = sum < 0 ? 0 : (int)(sum / a.floor);
  out[at] = fma(a.scale, log(1.0f + (float)steps), 1.0f);
}

PE_CONSTANT(bool, INTERLEAVED, 0);

struct pairs_args { int rows, heads, width, pairs; };

kernel void rotate_pairs(constant pairs_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device const float *table [[buffer(2)]],
                         device float *out [[buffer(3)]], uint3 at [[thread_position_in_grid]]) {
  const int each = a.width - a.pairs, head = (int)at.x / each, j = (int)at.x % each, row = (int)at.y;
  if (head >= a.heads) return;
  const long start = ((long)row * a.heads + head) * a.width;
  if (j >= a.pairs) {
    out[start + a.pairs + j] = x[start + a.pairs + j];
    return;
  }
  const long i = start + (INTERLEAVED ? 2 * j : j), k = i + (INTERLEAVED ? 1 : a.pairs);
  const float u = x[i], v = x[k], c = table[(long)row * 2 * a.pairs + j], s = table[(long)row * 2 * a.pairs + a.pairs + j];
  out[i] = u * c - v * s;
  out[k] = v * c + u * s;
}

PE_CONSTANT(int, K_FORMAT, 1);
PE_CONSTANT(int, V_FORMAT, 2);

struct append_args {
  int rows, q_heads, kv_heads, width, v_width, pairs, cells, room;  /* room: floats of a simdgroup's threadgroup memory */
  int k_run, v_run;              /* of a mixed width, the elements that a Hadamard matrix spans */
  float k_shrink, v_shrink, eps;
  long k_head, k_cell, v_head, v_cell;                              /* bytes between heads and between cells of the caches */
};

/* Into threadgroup memory: a head's elements times inv * weight where there is a weight, the first 2 x pairs of them turned. */
static inline void turned(device const float *x, threadgroup float *y, int width, int pairs, device const float *table,
                          device const float *weight, float eps, int lane) {
  const float inverse = weight ? 1.0f / sqrt(simdgroup_row_sum(x, width, true, 0.0f, lane) / (float)width + eps) : 1.0f;
  for (int j = lane; j < pairs; j += 32) {
    const int i = INTERLEAVED ? 2 * j : j, k = i + (INTERLEAVED ? 1 : pairs);
    float u = x[i], v = x[k];
    if (weight) u = u * inverse * weight[i], v = v * inverse * weight[k];
    y[i] = u * table[j] - v * table[pairs + j];
    y[k] = v * table[j] + u * table[pairs + j];
  }
  for (int i = 2 * pairs + lane; i < width; i += 32) y[i] = weight ? x[i] * inverse * weight[i] : x[i];
}

/* Heads of a row: q_heads of q, kv_heads of k, and where there is a v, kv_heads of v. cache_append has no q, no table and no v. */
kernel void append_heads(constant append_args &a [[buffer(0)]], device const float *q [[buffer(1)]], device const float *k [[buffer(2)]],
                         device const float *v [[buffer(3)]], device const float *table [[buffer(4)]],
                         device const int *cells [[buffer(5)]], device const float *q_norm [[buffer(6)]],
                         device const float *k_norm [[buffer(7)]], device const float *offset [[buffer(8)]],
                         device float *q_out [[buffer(9)]], device uchar *k_cache [[buffer(10)]], device uchar *v_cache [[buffer(11)]],
                         device pe_fault *fault [[buffer(12)]], threadgroup float *memory [[threadgroup(0)]],
                         uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                         uint simdgroups [[simdgroups_per_threadgroup]], uint lane_ [[thread_index_in_simdgroup]]) {
  const int lane = (int)lane_, row = (int)group.y, head = (int)(group.x * simdgroups + simdgroup);
  threadgroup float *own = memory + (int)simdgroup * a.room, *other = own + a.room / 2;
  device const float *turns = table + (long)row * 2 * a.pairs;
  if (head >= a.q_heads + (v ? 2 : 1) * a.kv_heads) return;
  if (head < a.q_heads) {
    const long at = ((long)row * a.q_heads + head) * a.width;
    turned(q + at, own, a.width, a.pairs, turns, q_norm, a.eps, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = lane; i < a.width; i += 32) q_out[at + i] = own[i];
    return;
  }
  const int cell = cells[row];
  if (cell < 0) return;
  if (cell >= a.cells) return raise_fault(fault, FAULT_BAD_VALUE, cell, a.cells);
  const int g = (head - a.q_heads) % a.kv_heads;
  if (head < a.q_heads + a.kv_heads) {
    const long at = ((long)row * a.kv_heads + g) * a.width;
    turned(k + at, own, a.width, a.pairs, turns, k_norm, a.eps, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = lane; offset && i < a.width; i += 32) own[i] -= offset[(long)g * a.width + i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (is_block(K_FORMAT)) own = mixed(own, other, a.width, a.k_run, a.k_shrink, lane);
    store_cell(K_FORMAT, k_cache + g * a.k_head + cell * a.k_cell, own, a.width, lane);
  } else {
    for (int i = lane; i < a.v_width; i += 32) own[i] = v[((long)row * a.kv_heads + g) * a.v_width + i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (is_block(V_FORMAT)) own = mixed(own, other, a.v_width, a.v_run, a.v_shrink, lane);
    store_cell(V_FORMAT, v_cache + g * a.v_head + cell * a.v_cell, own, a.v_width, lane);
  }
}

/* groups.metal: cache_groups, merge_attention. Reference: pyengine/ops/groups.py: cache_groups, merge_attention.
 *
 * write_groups  A threadgroup of four simdgroups owns a group of 32 keys and values of one head. Keys by channel: a simdgroup reads 32 channels of
 *               the 32 keys, 64 bytes of a key in F16, then has a lane for each key, and all lanes together make a channel's block. Keys that
 *               are not by channel, and values: a simdgroup has every fourth cell, which is mixed where it is in blocks. Threadgroup memory: of
 *               each simdgroup 32 x 33 floats, so that neither way of access meets a bank twice, or a cell and room to mix it. A group is read
 *               once and written once, 24 KB of 128 elements in F16 to Q4_1; Q2_1's search takes some 30 sums of a simdgroup a block, which an
 *               M3 Max (40 cores) has time for: 8192 tokens of 8 heads are 2.1e9 lanes' sums, a few ms a layer. A token has none but every 32nd.
 * merge_heads   A simdgroup owns one head of one row, a lane every 32nd element. Parts are added in their order. n parts of 4 bytes an element
 *               are read and 4 bytes written: bound by memory, in a step of few rows by the launch.
 */
#include "activations.h"
#include "store_cells.h"

PE_CONSTANT(int, K_FORMAT, 0);
PE_CONSTANT(int, V_FORMAT, 1);
PE_CONSTANT(int, K_FULL, 2);
PE_CONSTANT(int, V_FULL, 3);

struct groups_args {
  int k_width, v_width, cells, full, room;     /* cells: of k; full: of k_full; room: floats of a simdgroup's threadgroup memory */
  int k_run, v_run;                            /* elements that are mixed together */
  float k_shrink, v_shrink;
  long k_head, k_cell, v_head, v_cell;         /* bytes, as below */
  long kf_head, kf_cell, vf_head, vf_cell;
};

enum { SIMDGROUPS = 4, COLUMNS = 32, PITCH = COLUMNS + 1 };

static inline int number_bytes(int format) { return format == PE_F32 ? 4 : 2; }

/* One block of keys by channel, of which the lane has one. */
static inline void store_channel(device uchar *to, float x, int lane) {
  if (channel_format(K_FORMAT) == PE_Q2_1) store_q2_1(to, x, lane);
  else store_q4_1(to, x, lane);
}

static inline void write_channels(constant groups_args &a, device const uchar *from, device uchar *to, threadgroup float *x, int simdgroup, int lane) {
  const int bytes = block_bytes(channel_format(K_FORMAT));
  for (int first = COLUMNS * simdgroup; first < a.k_width; first += COLUMNS * SIMDGROUPS) {
    for (int j = 0; j < GROUP_KEYS; j++) x[j * PITCH + lane] = load_number(K_FULL, from + j * a.kf_cell + (first + lane) * number_bytes(K_FULL));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int c = 0; c < COLUMNS; c++) store_channel(to + (first + c) * bytes, x[lane * PITCH + c], lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

/* Four simdgroups' cells of a group. */
static inline void write_cells(int full, device const uchar *from, long from_cell, int format, device uchar *to, long to_cell, int width, int run,
                               float shrink, threadgroup float *x, int room, int simdgroup, int lane) {
  for (int j = simdgroup; j < GROUP_KEYS; j += SIMDGROUPS) {
    threadgroup float *y = x;
    for (int i = lane; i < width; i += 32) x[i] = load_number(full, from + j * from_cell + i * number_bytes(full));
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (is_block(format)) y = mixed(x, x + room / 2, width, run, shrink, lane);
    store_cell(format, to + j * to_cell, y, width, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

/* Does a group begin at this cell of so many? The thread that `says` so notes why not. */
static inline bool begins(int cell, int cells, bool says, device pe_fault *fault) {
  if (cell >= 0 && cell % GROUP_KEYS == 0 && cell + GROUP_KEYS <= cells) return true;
  if (says) raise_fault(fault, FAULT_BAD_VALUE, cell, cells);
  return false;
}

kernel void write_groups(constant groups_args &a [[buffer(0)]], device uchar *k [[buffer(1)]], device uchar *v [[buffer(2)]],
                         device const uchar *k_full [[buffer(3)]], device const uchar *v_full [[buffer(4)]],
                         device const int *source [[buffer(5)]], device const int *target [[buffer(6)]], device pe_fault *fault [[buffer(7)]],
                         threadgroup float *memory [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]], uint lane_ [[thread_index_in_simdgroup]]) {
  const int lane = (int)lane_, own = (int)simdgroup, to = target[group.x], head = (int)group.y;
  const bool says = lane == 0 && own == 0 && head == 0;
  threadgroup float *x = memory + own * a.room;
  if (to < 0) return;
  const int from = source[group.x];
  if (!begins(from, a.full, says, fault) || !begins(to, a.cells, says, fault)) return;
  k_full += head * a.kf_head + from * a.kf_cell;
  v_full += head * a.vf_head + from * a.vf_cell;
  k += head * a.k_head + to * a.k_cell;
  v += head * a.v_head + to * a.v_cell;
  if (by_channel(K_FORMAT)) write_channels(a, k_full, k, x, own, lane);
  else write_cells(K_FULL, k_full, a.kf_cell, K_FORMAT, k, a.k_cell, a.k_width, a.k_run, a.k_shrink, x, a.room, own, lane);
  write_cells(V_FULL, v_full, a.vf_cell, V_FORMAT, v, a.v_cell, a.v_width, a.v_run, a.v_shrink, x, a.room, own, lane);
}

/* ---- parts of a softmax ---- */

struct merge_args { int heads, width, parts; };    /* heads: of all rows; width: of one */

enum { MOST_PARTS = 4 };

/* The weight of a part whose largest logit and sum are at stats, where the largest one of all is `top`. */
static inline float weight_of(device const float *stats, float top) {
  return stats[1] > 0.0f ? stats[1] * exp_of(stats[0] - top) : 0.0f * stats[1];
}

kernel void merge_heads(constant merge_args &a [[buffer(0)]], device const float *x0 [[buffer(1)]], device const float *x1 [[buffer(2)]],
                        device const float *x2 [[buffer(3)]], device const float *x3 [[buffer(4)]], device const float *s0 [[buffer(5)]],
                        device const float *s1 [[buffer(6)]], device const float *s2 [[buffer(7)]], device const float *s3 [[buffer(8)]],
                        device float *out [[buffer(9)]], device float *together [[buffer(10)]],
                        uint3 group [[threadgroup_position_in_grid]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                        uint simdgroups [[simdgroups_per_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  const long head = (long)group.x * simdgroups + simdgroup;
  if (head >= a.heads) return;
  device const float *x[MOST_PARTS] = {x0, x1, x2, x3};
  device const float *stats[MOST_PARTS] = {s0, s1, s2, s3};
  float weight[MOST_PARTS], top = -INFINITY, total = 0.0f;
  int only = -1;                                    /* the only part that has keys is the result, bit for bit */
  for (int i = 0; i < a.parts; i++)
    if (stats[i][2 * head + 1] > 0.0f) top = max(top, stats[i][2 * head]);
  for (int i = 0; i < a.parts; i++) {
    weight[i] = weight_of(stats[i] + 2 * head, top);
    total += weight[i];
  }
  for (int i = a.parts - 1; i >= 0; i--)
    if (weight[i] == total && total > 0.0f) only = i;
  if (together && lane == 0) {
    together[2 * head] = total != 0.0f ? top : 0.0f;
    together[2 * head + 1] = total;
  }
  for (int j = (int)lane; j < a.width; j += 32) {
    const long at = head * a.width + j;
    float sum = 0.0f;
    for (int i = 0; only < 0 && i < a.parts; i++)
      if (weight[i] != 0.0f) sum = fma(x[i][at], weight[i], sum);
    out[at] = only >= 0 ? x[only][at] : total != 0.0f ? sum / total : sum;
  }
}

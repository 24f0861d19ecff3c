/* experts.metal: which rows go to which expert, for expert_linear, whose products are those of linear.metal and linear_floats.metal.
 * Reference: pyengine/ops/experts.py: expert_linear.
 *
 * A pair is a row and one of its experts. One threadgroup sorts the pairs by expert, those of one in the order of their numbers, and cuts
 * each expert's run into tiles of rows that are multiplied together, so that an expert's weights are read once for each tile. A thread
 * owns every 256th expert and reads all pairs twice: 4 p bytes that all lanes read at once. With 4096 pairs (a prompt of 512 rows, 8
 * experts each) some 10 microseconds; with 8 nothing beside the launch.
 * Shared memory: for each expert where its pairs and its tiles begin, 8 bytes.
 */
#include "common.h"

struct sort_args {
  int pairs, experts;
  int rows;        /* of a tile, at most */
  int tiles;       /* room in the table of tiles; those that are not used get no rows */
};

kernel void sort_experts(constant sort_args &a [[buffer(0)]], device const int *chosen [[buffer(1)]], device int *order [[buffer(2)]],
                         device int *tiles [[buffer(3)]], device pe_fault *fault [[buffer(4)]], threadgroup int *begins [[threadgroup(0)]],
                         uint index [[thread_index_in_threadgroup]]) {
  threadgroup int *first_tile = begins + a.experts + 1;
  const int last = a.experts - 1;
  for (int i = (int)index; i < a.pairs; i += 256)
    if (chosen[i] < 0 || chosen[i] > last) raise_fault(fault, FAULT_BAD_VALUE, chosen[i], a.experts);
  for (int e = (int)index; e < a.experts; e += 256) {
    int n = 0;
    for (int i = 0; i < a.pairs; i++) n += clamp(chosen[i], 0, last) == e;
    begins[e] = n;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (index == 0) {
    int pairs = 0, t = 0;
    for (int e = 0; e <= a.experts; e++) {
      const int n = e < a.experts ? begins[e] : 0;
      begins[e] = pairs;
      first_tile[e] = t;
      pairs += n;
      t += (n + a.rows - 1) / a.rows;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = (int)index; e < a.experts; e += 256) {
    int at = begins[e];
    for (int i = 0; i < a.pairs && at < begins[e + 1]; i++)
      if (clamp(chosen[i], 0, last) == e) order[at++] = i;
    for (int t = first_tile[e]; t < first_tile[e + 1]; t++) {
      const int first = begins[e] + (t - first_tile[e]) * a.rows;
      tiles[3 * t] = e;
      tiles[3 * t + 1] = first;
      tiles[3 * t + 2] = min(a.rows, begins[e + 1] - first);
    }
  }
  for (int t = first_tile[a.experts] + (int)index; t < a.tiles; t += 256) tiles[3 * t] = tiles[3 * t + 1] = tiles[3 * t + 2] = 0;
}

/* team.h: threads that share a row. A team is a simdgroup, of which a threadgroup may hold several with a row each, or all simdgroups of a
 * threadgroup of 256. Which it is follows from the width of the row alone: a simdgroup has rows of up to 1024. Sums are those of
 * csrc/cpu/vec.h, so that they have the same bits: 1024 sums, element i in number i % 1024, in the order of the row, which are folded in
 * halves: i with i + 512, i + 256 .. i + 1. */
#ifndef PE_METAL_TEAM_H
#define PE_METAL_TEAM_H

#include "common.h"

struct team {
  int size;       /* threads */
  int at;         /* this thread in it */
  uint lane, group;
  threadgroup float *parts;  /* [256 a turn] for a team of several simdgroups */
};

static inline team team_of(int size, uint number, uint lane, uint group, threadgroup float *parts) {
  return team{size, (int)number % size, lane, group, parts};
}

/* What simdgroups have, in every thread of the team. `turn`: no two calls without a barrier between them may have the same. */
static inline float team_part(team t, float own, float otherwise, int turn) {
  if (t.lane == 0) t.parts[256 * turn + (int)t.group] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return (int)t.lane < t.size / 32 ? t.parts[256 * turn + (int)t.lane] : otherwise;
}

/* ---- sums ---- */

/* Sum of one of the 1024: of elements, or of the squares of what they are above `centre`. */
template <class Row> static inline float sum_from(Row x, int first, int width, bool squares, float centre) {
  float sum = 0.0f;
  for (int i = first; i < width; i += 1024) sum = squares ? fma(x[i] - centre, x[i] - centre, sum) : sum + x[i];
  return sum;
}

/* The fold of what the lanes have; simd_sum's order is the GPU's own. */
static inline float fold_lanes(float sum) {
  for (ushort apart = 16; apart > 0; apart /= 2) sum += simd_shuffle_xor(sum, apart);
  return sum;
}

/* A row of a simdgroup, up to 1024 wide, in every lane. */
template <class Row> static inline float simdgroup_row_sum(Row x, int width, bool squares, float centre, int lane) {
  float s[8];
  for (int j = 0; j < 8; j++) {
    const int i = lane + 32 * j;
    s[j] = sum_from(x, i, width, squares, centre);
    if (width > 256)
      s[j] = (s[j] + sum_from(x, i + 512, width, squares, centre)) +
             (sum_from(x, i + 256, width, squares, centre) + sum_from(x, i + 768, width, squares, centre));
  }
  return fold_lanes(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])));
}

/* The team's row, in every thread. */
template <class Row> static inline float row_sum(team t, Row x, int width, bool squares, float centre, int turn) {
  if (t.size == 32) return simdgroup_row_sum(x, width, squares, centre, (int)t.lane);
  float s[8];
  for (int j = 0; j < 4; j++) s[j] = sum_from(x, t.at + 256 * j, width, squares, centre);
  t.parts[256 * turn + t.at] = (s[0] + s[2]) + (s[1] + s[3]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = 0; j < 8; j++) s[j] = t.parts[256 * turn + (int)t.lane + 32 * j];
  return fold_lanes(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])));
}

static inline float team_max(team t, float x, int turn) {
  const float own = simd_max(x);
  return t.size == 32 ? own : simd_max(team_part(t, own, -INFINITY, turn));
}

#endif

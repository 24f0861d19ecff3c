/* team.h: threads that share a row. A team is a simdgroup, of which a threadgroup may hold several with a row each, or all simdgroups of a
 * threadgroup. Which it is follows from the width of the row alone, and so does the order of every sum: elements i, i + size, i + 2 size ..
 * in a thread, then simd_sum, then over simdgroups. */
#ifndef PE_METAL_TEAM_H
#define PE_METAL_TEAM_H

#include "common.h"

struct team {
  int size;       /* threads */
  int at;         /* this thread in it */
  uint lane, group;
  threadgroup float *parts;  /* [32 a turn] for a team of several simdgroups */
};

static inline team team_of(int size, uint number, uint lane, uint group, threadgroup float *parts) {
  return team{size, (int)number % size, lane, group, parts};
}

/* What simdgroups have, in every thread of the team. `turn`: no two calls without a barrier between them may have the same. */
static inline float team_part(team t, float own, float otherwise, int turn) {
  if (t.lane == 0) t.parts[32 * turn + (int)t.group] = own;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return (int)t.lane < t.size / 32 ? t.parts[32 * turn + (int)t.lane] : otherwise;
}
static inline float team_sum(team t, float x, int turn) {
  const float own = simd_sum(x);
  return t.size == 32 ? own : simd_sum(team_part(t, own, 0.0f, turn));
}
static inline float team_max(team t, float x, int turn) {
  const float own = simd_max(x);
  return t.size == 32 ? own : simd_max(team_part(t, own, -INFINITY, turn));
}

#endif

/* norm.metal: rms_norm, layer_norm, l2_norm, softmax, reduce over the last axis, which is contiguous; group_norm over pictures.
 * Reference: pyengine/ops/norm.py: rms_norm, layer_norm, l2_norm, softmax, reduce, group_norm.
 *
 * A team (team.h) owns a row: a simdgroup up to 1024 elements, four rows a threadgroup, else 256 threads. Threadgroup memory: 256 floats
 * for each sum over a team of several simdgroups. Neighbouring threads read neighbouring elements. From memory each reads x once (what it
 * reads again lies in the cache) and writes out once: 8 bytes an element, 12 with a residual; arithmetic is a fraction of that time.
 * out may be x or the residual: a thread writes only elements that it alone reads.
 *
 * group_norm: a threadgroup of 256 owns a group of a picture's channels, as a row whose numbers lie in runs of its channels.
 */
#include "activations.h"
#include "team.h"

PE_CONSTANT(bool, CENTRED, 0);      /* layer_norm */
PE_CONSTANT(int, REDUCTION, 1);

struct norm_args {
  int rows, width, team;
  int add_step;                      /* elements from one row of `add` to the next: 0 for a bias */
  float eps;
};

/* y = (x - mean) / sqrt(mean of (x - mean)^2 + eps) * weight + add; without CENTRED the mean counts as 0. */
kernel void norm_rows(constant norm_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device const float *weight [[buffer(2)]],
                      device const float *add [[buffer(3)]], device float *out [[buffer(4)]],
                      threadgroup float *parts [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                      uint number [[thread_index_in_threadgroup]], uint3 threads [[threads_per_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const team t = team_of(a.team, number, lane, simdgroup, parts);
  const int row = (int)(group.x * (threads.x / (uint)a.team) + number / (uint)a.team);
  if (row >= a.rows) return;
  x += (long)row * a.width;
  out += (long)row * a.width;
  const float mean = CENTRED ? row_sum(t, x, a.width, false, 0.0f, 0) / (float)a.width : 0.0f;
  const float inverse = 1.0f / sqrt(row_sum(t, x, a.width, true, mean, 1) / (float)a.width + a.eps);
  for (int i = t.at; i < a.width; i += t.size) {
    float y = (x[i] - mean) * inverse;
    if (weight) y *= weight[i];
    if (add) y += add[(long)row * a.add_step + i];
    out[i] = y;
  }
}

struct length_args { int rows, width, team; float eps; };

kernel void scale_to_length(constant length_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                            threadgroup float *parts [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                            uint number [[thread_index_in_threadgroup]], uint3 threads [[threads_per_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const team t = team_of(a.team, number, lane, simdgroup, parts);
  const int row = (int)(group.x * (threads.x / (uint)a.team) + number / (uint)a.team);
  if (row >= a.rows) return;
  x += (long)row * a.width;
  out += (long)row * a.width;
  const float length_ = sqrt(row_sum(t, x, a.width, true, 0.0f, 0));
  const float inverse = 1.0f / (length_ > a.eps || isnan(length_) ? length_ : a.eps);
  for (int i = t.at; i < a.width; i += t.size) out[i] = x[i] * inverse;
}

struct group_args {
  int count, each;                   /* numbers of a group, and of a run of it */
  int d;                             /* numbers from one run to the next */
  long picture;                      /* and from one picture to the next */
  float eps;
};

/* A group's numbers, by their number. */
struct grouped {
  device const float *x;
  int each, d;
  float operator[](int i) const { return x[(long)(i / each) * d + i % each]; }
};

kernel void norm_groups(constant group_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device const float *weight [[buffer(2)]],
                        device const float *bias [[buffer(3)]], device float *out [[buffer(4)]],
                        threadgroup float *parts [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                        uint number [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                        uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const team t = team_of(256, number, lane, simdgroup, parts);
  const int first = (int)group.y * a.each;
  x += (long)group.x * a.picture + first;
  out += (long)group.x * a.picture + first;
  grouped all;
  all.x = x, all.each = a.each, all.d = a.d;
  const float mean = row_sum(t, all, a.count, false, 0.0f, 0) / (float)a.count;
  const float inverse = 1.0f / sqrt(row_sum(t, all, a.count, true, mean, 1) / (float)a.count + a.eps);
  threadgroup_barrier(mem_flags::mem_device);
  for (int i = t.at; i < a.count; i += t.size) {
    const int c = i % a.each;
    float y = (all[i] - mean) * inverse;
    if (weight) y *= weight[first + c];
    if (bias) y += bias[first + c];
    out[(long)(i / a.each) * a.d + c] = y;
  }
}

struct softmax_args { int rows, width, team; float scale; };

kernel void softmax_rows(constant softmax_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                         threadgroup float *parts [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                         uint number [[thread_index_in_threadgroup]], uint3 threads [[threads_per_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const team t = team_of(a.team, number, lane, simdgroup, parts);
  const int row = (int)(group.x * (threads.x / (uint)a.team) + number / (uint)a.team);
  if (row >= a.rows) return;
  x += (long)row * a.width;
  out += (long)row * a.width;
  float top = -INFINITY;
  for (int i = t.at; i < a.width; i += t.size) top = max(top, x[i] * a.scale);
  top = team_max(t, top, 0);
  for (int i = t.at; i < a.width; i += t.size) out[i] = exp_of(x[i] * a.scale - top); /* the thread's own, for its sums too */
  const float inverse = 1.0f / row_sum(t, out, a.width, false, 0.0f, 1);
  for (int i = t.at; i < a.width; i += t.size) out[i] *= inverse;
}

enum { REDUCE_SUM, REDUCE_MEAN, REDUCE_MAX, REDUCE_MIN };

struct reduce_args { int rows, width, team; };

kernel void reduce_rows(constant reduce_args &a [[buffer(0)]], device const float *x [[buffer(1)]], device float *out [[buffer(2)]],
                        threadgroup float *parts [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
                        uint number [[thread_index_in_threadgroup]], uint3 threads [[threads_per_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  const team t = team_of(a.team, number, lane, simdgroup, parts);
  const int row = (int)(group.x * (threads.x / (uint)a.team) + number / (uint)a.team);
  if (row >= a.rows) return;
  x += (long)row * a.width;
  float y = 0.0f;
  if (REDUCTION == REDUCE_SUM || REDUCTION == REDUCE_MEAN) {
    y = row_sum(t, x, a.width, false, 0.0f, 0);
    if (REDUCTION == REDUCE_MEAN) y /= (float)a.width;
  } else {                           /* NaN where the row holds one, as in NumPy: it is looked for apart from the largest */
    const float sign = REDUCTION == REDUCE_MAX ? 1.0f : -1.0f;
    float top = -INFINITY, bad = 0.0f;
    for (int i = t.at; i < a.width; i += t.size) {
      top = max(top, sign * x[i]);
      bad = isnan(x[i]) ? 1.0f : bad;
    }
    top = team_max(t, top, 0);
    y = team_max(t, bad, 1) != 0.0f ? NAN : sign * top;
  }
  if (t.at == 0) out[row] = y;
}

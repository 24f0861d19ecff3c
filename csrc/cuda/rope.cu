/* rope.cu: rope, cache_append, rope_append. Reference: pyengine/ops/rope.py: rope, cache_append, rope_append.
 *
 * A warp owns one head of one row, in all three kernels; a block has 8 warps. A lane owns the pairs (of the rotation), then the elements
 * lane, lane + 32 ... of its head. What goes to a cache passes through shared memory, one head a warp [8][width], because quantizers and
 * the mixing of block formats want other elements in a lane than the rotation has. A key or value is read once and written
 * once in the cache's format, a query read once and written once: at most 8 bytes an element, about 6 operations, and 16 + log2(e) more
 * to mix and 5 to round; so a step of few rows is bound by the launch, a prompt's by memory. out may be x (q).
 *
 * Every float is made by the operations of csrc/cpu/rope.c in their order, so that caches hold the same bytes.
 */
#include "cells.h"
#include "sums.h"

namespace {

enum { WARPS = 8, THREADS = 32 * WARPS };

/* One head for each warp; `width` floats apart. */
struct Heads { float x[4]; };

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }

/* 1 / sqrt(mean of squares + eps) */
__device__ float inverse_rms(const float *x, int n, float eps) {
  const float sum = pe::sum_of_warp(n, [=](int i, float so_far) { return fmaf(x[i], x[i], so_far); });
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, (float)n), eps)));
}

/* The angles of a row: cosines [f], sines [f]. */
struct Angles { const float *table; int f; bool interleaved; };

/* x * inv * weight where there is a weight. */
__device__ __forceinline__ float weighted(float x, const float *weight, int i, float inv) {
  return weight ? __fmul_rn(__fmul_rn(x, inv), weight[i]) : x;
}

/* y = x [e] rotated, its first 2 f elements; y may be x. */
__device__ void rotate_head(const float *x, float *y, int e, const Angles &a, const float *weight, float inv) {
  for (int i = lane_of(); i < a.f; i += 32) {
    const int first = a.interleaved ? 2 * i : i, second = a.interleaved ? first + 1 : i + a.f;
    const float u = weighted(x[first], weight, first, inv), v = weighted(x[second], weight, second, inv);
    const float c = a.table[i], s = a.table[a.f + i];
    y[first] = __fsub_rn(__fmul_rn(u, c), __fmul_rn(v, s));
    y[second] = __fadd_rn(__fmul_rn(v, c), __fmul_rn(u, s));
  }
  for (int i = 2 * a.f + lane_of(); i < e; i += 32) y[i] = weighted(x[i], weight, i, inv);
}

/* ---- rope ---- */

struct Rotation {
  const float *x, *table;
  float *out;
  int64_t heads; /* of all rows */
  int h, e, t;
  bool interleaved;
};

__global__ void __launch_bounds__(THREADS) rope_kernel(Rotation w) {
  const int64_t head = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32;
  if (head >= w.heads) return;
  const Angles a = {w.table + head / w.h * w.t, w.t / 2, w.interleaved};
  rotate_head(w.x + head * w.e, w.out + head * w.e, w.e, a, nullptr, 1.0f);
}

/* ---- caches ---- */

/* Where a row goes; -1: nowhere. A cell behind the last one is a fault. */
__device__ __forceinline__ int64_t target(const int32_t *cells, int64_t row, const pe::Cache &cache, pe_fault *fault) {
  const int32_t cell = cells[row];
  if (cell < cache.cells) return cell;
  if (lane_of() == 0) pe::raise(fault, PE_BAD_VALUE, cell, cache.cells);
  return -1;
}

/* Write the head at x, which is in shared memory. */
__device__ void append(const pe::Cache &cache, int head, int64_t cell, float *x, const float *offset) {
  if (offset)
    for (int i = lane_of(); i < cache.elements; i += 32) x[i] = __fsub_rn(x[i], offset[i]);
  __syncwarp();
  if (pe::in_blocks(cache)) pe::mix(x, cache.elements);
  pe::store_cell(pe::cell_at(cache, head, cell), cache.dtype, x, cache.elements);
}

__device__ __forceinline__ float *own_head(int width) { return pe::shared<Heads>().x + threadIdx.x / 32 * width; }

struct Append {
  pe::Cache cache;
  const float *x, *offset;
  const int32_t *cells;
  int64_t heads;
  int g, width;
  pe_fault *fault;
};

__global__ void __launch_bounds__(THREADS) cache_append_kernel(Append w) {
  const int64_t at = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, row = at / w.g;
  const int e = w.cache.elements, head = (int)(at % w.g);
  if (at >= w.heads) return;
  const int64_t cell = target(w.cells, row, w.cache, w.fault);
  if (cell < 0) return;
  float *x = own_head(w.width);
  for (int i = lane_of(); i < e; i += 32) x[i] = w.x[at * e + i];
  __syncwarp();
  append(w.cache, head, cell, x, w.offset ? w.offset + (int64_t)head * e : nullptr);
}

struct RopeAppend {
  const float *q, *k, *v, *table, *q_norm, *k_norm, *k_offset;
  float *out;
  pe::Cache k_cache, v_cache;
  const int32_t *cells;
  int64_t m;
  int h, g, e, t, width;
  float eps;
  bool interleaved;
  pe_fault *fault;
};

/* Heads of a row: h of q, then g of k, then g of v. */
__global__ void __launch_bounds__(THREADS) rope_append_kernel(RopeAppend w) {
  const int64_t at = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, each = w.h + 2 * w.g, row = at / each;
  int head = (int)(at % each);
  if (row >= w.m) return;
  const Angles a = {w.table + row * w.t, w.t / 2, w.interleaved};
  if (head < w.h) {
    const float *x = w.q + (row * w.h + head) * w.e;
    const float inv = w.q_norm ? inverse_rms(x, w.e, w.eps) : 1.0f;
    __syncwarp(); /* all have read x, which may be out */
    rotate_head(x, w.out + (row * w.h + head) * w.e, w.e, a, w.q_norm, inv);
    return;
  }
  head -= w.h;
  const bool is_key = head < w.g;
  if (!is_key) head -= w.g;
  const int64_t cell = target(w.cells, row, is_key ? w.k_cache : w.v_cache, w.fault);
  if (cell < 0) return;
  float *to = own_head(w.width);
  if (is_key) {
    const float *x = w.k + (row * w.g + head) * w.e;
    rotate_head(x, to, w.e, a, w.k_norm, w.k_norm ? inverse_rms(x, w.e, w.eps) : 1.0f);
    __syncwarp();
    append(w.k_cache, head, cell, to, w.k_offset ? w.k_offset + (int64_t)head * w.e : nullptr);
  } else {
    const int f = w.v_cache.elements;
    const float *x = w.v + (row * w.g + head) * f;
    for (int i = lane_of(); i < f; i += 32) to[i] = x[i];
    __syncwarp();
    append(w.v_cache, head, cell, to, nullptr);
  }
}

unsigned blocks_of(int64_t warps) { return (unsigned)((warps + WARPS - 1) / WARPS); }

/* Floats between the heads of warps: whole blocks, so that all are aligned alike. */
int width_of(int64_t elements) { return (int)pe::round_up(elements, 32); }

enum { MOST_ELEMENTS = 1024 }; /* of a head: 32 KB of shared memory a block */

pe_status check_width(const char *op, int64_t elements, pe_stream *s) {
  if (elements <= MOST_ELEMENTS) return PE_OK;
  return pe_fail(s, PE_NO_KERNEL, "%s: heads of %lld elements, at most %d are possible", op, (long long)elements, MOST_ELEMENTS);
}

} // namespace

PE_KERNEL(cuda, rope)(const pe_tensor *x, const pe_tensor *table, const pe_tensor *out, const pe_rope_params *p, pe_stream *s) {
  const int64_t m = x->shape[0], h = x->shape[1], e = x->shape[2], t = table->shape[1];
  if (t > e || t % 2) return pe_fail(s, PE_BAD_SHAPE, "rope: a table of %lld for heads of %lld", (long long)t, (long long)e);
  if (m * h == 0 || e == 0) return PE_OK;
  const Rotation w = {(const float *)x->data, (const float *)table->data, (float *)out->data, m * h, (int)h, (int)e, (int)t,
                      p->interleaved != 0};
  pe::launch(pe::stream(s), rope_kernel, dim3(blocks_of(m * h)), dim3(THREADS), 0, w);
  return PE_OK;
}

PE_KERNEL(cuda, cache_append)(const pe_tensor *cache, const pe_tensor *x, const pe_tensor *cells, const pe_tensor *offset,
                              const pe_tensor *out, const pe_cache_append_params *p, pe_stream *s) {
  (void)p, (void)out; /* the cache itself */
  const int64_t m = x->shape[0], g = x->shape[1], e = x->shape[2];
  pe_status bad = pe::check_cells("cache_append", "cache", cache, true, s);
  if (!bad) bad = check_width("cache_append", e, s);
  if (bad || m * g == 0 || e == 0) return bad;
  const int width = width_of(e);
  const Append w = {pe::cache_of(cache), (const float *)x->data, offset ? (const float *)offset->data : nullptr,
                    (const int32_t *)cells->data, m * g, (int)g, width, pe::fault(s)};
  pe::launch(pe::stream(s), cache_append_kernel, dim3(blocks_of(m * g)), dim3(THREADS), WARPS * width * sizeof(float), w);
  return PE_OK;
}

PE_KERNEL(cuda, rope_append)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *table,
                             const pe_tensor *k_cache, const pe_tensor *v_cache, const pe_tensor *cells, const pe_tensor *q_norm,
                             const pe_tensor *k_norm, const pe_tensor *k_offset, const pe_tensor *out0, const pe_tensor *out1,
                             const pe_tensor *out2, const pe_rope_append_params *p, pe_stream *s) {
  (void)out1, (void)out2; /* the caches themselves */
  const int64_t m = q->shape[0], h = q->shape[1], g = k->shape[1], e = q->shape[2], f = v->shape[2], t = table->shape[1];
  pe_status bad = pe::check_cells("rope_append", "k_cache", k_cache, true, s);
  if (!bad) bad = pe::check_cells("rope_append", "v_cache", v_cache, true, s);
  if (!bad) bad = check_width("rope_append", e > f ? e : f, s);
  if (bad) return bad;
  if (t > e || t % 2) return pe_fail(s, PE_BAD_SHAPE, "rope_append: a table of %lld for heads of %lld", (long long)t, (long long)e);
  if (m == 0) return PE_OK;
  const auto floats = [](const pe_tensor *a) { return a ? (const float *)a->data : nullptr; };
  const int width = width_of(e > f ? e : f);
  const RopeAppend w = {floats(q), floats(k), floats(v), floats(table), floats(q_norm), floats(k_norm), floats(k_offset),
                        (float *)out0->data, pe::cache_of(k_cache), pe::cache_of(v_cache), (const int32_t *)cells->data, m, (int)h,
                        (int)g, (int)e, (int)t, width, p->eps, p->interleaved != 0, pe::fault(s)};
  pe::launch(pe::stream(s), rope_append_kernel, dim3(blocks_of(m * (h + 2 * g))), dim3(THREADS), WARPS * width * sizeof(float), w);
  return PE_OK;
}

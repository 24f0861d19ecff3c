/* attention.metal: softmax(scale q k^T) v over an interval of keys for each query.
 * Reference: pyengine/ops/attention.py: attention.
 *
 *   query   one head of one row; the queries of a key/value head are numbered row by row, `slots` of them a row
 *   tile    64 keys, aligned in their LOGICAL numbers; chunk: 256 keys, aligned likewise; a half of a tile is loaded at a time
 *
 * Three kernels run one after the other: attention_queries scales the queries, attention_chunks does the work, attention_finish divides.
 * Online softmax starts afresh in each chunk, and chunks are merged in ascending order. A threadgroup of attention_chunks owns 32 queries
 * and all of their chunks (prompts, encoders), or, where rows are few, the heads of one row and one chunk (SPLIT), whose result
 * attention_finish merges. Both do the same with a query: a score is a chain of products of 8 x 8 matrices, e ascending, an output one
 * with keys ascending; tiles and chunks that a query does not see change nothing of it. So a row has the same bits alone, beside others,
 * and in a prompt however it is cut. Tiles, chunks, tops and the order of sums are the CPU's (csrc/cpu/attention.c): where a matrix adds its
 * 8 products one after the other, as in emulation, results over caches of plain numbers have the CPU's bits.
 *
 * Where keys lie in blocks, queries are mixed and rounded to 8 bits first, one scale a head, and products are of codes, exact in float: each
 * block's sum times its scale joins the score, as on the CPU; results over blocks are mixed back. Keys by channel become floats: half a tile is
 * a group of theirs. products="int8" allows the CPU to round
 * more; here it is computed as "float". Values wider than 256 take 8 queries a threadgroup, whose sums then fit the registers.
 *
 * Roofline of attention_chunks: a threadgroup reads the cells of its keys once. Of each byte of F16, 8 queries make 8 operations and 32
 * make 32; an M3 Max has time for 35 (400 GB/s, 14 TFLOP/s). So memory is the limit for single rows, and products are for prompts, where
 * threadgroups find keys in the cache. One row of 8 key/value heads and 4096 keys is 128 threadgroups.
 */
#include "activations.h"
#include "cells.h"
#include "matrices.h"
#include "store_cells.h"

PE_CONSTANT(int, K_FORMAT, 0);
PE_CONSTANT(int, V_FORMAT, 1);
PE_CONSTANT(bool, K_WHOLE, 2);     /* elements of a cell lie side by side, four of them aligned; blocks: cells, or groups, are whole words */
PE_CONSTANT(bool, V_WHOLE, 3);
PE_CONSTANT(int, TILES, 4);        /* of 8 queries in a threadgroup: 1 or 4; 1 with more than 4 slices */
PE_CONSTANT(int, SLICES, 5);       /* of 64 elements of a value */
PE_CONSTANT(bool, PAGED, 6);       /* keys lie in cells that a table names */
PE_CONSTANT(bool, SEQUENCED, 7);   /* rows belong to sequences of that table */
PE_CONSTANT(bool, CAPPED, 8);
PE_CONSTANT(bool, SPLIT, 9);
PE_CONSTANT(bool, SUNK, 10);       /* there are sinks */
PE_CONSTANT(bool, BIASED, 11);     /* scores get what their distance adds */
PE_CONSTANT(bool, TOLD, 12);       /* largest logits and sums are wanted too */

enum { HALF = 32, TILE = 64, CHUNK = 256, SLICE = 64, SLICE_STRIDE = 68, SCORE_STRIDE = 68, MOST_QUERIES = 32, MOST_WIDTH = 512, RAW_RUN = 256, RAW_STRIDE = 276 };

struct attention_args {
  int m, heads, group, slots;      /* group: heads of a key/value head; slots: queries of a row, group or more */
  int e, ep, eq, f, queries;       /* ep: e in whole 8s; eq: floats from a query to the next; queries: of a key/value head, padded */
  int l, n_cells, sequences, cells_stride;
  int chunks;                      /* SPLIT: of one row, at most */
  int reach;                       /* BIASED: the farthest distance that has a number of its own */
  int k_run, v_run;                /* elements that are mixed together */
  float k_shrink, v_shrink, scale, softcap;
  long q_row, q_head, q_step;      /* bytes, as all below */
  long k_head, k_cell, k_step;
  long v_head, v_cell, v_step;
};

/* ---- queries ----
 *
 * A simdgroup owns one query: times scale, to queries[head][query][eq], with zeros behind. Where keys lie in blocks it is mixed, and becomes
 * codes; behind them what one is worth, and the sum of each 32.
 * Shared memory: 1024 floats, to mix. 8 bytes of traffic an element.
 */
kernel void attention_queries(constant attention_args &a [[buffer(0)]], device const uchar *q [[buffer(1)]],
                              device float *queries [[buffer(2)]], threadgroup float *shared [[threadgroup(0)]],
                              uint3 at [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const int row = (int)at.x / a.slots, i = (int)at.x % a.slots, there = row < a.m && i < a.group;
  device const uchar *from = q + (there ? row * a.q_row + ((int)at.y * a.group + i) * a.q_head : 0);
  device float *to = queries + ((long)at.y * a.queries + at.x) * a.eq;
  threadgroup float *x = shared;
  for (int j = (int)lane; j < a.ep; j += 32) x[j] = there && j < a.e ? *(device const float *)(from + j * a.q_step) * a.scale : 0.0f;
  if (is_block(K_FORMAT)) {
    x = mixed(shared, shared + MOST_WIDTH, a.e, a.k_run, a.k_shrink, (int)lane);
    float most = 0.0f;
    for (int j = (int)lane; j < a.e; j += 32) most = max(most, fabs(x[j]));
    const float d = simd_max(most) / 127.0f, inverse = inverse_of(d);
    for (int j = (int)lane; j < a.e; j += 32) {
      x[j] = rint(x[j] * inverse);
      const float sum = simd_sum(x[j]);                       /* whole numbers: any order */
      if (lane == 0) to[a.ep + 1 + j / 32] = sum;
    }
    if (lane == 0) to[a.ep] = d;
  }
  for (int j = (int)lane; j < a.ep; j += 32) to[j] = x[j];
}

/* ---- chunks ---- */

/* Floats of the shared memory of attention_chunks before each area, 19.8 KB and 8.8 for blocks: places in a matrix; of each query its
 * interval, that in the run of rows at hand, top and sum of the chunk and of all so far, the two factors of a merge, and the largest logit
 * of all so far; cells of a tile;
 * whether a simdgroup loaded a value that is no number; scores, then probabilities [query][68]; 64 elements of keys or values of half a
 * tile [32][68]; 256 elements of cells of blocks as they are [32][276 bytes]. */
enum {
  AT_PLACES = 0,
  AT_LO = 64,
  AT_HI = AT_LO + MOST_QUERIES,
  AT_RUN_LO = AT_HI + MOST_QUERIES,
  AT_RUN_HI = AT_RUN_LO + MOST_QUERIES,
  AT_TOP = AT_RUN_HI + MOST_QUERIES,
  AT_SUM = AT_TOP + MOST_QUERIES,
  AT_ALL_TOP = AT_SUM + MOST_QUERIES,
  AT_ALL_SUM = AT_ALL_TOP + MOST_QUERIES,
  AT_SHRINK = AT_ALL_SUM + MOST_QUERIES,
  AT_GROW = AT_SHRINK + MOST_QUERIES,
  AT_MOST = AT_GROW + MOST_QUERIES,
  AT_CELLS = AT_MOST + MOST_QUERIES,
  AT_BAD = AT_CELLS + TILE,
  AT_SCORES = AT_BAD + 4,
  AT_SLICE = AT_SCORES + MOST_QUERIES * SCORE_STRIDE,
  AT_RAW = AT_SLICE + HALF * SLICE_STRIDE
};

/* What a thread knows of its threadgroup's work. */
struct work {
  int first, head;           /* first query; key/value head */
  int index, lane, warp;
  int r[2], c[2];            /* rows and columns of the lane's elements of a matrix */
  int tile;                  /* of 8 queries, whose products the simdgroup takes */
  int sequence, lo, hi;      /* of the run of rows at hand: all of its keys lie in lo .. hi - 1 */
  device const float *bias;  /* [heads][2 reach + 1], BIASED */
  device const int *numbers; /* of rows among the keys; null: their last key */
};

/* Sums of the simdgroup's queries: matrix s * (2 TILES) + j is elements 64 s + 8 (first + j) of a value, first 0, or with one tile that all
 * simdgroups share 2 warp. */
struct outputs {
  simdgroup_float8x8 acc[32];
};

static inline threadgroup int *ints(threadgroup float *shared, int at) { return (threadgroup int *)(shared + at); }
static inline int per_slice() { return TILES == 4 ? 8 : 2; }
static inline int first_of_slice(thread const work &w) { return TILES == 4 ? 0 : 2 * w.warp; }

/* The interval of a query; empty where its numbers are refused. */
static inline int2 interval_of(constant attention_args &a, int row, device const int *lo, device const int *hi, device const int *seq,
                               device pe_fault *fault) {
  const int2 none = int2(0, 0);
  const int first = lo[row], end = hi[row], sequence = SEQUENCED ? seq[row] : 0;
  if (first >= end) return none;
  const long keys = (long)end - first;
  if (first < 0 || (!PAGED && end > a.n_cells)) {
    raise_fault(fault, FAULT_BAD_VALUE, first < 0 ? first : end, a.n_cells);
    return none;
  }
  if (PAGED && keys > a.l) {
    raise_fault(fault, FAULT_BAD_VALUE, keys, a.l);
    return none;
  }
  if (PAGED && (sequence < 0 || sequence >= a.sequences)) {
    raise_fault(fault, FAULT_BAD_VALUE, sequence, a.sequences);
    return none;
  }
  return int2(first, end);
}

/* Cells of the tile at key0; -1 for those that no query of the run sees. Threads 0 .. 63 own a key each. */
static inline void find_cells(constant attention_args &a, thread const work &w, int key0, device const int *cells, device pe_fault *fault,
                              threadgroup float *shared) {
  if (w.index >= TILE) return;
  const int key = key0 + w.index;
  int cell = -1, wanted = 0;
  for (int i = 0; i < 8 * TILES; i++) wanted |= ints(shared, AT_RUN_LO)[i] <= key && key < ints(shared, AT_RUN_HI)[i];
  if (wanted) {
    cell = PAGED ? cells[(long)w.sequence * a.cells_stride + key % a.l] : key;
    if (cell < 0 || cell >= a.n_cells) {
      raise_fault(fault, FAULT_BAD_VALUE, cell, a.n_cells);
      cell = -1;
    }
    if (by_channel(K_FORMAT) && cell >= 0) {                /* has the key's place in its group, behind the key before it */
      const int place = key % GROUP_KEYS;
      bool good = cell % GROUP_KEYS == place;
      for (int i = 0; PAGED && place && good && i < 8 * TILES; i++)
        if (ints(shared, AT_RUN_LO)[i] < key && key < ints(shared, AT_RUN_HI)[i])
          good = cells[(long)w.sequence * a.cells_stride + (key - 1) % a.l] == cell - 1;
      if (!good) {
        raise_fault(fault, FAULT_BAD_VALUE, cell, a.n_cells);
        cell = -1;
      }
    }
  }
  ints(shared, AT_CELLS)[w.index] = cell;
}

/* The run of 256 elements from `from` on in the cells of half a tile, whose elements are blocks, as they are, all at once: blocks end anywhere
 * in a sector, and a thread's part of one would be three requests. */
static inline void copy_cells(int format, bool words, device const uchar *head, long cell_bytes, int from, int count, int half_,
                              threadgroup float *shared, int index) {
  threadgroup uchar *raw = (threadgroup uchar *)(shared + AT_RAW);
  const int size = words ? 4 : 2, parts = min((int)RAW_RUN, count - from) / 32 * block_bytes(format) / size;
  head += from / 32 * block_bytes(format);
  for (int i = index; i < HALF * parts; i += 128) {
    const int key = i / parts, at = i % parts * size, cell = ints(shared, AT_CELLS)[HALF * half_ + key];
    if (cell < 0) continue;
    if (words) *(threadgroup uint *)(raw + key * RAW_STRIDE + at) = *(device const uint *)(head + cell * cell_bytes + at);
    else *(threadgroup ushort *)(raw + key * RAW_STRIDE + at) = *(device const ushort *)(head + cell * cell_bytes + at);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

/* Channels from .. from + 255 of the group of keys that half a tile is, as they are, side by side; the cells' own bytes follow from its first one. */
static inline void copy_group(constant attention_args &a, bool words, device const uchar *head, int from, int half_, threadgroup float *shared, int index) {
  threadgroup uchar *raw = (threadgroup uchar *)(shared + AT_RAW);
  const int bytes = block_bytes(channel_format(K_FORMAT)), size = words ? 4 : 2, n = min((int)RAW_RUN, a.e - from) * bytes / size;
  const int cell = ints(shared, AT_CELLS)[HALF * half_ + index % 32];
  const uint wanted = (uint)(ulong)simd_ballot(cell >= 0);
  const int first = simd_shuffle(cell, (ushort)(wanted ? ctz(wanted) : 0u));
  head += (wanted ? first / GROUP_KEYS * GROUP_KEYS : 0) * a.k_cell + from * bytes;
  for (int i = index; i < n; i += 128) {
    if (words) *(threadgroup uint *)(raw + 4 * i) = wanted ? *(device const uint *)(head + 4 * i) : 0u;
    else *(threadgroup ushort *)(raw + 2 * i) = wanted ? *(device const ushort *)(head + 2 * i) : (ushort)0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

/* Channels from .. from + 63 of that group. A thread owns a channel of 16 keys: blocks are an odd number of words apart. */
static inline void load_channels(int from, int count, threadgroup float *shared, int index) {
  const int format = channel_format(K_FORMAT), channel = index % SLICE, key = index / SLICE * (HALF / 2);
  threadgroup const uchar *block = (threadgroup const uchar *)(shared + AT_RAW) + (from % RAW_RUN + channel) * block_bytes(format);
  threadgroup float *to = shared + AT_SLICE + key * SLICE_STRIDE + channel;
  const bool there = from + channel < count;
  for (int j = 0; j < HALF / 2; j += 4) {
    const float4 y = there ? block4(format, block, key + j) : float4(0.0f);
    for (int i = 0; i < 4; i++) to[(j + i) * SLICE_STRIDE] = y[i];
  }
}

/* Elements from .. from + 63 of the keys or values of half a tile, or their codes, zero where there are none. A thread owns four of every 8th
 * key, so that 16 of them read a cell side by side. Returns whether all are numbers. */
static inline bool load_slice(int format, bool codes, bool whole, device const uchar *head, long cell_bytes, long step, int from, int count, int half_,
                              threadgroup float *shared, int index) {
  bool good = true;
  for (int key = index / 16; key < HALF; key += 8) {
    const int cell = ints(shared, AT_CELLS)[HALF * half_ + key], i = from + index % 16 * 4;
    float4 y = float4(0.0f);
    if (cell >= 0 && i < count) {
      threadgroup const uchar *raw = (threadgroup const uchar *)(shared + AT_RAW) + key * RAW_STRIDE;
      if (is_block(format)) y = codes ? codes4(format, raw, i % RAW_RUN) : block4(format, raw, i % RAW_RUN);
      else y = load_cell4(format, whole, head + cell * cell_bytes, step, i, count);
    }
    for (int j = 0; j < 4; j++) good = good && isfinite(y[j]);
    *(threadgroup float4 *)(shared + AT_SLICE + key * SLICE_STRIDE + index % 16 * 4) = y;
  }
  return good;
}

/* total += the products of block `block` in s, of 8 n keys from key0 on of half a tile, which are cleared. */
static inline void add_block(constant attention_args &a, thread const work &w, device const float *q, int block, int n, int key0,
                             threadgroup const float *shared, thread simdgroup_float8x8 *s, thread float *total) {
  threadgroup const uchar *raw = (threadgroup const uchar *)(shared + AT_RAW);
  for (int t = 0; t < n; t++) {
    for (int e = 0; e < 2; e++) {
      const float2 of = scales_of(K_FORMAT, raw + (key0 + 8 * t + w.c[e]) * RAW_STRIDE, block % (RAW_RUN / 32));
      float y = fma(s[t].thread_elements()[e], of.x, total[2 * t + e]);
      if (has_least(K_FORMAT)) y = fma(q[w.r[e] * a.eq + a.ep + 1 + block], of.y, y);
      total[2 * t + e] = y;
    }
    s[t] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

/* Scores of half a tile: with four tiles of queries each simdgroup takes one and all keys, else 8 of the keys. */
static inline void score_keys(constant attention_args &a, thread const work &w, int half_, device const float *queries,
                              device const uchar *k, threadgroup float *shared) {
  const int n = TILES == 4 ? 4 : 1, key0 = TILES == 4 ? 0 : 8 * w.warp;
  device const float *q = queries + ((long)w.head * a.queries + w.first + 8 * w.tile) * a.eq;
  simdgroup_float8x8 s[4];
  float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};   /* of blocks */
  for (int t = 0; t < n; t++) s[t] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  k += w.head * a.k_head;
  for (int from = 0; from < a.ep; from += SLICE) {
    if (is_block(K_FORMAT) && from % RAW_RUN == 0) copy_cells(K_FORMAT, K_WHOLE, k, a.k_cell, from, a.e, half_, shared, w.index);
    if (by_channel(K_FORMAT) && from % RAW_RUN == 0) copy_group(a, K_WHOLE, k, from, half_, shared, w.index);
    if (by_channel(K_FORMAT)) load_channels(from, a.e, shared, w.index);
    else load_slice(K_FORMAT, is_block(K_FORMAT), K_WHOLE, k, a.k_cell, a.k_step, from, a.e, half_, shared, w.index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < min((int)SLICE, a.ep - from); i += 8) {
      simdgroup_float8x8 left, right;
      simdgroup_load(left, q + from + i, a.eq);
      for (int t = 0; t < n; t++) {
        simdgroup_load(right, shared + AT_SLICE + (key0 + 8 * t) * SLICE_STRIDE + i, SLICE_STRIDE, ulong2(0), true);
        simdgroup_multiply_accumulate(s[t], left, right, s[t]);
      }
      if (is_block(K_FORMAT) && i % 32 == 24) add_block(a, w, q, (from + i) / 32, n, key0, shared, s, total);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (is_block(K_FORMAT))
    for (int t = 0; t < n; t++)
      for (int e = 0; e < 2; e++) s[t].thread_elements()[e] = total[2 * t + e] * q[w.r[e] * a.eq + a.ep];
  threadgroup float *to = shared + AT_SCORES + 8 * w.tile * SCORE_STRIDE + HALF * half_ + key0;
  for (int t = 0; t < n; t++) simdgroup_store(s[t], to + 8 * t, SCORE_STRIDE);
}

/* A query's top moves only when a score passes it by so much (csrc/cpu/attention_softmax.h). */
constant float SLACK = 8.0f;

/* Scores of a tile become probabilities relative to their query's top; those of masked keys 0. Four lanes own a query: lane q of them keys
 * 4 q .. 4 q + 3 of every 16, whose sums it keeps. */
static inline void soften(constant attention_args &a, thread const work &w, int key0, threadgroup float *shared, thread float *sums) {
  const int query = w.index / 4, from = w.index % 4 * 4;
  const int lo = ints(shared, AT_RUN_LO)[query] - key0 - from, hi = ints(shared, AT_RUN_HI)[query] - key0 - from;
  threadgroup float *p = shared + AT_SCORES + query * SCORE_STRIDE + from;
  const float old = shared[AT_TOP + query];
  float best = -INFINITY;
  device const float *bias = w.bias;
  int distance = 0;                                    /* from the query to the lane's first key */
  if (BIASED && lo < hi) {
    const int slot = w.first + query, row = slot / a.slots;
    distance = key0 + from - (w.numbers ? w.numbers[row] : ints(shared, AT_HI)[query] - 1);
    bias += (long)(w.head * a.group + slot % a.slots) * (2 * a.reach + 1) + a.reach;
  }
  for (int i = 0; i < TILE; i += 16)
    for (int j = i; j < i + 4; j++)
      if (lo <= j && j < hi) {
        if (BIASED) p[j] += bias[max(-a.reach, min(a.reach, distance + j))];
        if (CAPPED) p[j] = tanh_of(p[j] * (1.0f / a.softcap)) * a.softcap;
        best = max(best, p[j]);
      }
  best = max(best, simd_shuffle_xor(best, 1));
  best = max(best, simd_shuffle_xor(best, 2));
  const bool moves = best > old + SLACK;
  const float top = moves ? best : old, shrink = moves ? exp_of(old - best) : 1.0f;
  for (int j = 0; j < 4; j++) sums[j] *= shrink;
  for (int i = 0; i < TILE; i += 16)
    for (int j = 0; j < 4; j++) {
      const float y = lo <= i + j && i + j < hi ? exp_of(p[i + j] - top) : 0.0f;
      p[i + j] = y;
      sums[j] += y;
    }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (from) return;
  shared[AT_TOP + query] = top;
  shared[AT_SHRINK + query] = shrink;
  if (TOLD) shared[AT_MOST + query] = max(shared[AT_MOST + query], best);
}

/* A chunk is at its end: a query's 16 sums become one. */
static inline void fold_sums(thread const work &w, threadgroup float *shared, thread float *sums) {
  for (int j = 0; j < 4; j++) {
    sums[j] += simd_shuffle_xor(sums[j], 2);
    sums[j] += simd_shuffle_xor(sums[j], 1);
  }
  if (w.index % 4 == 0) shared[AT_SUM + w.index / 4] = (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

/* Values of a slice that are no numbers count for the queries that see them, and are then 0 for the products, which would carry them to all
 * queries of a matrix. */
static inline void add_bad_values(thread const work &w, int key0, int half_, int slice, threadgroup float *shared, thread outputs &o) {
  for (int j = 0; j < per_slice(); j++)
    for (int e = 0; e < 2; e++) {
      const int query = 8 * w.tile + w.r[e];
      for (int key = 0; key < HALF; key++) {
        const float y = shared[AT_SLICE + key * SLICE_STRIDE + 8 * (first_of_slice(w) + j) + w.c[e]];
        if (!isfinite(y) && ints(shared, AT_RUN_LO)[query] <= key0 + HALF * half_ + key &&
            key0 + HALF * half_ + key < ints(shared, AT_RUN_HI)[query])
          o.acc[slice * per_slice() + j].thread_elements()[e] += shared[AT_SCORES + query * SCORE_STRIDE + HALF * half_ + key] * y;
      }
    }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int key = w.index / 16; key < HALF; key += 8)
    for (int i = 0; i < 4; i++) {
      threadgroup float *y = shared + AT_SLICE + key * SLICE_STRIDE + w.index % 16 * 4 + i;
      if (!isfinite(*y)) *y = 0.0f;
    }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

/* acc = acc * shrink + probabilities of half a tile times its values; only the first half of a tile that is taken shrinks. */
static inline void add_values(constant attention_args &a, thread const work &w, int key0, int half_, bool shrinks, device const uchar *v,
                              threadgroup float *shared, thread outputs &o) {
  v += w.head * a.v_head;
  PE_UNROLL
  for (int slice = 0; slice < SLICES; slice++) {
    if (is_block(V_FORMAT) && SLICE * slice % RAW_RUN == 0)
      copy_cells(V_FORMAT, V_WHOLE, v, a.v_cell, SLICE * slice, a.f, half_, shared, w.index);
    const bool good = load_slice(V_FORMAT, false, V_WHOLE, v, a.v_cell, a.v_step, SLICE * slice, a.f, half_, shared, w.index);
    const bool all_good = simd_all(good);
    if (w.lane == 0) ints(shared, AT_BAD)[w.warp] = !all_good;
    PE_UNROLL
    for (int j = 0; shrinks && j < per_slice(); j++)
      for (int e = 0; e < 2; e++) o.acc[slice * per_slice() + j].thread_elements()[e] *= shared[AT_SHRINK + 8 * w.tile + w.r[e]];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    threadgroup const int *bad = ints(shared, AT_BAD);
    if (bad[0] | bad[1] | bad[2] | bad[3]) add_bad_values(w, key0, half_, slice, shared, o);
    for (int key = 0; key < HALF; key += 8) {
      simdgroup_float8x8 left, right;
      simdgroup_load(left, shared + AT_SCORES + 8 * w.tile * SCORE_STRIDE + HALF * half_ + key, SCORE_STRIDE);
      PE_UNROLL
      for (int j = 0; j < per_slice(); j++) {
        simdgroup_load(right, shared + AT_SLICE + key * SLICE_STRIDE + 8 * (first_of_slice(w) + j), SLICE_STRIDE);
        simdgroup_multiply_accumulate(o.acc[slice * per_slice() + j], left, right, o.acc[slice * per_slice() + j]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

/* One chunk for all queries of the run, into top, sum and o. */
static inline void run_chunk(constant attention_args &a, thread const work &w, int chunk, device const float *queries,
                             device const uchar *k, device const uchar *v, device const int *cells, device pe_fault *fault,
                             threadgroup float *shared, thread outputs &o) {
  if (w.index < 8 * TILES) {
    shared[AT_TOP + w.index] = -INFINITY;
  }
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  PE_UNROLL
  for (int j = 0; j < SLICES * per_slice(); j++) o.acc[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int key0 = chunk * CHUNK; key0 < (chunk + 1) * CHUNK; key0 += TILE) {
    if (key0 + TILE <= w.lo || key0 >= w.hi) continue;
    find_cells(a, w, key0, cells, fault, shared);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int begin = key0 + HALF <= w.lo ? 1 : 0, end = key0 + HALF >= w.hi ? 1 : 2; /* halves that have keys of the run */
    for (int half_ = begin; half_ < end; half_++) score_keys(a, w, half_, queries, k, shared);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (w.index < 32 * TILES) soften(a, w, key0, shared, sums);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int half_ = begin; half_ < end; half_++) add_values(a, w, key0, half_, half_ == begin, v, shared, o);
  }
  if (w.index < 32 * TILES) fold_sums(w, shared, sums);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

/* Factors of what there was and of what comes where two partial sums with tops of their own become one, whose top is returned. */
static inline float merged(float top, float next, thread float &shrink, thread float &grow) {
  const float now = max(top, next);
  shrink = exp_of(top - now);
  grow = exp_of(next - now);
  return now;
}

/* Add a chunk to what the queries that see it have so far, which lies in `out`; with SPLIT keep it by itself. */
static inline void merge_chunk(constant attention_args &a, thread const work &w, int chunk, int number, device float *out,
                               device float *partials, device float *tops, device float *mosts, threadgroup float *shared, thread outputs &o) {
  if (w.index < 8 * TILES) {
    const int lo = ints(shared, AT_RUN_LO)[w.index], hi = ints(shared, AT_RUN_HI)[w.index];
    float shrink = -1.0f, grow = -1.0f;                 /* not seen */
    if (lo < hi && lo < (chunk + 1) * CHUNK && hi > chunk * CHUNK) {
      const float top = shared[AT_TOP + w.index], sum = shared[AT_SUM + w.index];
      if (lo / CHUNK == chunk) {                        /* the first */
        grow = 1.0f;
        shared[AT_ALL_TOP + w.index] = top;
        shared[AT_ALL_SUM + w.index] = sum;
      } else if (!SPLIT) {
        shared[AT_ALL_TOP + w.index] = merged(shared[AT_ALL_TOP + w.index], top, shrink, grow);
        shared[AT_ALL_SUM + w.index] = fma(sum, grow, shared[AT_ALL_SUM + w.index] * shrink);
      } else {
        grow = 1.0f;
      }
      const int i = (w.first + w.index) % a.slots;
      const long at = (long)(w.first + w.index) / a.slots * a.heads + w.head * a.group + i;
      if (SPLIT) tops[2 * (at * a.chunks + number)] = top, tops[2 * (at * a.chunks + number) + 1] = sum;
      if (SPLIT && TOLD) mosts[at * a.chunks + number] = shared[AT_MOST + w.index];
    }
    shared[AT_SHRINK + w.index] = shrink;
    shared[AT_GROW + w.index] = grow;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = 0; e < 2; e++) {
    const int query = 8 * w.tile + w.r[e], slot = w.first + query;
    const float shrink = shared[AT_SHRINK + query], grow = shared[AT_GROW + query];
    if (grow == -1.0f) continue;
    const long at = (long)(slot / a.slots) * a.heads + w.head * a.group + slot % a.slots;
    device float *to = SPLIT ? partials + (at * a.chunks + number) * a.f : out + at * a.f;
    PE_UNROLL
    for (int j = 0; j < SLICES * per_slice(); j++) {
      const int i = j / per_slice() * SLICE + 8 * (first_of_slice(w) + j % per_slice()) + w.c[e];
      if (i >= a.f) continue;
      const float y = o.acc[j].thread_elements()[e];
      to[i] = shrink == -1.0f ? y : fma(y, grow, to[i] * shrink);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

/* Rows `row` .. until that belong to one sequence, as far as they are the threadgroup's: where their keys lie. */
static inline void start_run(constant attention_args &a, thread work &w, int row, int until, threadgroup float *shared) {
  if (w.index < 8 * TILES) {
    const int own = (w.first + w.index) / a.slots, mine = row <= own && own < until;
    ints(shared, AT_RUN_LO)[w.index] = mine ? ints(shared, AT_LO)[w.index] : 0;
    ints(shared, AT_RUN_HI)[w.index] = mine ? ints(shared, AT_HI)[w.index] : 0;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  w.lo = 0x7fffffff, w.hi = 0;
  for (int i = 0; i < 8 * TILES; i++) {
    const int lo = ints(shared, AT_RUN_LO)[i], hi = ints(shared, AT_RUN_HI)[i];
    if (lo < hi) w.lo = min(w.lo, lo), w.hi = max(w.hi, hi);
  }
}

kernel void attention_chunks(constant attention_args &a [[buffer(0)]], device const float *queries [[buffer(1)]],
                             device const uchar *k [[buffer(2)]], device const uchar *v [[buffer(3)]], device const int *lo [[buffer(4)]],
                             device const int *hi [[buffer(5)]], device const int *cells [[buffer(6)]], device const int *seq [[buffer(7)]],
                             device float *out [[buffer(8)]], device float *partials [[buffer(9)]], device float *tops [[buffer(10)]],
                             device pe_fault *fault [[buffer(11)]], device const float *bias [[buffer(12)]],
                             device const int *numbers [[buffer(13)]], device float *mosts [[buffer(14)]], threadgroup float *shared [[threadgroup(0)]],
                             uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
                             uint lane [[thread_index_in_simdgroup]], uint warp [[simdgroup_index_in_threadgroup]]) {
  work w;
  w.first = 8 * TILES * (int)group.x, w.head = (int)group.y;
  w.index = (int)index, w.lane = (int)lane, w.warp = (int)warp, w.tile = TILES == 4 ? w.warp : 0;
  w.sequence = 0;
  w.bias = bias, w.numbers = numbers;
  find_places(shared + AT_PLACES, w.index, w.r, w.c);
  const int end = min(a.m, (w.first + 8 * TILES + a.slots - 1) / a.slots);
  if (w.index < 8 * TILES) {
    const int slot = w.first + w.index, row = slot / a.slots;
    const int2 own = row < a.m && slot % a.slots < a.group ? interval_of(a, row, lo, hi, seq, fault) : int2(0, 0);
    ints(shared, AT_LO)[w.index] = own.x;
    ints(shared, AT_HI)[w.index] = own.y;
    shared[AT_ALL_TOP + w.index] = -INFINITY;
    shared[AT_ALL_SUM + w.index] = 0.0f;
    shared[AT_MOST + w.index] = -INFINITY;
  }
  outputs o;
  for (int row = w.first / a.slots, until; row < end; row = until) {
    until = SEQUENCED ? row + 1 : end;
    if (SEQUENCED) {
      w.sequence = seq[row];
      while (until < end && seq[until] == w.sequence) until++;
    }
    start_run(a, w, row, until, shared);
    if (w.lo < w.hi) {
      const int first = w.lo / CHUNK, last = (w.hi - 1) / CHUNK;
      for (int chunk = SPLIT ? first + (int)group.z : first; chunk <= last; chunk++) {
        run_chunk(a, w, chunk, queries, k, v, cells, fault, shared, o);
        merge_chunk(a, w, chunk, chunk - first, out, partials, tops, mosts, shared, o);
        if (SPLIT) break;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (SPLIT || w.index >= 8 * TILES) return;
  const int slot = w.first + w.index;
  if (slot / a.slots >= a.m || slot % a.slots >= a.group) return;
  const long at = (long)(slot / a.slots) * a.heads + w.head * a.group + slot % a.slots;
  tops[2 * at] = shared[AT_ALL_TOP + w.index];
  tops[2 * at + 1] = shared[AT_ALL_SUM + w.index];
  if (TOLD) mosts[at] = shared[AT_MOST + w.index];
}

/* ---- results ----
 *
 * A simdgroup owns one query, a lane every 32nd element of it: with SPLIT it merges the chunks in ascending order, as merge_chunk does,
 * four of which are loaded at once; then acc / sum, a sink joining the sum only, and over values in blocks the result is mixed back.
 * Shared memory: 1024 floats, to mix. With SPLIT 4 f bytes are read for each chunk and head, beside the chunk's 1024 f of F16.
 */

enum { LANE_ELEMENTS = MOST_WIDTH / 32, AT_ONCE = 4 };

struct query_sums {
  float top, sum, y[LANE_ELEMENTS];
};

/* What one query has after all of its n chunks. */
static inline query_sums merge_all(constant attention_args &a, long query, int n, device const float *partials, device const float *tops,
                                   int lane) {
  query_sums t;
  for (int first = 0; first < n; first += AT_ONCE) {
    float x[AT_ONCE][LANE_ELEMENTS], top[AT_ONCE], sum[AT_ONCE];
    PE_UNROLL
    for (int u = 0; u < AT_ONCE; u++) {
      const long at = query * a.chunks + min(first + u, n - 1);
      top[u] = tops[2 * at];
      sum[u] = tops[2 * at + 1];
      PE_UNROLL
      for (int j = 0; j < LANE_ELEMENTS; j++) x[u][j] = lane + 32 * j < a.f ? partials[at * a.f + lane + 32 * j] : 0.0f;
    }
    PE_UNROLL
    for (int u = 0; u < AT_ONCE; u++) {
      if (first + u >= n) continue;
      float shrink = 0.0f, grow = 0.0f;
      if (first + u) {
        t.top = merged(t.top, top[u], shrink, grow);
        t.sum = fma(sum[u], grow, t.sum * shrink);
      } else {
        t.top = top[u], t.sum = sum[u];
      }
      PE_UNROLL
      for (int j = 0; j < LANE_ELEMENTS; j++) t.y[j] = first + u ? fma(x[u][j], grow, t.y[j] * shrink) : x[u][j];
    }
  }
  return t;
}

kernel void attention_finish(constant attention_args &a [[buffer(0)]], device const int *lo [[buffer(1)]],
                             device const int *hi [[buffer(2)]], device const int *seq [[buffer(3)]],
                             device const float *partials [[buffer(4)]], device const float *tops [[buffer(5)]],
                             device const float *sinks [[buffer(6)]], device float *out [[buffer(7)]],
                             device pe_fault *fault [[buffer(8)]], device const float *mosts [[buffer(9)]],
                             device float *stats [[buffer(10)]], threadgroup float *shared [[threadgroup(0)]],
                             uint3 at [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]]) {
  const long query = (long)at.y * a.heads + at.x;
  const int2 keys = interval_of(a, (int)at.y, lo, hi, seq, fault);
  device float *to = out + query * a.f;
  if (keys.x >= keys.y) {
    for (int i = (int)lane; i < a.f; i += 32) to[i] = 0.0f;
    if (TOLD && lane < 2) stats[2 * query + lane] = 0.0f;
    return;
  }
  query_sums t;
  if (SPLIT) {
    t = merge_all(a, query, (keys.y - 1) / CHUNK - keys.x / CHUNK + 1, partials, tops, (int)lane);
  } else {
    t.top = tops[2 * query], t.sum = tops[2 * query + 1];
    PE_UNROLL
    for (int j = 0; j < LANE_ELEMENTS; j++) t.y[j] = (int)lane + 32 * j < a.f ? to[lane + 32 * j] : 0.0f;
  }
  if (TOLD && lane == 0) {
    const int chunks = SPLIT ? (keys.y - 1) / CHUNK - keys.x / CHUNK + 1 : 1;
    float largest = SUNK ? sinks[at.x] : -INFINITY;
    for (int i = 0; i < chunks; i++) largest = max(largest, mosts[SPLIT ? query * a.chunks + i : query]);
    const float total = t.sum * exp_of(t.top - largest);
    stats[2 * query] = largest;
    stats[2 * query + 1] = SUNK ? total + exp_of(sinks[at.x] - largest) : total;
  }
  float shrink = 1.0f;
  if (SUNK) {
    const float sink = sinks[at.x], now = max(t.top, sink);
    shrink = exp_of(t.top - now);
    t.sum = t.sum * shrink + exp_of(sink - now);
  }
  PE_UNROLL
  for (int j = 0; j < LANE_ELEMENTS; j++) shared[lane + 32 * j] = t.y[j] * shrink / t.sum;
  threadgroup float *y = is_block(V_FORMAT) ? mixed(shared, shared + MOST_WIDTH, a.f, a.v_run, a.v_shrink, (int)lane) : shared;
  for (int i = (int)lane; i < a.f; i += 32) to[i] = y[i];
}

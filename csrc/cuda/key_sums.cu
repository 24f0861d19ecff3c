/* key_sums.cu: what the queries of an attention give to each key, added to the key's sums.
 * Reference: pyengine/ops/attention.py: key_sums.
 *
 * Block (x, y, z) has 128 threads and owns the sums of KEYS places, from KEYS x on, of key/value head y and sequence z. It walks the rows
 * in order, 128 at a time, and keeps a list of those that are of its sequence, have weights and see one of its places; a block that finds
 * none reads nothing else. Queries of the list pass through shared memory, QUERIES at once: a thread makes the scores of one key and every
 * (128 / KEYS)-th of them, elements ascending, then their powers; then the thread of a key adds them, one query after the other. So a sum
 * has the same bits however a prompt is cut, and for plain numbers they are the CPU's, where attention is of floats. Where it is of halves,
 * probabilities are off by what is left of those, about 1e-6. Over keys in blocks queries are rounded to 8 bits, as everywhere.
 *
 * Shared memory: keys [KEYS][e rounded up to 4, + 4] and queries [QUERIES][the same] as floats; rows are 16 bytes more than a multiple of
 * 128 apart for the usual widths, so that 8 lanes' 16-byte loads meet no bank twice. 2 e operations a query and key, 1 + 1 / QUERIES loads
 * of 16 bytes for 4 fma: bound by shared memory. K is read once, queries once for KEYS keys.
 */
#include "activations.h"
#include "cells.h"

namespace {

using namespace pe;

enum { THREADS = 128, QUERIES = 16, CHANNELS = 6, MOST_ELEMENTS = 512 };
constexpr float LARGE = 0.01f; /* of a row's largest probability */

struct Sums {
  float *sums;
  const float *stats, *weights;
  const char *q;
  int64_t q_row, q_head, q_element; /* bytes */
  Cache k;
  const int32_t *lo, *hi, *seq, *cells;
  int64_t cells_stride, n_keys;     /* n_keys: of a head in `sums` */
  pe_fault *fault;
  int kinds[CHANNELS];
  float scale, softcap, over;       /* over: 1 / softcap */
  int m, h, group, e, l, n_sequences, channels, pitch;
};

/* Rows that are looked at together: those that count, in order. */
struct List { int n[THREADS / 32], row[THREADS], first[THREADS], keys[THREADS]; };

template <int KEYS> struct Shared {
  List list;
  int32_t cells[KEYS];
  float less[QUERIES][KEYS + 1], power[QUERIES][KEYS + 1]; /* logits less the largest one of their query, and e^that; masked: 0 */
  float4 numbers[1];                                       /* keys, then queries */
};

__device__ __forceinline__ bool has_weights(const Sums &w, int row) {
  bool any = false;
#pragma unroll 1
  for (int c = 0; c < w.channels; c++) any |= w.weights[(int64_t)row * w.channels + c] != 0.0f;
  return any;
}

/* Is a row of a sequence, with keys, and right? Where it is wrong the first block says so. */
__device__ __forceinline__ bool is_right(const Sums &w, int row, bool says) {
  const int64_t lo = w.lo[row], hi = w.hi[row], sequence = w.seq ? w.seq[row] : 0;
  const bool known = sequence >= 0 && sequence < w.n_sequences;
  if (lo >= hi) return false;
  if (lo >= 0 && hi - lo <= w.l && known) return true;
  if (says) raise(w.fault, PE_BAD_VALUE, lo < 0 ? lo : known ? hi - lo : sequence, known ? w.l : w.n_sequences);
  return false;
}

/* Does a row whose keys begin at place `first` see place `at`? */
__device__ __forceinline__ bool sees(int first, int keys, int at, int l) {
  const int d = at - first;
  return (d < 0 ? d + l : d) < keys;
}

/* Of the rows from `base` on, those that count for the places first .. end - 1 into the list; gives their number. Barriers at both ends. */
__device__ __forceinline__ int find_rows(const Sums &w, List &list, int base, int first, int end) {
  const int row = base + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool counts = row < w.m && has_weights(w, row) && is_right(w, row, blockIdx.x + blockIdx.y + blockIdx.z == 0);
  counts = counts && (w.seq ? w.seq[row] : 0) == (int)blockIdx.z;
  int start = 0, keys = 0;
  if (counts) {
    start = w.lo[row] % w.l, keys = w.hi[row] - w.lo[row];
    counts = sees(start, keys, first, w.l) || (start >= first && start < end); /* the first place, or what begins behind it */
  }
  const unsigned all = __ballot_sync(ALL, counts);
  __syncthreads();
  if (lane == 0) list.n[warp] = __popc(all);
  __syncthreads();
  int at = __popc(all & ((1u << lane) - 1)), n = 0;
  for (int i = 0; i < THREADS / 32; i++) {
    if (i < warp) at += list.n[i];
    n += list.n[i];
  }
  if (counts) list.row[at] = row, list.first[at] = start, list.keys[at] = keys;
  __syncthreads();
  return n;
}

/* Code i of a block of Q4_0, Q4_1 or Q2_1. */
__device__ __forceinline__ int code_of(const char *block, int32_t dtype, int i) {
  const uint8_t *codes = (const uint8_t *)block + (dtype == PE_Q4_0 ? 2 : 4);
  return dtype == PE_Q2_1 ? codes[i / 4] >> i % 4 * 2 & 3 : codes[i % 16] >> i / 16 * 4 & 15;
}

/* Element i of a cell, in any format. */
__device__ __forceinline__ float element_of(const Cache &c, const char *cell, int i) {
  const pe_format f = cell_format_of(c.dtype);
  if (f.elements == 1) return load_number(c.dtype, cell + i * c.element);
  const char *block = cell + i / 32 * f.bytes;
  const float d = from_half(*(const uint16_t *)block);
  if (c.dtype == PE_Q8_0) return d * (float)((const int8_t *)block)[2 + i % 32];
  const int code = code_of(block, c.dtype, i % 32);
  return c.dtype == PE_Q4_0 ? d * (float)(code - 8) : fmaf((float)code, d, from_half(*(const uint16_t *)(block + 2)));
}

/* Element `at` of 16 keys by channel, `pitch` apart; 0 where there is none. A lane has a channel; its block is the same as long as the group is. */
__device__ __forceinline__ void load_channel(const Cache &c, const int32_t *cells, int at, int pitch, float *to) {
  const int32_t format = channel_format(c.dtype);
  const char *block = nullptr;
  float d = 0.0f, m = 0.0f;
  int group = -1;
#pragma unroll 1
  for (int j = 0; j < 16; j++, to += pitch) {
    const int cell = cells[j];
    const bool there = (uint32_t)cell < c.cells && at < c.elements;
    if (there && cell / GROUP_KEYS != group) {
      group = cell / GROUP_KEYS;
      block = cell_at(c, blockIdx.y, group * GROUP_KEYS) + at * cell_format_of(format).bytes;
      d = from_half(*(const uint16_t *)block), m = from_half(*(const uint16_t *)(block + 2));
    }
    *to = there ? fmaf((float)code_of(block, format, cell % GROUP_KEYS), d, m) : 0.0f;
  }
}

template <int KEYS> __device__ __forceinline__ void load_keys(const Sums &w, Shared<KEYS> &sh, int first) {
  float *to = (float *)sh.numbers;
  const int32_t *map = (const int32_t *)((const char *)w.cells + blockIdx.z * w.cells_stride);
  for (int j = threadIdx.x; j < KEYS; j += THREADS) sh.cells[j] = first + j < w.l ? map[first + j] : -1;
  __syncthreads();
  if (by_channel(w.k)) {
    for (int i = threadIdx.x; i < KEYS / 16 * w.pitch; i += THREADS)
      load_channel(w.k, sh.cells + i / w.pitch * 16, i % w.pitch, w.pitch, to + i / w.pitch * 16 * w.pitch + i % w.pitch);
    return;
  }
#pragma unroll 1 /* side by side, all formats of several elements are more than a thread has registers for */
  for (int i = threadIdx.x; i < KEYS * w.pitch; i += THREADS) {
    const int cell = sh.cells[i / w.pitch], at = i % w.pitch;
    to[i] = (uint32_t)cell < w.k.cells && at < w.e ? element_of(w.k, cell_at(w.k, blockIdx.y, cell), at) : 0.0f;
  }
}

/* Queries from number `first` of the list on, n of them, scaled; over keys in blocks mixed and rounded to 8 bits. */
__device__ __forceinline__ void load_queries(const Sums &w, const List &list, int first, int n, float *to) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < n; i += THREADS / 32) {
    float *x = to + i * w.pitch;
    const char *from = w.q + list.row[(first + i) / w.group] * w.q_row + ((int)blockIdx.y * w.group + (first + i) % w.group) * w.q_head;
    for (int j = lane; j < w.pitch; j += 32) x[j] = j < w.e ? *(const float *)(from + j * w.q_element) * w.scale : 0.0f;
    __syncwarp();
    if (!in_blocks(w.k)) continue;
    mix(x, w.e);
    float most = 0.0f;
    for (int j = lane; j < w.e; j += 32) most = fmaxf(most, fabsf(x[j]));
    const float d = __fdiv_rn(lanes_max(most), 127.0f), inv = inverse(d);
    for (int j = lane; j < w.e; j += 32) x[j] = rintf(x[j] * inv) * d;
  }
}

/* Powers of n queries and the thread's key. */
template <int KEYS> __device__ __forceinline__ void find_powers(const Sums &w, Shared<KEYS> &sh, int first_query, int n, int first) {
  constexpr int LANES = THREADS / KEYS, OWN = QUERIES / LANES;
  const int key = threadIdx.x % KEYS, lane = threadIdx.x / KEYS, wide = w.pitch / 4;
  const float4 *k = sh.numbers + key * wide, *q = sh.numbers + KEYS * wide;
  float s[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++) s[i] = 0.0f;
#pragma unroll 2
  for (int at = 0; at < (w.e + 3) / 4; at++) {
    const float4 y = k[at];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      if (lane + LANES * i >= n) continue;
      const float4 x = q[(lane + LANES * i) * wide + at];
      s[i] = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, s[i]))));
    }
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) sh.less[lane + LANES * i][key] = s[i];
#pragma unroll 1 /* from there, and one by one: side by side they are more than a thread has registers for */
  for (int own = lane; own < n; own += LANES) {
    const int number = (first_query + own) / w.group;
    const bool seen = first + key < w.l && sees(sh.list.first[number], sh.list.keys[number], first + key, w.l);
    if (seen && (uint32_t)sh.cells[key] >= w.k.cells) raise(w.fault, PE_BAD_VALUE, sh.cells[key], w.k.cells);
    const int64_t query = (int64_t)sh.list.row[number] * w.h + (int)blockIdx.y * w.group + (first_query + own) % w.group;
    float x = sh.less[own][key];
    if (w.softcap != 0.0f) x = tanh_of(x * w.over) * w.softcap;
    sh.less[own][key] = seen ? __fsub_rn(x, w.stats[2 * query]) : 0.0f;
    sh.power[own][key] = seen ? exp_of(__fsub_rn(x, w.stats[2 * query])) : 0.0f;
  }
}

/* Add what n queries give the thread's key. */
template <int KEYS>
__device__ __forceinline__ void add_queries(const Sums &w, const Shared<KEYS> &sh, int first_query, int n, float (&acc)[CHANNELS]) {
#pragma unroll 1
  for (int i = 0; i < n; i++) {
    const int64_t row = sh.list.row[(first_query + i) / w.group];
    const float total = w.stats[2 * (row * w.h + (int)blockIdx.y * w.group + (first_query + i) % w.group) + 1];
    const float power = sh.power[i][threadIdx.x], share = __fmul_rn(power, __fdiv_rn(1.0f, total));
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
      if (c >= w.channels) break;
      const float weight = w.weights[row * w.channels + c];
      if (weight == 0.0f) continue;
      float y = share;
      if (w.kinds[c] == 1) y = __fmul_rn(share, share);
      else if (w.kinds[c] == 2) y = power < LARGE ? 0.0f : 1.0f;
      else if (w.kinds[c] == 3) y = __fmul_rn(share, __fsub_rn(logf(total), sh.less[i][threadIdx.x]));
      acc[c] = fmaf(weight, y, acc[c]);
    }
  }
}

template <int KEYS> __global__ void __launch_bounds__(THREADS, 4) key_sums_kernel(const Sums w) {
  Shared<KEYS> &sh = shared<Shared<KEYS>>();
  const int first = blockIdx.x * KEYS, end = min(first + KEYS, w.l), key = threadIdx.x;
  float *sums = w.sums + (blockIdx.y * w.n_keys + (int64_t)blockIdx.z * w.l + first + key) * w.channels, acc[CHANNELS] = {};
  const bool mine = key < KEYS && first + key < w.l;
  bool loaded = false;
  for (int base = 0; base < w.m; base += THREADS) {
    const int queries = find_rows(w, sh.list, base, first, end) * w.group;
    if (queries && !loaded) {
      load_keys<KEYS>(w, sh, first);
#pragma unroll
      for (int c = 0; c < CHANNELS; c++)
        if (mine && c < w.channels) acc[c] = sums[c];
      loaded = true;
    }
    for (int at = 0; at < queries; at += QUERIES) {
      const int n = min((int)QUERIES, queries - at);
      load_queries(w, sh.list, at, n, (float *)sh.numbers + KEYS * w.pitch);
      __syncthreads();
      find_powers<KEYS>(w, sh, at, n, first);
      __syncthreads();
      if (mine) add_queries<KEYS>(w, sh, at, n, acc);
    }
  }
#pragma unroll
  for (int c = 0; c < CHANNELS; c++)
    if (mine && loaded && c < w.channels) sums[c] = acc[c];
}

template <int KEYS> void start(const Sums &w, int g, cudaStream_t stream) {
  const dim3 grid((unsigned)((w.l + KEYS - 1) / KEYS), (unsigned)g, (unsigned)w.n_sequences);
  launch(stream, key_sums_kernel<KEYS>, grid, dim3(THREADS), sizeof(Shared<KEYS>) + (KEYS + QUERIES) * w.pitch * sizeof(float), w);
}

template <class T> const T *data_of(const pe_tensor *t) { return t ? static_cast<const T *>(t->data) : nullptr; }

} // namespace

PE_KERNEL(cuda, key_sums)(const pe_tensor *sums, const pe_tensor *q, const pe_tensor *k, const pe_tensor *lo, const pe_tensor *hi,
                          const pe_tensor *cells, const pe_tensor *seq, const pe_tensor *stats, const pe_tensor *weights, const pe_tensor *out,
                          const pe_key_sums_params *p, pe_stream *s) {
  (void)out; /* the sums themselves */
  Sums w = {};
  const int64_t h = q->shape[1], g = k->shape[0];
  if (q->shape[0] == 0 || h == 0 || cells->shape[1] == 0) return PE_OK;
  if (g == 0 || h % g) return pe_fail(s, PE_BAD_SHAPE, "key_sums: %lld heads share %lld", (long long)h, (long long)g);
  if (sums->shape[2] > CHANNELS || q->shape[2] > MOST_ELEMENTS)
    return pe_fail(s, PE_NO_KERNEL, "key_sums: %lld channels and heads of %lld elements; at most %d and %d are possible", (long long)sums->shape[2],
                   (long long)q->shape[2], CHANNELS, MOST_ELEMENTS);
  const pe_status bad = check_keys("key_sums", "k", k, false, s);
  if (bad) return bad;
  w.sums = static_cast<float *>(sums->data), w.n_keys = sums->shape[1], w.channels = (int)sums->shape[2];
  w.stats = data_of<float>(stats), w.weights = data_of<float>(weights), w.fault = fault(s);
  w.q = data_of<char>(q), w.q_row = q->stride[0], w.q_head = q->stride[1], w.q_element = q->stride[2], w.k = cache_of(k);
  w.lo = data_of<int32_t>(lo), w.hi = data_of<int32_t>(hi), w.seq = data_of<int32_t>(seq), w.cells = data_of<int32_t>(cells);
  w.cells_stride = cells->stride[0], w.n_sequences = (int)cells->shape[0], w.l = (int)cells->shape[1];
  for (int c = 0; c < w.channels; c++) w.kinds[c] = p->kinds[c];
  w.scale = p->scale, w.softcap = p->softcap, w.over = 1.0f / p->softcap;
  w.m = (int)q->shape[0], w.h = (int)h, w.group = (int)(h / g), w.e = (int)q->shape[2];
  w.pitch = (int)round_up(w.e, 4) + 4;
  if (w.e <= 128) start<64>(w, (int)g, stream(s));
  else if (w.e <= 256) start<32>(w, (int)g, stream(s));
  else start<16>(w, (int)g, stream(s));
  return PE_OK;
}

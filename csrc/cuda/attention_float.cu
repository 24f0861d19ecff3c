/* attention_float.cu: attention in float32 throughout; nothing is rounded but sums, and queries of keys in blocks, to 8 bits as on the CPU.
 *
 * Block (x, y, z) has 128 threads in TY x TX and owns unit x (then x + gridDim.x ...) of key/value head y: 4 TY queries; and of the chunks
 * that it sees those number z, z + gridDim.z ... Thread (ty, tx) makes the scores of queries 4 ty .. 4 ty + 3 and keys tx, tx + TX ...
 * of a tile, elements ascending, and sums of their values in columns CPT tx .. CPT tx + CPT - 1 of every 64, keys ascending; between
 * the two a warp owns whole queries for the softmax, whose sums are of keys 16 apart. A masked key is skipped, whatever it holds. Tiles,
 * chunks, tops and all sums are those of csrc/cpu/attention.c, and so are the bits.
 *
 * Keys in blocks stay codes, and queries become codes, all as floats: sums of a block are exact, and times its scale join the score. Keys by
 * channel become floats, and queries stay what they are.
 *
 * Shared memory: queries [4 TY][e rounded up to 64, + 4]; of codes their scales, sums of 32 of them and what each block of keys
 * is worth; slices of a tile, [64 keys][64 elements + 4], of K one after the other, then of V; with blocks up to 256 elements of a
 * tile's cells as they lie, twice; scores, then probabilities [4 TY][64 + 4]; top, sum and factor of each query. Rows are 4 floats more than
 * a multiple of 32 apart, so that 8 threads' 16-byte loads meet no bank twice. While a slice is used the next is on its way: floats by cp.async into a second
 * buffer, 16-bit numbers (NARROW) into 16 registers of each thread, and from there as floats into the one buffer. Of cells with blocks (BLOCKY)
 * stretches come by cp.async, and are unpacked into that buffer slice by slice.
 * Per tile and block: 64 (e + f) numbers of K and V; 2 (e + f) * 64 * 4 TY operations. TY = 8 (prompts, encoders): of F16 32 operations a
 * byte of K and V from L2; 8 loads of 16 bytes for 64 fma a thread: bound by fma, to about three quarters of their peak. TY = 2
 * (generation): each byte of the cache is read once for 8 heads of a group, 5 loads of 16 bytes for 16 fma: on an RTX 4090 F16 caches
 * are the limit, on an H200 shared memory, at some 60% of the bandwidth. TY = 4: heads wider than 256.
 */
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace {

using namespace pe;

enum { THREADS = 128, OWN = 4 /* queries of a thread */, SLICE = 64, PITCH = SLICE + 4, CHUNK = FLOAT_CHUNK_KEYS };
enum { MINIMA = TILE_KEYS * SLICE / COLUMNS /* of blocks in a slice of a tile: their minima lie so far behind their scales */ };
enum How { WIDE, NARROW, BLOCKY /* K or V is in blocks, K perhaps by channel */ };
constexpr float SLACK = 8.0f; /* csrc/cpu/attention_softmax.h */

__device__ __forceinline__ int slices_of(int elements) { return (elements + SLICE - 1) / SLICE; }

/* Begin to copy elements first .. first + 63 of a tile's cells. */
__device__ __forceinline__ void load_slice(const Cache &c, bool copied, int64_t head, const int32_t *cells, int first, float *to) {
  if (copied) {
    for (int i = threadIdx.x; i < TILE_KEYS * SLICE / 4; i += THREADS) {
      const int key = i / (SLICE / 4), at = first + i % (SLICE / 4) * 4;
      const bool valid = cells[key] >= 0 && at < c.elements;
      cp_async16(to + key * PITCH + at - first, valid ? cell_at(c, head, cells[key]) + 4 * at : c.data, valid);
    }
    return;
  }
  for (int i = threadIdx.x; i < TILE_KEYS * SLICE; i += THREADS) {
    const int key = i / SLICE, at = first + i % SLICE;
    const bool valid = cells[key] >= 0 && at < c.elements;
    to[key * PITCH + at - first] = valid ? load_number(c.dtype, cell_at(c, head, cells[key]) + at * c.element) : 0.0f;
  }
}

/* A slice of 16-bit numbers in the threads' registers: thread 8 i + j has elements 8 j .. 8 j + 7 of keys i, i + 16 .. */
struct Held {
  enum { PARTS = SLICE / 8, KEYS = THREADS / PARTS, N = TILE_KEYS / KEYS };
  uint4 x[N];
  bool f16;

  __device__ __forceinline__ void load(const Cache &c, int64_t head, const int32_t *cells, int first) {
    const int at = first + threadIdx.x % PARTS * 8;
    f16 = c.dtype == PE_F16;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const int cell = cells[threadIdx.x / PARTS + KEYS * n];
      x[n] = cell >= 0 && at < c.elements ? *(const uint4 *)(cell_at(c, head, cell) + 2 * at) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ float2 pair(uint32_t bits) const { return f16 ? unpack_half2(bits) : unpack_bf162(bits); }
  /* Of 8 lanes the last four write their halves the other way round: 32 different banks. */
  __device__ __forceinline__ void store(float *to) const {
    const int part = threadIdx.x % PARTS, second = part >= PARTS / 2;
    to += threadIdx.x / PARTS * PITCH + 8 * part;
#pragma unroll
    for (int n = 0; n < N; n++, to += KEYS * PITCH) {
      const float2 a = pair(x[n].x), b = pair(x[n].y), c = pair(x[n].z), d = pair(x[n].w);
      const float4 low = make_float4(a.x, a.y, b.x, b.y), high = make_float4(c.x, c.y, d.x, d.y);
      *(float4 *)(to + 4 * second) = second ? high : low;
      *(float4 *)(to + 4 - 4 * second) = second ? low : high;
    }
  }
};

/* Slices of K, then of V, of tile after tile; one is on its way while one is used. */
template <int HOW> struct Slices {
  WalkOf<CHUNK> ahead;
  int slice, to;
  Held held;

  __device__ __forceinline__ Slices(const WalkOf<CHUNK> &first) : ahead(first), slice(0), to(0) {}
  __device__ __forceinline__ float *buffer(const Job &w, int i) const { return area<float>(w.at.k + i * w.at.stage_bytes); }
  __device__ __forceinline__ void begin(const Job &w, const Unit &u, const Seen &seen) { load(w, u, seen); }
  __device__ __forceinline__ void load(const Job &w, const Unit &u, const Seen &seen) {
    if (ahead.more()) {
      const int32_t *cells = area<int32_t>(w.at.cells) + ahead.tile % (CHUNK / TILE_KEYS) * TILE_KEYS;
      const int keys = slices_of(w.e), values = slices_of(w.f);
      const bool of_keys = slice < keys;
      const int first = (of_keys ? slice : slice - keys) * SLICE;
      if constexpr (HOW == NARROW) held.load(of_keys ? w.k : w.v, u.g, cells, first);
      else load_slice(of_keys ? w.k : w.v, (of_keys ? w.k_form : w.v_form) == COPIED, u.g, cells, first, buffer(w, to));
      if (++slice == keys + values) {
        slice = 0;
        if (ahead.step(w, u, seen, blockIdx.z, gridDim.z) && ahead.more()) find_cells(w, u, seen, ahead.chunk());
      }
    }
    if constexpr (HOW == NARROW) return;
    cp_async_commit();
    to ^= 1;
  }
  /* The next slice; ends with a barrier. */
  __device__ __forceinline__ const float *next(const Job &w, const Unit &u, const Seen &seen) {
    if constexpr (HOW == NARROW) {
      __syncthreads();
      held.store(buffer(w, 0));
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const float *is = buffer(w, HOW == WIDE ? to ^ 1 : 0);
    load(w, u, seen);
    return is;
  }
};

/* A slice of a tile that is staged becomes floats, keys in blocks their codes; zeros beyond the cell. Four lanes have a block; those of
 * keys i and i + 4 stand beside each other, so that no bank is met twice. first: element of the cell; worth: for keys' scales, or null. */
__device__ __forceinline__ void unpack_slice(const Cache &c, Form form, int64_t head, const char *staged, int pitch, int first, float *worth,
                                             float *to) {
  const int lane = again(lane_of()), t = lane % 4, other = lane / 4 % 2, bytes = cell_format_of(c.dtype).bytes;
#pragma unroll 2
  for (int i = warp_of(); i < TILE_KEYS / 8 * (SLICE / COLUMNS); i += THREADS / 32) {
    const int key = i / 2 * 8 + lane / 8 + 4 * other, b = i % 2, block = first + b * COLUMNS;
    float *dest = to + key * PITCH + b * COLUMNS;
    float y[8] = {};
    if (form == BLOCKS) {
      if (block < c.elements) {
        const char *from = staged + key * pitch + block % STRETCH / 32 * bytes;
        const uint2 codes = codes_of(from, c.dtype, t);
        const float d = scale_of(from), m = least_of(from, c.dtype);
        const uint32_t words[2] = {codes.x, codes.y};
#pragma unroll
        for (int n = 0; n < 8; n++) {
          const float code = (float)(int8_t)(words[n / 4] >> n % 4 * 8);
          y[n] = worth ? code : has_least(c.dtype) ? fmaf(code, d, m) : __fmul_rn(code, d);
        }
        if (worth && t == 0) worth[b * TILE_KEYS + key] = d;
        if (worth && t == 1 && has_least(c.dtype)) worth[b * TILE_KEYS + key + MINIMA] = m;
      }
      *(float4 *)(dest + 4 * t) = make_float4(y[0], y[1], y[2], y[3]);
      *(float4 *)(dest + 16 + 4 * t) = make_float4(y[4], y[5], y[6], y[7]);
      continue;
    }
    const int at = block + 8 * t;
    if (form == COPIED && at < c.elements) {
      const uint4 x = *(const uint4 *)(staged + key * pitch + 2 * (at % STRETCH));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const float2 two = c.dtype == PE_F16 ? unpack_half2(words[n]) : unpack_bf162(words[n]);
        y[2 * n] = two.x, y[2 * n + 1] = two.y;
      }
    } else if (form == GATHERED) {
      const int cell = ((const int32_t *)staged)[key];
#pragma unroll
      for (int n = 0; n < 8; n++) y[n] = cell >= 0 && at + n < c.elements ? load_number(c.dtype, cell_at(c, head, cell) + (at + n) * c.element) : 0.0f;
    }
    const float4 low = make_float4(y[0], y[1], y[2], y[3]), high = make_float4(y[4], y[5], y[6], y[7]);
    *(float4 *)(dest + 8 * t + 4 * other) = other ? high : low;
    *(float4 *)(dest + 8 * t + 4 - 4 * other) = other ? low : high;
  }
}

/* The same of keys by channel: a warp has 32 channels of one group, a lane one of them, so that neither its words nor its floats meet a bank
 * twice. channels: of a group, as many as are staged. */
__device__ __forceinline__ void unpack_channels(const Cache &c, const char *staged, int channels, int first, float *to) {
  const int32_t format = channel_format(c.dtype);
  const int h = warp_of() / (SLICE / COLUMNS), channel = again(warp_of() % (SLICE / COLUMNS) * COLUMNS + lane_of());
  const char *block = staged + (h * channels + first % STRETCH + channel) * cell_format_of(format).bytes;
  const bool there = first + channel < c.elements;
  const float d = there ? scale_of(block) : 0.0f, m = there ? least_of(block, format) : 0.0f;
  to += GROUP_KEYS * h * PITCH + channel;
#pragma unroll 2
  for (int i = 0; i < GROUP_KEYS / 4; i++) {
    const uint32_t codes = there ? four_codes_of(block, format, i) : 0;
#pragma unroll
    for (int n = 0; n < 4; n++) to[(4 * i + n) * PITCH] = fmaf((float)(codes >> 8 * n & 255), d, m);
  }
}

/* The same where K or V is in blocks. Stretches of cells, of K, then of V, come as they lie, in whole sectors: two are on their way or in
 * use, or one. Numbers that are not copied are read where they lie when their slice's turn comes; staged are their cells. */
template <> struct Slices<BLOCKY> {
  WalkOf<CHUNK> ahead;
  int coming, to;  /* stretch of that tile which is next to be loaded, and its buffer */
  int slice, from; /* slice of the tile in use, and the buffer of its stretch */

  __device__ __forceinline__ Slices(const WalkOf<CHUNK> &first) : ahead(first), coming(0), to(0), slice(0), from(0) {}
  static __device__ __forceinline__ int stretches_of(int elements) { return (elements + STRETCH - 1) / STRETCH; }
  __device__ __forceinline__ char *stage(const Job &w, int i) const { return area<char>(w.at.k + (w.at.one ? 0 : i * w.at.stage_bytes)); }
  __device__ __forceinline__ void begin(const Job &w, const Unit &u, const Seen &seen) {
    for (int i = w.at.one; i < 2; i++) load(w, u, seen);
  }
  __device__ __forceinline__ void load(const Job &w, const Unit &u, const Seen &seen) {
    if (ahead.more()) {
      const int32_t *cells = area<int32_t>(w.at.cells) + ahead.tile % (CHUNK / TILE_KEYS) * TILE_KEYS;
      const int keys = stretches_of(w.e);
      const bool of_keys = coming < keys;
      Cache part = of_keys ? w.k : w.v;
      if ((of_keys ? w.k_form : w.v_form) == GATHERED) {
        if (threadIdx.x < TILE_KEYS) ((int32_t *)stage(w, to))[threadIdx.x] = cells[threadIdx.x];
      } else {
        const int first = (of_keys ? coming : coming - keys) * STRETCH, n = min(STRETCH, part.elements - first);
        if (of_keys && w.k_form == CHANNELS) {
          copy_groups(part, u.g, cells, first, n, stage(w, to));
        } else {
          const pe_format f = cell_format_of(part.dtype);
          part.data += first / f.elements * f.bytes;
          part.elements = n;
          load_tile<false>(part, BLOCKS, u.g, cells, of_keys ? w.at.k_pitch : w.at.v_pitch, stage(w, to));
        }
      }
      if (++coming == keys + stretches_of(w.f)) {
        coming = 0;
        if (ahead.step(w, u, seen, blockIdx.z, gridDim.z) && ahead.more()) find_cells<true>(w, u, seen, ahead.chunk());
      }
    }
    cp_async_commit();
    to ^= 1;
  }
  /* The next slice; ends with a barrier. */
  __device__ __forceinline__ const float *next(const Job &w, const Unit &u, const Seen &seen) {
    const int keys = slices_of(w.e), all = keys + slices_of(w.f);
    const bool of_keys = slice < keys;
    const int first = (of_keys ? slice : slice - keys) * SLICE;
    float *is = area<float>(w.at.k_ready);
    if (first % STRETCH == 0) wait_for_copies(w.at.one ? 0 : 1);
    __syncthreads();
    if (of_keys && w.k_form == CHANNELS) unpack_channels(w.k, stage(w, from), min(STRETCH, w.e - first / STRETCH * STRETCH), first, is);
    else
      unpack_slice(of_keys ? w.k : w.v, of_keys ? w.k_form : w.v_form, u.g, stage(w, from), of_keys ? w.at.k_pitch : w.at.v_pitch, first,
                   of_keys && w.k_form == BLOCKS ? area<float>(w.at.k_scale) : nullptr, is);
    __syncthreads();
    slice = slice + 1 == all ? 0 : slice + 1;
    if (slice == 0 || slice == keys || (first + SLICE) % STRETCH == 0) { /* the stretch has been used */
      from ^= 1;
      load(w, u, seen);
    }
    return is;
  }
};

/* What a block keeps of each query: in shared memory. */
struct Kept { float *top, *sum, *factor, *p; };

__device__ __forceinline__ Kept kept_of(const Job &w, int n) {
  float *at = area<float>(w.at.peaks);
  return Kept{at, at + n, at + 2 * n, area<float>(w.at.p)};
}

/* Scores of a tile become probabilities; those of masked keys -1. A warp owns every fourth query, n of them; lane l < 16 has in sums those of
 * keys l, l + 16 .. of a tile. */
template <int N> __device__ __forceinline__ void soften(const Job &w, const Unit &u, int first, const Kept &kept, float (&sums)[N]) {
  const Interval *rows = area<Interval>(w.at.rows);
#pragma unroll
  for (int n = 0; n < N; n++) {
    const int i = warp_of() + THREADS / 32 * n;
    float x[2], peak = PE_NONE;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int key = first + lane_of() + 32 * j;
      x[j] = kept.p[i * PITCH + lane_of() + 32 * j];
      if (w.bias && i < queries_of(u)) x[j] += bias_of(w, u, i, key);
      if (w.softcap != 0.0f) x[j] = tanh_of(x[j] * __fdiv_rn(1.0f, w.softcap)) * w.softcap;
      if (key < rows[i].lo || key >= rows[i].hi) x[j] = PE_NONE;
      peak = fmaxf(peak, x[j]);
    }
    peak = lanes_max(peak);
    float top = kept.top[i], factor = 1.0f;
    if (peak > top + SLACK) factor = exp_of(top - peak), top = peak;
    float sum = sums[n] * factor;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int key = first + lane_of() + 32 * j;
      const bool masked = key < rows[i].lo || key >= rows[i].hi;
      const float p = masked ? 0.0f : exp_of(x[j] - (top == PE_NONE ? 0.0f : top));
      sum += p;
      sum += __shfl_down_sync(0xffffffffu, p, 16);
      kept.p[i * PITCH + lane_of() + 32 * j] = masked ? -1.0f : p;
    }
    sums[n] = sum;
    __syncwarp(); /* all have read the top */
    if (lane_of() == 0) kept.top[i] = top, kept.factor[i] = factor;
    if (w.stats && lane_of() == 0) note_peak(w, i, peak);
    __syncwarp();
  }
}

/* A chunk is at its end: its 16 sums are one. Ends with a barrier. */
template <int N> __device__ __forceinline__ void fold_sums(const Kept &kept, float (&sums)[N]) {
#pragma unroll
  for (int n = 0; n < N; n++) {
#pragma unroll
    for (int d = 8; d; d /= 2) sums[n] += __shfl_xor_sync(0xffffffffu, sums[n], d);
    if (lane_of() == 0) kept.sum[warp_of() + THREADS / 32 * n] = sums[n];
    sums[n] = 0.0f;
  }
  __syncthreads();
}

/* s[i][j] += queries 4 ty + i by keys tx + TX j over N elements of a slice. */
template <int TX, int N = SLICE>
__device__ __forceinline__ void add_float_scores(const float *q, int q_pitch, const float *k, int tx, float (&s)[OWN][TILE_KEYS / TX]) {
#pragma unroll 2
  for (int at = 0; at < N; at += 4) {
    float4 x[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = *(const float4 *)(q + i * q_pitch + at);
#pragma unroll
    for (int j = 0; j < TILE_KEYS / TX; j++) {
      const float4 y = *(const float4 *)(k + (tx + TX * j) * PITCH + at);
#pragma unroll
      for (int i = 0; i < OWN; i++) s[i][j] = fmaf(x[i].w, y.w, fmaf(x[i].z, y.z, fmaf(x[i].y, y.y, fmaf(x[i].x, y.x, s[i][j]))));
    }
  }
}

/* The same of codes: each block's sum times its scale, and the sum of the query's codes times its minimum, if it has one. q_sums: [query][ne], of
 * this slice and query 4 ty. */
template <int TX>
__device__ __forceinline__ void add_codes(const Job &w, const float *q, int q_pitch, const float *q_sums, int blocks, const float *k, int tx,
                                          float (&s)[OWN][TILE_KEYS / TX]) {
  const float *scales = area<float>(w.at.k_scale) + tx;
  for (int b = 0; b < blocks; b++, q += 32, k += 32, q_sums++, scales += TILE_KEYS) {
    float dot[OWN][TILE_KEYS / TX] = {};
    add_float_scores<TX, 32>(q, q_pitch, k, tx, dot);
#pragma unroll
    for (int j = 0; j < TILE_KEYS / TX; j++)
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        s[i][j] = fmaf(dot[i][j], scales[TX * j], s[i][j]);
        if (has_least(w.k.dtype)) s[i][j] = fmaf(q_sums[i * w.ne], scales[TX * j + MINIMA], s[i][j]);
      }
  }
}

/* acc[i][j] = factor[i] acc[i][j] + sum over the keys of p and column CPT tx + j of a slice of V. */
template <int CPT>
__device__ __forceinline__ void add_slice(const float *p, const float *factor, const float *v, int tx, float (&acc)[OWN][CPT]) {
#pragma unroll
  for (int i = 0; i < OWN; i++)
#pragma unroll
    for (int j = 0; j < CPT; j++) acc[i][j] *= factor[i];
#pragma unroll 2
  for (int key = 0; key < TILE_KEYS; key += 4) {
    float x[OWN][4];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const float4 four = *(const float4 *)(p + i * PITCH + key);
      x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
    }
#pragma unroll
    for (int c = 0; c < 4; c++) {
      float y[CPT];
      if constexpr (CPT == 4) {
        const float4 four = *(const float4 *)(v + (key + c) * PITCH + 4 * tx);
        y[0] = four.x, y[1] = four.y, y[2] = four.z, y[3] = four.w;
      } else if constexpr (CPT == 2) {
        const float2 two = *(const float2 *)(v + (key + c) * PITCH + 2 * tx);
        y[0] = two.x, y[1] = two.y;
      } else {
        y[0] = v[(key + c) * PITCH + tx];
      }
#pragma unroll
      for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < CPT; j++)
          if (!(x[i][c] < 0.0f)) acc[i][j] = fmaf(x[i][c], y[j], acc[i][j]);
    }
  }
}

/* As settle of attention_softmax.h, for this file's owners: columns CPT tx + j of slices of 64. */
template <int N, int CPT>
__device__ __forceinline__ void settle_floats(const Job &w, const Unit &u, int i, int chunk, const float (&acc)[N][OWN][CPT], int own,
                                              Total part, Total &total, int tx) {
  const Interval seen = area<Interval>(w.at.rows)[i];
  if (i >= queries_of(u) || !meets(seen, chunk * CHUNK, CHUNK)) return;
  const int64_t query = (int64_t)row_of(u, i) * w.h + head_of(u, i), slot = query * w.chunks + chunk - first_chunk<CHUNK>(seen);
  const bool fresh = chunk == first_chunk<CHUNK>(seen), last = chunk == last_chunk<CHUNK>(seen);
  float before = 0.0f, now = 1.0f, factor = 1.0f;
  if (w.partials) {
    if (tx == 0) {
      w.tops[2 * slot] = part.top, w.tops[2 * slot + 1] = part.sum;
      if (w.stats) w.mosts[slot] = area<float>(w.at.most)[i];
    }
  } else {
    if (fresh) total = part;
    else merge_tops<true>(total, part, before, now);
    if (last && w.stats && tx == 0) tell<true>(w, query, total, area<float>(w.at.most)[i]);
    if (last) factor = join_sink<true>(w.sinks, head_of(u, i), total);
  }
#pragma unroll
  for (int b = 0; b < N; b++)
#pragma unroll
    for (int j = 0; j < CPT; j++) {
      const int at = b * SLICE + CPT * tx + j;
      float x = acc[b][own][j];
      if (at >= w.f) continue;
      float *to = w.partials ? w.partials + slot * w.nf * COLUMNS + at : w.out + query * w.f + at;
      if (!w.partials && !fresh) x = merged(*to, x, before, now);
      *to = !w.partials && last ? finished(x, factor, total.sum) : x;
    }
}

/* Scaled queries, zeros beyond e and where there is none. */
__device__ __forceinline__ void load_floats(const Job &w, const Unit &u, int n, int pitch) {
  float *q = area<float>(w.at.q);
  for (int i = warp_of(); i < n; i += THREADS / 32) {
    const bool there = i < queries_of(u);
    const char *from = there ? w.q + row_of(u, i) * w.q_row + head_of(u, i) * w.q_head : nullptr;
    for (int j = lane_of(); j < pitch - 4; j += 32)
      q[i * pitch + j] = there && j < w.e ? *(const float *)(from + j * w.q_element) * w.scale : 0.0f;
  }
}

/* Queries that load_floats has left become codes, mixed: with a scale each, and sums of 32. */
__device__ __forceinline__ void round_queries(const Job &w, int n, int pitch) {
  for (int i = warp_of(); i < n; i += THREADS / 32) {
    float *x = area<float>(w.at.q) + i * pitch, most = 0.0f;
    __syncwarp();
    mix(x, w.e);
    for (int j = lane_of(); j < w.e; j += 32) most = fmaxf(most, fabsf(x[j]));
    const float d = __fdiv_rn(lanes_max(most), 127.0f), inv = inverse(d);
    for (int b = 0; b < w.ne; b++) {
      float code = rintf(__fmul_rn(x[b * 32 + lane_of()], inv));
      x[b * 32 + lane_of()] = code;
#pragma unroll
      for (int apart = 16; apart; apart /= 2) code += __shfl_xor_sync(0xffffffffu, code, apart);
      if (lane_of() == 0) area<float>(w.at.q_sum)[i * w.ne + b] = code;
    }
    if (lane_of() == 0) area<float>(w.at.q_scale)[i] = d;
  }
}

/* N: slices of V, at most. */
template <int TY, int N, int HOW>
struct FloatUnit {
  enum { TX = THREADS / TY, QUERIES = OWN * TY, KEYS = TILE_KEYS / TX, CPT = SLICE / TX };
  float acc[N][OWN][CPT], sums[QUERIES / (THREADS / 32)];
  Total total[OWN];

  __device__ __forceinline__ void clear(const Kept &kept) {
#pragma unroll
    for (int b = 0; b < N; b++)
#pragma unroll
      for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int j = 0; j < CPT; j++) acc[b][i][j] = 0.0f;
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES; i += THREADS) kept.top[i] = PE_NONE;
  }

  __device__ __forceinline__ void attend_tile(const Job &w, const Unit &u, const Seen &seen, int tile, Slices<HOW> &slices, const Kept &kept) {
    const int ty = threadIdx.x / TX, tx = threadIdx.x % TX, pitch = slices_of(w.e) * SLICE + 4;
    float s[OWN][KEYS] = {}, factor[OWN];
    for (int i = 0; i < slices_of(w.e); i++) {
      const float *q = area<float>(w.at.q) + OWN * ty * pitch + i * SLICE, *k = slices.next(w, u, seen);
      if (HOW == BLOCKY && w.k_form == BLOCKS)
        add_codes<TX>(w, q, pitch, area<float>(w.at.q_sum) + OWN * ty * w.ne + 2 * i, min(2, w.ne - 2 * i), k, tx, s);
      else add_float_scores<TX>(q, pitch, k, tx, s);
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      const float scale = HOW == BLOCKY && w.k_form == BLOCKS ? area<float>(w.at.q_scale)[OWN * ty + i] : 1.0f;
#pragma unroll
      for (int j = 0; j < KEYS; j++) kept.p[(OWN * ty + i) * PITCH + tx + TX * j] = s[i][j] * scale;
    }
    __syncthreads();
    soften(w, u, tile * TILE_KEYS, kept, sums);
#pragma unroll
    for (int b = 0; b < N; b++) {
      if (b >= slices_of(w.f)) break;
      const float *v = slices.next(w, u, seen); /* a barrier: probabilities are there */
#pragma unroll
      for (int i = 0; i < OWN; i++) factor[i] = kept.factor[OWN * ty + i];
      add_slice<CPT>(kept.p + OWN * ty * PITCH, factor, v, tx, acc[b]);
    }
  }

  __device__ __forceinline__ void run(const Job &w, const Unit &u) {
    const Seen seen = load_intervals(w, u, QUERIES);
    const Kept kept = kept_of(w, QUERIES);
    const int ty = threadIdx.x / TX, tx = threadIdx.x % TX;
    load_floats(w, u, QUERIES, slices_of(w.e) * SLICE + 4);
    if (HOW == BLOCKY && w.k_form == BLOCKS) round_queries(w, QUERIES, slices_of(w.e) * SLICE + 4);
    WalkOf<CHUNK> now = {0, 0};
    now.enter(w, u, seen, 0, blockIdx.z, gridDim.z);
    if (now.more()) {
      Slices<HOW> slices(now);
      find_cells<HOW == BLOCKY>(w, u, seen, now.chunk());
      slices.begin(w, u, seen);
      forget_peaks(w, QUERIES);
      clear(kept);
#pragma unroll
      for (float &sum : sums) sum = 0.0f;
      while (now.more()) {
        const int chunk = now.chunk();
        attend_tile(w, u, seen, now.tile, slices, kept);
        if (!now.step(w, u, seen, blockIdx.z, gridDim.z)) continue;
        fold_sums(kept, sums);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
          const int at = OWN * ty + i;
          settle_floats<N, CPT>(w, u, at, chunk, acc, i, Total{kept.top[at], kept.sum[at]}, total[i], tx);
        }
        clear(kept);
      }
    }
    if (w.partials) return;
    for (int i = warp_of(); i < queries_of(u); i += THREADS / 32)
      finish_query(w, w.out + ((int64_t)row_of(u, i) * w.h + head_of(u, i)) * w.f, area<Interval>(w.at.rows)[i],
                   area<float>(w.at.mixing) + warp_of() * w.f);
  }
};

/* Blocks beside each other on a multiprocessor, for which registers are kept few enough. */
template <int TY, int N> constexpr int BESIDE = TY == 2 && N == 2 ? 3 : 2;

template <int TY, int N, int HOW>
__global__ void __launch_bounds__(THREADS, BESIDE<TY, N>) attend_floats_kernel(const Job w) {
  for (int at = blockIdx.x;; at += gridDim.x) {
    const Unit u = unit_at(w, at, blockIdx.y);
    if (u.n_rows == 0) return;
    FloatUnit<TY, N, HOW> unit;
    unit.run(w, u);
    __syncthreads();
  }
}

template <int TY, int N>
void launch_floats(const Job &w, dim3 grid, cudaStream_t stream) {
  if (is_blocky(w)) launch(stream, attend_floats_kernel<TY, N, BLOCKY>, grid, dim3(THREADS), w.at.bytes, w);
  else if (w.narrow) launch(stream, attend_floats_kernel<TY, N, NARROW>, grid, dim3(THREADS), w.at.bytes, w);
  else launch(stream, attend_floats_kernel<TY, N, WIDE>, grid, dim3(THREADS), w.at.bytes, w);
}

/* MOST: slices of V, at most. */
template <int TY, int MOST>
void launch_narrowest(const Job &w, dim3 grid, cudaStream_t stream) {
  if constexpr (!PE_ONE_INSTANCE && TY != 4) {
    if (w.f <= 2 * SLICE) return launch_floats<TY, 2>(w, grid, stream);
    if (w.f <= 4 * SLICE && MOST > 4) return launch_floats<TY, 4>(w, grid, stream);
  }
  launch_floats<TY, MOST>(w, grid, stream);
}

} // namespace

void pe::attend_floats(const Job &w, int queries, dim3 grid, cudaStream_t stream) {
  if (queries == 8) launch_narrowest<2, 8>(w, grid, stream);
  else if (queries == 16) launch_narrowest<4, 8>(w, grid, stream);
  else launch_narrowest<8, 4>(w, grid, stream);
}

/* attention.h: what the kernels of attention share: the job of a node, units of work, which keys they walk and in which cells those lie.
 * Reference: pyengine/ops/attention.py: attention.
 *
 *   query   one head of one row
 *   unit    queries of one sequence and one key/value head: up to `rows` rows times `heads` heads of the group, numbered row by row
 *   chunk   CHUNK_KEYS keys (of floats FLOAT_CHUNK_KEYS, as on the CPU), aligned in the LOGICAL numbers of the keys; online softmax
 *           starts afresh in each, and chunks are merged in ascending order
 *   tile    TILE_KEYS keys, aligned likewise
 *
 * What happens to a query follows from its interval and the numbers of its keys alone. So it has the same bits in every unit, alone or
 * beside others, and however a prompt is cut: all kernels do the same operations on it in the same order (attention_tiles.h,
 * attention_softmax.h), and differ only in who does them. A masked key has probability 0; of keys and values that no query of the
 * unit sees nothing is read.
 */
#ifndef PE_CUDA_ATTENTION_H
#define PE_CUDA_ATTENTION_H

#include "cells.h"

namespace pe {

enum { TILE_KEYS = 64, CHUNK_KEYS = 512, FLOAT_CHUNK_KEYS = 256, CELL_KEYS = 256 /* whose cells are looked up together */ };
enum { COLUMNS = 32 /* elements of a block of columns of q, K or V */ };
enum { STRETCH = 256 /* elements of a cell that attention of floats has staged at once, where there are blocks */ };

/* Where the parts of a block's shared memory begin, in bytes; attention.cu lays them out. */
struct Areas {
  int cells, rows;          /* [CELL_KEYS] cells of the keys that are being loaded; [queries] intervals */
  int task, totals;         /* a unit and what it sees; [queries] of chunks so far */
  int q, q_scale, q_sum;    /* queries as halves, codes or floats; a scale for each; of codes sums of blocks */
  int k, v, stage_bytes;    /* loaded tiles, `stages` of them */
  int k_ready, k_scale, v_ready; /* a tile of blocks, unpacked; in attention of floats k_ready is a slice of K or V */
  int peaks, p, mixing;
  int most;                 /* [queries]: the largest logit so far, where stats are wanted */
  int k_pitch, v_pitch;     /* bytes between cells of blocks */
  int stages, bytes;
  bool one;                 /* V takes the place of K when that has been used: for cards with little shared memory */
};

/* How a tile gets into shared memory. */
enum Form {
  COPIED,   /* in memory as in shared memory, copied 16 bytes at a time while other tiles are used */
  GATHERED, /* any plain numbers at any distance, read one by one */
  BLOCKS,   /* copied as it is and unpacked there */
  CHANNELS, /* of K: a block holds a channel of 32 keys, copied and unpacked likewise */
};

struct Job {
  const char *q;
  int64_t q_row, q_head, q_element; /* bytes */
  Cache k, v;
  const int32_t *lo, *hi, *seq, *cells;
  int64_t cells_stride, n_cells;
  const float *sinks, *bias;        /* bias: [h][2 reach + 1], by the distance from a query to a key; or null */
  const int32_t *numbers;           /* of rows among the keys; null: their last key */
  float *out, *stats;               /* stats: [query][2], or null */
  float *partials, *tops;           /* split: [query][chunks][fp], [query][chunks][2]; null where a unit merges its chunks itself */
  float *mosts;                     /* split: [query][chunks], the largest logit of its block so far */
  pe_fault *fault;
  float scale, softcap;
  int32_t l, n_sequences;
  int32_t m, h, g, group, e, f, ne, nf; /* ne, nf: blocks of columns of K and V */
  int32_t rows, heads, head_tiles;  /* of a unit; units that share a group */
  int32_t chunks;                   /* of one query, at most */
  int32_t reach;                    /* of the bias */
  int64_t least, most;              /* keys of the queries whose turn it is: others are left as they are */
  Form k_form, v_form;
  bool narrow;                      /* in attention of floats: all of K and V is 16 bits wide and side by side */
  bool fine;                        /* in attention of halves: operands that are no halves are two, the second what the first leaves of them */
  Areas at;
};

/* Is K or V in blocks? */
inline bool is_blocky(const Job &w) { return in_blocks(w.k) || by_channel(w.k) || in_blocks(w.v); }

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

/* Two floats as a pair of halves, and what that leaves of them as another: together 22 bits, or all above 2^-25. */
__device__ __forceinline__ void split_halves(float low, float high, uint32_t &most, uint32_t &less) {
  most = pack_half2(low, high);
  const float2 held = unpack_half2(most);
  less = pack_half2(low - held.x, high - held.y);
}

struct AnyBytes { unsigned char byte[16]; };
__device__ __forceinline__ char *shared_bytes() { return (char *)shared<AnyBytes>().byte; }
template <class T> __device__ __forceinline__ T *area(int at) { return (T *)(shared_bytes() + at); }

/* ---- intervals ---- */

struct Interval { int lo, hi; };

__device__ __forceinline__ bool empty(Interval i) { return i.hi <= i.lo; }
/* Does another kernel attend for this row? */
__device__ __forceinline__ bool is_anothers(Interval i) { return i.hi < 0; }

/* The keys of a row; none where its numbers are out of range, which is a fault, or where it is another kernel's. */
__device__ __forceinline__ Interval interval_of(const Job &w, int row, bool say) {
  const int lo = w.lo[row], hi = w.hi[row];
  if (lo >= hi) return Interval{0, 0};
  int64_t value = 0, limit = 0;
  bool bad = false;
  if (lo < 0) bad = true, value = lo, limit = w.n_cells;
  else if (!w.cells && hi > w.n_cells) bad = true, value = hi, limit = w.n_cells;
  else if (w.cells && (int64_t)hi - lo > w.l) bad = true, value = (int64_t)hi - lo, limit = w.l;
  else if (w.cells && w.seq && (w.seq[row] < 0 || w.seq[row] >= w.n_sequences)) bad = true, value = w.seq[row], limit = w.n_sequences;
  if (bad && say) raise(w.fault, PE_BAD_VALUE, value, limit);
  if (bad) return Interval{0, 0};
  return (int64_t)hi - lo < w.least || (int64_t)hi - lo > w.most ? Interval{0, -1} : Interval{lo, hi};
}

template <int CHUNK = CHUNK_KEYS> __device__ __forceinline__ int first_chunk(Interval i) { return i.lo / CHUNK; }
template <int CHUNK = CHUNK_KEYS> __device__ __forceinline__ int last_chunk(Interval i) { return (i.hi - 1) / CHUNK; }
/* Does it hold a key of the n from `first` on? */
__device__ __forceinline__ bool meets(Interval i, int64_t first, int n) { return !empty(i) && i.lo - first < n && i.hi > first; }

/* ---- units ---- */

struct Unit {
  int row, n_rows, head, n_heads; /* head: of q */
  int64_t g;                      /* head of K and V */
  int sequence;
};

/* Rows of one sequence are cut every w.rows from where the sequence begins. By a warp: the first row of the block of rows number `at`,
 * or -1. */
__device__ __forceinline__ int find_rows(const Job &w, int at) {
  if (!w.seq || !w.cells) return (int64_t)at * w.rows < w.m ? at * w.rows : -1;
  const int lane = lane_of();
  int start = 0;
  for (int first = 0; first < w.m; first += 32) {
    const int row = first + lane;
    const bool fresh = row < w.m && (row == 0 || w.seq[row] != w.seq[row - 1]);
    const unsigned edges = __ballot_sync(0xffffffffu, fresh), below = edges & (0xffffffffu >> (31 - lane));
    const int own = below ? first + 31 - __clz((int)below) : start;
    const unsigned cuts = __ballot_sync(0xffffffffu, row < w.m && (row - own) % w.rows == 0);
    if (at < __popc(cuts)) {
      unsigned left = cuts;
      for (; at > 0; at--) left &= left - 1;
      return first + __ffs((int)left) - 1;
    }
    at -= __popc(cuts);
    start = __shfl_sync(0xffffffffu, own, 31);
  }
  return -1;
}

/* Unit number `at` of a key/value head; n_rows is 0 where there is none. By a warp. */
__device__ __forceinline__ Unit unit_at(const Job &w, int at, int g) {
  Unit u = {0, 0, 0, 0, g, 0};
  const int tile = at % w.head_tiles, row = find_rows(w, at / w.head_tiles);
  if (row < 0) return u;
  const int most = min(w.rows, w.m - row), first = tile * w.heads;
  u.row = row;
  u.n_rows = most;
  if (w.seq && w.cells) {
    u.sequence = w.seq[row];
    for (int i = 0; i < most; i += 32) {
      const unsigned other = __ballot_sync(0xffffffffu, i + lane_of() < most && w.seq[row + i + lane_of()] != u.sequence);
      if (!other) continue;
      u.n_rows = i + __ffs((int)other) - 1;
      break;
    }
  }
  u.head = g * w.group + first;
  u.n_heads = min(w.heads, w.group - first);
  return u;
}

/* Row and head of query i of a unit. */
__device__ __forceinline__ int row_of(const Unit &u, int i) { return u.row + i / u.n_heads; }
__device__ __forceinline__ int head_of(const Unit &u, int i) { return u.head + i % u.n_heads; }
__device__ __forceinline__ int queries_of(const Unit &u) { return u.n_rows * u.n_heads; }

/* What the distance from query i of a unit to a key adds to their score. */
__device__ __forceinline__ float bias_of(const Job &w, const Unit &u, int i, int key) {
  const int row = row_of(u, i), distance = key - (w.numbers ? w.numbers[row] : w.hi[row] - 1);
  return w.bias[(int64_t)head_of(u, i) * (2 * w.reach + 1) + w.reach + max(-w.reach, min(w.reach, distance))];
}

/* What all rows of a unit together see. */
struct Seen {
  int lo, hi;
  bool whole; /* every key between is seen by some row */
};

/* Intervals of the block's n queries into shared memory, and what they see together. By all threads, n at least; ends with a barrier. */
__device__ __forceinline__ Seen load_intervals(const Job &w, const Unit &u, int n) {
  Interval *to = area<Interval>(w.at.rows);
  if (const int i = threadIdx.x; i < n)
    to[i] = i < queries_of(u) ? interval_of(w, row_of(u, i), blockIdx.y == 0 && i % u.n_heads == 0) : Interval{0, 0};
  __syncthreads();
  int lo = 0x7fffffff, hi = 0, gaps = 0;
  for (int i = lane_of(); i < u.n_rows; i += 32) {
    const Interval own = to[i * u.n_heads], next = to[min(i + 1, u.n_rows - 1) * u.n_heads];
    if (!empty(own)) lo = min(lo, own.lo), hi = max(hi, own.hi);
    gaps |= empty(own) || empty(next) || max(own.lo, next.lo) > min(own.hi, next.hi);
  }
#pragma unroll
  for (int d = 16; d; d /= 2) {
    lo = min(lo, __shfl_xor_sync(0xffffffffu, lo, d));
    hi = max(hi, __shfl_xor_sync(0xffffffffu, hi, d));
  }
  return Seen{lo, hi, !__any_sync(0xffffffffu, gaps)};
}

/* The first chunk from `chunk` on of which any row of the unit sees a key, or -1. By a warp. */
template <int CHUNK> __device__ __forceinline__ int next_chunk(const Job &w, const Unit &u, const Seen &seen, int chunk) {
  if (seen.hi <= seen.lo || chunk > (seen.hi - 1) / CHUNK) return -1;
  if (seen.whole) return max(chunk, seen.lo / CHUNK);
  const Interval *rows = area<Interval>(w.at.rows);
  int best = 0x7fffffff;
  for (int i = lane_of(); i < u.n_rows; i += 32) {
    const Interval own = rows[i * u.n_heads];
    if (!empty(own) && last_chunk<CHUNK>(own) >= chunk) best = min(best, max(chunk, first_chunk<CHUNK>(own)));
  }
#pragma unroll
  for (int d = 16; d; d /= 2) best = min(best, __shfl_xor_sync(0xffffffffu, best, d));
  return best == 0x7fffffff ? -1 : best;
}

/* Walks the tiles of a unit, those chunks whose turn is `share` of `shares`. All warps walk alike. */
template <int CHUNK> struct WalkOf {
  int tile, turn; /* tile: -1 where there is none */

  __device__ __forceinline__ bool more() const { return tile >= 0; }
  __device__ __forceinline__ int chunk() const { return tile / (CHUNK / TILE_KEYS); }
  __device__ __forceinline__ void enter(const Job &w, const Unit &u, const Seen &seen, int from, int share, int shares) {
    int chunk = next_chunk<CHUNK>(w, u, seen, from);
    for (; chunk >= 0 && turn % shares != share; turn++)
      chunk = chunk == 0x7fffffff / CHUNK ? -1 : next_chunk<CHUNK>(w, u, seen, chunk + 1);
    turn++;
    tile = chunk < 0 ? -1 : max(chunk * (CHUNK / TILE_KEYS), seen.lo / TILE_KEYS);
  }
  /* true where the next tile is in another chunk, or there is none */
  __device__ __forceinline__ bool step(const Job &w, const Unit &u, const Seen &seen, int share, int shares) {
    if ((tile + 1) % (CHUNK / TILE_KEYS) && tile < (seen.hi - 1) / TILE_KEYS) { /* not the chunk's last one */
      tile++;
      return false;
    }
    if (chunk() == 0x7fffffff / CHUNK) tile = -1;
    else enter(w, u, seen, chunk() + 1, share, shares);
    return true;
  }
};
using Walk = WalkOf<CHUNK_KEYS>;

/* ---- cells ---- */

/* Cells of keys CELL_KEYS * at .. into shared memory: -1 for those that no row sees. By all threads, between barriers. GROUPED: of keys that may be
 * by channel, where those of a group lie side by side. */
template <bool GROUPED = false>
__device__ __forceinline__ void find_cells(const Job &w, const Unit &u, const Seen &seen, int at) {
  int32_t *to = area<int32_t>(w.at.cells);
  const Interval *rows = area<Interval>(w.at.rows);
  const int32_t *map = w.cells ? (const int32_t *)((const char *)w.cells + u.sequence * w.cells_stride) : nullptr;
  __syncthreads();
  for (int j = threadIdx.x; j < CELL_KEYS; j += blockDim.x) {
    const int key = at * CELL_KEYS + j; /* at most 2^31 - 1 */
    bool wanted = key >= seen.lo && key < seen.hi;
    if (wanted && !seen.whole) {
      wanted = false;
      for (int i = 0; i < u.n_rows && !wanted; i++) wanted = key >= rows[i * u.n_heads].lo && key < rows[i * u.n_heads].hi;
    }
    int32_t cell = !wanted ? -1 : map ? map[key % w.l] : key;
    if (wanted && (uint32_t)cell >= w.n_cells) {
      raise(w.fault, PE_BAD_VALUE, cell, w.n_cells);
      cell = -1;
    }
    if (GROUPED && w.k_form == CHANNELS && cell >= 0 && cell % GROUP_KEYS != j % GROUP_KEYS) raise(w.fault, PE_BAD_VALUE, cell, w.n_cells), cell = -1;
    to[j] = cell;
  }
  __syncthreads();
  for (int j = threadIdx.x; GROUPED && w.k_form == CHANNELS && j < CELL_KEYS; j += blockDim.x)
    if (j % GROUP_KEYS && to[j] >= 0 && to[j - 1] >= 0 && to[j] != to[j - 1] + 1) raise(w.fault, PE_BAD_VALUE, to[j], w.n_cells);
}

/* ---- files of kernels, called by attention.cu ---- */

/* Kernels are compiled for several numbers of columns, so that few columns take few registers. The emulator, which has no registers to
 * spare, has only the one for most. */
#if PE_EMULATED
#define PE_ONE_INSTANCE true
#else
#define PE_ONE_INSTANCE false
#endif

enum { FEW_QUERIES = 16, FEW_WARPS = 4 };

/* grid: units, heads of K and V, shares of the chunks. */
void attend_few(const Job &w, dim3 grid, cudaStream_t stream);
/* Make those rows again, each alone, whose results are not finite; areas are those of attend_few. */
void repair(const Job &w, cudaStream_t stream);
void attend_many(const Job &w, int queries, dim3 grid, cudaStream_t stream);
void attend_floats(const Job &w, int queries, dim3 grid, cudaStream_t stream); /* 8, 16 or 32 queries a block */

} // namespace pe

#endif

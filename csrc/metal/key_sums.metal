/* key_sums.metal: what the queries of an attention give to each key, added to the key's sums.
 * Reference: pyengine/ops/attention.py: key_sums.
 *
 * Queries are made ready by attention_queries (attention.metal), which has scaled them, and over keys in blocks rounded them to codes. A
 * threadgroup of 128 owns the sums of KEYS places of one key/value head and sequence. It walks the rows in order, 128 at a time, and keeps a
 * list of those that are of its sequence, have weights and see one of its places; a threadgroup that finds none reads nothing else. Of
 * 16 queries of the list at once a thread makes the scores of one key and every (128 / KEYS)-th of them, elements ascending, then their
 * powers; then the thread of a key adds them, one query after the other. So a sum has the same bits however a prompt is cut, and over
 * caches of plain numbers the CPU's, where attention's are.
 *
 * Threadgroup memory: keys [KEYS][e in whole 4s, + 4] floats, powers, logits and the list: up to 28 KB. 2 e operations a query and key; K is read
 * once, queries once for KEYS keys.
 */
#include "activations.h"
#include "cells.h"

enum { THREADS = 128, TOGETHER = 16, CHANNELS = 6 };

PE_CONSTANT(int, K_FORMAT, 0);
PE_CONSTANT(int, KEYS, 1);
PE_CONSTANT(bool, SEQUENCED, 2);
PE_CONSTANT(bool, CAPPED, 3);

struct sums_args {
  int m, heads, group, e, ep, eq, queries; /* as attention_queries has them */
  int l, n_cells, sequences, cells_stride;
  int channels, n_keys, pitch;             /* n_keys: of a head in `sums` */
  int kinds[6];
  float softcap;
  long k_head, k_cell, k_step;             /* bytes */
};

constant float LARGE = 0.01f;              /* of a row's largest probability */

/* Where areas of the threadgroup's memory begin: of the list flags, rows, places of first keys and numbers of keys; cells; logits less the
 * largest one of their query and e^that [16][KEYS + 1]; keys. */
enum { AT_FLAGS = 0, AT_ROWS = THREADS, AT_FIRST = 2 * THREADS, AT_COUNTS = 3 * THREADS, AT_CELLS = 4 * THREADS };
static inline int at_less() { return AT_CELLS + KEYS; }
static inline int at_powers() { return at_less() + TOGETHER * (KEYS + 1); }
static inline int at_keys() { return (at_powers() + TOGETHER * (KEYS + 1) + 3) / 4 * 4; }

static inline threadgroup int *ints(threadgroup float *shared, int at) { return (threadgroup int *)(shared + at); }

/* Is a row of a sequence, with keys, and right? The thread that `says` so notes why not. */
static inline bool is_right(constant sums_args &a, int lo, int hi, int sequence, bool says, device pe_fault *fault) {
  const long keys = (long)hi - lo;
  const bool known = sequence >= 0 && sequence < a.sequences;
  if (lo >= hi) return false;
  if (lo >= 0 && keys <= a.l && known) return true;
  if (says) raise_fault(fault, FAULT_BAD_VALUE, lo < 0 ? (long)lo : known ? keys : (long)sequence, known ? a.l : a.sequences);
  return false;
}

/* Does a row whose keys begin at place `first` see place `at`? */
static inline bool sees(int first, int keys, int at, int l) {
  const int d = at - first;
  return (d < 0 ? d + l : d) < keys;
}

/* Element i of a cell, in any format. */
static inline float element_of(constant sums_args &a, device const uchar *cell, int i) {
  if (!is_block(K_FORMAT)) return load_number(K_FORMAT, cell + i * a.k_step);
  device const uchar *block = cell + i / 32 * block_bytes(K_FORMAT);
  const float d = (float)*(device const half *)block;
  if (K_FORMAT == PE_Q8_0) return (float)(int)(char)block[2 + i % 32] * d;
  const int code = code_of(K_FORMAT, block, i % 32);
  if (K_FORMAT == PE_Q4_0) return (float)(code - 8) * d;
  return fma((float)code, d, (float)*(device const half *)(block + 2));
}

/* Element `at` of 8 keys by channel, `pitch` apart; 0 where there is none. Its block is the same as long as the group is. head: of the cache. */
static inline void load_channel(constant sums_args &a, device const uchar *head, threadgroup const int *cells, int at, threadgroup float *to) {
  const int format = channel_format(K_FORMAT);
  device const uchar *block = head;
  int group = -1;
  float d = 0.0f, m = 0.0f;
  for (int j = 0; j < 8; j++) {
    const int cell = cells[j];
    const bool there = cell >= 0 && cell < a.n_cells && at < a.e;
    if (there && cell / GROUP_KEYS != group) {
      group = cell / GROUP_KEYS;
      block = head + group * GROUP_KEYS * a.k_cell + at * block_bytes(format);
      d = (float)((device const half *)block)[0], m = (float)((device const half *)block)[1];
    }
    to[j * a.pitch] = there ? fma((float)code_of(format, block, cell % GROUP_KEYS), d, m) : 0.0f;
  }
}

kernel void key_sums_tiles(constant sums_args &a [[buffer(0)]], device float *sums [[buffer(1)]], device const float *queries [[buffer(2)]],
                           device const uchar *k [[buffer(3)]], device const int *lo [[buffer(4)]], device const int *hi [[buffer(5)]],
                           device const int *cells [[buffer(6)]], device const int *seq [[buffer(7)]], device const float *stats [[buffer(8)]],
                           device const float *weights [[buffer(9)]], device pe_fault *fault [[buffer(10)]],
                           threadgroup float *shared [[threadgroup(0)]], uint3 at_ [[threadgroup_position_in_grid]],
                           uint index_ [[thread_index_in_threadgroup]]) {
  const int index = (int)index_, head = (int)at_.y, sequence = (int)at_.z, first = KEYS * (int)at_.x, end = min(first + KEYS, a.l);
  const int key = index % KEYS, lane = index / KEYS, lanes = THREADS / KEYS, place = first + key;
  threadgroup int *rows = ints(shared, AT_ROWS), *firsts = ints(shared, AT_FIRST), *counts = ints(shared, AT_COUNTS);
  threadgroup float *less = shared + at_less(), *powers = shared + at_powers(), *keys = shared + at_keys();
  const bool mine = index < KEYS && place < a.l;
  device float *to = sums + ((long)head * a.n_keys + (long)sequence * a.l + place) * a.channels;
  float acc[CHANNELS] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  bool loaded = false;
  for (int base = 0; base < a.m; base += THREADS) {
    /* rows that count, in order */
    const int row = base + index;
    int start = 0, seen = 0, wanted = 0;
    if (row < a.m) {
      bool any = false;
      for (int c = 0; c < a.channels; c++) any = any || weights[(long)row * a.channels + c] != 0.0f;
      const int own = SEQUENCED ? seq[row] : 0;
      if (any && is_right(a, lo[row], hi[row], own, at_.x + at_.y + at_.z == 0, fault) && own == sequence) {
        start = lo[row] % a.l, seen = hi[row] - lo[row];
        wanted = sees(start, seen, first, a.l) || (start >= first && start < end); /* the first place, or what begins behind it */
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    ints(shared, AT_FLAGS)[index] = wanted;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int number = 0, n = 0;
    for (int i = 0; i < THREADS; i++) {
      if (i < index) number += ints(shared, AT_FLAGS)[i];
      n += ints(shared, AT_FLAGS)[i];
    }
    if (wanted) rows[number] = row, firsts[number] = start, counts[number] = seen;
    if (n && !loaded) {
      for (int j = index; j < KEYS; j += THREADS) ints(shared, AT_CELLS)[j] = first + j < a.l ? cells[(long)sequence * a.cells_stride + first + j] : -1;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = index; by_channel(K_FORMAT) && i < KEYS / 8 * a.pitch; i += THREADS)
        load_channel(a, k + head * a.k_head, ints(shared, AT_CELLS) + i / a.pitch * 8, i % a.pitch, keys + i / a.pitch * 8 * a.pitch + i % a.pitch);
      for (int i = index; !by_channel(K_FORMAT) && i < KEYS * a.pitch; i += THREADS) {
        const int cell = ints(shared, AT_CELLS)[i / a.pitch], j = i % a.pitch;
        keys[i] = cell >= 0 && cell < a.n_cells && j < a.e ? element_of(a, k + head * a.k_head + cell * a.k_cell, j) : 0.0f;
      }
      for (int c = 0; mine && c < a.channels; c++) acc[c] = to[c];
      loaded = true;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int from = 0; from < n * a.group; from += TOGETHER) {
      const int some = min((int)TOGETHER, n * a.group - from);
      for (int i = lane; i < some; i += lanes) {
        const int own = (from + i) / a.group, t = (from + i) % a.group;
        const long query = (long)rows[own] * a.group + t;
        device const float *q = queries + ((long)head * a.queries + query) * a.eq;
        threadgroup const float *y = keys + key * a.pitch;
        float s = 0.0f;
        for (int j = 0; j < a.e; j++) s = fma(q[j], y[j], s);
        if (is_block(K_FORMAT)) s *= q[a.ep];
        if (CAPPED) s = tanh_of(s * (1.0f / a.softcap)) * a.softcap;
        const bool there = place < a.l && sees(firsts[own], counts[own], place, a.l);
        const int cell = ints(shared, AT_CELLS)[key];
        if (there && (cell < 0 || cell >= a.n_cells)) raise_fault(fault, FAULT_BAD_VALUE, cell, a.n_cells);
        const float below = s - stats[2 * ((long)rows[own] * a.heads + head * a.group + t)];
        less[i * (KEYS + 1) + key] = there ? below : 0.0f;
        powers[i * (KEYS + 1) + key] = there ? exp_of(below) : 0.0f;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int i = 0; mine && i < some; i++) {
        const int own = rows[(from + i) / a.group];
        const float total = stats[2 * ((long)own * a.heads + head * a.group + (from + i) % a.group) + 1];
        const float power = powers[i * (KEYS + 1) + key], share = power * (1.0f / total);
        for (int c = 0; c < a.channels; c++) {
          const float weight = weights[(long)own * a.channels + c];
          if (weight == 0.0f) continue;
          float y = share;
          if (a.kinds[c] == 1) y = share * share;
          else if (a.kinds[c] == 2) y = power < LARGE ? 0.0f : 1.0f;
          else if (a.kinds[c] == 3) y = share * (log(total) - less[i * (KEYS + 1) + key]);
          acc[c] = fma(weight, y, acc[c]);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
  for (int c = 0; mine && loaded && c < a.channels; c++) to[c] = acc[c];
}

/* cache_groups.cu: groups of 32 keys and values that a cache holds in full, into cells of which keys have scales by channel.
 * Reference: pyengine/ops/groups.py: cache_groups.
 *
 * Block (x, y) has 4 warps and owns group x of key/value head y. Keys by channel: warp i has channels 32 i, 32 i + 128 ..: it reads them of the
 * 32 keys, 64 bytes of a key in F16, and then has a lane for each key, which with the others makes a channel's block; 32 blocks are
 * written side by side. Keys that are not by channel, and values: warp i has cells i, i + 4 .. one after the other, mixed where they are in
 * blocks. Bytes are those of csrc/cpu/cache_groups.c: store_block makes them.
 *
 * Shared memory: of each warp [32 keys][33] floats, so that neither way of access meets a bank twice, or one cell; and the blocks of these, which
 * are written side by side.
 * A group is read once and written once. Of 128 elements in F16 that is 16 KB of a head, and Q2_1's search takes some 30 sums over lanes, 160
 * shuffles, for each of 128 channels and values: 40,000 of a warp, of which a multiprocessor does one in two clocks, 0.05 ms. A prompt of 8192
 * tokens of 8 heads has 2048 groups, 15 for each multiprocessor of an H200: 0.8 ms a layer for kivi2, of kivi4 a tenth; a token has none but every
 * 32nd.
 */
#include "cells.h"

namespace {

using namespace pe;

enum { WARPS = 4, MOST_ELEMENTS = 1024, COLUMNS = 32, BLOCKS = 8 }; /* BLOCKS: of a multiprocessor, 64 registers a thread */

struct Groups {
  Cache k, v, k_full, v_full;
  const int32_t *source, *target;
  pe_fault *fault;
};

/* Of a warp. */
struct Room {
  union {
    float keys[GROUP_KEYS][COLUMNS + 1];
    float cell[MOST_ELEMENTS];
  };
  uint32_t blocks[MOST_ELEMENTS / 32 * PE_BYTES_Q8_0 / 4];
};
struct Rooms { Room of[WARPS]; };

__device__ __forceinline__ int lane_of() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / 32; }

/* n bytes that a warp has made, side by side; blocks are aligned to 2. */
__device__ __forceinline__ void write_blocks(char *to, const uint32_t *from, int n) {
  const bool words = (((uintptr_t)to | n) & 3) == 0;
  for (int i = lane_of(); words && i < n / 4; i += 32) ((uint32_t *)to)[i] = from[i];
  for (int i = lane_of(); !words && i < n / 2; i += 32) ((uint16_t *)to)[i] = ((const uint16_t *)from)[i];
}

__device__ void write_channels(const Cache &from, int64_t source, const Cache &to, int64_t target, Room &room) {
  const int32_t format = channel_format(to.dtype);
  const int bytes = cell_format_of(format).bytes;
  char *group = cell_at(to, blockIdx.y, target);
  for (int first = COLUMNS * warp_of(); first < to.elements; first += COLUMNS * WARPS) {
#pragma unroll 8 /* loads in flight; all 32 would spill */
    for (int j = 0; j < GROUP_KEYS; j++)
      room.keys[j][lane_of()] = load_number(from.dtype, cell_at(from, blockIdx.y, source + j) + (first + lane_of()) * from.element);
    __syncwarp();
    for (int c = 0; c < COLUMNS; c++) store_block((char *)room.blocks + c * bytes, format, room.keys[lane_of()][c]);
    __syncwarp();
    write_blocks(group + first * bytes, room.blocks, COLUMNS * bytes);
    __syncwarp();
  }
}

__device__ void copy_cells(const Cache &from, int64_t source, const Cache &to, int64_t target, Room &room) {
  const int n = to.elements / 32 * cell_format_of(to.dtype).bytes; /* of blocks */
  float *x = room.cell;
  for (int j = warp_of(); j < GROUP_KEYS; j += WARPS) {
    const char *full = cell_at(from, blockIdx.y, source + j);
    for (int i = lane_of(); i < to.elements; i += 32) x[i] = load_number(from.dtype, full + i * from.element);
    __syncwarp();
    char *cell = cell_at(to, blockIdx.y, target + j);
    if (in_blocks(to)) {
      mix(x, to.elements);
      store_cell((char *)room.blocks, to.dtype, x, to.elements);
      __syncwarp();
      write_blocks(cell, room.blocks, n);
    } else {
      store_cell(cell, to.dtype, x, to.elements);
    }
    __syncwarp();
  }
}

/* Does a group begin at this cell? Where none does, one thread says so. */
__device__ __forceinline__ bool begins(const Cache &c, int cell, pe_fault *fault) {
  if (cell >= 0 && cell % GROUP_KEYS == 0 && cell + GROUP_KEYS <= c.cells) return true;
  if (threadIdx.x == 0 && blockIdx.y == 0) raise(fault, PE_BAD_VALUE, cell, c.cells);
  return false;
}

__global__ void __launch_bounds__(32 * WARPS, BLOCKS) cache_groups_kernel(const Groups w) {
  const int target = w.target[blockIdx.x];
  if (target < 0) return;
  const int source = w.source[blockIdx.x];
  if (!begins(w.k_full, source, w.fault) || !begins(w.k, target, w.fault)) return;
  Room &room = shared<Rooms>().of[warp_of()];
  if (by_channel(w.k)) write_channels(w.k_full, source, w.k, target, room);
  else copy_cells(w.k_full, source, w.k, target, room);
  copy_cells(w.v_full, source, w.v, target, room);
}

pe_status check_full(const char *name, const pe_tensor *t, pe_stream *s) {
  const pe_status bad = check_cells("cache_groups", name, t, true, s);
  if (bad || cell_format_of(t->dtype).elements == 1) return bad;
  return pe_fail(s, PE_NO_KERNEL, "cache_groups: '%s' has dtype %d; plain numbers are possible", name, t->dtype);
}

} // namespace

PE_KERNEL(cuda, cache_groups)(const pe_tensor *k, const pe_tensor *v, const pe_tensor *k_full, const pe_tensor *v_full, const pe_tensor *source,
                              const pe_tensor *target, const pe_tensor *out0, const pe_tensor *out1, const pe_cache_groups_params *p,
                              pe_stream *s) {
  (void)p, (void)out0, (void)out1; /* the caches themselves */
  pe_status bad = check_keys("cache_groups", "k", k, true, s);
  if (!bad) bad = check_cells("cache_groups", "v", v, true, s);
  if (!bad) bad = check_full("k_full", k_full, s);
  if (!bad) bad = check_full("v_full", v_full, s);
  if (!bad && (k->shape[2] > MOST_ELEMENTS || v->shape[2] > MOST_ELEMENTS))
    bad = pe_fail(s, PE_NO_KERNEL, "cache_groups: heads of %lld and %lld elements, at most %d are possible", (long long)k->shape[2],
                  (long long)v->shape[2], (int)MOST_ELEMENTS);
  const int64_t n = source->shape[0], g = k->shape[0];
  if (bad || n * g == 0) return bad;
  const Groups w = {cache_of(k), cache_of(v), cache_of(k_full), cache_of(v_full), (const int32_t *)source->data,
                    (const int32_t *)target->data, fault(s)};
  launch(stream(s), cache_groups_kernel, dim3((unsigned)n, (unsigned)g), dim3(32 * WARPS), sizeof(Rooms), w);
  return PE_OK;
}

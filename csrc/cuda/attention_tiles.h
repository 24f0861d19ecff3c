/* attention_tiles.h: tiles of 64 keys in shared memory, and products of a warp's 16 queries with them on tensor cores.
 *
 * A tile of halves is [blocks of 32 columns][64 places][64 bytes]; place i of K is key i. Every 8 places of a block of columns are 512
 * bytes without a gap: what the 32 lanes of a warp copy with one request from 8 cells, and later read with one.
 *
 *   Scores, m16n8k16 (g = lane / 4, t = lane % 4): lane (g, t) takes bytes 16 t .. 16 t + 15 of key g, eight elements, for two mma.
 *   So in the k of an mma, 2 t, 2 t + 1, 2 t + 8, 2 t + 9 are elements 8 t + 4 j .. 8 t + 4 j + 3 of the block (j = 0, 1), in q too.
 *
 *   Values: k is the key, n a column. Column n of mma i (0 .. 3) is element 4 n + i of the block, so lane (g, t) takes 8 bytes of each of
 *   its four keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9, and holds in its sums elements 8 t .. 8 t + 7 of queries g and g + 8. Places of V
 *   are permuted within 16 keys, so that a warp reads 256 bytes without a gap: place 4 s + t is the s-th of the keys of t. In places with
 *   t >= 2 the two halves of the 64 bytes are exchanged: 16 lanes' 8 bytes then lie in different banks.
 *
 * Keys in blocks stay codes of 8 bits, [blocks of columns][64 keys][32 bytes]: one block is the k of m16n8k32, and lane (g, t) takes
 * bytes 8 t .. 8 t + 7 of key g, elements 4 t .. 4 t + 3 and 16 + 4 t .. 16 + 4 t + 3: words of a block that 8 keys' lanes read without
 * meeting a bank twice, cells being 16 bytes more than a multiple of 32 apart. Queries are codes too, with one scale each; the sum of a
 * block is exact (it begins at 1.5 * 2^23, so that its bits are those of a float), and scores are those of csrc/cpu/attention.c bit for
 * bit. Values in blocks become halves. Keys by channel do too, two for each number: where a tile is unpacked a lane has a channel, and writes 2
 * of the 64 bytes that a warp writes of a key.
 */
#ifndef PE_CUDA_ATTENTION_TILES_H
#define PE_CUDA_ATTENTION_TILES_H

#include "attention.h"

namespace pe {

enum { HALF_TILE = TILE_KEYS * 64 /* bytes of a block of columns of halves */, CODE_TILE = TILE_KEYS * 32 };

__device__ __forceinline__ int place_of_value(int key) { return key / 16 * 16 + (key / 8 % 2 * 2 + key % 2) * 4 + key % 8 / 2; }
__device__ __forceinline__ int value_of_place(int place) {
  const int s = place / 4 % 4;
  return place / 16 * 16 + place % 4 * 2 + s % 2 + s / 2 * 8;
}

/* Bytes of 16-byte part `part` in a place of V. */
__device__ __forceinline__ int part_of_value(int place, int part) { return (part ^ (place & 2)) * 16; }

/* ---- loading ---- */

/* Elements first .. first + 7 of a cell as halves; 0 from n on. */
__device__ __forceinline__ uint4 gather_eight(const Cache &c, const char *cell, int first, int n) {
  float x[8];
  if (c.dtype == PE_F32 && c.element == 4 && n >= 8 && ((uintptr_t)(cell + 4 * first) & 15) == 0) {
    const float4 a = *(const float4 *)(cell + 4 * first), b = *(const float4 *)(cell + 4 * first + 16);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = i < n ? load_number(c.dtype, cell + (first + i) * c.element) : 0.0f;
  }
  return make_uint4(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]), pack_half2(x[4], x[5]), pack_half2(x[6], x[7]));
}

/* Copy blocks as they are: n bytes a cell, STEP at a time, cells `pitch` bytes apart. */
template <int STEP>
__device__ __forceinline__ void copy_cells(const Cache &c, int64_t head, const int32_t *cells, int n, int pitch, char *to) {
  const int parts = n / STEP;
  for (int i = again(threadIdx.x); i < TILE_KEYS * parts; i += blockDim.x) {
    const int key = i / parts, at = i % parts * STEP;
    const char *from = cell_at(c, head, max(0, cells[key])) + at;
    char *dest = to + key * pitch + at;
    if (cells[key] < 0) { /* zeros: codes and scales */
      for (int j = 0; j < STEP; j += 2) *(uint16_t *)(dest + j) = 0;
    } else if (STEP == 16) cp_async16(dest, from);
    else if (STEP == 8) cp_async8(dest, from);
    else if (STEP == 4) cp_async4(dest, from);
    else *(uint16_t *)dest = *(const uint16_t *)from;
  }
}

/* The cell where group `h` of a tile begins, or -1 where no key of it is wanted. By a warp. */
__device__ __forceinline__ int group_of_cells(const int32_t *cells, int h) {
  const int cell = cells[GROUP_KEYS * h + lane_of()];
  const unsigned wanted = __ballot_sync(0xffffffffu, cell >= 0);
  return wanted ? __shfl_sync(0xffffffffu, cell, __ffs((int)wanted) - 1) / GROUP_KEYS * GROUP_KEYS : -1;
}

/* Copy channels first .. first + n - 1 of a tile's groups of keys as they are, [group][n] blocks; zeros where no key is wanted. By all threads. */
__device__ __forceinline__ void copy_groups(const Cache &c, int64_t head, const int32_t *cells, int first, int n, char *to) {
  const int bytes = cell_format_of(channel_format(c.dtype)).bytes, parts = n * bytes / 16;
#pragma unroll
  for (int h = 0; h < TILE_KEYS / GROUP_KEYS; h++) {
    const int begin = group_of_cells(cells, h);
    const char *from = begin < 0 ? c.data : cell_at(c, head, begin) + first * bytes;
    for (int i = again(threadIdx.x); i < parts; i += blockDim.x) cp_async16(to + (h * parts + i) * 16, from + (begin < 0 ? 0 : 16 * i), begin >= 0);
  }
}

/* Begin to load a tile of K or V. cells: of its 64 keys. By all threads; a group of copies is not closed. */
template <bool VALUES>
__device__ __forceinline__ void load_tile(const Cache &c, Form form, int64_t head, const int32_t *cells, int pitch, char *to) {
  if (form == BLOCKS) {
    const pe_format f = cell_format_of(c.dtype);
    const int n = c.elements / f.elements * f.bytes, apart = (int)(c.cell | c.head | (int64_t)(uintptr_t)c.data | n);
    if (apart % 16 == 0) copy_cells<16>(c, head, cells, n, pitch, to);
    else if (apart % 8 == 0) copy_cells<8>(c, head, cells, n, pitch, to);
    else if (apart % 4 == 0) copy_cells<4>(c, head, cells, n, pitch, to);
    else copy_cells<2>(c, head, cells, n, pitch, to);
    return;
  }
  const int lane = again(lane_of()), g = lane / 4, t = lane % 4, columns = (c.elements + COLUMNS - 1) / COLUMNS;
  for (int i = warp_of(); i < 8 * columns; i += blockDim.x / 32) {
    const int place = i % 8 * 8 + g, cell = cells[VALUES ? value_of_place(place) : place], first = i / 8 * COLUMNS + 8 * t;
    const bool valid = cell >= 0 && first < c.elements;
    const char *from = valid ? cell_at(c, head, cell) : c.data;
    char *dest = to + i / 8 * HALF_TILE + place * 64 + (VALUES ? part_of_value(place, t) : t * 16);
    if (form == COPIED) cp_async16(dest, from + (valid ? 2 * first : 0), valid);
    else *(uint4 *)dest = valid ? gather_eight(c, from, first, c.elements - first) : make_uint4(0, 0, 0, 0);
  }
}

/* Two bfloat16 to two halves: exact from 2^-14 to 65504, which is what lies in caches. */
__device__ __forceinline__ uint32_t halves_of_bf16(uint32_t x) {
  const float2 v = unpack_bf162(x);
  return pack_half2(v.x, v.y);
}

/* What this thread has copied by load_tile becomes halves, in place. Before the barrier. */
template <bool VALUES>
__device__ __forceinline__ void narrow_tile(const Cache &c, char *tile) {
  const int lane = again(lane_of()), g = lane / 4, t = lane % 4, own = g * 64 + (VALUES ? part_of_value(g, t) : t * 16);
  const int columns = (c.elements + COLUMNS - 1) / COLUMNS;
  for (int i = warp_of(); i < 8 * columns; i += blockDim.x / 32) {
    uint4 *at = (uint4 *)(tile + i / 8 * HALF_TILE + i % 8 * 512 + own);
    const uint4 x = *at;
    *at = make_uint4(halves_of_bf16(x.x), halves_of_bf16(x.y), halves_of_bf16(x.z), halves_of_bf16(x.w));
  }
}

/* ---- unpacking blocks ---- */

/* Blocks are aligned to 2 bytes; those of a warp's lanes at one time all to 4, or none. */
__device__ __forceinline__ uint32_t word_at(const char *p) {
  if (((uintptr_t)p & 3) == 0) return *(const uint32_t *)p;
  return *(const uint16_t *)p | (uint32_t)*(const uint16_t *)(p + 2) << 16;
}

/* Four codes of Q4_0 less 8: bytes do not carry into each other. */
__device__ __forceinline__ uint32_t less_8(uint32_t nibbles) { return (nibbles + 0x78787878u) ^ 0x80808080u; }

/* Codes 4 i .. 4 i + 3 of a block, as signed bytes. Those of Q4_1 and Q2_1 are 0 .. 15 and 0 .. 3. */
__device__ __forceinline__ uint32_t four_codes_of(const char *block, int32_t dtype, int i) {
  if (dtype == PE_Q8_0) return word_at(block + 2 + 4 * i);
  if (dtype == PE_Q2_1) {
    const uint32_t four = (uint8_t)block[4 + i];
    return (four | four << 6 | four << 12 | four << 18) & 0x03030303u;
  }
  const uint32_t x = word_at(block + (dtype == PE_Q4_0 ? 2 : 4) + 4 * (i % 4)) >> (i / 4 * 4) & 0x0f0f0f0fu;
  return dtype == PE_Q4_0 ? less_8(x) : x;
}

/* Codes 4 t .. 4 t + 3 and 16 + 4 t .. of a block, likewise. */
__device__ __forceinline__ uint2 codes_of(const char *block, int32_t dtype, int t) {
  if (dtype == PE_Q8_0) return make_uint2(word_at(block + 2 + 4 * t), word_at(block + 18 + 4 * t));
  if (dtype == PE_Q2_1) return make_uint2(four_codes_of(block, PE_Q2_1, t), four_codes_of(block, PE_Q2_1, 4 + t));
  const uint32_t both = word_at(block + (dtype == PE_Q4_0 ? 2 : 4) + 4 * t);
  const uint2 x = make_uint2(both & 0x0f0f0f0fu, both >> 4 & 0x0f0f0f0fu);
  return dtype == PE_Q4_0 ? make_uint2(less_8(x.x), less_8(x.y)) : x;
}

__device__ __forceinline__ float scale_of(const char *block) { return from_half(*(const uint16_t *)block); }
__device__ __forceinline__ bool has_least(int32_t dtype) { return dtype == PE_Q4_1 || dtype == PE_Q2_1; }
__device__ __forceinline__ float least_of(const char *block, int32_t dtype) {
  return has_least(dtype) ? from_half(*(const uint16_t *)(block + 2)) : 0.0f;
}

/* A tile of keys in blocks: codes, scales [block of columns][key], and minima, if any, behind all scales. */
__device__ __forceinline__ void unpack_keys(const Job &w, const char *from) {
  char *codes = area<char>(w.at.k_ready);
  float *scales = area<float>(w.at.k_scale);
  const int bytes = cell_format_of(w.k.dtype).bytes, thread = again(threadIdx.x), t = thread % 4;
  for (int i = thread / 4; i < TILE_KEYS * w.ne; i += blockDim.x / 4) {
    const int key = i % TILE_KEYS, b = i / TILE_KEYS;
    const char *block = from + key * w.at.k_pitch + b * bytes;
    *(uint2 *)(codes + b * CODE_TILE + key * 32 + t * 8) = codes_of(block, w.k.dtype, t);
    if (t == 0) scales[i] = scale_of(block);
    if (t == 1 && has_least(w.k.dtype)) scales[i + TILE_KEYS * w.ne] = least_of(block, w.k.dtype);
  }
}

/* Two halves 1152 + code become code * d + m; less: what a half leaves of that, 19 bits and less. */
__device__ __forceinline__ uint32_t scaled(uint32_t codes, float d, float m, uint32_t &less) {
#if defined(__CUDA_ARCH__)
  half2 x, scale = __float2half2_rn(d);
  memcpy(&x, &codes, 4);
  x = __hsub2(x, __float2half2_rn(1152.0f));
  half2 most = __hmul2_rn(x, scale), rest = __hfma2(x, scale, __hneg2(most)); /* exact */
  if (m != 0.0f) { /* Knuth's sum of two: exact as well */
    const half2 more = __float2half2_rn(m), sum = __hadd2_rn(most, more), part = __hsub2_rn(sum, most);
    rest = __hadd2_rn(rest, __hadd2_rn(__hsub2_rn(most, __hsub2_rn(sum, part)), __hsub2_rn(more, part)));
    most = sum;
  }
  memcpy(&codes, &most, 4);
  memcpy(&less, &rest, 4);
#else
  const float2 x = unpack_half2(codes);
  split_halves((x.x - 1152.0f) * d, (x.y - 1152.0f) * d, codes, less);
  if (m != 0.0f) {
    const float2 most = unpack_half2(codes), rest = unpack_half2(less);
    uint32_t left;
    split_halves(most.x + m, most.y + m, codes, left);
    const float2 lost = unpack_half2(left);
    less = pack_half2(rest.x + lost.x, rest.y + lost.y);
  }
#endif
  return codes;
}

/* Four codes times d, plus m, as halves: the bits 0x6400 + n are the half 1024 + n. */
__device__ __forceinline__ uint2 halves_of_codes(uint32_t codes, float d, float m, uint2 &less) {
  codes ^= 0x80808080u;
  const uint32_t low = scaled(__byte_perm(codes, 0x64646464u, 0x4140), d, m, less.x);
  return make_uint2(low, scaled(__byte_perm(codes, 0x64646464u, 0x4342), d, m, less.y));
}

/* A tile of keys by channel becomes halves, behind all of them what they leave. A warp has a group's 32 channels. */
__device__ __forceinline__ void unpack_groups(const Job &w, const char *from) {
  const int32_t format = channel_format(w.k.dtype);
  const int bytes = cell_format_of(format).bytes, behind = w.ne * HALF_TILE / 2, lane = again(lane_of());
  for (int i = warp_of(); i < TILE_KEYS / GROUP_KEYS * w.ne; i += blockDim.x / 32) {
    const int h = i % (TILE_KEYS / GROUP_KEYS), b = i / (TILE_KEYS / GROUP_KEYS);
    const char *block = from + (h * w.e + b * COLUMNS + lane) * bytes;
    const float d = scale_of(block), m = least_of(block, format);
    uint16_t *to = area<uint16_t>(w.at.k_ready) + (b * TILE_KEYS + h * GROUP_KEYS) * COLUMNS + lane;
#pragma unroll 2
    for (int four = 0; four < GROUP_KEYS / 4; four++, to += 4 * COLUMNS) {
      uint2 less;
      const uint2 x = halves_of_codes(four_codes_of(block, format, four), d, m, less);
      to[0] = (uint16_t)x.x, to[COLUMNS] = (uint16_t)(x.x >> 16), to[2 * COLUMNS] = (uint16_t)x.y, to[3 * COLUMNS] = (uint16_t)(x.y >> 16);
      uint16_t *rest = to + behind;
      rest[0] = (uint16_t)less.x, rest[COLUMNS] = (uint16_t)(less.x >> 16), rest[2 * COLUMNS] = (uint16_t)less.y, rest[3 * COLUMNS] = (uint16_t)(less.y >> 16);
    }
  }
}

/* A tile of values in blocks becomes halves, behind all of them what they leave. */
__device__ __forceinline__ void unpack_values(const Job &w, const char *from) {
  char *to = area<char>(w.at.v_ready);
  const int bytes = cell_format_of(w.v.dtype).bytes, thread = again(threadIdx.x), t = thread % 4;
  for (int i = thread / 4; i < TILE_KEYS * w.nf; i += blockDim.x / 4) {
    const int place = i % TILE_KEYS, key = value_of_place(place), b = i / TILE_KEYS;
    const char *block = from + key * w.at.v_pitch + b * bytes;
    const uint2 x = codes_of(block, w.v.dtype, t);
    const float d = scale_of(block), m = least_of(block, w.v.dtype);
    char *dest = to + b * HALF_TILE + place * 64 + t % 2 * 8, *behind = dest + w.nf * HALF_TILE;
    const int near = part_of_value(place, t / 2), far = part_of_value(place, 2 + t / 2);
    uint2 less;
    *(uint2 *)(dest + near) = halves_of_codes(x.x, d, m, less);
    *(uint2 *)(behind + near) = less;
    *(uint2 *)(dest + far) = halves_of_codes(x.y, d, m, less);
    *(uint2 *)(behind + far) = less;
  }
}

/* ---- the tiles of a unit ---- */

/* Wait until only the `ahead` youngest groups of copies are under way. */
__device__ __forceinline__ void wait_for_copies(int ahead) {
  if (ahead == 0) cp_async_wait<0>();
  else if (ahead == 1) cp_async_wait<1>();
  else cp_async_wait<2>();
}

enum { MOST_STAGES = 4 };

/* The tiles of a unit in the order of their keys. While one of them is used, the next stages - 1 are on their way. All functions by all
 * threads of the block. MANY: a block has all chunks, and blocks of numbers are unpacked. */
template <bool MANY> struct Loader {
  Walk ahead;  /* the next tile to be loaded */
  int current; /* the stage of the one in use; that one goes into the stage before it */

  __device__ __forceinline__ void begin(const Job &w, const Unit &u, const Seen &seen, const Walk &first) {
    ahead = first;
    current = 0;
    find_cells<true>(w, u, seen, first.tile / (CELL_KEYS / TILE_KEYS));
    for (int i = 1; i < w.at.stages; i++) load(w, u, seen, i - 1);
  }
  /* The walk goes on; cells of the keys that follow are there. */
  __device__ __forceinline__ void step(const Job &w, const Unit &u, const Seen &seen) {
    const bool apart = MANY ? ahead.step(w, u, seen, 0, 1) : ahead.step(w, u, seen, blockIdx.z, gridDim.z);
    if (ahead.more() && (apart || ahead.tile % (CELL_KEYS / TILE_KEYS) == 0)) find_cells<true>(w, u, seen, ahead.tile / (CELL_KEYS / TILE_KEYS));
  }
  /* Of the 64 keys of the tile. */
  __device__ __forceinline__ const int32_t *cells(const Job &w) const {
    return area<int32_t>(w.at.cells) + ahead.tile % (CELL_KEYS / TILE_KEYS) * TILE_KEYS;
  }
  __device__ __forceinline__ void load(const Job &w, const Unit &u, const Seen &seen, int to) {
    if (ahead.more()) {
      char *stage = shared_bytes() + to * w.at.stage_bytes;
      if (w.k_form == CHANNELS) copy_groups(w.k, u.g, cells(w), 0, w.e, stage + w.at.k);
      else load_tile<false>(w.k, w.k_form, u.g, cells(w), w.at.k_pitch, stage + w.at.k);
      if (w.at.one) return;
      load_tile<true>(w.v, w.v_form, u.g, cells(w), w.at.v_pitch, stage + w.at.v);
      step(w, u, seen);
    }
    cp_async_commit();
  }
  /* With w.at.one: V of the tile whose K has been used, in K's place. Between barriers; gives where its halves lie. */
  __device__ __forceinline__ const char *load_values(const Job &w, const Unit &u, const Seen &seen) {
    char *stage = area<char>(w.at.v);
    load_tile<true>(w.v, w.v_form, u.g, cells(w), w.at.v_pitch, stage);
    cp_async_commit();
    cp_async_wait<0>();
    if (w.v_form == COPIED && w.v.dtype == PE_BF16) narrow_tile<true>(w.v, stage);
    step(w, u, seen);
    __syncthreads();
    return stage;
  }
  /* Wait for the next tile; k and v are where it lies. Another stage begins to load. */
  __device__ __forceinline__ void next(const Job &w, const Unit &u, const Seen &seen, const char *&k, const char *&v) {
    if (w.at.stages == 1) {
      __syncthreads();
      load(w, u, seen, 0);
      if (w.at.one) cp_async_commit();
    }
    wait_for_copies(max(0, w.at.stages - 2));
    char *stage = shared_bytes() + current * w.at.stage_bytes;
    k = stage + w.at.k, v = stage + w.at.v;
    if (w.k_form == COPIED && w.k.dtype == PE_BF16) narrow_tile<false>(w.k, stage + w.at.k);
    if (!w.at.one && w.v_form == COPIED && w.v.dtype == PE_BF16) narrow_tile<true>(w.v, stage + w.at.v);
    __syncthreads();
    if (w.at.stages > 1) load(w, u, seen, current == 0 ? w.at.stages - 1 : current - 1);
    if (w.k_form == CHANNELS) unpack_groups(w, k), k = area<char>(w.at.k_ready);
    if (MANY && w.k_form == BLOCKS) unpack_keys(w, k);
    if (MANY && w.v_form == BLOCKS) unpack_values(w, v), v = area<char>(w.at.v_ready);
    if (w.k_form == CHANNELS || (MANY && (w.k_form == BLOCKS || w.v_form == BLOCKS))) __syncthreads();
    current = current + 1 == w.at.stages ? 0 : current + 1;
  }
};

/* ---- queries ---- */

__device__ __forceinline__ const char *query_at(const Job &w, const Unit &u, int i) {
  return w.q + row_of(u, i) * w.q_row + head_of(u, i) * w.q_head;
}

/* The power of two that brings x to 2^14 .. 2^15, as far as there is one; inverse: 1 / it. */
__device__ __forceinline__ float raise_to_halves(float x, float &inverse) {
  const int exponent = min(253, 268 - (int)(__float_as_uint(x) >> 23));
  inverse = __uint_as_float((uint32_t)(254 - exponent) << 23);
  return __uint_as_float((uint32_t)exponent << 23);
}

/* Query i of n, times scale and a power of two that leaves no small halves, as halves [block of columns][n][32]; zeros where there is none.
 * w.fine: behind all of them what they leave. One number undoes the power. By a warp. */
__device__ __forceinline__ void load_halves(const Job &w, const Unit &u, int i, int n) {
  uint16_t *to = area<uint16_t>(w.at.q) + i * COLUMNS + lane_of();
  const bool there = i < queries_of(u);
  const char *from = there ? query_at(w, u, i) : nullptr;
  float most = 0.0f, undo;
  for (int j = lane_of(); there && j < w.e; j += 32) most = fmaxf(most, fabsf(*(const float *)(from + j * w.q_element) * w.scale));
  const float power = raise_to_halves(lanes_max(most), undo);
  for (int b = 0; b < w.ne; b++) {
    const int j = b * COLUMNS + lane_of();
    const float x = there && j < w.e ? __fmul_rn(__fmul_rn(*(const float *)(from + j * w.q_element), w.scale), power) : 0.0f;
    const uint16_t held = half_bits(x);
    to[b * n * COLUMNS] = held;
    if (w.fine) to[(w.ne + b) * n * COLUMNS] = half_bits(x - from_half(held));
  }
  if (lane_of() == 0) area<float>(w.at.q_scale)[i] = undo;
}

/* Query i of n as codes, mixed: [block][n][32 bytes], one scale, and a sum for each block. By a warp. */
__device__ __forceinline__ void load_codes(const Job &w, const Unit &u, int i, int n) {
  float *x = area<float>(w.at.mixing) + warp_of() * max(w.e, w.f), most = 0.0f;
  int8_t *to = area<int8_t>(w.at.q) + i * COLUMNS + lane_of() % 16 / 4 * 8 + lane_of() / 16 * 4 + lane_of() % 4;
  int32_t *sums = area<int32_t>(w.at.q_sum) + i;
  const bool there = i < queries_of(u);
  const char *from = there ? query_at(w, u, i) : nullptr;
  for (int j = lane_of(); j < w.e; j += 32) x[j] = there ? __fmul_rn(*(const float *)(from + j * w.q_element), w.scale) : 0.0f;
  __syncwarp();
  mix(x, w.e);
  for (int j = lane_of(); j < w.e; j += 32) most = fmaxf(most, fabsf(x[j]));
  const float d = __fdiv_rn(lanes_max(most), 127.0f), inv = inverse(d);
  for (int b = 0; b < w.ne; b++) {
    int code = (int)rintf(__fmul_rn(x[b * COLUMNS + lane_of()], inv));
    to[b * n * COLUMNS] = (int8_t)code;
#pragma unroll
    for (int apart = 16; apart; apart /= 2) code += __shfl_xor_sync(0xffffffffu, code, apart);
    if (lane_of() == 0) sums[b * n] = code;
  }
  if (lane_of() == 0) area<float>(w.at.q_scale)[i] = d;
  __syncwarp();
}

/* All queries of the block. By all threads; a barrier must follow. */
__device__ __forceinline__ void load_queries(const Job &w, const Unit &u, int n) {
  for (int i = warp_of(); i < n; i += blockDim.x / 32)
    if (w.k_form == BLOCKS) load_codes(w, u, i, n);
    else load_halves(w, u, i, n);
}

/* ---- products; all by a warp ---- */

/* Scores times what is a query's scale. */
template <int KEYS>
__device__ __forceinline__ void scale_scores(const Job &w, int first, float (&s)[KEYS][4]) {
  const float *scales = area<float>(w.at.q_scale) + first + lane_of() / 4, low = scales[0], high = scales[8];
#pragma unroll
  for (int j = 0; j < KEYS; j++) s[j][0] *= low, s[j][1] *= low, s[j][2] *= high, s[j][3] *= high;
}

/* A block of columns of 16 queries, of which this lane holds what two mma take of it. */
struct QueryBlock {
  uint32_t low[4], high[4];
  __device__ __forceinline__ QueryBlock(const char *q) {
    const uint4 x = *(const uint4 *)q, y = *(const uint4 *)(q + 512);
    low[0] = x.x, low[1] = y.x, low[2] = x.y, low[3] = y.y;
    high[0] = x.z, high[1] = y.z, high[2] = x.w, high[3] = y.w;
  }
  /* s += it by the same block of columns of 8 keys */
  __device__ __forceinline__ void add_scores(const uint4 &k, float (&s)[4]) const {
    const uint32_t first_two[2] = {k.x, k.y}, last_two[2] = {k.z, k.w};
    mma_f16(s, low, first_two);
    mma_f16(s, high, last_two);
  }
};

/* s[j] = queries first .. first + 15 (of n) by keys 8 (key + j) .. + 7, j < KEYS; not scaled yet. */
template <int KEYS, bool FINE>
__device__ __forceinline__ void add_scores(const Job &w, int first, int n, const char *tile, int key, float (&s)[KEYS][4]) {
  const int lane = again(lane_of()), behind = w.ne * n * 64;
  const char *q = area<char>(w.at.q) + first * 64 + lane * 16, *k = tile + key * 512 + lane * 16;
#pragma unroll
  for (int j = 0; j < KEYS; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
  for (int b = 0; b < w.ne; b++, q += n * 64, k += HALF_TILE) {
    const QueryBlock most(q), less(q + (FINE ? behind : 0));
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
      const uint4 own = *(const uint4 *)(k + j * 512);
      most.add_scores(own, s[j]);
      if (FINE) less.add_scores(own, s[j]);
    }
  }
}

/* The same scores get what halves leave of the keys, which lies behind them. */
template <int KEYS> __device__ __forceinline__ void add_rest(const Job &w, int first, int n, const char *tile, int key, float (&s)[KEYS][4]) {
  const int lane = again(lane_of());
  const char *q = area<char>(w.at.q) + first * 64 + lane * 16, *k = tile + w.ne * HALF_TILE + key * 512 + lane * 16;
  for (int b = 0; b < w.ne; b++, q += n * 64, k += HALF_TILE) {
    const QueryBlock most(q);
#pragma unroll
    for (int j = 0; j < KEYS; j++) most.add_scores(*(const uint4 *)(k + j * 512), s[j]);
  }
}
template <int KEYS>
__device__ __forceinline__ void scores_of_halves(const Job &w, int first, int n, const char *tile, int key, float (&s)[KEYS][4]) {
  if (w.fine) add_scores<KEYS, true>(w, first, n, tile, key, s);
  else add_scores<KEYS, false>(w, first, n, tile, key, s);
  if (w.k_form == CHANNELS) add_rest<KEYS>(w, first, n, tile, key, s);
  scale_scores<KEYS>(w, first, s);
}

/* Keys in blocks as scores_of_codes takes them: block of columns b of keys 8 group .. 8 group + 7, unpacked (for many queries). */
struct UnpackedKeys {
  const char *codes;   /* this and the scales: of this lane */
  const float *scales;
  int minima; /* behind the scales */
  __device__ __forceinline__ UnpackedKeys(const Job &w) {
    const int lane = again(lane_of());
    codes = area<char>(w.at.k_ready) + lane * 8, scales = area<float>(w.at.k_scale) + lane % 4 * 2, minima = TILE_KEYS * w.ne;
  }
  __device__ __forceinline__ uint2 codes_at(int b, int group) const { return *(const uint2 *)(codes + b * CODE_TILE + group * 256); }
  __device__ __forceinline__ float2 scale_at(int b, int group) const { return *(const float2 *)(scales + b * TILE_KEYS + group * 8); }
  __device__ __forceinline__ float2 least_at(int b, int group) const { return scale_at(b + minima / TILE_KEYS, group); }
};

/* The same as they lie in the cache (for few). */
struct PackedKeys {
  const char *tile;
  int pitch, bytes;
  int32_t dtype;
  __device__ __forceinline__ const char *block(int b, int key) const { return tile + key * pitch + b * bytes; }
  __device__ __forceinline__ uint2 codes_at(int b, int group) const {
    return codes_of(block(b, group * 8 + lane_of() / 4), dtype, lane_of() % 4);
  }
  __device__ __forceinline__ float2 scale_at(int b, int group) const {
    const int key = group * 8 + lane_of() % 4 * 2;
    return make_float2(scale_of(block(b, key)), scale_of(block(b, key + 1)));
  }
  __device__ __forceinline__ float2 least_at(int b, int group) const {
    const int key = group * 8 + lane_of() % 4 * 2;
    return make_float2(least_of(block(b, key), dtype), least_of(block(b, key + 1), dtype));
  }
};

/* Scores as of scores_of_halves. */
template <int KEYS, class Source>
__device__ __forceinline__ void scores_of_codes(const Job &w, int first, int n, const Source &k, int key, float (&s)[KEYS][4]) {
  const int g = lane_of() / 4, magic = 0x4b400000; /* 12582912 as a float */
  const bool has_minima = has_least(w.k.dtype);
  const char *q = area<char>(w.at.q) + first * 32 + lane_of() * 8;
  const int32_t *sums = area<int32_t>(w.at.q_sum) + first + g;
#pragma unroll
  for (int j = 0; j < KEYS; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
  for (int b = 0; b < w.ne; b++, q += n * 32, sums += n) {
    const uint2 x = *(const uint2 *)q, y = *(const uint2 *)(q + 256);
    const uint32_t a[4] = {x.x, y.x, x.y, y.y};
    const float sum_low = has_minima ? (float)sums[0] : 0.0f, sum_high = has_minima ? (float)sums[8] : 0.0f;
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
      const uint2 v = k.codes_at(b, key + j);
      const uint32_t bytes[2] = {v.x, v.y};
      int32_t dot[4] = {magic, magic, magic, magic};
      mma_s8(dot, a, bytes);
      const float2 scale = k.scale_at(b, key + j);
#pragma unroll
      for (int i = 0; i < 4; i++) s[j][i] = fmaf(__int_as_float(dot[i]) - 12582912.0f, i % 2 ? scale.y : scale.x, s[j][i]);
      if (!has_minima) continue;
      const float2 least = k.least_at(b, key + j);
#pragma unroll
      for (int i = 0; i < 4; i++) s[j][i] = fmaf(i / 2 ? sum_high : sum_low, i % 2 ? least.y : least.x, s[j][i]);
    }
  }
  scale_scores<KEYS>(w, first, s);
}

/* acc[i] += the probabilities of 16 keys by a block of columns of V, of which v[s] are this lane's four elements of its s-th key. */
template <bool FINE>
__device__ __forceinline__ void add_products(const uint32_t (&p)[4], const uint32_t (&less)[4], const uint2 (&v)[4], float (&acc)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t x[4];
#pragma unroll
    for (int s = 0; s < 4; s++) x[s] = i / 2 ? v[s].y : v[s].x;
    const int halves = i % 2 ? 0x7632 : 0x5410;
    const uint32_t keys[2] = {__byte_perm(x[0], x[1], halves), __byte_perm(x[2], x[3], halves)};
    mma_f16(acc[i], p, keys);
    if (FINE) mma_f16(acc[i], less, keys);
  }
}

/* V as halves; step: which 16 keys of the tile. */
template <bool FINE>
__device__ __forceinline__ void add_values(const uint32_t (&p)[4], const uint32_t (&less)[4], const char *block, int step, float (&acc)[4][4]) {
  const int g = lane_of() / 4, t = lane_of() % 4;
  const char *v = block + step * 1024 + t * 64 + part_of_value(t, g / 2) + g % 2 * 8;
  const uint2 x[4] = {*(const uint2 *)v, *(const uint2 *)(v + 256), *(const uint2 *)(v + 512), *(const uint2 *)(v + 768)};
  add_products<FINE>(p, less, x, acc);
}

/* V in blocks as they lie in the cache; tile: at the block of columns. */
__device__ __forceinline__ void add_blocks(const uint32_t (&p)[4], const uint32_t (&less)[4], const char *tile, int pitch, int32_t dtype, int step,
                                           float (&acc)[4][4]) {
  uint2 x[4], rest[4];
#pragma unroll
  for (int s = 0; s < 4; s++) {
    const char *block = tile + (16 * step + lane_of() % 4 * 2 + s % 2 + s / 2 * 8) * pitch;
    x[s] = halves_of_codes(four_codes_of(block, dtype, lane_of() / 4), scale_of(block), least_of(block, dtype), rest[s]);
  }
  add_products<true>(p, less, x, acc);
  add_products<false>(p, less, rest, acc);
}

} // namespace pe

#endif

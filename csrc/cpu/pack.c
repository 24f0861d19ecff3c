/* pack.c: portable C, compiled once. Rearranges words of 4 bytes; no arithmetic on values. A thread packs whole groups: it
 * reads 16 rows block by block and writes one run of memory, both once. The drawing is in pack.h.
 */
#include "pack.h"

#include <string.h>

#include "../quants.h"

typedef struct layout {
  int64_t k, blocks, head, body; /* k of a block, blocks in a unit, bytes for 16 rows */
} layout;

static layout layout_of(int32_t dtype) {
  switch (dtype) {
#define LAYOUT(name, blocks, head, body, ...) case PE_##name: return (layout){PE_BLOCK_##name, blocks, head, body};
    PE_PACKED_BLOCKS(LAYOUT)
    PE_PACKED_FLOATS(LAYOUT)
#undef LAYOUT
    default: return (layout){0, 0, 0, 0};
  }
}

int64_t pe_pack_group_bytes(int32_t dtype, int64_t k) {
  layout l = layout_of(dtype);
  if (!l.k || k <= 0 || k % l.k || k > INT64_MAX / 128) return 0;
  int64_t blocks = k / l.k, units = (blocks + l.blocks - 1) / l.blocks;
  int64_t bytes = units * l.blocks * l.head + blocks * l.body;
  return (bytes + 63) / 64 * 64;
}

int64_t pe_pack_bytes(int32_t dtype, int64_t n, int64_t k) {
  int64_t group = pe_pack_group_bytes(dtype, k), bytes;
  if (!group || n <= 0 || n > INT64_MAX - 15 || __builtin_mul_overflow(group, (n + 15) / 16, &bytes)) return 0;
  return bytes;
}

/* ---- one row of a block to its lane: word i of a vector area is at to[16 i] ---- */

static uint32_t word(const uint8_t *p) {
  uint32_t w;
  memcpy(&w, p, 4);
  return w;
}

static void put(uint8_t *to, int64_t i, uint32_t w) { memcpy(to + 64 * i, &w, 4); }
static void put16(uint8_t *to, uint16_t h) { memcpy(to, &h, 2); }

/* Nibbles as 32-blocks have them are in place: byte i of the file holds k = i below and k = i + 16 above. */
static void put_nibbles(uint8_t *to, const uint8_t *qs) {
  for (int v = 0; v < 4; v++) put(to, v, word(qs + 4 * v));
}

/* 32 bytes of the file: low nibbles are one step, high nibbles another. */
static void put_nibble_pair(uint8_t *low, uint8_t *high, const uint8_t *qs) {
  for (int v = 0; v < 4; v++) {
    uint32_t a = word(qs + 4 * v), b = word(qs + 16 + 4 * v);
    put(low, v, (a & 0x0f0f0f0fu) | (b & 0x0f0f0f0fu) << 4);
    put(high, v, (a >> 4 & 0x0f0f0f0fu) | (b & 0xf0f0f0f0u));
  }
}

/* 32 bytes of the file whose bits `shift`, `shift` + 1 are the two bits of one step. */
static void put_plane2(uint8_t *to, const uint8_t *bits, int shift) {
  for (int i = 0; i < 2; i++) {
    uint32_t w = 0;
    for (int t = 0; t < 4; t++) w |= (word(bits + 16 * i + 4 * t) >> shift & 0x03030303u) << 2 * t;
    put(to, i, w);
  }
}

/* 32 bytes of the file whose bit `shift` is the bit of one step. */
static void put_plane1(uint8_t *to, const uint8_t *bits, int shift) {
  uint32_t w = 0;
  for (int g = 0; g < 8; g++) w |= (word(bits + 4 * g) >> shift & 0x01010101u) << g;
  put(to, 0, w);
}

/* Bits 0..3 of a byte become bit 0 of bytes 0..3, its bits 4..7 their bit 1. The product spreads four bits. */
#define SPREAD4(b) (((b) & 15u) * 0x00204081u & 0x01010101u)
#define SPREAD(b) (SPREAD4(b) | SPREAD4((b) >> 4) << 1)
#define SPREAD_4(b) SPREAD(b), SPREAD((b) + 1), SPREAD((b) + 2), SPREAD((b) + 3)
#define SPREAD_16(b) SPREAD_4(b), SPREAD_4((b) + 4), SPREAD_4((b) + 8), SPREAD_4((b) + 12)
#define SPREAD_64(b) SPREAD_16(b), SPREAD_16((b) + 16), SPREAD_16((b) + 32), SPREAD_16((b) + 48)
static const uint32_t spread[256] = {SPREAD_64(0u), SPREAD_64(64u), SPREAD_64(128u), SPREAD_64(192u)};

/* The fifth bits of a 32-block: bit i of qh belongs to k = i. */
static void put_plane1_of_32(uint8_t *to, const uint8_t *qh) {
  put(to, 0, spread[qh[0]] | spread[qh[1]] << 2 | spread[qh[2]] << 4 | spread[qh[3]] << 6);
}

/* One block of row r; `head` and `body` are those of the block. */
static void pack_block(int32_t dtype, const uint8_t *src, uint8_t *head, uint8_t *body, int r) {
  uint8_t *lane = body + 4 * r;
  switch (dtype) {
    case PE_Q4_0:
    case PE_IQ4_NL: { /* same layout */
      const block_q4_0 *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put_nibbles(lane, b->qs);
      break;
    }
    case PE_Q4_1: {
      const block_q4_1 *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put16(head + 32 + 2 * r, b->m);
      put_nibbles(lane, b->qs);
      break;
    }
    case PE_Q5_0: {
      const block_q5_0 *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put_nibbles(lane, b->qs);
      put_plane1_of_32(lane + 256, b->qh);
      break;
    }
    case PE_Q5_1: {
      const block_q5_1 *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put16(head + 32 + 2 * r, b->m);
      put_nibbles(lane, b->qs);
      put_plane1_of_32(lane + 256, b->qh);
      break;
    }
    case PE_Q8_0: {
      const block_q8_0 *b = (const void *)src;
      put16(head + 2 * r, b->d);
      for (int g = 0; g < 8; g++) put(lane, g, word((const uint8_t *)b->qs + 4 * g) ^ 0x80808080u);
      break;
    }
    case PE_MXFP4: {
      const block_mxfp4 *b = (const void *)src;
      head[r] = b->e;
      put_nibbles(lane, b->qs);
      break;
    }
    case PE_Q2_K: {
      const block_q2_K *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put16(head + 32 + 2 * r, b->dmin);
      for (int i = 0; i < 4; i++) put(head + 64 + 4 * r, i, word(b->scales + 4 * i));
      for (int s = 0; s < 8; s++) put_plane2(lane + 128 * s, b->qs + 32 * (s / 4), 2 * (s % 4));
      break;
    }
    case PE_Q3_K: {
      const block_q3_K *b = (const void *)src;
      put16(head + 2 * r, b->d);
      for (int i = 0; i < 3; i++) put(lane, i, word(b->scales + 4 * i));
      for (int s = 0; s < 8; s++) {
        put_plane2(lane + 192 + 192 * s, b->qs + 32 * (s / 4), 2 * (s % 4));
        put_plane1(lane + 192 + 192 * s + 128, b->hmask, s);
      }
      break;
    }
    case PE_Q4_K: {
      const block_q4_K *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put16(head + 32 + 2 * r, b->dmin);
      for (int i = 0; i < 3; i++) put(head + 64 + 4 * r, i, word(b->scales + 4 * i));
      for (int s = 0; s < 8; s += 2) put_nibble_pair(lane + 256 * s, lane + 256 * (s + 1), b->qs + 16 * s);
      break;
    }
    case PE_Q5_K: {
      const block_q5_K *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put16(head + 32 + 2 * r, b->dmin);
      for (int i = 0; i < 3; i++) put(head + 64 + 4 * r, i, word(b->scales + 4 * i));
      for (int s = 0; s < 8; s += 2) put_nibble_pair(lane + 320 * s, lane + 320 * (s + 1), b->qs + 16 * s);
      for (int s = 0; s < 8; s++) put_plane1(lane + 320 * s + 256, b->qh, s);
      break;
    }
    case PE_Q6_K: {
      const block_q6_K *b = (const void *)src;
      put16(head + 2 * r, b->d);
      for (int i = 0; i < 4; i++) put(lane, i, word((const uint8_t *)b->scales + 4 * i));
      for (int h = 0; h < 2; h++) {
        uint8_t *to = lane + 256 + 384 * 4 * h;
        put_nibble_pair(to, to + 384 * 2, b->ql + 64 * h);
        put_nibble_pair(to + 384, to + 384 * 3, b->ql + 64 * h + 32);
        for (int s = 0; s < 4; s++) put_plane2(to + 384 * s + 256, b->qh + 32 * h, 2 * s);
      }
      break;
    }
    case PE_IQ4_XS: {
      const block_iq4_xs *b = (const void *)src;
      put16(head + 2 * r, b->d);
      put16(head + 32 + 2 * r, b->scales_h);
      put(head + 64 + 4 * r, 0, word(b->scales_l));
      for (int s = 0; s < 8; s++) put_nibbles(lane + 256 * s, b->qs + 16 * s);
      break;
    }
    default: break;
  }
}

/* [16 rows][k] to [k][16 rows]; 64 of k at a time, so that the lines written stay in the first cache. */
static void pack_floats(const uint8_t *src, int64_t size, int64_t rows, int64_t k, uint8_t *dst) {
  for (int64_t at = 0; at < k; at += 64) {
    int64_t end = at + 64 < k ? at + 64 : k;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = at; i < end; i++) memcpy(dst + (16 * i + r) * size, src + (r * k + i) * size, (size_t)size);
  }
}

/* The next group, on both sides: lines that are needed some thousand instructions later. Rows are too short for the processor to
 * foresee them; without this, packing takes twice as long from memory as from a cache (2026-11, Zen 5). */
static inline void fetch_ahead(const uint8_t *to, int64_t n_to, const uint8_t *from, int64_t n_from) {
  for (int64_t i = 0; i < n_to; i += 64) __builtin_prefetch(to + i, 1);
  for (int64_t i = 0; i < n_from; i += 64) __builtin_prefetch(from + i, 0);
}

pe_status pe_pack_groups(int32_t dtype, const void *src, int64_t n, int64_t k, int64_t group_begin, int64_t group_end,
                         void *dst) {
  layout l = layout_of(dtype);
  if (!l.k) return PE_BAD_DTYPE;
  if (!pe_pack_bytes(dtype, n, k)) return PE_BAD_SHAPE;
  if (group_begin < 0 || group_begin > group_end || group_end > (n + 15) / 16) return PE_BAD_SHAPE;
  int64_t group = pe_pack_group_bytes(dtype, k), block = pe_format_of(dtype).bytes, blocks = k / l.k;
  int64_t unit = l.blocks * (l.head + l.body), share = group / (16 * blocks);
  for (int64_t g = group_begin; g < group_end; g++) {
    const uint8_t *from = (const uint8_t *)src + 16 * g * blocks * block;
    uint8_t *to = (uint8_t *)dst + g * group;
    int64_t rows = n - 16 * g < 16 ? n - 16 * g : 16;
    if (rows < 16) memset(to, 0, (size_t)group);
    if (l.k == 1) {
      if (block == 4) pack_floats(from, 4, rows, k, to);
      else pack_floats(from, 2, rows, k, to);
      memset(to + k * l.body, 0, (size_t)(group - k * l.body));
      continue;
    }
    const uint8_t *next_to = to + group, *next_from = from + 16 * blocks * block;
    for (int64_t b = 0; b < blocks; b++) {
      uint8_t *base = to + b / l.blocks * unit, *head = base + b % l.blocks * l.head;
      uint8_t *body = base + l.blocks * l.head + b % l.blocks * l.body;
      if (b == blocks - 1) memset(head, 0, (size_t)((l.blocks - b % l.blocks) * l.head)); /* fills the last unit */
      for (int64_t r = 0; r < rows; r++, next_to += share, next_from += block) {
        fetch_ahead(next_to, share, next_from, block);
        pack_block(dtype, from + (r * blocks + b) * block, head, body, (int)r);
      }
    }
    int64_t used = (blocks + l.blocks - 1) / l.blocks * l.blocks * l.head + blocks * l.body;
    memset(to + used, 0, (size_t)(group - used));
  }
  return PE_OK;
}

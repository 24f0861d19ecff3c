/* pack.c: portable C, compiled once. Rearranges words of 4 bytes; no arithmetic on values. A thread packs whole groups: it
 * reads 16 rows block by block, 4 of them at once, and writes one run of memory, both once. The drawing is in pack.h. In the caches
 * 5 to 9 GB/s on one core (2026-11, Zen 5).
 */
#include "pack.h"

#include <stddef.h>
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

/* ---- four rows of a block to their lanes ---- */

/* A word of each of 4 rows. A vector area has 16 lanes, so 4 neighbouring rows are 16 bytes of it. */
typedef uint32_t quad __attribute__((vector_size(16)));
#if defined(__clang__)
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad){i, j, k, l})
#endif

#define ALWAYS static inline __attribute__((always_inline))

/* The same block of up to 4 rows, from row r of the group on. Beyond the n rows that there are it is the last one again. */
typedef struct rows4 { const uint8_t *block[4]; int r, n; } rows4;

static uint32_t word(const uint8_t *p) {
  uint32_t w;
  memcpy(&w, p, 4);
  return w;
}

static quad load4(const uint8_t *p) {
  quad q;
  memcpy(&q, p, 16);
  return q;
}

/* Words 0..3 from byte `at` of the blocks on. */
ALWAYS void words4(const rows4 *x, size_t at, quad w[4]) {
  const quad r0 = load4(x->block[0] + at), r1 = load4(x->block[1] + at), r2 = load4(x->block[2] + at), r3 = load4(x->block[3] + at);
  const quad a = PICK(r0, r1, 0, 4, 1, 5), b = PICK(r0, r1, 2, 6, 3, 7), c = PICK(r2, r3, 0, 4, 1, 5), d = PICK(r2, r3, 2, 6, 3, 7);
  w[0] = PICK(a, c, 0, 1, 4, 5);
  w[1] = PICK(a, c, 2, 3, 6, 7);
  w[2] = PICK(b, d, 0, 1, 4, 5);
  w[3] = PICK(b, d, 2, 3, 6, 7);
}

/* To vector i of an area. */
ALWAYS void put(const rows4 *x, uint8_t *area, int64_t i, quad w) {
  uint8_t *to = area + 64 * i + 4 * x->r;
  if (x->n == 4) memcpy(to, &w, 16);
  else memcpy(to, &w, 4 * (size_t)x->n);
}

/* n words from byte `at` on, which need not have 16 bytes behind it. */
ALWAYS void put_words(const rows4 *x, uint8_t *area, size_t at, int n) {
  for (int i = 0; i < n; i++) {
    quad w;
    for (int r = 0; r < 4; r++) w[r] = word(x->block[r] + at + 4 * (size_t)i);
    put(x, area, i, w);
  }
}

/* The number of 16 bits at byte `at`. */
ALWAYS void put16(const rows4 *x, uint8_t *area, size_t at) {
  for (int r = 0; r < x->n; r++) memcpy(area + 2 * (x->r + r), x->block[r] + at, 2);
}

/* Nibbles as 32-blocks have them are in place: byte i of the file holds k = i below and k = i + 16 above. */
ALWAYS void put_nibbles(const rows4 *x, uint8_t *area, size_t at) {
  quad w[4];
  words4(x, at, w);
  for (int v = 0; v < 4; v++) put(x, area, v, w[v]);
}

/* 32 bytes of the file: low nibbles are one step, high nibbles another. */
ALWAYS void put_nibble_pair(const rows4 *x, uint8_t *low, uint8_t *high, size_t at) {
  quad a[4], b[4];
  words4(x, at, a);
  words4(x, at + 16, b);
  for (int v = 0; v < 4; v++) {
    put(x, low, v, (a[v] & 0x0f0f0f0fu) | (b[v] & 0x0f0f0f0fu) << 4);
    put(x, high, v, (a[v] >> 4 & 0x0f0f0f0fu) | (b[v] & 0xf0f0f0f0u));
  }
}

/* 32 bytes of the file, whose bits 2 j, 2 j + 1 are two bits of step j, for 4 steps that lie `step` bytes apart. */
ALWAYS void put_planes2(const rows4 *x, uint8_t *area, int64_t step, size_t at) {
  quad w[8];
  words4(x, at, w);
  words4(x, at + 16, w + 4);
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < 2; i++) {
      quad y = w[4 * i] >> 2 * j & 0x03030303u;
      for (int t = 1; t < 4; t++) y |= (w[4 * i + t] >> 2 * j & 0x03030303u) << 2 * t;
      put(x, area + step * j, i, y);
    }
}

/* 32 bytes of the file, whose bit j is the bit of step j, for 8 steps. */
ALWAYS void put_planes1(const rows4 *x, uint8_t *area, int64_t step, size_t at) {
  quad w[8];
  words4(x, at, w);
  words4(x, at + 16, w + 4);
  for (int j = 0; j < 8; j++) {
    quad y = w[0] >> j & 0x01010101u;
    for (int g = 1; g < 8; g++) y |= (w[g] >> j & 0x01010101u) << g;
    put(x, area + step * j, 0, y);
  }
}

/* Bits 0..3 of a byte become bit 0 of bytes 0..3, its bits 4..7 their bit 1. The product spreads four bits. */
#define SPREAD4(b) (((b) & 15u) * 0x00204081u & 0x01010101u)
#define SPREAD(b) (SPREAD4(b) | SPREAD4((b) >> 4) << 1)
#define SPREAD_4(b) SPREAD(b), SPREAD((b) + 1), SPREAD((b) + 2), SPREAD((b) + 3)
#define SPREAD_16(b) SPREAD_4(b), SPREAD_4((b) + 4), SPREAD_4((b) + 8), SPREAD_4((b) + 12)
#define SPREAD_64(b) SPREAD_16(b), SPREAD_16((b) + 16), SPREAD_16((b) + 32), SPREAD_16((b) + 48)
static const uint32_t spread[256] = {SPREAD_64(0u), SPREAD_64(64u), SPREAD_64(128u), SPREAD_64(192u)};

/* The fifth bits of a 32-block: bit i of qh belongs to k = i. */
ALWAYS void put_plane1_of_32(const rows4 *x, uint8_t *area, size_t at) {
  quad w;
  for (int r = 0; r < 4; r++) {
    const uint8_t *qh = x->block[r] + at;
    w[r] = spread[qh[0]] | spread[qh[1]] << 2 | spread[qh[2]] << 4 | spread[qh[3]] << 6;
  }
  put(x, area, 0, w);
}

#define AT(format, field) offsetof(block_##format, field)

/* `head` and `body` are those of the block. */
ALWAYS void pack_blocks(int32_t dtype, const rows4 *x, uint8_t *head, uint8_t *body) {
  switch (dtype) {
    case PE_Q4_0:
    case PE_IQ4_NL: /* same layout */
      put16(x, head, AT(q4_0, d));
      put_nibbles(x, body, AT(q4_0, qs));
      break;
    case PE_Q4_1:
      put16(x, head, AT(q4_1, d));
      put16(x, head + 32, AT(q4_1, m));
      put_nibbles(x, body, AT(q4_1, qs));
      break;
    case PE_Q5_0:
      put16(x, head, AT(q5_0, d));
      put_nibbles(x, body, AT(q5_0, qs));
      put_plane1_of_32(x, body + 256, AT(q5_0, qh));
      break;
    case PE_Q5_1:
      put16(x, head, AT(q5_1, d));
      put16(x, head + 32, AT(q5_1, m));
      put_nibbles(x, body, AT(q5_1, qs));
      put_plane1_of_32(x, body + 256, AT(q5_1, qh));
      break;
    case PE_Q8_0:
      put16(x, head, AT(q8_0, d));
      for (int h = 0; h < 2; h++) {
        quad w[4];
        words4(x, AT(q8_0, qs) + 16 * (size_t)h, w);
        for (int v = 0; v < 4; v++) put(x, body, 4 * h + v, w[v] ^ 0x80808080u);
      }
      break;
    case PE_MXFP4:
      for (int r = 0; r < x->n; r++) head[x->r + r] = x->block[r][AT(mxfp4, e)];
      put_nibbles(x, body, AT(mxfp4, qs));
      break;
    case PE_Q2_K:
      put16(x, head, AT(q2_K, d));
      put16(x, head + 32, AT(q2_K, dmin));
      put_words(x, head + 64, AT(q2_K, scales), 4);
      for (int h = 0; h < 2; h++) put_planes2(x, body + 128 * 4 * h, 128, AT(q2_K, qs) + 32 * (size_t)h);
      break;
    case PE_Q3_K:
      put16(x, head, AT(q3_K, d));
      put_words(x, body, AT(q3_K, scales), 3);
      for (int h = 0; h < 2; h++) put_planes2(x, body + 192 + 192 * 4 * h, 192, AT(q3_K, qs) + 32 * (size_t)h);
      put_planes1(x, body + 192 + 128, 192, AT(q3_K, hmask));
      break;
    case PE_Q4_K:
      put16(x, head, AT(q4_K, d));
      put16(x, head + 32, AT(q4_K, dmin));
      put_words(x, head + 64, AT(q4_K, scales), 3);
      for (int s = 0; s < 8; s += 2) put_nibble_pair(x, body + 256 * s, body + 256 * (s + 1), AT(q4_K, qs) + 16 * (size_t)s);
      break;
    case PE_Q5_K:
      put16(x, head, AT(q5_K, d));
      put16(x, head + 32, AT(q5_K, dmin));
      put_words(x, head + 64, AT(q5_K, scales), 3);
      for (int s = 0; s < 8; s += 2) put_nibble_pair(x, body + 320 * s, body + 320 * (s + 1), AT(q5_K, qs) + 16 * (size_t)s);
      put_planes1(x, body + 256, 320, AT(q5_K, qh));
      break;
    case PE_Q6_K:
      put16(x, head, AT(q6_K, d));
      put_words(x, body, AT(q6_K, scales), 4);
      for (int h = 0; h < 2; h++) {
        uint8_t *to = body + 256 + 384 * 4 * h;
        put_nibble_pair(x, to, to + 384 * 2, AT(q6_K, ql) + 64 * (size_t)h);
        put_nibble_pair(x, to + 384, to + 384 * 3, AT(q6_K, ql) + 64 * (size_t)h + 32);
        put_planes2(x, to + 256, 384, AT(q6_K, qh) + 32 * (size_t)h);
      }
      break;
    case PE_IQ4_XS:
      put16(x, head, AT(iq4_xs, d));
      put16(x, head + 32, AT(iq4_xs, scales_h));
      put_words(x, head + 64, AT(iq4_xs, scales_l), 1);
      for (int s = 0; s < 8; s++) put_nibbles(x, body + 256 * s, AT(iq4_xs, qs) + 16 * (size_t)s);
      break;
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

/* The same block of 4 rows of the next group, which is needed some thousand instructions later. Rows are too short for the
 * processor to foresee them; without this, packing takes twice as long from memory as from a cache (2026-11, Zen 5). Always inline:
 * as a function it would have no effect, to GCC's mind, and calls of it none either. */
ALWAYS void fetch_ahead(const uint8_t *first, int64_t row, int64_t bytes) {
  for (int r = 0; r < 4; r++)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + (16 + r) * row + i, 0);
}

pe_status pe_pack_groups(int32_t dtype, const void *src, int64_t n, int64_t k, int64_t group_begin, int64_t group_end,
                         void *dst) {
  layout l = layout_of(dtype);
  if (!l.k) return PE_BAD_DTYPE;
  if (!pe_pack_bytes(dtype, n, k)) return PE_BAD_SHAPE;
  if (group_begin < 0 || group_begin > group_end || group_end > (n + 15) / 16) return PE_BAD_SHAPE;
  int64_t group = pe_pack_group_bytes(dtype, k), block = pe_format_of(dtype).bytes, blocks = k / l.k;
  int64_t unit = l.blocks * (l.head + l.body);
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
    for (int64_t b = 0; b < blocks; b++) {
      uint8_t *base = to + b / l.blocks * unit, *head = base + b % l.blocks * l.head;
      uint8_t *body = base + l.blocks * l.head + b % l.blocks * l.body;
      if (b == blocks - 1) memset(head, 0, (size_t)((l.blocks - b % l.blocks) * l.head)); /* fills the last unit */
      for (int64_t r = 0; r < rows; r += 4) {
        const uint8_t *first = from + (r * blocks + b) * block;
        const int64_t row = blocks * block, left = rows - r;
        fetch_ahead(first, row, block);
        if (left >= 4) { /* apart, so that the number is a constant where blocks are packed */
          const rows4 x = {{first, first + row, first + 2 * row, first + 3 * row}, (int)r, 4};
          pack_blocks(dtype, &x, head, body);
        } else {
          const uint8_t *last = first + (left - 1) * row;
          const rows4 x = {{first, left > 1 ? first + row : last, last, last}, (int)r, (int)left};
          pack_blocks(dtype, &x, head, body);
        }
      }
    }
    int64_t used = (blocks + l.blocks - 1) / l.blocks * l.blocks * l.head + blocks * l.body;
    memset(to + used, 0, (size_t)(group - used));
  }
  return PE_OK;
}

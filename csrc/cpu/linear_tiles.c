/* linear_tiles.c: `linear` with packed blocks and many rows of x: linear.c says what the whole is.
 * Reference: pyengine/ops/matmul.py: linear.
 *
 * A panel of 256 of k is unpacked once into L1 (12 KB of codes, 3 to 9 KB of scales on avx512), and a tile takes INT_TILE_ROWS
 * rows of x times PANEL_GROUPS vectors: 12 integer and 12 float accumulators in 32 registers. avx2 has half as many of half the size:
 * its 8 integer sums stay in registers and the float ones in L1.
 */
#include "dots.h"
#include "linear_parts.h"

#if defined(PE_NEON)
#include "linear_neon.h"
#else
/* How often a tile of `count` steps calls fetch_ahead. */
PE_INLINE int64_t tile_fetches(int64_t count) { return count; }

/* Steps s0 .. s0 + count - 1 of PANEL_GROUPS groups. */
PE_INLINE void unpack_panel(int id, const uint8_t *const group[PANEL_GROUPS], int64_t s0, int64_t count, uint8_t *to) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32;
  const int64_t step = panel_step_bytes(t.halves, t.offsets);
  for (int64_t b = s0 / steps; b < (s0 + count) / steps; b++) {
    for (int v = 0; v < PANEL_GROUPS; v++) {
      const uint8_t *head = pe_block_head(t, group[v], b), *body = pe_block_body(t, group[v], b);
PE_UNROLL_STEPS
      for (int j = 0; j < steps; j++) {
        pe_step w;
        pe_unpack(id, head, body, j, &w);
        uint8_t *p = to + (b * steps + j - s0) * step;
PE_UNROLL(8)
        for (int g = 0; g < 8; g++) v64u_store(p + 64 * (PANEL_GROUPS * g + v), w.u[g]);
        float *f = (float *)(p + 64 * PANEL_GROUPS * 8) + 16 * v;
PE_UNROLL(2)
        for (int h = 0; h < t.halves; h++) {
          v16f_store(f + 16 * PANEL_GROUPS * h, w.s[h]);
          v16f_store(f + 16 * PANEL_GROUPS * (t.halves + h), dot_base(w.s[h]));
          if (t.offsets) v16f_store(f + 16 * PANEL_GROUPS * (2 * t.halves + h), w.o[h]);
        }
      }
    }
  }
}

/* Panel times row i of x, for `rows` <= INT_TILE_ROWS rows and `count` steps. */
PE_INLINE void tile_rows(int rows, int halves, int offsets, int z128, int run, int zero, const uint8_t *panel, int64_t count,
                         const char *x, int64_t ld, panel_ahead *ahead, const linear_target *to) {
  v16f sum[INT_TILE_ROWS][PANEL_GROUPS];
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < PANEL_GROUPS; v++) sum[i][v] = linear_begin(to, 16 * (PANEL_GROUPS * i + v));
  for (int64_t s = 0; s < count; s++) {
    const float *f = (const float *)(panel + 64 * PANEL_GROUPS * 8);
    fetch_ahead(ahead);
PE_UNROLL(2)
    for (int h = 0; h < halves; h++) {
      v16i dot[INT_TILE_ROWS][PANEL_GROUPS];
PE_UNROLL(8)
      for (int i = 0; i < rows; i++) {
        const int32_t n = halves == 2 ? linear_step_of(x, ld, i, s)->sum2[h] : linear_step_of(x, ld, i, s)->sum;
        const v16i start = offsets ? v16i_set1(PE_DOT_BASE) : dot_start(n, -zero);
PE_UNROLL(8)
        for (int v = 0; v < PANEL_GROUPS; v++) dot[i][v] = start;
      }
PE_UNROLL(8)
      for (int first = 8 / halves * h; first < 8 / halves * (h + 1); first += run) {
        v16i part[INT_TILE_ROWS][PANEL_GROUPS];
PE_UNROLL(8)
        for (int g = first; g < first + run; g++) {
          v64u w[PANEL_GROUPS];
PE_UNROLL(8)
          for (int v = 0; v < PANEL_GROUPS; v++) w[v] = v64u_load(panel + 64 * (PANEL_GROUPS * g + v));
PE_UNROLL(8)
          for (int i = 0; i < rows; i++) {
            const v64u q = v64u_set4(linear_step_of(x, ld, i, s)->q + 4 * g);
PE_UNROLL(8)
            for (int v = 0; v < PANEL_GROUPS; v++)
              if (z128) dot[i][v] = dot_z128(dot[i][v], w[v], q);
              else part[i][v] = g == first ? dot_run_begin(dot[i][v], w[v], q) : dot_run_add(part[i][v], w[v], q);
          }
        }
PE_UNROLL(8)
        for (int i = 0; i < rows && !z128; i++)
PE_UNROLL(8)
          for (int v = 0; v < PANEL_GROUPS; v++) dot[i][v] = dot_run_end(dot[i][v], part[i][v]);
      }
PE_UNROLL(8)
      for (int i = 0; i < rows; i++) {
        v16f d = v16f_set1(linear_step_of(x, ld, i, s)->d);
PE_UNROLL(8)
        for (int v = 0; v < PANEL_GROUPS; v++) {
          const float *s_at = f + 16 * (PANEL_GROUPS * h + v);
          sum[i][v] = v16f_fma(dot_scaled(dot[i][v], v16f_load(s_at), v16f_load(s_at + 16 * PANEL_GROUPS * halves)), d, sum[i][v]);
        }
        if (offsets) {
          v16f ds = v16f_set1(halves == 2 ? linear_step_of(x, ld, i, s)->dsum2[h] : linear_step_of(x, ld, i, s)->dsum);
PE_UNROLL(8)
          for (int v = 0; v < PANEL_GROUPS; v++)
            sum[i][v] = v16f_fma(v16f_load(f + 16 * (PANEL_GROUPS * (2 * halves + h) + v)), ds, sum[i][v]);
        }
      }
    }
    panel += panel_step_bytes(halves, offsets);
  }
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < PANEL_GROUPS; v++) linear_end(to, 16 * (PANEL_GROUPS * i + v), sum[i][v]);
}
#endif

/* A tile for each kind of steps (pyengine/dtype.py: PackedForm) and run of products, whatever the format. */
#define TILE(name, halves, offsets, z128, run)                                                                         \
  static void tile_##name(int zero, const uint8_t *panel, int64_t count, const char *x, int64_t ld, int64_t m,         \
                          panel_ahead *ahead, linear_target to) {                                                      \
    for (; m >= INT_TILE_ROWS; m -= INT_TILE_ROWS, x += INT_TILE_ROWS * ld, linear_skip(&to, INT_TILE_ROWS))           \
      tile_rows(INT_TILE_ROWS, halves, offsets, z128, run, zero, panel, count, x, ld, ahead, &to);                 \
    if (m == 3) tile_rows(3, halves, offsets, z128, run, zero, panel, count, x, ld, ahead, &to);                   \
    if (m == 2) tile_rows(2, halves, offsets, z128, run, zero, panel, count, x, ld, ahead, &to);                   \
    if (m == 1) tile_rows(1, halves, offsets, z128, run, zero, panel, count, x, ld, ahead, &to);                   \
  }
TILE(zero, 1, 0, 0, 8)
TILE(zero128, 1, 0, 1, 8)
TILE(offset, 1, 1, 0, 8)
TILE(halves_zero, 2, 0, 0, 4)
TILE(halves_offset, 2, 1, 0, 4)
#if PE_RUN(32) < 8 /* codes of more bits have shorter runs */
TILE(zero_4, 1, 0, 0, 4)
TILE(offset_4, 1, 1, 0, 4)
TILE(halves_zero_2, 2, 0, 0, 2)
#else
#define tile_zero_4 tile_zero
#define tile_offset_4 tile_offset
#define tile_halves_zero_2 tile_halves_zero
#endif

#define UNPACK(id, ...)                                                                                                \
  static void unpack_##id(const uint8_t *const group[PANEL_GROUPS], int64_t s0, int64_t count, uint8_t *to) {          \
    unpack_panel(PE_##id, group, s0, count, to);                                                                       \
  }
PE_PACKED_BLOCKS(UNPACK)

static linear_tiler tiler_of(int32_t id) {
  const int run = PE_RUN(pe_most_code(pe_traits_of(id)));
#define tile_of_zero run < 8 ? tile_zero_4 : tile_zero
#define tile_of_zero128 tile_zero128
#define tile_of_offset run < 8 ? tile_offset_4 : tile_offset
#define tile_of_halves_zero run < 4 ? tile_halves_zero_2 : tile_halves_zero
#define tile_of_halves_offset tile_halves_offset
  switch (id) {
#define TILER(name, blocks, head, body, steps, ...) case PE_##name: return (linear_tiler){unpack_##name, tile_of_##steps};
    PE_PACKED_BLOCKS(TILER)
#undef TILER
    default: return (linear_tiler){0, 0};
  }
}

/* k at .. at + count - 1 of all rows, as int8. */
static const char *gather_codes(const linear_product *t, int64_t at, int64_t count) {
  const linear_gather *g = t->gather;
  char *to = (char *)(g->room + t->rows * GATHER_FLOATS);
  if (g->codes) {
    g->codes(g, t->row0, t->rows, at, count, to, GATHER_CODES);
    return to;
  }
  g->floats(g, t->row0, t->rows, at, count, g->room, GATHER_FLOATS);
  for (int64_t i = 0; i < t->rows; i++) linear_quantize(g->room + i * GATHER_FLOATS, count, to + i * GATHER_CODES);
  return to;
}

/* While k = at .. at + count - 1 of a panel is multiplied: that part of the next panel; of the last panel, what the first one reads next. */
static panel_ahead panel_ahead_of(const linear_product *t, int sme, pe_traits c, int64_t panel, int64_t at, int64_t count) {
  const int64_t bytes = c.head + c.body; /* of a block */
  const int last = panel + 1 == t->panels;
  panel_ahead y = {.at = at / c.k * bytes + (last ? pe_min(32 * PANEL_STEPS / c.k * bytes, t->bytes) : 0), .end = t->bytes};
  for (int v = 0; v < PANEL_GROUPS; v++) {
    y.group[v] = linear_group(t, last ? 0 : panel + 1, v);
    y.next[v] = t->next + v * t->bytes;
  }
  y.lines = (count / c.k * bytes + 63) / 64;
  y.steps = sme ? 1 : (t->rows + INT_TILE_ROWS - 1) / INT_TILE_ROWS * tile_fetches(count / 32);
  return y;
}

/* Whether SME multiplies. One thread does it: its unit is shared by processors, and beside it they have theirs. Bits are the same. */
static int sme_takes(const linear_product *t) {
#if defined(PE_SME)
  return t->rows >= SME_ROWS && t->thread == 0 && PE_NAME(linear_sme_is_free)();
#else
  (void)t;
  return 0;
#endif
}

void PE_NAME(linear_tiles)(const linear_product *t) {
  const pe_traits c = pe_traits_of(t->id);
  const int zero = c.zero == 128 ? 128 - PE_DOT_ZERO : c.zero, sme = sme_takes(t);
  const int64_t chunk = 32 * PANEL_STEPS;
  linear_tiler f = tiler_of(t->id);
#if defined(PE_SME)
  if (sme) f = PE_NAME(linear_sme_tiler)(t->id);
#endif
  for (int64_t at = 0; at < t->k; at += chunk) {
    const int64_t count = pe_min(chunk, t->k - at), ldq = t->gather ? GATHER_CODES : t->ldq;
    const char *q = t->gather ? gather_codes(t, at, count) : t->q + 2 * at;
#if defined(PE_SME)
    if (sme) PE_NAME(linear_sme_turn)(q, ldq, count / 2, t->rows, t->turned);
    if (sme) q = t->turned;
#endif
    for (int64_t p = 0; p < t->panels; p++) {
      const uint8_t *group[PANEL_GROUPS];
      for (int v = 0; v < PANEL_GROUPS; v++) group[v] = linear_group(t, p, v);
      panel_ahead ahead = panel_ahead_of(t, sme, c, p, at, count);
      f.unpack(group, at / 32, count / 32, (uint8_t *)t->panel);
      f.tile(zero, (const uint8_t *)t->panel, count / 32, q, ldq, t->rows, &ahead, linear_target_of(t, p, at, at + count));
    }
  }
}

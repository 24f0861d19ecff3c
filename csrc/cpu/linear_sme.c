/* linear_sme.c: `linear` with the outer products of SME, where vectors have 512 bits: linear.c says what the whole is.
 * Reference: pyengine/ops/matmul.py: linear.
 *
 * ZA is four tiles of 16 x 16 words; `smopa` and `fmopa` add the outer product of two vectors to one of them. The vector of weights is one
 * of a panel: 16 rows x 4 of k as bytes, or x 1 as floats. That of x has 16 rows in the same layout, so 16 rows x 64 bytes of x are turned,
 * once for all panels of a strip.
 *
 *   integers  The 64 bytes of a row are a linear_step, so a turned step is 8 vectors for `smopa`, and one each of scales and sums. A tile is
 *             the sum over 32 of k, or 16 where scales change so often; then its rows leave ZA, are scaled, and enter 16 sums in registers.
 *   floats    up to 64 rows of x times 16 of the weights, k ascending: an outer product is an fma for each sum
 *
 * So the bits are those of all instruction sets. Integers begin with PE_DOT_BASE in place of a conversion (dots.h).
 *
 * Streaming mode. Functions marked STREAMING run in it, and call nothing. `stream` enters and leaves it around one, by instructions of its
 * own: clang's attributes for that ask for the length of vectors before they enter, by an instruction that Apple's processors lack there.
 */
#include "dots.h"
#include "linear_parts.h"

#include <stddef.h>

#if defined(PE_SME)
#include <arm_sme.h>

#define STREAMING __arm_streaming __arm_inout("za")
#define STREAMING_INLINE static inline __attribute__((always_inline, unused))
#define EACH16(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15)

/* ---- streaming mode ---- */

/* Whether ZA is free. By the procedure call standard, TPIDR2_EL0 points to where a caller further up wants its contents saved, if they count. */
int PE_NAME(linear_sme_is_free)(void) {
  uint64_t keep;
  __asm__ volatile("mrs %0, tpidr2_el0" : "=r"(keep));
  return !keep;
}

#define FOUR_OF(kind, a, b, c, d) kind #a, kind #b, kind #c, kind #d
#define SIXTEEN_OF(kind) \
  FOUR_OF(kind, 0, 1, 2, 3), FOUR_OF(kind, 4, 5, 6, 7), FOUR_OF(kind, 8, 9, 10, 11), FOUR_OF(kind, 12, 13, 14, 15)
#define SIXTEEN_MORE_OF(kind) \
  FOUR_OF(kind, 16, 17, 18, 19), FOUR_OF(kind, 20, 21, 22, 23), FOUR_OF(kind, 24, 25, 26, 27), FOUR_OF(kind, 28, 29, 30, 31)
#if defined(__APPLE__) || defined(_WIN32)
#define PLATFORM_REGISTER /* x18 belongs to the system */
#else
#define PLATFORM_REGISTER "x18",
#endif

/* body(job) in streaming mode, with a ZA of zeros. Entering and leaving it clears all vectors and predicates, so none is live across. */
static __attribute__((noinline)) void stream(void (*body)(const void *) STREAMING, const void *job) {
  __asm__ volatile(
    "sub sp, sp, #128\n\t" /* where a compiler may keep values below the stack */
    "smstart\n\t"
    "mov x0, %1\n\t"
    "blr %0\n\t"
    "smstop\n\t"
    "add sp, sp, #128"
    :
    : "r"(body), "r"(job)
    : SIXTEEN_OF("x"), "x16", "x17", PLATFORM_REGISTER "x30", SIXTEEN_OF("v"), SIXTEEN_MORE_OF("v"), SIXTEEN_OF("p"), "cc", "memory");
}

/* ---- rows of x, turned ---- */

/* 64-byte lines of rows of x, `ld` bytes apart; of the last line so many words as are left of `words`. to: [16 rows][line][word][row] */
typedef struct turn_job { const char *x; int64_t ld, words, rows; int32_t *to; } turn_job;

/* A number that the compiler does not know: where it knows the number of a row of a tile, clang 22 addresses rows 1 to 3 from a register that
 * holds something else, and takes an instruction for each further row. */
STREAMING_INLINE uint32_t hidden(uint32_t n) STREAMING {
  __asm__("" : "+r"(n));
  return n;
}

/* Rows 4q .. 4q + 3 of a tile are addressed from a register each. */
#define SLICES const uint32_t slice0 = hidden(0), slice1 = hidden(4), slice2 = hidden(8), slice3 = hidden(12);
#define SLICE(i) ((i) < 4 ? slice0 : (i) < 8 ? slice1 : (i) < 12 ? slice2 : slice3) + (i) % 4

/* Rows beyond the last are that one again: nobody reads their sums. */
#define TURN_IN(i)                                                                                                     \
  svld1_hor_za32(0, SLICE(i), some, x);                                                                                \
  x += i < last ? t->ld : 0;
#define TURN_OUT(i) svst1_ver_za32(0, SLICE(i), all, to + 16 * i);

static void turn(const void *job) STREAMING {
  const turn_job *t = job;
  const svbool_t all = svptrue_b32();
  int32_t *to = t->to;
  SLICES
  for (int64_t r = 0; r < t->rows; r += 16)
    for (int64_t word = 0; word < t->words; word += 16, to += 256) {
      const svbool_t some = svwhilelt_b32_s64(word, t->words);
      const int64_t last = t->rows - 1 - r;
      const char *x = t->x + r * t->ld + 4 * word;
      EACH16(TURN_IN)
      EACH16(TURN_OUT)
    }
}

void PE_NAME(linear_sme_turn)(const void *x, int64_t ld, int64_t words, int64_t rows, void *to) {
  const turn_job job = {x, ld, words, rows, to};
  stream(turn, &job);
}

/* ---- integers ---- */

/* A panel in L1: for each step 8 vectors of signed codes, then of each half scales, dot_base of scales, and offsets. */
PE_INLINE void unpack_panel(int id, const uint8_t *const group[PANEL_GROUPS], int64_t s0, int64_t count, uint8_t *to) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32, scales = t.halves * (2 + t.offsets);
  for (int64_t b = s0 / steps; b < (s0 + count) / steps; b++) {
    const uint8_t *head = pe_block_head(t, group[0], b), *body = pe_block_body(t, group[0], b);
PE_UNROLL_STEPS
    for (int j = 0; j < steps; j++, to += 64 * (8 + scales)) {
PE_UNROLL(4)
      for (int part = 0; part < 4; part++) {
        float *f = (float *)(to + 512 + 16 * part);
        pe_step_part w;
        pe_unpack_part(id, head, body, j, part, &w);
PE_UNROLL(8)
        for (int g = 0; g < 8; g++)
          vst1q_s8((int8_t *)to + 64 * g + 16 * part, (int8x16_t)(t.zero == 128 ? w.u[g] ^ (uint8_t)0x80 : w.u[g]));
PE_UNROLL(2)
        for (int h = 0; h < t.halves; h++) {
          vst1q_f32(f + 16 * h, (float32x4_t)w.s[h]);
          vst1q_f32(f + 16 * (t.halves + h), vmulq_n_f32((float32x4_t)w.s[h], -12582912.0f));
          if (t.offsets) vst1q_f32(f + 16 * (2 * t.halves + h), (float32x4_t)w.o[h]);
        }
      }
    }
  }
}

#define UNPACK(id, ...)                                                                                                \
  static void unpack_##id(const uint8_t *const group[PANEL_GROUPS], int64_t s0, int64_t count, uint8_t *to) {          \
    unpack_panel(PE_##id, group, s0, count, to);                                                                       \
  }
PE_PACKED_BLOCKS(UNPACK)

/* A panel times turned rows of x. */
typedef struct integer_job {
  int32_t zero;
  const uint8_t *panel;
  const int8_t *x;
  int64_t count, rows; /* steps; rows of x */
  linear_target to;
} integer_job;

/* Words of a linear_step, of which a turned one has a vector each. */
enum { STEP_D = 8, STEP_DSUM = 9, STEP_DSUM2 = 10, STEP_SUM = 12, STEP_SUM2 = 13 };
_Static_assert(offsetof(linear_step, d) == 4 * STEP_D && offsetof(linear_step, dsum) == 4 * STEP_DSUM &&
                 offsetof(linear_step, dsum2) == 4 * STEP_DSUM2 && offsetof(linear_step, sum) == 4 * STEP_SUM &&
                 offsetof(linear_step, sum2) == 4 * STEP_SUM2, "words of a step of x");

#define BEGIN(i)                                                                                                       \
  svfloat32_t sum##i = svdup_n_f32(0);                                                                                 \
  if (!t->to.opens) sum##i = svld1_f32(all, t->to.part + 16 * (r + (i < last ? i : last)));

/* Row 4q + i of tile h: scaled, and added to its sum. */
#define ROW(h, q, i, n)                                                                                                \
  sum##n = svmla_lane_f32(sum##n, svmad_f32_x(all, svread_hor_za32_f32_m(svundef_f32(), all, h, slice##q + i), s, base), d, i); \
  if (offsets) sum##n = svmla_lane_f32(sum##n, o, dsum, i);
#define ROWS(h, q, a, b, c, e)                                                                                         \
  {                                                                                                                    \
    const svfloat32_t d = svld1rq_f32(all, words + 16 * STEP_D + 4 * q), dsum = svld1rq_f32(all, sums + 4 * q);        \
    ROW(h, q, 0, a) ROW(h, q, 1, b) ROW(h, q, 2, c) ROW(h, q, 3, e)                                                    \
  }
/* Sums are done here: without this clang reads rows of the other half before, and keeps them on the stack. */
#define DONE(a, b, c, e) __asm__ volatile("" : "+w"(sum##a), "+w"(sum##b), "+w"(sum##c), "+w"(sum##e) : : "memory");
/* Half h of a step, or all of it. */
#define HALF(h)                                                                                                        \
  {                                                                                                                    \
    const float *words = (const float *)x, *scales = (const float *)(panel + 512);                                     \
    const float *sums = words + 16 * (halves == 2 ? STEP_DSUM2 + h : STEP_DSUM);                                       \
    const svint32_t codes = svld1_s32(all, (const int32_t *)x + 16 * (halves == 2 ? STEP_SUM2 + h : STEP_SUM));        \
    svint32_t start = svdup_n_s32(PE_DOT_BASE);                                                                        \
    if (!offsets) start = svmls_n_s32_x(all, start, codes, t->zero);                                                   \
    svzero_mask_za(h ? 0x22 : 0x11);                                                                                   \
    svaddva_za32_s32_m(h, all, all, start);                                                                            \
    for (int g = 8 / halves * h; g < 8 / halves * (h + 1); g++)                                                        \
      svmopa_za32_s8_m(h, bytes, bytes, svld1_s8(bytes, x + 64 * g), svld1_s8(bytes, (const int8_t *)panel + 64 * g)); \
    const svfloat32_t s = svld1_f32(all, scales + 16 * h), base = svld1_f32(all, scales + 16 * (halves + h));          \
    const svfloat32_t o = offsets ? svld1_f32(all, scales + 16 * (2 * halves + h)) : s;                                \
    ROWS(h, 0, 0, 1, 2, 3) ROWS(h, 1, 4, 5, 6, 7) ROWS(h, 2, 8, 9, 10, 11) ROWS(h, 3, 12, 13, 14, 15)                  \
    DONE(0, 1, 2, 3) DONE(4, 5, 6, 7) DONE(8, 9, 10, 11) DONE(12, 13, 14, 15)                                          \
  }
#define END(i)                                                                                                         \
  if (i <= last) {                                                                                                     \
    float *to = (t->to.closes ? t->to.acc : t->to.part) + 16 * (r + i);                                                \
    svst1_f32(all, to, t->to.closes ? svadd_f32_x(all, svld1_f32(all, to), sum##i) : sum##i);                          \
  }

STREAMING_INLINE void integers(int halves, int offsets, const integer_job *t) STREAMING {
  const svbool_t all = svptrue_b32(), bytes = svptrue_b8();
  const int8_t *x = t->x;
  SLICES
  for (int64_t r = 0; r < t->rows; r += 16) {
    const int64_t last = t->rows - 1 - r;
    const uint8_t *panel = t->panel;
    EACH16(BEGIN)
    for (int64_t s = 0; s < t->count; s++, x += 1024, panel += 64 * (8 + halves * (2 + offsets))) {
      HALF(0)
      if (halves == 2) HALF(1)
    }
    EACH16(END)
  }
}

/* An entry for each kind of steps (pyengine/dtype.py: PackedForm). x is turned already. */
#define TILE(name, halves, offsets)                                                                                    \
  static void integers_##name(const void *job) STREAMING { integers(halves, offsets, job); }                           \
  static void tile_##name(int zero, const uint8_t *panel, int64_t count, const char *x, int64_t ld, int64_t m,         \
                          panel_ahead *ahead, linear_target to) {                                                      \
    const integer_job job = {zero, panel, (const int8_t *)x, count, m, to};                                            \
    (void)ld;                                                                                                          \
    fetch_ahead(ahead);                                                                                                \
    stream(integers_##name, &job);                                                                                     \
  }
TILE(zero, 1, 0)
TILE(offset, 1, 1)
TILE(halves_zero, 2, 0)
TILE(halves_offset, 2, 1)
#define tile_zero128 tile_zero /* codes are signed */

linear_tiler PE_NAME(linear_sme_tiler)(int32_t id) {
  switch (id) {
#define TILER(name, blocks, head, body, steps, ...) case PE_##name: return (linear_tiler){unpack_##name, tile_##steps};
    PE_PACKED_BLOCKS(TILER)
#undef TILER
    default: return (linear_tiler){0, 0};
  }
}

/* ---- floats ---- */

/* Rows panel[step k] of 16 floats, k < count, times turned rows of x. */
typedef struct float_job {
  const float *panel;
  int64_t step, count, rows;
  const float *x;
  linear_target to;
} float_job;

/* Row i of tile n, of those that are there: from the sums so far, or to them. */
#define FLOAT_ROWS(n)                                                                                                  \
  for (uint32_t i = hidden(0); n < tiles && i < 16 && r + 16 * n + i < t->rows; i++)
#define FLOAT_BEGIN(n) FLOAT_ROWS(n) svld1_hor_za32(n, i, all, t->to.part + 16 * (r + 16 * n + i));
#define FLOAT_PRODUCT(n)                                                                                               \
  if (n < tiles) svmopa_za32_f32_m(n, all, all, svld1_f32(all, x + n * lines * 256 + 16 * k), w);
#define FLOAT_END(n)                                                                                                   \
  FLOAT_ROWS(n) {                                                                                                      \
    float *to = t->to.acc + 16 * (r + 16 * n + i);                                                                     \
    if (t->to.closes) svst1_f32(all, to, svadd_f32_x(all, svld1_f32(all, to), svread_hor_za32_f32_m(svundef_f32(), all, n, i))); \
    else svst1_hor_za32(n, i, all, t->to.part + 16 * (r + 16 * n + i));                                                \
  }

STREAMING_INLINE void float_rows(int tiles, const float_job *t, int64_t r) STREAMING {
  const svbool_t all = svptrue_b32();
  const int64_t lines = (t->count + 15) / 16;
  const float *x = t->x + r * lines * 16, *panel = t->panel;
  svzero_za();
  if (!t->to.opens) { FLOAT_BEGIN(0) FLOAT_BEGIN(1) FLOAT_BEGIN(2) FLOAT_BEGIN(3) }
  for (int64_t k = 0; k < t->count; k++, panel += t->step) {
    const svfloat32_t w = svld1_f32(all, panel);
    FLOAT_PRODUCT(0) FLOAT_PRODUCT(1) FLOAT_PRODUCT(2) FLOAT_PRODUCT(3)
  }
  FLOAT_END(0) FLOAT_END(1) FLOAT_END(2) FLOAT_END(3)
}

static void floats(const void *job) STREAMING {
  const float_job *t = job;
  int64_t r = 0;
  for (; r + 48 < t->rows; r += 64) float_rows(4, t, r);
  if (r + 32 < t->rows) float_rows(3, t, r);
  else if (r + 16 < t->rows) float_rows(2, t, r);
  else if (r < t->rows) float_rows(1, t, r);
}

void PE_NAME(linear_sme_floats)(const float *panel, int64_t step, int64_t count, const float *x, int64_t rows, linear_target to) {
  const float_job job = {panel, step, count, rows, x, to};
  stream(floats, &job);
}
#endif

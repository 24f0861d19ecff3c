/* linear_float.c: `linear` with weights that are floats, and with formats that have no packed form, which become floats: linear.c
 * says what the whole is.
 * Reference: pyengine/ops/matmul.py: linear.
 *
 * Up to ROWS_FEW rows of x read packed floats where they lie. Else packed F32 is read there 128 of k at a time, and other weights become float
 * panels of as many (256 from the file's layout); a tile takes FLOAT_TILE_ROWS rows of x times PANEL_GROUPS vectors. x stays float; one
 * accumulator an output, fma in k order, cut into slices as all products are (linear_parts.h).
 */
#include "../host/dequant.h"
#include "linear_parts.h"

/* A panel as it lies in memory: 16 floats of group v for number k at `at + v apart + k step`. */
typedef struct panel_floats { const float *at; int64_t apart, step; } panel_floats;

/* The first `groups` of a panel times `rows` <= FLOAT_TILE_ROWS rows of x. */
PE_INLINE void float_rows(int rows, int groups, panel_floats panel, int64_t count, const float *x, int64_t ld, const linear_target *to) {
  v16f sum[FLOAT_TILE_ROWS][PANEL_GROUPS];
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < groups; v++) sum[i][v] = linear_begin(to, 16 * (PANEL_GROUPS * i + v));
  for (int64_t k = 0; k < count; k++, panel.at += panel.step) {
    v16f w[PANEL_GROUPS];
PE_UNROLL(8)
    for (int v = 0; v < groups; v++) w[v] = v16f_load(panel.at + panel.apart * v);
PE_UNROLL(8)
    for (int i = 0; i < rows; i++) {
      v16f a = v16f_set1(x[i * ld + k]);
PE_UNROLL(8)
      for (int v = 0; v < groups; v++) sum[i][v] = v16f_fma(w[v], a, sum[i][v]);
    }
  }
PE_UNROLL(8)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < groups; v++) linear_end(to, 16 * (PANEL_GROUPS * i + v), sum[i][v]);
}

/* ahead[v]: `lines` cache lines of group v that the next panel is made of; each tile asks for its share of them. The next rows of x are not asked
 * for: a processor sees that they come, and asking took a twentieth of the time. Lines wait in the second cache: the first one is full. */
PE_INLINE void tile_groups(int groups, panel_floats panel, int64_t count, const uint8_t *const ahead[PANEL_GROUPS], int64_t lines,
                           const float *x, int64_t ld, int64_t m, linear_target to) {
  const int64_t share = (lines * FLOAT_TILE_ROWS + m - 1) / m;
  for (int64_t asked = 0; m >= FLOAT_TILE_ROWS; m -= FLOAT_TILE_ROWS, x += FLOAT_TILE_ROWS * ld, linear_skip(&to, FLOAT_TILE_ROWS)) {
    for (const int64_t stop = pe_min(lines, asked + share); asked < stop; asked++)
      for (int v = 0; v < PANEL_GROUPS; v++) __builtin_prefetch(ahead[v] + 64 * asked, 0, 2);
    float_rows(FLOAT_TILE_ROWS, groups, panel, count, x, ld, &to);
  }
#define PART(n)                                                                                                        \
  if (m >= n) {                                                                                                        \
    float_rows(n, groups, panel, count, x, ld, &to);                                                                   \
    m -= n;                                                                                                            \
    x += n * ld;                                                                                                       \
    linear_skip(&to, n);                                                                                               \
  }
#if defined(PE_AVX512)
  PART(4)
#endif
  PART(2)
  PART(1)
#undef PART
}

/* A panel's last groups may be those of no rows of the matrix: they are left out. */
static void float_tile(int64_t groups, panel_floats panel, int64_t count, const uint8_t *const ahead[PANEL_GROUPS], int64_t lines, const float *x,
                       int64_t ld, int64_t m, linear_target to) {
#if defined(PE_AVX512)
  if (groups == 1) return tile_groups(1, panel, count, ahead, lines, x, ld, m, to);
  if (groups == 2) return tile_groups(2, panel, count, ahead, lines, x, ld, m, to);
#endif
  (void)groups;
  tile_groups(PANEL_GROUPS, panel, count, ahead, lines, x, ld, m, to);
}

void PE_NAME(linear_float_tile)(int64_t groups, const float *panel, int64_t count, const uint8_t *const ahead[PANEL_GROUPS], int64_t lines,
                                const float *x, int64_t ld, int64_t m, linear_target to) {
  float_tile(groups, (panel_floats){panel, 16, 16 * PANEL_GROUPS}, count, ahead, lines, x, ld, m, to);
}

/* Few rows: acc[i][16 PANEL_GROUPS] = a panel of packed floats times row i of x, straight from memory. */
PE_INLINE void stream_rows(int id, int rows, const uint8_t *const group[PANEL_GROUPS], int64_t count, const float *x, int64_t ld,
                           float *acc) {
  const int size = id == PE_F32 ? 64 : 32, lines = 64 / size; /* k of a cache line */
  v16f sum[ROWS_FEW][PANEL_GROUPS];
PE_UNROLL(4)
  for (int i = 0; i < rows; i++)
PE_UNROLL(8)
    for (int v = 0; v < PANEL_GROUPS; v++) sum[i][v] = v16f_zero();
  for (int64_t k = 0, end = 32 * linear_slice(count), first = 1; k < count; k++) {
PE_UNROLL(8)
    for (int v = 0; v < PANEL_GROUPS; v++) {
      v16f w = linear_floats_of(id, group[v] + size * k);
      if (lines == 1 || k % 2 == 0) pe_prefetch(group[v] + size * k + DECODE_AHEAD / 2);
PE_UNROLL(4)
      for (int i = 0; i < rows; i++) sum[i][v] = v16f_fma(w, v16f_set1(x[i * ld + k]), sum[i][v]);
    }
    if (k + 1 < end && k + 1 < count) continue;
PE_UNROLL(4)
    for (int i = 0; i < rows; i++)
PE_UNROLL(8)
      for (int v = 0; v < PANEL_GROUPS; v++) {
        float *to = acc + 16 * (PANEL_GROUPS * i + v);
        v16f_store(to, first ? sum[i][v] : v16f_add(v16f_load(to), sum[i][v]));
        sum[i][v] = v16f_zero();
      }
    first = 0;
    end += 32 * linear_slice(count);
  }
}

static void stream(int id, int64_t m, const uint8_t *const group[PANEL_GROUPS], int64_t count, const float *x, int64_t ld,
                   float *acc) {
#define STREAM(id_, rows)                                                                                              \
  if (id == PE_##id_ && m == rows) stream_rows(PE_##id_, rows, group, count, x, ld, acc);
  STREAM(F32, 1) STREAM(F32, 2) STREAM(F32, 3) STREAM(F32, 4)
  STREAM(F16, 1) STREAM(F16, 2) STREAM(F16, 3) STREAM(F16, 4)
  STREAM(BF16, 1) STREAM(BF16, 2) STREAM(BF16, 3) STREAM(BF16, 4)
#undef STREAM
}

/* Columns k0 .. k0 + count - 1 of the groups of a panel, as floats [count][16 PANEL_GROUPS]. `rows` is room for
 * [16][FILE_PANEL_DEPTH] floats. */
static pe_status float_panel(const pe_tensor *w, int64_t g0, int64_t k0, int64_t count, float *panel, float *rows) {
  const int64_t n = w->shape[0], k = w->shape[1], last = (n - 1) / 16;
  for (int v = 0; v < PANEL_GROUPS; v++) {
    const int64_t g = pe_min(g0 + v, last);
    if (w->dtype >= PE_PACKED) {
      const int32_t id = w->dtype - PE_PACKED;
      const uint8_t *from = (const uint8_t *)w->data + g * pe_pack_group_bytes(id, k) + k0 * 16 * pe_format_of(id).bytes;
      float *to = panel + 16 * v;
#define WIDEN(id_, size)                                                                                               \
  if (id == id_)                                                                                                       \
    for (int64_t i = 0; i < count; i++) v16f_store(to + 16 * PANEL_GROUPS * i, linear_floats_of(id_, from + size * i));
      WIDEN(PE_F16, 32) WIDEN(PE_BF16, 32) /* F32 is read where it lies */
#undef WIDEN
      continue;
    }
    const int64_t block = pe_format_of(w->dtype).elements;
    if (!block) return PE_BAD_DTYPE;
    for (int64_t r = 0; r < 16; r++) {
      const char *from = (const char *)w->data + pe_min(16 * g + r, n - 1) * w->stride[0] + k0 / block * w->stride[1];
      pe_status status = pe_dequantize_row(w->dtype, from, rows + FILE_PANEL_DEPTH * r, count);
      if (status) return status;
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t r = 0; r < 16; r++) panel[16 * (PANEL_GROUPS * i + v) + r] = rows[FILE_PANEL_DEPTH * r + i];
  }
  return PE_OK;
}

void PE_NAME(linear_few_floats)(const linear_product *t) {
  for (int64_t p = 0; p < t->panels; p++) {
    const uint8_t *group[PANEL_GROUPS];
    for (int v = 0; v < PANEL_GROUPS; v++) group[v] = linear_group(t, p, v);
    stream(t->id, t->rows, group, t->k, t->h, t->ldh, t->acc + p * linear_sums(t));
  }
}

/* A panel times all rows of x. turned: of SME; else NULL. */
static void panel_times_rows(const linear_product *t, int64_t groups, panel_floats panel, int64_t count, const uint8_t *const ahead[PANEL_GROUPS],
                             const float *x, int64_t ld, const char *turned, linear_target to) {
  const int64_t lines = t->packed ? count * pe_format_of(t->id).bytes / 4 : 0; /* of a cache */
#if defined(PE_SME)
  if (turned) {
    for (int64_t i = 0; i < lines; i++) __builtin_prefetch(ahead[0] + 64 * i, 0, 2);
    PE_NAME(linear_sme_floats)(panel.at, panel.step, count, (const float *)turned, t->rows, to);
    return;
  }
#endif
  (void)turned;
  float_tile(groups, panel, count, ahead, lines, x, ld, t->rows, to);
}

/* Rows of x turned for SME's tiles; NULL: others multiply. */
static const char *turned_rows(const linear_product *t, const float *x, int64_t ld, int64_t count) {
#if defined(PE_SME)
  if (t->rows >= SME_ROWS && PE_NAME(linear_sme_is_free)()) {
    PE_NAME(linear_sme_turn)(x, 4 * ld, count, t->rows, t->turned);
    return t->turned;
  }
#endif
  (void)t, (void)x, (void)ld, (void)count;
  return 0;
}

pe_status PE_NAME(linear_floats)(const linear_product *t) {
  const int64_t chunk = t->packed ? FLOAT_PANEL_DEPTH : FILE_PANEL_DEPTH, size = 16 * pe_format_of(t->id).bytes;
  for (int64_t at = 0; at < t->k; at += chunk) {
    const int64_t count = pe_min(chunk, t->k - at), ld = t->gather ? GATHER_FLOATS : t->ldh;
    const float *x = t->gather ? t->gather->room : t->h + at;
    if (t->gather) t->gather->floats(t->gather, t->row0, t->rows, at, count, t->gather->room, ld);
    const char *turned = turned_rows(t, x, ld, count);
    for (int64_t p = 0; p < t->panels; p++) {
      panel_floats panel = {(const float *)t->panel, 16, 16 * PANEL_GROUPS};
      if (t->packed && t->id == PE_F32) {
        panel = (panel_floats){(const float *)linear_group(t, p, 0) + 16 * at, t->bytes / 4, 16};
      } else {
        const pe_status status = float_panel(t->w, t->g0 + PANEL_GROUPS * p, at, count, (float *)t->panel, t->dequantized);
        if (status) return status;
      }
      const int64_t later = p + 1 < t->panels ? at : at + count; /* k where the next panel begins */
      const uint8_t *ahead[PANEL_GROUPS];
      for (int v = 0; v < PANEL_GROUPS; v++) {
        const uint8_t *group = linear_group(t, p, v);
        ahead[v] = !t->packed              ? 0
                   : p + 1 < t->panels     ? group + PANEL_GROUPS * t->bytes + size * at
                   : later < t->k          ? group - PANEL_GROUPS * p * t->bytes + size * later
                                           : t->next + v * t->bytes;
      }
      panel_times_rows(t, pe_min(PANEL_GROUPS, t->groups - t->g0 - PANEL_GROUPS * p), panel, count, ahead, x, ld, turned,
                       linear_target_of(t, p, at, at + count));
    }
  }
  return PE_OK;
}

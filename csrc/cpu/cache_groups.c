/* cache_groups.c: groups of 32 keys and values that a cache holds in full, into cells of which keys have scales by channel.
 * Reference: pyengine/ops/groups.py: cache_groups.
 *
 * A thread claims groups of one head. Keys: 16 channels of the 32 keys at a time are transposed, then each channel's 32 elements are one
 * block. Values: a cell after the other, mixed where they are in blocks (cells.h). A block's bytes follow from its 32 elements alone.
 */
#include "cells.h"

/* `at` is a head of a cache and a cell. */
static char *cell_at(const pe_tensor *t, int64_t head, int64_t cell) { return (char *)t->data + head * t->stride[0] + cell * t->stride[1]; }

PE_INLINE v16f load_full(int32_t dtype, const char *cell, int64_t i) {
  return dtype == PE_F32 ? load_cell(PE_F32, cell, i) : dtype == PE_F16 ? load_cell(PE_F16, cell, i) : load_cell(PE_BF16, cell, i);
}

/* One cell into another one; head: room for its elements. */
static void copy_cell(const pe_tensor *from, const char *source, const pe_tensor *to, char *target, float *head) {
  const int64_t n = to->shape[2];
  const int32_t d = from->dtype;
  const int64_t size = cell_format_of(d).bytes;
  for (int64_t i = 0; i < n; i += 16)
    store_some(head + i, n - i >= 16 ? load_full(d, source, i) : d == PE_F32 ? load_cell_n(PE_F32, source, size, i, n - i)
                         : d == PE_F16 ? load_cell_n(PE_F16, source, size, i, n - i) : load_cell_n(PE_BF16, source, size, i, n - i), n - i);
  if (in_blocks(to)) mix(head, n);
  store_cell(target, to->dtype, head, n);
}

static void group_of_keys(const pe_tensor *from, int64_t head, int64_t source, const pe_tensor *to, int64_t target) {
  const int32_t format = channel_format(to->dtype);
  const int64_t bytes = cell_format_of(format).bytes;
  char *block = cell_at(to, head, target);
  float t[16 * GROUP_KEYS];
  for (int64_t i = 0; i < to->shape[2]; i += 16) {
    for (int j = 0; j < GROUP_KEYS; j += 16) {
      v16f x[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) x[r] = load_full(from->dtype, cell_at(from, head, source + j + r), i);
      transpose16(x, t + j, GROUP_KEYS);
    }
    for (int c = 0; c < 16; c++, block += bytes) store_cell(block, format, t + c * GROUP_KEYS, GROUP_KEYS);
  }
}

static pe_status check_full(const char *name, const pe_tensor *t, pe_stream *s) {
  const pe_status bad = check_cells("cache_groups", name, t, 1, s);
  if (bad || !in_blocks(t)) return bad;
  return pe_fail(s, PE_NO_KERNEL, "cache_groups: '%s' has dtype %d; plain numbers are possible", name, t->dtype);
}

/* Do n numbers begin groups of a cache? */
static pe_status check_groups(const int32_t *cells, const int32_t *target, int64_t n, const pe_tensor *t, pe_stream *s) {
  for (int64_t i = 0; i < n; i++)
    if (target[i] >= 0 && (cells[i] < 0 || cells[i] % GROUP_KEYS || cells[i] + GROUP_KEYS > t->shape[1]))
      return pe_fail(s, PE_BAD_VALUE, "cache_groups: group %lld begins at cell %d of %lld", (long long)i, cells[i], (long long)t->shape[1]);
  return PE_OK;
}

/* One cell a thread. */
static int64_t head_bytes(const pe_tensor *k, const pe_tensor *v) { return pe_round_up(pe_max(k->shape[2], v->shape[2]) * 4, 64); }

PE_SCRATCH(cpu, cache_groups)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params;
  return n_threads * head_bytes(pe_arg(a, 0), pe_arg(a, 1));
}

PE_KERNEL(cpu, cache_groups)(const pe_tensor *k, const pe_tensor *v, const pe_tensor *k_full, const pe_tensor *v_full, const pe_tensor *source,
                             const pe_tensor *target, const pe_tensor *out0, const pe_tensor *out1, const pe_cache_groups_params *p,
                             pe_stream *s) {
  (void)p, (void)out0, (void)out1; /* the caches themselves */
  const int64_t n = source->shape[0], g = k->shape[0];
  const int32_t *from = source->data, *to = target->data;
  float *head = (float *)(s->scratch + s->ith * head_bytes(k, v));
  const int by_channel = channel_format(k->dtype) != PE_F32;
  pe_status bad = by_channel ? check_channels("cache_groups", "k", k, s) : check_cells("cache_groups", "k", k, 1, s);
  if (!bad) bad = check_cells("cache_groups", "v", v, 1, s);
  if (!bad) bad = check_full("k_full", k_full, s);
  if (!bad) bad = check_full("v_full", v_full, s);
  if (!bad) bad = check_groups(from, to, n, k_full, s);
  if (!bad) bad = check_groups(to, to, n, k, s);
  if (bad) return bad;
  for (int64_t i; (i = pe_next(s, 0)) < n * g;) {
    const int64_t a = from[i / g], b = to[i / g], h = i % g;
    if (b < 0) continue;
    if (by_channel) group_of_keys(k_full, h, a, k, b);
    for (int j = 0; j < GROUP_KEYS; j++) {
      if (!by_channel) copy_cell(k_full, cell_at(k_full, h, a + j), k, cell_at(k, h, b + j), head);
      copy_cell(v_full, cell_at(v_full, h, a + j), v, cell_at(v, h, b + j), head);
    }
  }
  return PE_OK;
}

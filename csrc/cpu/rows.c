/* rows.c: out[i] = scale * table[ids[i]], the table in any format; a negative id -1-j copies row j of `media` instead.
 * Reference: pyengine/ops/matmul.py: rows.
 *
 * A thread owns whole rows of `out` and claims them one by one. A row of a packed table is one lane of its group of 16 rows, so
 * all lines of the group are read. Values are those of pe_dequantize_row, bit for bit, times scale.
 */
#include "../host/dequant.h"
#include "cpu.h"
#include "unpack.h"

/* Lane r of a group, k elements. */
PE_INLINE void row_of_group(int id, const uint8_t *group, int64_t k, int64_t r, v16f scale, float *to) {
  const pe_traits t = pe_traits_of(id);
  const int steps = t.k / 32;
  for (int64_t b = 0; b < k / t.k; b++) {
PE_UNROLL_STEPS
    for (int j = 0; j < steps; j++) {
      pe_step w;
      float f[4][16];
      uint8_t u[8][64], code[32];
      pe_unpack(id, pe_block_head(t, group, b), pe_block_body(t, group, b), j, &w);
      for (int g = 0; g < 8; g++) {
        v64u_store(u[g], w.u[g]);
        memcpy(code + 4 * g, u[g] + 4 * r, 4);
      }
      for (int h = 0; h < t.halves; h++) {
        v16f_store(f[h], w.s[h]);
        if (t.offsets) v16f_store(f[2 + h], w.o[h]);
      }
      for (int i = 0; i < 2; i++) {
        int h = i * (t.halves - 1);
        v16i q = v16i_sub(v16i_and(v16i_load_i8(code + 16 * i), v16i_set1(255)), v16i_set1(t.zero));
        v16f y = v16f_mul(v16i_to_f(q), v16f_set1(f[h][r]));
        if (t.offsets) y = v16f_add(y, v16f_set1(f[2 + h][r]));
        v16f_store(to + 32 * (b * steps + j) + 16 * i, v16f_mul(y, scale));
      }
    }
  }
}

static pe_status packed_row(int id, const uint8_t *group, int64_t k, int64_t r, float times, float *to) {
  const v16f scale = v16f_set1(times);
  uint16_t h;
  switch (id) {
#define BLOCKS(name, ...) case PE_##name: row_of_group(PE_##name, group, k, r, scale, to); return PE_OK;
    PE_PACKED_BLOCKS(BLOCKS)
#undef BLOCKS
    case PE_F32:
      for (int64_t i = 0; i < k; i++) to[i] = ((const float *)group)[16 * i + r] * times;
      return PE_OK;
    case PE_F16:
    case PE_BF16:
      for (int64_t i = 0; i < k; i++) {
        memcpy(&h, group + 32 * i + 2 * r, 2);
        to[i] = (id == PE_F16 ? pe_f16_to_f32(h) : pe_bf16_to_f32(h)) * times;
      }
      return PE_OK;
    default: return PE_NO_KERNEL;
  }
}

PE_KERNEL(cpu, rows)(const pe_tensor *table, const pe_tensor *ids, const pe_tensor *media, const pe_tensor *out,
                const pe_rows_params *p, pe_stream *s) {
  const int64_t m = ids->shape[0], n = table->shape[0], k = table->shape[1], n_media = media ? media->shape[0] : 0;
  const v16f scale = v16f_set1(p->scale);
  const int packed = table->dtype >= PE_PACKED;
  const int64_t bytes = packed ? pe_pack_group_bytes(table->dtype - PE_PACKED, k) : 0;
  if (packed && k && !bytes) return pe_fail(s, PE_NO_KERNEL, "rows: no packed form of format %d", table->dtype - PE_PACKED);
  for (int64_t i; (i = pe_next(s, 0)) < m;) {
    const int64_t id = *(const int32_t *)((const char *)ids->data + i * ids->stride[0]);
    float *to = (float *)((char *)out->data + i * out->stride[0]);
    if (id < 0 && -1 - id < n_media) {
      memcpy(to, (const char *)media->data + (-1 - id) * media->stride[0], (size_t)k * sizeof(float));
      continue;
    }
    if (id < 0 || id >= n) return pe_fail(s, PE_BAD_VALUE, "rows: id %lld of %lld", (long long)id, (long long)n);
    if (k == 0) continue;
    pe_status status;
    if (packed) {
      status = packed_row(table->dtype - PE_PACKED, (const uint8_t *)table->data + id / 16 * bytes, k, id % 16, p->scale, to);
    } else {
      status = pe_dequantize_row(table->dtype, (const char *)table->data + id * table->stride[0], to, k);
      for (int64_t c = 0; c < k && !status && p->scale != 1.0f; c += 16) {
        if (c + 16 <= k) v16f_store(to + c, v16f_mul(v16f_load(to + c), scale));
        else v16f_store_n(to + c, v16f_mul(v16f_load_n(to + c, k - c), scale), k - c);
      }
    }
    if (status) return pe_fail(s, PE_NO_KERNEL, "rows: format %d cannot be read", table->dtype);
  }
  return PE_OK;
}

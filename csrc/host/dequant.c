/* dequant.c: portable C, one function a format, one block a call. Loads small tensors and rows of embeddings, and is
 * what the kernels of quantized products are compared with. Those never come here themselves.
 *
 * Every product and sum is rounded to float32 in the order that gguf-py writes it, so the file must be compiled with
 * -ffp-contract=off and without -ffast-math.
 */
#include "dequant.h"
#include "../quants.h"

#include <float.h>
#include <string.h>

_Static_assert(FLT_EVAL_METHOD == 0, "float arithmetic must be rounded to float");

static const int8_t iq4_nl_values[16] = PE_IQ4_NL_VALUES;
static const int8_t e2m1_x2_values[16] = PE_E2M1_X2_VALUES;

/* ---- codebooks ------------------------------------------------------------------------------------------------- */

/* As many rows as an index has values, so that no index of a file can miss. */
static int8_t iq2_xxs_grid[1 << 8][8], iq2_xs_grid[1 << 9][8], iq2_s_grid[1 << 10][8];
static int8_t iq3_xxs_grid[1 << 8][4], iq3_s_grid[1 << 9][4], iq1_grid[1 << 11][8];

typedef struct {
  int8_t *table;
  int64_t bytes;
  int ready;      /* stored with release after the table, read with acquire before it */
} codebook;

static codebook *codebook_of(int32_t dtype) {
  static codebook iq2_xxs = {iq2_xxs_grid[0], sizeof iq2_xxs_grid, 0}, iq2_xs = {iq2_xs_grid[0], sizeof iq2_xs_grid, 0},
                  iq2_s = {iq2_s_grid[0], sizeof iq2_s_grid, 0}, iq3_xxs = {iq3_xxs_grid[0], sizeof iq3_xxs_grid, 0},
                  iq3_s = {iq3_s_grid[0], sizeof iq3_s_grid, 0}, iq1 = {iq1_grid[0], sizeof iq1_grid, 0};
  switch (dtype) {
    case PE_IQ2_XXS: return &iq2_xxs;
    case PE_IQ2_XS: return &iq2_xs;
    case PE_IQ2_S: return &iq2_s;
    case PE_IQ3_XXS: return &iq3_xxs;
    case PE_IQ3_S: return &iq3_s;
    case PE_IQ1_S:
    case PE_IQ1_M: return &iq1;
    default: return NULL;
  }
}

pe_status pe_set_codebook(int32_t dtype, const void *table, int64_t bytes) {
  codebook *book = codebook_of(dtype);
  if (!book) return PE_BAD_DTYPE;
  if (!table || bytes != book->bytes) return PE_BAD_SHAPE;
  if (__atomic_load_n(&book->ready, __ATOMIC_ACQUIRE)) {
    return memcmp(book->table, table, (size_t)bytes) ? PE_BAD_VALUE : PE_OK;
  }
  memcpy(book->table, table, (size_t)bytes);
  __atomic_store_n(&book->ready, 1, __ATOMIC_RELEASE);
  return PE_OK;
}

const int8_t *pe_codebook(int32_t dtype) {
  codebook *book = codebook_of(dtype);
  return book && __atomic_load_n(&book->ready, __ATOMIC_ACQUIRE) ? book->table : NULL;
}

/* ---- helpers --------------------------------------------------------------------------------------------------- */

static uint32_t load_u32(const void *p) {
  uint32_t v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* Seven stored sign bits and the eighth, which makes the number of minus signs even. */
static uint32_t even_signs(uint32_t seven) {
  uint32_t parity = seven ^ (seven >> 4);
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  return seven | (parity & 1u) << 7;
}

/* y[i] = scale * grid[i], negated where bit i of signs is set. Returns the end of what it wrote. */
static float *put_signed(float *y, float scale, const int8_t *grid, int n, uint32_t signs) {
  for (int i = 0; i < n; i++) {
    float v = scale * (float)grid[i];
    y[i] = signs >> i & 1u ? -v : v;
  }
  return y + n;
}

/* Scale and minimum number j of 8 in the twelve bytes of block_q4_K and block_q5_K. */
static void k4_scale_min(const uint8_t *s, int j, float *scale, float *min) {
  uint32_t sc, m;
  if (j < 4) {
    sc = s[j] & 63u;
    m = s[j + 4] & 63u;
  } else {
    sc = (s[j + 4] & 15u) | (s[j - 4] >> 6) << 4;
    m = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
  }
  *scale = (float)(int32_t)sc;
  *min = (float)(int32_t)m;
}

/* ---- blocks of 32 (nvfp4: 64) ---------------------------------------------------------------------------------- */

static void q4_0(const void *src, float *y) {
  block_q4_0 b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int i = 0; i < 16; i++) {
    y[i] = d * (float)((b.qs[i] & 15) - 8);
    y[i + 16] = d * (float)((b.qs[i] >> 4) - 8);
  }
}

static void q4_1(const void *src, float *y) {
  block_q4_1 b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d), m = pe_f16_to_f32(b.m);
  for (int i = 0; i < 16; i++) {
    y[i] = d * (float)(b.qs[i] & 15) + m;
    y[i + 16] = d * (float)(b.qs[i] >> 4) + m;
  }
}

/* Elements i and i + 16 of block_q5_0 and block_q5_1. */
static int q5_low(const uint8_t *qs, uint32_t qh, int i) { return (int)((qs[i] & 15u) | (qh >> i & 1u) << 4); }
static int q5_high(const uint8_t *qs, uint32_t qh, int i) { return qs[i] >> 4 | (int)(qh >> (i + 16) & 1u) << 4; }

static void q5_0(const void *src, float *y) {
  block_q5_0 b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  uint32_t qh = load_u32(b.qh);
  for (int i = 0; i < 16; i++) {
    y[i] = d * (float)(q5_low(b.qs, qh, i) - 16);
    y[i + 16] = d * (float)(q5_high(b.qs, qh, i) - 16);
  }
}

static void q5_1(const void *src, float *y) {
  block_q5_1 b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d), m = pe_f16_to_f32(b.m);
  uint32_t qh = load_u32(b.qh);
  for (int i = 0; i < 16; i++) {
    y[i] = d * (float)q5_low(b.qs, qh, i) + m;
    y[i + 16] = d * (float)q5_high(b.qs, qh, i) + m;
  }
}

static void q8_0(const void *src, float *y) {
  block_q8_0 b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int i = 0; i < 32; i++) y[i] = (float)b.qs[i] * d;
}

static void iq4_nl(const void *src, float *y) {
  block_iq4_nl b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int i = 0; i < 16; i++) {
    y[i] = d * (float)iq4_nl_values[b.qs[i] & 15];
    y[i + 16] = d * (float)iq4_nl_values[b.qs[i] >> 4];
  }
}

static void mxfp4(const void *src, float *y) {
  block_mxfp4 b;
  memcpy(&b, src, sizeof b);
  float d = pe_e8m0_half_to_f32(b.e);
  for (int i = 0; i < 16; i++) {
    y[i] = d * (float)e2m1_x2_values[b.qs[i] & 15];
    y[i + 16] = d * (float)e2m1_x2_values[b.qs[i] >> 4];
  }
}

static void nvfp4(const void *src, float *y) {
  block_nvfp4 b;
  memcpy(&b, src, sizeof b);
  for (int s = 0; s < 4; s++, y += 16) {
    float d = pe_e4m3_half_to_f32(b.d[s]);
    for (int i = 0; i < 8; i++) {
      y[i] = d * (float)e2m1_x2_values[b.qs[8 * s + i] & 15];
      y[i + 8] = d * (float)e2m1_x2_values[b.qs[8 * s + i] >> 4];
    }
  }
}

/* ---- blocks of 256: K formats ---------------------------------------------------------------------------------- */

/* Code i of 256 in two-bit fields, the order that block_q2_K draws. */
static int two_bits(const uint8_t *qs, int i) { return qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3; }

static void q2_k(const void *src, float *y) {
  block_q2_K b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d), dmin = pe_f16_to_f32(b.dmin);
  for (int j = 0; j < 16; j++) {
    float scale = d * (float)(b.scales[j] & 15), min = dmin * (float)(b.scales[j] >> 4);
    for (int i = 16 * j; i < 16 * j + 16; i++) y[i] = scale * (float)two_bits(b.qs, i) - min;
  }
}

static void q3_k(const void *src, float *y) {
  block_q3_K b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 16; j++) {
    int low = b.scales[j % 8] >> (j / 8 * 4) & 15, high = b.scales[8 + j % 4] >> (j / 4 * 2) & 3;
    float scale = d * (float)((low | high << 4) - 32);
    for (int i = 16 * j; i < 16 * j + 16; i++) {
      int third = b.hmask[i % 32] >> (i / 32) & 1;
      y[i] = scale * (float)(two_bits(b.qs, i) - (third ? 0 : 4));
    }
  }
}

static void q4_k(const void *src, float *y) {
  block_q4_K b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d), dmin = pe_f16_to_f32(b.dmin);
  for (int j = 0; j < 8; j++, y += 32) {
    float scale, min;
    k4_scale_min(b.scales, j, &scale, &min);
    scale = d * scale;
    min = dmin * min;
    for (int i = 0; i < 32; i++) y[i] = scale * (float)(b.qs[j / 2 * 32 + i] >> (j % 2 * 4) & 15) - min;
  }
}

static void q5_k(const void *src, float *y) {
  block_q5_K b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d), dmin = pe_f16_to_f32(b.dmin);
  for (int j = 0; j < 8; j++, y += 32) {
    float scale, min;
    k4_scale_min(b.scales, j, &scale, &min);
    scale = d * scale;
    min = dmin * min;
    for (int i = 0; i < 32; i++) {
      int q = (b.qs[j / 2 * 32 + i] >> (j % 2 * 4) & 15) | (b.qh[i] >> j & 1) << 4;
      y[i] = scale * (float)q - min;
    }
  }
}

static void q6_k(const void *src, float *y) {
  block_q6_K b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int i = 0; i < 256; i++) {
    int half = i / 128, r = i % 128;
    int low = b.ql[64 * half + r % 64] >> (r / 64 * 4) & 15, high = b.qh[32 * half + r % 32] >> (r / 32 * 2) & 3;
    y[i] = (d * (float)b.scales[i / 16]) * (float)((low | high << 4) - 32);
  }
}

/* ---- blocks of 256: codebook formats --------------------------------------------------------------------------- */

static void iq2_xxs(const void *src, float *y) {
  block_iq2_xxs b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 8; j++) {
    uint32_t indices = load_u32(&b.qs[4 * j]), rest = load_u32(&b.qs[4 * j + 2]);
    float scale = d * (0.5f + (float)(int32_t)(rest >> 28)) * 0.25f;
    for (int g = 0; g < 4; g++) {
      y = put_signed(y, scale, iq2_xxs_grid[indices >> (8 * g) & 255u], 8, even_signs(rest >> (7 * g) & 127u));
    }
  }
}

static void iq2_xs(const void *src, float *y) {
  block_iq2_xs b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 32; j++) {
    float scale = d * (0.5f + (float)(b.scales[j / 4] >> (j / 2 % 2 * 4) & 15)) * 0.25f;
    y = put_signed(y, scale, iq2_xs_grid[b.qs[j] & 511u], 8, even_signs(b.qs[j] >> 9));
  }
}

static void iq2_s(const void *src, float *y) {
  block_iq2_s b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 32; j++) {
    float scale = d * (0.5f + (float)(b.scales[j / 4] >> (j / 2 % 2 * 4) & 15)) * 0.25f;
    int index = b.qs[j] | (b.qh[j / 4] >> (j % 4 * 2) & 3) << 8;
    y = put_signed(y, scale, iq2_s_grid[index], 8, b.signs[j]);
  }
}

static void iq3_xxs(const void *src, float *y) {
  block_iq3_xxs b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 64; j++) {
    uint32_t aux = load_u32(&b.aux[j / 8 * 4]);
    float scale = d * (0.5f + (float)(int32_t)(aux >> 28)) * 0.5f;
    uint32_t signs = even_signs(aux >> (j % 8 / 2 * 7) & 127u);
    y = put_signed(y, scale, iq3_xxs_grid[b.qs[j]], 4, signs >> (j % 2 * 4));
  }
}

static void iq3_s(const void *src, float *y) {
  block_iq3_s b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 64; j++) {
    float scale = d * (float)(1 + 2 * (b.scales[j / 16] >> (j / 8 % 2 * 4) & 15));
    int index = b.qs[j] | (b.qh[j / 8] >> (j % 8) & 1) << 8;
    y = put_signed(y, scale, iq3_s_grid[index], 4, (uint32_t)b.signs[j / 2] >> (j % 2 * 4));
  }
}

static float *put_iq1(float *y, float scale, uint32_t index, uint32_t minus) {
  float delta = minus ? -0.125f : 0.125f;
  for (int i = 0; i < 8; i++) y[i] = scale * ((float)iq1_grid[index][i] + delta);
  return y + 8;
}

static void iq1_s(const void *src, float *y) {
  block_iq1_s b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 32; j++) {
    uint32_t qh = b.qh[j / 4];
    float scale = d * (float)(int32_t)(2u * (qh >> 12 & 7u) + 1u);
    y = put_iq1(y, scale, b.qs[j] | (qh >> (j % 4 * 3) & 7u) << 8, qh >> 15);
  }
}

static void iq1_m(const void *src, float *y) {
  block_iq1_m b;
  memcpy(&b, src, sizeof b);
  uint16_t words[4];
  memcpy(words, b.scales, sizeof words);
  uint32_t d_bits = 0;
  for (int k = 0; k < 4; k++) d_bits |= (uint32_t)(words[k] >> 12) << (4 * k);
  float d = pe_f16_to_f32((uint16_t)d_bits);
  for (int j = 0; j < 32; j++) {
    uint32_t qh = (uint32_t)b.qh[j / 2] >> (j % 2 * 4);
    float scale = d * (float)(2 * (words[j / 8] >> (j / 2 % 4 * 3) & 7) + 1);
    y = put_iq1(y, scale, b.qs[j] | (qh & 7u) << 8, qh & 8u);
  }
}

static void iq4_xs(const void *src, float *y) {
  block_iq4_xs b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int j = 0; j < 8; j++, y += 32) {
    int low = b.scales_l[j / 2] >> (j % 2 * 4) & 15, high = b.scales_h >> (2 * j) & 3;
    float scale = d * (float)((low | high << 4) - 32);
    for (int i = 0; i < 16; i++) {
      y[i] = scale * (float)iq4_nl_values[b.qs[16 * j + i] & 15];
      y[i + 16] = scale * (float)iq4_nl_values[b.qs[16 * j + i] >> 4];
    }
  }
}

/* ---- blocks of 256: ternary formats ---------------------------------------------------------------------------- */

/* Digit n of each of `count` bytes; digits are major. Returns the end of what it wrote. */
static float *put_ternary(float *y, float d, const uint8_t *bytes, int count, int digits) {
  uint32_t power = 1;
  for (int n = 0; n < digits; n++, power *= 3) {
    for (int l = 0; l < count; l++) {
      uint32_t fraction = bytes[l] * power & 255u;
      *y++ = d * (float)((int32_t)(fraction * 3 >> 8) - 1);
    }
  }
  return y;
}

static void tq1_0(const void *src, float *y) {
  block_tq1_0 b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  y = put_ternary(y, d, b.qs, 32, 5);
  y = put_ternary(y, d, b.qs + 32, 16, 5);
  put_ternary(y, d, b.qh, 4, 4);
}

static void tq2_0(const void *src, float *y) {
  block_tq2_0 b;
  memcpy(&b, src, sizeof b);
  float d = pe_f16_to_f32(b.d);
  for (int i = 0; i < 256; i++) y[i] = d * (float)(two_bits(b.qs, i) - 1);
}

/* ---- plain formats --------------------------------------------------------------------------------------------- */

static void f32(const void *src, float *y) { memcpy(y, src, sizeof *y); }

static void f16(const void *src, float *y) {
  uint16_t h;
  memcpy(&h, src, sizeof h);
  *y = pe_f16_to_f32(h);
}

static void bf16(const void *src, float *y) {
  uint16_t h;
  memcpy(&h, src, sizeof h);
  *y = pe_bf16_to_f32(h);
}

pe_status pe_dequantize_row(int32_t dtype, const void *src, float *dst, int64_t n) {
  void (*block)(const void *, float *);
  switch (dtype) {
#define FORMAT(name, function) \
  case PE_##name: block = function; break
    FORMAT(F32, f32);
    FORMAT(F16, f16);
    FORMAT(BF16, bf16);
    FORMAT(Q4_0, q4_0);
    FORMAT(Q4_1, q4_1);
    FORMAT(Q5_0, q5_0);
    FORMAT(Q5_1, q5_1);
    FORMAT(Q8_0, q8_0);
    FORMAT(IQ4_NL, iq4_nl);
    FORMAT(MXFP4, mxfp4);
    FORMAT(NVFP4, nvfp4);
    FORMAT(Q2_K, q2_k);
    FORMAT(Q3_K, q3_k);
    FORMAT(Q4_K, q4_k);
    FORMAT(Q5_K, q5_k);
    FORMAT(Q6_K, q6_k);
    FORMAT(IQ2_XXS, iq2_xxs);
    FORMAT(IQ2_XS, iq2_xs);
    FORMAT(IQ2_S, iq2_s);
    FORMAT(IQ3_XXS, iq3_xxs);
    FORMAT(IQ3_S, iq3_s);
    FORMAT(IQ1_S, iq1_s);
    FORMAT(IQ1_M, iq1_m);
    FORMAT(IQ4_XS, iq4_xs);
    FORMAT(TQ1_0, tq1_0);
    FORMAT(TQ2_0, tq2_0);
#undef FORMAT
    default: return PE_BAD_DTYPE;
  }
  const int64_t elements = pe_format_of(dtype).elements, bytes = pe_format_of(dtype).bytes;
  if (n < 0 || n % elements) return PE_BAD_SHAPE;
  if (codebook_of(dtype) && !pe_codebook(dtype)) return PE_NO_KERNEL;
  for (int64_t i = 0; i < n / elements; i++) block((const char *)src + i * bytes, dst + i * elements);
  return PE_OK;
}

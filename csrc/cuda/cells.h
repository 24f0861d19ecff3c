/* cells.h: what one cell of a key/value cache holds, one head of one token, in kernels: plain numbers (F32, F16, BF16), or blocks of 32
 * as csrc/quants.h draws them (Q8_0, Q4_0, Q4_1, Q2_1). Writing gives the bytes that csrc/cpu/cells.h gives for the same floats. In an
 * array of plain numbers the elements of a cell may lie at any distance, blocks lie side by side. Keys by channel have a block for each
 * channel of GROUP_KEYS cells.
 *
 * Blocks hold mixed elements, H x of a key or value x, for one Hadamard matrix H (pyengine/ops/rope.py: mixed). */
#ifndef PE_CUDA_CELLS_H
#define PE_CUDA_CELLS_H

#include "../quants.h"
#include "cuda.h"

namespace pe {

/* The block of a format that caches may have; no elements where none has it. */
__host__ __device__ __forceinline__ pe_format cell_format_of(int32_t dtype) {
  switch (dtype) {
#define PE_CELL(name) case PE_##name: return pe_format{PE_BLOCK_##name, PE_BYTES_##name};
    PE_CELL(F32) PE_CELL(F16) PE_CELL(BF16) PE_CELL(Q8_0) PE_CELL(Q4_0) PE_CELL(Q4_1) PE_CELL(Q2_1)
#undef PE_CELL
    default: return pe_format{0, 0};
  }
}

/* A cache [heads, cells, elements]; distances in bytes. */
struct Cache {
  char *data;
  int64_t head, cell, element;
  int32_t dtype, elements;
  int64_t cells;
};

inline Cache cache_of(const pe_tensor *t) {
  return Cache{static_cast<char *>(t->data), t->stride[0], t->stride[1], t->stride[2], t->dtype, static_cast<int32_t>(t->shape[2]),
               t->shape[1]};
}

__host__ __device__ __forceinline__ bool in_blocks(const Cache &c) { return cell_format_of(c.dtype).elements > 1; }
__device__ __forceinline__ char *cell_at(const Cache &c, int64_t head, int64_t cell) { return c.data + head * c.head + cell * c.cell; }

/* Can kernels use this cache at all? side_by_side: its elements must not be spread. */
inline pe_status check_cells(const char *op, const char *name, const pe_tensor *t, bool side_by_side, pe_stream *s) {
  const pe_format f = cell_format_of(t->dtype);
  if (!f.elements)
    return pe_fail(s, PE_NO_KERNEL, "%s: '%s' has dtype %d; F32, F16, BF16, Q8_0, Q4_0, Q4_1 and Q2_1 are possible", op, name, t->dtype);
  if (t->shape[2] % f.elements)
    return pe_fail(s, PE_BAD_SHAPE, "%s: %lld elements of '%s' are no whole blocks", op, (long long)t->shape[2], name);
  if ((side_by_side || f.elements > 1) && t->stride[2] != f.bytes)
    return pe_fail(s, PE_NO_KERNEL, "%s: the elements of '%s' do not lie side by side", op, name);
  return PE_OK;
}

/* ---- keys by channel: a block holds one channel of the keys of a group, which are not mixed ---- */

enum { GROUP_KEYS = 32 };

/* The format of their blocks; PE_F32 where keys are not by channel. */
__host__ __device__ __forceinline__ int32_t channel_format(int32_t dtype) {
  return dtype == PE_Q4_1_CHANNELS ? PE_Q4_1 : dtype == PE_Q2_1_CHANNELS ? PE_Q2_1 : PE_F32;
}
__host__ __device__ __forceinline__ bool by_channel(const Cache &c) { return channel_format(c.dtype) != PE_F32; }

inline pe_status check_channels(const char *op, const char *name, const pe_tensor *t, pe_stream *s) {
  const int64_t bytes = cell_format_of(channel_format(t->dtype)).bytes;
  if (t->shape[2] % 32 || t->shape[1] % GROUP_KEYS || t->stride[2] != bytes || t->stride[1] != t->shape[2] / 32 * bytes ||
      (((uintptr_t)t->data | (uintptr_t)t->stride[0]) & 15))
    return pe_fail(s, PE_BAD_SHAPE, "%s: '%s' is no groups of %d cells, which lie side by side, of %lld elements", op, name, (int)GROUP_KEYS,
                   (long long)t->shape[2]);
  return PE_OK;
}

/* Keys that may be by channel. */
inline pe_status check_keys(const char *op, const char *name, const pe_tensor *t, bool side_by_side, pe_stream *s) {
  return channel_format(t->dtype) != PE_F32 ? check_channels(op, name, t, s) : check_cells(op, name, t, side_by_side, s);
}

/* ---- mixing ---- */

/* 1 / sqrt of the largest power of two that divides n. */
__device__ __forceinline__ float mixing_scale(int n) { return (float)(1.0 / sqrt((double)(n & -n))); }

/* x = H x in shared memory, by a warp; n is a multiple of 32. Sums are in the order of csrc/cpu/cells.h: within 16 elements a product, j
 * ascending, beyond that butterflies. Two lanes' elements never share a bank. */
__device__ __forceinline__ void mix(float *x, int n) {
  const int lane = threadIdx.x % 32, run = lane & 16, own = lane & 15, s = n & -n;
  for (int i = 0; i < n; i += 32) {
    float y = 0.0f;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const float v = x[i + run + j];
      y = __fadd_rn(y, __popc(j & own) & 1 ? -v : v);
    }
    const float other = __shfl_xor_sync(0xffffffffu, y, 16);
    y = run ? __fsub_rn(other, y) : __fadd_rn(y, other);
    __syncwarp();
    x[i + lane] = y;
  }
  __syncwarp();
  for (int h = 32; h < s; h *= 2) {
    for (int i = lane; i < n / 2; i += 32) {
      const int at = i / h * 2 * h + i % h;
      const float a = x[at], b = x[at + h];
      x[at] = __fadd_rn(a, b);
      x[at + h] = __fsub_rn(a, b);
    }
    __syncwarp();
  }
  const float shrink = mixing_scale(n);
  for (int i = lane; i < n; i += 32) x[i] = __fmul_rn(x[i], shrink);
  __syncwarp();
}

/* ---- writing ---- */

__device__ __forceinline__ uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ float from_half(uint16_t h) { return __half2float(__ushort_as_half(h)); }

/* To nearest even; NaN stays NaN. */
__device__ __forceinline__ uint16_t bf16_bits(float x) {
  const uint32_t b = __float_as_uint(x);
  return (uint16_t)((b & 0x7fffffffu) > 0x7f800000u ? b >> 16 | 0x40 : (b + 0x7fff + (b >> 16 & 1)) >> 16);
}

__device__ __forceinline__ float inverse(float d) { return d != 0.0f ? __fdiv_rn(1.0f, d) : 0.0f; }

/* To the nearest integer, halves away from zero. */
__device__ __forceinline__ int round_away(float x) {
  const float a = fabsf(x), n = rintf(a);
  return (int)copysignf(__fsub_rn(a, n) < 0.5f ? n : n + 1.0f, x);
}

/* The integer part of 0 <= x, at most 15. */
__device__ __forceinline__ int nibble_of(float x) { return (int)fminf(floorf(x), 15.0f); }

__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

/* In the order of v16f_sum of csrc/cpu/simd.h, of the sums of elements i and i + 16. */
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int d = 16; d; d /= 2) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, d));
  return x;
}

/* Of 2 bits a code, m and d are searched for: what csrc/cpu/cells.h (store_q2_1) does, operation by operation. */
__device__ __forceinline__ void store_q2_1(char *block, float x) {
  const int lane = threadIdx.x % 32;
  const float low = -lanes_max(-x), high = lanes_max(x), middle = __fmul_rn(__fadd_rn(low, high), 0.5f), mean = __fmul_rn(lanes_sum(x), 1.0f / 32);
  float best = INFINITY, scale = 0.0f, least = 0.0f;
  uint32_t code = 0;
#pragma unroll 1
  for (int from = 0; from < 2; from++) {
    const float reach = __fmul_rn(__fsub_rn(high, low), from ? 0.375f : 0.5f);
    float m = __fsub_rn(middle, reach), d = __fmul_rn(reach, 2.0f / 3);
#pragma unroll 1
    for (int i = 0; i < 3; i++) {
      const float dh = from_half(half_bits(d)), mh = from_half(half_bits(m));
      const float q = floorf(fminf(fmaxf(__fadd_rn(__fmul_rn(__fsub_rn(x, mh), inverse(dh)), 0.5f), 0.0f), 3.0f));
      const float off = __fsub_rn(__fadd_rn(__fmul_rn(q, dh), mh), x), sum = lanes_sum(__fmul_rn(off, off));
      if (!(sum >= best)) best = sum, scale = dh, least = mh, code = (uint32_t)q; /* so too where it is no number */
      const float all = lanes_sum(q), p = __fsub_rn(q, __fmul_rn(all, 1.0f / 32)), spread = lanes_sum(__fmul_rn(p, p));
      if (!(spread > 0.0f)) break;
      d = __fdiv_rn(lanes_sum(__fmul_rn(p, __fsub_rn(x, mean))), spread);
      m = __fsub_rn(mean, __fmul_rn(__fmul_rn(d, all), 1.0f / 32));
    }
  }
  code <<= 2 * (lane % 16);
#pragma unroll
  for (int d = 8; d; d /= 2) code |= __shfl_xor_sync(0xffffffffu, code, d);
  if (lane % 16 == 0) ((uint16_t *)block)[2 + lane / 8] = (uint16_t)code, ((uint16_t *)block)[3 + lane / 8] = (uint16_t)(code >> 16);
  if (lane == 0) ((uint16_t *)block)[0] = half_bits(scale), ((uint16_t *)block)[1] = half_bits(least);
}

/* One block, by a warp: lane i holds element i. Blocks are aligned to 2 bytes. */
__device__ __forceinline__ void store_block(char *block, int32_t dtype, float x) {
  const int lane = threadIdx.x % 32;
  uint8_t *codes = (uint8_t *)block + 2;
  uint16_t *head = (uint16_t *)block;
  if (dtype == PE_Q8_0) { /* d = max |x| / 127, codes x / d */
    const float d = __fdiv_rn(lanes_max(fabsf(x)), 127.0f);
    codes[lane] = (uint8_t)round_away(__fmul_rn(x, inverse(d)));
    if (lane == 0) head[0] = half_bits(d);
    return;
  }
  if (dtype == PE_Q2_1) return store_q2_1(block, x);
  int code;
  if (dtype == PE_Q4_0) { /* d = the first x with the largest |x|, over -8; codes x / d + 8.5 cut to an integer, rounded once */
    const float most = lanes_max(fabsf(x));
    const unsigned first = __ballot_sync(0xffffffffu, fabsf(x) == most);
    const float top = __shfl_sync(0xffffffffu, x, first ? __ffs((int)first) - 1 : 0), d = __fdiv_rn(top, -8.0f);
    code = nibble_of((float)((double)x * (double)inverse(d) + 8.5));
    if (lane == 0) head[0] = half_bits(d);
  } else { /* m = min x, d = (max x - m) / 15, codes (x - m) / d + 0.5 cut to an integer */
    const float m = -lanes_max(-x), d = __fdiv_rn(__fsub_rn(lanes_max(x), m), 15.0f);
    code = nibble_of(__fadd_rn(__fmul_rn(__fsub_rn(x, m), inverse(d)), 0.5f));
    codes += 2;
    if (lane == 0) head[0] = half_bits(d), head[1] = half_bits(m);
  }
  const int high = __shfl_down_sync(0xffffffffu, code, 16);
  if (lane < 16) codes[lane] = (uint8_t)(code | high << 4);
}

/* Write the n elements of a cell, which lie in shared memory, by a warp. */
__device__ __forceinline__ void store_cell(char *cell, int32_t dtype, const float *x, int n) {
  const int lane = threadIdx.x % 32;
  if (dtype == PE_F32) {
    for (int i = lane; i < n; i += 32) ((float *)cell)[i] = x[i];
  } else if (dtype == PE_F16 || dtype == PE_BF16) {
    const bool f16 = dtype == PE_F16;
    if (((uintptr_t)cell & 3) == 0 && n % 2 == 0) {
      for (int i = lane; i < n / 2; i += 32) {
        const float2 v = ((const float2 *)x)[i];
        ((uint32_t *)cell)[i] = f16 ? half_bits(v.x) | (uint32_t)half_bits(v.y) << 16 : bf16_bits(v.x) | (uint32_t)bf16_bits(v.y) << 16;
      }
    } else {
      for (int i = lane; i < n; i += 32) ((uint16_t *)cell)[i] = f16 ? half_bits(x[i]) : bf16_bits(x[i]);
    }
  } else {
    const int bytes = cell_format_of(dtype).bytes;
    for (int i = 0; i < n; i += 32, cell += bytes) store_block(cell, dtype, x[i + lane]);
  }
}

/* ---- reading ---- */

/* One plain number. */
__device__ __forceinline__ float load_number(int32_t dtype, const char *p) {
  if (dtype == PE_F32) return *(const float *)p;
  const uint16_t h = *(const uint16_t *)p;
  return dtype == PE_F16 ? from_half(h) : pe_bf16_to_f32(h);
}

} // namespace pe

#endif

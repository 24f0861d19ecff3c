/* unpack.h: steps of packed weights (csrc/cpu/pack.h draws them) as the A operand of mma.m16n8k32, in registers.
 *
 * A warp takes a *pair*: two groups of 16 rows, the same step of 32 of k in both. The packed form has 16 rows x 4 bytes side by side, so
 * 16 bytes are the same 4 of k of 4 rows. Lane l = 16 h + 4 q + t takes group h, rows 4q .. 4q+3 (a quad), and of every step the four of k
 * from 4t on and from 16 + 4t on:
 *
 *   nibbles   16 bytes at 64 t + 16 q           low nibbles: k = 4t .., high nibbles: k = 16 + 4t ..
 *   bytes     16 bytes at 64 t + 16 q, and 256 behind
 *   planes    16 bytes at 16 q of each plane, the same for the four t: a broadcast within the load
 *
 * So a load of a warp is two whole runs of 256 bytes, and what it holds is the A operand of two products with nothing exchanged: product j
 * (0, 1) has as its row g = 4h + q row 2j of the quad, and as its row g + 8 row 2j + 1. A product's D then holds, in lane l, rows 2j and
 * 2j + 1 of the quad times columns 2t, 2t + 1: over both products 4 neighbouring rows, whose scales this lane has.
 *
 * Codes of formats with a zero point of 2^b are shifted to the top of their byte and the top bit is flipped: (u - 2^b) 2^(7-b), a signed
 * byte; the scale takes the power of two back, which is exact. Formats whose codes are indices look up signed bytes. So no format needs
 * the sum of x to mend a zero point; those with offsets need it for the offset only.
 */
#ifndef PE_CUDA_UNPACK_H
#define PE_CUDA_UNPACK_H

#include "../quants.h"
#include "linear_parts.h"

namespace pe {

/* What the table of formats says, and where parts of a block lie. */
template <int FORMAT> struct Packed;

#define PE_PACKED_TRAITS(name, blocks_, head_, body_, steps_, halves_, offsets_, zero_)                          \
  template <> struct Packed<PE_##name> {                                                                         \
    static constexpr int block_steps = PE_BLOCK_##name / 32, unit = blocks_, head = head_, body = body_;         \
    static constexpr int halves = halves_, offsets = offsets_;                                                   \
  };
PE_PACKED_BLOCKS(PE_PACKED_TRAITS)
#undef PE_PACKED_TRAITS

template <int F> constexpr bool is_k = Packed<F>::block_steps == 8;
template <int F> constexpr bool is_table = F == PE_IQ4_NL || F == PE_IQ4_XS || F == PE_MXFP4;
template <int F> constexpr int body_scales = F == PE_Q3_K ? 192 : F == PE_Q6_K ? 256 : 0; /* bytes of scales that open a body */
template <int F> constexpr int step_bytes = (Packed<F>::body - body_scales<F>) / Packed<F>::block_steps;
template <int F> constexpr int unit_bytes = Packed<F>::unit * (Packed<F>::head + Packed<F>::body);

/* 16-byte pieces of codes that a lane takes of a step, and words of scales of a block. */
template <int F> constexpr int code_pieces = F == PE_Q3_K || F == PE_Q6_K                                   ? 3
                                             : F == PE_Q5_0 || F == PE_Q5_1 || F == PE_Q5_K || F == PE_Q8_0 || F == PE_Q2_K ? 2
                                                                                                            : 1;
template <int F> constexpr int scale_words = F == PE_Q2_K || F == PE_Q6_K                    ? 4
                                             : F == PE_Q3_K || F == PE_Q4_K || F == PE_Q5_K ? 3
                                             : F == PE_IQ4_XS                               ? 1
                                                                                            : 0;

/* What a signed code of a step is worth in units of its scale. */
template <int F> constexpr float code_unit = F == PE_Q4_0   ? 1.0f / 16
                                             : F == PE_Q5_0 ? 1.0f / 8
                                             : F == PE_Q3_K ? 1.0f / 32
                                             : F == PE_Q6_K ? 1.0f / 4
                                                            : 1.0f;

/* Bytes of a group in global memory, read once: or, swizzled, in shared memory. There bit 5 of an offset is flipped by bit 7, so that the
 * eight lanes of a quarter of a 16-byte load (two quads, four t) touch eight different quarters of 128 bytes. */
struct GlobalBytes {
  const uint8_t *at;
  __device__ __forceinline__ uint4 load16(int offset) const { return ld_global_16(at + offset); }
  __device__ __forceinline__ uint32_t load4(int offset) const { return ld_global_4(at + offset); }
  __device__ __forceinline__ uint32_t load2(int offset) const { return __ldg(reinterpret_cast<const uint16_t *>(at + offset)); }
};
__host__ __device__ constexpr int swizzled(int offset) { return offset ^ (offset >> 2 & 32); }
struct SharedBytes {
  const uint8_t *at;
  __device__ __forceinline__ uint4 load16(int offset) const { return *reinterpret_cast<const uint4 *>(at + swizzled(offset)); }
  __device__ __forceinline__ uint32_t load4(int offset) const { return *reinterpret_cast<const uint32_t *>(at + swizzled(offset)); }
  __device__ __forceinline__ uint32_t load2(int offset) const { return *reinterpret_cast<const uint16_t *>(at + swizzled(offset)); }
};

/* Codes of a step as they lie in memory: pieces of the quad. */
template <int F> struct Codes { uint4 piece[code_pieces<F>]; };

template <int F, class Bytes> __device__ __forceinline__ void load_codes(Codes<F> &c, const Bytes &from, int step, const Lane &l) {
  const int nibbles = step + 64 * l.t + 16 * l.q, plane = step + 16 * l.q;
  if constexpr (F == PE_Q2_K) {
    c.piece[0] = from.load16(plane), c.piece[1] = from.load16(plane + 64);
  } else if constexpr (F == PE_Q3_K) {
    c.piece[0] = from.load16(plane), c.piece[1] = from.load16(plane + 64), c.piece[2] = from.load16(plane + 128);
  } else {
    c.piece[0] = from.load16(nibbles);
    if constexpr (F == PE_Q8_0) c.piece[1] = from.load16(nibbles + 256);
    else if constexpr (code_pieces<F> >= 2) c.piece[1] = from.load16(plane + 256);
    if constexpr (F == PE_Q6_K) c.piece[2] = from.load16(plane + 320);
  }
}

/* ---- codes to signed or unsigned bytes: low is k = 4t .., high is k = 16 + 4t .. ---- */

__device__ __forceinline__ uint32_t pick(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

/* Signed values of the sixteen codes, four bytes a word. */
template <int F> __device__ __forceinline__ uint32_t table_word(int i) {
  /* -127 -104 -83 -65, -49 -35 -22 -10, 1 13 25 38, 53 69 89 113 */
  constexpr uint32_t iq4[4] = {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u};
  /* 0 1 2 3, 4 6 8 12, 0 -1 -2 -3, -4 -6 -8 -12 */
  constexpr uint32_t e2m1[4] = {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu};
  return F == PE_MXFP4 ? e2m1[i] : iq4[i];
}

/* Values of the four nibbles in the low half of w. */
template <int F> __device__ __forceinline__ uint32_t look_up(uint32_t w) {
  const uint32_t index = w & 0x7777u, low = __byte_perm(table_word<F>(0), table_word<F>(1), index);
  const uint32_t high = __byte_perm(table_word<F>(2), table_word<F>(3), index);
  return __byte_perm(low, high, 0x3210u | (w >> 1 & 0x4444u));
}

template <int F> __device__ __forceinline__ void to_bytes(const Codes<F> &c, int row, int t, uint32_t &low, uint32_t &high) {
  constexpr uint32_t top = 0x80808080u;
  const uint32_t w = pick(c.piece[0], row);
  if constexpr (F == PE_Q4_0) {
    low = (w << 4 & 0xf0f0f0f0u) ^ top, high = (w & 0xf0f0f0f0u) ^ top;
  } else if constexpr (F == PE_Q4_1 || F == PE_Q4_K) {
    low = w & 0x0f0f0f0fu, high = w >> 4 & 0x0f0f0f0fu;
  } else if constexpr (F == PE_Q5_0) {
    const uint32_t p = pick(c.piece[1], row);
    low = (w << 3 & 0x78787878u) | (~(p << (7 - t)) & top), high = (w >> 1 & 0x78787878u) | (~(p << (3 - t)) & top);
  } else if constexpr (F == PE_Q5_1 || F == PE_Q5_K) {
    const uint32_t p = pick(c.piece[1], row);
    low = (w & 0x0f0f0f0fu) | (p << (4 - t) & 0x10101010u), high = (w >> 4 & 0x0f0f0f0fu) | (p >> t & 0x10101010u);
  } else if constexpr (F == PE_Q8_0) {
    low = w ^ top, high = pick(c.piece[1], row) ^ top;
  } else if constexpr (F == PE_Q2_K) {
    low = w >> 2 * t & 0x03030303u, high = pick(c.piece[1], row) >> 2 * t & 0x03030303u;
  } else if constexpr (F == PE_Q3_K) {
    const uint32_t p = pick(c.piece[2], row), v = pick(c.piece[1], row);
    low = (w >> 2 * t << 5 & 0x60606060u) | (~(p << (7 - t)) & top);
    high = (v >> 2 * t << 5 & 0x60606060u) | (~(p << (3 - t)) & top);
  } else if constexpr (F == PE_Q6_K) {
    const uint32_t p = pick(c.piece[1], row), v = pick(c.piece[2], row);
    low = (w << 2 & 0x3c3c3c3cu) | ((p << (6 - 2 * t) & 0xc0c0c0c0u) ^ top);
    high = (w >> 2 & 0x3c3c3c3cu) | ((v << (6 - 2 * t) & 0xc0c0c0c0u) ^ top);
  } else {
    static_assert(is_table<F>, "a format without codes");
    const uint32_t a = look_up<F>(w), b = look_up<F>(w >> 16); /* bytes: low 0, high 0, low 1, high 1 and so on */
    low = __byte_perm(a, b, 0x6420u), high = __byte_perm(a, b, 0x7531u);
  }
}

/* The A operands of both products. */
template <int F> __device__ __forceinline__ void to_operands(const Codes<F> &c, const Lane &l, uint32_t (&a)[2][4]) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
    to_bytes<F>(c, 2 * j, l.t, a[j][0], a[j][2]);
    to_bytes<F>(c, 2 * j + 1, l.t, a[j][1], a[j][3]);
  }
}

/* ---- scales: w = s code, or s code + o ----
 *
 * Of each row of a pair a lane of its own takes the scales: lane 16 h + r row r of group h, for 4 steps at a time. They reach the lanes
 * that multiply through shared memory, [step][s of each half, o of each half][32 rows]: a store of a warp is 32 floats in a row, and
 * a quad's four are one load, the same for its four lanes. */

constexpr int SCALED_STEPS = 4;
template <int F> constexpr int scale_planes = Packed<F>::halves * (1 + Packed<F>::offsets);
template <int F> struct WarpScales { float at[SCALED_STEPS][scale_planes<F>][32]; };

/* Scales of a row as they lie in memory: of a block of 256, or of 4 blocks of 32. 16-bit numbers; of MXFP4 one word, the exponents of rows
 * 4 (r % 4) .. + 3 in block r / 4 of 4. */
template <int F> struct RowScales {
  uint32_t d[is_k<F> || F == PE_MXFP4 ? 1 : SCALED_STEPS];
  uint32_t m[Packed<F>::offsets || F == PE_IQ4_XS ? (is_k<F> ? 1 : SCALED_STEPS) : 1];
  uint32_t words[scale_words<F> > 0 ? scale_words<F> : 1];
};

/* Of a block of 256. head: of the block; words: where its scales of parts begin (in the head or the body). */
template <int F, class Bytes> __device__ __forceinline__ void load_scales(RowScales<F> &s, const Bytes &from, int head, int words) {
  const int r = threadIdx.x % 16;
  s.d[0] = from.load2(head + 2 * r);
  if constexpr (Packed<F>::offsets || F == PE_IQ4_XS) s.m[0] = from.load2(head + 32 + 2 * r);
#pragma unroll
  for (int i = 0; i < scale_words<F>; i++) s.words[i] = from.load4(words + 64 * i + 4 * r);
}

/* Of `count` blocks of 32, the first of which is the first of a unit. */
template <int F, class Bytes> __device__ __forceinline__ void load_scales_of_32(RowScales<F> &s, const Bytes &from, int unit, int count) {
  const int r = threadIdx.x % 16;
  if constexpr (F == PE_MXFP4) {
    s.d[0] = from.load4(unit + 4 * r);
  } else {
#pragma unroll
    for (int i = 0; i < SCALED_STEPS; i++) {
      if (i >= count) continue;
      const int head = unit + i / Packed<F>::unit * unit_bytes<F> + i % Packed<F>::unit * Packed<F>::head + 2 * r;
      s.d[i] = from.load2(head);
      if constexpr (Packed<F>::offsets) s.m[i] = from.load2(head + 32);
    }
  }
}

/* Where the scales of parts of a block begin. */
template <int F> __device__ __forceinline__ int words_at(int head, int body) { return body_scales<F> ? body : head + 64; }

__device__ __forceinline__ float half_float(uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); }
__device__ __forceinline__ float byte_float(uint32_t w, int i) { return static_cast<float>(w >> 8 * i & 255u); }

/* Scales of the row in step j of its block of 256, j = 4 late + i: to s and o of each half. A product of a 16-bit float and a scale of at
 * most 8 bits is exact. */
template <int F>
__device__ __forceinline__ void row_scales(const RowScales<F> &from, int late, int i, float (&s)[Packed<F>::halves], float (&o)[2]) {
  const float d = half_float(from.d[is_k<F> ? 0 : i]) * code_unit<F>;
  const int j = SCALED_STEPS * late + i, part = 2 * (i % 2); /* byte of a word that has the scales of two steps */
  if constexpr (F == PE_Q2_K || F == PE_Q6_K) {
    const uint32_t w = i < 2 ? (late ? from.words[2] : from.words[0]) : (late ? from.words[3] : from.words[1]);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if constexpr (F == PE_Q6_K) {
        s[h] = d * static_cast<float>(static_cast<int8_t>(w >> 8 * (part + h)));
      } else {
        s[h] = d * static_cast<float>(w >> 8 * (part + h) & 15u);
        o[h] = -half_float(from.m[0]) * static_cast<float>(w >> (8 * (part + h) + 4) & 15u);
      }
    }
  } else if constexpr (F == PE_Q3_K) { /* part i of quarter j / 2: low bits in a nibble, two high bits in the third word */
    const uint32_t low = from.words[i / 2] >> 4 * late & 0x0f0f0f0fu;
    const uint32_t w = low | (from.words[2] >> 2 * (j / 2) & 0x03030303u) << 4;
#pragma unroll
    for (int h = 0; h < 2; h++) s[h] = d * (byte_float(w, part + h) - 32.0f);
  } else if constexpr (F == PE_Q4_K || F == PE_Q5_K) {
    const uint32_t a = from.words[0], b = from.words[1], c = from.words[2];
    const uint32_t scale = late ? (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u) : a & 0x3f3f3f3fu;
    const uint32_t min = late ? (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u) : b & 0x3f3f3f3fu;
    s[0] = d * byte_float(scale, i);
    o[0] = -half_float(from.m[0]) * byte_float(min, i);
  } else if constexpr (F == PE_IQ4_XS) {
    const uint32_t scale = (from.words[0] >> 4 * j & 15u) | (from.m[0] >> 2 * j & 3u) << 4;
    s[0] = d * (static_cast<float>(scale) - 32.0f);
  } else {
    s[0] = d;
    if constexpr (Packed<F>::offsets) o[0] = half_float(from.m[i]);
  }
}

/* Write the scales of `count` steps for the warp, the second half of a block of 256 if `late`. */
template <int F>
__device__ __forceinline__ void expand_scales(const RowScales<F> &from, int late, int count, WarpScales<F> &to) {
  const int lane = threadIdx.x % 32;
  if constexpr (F == PE_MXFP4) {
    /* Eight lanes that store together take 32 rows of a step: words of both groups. */
    const int h = lane / 4 % 2, r = lane % 4, step = lane / 8;
    const uint32_t word = __shfl_sync(ALL, from.d[0], 16 * h + 4 * step + r);
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = pe_e8m0_half_to_f32(static_cast<uint8_t>(word >> 8 * i));
    *reinterpret_cast<float4 *>(&to.at[step][0][16 * h + 4 * r]) = make_float4(s[0], s[1], s[2], s[3]);
  } else {
#pragma unroll
    for (int i = 0; i < SCALED_STEPS; i++) {
      if (i >= count) continue;
      float s[Packed<F>::halves], o[2];
      row_scales<F>(from, late, i, s, o);
#pragma unroll
      for (int h = 0; h < Packed<F>::halves; h++) {
        to.at[i][h][lane] = s[h];
        if constexpr (Packed<F>::offsets) to.at[i][Packed<F>::halves + h][lane] = o[h];
      }
    }
  }
}

/* Of a step: [half][row of the quad]. */
template <int F> struct StepScales {
  float s[Packed<F>::halves][4], o[Packed<F>::halves][4];
};
template <int F> __device__ __forceinline__ void read_scales(const WarpScales<F> &from, int i, const Lane &l, StepScales<F> &to) {
#pragma unroll
  for (int h = 0; h < Packed<F>::halves; h++) {
    const float4 s = *reinterpret_cast<const float4 *>(&from.at[i][h][16 * l.h + 4 * l.q]);
    to.s[h][0] = s.x, to.s[h][1] = s.y, to.s[h][2] = s.z, to.s[h][3] = s.w;
    if constexpr (Packed<F>::offsets) {
      const float4 o = *reinterpret_cast<const float4 *>(&from.at[i][Packed<F>::halves + h][16 * l.h + 4 * l.q]);
      to.o[h][0] = o.x, to.o[h][1] = o.y, to.o[h][2] = o.z, to.o[h][3] = o.w;
    }
  }
}

/* ---- a step times 8 rows of x ---- */

/* Sums of products start at this number, whose bits are those of 1.5 * 2^23: as a float it is 1.5 * 2^23 + sum, exactly, since sums are
 * below 2^20. So no conversion is needed. */
constexpr int32_t SUM_ZERO = 0x4b400000;
constexpr float SUM_ZERO_FLOAT = 12582912.0f;

/* d = SUM_ZERO + a b: the start is an operand of its own, which the compiler keeps, so it costs no move for each product. */
__device__ __forceinline__ void product_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !PE_EMULATED && PE_SM80
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(SUM_ZERO));
#else
  d[0] = d[1] = d[2] = d[3] = SUM_ZERO;
  mma_s8(d, a, b);
#endif
}
__device__ __forceinline__ void product_s8_k16(int32_t (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if !PE_EMULATED && PE_SM80
  asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b), "r"(SUM_ZERO));
#else
  d[0] = d[1] = d[2] = d[3] = SUM_ZERO;
  mma_s8_k16(d, a, b);
#endif
}

/* sum * s, rounded once. -SUM_ZERO_FLOAT * s is exact (s has at most 19 bits and the factor two), so one fma takes the start off again.
 * Exponents of MXFP4 reach so far that this factor could overflow: there the start goes first. */
template <int F> __device__ __forceinline__ float scaled_sum(int32_t sum, float s) {
  const float f = __int_as_float(sum);
  return F == PE_MXFP4 ? (f - SUM_ZERO_FLOAT) * s : fmaf(f, s, -SUM_ZERO_FLOAT * s);
}

/* acc[row of the quad][column] += step * x. b: codes of x; d, dsum: of columns 2t, 2t+1, in order (d0, d1, dsum0, dsum1); parts: of
 * halves with offsets (dsum of the first half 0, 1, of the second 0, 1). The order of additions is all there is of it in any kernel:
 *   acc = fma(sum * s, d, acc), then acc = fma(o, dsum, acc)       and so for each half */
template <int F, int COLUMNS = 2>
__device__ __forceinline__ void multiply_step(const uint32_t (&a)[2][4], const StepScales<F> &w, const uint32_t (&b)[2], const float4 &x,
                                              const float4 &parts, float (&acc)[4][2]) {
#pragma unroll
  for (int j = 0; j < 2; j++) {
#pragma unroll
    for (int h = 0; h < Packed<F>::halves; h++) {
      int32_t sum[4];
      if constexpr (Packed<F>::halves == 2) {
        const uint32_t half[2] = {a[j][2 * h], a[j][2 * h + 1]};
        product_s8_k16(sum, half, b[h]);
      } else {
        product_s8(sum, a[j], b);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i % 2 >= COLUMNS) continue;
        const int row = 2 * j + i / 2;
        float &y = acc[row][i % 2];
        y = fmaf(scaled_sum<F>(sum[i], w.s[h][row]), i % 2 ? x.y : x.x, y);
        if constexpr (Packed<F>::offsets) {
          const float first = i % 2 ? parts.y : parts.x, second = i % 2 ? parts.w : parts.z, whole = i % 2 ? x.w : x.z;
          y = fmaf(w.o[h][row], Packed<F>::halves == 1 ? whole : h ? second : first, y);
        }
      }
    }
  }
}

} // namespace pe

#endif

/* cells.h: four elements of a cell of a key/value cache, as floats: plain numbers (F32, F16, BF16) at any distance, or blocks of 32
 * (Q8_0, Q4_0, Q4_1, Q2_1), which csrc/quants.h draws and which lie side by side. What is read is exact but for the sums of Q4_1 and Q2_1, as
 * on the CPU (csrc/cpu/cells.h). Keys by channel have a block for each channel of GROUP_KEYS cells, and are not mixed.
 */
#ifndef PE_METAL_CELLS_H
#define PE_METAL_CELLS_H

#include "common.h"

static inline float load_number(int format, device const uchar *p) {
  if (format == PE_F32) return *(device const float *)p;
  if (format == PE_F16) return (float)*(device const half *)p;
  return pe_bf16_to_f32(*(device const ushort *)p);
}

enum { GROUP_KEYS = 32 };

static inline bool has_least(int format) { return format == PE_Q4_1 || format == PE_Q2_1; }
static inline bool is_block(int format) { return format == PE_Q8_0 || format == PE_Q4_0 || has_least(format); }
static inline int block_bytes(int format) {
  return format == PE_Q8_0 ? PE_BYTES_Q8_0 : format == PE_Q4_0 ? PE_BYTES_Q4_0 : format == PE_Q2_1 ? PE_BYTES_Q2_1 : PE_BYTES_Q4_1;
}

/* The format of the blocks of keys by channel; PE_F32 where keys are not. */
static inline int channel_format(int format) {
  return format == PE_Q4_1_CHANNELS ? PE_Q4_1 : format == PE_Q2_1_CHANNELS ? PE_Q2_1 : PE_F32;
}
static inline bool by_channel(int format) { return channel_format(format) != PE_F32; }

/* Elements i .. i + 3 of a cell of plain numbers, i a multiple of 4; those from `count` on are 0. `step`: bytes between elements; whole:
 * they lie side by side, four of them aligned to their size, and count is a multiple of 4. */
static inline float4 load_cell4(int format, bool whole, device const uchar *cell, long step, int i, int count) {
  float4 y = float4(0.0f);
  if (whole && format == PE_F32) return *(device const float4 *)(cell + 4 * i);
  if (whole && format == PE_F16) {
    const half4 x = *(device const half4 *)(cell + 2 * i);
    return float4(x);
  }
  if (whole) {
    const ushort4 x = *(device const ushort4 *)(cell + 2 * i);
    for (int j = 0; j < 4; j++) y[j] = pe_bf16_to_f32(x[j]);
    return y;
  }
  for (int j = 0; j < 4; j++)
    if (i + j < count) y[j] = load_number(format, cell + (i + j) * step);
  return y;
}

/* Codes of elements i .. i + 3 of a cell of blocks that was copied to threadgroup memory; its address is a multiple of 2. */
static inline float4 codes4(int format, threadgroup const uchar *cell, int i) {
  threadgroup const uchar *block = cell + i / 32 * block_bytes(format);
  const int at = i % 32;
  if (format == PE_Q2_1) {
    const int four = block[4 + at / 4];
    return float4((float)(four & 3), (float)(four >> 2 & 3), (float)(four >> 4 & 3), (float)(four >> 6));
  }
  threadgroup const ushort *from = (threadgroup const ushort *)(block + (format == PE_Q4_1 ? 4 : 2) + (format == PE_Q8_0 ? at : at % 16));
  const uint codes = (uint)from[0] | (uint)from[1] << 16;
  float4 y;
  for (int j = 0; j < 4; j++) {
    const uint byte = codes >> 8 * j;
    y[j] = format == PE_Q8_0 ? (float)(int)(char)byte : (float)((int)(byte >> at / 16 * 4 & 15u) - (format == PE_Q4_0 ? 8 : 0));
  }
  return y;
}

/* The block's scale, and what is added to the elements of one that has a minimum. */
static inline float2 scales_of(int format, threadgroup const uchar *cell, int block) {
  threadgroup const half *from = (threadgroup const half *)(cell + block * block_bytes(format));
  return float2((float)from[0], has_least(format) ? (float)from[1] : 0.0f);
}

/* The elements. */
static inline float4 block4(int format, threadgroup const uchar *cell, int i) {
  const float4 codes = codes4(format, cell, i);
  const float2 s = scales_of(format, cell, i / 32);
  float4 y;
  for (int j = 0; j < 4; j++) y[j] = has_least(format) ? fma(codes[j], s.x, s.y) : codes[j] * s.x;
  return y;
}

/* Code i of a block of Q4_0, Q4_1 or Q2_1 in the device's memory. */
static inline int code_of(int format, device const uchar *block, int i) {
  if (format == PE_Q2_1) return block[4 + i / 4] >> i % 4 * 2 & 3;
  return block[(format == PE_Q4_0 ? 2 : 4) + i % 16] >> i / 16 * 4 & 15;
}

#endif

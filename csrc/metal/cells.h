/* cells.h: four elements of a cell of a key/value cache, as floats: plain numbers (F32, F16, BF16) at any distance, or blocks of 32
 * (Q8_0, Q4_0, Q4_1), which csrc/quants.h draws. What is read is exact but for Q4_1's sum, as on the CPU (csrc/cpu/cells.h).
 */
#ifndef PE_METAL_CELLS_H
#define PE_METAL_CELLS_H

#include "common.h"

static inline float load_number(int format, device const uchar *p) {
  if (format == PE_F32) return *(device const float *)p;
  if (format == PE_F16) return (float)*(device const half *)p;
  return pe_bf16_to_f32(*(device const ushort *)p);
}

/* Elements i .. i + 3 of a cell, i a multiple of 4; those from `count` on are 0. `step`: bytes between elements; whole: they lie side by
 * side, four of them aligned to their size, and count is a multiple of 4. */
static inline float4 load_cell4(int format, bool whole, device const uchar *cell, long step, int i, int count) {
  if (format == PE_F32 || format == PE_F16 || format == PE_BF16) {
    if (whole && format == PE_F32) return *(device const float4 *)(cell + 4 * i);
    if (whole && format == PE_F16) return (float4)*(device const half4 *)(cell + 2 * i);
    float4 y = float4(0.0f);
    if (whole) {
      const ushort4 x = *(device const ushort4 *)(cell + 2 * i);
      for (int j = 0; j < 4; j++) y[j] = pe_bf16_to_f32(x[j]);
      return y;
    }
    for (int j = 0; j < 4; j++)
      if (i + j < count) y[j] = load_number(format, cell + (i + j) * step);
    return y;
  }
  const int at = i % 32, bytes = format == PE_Q8_0 ? PE_BYTES_Q8_0 : format == PE_Q4_0 ? PE_BYTES_Q4_0 : PE_BYTES_Q4_1;
  device const uchar *block = cell + i / 32 * bytes;
  const float d = (float)*(device const half *)block;
  device const ushort *from = (device const ushort *)(block + (format == PE_Q4_1 ? 4 : 2) + (format == PE_Q8_0 ? at : at % 16));
  const uint codes = (uint)from[0] | (uint)from[1] << 16;
  float4 y;
  for (int j = 0; j < 4; j++) {
    const uint byte = codes >> 8 * j;
    if (format == PE_Q8_0) y[j] = (float)(int)(char)byte * d;
    else if (format == PE_Q4_0) y[j] = (float)((int)(byte >> at / 16 * 4 & 15u) - 8) * d;
    else y[j] = fma((float)(byte >> at / 16 * 4 & 15u), d, (float)((device const half *)block)[1]);
  }
  return y;
}

#endif

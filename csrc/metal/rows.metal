/* rows.metal: out[i] = scale * table[ids[i]], the table in any format; a negative id -1-j copies row j of `media` instead.
 * Reference: pyengine/ops/matmul.py: rows.
 *
 * gather_rows    A thread owns eight elements of a row, which lie side by side in the file's layout (dequant.h) and are written as 32 bytes.
 * gather_packed  A thread owns 16 of a step of 32 elements, one half of a packed step's vectors (packed.h); of the 64 bytes that a group of
 *                16 rows holds side by side, 4 are used, so that a row costs sixteen times its bytes: rows of a table are few.
 * Nothing is shared. From memory comes what the rows take, and 4 bytes an element go out. A row whose id is wrong is left as it is.
 */
#include "dequant.h"
#include "packed.h"

PE_CONSTANT(int, FORMAT, 0);

struct gather_args {
  int rows, width, n, media;     /* rows of the table, and of media */
  int bytes;                     /* of a row of the table, of a group of 16 rows where it is packed */
  int block, block_bytes;        /* elements and bytes of a block */
  int id_step, media_step, out_step;                     /* elements from one to the next */
  float scale;
};

/* The table's row of row i; -1 where there is none: media was copied, `each` elements from `first` on, or the id is wrong. */
static inline int table_row(constant gather_args &a, int id, device const float *media, device float *to, int first, int each,
                            device pe_fault *fault) {
  if (id >= 0 && id < a.n) return id;
  if (id < 0 && -1 - id < a.media) {
    for (int i = first; i < min(a.width, first + each); i++) to[i] = media[(long)(-1 - id) * a.media_step + i];
  } else if (first == 0) {
    raise_fault(fault, FAULT_BAD_VALUE, id, a.n);
  }
  return -1;
}

kernel void gather_rows(constant gather_args &a [[buffer(0)]], device const uchar *table [[buffer(1)]], device const int *ids [[buffer(2)]],
                        device const float *media [[buffer(3)]], device float *out [[buffer(4)]],
                        device const codebooks *books [[buffer(5)]], device pe_fault *fault [[buffer(6)]],
                        uint3 at [[thread_position_in_grid]]) {
  const int first = 8 * (int)at.x, row = (int)at.y;
  if (first >= a.width) return;
  device float *to = out + (long)row * a.out_step;
  const int id = table_row(a, ids[(long)row * a.id_step], media, to, first, 8, fault);
  if (id < 0) return;
  device const uchar *from = table + (long)id * a.bytes;
  if (FORMAT == PE_F32 || FORMAT == PE_F16 || FORMAT == PE_BF16) { /* whose rows need no whole eights */
    for (int i = first; i < min(a.width, first + 8); i++) {
      const float v = FORMAT == PE_F32 ? ((device const float *)from)[i]
                    : FORMAT == PE_F16 ? (float)((device const half *)from)[i] : pe_bf16_to_f32(((device const ushort *)from)[i]);
      to[i] = v * a.scale;
    }
    return;
  }
  float y[8];
  file_values(FORMAT, from + (long)(first / a.block) * a.block_bytes, first % a.block, books, y);
  for (int j = 0; j < 8; j++) to[first + j] = y[j] * a.scale;
}

kernel void gather_packed(constant gather_args &a [[buffer(0)]], device const uchar *table [[buffer(1)]], device const int *ids [[buffer(2)]],
                          device const float *media [[buffer(3)]], device float *out [[buffer(4)]], device pe_fault *fault [[buffer(5)]],
                          uint3 at [[thread_position_in_grid]]) {
  const int first = 32 * ((int)at.x / 2), h = (int)at.x % 2, row = (int)at.y;
  if (first >= a.width) return;
  device float *to = out + (long)row * a.out_step;
  const int id = table_row(a, ids[(long)row * a.id_step], media, to, first + 16 * h, 16, fault);
  if (id < 0) return;
  device const uchar *group = table + (long)(id / 16) * a.bytes;
  const int r = id % 16;
  if (FORMAT == PE_F32 || FORMAT == PE_F16 || FORMAT == PE_BF16) {
    for (int i = first + 16 * h; i < min(a.width, first + 16 * h + 16); i++) {
      const float v = FORMAT == PE_F32 ? ((device const float *)group)[16 * i + r]
                    : FORMAT == PE_F16 ? (float)((device const half *)group)[16 * i + r] : pe_bf16_to_f32(((device const ushort *)group)[16 * i + r]);
      to[i] = v * a.scale;
    }
    return;
  }
  const packed_form f = packed_form_of(FORMAT);
  device const uchar *head = packed_head(f, group, first / f.k), *body = packed_body(f, group, first / f.k);
  const block_scales b = scales_of_block(FORMAT, head, body, r);
  const step_scales s = scales_of_step(FORMAT, b, first % f.k / 32);
  const step_codes c = codes_of_step(FORMAT, body, first % f.k / 32, r, h);
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) {
      const int side = f.halves == 2 ? i / 2 : 0;
      const float u = (float)((int)(c.u[i] >> 8 * j & 255u) - f.zero);
      to[first + 4 * (h + 2 * i) + j] = (f.offsets ? u * s.s[side] + s.o[side] : u * s.s[side]) * a.scale;
    }
}

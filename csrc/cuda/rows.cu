/* rows.cu: out[i] = scale * table[ids[i]], the table in any format; a negative id -1-j copies row j of `media` instead.
 * Reference: pyengine/ops/matmul.py: rows.
 *
 * Block (x, y) has 128 threads and owns elements 1024 x ... of result row y (row and pieces share the grid's x axis); a thread owns eight
 * neighbouring elements, which have one scale in every format. No shared memory. A row is read once: in the file's layout neighbouring
 * threads read neighbouring bytes; in a packed table the words of a row lie 64 bytes apart (16 rows side by side), so each costs a
 * sector of 32 bytes for 4, and a packed row moves up to 8 times its size. Rows are few and short: at one token this is bound
 * by latency, of a prompt the 4 bytes an element that are written weigh as much.
 * Values are those of host/dequant.c, bit for bit, times scale.
 */
#include "dequant.h"

namespace {

enum { THREADS = 128, EIGHT = 8 };

struct Picked {
  const char *table, *media;
  const int32_t *ids;
  char *out;
  const pe_codebooks *books;
  int64_t m, n, k, n_media;
  int64_t table_stride, media_stride, ids_stride, out_stride; /* bytes; of a packed table, a group of 16 rows */
  float scale;
  pe_fault *fault;
};

/* ---- one row, elements i .. i + 7 (of plain numbers perhaps fewer) ---- */

/* Packed blocks as in csrc/cpu/pack.h: words of row r at `group`. */
struct PackedBlock { int k, unit, head, body; };

__host__ __device__ constexpr PackedBlock packed_block(int format) {
  switch (format) {
#define BLOCK(name, unit, head, body, ...) case PE_##name: return PackedBlock{PE_BLOCK_##name, unit, head, body};
    PE_PACKED_BLOCKS(BLOCK)
    PE_PACKED_FLOATS(BLOCK)
#undef BLOCK
    default: return PackedBlock{0, 0, 0, 0};
  }
}

__host__ __device__ constexpr int packed_zero(int format) {
  switch (format) {
#define ZERO(name, unit, head, body, steps, halves, offsets, zero) case PE_##name: return zero;
    PE_PACKED_BLOCKS(ZERO)
#undef ZERO
    default: return 0;
  }
}

/* A row's place in a block of its group: word w of an area of vectors. */
struct Lane {
  const uint8_t *head, *body;
  int r;
  __device__ __forceinline__ uint32_t word(const uint8_t *area, int vector) const { return *(const uint32_t *)(area + 64 * vector + 4 * r); }
  __device__ __forceinline__ float half(int at) const { return pe::read_half(head + at + 2 * r); }
};

/* Low or high nibbles of vectors v, v + 1 of a step: eight elements, those of vectors g = 2 e, 2 e + 1 of eight. */
__device__ __forceinline__ void lane_nibbles(const Lane &l, const uint8_t *step, int e, uint32_t codes[2]) {
#pragma unroll
  for (int j = 0; j < 2; j++) codes[j] = l.word(step, (2 * e + j) % 4) >> (e / 2 * 4) & 0x0f0f0f0fu;
}

/* Bit g of the plane's byte to bit `to`. */
__device__ __forceinline__ void lane_plane1(const Lane &l, const uint8_t *plane, int e, int to, uint32_t codes[2]) {
#pragma unroll
  for (int j = 0; j < 2; j++) codes[j] |= (l.word(plane, 0) >> (2 * e + j) & 0x01010101u) << to;
}

/* Bits 2t, 2t + 1 of vector e / 2 of the plane to bits `to`, `to` + 1, t = g % 4. */
__device__ __forceinline__ void lane_plane2(const Lane &l, const uint8_t *plane, int e, int to, uint32_t codes[2]) {
#pragma unroll
  for (int j = 0; j < 2; j++) codes[j] |= (l.word(plane, e / 2) >> (2 * ((2 * e + j) % 4)) & 0x03030303u) << to;
}

__device__ __forceinline__ float byte_at(uint32_t w, int i) { return (float)(int)(w >> (8 * i) & 255u); }

/* Q4_K, Q5_K: scale and minimum j of 8. */
__device__ __forceinline__ void lane_scale_min(const Lane &l, int j, float *scale, float *min) {
  const uint32_t a = l.word(l.head + 64, 0), b = l.word(l.head + 64, 1), c = l.word(l.head + 64, 2);
  *scale = byte_at(j < 4 ? a & 0x3f3f3f3fu : (c & 0x0f0f0f0fu) | (a >> 2 & 0x30303030u), j % 4);
  *min = byte_at(j < 4 ? b & 0x3f3f3f3fu : (c >> 4 & 0x0f0f0f0fu) | (b >> 2 & 0x30303030u), j % 4);
}

/* y = elements 32 step + 8 e .. + 7 of a block, e = 0..3. */
template <int F>
__device__ __forceinline__ void packed8(const Lane &l, int step, int e, float y[8]) {
  uint32_t codes[2] = {0, 0};
  const int zero = packed_zero(F);
  if constexpr (F == PE_Q4_0 || F == PE_Q4_1 || F == PE_Q5_0 || F == PE_Q5_1) {
    lane_nibbles(l, l.body, e, codes);
    if (F == PE_Q5_0 || F == PE_Q5_1) lane_plane1(l, l.body + 256, e, 4, codes);
    if (F == PE_Q4_0 || F == PE_Q5_0) pe::put_scaled(y, l.half(0), codes, zero);
    else pe::put_shifted(y, l.half(0), codes, l.half(32));
  } else if constexpr (F == PE_Q8_0) {
    for (int j = 0; j < 2; j++) codes[j] = l.word(l.body, 2 * e + j);
    pe::put_scaled(y, l.half(0), codes, zero);
  } else if constexpr (F == PE_IQ4_NL) {
    lane_nibbles(l, l.body, e, codes);
    pe::put_levels_iq4(y, l.half(0), codes);
  } else if constexpr (F == PE_MXFP4) {
    lane_nibbles(l, l.body, e, codes);
    pe::put_levels_e2m1(y, pe_e8m0_half_to_f32(l.head[l.r]), codes);
  } else if constexpr (F == PE_Q2_K) {
    const uint32_t q = l.word(l.head + 64, step / 2) >> (8 * (2 * (step % 2) + e / 2));
    lane_plane2(l, l.body + 128 * step, e, 0, codes);
    pe::put_shifted(y, __fmul_rn(l.half(0), (float)(int)(q & 15u)), codes, -__fmul_rn(l.half(32), (float)(int)(q >> 4 & 15u)));
  } else if constexpr (F == PE_Q3_K) {
    const int q = step / 2, i = 2 * (step % 2) + e / 2; /* scale 4 q + i */
    const uint32_t scale = (l.word(l.body, q % 2) >> (4 * (q / 2)) & 0x0f0f0f0fu) | (l.word(l.body, 2) >> (2 * q) & 0x03030303u) << 4;
    lane_plane2(l, l.body + 192 + 192 * step, e, 0, codes);
    lane_plane1(l, l.body + 192 + 192 * step + 128, e, 2, codes);
    pe::put_scaled(y, __fmul_rn(l.half(0), byte_at(scale, i) - 32.0f), codes, zero);
  } else if constexpr (F == PE_Q4_K || F == PE_Q5_K) {
    const uint8_t *body = l.body + (F == PE_Q5_K ? 320 : 256) * step;
    float scale, min;
    lane_scale_min(l, step, &scale, &min);
    lane_nibbles(l, body, e, codes);
    if (F == PE_Q5_K) lane_plane1(l, body + 256, e, 4, codes);
    pe::put_shifted(y, __fmul_rn(l.half(0), scale), codes, -__fmul_rn(l.half(32), min));
  } else if constexpr (F == PE_Q6_K) {
    const int8_t scale = (int8_t)(l.word(l.body, step / 2) >> (8 * (2 * (step % 2) + e / 2)));
    lane_nibbles(l, l.body + 256 + 384 * step, e, codes);
    lane_plane2(l, l.body + 256 + 384 * step + 256, e, 4, codes);
    pe::put_scaled(y, __fmul_rn(l.half(0), (float)scale), codes, zero);
  } else {
    static_assert(F == PE_IQ4_XS, "a packed format without a reader");
    const uint32_t low = l.word(l.head + 64, 0) >> (4 * step) & 15u, high = pe::read_u16(l.head + 32 + 2 * l.r) >> (2 * step) & 3u;
    lane_nibbles(l, l.body + 256 * step, e, codes);
    pe::put_levels_iq4(y, __fmul_rn(l.half(0), (float)((int)(low | high << 4) - 32)), codes);
  }
}

/* How a format's rows are read: elements i .. i + 7 of row `id`. */
template <int F>
struct FileRow {
  static constexpr int piece = 8;
  __device__ __forceinline__ static void get(const Picked &p, int64_t id, int64_t i, float y[8]) {
    using block = pe::file_block<F>;
    block::get8((const uint8_t *)p.table + id * p.table_stride + i / block::elements * block::bytes, (int)(i % block::elements), p.books, y);
  }
};

template <int F>
struct PackedRow {
  static constexpr int piece = 8;
  __device__ __forceinline__ static void get(const Picked &p, int64_t id, int64_t i, float y[8]) {
    constexpr PackedBlock b = packed_block(F);
    const int64_t block = i / b.k;
    const uint8_t *unit = (const uint8_t *)p.table + id / 16 * p.table_stride + block / b.unit * (b.unit * (b.head + b.body));
    const int at = (int)(block % b.unit), within = (int)(i % b.k);
    packed8<F>(Lane{unit + at * b.head, unit + b.unit * b.head + at * b.body, (int)(id % 16)}, within / 32, within % 32 / 8, y);
  }
};

template <int F>
__device__ __forceinline__ float plain(const char *p) {
  if (F == PE_F32) return *(const float *)p;
  return F == PE_F16 ? pe::read_half(p) : pe_bf16_to_f32((uint16_t)pe::read_u16(p));
}

/* Plain numbers, `pitch` bytes apart; any number of them. */
template <int F, int PACKED>
struct PlainRow {
  static constexpr int piece = 1;
  __device__ __forceinline__ static void get(const Picked &p, int64_t id, int64_t i, float y[8]) {
    constexpr int size = F == PE_F32 ? 4 : 2, pitch = PACKED ? 16 * size : size;
    const char *row = p.table + (PACKED ? id / 16 * p.table_stride + id % 16 * size : id * p.table_stride);
    for (int j = 0; j < EIGHT && i + j < p.k; j++) y[j] = plain<F>(row + (i + j) * pitch);
  }
};

/* ---- the kernel ---- */

template <class READ>
__global__ void __launch_bounds__(THREADS) rows_kernel(Picked p, unsigned pieces) {
  const unsigned row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const int64_t i = EIGHT * ((int64_t)piece * THREADS + threadIdx.x), id = *(const int32_t *)((const char *)p.ids + row * p.ids_stride);
  const int media = id < 0 && -1 - id < p.n_media;
  if (!media && (id < 0 || id >= p.n)) {
    if (i == 0) pe::raise(p.fault, PE_BAD_VALUE, id, p.n);
    return;
  }
  if (i >= p.k) return;
  float y[EIGHT];
  if (media) {
    const float *from = (const float *)(p.media + (-1 - id) * p.media_stride) + i;
    for (int j = 0; j < EIGHT; j++) y[j] = i + j < p.k ? from[j] : 0.0f;
  } else {
    READ::get(p, id, i, y);
#pragma unroll
    for (int j = 0; j < EIGHT; j++) y[j] = (READ::piece == 8 || i + j < p.k) ? __fmul_rn(y[j], p.scale) : 0.0f;
  }
  float *to = (float *)(p.out + row * p.out_stride) + i;
  if (i + EIGHT <= p.k && ((uintptr_t)to & 15) == 0) {
    ((float4 *)to)[0] = make_float4(y[0], y[1], y[2], y[3]);
    ((float4 *)to)[1] = make_float4(y[4], y[5], y[6], y[7]);
  } else {
    for (int j = 0; j < EIGHT && i + j < p.k; j++) to[j] = y[j];
  }
}

template <class READ>
pe_status launch(const Picked &p, pe_stream *s) {
  const int64_t pieces = (p.k + EIGHT * THREADS - 1) / (EIGHT * THREADS);
  if (p.m * pieces >= int64_t{1} << 31) return pe_fail(s, PE_NO_KERNEL, "rows: %lld rows of %lld", (long long)p.m, (long long)p.k);
  pe::launch(pe::stream(s), rows_kernel<READ>, dim3((unsigned)(p.m * pieces)), dim3(THREADS), 0, p, (unsigned)pieces);
  return PE_OK;
}

int64_t group_bytes(const PackedBlock &b, int64_t k) {
  const int64_t blocks = k / b.k, units = (blocks + b.unit - 1) / b.unit;
  return pe::round_up(units * b.unit * b.head + blocks * b.body, 64);
}

pe_status launch_packed(int format, const Picked &p, pe_stream *s) {
  switch (format) {
#define BLOCKS(name, ...) case PE_##name: return launch<PackedRow<PE_##name>>(p, s);
    PE_PACKED_BLOCKS(BLOCKS)
#undef BLOCKS
    case PE_F32: return launch<PlainRow<PE_F32, 1>>(p, s);
    case PE_F16: return launch<PlainRow<PE_F16, 1>>(p, s);
    case PE_BF16: return launch<PlainRow<PE_BF16, 1>>(p, s);
    default: return pe_fail(s, PE_NO_KERNEL, "rows: no packed form of format %d", format);
  }
}

pe_status launch_file(int format, const Picked &p, pe_stream *s) {
  switch (format) {
#define BLOCKS(name) case PE_##name: return launch<FileRow<PE_##name>>(p, s);
    PE_FILE_BLOCKS(BLOCKS)
#undef BLOCKS
#define BLOCKS(name)                                                                                                   \
    case PE_##name:                                                                                                    \
      if (p.books) return launch<FileRow<PE_##name>>(p, s);                                                            \
      return pe_fail(s, PE_NO_KERNEL, "rows: the codebook of format %d is not on the device", format);
    PE_FILE_BLOCKS_OF_CODEBOOKS(BLOCKS)
#undef BLOCKS
    case PE_F32: return launch<PlainRow<PE_F32, 0>>(p, s);
    case PE_F16: return launch<PlainRow<PE_F16, 0>>(p, s);
    case PE_BF16: return launch<PlainRow<PE_BF16, 0>>(p, s);
    default: return pe_fail(s, PE_NO_KERNEL, "rows: format %d cannot be read", format);
  }
}

} // namespace

PE_KERNEL(cuda, rows)(const pe_tensor *table, const pe_tensor *ids, const pe_tensor *media, const pe_tensor *out,
                      const pe_rows_params *p, pe_stream *s) {
  const int packed = table->dtype >= PE_PACKED, format = packed ? table->dtype - PE_PACKED : table->dtype;
  Picked q = {};
  q.table = (const char *)table->data;
  q.media = media ? (const char *)media->data : nullptr;
  q.ids = (const int32_t *)ids->data;
  q.out = (char *)out->data;
  q.books = pe::codebooks(s);
  q.m = ids->shape[0];
  q.n = table->shape[0];
  q.k = table->shape[1];
  q.n_media = media ? media->shape[0] : 0;
  q.media_stride = media ? media->stride[0] : 0;
  q.ids_stride = ids->stride[0];
  q.out_stride = out->stride[0];
  q.scale = p->scale;
  q.fault = pe::fault(s);
  if (q.m == 0 || q.k == 0) return PE_OK;
  const PackedBlock block = packed_block(format);
  if (packed && block.k) q.table_stride = group_bytes(block, q.k);
  else q.table_stride = table->stride[0];
  return packed ? launch_packed(format, q, s) : launch_file(format, q, s);
}

/* linear_rows.cu: rows of x, normed where there is a norm, as products read them: int8 with scales, bf16, f16 or float32. linear.h draws
 * the forms.
 *
 * A block of 256 threads owns a prepared row. A thread takes 4 elements of each 1024; eight lanes hold a block of 32. Sums of squares
 * are those of sums.h. Shared memory: what folds them, and a float for each warp.
 * Reads 4 k bytes a row (twice with a norm, the second time from L1), writes 1.25 k of int8: latency, not bandwidth, is the limit.
 */
#include "linear.h"
#include "sums.h"

namespace pe {
namespace {

constexpr int THREADS = 256;

struct RowShared {
  BlockSums sums;
  float most[THREADS / 32];
};

/* Elements e .. e + 3 of a row, zeros behind its end. */
__device__ __forceinline__ float4 load_row(const float *row, int e, int k) {
  if (e + 4 <= k && reinterpret_cast<uintptr_t>(row) % 16 == 0) return *reinterpret_cast<const float4 *>(row + e);
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = e + i < k ? row[e + i] : 0.0f;
  return make_float4(v[0], v[1], v[2], v[3]);
}

/* 1 / sqrt(mean of squares + eps). */
__device__ __forceinline__ float inverse_rms(const float *row, int k, float eps, RowShared &sh) {
  float s[4] = {};
  for (int e = 4 * threadIdx.x; e < k; e += ROW_SUMS) {
    const float4 v = load_row(row, e, k);
    s[0] = fmaf(v.x, v.x, s[0]), s[1] = fmaf(v.y, v.y, s[1]), s[2] = fmaf(v.z, v.z, s[2]), s[3] = fmaf(v.w, v.w, s[3]);
  }
  return 1.0f / sqrtf(fold_block(sh.sums, s) / static_cast<float>(k) + eps);
}

__device__ __forceinline__ float largest(const float4 &v) { /* as bits, so that a NaN is the largest */
  const int most = max(max(__float_as_int(v.x) & 0x7fffffff, __float_as_int(v.y) & 0x7fffffff),
                       max(__float_as_int(v.z) & 0x7fffffff, __float_as_int(v.w) & 0x7fffffff));
  return __int_as_float(most);
}
template <int WIDTH> __device__ __forceinline__ float widest(float v) {
  int most = __float_as_int(v);
  for (int apart = WIDTH / 2; apart > 0; apart /= 2) most = max(most, __shfl_xor_sync(ALL, most, apart));
  return __int_as_float(most);
}

/* A code is clamped: that of a NaN is anything, and its scale is NaN. */
__device__ __forceinline__ int code_of(float x, float inverse) { return min(127, max(-127, __float2int_rn(x * inverse))); }

/* Four elements of a block of 32 that eight lanes hold: scale max |x| / 127, codes to nearest even (csrc/cpu/codes.h). */
__device__ __forceinline__ void put_codes(const float4 &v, int e, bool inside, uint8_t *tile, int row, bool halves) {
  const float most = widest<8>(largest(v));
  float inverse = most > 0.0f ? 127.0f / most : 0.0f, d = most / 127.0f;
  if (inverse > 3e38f) inverse = 0.0f, d = 0.0f; /* so small that its inverse overflows */
  const int c0 = code_of(v.x, inverse), c1 = code_of(v.y, inverse), c2 = code_of(v.z, inverse), c3 = code_of(v.w, inverse);
  const int half = warp_sum<4>(c0 + c1 + c2 + c3), other = __shfl_xor_sync(ALL, half, 4);
  if (!inside) return;
  uint8_t *at = tile + e / 32 * RECORD;
  const int chunk = e / 4 % 8;
  *reinterpret_cast<uint32_t *>(at + 32 * row + 8 * (chunk % 4) + 4 * (chunk / 4)) =
      (c0 & 255u) | (c1 & 255u) << 8 | (c2 & 255u) << 16 | static_cast<uint32_t>(c3) << 24;
  float *scales = reinterpret_cast<float *>(at + CODES_BYTES + 16 * (row / 2)) + row % 2;
  if (chunk == 0) {
    scales[0] = d;
    scales[2] = d * static_cast<float>(half + other);
    if (halves) {
      scales[16] = d * static_cast<float>(half);
      scales[18] = d * static_cast<float>(other);
    }
  }
}

/* A tile that has one row: the scales of the others are zeros. Lanes read them for columns whose sums nobody stores. */
__device__ __forceinline__ void clear_scales(int e, uint8_t *tile, bool halves) {
  float *scales = reinterpret_cast<float *>(tile + e / 32 * RECORD + CODES_BYTES);
  const int pair = e / 4 % 8; /* of rows */
  for (int i = pair ? 0 : 1; pair < TILE_ROWS / 2 && i < 4; i += pair ? 1 : 2) {
    scales[4 * pair + i] = 0.0f;
    if (halves) scales[16 + 4 * pair + i] = 0.0f;
  }
}

/* Elements e .. e + 3 to a record of 16-bit floats. */
__device__ __forceinline__ void put_words(uint32_t low, uint32_t high, int e, uint8_t *record, int row) {
  uint16_t *at = reinterpret_cast<uint16_t *>(record + 32 * row) + e / 4 % 4;
  at[0] = static_cast<uint16_t>(low), at[4] = static_cast<uint16_t>(low >> 16);
  at[8] = static_cast<uint16_t>(high), at[12] = static_cast<uint16_t>(high >> 16);
}
__device__ __forceinline__ void put_f16(const float4 &v, int e, uint8_t *tile, int row, float by) {
  put_words(pack_half2(v.x * by, v.y * by), pack_half2(v.z * by, v.w * by), e, tile + e / 16 * CODES_BYTES, row);
}

/* What bf16 holds, and in a record behind that what it leaves. */
__device__ __forceinline__ void put_bf16(const float4 &v, int e, uint8_t *tile, int row) {
  const uint32_t low = pack_bf162(v.x, v.y), high = pack_bf162(v.z, v.w);
  const float2 a = unpack_bf162(low), b = unpack_bf162(high);
  uint8_t *record = tile + e / 16 * 2 * CODES_BYTES;
  put_words(low, high, e, record, row);
  put_words(pack_bf162(v.x - a.x, v.y - a.y), pack_bf162(v.z - b.x, v.w - b.y), e, record + CODES_BYTES, row);
}

__global__ void __launch_bounds__(THREADS) prepare_rows(const Preparation p) {
  auto &sh = shared<RowShared>();
  const int slot = blockIdx.x, tile = p.spread ? slot : slot / TILE_ROWS, in_tile = p.spread ? 0 : slot % TILE_ROWS;
  const int source = p.order ? p.order[slot] : slot;
  if (source == NO_TILE) return;
  const bool there = source >= 0 && (p.order || source < p.m);
  const float *row = p.x + (there ? source / p.each : 0) * p.x_stride;
  const float inverse = p.norm && there ? inverse_rms(row, p.k, p.eps, sh) : 1.0f;
  const int steps = (p.k + 31) / 32, rounds = (32 * steps + 4 * THREADS - 1) / (4 * THREADS);
  auto element = [&](int e) {
    float4 v = there ? load_row(row, e, p.k) : make_float4(0, 0, 0, 0);
    if (p.norm && there) {
      const float4 gain = load_row(p.norm, e, p.k);
      v.x = v.x * inverse * gain.x, v.y = v.y * inverse * gain.y, v.z = v.z * inverse * gain.z, v.w = v.w * inverse * gain.w;
    }
    return v;
  };
  float by = 1.0f; /* 2^14 / 2^exponent of the largest */
  if (p.f16) {
    float most = 0.0f;
    for (int i = 0, e = 4 * threadIdx.x; i < rounds; i++, e += 4 * THREADS) {
      const float v = largest(element(e));
      if (__float_as_int(v) > __float_as_int(most)) most = v;
    }
    most = widest<32>(most);
    if (threadIdx.x % 32 == 0) sh.most[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++)
      if (__float_as_int(sh.most[i]) > __float_as_int(most)) most = sh.most[i];
    const int exponent = min(max(__float_as_int(most) >> 23, 30), 254);
    by = __int_as_float((268 - min(exponent, 253)) << 23);
    if (threadIdx.x == 0) p.f16_unit[p.spread ? TILE_ROWS * slot : slot] = __int_as_float((min(exponent, 253) - 14) << 23);
  }
  for (int i = 0, e = 4 * threadIdx.x; i < rounds; i++, e += 4 * THREADS) {
    const float4 v = element(e);
    const bool inside = e < 32 * steps;
    if (p.codes) put_codes(v, e, inside, p.codes + static_cast<int64_t>(tile) * steps * RECORD, in_tile, p.halves);
    if (!inside) continue;
    if (p.codes && p.spread) clear_scales(e, p.codes + static_cast<int64_t>(tile) * steps * RECORD, p.halves);
    if (p.bf16) put_bf16(v, e, p.bf16 + static_cast<int64_t>(tile) * steps * 4 * CODES_BYTES, in_tile);
    if (p.f16) put_f16(v, e, p.f16 + static_cast<int64_t>(tile) * steps * 2 * CODES_BYTES, in_tile, by);
    if (p.floats)
      *reinterpret_cast<float4 *>(p.floats + static_cast<int64_t>(p.spread ? TILE_ROWS * slot : slot) * steps * 32 + e) = v;
  }
}

} // namespace

void prepare(const Preparation &p, int rows, cudaStream_t stream) {
  launch(stream, prepare_rows, dim3(rows), dim3(THREADS), sizeof(RowShared), p);
}

} // namespace pe

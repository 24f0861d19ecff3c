// words.cu: the words of csrc/cuda/device.h and csrc/emulate, each as a kernel of one warp over what Python gives: registers of
// lanes go in and out as they are, so that test_words.py lays fragments out itself.
#include "cuda/device.h"

namespace {

__global__ void mma_f16(const uint32_t *a, const uint32_t *b, float *d) {
  const int t = threadIdx.x;
  float c[4] = {d[4 * t], d[4 * t + 1], d[4 * t + 2], d[4 * t + 3]};
  pe::mma_f16(c, {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]}, {b[2 * t], b[2 * t + 1]});
  for (int i = 0; i < 4; i++) d[4 * t + i] = c[i];
}

__global__ void mma_bf16(const uint32_t *a, const uint32_t *b, float *d) {
  const int t = threadIdx.x;
  float c[4] = {d[4 * t], d[4 * t + 1], d[4 * t + 2], d[4 * t + 3]};
  pe::mma_bf16(c, {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]}, {b[2 * t], b[2 * t + 1]});
  for (int i = 0; i < 4; i++) d[4 * t + i] = c[i];
}

__global__ void mma_s8(const uint32_t *a, const uint32_t *b, int32_t *d) {
  const int t = threadIdx.x;
  int32_t c[4] = {d[4 * t], d[4 * t + 1], d[4 * t + 2], d[4 * t + 3]};
  pe::mma_s8(c, {a[4 * t], a[4 * t + 1], a[4 * t + 2], a[4 * t + 3]}, {b[2 * t], b[2 * t + 1]});
  for (int i = 0; i < 4; i++) d[4 * t + i] = c[i];
}

__global__ void mma_s8_k16(const uint32_t *a, const uint32_t *b, int32_t *d) {
  const int t = threadIdx.x;
  int32_t c[4] = {d[4 * t], d[4 * t + 1], d[4 * t + 2], d[4 * t + 3]};
  pe::mma_s8_k16(c, {a[2 * t], a[2 * t + 1]}, b[t]);
  for (int i = 0; i < 4; i++) d[4 * t + i] = c[i];
}

struct Matrices { uint4 rows[32]; };

template <bool TRANS> __global__ void ldmatrix(const uint32_t *rows, const uint32_t *, uint32_t *r) {
  auto &sh = pe::shared<Matrices>();
  const int t = threadIdx.x;
  pe::cp_async16(&sh.rows[t], rows + 4 * t);
  pe::cp_async_commit();
  pe::cp_async_wait<0>();
  __syncwarp();
  uint32_t got[4];
  if (TRANS) pe::ldmatrix_x4_trans(got, &sh.rows[t]);
  else pe::ldmatrix_x4(got, &sh.rows[t]);
  for (int i = 0; i < 4; i++) r[4 * t + i] = got[i];
}

// Three groups of copies, of 16, 8 and 4 bytes, some filled with zeros; out shows when each is there.
struct Copied { uint32_t sixteen[128], eight[64], four[32]; };

__global__ void cp_async(const uint32_t *x, const uint32_t *, uint32_t *out) {
  auto &sh = pe::shared<Copied>();
  const int t = threadIdx.x;
  pe::cp_async16(&sh.sixteen[4 * t], x + 4 * t, t % 3 != 0);
  pe::cp_async_commit();
  pe::cp_async8(&sh.eight[2 * t], x + 2 * t);
  pe::cp_async_commit();
  pe::cp_async4(&sh.four[t], x + t, t % 2 == 0);
  pe::cp_async_commit();
  pe::cp_async_wait<2>();
  out[t] = sh.sixteen[4 * t] + sh.sixteen[4 * t + 3];
  pe::cp_async_wait<1>();
  out[32 + t] = sh.eight[2 * t] + sh.eight[2 * t + 1];
  pe::cp_async_wait<0>();
  out[64 + t] = sh.four[t];
}

// Of each lane 16 words: what its collectives gave.
__global__ void collectives(const int32_t *x, const int32_t *y, int32_t *out) {
  const int t = threadIdx.x, v = x[t];
  int32_t *o = out + 16 * t;
  o[0] = __shfl_sync(pe::ALL, v, y[t]);
  o[1] = __shfl_sync(pe::ALL, v, y[t], 8);
  o[2] = __shfl_xor_sync(pe::ALL, v, 5);
  o[3] = __shfl_up_sync(pe::ALL, v, 3);
  o[4] = __shfl_down_sync(pe::ALL, v, 3, 16);
  o[5] = int(__ballot_sync(pe::ALL, v & 1));
  o[6] = __any_sync(pe::ALL, v == 7);
  o[7] = __all_sync(pe::ALL, v > -1000);
  o[8] = pe::warp_sum(v);
  o[9] = pe::warp_max<8>(v);
  o[10] = pe::dp4a(uint32_t(v), uint32_t(y[t]), 100);
  o[11] = int(__byte_perm(unsigned(v), unsigned(y[t]), 0x6b20));
  o[12] = __clz(v) + 64 * __popc(unsigned(v));
  o[13] = __ffs(v);
  o[14] = __float2int_rn(float(v) / 2.0f);
  o[15] = atomicAdd(out + 16 * 32, v) * 0 + atomicMax(out + 16 * 32 + 1, v) * 0 + int(blockDim.x);
}

// Conversions of 32 numbers at a time, by as many blocks as there are.
__global__ void conversions(const float *f, const uint32_t *bits, uint32_t *out) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const uint16_t low = uint16_t(bits[i]);
  out[4 * i] = __half_as_ushort(__float2half_rn(f[i])) | uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(f[i]))) << 16;
  out[4 * i + 1] = __float_as_uint(__half2float(__ushort_as_half(low)));
  out[4 * i + 2] = pe::pack_half2(f[i], 1.0f);
  out[4 * i + 3] = __float_as_uint(pe::unpack_half2(bits[i]).y);
}

// Loads and stores whose requests are known: 4-byte loads side by side, 16-byte loads, a column of 128-byte rows, shared memory with
// a stride of 33 and of 32 words.
struct Square { float x[32][33]; float column[32][32]; };

__global__ void requests(const float *x, const int32_t *n, float *out) {
  auto &sh = pe::shared<Square>();
  const int t = threadIdx.x;
  sh.x[t][0] = x[t];                                             // 4 sectors; banks t: 1 pass
  const uint4 v = pe::ld_global_16(x + 4 * t);                   // 16 sectors
  sh.column[t][0] = __uint_as_float(v.x) + x[32 * t];            // 32 sectors; one bank: 32 passes
  __syncwarp();
  float sum = 0.0f;
  const int step = n[0];                                         // 0: 1 sector
  for (int i = 0; i < 2 + t % 2; i++) sum += sh.column[t][i * step];  // 2 requests of 32 passes, then one of 16
  out[t] = sum + sh.x[0][0];                                     // all read one word: 1 pass
}

struct Row256 { float x[256]; };

// Many accesses, and many collectives, to be timed.
__global__ void many_accesses(const float *x, const int32_t *n, float *out) {
  auto &sh = pe::shared<Row256>();
  float sum = 0.0f;
  for (int i = 0; i < n[0]; i++) {
    sh.x[threadIdx.x] = sum;
    sum += sh.x[threadIdx.x] + x[threadIdx.x];
  }
  out[threadIdx.x] = sum;
}
__global__ void many_shuffles(const float *x, const int32_t *n, float *out) {
  float sum = x[threadIdx.x];
  for (int i = 0; i < n[0]; i++) sum = __shfl_xor_sync(pe::ALL, sum, 1);
  out[threadIdx.x] = sum;
}

struct Call { void *a, *b, *c; };

template <class A, class B, class C> void call(void (*kernel)(const A *, const B *, C *), int blocks, int threads, size_t shared, const Call &p) {
  pe::launch(nullptr, kernel, blocks, threads, shared, static_cast<const A *>(p.a), static_cast<const B *>(p.b), static_cast<C *>(p.c));
}

}  // namespace

// Run a kernel on device copies of a, b and c, and copy c back; what went wrong, or "".
extern "C" __attribute__((visibility("default"))) const char *word(const char *name, int blocks, int threads, void *const *host, const int64_t *bytes) {
  void *p[3] = {};
  for (int i = 0; i < 3; i++) {
    cudaMalloc(&p[i], size_t(bytes[i]));
    cudaMemcpy(p[i], host[i], size_t(bytes[i]), cudaMemcpyHostToDevice);
  }
  const Call c = {p[0], p[1], p[2]};
#define WORD(kernel, shared) if (!strcmp(name, #kernel)) call(kernel, blocks, threads, shared, c)
  WORD(mma_f16, 0);
  WORD(mma_bf16, 0);
  WORD(mma_s8, 0);
  WORD(mma_s8_k16, 0);
  WORD(ldmatrix<false>, sizeof(Matrices));
  WORD(ldmatrix<true>, sizeof(Matrices));
  WORD(cp_async, sizeof(Copied));
  WORD(collectives, 0);
  WORD(conversions, 0);
  WORD(requests, sizeof(Square));
  WORD(many_accesses, sizeof(Row256));
  WORD(many_shuffles, 0);
  const cudaError_t error = cudaGetLastError();
  cudaMemcpy(host[2], p[2], size_t(bytes[2]), cudaMemcpyDeviceToHost);
  for (void *memory : p) cudaFree(memory);
  return error ? cudaGetErrorString(error) : "";
}

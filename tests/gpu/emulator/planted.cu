// planted.cu: small kernels in pairs, a right one and one with a fault (WRONG). The line that must be reported carries its name.
//
// All run with blocks of 64 threads on a matrix x of 4 rows of 64 floats (the allocation ends with it) and out, as large.
#include "cuda/device.h"

namespace {

constexpr int N = 64, ROWS = 4;

struct Row { float x[N]; };

template <bool WRONG> __global__ void missing_barrier(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x, row = blockIdx.x * N;
  sh.x[t] = x[row + t];
  if (!WRONG) __syncthreads();
  out[row + t] = sh.x[N - 1 - t];                                                     // <- missing_barrier
}

// The second pass over a tile begins before everybody has read the first.
template <bool WRONG> __global__ void missing_barrier_behind(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x;
  float sum = 0.0f;
  for (int row = 0; row < ROWS; row++) {
    sh.x[t] = x[row * N + t];                                                         // <- missing_barrier_behind
    __syncthreads();
    sum += sh.x[(t + 1) % N];
    if (!WRONG) __syncthreads();
  }
  if (blockIdx.x == 0) out[t] = sum;
}

// Lanes of one warp that do not meet.
template <bool WRONG> __global__ void missing_syncwarp(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x, row = blockIdx.x * N;
  sh.x[t] = x[row + t];
  if (!WRONG) __syncwarp();
  float y = sh.x[t ^ 1];                                                              // <- missing_syncwarp
  y += __shfl_xor_sync(pe::ALL, y, 1);
  if (!WRONG) __syncwarp(3u << (t % 32 / 2 * 2));
  sh.x[t ^ 1] = y;
  out[row + t] = y;
}

template <bool WRONG> __global__ void two_writers(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x, row = blockIdx.x * N;
  sh.x[WRONG && t == 40 ? 3 : t] = x[row + t];                                        // <- two_writers
  out[row + t] = x[row + t];
}

template <bool WRONG> __global__ void blocks_race(const float *x, float *out) {
  const int t = threadIdx.x;
  if (t == 0) out[WRONG ? 0 : blockIdx.x] = x[blockIdx.x];                            // <- blocks_race
}

template <bool WRONG> __global__ void atomic_race(const float *x, float *out) {
  if (threadIdx.x == 0) {
    atomicAdd(out, x[0]);                                                             // <- atomic_race: after the read of block 2
    if (WRONG && blockIdx.x == 2) out[1] = out[0];
  }
}

// The last block to come sums what all have left: right only behind fences.
template <bool WRONG> __global__ void last_block(const float *x, float *out) {
  if (threadIdx.x != 0) return;
  out[1 + blockIdx.x] = x[blockIdx.x * N];
  if (!WRONG) __threadfence();
  if (atomicAdd(reinterpret_cast<int *>(out), 1) != int(gridDim.x) - 1) return;
  float sum = 0.0f;
  for (int i = 0; i < int(gridDim.x); i++) sum += out[1 + i];                         // <- last_block
  out[1] = sum;
}

template <bool WRONG> __global__ void tile_edge(const float *x, float *out) {
  const int row = blockIdx.x;
  for (int i = threadIdx.x; WRONG ? i <= N : i < N; i += blockDim.x) out[row * N + i % N] = x[row * N + i];  // <- tile_edge
}

template <bool WRONG> __global__ void shared_edge(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x;
  sh.x[t] = x[t];
  __syncthreads();
  if (blockIdx.x == 0) out[t] = sh.x[WRONG ? t + 1 : (t + 1) % N];                    // <- shared_edge
}

template <bool WRONG> __global__ void shared_size(const float *x, float *out) {
  auto &sh = pe::shared<Row>();                                                       // <- shared_size
  sh.x[threadIdx.x] = x[threadIdx.x];
  if (blockIdx.x == 0) out[threadIdx.x] = sh.x[threadIdx.x];
}

template <bool WRONG> __global__ void divergent_barrier(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x, row = blockIdx.x * N;
  if (WRONG && t % 32 < 16) {
    sh.x[t] = x[row + t];
    __syncthreads();
  } else {
    sh.x[t] = x[row + t] + (WRONG ? 1.0f : 0.0f);
    __syncthreads();                                                                  // <- divergent_barrier
  }
  out[row + t] = sh.x[N - 1 - t];
}

template <bool WRONG> __global__ void missing_lanes(const float *x, float *out) {
  float y = x[threadIdx.x];
  if (!WRONG || threadIdx.x % 32 < 16) y += __shfl_xor_sync(pe::ALL, y, 8);           // <- missing_lanes
  __syncthreads();
  if (blockIdx.x == 0) out[threadIdx.x] = y;
}

template <bool WRONG> __global__ void missing_lane_in_mask(const float *x, float *out) {
  float y = x[threadIdx.x];
  if (threadIdx.x < 8) y = __shfl_sync(0xff, y, WRONG ? 8 : 7);                       // <- missing_lane_in_mask
  if (blockIdx.x == 0) out[threadIdx.x] = y;
}

template <bool WRONG> __global__ void shared_not_written(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x, row = blockIdx.x * N;
  if (!WRONG || t != 5) sh.x[t] = x[row + t];
  __syncthreads();
  out[row + t] = sh.x[t / 2];                                                         // <- shared_not_written
}

template <bool WRONG> __global__ void memory_not_written(const float *x, float *out) {
  const float *from = WRONG && blockIdx.x == 3 && threadIdx.x == 63 ? out : x;
  out[blockIdx.x * N + threadIdx.x] = from[(WRONG ? 1 : 0) + blockIdx.x * N + threadIdx.x - (WRONG ? 1 : 0)];  // <- memory_not_written
}

template <bool WRONG> __global__ void misaligned_load(const float *x, float *out) {
  const int t = threadIdx.x;
  if (t >= N / 4 - 1 || blockIdx.x != 0) return;
  const uint4 v = *reinterpret_cast<const uint4 *>(x + 4 * t + (WRONG ? 2 : 0));      // <- misaligned_load
  out[t] = __uint_as_float(v.x) + __uint_as_float(v.w);
}

template <bool WRONG> __global__ void misaligned_store(const float *x, float *out) {
  const int t = threadIdx.x;
  if (t >= N / 2 - 1 || blockIdx.x != 0) return;
  *reinterpret_cast<float2 *>(out + 2 * t + (WRONG ? 1 : 0)) = make_float2(x[t], 1.0f);  // <- misaligned_store
}

template <bool WRONG> __global__ void missing_wait(const float *x, float *out) {
  auto &sh = pe::shared<Row>();
  const int t = threadIdx.x;
  if (t < N / 4) pe::cp_async16(&sh.x[4 * t], x + 4 * t);
  pe::cp_async_commit();
  pe::cp_async_wait<WRONG ? 1 : 0>();
  __syncthreads();
  if (blockIdx.x == 0) out[t] = sh.x[t];                                              // <- missing_wait
}

template <bool WRONG> __global__ void ldmatrix_race(const float *x, float *out) {
  auto &sh = pe::shared<uint4[N]>();
  const int t = threadIdx.x;
  pe::cp_async16(&sh[t], x + t / 4 * 4);
  pe::cp_async_commit();
  pe::cp_async_wait<0>();
  if (!WRONG) __syncwarp();
  uint32_t r[4];
  pe::ldmatrix_x4(r, &sh[t ^ 1]);                                                     // <- ldmatrix_race
  if (blockIdx.x == 0) out[t] = __uint_as_float(r[0]);
}

// ld.global.nc of what the kernel itself has written: the cache may hold what was there before.
template <bool WRONG> __global__ void stale_load(const float *x, float *out) {
  const int at = blockIdx.x * N + threadIdx.x;
  out[at] = x[at];
  __syncthreads();
  out[at] += __uint_as_float(pe::ld_global_4(WRONG ? out + at : x + at));             // <- stale_load
}

template <bool WRONG> __global__ void host_memory(const float *x, float *out, const float *host) {
  if (blockIdx.x == 0) out[threadIdx.x] = (WRONG ? host : x)[threadIdx.x];            // <- host_memory
}

template <bool WRONG> __global__ void bytes_race(const float *x, float *out) {
  auto &sh = pe::shared<int8_t[2 * N]>();
  const int t = threadIdx.x;
  sh[t] = int8_t(x[t]);                                                               // <- bytes_race: thread 10, after thread 9
  if (WRONG && t == 9) sh[10] = 0;
  __syncthreads();
  if (blockIdx.x == 0) out[t] = sh[t ^ 3];
}

template <class... P> void both(bool wrong, void (*right)(P...), void (*planted)(P...), size_t shared, const std::decay_t<P> &...arguments) {
  pe::launch(nullptr, wrong ? planted : right, ROWS, N, shared, arguments...);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char *planted(const char *name, int wrong) {
  float *x = nullptr, *out = nullptr, host[N * ROWS] = {};
  for (int i = 0; i < N * ROWS; i++) host[i] = float(i % 100);
  cudaMalloc(reinterpret_cast<void **>(&x), sizeof host);
  cudaMalloc(reinterpret_cast<void **>(&out), sizeof host);
  cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice);
  const bool is_atomic = !strcmp(name, "atomic_race") || !strcmp(name, "last_block");
  if (is_atomic) cudaMemset(out, 0, 4);
#define BOTH(kernel) if (!strcmp(name, #kernel)) both(wrong, kernel<false>, kernel<true>, sizeof(Row), x, out)
  BOTH(missing_barrier);
  BOTH(missing_barrier_behind);
  BOTH(missing_syncwarp);
  BOTH(two_writers);
  BOTH(blocks_race);
  BOTH(atomic_race);
  BOTH(last_block);
  BOTH(tile_edge);
  BOTH(shared_edge);
  BOTH(divergent_barrier);
  BOTH(missing_lanes);
  BOTH(missing_lane_in_mask);
  BOTH(shared_not_written);
  BOTH(memory_not_written);
  BOTH(misaligned_load);
  BOTH(misaligned_store);
  BOTH(missing_wait);
  BOTH(bytes_race);
  BOTH(stale_load);
  if (!strcmp(name, "ldmatrix_race")) both(wrong, ldmatrix_race<false>, ldmatrix_race<true>, sizeof(uint4[N]), x, out);
  if (!strcmp(name, "shared_size")) both(wrong, shared_size<false>, shared_size<true>, wrong ? sizeof(Row) - 4 : sizeof(Row), x, out);
  if (!strcmp(name, "host_memory")) both(wrong, host_memory<false>, host_memory<true>, 0, x, out, const_cast<const float *>(host));
  const cudaError_t error = cudaGetLastError();
  cudaFree(x);
  cudaFree(out);
  return error ? cudaGetErrorString(error) : "";
}

/* top.cu: the k largest of each row, at most 256, and sums of weights.
 * Reference: pyengine/ops/top.py: top_k; csrc/weight.h. Method: bitonic top-k (Shanbhag, Pirk and Madden 2018, doi:10.1145/3183713.3183735).
 *
 * A number and its place are one key of 64 bits: the larger key comes first. Runs of 256 keys are sorted; of two runs the 256 largest are
 * the larger ones of key i of one and key 255 - i of the other, which eight more passes sort.
 *
 * find_kernel   Block (p, r) owns part p of up to 16 of row r: it takes 15 runs at a time, and keeps the 256 largest so far beside them.
 * join_kernel   A block owns a row: of the 256 largest of each part the k largest.
 * weigh_kernel  Block (c, r) owns 4096 numbers: 256 threads make their weights, 16 of them one sum each, in order.
 * Shared memory: 16 runs of keys, 32 KB; weights, 16 KB. Rows are read twice, 8 n bytes of 4 TB/s: a microsecond for 262144 logits, of
 * which 16 parts are 18 multiprocessors' work for some 50 passes over shared memory each 3840 keys: that, and three launches, is the time.
 */
#include "../weight.h"
#include "cuda.h"

namespace {

using namespace pe;

enum { RUN = 256, RUNS = 16, THREADS = 256, PARTS = 16, FRESH = (RUNS - 1) * RUN };

struct Keys { uint64_t key[RUNS * RUN]; };
struct Weights { float at[PE_WEIGHT_CHUNK]; };

/* Of the larger number, of equals the lower place; 0 comes after all. */
__device__ __forceinline__ uint64_t key_of(float x, int at) { return static_cast<uint64_t>(pe_logit_key(x)) << 32 | static_cast<uint32_t>(~at); }

/* Compare keys that are `apart`, pair by pair; the larger first where bit `up` of the place is 0. */
__device__ __forceinline__ void exchange(uint64_t *key, int pairs, int apart, int up) {
  for (int i = threadIdx.x; i < pairs; i += THREADS) {
    const int low = 2 * i - (i & (apart - 1)), high = low + apart;
    const uint64_t a = key[low], b = key[high];
    if ((a < b) == !(low & up)) key[low] = b, key[high] = a;
  }
  __syncthreads();
}

/* Each run by itself, the largest first. */
__device__ __forceinline__ void sort_runs(uint64_t *key, int runs) {
  for (int size = 2; size <= RUN; size *= 2)
    for (int apart = size / 2; apart; apart /= 2) exchange(key, runs * RUN / 2, apart, size < RUN ? size : 0);
}

/* Sorted runs to the largest of all, in the first run. */
__device__ __forceinline__ void join_runs(uint64_t *key, int runs) {
  for (int half; runs > 1; runs = half) {
    half = (runs + 1) / 2;
    const int joined = (runs - half) * RUN;
    for (int i = threadIdx.x; i < joined; i += THREADS) key[i] = max(key[i], key[half * RUN + i / RUN * RUN + RUN - 1 - i % RUN]);
    __syncthreads();
    for (int apart = RUN / 2; apart; apart /= 2) exchange(key, joined / 2, apart, 0);
  }
}

struct Search {
  const char *x;
  float *values, *sums;
  int32_t *ids;
  uint64_t *found; /* [rows][parts][RUN] */
  int64_t stride;  /* bytes from one row to the next */
  int n, k, width; /* width: of a part */
};

__global__ void __launch_bounds__(THREADS) find_kernel(const Search w) {
  uint64_t *key = shared<Keys>().key;
  const float *x = reinterpret_cast<const float *>(w.x + blockIdx.y * w.stride);
  const int begin = blockIdx.x * w.width, end = min(w.n, begin + w.width);
  for (int i = threadIdx.x; i < RUN; i += THREADS) key[i] = 0;
  for (int from = begin; from < end; from += FRESH) {
    const int fresh = (min(FRESH, end - from) + RUN - 1) / RUN;
    for (int i = threadIdx.x; i < fresh * RUN; i += THREADS) key[RUN + i] = from + i < end ? key_of(x[from + i], from + i) : 0;
    __syncthreads();
    sort_runs(key + RUN, fresh);
    join_runs(key, 1 + fresh);
  }
  uint64_t *to = w.found + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * RUN;
  for (int i = threadIdx.x; i < RUN; i += THREADS) to[i] = key[i];
}

__global__ void __launch_bounds__(THREADS) join_kernel(const Search w, int parts) {
  uint64_t *key = shared<Keys>().key;
  const int64_t row = blockIdx.x;
  const float *x = reinterpret_cast<const float *>(w.x + row * w.stride);
  for (int i = threadIdx.x; i < parts * RUN; i += THREADS) key[i] = w.found[row * parts * RUN + i];
  __syncthreads();
  join_runs(key, parts);
  for (int i = threadIdx.x; i < w.k; i += THREADS) {
    const int at = static_cast<int>(~static_cast<uint32_t>(key[i]));
    w.ids[row * w.k + i] = at;
    w.values[row * w.k + i] = x[at];
  }
}

__global__ void __launch_bounds__(THREADS) weigh_kernel(const Search w) {
  float *weight = shared<Weights>().at;
  const int64_t row = blockIdx.y;
  const int first = blockIdx.x * PE_WEIGHT_CHUNK;
  const float *x = reinterpret_cast<const float *>(w.x + row * w.stride) + first, top = w.values[row * w.k];
  for (int i = threadIdx.x; i < PE_WEIGHT_CHUNK; i += THREADS) weight[i] = first + i < w.n ? pe_weight_exp(pe_weight_clamp(x[i] - top)) : 0.0f;
  __syncthreads();
  if (threadIdx.x >= PE_WEIGHT_LANES) return;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < PE_WEIGHT_CHUNK; i += PE_WEIGHT_LANES) sum += weight[i];
  w.sums[(row * gridDim.x + blockIdx.x) * PE_WEIGHT_LANES + threadIdx.x] = sum;
}

int parts_of(int64_t n) { return static_cast<int>(min(static_cast<int64_t>(PARTS), (n + FRESH - 1) / FRESH)); }

}  // namespace

PE_SCRATCH(cuda, top_k)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)n_threads;
  return a->t[a->start[0]]->shape[0] * parts_of(static_cast<const pe_top_k_params *>(params)->n) * RUN * 8;
}

PE_KERNEL(cuda, top_k)(const pe_tensor *x, const pe_tensor *out0, const pe_tensor *out1, const pe_tensor *out2, const pe_top_k_params *p,
                       pe_stream *s) {
  const int64_t m = x->shape[0];
  if (p->k < 1 || p->k > RUN || p->k > p->n || p->n > x->shape[1]) return PE_BAD_SHAPE;
  if (m == 0) return PE_OK;
  const int parts = parts_of(p->n), width = (p->n + parts - 1) / parts, chunks = (p->n + PE_WEIGHT_CHUNK - 1) / PE_WEIGHT_CHUNK;
  const unsigned rows = static_cast<unsigned>(m);
  const Search w = {static_cast<const char *>(x->data), static_cast<float *>(out0->data), static_cast<float *>(out2->data),
                    static_cast<int32_t *>(out1->data), reinterpret_cast<uint64_t *>(s->scratch), x->stride[0], p->n, p->k, width};
  launch(stream(s), find_kernel, dim3(parts, rows), dim3(THREADS), sizeof(Keys), w);
  launch(stream(s), join_kernel, dim3(rows), dim3(THREADS), sizeof(Keys), w, parts);
  launch(stream(s), weigh_kernel, dim3(chunks, rows), dim3(THREADS), sizeof(Weights), w);
  return PE_OK;
}

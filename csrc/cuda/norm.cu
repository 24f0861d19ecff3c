/* norm.cu: rms_norm, layer_norm, l2_norm, softmax, reduce over the last axis, which is contiguous; group_norm over pictures.
 * Reference: pyengine/ops/norm.py: rms_norm, layer_norm, l2_norm, softmax, reduce, group_norm.
 *
 * A row of d elements belongs to a team of threads: a warp up to 512 elements (eight rows a block), else a block of up to 256 threads.
 * Thread t of n owns the fours t, t + n, t + 2 n ... of its row, and keeps them in registers (up to KEEP fours, 8192 elements; beyond
 * that they are read again for each pass). So a row is read once and written once: 8 bytes an element, 12 with a residual,
 * by 16-byte accesses; weights stay in L2. Sums are those of sums.h, of the CPU's bits, through 4 KB of shared memory. At one row a
 * block is bound by latency: a barrier for each sum. out may be x or the residual.
 *
 * group_norm: a block owns a group of a picture's channels, thread t every 256th of its numbers from t on, and reads them three times, from L2 but
 * for the first.
 */
#include <cmath>

#include "activations.h"
#include "strides.h"
#include "sums.h"

namespace {

enum { WARP = 32, ROWS = 8, MOST_THREADS = pe::ROW_SUMS / 4, MOST_WARPS = MOST_THREADS / WARP };

struct NormShared {
  pe::BlockSums sums;
  float part[2][MOST_WARPS];
};

/* ---- what a team does together ---- */

struct Most { /* the larger one; what is no number loses */
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct MostOrNan {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

/* All threads of the team (blockDim.x of them) get f over their v. `turn` alternates, so that one barrier a sum is enough. */
template <class F>
__device__ __forceinline__ float team(F f, float v, float neutral, NormShared &sh, int turn) {
#pragma unroll
  for (int d = WARP / 2; d; d /= 2) v = f(v, __shfl_xor_sync(0xffffffffu, v, d));
  if (blockDim.x == WARP) return v;
  const int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
  if (lane == 0) sh.part[turn][threadIdx.x / WARP] = v;
  __syncthreads();
  v = lane < warps ? sh.part[turn][lane] : neutral;
#pragma unroll
  for (int d = MOST_WARPS / 2; d; d /= 2) v = f(v, __shfl_xor_sync(0xffffffffu, v, d));
  return __shfl_sync(0xffffffffu, v, 0);
}

/* The fours of a row that a thread owns: in registers, or with KEEP = 0 in memory. Elements beyond the row are `fill`. */
template <int KEEP>
struct Row {
  const float *x;
  int64_t d;
  float kept[KEEP ? KEEP : 1][4];

  __device__ __forceinline__ Row(const float *from, int64_t n) : x(from), d(n) {
#pragma unroll
    for (int i = 0; i < KEEP; i++) read(at(i), kept[i]);
  }
  __device__ __forceinline__ int64_t at(int i) const { return 4 * ((int64_t)i * blockDim.x + threadIdx.x); }
  __device__ __forceinline__ void read(int64_t start, float v[4]) const {
    pe::load4(x + start, 1, (int)max((int64_t)0, min((int64_t)4, d - start)), v);
  }
  /* f(element number of the four, how many of it there are, its elements) */
  template <class F>
  __device__ __forceinline__ void each(F f) {
    if constexpr (KEEP > 0) {
#pragma unroll
      for (int i = 0; i < KEEP; i++)
        if (at(i) < d) f(at(i), (int)min((int64_t)4, d - at(i)), kept[i]);
    } else {
      float v[4];
      for (int64_t start = at(0); start < d; start += 4 * (int64_t)blockDim.x) {
        read(start, v);
        f(start, (int)min((int64_t)4, d - start), v);
      }
    }
  }
};

/* Sum over the row of g(element, sum so far). again: it is not the first of the kernel. */
template <int KEEP, class G>
__device__ __forceinline__ float sum_of(Row<KEEP> &row, G g, NormShared &sh, bool again) {
  float s[4] = {};
  if (KEEP > 0 && KEEP <= 4 && blockDim.x == WARP) { /* fours 128 elements apart have sums of their own */
    float own[4][4] = {};
#pragma unroll
    for (int i = 0; i < KEEP && i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (row.at(i) + j < row.d) own[i][j] = g(row.kept[i][j], 0.0f);
#pragma unroll
    for (int j = 0; j < 4; j++) s[j] = (own[0][j] + own[2][j]) + (own[1][j] + own[3][j]);
    return pe::fold_fours(make_float4(s[0], s[1], s[2], s[3]));
  }
  row.each([&](int64_t, int n, float v[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (j < n) s[j] = g(v[j], s[j]);
  });
  if (again) __syncthreads();
  return pe::fold_block(sh.sums, s);
}

__device__ __forceinline__ void read_or(const float *p, int64_t start, int n, float otherwise, float v[4]) {
  if (p) pe::load4(p + start, 1, n, v);
  else v[0] = v[1] = v[2] = v[3] = otherwise;
}

/* ---- the kernels: grid of blocks, blockDim = (threads of a team, rows) ---- */

struct Rows { int64_t n, d; };

/* NORM: (x - mean) / rms of that, or x / rms where CENTRED is 0; times weight; plus `add`, which steps by add_pitch from row to row. */
template <int CENTRED, int KEEP>
__global__ void __launch_bounds__(MOST_THREADS) norm_kernel(Rows rows, const float *x, const float *weight, const float *add, int64_t add_pitch,
                                                            float *out, float eps) {
  auto &sh = pe::shared<NormShared>();
  const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, d = rows.d;
  if (i >= rows.n) return; /* whole warps: a block of several rows has no barriers */
  Row<KEEP> row(x + i * d, d);
  const float mean = CENTRED ? sum_of(row, [](float v, float sum) { return sum + v; }, sh, false) / (float)d : 0.0f;
  const float squares = sum_of(row, [=](float v, float sum) { return fmaf(v - mean, v - mean, sum); }, sh, CENTRED);
  const float inv = 1.0f / sqrtf(squares / (float)d + eps);
  const float *more = add ? add + i * add_pitch : nullptr;
  float *to = out + i * d;
  row.each([&](int64_t start, int n, float v[4]) {
    float w[4], b[4], y[4];
    read_or(weight, start, n, 1.0f, w);
    read_or(more, start, n, 0.0f, b);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      y[j] = __fmul_rn(__fmul_rn(v[j] - mean, inv), w[j]);
      if (more) y[j] = __fadd_rn(y[j], b[j]);
    }
    pe::store4(to + start, n, y);
  });
}

template <int KEEP>
__global__ void __launch_bounds__(MOST_THREADS) length_kernel(Rows rows, const float *x, float *out, float eps) {
  auto &sh = pe::shared<NormShared>();
  const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, d = rows.d;
  if (i >= rows.n) return;
  Row<KEEP> row(x + i * d, d);
  const float length = sqrtf(sum_of(row, [](float v, float sum) { return fmaf(v, v, sum); }, sh, false));
  const float inv = 1.0f / (length > eps || length != length ? length : eps);
  row.each([&](int64_t start, int n, float v[4]) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; j++) y[j] = v[j] * inv;
    pe::store4(out + i * d + start, n, y);
  });
}

/* Group y of picture x: `places` runs of `each` channels, d apart. */
struct Groups { int64_t places, d, each; };

template <class G>
__device__ __forceinline__ float over_group(const Groups &a, const float *x, G g, NormShared &sh, int turn) {
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < a.places * a.each; i += blockDim.x) sum = g(x[i / a.each * a.d + i % a.each], sum);
  return team([](float p, float q) { return p + q; }, sum, 0.0f, sh, turn);
}

__global__ void __launch_bounds__(MOST_THREADS) group_kernel(Groups a, const float *x, const float *weight, const float *bias, float *out, float eps) {
  auto &sh = pe::shared<NormShared>();
  const int64_t first = blockIdx.y * a.each, at = blockIdx.x * a.places * a.d + first;
  x += at, out += at;
  const float count = (float)(a.places * a.each);
  const float mean = over_group(a, x, [](float v, float sum) { return sum + v; }, sh, 0) / count;
  const float squares = over_group(a, x, [=](float v, float sum) { return fmaf(v - mean, v - mean, sum); }, sh, 1);
  const float inv = 1.0f / sqrtf(squares / count + eps);
  for (int64_t i = threadIdx.x; i < a.places * a.each; i += blockDim.x) {
    const int64_t c = i % a.each, from = i / a.each * a.d + c;
    float y = (x[from] - mean) * inv;
    if (weight) y = y * weight[first + c];
    if (bias) y = y + bias[first + c];
    out[from] = y;
  }
}

template <int KEEP>
__global__ void __launch_bounds__(MOST_THREADS) softmax_kernel(Rows rows, const float *x, float *out, float scale) {
  auto &sh = pe::shared<NormShared>();
  const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, d = rows.d;
  if (i >= rows.n) return;
  Row<KEEP> row(x + i * d, d);
  float top = -INFINITY;
  row.each([&](int64_t, int n, float v[4]) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (j < n) top = fmaxf(v[j] * scale, top);
  });
  top = team(Most(), top, -INFINITY, sh, 0);
  const float sum = sum_of(row, [=](float v, float total) { return total + pe::exp_of(__fmul_rn(v, scale) - top); }, sh, false);
  const float inv = 1.0f / sum;
  row.each([&](int64_t start, int n, float v[4]) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; j++) y[j] = j < n ? pe::exp_of(__fmul_rn(v[j], scale) - top) * inv : 0.0f;
    pe::store4(out + i * d + start, n, y);
  });
}

template <int KIND, int KEEP>
__global__ void __launch_bounds__(MOST_THREADS) reduce_kernel(Rows rows, const float *x, float *out) {
  auto &sh = pe::shared<NormShared>();
  const int64_t i = (int64_t)blockIdx.x * blockDim.y + threadIdx.y, d = rows.d;
  if (i >= rows.n) return;
  Row<KEEP> row(x + i * d, d);
  float y;
  if constexpr (KIND == PE_REDUCE_KIND_SUM || KIND == PE_REDUCE_KIND_MEAN) {
    y = sum_of(row, [](float v, float sum) { return sum + v; }, sh, false);
    if (KIND == PE_REDUCE_KIND_MEAN) y /= (float)d;
  } else {
    const float sign = KIND == PE_REDUCE_KIND_MAX ? 1.0f : -1.0f;
    y = -INFINITY;
    row.each([&](int64_t, int n, float v[4]) {
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (j < n) y = MostOrNan()(sign * v[j], y);
    });
    y = sign * team(MostOrNan(), y, -INFINITY, sh, 0);
  }
  if (threadIdx.x == 0) out[i] = y;
}

/* ---- launches ---- */

/* How rows of d elements are shared out: it follows from d alone. */
struct Teams {
  int threads, keep, rows; /* threads of a team, fours that each keeps, teams of a block */
};

Teams teams_of(int64_t d) {
  const int64_t fours = (d + 3) / 4;
  Teams t;
  t.threads = fours <= 4 * WARP ? WARP : (int)(fours < MOST_THREADS ? pe::round_up(fours, WARP) : (int64_t)MOST_THREADS);
  t.rows = t.threads == WARP ? ROWS : 1;
  const int64_t each = (fours + t.threads - 1) / t.threads;
  t.keep = each <= 1 ? 1 : each <= 2 ? 2 : each <= 4 ? 4 : each <= 8 ? 8 : 0;
  return t;
}

Rows rows_of(const pe_tensor *x) {
  Rows r = {1, x->shape[x->ndim - 1]};
  for (int i = 0; i + 1 < x->ndim; i++) r.n *= x->shape[i];
  return r;
}

/* Call LAUNCH(keep) with a constant. */
#define PE_EACH_KEEP(keep, LAUNCH)                                                                                     \
  switch (keep) {                                                                                                      \
    case 1: LAUNCH(1); break;                                                                                          \
    case 2: LAUNCH(2); break;                                                                                          \
    case 4: LAUNCH(4); break;                                                                                          \
    case 8: LAUNCH(8); break;                                                                                          \
    default: LAUNCH(0);                                                                                                \
  }

const float *data_or_null(const pe_tensor *t) { return t ? (const float *)t->data : nullptr; }

template <class... T, class... A>
pe_status launch_rows(const char *op, pe_stream *s, Rows r, Teams t, void (*kernel)(T...), A... args) {
  const int64_t blocks = (r.n + t.rows - 1) / t.rows;
  if (!pe::counts_in_31_bits(blocks)) return pe_fail(s, PE_NO_KERNEL, "%s: %lld rows", op, (long long)r.n);
  pe::launch(pe::stream(s), kernel, dim3((unsigned)blocks), dim3((unsigned)t.threads, (unsigned)t.rows), sizeof(NormShared), r, args...);
  return PE_OK;
}

template <int CENTRED>
pe_status norm(const char *op, const pe_tensor *x, const pe_tensor *weight, const float *add, int64_t add_pitch, const pe_tensor *out,
               float eps, pe_stream *s) {
  const Rows r = rows_of(x);
  const Teams t = teams_of(r.d);
  pe_status status = PE_OK;
  if (r.n == 0 || r.d == 0) return PE_OK;
#define LAUNCH(KEEP)                                                                                                   \
  status = launch_rows(op, s, r, t, norm_kernel<CENTRED, KEEP>, (const float *)x->data, data_or_null(weight), add, add_pitch, (float *)out->data, eps)
  PE_EACH_KEEP(t.keep, LAUNCH)
#undef LAUNCH
  return status;
}

template <int KIND>
pe_status reduce(const pe_tensor *x, const pe_tensor *out, pe_stream *s) {
  const Rows r = rows_of(x);
  const Teams t = teams_of(r.d);
  pe_status status = PE_OK;
#define LAUNCH(KEEP) status = launch_rows("reduce", s, r, t, reduce_kernel<KIND, KEEP>, (const float *)x->data, (float *)out->data)
  PE_EACH_KEEP(t.keep, LAUNCH)
#undef LAUNCH
  return status;
}

} // namespace

PE_KERNEL(cuda, rms_norm)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *residual, const pe_tensor *out,
                          const pe_rms_norm_params *p, pe_stream *s) {
  return norm<0>("rms_norm", x, weight, data_or_null(residual), x->shape[x->ndim - 1], out, p->eps, s);
}

PE_KERNEL(cuda, layer_norm)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *bias, const pe_tensor *out,
                            const pe_layer_norm_params *p, pe_stream *s) {
  return norm<1>("layer_norm", x, weight, data_or_null(bias), 0, out, p->eps, s);
}

PE_KERNEL(cuda, l2_norm)(const pe_tensor *x, const pe_tensor *out, const pe_l2_norm_params *p, pe_stream *s) {
  const Rows r = rows_of(x);
  const Teams t = teams_of(r.d);
  pe_status status = PE_OK;
  if (r.n == 0 || r.d == 0) return PE_OK;
#define LAUNCH(KEEP) status = launch_rows("l2_norm", s, r, t, length_kernel<KEEP>, (const float *)x->data, (float *)out->data, p->eps)
  PE_EACH_KEEP(t.keep, LAUNCH)
#undef LAUNCH
  return status;
}

PE_KERNEL(cuda, group_norm)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *bias, const pe_tensor *out,
                            const pe_group_norm_params *p, pe_stream *s) {
  const Rows r = rows_of(x);
  const int64_t n = x->shape[0];
  if (r.n == 0 || r.d == 0) return PE_OK;
  if (p->groups > 65535 || !pe::counts_in_31_bits(n))
    return pe_fail(s, PE_NO_KERNEL, "group_norm: %d groups of %lld pictures", p->groups, (long long)n);
  const Groups a = {r.n / n, r.d, r.d / p->groups};
  pe::launch(pe::stream(s), group_kernel, dim3((unsigned)n, (unsigned)p->groups), dim3(MOST_THREADS), sizeof(NormShared), a,
             (const float *)x->data, data_or_null(weight), data_or_null(bias), (float *)out->data, p->eps);
  return PE_OK;
}

PE_KERNEL(cuda, softmax)(const pe_tensor *x, const pe_tensor *out, const pe_softmax_params *p, pe_stream *s) {
  const Rows r = rows_of(x);
  const Teams t = teams_of(r.d);
  pe_status status = PE_OK;
  if (r.n == 0 || r.d == 0) return PE_OK;
#define LAUNCH(KEEP) status = launch_rows("softmax", s, r, t, softmax_kernel<KEEP>, (const float *)x->data, (float *)out->data, p->scale)
  PE_EACH_KEEP(t.keep, LAUNCH)
#undef LAUNCH
  return status;
}

PE_KERNEL(cuda, reduce)(const pe_tensor *x, const pe_tensor *out, const pe_reduce_params *p, pe_stream *s) {
  const Rows r = rows_of(x);
  if (r.n == 0) return PE_OK;
  if (r.d == 0 && (p->kind == PE_REDUCE_KIND_MAX || p->kind == PE_REDUCE_KIND_MIN))
    return pe_fail(s, PE_BAD_SHAPE, "reduce: max and min need at least one element");
  switch (p->kind) {
    case PE_REDUCE_KIND_SUM: return reduce<PE_REDUCE_KIND_SUM>(x, out, s);
    case PE_REDUCE_KIND_MEAN: return reduce<PE_REDUCE_KIND_MEAN>(x, out, s);
    case PE_REDUCE_KIND_MAX: return reduce<PE_REDUCE_KIND_MAX>(x, out, s);
    default: return reduce<PE_REDUCE_KIND_MIN>(x, out, s);
  }
}

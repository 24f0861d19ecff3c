/* recurrent.cu: causal_conv, gated_delta_rule: layers with a state of fixed size for each conversation.
 * Reference: pyengine/ops/recurrent.py: causal_conv, gated_delta_rule.
 *
 * causal_conv       A thread owns one channel of one row. It looks back for the row at which its conversation begins in this step, at
 *                   most as far as the taps reach, and reads what lies before from the state. 4 (taps + 1) bytes an element, most of
 *                   which are in the cache; bound by memory.
 * gated_delta_rule  A block of 4 warps owns COLUMNS columns of one head's matrix [e, f] and walks all rows of the step. Lane 8 p + c of
 *                   a warp keeps elements p, p + 4, p + 8 ... of column c in registers (PER of them); a sum over a column is a sum of
 *                   each thread's own elements, and two shuffles: parts (0 + 1) + (2 + 3). q, k and v of ROWS rows pass
 *                   through shared memory, 8 e + 128 bytes a row. 7 e f operations a row and head; the state is read and written once
 *                   a step, by 32-byte sectors. One row is bound by the state's memory, a prompt by the latency of a row: two barriers
 *                   for ROWS rows, four shuffles a row.
 * Operations are those of csrc/cpu/recurrent.c in their order, so results are the CPU's to the bit. No cell is read and written in one launch.
 */
#include "activations.h"

namespace {

enum { FOLLOWS = -2, THREADS = 128, PARTS = 4, COLUMNS = 32, ROWS = 8, MOST_ELEMENTS = 256 };

/* Where states lie: floats between heads and cells; and which of them rows read and write. */
struct States {
  float *data;
  int64_t head, cell;
  int cells;
  const int32_t *before, *after;
  pe_fault *fault;

  __device__ __forceinline__ float *at(int64_t h, int64_t c) const { return data + h * head + c * cell; }
  /* Whether row i may go on; the first thread of a launch says why not. */
  __device__ __forceinline__ bool right(int64_t i, int from, int to, bool says) const {
    const bool wrong = from < (i ? FOLLOWS : -1) || from >= cells;
    if (!wrong && to < cells) return true;
    if (says) pe::raise(fault, PE_BAD_VALUE, wrong ? from : to, cells);
    return false;
  }
};

States states_of(const pe_tensor *t, const pe_tensor *before, const pe_tensor *after, pe_stream *s) {
  return {(float *)t->data, t->stride[0] / 4, t->stride[1] / 4, (int)t->shape[1], (const int32_t *)before->data,
          (const int32_t *)after->data, pe::fault(s)};
}

/* ---- convolution ---- */

struct Conv {
  const float *x, *weight;
  float *out;
  int64_t m, d;
  int taps;
  States states;
};

__global__ void __launch_bounds__(THREADS) conv_kernel(Conv w) {
  const int64_t c = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (c >= w.d) return;
  for (int64_t i = blockIdx.y; i < w.m; i += gridDim.y) {
    int64_t start = i; /* of the rows that a tap reaches, the first one of this conversation */
    while (start > 0 && start > i - w.taps + 1 && w.states.before[start] == FOLLOWS) start--;
    const int cell = w.states.before[start], to = w.states.after[i];
    if (!w.states.right(start, cell, to, c == 0)) continue;
    float sum = 0.0f;
    for (int j = 0; j < w.taps; j++) {
      const int64_t row = i - w.taps + 1 + j;
      const float v = row >= start ? w.x[row * w.d + c] : cell >= 0 ? w.states.at(row - start + w.taps - 1, cell)[c] : 0.0f;
      sum = fmaf(w.weight[j * w.d + c], v, sum);
    }
    w.out[i * w.d + c] = sum;
    for (int j = 0; to >= 0 && j < w.taps - 1; j++) {
      const int64_t row = i - w.taps + 2 + j;
      w.states.at(j, to)[c] = row >= start ? w.x[row * w.d + c] : cell >= 0 ? w.states.at(row - start + w.taps - 1, cell)[c] : 0.0f;
    }
  }
}

/* ---- the delta rule ---- */

/* k [ROWS][4 PER], q the same, v [ROWS][COLUMNS], decay and beta [ROWS]. */
struct Shared { float x[4]; };

struct Delta {
  const float *q, *k, *v, *log_decay, *beta;
  float *out;
  int64_t m;
  int h, f, g, e, tiled;
  States states;
};

/* Sum over a column of what its four threads have. All of them get it. */
__device__ __forceinline__ float over_column(float v) {
  v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 8));
  return __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 16));
}

template <int PER>
__global__ void __launch_bounds__(THREADS) delta_kernel(Delta w) {
  const int width = PARTS * PER, head = blockIdx.y, first = blockIdx.x * COLUMNS, lane = threadIdx.x % 32;
  const int part = lane / 8, column = threadIdx.x / 32 * 8 + lane % 8, at = first + column;
  const int shared = w.tiled ? head % w.g : head / (w.h / w.g);
  float *k = pe::shared<Shared>().x, *q = k + ROWS * width, *v = q + ROWS * width, *decay = v + ROWS * COLUMNS, *beta = decay + ROWS;
  const bool mine = at < w.f, says = head == 0 && first == 0 && threadIdx.x == 0;
  float s[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) s[i] = 0.0f;
  for (int64_t i0 = 0; i0 < w.m; i0 += ROWS) {
    const int n = (int)(w.m - i0 < ROWS ? w.m - i0 : ROWS);
    __syncthreads(); /* all have read the rows before these */
    for (int j = threadIdx.x; j < n * width; j += THREADS) {
      const int row = j / width, d = j % width;
      const int64_t from = ((i0 + row) * w.g + shared) * w.e + d;
      k[j] = d < w.e ? w.k[from] : 0.0f;
      q[j] = d < w.e ? w.q[from] : 0.0f;
    }
    for (int j = threadIdx.x; j < n * COLUMNS; j += THREADS) {
      const int row = j / COLUMNS, c = first + j % COLUMNS;
      v[j] = c < w.f ? w.v[((i0 + row) * w.h + head) * w.f + c] : 0.0f;
    }
    if (threadIdx.x < n) {
      decay[threadIdx.x] = pe::exp_of(w.log_decay[(i0 + threadIdx.x) * w.h + head]);
      beta[threadIdx.x] = w.beta[(i0 + threadIdx.x) * w.h + head];
    }
    __syncthreads();
#pragma unroll 1
    for (int row = 0; row < n; row++) {
      const int64_t i = i0 + row;
      const int from = w.states.before[i], to = w.states.after[i];
      if (!w.states.right(i, from, to, says)) return; /* all threads of the block alike */
      if (from != FOLLOWS) {
        const float *old = from >= 0 ? w.states.at(head, from) : nullptr;
#pragma unroll
        for (int j = 0; j < PER; j++) {
          const int d = part + PARTS * j;
          s[j] = old && mine && d < w.e ? old[(int64_t)d * w.f + at] : 0.0f;
        }
      }
      const float *kr = k + row * width + part, *qr = q + row * width + part;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < PER; j++) sum = fmaf(kr[PARTS * j], s[j], sum);
      const float seen = over_column(sum), fades = decay[row];
      const float change = __fmul_rn(beta[row], __fsub_rn(v[row * COLUMNS + column], __fmul_rn(seen, fades)));
      sum = 0.0f;
#pragma unroll
      for (int j = 0; j < PER; j++) {
        s[j] = fmaf(kr[PARTS * j], change, __fmul_rn(s[j], fades));
        sum = fmaf(qr[PARTS * j], s[j], sum);
      }
      const float y = over_column(sum);
      if (mine && part == 0) w.out[(i * w.h + head) * w.f + at] = y;
      if (to >= 0) {
        float *kept = w.states.at(head, to);
#pragma unroll
        for (int j = 0; j < PER; j++) {
          const int d = part + PARTS * j;
          if (mine && d < w.e) kept[(int64_t)d * w.f + at] = s[j];
        }
      }
    }
  }
}

template <int PER>
void launch_delta(const Delta &w, pe_stream *s) {
  const size_t bytes = ROWS * (2 * PARTS * PER + COLUMNS + 2) * sizeof(float);
  pe::launch(pe::stream(s), delta_kernel<PER>, dim3((unsigned)((w.f + COLUMNS - 1) / COLUMNS), (unsigned)w.h), dim3(THREADS), bytes, w);
}

} // namespace

PE_KERNEL(cuda, causal_conv)(const pe_tensor *x, const pe_tensor *weight, const pe_tensor *state, const pe_tensor *before,
                             const pe_tensor *after, const pe_tensor *out0, const pe_tensor *out1, const pe_causal_conv_params *p,
                             pe_stream *s) {
  (void)p, (void)out1; /* the state itself */
  const int64_t m = x->shape[0], d = x->shape[1];
  if (m == 0 || d == 0) return PE_OK;
  const Conv w = {(const float *)x->data, (const float *)weight->data, (float *)out0->data, m, d, (int)weight->shape[0],
                  states_of(state, before, after, s)};
  const int64_t rows = m < 65535 ? m : 65535;
  pe::launch(pe::stream(s), conv_kernel, dim3((unsigned)((d + THREADS - 1) / THREADS), (unsigned)rows), dim3(THREADS), 0, w);
  return PE_OK;
}

PE_KERNEL(cuda, gated_delta_rule)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *log_decay,
                                  const pe_tensor *beta, const pe_tensor *state, const pe_tensor *before, const pe_tensor *after,
                                  const pe_tensor *out0, const pe_tensor *out1, const pe_gated_delta_rule_params *p, pe_stream *s) {
  (void)out1; /* the state itself */
  const int64_t m = v->shape[0], h = v->shape[1], f = v->shape[2], g = k->shape[1], e = k->shape[2];
  if (g == 0 || h % g) return pe_fail(s, PE_BAD_SHAPE, "gated_delta_rule: %lld heads share %lld keys", (long long)h, (long long)g);
  if (e > MOST_ELEMENTS) return pe_fail(s, PE_NO_KERNEL, "gated_delta_rule: keys of %lld elements, at most %d are possible", (long long)e, MOST_ELEMENTS);
  if (m == 0 || h == 0 || f == 0) return PE_OK;
  const Delta w = {(const float *)q->data, (const float *)k->data, (const float *)v->data, (const float *)log_decay->data,
                   (const float *)beta->data, (float *)out0->data, m, (int)h, (int)f, (int)g, (int)e, p->tiled,
                   states_of(state, before, after, s)};
  if (e <= 32) launch_delta<8>(w, s);
  else if (e <= 64) launch_delta<16>(w, s);
  else if (e <= 128) launch_delta<32>(w, s);
  else launch_delta<64>(w, s);
  return PE_OK;
}

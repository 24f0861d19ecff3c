/* linear.cu: one to four weight matrices times the same rows, with everything fused that touches those rows: the host's part. linear.h says
 * how sums are formed, and names the files with kernels.
 * Reference: pyengine/ops/matmul.py: linear. It becomes two launches, or one more for each further format among the weights:
 *   1. rows of x, normed, as int8, 16-bit floats or float32, once for all weights          linear_rows.cu
 *   2. the product with all matrices of a format; bias, glu, residual and cap at its end
 * A glu of matrices of two formats is two products and a launch of combine: a thread owns an element; no shared memory; 12 bytes an element.
 */
#include "linear.h"

namespace pe {

Kind kind_of(const pe_tensor *w) {
  const int32_t format = format_of(w);
  if (w->dtype < PE_PACKED) return pe_format_of(format).elements ? KIND_FLOAT : KIND_NONE;
  switch (format) {
#define BLOCKS(name, ...) case PE_##name:
    PE_PACKED_BLOCKS(BLOCKS) return KIND_BLOCKS;
#undef BLOCKS
    case PE_F16:
    case PE_BF16: return KIND_HALF;
    case PE_F32: return KIND_FLOAT;
    default: return KIND_NONE;
  }
}

/* Bytes of a packed group of 16 rows; of a row in the file's layout. */
static int64_t group_bytes_of(const pe_tensor *w, int64_t k) {
  if (w->dtype < PE_PACKED) return w->stride[w->ndim - 2];
  int64_t block = 1, unit = 1, head = 0, body = 0;
  switch (format_of(w)) {
#define BLOCKS(name, unit_, head_, body_, ...) case PE_##name: block = PE_BLOCK_##name, unit = unit_, head = head_, body = body_; break;
    PE_PACKED_BLOCKS(BLOCKS)
    PE_PACKED_FLOATS(BLOCKS)
#undef BLOCKS
    default: break;
  }
  const int64_t blocks = k / block;
  return round_up((blocks + unit - 1) / unit * unit * head + blocks * body, 64);
}

Matrix matrix_of(const pe_tensor *w, const float *bias, const pe_tensor *out) {
  const int64_t n = w->shape[w->ndim - 2], group = group_bytes_of(w, w->shape[w->ndim - 1]);
  const int64_t expert = w->ndim < 3 ? 0 : w->dtype >= PE_PACKED ? (n + 15) / 16 * group : w->stride[0];
  return {static_cast<const uint8_t *>(w->data), group, expert, bias, static_cast<float *>(out->data), out->stride[0] / 4,
          static_cast<int>(n), 0};
}

Places places_of(const pe_tensor *const *w, int32_t n_w, int64_t rows, int64_t k) {
  Places y = {-1, -1, -1, -1, -1, 0, false};
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, steps = (k + 31) / 32;
  auto take = [&](int64_t &at, int64_t bytes) {
    if (at >= 0) return;
    at = y.bytes;
    y.bytes += round_up(bytes, 256);
  };
  for (int i = 0; i < n_w; i++)
    if (w[i]->dtype == PE_PACKED + PE_Q2_K) y.halves = true;
  for (int i = 0; i < n_w; i++) {
    const Kind kind = kind_of(w[i]);
    if (kind == KIND_BLOCKS) take(y.codes, tiles * steps * RECORD);
    if (kind == KIND_FLOAT) take(y.floats, tiles * TILE_ROWS * steps * 128);
    if (kind != KIND_HALF) continue;
    const bool bf16 = format_of(w[i]) == PE_BF16;
    take(bf16 ? y.bf16 : y.f16, tiles * steps * (bf16 ? 4 : 2) * CODES_BYTES);
    if (!bf16) take(y.f16_unit, tiles * TILE_ROWS * 4);
  }
  return y;
}

void place(Preparation &t, const Places &y, char *scratch) {
  auto at = [&](int64_t offset) { return offset < 0 ? nullptr : scratch + offset; };
  t.halves = y.halves;
  t.codes = reinterpret_cast<uint8_t *>(at(y.codes));
  t.bf16 = reinterpret_cast<uint8_t *>(at(y.bf16));
  t.f16 = reinterpret_cast<uint8_t *>(at(y.f16));
  t.f16_unit = reinterpret_cast<float *>(at(y.f16_unit));
  t.floats = reinterpret_cast<float *>(at(y.floats));
}

int unit_tiles(Kind kind, int64_t rows, int64_t n, const Queue &queue) {
  if (rows <= TILE_ROWS) return 1;
  if (rows <= 4 * TILE_ROWS) return kind == KIND_FLOAT ? 4 : 2;
  const int64_t blocks = (n + 127) / 128 * ((rows + 127) / 128);
  /* Blocks of 128 x 128 need more shared memory than an sm_75 has. */
  return kind != KIND_FLOAT && rows > 64 && blocks >= queue.multiprocessors && queue.capability >= 80 ? 16 : 8;
}

/* Blocks for each unit that walk through pairs: as many as run at once, 16 warps of 128 registers to a multiprocessor, in equal shares. Of
 * units of experts perhaps a quarter has work. */
static unsigned few_blocks(const Product &p, int units, const Queue &queue) {
  const int warps = (p.steps + p.slice - 1) / p.slice, room = queue.multiprocessors * (16 / warps) * (p.units ? 4 : 1);
  const int blocks = room / units > 0 ? room / units : 1, rounds = (p.blocks + blocks - 1) / blocks;
  return static_cast<unsigned>((p.blocks + rounds - 1) / rounds);
}

pe_status multiply(int32_t dtype, const Preparation &x, Product &p, int tiles, int units, const Queue &queue) {
  pe_tensor w = {};
  w.dtype = dtype;
  const Kind kind = kind_of(&w);
  const int pairs = tiles == 16 ? 4 : tiles == 8 ? 2 : 1;
  int blocks = 0;
  for (int i = 0; i < (p.glu ? 1 : p.n_w); i++) {
    const int groups = (p.w[i].n + 15) / 16, all = p.glu ? groups : (groups + 1) / 2;
    p.w[i].blocks_before = blocks;
    blocks += (all + pairs - 1) / pairs;
  }
  if (blocks == 0 || units == 0) return PE_OK;
  if (blocks > 65535) return PE_NO_KERNEL; /* the grid's limit: 2 million rows of weights, one million with glu */
  p.blocks = blocks;
  dim3 grid(units, blocks);
  switch (kind) {
    case KIND_BLOCKS:
      p.x = x.codes;
      if (tiles > 4) return multiply_tiles(format_of(&w), p, tiles, grid, queue.stream);
      if (tiles == 1) grid.y = few_blocks(p, units, queue);
      return multiply_few(format_of(&w), p, tiles, grid, queue.stream);
    case KIND_HALF:
      p.x = format_of(&w) == PE_BF16 ? x.bf16 : x.f16;
      p.x_unit = format_of(&w) == PE_BF16 ? nullptr : x.f16_unit;
      return multiply_half(format_of(&w), p, tiles, grid, queue.stream);
    case KIND_FLOAT:
      p.x = reinterpret_cast<const uint8_t *>(x.floats);
      p.x_stride = static_cast<int64_t>(p.steps) * 128;
      return multiply_floats(dtype, p, tiles, grid, queue.stream);
    default: return PE_NO_KERNEL;
  }
}

/* ---- a glu of two formats ---- */

/* y = glu(y) * up, then the cap; rows of n, `up` without gaps. A thread owns an element. */
static __global__ void combine(float *y, const float *up, int64_t m, int n, int64_t stride, int glu, float softcap) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= m * n) return;
  float &at = y[i / n * stride + i % n];
  float value = glu_of(glu, at) * up[i];
  if (softcap != 0.0f) value = capped(value, softcap);
  at = value;
}

void combine_glu(const Matrix &w, const float *up, int64_t m, int glu, float softcap, cudaStream_t stream) {
  launch(stream, combine, dim3(static_cast<unsigned>((m * w.n + 255) / 256)), dim3(256), 0, w.out, up, m, w.n, w.out_stride, glu, softcap);
}

} // namespace pe

namespace {

using namespace pe;

bool is_mixed(const pe_tensor *const *w, int32_t glu) { return glu != PE_LINEAR_GLU_NONE && w[0]->dtype != w[1]->dtype; }

pe_status check(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, int32_t n_bias, const pe_tensor *residual, int32_t n_out,
                const pe_linear_params *p, pe_stream *s) {
  const bool glu = p->glu != PE_LINEAR_GLU_NONE;
  if (n_w < 1 || n_w > 4 || (n_bias && n_bias != n_w) || n_out != (glu ? 1 : n_w))
    return pe_fail(s, PE_BAD_SHAPE, "linear: %d weights, %d biases, %d outputs", n_w, n_bias, n_out);
  if ((glu && (n_w != 2 || w[0]->shape[0] != w[1]->shape[0])) || (residual && (glu || n_w != 1)))
    return pe_fail(s, PE_BAD_SHAPE, "linear: glu takes two equal weights and no residual, a residual one weight");
  for (int i = 0; i < n_w; i++) {
    if (w[i]->shape[1] != x->shape[1] || x->shape[1] % pe_format_of(format_of(w[i])).elements)
      return pe_fail(s, PE_BAD_SHAPE, "linear: x has %lld columns, weight %d of format %d has %lld", (long long)x->shape[1], i,
                     w[i]->dtype, (long long)w[i]->shape[1]);
    if (w[i]->shape[0] > INT32_MAX / 2 || x->shape[1] > INT32_MAX / 64 || x->shape[0] > INT32_MAX / 16)
      return pe_fail(s, PE_NO_KERNEL, "linear: %lld x %lld weights, %lld rows: too many", (long long)w[i]->shape[0],
                     (long long)x->shape[1], (long long)x->shape[0]);
  }
  return PE_OK;
}

/* The product with weights i of those in `mask`, which have one dtype. */
pe_status product(const pe_linear_params *params, const pe_tensor *const *w, int32_t n_w, unsigned mask, const Preparation &x,
                  Product &p, pe_stream *s) {
  int64_t n = 0;
  int32_t dtype = 0, count = 0;
  Matrix all[4] = {};
  for (int i = 0; i < n_w; i++)
    if (mask >> i & 1) {
      all[count++] = p.w[i];
      dtype = w[i]->dtype;
      n += w[i]->shape[0];
    }
  Product one = p;
  for (int i = 0; i < 4; i++) one.w[i] = all[i];
  one.n_w = count;
  one.glu = count == 2 ? params->glu : PE_LINEAR_GLU_NONE;
  one.softcap = is_mixed(w, params->glu) ? 0.0f : params->softcap;
  const int tiles = unit_tiles(kind_of(w[0]->dtype == dtype ? w[0] : w[__builtin_ctz(mask)]), p.m, n, queue(s));
  pe_status status = multiply(dtype, x, one, tiles, (p.tiles + tiles - 1) / tiles, queue(s));
  if (status) return pe_fail(s, status, "linear: no kernel for format %d", dtype);
  return status;
}

} // namespace

PE_SCRATCH(cuda, linear)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)n_threads;
  const pe_tensor *x = a->t[a->start[0]], *const *w = a->t + a->start[1];
  const int32_t glu = static_cast<const pe_linear_params *>(params)->glu;
  const int64_t m = round_up(x->shape[0], TILE_ROWS);
  return places_of(w, a->count[1], m, x->shape[1]).bytes + (is_mixed(w, glu) ? m * w[1]->shape[0] * 4 : 0);
}

PE_KERNEL(cuda, linear)(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, const pe_tensor *const *bias, int32_t n_bias,
                        const pe_tensor *norm, const pe_tensor *residual, const pe_tensor *const *out, int32_t n_out,
                        const pe_linear_params *p, pe_stream *s) {
  const int64_t m = x->shape[0], k = x->shape[1], rows = round_up(m, TILE_ROWS);
  pe_status status = check(x, w, n_w, n_bias, residual, n_out, p, s);
  if (status || m == 0 || k == 0) return status;
  const bool mixed = is_mixed(w, p->glu);
  const Places y = places_of(w, n_w, rows, k);
  const int64_t bytes = y.bytes + (mixed ? rows * w[1]->shape[0] * 4 : 0);
  if (s->scratch_bytes < bytes)
    return pe_fail(s, PE_NO_MEMORY, "linear: %lld bytes of scratch, needs %lld", (long long)s->scratch_bytes, (long long)bytes);

  Preparation prepared = {};
  prepared.x = static_cast<const float *>(x->data);
  prepared.norm = norm ? static_cast<const float *>(norm->data) : nullptr;
  prepared.x_stride = x->stride[0] / 4;
  prepared.eps = p->norm_eps;
  prepared.m = static_cast<int>(m);
  prepared.k = static_cast<int>(k);
  prepared.each = 1;
  place(prepared, y, s->scratch);
  prepare(prepared, static_cast<int>(rows), stream(s));

  Product t = {};
  t.residual = residual ? static_cast<const float *>(residual->data) : nullptr;
  t.residual_stride = residual ? residual->stride[0] / 4 : 0;
  t.k = static_cast<int>(k);
  t.steps = static_cast<int>((k + 31) / 32);
  t.slice = linear_slice(k);
  t.m = static_cast<int>(m);
  t.tiles = static_cast<int>(rows / TILE_ROWS);
  t.codebooks = codebooks(s);
  for (int i = 0; i < n_w; i++)
    t.w[i] = matrix_of(w[i], n_bias ? static_cast<const float *>(bias[i]->data) : nullptr, out[n_out == n_w ? i : 0]);
  if (mixed) {
    t.w[1].out = reinterpret_cast<float *>(s->scratch + y.bytes);
    t.w[1].out_stride = t.w[1].n;
  }
  for (unsigned left = (1u << n_w) - 1; left && !status;) {
    unsigned mask = 0;
    for (int i = 0; i < n_w; i++)
      if (left >> i & 1 && w[i]->dtype == w[__builtin_ctz(left)]->dtype) mask |= 1u << i;
    status = product(p, w, n_w, mask, prepared, t, s);
    left &= ~mask;
  }
  if (mixed && !status) combine_glu(t.w[0], t.w[1].out, m, p->glu, p->softcap, stream(s));
  return status;
}

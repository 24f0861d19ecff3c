/* experts.cu: expert_linear, the products of rows with the weights of the experts that they chose.
 * Reference: pyengine/ops/experts.py: expert_linear; kernels and the order of sums are those of `linear` (linear.h), with the same bits.
 *
 * A pair is a row and one of its experts; p = m u of them.
 *   one row    Each of its u experts is a unit of one row: the product's blocks read `chosen` themselves. Two launches, as in `linear`; the
 *              bytes of u experts are read once.
 *   more rows  Pairs are sorted by expert (counting: two launches, a warp for each expert that reads all of `chosen`: 4 e p bytes from the
 *              second cache, 128 a load). Each expert's pairs begin a tile of 8 prepared rows, and its tiles are cut into units of up to
 *              U tiles, U by the mean number of rows of an expert. A unit's blocks read the expert's weights once; units of one expert
 *              meet in the second cache. How many units there are only the device knows: the grid has room for the most, and blocks
 *              beyond return at once.
 * Sorting has no shared memory; the products' is in linear_*.cu. Bound by memory: each used expert's bytes once, where a unit holds all its rows.
 * The place of a pair does not matter for its result, and is the same in every run all the same: pairs of an expert are in their order.
 */
#include "linear.h"

namespace pe {
namespace {

constexpr int SORT_THREADS = 256;

struct Sorting {
  const int32_t *chosen;
  int64_t stride;        /* of chosen, in numbers */
  int m, used, experts;
  int tiles;             /* at most in use */
  int unit;              /* tiles of a unit at most */
  int32_t *counts;       /* of pairs, of each expert */
  int32_t *order;        /* the pair of each prepared row */
  Unit *units;
  int32_t *n_units;
  pe_fault *fault;
};

__device__ __forceinline__ int expert_of(const Sorting &s, int pair) { return s.chosen[pair / s.used * s.stride + pair % s.used]; }
__device__ __forceinline__ int cut(int n, int by) { return (n + by - 1) / by; }

/* counts[e], by a warp for each e. The first warp looks for experts that are not there. */
__global__ void __launch_bounds__(SORT_THREADS) count_pairs(const Sorting s) {
  const int e = (blockIdx.x * SORT_THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (e >= s.experts) return;
  int count = 0;
  for (int pair = lane; pair < s.m * s.used; pair += 32) {
    const int id = expert_of(s, pair);
    count += id == e;
    if (e == 0 && (id < 0 || id >= s.experts)) raise(s.fault, PE_BAD_VALUE, id, s.experts);
  }
  count = warp_sum(count);
  if (lane == 0) s.counts[e] = count;
}

/* Tiles and units of expert e, behind those of the experts before it; the last expert's warp also marks what is left over. */
__global__ void __launch_bounds__(SORT_THREADS) place_pairs(const Sorting s) {
  const int e = (blockIdx.x * SORT_THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (e >= s.experts) return;
  int tile = 0, unit = 0;
  for (int i = lane; i < e; i += 32) {
    const int tiles = cut(s.counts[i], TILE_ROWS);
    tile += tiles, unit += cut(tiles, s.unit);
  }
  tile = warp_sum(tile), unit = warp_sum(unit);
  const int tiles = cut(s.counts[e], TILE_ROWS), units = cut(tiles, s.unit);
  int at = TILE_ROWS * tile;
  for (int first = 0; first < s.m * s.used; first += 32) {
    const int pair = first + lane;
    const bool mine = pair < s.m * s.used && expert_of(s, pair) == e;
    const unsigned all = __ballot_sync(ALL, mine);
    if (mine) s.order[at + __popc(all & ((1u << lane) - 1))] = pair;
    at += __popc(all);
  }
  for (int i = at + lane; i < TILE_ROWS * (tile + tiles); i += 32) s.order[i] = NO_ROW;
  for (int i = lane; i < units; i += 32)
    s.units[unit + i] = {e, tile + i * s.unit, min(s.unit, tiles - i * s.unit), 0};
  if (e + 1 < s.experts) return;
  for (int i = TILE_ROWS * (tile + tiles) + lane; i < TILE_ROWS * s.tiles; i += 32) s.order[i] = NO_TILE;
  if (lane == 0) *s.n_units = unit + units;
}

/* Shapes of a mixture, and where its working memory lies: prepared rows, then what is sorted, then the second matrix' results where a glu
 * has two formats. */
struct Mixture {
  int64_t m, used, pairs, experts, n, k, most; /* most: experts that can be in use */
  bool sorted, mixed;
  int64_t tiles;
  Places rows;
  int64_t counts, order, units, n_units, up, bytes;
};

Mixture mixture_of(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, const pe_tensor *chosen) {
  Mixture t = {};
  t.m = chosen->shape[0], t.used = chosen->shape[1], t.pairs = t.m * t.used;
  t.experts = w[0]->shape[0], t.n = w[0]->shape[1], t.k = w[0]->shape[2];
  t.most = t.pairs < t.experts ? t.pairs : t.experts;
  t.sorted = t.m > 1;
  t.mixed = n_w == 2 && w[0]->dtype != w[1]->dtype;
  t.tiles = t.sorted ? (t.pairs + (TILE_ROWS - 1) * t.most) / TILE_ROWS : x->shape[0];
  t.rows = places_of(w, n_w, TILE_ROWS * t.tiles, t.k);
  int64_t end = t.rows.bytes;
  auto take = [&](int64_t bytes) {
    const int64_t at = end;
    end += round_up(bytes, 256);
    return at;
  };
  t.counts = take(4 * t.experts);
  t.order = take(4 * TILE_ROWS * t.tiles);
  t.units = take(static_cast<int64_t>(sizeof(Unit)) * t.tiles);
  t.n_units = take(4);
  t.up = take(t.mixed ? 4 * t.pairs * t.n : 0);
  t.bytes = end;
  return t;
}

pe_status check(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, const pe_tensor *chosen, const pe_tensor *out,
                const pe_expert_linear_params *p, pe_stream *s) {
  const int64_t m = chosen->shape[0], pairs = m * chosen->shape[1];
  if (n_w != 1 + (p->glu != PE_EXPERT_LINEAR_GLU_NONE))
    return pe_fail(s, PE_BAD_SHAPE, "expert_linear: %d weights; one, or two with glu", n_w);
  if ((x->shape[0] != m && x->shape[0] != pairs) || out->shape[0] != pairs)
    return pe_fail(s, PE_BAD_SHAPE, "expert_linear: %lld rows for %lld x %lld experts", (long long)x->shape[0], (long long)m,
                   (long long)chosen->shape[1]);
  for (int i = 0; i < n_w; i++)
    if (w[i]->shape[0] != w[0]->shape[0] || w[i]->shape[1] != out->shape[1] || w[i]->shape[2] != x->shape[1] ||
        x->shape[1] % pe_format_of(format_of(w[i])).elements)
      return pe_fail(s, PE_BAD_SHAPE, "expert_linear: weight %d does not fit", i);
  if (pairs > INT32_MAX / 256 || w[0]->shape[1] > INT32_MAX / 2 || x->shape[1] > INT32_MAX / 64)
    return pe_fail(s, PE_NO_KERNEL, "expert_linear: %lld pairs of %lld x %lld weights: too many", (long long)pairs,
                   (long long)w[0]->shape[1], (long long)x->shape[1]);
  return PE_OK;
}

/* Sort pairs into units of `unit` tiles, and let the product read them. */
void sort(const Mixture &t, const pe_tensor *chosen, int unit, Product &p, pe_stream *s) {
  Sorting sorting = {static_cast<const int32_t *>(chosen->data), chosen->stride[0] / 4, static_cast<int>(t.m), static_cast<int>(t.used),
                     static_cast<int>(t.experts), static_cast<int>(t.tiles), unit,
                     reinterpret_cast<int32_t *>(s->scratch + t.counts), reinterpret_cast<int32_t *>(s->scratch + t.order),
                     reinterpret_cast<Unit *>(s->scratch + t.units), reinterpret_cast<int32_t *>(s->scratch + t.n_units), fault(s)};
  const dim3 grid(static_cast<unsigned>((32 * t.experts + SORT_THREADS - 1) / SORT_THREADS));
  launch(stream(s), count_pairs, grid, dim3(SORT_THREADS), 0, sorting);
  launch(stream(s), place_pairs, grid, dim3(SORT_THREADS), 0, sorting);
  p.order = sorting.order;
  p.units = sorting.units;
  p.n_units = sorting.n_units;
}

/* The product with weights first .. first + count - 1, of one dtype. */
pe_status product(const Mixture &t, const pe_tensor *const *w, int first, int count, int glu, int unit, const Preparation &x, Product p,
                  pe_stream *s) {
  for (int i = 0; i < count; i++) p.w[i] = p.w[first + i];
  p.n_w = count;
  p.glu = count == 2 ? glu : PE_LINEAR_GLU_NONE;
  const int64_t rows = TILE_ROWS * unit, units = t.sorted ? (t.pairs + (rows - 1) * t.most) / rows : t.pairs;
  const pe_status status = multiply(w[first]->dtype, x, p, unit, static_cast<int>(units), queue(s));
  return status ? pe_fail(s, status, "expert_linear: no kernel for format %d", w[first]->dtype) : PE_OK;
}

} // namespace
} // namespace pe

#define SAME(glu) static_assert((int)PE_EXPERT_LINEAR_GLU_##glu == (int)PE_LINEAR_GLU_##glu, "as in linear");
SAME(NONE) SAME(SILU) SAME(GELU_TANH) SAME(GELU) SAME(RELU)
#undef SAME

PE_SCRATCH(cuda, expert_linear)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)params, (void)n_threads;
  pe_tensor few = *a->t[a->start[0]];
  const pe_tensor *const *w = a->t + a->start[1], *chosen = a->t[a->start[2]];
  const int64_t most = pe::mixture_of(&few, w, a->count[1], chosen).bytes;
  pe_tensor one = *chosen; /* one row takes a tile for each expert, which fewer rows than experts do not */
  one.shape[0] = 1;
  few.shape[0] = chosen->shape[1];
  const int64_t single = pe::mixture_of(&few, w, a->count[1], &one).bytes;
  return most > single ? most : single;
}

PE_KERNEL(cuda, expert_linear)(const pe_tensor *x, const pe_tensor *const *w, int32_t n_w, const pe_tensor *chosen, const pe_tensor *out,
                               const pe_expert_linear_params *p, pe_stream *s) {
  using namespace pe;
  pe_status status = check(x, w, n_w, chosen, out, p, s);
  if (status) return status;
  const Mixture t = mixture_of(x, w, n_w, chosen);
  if (t.pairs == 0 || t.k == 0 || t.n == 0) return PE_OK;
  if (s->scratch_bytes < t.bytes)
    return pe_fail(s, PE_NO_MEMORY, "expert_linear: %lld bytes of scratch, needs %lld", (long long)s->scratch_bytes, (long long)t.bytes);

  Product job = {};
  job.k = static_cast<int>(t.k);
  job.steps = static_cast<int>((t.k + 31) / 32);
  job.slice = linear_slice(t.k);
  job.m = static_cast<int>(t.pairs);
  job.tiles = static_cast<int>(t.tiles);
  job.experts = static_cast<int>(t.experts);
  job.fault = fault(s);
  job.codebooks = codebooks(s);
  for (int i = 0; i < n_w; i++) job.w[i] = matrix_of(w[i], nullptr, out);
  if (t.mixed) job.w[1].out = reinterpret_cast<float *>(s->scratch + t.up), job.w[1].out_stride = t.n;
  const bool floats = kind_of(w[0]) == KIND_FLOAT || kind_of(w[n_w - 1]) == KIND_FLOAT;
  int unit = 1;
  if (t.sorted) {
    unit = unit_tiles(floats ? KIND_FLOAT : kind_of(w[0]), 2 * t.pairs / t.most, t.n * t.most, queue(s));
    sort(t, chosen, unit, job, s);
  } else {
    job.chosen = static_cast<const int32_t *>(chosen->data);
    job.shared = x->shape[0] == 1;
  }

  Preparation rows = {};
  rows.x = static_cast<const float *>(x->data);
  rows.x_stride = x->stride[0] / 4;
  rows.m = static_cast<int>(x->shape[0]);
  rows.k = job.k;
  rows.each = x->shape[0] == t.m ? static_cast<int>(t.used) : 1;
  rows.spread = !t.sorted;
  rows.order = job.order;
  if (!t.sorted) rows.each = 1;
  place(rows, t.rows, s->scratch);
  prepare(rows, static_cast<int>(t.sorted ? TILE_ROWS * t.tiles : t.tiles), stream(s));

  if (!t.mixed) return product(t, w, 0, n_w, p->glu, unit, rows, job, s);
  status = product(t, w, 0, 1, p->glu, unit, rows, job, s);
  if (!status) status = product(t, w, 1, 1, p->glu, unit, rows, job, s);
  if (!status) combine_glu(job.w[0], job.w[1].out, t.pairs, p->glu, 0.0f, stream(s));
  return status;
}

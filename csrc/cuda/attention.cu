/* attention.cu: softmax(scale q k^T) v over an interval of keys for each query: which kernel does a node, and the merging of chunks.
 * Reference: pyengine/ops/attention.py: attention.
 *
 *   keys and values             a query sees             products of                                   within, of the reference
 *   F32, heads wider than 256   any number of keys       floats, in the CPU's order: its bits          2e-6 of the spread of values
 *   F16, BF16, blocks, keys     up to EXACT_KEYS of them the same (attention_float.cu)                 2e-6
 *   by channel                  more                     halves, two for each number that is none      2e-6
 *   F32 with products="int8"    any number of keys       halves: all are rounded to 11 bits            1e-3 (int8 allows 5e-3)
 *
 * Keys in blocks meet queries of 8 bits everywhere, as on the CPU; what is said of them is against such queries.
 *
 * Two halves: q = high + low, each an operand of its own, so that 22 bits of q count; of probabilities the same. Keys and values of 16 bits
 * are halves as they are. Values in blocks, and keys by channel, are code * scale, of 19 bits: two halves as well, and of the four products the
 * least is left out. What it takes of tensor cores is twice (values in blocks: three times) the products, no more bytes of the cache, and for queries and
 * unpacked values twice the shared memory: attention_many.cu counts it. With one half each results were within 1e-3.
 *
 * Why two kernels: activations are rounded to 8 bits behind attention, and one that differs in its last digit may fall on the other side of
 * the middle of two codes. Then logits differ by what rounding to 8 bits costs, up to 1e-2 of their range; so agreement with the CPU takes its
 * bits, which tensor cores cannot give. Of long contexts attention would be most of the time: an H200 multiplies halves nine times as
 * fast as floats, a GeForce twice. $PYENGINE_CUDA_EXACT_KEYS moves the border: 0 leaves all to tensor cores. Where a node may meet both
 * kinds of queries two kernels run, and each leaves the other's alone; what a query gets follows from its own interval.
 *
 * Queries of few rows a sequence go to attention_few.cu, with the chunks of a query spread over the card; of many to attention_many.cu,
 * where a block has all chunks of 64 or 128 queries. A query has the same bits in both, and in units of any size (attention.h says
 * why), so the choice may follow from the numbers of rows and sequences. bfloat16 becomes a half exactly from 2^-14 to 65504; beyond, it is
 * infinite, below, it loses bits, as a F16 cache would.
 *
 * merge_kernel: block i owns query i, a thread a column. It reads the partial sums of the query's chunks once, (f + 2) * 4 bytes each, in
 * ascending order, and writes f floats: a chunk of 512 keys of 8 heads of 128 in F16 is 1 MB, its partials are 4 KB a query.
 */
#include "attention_softmax.h"

#include <cstdlib>

namespace {

using namespace pe;

enum { MOST_COLUMNS = 512, MOST_HALVES = 256 /* columns in attention of halves */, LEAST_MANY = 32 /* queries of a block of attend_many */ };
enum { EXACT_KEYS = 2048, SPLIT_BYTES = 32 << 20, SPLIT_ROWS = 8 };
constexpr int64_t ANY = INT64_MAX;

struct MixingRow { float x[MOST_COLUMNS]; };

template <bool NATURAL>
__global__ void __launch_bounds__(MOST_COLUMNS) merge_kernel(const Job w) {
  constexpr int CHUNK = NATURAL ? FLOAT_CHUNK_KEYS : CHUNK_KEYS;
  const int64_t query = blockIdx.x;
  const int row = (int)(query / w.h), head = (int)(query % w.h), column = threadIdx.x, wide = w.nf * COLUMNS;
  const Interval seen = interval_of(w, row, false);
  float *out = w.out + query * w.f, x = 0.0f, before, now;
  if (is_anothers(seen)) return;
  if (!empty(seen)) {
    const int64_t slot = query * w.chunks;
    float most = PE_NONE;
    Total total;
    for (int i = 0; i <= last_chunk<CHUNK>(seen) - first_chunk<CHUNK>(seen); i++) {
      const Total part = {w.tops[2 * (slot + i)], w.tops[2 * (slot + i) + 1]};
      if (w.stats && column == 0) most = fmaxf(most, w.mosts[slot + i]);
      const float y = column < w.f ? w.partials[(slot + i) * wide + column] : 0.0f;
      if (i == 0) {
        total = part, x = y;
        continue;
      }
      merge_tops<NATURAL>(total, part, before, now);
      x = merged(x, y, before, now);
    }
    if (w.stats && column == 0) tell<NATURAL>(w, query, total, most);
    const float factor = join_sink<NATURAL>(w.sinks, head, total);
    x = finished(x, factor, total.sum);
    if (in_blocks(w.v)) {
      float *all = shared<MixingRow>().x;
      all[column] = x;
      __syncthreads();
      if (warp_of() == 0) mix(all, w.f);
      __syncthreads();
      x = all[column];
    }
  } else if (w.stats && column == 0) {
    tell_nothing(w, query);
  }
  if (column < w.f) out[column] = x;
}

/* ---- which kernel, with which units ---- */

/* Shared memory that a block can have, by compute capability (CUDA C++ Programming Guide, table of technical specifications). */
int shared_limit(int capability) {
  switch (capability) {
    case 75: return 64 << 10;
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: case 121: return 99 << 10;
    default: return 227 << 10;
  }
}

int at_end(int *end, int64_t bytes) {
  const int at = *end;
  *end += (int)round_up(bytes, 128);
  return at;
}

/* Staged cells of blocks lie so far apart that 4 lanes of 8 keys, 4 bytes each, meet no bank twice. */
int pitch_of(int32_t dtype, int elements) {
  const int32_t block = channel_format(dtype);
  const pe_format f = cell_format_of(block != PE_F32 ? block : dtype);
  const int pitch = (int)round_up(elements / f.elements * f.bytes, 16);
  return pitch % 32 ? pitch : pitch + 16;
}

int tile_bytes(Form form, int columns, int pitch) { return form == BLOCKS || form == CHANNELS ? TILE_KEYS * pitch : columns * TILE_KEYS * 64; }

/* A stretch of a tile's cells as they lie; of numbers that are not copied only which cells they are. */
int staged_bytes(Form form, int pitch) { return TILE_KEYS * (form == GATHERED ? (int)sizeof(int32_t) : pitch); }

/* stages: 0 for one in which V takes the place of K. */
void lay_out(Job *w, int queries, int warps, int stages) {
  Areas &a = w->at;
  const bool few = queries == FEW_QUERIES;
  const int parts = w->fine ? 2 : 1;
  int end = 0;
  a.one = stages == 0;
  a.cells = at_end(&end, CELL_KEYS * 4);
  a.rows = at_end(&end, queries * sizeof(Interval));
  a.task = at_end(&end, sizeof(Task));
  a.totals = at_end(&end, queries * sizeof(Total));
  a.most = at_end(&end, w->stats ? queries * 4 : 0);
  a.q = at_end(&end, (int64_t)queries * w->ne * (w->k_form == BLOCKS ? 32 : 64 * parts));
  a.q_scale = at_end(&end, queries * 4);
  a.q_sum = at_end(&end, w->k_form == BLOCKS ? (int64_t)queries * w->ne * 4 : 0);
  a.k_ready = at_end(&end, w->k_form == CHANNELS ? w->ne * TILE_KEYS * 64 * 2 : !few && w->k_form == BLOCKS ? w->ne * TILE_KEYS * 32 : 0);
  a.k_scale = at_end(&end, !few && w->k_form == BLOCKS ? w->ne * TILE_KEYS * 8 : 0);
  a.v_ready = at_end(&end, !few && w->v_form == BLOCKS ? w->nf * TILE_KEYS * 64 * 2 : 0);
  a.peaks = at_end(&end, few ? FEW_WARPS * queries * 4 : 0);
  a.p = at_end(&end, few ? TILE_KEYS / 16 * 32 * 16 * 2 : 0);
  a.mixing = at_end(&end, w->k_form == BLOCKS || w->v_form == BLOCKS ? warps * (w->e > w->f ? w->e : w->f) * 4 : 0);
  a.k_pitch = pitch_of(w->k.dtype, w->e), a.v_pitch = pitch_of(w->v.dtype, w->f);
  const int begin = end, k_bytes = tile_bytes(w->k_form, w->ne, a.k_pitch), v_bytes = tile_bytes(w->v_form, w->nf, a.v_pitch);
  a.k = at_end(&end, a.one && v_bytes > k_bytes ? v_bytes : k_bytes);
  a.v = a.one ? a.k : at_end(&end, v_bytes);
  a.stage_bytes = end - begin;
  a.stages = a.one ? 1 : stages;
  a.bytes = begin + a.stages * a.stage_bytes;
}

/* one: a stretch of cells is staged when the one before it has been used, where there are blocks. */
void lay_out_floats(Job *w, int queries, bool one) {
  Areas &a = w->at;
  int end = 0;
  const bool codes = w->k_form == BLOCKS, blocks = is_blocky(*w);
  const int pitch = 64 + 4, slice = TILE_KEYS * pitch * 4;
  a.cells = at_end(&end, CELL_KEYS * 4);
  a.rows = at_end(&end, queries * sizeof(Interval));
  a.q = at_end(&end, (int64_t)queries * (round_up(w->e, 64) + 4) * 4);
  a.q_scale = at_end(&end, codes ? queries * 4 : 0);
  a.q_sum = at_end(&end, codes ? queries * w->ne * 4 : 0);
  a.k_scale = at_end(&end, codes ? TILE_KEYS * 2 * 8 : 0);
  a.mixing = at_end(&end, w->v_form == BLOCKS ? 4 * w->f * 4 : 0);
  a.peaks = at_end(&end, 3 * queries * 4);
  a.most = at_end(&end, w->stats ? queries * 4 : 0);
  a.p = at_end(&end, queries * pitch * 4);
  a.k_ready = at_end(&end, blocks ? slice : 0);
  a.one = one;
  a.k_pitch = pitch_of(w->k.dtype, w->e < STRETCH ? w->e : STRETCH), a.v_pitch = pitch_of(w->v.dtype, w->f < STRETCH ? w->f : STRETCH);
  const int k_bytes = staged_bytes(w->k_form, a.k_pitch), v_bytes = staged_bytes(w->v_form, a.v_pitch);
  a.k = at_end(&end, !blocks ? slice : k_bytes > v_bytes ? k_bytes : v_bytes);
  a.stage_bytes = end - a.k;
  a.bytes = a.k + (one || w->narrow ? 1 : 2) * a.stage_bytes;
}

/* Units of so many queries; returns how many there may be: with sequences that begin anywhere a few more than without. */
int64_t cut_units(Job *w, int queries) {
  w->heads = w->group < queries ? w->group : queries;
  w->rows = queries / w->heads;
  w->head_tiles = (w->group + w->heads - 1) / w->heads;
  int64_t blocks = (w->m + w->rows - 1) / w->rows;
  if (w->cells && w->seq) blocks = blocks + w->n_sequences < w->m ? blocks + w->n_sequences : w->m;
  return blocks * w->head_tiles;
}

int64_t wide_of(int64_t f) { return round_up(f, COLUMNS); }

int64_t keys_of(const pe_tensor *k, const pe_tensor *v, const pe_tensor *cells) {
  return cells ? cells->shape[1] : k->shape[1] < v->shape[1] ? k->shape[1] : v->shape[1];
}

/* Queries that see up to so many keys are for attention of floats, those that see more for attention of halves. */
int64_t exact_keys(const pe_tensor *k, const pe_tensor *v, int32_t products) {
  if (k->shape[2] > MOST_HALVES || v->shape[2] > MOST_HALVES) return ANY;
  if (products == PE_ATTENTION_PRODUCTS_INT8) return 0;
  if (k->dtype == PE_F32 || v->dtype == PE_F32) return ANY;
  const char *own = getenv("PYENGINE_CUDA_EXACT_KEYS");
  return own ? atoll(own) : (int64_t)EXACT_KEYS;
}

/* Of a query that sees up to n keys; anywhere: they begin in the middle of a chunk, perhaps. */
int64_t chunks_of(int64_t n, bool anywhere, bool floats) {
  const int64_t chunk = floats ? FLOAT_CHUNK_KEYS : CHUNK_KEYS;
  return anywhere ? n / chunk + 2 : (n + chunk - 1) / chunk;
}
int64_t split_bytes(int64_t m, int64_t h, int64_t f, int64_t chunks) { return m * h * chunks * (wide_of(f) + 3) * 4; }

bool multiple_of_16(const pe_tensor *t) {
  return (((uintptr_t)t->data | (uintptr_t)t->stride[0] | (uintptr_t)t->stride[1]) & 15) == 0;
}

/* wide: whether it is float32 that is copied as it is, or 16-bit numbers. */
Form form_of(const pe_tensor *t, bool wide) {
  const pe_format f = cell_format_of(t->dtype);
  if (channel_format(t->dtype) != PE_F32) return CHANNELS;
  if (f.elements > 1) return BLOCKS;
  if (t->stride[2] != f.bytes || t->shape[2] * f.bytes % 16 || !multiple_of_16(t)) return GATHERED;
  return wide == (t->dtype == PE_F32) ? COPIED : GATHERED;
}

struct Node {
  Job w;
  bool floats;
  int shared, multiprocessors;
  int64_t scratch;
};

/* Blocks that share the chunks of a unit: enough to fill the card three times, if scratch holds their partial sums. */
int64_t shares_of(const Node &n, int64_t units) {
  const int64_t wanted = (3 * n.multiprocessors + units * n.w.g - 1) / (units * n.w.g);
  if (split_bytes(n.w.m, n.w.h, n.w.f, n.w.chunks) > n.scratch) return 1;
  return wanted < n.w.chunks ? wanted : n.w.chunks;
}

void merge(const Node &n, cudaStream_t stream) {
  const dim3 grid((unsigned)(n.w.m * n.w.h)), block(n.w.nf * COLUMNS);
  if (n.floats) launch(stream, merge_kernel<true>, grid, block, sizeof(MixingRow), n.w);
  else launch(stream, merge_kernel<false>, grid, block, sizeof(MixingRow), n.w);
}

/* Few queries of each sequence: units share, perhaps, their chunks between blocks. */
void run_few(Node *n, int64_t units, int queries, cudaStream_t stream) {
  const int64_t shares = shares_of(*n, units);
  const dim3 grid((unsigned)units, (unsigned)n->w.g, (unsigned)shares);
  if (shares == 1) n->w.partials = n->w.tops = nullptr;
  if (n->floats) attend_floats(n->w, queries, grid, stream);
  else attend_few(n->w, grid, stream);
  if (shares > 1) merge(*n, stream);
}

pe_status too_large(const Node &n, pe_stream *s) {
  return pe_fail(s, PE_NO_KERNEL, "attention: heads of %d and %d elements need %d bytes of shared memory, this card has %d", n.w.e, n.w.f,
                 n.w.at.bytes, n.shared);
}

/* Rows of a sequence, on average: what decides between the kernels. */
int64_t rows_together(const Job &w) { return w.cells && w.seq ? (w.m + w.n_sequences - 1) / w.n_sequences : w.m; }

pe_status run_floats(Node *n, pe_stream *s) {
  const bool wide = n->w.e > MOST_HALVES || n->w.f > MOST_HALVES;
  int queries = rows_together(n->w) * n->w.group <= 16 ? 8 : wide ? 16 : 32;
  const bool blocks = is_blocky(n->w);
  lay_out_floats(&n->w, queries, false);
  if (n->w.at.bytes > n->shared && blocks) lay_out_floats(&n->w, queries, true);
  if (n->w.at.bytes > n->shared) lay_out_floats(&n->w, queries = 8, false);
  if (n->w.at.bytes > n->shared && blocks) lay_out_floats(&n->w, queries, true);
  const int64_t units = cut_units(&n->w, queries);
  if (n->w.at.bytes > n->shared) return too_large(*n, s);
  run_few(n, units, queries, stream(s));
  return PE_OK;
}

/* Areas of attend_few; more than 2 stages only where three blocks have room beside each other. */
bool lay_out_few(const Node &n, Job *w) {
  int stages = 4;
  for (lay_out(w, FEW_QUERIES, FEW_WARPS, stages); stages > 0 && w->at.bytes > (stages > 2 ? n.shared / 3 : n.shared);)
    lay_out(w, FEW_QUERIES, FEW_WARPS, --stages);
  return w->at.bytes <= n.shared;
}

pe_status run_halves(Node *n, pe_stream *s) {
  Job &w = n->w, alone = n->w;
  alone.partials = alone.tops = nullptr;
  if (!lay_out_few(*n, &alone)) return too_large(*n = Node{alone, false, n->shared, 0, 0}, s);
  int queries = rows_together(w) * w.group > 64 && w.nf <= 4 ? 128 : 64;
  for (; queries >= LEAST_MANY; queries /= 2) {
    lay_out(&w, queries, queries / 16, queries > 64 ? 2 : 1);
    if (w.at.bytes <= n->shared) break;
  }
  int64_t units = cut_units(&w, queries >= LEAST_MANY ? queries : LEAST_MANY);
  const bool fills = 2 * units * w.g >= n->multiprocessors || split_bytes(w.m, w.h, w.f, w.chunks) > n->scratch;
  if (rows_together(w) * w.group > 2 * FEW_QUERIES && fills && queries >= LEAST_MANY) {
    lay_out(&w, queries, queries / 16, 2);
    if (w.at.bytes > n->shared) lay_out(&w, queries, queries / 16, 1);
    w.partials = w.tops = nullptr;
    attend_many(w, queries, dim3((unsigned)units, (unsigned)w.g), stream(s));
    repair(alone, stream(s));
    return PE_OK;
  }
  units = cut_units(&w, rows_together(w) == 1 ? (w.group < FEW_QUERIES ? w.group : FEW_QUERIES) : FEW_QUERIES);
  lay_out_few(*n, &w);
  run_few(n, units, FEW_QUERIES, stream(s));
  if (w.rows > 1) repair(alone, stream(s));
  return PE_OK;
}

pe_status check(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *cells, const pe_tensor *seq,
                const pe_tensor *sinks, const pe_tensor *bias, const pe_attention_params *p, pe_stream *s) {
  const int64_t h = q->shape[1], g = k->shape[0];
  if (g == 0 || h % g) return pe_fail(s, PE_BAD_SHAPE, "attention: %lld heads share %lld", (long long)h, (long long)g);
  pe_status bad = check_keys("attention", "k", k, false, s);
  if (!bad) bad = check_cells("attention", "v", v, false, s);
  if (bad) return bad;
  if (p->products == PE_ATTENTION_PRODUCTS_INT8 &&
      (cells || seq || sinks || bias || p->softcap != 0.0f || cell_format_of(k->dtype).elements != 1 || cell_format_of(v->dtype).elements != 1))
    return pe_fail(s, PE_NO_KERNEL, "attention: products of int8 take neither cells nor blocks nor sinks nor a bias nor a soft cap");
  if (v->shape[2] > MOST_COLUMNS)
    return pe_fail(s, PE_NO_KERNEL, "attention: values of %lld elements, at most %d are possible", (long long)v->shape[2], MOST_COLUMNS);
  return PE_OK;
}

void set_chunks(Job *w, int64_t chunks) {
  w->chunks = (int32_t)chunks;
  w->tops = w->partials + (int64_t)w->m * w->h * chunks * wide_of(w->f);
  w->mosts = w->tops + 2 * (int64_t)w->m * w->h * chunks;
}

template <class T> T *data_of(const pe_tensor *t) { return t ? static_cast<T *>(t->data) : nullptr; }

} // namespace

/* Partial sums: for SPLIT_ROWS rows in any case, for more as far as SPLIT_BYTES hold them. */
PE_SCRATCH(cuda, attention)(const pe_args *a, const void *params, int32_t n_threads) {
  (void)n_threads;
  const pe_tensor *q = pe_arg(a, 0), *k = pe_arg(a, 1), *v = pe_arg(a, 2);
  const int64_t n = keys_of(k, v, pe_arg(a, 5)), exact = exact_keys(k, v, static_cast<const pe_attention_params *>(params)->products);
  const int64_t few = exact > 0 ? chunks_of(exact < n ? exact : n, pe_arg(a, 5) || exact < n, true) : 0;
  const int64_t all = n > exact ? chunks_of(n, pe_arg(a, 5), false) : 0;
  const int64_t one = split_bytes(1, q->shape[1], v->shape[2], few > all ? few : all);
  int64_t rows = one ? SPLIT_BYTES / one : 0;
  if (rows < SPLIT_ROWS) rows = SPLIT_ROWS;
  return one * (rows < q->shape[0] ? rows : q->shape[0]);
}

PE_KERNEL(cuda, attention)(const pe_tensor *q, const pe_tensor *k, const pe_tensor *v, const pe_tensor *lo, const pe_tensor *hi,
                           const pe_tensor *cells, const pe_tensor *seq, const pe_tensor *sinks, const pe_tensor *bias,
                           const pe_tensor *numbers, const pe_tensor *out, const pe_tensor *stats, const pe_attention_params *p,
                           pe_stream *s) {
  Node n = {};
  Job &w = n.w;
  if (q->shape[0] == 0 || q->shape[1] == 0 || v->shape[2] == 0) return PE_OK;
  const pe_status bad = check(q, k, v, cells, seq, sinks, bias, p, s);
  if (bad) return bad;
  w.q = data_of<char>(q), w.q_row = q->stride[0], w.q_head = q->stride[1], w.q_element = q->stride[2];
  w.k = cache_of(k), w.v = cache_of(v);
  w.lo = data_of<int32_t>(lo), w.hi = data_of<int32_t>(hi), w.seq = data_of<int32_t>(seq), w.cells = data_of<int32_t>(cells);
  if (cells) w.cells_stride = cells->stride[0], w.l = (int32_t)cells->shape[1], w.n_sequences = (int32_t)cells->shape[0];
  w.n_cells = k->shape[1] < v->shape[1] ? k->shape[1] : v->shape[1];
  w.bias = data_of<float>(bias), w.numbers = data_of<int32_t>(numbers), w.reach = bias ? (int32_t)(bias->shape[1] / 2) : 0;
  w.sinks = data_of<float>(sinks), w.out = data_of<float>(out), w.stats = data_of<float>(stats), w.fault = fault(s), w.scale = p->scale, w.softcap = p->softcap;
  w.m = (int32_t)q->shape[0], w.h = (int32_t)q->shape[1], w.g = (int32_t)k->shape[0], w.group = w.h / w.g;
  w.e = (int32_t)q->shape[2], w.f = (int32_t)v->shape[2];
  w.ne = (w.e + COLUMNS - 1) / COLUMNS, w.nf = (w.f + COLUMNS - 1) / COLUMNS;
  w.partials = reinterpret_cast<float *>(s->scratch);
  n.shared = shared_limit(queue(s).capability), n.multiprocessors = queue(s).multiprocessors, n.scratch = s->scratch_bytes;
  const int64_t keys = keys_of(k, v, cells), exact = exact_keys(k, v, p->products);
  pe_status done = PE_OK;
  if (exact > 0) {
    Node floats = n;
    floats.floats = true;
    floats.w.least = 0, floats.w.most = exact;
    const bool blocks = is_blocky(w);
    floats.w.narrow = form_of(k, false) == COPIED && form_of(v, false) == COPIED;
    floats.w.k_form = form_of(k, !blocks && !floats.w.narrow), floats.w.v_form = form_of(v, !blocks && !floats.w.narrow);
    set_chunks(&floats.w, chunks_of(exact < keys ? exact : keys, cells || exact < keys, true));
    done = run_floats(&floats, s);
  }
  if (done != PE_OK || keys <= exact) return done;
  w.least = exact + 1, w.most = ANY;
  w.fine = p->products != PE_ATTENTION_PRODUCTS_INT8;
  w.k_form = form_of(k, false), w.v_form = form_of(v, false);
  set_chunks(&w, chunks_of(keys, cells, false));
  return run_halves(&n, s);
}

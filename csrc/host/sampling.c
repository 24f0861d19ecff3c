/* sampling.c: the sampler of sampling.h. One row, one thread, no allocation.
 *
 * A vocabulary of 262,144 is read once or twice as a whole, in loops that the compiler turns into vectors, and never
 * sorted: the maximum of each 64 logits (4,096 of them) is sorted, and as the k-th largest maximum cannot exceed the
 * k-th largest logit, only logits above it, hardly more than k, are gathered and sorted. Without top_k the same is
 * done for a guess of k that grows until top_p and min_p end inside.
 *
 * Sums that decide are written with 16 explicit lanes or in double, in an order that no compiler may change. Compile
 * with -ffp-contract=off and without -ffast-math.
 */
#include "sampling.h"

#include "../weight.h"
#include "numbers.h"

#include <float.h>
#include <math.h>
#include <string.h>

_Static_assert(FLT_EVAL_METHOD == 0, "float arithmetic must be rounded to float");

/* The two passes over the vocabulary, compiled also for wider vectors where the loader can choose, which it does before a sanitizer
 * has begun: the same bits. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
  !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

enum { LANES = PE_WEIGHT_LANES, BLOCK = 64, CHUNK = PE_WEIGHT_CHUNK, FIRST_GUESS = 256, GROWTH = 8 };
enum { ZIPF = 100 };   /* logits that mirostat 1 fits Zipf's law to, as the paper does */

typedef struct { uint32_t key; int32_t id; } entry;   /* sorted by ascending key */

typedef struct {
  float *logits;       /* [n] after mask, bias and penalties */
  float *maxima;       /* [n_blocks] of each BLOCK logits */
  double *chunks;      /* [n_chunks] sums of each CHUNK weights */
  entry *blocks;       /* [n_blocks] maxima in descending order */
  entry *kept;         /* [n] candidates in descending order of logits */
  entry *scores;       /* [n] */
  entry *spare;        /* [n] */
  float *weights;      /* [n] of candidates */
} workspace;

/* Lay the workspace out from `base`, each part at a multiple of 64 bytes; returns the bytes it takes. */
static int64_t lay_out(workspace *w, char *base, int64_t n) {
  int64_t n_blocks = (n + BLOCK - 1) / BLOCK, n_chunks = (n + CHUNK - 1) / CHUNK, at = 0;
#define PART(name, count) \
  w->name = (void *)(base + at); \
  at += ((count) * (int64_t)sizeof *w->name + 63) / 64 * 64
  PART(logits, n);
  PART(maxima, n_blocks);
  PART(chunks, n_chunks);
  PART(blocks, n_blocks);
  PART(kept, n);
  PART(scores, n);
  PART(spare, n);
  PART(weights, n);
#undef PART
  return at;
}

int64_t pe_sample_scratch(int32_t n_vocab) {
  char nothing;
  workspace w;
  return n_vocab < 1 ? 0 : lay_out(&w, &nothing, n_vocab);
}

/* ---- numbers --------------------------------------------------------------------------------------------------- */

static uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

double pe_random_unit(uint64_t seed, uint64_t step) {
  uint64_t bits = mix64(mix64(seed) + (step + 1) * 0x9e3779b97f4a7c15u);
  return (double)(bits >> 11) * 0x1p-53;
}

static float weight_of(float x, float max, float temperature) { return pe_weight_exp(pe_weight_clamp((x - max) / temperature)); }

/* weights[i] = weight_of(x[i]), the same bits. Two loops: gcc makes one into a branch instead of vectors. */
static inline __attribute__((always_inline)) void weigh_all(const float *x, int64_t n, float max, float temperature,
                                                            float *weights) {
  if (temperature == 1) {
    for (int64_t i = 0; i < n; i++) weights[i] = pe_weight_clamp(x[i] - max);
  } else {
    for (int64_t i = 0; i < n; i++) weights[i] = pe_weight_clamp((x[i] - max) / temperature);
  }
  for (int64_t i = 0; i < n; i++) weights[i] = pe_weight_exp(weights[i]);
}

/* A key whose ascending order is the order of floats; -0 and 0 are equal. */
static inline uint32_t ascending(float x) {
  union { float f; uint32_t u; } v = {x + 0.0f};
  return v.u ^ (v.u >> 31 ? 0xffffffffu : 0x80000000u);
}

static inline uint32_t descending(float x) { return ~ascending(x); }

static inline float value_of_descending(uint32_t key) {
  union { uint32_t u; float f; } v = {~key};
  v.u ^= v.u >> 31 ? 0x80000000u : 0xffffffffu;
  return v.f;
}

/* Stable radix sort, four passes of a byte each. */
static void sort(entry *a, entry *spare, int64_t n) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t start[256] = {0}, at = 0;
    for (int64_t i = 0; i < n; i++) start[a[i].key >> shift & 255u]++;
    for (int d = 0; d < 256; d++) {
      int64_t count = start[d];
      start[d] = at;
      at += count;
    }
    for (int64_t i = 0; i < n; i++) spare[start[a[i].key >> shift & 255u]++] = a[i];
    entry *swap = a;
    a = spare;
    spare = swap;
  }
}

/* ---- passes over the vocabulary -------------------------------------------------------------------------------- */

/* Maximum of every block and of all. *bad: the first NaN or +inf, else -1. */
WIDE static float scan(const float *x, int64_t n, float *maxima, int64_t *bad) {
  float all = -INFINITY;
  *bad = -1;
  for (int64_t b = 0; b * BLOCK < n; b++) {
    const float *p = x + b * BLOCK;
    float m[LANES], block = -INFINITY;
    int32_t ok = 1;
    for (int l = 0; l < LANES; l++) m[l] = -INFINITY;
    if (n - b * BLOCK >= BLOCK) {
      int32_t good[LANES];
      for (int l = 0; l < LANES; l++) good[l] = 1;
      for (int i = 0; i < BLOCK; i += LANES) {
        for (int l = 0; l < LANES; l++) {
          m[l] = p[i + l] > m[l] ? p[i + l] : m[l];
          good[l] &= p[i + l] < INFINITY;
        }
      }
      for (int l = 0; l < LANES; l++) ok &= good[l];
    } else {
      for (int64_t i = 0; i < n - b * BLOCK; i++) {
        m[0] = p[i] > m[0] ? p[i] : m[0];
        ok &= p[i] < INFINITY;
      }
    }
    for (int l = 0; l < LANES; l++) block = m[l] > block ? m[l] : block;
    maxima[b] = block;
    all = block > all ? block : all;
    if (!ok) {
      int64_t i = b * BLOCK;
      while (x[i] < INFINITY) i++;
      *bad = i;
      return all;
    }
  }
  return all;
}

static double sum_of_lanes(const float *lanes) {
  double sum = 0;
  for (int l = 0; l < LANES; l++) sum += lanes[l];
  return sum;
}

/* The sum of all weights; chunks[c] is that of chunk c. */
WIDE static double sum_weights(const float *x, int64_t n, float max, float temperature, double *chunks) {
  double total = 0;
  for (int64_t c = 0; c * CHUNK < n; c++) {
    int64_t count = n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK;
    float weights[CHUNK], lanes[LANES] = {0};
    weigh_all(x + c * CHUNK, count, max, temperature, weights);
    for (int64_t i = count; i % LANES; i++) weights[i] = 0;
    for (int64_t i = 0; i < count; i += LANES) {
      for (int l = 0; l < LANES; l++) lanes[l] += weights[i + l];
    }
    total += chunks[c] = sum_of_lanes(lanes);
  }
  return total;
}

/* The sum of weights times their distance from the largest logit, at temperature 1; *count: logits above -inf. */
WIDE static double sum_distances(const float *x, int64_t n, float max, int64_t *count) {
  double total = 0;
  *count = 0;
  for (int64_t c = 0; c * CHUNK < n; c++) {
    int64_t m = n - c * CHUNK < CHUNK ? n - c * CHUNK : CHUNK;
    float weights[CHUNK], lanes[LANES] = {0};
    const float *p = x + c * CHUNK;
    weigh_all(p, m, max, 1, weights);
    for (int64_t i = 0; i < m; i++) weights[i] *= pe_weight_clamp(p[i] - max);
    for (int64_t i = m; i % LANES; i++) weights[i] = 0;
    for (int64_t i = 0; i < m; i += LANES) {
      for (int l = 0; l < LANES; l++) lanes[l] += weights[i + l];
    }
    for (int64_t i = 0; i < m; i++) *count += p[i] >= -FLT_MAX;
    total += sum_of_lanes(lanes);
  }
  return total;
}

/* The least logit that is within `sigmas` standard deviations of the largest. */
WIDE static float sigma_threshold(const float *x, int64_t n, float max, float sigmas) {
  double sums[LANES] = {0}, squares[LANES] = {0}, sum = 0, square = 0;
  int64_t counts[LANES] = {0}, count = 0, whole = n - n % LANES;
  for (int64_t i = 0; i < n; i += LANES) {
    float row[LANES];
    for (int l = 0; l < LANES; l++) row[l] = i < whole || l < n - i ? x[i + l] : -INFINITY;
    for (int l = 0; l < LANES; l++) {
      double d = row[l] >= -FLT_MAX ? (double)row[l] - max : 0;
      sums[l] += d;
      squares[l] += d * d;
      counts[l] += row[l] >= -FLT_MAX;
    }
  }
  for (int l = 0; l < LANES; l++) sum += sums[l], square += squares[l], count += counts[l];
  double variance = (square - sum * sum / (double)count) / (double)count;
  return pe_float_above(max - sigmas * sqrt(variance > 0 ? variance : 0));
}

static int64_t first_of(const float *x, const float *maxima, float value) {
  int64_t b = 0;
  while (maxima[b] != value) b++;
  int64_t i = b * BLOCK;
  while (x[i] != value) i++;
  return i;
}

/* Candidates in descending order: of the logits that are not below `least`, at least the k largest (all that exceed -inf, if there are
 * fewer); more than k only by what the threshold lets in. w->blocks must be sorted. */
static int64_t gather(workspace *w, const float *x, int64_t n, int64_t k, float least) {
  int64_t n_blocks = (n + BLOCK - 1) / BLOCK, count = 0;
  float threshold = k <= n_blocks ? value_of_descending(w->blocks[k - 1].key) : -FLT_MAX;
  if (!(threshold > least)) threshold = least;
  for (int64_t b = 0; b < n_blocks; b++) {
    if (!(w->maxima[b] >= threshold)) continue;
    int64_t end = n - b * BLOCK < BLOCK ? n : (b + 1) * BLOCK;
    for (int64_t i = b * BLOCK; i < end; i++) {
      if (x[i] >= threshold) w->kept[count++] = (entry){descending(x[i]), (int32_t)i};
    }
  }
  sort(w->kept, w->spare, count);
  return count;
}

static void sort_blocks(workspace *w, int64_t n) {
  int64_t n_blocks = (n + BLOCK - 1) / BLOCK;
  for (int64_t b = 0; b < n_blocks; b++) w->blocks[b] = (entry){descending(w->maxima[b]), (int32_t)b};
  sort(w->blocks, w->spare, n_blocks);
}

/* ---- steps on sorted candidates -------------------------------------------------------------------------------- */

/* Weights relative to the first candidate, which is the largest; returns their sum. */
static double weigh(workspace *w, const float *x, int64_t count, float temperature) {
  float max = x[w->kept[0].id];
  double sum = 0;
  for (int64_t i = 0; i < count; i++) w->weights[i] = weight_of(x[w->kept[i].id], max, temperature);
  for (int64_t i = 0; i < count; i++) sum += w->weights[i];
  return sum;
}

/* -log p - H = (log Z - x) - (log Z - mean x) = mean x - x. Keeps the order of what it keeps. */
static int64_t keep_typical(workspace *w, const float *x, int64_t count, float typical_p) {
  double sum = weigh(w, x, count, 1.0f), mean = 0, reached = 0;
  float max = x[w->kept[0].id];
  for (int64_t i = 0; i < count; i++) mean += w->weights[i] * ((double)x[w->kept[i].id] - max);
  mean /= sum;
  for (int64_t i = 0; i < count; i++) {
    double distance = mean - ((double)x[w->kept[i].id] - max);
    w->scores[i] = (entry){ascending((float)(distance < 0 ? -distance : distance)), (int32_t)i};
    w->kept[i].key = 0;
  }
  sort(w->scores, w->spare, count);
  for (int64_t i = 0; i < count && reached <= typical_p * sum; i++) {
    w->kept[w->scores[i].id].key = 1;
    reached += w->weights[w->scores[i].id];
  }
  int64_t left = 0;
  for (int64_t i = 0; i < count; i++) {
    if (w->kept[i].key) w->kept[left++] = w->kept[i];
  }
  return left;
}

/* How many of the first candidates top_p and then min_p keep; w->weights are set, `sum` is that of the whole
 * distribution. */
static int64_t keep_top(const workspace *w, int64_t count, double sum, const pe_sampler_params *p) {
  if (p->top_p < 1) {
    double reached = 0;
    int64_t i = 0;
    do reached += w->weights[i++];
    while (i < count && reached < p->top_p * sum);
    count = i;
  }
  if (p->min_p > 0) {
    int64_t i = 1;
    while (i < count && w->weights[i] >= p->min_p * w->weights[0]) i++;
    count = i;
  }
  return count;
}

/* All steps up to min_p, given the sum of all weights; returns how many candidates are left in w->kept. */
static int64_t truncate_all(workspace *w, const float *x, int64_t n, float max, double sum, const pe_sampler_params *p) {
  int typical = p->typical_p < 1, limited = p->top_k > 0 && p->top_k < n, sigma = p->top_n_sigma > 0;
  sort_blocks(w, n);
  if (limited || typical || sigma) {
    int64_t count = gather(w, x, n, limited ? p->top_k : n, sigma ? sigma_threshold(x, n, max, p->top_n_sigma) : -FLT_MAX);
    if (limited && count > p->top_k) count = p->top_k;
    if (typical) count = keep_typical(w, x, count, p->typical_p);
    return keep_top(w, count, weigh(w, x, count, 1.0f), p);
  }
  for (int64_t k = FIRST_GUESS;; k *= GROWTH) {
    int64_t count = gather(w, x, n, k < n ? k : n, -FLT_MAX);
    weigh(w, x, count, 1.0f);
    int64_t left = keep_top(w, count, sum, p);
    if (left < count || k >= n) return left;
  }
}

static int64_t draw_kept(workspace *w, const float *x, int64_t count, float temperature, double unit) {
  double target = unit * weigh(w, x, count, temperature), reached = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; i++) {
    reached += w->weights[i];
    if (reached > target) return w->kept[i].id;
    if (w->weights[i] > 0) last = i;
  }
  return w->kept[last].id;
}

static int excludes(const pe_sampler_params *p, uint64_t seed, uint64_t step) {
  return p->xtc_probability > 0 && pe_random_unit(~seed, step) < p->xtc_probability;
}

/* How many of the first candidates xtc leaves out; w->weights are set, `sum` is that of all. */
static int64_t n_excluded(const workspace *w, int64_t count, double sum, const pe_sampler_params *p) {
  int64_t n = 0;
  while (n < count && w->weights[n] >= p->xtc_threshold * sum) n++;
  return n > 1 ? n - 1 : 0;
}

/* The temperature for `count` tokens of which weights and weighted distances from the largest have these sums. */
static float dynamic_temperature(double sum, double distances, int64_t count, const pe_sampler_params *p) {
  double low = (double)p->temperature - p->dynatemp_range, high = (double)p->temperature + p->dynatemp_range;
  double part = count > 1 ? (pe_ln(sum) - distances / sum) / pe_ln((double)count) : 1;
  low = low > 0 ? low : 0;
  if (part < DBL_MIN) part = DBL_MIN;
  part = p->dynatemp_exponent == 1 ? part : pe_power_of_e(p->dynatemp_exponent * pe_ln(part));
  double t = low + (high - low) * (part < 1 ? part : 1);
  return t < FLT_MAX ? (float)t : FLT_MAX;
}

/* The steps behind the truncation, and the draw; *count becomes what it was drawn from. */
static int64_t draw_left(workspace *w, const float *x, int64_t *count, const pe_sampler_params *p, uint64_t seed, uint64_t step) {
  float temperature = p->temperature;
  if (excludes(p, seed, step)) {
    int64_t n = n_excluded(w, *count, weigh(w, x, *count, 1.0f), p);
    w->kept += n;
    *count -= n;
  }
  if (p->dynatemp_range > 0) {
    double sum = weigh(w, x, *count, 1.0f), distances = 0, max = x[w->kept[0].id];
    for (int64_t i = 0; i < *count; i++) distances += w->weights[i] * (x[w->kept[i].id] - max);
    temperature = dynamic_temperature(sum, distances, *count, p);
    if (temperature == 0) return w->kept[0].id;
  }
  return draw_kept(w, x, *count, temperature, pe_random_unit(seed, step));
}

/* Draw from the whole vocabulary, given the sum of all weights and of each chunk: find the chunk, then the token. */
static int64_t draw_all(const workspace *w, const float *x, int64_t n, float max, float temperature, double sum,
                        double unit) {
  double target = unit * sum, reached = 0;
  int64_t chunk = 0, last = 0;
  for (int64_t c = 0; c * CHUNK < n; c++) {
    if (!(w->chunks[c] > 0)) continue;
    chunk = c;
    if (reached + w->chunks[c] > target) break;
    reached += w->chunks[c];
  }
  for (int64_t i = chunk * CHUNK; i < n && i < (chunk + 1) * CHUNK; i++) {
    float weight = weight_of(x[i], max, temperature);
    reached += weight;
    if (weight > 0) last = i;
    if (reached > target) break;
  }
  return last;
}

/* The same for a distribution of which nothing is truncated. */
static int64_t draw_untruncated(workspace *w, const float *x, int64_t n, float max, const pe_sampler_params *p, const pe_sampler_input *in,
                                int64_t *n_kept) {
  float temperature = p->temperature;
  *n_kept = n;
  if (excludes(p, in->seed, in->step)) {
    int64_t most = p->xtc_threshold * (float)n > 1 ? (int64_t)(1 / p->xtc_threshold) + 2 : n;   /* no more are so probable */
    double sum = sum_weights(x, n, max, 1, w->chunks);
    sort_blocks(w, n);
    int64_t count = gather(w, x, n, most < n ? most : n, -FLT_MAX);
    weigh(w, x, count, 1.0f);
    int64_t out = n_excluded(w, count, sum, p);
    if (out && x != w->logits) x = memcpy(w->logits, x, sizeof *x * (size_t)n);
    for (int64_t i = 0; i < out; i++) w->logits[w->kept[i].id] = -INFINITY;
    if (out) max = x[w->kept[out].id];
    *n_kept -= out;
  }
  if (p->dynatemp_range > 0) {
    int64_t count;
    double distances = sum_distances(x, n, max, &count);
    temperature = dynamic_temperature(sum_weights(x, n, max, 1, w->chunks), distances, count, p);
    for (int64_t i = 0; temperature == 0 && i < n; i++) {
      if (x[i] == max) return i;
    }
  }
  double sum = sum_weights(x, n, max, temperature, w->chunks);
  return draw_all(w, x, n, max, temperature, sum, pe_random_unit(in->seed, in->step));
}

/* How many tokens are expected to have a surprise of at most mu, if the count largest logits follow Zipf's law: the paper's
 * equations 1 and 2, and its authors' rounding. */
static int64_t zipf_count(const workspace *w, const float *x, int64_t count, int64_t n, double mu, float temperature) {
  double products = 0, squares = 0;
  for (int64_t i = 0; i + 1 < count; i++) {
    double t = pe_ln((double)(i + 2) / (double)(i + 1)), b = ((double)x[w->kept[i].id] - x[w->kept[i + 1].id]) / temperature;
    products += t * b;
    squares += t * t;
  }
  double s = squares > 0 ? products / squares : 0, epsilon = s - 1;
  double tail = 1 - pe_power_of_e(-epsilon * pe_ln((double)n)), part = epsilon * epsilon > 1e-18 ? epsilon / tail : 1 / pe_ln((double)n);
  if (n < 2) return 1;
  double exponent = (pe_ln(part) + mu * PE_LN2) / (s > 1e-9 ? s : 1e-9), k = pe_power_of_e(exponent < 40 ? exponent : 40) + 0.5;
  return k < (double)n ? (int64_t)k + 1 : n;
}

/* Draw by mirostat, and give mu of the next draw. */
static int64_t draw_mirostat(workspace *w, const float *x, int64_t n, float max, const pe_sampler_params *p, const pe_sampler_input *in,
                             int64_t *n_kept, double *mu) {
  double log_sum = pe_ln(sum_weights(x, n, max, p->temperature, w->chunks));
  sort_blocks(w, n);
  int64_t count;
  if (p->mirostat == 1) {
    count = gather(w, x, n, ZIPF < n ? ZIPF : n, -FLT_MAX);
    int64_t k = zipf_count(w, x, count < ZIPF ? count : ZIPF, n, in->mu, p->temperature);
    count = gather(w, x, n, k, -FLT_MAX);
    count = count < k ? count : k;
  } else {
    count = gather(w, x, n, n, pe_float_above(max + p->temperature * (log_sum - in->mu * PE_LN2)));
    if (count == 0) gather(w, x, n, 1, max), count = 1;
  }
  int64_t token = draw_kept(w, x, count, p->temperature, pe_random_unit(in->seed, in->step));
  *n_kept = count;
  *mu = in->mu - p->mirostat_eta * ((log_sum - ((double)x[token] - max) / p->temperature) / PE_LN2 - p->mirostat_tau);
  return token;
}

void pe_repeats(const int32_t *tokens, int32_t n, int32_t *runs) {
  if (n < 1) return;
  const int32_t *last = tokens + (n - 1);
  int32_t *run = runs + (n - 1), from = 0, to = 0;   /* the run at `from` before the end is the one that reaches furthest, to `to` */
  run[0] = 0;
  for (int32_t k = 1; k < n; k++) {
    int32_t m = 0;
    if (k < to) m = run[from - k] < to - k ? run[from - k] : to - k;
    while (k + m < n && last[-m] == last[-k - m]) m++;
    if (k + m > to) from = k, to = k + m;
    run[-k] = m;
  }
}

/* ---- the call -------------------------------------------------------------------------------------------------- */

static pe_status fault(pe_sampled *out, int32_t fault, int64_t token) {
  *out = (pe_sampled){.token = (int32_t)token, .logprob = 0, .n_kept = 0, .fault = fault};
  return PE_BAD_VALUE;
}

/* Negated comparisons refuse NaN too. */
static int params_are_good(const pe_sampler_params *p) {
  return p->temperature >= 0 && p->temperature <= FLT_MAX && p->top_p >= 0 && p->min_p <= 1 && p->typical_p >= 0 &&
         p->repeat_penalty > 0 && p->repeat_penalty <= FLT_MAX && fabsf(p->presence_penalty) <= FLT_MAX &&
         fabsf(p->frequency_penalty) <= FLT_MAX && p->top_n_sigma <= FLT_MAX && p->xtc_probability >= 0 && p->xtc_probability <= 1 &&
         p->xtc_threshold >= 0 && p->xtc_threshold <= 1 && p->dynatemp_range >= 0 && p->dynatemp_range <= FLT_MAX &&
         p->dynatemp_exponent >= 0 && p->dynatemp_exponent <= FLT_MAX && p->mirostat >= 0 && p->mirostat <= 2 && p->mirostat_tau >= 0 &&
         p->mirostat_tau <= FLT_MAX && p->mirostat_eta >= 0 && p->mirostat_eta <= FLT_MAX;
}

/* Bias, mask, penalties and dry into w->logits. Returns 0 and sets *bad if a token is not in the vocabulary. */
static int change_logits(workspace *w, const pe_sampler_params *p, const pe_sampler_input *in, int64_t *bad) {
  float *x = w->logits;
  int32_t n = in->n_vocab;
  memcpy(x, in->logits, sizeof *x * (size_t)n);
  for (int32_t i = 0; i < in->n_bias; i++) {
    int32_t t = in->bias[i].token;
    if (t < 0 || t >= n) return *bad = t, 0;
    x[t] += in->bias[i].value;
  }
  for (int32_t i = 0; i < in->n_recent; i++) {
    int32_t t = in->recent[i].token;
    if (t < 0 || t >= n) return *bad = t, 0;
    x[t] = x[t] > 0 ? x[t] / p->repeat_penalty : x[t] * p->repeat_penalty;
    x[t] -= (float)in->recent[i].count * p->frequency_penalty + p->presence_penalty;
  }
  for (int32_t i = 0; i < in->n_less; i++) {
    int32_t t = in->less[i].token;
    if (t < 0 || t >= n) return *bad = t, 0;
    x[t] -= in->less[i].value;
  }
  for (int64_t t = 0; in->allowed && t < n; t += 32) {
    uint32_t word = in->allowed[t / 32];
    for (int64_t i = t; word != 0xffffffffu && i < n && i < t + 32; i++) {
      if (!(word >> (i - t) & 1u)) x[i] = -INFINITY;
    }
  }
  return 1;
}

pe_status pe_sample(const pe_sampler_params *p, const pe_sampler_input *in, void *scratch, pe_sampled *out,
                    pe_token_value *top, int32_t n_top) {
  const float *x = in->logits;
  int64_t n = in->n_vocab, bad;
  if (n < 1 || n_top < 0 || n_top > n) return PE_BAD_SHAPE;
  if (!params_are_good(p)) return fault(out, PE_FAULT_PARAMS, -1);
  workspace w;
  lay_out(&w, scratch, n);

  float given_max = scan(x, n, w.maxima, &bad), max = given_max;
  if (bad >= 0) return fault(out, PE_FAULT_LOGIT, bad);
  if (given_max == -INFINITY) return fault(out, PE_FAULT_EMPTY, -1);
  double sum = sum_weights(x, n, given_max, 1.0f, w.chunks), log_sum = log(sum);
  if (n_top) {
    sort_blocks(&w, n);
    int64_t count = gather(&w, x, n, n_top, -FLT_MAX);
    for (int64_t i = 0; i < n_top; i++) {
      int32_t id = i < count ? w.kept[i].id : -1;
      top[i] = (pe_token_value){id, id < 0 ? -INFINITY : (float)((double)x[id] - given_max - log_sum)};
    }
  }

  int penalties = in->n_recent && (p->repeat_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0);
  int changed = penalties || in->n_bias || in->allowed || in->n_less;
  if (changed) {
    if (!change_logits(&w, p, in, &bad)) return fault(out, PE_FAULT_TOKEN, bad);
    x = w.logits;
    max = scan(x, n, w.maxima, &bad);
    if (bad >= 0) return fault(out, PE_FAULT_LOGIT, bad);
    if (max == -INFINITY) return fault(out, PE_FAULT_EMPTY, -1);
  }

  int limited = p->top_k > 0 && p->top_k < n;
  int truncates = limited || p->typical_p < 1 || p->top_p < 1 || p->min_p > 0 || p->top_n_sigma > 0;
  int64_t token, n_kept = 1;
  double mu = in->mu;
  if (p->temperature == 0) {
    token = first_of(x, w.maxima, max);
  } else if (p->mirostat) {
    token = draw_mirostat(&w, x, n, max, p, in, &n_kept, &mu);
  } else if (!truncates && (p->xtc_probability > 0 || p->dynatemp_range > 0)) {
    token = draw_untruncated(&w, x, n, max, p, in, &n_kept);
  } else {
    float temperature = truncates ? 1 : p->temperature;   /* of the sum over the whole vocabulary, if one is needed */
    int needed = !truncates || (p->top_p < 1 && !limited);
    if (needed && (changed || temperature != 1)) sum = sum_weights(x, n, max, temperature, w.chunks);
    n_kept = truncates ? truncate_all(&w, x, n, max, sum, p) : n;
    token = truncates ? draw_left(&w, x, &n_kept, p, in->seed, in->step)
                      : draw_all(&w, x, n, max, temperature, sum, pe_random_unit(in->seed, in->step));
  }
  *out = (pe_sampled){.token = (int32_t)token, .logprob = (float)((double)in->logits[token] - given_max - log_sum),
                      .n_kept = (int32_t)n_kept, .fault = PE_FAULT_NONE, .mu = mu};
  return PE_OK;
}

/* ---- from the largest logits alone --------------------------------------------------------------------------------- */

/* Candidates are numbers of the largest here, x their logits; all: there are no others. Returns how many are left up to min_p, 0 where the
 * others could matter. */
static int64_t truncate_few(workspace *w, const float *x, int64_t count, int all, double sum, int64_t n, const pe_sampler_params *p) {
  int typical = p->typical_p < 1, limited = p->top_k > 0 && p->top_k < n;
  if (limited || typical) {
    if (!all && (!limited || p->top_k > count)) return 0;
    if (limited && count > p->top_k) count = p->top_k;
    if (typical) count = keep_typical(w, x, count, p->typical_p);
    return keep_top(w, count, weigh(w, x, count, 1.0f), p);
  }
  if (p->top_p >= 1 && !(p->min_p > 0)) return 0;
  weigh(w, x, count, 1.0f);
  int64_t left = keep_top(w, count, sum, p);
  return left < count || all ? left : 0;
}

pe_status pe_sample_few(const pe_sampler_params *p, const pe_sampler_few *in, void *scratch, pe_sampled *out, pe_token_value *top,
                        int32_t n_top) {
  const float *x = in->logits;
  if (in->k < 1 || in->k > in->n_vocab || n_top < 0 || n_top > in->k) return PE_BAD_SHAPE;
  if (!params_are_good(p)) return fault(out, PE_FAULT_PARAMS, -1);
  if (!(x[0] < INFINITY)) return fault(out, PE_FAULT_LOGIT, in->tokens[0]);
  if (x[0] == -INFINITY) return fault(out, PE_FAULT_EMPTY, -1);
  workspace w;
  lay_out(&w, scratch, in->k);
  double sum = 0;
  for (int64_t c = 0; c * CHUNK < in->n_vocab; c++) sum += sum_of_lanes(in->sums + c * LANES);
  double log_sum = log(sum);
  int64_t count = 0, at = 0, n_kept = 1;
  for (; count < in->k && x[count] >= -FLT_MAX; count++) w.kept[count] = (entry){descending(x[count]), (int32_t)count};
  for (int64_t i = 0; i < n_top; i++)
    top[i] = i < count ? (pe_token_value){in->tokens[i], (float)((double)x[i] - x[0] - log_sum)} : (pe_token_value){-1, -INFINITY};
  if (p->temperature != 0) {
    if (p->top_n_sigma > 0 || p->mirostat) return fault(out, PE_FAULT_FEW, -1);
    n_kept = truncate_few(&w, x, count, count < in->k || in->k == in->n_vocab, sum, in->n_vocab, p);
    if (n_kept == 0) return fault(out, PE_FAULT_FEW, -1);
    at = draw_left(&w, x, &n_kept, p, in->seed, in->step);
  }
  *out = (pe_sampled){.token = in->tokens[at], .logprob = (float)((double)x[at] - x[0] - log_sum), .n_kept = (int32_t)n_kept,
                      .fault = PE_FAULT_NONE};
  return PE_OK;
}

/* sampling.h: choose the next token from one row of logits. setup.py reads these declarations for cffi, so they stay plain.
 *
 * The chain, in the order of llama.cpp's default:
 *
 *   logit bias, allowed mask    bias is added; the logit of a token that is not allowed becomes -inf
 *   penalties                   for each recent token: logit > 0 ? logit / repeat : logit * repeat, then
 *                               logit -= count * frequency + presence
 *   top_k                       the k largest logits; <= 0 keeps all
 *   typical_p                   by distance of -log p from the entropy, nearest first, until their sum exceeds it; >= 1
 *                               keeps all (Meister et al. 2022, arXiv:2202.00666)
 *   top_p                       the most probable until their sum reaches it; >= 1 keeps all (Holtzman et al. 2019,
 *                               arXiv:1904.09751)
 *   min_p                       those with p >= min_p * largest p; <= 0 keeps all (Nguyen et al. 2024,
 *                               arXiv:2407.01082)
 *   temperature                 p proportional to exp(logit / temperature)
 *
 * Each step sees the probabilities of what the step before kept, renormalised, without temperature. Every step keeps at
 * least one token. Temperature 0 is greedy: the largest logit after penalties, whatever the steps between say. Of equal
 * logits the lower id comes first, everywhere.
 *
 * What is guaranteed: the token depends on logits, parameters, (seed, step) only. It is computed with IEEE additions,
 * multiplications, divisions and comparisons in one fixed order, without libm, so equal logits, bit for bit, give the
 * equal token on every machine. Logprobs use log() of libm and may differ in the last digit.
 */
#ifndef PE_SAMPLING_H
#define PE_SAMPLING_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pe_token_count { int32_t token, count; } pe_token_count;
typedef struct pe_token_value { int32_t token; float value; } pe_token_value;

typedef struct pe_sampler_params {
  float temperature;
  int32_t top_k;
  float top_p, min_p, typical_p;
  float repeat_penalty, presence_penalty, frequency_penalty;   /* 1, 0 and 0 do nothing */
} pe_sampler_params;

typedef struct pe_sampler_input {
  const float *logits;             /* [n_vocab], only read */
  int32_t n_vocab;
  const pe_token_count *recent;    /* [n_recent], each token once, counts above 0 */
  int32_t n_recent;
  const pe_token_value *bias;      /* [n_bias], added to logits */
  int32_t n_bias;
  const uint32_t *allowed;         /* NULL: all; else bit t % 32 of word t / 32 belongs to token t */
  uint64_t seed, step;             /* the random number of step `step` of the stream `seed` */
} pe_sampler_input;

/* The k largest logits of a row, as the op `top_k` finds them on a device: the largest first, of equals the lower token. */
typedef struct pe_sampler_few {
  const float *logits;             /* [k] */
  const int32_t *tokens;           /* [k] */
  const float *sums;               /* [ceil(n_vocab / 4096)][16] of weights: weight.h */
  int32_t k, n_vocab;
  uint64_t seed, step;
} pe_sampler_few;

enum pe_sample_fault {
  PE_FAULT_NONE = 0,
  PE_FAULT_PARAMS = 1,             /* a parameter is out of its range */
  PE_FAULT_TOKEN = 2,              /* `recent` or `bias` names token `token`, which is not in the vocabulary */
  PE_FAULT_LOGIT = 3,              /* the logit of `token` is NaN or +inf */
  PE_FAULT_EMPTY = 4,              /* no token is left: all logits are -inf or not allowed */
  PE_FAULT_FEW = 5                 /* the largest logits do not decide: the row is needed */
};

typedef struct pe_sampled {
  int32_t token;
  float logprob;                   /* ln of its probability under the logits as given: no bias, no temperature */
  int32_t n_kept;                  /* tokens it was drawn from; 1 when greedy */
  int32_t fault;                   /* enum pe_sample_fault, with PE_BAD_VALUE */
} pe_sampled;

/* Bytes of scratch for a vocabulary; 64-byte aligned memory that keeps nothing between calls. */
PE_API int64_t pe_sample_scratch(int32_t n_vocab);

/* Choose a token. top receives the n_top most probable tokens under the logits as given with their logprobs, best
 * first; fewer if fewer logits exceed -inf, then the rest has token -1. PE_BAD_SHAPE: n_vocab < 1 or n_top outside
 * 0..n_vocab. PE_BAD_VALUE: see out->fault. */
PE_API pe_status pe_sample(const pe_sampler_params *params, const pe_sampler_input *input, void *scratch,
                           pe_sampled *out, pe_token_value *top, int32_t n_top);

/* The same token, logprobs and faults as pe_sample gives for the whole row without bias, penalties and mask; or PE_FAULT_FEW, where they
 * depend on logits that are not here. Greedy and with top_k <= k they never do. n_top is at most k. */
PE_API pe_status pe_sample_few(const pe_sampler_params *params, const pe_sampler_few *few, void *scratch, pe_sampled *out,
                               pe_token_value *top, int32_t n_top);

/* Number `step` of stream `seed`, uniform in [0, 1): SplitMix64 (Steele, Lea and Flood 2014,
 * doi:10.1145/2660193.2660195) started at the mixed seed, upper 53 bits of its output. */
PE_API double pe_random_unit(uint64_t seed, uint64_t step);

#ifdef __cplusplus
}
#endif
#endif

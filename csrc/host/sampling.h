/* sampling.h: choose the next token from one row of logits. setup.py reads these declarations for cffi, so they stay plain.
 *
 * The chain, in the order of llama.cpp's default:
 *
 *   logit bias, allowed mask    bias is added; the logit of a token that is not allowed becomes -inf
 *   penalties                   for each recent token: logit > 0 ? logit / repeat : logit * repeat, then
 *                               logit -= count * frequency + presence
 *   dry                         logit -= what the caller says (text/repetition.py)
 *   top_n_sigma                 logits >= largest - top_n_sigma * standard deviation of all; <= 0 keeps all (Tang et al. 2024,
 *                               arXiv:2411.07641)
 *   top_k                       the k largest logits; <= 0 keeps all
 *   typical_p                   by distance of -log p from the entropy, nearest first, until their sum exceeds it; >= 1
 *                               keeps all (Meister et al. 2022, arXiv:2202.00666)
 *   top_p                       the most probable until their sum reaches it; >= 1 keeps all (Holtzman et al. 2019,
 *                               arXiv:1904.09751)
 *   min_p                       those with p >= min_p * largest p; <= 0 keeps all (Nguyen et al. 2024,
 *                               arXiv:2407.01082)
 *   xtc                         with xtc_probability: of those with p >= xtc_threshold only the least probable stays
 *                               (p-e-w, text-generation-webui pull request 6335)
 *   temperature                 p proportional to exp(logit / temperature); dynatemp_range > 0: the temperature is
 *                               low + (high - low) * (H / ln n)^dynatemp_exponent, H the entropy of the n tokens left, low and
 *                               high temperature -+ dynatemp_range, at least 0 (kalomaze, koboldcpp pull request 600)
 *
 * mirostat 1 or 2 takes the place of all steps behind dry (Basu et al. 2020, arXiv:2007.14966, and the authors' program): the
 * temperature comes first, then tokens are kept up to a surprise of mu, then mu -= eta * (surprise of the drawn - tau).
 * Surprises are -log2 p under the whole distribution. Version 1 keeps the k largest, with k by Zipf's law fitted to the 100
 * largest; version 2 those whose surprise is at most mu.
 *
 * Each step sees the probabilities of what the step before kept, renormalised, without temperature. Every step keeps at
 * least one token. Temperature 0 is greedy: the largest logit after penalties and dry, whatever the steps between say. Of equal
 * logits the lower id comes first, everywhere.
 *
 * What is guaranteed: the token depends on logits, parameters, (seed, step) only. It is computed with IEEE additions,
 * multiplications, divisions, square roots and comparisons in one fixed order, without libm, so equal logits, bit for bit, give the
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
  float top_n_sigma, xtc_probability, xtc_threshold, dynatemp_range, dynatemp_exponent;   /* 0 each: no such step */
  int32_t mirostat;                /* 0, 1 or 2 */
  float mirostat_tau, mirostat_eta;
} pe_sampler_params;

typedef struct pe_sampler_input {
  const float *logits;             /* [n_vocab], only read */
  int32_t n_vocab;
  const pe_token_count *recent;    /* [n_recent], each token once, counts above 0 */
  int32_t n_recent;
  const pe_token_value *bias;      /* [n_bias], added to logits */
  int32_t n_bias;
  const uint32_t *allowed;         /* NULL: all; else bit t % 32 of word t / 32 belongs to token t */
  uint64_t seed, step;             /* the random number of step `step` of the stream `seed`; xtc's is of the stream ~seed */
  const pe_token_value *less;      /* [n_less], subtracted from logits behind the penalties */
  int32_t n_less;
  double mu;                       /* of mirostat: 2 * tau at first, then what the draw before gave */
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
  PE_FAULT_TOKEN = 2,              /* `recent`, `bias` or `less` names `token`, which is not in the vocabulary */
  PE_FAULT_LOGIT = 3,              /* the logit of `token` is NaN or +inf */
  PE_FAULT_EMPTY = 4,              /* no token is left: all logits are -inf or not allowed */
  PE_FAULT_FEW = 5                 /* the largest logits do not decide: the row is needed */
};

typedef struct pe_sampled {
  int32_t token;
  float logprob;                   /* ln of its probability under the logits as given: no bias, no temperature */
  int32_t n_kept;                  /* tokens it was drawn from; 1 when greedy */
  int32_t fault;                   /* enum pe_sample_fault, with PE_BAD_VALUE */
  double mu;                       /* of mirostat, for the next draw */
} pe_sampled;

/* Bytes of scratch for a vocabulary; 64-byte aligned memory that keeps nothing between calls. */
PE_API int64_t pe_sample_scratch(int32_t n_vocab);

/* Choose a token. top receives the n_top most probable tokens under the logits as given with their logprobs, best
 * first; fewer if fewer logits exceed -inf, then the rest has token -1. PE_BAD_SHAPE: n_vocab < 1 or n_top outside
 * 0..n_vocab. PE_BAD_VALUE: see out->fault. */
PE_API pe_status pe_sample(const pe_sampler_params *params, const pe_sampler_input *input, void *scratch,
                           pe_sampled *out, pe_token_value *top, int32_t n_top);

/* The same token, logprobs and faults as pe_sample gives for the whole row without bias, penalties and mask; or PE_FAULT_FEW, where they
 * depend on logits that are not here, as top_n_sigma and mirostat always do. Greedy and else with top_k <= k they never do. n_top is at
 * most k. */
PE_API pe_status pe_sample_few(const pe_sampler_params *params, const pe_sampler_few *few, void *scratch, pe_sampled *out,
                               pe_token_value *top, int32_t n_top);

/* runs[i], for each of n tokens: how many tokens up to this one are those that the sequence ends with; 0 for the last. Linear in n:
 * Z-algorithm, from the end (Gusfield 1997, Algorithms on Strings, Trees, and Sequences, section 1.4). */
PE_API void pe_repeats(const int32_t *tokens, int32_t n, int32_t *runs);

/* Number `step` of stream `seed`, uniform in [0, 1): SplitMix64 (Steele, Lea and Flood 2014,
 * doi:10.1145/2660193.2660195) started at the mixed seed, upper 53 bits of its output. */
PE_API double pe_random_unit(uint64_t seed, uint64_t step);

#ifdef __cplusplus
}
#endif
#endif

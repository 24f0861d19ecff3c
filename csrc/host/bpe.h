/* bpe.h: find strings of a GGUF file by their text, and join the characters of a text into tokens. setup.py
 * reads these declarations for cffi, so they stay plain.
 *
 * Both kinds of BPE start from the characters of a part of the text and join two neighbours at a time, the best pair
 * first and of equal ones the leftmost, until no pair can be joined:
 *
 *   by rank     a pair is as good as "left right" is early among the merges (Sennrich et al. 2016, arXiv:1508.07909)
 *   by score    a pair is as good as the score of the token that it makes (SentencePiece; llama.cpp, llm_tokenizer_spm)
 *
 * Texts are compared, not ids, so a merge may make or use a text that is no token; what is none in the end is spelled
 * byte by byte. A character is as long as its first byte says, valid or not. A part of n bytes takes O(n log n) time.
 */
#ifndef PE_BPE_H
#define PE_BPE_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Strings as they lie in the file, and a hash table over them. The caller owns the memory. */
typedef struct pe_strings {
  const uint8_t *data;   /* n times: length (u64, little-endian), then that many bytes */
  int64_t n_bytes;
  int64_t n;
  int64_t *start;        /* [n + 1], written: where the length of each string is; the end of the last */
  uint64_t *slots;       /* [n_slots], zeros; written: upper half of the hash << 32 | index + 1, 0 where free */
  int64_t n_slots;       /* a power of two above n, better not below 2n */
  int64_t n_twice;       /* written: strings that are there before; the first one is found */
  int64_t n_empty;       /* written: strings of no bytes */
  int64_t longest;       /* written: bytes of the longest string */
} pe_strings;

/* Pass over n strings from data[*at] on. Returns how many of them lie within the data as a whole; *at is moved behind these. */
PE_API int64_t pe_strings_pass(const uint8_t *data, int64_t n_bytes, int64_t n, int64_t *at);

/* Fill the written fields. PE_BAD_SHAPE: a length exceeds what is left of the data, or n_slots is no such number.
 * PE_BAD_VALUE: so many hashes are equal that finding would be slow; only made-up strings get there. */
PE_API pe_status pe_strings_index(pe_strings *s);

/* The index of a string, or -1. */
PE_API int64_t pe_strings_find(const pe_strings *s, const uint8_t *text, int64_t n_bytes);

/* The first string that is not two texts with a space between, or -1. The first text may begin with a space. */
PE_API int64_t pe_strings_not_pair(const pe_strings *s);

typedef struct pe_bpe {
  const pe_strings *tokens;
  const pe_strings *merges;   /* "left right", best first; NULL: by score */
  const float *scores;        /* [tokens->n], by score only */
  int32_t spell[256];         /* the token of each byte, for texts that are no token; -1: left out */
  int32_t whole;              /* a part that is a token is that token, whatever the merges say */
  int32_t byte_level;         /* the strings write a letter for each byte (GPT-2, encoder.py: bytes_to_unicode) */
} pe_bpe;

/* Give the ids of a text cut into parts that end at `ends`, the last at n_bytes. ids: room for one a byte of the text,
 * for two if byte_level. PE_BAD_SHAPE: the ends do not rise to n_bytes, or a part has 2^30 bytes and more.
 * PE_NO_MEMORY: 65 bytes for each byte of the longest part, 130 if byte_level, are not there. */
PE_API pe_status pe_bpe_encode(const pe_bpe *bpe, const uint8_t *text, int64_t n_bytes, const int64_t *ends,
                               int64_t n_parts, int32_t *ids, int64_t *n_ids);

#ifdef __cplusplus
}
#endif
#endif

/* bpe.c: see bpe.h. */
#include "bpe.h"

#include <stdlib.h>
#include <string.h>

enum { LENGTH_BYTES = 8, MAX_PROBES = 1024 }; /* half-full tables of 2^18 strings need less than 100 */

/* ---- strings ---- */

/* FNV-1a (Fowler, Noll, Vo), which takes a string in pieces; `finish` spreads it over all bits. */
static const uint64_t FNV_START = 0xcbf29ce484222325u, FNV_PRIME = 0x100000001b3u;

static inline uint64_t hash_more(uint64_t h, const uint8_t *text, int64_t n) {
  for (int64_t i = 0; i < n; i++) h = (h ^ text[i]) * FNV_PRIME;
  return h;
}

static inline uint64_t hash_finish(uint64_t h) {
  h = (h ^ h >> 32) * 0x9e3779b97f4a7c15u;
  return h ^ h >> 29;
}

static inline uint64_t load_u64(const uint8_t *p) {
  uint64_t v = 0;
  for (int i = 0; i < 8; i++) v |= (uint64_t)p[i] << 8 * i;
  return v;
}

typedef struct span { const uint8_t *text; int64_t n; } span;

static inline span string_at(const pe_strings *s, int64_t i) {
  int64_t from = s->start[i] + LENGTH_BYTES;
  return (span){s->data + from, s->start[i + 1] - from};
}

static inline int equal(span a, span b) { return a.n == b.n && !memcmp(a.text, b.text, (size_t)a.n); }

static inline uint64_t slot_of(uint64_t h, int64_t i) { return (h & 0xffffffff00000000u) | (uint64_t)(i + 1); }
static inline int64_t index_in(uint64_t slot) { return (int64_t)(slot & 0xffffffffu) - 1; }
static inline int same_tag(uint64_t slot, uint64_t h) { return slot >> 32 == h >> 32; }

int64_t pe_strings_pass(const uint8_t *data, int64_t n_bytes, int64_t n, int64_t *at) {
  for (int64_t i = 0; i < n; i++) {
    if (n_bytes - *at < LENGTH_BYTES) return i;
    uint64_t size = load_u64(data + *at);
    if (size > (uint64_t)(n_bytes - *at - LENGTH_BYTES)) return i;
    *at += LENGTH_BYTES + (int64_t)size;
  }
  return n;
}

pe_status pe_strings_index(pe_strings *s) {
  if (s->n < 0 || s->n >= INT32_MAX || s->n_slots <= s->n || (s->n_slots & (s->n_slots - 1))) return PE_BAD_SHAPE;
  s->n_twice = s->n_empty = s->longest = 0;
  int64_t at = 0;
  for (int64_t i = 0; i < s->n; i++) {
    if (s->n_bytes - at < LENGTH_BYTES) return PE_BAD_SHAPE;
    uint64_t n = load_u64(s->data + at);
    if (n > (uint64_t)(s->n_bytes - at - LENGTH_BYTES)) return PE_BAD_SHAPE;
    s->start[i] = at;
    at = s->start[i + 1] = at + LENGTH_BYTES + (int64_t)n;
    if ((int64_t)n > s->longest) s->longest = (int64_t)n;
    s->n_empty += !n;

    span text = string_at(s, i);
    uint64_t h = hash_finish(hash_more(FNV_START, text.text, text.n)), mask = (uint64_t)s->n_slots - 1, k = h & mask;
    int probes = 0;
    while (s->slots[k] && !(same_tag(s->slots[k], h) && equal(text, string_at(s, index_in(s->slots[k]))))) {
      if (++probes == MAX_PROBES) return PE_BAD_VALUE;
      k = (k + 1) & mask;
    }
    if (s->slots[k]) s->n_twice++;
    else s->slots[k] = slot_of(h, i);
  }
  if (!s->n) s->start[0] = 0;
  return PE_OK;
}

/* Find left + right, or left + " " + right. */
static int64_t find(const pe_strings *s, span left, int spaced, span right) {
  int64_t n = left.n + spaced + right.n;
  if (n > s->longest) return -1;
  uint64_t h = hash_more(FNV_START, left.text, left.n);
  if (spaced) h = hash_more(h, (const uint8_t *)" ", 1);
  h = hash_finish(hash_more(h, right.text, right.n));
  uint64_t mask = (uint64_t)s->n_slots - 1, k = h & mask;
  for (int probes = 0; s->slots[k] && probes < MAX_PROBES; probes++, k = (k + 1) & mask) {
    if (!same_tag(s->slots[k], h)) continue;
    span found = string_at(s, index_in(s->slots[k]));
    if (found.n == n && !memcmp(found.text, left.text, (size_t)left.n) && (!spaced || found.text[left.n] == ' ') &&
        !memcmp(found.text + left.n + spaced, right.text, (size_t)right.n))
      return index_in(s->slots[k]);
  }
  return -1;
}

static int64_t find_one(const pe_strings *s, span text) { return find(s, text, 0, (span){text.text + text.n, 0}); }

int64_t pe_strings_find(const pe_strings *s, const uint8_t *text, int64_t n_bytes) {
  return find_one(s, (span){text, n_bytes});
}

int64_t pe_strings_not_pair(const pe_strings *s) {
  for (int64_t i = 0; i < s->n; i++) {
    span text = string_at(s, i);
    const uint8_t *space = text.n > 2 ? memchr(text.text + 1, ' ', (size_t)(text.n - 1)) : NULL;
    if (!space || space == text.text + text.n - 1) return i;
  }
  return -1;
}

/* ---- joining ---- */

/* A stretch of the part, n bytes from `start`, in a list from left to right that -1 ends; n is 0 once it is joined to
 * its left. */
typedef struct symbol { int32_t start, n, prev, next; } symbol;

/* A symbol that can be joined to its right neighbour. It is out of date if the two no longer have n bytes together. */
typedef struct pair { double key; int32_t left, n; } pair; /* lower keys first */

typedef struct work {
  const pe_bpe *bpe;
  const uint8_t *text;
  symbol *symbols;
  pair *heap;            /* heap[i] before heap[2i + 1] and heap[2i + 2] */
  int64_t n_heap;
} work;

static inline int before(pair a, pair b) { return a.key < b.key || (a.key == b.key && a.left < b.left); }

static void push(work *w, pair p) {
  int64_t i = w->n_heap++;
  for (; i && before(p, w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
  w->heap[i] = p;
}

static pair pop(work *w) {
  pair first = w->heap[0], last = w->heap[--w->n_heap];
  int64_t i = 0;
  for (int64_t child; (child = 2 * i + 1) < w->n_heap; i = child) {
    if (child + 1 < w->n_heap && before(w->heap[child + 1], w->heap[child])) child++;
    if (!before(w->heap[child], last)) break;
    w->heap[i] = w->heap[child];
  }
  w->heap[i] = last;
  return first;
}

static inline span text_of(const work *w, int32_t i) { return (span){w->text + w->symbols[i].start, w->symbols[i].n}; }

static void offer(work *w, int32_t left) {
  if (left < 0 || w->symbols[left].next < 0) return;
  span a = text_of(w, left), b = text_of(w, w->symbols[left].next);
  int64_t found = w->bpe->merges ? find(w->bpe->merges, a, 1, b) : find(w->bpe->tokens, a, 0, b);
  if (found < 0) return;
  push(w, (pair){w->bpe->merges ? (double)found : -(double)w->bpe->scores[found], left, (int32_t)(a.n + b.n)});
}

static inline int32_t character_bytes(uint8_t first) {
  return first < 0xc0 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
}

/* Write the ids of one part of n >= 1 bytes; returns the place after them. */
static int32_t *encode_part(work *w, int32_t n, int32_t *ids) {
  const pe_bpe *bpe = w->bpe;
  symbol *symbols = w->symbols;
  int64_t whole = bpe->whole ? pe_strings_find(bpe->tokens, w->text, n) : -1;
  if (whole >= 0) {
    *ids++ = (int32_t)whole;
    return ids;
  }
  int32_t n_symbols = 0;
  for (int32_t at = 0; at < n; n_symbols++) {
    int32_t size = character_bytes(w->text[at]);
    if (size > n - at) size = n - at;
    symbols[n_symbols] = (symbol){at, size, n_symbols - 1, n_symbols + 1};
    at += size;
  }
  symbols[n_symbols - 1].next = -1;
  w->n_heap = 0;
  for (int32_t i = 0; i < n_symbols; i++) offer(w, i);

  while (w->n_heap) {
    pair p = pop(w);
    symbol *left = symbols + p.left;
    if (!left->n || left->next < 0) continue;
    symbol *right = symbols + left->next;
    if (left->n + right->n != p.n) continue;
    left->n = p.n;
    left->next = right->next;
    right->n = 0;
    if (left->next >= 0) symbols[left->next].prev = p.left;
    offer(w, left->prev);
    offer(w, p.left);
  }
  for (int32_t i = 0; i >= 0; i = symbols[i].next) {
    span text = text_of(w, i);
    int64_t id = find_one(bpe->tokens, text);
    if (id >= 0) *ids++ = (int32_t)id;
    else
      for (int64_t k = 0; k < text.n; k++)
        if (bpe->spell[text.text[k]] >= 0) *ids++ = bpe->spell[text.text[k]];
  }
  return ids;
}

/* Write a letter for each byte, its own where that can be seen, else one from U+0100 on. Returns the bytes written. */
static int64_t spell_letters(const uint8_t *text, int64_t n, uint8_t *out) {
  uint8_t *at = out;
  for (int64_t i = 0; i < n; i++) {
    int code = text[i];
    if (code <= 0x20) code += 0x100;
    else if (code >= 0x7f && code <= 0xa0) code += 0x121 - 0x7f;
    else if (code == 0xad) code = 0x143;
    if (code >= 0x80) *at++ = (uint8_t)(0xc0 | code >> 6);
    *at++ = (uint8_t)(code < 0x80 ? code : 0x80 | (code & 0x3f));
  }
  return at - out;
}

pe_status pe_bpe_encode(const pe_bpe *bpe, const uint8_t *text, int64_t n_bytes, const int64_t *ends, int64_t n_parts,
                        int32_t *ids, int64_t *n_ids) {
  int64_t longest = 0, start = 0;
  for (int64_t i = 0; i < n_parts; start = ends[i++]) {
    if (ends[i] < start || ends[i] > n_bytes || ends[i] - start >= 1 << 30) return PE_BAD_SHAPE;
    if (ends[i] - start > longest) longest = ends[i] - start;
  }
  *n_ids = 0;
  if (start != n_bytes) return PE_BAD_SHAPE;
  if (!longest) return PE_OK;
  /* n symbols; n - 1 pairs at first, and at most 2 for each of at most n - 1 joins. */
  size_t n = (size_t)longest * (bpe->byte_level ? 2 : 1);
  char *memory = malloc(n * (3 * sizeof(pair) + sizeof(symbol) + 1));
  if (!memory) return PE_NO_MEMORY;
  symbol *symbols = (symbol *)(memory + n * 3 * sizeof(pair));
  work w = {bpe, NULL, symbols, (pair *)memory, 0};
  uint8_t *letters = (uint8_t *)(symbols + n);
  int32_t *end = ids;
  start = 0;
  for (int64_t i = 0; i < n_parts; start = ends[i++]) {
    int64_t size = ends[i] - start;
    w.text = bpe->byte_level ? letters : text + start;
    if (bpe->byte_level) size = spell_letters(text + start, size, letters);
    if (size) end = encode_part(&w, (int32_t)size, end);
  }
  free(memory);
  *n_ids = end - ids;
  return PE_OK;
}

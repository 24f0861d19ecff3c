/* runner.c: run op cases from a file on one instruction set and write what came out. So kernels can be tested where
 * there is no Python: under an emulator, on a phone. tests/support/crossbuild.py builds it and speaks its files.
 *
 *   runner                                 print the instruction sets that this machine and build have
 *   runner ISA THREADS CASES RESULTS
 *   RUNNER_ZA=1 runner ...                 the same while each thread keeps something in Arm's matrix registers
 *
 * Both files are runs of little-endian 8-byte words; "bytes" are a length and so many bytes, filled up to a word.
 *
 *   CASES     magic, number of codebooks, codebooks, number of cases, cases
 *   codebook  dtype, bytes
 *   case      bytes op, bytes params, n_in, n_out, tensors in each argument [n_in + n_out], tensors
 *   tensor    role, dtype, ndim, shape[6], stride[6], then by role:
 *               0 plain    bytes: its memory, the first element at the first byte
 *               1 pack     bytes: a matrix in its file's layout, which is packed here; dtype and strides are the file's
 *               2 same     number of the tensor of this case whose memory and strides it has
 *   RESULTS   for each case: status, bytes message, and for each tensor of an output the bytes of its memory
 *
 * The status is a pe_status, or -1 where the runner itself found a fault; the message says which. Every memory ends where
 * a page begins that may not be touched, bytes before it are looked at afterwards, and inputs that are not also outputs
 * are read-only: a kernel that leaves its arrays ends the program, which names the op.
 */
#define _DEFAULT_SOURCE
#define _DARWIN_C_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#include <io.h>
#else
#include <unistd.h>
#endif

#include "../../csrc/cpu/pack.h"
#include "../../csrc/host/dequant.h"
#include "../../csrc/host/system.h"
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/pool.h"

enum { MAX_TENSORS = 32, MAX_THREADS = 64, GUARD = 0xA5, PLAIN = 0, PACK = 1, SAME = 2 };
static const int64_t MAGIC = 0x3173657361636570; /* "pecases1" */

static char current[64] = "none"; /* the op that runs, for the fault handler */

static void fail(const char *what) {
  fprintf(stderr, "runner: %s (op %s)\n", what, current);
  exit(1);
}

static void on_fault(int signal_number) {
  static const char text[] = "runner: a kernel left its memory, op ";
  (void)signal_number;
  if (write(2, text, sizeof text - 1) < 0 || write(2, current, strlen(current)) < 0 || write(2, "\n", 1) < 0) _exit(4);
  _exit(3);
}

/* ---- files ---- */

typedef struct reader { const char *at, *end; } reader;
typedef struct bytes { const char *p; int64_t n; } bytes;

static int64_t read_word(reader *r) {
  int64_t w;
  if (r->end - r->at < 8) fail("the file of cases is cut short");
  memcpy(&w, r->at, 8);
  r->at += 8;
  return w;
}

static bytes read_bytes(reader *r) {
  bytes b = {0, read_word(r)};
  if (b.n < 0 || b.n > r->end - r->at) fail("the file of cases is cut short");
  b.p = r->at;
  r->at += (b.n + 7) / 8 * 8;
  return b;
}

static int64_t read_count(reader *r, int64_t most) {
  int64_t n = read_word(r);
  if (n < 0 || n > most) fail("a count is out of range");
  return n;
}

static bytes read_file(const char *path) {
  FILE *f = fopen(path, "rb");
  bytes b = {0, 0};
  if (!f || fseek(f, 0, SEEK_END) || (b.n = ftell(f)) < 0 || fseek(f, 0, SEEK_SET)) fail("cannot read the cases");
  char *p = malloc((size_t)b.n + 1);
  if (!p || fread(p, 1, (size_t)b.n, f) != (size_t)b.n) fail("cannot read the cases");
  fclose(f);
  b.p = p;
  return b;
}

static void write_bytes(FILE *f, const void *p, int64_t n) {
  static const char zero[8];
  size_t fill = (size_t)(-n & 7);
  if (fwrite(&n, 8, 1, f) != 1 || fwrite(p, 1, (size_t)n, f) != (size_t)n || fwrite(zero, 1, fill, f) != fill)
    fail("cannot write the results");
}

/* ---- memory between a guard and a page that may not be touched ---- */

typedef struct memory {
  char *map, *data;
  int64_t n, map_bytes, page; /* n: bytes of data */
} memory;

#if defined(_WIN32)
enum { HIDDEN = PAGE_NOACCESS, FROZEN = PAGE_READONLY };
static int64_t page_bytes(void) {
  SYSTEM_INFO about;
  GetSystemInfo(&about);
  return about.dwPageSize;
}
static void protect(char *p, int64_t n, int how) {
  DWORD before;
  if (!VirtualProtect(p, (size_t)n, (DWORD)how, &before)) fail("cannot protect memory");
}
#else
enum { HIDDEN = PROT_NONE, FROZEN = PROT_READ };
static int64_t page_bytes(void) { return sysconf(_SC_PAGESIZE); }
static void protect(char *p, int64_t n, int how) {
  if (mprotect(p, (size_t)n, how)) fail("cannot protect memory");
}
#endif

static memory memory_new(int64_t n, int64_t align) {
  memory m = {0, 0, n, 0, page_bytes()};
  int64_t room = (n + align - 1) / align * align;
  m.map_bytes = (room + 64 + m.page - 1) / m.page * m.page + m.page;
  m.map = pe_pages_new((size_t)m.map_bytes, 0);
  if (!m.map) fail("no memory");
  m.data = m.map + m.map_bytes - m.page - room;
  memset(m.map, GUARD, (size_t)(m.map_bytes - m.page));
  protect(m.map + m.map_bytes - m.page, m.page, HIDDEN);
  return m;
}

static void memory_freeze(memory *m) { protect(m->map, m->map_bytes - m->page, FROZEN); }

static int memory_intact(const memory *m) {
  const char *end = m->map + m->map_bytes - m->page;
  for (const char *p = m->map; p < m->data; p++)
    if (*p != (char)GUARD) return 0;
  for (const char *p = m->data + m->n; p < end; p++)
    if (*p != (char)GUARD) return 0;
  return 1;
}

static void memory_free(memory *m) { pe_pages_free(m->map, (size_t)m->map_bytes); }

/* ---- one case ---- */

typedef struct job {
  const pe_kernel_entry *kernel;
  pe_args args;
  const void *params;
  memory scratch;
  pe_pool *pool;
  _Alignas(64) int64_t counters[8];
  int32_t status;
  char message[PE_MAX_MESSAGE];
} job;

/* ZA in use, as the procedure call standard has it: it is on, and TPIDR2_EL0 points to where it would be saved. */
#if defined(__aarch64__)
static uint64_t saved_here[2];
static void use_za(void) {
  __asm__ volatile(".inst 0xd503457f\n\tmsr S3_3_C13_C0_5, %0" : : "r"(saved_here) : "memory"); /* smstart za; tpidr2_el0 */
}
static int za_is_used(void) { /* and gives it back */
  uint64_t svcr, place;
  __asm__ volatile("mrs %0, S3_3_C4_C2_2\n\tmrs %1, S3_3_C13_C0_5\n\tmsr S3_3_C13_C0_5, xzr\n\t.inst 0xd503447f" /* smstop za */
                   : "=r"(svcr), "=r"(place) : : "memory");
  return svcr == 2 && place == (uint64_t)(uintptr_t)saved_here;
}
#else
static void use_za(void) { fail("RUNNER_ZA needs a 64-bit Arm"); }
static int za_is_used(void) { return 0; }
#endif

static void run_member(void *context, int ith, int nth) {
  job *j = context;
  char message[PE_MAX_MESSAGE] = "";
  const int za = getenv("RUNNER_ZA") != 0;
  pe_stream s = {ith, nth, j->scratch.data, j->scratch.n, j->counters, j->pool, message};
  if (za) use_za();
  int32_t status = (int32_t)j->kernel->run(&j->args, j->params, &s), none = PE_OK;
  if (za && !za_is_used()) fail("a kernel took another's matrix registers");
  if (status != PE_OK && __atomic_compare_exchange_n(&j->status, &none, status, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
    memcpy(j->message, message, sizeof message);
}

static memory pack(pe_tensor *t, bytes file) { /* matrices one after the other as one: rows of each fill whole groups of 16 */
  int64_t n = t->ndim == 3 ? t->shape[0] * t->shape[1] : t->shape[0], k = t->shape[t->ndim - 1], size = pe_pack_bytes(t->dtype, n, k);
  if (t->ndim == 3 && t->shape[1] % 16) fail("experts that share a group of rows");
  if (!size) fail("a matrix that cannot be packed");
  memory m = memory_new(size, 64);
  if (pe_pack_groups(t->dtype, file.p, n, k, 0, (n + 15) / 16, m.data)) fail("a matrix that cannot be packed");
  t->dtype += PE_PACKED;
  return m;
}

static void run_case(reader *r, const pe_isa *isa, pe_pool *pool, FILE *results) {
  bytes name = read_bytes(r), params = read_bytes(r);
  int64_t n_in = read_count(r, MAX_TENSORS), n_out = read_count(r, MAX_TENSORS - n_in);
  int32_t start[MAX_TENSORS], count[MAX_TENSORS], n = 0, first_out = 0;
  pe_tensor tensors[MAX_TENSORS];
  const pe_tensor *pointers[MAX_TENSORS];
  memory memories[MAX_TENSORS];
  int owner[MAX_TENSORS], written[MAX_TENSORS] = {0};
  snprintf(current, sizeof current, "%.*s", (int)name.n, name.p);
  for (int64_t i = 0; i < n_in + n_out; i++) {
    start[i] = n;
    count[i] = (int32_t)read_count(r, MAX_TENSORS - n);
    n += count[i];
    if (i < n_in) first_out = n;
  }
  for (int32_t i = 0; i < n; i++) {
    pe_tensor *t = &tensors[i];
    int64_t role = read_word(r);
    t->dtype = (int32_t)read_word(r);
    t->ndim = (int32_t)read_count(r, PE_MAX_DIMS);
    for (int d = 0; d < PE_MAX_DIMS; d++) t->shape[d] = read_word(r);
    for (int d = 0; d < PE_MAX_DIMS; d++) t->stride[d] = read_word(r);
    owner[i] = i;
    if (role == SAME) {
      owner[i] = (int)read_count(r, i - 1);
      memories[i] = memories[owner[i]];
    } else if (role == PACK) {
      memories[i] = pack(t, read_bytes(r));
    } else {
      bytes b = read_bytes(r);
      memories[i] = memory_new(b.n, 4);
      memcpy(memories[i].data, b.p, (size_t)b.n);
    }
    t->data = memories[i].data;
    pointers[i] = t;
    if (i >= first_out) written[owner[i]] = 1;
  }
  for (int32_t i = 0; i < first_out; i++)
    if (owner[i] == i && !written[i]) memory_freeze(&memories[i]);

  job j = {.kernel = pe_isa_kernel(isa, current), .params = params.p, .pool = pool};
  j.args = (pe_args){pointers, start, count, (int32_t)n_in, (int32_t)n_out};
  if (!j.kernel) fail("there is no such kernel");
  int64_t scratch = j.kernel->scratch ? j.kernel->scratch(&j.args, j.params, pe_pool_size(pool)) : 0;
  if (scratch < 0) fail("a scratch size below 0");
  j.scratch = memory_new(scratch, 64);
  memset(j.scratch.data, 0xFF, (size_t)scratch);
  pe_pool_run(pool, run_member, &j);

  int64_t status = j.status;
  for (int32_t i = 0; i < n; i++)
    if (!memory_intact(&memories[i])) {
      status = -1;
      snprintf(j.message, sizeof j.message, "wrote before or behind tensor %d", i);
    }
  if (!memory_intact(&j.scratch)) {
    status = -1;
    snprintf(j.message, sizeof j.message, "wrote before or behind its scratch");
  }
  if (fwrite(&status, 8, 1, results) != 1) fail("cannot write the results");
  write_bytes(results, j.message, (int64_t)strlen(j.message));
  for (int32_t i = first_out; i < n; i++) write_bytes(results, memories[i].data, memories[i].n);
  memory_free(&j.scratch);
  for (int32_t i = 0; i < n; i++)
    if (owner[i] == i) memory_free(&memories[i]);
}

int main(int argc, char **argv) {
  if (argc == 1) {
    for (const pe_isa *isa = pe_isas; isa->name; isa++)
      if (isa->supported()) puts(isa->name);
    return 0;
  }
  if (argc != 5) fail("usage: runner [ISA THREADS CASES RESULTS]");
  const pe_isa *isa = pe_isas;
  while (isa->name && strcmp(isa->name, argv[1])) isa++;
  if (!isa->name || !isa->supported()) fail("this machine or build does not have that instruction set");
  int threads = atoi(argv[2]);
  if (threads < 1 || threads > MAX_THREADS) fail("1 to 64 threads are possible");
  signal(SIGSEGV, on_fault);
#if defined(SIGBUS)
  signal(SIGBUS, on_fault);
#endif

  bytes file = read_file(argv[3]);
  reader r = {file.p, file.p + file.n};
  FILE *results = fopen(argv[4], "wb");
  pe_pool *pool = pe_pool_new(threads);
  if (!results || !pool) fail("cannot start");
  if (read_word(&r) != MAGIC) fail("this is no file of cases");
  for (int64_t n = read_word(&r); n > 0; n--) {
    int32_t dtype = (int32_t)read_word(&r);
    bytes table = read_bytes(&r);
    if (pe_set_codebook(dtype, table.p, table.n)) fail("a codebook is refused");
  }
  for (int64_t n = read_word(&r); n > 0; n--) run_case(&r, isa, pool, results);
  pe_pool_free(pool);
  if (fclose(results)) fail("cannot write the results");
  return 0;
}

/* threads.c: pools and programs under ThreadSanitizer: several callers, each with a pool of its own, run programs whose kernels
 * hand rows to each other over barriers, count chunks, and fail together; pools are made, left to fall asleep, and freed all
 * the while.
 *
 *   threads CALLERS THREADS ROUNDS
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../csrc/cpu/pool.h"
#include "../../csrc/cpu/program.h"

enum { ROWS = 37, COLUMNS = 8, NODES = 5 };

static void fail(const char *what) {
  fprintf(stderr, "threads: %s\n", what);
  exit(1);
}

/* out[r] = x[r] + 1 by chunks; then, behind a barrier, out[r] += x of the row before, which another member wrote. */
static pe_status hand_on(const pe_args *args, const void *params, pe_stream *s) {
  const float *x = pe_arg(args, 0)->data;
  float *out = pe_arg(args, 1)->data, *scratch = (float *)s->scratch;
  const int64_t rows = pe_arg(args, 0)->shape[0];
  (void)params;
  for (int64_t r; (r = pe_next(s, 0)) < rows;)
    for (int c = 0; c < COLUMNS; c++) scratch[r * COLUMNS + c] = x[r * COLUMNS + c] + 1;
  pe_barrier(s);
  for (int64_t r; (r = pe_next(s, 1)) < rows;)
    for (int c = 0; c < COLUMNS; c++)
      out[r * COLUMNS + c] = scratch[r * COLUMNS + c] + scratch[(r ? r - 1 : rows - 1) * COLUMNS + c];
  pe_barrier(s);
  for (int64_t r; (r = pe_next(s, 2)) < rows;)
    for (int c = 0; c < COLUMNS; c++) scratch[r * COLUMNS + c] = out[(rows - 1 - r) * COLUMNS + c];
  return PE_OK;
}

/* Every member finds the same fault, and says who it is. */
static pe_status refuse(const pe_args *args, const void *params, pe_stream *s) {
  (void)params;
  return *(const int32_t *)pe_arg(args, 0)->data ? pe_fail(s, PE_BAD_VALUE, "member %d of %d refuses", s->ith, s->nth) : PE_OK;
}

typedef struct caller { pthread_t id; int threads, rounds; } caller;

static void *call(void *context) {
  const caller *c = context;
  float *arena = aligned_alloc(64, 4096 * sizeof(float));
  int64_t *counters = aligned_alloc(64, (NODES + 1) * PE_COUNTER_STRIDE * sizeof(int64_t));
  int32_t *flag = aligned_alloc(64, 64);
  pe_program_tensor specs[NODES + 2];
  pe_tensor tensors[NODES + 2];
  const pe_tensor *pointers[NODES + 2], *flags[1];
  int32_t start[] = {0, 1}, count[] = {1, 1};
  pe_program_node nodes[NODES + 1];
  if (!arena || !counters || !flag) fail("no memory");
  memset(nodes, 0, sizeof nodes);
  memset(tensors, 0, sizeof tensors);
  for (int i = 0; i <= NODES; i++) {
    specs[i] = (pe_program_tensor){.offset = i % 2 * 4 * 512, .dtype = PE_F32, .ndim = 2, .shape = {{1, 0}, {COLUMNS, -1}},
                                   .stride = {{4 * COLUMNS, -1}, {4, -1}}};
    tensors[i] = (pe_tensor){.dtype = PE_F32, .ndim = 2};
    pointers[i] = &tensors[i];
  }
  specs[NODES + 1] = (pe_program_tensor){.base = 1, .dtype = PE_I32, .ndim = 1, .shape = {{1, -1}}, .stride = {{4, -1}}};
  tensors[NODES + 1] = (pe_tensor){.dtype = PE_I32, .ndim = 1};
  flags[0] = &tensors[NODES + 1];
  for (int i = 0; i < NODES; i++)
    nodes[i] = (pe_program_node){.run = hand_on, .args = {pointers + i, start, count, 1, 1}, .scratch_offset = 4 * 1024,
                                 .scratch_bytes = 4 * 512};
  nodes[NODES] = nodes[NODES - 1];
  nodes[2].run = refuse;
  nodes[2].args = (pe_args){flags, start, count, 1, 0};
  char *bases[] = {(char *)arena, (char *)flag};
  pe_program program = {.spec = specs, .tensors = tensors, .n_tensors = NODES + 2, .nodes = nodes, .n_nodes = NODES + 1,
                        .bases = bases, .n_bases = 2, .counters = counters, .profile = 1};
  for (int round = 0; round < c->rounds; round++) {
    pe_pool *pool = pe_pool_new(c->threads);
    if (!pool) fail("no pool");
    for (int run = 0; run < 20; run++) {
      const int64_t dims[] = {run % ROWS + 1};
      for (int i = 0; i < 1024; i++) arena[i] = (float)(i % 7);
      *flag = run % 5 == 4;
      const int32_t status = pe_program_run(&program, pool, dims, run % 3);
      if (status != (*flag ? PE_BAD_VALUE : PE_OK)) fail("a program ends with another status");
      if (*flag && (program.failed_node != 2 || !strstr(program.message, "refuses")))
        fail("a failed program says nothing of its node");
      if (run % 10 == 9) usleep(3000); /* the members fall asleep */
    }
    pe_pool_free(pool);
  }
  free(arena);
  free(counters);
  free(flag);
  return 0;
}

int main(int argc, char **argv) {
  const int n = argc == 4 ? atoi(argv[1]) : 0;
  caller callers[16];
  if (n < 1 || n > 16) fail("usage: threads CALLERS THREADS ROUNDS");
  for (int i = 0; i < n; i++) {
    callers[i] = (caller){.threads = atoi(argv[2]), .rounds = atoi(argv[3])};
    if (pthread_create(&callers[i].id, 0, call, &callers[i])) fail("no thread");
  }
  for (int i = 0; i < n; i++) pthread_join(callers[i].id, 0);
  puts("done");
  return 0;
}

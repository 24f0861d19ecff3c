/* red_zones.c: kernels that touch one element too many, in a program whose tensors lie side by side in one allocation.
 * Built with the address sanitizer, which must end each of them; tests/kernels/test_sanitizers.py names the fault to commit.
 *
 *   red_zones FAULT     right, or one of FAULTS
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/cpu/pack.h"
#include "../../csrc/cpu/pool.h"
#include "../../csrc/cpu/program.h"

enum { N = 10, LINE = 64, ARENA = 8 * LINE, WEIGHTS = 4 * LINE };

static const char *const FAULTS[] = {"right", "read_behind", "write_behind", "write_before", "read_dead", "read_scratch_behind",
                                     "write_weights_behind", "read_between_rows", "read_other_weights", 0};

/* out[i] = x[i] + w[i], with a fault. */
static pe_status faulty(const pe_args *args, const void *params, pe_stream *s) {
  const char *fault = params;
  const pe_tensor *x = pe_arg(args, 0), *w = pe_arg(args, 1), *out = pe_arg(args, 2);
  volatile float *a = x->data, *b = w->data, *c = out->data, *scratch = (float *)s->scratch;
  pe_barrier(s);
  if (s->ith != s->nth - 1) return PE_OK; /* the last member's work, so not the one that marks */
  for (int64_t i = 0; i < N; i++) c[i] = a[i * x->stride[0] / 4] + b[i];
  for (int64_t i = 0; i < s->scratch_bytes / 4; i++) scratch[i] = 1;
  if (!strcmp(fault, "read_behind")) c[0] = a[N];
  if (!strcmp(fault, "write_behind")) c[N] = 1;
  if (!strcmp(fault, "write_before")) c[-1] = 1;
  if (!strcmp(fault, "read_dead")) c[0] = a[2 * LINE / 4]; /* the other step's result */
  if (!strcmp(fault, "read_scratch_behind")) c[0] = scratch[s->scratch_bytes / 4];
  if (!strcmp(fault, "write_weights_behind")) b[N] = 1;
  if (!strcmp(fault, "read_between_rows")) c[0] = a[2]; /* x has every fourth element of its memory */
  if (!strcmp(fault, "read_other_weights")) c[0] = b[2 * LINE / 4];
  return PE_OK;
}

static pe_axis number(int64_t n) { return (pe_axis){n, -1}; }

static pe_program_tensor row(int32_t base, int64_t offset, int64_t stride) {
  return (pe_program_tensor){.base = base, .offset = offset, .dtype = PE_F32, .ndim = 1, .shape = {number(N)},
                             .stride = {number(stride)}};
}

int main(int argc, char **argv) {
  const char *fault = argc == 2 ? argv[1] : "";
  int known = 0;
  for (int i = 0; FAULTS[i]; i++) known |= !strcmp(FAULTS[i], fault);
  if (!known) return 2;
  char *arena = aligned_alloc(4096, ARENA + 4096 - ARENA % 4096), *weights = aligned_alloc(4096, WEIGHTS + 4096 - WEIGHTS % 4096);
  memset(arena, 0, ARENA);
  memset(weights, 0, WEIGHTS);
  const int64_t step = strcmp(fault, "read_between_rows") ? 4 : 16;
  /* arena: x, first result, second result, scratch; weights: one of each step */
  pe_program_tensor specs[] = {row(0, 0, step), row(1, 0, 4), row(0, 3 * LINE, 4), row(2, 0, 4), row(0, 4 * LINE, 4)};
  pe_tensor tensors[5] = {0};
  for (int i = 0; i < 5; i++) tensors[i] = (pe_tensor){.dtype = specs[i].dtype, .ndim = 1};
  const pe_tensor *first[] = {&tensors[0], &tensors[1], &tensors[2]}, *second[] = {&tensors[2], &tensors[3], &tensors[4]};
  int32_t start[] = {0, 1, 2}, count[] = {1, 1, 1};
  pe_program_node nodes[] = {{.run = faulty, .args = {first, start, count, 2, 1}, .params = fault,
                              .scratch_offset = 6 * LINE, .scratch_bytes = 40},
                             {.run = faulty, .args = {second, start, count, 2, 1}, .params = "right"}};
  if (!strcmp(fault, "read_dead")) { /* by the second step, of what the first one read */
    nodes[0].params = "right";
    nodes[1].params = fault;
    specs[2].offset = 2 * LINE;
    specs[4].offset = 5 * LINE;
    first[2] = &tensors[2];
  }
  char *bases[] = {arena, weights, weights + 2 * LINE};
  const pe_memory memories[] = {{arena, ARENA}, {weights, WEIGHTS}};
  _Alignas(64) int64_t counters[2 * PE_COUNTER_STRIDE] = {0};
  pe_program program = {.spec = specs, .tensors = tensors, .n_tensors = 5, .nodes = nodes, .n_nodes = 2,
                        .bases = bases, .n_bases = 3,
                        .memories = memories, .n_memories = 2, .counters = counters};
  for (int threads = 1; threads <= 3; threads += 2) {
    pe_pool *pool = pe_pool_new(threads);
    if (!pool || pe_program_run(&program, pool, 0, 0) != PE_OK) return 3;
    pe_pool_free(pool);
  }
  memset(arena, 1, ARENA); /* between runs, everything is the host's */
  memset(weights, 1, WEIGHTS);
  free(arena);
  free(weights);
  puts("done");
  return 0;
}

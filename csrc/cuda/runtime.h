/* runtime.h: cards, their memory, copies, and programs that are replayed as graphs. Flat functions for Python (cffi), so the declarations
 * stay plain. Those that can fail return a pe_status; pe_card_error says why, for the thread that asks.
 */
#ifndef PE_CUDA_RUNTIME_H
#define PE_CUDA_RUNTIME_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { PE_CARD_FAILED = 100 };  /* a status besides those of pe_status: the driver or the device failed */

/* Why the last call of this thread failed: "cudaMalloc: out of memory". */
PE_API const char *pe_card_error(void);

/* A number that changes with the structs of this file: whoever reads them with another one was built from other sources. */
PE_API int64_t pe_card_layout(void);

/* Versions as 1000 * major + 10 * minor: what the driver can do (0: there is none), and what this library was built with. */
PE_API int32_t pe_card_versions(int32_t *driver, int32_t *runtime);

/* How many devices there are. */
PE_API int32_t pe_card_count(int32_t *n);

typedef struct pe_card_facts {
  char name[256];
  int32_t capability;           /* 75, 80, 86 .. */
  int32_t multiprocessors;
  int64_t total, free;          /* bytes, of which so many are free now */
} pe_card_facts;

PE_API int32_t pe_card_facts_of(int32_t device, pe_card_facts *out);

/* Names of the ops that have kernels here, one after the other; null behind the last. */
PE_API const char *pe_card_kernel(int32_t i);

/* -- memory ---------------------------------------------------------------------------------------------------------------------------- */

/* Memory of a device: zeroed, but for the checked form of the emulator. */
PE_API int32_t pe_card_new(int32_t device, int64_t bytes, uint64_t *out);
PE_API int32_t pe_card_free(int32_t device, uint64_t address);

/* Zeroed memory of the host that devices copy from and to without the processor. */
PE_API int32_t pe_card_host_new(int64_t bytes, uint64_t *out);
PE_API int32_t pe_card_host_free(uint64_t address);

/* A queue of work on a device: what is put into it is done in order; pe_card_wait waits for all of it. */
typedef struct pe_card_queue pe_card_queue;

PE_API int32_t pe_card_queue_new(int32_t device, pe_card_queue **out);
/* Say where the grids of IQ1 .. IQ3 lie in the device's memory (pe_codebooks in dequant.h): those that kernels of this queue read. */
PE_API int32_t pe_card_set_codebooks(pe_card_queue *queue, uint64_t address);
/* Programs that still use it keep it. */
PE_API int32_t pe_card_queue_free(pe_card_queue *queue);
PE_API int32_t pe_card_wait(pe_card_queue *queue);

/* A place in a queue, to wait for what was put in before it; one that was never marked is over. */
PE_API int32_t pe_card_mark(pe_card_queue *queue, int32_t slot);
PE_API int32_t pe_card_wait_mark(pe_card_queue *queue, int32_t slot);

enum { PE_CARD_MARKS = 4 };

/* Copy `rows` runs of `bytes`, so many bytes apart; between the host, the queue's device and others, as the addresses say. */
PE_API int32_t pe_card_copy(pe_card_queue *queue, uint64_t to, int64_t to_stride, uint64_t from, int64_t from_stride, int64_t bytes,
                            int64_t rows);

/* Let a device copy from and to another one's memory directly, where the machine can; elsewhere the driver takes the way by the host. */
PE_API int32_t pe_card_meet(int32_t device, int32_t other);

/* Copy runs of cells to others of the same state: memory is [heads][cells][cell_bytes], runs are (from, to, count), n_runs of them. No
 * cell is both read and written. */
PE_API int32_t pe_card_copy_cells(pe_card_queue *queue, uint64_t memory, int64_t heads, int64_t cells, int64_t cell_bytes,
                                  const int32_t *runs, int64_t n_runs);

/* -- programs -------------------------------------------------------------------------------------------------------------------------- */

/* A number that is `scale`, or `scale` x the value of run-time axis `dim` (dim >= 0). */
typedef struct pe_card_axis { int64_t scale; int32_t dim; } pe_card_axis;

typedef struct pe_card_tensor {
  uint64_t address;
  int32_t dtype, ndim;
  pe_card_axis shape[6], stride[6];
} pe_card_tensor;

typedef struct pe_card_node {
  const char *op;
  const char *params;           /* the bytes of pe_<op>_params */
  int32_t params_bytes;
  int32_t n_in, n_out;
  const int32_t *count;         /* [n_in + n_out]: how many tensors each argument is */
  const int32_t *tensors;       /* their numbers, one argument after the other */
  uint64_t scratch;
  int64_t scratch_bytes;
} pe_card_node;

/* Bytes that a run sends before the steps (host to device) or fetches after them: elements x the product of some run-time axes. */
typedef struct pe_card_transfer {
  uint64_t host, device;
  int64_t bytes;                /* of one element, times all axes that are fixed */
  int32_t n_dims, dims[6];
  int32_t last;                 /* sent by runs that begin at a step before this one: the last that reads it, and one */
} pe_card_transfer;

typedef struct pe_card_program pe_card_program;

/* A program over memory that its caller holds; everything that the arguments point to is copied. n_dims: how many run-time axes.
 * faults: pe_card_fault_bytes of memory that pe_card_host_new gave. */
PE_API int32_t pe_card_program_new(pe_card_queue *queue, const pe_card_tensor *tensors, int32_t n_tensors, const pe_card_node *nodes,
                                   int32_t n_nodes, int32_t n_dims, const pe_card_transfer *sends, int32_t n_sends,
                                   const pe_card_transfer *fetches, int32_t n_fetches, uint64_t faults, pe_card_program **out);
PE_API int32_t pe_card_program_free(pe_card_program *program);
PE_API int64_t pe_card_fault_bytes(int32_t n_nodes);

/* What a run says: the step that failed (-1: none in particular), and why; for what only the device saw, a number and its limit. */
typedef struct pe_card_outcome {
  int32_t node, seen;           /* seen: `value` and `limit` say it, not `message` */
  int64_t value, limit;
  char message[256];
} pe_card_outcome;

/* Send, do the steps from `first` on, fetch, and wait. dims[i] is the value of run-time axis i. Dims that come for the second time are
 * recorded as a graph, which later runs replay. */
PE_API int32_t pe_card_program_run(pe_card_program *program, const int64_t *dims, int32_t first, pe_card_outcome *outcome);

/* Send what differs between a table and its shadow, both on the host; `table` is what the device shall have. */
PE_API int32_t pe_card_send_changes(pe_card_queue *queue, uint64_t device, const void *table, void *shadow, int64_t bytes);

/* Time each step, and forget the times until now; while it is on, nothing is replayed. seconds: [n_nodes]. */
PE_API int32_t pe_card_program_profile(pe_card_program *program, int32_t on);
PE_API int32_t pe_card_program_seconds(const pe_card_program *program, double *seconds);

/* How many runs replayed a graph, and how many graphs there are now. */
PE_API int32_t pe_card_program_graphs(const pe_card_program *program, int64_t *replayed, int32_t *held);

/* Working memory of an op's kernel for tensors of these sizes (their largest: dims are not looked at): -1 where there is no such kernel. */
PE_API int64_t pe_card_scratch(const pe_card_tensor *tensors, int32_t n_tensors, const pe_card_node *node);

#ifdef __cplusplus
}
#endif
#endif

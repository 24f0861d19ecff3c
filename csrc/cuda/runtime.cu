// runtime.cu: devices, their memory, queues and copies.
#include "runtime.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

#include "../table.h"
#include "state.h"
#if PE_EMULATED
#include "../emulate/peers.h"
#endif

extern const pe_kernel_entry PE_NAME(kernels)[];

namespace pe {

thread_local char message[PE_MAX_MESSAGE];

int32_t failed(const char *what, cudaError_t error) {
  cudaGetLastError();                                        // what is not asked for again would be found by the next launch
  snprintf(message, sizeof message, "%.*s: %s", static_cast<int>(strcspn(what, "(")), what, cudaGetErrorString(error));
  return error == cudaErrorMemoryAllocation ? static_cast<int32_t>(PE_NO_MEMORY) : static_cast<int32_t>(PE_CARD_FAILED);
}

}  // namespace pe

using pe::failed;

namespace {

// Copy runs of cells: block (run, head), whose threads take 16 bytes each, or single bytes where cells are no multiple of that.
// No shared memory. Moves each cell's bytes twice; one launch does PE_RUNS runs, which travel with its arguments.
constexpr int PE_RUNS = 256, COPY_THREADS = 256;

struct CellRuns { int32_t from[PE_RUNS], to[PE_RUNS], count[PE_RUNS]; };

__global__ void copy_cells(char *memory, int64_t head_bytes, int64_t cell_bytes, const CellRuns runs) {
  char *head = memory + static_cast<int64_t>(blockIdx.y) * head_bytes;
  const char *from = head + runs.from[blockIdx.x] * cell_bytes;
  char *to = head + runs.to[blockIdx.x] * cell_bytes;
  const int64_t bytes = runs.count[blockIdx.x] * cell_bytes;
  if (cell_bytes % 16 == 0) {
    for (int64_t i = threadIdx.x; i < bytes / 16; i += COPY_THREADS)
      reinterpret_cast<int4 *>(to)[i] = reinterpret_cast<const int4 *>(from)[i];
  } else {
    for (int64_t i = threadIdx.x; i < bytes; i += COPY_THREADS) to[i] = from[i];
  }
}

}  // namespace

const char *pe_card_error(void) { return pe::message; }

int32_t pe_card_versions(int32_t *driver, int32_t *runtime) {
  int versions[2] = {0, 0};
  PE_TRY(cudaDriverGetVersion(&versions[0]));
  PE_TRY(cudaRuntimeGetVersion(&versions[1]));
  *driver = versions[0];
  *runtime = versions[1];
  return PE_OK;
}

int32_t pe_card_count(int32_t *n) {
  int found = 0;
  PE_TRY(cudaGetDeviceCount(&found));
  *n = found;
  return PE_OK;
}

int32_t pe_card_facts_of(int32_t device, pe_card_facts *out) {
  cudaDeviceProp p;
  size_t free = 0, total = 0;
  PE_TRY(cudaGetDeviceProperties(&p, device));
  PE_TRY(cudaSetDevice(device));
  PE_TRY(cudaMemGetInfo(&free, &total));
  snprintf(out->name, sizeof out->name, "%s", p.name);
  out->capability = 10 * p.major + p.minor;
  out->multiprocessors = p.multiProcessorCount;
  out->total = static_cast<int64_t>(total);
  out->free = static_cast<int64_t>(free);
  return PE_OK;
}

const char *pe_card_kernel(int32_t i) { return PE_NAME(kernels)[i].name; }

// -- memory ------------------------------------------------------------------------------------------------------------------------------

int32_t pe_card_new(int32_t device, int64_t bytes, uint64_t *out) {
  void *p = nullptr;
  PE_TRY(cudaSetDevice(device));
  PE_TRY(cudaMalloc(&p, static_cast<size_t>(bytes)));
#if !defined(PE_CHECKED)                                     // where a read of what was never written is found
  if (const cudaError_t error = cudaMemset(p, 0, static_cast<size_t>(bytes))) {
    cudaFree(p);
    return failed("cudaMemset", error);
  }
#endif
  *out = reinterpret_cast<uint64_t>(p);
  return PE_OK;
}

int32_t pe_card_free(int32_t device, uint64_t address) {
  PE_TRY(cudaSetDevice(device));
  PE_TRY(cudaFree(reinterpret_cast<void *>(address)));
  return PE_OK;
}

int32_t pe_card_host_new(int64_t bytes, uint64_t *out) {
  void *p = nullptr;
  PE_TRY(cudaHostAlloc(&p, static_cast<size_t>(bytes), cudaHostAllocDefault));
  memset(p, 0, static_cast<size_t>(bytes));
  *out = reinterpret_cast<uint64_t>(p);
  return PE_OK;
}

int32_t pe_card_host_free(uint64_t address) {
  PE_TRY(cudaFreeHost(reinterpret_cast<void *>(address)));
  return PE_OK;
}

int32_t pe_card_queue_new(int32_t device, pe_card_queue **out) {
  cudaDeviceProp p;
  PE_TRY(cudaSetDevice(device));
  PE_TRY(cudaGetDeviceProperties(&p, device));
  pe_card_queue *q = new pe_card_queue{};
  q->device = device;
  q->users = 1;
  q->capability = 10 * p.major + p.minor;
  q->multiprocessors = p.multiProcessorCount;
  cudaError_t error = cudaStreamCreateWithFlags(&q->stream, cudaStreamNonBlocking);
  for (cudaEvent_t &mark : q->marks)
    if (!error) error = cudaEventCreateWithFlags(&mark, cudaEventDisableTiming);
  if (error) {
    pe_card_queue_free(q);
    return failed("a new queue", error);
  }
  *out = q;
  return PE_OK;
}

int32_t pe_card_set_codebooks(pe_card_queue *queue, uint64_t address) {
  queue->codebooks = reinterpret_cast<const pe_codebooks *>(address);
  return PE_OK;
}

int32_t pe_card_queue_free(pe_card_queue *queue) {
  if (--queue->users) return PE_OK;
  cudaSetDevice(queue->device);
  for (cudaEvent_t mark : queue->marks)
    if (mark) cudaEventDestroy(mark);
  if (queue->stream) cudaStreamDestroy(queue->stream);
  delete queue;
  return PE_OK;
}

int32_t pe_card_wait(pe_card_queue *queue) {
  PE_TRY(cudaSetDevice(queue->device));
  PE_TRY(cudaStreamSynchronize(queue->stream));
  return PE_OK;
}

int32_t pe_card_mark(pe_card_queue *queue, int32_t slot) {
  PE_TRY(cudaSetDevice(queue->device));
  PE_TRY(cudaEventRecord(queue->marks[slot], queue->stream));
  return PE_OK;
}

int32_t pe_card_wait_mark(pe_card_queue *queue, int32_t slot) {
  PE_TRY(cudaSetDevice(queue->device));
  PE_TRY(cudaEventSynchronize(queue->marks[slot]));
  return PE_OK;
}

int32_t pe_card_copy(pe_card_queue *queue, uint64_t to, int64_t to_stride, uint64_t from, int64_t from_stride, int64_t bytes,
                     int64_t rows) {
  if (bytes == 0 || rows == 0) return PE_OK;
  void *target = reinterpret_cast<void *>(to);
  const void *source = reinterpret_cast<const void *>(from);
  const size_t n = static_cast<size_t>(bytes);
  PE_TRY(cudaSetDevice(queue->device));
  if (rows == 1)
    PE_TRY(cudaMemcpyAsync(target, source, n, cudaMemcpyDefault, queue->stream));
  else
    PE_TRY(cudaMemcpy2DAsync(target, static_cast<size_t>(to_stride), source, static_cast<size_t>(from_stride), n,
                             static_cast<size_t>(rows), cudaMemcpyDefault, queue->stream));
  return PE_OK;
}

int32_t pe_card_meet(int32_t device, int32_t other) {
  for (const auto &[own, its] : {std::pair(device, other), std::pair(other, device)}) {
    int can = 0;
    PE_TRY(cudaDeviceCanAccessPeer(&can, own, its));
    if (!can) continue;
    PE_TRY(cudaSetDevice(own));
    const cudaError_t error = cudaDeviceEnablePeerAccess(its, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) cudaGetLastError(); /* forget it */
    else if (error) return failed("cudaDeviceEnablePeerAccess", error);
  }
  return PE_OK;
}

int32_t pe_card_copy_cells(pe_card_queue *queue, uint64_t memory, int64_t heads, int64_t cells, int64_t cell_bytes, const int32_t *runs,
                           int64_t n_runs) {
  PE_TRY(cudaSetDevice(queue->device));
  for (int64_t first = 0; first < n_runs; first += PE_RUNS) {
    const int n = static_cast<int>(n_runs - first < PE_RUNS ? n_runs - first : PE_RUNS);
    CellRuns some{};
    for (int i = 0; i < n; i++) {
      const int32_t *run = runs + 3 * (first + i);
      some.from[i] = run[0];
      some.to[i] = run[1];
      some.count[i] = run[2];
    }
    pe::launch(queue->stream, copy_cells, dim3(n, static_cast<unsigned>(heads)), dim3(COPY_THREADS), 0, reinterpret_cast<char *>(memory),
               cells * cell_bytes, cell_bytes, some);
    PE_TRY(cudaGetLastError());
  }
  return PE_OK;
}

int32_t pe_card_send_changes(pe_card_queue *queue, uint64_t device, const void *table, void *shadow, int64_t bytes) {
  constexpr int64_t PART = 4096;
  const char *now = static_cast<const char *>(table);
  char *before = static_cast<char *>(shadow);
  int64_t begin = -1;                                        // of parts in a row that differ
  PE_TRY(cudaSetDevice(queue->device));
  for (int64_t at = 0;; at += PART) {
    const int64_t n = bytes - at < PART ? bytes - at : PART;
    const bool differs = n > 0 && memcmp(now + at, before + at, static_cast<size_t>(n)) != 0;
    if (differs) {
      memcpy(before + at, now + at, static_cast<size_t>(n));
      if (begin < 0) begin = at;
    } else if (begin >= 0) {                                 // from the shadow, which nobody else writes to
      const int64_t end = at < bytes ? at : bytes;
      PE_TRY(cudaMemcpyAsync(reinterpret_cast<void *>(device + static_cast<uint64_t>(begin)), before + begin,
                             static_cast<size_t>(end - begin), cudaMemcpyDefault, queue->stream));
      begin = -1;
    }
    if (n <= 0) return PE_OK;
  }
}

pe_status pe_fail(pe_stream *s, pe_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(s->message, PE_MAX_MESSAGE, format, args);
  va_end(args);
  return status;
}

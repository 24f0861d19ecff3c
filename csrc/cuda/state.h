/* state.h: what the parts of the runtime share. */
#ifndef PE_CUDA_STATE_H
#define PE_CUDA_STATE_H

#include <atomic>

#include "cuda.h"
#include "runtime.h"

struct pe_card_queue {
  int32_t device;
  std::atomic<int> users;       /* its owner and the programs that use it: the last one that goes frees it, whatever their order */
  int capability, multiprocessors;
  cudaStream_t stream;
  const pe_codebooks *codebooks;
  cudaEvent_t marks[PE_CARD_MARKS];
};

namespace pe {

/* What pe_card_error gives: why the last call of this thread failed. */
extern thread_local char message[PE_MAX_MESSAGE];

/* Note there why a call of the CUDA runtime failed, and return a pe_status or PE_CARD_FAILED. */
int32_t failed(const char *what, cudaError_t error);

}  // namespace pe

/* Leave the function if a call of the CUDA runtime fails. */
#define PE_TRY(call)                                                          \
  do {                                                                        \
    const cudaError_t pe_error = (call);                                      \
    if (pe_error != cudaSuccess) return pe::failed(#call, pe_error);          \
  } while (0)

#endif

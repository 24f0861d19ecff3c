/* count.h: what kernels ask of memory, counted in the checked form (count.cpp).
 *
 * Accesses of the lanes of a warp by the same line, the n-th of each lane since they last met, are one request, as a card would issue
 * it. A request to global memory costs the 32-byte sectors that it touches; one to shared memory one pass over 32 banks of 4 bytes
 * for 32 lanes of up to 4 bytes, 16 lanes of 8 or 8 lanes of 16, and one more for each further word that a bank must give.
 * Flat functions, for Python: tests/support/emulated.py.
 */
#ifndef PE_EMULATE_COUNT_H
#define PE_EMULATE_COUNT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pe_emulated_traffic {
  int64_t requests;        /* of warps */
  int64_t bytes;           /* that threads asked for */
  int64_t sectors;         /* of 32 bytes, by request; of shared memory: passes */
  int64_t conflicts;       /* passes of shared memory beyond the first */
} pe_emulated_traffic;

typedef struct pe_emulated_counts {
  int64_t launches, blocks, barriers, collectives, mma, dp4a, atomics; /* barriers by block, collectives by warp, dp4a by thread */
  pe_emulated_traffic loads, stores, shared_loads, shared_stores;
  int64_t threads, shared_bytes;             /* of a block, the largest */
  int64_t different_loads, different_stores; /* sectors that a launch touched at least once, over all launches */
} pe_emulated_counts;

/* Forget all counts. */
void pe_emulated_reset(void);
/* How many kernels were launched since, and the counts of number i with its name. */
int32_t pe_emulated_kernels(void);
void pe_emulated_kernel(int32_t i, char *name, int32_t name_bytes, pe_emulated_counts *out);
/* What kernel number i loaded and stored in the allocation that holds this address; all zero where that is nothing. */
void pe_emulated_buffer(int32_t i, uint64_t address, pe_emulated_traffic *loads, pe_emulated_traffic *stores);

#ifdef __cplusplus
}

#include "engine.h"

namespace emu {

struct Region;

void count_launch(const Launch &launch);
void count_events(const uint64_t (&events)[int(Event::n_events)]);
void count_different(int64_t loads, int64_t stores);
void count_access(const Lane &lane, bool shared, uintptr_t at, size_t bytes, Access access, const void *site, const Region *region);
/* All lanes of the block, these lanes of the warp, have met: what they do next are new requests. */
void count_together(Block &block);
void count_together(Warp &warp, uint32_t mask);

}  // namespace emu
#endif
#endif

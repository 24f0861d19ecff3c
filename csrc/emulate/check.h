/* check.h: what the engine tells the watcher (check.cpp). In the plain form nobody watches and all of this folds away. */
#ifndef PE_EMULATE_CHECK_H
#define PE_EMULATE_CHECK_H

#include "engine.h"

namespace emu {

constexpr uint32_t FIRST_SERIAL = 2;      /* of a block; in the history of a word of memory 0 is nobody and 1 the host */

#ifdef PE_CHECKED
void begin_launch(const Launch &launch);
void end_launch(const Launch &launch, uint64_t (&events)[int(Event::n_events)]);
void begin_block(Block &block);
void end_block(Block &block, bool failed);
void barrier_opened(Block &block);
void warp_ordered(Warp &warp, uint32_t mask);
void touched(const void *address, size_t bytes, Access access, const void *site);
void copy_started(void *shared, int bytes, const void *site);
void copy_ended(void *shared, int bytes, const void *site);
bool same_line(const void *site, const void *other);
void host_wrote(void *memory, size_t bytes);
#else
inline void begin_launch(const Launch &) {}
inline void end_launch(const Launch &, uint64_t (&)[int(Event::n_events)]) {}
inline void begin_block(Block &) {}
inline void end_block(Block &, bool) {}
inline void barrier_opened(Block &) {}
inline void warp_ordered(Warp &, uint32_t) {}
inline void touched(const void *, size_t, Access, const void *) {}
inline void copy_started(void *, int, const void *) {}
inline void copy_ended(void *, int, const void *) {}
inline bool same_line(const void *, const void *) { return true; }
inline void host_wrote(void *, size_t) {}
#endif

/* -- memory of emulated devices ----------------------------------------------------------------------------------------------- */

/* Device memory, aligned to 256 bytes; null where the device has no more. */
void *device_allocate(int device, size_t bytes);
bool device_free(void *memory);
/* What a device may hold (PYENGINE_EMULATED_MEMORY, in bytes, for each), and how much of it is taken. */
size_t device_bytes();
size_t device_bytes_used(int device);
/* The device whose memory this is, -1 for none. */
int device_of(const void *memory);

/* Whether these bytes, if they begin in device memory, stay within its allocation. */
bool device_holds(const void *memory, size_t bytes);

/* Memory of the host that kernels may use. False: it was registered before / it was not. */
bool host_pinned(void *memory, size_t bytes);
bool host_unpinned(void *memory);

/* Where allocations lie: with red zones around them in the checked form. */
void *zone_allocate(size_t bytes);
void zone_free(void *memory, size_t bytes);

}  // namespace emu
#endif

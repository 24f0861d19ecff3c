/* check.h: memory that launches may use, and what the engine tells the watcher (check.cpp, count.cpp). In the plain form nobody watches. */
#ifndef PE_EMULATE_CHECK_H
#define PE_EMULATE_CHECK_H

#include <cstring>
#include <map>
#include <mutex>

#include "engine.h"

#define SITE __builtin_return_address(0)  /* the code that calls the function that says it */

namespace emu {

/* -- memory (memory.cpp) ---------------------------------------------------------------------------------------------------------- */

constexpr int HOST = -1;
extern std::mutex busy;                   /* held by a launch, and while memory is allocated */

struct Region {
  uintptr_t begin, end;
  int device;                             /* HOST: pinned */
  std::vector<uint8_t> written;           /* of each byte whether anybody wrote it; none: all is taken as written */

  bool was_written(uintptr_t at, size_t bytes) const { return written.empty() || !std::memchr(&written[at - begin], 0, bytes); }
  void wrote(uintptr_t at, size_t bytes) { if (!written.empty()) std::memset(&written[at - begin], 1, bytes); }
};

/* Memory of a device or of the host, aligned to 256 bytes, with red zones around it; null where the device has no more. */
void *allocate(int device, size_t bytes);
bool release(void *memory);
/* Bytes of each device (PYENGINE_EMULATED_MEMORY), and how many are taken. */
size_t device_bytes();
size_t device_bytes_used(int device);
/* The allocation that holds this address, or null. */
Region *allocation(const void *memory);

/* In a launch: the region that holds all of these bytes, or null; the nearest one within 1 MiB, or null. */
void choose_regions(const Launch &launch);
Region *region_of(uintptr_t at, size_t bytes);
const Region *region_near(uintptr_t at);

/* -- watching --------------------------------------------------------------------------------------------------------------------- */

constexpr uint32_t FIRST_SERIAL = 1;      /* of a block: 0 is nobody, in the past of a word of memory */
using Events = const uint64_t (&)[int(Event::n_events)];

#ifdef PE_CHECKED
constexpr bool CHECKED = true;
#define PE_WATCHED(declaration) declaration;
#else
constexpr bool CHECKED = false;
#define PE_WATCHED(declaration) inline declaration {}
#endif
PE_WATCHED(void begin_launch(const Launch &, uint32_t /* first serial */))
PE_WATCHED(void end_launch(Events))
PE_WATCHED(void begin_block(Block &))
PE_WATCHED(void end_block(Block &))
PE_WATCHED(void barrier_opened(Block &))
PE_WATCHED(void warp_met(const Block &, Warp &, uint32_t /* mask */, bool /* orders */))
PE_WATCHED(void touched(const void *, size_t, Access, const void * /* site */))
PE_WATCHED(void copy_started(void *, int, const void * /* site */))
PE_WATCHED(void copy_ended(void *, int, const void * /* site */))
#undef PE_WATCHED

/* Whether two addresses are of one line: a compiler may have doubled it. */
inline bool same_line(const void *site, const void *other) { return !CHECKED || site == other || describe_code(site) == describe_code(other); }

/* Counting (count.cpp). All lanes of the block, or these lanes of the warp, have met: what they do next are new requests. */
void count_launch(const Launch &launch);
void count_access(const Lane &lane, bool shared, uintptr_t at, size_t bytes, Access access, const void *site, const Region *region);
void count_together(Block &block);
void count_together(Warp &warp, uint32_t mask);
void count_end(Events events, int64_t sectors_read, int64_t sectors_written);

}  // namespace emu
#endif

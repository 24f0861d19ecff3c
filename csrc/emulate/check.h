/* check.h: memory that launches may use, and what the engine tells the watcher (check.cpp). In the plain form nobody watches. */
#ifndef PE_EMULATE_CHECK_H
#define PE_EMULATE_CHECK_H

#include <cstdlib>
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

/* What a variable of the environment says. */
inline int64_t number_from(const char *variable, int64_t otherwise) {
  const char *said = std::getenv(variable);
  return said && *said ? std::atoll(said) : otherwise;
}

/* Memory of a device or of the host, aligned to 256 bytes, with red zones around it; null where the device has no more. */
void *allocate(int device, size_t bytes);
bool release(void *memory);
/* Bytes of each device, and how many are taken. */
inline size_t device_bytes() { return size_t(number_from("PYENGINE_EMULATED_MEMORY", int64_t(8) << 30)); }
size_t device_bytes_used(int device);
/* The allocation that holds this address, or null. */
Region *allocation(const void *memory);

/* In a launch: the region that holds all of these bytes, or null; the nearest one within 1 MiB, or null. */
void choose_regions(const Launch &launch);
Region *region_of(uintptr_t at, size_t bytes);
const Region *region_near(uintptr_t at);

/* -- watching --------------------------------------------------------------------------------------------------------------------- */
PE_WATCHED(void begin_launch(const Launch &, uint32_t /* first serial */))
PE_WATCHED(void end_launch(Block &))
PE_WATCHED(void together(Block &)) /* it begins, or a barrier opens */
PE_WATCHED(void warp_met(Warp &, uint32_t /* mask */, bool /* orders */))
/* By kernels' code; whole: at once, as one vector; otherwise as pieces that are aligned to their sizes. */
PE_WATCHED(void touched(const void *, size_t, Access, const void * /* site */, bool /* whole */ = true))
PE_WATCHED(void copy_started(void *, int, const void * /* site */))
PE_WATCHED(void copy_ended(void *, int, const void * /* site */))
}  // namespace emu
#endif

/* check.h: what the engine tells the watcher (check.cpp). In the plain form nobody watches and all of this folds away. */
#ifndef PE_EMULATE_CHECK_H
#define PE_EMULATE_CHECK_H

#include <cstring>

#include "engine.h"

namespace emu {

constexpr uint32_t FIRST_SERIAL = 2;      /* of a block; in the history of a word of memory 0 is nobody and 1 the host */

#ifdef PE_CHECKED
void begin_launch(const Launch &launch, uint32_t first_serial);
void end_launch(const uint64_t (&events)[int(Event::n_events)]);
void begin_block(Block &block);
void end_block(Block &block);
void barrier_opened(Block &block);
void warp_met(const Block &block, Warp &warp, uint32_t mask, bool orders);
void touched(const void *address, size_t bytes, Access access, const void *site);
void copy_started(void *shared, int bytes, const void *site);
void copy_ended(void *shared, int bytes, const void *site);
bool same_line(const void *site, const void *other);
#else
inline void begin_launch(const Launch &, uint32_t) {}
inline void end_launch(const uint64_t (&)[int(Event::n_events)]) {}
inline void begin_block(Block &) {}
inline void end_block(Block &) {}
inline void barrier_opened(Block &) {}
inline void warp_met(const Block &, Warp &, uint32_t, bool) {}
inline void touched(const void *, size_t, Access, const void *) {}
inline void copy_started(void *, int, const void *) {}
inline void copy_ended(void *, int, const void *) {}
inline bool same_line(const void *, const void *) { return true; }
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

/* The host wrote to device memory. */
void host_wrote(const void *memory, size_t bytes);

/* Memory of the host that kernels may use. False: it was registered before / it was not. */
bool host_pinned(const void *memory, size_t bytes);
bool host_unpinned(const void *memory);

/* -- what a launch may use (checked form) ------------------------------------------------------------------------------------------- */

struct Region {
  uintptr_t begin, end;
  uint8_t *written;                       /* a bit for each byte; null: taken as written */
  std::string what;

  bool was_written(uintptr_t at, size_t bytes) const { /* 1 to 16, aligned */
    const uintptr_t i = at - begin;
    if (bytes == 16) return written[i / 8] == 0xff && written[i / 8 + 1] == 0xff;
    return (~written[i / 8] >> i % 8 & ((1u << bytes) - 1)) == 0;
  }
  void wrote(uintptr_t at, size_t bytes) {
    uintptr_t i = at - begin;
    for (; bytes && (i % 8 || bytes < 8); i++, bytes--) written[i / 8] |= uint8_t(1 << i % 8);
    std::memset(written + i / 8, 0xff, bytes / 8);
    for (i += bytes / 8 * 8, bytes %= 8; bytes; i++, bytes--) written[i / 8] |= uint8_t(1 << i % 8);
  }
};

void choose_regions(const Launch &launch);
Region *region_of(uintptr_t at, size_t bytes);  /* that holds all of these bytes, or null */
const Region *region_near(uintptr_t at);        /* the closest one within 1 MiB, or null */

}  // namespace emu
#endif

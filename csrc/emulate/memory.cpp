/* memory.cpp: the memory of emulated devices, and what the host lets kernels use of its own. */
#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "check.h"
#include "types.h"

namespace emu {

namespace {

struct Allocation { size_t bytes; int device; };

std::mutex lock;
std::map<uintptr_t, Allocation> allocations;            /* by first address */
std::map<uintptr_t, size_t> pinned;
std::map<int, size_t> used;

/* The entry of a map by first address that holds this address, or end(). */
template <class Map> auto holding(Map &map, uintptr_t at, size_t (*bytes)(const typename Map::mapped_type &)) {
  auto next = map.upper_bound(at);
  if (next == map.begin()) return map.end();
  --next;
  return at < next->first + bytes(next->second) ? next : map.end();
}
size_t bytes_of(const Allocation &a) { return a.bytes; }

}  // namespace

size_t device_bytes() {
  const char *said = std::getenv("PYENGINE_EMULATED_MEMORY");
  return said && *said ? std::strtoull(said, nullptr, 10) : size_t(8) << 30;
}

size_t device_bytes_used(int device) {
  std::lock_guard<std::mutex> hold(lock);
  return used[device];
}

void *device_allocate(int device, size_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  if (bytes > device_bytes() || used[device] > device_bytes() - bytes) return nullptr;
  void *p = zone_allocate(bytes);
  if (!p) return nullptr;
  allocations[reinterpret_cast<uintptr_t>(p)] = {bytes, device};
  used[device] += bytes;
  return p;
}

bool device_free(void *memory) {
  std::lock_guard<std::mutex> hold(lock);
  auto found = allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == allocations.end()) return false;
  used[found->second.device] -= found->second.bytes;
  zone_free(memory, found->second.bytes);
  allocations.erase(found);
  return true;
}

int device_of(const void *memory) {
  std::lock_guard<std::mutex> hold(lock);
  auto found = holding(allocations, reinterpret_cast<uintptr_t>(memory), bytes_of);
  return found == allocations.end() ? -1 : found->second.device;
}

bool device_holds(const void *memory, size_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  auto found = holding(allocations, at, bytes_of);
  return found == allocations.end() || bytes <= found->first + found->second.bytes - at;
}

bool host_pinned(void *memory, size_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  return pinned.emplace(reinterpret_cast<uintptr_t>(memory), bytes).second;
}
bool host_unpinned(void *memory) {
  std::lock_guard<std::mutex> hold(lock);
  return pinned.erase(reinterpret_cast<uintptr_t>(memory)) == 1;
}

uint32_t atomic_load_4(const void *at) { return __atomic_load_n(static_cast<const uint32_t *>(at), __ATOMIC_RELAXED); }
uint64_t atomic_load_8(const void *at) { return __atomic_load_n(static_cast<const uint64_t *>(at), __ATOMIC_RELAXED); }
uint32_t atomic_swap_if_4(void *at, uint32_t expected, uint32_t desired) {
  __atomic_compare_exchange_n(static_cast<uint32_t *>(at), &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
uint64_t atomic_swap_if_8(void *at, uint64_t expected, uint64_t desired) {
  __atomic_compare_exchange_n(static_cast<uint64_t *>(at), &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

#ifndef PE_CHECKED
void *zone_allocate(size_t bytes) {
  void *p = nullptr;
  return posix_memalign(&p, 256, bytes) ? nullptr : p;
}
void zone_free(void *memory, size_t) { std::free(memory); }
#endif

}  // namespace emu

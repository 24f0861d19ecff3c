/* memory.cpp: the memory of emulated devices, and what the host lets kernels use of its own. */
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "check.h"
#include "types.h"

namespace emu {

namespace {

constexpr size_t RED_ZONE = 4096;

struct Allocation {
  int device;
  size_t bytes;
  std::vector<uint8_t> written;                         /* bits, in the checked form */
};

std::mutex lock;
std::map<uintptr_t, Allocation> allocations;            /* by first address */
std::map<uintptr_t, size_t> pinned;
std::map<int, size_t> used;
bool changed;                                           /* either of the first two, since regions were listed */
std::vector<Region> regions;                            /* of the launch, by address; they do not overlap */
size_t last_region;

/* The allocation that holds this address, or end(). */
std::map<uintptr_t, Allocation>::iterator holding(uintptr_t at) {
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return allocations.end();
  --next;
  return at < next->first + next->second.bytes ? next : allocations.end();
}

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
  void *p = nullptr;
  if (posix_memalign(&p, 256, bytes + 2 * RED_ZONE)) return nullptr;
  std::memset(p, 0xff, bytes + 2 * RED_ZONE); /* as floats: NaN */
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + RED_ZONE;
  Allocation &a = allocations[at] = {device, bytes, {}};
#ifdef PE_CHECKED
  a.written.resize(bytes / 8 + 1);
#endif
  used[device] += a.bytes;
  changed = true;
  return reinterpret_cast<void *>(at);
}

bool device_free(void *memory) {
  std::lock_guard<std::mutex> hold(lock);
  auto found = allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == allocations.end()) return false;
  used[found->second.device] -= found->second.bytes;
  allocations.erase(found);
  changed = true;
  std::free(static_cast<char *>(memory) - RED_ZONE);
  return true;
}

int device_of(const void *memory) {
  std::lock_guard<std::mutex> hold(lock);
  auto found = holding(reinterpret_cast<uintptr_t>(memory));
  return found == allocations.end() ? -1 : found->second.device;
}

bool device_holds(const void *memory, size_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  auto found = holding(at);
  return found == allocations.end() || bytes <= found->first + found->second.bytes - at;
}

void host_wrote(const void *memory, size_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  auto found = holding(reinterpret_cast<uintptr_t>(memory));
  if (found == allocations.end() || found->second.written.empty()) return;
  Allocation &a = found->second;
  Region{found->first, found->first + a.bytes, a.written.data(), {}}.wrote(reinterpret_cast<uintptr_t>(memory), bytes);
}

bool host_pinned(const void *memory, size_t bytes) {
  std::lock_guard<std::mutex> hold(lock);
  changed = true;
  return pinned.emplace(reinterpret_cast<uintptr_t>(memory), bytes).second;
}
bool host_unpinned(const void *memory) {
  std::lock_guard<std::mutex> hold(lock);
  changed = true;
  return pinned.erase(reinterpret_cast<uintptr_t>(memory)) == 1;
}

/* -- regions ------------------------------------------------------------------------------------------------------------------------- */

void choose_regions(const Launch &launch) {
  std::lock_guard<std::mutex> hold(lock);
  if (launch.ranges.empty() && !changed) return;
  changed = !launch.ranges.empty();
  last_region = 0;
  std::vector<Region> found;
  for (const Range &r : launch.ranges)
    if (r.bytes) found.push_back({reinterpret_cast<uintptr_t>(r.begin), reinterpret_cast<uintptr_t>(r.begin) + r.bytes, nullptr, "a buffer"});
  if (launch.ranges.empty()) {
    for (auto &[begin, a] : allocations)
      found.push_back({begin, begin + a.bytes, a.written.data(), "an allocation of device " + std::to_string(a.device)});
    for (auto &[begin, bytes] : pinned) found.push_back({begin, begin + bytes, nullptr, "pinned memory of the host"});
  }
  std::sort(found.begin(), found.end(), [](const Region &a, const Region &b) { return a.begin < b.begin; });
  regions.clear();
  for (Region &r : found) { /* buffers may be parts of each other */
    if (!regions.empty() && r.begin < regions.back().end) regions.back().end = std::max(regions.back().end, r.end);
    else regions.push_back(std::move(r));
  }
}

Region *region_of(uintptr_t at, size_t bytes) {
  if (last_region >= regions.size() || at < regions[last_region].begin || at >= regions[last_region].end) {
    auto next = std::upper_bound(regions.begin(), regions.end(), at, [](uintptr_t a, const Region &r) { return a < r.begin; });
    if (next == regions.begin()) return nullptr;
    last_region = size_t(next - regions.begin()) - 1;
  }
  Region &r = regions[last_region];
  return at >= r.begin && at < r.end && bytes <= r.end - at ? &r : nullptr;
}

const Region *region_near(uintptr_t at) {
  const Region *best = nullptr;
  uintptr_t closest = 1 << 20;
  for (const Region &r : regions) {
    const uintptr_t away = at < r.begin ? r.begin - at : at >= r.end ? at - r.end : 0;
    if (away < closest) {
      closest = away;
      best = &r;
    }
  }
  return best;
}

/* -- atomics, where no sanitizer rewrites them ---------------------------------------------------------------------------------------- */

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

}  // namespace emu

/* device.cpp: see device.h. */
#include "device.h"

#include <chrono>
#include <cstdio>
#include <cstring>

#include "../engine.h"

namespace {

const pe_metal_entry *entry(int32_t number) {
  for (const pe_metal_entry *const *table = pe_metal_tables; *table; table++)
    for (const pe_metal_entry *e = *table; e->name; e++)
      if (number-- == 0) return e;
  return nullptr;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

bool run(const pe_metal_launch &l, const pe_metal_entry &e) {
  void *buffers[PE_METAL_BUFFERS];
  for (int i = 0; i < PE_METAL_BUFFERS; i++) buffers[i] = reinterpret_cast<void *>(l.buffers[i]);
  e.set_constants(l.constants);
  emu::Launch launch;
  launch.kernel = e.code;
  launch.grid = {l.grid[0], l.grid[1], l.grid[2]};
  launch.block = {l.threads[0], l.threads[1], l.threads[2]};
  launch.shared_bytes = l.shared_bytes;
  launch.body = [&] { e.thread(buffers); };
  launch.arguments = buffers;
  launch.argument_bytes = sizeof buffers;
  for (int i = 0; i < PE_METAL_BUFFERS; i++)
    if (buffers[i]) launch.ranges.push_back({buffers[i], static_cast<size_t>(l.bytes[i])});
  return emu::launch(launch);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t pe_metal_find(const char *name) {
  int32_t number = 0;
  for (const pe_metal_entry *e; (e = entry(number)); number++)
    if (!strcmp(e->name, name)) return number;
  return -1;
}

__attribute__((visibility("default"))) int32_t pe_metal_run(pe_metal_launch *launches, int32_t n, char *message, int32_t message_bytes) {
  snprintf(message, (size_t)message_bytes, "%s", "");
  for (int32_t i = 0; i < n; i++) {
    const pe_metal_entry *e = entry(launches[i].kernel);
    const double start = now();
    if (!e || !run(launches[i], *e)) {
      snprintf(message, (size_t)message_bytes, "%s", e ? emu::last_error().c_str() : "no such kernel");
      return i;
    }
    launches[i].seconds = now() - start;
  }
  return n;
}
}

/* device.h: a Metal device that is emulated: kernels by name, and lists of launches that are replayed. Flat functions for Python
 * (cffi reads the declarations below, so they stay plain). Memory is the caller's.
 */
#ifndef PE_EMULATE_METAL_DEVICE_H
#define PE_EMULATE_METAL_DEVICE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { PE_METAL_BUFFERS = 31, PE_METAL_CONSTANTS = 16 };

/* One dispatch: a kernel, values of its library's function constants (the bits of a float, or 0 or 1), its buffers (null where there is
 * none) with the bytes that it may touch from there, threadgroups of the grid, threads of a threadgroup, bytes of threadgroup memory. */
typedef struct pe_metal_launch {
  int32_t kernel;
  uint32_t grid[3], threads[3];
  uint32_t shared_bytes;
  int32_t constants[16];
  uint64_t buffers[31];
  int64_t bytes[31];
  double seconds;                /* of the last run */
} pe_metal_launch;

/* The number of a kernel, -1 if there is none of that name. */
int32_t pe_metal_find(const char *name);

/* Run launches one after the other. Returns how many were run; message says why the next one failed ("" where all were). */
int32_t pe_metal_run(pe_metal_launch *launches, int32_t n, char *message, int32_t message_bytes);

#ifdef __cplusplus
}

/* One kernel: a thunk that is one thread of it, and what sets its library's function constants. Generated tables hold these. */
struct pe_metal_entry {
  const char *name;
  const void *code;
  void (*thread)(void *const *buffers);
  void (*set_constants)(const int32_t *values);
};
extern const pe_metal_entry *const pe_metal_tables[]; /* null at the end; each ends with a null name */
#endif
#endif

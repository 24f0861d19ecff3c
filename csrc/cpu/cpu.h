/* cpu.h: what every file of CPU kernels includes. A file that uses PE_KERNEL, PE_SCRATCH or PE_NAME is compiled once per
 * instruction set with -DPE_ISA=<name>; PE_NAME gives its functions a name of their own. The others (pack.c, pool.c, program.c, isa.c)
 * are compiled once. */
#ifndef PE_CPU_H
#define PE_CPU_H

#include "../pe.h"

#define PE_CAT3_(a, b, c) a##b##c
#define PE_CAT3(a, b, c) PE_CAT3_(a, b, c)
#define PE_NAME(x) PE_CAT3(PE_CAT3(pe_, PE_ISA, _), x, )

/* PE_KERNEL(cpu, rms_norm)(const pe_tensor *x, ...) { ... }        the named prototype is in gen/kernels.h
 * PE_SCRATCH(cpu, rms_norm)(const pe_args *a, const void *params, int32_t n_threads) { return bytes; }
 *   optional; called when a program is planned, with the largest shapes and without data.
 * The first argument is the backend, which is the name of the folder: codegen collects these lines into gen/cpu/table.c. */
#define PE_KERNEL(backend, op) PE_CAT3(PE_KERNEL_OF_, backend, )(op)
#define PE_SCRATCH(backend, op) PE_CAT3(PE_SCRATCH_OF_, backend, )(op)
#define PE_KERNEL_OF_cpu(op) pe_status PE_NAME(op)
#define PE_SCRATCH_OF_cpu(op) int64_t PE_NAME(PE_CAT3(op, _, scratch))

#include "../gen/kernels.h" /* generated: parameter structs and prototypes for this PE_ISA */
#include "simd.h"

static inline int64_t pe_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t pe_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t pe_round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

#endif

/* guard.h: what the address sanitizer is told of memory that it does not see for itself: arenas, weights and caches are one
 * allocation each, and it does not know vector instructions with masks. Nothing at all in other builds. */
#ifndef PE_GUARD_H
#define PE_GUARD_H

#include <stddef.h>

#if defined(__SANITIZE_ADDRESS__)
#define PE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PE_ASAN 1
#endif
#endif

#if defined(PE_ASAN)
#include <sanitizer/asan_interface.h>
#ifdef __cplusplus
extern "C" {
#endif
void __asan_loadN(void *p, ptrdiff_t n);
void __asan_storeN(void *p, ptrdiff_t n);
#ifdef __cplusplus
}
#endif
#define PE_READS(p, n) __asan_loadN((void *)(p), (ptrdiff_t)(n))
#define PE_WRITES(p, n) __asan_storeN((void *)(p), (ptrdiff_t)(n))
#else
#define PE_READS(p, n) ((void)0)
#define PE_WRITES(p, n) ((void)0)
#endif

#endif

/* watch.h: files that are mapped and may lose bytes, because another program cuts them or a disk fails. setup.py reads these
 * declarations for cffi, so they stay plain.
 *
 * A read of bytes that are gone raises SIGBUS, which ends a process. For memory that is watched it does not: from the page of the
 * read on to the end, the mapping becomes zeros, the loss is noted, and the read goes on. Whoever read asks afterwards. Other faults
 * go to the handler that was there before.
 */
#ifndef PE_WATCH_H
#define PE_WATCH_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Watch a mapping; returns its number, or -1 where nothing can be watched (Windows, which does not let mapped files be cut), or
 * where all numbers are in use. */
PE_API int32_t pe_watch(const void *start, int64_t n_bytes);

/* Whether bytes of it were lost since. */
PE_API int32_t pe_watch_lost(int32_t number);

/* End watching: before the mapping goes, for its addresses may then be somebody else's. Its number is free again. */
PE_API void pe_watch_end(int32_t number);

#ifdef __cplusplus
}
#endif
#endif

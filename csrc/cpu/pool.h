/* pool.h: a persistent team of threads that runs one job at a time. Members spin briefly between jobs, then sleep. */
#ifndef PE_POOL_H
#define PE_POOL_H

#include "../pe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pe_pool pe_pool;
typedef void (*pe_job)(void *context, int ith, int nth);

pe_pool *pe_pool_new(int n_threads); /* null when threads cannot be made */
void pe_pool_free(pe_pool *pool);
int pe_pool_size(const pe_pool *pool);
void pe_pool_run(pe_pool *pool, pe_job job, void *context); /* every member calls job; returns when all have */
void pe_pool_barrier(pe_pool *pool);                        /* inside a job only */

#ifdef __cplusplus
}
#endif
#endif

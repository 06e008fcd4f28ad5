/* The threads that share a pass, and the barrier at which they meet. */
#ifndef TPRO_NB_TEAM_H
#define TPRO_NB_TEAM_H

#include <sched.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#define omp_get_wtime() 0.
#endif

#define SPINS 3000 /* then the rest of the time slice is given away */

typedef struct {
    int count; /* threads that have arrived */
    int sense; /* turns over when all have */
    int pad[30];
} Barrier;

typedef struct {
    int index, count; /* this thread, and how many came: fewer than asked for where
                         OMP_THREAD_LIMIT or OMP_DYNAMIC says so */
    int sense;        /* what the barrier's sense will be when all have arrived */
    Barrier *barrier;
} Thread;

static inline void meet(Thread *me) {
    Barrier *barrier = me->barrier;
    me->sense ^= 1;
    if (me->count == 1)
        return;
    if (__atomic_add_fetch(&barrier->count, 1, __ATOMIC_ACQ_REL) == me->count) {
        barrier->count = 0;
        __atomic_store_n(&barrier->sense, me->sense, __ATOMIC_RELEASE);
        return;
    }
    /* Spinning is quicker than sleeping. It ends in yielding, which spares a busy machine. */
    for (int tries = 0; __atomic_load_n(&barrier->sense, __ATOMIC_ACQUIRE) != me->sense; tries++)
        if (tries > SPINS)
            sched_yield();
}

#endif

/* A stack of decoder layers as Python hands it over. The structs are mirrored in 12c, field for
   field. */
#ifndef TPRO_NB_MODEL_H
#define TPRO_NB_MODEL_H

#include "lanes.h"
#include "team.h"

typedef struct {
    const float *input_norm, *query_norm, *key_norm, *post_norm; /* null where there is none */
    const Weight *qkv, *output, *gate_up, *down;                 /* packed, see product.h */
    Weight *keys;                                                /* [kv_heads][head_dim][slots] */
    Weight *values;                                              /* [kv_heads][slots][head_dim] */
} Layer;

typedef struct {
    int hidden, intermediate, heads, kv_heads, head_dim;
    int slots; /* of the cache */
    int layers, threads;
    int rows;   /* the most that one call takes */
    int width;  /* what attention reads: `hidden`, or twice that beside an embedding */
    int n_taps; /* layers whose output is kept */
    float eps;
    const float *cosines, *sines; /* [slots][head_dim/2] */
    const float *final_norm;      /* null: none */
    const Layer *layer;
    float *qkv, *gate_up; /* scratch: [rows][outputs of the product] */
    float *scores;        /* scratch: for every thread twice the scores of a group of heads */
    Weight *own;          /* scratch: for every thread [rows][width], normalised rows */
    Weight *shared;       /* scratch: [rows][..], what the next product reads */
    const int *taps;
    float *tapped;   /* [rows of the pass][n_taps][hidden] */
    double *seconds; /* null, or the first thread's time by section */
    Barrier barrier;
} Model;

/* One row of a pass: where it stands, where its key and value go, and what it sees. */
enum {
    POSITION,
    SLOT,
    BASE,     /* first slot of its text */
    PAST,     /* slots in sight from there on: the text so far */
    N_OTHERS, /* further slots in sight: for a tree node its ancestors and itself */
    OTHERS,   /* the first of them */
};

typedef struct {
    const int *table; /* [count][stride] */
    int count, stride;
} Rows;

static inline const int *row_of(const Rows *rows, int i) {
    return rows->table + i * rows->stride;
}

/* A head, or any packed matrix whose largest outputs are asked for. */
typedef struct {
    const Weight *weights;
    float *scores;   /* [rows][n_out], room for the outputs */
    int n_out, real; /* the first `real` outputs count, the rest is padding */
} Head;

static inline void start_team(Model *model) {
    model->barrier.count = model->barrier.sense = 0;
}

static inline Thread join_team(Model *model) {
    return (Thread){omp_get_thread_num(), omp_get_num_threads(), 0, &model->barrier};
}

static inline Weight *own_rows(const Model *model, const Thread *me) {
    return model->own + (size_t)me->index * model->rows * model->width;
}

/* Sections of a pass; `seconds` holds the time of the last mark, then a sum for each. */
enum { LAST_MARK, PRODUCTS, ATTENTION, HEAD };

static inline void mark(Model *model, const Thread *me, int section) {
    if (me->index || !model->seconds)
        return;
    double now = omp_get_wtime();
    model->seconds[section] += now - model->seconds[LAST_MARK];
    model->seconds[LAST_MARK] = now;
}

/* One row and one group of heads that share keys; `scores` is the thread's own. */
void attend(const Model *model, const Layer *layer, const float *query, Weight *out, int group,
            const int *row, float *scores);

/* A thread's share of the whole stack. x: [rows][hidden], changed in place; `beside`: null, or what
   EAGLE-3's attention reads before the state, [rows][hidden]. */
void run_layers(Model *model, float *x, const Weight *beside, const Rows *rows, Thread *me);

#endif

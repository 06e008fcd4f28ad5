/* What Python calls for the draft's turn: the whole expansion of a tree. */
#include "model.h"
#include "product.h"
#include "rows.h"

typedef struct {
    const Weight *embed; /* [V][hidden] */
    const Weight *fc;    /* packed; EAGLE-1 only, and `bias` */
    const float *bias;
    Weight *input;           /* scratch: [rows][2 * hidden] */
    const float *embed_norm; /* EAGLE-3 only, and `norm` */
    const float *norm;       /* before the head */
    Head head;
    const int *hot; /* the token behind each output of the head */
} Draft;

typedef struct {
    const int *tokens;
    const float *features; /* [..][hidden] */
    const int *from;       /* which feature each token goes with */
} DraftInput;

typedef struct { /* everything proposed: k entries, then k*k for every further level */
    int *parent; /* place in the pool, -1: the root; children in the frontier's order */
    int *token;
    double *log_confidence;
} Pool;

/* The k best log-probabilities of a row of outputs, which are used up. */
static void best_of(float *scores, const Head *head, int k, int *ids, float *logp) {
    int n = head->n_out;
    for (int j = head->real; j < n; j++)
        scores[j] = -1e38f;
    float most = scores[argmax(scores, n)];
    Floats sums = {0};
    for (int j = 0; j < n; j += LANES)
        sums += exp_lanes(load_floats(scores + j) - most);
    float sum = sum_of_lanes(sums);
    for (int rank = 0; rank < k; rank++) {
        int id = argmax(scores, n);
        ids[rank] = id;
        logp[rank] = scores[id] - most - logf(sum);
        scores[id] = -1e38f;
    }
}

/* EAGLE-1 reads token and feature through fc, whose sum begins with the bias. */
static void mix_input(Model *model, const Draft *draft, const DraftInput *in, int n_rows, float *x,
                      Thread *me) {
    int hidden = model->hidden;
    for (int i = me->index; i < n_rows; i += me->count) {
        Weight *row = draft->input + (size_t)i * 2 * hidden;
        memcpy(row, draft->embed + (size_t)in->tokens[i] * hidden, hidden * sizeof(Weight));
        norm_row(in->features + (size_t)in->from[i] * hidden, 0, row + hidden, hidden, 0);
        memcpy(x + (size_t)i * hidden, draft->bias, hidden * sizeof(float));
    }
    meet(me);
    product(draft->input, draft->fc, x, n_rows, hidden, 2 * hidden, 1, me);
    meet(me);
}

/* EAGLE-3 begins with the feature; its attention reads the normalised embedding beside it. */
static void lay_beside(Model *model, const Draft *draft, const DraftInput *in, int n_rows, float *x,
                       Thread *me) {
    int hidden = model->hidden;
    for (int i = me->index; i < n_rows; i += me->count) {
        float embedding[hidden];
        for (int d = 0; d < hidden; d++)
            embedding[d] = to_float(draft->embed[(size_t)in->tokens[i] * hidden + d]);
        norm_row(embedding, draft->embed_norm, draft->input + (size_t)i * hidden, hidden,
                 model->eps);
        memcpy(x + (size_t)i * hidden, in->features + (size_t)in->from[i] * hidden,
               hidden * sizeof(float));
    }
    meet(me);
}

/* One pass of the draft: hidden states in x and, below the rows from `start` on, the k best. */
static void draft_pass(Model *model, const Draft *draft, const DraftInput *in, const Rows *rows,
                       float *x, int start, int k, int *ids, float *logp, Thread *me) {
    int hidden = model->hidden, asked = rows->count - start;
    const Head *head = &draft->head;
    Weight *own = own_rows(model, me);
    if (draft->embed_norm) {
        lay_beside(model, draft, in, rows->count, x, me);
        run_layers(model, x, draft->input, rows, me);
    } else {
        mix_input(model, draft, in, rows->count, x, me);
        run_layers(model, x, 0, rows, me);
    }
    for (int i = 0; i < asked; i++)
        norm_row(x + (size_t)(start + i) * hidden, draft->norm, own + (size_t)i * hidden, hidden,
                 model->eps);
    product(own, head->weights, head->scores, asked, head->n_out, hidden, 0, me);
    meet(me);
    for (int i = me->index; i < asked; i += me->count)
        best_of(head->scores + (size_t)i * head->n_out, head, k, ids + i * k, logp + i * k);
    meet(me);
}

/* Enter a level's proposals, k for every node of the frontier, which is null for the root's. */
static void enter(const Pool *pool, int begin, int end, int k, const int *frontier, const int *ids,
                  const float *logp, const int *hot) {
    for (int i = begin; i < end; i++) {
        int parent = frontier ? frontier[(i - begin) / k] : -1;
        pool->parent[i] = parent;
        pool->token[i] = hot[ids[i - begin]];
        pool->log_confidence[i] = logp[i - begin] + (parent < 0 ? 0 : pool->log_confidence[parent]);
    }
}

/* The k surest of a level, the earlier one of equals first. */
static void choose_frontier(const Pool *pool, int begin, int end, int k, int *frontier) {
    char taken[end - begin];
    memset(taken, 0, end - begin);
    for (int j = 0; j < k; j++) {
        int surest = -1;
        for (int i = begin; i < end; i++) {
            if (taken[i - begin])
                continue;
            if (surest < 0 || pool->log_confidence[i] > pool->log_confidence[surest])
                surest = i;
        }
        frontier[j] = surest;
        taken[surest - begin] = 1;
    }
}

EXPORT void propose(Model *model, const Draft *draft, const DraftInput *accepted, const Rows *rows,
                    float *hidden, int depth, int k, const Pool *pool) {
    const int *root = row_of(rows, rows->count - 1);
    int past = root[POSITION] + 1; /* slots in sight of every drafted node: the root is read */
    int slot = root[SLOT] + 1;     /* the next free one */
    int stride = OTHERS + depth;
    int frontier[k], tokens[k], from[k], ids[k * k];
    float logp[k * k];
    int even[k * stride], odd[k * stride];
    int *tables[2] = {even, odd}; /* what this level's rows see, and the one before */
    float *states[2] = {hidden, hidden + (size_t)model->rows * model->hidden};
    start_team(model);
#pragma omp parallel num_threads(model->threads)
    {
        Thread me = join_team(model);
        int start = rows->count - 1; /* only the root is continued */
        draft_pass(model, draft, accepted, rows, states[0], start, k, ids, logp, &me);
        int begin = 0, end = k; /* this level's entries in the pool */
        for (int level = 1;; level++) {
            int *table = tables[level & 1], *above = tables[~level & 1];
            if (me.index == 0) {
                enter(pool, begin, end, k, level == 1 ? 0 : frontier, ids, logp, draft->hot);
            }
            if (level == depth)
                break;
            if (me.index == 0) {
                choose_frontier(pool, begin, end, k, frontier);
                for (int j = 0; j < k; j++) {
                    int parent = (frontier[j] - begin) / k; /* its row in the pass before */
                    int *row = table + j * stride;
                    tokens[j] = pool->token[frontier[j]];
                    from[j] = level == 1 ? start : parent;
                    row[POSITION] = past + level - 1;
                    row[SLOT] = slot + (level - 1) * k + j;
                    row[BASE] = root[BASE];
                    row[PAST] = past;
                    row[N_OTHERS] = level; /* its ancestors below the root, and itself */
                    if (level > 1)
                        memcpy(row + OTHERS, above + parent * stride + OTHERS,
                               (level - 1) * sizeof(int));
                    row[OTHERS + level - 1] = row[SLOT];
                }
            }
            meet(&me);
            DraftInput in = {tokens, states[~level & 1], from};
            Rows drafted = {table, k, stride};
            draft_pass(model, draft, &in, &drafted, states[level & 1], 0, k, ids, logp, &me);
            begin = end;
            end += k * k;
        }
    }
}

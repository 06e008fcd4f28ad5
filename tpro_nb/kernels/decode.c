/* What Python calls for a target's pass. */
#include "model.h"
#include "product.h"
#include "rows.h"

/* Hidden states after the stack, in place. */
EXPORT void forward(Model *model, float *x, const Weight *beside, const Rows *rows) {
    start_team(model);
#pragma omp parallel num_threads(model->threads)
    {
        Thread me = join_team(model);
        run_layers(model, x, beside, rows, &me);
    }
}

/* From tokens to features (x, [rows][hidden]), and to the argmax of the outputs of every row from
   `start` on. */
EXPORT void greedy(Model *model, const Weight *embed, const int *tokens, const Rows *rows,
                   const Head *head, int start, float *x, int *best) {
    int hidden = model->hidden, n_rows = rows->count, asked = n_rows - start;
    start_team(model);
#pragma omp parallel num_threads(model->threads)
    {
        Thread me = join_team(model);
        Weight *own = own_rows(model, &me);
        for (int i = me.index; i < n_rows; i += me.count)
            for (int d = 0; d < hidden; d++)
                x[(size_t)i * hidden + d] = to_float(embed[(size_t)tokens[i] * hidden + d]);
        meet(&me);
        if (me.index == 0 && model->seconds)
            model->seconds[LAST_MARK] = omp_get_wtime();
        run_layers(model, x, 0, rows, &me);
        mark(model, &me, PRODUCTS);
        for (int i = 0; i < asked; i++)
            norm_row(x + (size_t)(start + i) * hidden, 0, own + (size_t)i * hidden, hidden, 0);
        product(own, head->weights, head->scores, asked, head->n_out, hidden, 0, &me);
        meet(&me);
        for (int i = me.index; i < asked; i += me.count)
            best[i] = argmax(head->scores + (size_t)i * head->n_out, head->real);
        meet(&me);
        mark(model, &me, HEAD);
    }
}

/* RMS norm of every row, in the weights' type. */
EXPORT void norms(const float *x, const float *norm, Weight *y, int n_rows, int n, float eps) {
    for (int i = 0; i < n_rows; i++)
        norm_row(x + (size_t)i * n, norm, y + (size_t)i * n, n, eps);
}

/* Copy slots of the cache, in ascending order and each to a lower one. */
EXPORT void move(Model *model, const int *from, const int *to, int n) {
    size_t head_dim = model->head_dim, slots = model->slots;
    for (int i = 0; i < n; i++)
        for (int layer = 0; layer < model->layers; layer++)
            for (int head = 0; head < model->kv_heads; head++) {
                Weight *keys = model->layer[layer].keys + head * head_dim * slots;
                Weight *values = model->layer[layer].values + head * slots * head_dim;
                for (size_t d = 0; d < head_dim; d++)
                    keys[d * slots + to[i]] = keys[d * slots + from[i]];
                memcpy(values + to[i] * head_dim, values + from[i] * head_dim,
                       head_dim * sizeof(Weight));
            }
}

EXPORT void matmul(const Weight *x, const Weight *w, float *y, int n_rows, int n_out, int n_in,
                   int threads) {
#pragma omp parallel num_threads(threads)
    {
        Thread me = {omp_get_thread_num(), omp_get_num_threads(), 0, 0};
        product(x, w, y, n_rows, n_out, n_in, 0, &me);
    }
}

/* The argmax of every row's outputs. */
EXPORT void best(const Weight *x, const Head *head, int n_rows, int n_in, int *out, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Thread me = {omp_get_thread_num(), omp_get_num_threads(), 0, 0};
        product(x, head->weights, head->scores, n_rows, head->n_out, n_in, 0, &me);
#pragma omp barrier
        for (int i = me.index; i < n_rows; i += me.count)
            out[i] = argmax(head->scores + (size_t)i * head->n_out, head->real);
    }
}

#include "model.h"
#include "product.h"
#include "rows.h"

/* Norms, rotates and caches what the first product gave: one head of one row after the other. */
static void place_heads(const Model *model, const Layer *layer, const Rows *rows,
                        const Thread *me) {
    int heads = model->heads, kv_heads = model->kv_heads, head_dim = model->head_dim;
    int n_qkv = (heads + 2 * kv_heads) * head_dim;
    int rotated = heads + kv_heads; /* heads of a row that are rotated: queries, then keys */
    for (int job = me->index; job < rows->count * rotated; job += me->count) {
        int i = job / rotated, head = job % rotated;
        const int *row = row_of(rows, i);
        size_t angle = (size_t)row[POSITION] * head_dim / 2;
        float *x = model->qkv + (size_t)i * n_qkv + head * head_dim;
        rotate_head(x, head < heads ? layer->query_norm : layer->key_norm, model->cosines + angle,
                    model->sines + angle, head_dim, model->eps);
        if (head < heads)
            continue;
        int kv_head = head - heads, slot = row[SLOT];
        const float *value = x + kv_heads * head_dim;
        for (int d = 0; d < head_dim; d++) {
            layer->keys[((size_t)kv_head * head_dim + d) * model->slots + slot] = to_weight(x[d]);
            layer->values[((size_t)kv_head * model->slots + slot) * head_dim + d] =
                to_weight(value[d]);
        }
    }
}

static void attend_rows(const Model *model, const Layer *layer, const Rows *rows,
                        const Thread *me) {
    int heads = model->heads, kv_heads = model->kv_heads, head_dim = model->head_dim;
    int group = heads / kv_heads; /* query heads that share keys */
    int n_qkv = (heads + 2 * kv_heads) * head_dim;
    float *scores = model->scores + (size_t)me->index * 2 * group * model->slots;
    for (int job = me->index; job < rows->count * kv_heads; job += me->count) {
        int i = job / kv_heads, kv_head = job % kv_heads;
        int first = kv_head * group * head_dim;
        attend(model, layer, model->qkv + (size_t)i * n_qkv + first,
               model->shared + (size_t)i * heads * head_dim + first, kv_head, row_of(rows, i),
               scores);
    }
}

/* silu(gate) * up. They take turns every 16 outputs, so this thread has computed both itself. */
static void gate_rows(const Model *model, int n_rows, const Thread *me) {
    int n_blocks = model->intermediate / LANES;
    int first = (long)n_blocks * me->index / me->count;
    int last = (long)n_blocks * (me->index + 1) / me->count;
    for (int i = 0; i < n_rows; i++)
        for (int block = first; block < last; block++) {
            const float *at =
                model->gate_up + (size_t)i * 2 * model->intermediate + block * 2 * LANES;
            Floats gate = load_floats(at), up = load_floats(at + LANES);
            Floats gated = gate / (1.f + exp_lanes(-gate)) * up;
            store_weights(model->shared + (size_t)i * model->intermediate + block * LANES, gated);
        }
}

static void keep_taps(const Model *model, const float *x, int layer, int n_rows, const Thread *me) {
    size_t hidden = model->hidden;
    for (int tap = 0; tap < model->n_taps; tap++)
        if (model->taps[tap] == layer)
            for (int i = me->index; i < n_rows; i += me->count)
                memcpy(model->tapped + ((size_t)i * model->n_taps + tap) * hidden, x + i * hidden,
                       hidden * sizeof(float));
}

static void norm_last(const Model *model, float *x, int n_rows, const Thread *me) {
    for (int i = me->index; i < n_rows; i += me->count) {
        float *state = x + (size_t)i * model->hidden;
        float scale = inverse_rms(state, model->hidden, model->eps);
        for (int d = 0; d < model->hidden; d++)
            state[d] *= scale * model->final_norm[d];
    }
}

void run_layers(Model *model, float *x, const Weight *beside, const Rows *rows, Thread *me) {
    int hidden = model->hidden, width = model->width, n_rows = rows->count;
    int n_heads = model->heads * model->head_dim;
    int n_qkv = n_heads + 2 * model->kv_heads * model->head_dim;
    Weight *own = own_rows(model, me);
    for (int n = 0; n < model->layers; n++) {
        const Layer *layer = model->layer + n;
        for (int i = 0; i < n_rows; i++) { /* every thread for itself: cheaper than meeting */
            Weight *row = own + (size_t)i * width;
            if (beside) {
                memcpy(row, beside + (size_t)i * hidden, hidden * sizeof(Weight));
                row += hidden;
            }
            norm_row(x + (size_t)i * hidden, layer->input_norm, row, hidden, model->eps);
        }
        product(own, layer->qkv, model->qkv, n_rows, n_qkv, width, 0, me);
        meet(me);
        mark(model, me, PRODUCTS);

        place_heads(model, layer, rows, me);
        meet(me);
        attend_rows(model, layer, rows, me);
        meet(me);
        mark(model, me, ATTENTION);

        product(model->shared, layer->output, x, n_rows, hidden, n_heads, 1, me);
        meet(me);
        for (int i = 0; i < n_rows; i++)
            norm_row(x + (size_t)i * hidden, layer->post_norm, own + (size_t)i * hidden, hidden,
                     model->eps);
        product(own, layer->gate_up, model->gate_up, n_rows, 2 * model->intermediate, hidden, 0,
                me);
        gate_rows(model, n_rows, me);
        meet(me);
        product(model->shared, layer->down, x, n_rows, hidden, model->intermediate, 1, me);
        meet(me);
        keep_taps(model, x, n, n_rows, me);
    }
    if (model->final_norm) {
        norm_last(model, x, n_rows, me);
        meet(me);
    }
}

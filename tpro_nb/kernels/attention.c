#include <math.h>
#include "model.h"

#define MAX_GROUP 4 /* query heads that are done together, one read of the keys for all */
#define MAX_DEPTH 4 /* blocks of 16 values that are summed together */

/* Scores of the slots from `base` to `end`, those in between that are not in sight included. Keys
   lie with the slots side by side, so sixteen scores come at once; two blocks at a time, since
   independent sums hide latency. */
INLINE void score_slots(const Model *model, const Weight *keys, const float *query, float *raw,
                        int base, int end, const int group) {
    int head_dim = model->head_dim, slots = model->slots;
    float scale = 1.f / sqrtf(head_dim);
    for (int slot = base; slot < end; slot += 2 * LANES) {
        Floats sums[MAX_GROUP], next_sums[MAX_GROUP];
        for (int head = 0; head < group; head++)
            sums[head] = next_sums[head] = (Floats){0};
        for (int d = 0; d < head_dim; d++) {
            const Weight *at = keys + (size_t)d * slots + slot;
            Floats key = load_weights(at);
            Floats next_key = load_weights(at + LANES);
            for (int head = 0; head < group; head++) {
                sums[head] += key * query[head * head_dim + d];
                next_sums[head] += next_key * query[head * head_dim + d];
            }
        }
        for (int head = 0; head < group; head++) {
            float *to = raw + (size_t)head * slots + slot;
            store_floats(to, sums[head] * scale);
            store_floats(to + LANES, next_sums[head] * scale);
        }
    }
}

/* The scores in sight gathered into one list, prefix first, and their softmax. It is the list that
   a plain loop would have, so the order of every sum is the plain loop's. */
INLINE void soften(float *shares, const float *raw, const int *row) {
    int past = row[PAST], n_others = row[N_OTHERS], n = past + n_others;
    int padded = (n + LANES - 1) / LANES * LANES;
    memcpy(shares, raw + row[BASE], past * sizeof(float));
    for (int i = 0; i < n_others; i++)
        shares[past + i] = raw[row[OTHERS + i]];
    float top = -1e30f;
    for (int i = 0; i < n; i++)
        top = shares[i] > top ? shares[i] : top;
    Floats sums = {0};
    for (int i = 0; i < padded; i += LANES) {
        Floats e = exp_lanes(load_floats(shares + i) - top);
        if (i + LANES > n)
            for (int lane = n - i; lane < LANES; lane++)
                e[lane] = 0;
        store_floats(shares + i, e);
        sums += e;
    }
    float sum = sum_of_lanes(sums);
    for (int i = 0; i < padded; i += LANES)
        store_floats(shares + i, load_floats(shares + i) * (1.f / sum));
}

/* The values in sight, weighted by their shares; `depth` blocks of 16 numbers at a time. */
INLINE void sum_values(const Model *model, const Weight *values, const float *shares, Weight *out,
                       const int *row, const int group, const int depth) {
    int head_dim = model->head_dim, past = row[PAST], n = past + row[N_OTHERS];
    for (int d = 0; d < head_dim; d += LANES * depth) {
        Floats sums[MAX_GROUP][MAX_DEPTH];
        for (int head = 0; head < group; head++)
            for (int block = 0; block < depth; block++)
                sums[head][block] = (Floats){0};
        for (int i = 0; i < n; i++) {
            int slot = i < past ? row[BASE] + i : row[OTHERS + i - past];
            const Weight *at = values + (size_t)slot * head_dim + d;
            for (int block = 0; block < depth; block++) {
                Floats value = load_weights(at + block * LANES);
                for (int head = 0; head < group; head++)
                    sums[head][block] += value * shares[(size_t)head * model->slots + i];
            }
        }
        for (int head = 0; head < group; head++)
            for (int block = 0; block < depth; block++)
                store_weights(out + head * head_dim + d + block * LANES, sums[head][block]);
    }
}

/* `group` and `depth` are constants where this is inlined. */
INLINE void attend_group(const Model *model, const Layer *layer, const float *query, Weight *out,
                         int kv_head, const int *row, int end, float *scores, const int group,
                         const int depth) {
    size_t cache = (size_t)kv_head * model->head_dim * model->slots;
    float *raw = scores + (size_t)group * model->slots;
    score_slots(model, layer->keys + cache, query, raw, row[BASE], end, group);
    for (int head = 0; head < group; head++) {
        size_t at = (size_t)head * model->slots;
        soften(scores + at, raw + at, row);
    }
    sum_values(model, layer->values + cache, scores, out, row, group, depth);
}

void attend(const Model *model, const Layer *layer, const float *query, Weight *out, int group,
            const int *row, float *scores) {
    int heads = model->heads / model->kv_heads, head_dim = model->head_dim;
    int end = row[BASE] + row[PAST];
    for (int i = 0; i < row[N_OTHERS]; i++)
        if (row[OTHERS + i] >= end)
            end = row[OTHERS + i] + 1;
    if (heads == 2 && head_dim % 64 == 0)
        attend_group(model, layer, query, out, group, row, end, scores, 2, 4);
    else if (heads == 3 && head_dim % 64 == 0)
        attend_group(model, layer, query, out, group, row, end, scores, 3, 4);
    else if (heads == 4 && head_dim % 64 == 0)
        attend_group(model, layer, query, out, group, row, end, scores, 4, 4);
    else
        for (int head = 0; head < heads; head++)
            attend_group(model, layer, query + head * head_dim, out + head * head_dim, group, row,
                         end, scores, 1, 1);
}

/* Small parts: what happens to a single row between the products. */
#ifndef TPRO_NB_ROWS_H
#define TPRO_NB_ROWS_H

#include <math.h>
#include "lanes.h"

/* One over the root mean square of n numbers; n is a multiple of 16. */
static inline float inverse_rms(const float *x, int n, float eps) {
    Floats squares = {0};
    for (int i = 0; i < n; i += LANES) {
        Floats values = load_floats(x + i);
        squares += values * values;
    }
    return 1.f / sqrtf(sum_of_lanes(squares) / n + eps);
}

/* RMS norm with weights `norm`, in the weights' type; without `norm` only the type changes. */
static inline void norm_row(const float *x, const float *norm, Weight *out, int n, float eps) {
    if (!norm) {
        for (int i = 0; i < n; i += LANES)
            store_weights(out + i, load_floats(x + i));
        return;
    }
    float scale = inverse_rms(x, n, eps);
    for (int i = 0; i < n; i += LANES)
        store_weights(out + i, load_floats(x + i) * scale * load_floats(norm + i));
}

/* A head of a query or key: its norm where the model has one, then the rotation of its position. */
static inline void rotate_head(float *x, const float *norm, const float *cosines,
                               const float *sines, int head_dim, float eps) {
    if (norm) {
        float scale = inverse_rms(x, head_dim, eps);
        for (int i = 0; i < head_dim; i++)
            x[i] *= scale * norm[i];
    }
    int half = head_dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i];
        float b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i] + a * sines[i];
    }
}

/* The first place of the largest number: the largest of sixteen lanes first, then where it is. */
static inline int argmax(const float *y, int n) {
    Floats largest = (Floats){0} - 1e38f;
    float top = -1e38f;
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats values = load_floats(y + i);
        Ints more = values > largest;
        largest = (Floats)(((Ints)values & more) | ((Ints)largest & ~more));
    }
    for (; i < n; i++)
        if (y[i] > top)
            top = y[i];
    for (int lane = 0; lane < LANES; lane++)
        if (largest[lane] > top)
            top = largest[lane];
    for (i = 0; i < n; i++)
        if (y[i] == top)
            return i;
    return 0;
}

#endif

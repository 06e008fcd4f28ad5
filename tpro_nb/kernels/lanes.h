/* Sixteen numbers at a time ("lanes"), whatever the machine's registers, and the weights' type. */
#ifndef TPRO_NB_LANES_H
#define TPRO_NB_LANES_H

#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default"))) /* called from Python */

typedef float Floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2)));

INLINE Floats load_floats(const float *from) {
    return *(const Floats *)from;
}

INLINE void store_floats(float *to, Floats values) {
    *(Floats *)to = values;
}

INLINE float sum_of_lanes(Floats values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++)
        sum += values[lane];
    return sum;
}

/* The type is chosen when the files are compiled: bf16 (-DBF16=1), or fp32 for the proof. */
#if BF16

typedef uint16_t Weight; /* the upper half of a float */
#define UNIT 2           /* inputs that lie together in the packed weights, four bytes an output */

INLINE float to_float(Weight weight) {
    uint32_t bits = (uint32_t)weight << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE Weight to_weight(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE Floats load_weights(const Weight *from) {
    Shorts halves;
    memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Ints) << 16);
}

INLINE void store_weights(Weight *to, Floats values) {
    Ints bits = (Ints)values;
    Shorts halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Shorts);
    memcpy(to, &halves, sizeof halves);
}

#else

typedef float Weight;
#define UNIT 1

INLINE float to_float(Weight weight) {
    return weight;
}

INLINE Weight to_weight(float value) {
    return value;
}

INLINE Floats load_weights(const Weight *from) {
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store_weights(Weight *to, Floats values) {
    memcpy(to, &values, sizeof values);
}

#endif

/* e to the x. x is cut to where a float can hold the result; then x = n ln 2 + r, and a polynomial
   gives e to the r, whose exponent is raised by n. */
INLINE Floats exp_lanes(Floats x) {
    Ints low = x < -87.f;
    Ints high = x > 88.f;
    Ints inside = (Ints)x & ~low & ~high;
    x = (Floats)(inside | ((Ints)(x * 0 - 87.f) & low) | ((Ints)(x * 0 + 88.f) & high));
    Floats n = (x * 1.44269504f + 12582912.f) - 12582912.f; /* 1.5 * 2^23: rounds to an integer */
    Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;   /* ln 2 in two parts */
    Floats poly = r * 1.9875691e-4f + 1.3981999e-3f;
    poly = poly * r + 8.3334519e-3f;
    poly = poly * r + 4.1665795e-2f;
    poly = poly * r + 1.6666665e-1f;
    poly = poly * r + .5f;
    poly = poly * r * r + r + 1.f;
    return poly * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

#endif

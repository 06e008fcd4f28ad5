#include "product.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define MOST_ROWS 12             /* of a tile: a sum for each stays in a register */
#define PANEL_BYTES (512 * 1024) /* of inputs that are laid side by side at a time */

/* The sums of one block of outputs after one more unit of a row's input. */
INLINE Floats multiply_add(Floats sums, Ints weights, const Weight *input) {
#if !BF16
    return sums + (Floats)weights * input[0];
#elif defined(__AVX512BF16__)
    int32_t pair;
    memcpy(&pair, input, sizeof pair);
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights,
                                    (__m512bh)_mm512_set1_epi32(pair));
#else
    sums += (Floats)(weights << 16) * to_float(input[0]);
    return sums + (Floats)(weights & (int32_t)0xffff0000) * to_float(input[1]);
#endif
}

#define TILE_PARAMETERS const Weight *x, const Weight *w, float *y, int n_out, int n_in, int add

/* The outputs of one block for `rows` rows, whose inputs lie side by side (see below). `rows` is a
   constant where this is inlined, so that every sum has a register of its own and the inner loops
   vanish. */
INLINE void tile(const int rows, TILE_PARAMETERS) {
    Floats sums[MOST_ROWS];
    for (int row = 0; row < rows; row++)
        sums[row] = (Floats){0};
    for (int in = 0; in < n_in; in += UNIT) {
        /* One stream, asked for before it is needed: 2 KB ahead into the first-level cache for
           few rows, 8 KB ahead into the second for more. Found by trial. */
        const char *stream = (const char *)(w + (size_t)in * LANES);
        if (rows < 4)
            __builtin_prefetch(stream + 2048, 0, 3);
        else
            __builtin_prefetch(stream + 8192, 0, 2);
        Ints weights;
        memcpy(&weights, stream, sizeof weights);
        for (int row = 0; row < rows; row++)
            sums[row] = multiply_add(sums[row], weights, x + in * rows + row * UNIT);
    }
    for (int row = 0; row < rows; row++) {
        float *to = y + (size_t)row * n_out;
        store_floats(to, add ? load_floats(to) + sums[row] : sums[row]);
    }
}

#define TILE(rows)                                                                                 \
    static void tile_##rows(TILE_PARAMETERS) {                                                     \
        tile(rows, x, w, y, n_out, n_in, add);                                                     \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
TILE(5)
TILE(6)
TILE(7)
TILE(8)
TILE(9)
TILE(10)
TILE(11)
TILE(12)

typedef void (*Tile)(TILE_PARAMETERS);
/* By the number of rows. */
static const Tile tiles[MOST_ROWS + 1] = {0,      tile_1, tile_2, tile_3,  tile_4,  tile_5, tile_6,
                                          tile_7, tile_8, tile_9, tile_10, tile_11, tile_12};

/* The first unit of every row, then the second of every row: one stream instead of `rows`. */
static void side_by_side(const Weight *x, Weight *to, int rows, int n_in) {
    for (int in = 0; in < n_in; in += UNIT)
        for (int row = 0; row < rows; row++)
            memcpy(to + in * rows + row * UNIT, x + row * n_in + in, UNIT * sizeof(Weight));
}

/* Rows that share one reading of the weights: in turns over every block, while it is in the first
   cache. */
static void panel(const Weight *x, const Weight *w, float *y, int n_rows, int n_out, int n_in,
                  int add, int first, int last) {
    int turns = (n_rows + MOST_ROWS - 1) / MOST_ROWS;
    int begin[turns + 1];
    for (int turn = 0; turn <= turns; turn++)
        begin[turn] = n_rows * turn / turns;
    Weight turned[n_rows > 1 ? n_in * n_rows : 1];
    if (n_rows > 1) {
        for (int turn = 0; turn < turns; turn++) {
            size_t from = (size_t)begin[turn] * n_in;
            side_by_side(x + from, turned + from, begin[turn + 1] - begin[turn], n_in);
        }
        x = turned;
    }
    for (int block = first; block < last; block++)
        for (int turn = 0; turn < turns; turn++)
            tiles[begin[turn + 1] - begin[turn]](
                x + (size_t)begin[turn] * n_in, w + (size_t)block * n_in * LANES,
                y + (size_t)begin[turn] * n_out + block * LANES, n_out, n_in, add);
}

void product(const Weight *x, const Weight *w, float *y, int n_rows, int n_out, int n_in, int add,
             const Thread *me) {
    int n_blocks = n_out / LANES;
    int n_pairs = (n_blocks + 1) / 2; /* threads share pairs of blocks: gate and up stay together */
    int first = (long)n_pairs * me->index / me->count * 2;
    int last = (long)n_pairs * (me->index + 1) / me->count * 2;
    if (last > n_blocks)
        last = n_blocks;

    int most = PANEL_BYTES / (n_in * sizeof(Weight)) / MOST_ROWS * MOST_ROWS;
    if (most < MOST_ROWS)
        most = MOST_ROWS;
    for (int row = 0; row < n_rows; row += most) {
        int rows = n_rows - row < most ? n_rows - row : most;
        panel(x + (size_t)row * n_in, w, y + (size_t)row * n_out, rows, n_out, n_in, add, first,
              last);
    }
}

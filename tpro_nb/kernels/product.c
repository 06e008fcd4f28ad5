#include "product.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define NARROW_ROWS 12 /* rows of a tile one block wide: a plain step or a tree */
#define WIDE_ROWS 6    /* rows of a tile four blocks wide: 24 sums in registers */
#define WIDE_BLOCKS 4

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

/* What a tile reads and writes. The inputs of a narrow tile lie side by side (see below). */
#define TILE_PARAMETERS                                                                            \
    const Weight *x, const Weight *w, float *y, int n_out, int n_in, int add, int ahead_from,      \
        int ahead_to

/* The outputs of `blocks` blocks for `rows` rows. Both are constants where this is inlined, so that
   every sum has a register of its own and the inner loops vanish. */
INLINE void tile(const int blocks, const int rows, TILE_PARAMETERS) {
    Floats sums[WIDE_BLOCKS][NARROW_ROWS];
    for (int b = 0; b < blocks; b++)
        for (int row = 0; row < rows; row++)
            sums[b][row] = (Floats){0};
    for (int in = 0; in < n_in; in += UNIT) {
        Ints weights[WIDE_BLOCKS];
        for (int b = 0; b < blocks; b++)
            memcpy(&weights[b], w + ((size_t)b * n_in + in) * LANES, sizeof(Ints));
        if (blocks == 1) {
            /* One stream, asked for before it is needed: 2 KB ahead into the first-level cache for
               few rows, 8 KB ahead into the second for more. Found by trial. */
            const char *stream = (const char *)(w + (size_t)in * LANES);
            if (rows < 4)
                __builtin_prefetch(stream + 2048, 0, 3);
            else
                __builtin_prefetch(stream + 8192, 0, 2);
        } else {
            /* Every turn over this tile asks for its part of the next one. */
            for (int b = ahead_from; b < ahead_to; b++)
                __builtin_prefetch(w + ((size_t)(blocks + b) * n_in + in) * LANES, 0, 3);
        }
        for (int row = 0; row < rows; row++) {
            const Weight *input = x + (blocks == 1 ? in * rows + row * UNIT : row * n_in + in);
            for (int b = 0; b < blocks; b++)
                sums[b][row] = multiply_add(sums[b][row], weights[b], input);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int b = 0; b < blocks; b++) {
            float *to = y + (size_t)row * n_out + b * LANES;
            store_floats(to, add ? load_floats(to) + sums[b][row] : sums[b][row]);
        }
}

#define TILE(blocks, rows)                                                                         \
    static void tile_##blocks##_##rows(TILE_PARAMETERS) {                                          \
        tile(blocks, rows, x, w, y, n_out, n_in, add, ahead_from, ahead_to);                       \
    }
TILE(4, 1)
TILE(4, 2)
TILE(4, 3)
TILE(4, 4)
TILE(4, 5)
TILE(4, 6)
TILE(1, 1)
TILE(1, 2)
TILE(1, 3)
TILE(1, 4)
TILE(1, 5)
TILE(1, 6)
TILE(1, 7)
TILE(1, 8)
TILE(1, 9)
TILE(1, 10)
TILE(1, 11)
TILE(1, 12)

typedef void (*Tile)(TILE_PARAMETERS);
/* By the number of rows. */
static const Tile wide_tile[WIDE_ROWS + 1] = {0,        tile_4_1, tile_4_2, tile_4_3,
                                              tile_4_4, tile_4_5, tile_4_6};
static const Tile narrow_tile[NARROW_ROWS + 1] = {
    0,        tile_1_1, tile_1_2, tile_1_3,  tile_1_4,  tile_1_5, tile_1_6,
    tile_1_7, tile_1_8, tile_1_9, tile_1_10, tile_1_11, tile_1_12};

/* The first unit of every row, then the second of every row: one stream instead of `n_rows`. */
static const Weight *side_by_side(const Weight *x, Weight *to, int n_rows, int n_in) {
    if (n_rows == 1)
        return x;
    for (int in = 0; in < n_in; in += UNIT)
        for (int row = 0; row < n_rows; row++)
            memcpy(to + in * n_rows + row * UNIT, x + row * n_in + in, UNIT * sizeof(Weight));
    return to;
}

void product(const Weight *x, const Weight *w, float *y, int n_rows, int n_out, int n_in, int add,
             const Thread *me) {
    int n_blocks = n_out / LANES;
    int n_pairs = (n_blocks + 1) / 2; /* threads share pairs of blocks: gate and up stay together */
    int first = (long)n_pairs * me->index / me->count * 2;
    int last = (long)n_pairs * (me->index + 1) / me->count * 2;
    if (last > n_blocks)
        last = n_blocks;

    /* More rows than a narrow tile takes come in turns, all of them over one tile's weights. */
    int turns = n_rows > NARROW_ROWS ? (n_rows + WIDE_ROWS - 1) / WIDE_ROWS : 1;
    Weight turned[n_in * (turns > 1 ? WIDE_ROWS : n_rows)];
    if (turns == 1)
        x = side_by_side(x, turned, n_rows, n_in);

    int width; /* blocks of this tile */
    for (int block = first; block < last; block += width) {
        width = turns > 1 && last - block >= WIDE_BLOCKS ? WIDE_BLOCKS : 1;
        const Tile *tiles = width == 1 ? narrow_tile : wide_tile;
        for (int turn = 0; turn < turns; turn++) {
            int row = n_rows * turn / turns;
            int rows = n_rows * (turn + 1) / turns - row;
            const Weight *inputs = x + (size_t)row * n_in;
            if (turns > 1 && width == 1)
                inputs = side_by_side(inputs, turned, rows, n_in);
            int ahead_from = (width * turn + turns - 1) / turns;
            int ahead_to = (width * (turn + 1) + turns - 1) / turns;
            tiles[rows](inputs, w + (size_t)block * n_in * LANES,
                        y + (size_t)row * n_out + block * LANES, n_out, n_in, add, ahead_from,
                        ahead_to);
        }
    }
}

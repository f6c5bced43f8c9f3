/* Products of a few rows on a CPU, W stored [O, I], and the largest of a row: what products.c hands to Python and other C
 * code builds on. fp32 arithmetic, rounded to bf16 where that is the format. Shapes: I in-features, O out-features, E
 * experts.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint32_t u16 __attribute__((vector_size(64)));

#define LANES 16
#define FEW_ROWS 4              /* rows that share a loaded weight as dot products */
#define QUAD 4                  /* rows and outputs computed at once where rows lie side by side in four lanes each */
#define MANY_ROWS 9             /* rows from which they go side by side in lanes */
#define BLOCK 8                 /* outputs computed at once in lanes */
#define PARALLEL_WORK (1 << 21) /* multiply-adds from which threads pay */

/* How numbers are rounded to few bits: `superbolt_operand` of quantization.c, which is compiled without -ffast-math. */
typedef struct {
    void (*round)(const float *x, i64 count, i64 format, float encode, i64 unscaled, float *out); /* NULL: not at all */
    i64 format;
    const float *encode; /* S, [E] */
} rounding;

typedef struct linear linear;
struct linear {
    const void *weight;   /* [O, I], experts: [E, O, I]; of a quantised one the numbers times their block scales */
    i64 out, in, bf16;    /* bf16: weight, inputs and results are bf16, else fp32 */
    i64 cast;             /* inputs come in fp32, to be rounded to bf16 */
    rounding inputs;      /* behind that */
    const float *factors; /* [E], what results are multiplied by before they are rounded; NULL: nothing */
    const linear *adapter; /* A and B: scale x B A x is added to the rounded results, and rounded again; NULL: nothing */
    float scale;
};

/* ------------------------------------------------------------------------------------------------------- numbers */

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void round_all(float *values, i64 count, i64 bf16) {
    if (bf16)
        for (i64 i = 0; i < count; i++) {
            uint32_t bits;
            memcpy(&bits, values + i, 4);
            bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
            memcpy(values + i, &bits, 4);
        }
}

static inline v16 load(const void *weight, i64 index, i64 bf16) {
    v16 value;
    if (bf16) {
        h16 half;
        memcpy(&half, (const uint16_t *)weight + index, sizeof half);
        u16 wide = __builtin_convertvector(half, u16) << 16;
        memcpy(&value, &wide, sizeof value);
    } else
        memcpy(&value, (const float *)weight + index, sizeof value);
    return value;
}

static inline float element(const void *weight, i64 index, i64 bf16) {
    return bf16 ? from_bf16(((const uint16_t *)weight)[index]) : ((const float *)weight)[index];
}

/* ------------------------------------------------------------------------------------------------------ products */

/* Sums neighbours: lanes 0 to 7 are of a, 8 to 15 of b. */
static inline v16 merge(v16 a, v16 b) {
    const i16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

/* Dot products of `outs` weight rows with `rows` rows of x, outs * rows <= LANES: each has an accumulator, and all are
 * summed together, which costs a fraction of one sum after the other. `last` is the last weight row there is. */
static inline __attribute__((always_inline)) void dot_block(const float *const *x, int rows, int outs,
                                                            const void *weight, i64 bf16, i64 in, i64 first, i64 last,
                                                            float *const *y) {
    v16 sums[LANES] = {{0}};
    const float *vectors[FEW_ROWS];
    i64 places[LANES], i = 0;
    for (int r = 0; r < rows; r++) vectors[r] = x[r];
    for (int o = 0; o < outs; o++) places[o] = (first + o < last ? first + o : last) * in;
    for (; i + LANES <= in; i += LANES) {
        v16 values[FEW_ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) values[r] = load(vectors[r], i, 0);
#pragma GCC unroll 16
        for (int o = 0; o < outs; o++) {
            v16 w = load(weight, places[o] + i, bf16);
            __builtin_prefetch((const char *)weight + (places[o] + i + 2048) * (bf16 ? 2 : 4));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sums[r * outs + o] += w * values[r];
        }
    }
    for (; i < in; i++)
        for (int o = 0; o < outs; o++)
            for (int r = 0; r < rows; r++) sums[r * outs + o][0] += element(weight, places[o] + i, bf16) * vectors[r][i];
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2)
#pragma GCC unroll 8
        for (int j = 0; j < LANES; j += 2 * step) sums[j] = merge(sums[j], sums[j + step]);
    const float *results = (const float *)sums;
    if (first + outs - 1 <= last)
        for (int r = 0; r < rows; r++) memcpy(y[r] + first, results + r * outs, outs * sizeof(float));
    else
        for (int r = 0; r < rows; r++)
            for (int o = 0; first + o <= last; o++) y[r][first + o] = results[r * outs + o];
}

/* Sums neighbours within each four lanes: two of a, then two of b. */
static inline v16 pairs(v16 a, v16 b) {
    const i16 even = {0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
}

/* Products of weight rows [first, end), whole blocks of QUAD, with QUAD rows of x, `in` a multiple of LANES. Lane
 * 4 r + j of side[i] is x[r][4 i + j]: every four lanes take the same four weights, and four outputs are summed by three
 * additions of neighbours instead of the fifteen of dot_block. */
static inline __attribute__((always_inline)) void quad_block(const v16 *side, int rows, const void *weight, i64 bf16,
                                                             i64 in, i64 first, i64 end, float *const *y) {
    const i16 quarter = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    for (; first < end; first += QUAD) {
        v16 sums[QUAD] = {{0}};
        for (i64 i = 0; i < in; i += LANES) {
            const v16 *x = side + i / QUAD;
#pragma GCC unroll 4
            for (int o = 0; o < QUAD; o++) {
                v16 w = load(weight, (first + o) * in + i, bf16);
                __builtin_prefetch((const char *)weight + ((first + o) * in + i + 2048) * (bf16 ? 2 : 4));
                sums[o] += __builtin_shuffle(w, quarter) * x[0];
                sums[o] += __builtin_shuffle(w, quarter + 4) * x[1];
                sums[o] += __builtin_shuffle(w, quarter + 8) * x[2];
                sums[o] += __builtin_shuffle(w, quarter + 12) * x[3];
            }
        }
        v16 all = pairs(pairs(sums[0], sums[1]), pairs(sums[2], sums[3]));
        for (int r = 0; r < rows; r++) memcpy(y[r] + first, (const float *)&all + QUAD * r, QUAD * sizeof(float));
    }
}

static void quad_rows(const v16 *side, int rows, const void *weight, i64 bf16, i64 in, i64 first, i64 end,
                      float *const *y) {
    if (bf16)
        quad_block(side, rows, weight, 1, in, first, end, y);
    else
        quad_block(side, rows, weight, 0, in, first, end, y);
}

/* Dot products of weight rows [first, end) with up to FEW_ROWS rows of x. */
static void dot_rows(const float *const *x, int rows, const void *weight, i64 bf16, i64 in, i64 first, i64 end,
                     float *const *y) {
#define BLOCKS(ROWS, OUTS, BF16) \
    for (; first < end; first += OUTS) dot_block(x, ROWS, OUTS, weight, BF16, in, first, end - 1, y)
#define FORMATS(ROWS, OUTS) \
    if (bf16) \
        BLOCKS(ROWS, OUTS, 1); \
    else \
        BLOCKS(ROWS, OUTS, 0)
    if (rows == 1) {
        FORMATS(1, 16);
    } else if (rows == 2) {
        FORMATS(2, 8);
    } else if (rows == 3) {
        FORMATS(3, 5);
    } else {
        FORMATS(4, 4);
    }
#undef FORMATS
#undef BLOCKS
}

/* Products of weight rows [first, last), at most BLOCK, with up to LANES rows laid side by side: side[i][row]. */
static void lane_rows(const v16 *side, int rows, const void *weight, i64 bf16, i64 in, i64 first, i64 last,
                      float *const *y, float *wide) {
    v16 sums[BLOCK] = {{0}};
    int count = (int)(last - first);
    const float *w = (const float *)weight + first * in;
    if (bf16) {
        for (i64 i = 0; i < count * in; i++) wide[i] = from_bf16(((const uint16_t *)weight)[first * in + i]);
        w = wide;
    }
    if (count == BLOCK)
        for (i64 i = 0; i < in; i++)
            for (int j = 0; j < BLOCK; j++) sums[j] += w[j * in + i] * side[i];
    else
        for (i64 i = 0; i < in; i++)
            for (int j = 0; j < count; j++) sums[j] += w[j * in + i] * side[i];
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < count; j++) y[r][first + j] = sums[j][r];
}

/* Copies rows of x side by side and rounds them as a product takes them. */
static void round_rows(const float **x, int rows, const linear *l, i64 expert, float *rounded) {
    i64 in = l->in;
    for (int r = 0; r < rows; r++) x[r] = memcpy(rounded + r * in, x[r], (size_t)in * sizeof(float));
    round_all(rounded, rows * in, l->cast);
    if (l->inputs.round) l->inputs.round(rounded, rows * in, l->inputs.format, l->inputs.encode[expert], 1, rounded);
}

static void multiply_rows(const float *const *inputs, float *const *y, i64 rows, const linear *l, i64 expert,
                          i64 most_threads);

/* Adds what the adapter of a product adds to its results y. */
static void add_low_rank(const float *const *inputs, float *const *y, i64 rows, const linear *l, i64 expert,
                         i64 most_threads) {
    const linear *down = &l->adapter[0], *up = &l->adapter[1];
    i64 rank = down->out, out = up->out;
    float *memory = malloc((size_t)rows * (rank + out) * sizeof(float)), *added = memory + rows * rank;
    const float *narrow[rows];
    float *to[rows], *wide[rows];
    for (i64 r = 0; r < rows; r++) narrow[r] = to[r] = memory + r * rank, wide[r] = added + r * out;
    multiply_rows(inputs, to, rows, down, expert, most_threads);
    multiply_rows(narrow, wide, rows, up, expert, most_threads);
    for (i64 r = 0; r < rows; r++) {
        for (i64 i = 0; i < out; i++) y[r][i] += l->scale * wide[r][i];
        round_all(y[r], out, l->bf16);
    }
    free(memory);
}

/* y[r] = W x[r] of one expert for rows given by pointers, rounded to bf16 where that is the format. */
static void multiply_rows(const float *const *inputs, float *const *y, i64 rows, const linear *l, i64 expert,
                          i64 most_threads) {
    i64 out = l->out, in = l->in, bf16 = l->bf16;
    const void *weight = (const char *)l->weight + expert * out * in * (bf16 ? 2 : 4);
    float factor = l->factors ? l->factors[expert] : 1;
    float *rounded = l->cast || l->inputs.round ? malloc((size_t)(rows < LANES ? rows : LANES) * in * sizeof(float)) : NULL;
    int threads = rows * out * in >= PARALLEL_WORK ? (int)most_threads : 1;
    for (i64 start = 0; start < rows;) {
        int part = (int)(rows - start < LANES ? rows - start : LANES);
        if (part < MANY_ROWS) part = part < FEW_ROWS ? part : FEW_ROWS;
        const float *x[LANES];
        for (int r = 0; r < part; r++) x[r] = inputs[start + r];
        if (rounded) round_rows(x, part, l, expert, rounded);
        if (part < MANY_ROWS) {
            v16 *side = part > 2 && in % LANES == 0 ? aligned_alloc(64, (size_t)(in / QUAD) * sizeof(v16)) : NULL;
            if (side)
                for (i64 i = 0; i < in; i++)
                    for (int r = 0; r < QUAD; r++)
                        ((float *)side)[i / QUAD * LANES + QUAD * r + i % QUAD] = r < part ? x[r][i] : 0;
#pragma omp parallel for num_threads(threads) if (threads > 1)
            for (i64 block = 0; block < (out + 63) / 64; block++) {
                i64 first = block * 64, end = first + 64 < out ? first + 64 : out, whole = side ? end / QUAD * QUAD : first;
                if (side) quad_rows(side, part, weight, bf16, in, first, whole, y + start);
                dot_rows(x, part, weight, bf16, in, whole, end, y + start);
            }
            free(side);
        } else {
            v16 *side = aligned_alloc(64, (size_t)in * sizeof(v16));
            for (i64 i = 0; i < in; i++)
                for (int r = 0; r < LANES; r++) side[i][r] = r < part ? x[r][i] : 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
            {
                float *wide = bf16 ? malloc((size_t)in * BLOCK * sizeof(float)) : NULL;
#pragma omp for
                for (i64 block = 0; block < (out + BLOCK - 1) / BLOCK; block++)
                    lane_rows(side, part, weight, bf16, in, block * BLOCK,
                              block * BLOCK + BLOCK < out ? block * BLOCK + BLOCK : out, y + start, wide);
                free(wide);
            }
            free(side);
        }
        for (int r = 0; r < part; r++) {
            float *row = y[start + r];
            if (l->factors)
                for (i64 i = 0; i < out; i++) row[i] *= factor;
            round_all(row, out, bf16);
        }
        start += part;
    }
    free(rounded);
    if (l->adapter) add_low_rank(inputs, y, rows, l, expert, most_threads);
}

/* y [rows, O] = x [rows, I] W^T. */
static void multiply(const float *x, i64 rows, const linear *l, i64 threads, float *y) {
    const float *from[rows];
    float *to[rows];
    for (i64 r = 0; r < rows; r++) from[r] = x + r * l->in, to[r] = y + r * l->out;
    multiply_rows(from, to, rows, l, 0, threads);
}

/* ------------------------------------------------------------------------------------------------------- largest */

static i64 largest(const float *values, i64 count) {
    float most = values[0];
    for (i64 i = 1; i < count; i++) most = values[i] > most ? values[i] : most;
    i64 place = 0;
    while (place < count - 1 && values[place] != most) place++;
    return place;
}

/* NVFP4 rounding of a matrix, on a CPU: scales, E2M1 numbers and what they stand for in one pass over memory.
 *
 * Bit for bit the portable operations of modules/precision/blocks.py (compiled without -ffast-math or contraction).
 * Memory is taken in patches of 16x16. A patch is held as 16 vectors whose lanes are 16 blocks of 16 numbers, one number
 * of each block a vector, so that everything about a block is done lane by lane; where blocks lie along the rows of
 * memory, patches are transposed on the way in and out. `quantization.py` fills the structure and says what it means.
 */
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint8_t b16 __attribute__((vector_size(16)));

#define N 16
#define SIGN 0x80000000u
#define NOT_A_NUMBER 0x7fc00000u
#define FLOAT_MAX 3.40282347e38f
#define PARALLEL_WORK (1 << 15) /* numbers from which threads pay */

enum { MAXIMUM, FOUR_SQUARES, FOUR_ABSOLUTE, SEARCH, GIVEN };
enum { FLOAT32, BFLOAT16, CODES, NOTHING };

typedef struct {
    const void *x;       /* [matrices, rows, columns] */
    i64 bf16, matrices, rows, columns;
    i64 along_rows;      /* blocks lie along rows (the last but one axis) instead of columns */
    i64 hadamard, tiles, choice;
    float denominator;   /* 6 * the largest block scale of the tensor */
    i64 rows_per_scale;
    const float *encode, *amax; /* [matrices * rows / rows_per_scale] */
    const uint8_t *bits; /* like x, or NULL: round to the nearest */
    const float *given;  /* scales for GIVEN */
    void *out;           /* like x */
    i64 kind, unscaled;
    float *scales;       /* of every block, [matrices, rows, columns / 16] or, along rows, [matrices, columns, rows / 16];
                            or NULL */
    i64 threads;
} job;

/* ------------------------------------------------------------------------------------------------------- numbers */

static inline v16 pick(i16 mask, v16 a, v16 b) { return (v16)((mask & (i16)a) | (~mask & (i16)b)); }
static inline v16 all(float value) { return value - (v16){0}; }
static inline v16 magnitude(v16 value) { return (v16)((u16)value & ~SIGN); }
/* Of magnitudes: their bits are in the order of the numbers, with NaN above all. */
static inline v16 larger(v16 a, v16 b) { return pick((i16)a > (i16)b, a, b); }

static inline u16 bf16_bits(v16 value) {
    u16 bits = (u16)value;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* E4M3 of 0 to 448, as fp32; a NaN stays one. */
static inline v16 round_e4m3(v16 value) {
    u16 bits = (u16)value;
    v16 normal = (v16)((bits + 0x7ffff + ((bits >> 20) & 1)) & ~0xfffffu);
    v16 subnormal = (value + 0x1.8p14f) - 0x1.8p14f;
    return pick(value < 0x1p-6f, subnormal, normal);
}

static inline v16 scale_of(v16 value) {
    v16 clamped = pick(value > 448.0f, all(448.0f), value);
    return pick((i16)magnitude(value) > 0x7f800000, (v16)(NOT_A_NUMBER - (u16){0}), round_e4m3(clamped));
}

/* What numbers are multiplied by before they are rounded. */
static inline v16 encode_factor(v16 scale, v16 encode) {
    v16 factor = 1.0f / (scale * (1.0f / encode));
    return pick(factor > FLOAT_MAX, all(FLOAT_MAX), factor);
}

/* E2M1 of numbers times a factor; a NaN becomes 6. `uniform`: k / 256, or NULL: to the nearest. */
static inline v16 round_e2m1(v16 value, v16 factor, const v16 *uniform) {
    v16 size = magnitude(value * factor), rounded;
    u16 sign = (u16)value & (u16)(size == size) & SIGN;
    size = pick(size <= 6.0f, size, all(6.0f));
    if (uniform) {
        v16 step = pick(size < 2.0f, all(0.5f), pick(size < 4.0f, all(1.0f), all(2.0f)));
        v16 moved = size + *uniform * step;
        v16 cut = (v16)((u16)moved & 0xffc00000u); /* one bit behind the point */
        v16 small = pick(moved < 0.5f, (v16){0}, all(0.5f));
        rounded = pick(moved < 1.0f, small, cut);
    } else {
        v16 power = (v16)((u16)pick(size > 1.0f, size, all(1.0f)) & 0x7f800000u);
        v16 large = power * 0x1.8p22f; /* its neighbours are one step apart */
        rounded = (size + large) - large;
    }
    return (v16)((u16)rounded | sign);
}

static inline u16 code_of(v16 value) {
    u16 bits = (u16)value, sign = bits >> 31 << 3;
    u16 shifted = ((bits & ~SIGN) >> 22) - 252; /* exponent and first bit behind the point: 0.5 is 0, 1 is 2, 6 is 7 */
    u16 place = (u16)pick(magnitude(value) < 1.0f, (v16)((u16)(magnitude(value) > 0.0f) & 1), (v16)shifted);
    return place | sign;
}

/* ------------------------------------------------------------------------------------------------------- patches */

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i16){__VA_ARGS__})
#endif
#define EXCHANGE(distance, low, high)                                   \
    for (int i = 0; i < N; i++)                                         \
        if (!(i & distance)) {                                          \
            v16 a = x[i], b = x[i + distance];                          \
            x[i] = SHUFFLE(a, b, low), x[i + distance] = SHUFFLE(a, b, high); \
        }
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

static inline void transpose(v16 *x) {
#pragma GCC unroll 16
    EXCHANGE(8, LOW8, HIGH8)
#pragma GCC unroll 16
    EXCHANGE(4, LOW4, HIGH4)
#pragma GCC unroll 16
    EXCHANGE(2, LOW2, HIGH2)
#pragma GCC unroll 16
    EXCHANGE(1, LOW1, HIGH1)
}

/* A patch's place: its first number, and how many rows and columns of it there are. */
typedef struct {
    i64 first, rows, columns, row, column, matrix;
} place;

static inline place locate(const job *j, i64 strip, i64 column) {
    i64 strips = (j->rows + N - 1) / N, row = strip % strips * N, matrix = strip / strips;
    place p = {(matrix * j->rows + row) * j->columns + column, j->rows - row, j->columns - column, row, column, matrix};
    if (p.rows > N) p.rows = N;
    if (p.columns > N) p.columns = N;
    return p;
}

static void load_patch(const job *j, const place *p, v16 *x) {
    for (i64 r = 0; r < N; r++) {
        x[r] = (v16){0};
        if (r >= p->rows) continue;
        i64 at = p->first + r * j->columns;
        if (j->bf16) {
            h16 half = {0};
            if (p->columns == N)
                memcpy(&half, (const uint16_t *)j->x + at, sizeof half);
            else
                memcpy(&half, (const uint16_t *)j->x + at, 2 * p->columns);
            x[r] = (v16)(__builtin_convertvector(half, u16) << 16);
        } else if (p->columns == N)
            memcpy(x + r, (const float *)j->x + at, sizeof x[r]);
        else
            memcpy(x + r, (const float *)j->x + at, 4 * p->columns);
    }
    if (!j->along_rows) transpose(x);
}

static void load_uniform(const job *j, const place *p, v16 *uniform) {
    for (i64 r = 0; r < N; r++) {
        b16 bytes = {0};
        if (r < p->rows) memcpy(&bytes, j->bits + p->first + r * j->columns, p->columns);
        uniform[r] = __builtin_convertvector(__builtin_convertvector(bytes, i16), v16) * 0x1p-8f;
    }
    if (!j->along_rows) transpose(uniform);
}

static void store_patch(const job *j, const place *p, v16 *y) {
    if (!j->along_rows) transpose(y);
    for (i64 r = 0; r < p->rows; r++) {
        i64 at = p->first + r * j->columns;
        if (j->kind == FLOAT32)
            memcpy((float *)j->out + at, y + r, 4 * p->columns);
        else if (j->kind == BFLOAT16) {
            h16 half = __builtin_convertvector(bf16_bits(y[r]), h16);
            if (p->columns == N)
                memcpy((uint16_t *)j->out + at, &half, sizeof half);
            else
                memcpy((uint16_t *)j->out + at, &half, 2 * p->columns);
        } else {
            b16 bytes = __builtin_convertvector(code_of(y[r]), b16);
            memcpy((uint8_t *)j->out + at, &bytes, p->columns);
        }
    }
}

/* The random Hadamard transform of every block; bf16 numbers are rounded to bf16 again. */
static void rotate(v16 *x, i64 bf16) {
    static const float signs[N] = {1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1};
    for (int i = 0; i < N; i++) x[i] *= signs[i];
    for (int half = 1; half < N; half *= 2)
        for (int i = 0; i < N; i++)
            if (!(i & half)) {
                v16 a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
    for (int i = 0; i < N; i++) {
        x[i] *= 0.25f;
        if (bf16) x[i] = (v16)(bf16_bits(x[i]) << 16);
    }
}

static inline v16 maximum(const v16 *x) {
    v16 largest = magnitude(x[0]);
    for (int i = 1; i < N; i++) largest = larger(largest, magnitude(x[i]));
    return largest;
}

/* Gives every lane the largest, or the sum in the order of a tree. */
static v16 over_lanes(v16 value, int sum) {
    float lanes[N], other[N];
    memcpy(lanes, &value, sizeof lanes);
    for (int half = N / 2; half; half /= 2)
        for (int i = 0; i < half; i++) {
            memcpy(other, lanes, sizeof other);
            uint32_t a, b;
            memcpy(&a, lanes + i, 4), memcpy(&b, lanes + i + half, 4);
            lanes[i] = sum ? other[i] + other[i + half] : a > b ? other[i] : other[i + half];
        }
    return all(lanes[0]);
}

/* -------------------------------------------------------------------------------------------------------- blocks */

static inline void round_block(const v16 *x, const v16 *uniform, v16 scale, v16 encode, v16 *q) {
    v16 factor = encode_factor(scale, encode);
    if (uniform)
        for (int i = 0; i < N; i++) q[i] = round_e2m1(x[i], factor, uniform + i);
    else
        for (int i = 0; i < N; i++) q[i] = round_e2m1(x[i], factor, NULL);
}

/* Transformer Engine's error of a candidate of four-over-six. */
static v16 four_error(const job *j, const v16 *x, const v16 *q, v16 scale, v16 amax) {
    v16 sum = {0};
    for (int i = 0; i < N; i++) {
        v16 difference = q[i] * scale * amax / j->denominator - x[i];
        sum += j->choice == FOUR_SQUARES ? difference * difference : magnitude(difference);
    }
    return sum;
}

static v16 search(const v16 *x, v16 best, v16 encode) {
    v16 least = {0};
    for (int byte = 0; byte < 127; byte++) { /* 0 stands for the scale of the maximum */
        float value = byte < 8 ? byte * 0x1p-9f : (8 + (byte & 7)) * 0x1p-10f * (1 << (byte >> 3));
        v16 scale = byte ? all(value) : best, factor = encode_factor(scale, encode), decode = scale / encode;
        v16 sum = {0};
        for (int i = 0; i < N; i++) {
            v16 difference = round_e2m1(x[i], factor, NULL) * decode - x[i];
            sum += difference * difference;
        }
        if (!byte)
            least = sum;
        else {
            best = pick(sum < least, scale, best);
            least = pick(sum < least, sum, least);
        }
    }
    return best;
}

static void quantize_patch(const job *j, const place *p) {
    v16 x[N], q[N], uniform[N], encode = all(1), amax = {0}, given = {0};
    i64 lanes = j->along_rows ? p->columns : p->rows;
    i64 blocks = (j->along_rows ? j->rows : j->columns) / N, block = (j->along_rows ? p->row : p->column) / N;
    i64 lane = p->matrix * (j->along_rows ? j->columns : j->rows) + (j->along_rows ? p->column : p->row);
    i64 row = p->matrix * j->rows + p->row;
    int same = j->along_rows || j->rows_per_scale % j->rows == 0;
    i64 group = row / j->rows_per_scale;
    if (same) encode = all(j->encode[group]), amax = all(j->amax[group]);
    for (i64 i = 0; i < lanes; i++) {
        if (!same) group = (row + i) / j->rows_per_scale, encode[i] = j->encode[group], amax[i] = j->amax[group];
        if (j->choice == GIVEN) given[i] = j->given[(lane + i) * blocks + block];
    }
    load_patch(j, p, x);
    if (j->hadamard) rotate(x, j->bf16);
    if (j->bits) load_uniform(j, p, uniform);
    const v16 *random = j->bits ? uniform : NULL;

    v16 largest = maximum(x), scale;
    if (j->tiles) largest = over_lanes(largest, 0);
    if (j->choice == GIVEN)
        scale = given;
    else if (j->choice == FOUR_SQUARES || j->choice == FOUR_ABSOLUTE)
        scale = scale_of(largest / 6.0f * encode);
    else
        scale = scale_of(largest * (encode * (1.0f / 6.0f)));
    if (j->choice == SEARCH) scale = search(x, scale, encode);
    if (j->kind != NOTHING) round_block(x, random, scale, encode, q);
    if (j->choice == FOUR_SQUARES || j->choice == FOUR_ABSOLUTE) {
        v16 four = scale_of(largest / 6.0f * encode * 1.5f), others[N];
        round_block(x, random, four, encode, others);
        v16 mine = four_error(j, x, q, scale, amax), theirs = four_error(j, x, others, four, amax);
        if (j->tiles) mine = over_lanes(mine, 1), theirs = over_lanes(theirs, 1);
        i16 better = theirs < mine;
        for (int i = 0; i < N; i++) q[i] = pick(better, others[i], q[i]);
        scale = pick(better, four, scale);
    }

    if (j->scales)
        for (i64 i = 0; i < lanes; i++) j->scales[(lane + i) * blocks + block] = scale[i];
    if (j->kind == NOTHING) return;
    if (j->kind != CODES) {
        v16 decode = j->unscaled ? scale : scale / encode;
        for (int i = 0; i < N; i++) q[i] *= decode;
    }
    store_patch(j, p, q);
}

void superbolt_quantize(const job *j) {
    i64 strips = j->matrices * ((j->rows + N - 1) / N);
#pragma omp parallel for num_threads(j->threads) if (j->matrices * j->rows * j->columns >= PARALLEL_WORK)
    for (i64 strip = 0; strip < strips; strip++)
        for (i64 column = 0; column < j->columns; column += N) {
            place p = locate(j, strip, column);
            quantize_patch(j, &p);
        }
}

/* The largest magnitude of each strip of 16 rows, NaN where there is one: [matrices, strips]. */
void superbolt_amax(const job *j, float *out) {
    i64 strips = j->matrices * ((j->rows + N - 1) / N);
#pragma omp parallel for num_threads(j->threads) if (j->matrices * j->rows * j->columns >= PARALLEL_WORK)
    for (i64 strip = 0; strip < strips; strip++) {
        v16 largest = {0};
        for (i64 column = 0; column < j->columns; column += N) {
            v16 x[N];
            place p = locate(j, strip, column);
            job straight = *j;
            straight.along_rows = j->along_rows || !j->hadamard; /* the order does not matter without a rotation */
            load_patch(&straight, &p, x);
            if (j->hadamard) rotate(x, j->bf16);
            largest = larger(largest, maximum(x));
        }
        out[strip] = over_lanes(largest, 0)[0];
    }
}

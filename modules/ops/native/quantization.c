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

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i16){__VA_ARGS__})
#endif

static inline v16 all(float value) { return value - (v16){0}; }
static inline v16 magnitude(v16 value) { return (v16)((u16)value & ~SIGN); }

/* Where compilers do not find the one instruction for it. `less`: a < b ? c : d. `least`: b where a is NaN. `larger`: of
 * magnitudes, whose bits are in the order of the numbers, with NaN above all. */
#ifdef __AVX512F__
#include <immintrin.h>
static inline v16 less(v16 a, v16 b, v16 c, v16 d) {
    __mmask16 mask = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
    return (v16)_mm512_mask_blend_ps(mask, (__m512)d, (__m512)c);
}
static inline v16 least(v16 a, v16 b) { return (v16)_mm512_min_ps((__m512)a, (__m512)b); }
static inline v16 larger(v16 a, v16 b) { return (v16)_mm512_max_epi32((__m512i)a, (__m512i)b); }
static inline h16 halves(u16 value) { return (h16)_mm512_cvtepi32_epi16((__m512i)value); }
static inline b16 bytes(u16 value) { return (b16)_mm512_cvtepi32_epi8((__m512i)value); }
static inline v16 numbers(b16 value) {
    return (v16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)value));
}
#else
static inline v16 pick(i16 mask, v16 a, v16 b) { return (v16)((mask & (i16)a) | (~mask & (i16)b)); }
static inline v16 less(v16 a, v16 b, v16 c, v16 d) { return pick(a < b, c, d); }
static inline v16 least(v16 a, v16 b) { return pick(a < b, a, b); }
static inline v16 larger(v16 a, v16 b) { return pick((i16)a > (i16)b, a, b); }
static inline h16 halves(u16 value) { return __builtin_convertvector(value, h16); }
static inline b16 bytes(u16 value) { return __builtin_convertvector(value, b16); }
static inline v16 numbers(b16 value) { return __builtin_convertvector(__builtin_convertvector(value, i16), v16); }
#endif

static inline u16 bf16_bits(v16 value) {
    u16 bits = (u16)value;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* E4M3 of 0 to 448, as fp32; a NaN stays one. */
static inline v16 round_e4m3(v16 value) {
    u16 bits = (u16)value;
    v16 normal = (v16)((bits + 0x7ffff + ((bits >> 20) & 1)) & ~0xfffffu);
    v16 subnormal = (value + 0x1.8p14f) - 0x1.8p14f;
    return less(value, all(0x1p-6f), subnormal, normal);
}

/* The scale of a block whose maximum this number comes from; a NaN, of any bits, stays one. */
static inline v16 scale_of(v16 value) {
    v16 scale = round_e4m3(least(value, all(448.0f)));
    u16 broken = (u16)(value != value) & NOT_A_NUMBER;
    return (v16)((u16)scale | broken);
}

/* What numbers are multiplied by before they are rounded. */
static inline v16 encode_factor(v16 scale, v16 encode) {
    v16 factor = 1.0f / (scale * (1.0f / encode));
    return less(all(FLOAT_MAX), factor, all(FLOAT_MAX), factor);
}

/* E2M1 of numbers times a factor; a NaN becomes 6. `uniform`: k / 256, or NULL: to the nearest. */
static inline v16 round_e2m1(v16 value, v16 factor, const v16 *uniform) {
    v16 product = value * factor, size = least(magnitude(product), all(6.0f)), rounded;
    if (uniform) {
        v16 step = less(size, all(2.0f), all(0.5f), less(size, all(4.0f), all(1.0f), all(2.0f)));
        v16 moved = size + *uniform * step;
        v16 cut = (v16)((u16)moved & 0xffc00000u); /* one bit behind the point */
        rounded = less(moved, all(1.0f), less(moved, all(0.5f), (v16){0}, all(0.5f)), cut);
    } else {
        v16 power = (v16)((u16)larger(size, all(1.0f)) & 0x7f800000u);
        v16 large = power * 0x1.8p22f; /* its neighbours are one step apart */
        rounded = (size + large) - large;
    }
    return (v16)((u16)rounded | ((u16)value & (u16)(product == product) & SIGN));
}

static inline u16 code_of(v16 value) {
    v16 size = magnitude(value);
    v16 place = (v16)(((u16)size >> 22) - 252); /* exponent and first bit behind the point: of 1 it is 2, of 6 it is 7 */
    v16 first = (v16)((u16)(size > 0.0f) & 1);
    return (u16)less(size, all(1.0f), first, place) | (u16)value >> 31 << 3;
}

/* ------------------------------------------------------------------------------------------------------- patches */

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

/* A patch's place: its first number, how many rows and columns of it there are, where it lies in its matrix. */
typedef struct {
    i64 first, rows, columns, row, column, matrix;
} place;

/* The first patch of a strip of 16 rows; `step` goes to the next one. */
static place locate(const job *j, i64 strip) {
    i64 strips = (j->rows + N - 1) / N, row = strip % strips * N, matrix = strip / strips, rows = j->rows - row;
    i64 columns = j->columns;
    return (place){(matrix * j->rows + row) * columns, rows < N ? rows : N, columns < N ? columns : N, row, 0, matrix};
}

static inline void step(const job *j, place *p) {
    p->first += N, p->column += N;
    if (j->columns - p->column < N) p->columns = j->columns - p->column;
}

/* Copies `count` of the 16 numbers of `size` bytes. */
static inline __attribute__((always_inline)) void copy(void *to, const void *from, i64 count, i64 size) {
    if (count == N)
        memcpy(to, from, N * size);
    else
        memcpy(to, from, count * size);
}

static inline __attribute__((always_inline)) void load_rows(const job *j, const place *p, v16 *x, int bf16) {
    for (i64 r = 0; r < p->rows; r++) {
        i64 at = p->first + r * j->columns;
        if (bf16) {
            h16 half = {0};
            copy(&half, (const uint16_t *)j->x + at, p->columns, 2);
            x[r] = (v16)(__builtin_convertvector(half, u16) << 16);
        } else {
            v16 row = {0};
            copy(&row, (const float *)j->x + at, p->columns, 4);
            x[r] = row;
        }
    }
    for (i64 r = p->rows; r < N; r++) x[r] = (v16){0};
}

static inline void load_patch(const job *j, const place *p, v16 *x, i64 turn) {
    if (j->bf16)
        load_rows(j, p, x, 1);
    else
        load_rows(j, p, x, 0);
    if (turn) transpose(x);
}

static inline void load_uniform(const job *j, const place *p, v16 *uniform) {
    for (i64 r = 0; r < N; r++) {
        b16 random = {0};
        if (r < p->rows) copy(&random, j->bits + p->first + r * j->columns, p->columns, 1);
        uniform[r] = numbers(random) * 0x1p-8f;
    }
    if (!j->along_rows) transpose(uniform);
}

static inline void store_patch(const job *j, const place *p, v16 *y) {
    if (!j->along_rows) transpose(y);
    for (i64 r = 0; r < p->rows; r++) {
        i64 at = p->first + r * j->columns;
        if (j->kind == FLOAT32)
            copy((float *)j->out + at, y + r, p->columns, 4);
        else if (j->kind == BFLOAT16) {
            h16 half = halves(bf16_bits(y[r]));
            copy((uint16_t *)j->out + at, &half, p->columns, 2);
        } else {
            b16 codes = bytes(code_of(y[r]));
            copy((uint8_t *)j->out + at, &codes, p->columns, 1);
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

/* Gives every lane the largest, or the sum of sums of the farthest. */
static inline v16 over_lanes(v16 value, int sum) {
#define FOLD(...)                                             \
    {                                                         \
        v16 other = SHUFFLE(value, value, __VA_ARGS__);       \
        value = sum ? value + other : larger(value, other);   \
    }
    FOLD(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
    FOLD(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
    FOLD(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
    FOLD(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
    return value;
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
    v16 smallest = {0};
    for (int byte = 0; byte < 127; byte++) { /* 0 stands for the scale of the maximum */
        float value = byte < 8 ? byte * 0x1p-9f : (8 + (byte & 7)) * 0x1p-10f * (1 << (byte >> 3));
        v16 scale = byte ? all(value) : best, factor = encode_factor(scale, encode), decode = scale / encode;
        v16 sum = {0};
        for (int i = 0; i < N; i++) {
            v16 difference = round_e2m1(x[i], factor, NULL) * decode - x[i];
            sum += difference * difference;
        }
        if (!byte)
            smallest = sum;
        else {
            best = less(sum, smallest, scale, best);
            smallest = less(sum, smallest, sum, smallest);
        }
    }
    return best;
}

static void quantize_patch(const job *j, const place *p, int same) {
    v16 x[N], q[N], uniform[N], encode = all(1), amax = {0}, given = {0};
    i64 lanes = j->along_rows ? p->columns : p->rows;
    i64 blocks = (j->along_rows ? j->rows : j->columns) / N, block = (j->along_rows ? p->row : p->column) / N;
    i64 lane = p->matrix * (j->along_rows ? j->columns : j->rows) + (j->along_rows ? p->column : p->row);
    i64 row = p->matrix * j->rows + p->row;
    if (same) {
        i64 group = row / j->rows_per_scale;
        encode = all(j->encode[group]), amax = all(j->amax[group]);
    } else
        for (i64 i = 0; i < lanes; i++) {
            i64 group = (row + i) / j->rows_per_scale;
            encode[i] = j->encode[group], amax[i] = j->amax[group];
        }
    if (j->choice == GIVEN)
        for (i64 i = 0; i < lanes; i++) given[i] = j->given[(lane + i) * blocks + block];
    load_patch(j, p, x, !j->along_rows);
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
        for (int i = 0; i < N; i++) q[i] = less(theirs, mine, others[i], q[i]);
        scale = less(theirs, mine, four, scale);
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
    int same = j->along_rows || j->rows_per_scale % j->rows == 0; /* one S for all lanes of a patch */
#pragma omp parallel for num_threads(j->threads) if (j->matrices * j->rows * j->columns >= PARALLEL_WORK)
    for (i64 strip = 0; strip < strips; strip++)
        for (place p = locate(j, strip); p.column < j->columns; step(j, &p)) quantize_patch(j, &p, same);
}

/* The largest magnitude of each strip of 16 rows, NaN where there is one: [matrices, strips]. */
void superbolt_amax(const job *j, float *out) {
    i64 strips = j->matrices * ((j->rows + N - 1) / N);
#pragma omp parallel for num_threads(j->threads) if (j->matrices * j->rows * j->columns >= PARALLEL_WORK)
    for (i64 strip = 0; strip < strips; strip++) {
        v16 largest = {0}, x[N];
        for (place p = locate(j, strip); p.column < j->columns; step(j, &p)) {
            load_patch(j, &p, x, j->hadamard && !j->along_rows); /* without a rotation any order will do */
            if (j->hadamard) rotate(x, j->bf16);
            largest = larger(largest, maximum(x));
        }
        out[strip] = over_lanes(largest, 0)[0];
    }
}

/* Vectors of 16 numbers, and matrices in patches of 16x16 of them: what the quantisers of quantization.c share.
 *
 * A patch is held as 16 vectors. Their lanes are 16 blocks and a vector is one number of each, so that everything about a
 * block is done lane by lane; where blocks lie along the rows of memory, patches are transposed on the way in and out.
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
#define PARALLEL_WORK (1 << 16) /* numbers from which threads pay */

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

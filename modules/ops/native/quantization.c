/* Quantisers that round a matrix in one pass over memory, on a CPU.
 *
 * Bit for bit the portable operations of modules/precision (compiled without -ffast-math or contraction).
 * `quantization.py` fills the structure `job` of patches.h and says what it means.
 */
#include "patches.h"

/* --------------------------------------------------------------------------------------------------------- NVFP4 */

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

/* Nothing but the random Hadamard transform. */
void superbolt_rotate(const job *j) {
    i64 strips = j->matrices * ((j->rows + N - 1) / N);
#pragma omp parallel for num_threads(j->threads) if (j->matrices * j->rows * j->columns >= PARALLEL_WORK)
    for (i64 strip = 0; strip < strips; strip++)
        for (place p = locate(j, strip); p.column < j->columns; step(j, &p)) {
            v16 x[N];
            load_patch(j, &p, x, !j->along_rows);
            rotate(x, j->bf16);
            store_patch(j, &p, x);
        }
}

/* ------------------------------------------------------------------------------------------------- MXFP8 and FP8 */

/* The smallest powers of two, 2^-127 to 2^127, that keep maxima of blocks within 448, and what they are multiplied by to
 * be 1; NaN for NaN. */
static void mxfp8_scales(v16 largest, v16 *powers, v16 *inverses) {
    for (int i = 0; i < N; i++) {
        u16 bits = (u16)(largest / 448.0f), pair;
        uint32_t exponent = bits[i] <= 0x400000 ? 0 : (bits[i] + 0x7fffff) >> 23; /* 0x400000: 2^-127 */
        if (exponent > 254) exponent = 254;
        pair[0] = exponent ? exponent << 23 : 0x400000;
        pair[1] = exponent < 254 ? (254 - exponent) << 23 : 0x400000;
        (*powers)[i] = bits[i] > 0x7f800000 ? largest[i] * 0 : ((v16)pair)[0];
        (*inverses)[i] = ((v16)pair)[1];
    }
}

/* Two patches hold 16 blocks of 32. */
static void mxfp8_patches(const job *j, const place *places) {
    v16 x[2][N], powers, inverses;
    for (int half = 0; half < 2; half++) load_patch(j, places + half, x[half], !j->along_rows);
    mxfp8_scales(larger(maximum(x[0]), maximum(x[1])), &powers, &inverses);
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < N; i++) {
            v16 value = x[half][i], size = least(magnitude(value * inverses), all(448.0f));
            x[half][i] = (v16)((u16)(round_e4m3(size) * powers) | ((u16)value & SIGN));
        }
        store_patch(j, places + half, x[half]);
    }
}

void superbolt_mxfp8(const job *j) {
    i64 strips = j->matrices * ((j->rows + N - 1) / N), pair = j->along_rows ? 2 : 1;
#pragma omp parallel for num_threads(j->threads) if (j->matrices * j->rows * j->columns >= PARALLEL_WORK)
    for (i64 strip = 0; strip < strips; strip += pair) {
        place places[2] = {locate(j, strip), locate(j, strip + pair - 1)};
        if (!j->along_rows) step(j, places + 1);
        while (places[0].column < j->columns) {
            mxfp8_patches(j, places);
            for (int i = 0; i < 2; i++)
                for (int steps = j->along_rows ? 1 : 2; steps; steps--) step(j, places + i);
        }
    }
}

static inline v16 round_e5m2(v16 value) {
    u16 bits = (u16)value;
    v16 normal = (v16)((bits + 0xfffff + ((bits >> 21) & 1)) & ~0x1fffffu);
    v16 subnormal = (value + 0x1.8p7f) - 0x1.8p7f;
    return less(value, all(0x1p-14f), subnormal, normal);
}

/* E4M3, or E5M2 where the largest number says so, times a scale of the tensor (of the row). */
void superbolt_fp8(const job *j, float largest) {
    i64 strips = j->matrices * ((j->rows + N - 1) / N);
#pragma omp parallel for num_threads(j->threads) if (j->matrices * j->rows * j->columns >= PARALLEL_WORK)
    for (i64 strip = 0; strip < strips; strip++) {
        place p = locate(j, strip);
        v16 x[N], scales[N];
        for (i64 r = 0; r < p.rows; r++)
            scales[r] = all(j->encode[(p.matrix * j->rows + p.row + r) / j->rows_per_scale]);
        for (; p.column < j->columns; step(j, &p)) {
            load_patch(j, &p, x, 0);
            for (i64 r = 0; r < p.rows; r++) {
                v16 product = x[r] * scales[r], size = least(magnitude(product), all(largest));
                v16 rounded = largest > 448 ? round_e5m2(size) : round_e4m3(size);
                if (!j->unscaled) rounded /= scales[r];
                u16 broken = (u16)(product != product) & NOT_A_NUMBER;
                x[r] = (v16)((u16)rounded | ((u16)product & SIGN) | broken);
            }
            store_patch(j, &p, x);
        }
    }
}

/* ----------------------------------------------------------------------------------------- operands of few-row products */

/* What NVFP4 (format 0) or FP8 leaves of numbers with one S, `encode`: times S where `unscaled`. Of NVFP4 they are whole
 * blocks, whatever rows these come from, and lie as the 16 lanes of a patch. `out` may be `x`. */
void superbolt_operand(const float *x, i64 count, i64 format, float encode, i64 unscaled, float *out) {
    i64 rows = count % N ? 1 : count / N;
    job j = {.x = x, .matrices = 1, .rows = rows, .columns = count / rows, .out = out, .kind = FLOAT32};
    j.rows_per_scale = rows, j.encode = j.amax = &encode, j.unscaled = unscaled, j.threads = 1;
    j.along_rows = format; /* FP8 has no blocks: patches need no turning */
    if (format)
        superbolt_fp8(&j, 448);
    else
        superbolt_quantize(&j);
}

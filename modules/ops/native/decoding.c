/* The layers of the network for a few new positions of each row, on a CPU.
 *
 * A decoding step of a small model is hundreds of tensor operations of a few microseconds, most of it the way to them.
 * Here it is one call. The arithmetic is that of the portable operations: fp32, with a rounding to bf16 wherever they
 * hold a bf16 tensor. modules/backbone/native.py fills the structures below and says when they apply.
 * Shapes: B rows, T new positions, n = B T, D hidden, I in-features, O out-features, k taps, C convolution channels,
 * H Mamba heads, P head dim, G groups, N state, E experts, K top-k.
 */
#include <float.h>
#include <math.h>
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

typedef struct {
    const void *weight; /* [O, I], fp32 or bf16; experts: [E, O, I] */
    i64 out, in;
} linear;

typedef struct {
    i64 kind;              /* 'M' 'E' '*' '-' */
    const float *norm;     /* [D] */
    linear products[6];    /* M: in, out; *: q, k, v, o; -: up, down; E: latent in, latent out, shared up, shared down,
                              experts up, experts down */
    const float *tables[6]; /* M: convolution [C, k], its bias [C] or NULL, A_log [H], D [H], dt_bias [H], norm [H P];
                              E: router [E, D], its bias [E] */
    i64 sizes[6];          /* M: H, P, G, N, k; *: Q, K, P; E: E, K, groups, selectable groups, normalised */
    float factor;          /* E: routed_scaling_factor */
    void *states[2];       /* M: window [B, k - 1, C] in the compute dtype, state fp32 [B, H, P, N];
                              *: keys and values [B, K, capacity, P] in the compute dtype */
    float *held[2];        /* M, when held: inputs [B, T, C] of the convolution; [B, T, H P + G N + H]: x, B, dt */
} layer;

typedef struct {
    i64 hidden, rows, length, bf16, hold, capacity, threads, layers;
    float epsilon;
    const i64 *starts;         /* [B] positions before */
    const void *embedding;     /* [V, D] in the compute dtype */
    const float *final;        /* [D], weight of the norm behind the layers */
    const float *enorm, *hnorm; /* [D], of an MTP block */
    linear join;               /* [D, 2 D], of an MTP block, else NULL */
} pass;

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

static inline float silu(float value) { return value / (1 + expf(-value)); }

/* Memory of one call: blocks are taken one after the other and given back together. */
typedef struct {
    char *start;
    size_t used, size;
} arena;

static float *take(arena *memory, i64 floats) {
    size_t bytes = ((size_t)floats * sizeof(float) + 63) / 64 * 64;
    if (memory->used + bytes > memory->size) return NULL;
    float *block = (float *)(memory->start + memory->used);
    memory->used += bytes;
    return block;
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

/* y[r] = W x[r] for rows given by pointers, rounded to bf16 where that is the format. */
static void multiply_rows(const float *const *x, float *const *y, i64 rows, const void *weight, i64 out, i64 in,
                          const pass *p) {
    i64 bf16 = p->bf16;
    int threads = rows * out * in >= PARALLEL_WORK ? (int)p->threads : 1;
    for (i64 start = 0; start < rows;) {
        int part = (int)(rows - start < LANES ? rows - start : LANES);
        if (part < MANY_ROWS) {
            part = part < FEW_ROWS ? part : FEW_ROWS;
            v16 *side = part > 2 && in % LANES == 0 ? aligned_alloc(64, (size_t)(in / QUAD) * sizeof(v16)) : NULL;
            if (side)
                for (i64 i = 0; i < in; i++)
                    for (int r = 0; r < QUAD; r++)
                        ((float *)side)[i / QUAD * LANES + QUAD * r + i % QUAD] = r < part ? x[start + r][i] : 0;
#pragma omp parallel for num_threads(threads) if (threads > 1)
            for (i64 block = 0; block < (out + 63) / 64; block++) {
                i64 first = block * 64, end = first + 64 < out ? first + 64 : out, whole = side ? end / QUAD * QUAD : first;
                if (side) quad_rows(side, part, weight, bf16, in, first, whole, y + start);
                dot_rows(x + start, part, weight, bf16, in, whole, end, y + start);
            }
            free(side);
        } else {
            v16 *side = aligned_alloc(64, (size_t)in * sizeof(v16));
            for (i64 i = 0; i < in; i++)
                for (int r = 0; r < LANES; r++) side[i][r] = r < part ? x[start + r][i] : 0;
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
        for (int r = 0; r < part; r++) round_all(y[start + r], out, bf16);
        start += part;
    }
}

static void multiply(const float *x, i64 rows, const linear *l, float *y, const pass *p) {
    const float *from[rows];
    float *to[rows];
    for (i64 r = 0; r < rows; r++) from[r] = x + r * l->in, to[r] = y + r * l->out;
    multiply_rows(from, to, rows, l->weight, l->out, l->in, p);
}

/* Logits, or any product without bias: y [n, O] = x [n, I] W^T. */
void superbolt_linear(const float *x, i64 rows, const void *weight, i64 out, i64 in, i64 bf16, i64 threads, float *y) {
    pass p = {.bf16 = bf16, .threads = threads};
    linear l = {weight, out, in};
    multiply(x, rows, &l, y, &p);
}

/* --------------------------------------------------------------------------------------------------------- layers */

/* Normalises rows [D] of x into rows of y that lie `stride` apart. */
static void rms_norm(const float *x, i64 rows, const float *weight, float *y, i64 stride, const pass *p) {
    i64 size = p->hidden;
    for (i64 r = 0; r < rows; r++, x += size, y += stride) {
        float sum = 0;
        for (i64 i = 0; i < size; i++) sum += x[i] * x[i];
        float scale = 1 / sqrtf(sum / size + p->epsilon);
        for (i64 i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
        round_all(y, size, p->bf16);
    }
}

static void squared_relu(float *x, i64 count, i64 bf16) {
    for (i64 i = 0; i < count; i++) x[i] = x[i] > 0 ? x[i] * x[i] : 0;
    round_all(x, count, bf16);
}

/* The state of heads [first, last) of one row brought from `before` over one position, to another place or the same;
 * y [P] per head unless NULL. */
static void scan_heads(const layer *l, const float *before, float *state, const float *x, const float *B,
                       const float *C, const float *dt, i64 first, i64 last, float *y) {
    i64 heads = l->sizes[0], width = l->sizes[1], groups = l->sizes[2], size = l->sizes[3];
    for (i64 h = first; h < last; h++) {
        float decay = expf(-dt[h] * expf(l->tables[2][h])), skip = l->tables[3][h];
        const float *b = B + h / (heads / groups) * size, *c = C ? C + h / (heads / groups) * size : NULL;
        for (i64 p = 0; p < width; p++) {
            const float *s0 = before + (h * width + p) * size;
            float *s = state + (h * width + p) * size, u = dt[h] * x[h * width + p], sum = 0;
            if (c) {
#pragma GCC ivdep
                for (i64 i = 0; i < size; i++) {
                    float value = s0[i] * decay + u * b[i];
                    s[i] = value, sum += value * c[i];
                }
                y[h * width + p] = sum + skip * x[h * width + p];
            } else
#pragma GCC ivdep
                for (i64 i = 0; i < size; i++) s[i] = s0[i] * decay + u * b[i];
        }
    }
}

static int mamba(const layer *l, const float *x, float *out, const pass *p, arena memory) {
    i64 heads = l->sizes[0], groups = l->sizes[2], size = l->sizes[3], taps = l->sizes[4], bf16 = p->bf16;
    i64 inner = heads * l->sizes[1], states = groups * size, channels = inner + 2 * states;
    i64 width = l->products[0].out, rows = p->rows * p->length;
    float *projected = take(&memory, rows * width), *y = take(&memory, rows * inner), *mixed = take(&memory, channels);
    float *window = take(&memory, taps * channels), *weights = take(&memory, taps * channels);
    float *dt = take(&memory, heads), *held = NULL, *scratch = p->hold ? take(&memory, inner * size) : mixed;
    if (!projected || !y || !mixed || !window || !weights || !dt || !scratch) return 1;
    for (i64 c = 0; c < channels; c++)
        for (i64 k = 0; k < taps; k++) weights[k * channels + c] = l->tables[0][c * taps + k];
    multiply(x, rows, &l->products[0], projected, p);
    int threads = inner * size >= PARALLEL_WORK / 4 ? (int)p->threads : 1;
    for (i64 b = 0; b < p->rows; b++) {
        float *before = (float *)l->states[1] + b * inner * size, *state = p->hold ? scratch : before;
        for (i64 i = 0; i < (taps - 1) * channels; i++)
            window[i] = element(l->states[0], b * (taps - 1) * channels + i, bf16);
        for (i64 t = 0; t < p->length; t++) {
            i64 r = b * p->length + t;
            const float *gate = projected + r * width, *new = gate + inner, *steps = new + channels;
            memcpy(window + (taps - 1) * channels, new, (size_t)channels * sizeof(float));
            for (i64 c = 0; c < channels; c++) mixed[c] = l->tables[1] ? l->tables[1][c] : 0;
            for (i64 k = 0; k < taps; k++)
                for (i64 c = 0; c < channels; c++) mixed[c] += window[k * channels + c] * weights[k * channels + c];
            for (i64 c = 0; c < channels; c++) mixed[c] = silu(mixed[c]);
            round_all(mixed, channels, bf16);
            memmove(window, window + channels, (size_t)((taps - 1) * channels) * sizeof(float));
            for (i64 h = 0; h < heads; h++) {
                float v = steps[h] + l->tables[4][h];
                dt[h] = v > 20 ? v : log1pf(expf(v));
            }
            if (p->hold) {
                memcpy(l->held[0] + r * channels, new, (size_t)channels * sizeof(float));
                held = l->held[1] + r * (inner + states + heads);
                memcpy(held, mixed, (size_t)(inner + states) * sizeof(float));
                memcpy(held + inner + states, dt, (size_t)heads * sizeof(float));
            }
#pragma omp parallel for num_threads(threads) if (threads > 1)
            for (i64 h = 0; h < heads; h++)
                scan_heads(l, before, state, mixed, mixed + inner, mixed + inner + states, dt, h, h + 1, y + r * inner);
            before = state;
            round_all(y + r * inner, inner, bf16);
            i64 part = inner / groups;
            for (i64 g = 0; g < groups; g++) {
                float sum = 0, *v = y + r * inner + g * part;
                for (i64 i = 0; i < part; i++) v[i] *= silu(gate[g * part + i]), sum += v[i] * v[i];
                float scale = 1 / sqrtf(sum / part + p->epsilon);
                for (i64 i = 0; i < part; i++) v[i] *= scale * l->tables[5][g * part + i];
            }
        }
        if (!p->hold)
            for (i64 i = 0; i < (taps - 1) * channels; i++) {
                i64 place = b * (taps - 1) * channels + i;
                if (bf16)
                    ((uint16_t *)l->states[0])[place] = to_bf16(window[i]);
                else
                    ((float *)l->states[0])[place] = window[i];
            }
    }
    round_all(y, rows * inner, bf16);
    multiply(y, rows, &l->products[1], out, p);
    return 0;
}

static void softmax(float *scores, i64 count) {
    float most = -FLT_MAX, sum = 0;
    for (i64 s = 0; s < count; s++) most = scores[s] > most ? scores[s] : most;
    for (i64 s = 0; s < count; s++) scores[s] = expf(scores[s] - most), sum += scores[s];
    for (i64 s = 0; s < count; s++) scores[s] /= sum;
}

/* y [rows, width]: values [count, width] weighed by each row's weights; 16 channels of all rows at a time. */
static void mean_values(const float *const *weights, int rows, const void *values, i64 bf16, i64 width, i64 count,
                        float *y) {
    i64 c = 0;
    for (; c + LANES <= width; c += LANES) {
        v16 sums[FEW_ROWS] = {{0}};
        for (i64 s = 0; s < count; s++) {
            v16 value = load(values, s * width + c, bf16);
            for (int r = 0; r < rows; r++) sums[r] += weights[r][s] * value;
        }
        for (int r = 0; r < rows; r++) memcpy(y + r * width + c, &sums[r], sizeof(v16));
    }
    for (; c < width; c++)
        for (int r = 0; r < rows; r++) {
            float sum = 0;
            for (i64 s = 0; s < count; s++) sum += weights[r][s] * element(values, s * width + c, bf16);
            y[r * width + c] = sum;
        }
}

static int attention(const layer *l, const float *x, float *out, const pass *p, arena memory) {
    i64 queries = l->sizes[0], heads = l->sizes[1], width = l->sizes[2], bf16 = p->bf16, rows = p->rows * p->length;
    i64 shared = queries / heads, longest = 0;
    float *q = take(&memory, rows * queries * width), *new[2];
    for (int i = 0; i < 2; i++) new[i] = take(&memory, rows * heads * width);
    for (i64 b = 0; b < p->rows; b++) longest = longest > p->starts[b] ? longest : p->starts[b];
    longest += p->length;
    int threads = rows * queries * width * longest >= PARALLEL_WORK ? (int)p->threads : 1;
    float *y = take(&memory, rows * queries * width), *all_scores = take(&memory, p->rows * heads * FEW_ROWS * longest);
    if (!q || !new[0] || !new[1] || !y || !all_scores) return 1;
    multiply(x, rows, &l->products[0], q, p);
    for (int i = 0; i < 2; i++) multiply(x, rows, &l->products[1 + i], new[i], p);
    for (i64 i = 0; i < rows * queries * width; i++) q[i] *= 1 / sqrtf((float)width);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (i64 job = 0; job < p->rows * heads; job++) {
        i64 b = job / heads, head = job % heads;
        float *scores = all_scores + job * FEW_ROWS * longest;
        void *kept[2];
        for (int i = 0; i < 2; i++) {
            i64 offset = job * p->capacity * width;
            kept[i] = bf16 ? (void *)((uint16_t *)l->states[i] + offset) : (void *)((float *)l->states[i] + offset);
            for (i64 t = 0; t < p->length; t++)
                for (i64 c = 0; c < width; c++) {
                    float value = new[i][((b * p->length + t) * heads + head) * width + c];
                    i64 place = (p->starts[b] + t) * width + c;
                    if (bf16)
                        ((uint16_t *)kept[i])[place] = to_bf16(value);
                    else
                        ((float *)kept[i])[place] = value;
                }
        }
        for (i64 t = 0; t < p->length; t++)
            for (i64 g = 0; g < shared; g += FEW_ROWS) {
                i64 place = ((b * p->length + t) * queries + head * shared + g) * width, end = p->starts[b] + t + 1;
                int group = (int)(shared - g < FEW_ROWS ? shared - g : FEW_ROWS);
                const float *one[FEW_ROWS];
                float *lines[FEW_ROWS];
                for (int r = 0; r < group; r++) one[r] = q + place + r * width, lines[r] = scores + r * longest;
                dot_rows(one, group, kept[0], bf16, width, 0, end, lines);
                for (int r = 0; r < group; r++) softmax(lines[r], end);
                mean_values((const float *const *)lines, group, kept[1], bf16, width, end, y + place);
            }
    }
    round_all(y, rows * queries * width, bf16);
    multiply(y, rows, &l->products[3], out, p);
    return 0;
}

/* Marks the `count` largest of values[0..size) as chosen, the earlier one of equals. */
static void choose(const float *values, i64 size, i64 count, const char *allowed, char *chosen) {
    memset(chosen, 0, (size_t)size);
    for (i64 k = 0; k < count; k++) {
        i64 best = -1;
        for (i64 e = 0; e < size; e++)
            if (!chosen[e] && (!allowed || allowed[e]) && (best < 0 || values[e] > values[best])) best = e;
        chosen[best] = 1;
    }
}

/* Weights [E] of one token, 0 where it does not go. */
static void route(const layer *l, const float *scores, float *weights, char *chosen, float *biased, char *groups) {
    i64 experts = l->sizes[0], top = l->sizes[1], parts = l->sizes[2], best_parts = l->sizes[3];
    for (i64 e = 0; e < experts; e++) biased[e] = scores[e] + l->tables[1][e];
    if (best_parts < parts) {
        i64 size = experts / parts;
        float best[parts];
        char allowed[parts];
        for (i64 g = 0; g < parts; g++) {
            float first = -FLT_MAX, second = -FLT_MAX;
            for (i64 e = g * size; e < (g + 1) * size; e++)
                if (biased[e] > first)
                    second = first, first = biased[e];
                else if (biased[e] > second)
                    second = biased[e];
            best[g] = size > 1 ? first + second : first;
        }
        choose(best, parts, best_parts, NULL, allowed);
        for (i64 e = 0; e < experts; e++) groups[e] = allowed[e / size];
    }
    choose(biased, experts, top, best_parts < parts ? groups : NULL, chosen);
    float sum = 0;
    for (i64 e = 0; e < experts; e++) sum += chosen[e] ? scores[e] : 0;
    float factor = l->factor / (l->sizes[4] ? sum + 1e-20f : 1);
    for (i64 e = 0; e < experts; e++) weights[e] = chosen[e] ? scores[e] * factor : 0;
}

static int mlp(const linear *up, const linear *down, const float *x, i64 rows, float *out, const pass *p,
               arena memory) {
    float *inner = take(&memory, rows * up->out);
    if (!inner) return 1;
    multiply(x, rows, up, inner, p);
    squared_relu(inner, rows * up->out, p->bf16);
    multiply(inner, rows, down, out, p);
    return 0;
}

static int mixture(const layer *l, const float *x, float *out, const pass *p, arena memory) {
    i64 experts = l->sizes[0], rows = p->rows * p->length, bf16 = p->bf16;
    const linear *up = &l->products[4], *down = &l->products[5];
    i64 latent = up->in, inner = up->out;
    float *scores = take(&memory, rows * experts), *weights = take(&memory, rows * experts);
    float *biased = take(&memory, experts), *flags = take(&memory, experts);
    float *narrow = take(&memory, rows * latent), *sums = take(&memory, rows * latent);
    float *between = take(&memory, rows * inner), *back = take(&memory, rows * latent);
    if (!scores || !weights || !biased || !flags || !narrow || !sums || !between || !back) return 1;
    pass exact = *p;
    exact.bf16 = 0;
    linear router = {l->tables[0], experts, p->hidden};
    multiply(x, rows, &router, scores, &exact);
    for (i64 i = 0; i < rows * experts; i++) scores[i] = 1 / (1 + expf(-scores[i]));
    for (i64 r = 0; r < rows; r++)
        route(l, scores + r * experts, weights + r * experts, (char *)flags, biased, (char *)flags + experts);
    if (l->products[0].weight)
        multiply(x, rows, &l->products[0], narrow, p);
    else
        memcpy(narrow, x, (size_t)(rows * latent) * sizeof(float));
    memset(sums, 0, (size_t)(rows * latent) * sizeof(float));
    for (i64 e = 0; e < experts; e++) {
        const float *from[rows], *middle[rows];
        float *to[rows], *last[rows], factor[rows];
        i64 count = 0, users[rows];
        for (i64 r = 0; r < rows; r++)
            if (weights[r * experts + e] != 0) {
                from[count] = narrow + r * latent, users[count] = r, factor[count] = weights[r * experts + e];
                middle[count] = to[count] = between + count * inner, last[count] = back + count * latent;
                count++;
            }
        if (!count) continue;
        i64 size = bf16 ? 2 : 4, place = e * inner * latent * size;
        multiply_rows(from, to, count, (const char *)up->weight + place, inner, latent, p);
        squared_relu(between, count * inner, bf16);
        multiply_rows(middle, last, count, (const char *)down->weight + place, latent, inner, p);
        for (i64 j = 0; j < count; j++)
            for (i64 i = 0; i < latent; i++) sums[users[j] * latent + i] += factor[j] * last[j][i];
    }
    round_all(sums, rows * latent, bf16);
    if (l->products[1].weight)
        multiply(sums, rows, &l->products[1], out, p);
    else
        memcpy(out, sums, (size_t)(rows * latent) * sizeof(float));
    if (l->products[2].weight) {
        float *shared = take(&memory, rows * p->hidden);
        if (!shared || mlp(&l->products[2], &l->products[3], x, rows, shared, p, memory)) return 1;
        for (i64 i = 0; i < rows * p->hidden; i++) out[i] += shared[i];
        round_all(out, rows * p->hidden, bf16);
    }
    return 0;
}

/* What the layers start from, x [n, D]: the tokens' embeddings, or for an MTP block their product, normalised and joined
 * with the hidden states, with join [D, 2 D]. */
static int begin(const pass *p, const i64 *tokens, const void *hidden, float *x, arena memory) {
    i64 rows = p->rows * p->length, size = p->hidden;
    for (i64 r = 0; r < rows; r++)
        for (i64 i = 0; i < size; i++) x[r * size + i] = element(p->embedding, tokens[r] * size + i, p->bf16);
    if (!p->join.weight) return 0;
    float *both = take(&memory, rows * 2 * size), *wide = take(&memory, rows * size);
    if (!both || !wide) return 1;
    for (i64 i = 0; i < rows * size; i++) wide[i] = element(hidden, i, p->bf16);
    rms_norm(x, rows, p->enorm, both, 2 * size, p);
    rms_norm(wide, rows, p->hnorm, both + size, 2 * size, p);
    multiply(both, rows, &p->join, x, p);
    return 0;
}

/* Runs the layers and the norm behind them.
 * tokens [B, T]; hidden [n, D] in the compute dtype, of an MTP block; out [n, D] in the compute dtype.
 * Returns 0, or 1 if `size` bytes of memory are too few. */
int superbolt_forward(const pass *p, const layer *layers, const i64 *tokens, const void *hidden, void *out, void *start,
                      i64 size) {
    arena memory = {start, 0, (size_t)size};
    i64 rows = p->rows * p->length, count = rows * p->hidden;
    float *x = take(&memory, count), *normed = take(&memory, count), *mixed = take(&memory, count);
    if (!x || !normed || !mixed || begin(p, tokens, hidden, x, memory)) return 1;
    for (i64 i = 0; i < p->layers; i++) {
        const layer *l = &layers[i];
        int failed;
        rms_norm(x, rows, l->norm, normed, p->hidden, p);
        if (l->kind == 'M')
            failed = mamba(l, normed, mixed, p, memory);
        else if (l->kind == '*')
            failed = attention(l, normed, mixed, p, memory);
        else if (l->kind == 'E')
            failed = mixture(l, normed, mixed, p, memory);
        else
            failed = mlp(&l->products[0], &l->products[1], normed, rows, mixed, p, memory);
        if (failed) return 1;
        for (i64 j = 0; j < count; j++) x[j] += mixed[j];
        round_all(x, count, p->bf16);
    }
    rms_norm(x, rows, p->final, normed, p->hidden, p);
    if (p->bf16)
        for (i64 i = 0; i < count; i++) ((uint16_t *)out)[i] = to_bf16(normed[i]);
    else
        memcpy(out, normed, (size_t)count * sizeof(float));
    return 0;
}

static i64 largest(const float *values, i64 count) {
    float most = values[0];
    for (i64 i = 1; i < count; i++) most = values[i] > most ? values[i] : most;
    i64 place = 0;
    while (place < count - 1 && values[place] != most) place++;
    return place;
}

/* The most likely token of each row of scores [rows, count]. */
void superbolt_largest(const float *scores, i64 rows, i64 count, i64 *out) {
    for (i64 r = 0; r < rows; r++) out[r] = largest(scores + r * count, count);
}

/* Logits of the lowest ids [0, vocabulary) after each of `rows` hidden states in the compute dtype; with a temperature
 * above 0, the probabilities that it makes of them. */
static void predict(const void *hidden, i64 rows, const linear *head, i64 vocabulary, float temperature, const pass *p,
                    float *wide, float *scores) {
    linear part = {head->weight, vocabulary, head->in};
    for (i64 i = 0; i < rows * head->in; i++) wide[i] = element(hidden, i, p->bf16);
    multiply(wide, rows, &part, scores, p);
    if (temperature > 0) {
        for (i64 i = 0; i < rows * vocabulary; i++) scores[i] /= temperature;
        for (i64 r = 0; r < rows; r++) softmax(scores + r * vocabulary, vocabulary);
    }
}

/* The token that a uniform number in [0, 1) draws from probabilities of any sum, by inverse CDF. */
static i64 draw(const float *probabilities, i64 count, double uniform) {
    double total = 0, before = 0;
    for (i64 i = 0; i < count; i++) total += probabilities[i];
    double point = uniform * total;
    i64 place = 0, last = 0;
    for (; place + 64 <= count; place += 64) { /* the block first: a chain of additions is slow */
        double sum = 0;
        for (i64 i = place; i < place + 64; i++) sum += probabilities[i];
        if (before + sum > point) break;
        before += sum;
    }
    for (; place < count; place++) {
        before += probabilities[place];
        if (probabilities[place] > 0) last = place;
        if (before > point) return place;
    }
    while (!last && count) /* rounding: the last token that can be drawn */
        if (probabilities[--count] > 0) last = count;
    return last;
}

/* Drafts of a round of speculative decoding of one row, by the MTP block (p, block), among the `drafted` lowest ids.
 * tokens [seen], which the block has not seen, the newest last; states [seen, D] in the compute dtype, the hidden states
 * of the positions before them. With a temperature above 0, uniforms [drafts] draw the drafts, from proposals
 * [drafts, drafted], which are filled. Fills proposed [drafts + 1]: the newest token and the drafts. The block then
 * remembers `seen` positions more. Returns 0, or 1 if `size` bytes of memory are too few. */
int superbolt_draft(const pass *given, const layer *block, const linear *head, i64 drafted, const i64 *tokens, i64 seen,
                    const void *states, i64 drafts, float temperature, const double *uniforms, float *proposals,
                    i64 *proposed, void *start, i64 size) {
    arena memory = {start, 0, (size_t)size};
    i64 starts = given->starts[0];
    float *wide = take(&memory, head->in);
    char *state = (char *)take(&memory, seen * head->in);
    if (!wide || !state) return 1;
    pass p = *given;
    p.starts = &starts, p.length = seen, p.hold = 0;
    proposed[0] = tokens[seen - 1];
    for (i64 k = 0; k < drafts; k++) {
        if (superbolt_forward(&p, block, k ? proposed + k : tokens, states, state, memory.start + memory.used,
                              size - (i64)memory.used))
            return 1;
        if (!k) { /* the last position gives the first draft; what follows leaves nothing behind */
            state += (seen - 1) * head->in * (p.bf16 ? 2 : 4);
            states = state, starts += seen, p.length = p.hold = 1;
        }
        float *scores = proposals + k * drafted;
        predict(state, 1, head, drafted, temperature, &p, wide, scores);
        proposed[k + 1] = temperature > 0 ? draw(scores, drafted, uniforms[k]) : largest(scores, drafted);
    }
    return 0;
}

/* The verification of those drafts by the network (p, layers), which then holds drafts + 1 positions: fills own with the
 * drafts kept and one token of the network's own, hidden [drafts + 1, D] in the compute dtype. With a temperature above
 * 0, uniforms [drafts + 1] decide about each draft and draw the network's own token. Returns the number of drafts kept,
 * or -1 if `size` bytes of memory are too few. */
i64 superbolt_verify(const pass *given, const layer *layers, const linear *head, i64 drafted, i64 drafts,
                     float temperature, const double *uniforms, const float *proposals, const i64 *proposed, i64 *own,
                     void *hidden, void *start, i64 size) {
    arena memory = {start, 0, (size_t)size};
    i64 length = drafts + 1, vocabulary = head->out, kept = 0;
    float *wide = take(&memory, length * head->in), *scores = take(&memory, length * vocabulary);
    if (!wide || !scores) return -1;
    pass p = *given;
    p.length = length, p.hold = 1;
    if (superbolt_forward(&p, layers, proposed, NULL, hidden, memory.start + memory.used, size - (i64)memory.used))
        return -1;
    predict(hidden, length, head, vocabulary, temperature, &p, wide, scores);
    if (temperature <= 0) {
        for (;; kept++) {
            own[kept] = largest(scores + kept * vocabulary, vocabulary);
            if (kept == drafts || own[kept] != proposed[kept + 1]) return kept;
        }
    }
    for (; kept < drafts; kept++) {
        i64 token = own[kept] = proposed[kept + 1];
        if (!(uniforms[kept] * proposals[kept * drafted + token] < scores[kept * vocabulary + token])) break;
    }
    float *target = scores + kept * vocabulary;
    if (kept < drafts) { /* what is left of the target; nothing, where both differ by rounding only: then all of it */
        const float *proposal = proposals + kept * drafted;
        float sum = 0;
        for (i64 i = 0; i < vocabulary; i++) {
            float left = target[i] - (i < drafted ? proposal[i] : 0);
            sum += (left > 0 ? left : 0);
        }
        if (sum > 0)
            for (i64 i = 0; i < drafted; i++) target[i] = target[i] > proposal[i] ? target[i] - proposal[i] : 0;
    }
    own[kept] = draw(target, vocabulary, uniforms[drafts]);
    return kept;
}

/* Takes over the first counts [B] of the T held positions of each Mamba-2 layer. */
void superbolt_advance(const pass *p, const layer *layers, const i64 *counts) {
    for (i64 i = 0; i < p->layers; i++) {
        const layer *l = &layers[i];
        if (l->kind != 'M') continue;
        i64 heads = l->sizes[0], states = l->sizes[2] * l->sizes[3], taps = l->sizes[4];
        i64 inner = heads * l->sizes[1], channels = inner + 2 * states, kept = inner + states + heads;
        int threads = inner * l->sizes[3] >= PARALLEL_WORK / 4 ? (int)p->threads : 1;
        for (i64 b = 0; b < p->rows; b++) {
            float *state = (float *)l->states[1] + b * inner * l->sizes[3];
            for (i64 t = 0; t < counts[b]; t++) {
                const float *x = l->held[1] + (b * p->length + t) * kept;
#pragma omp parallel for num_threads(threads) if (threads > 1)
                for (i64 h = 0; h < heads; h++)
                    scan_heads(l, state, state, x, x + inner, NULL, x + inner + states, h, h + 1, NULL);
            }
            for (i64 k = 0; k < taps - 1; k++) { /* position counts + k of the window followed by the held inputs */
                i64 from = counts[b] + k, size = p->bf16 ? 2 : 4;
                char *row = (char *)l->states[0] + b * (taps - 1) * channels * size;
                if (from < taps - 1)
                    memmove(row + k * channels * size, row + from * channels * size, (size_t)(channels * size));
                else
                    for (i64 c = 0; c < channels; c++) {
                        float value = l->held[0][(b * p->length + from - (taps - 1)) * channels + c];
                        if (p->bf16)
                            ((uint16_t *)row)[k * channels + c] = to_bf16(value);
                        else
                            ((float *)row)[k * channels + c] = value;
                    }
            }
        }
    }
}

/* The layers of the network for a few new positions of each row, on a CPU.
 *
 * A decoding step of a small model is hundreds of tensor operations of a few microseconds, most of it the way to them.
 * Here it is one call. The arithmetic is that of the portable operations: fp32, with a rounding to bf16 wherever they
 * hold a bf16 tensor. native.py fills the structures below and says when they apply.
 * Shapes: B rows, T new positions, n = B T, D hidden, I in-features, O out-features, k taps, C convolution channels,
 * H Mamba heads, P head dim, G groups, N state, E experts, K top-k.
 */
#include <float.h>
#include <math.h>

#include "products.h"

typedef struct {
    i64 kind;              /* 'M' 'E' '*' '-' */
    const float *norm;     /* [D] */
    linear products[6];    /* M: in, out; *: q, k, v, o; -: up, down; E: latent in, latent out, shared up, shared down,
                              experts up, experts down */
    const float *tables[6]; /* M: convolution [C, k], its bias [C] or NULL, A_log [H], D [H], dt_bias [H], norm [H P];
                              E: router [E, D], its bias [E] */
    i64 sizes[6];          /* M: H, P, G, N, k; *: Q, K, P; E: E, K, groups, selectable groups, normalised */
    float factor;          /* E: routed_scaling_factor */
    void *states[2];       /* M: window [B, k - 1, C] in the dtype of the in product, state fp32 [B, H, P, N];
                              *: keys and values [B, K, capacity, P] in the dtype of the k product */
    rounding kept[2];      /* *: of keys and values */
    float *held[2];        /* M, when held: inputs [B, T, C] of the convolution; [B, T, H P + G N + H]: x, B, dt */
} layer;

typedef struct {
    i64 hidden, rows, length, hold, capacity, threads, layers;
    i64 bf16;                  /* the residual stream is bf16, else fp32 */
    float epsilon;
    const i64 *starts;         /* [B] positions before */
    const void *embedding;     /* [V, D] in the dtype of the stream */
    const float *final;        /* [D], weight of the norm behind the layers */
    const float *enorm, *hnorm; /* [D], of an MTP block */
    linear join;               /* [D, 2 D], of an MTP block, else NULL */
} pass;

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

static void project(const float *x, i64 rows, const linear *l, float *y, const pass *p) {
    multiply(x, rows, l, p->threads, y);
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
    i64 heads = l->sizes[0], groups = l->sizes[2], size = l->sizes[3], taps = l->sizes[4], bf16 = l->products[0].bf16;
    i64 inner = heads * l->sizes[1], states = groups * size, channels = inner + 2 * states;
    i64 width = l->products[0].out, rows = p->rows * p->length;
    float *projected = take(&memory, rows * width), *y = take(&memory, rows * inner), *mixed = take(&memory, channels);
    float *window = take(&memory, taps * channels), *weights = take(&memory, taps * channels);
    float *dt = take(&memory, heads), *held = NULL, *scratch = p->hold ? take(&memory, inner * size) : mixed;
    if (!projected || !y || !mixed || !window || !weights || !dt || !scratch) return 1;
    for (i64 c = 0; c < channels; c++)
        for (i64 k = 0; k < taps; k++) weights[k * channels + c] = l->tables[0][c * taps + k];
    project(x, rows, &l->products[0], projected, p);
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
    project(y, rows, &l->products[1], out, p);
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
    i64 queries = l->sizes[0], heads = l->sizes[1], width = l->sizes[2], rows = p->rows * p->length;
    i64 bf16 = l->products[1].bf16, shared = queries / heads, longest = 0;
    float *q = take(&memory, rows * queries * width), *new[2];
    for (int i = 0; i < 2; i++) new[i] = take(&memory, rows * heads * width);
    for (i64 b = 0; b < p->rows; b++) longest = longest > p->starts[b] ? longest : p->starts[b];
    longest += p->length;
    int threads = rows * queries * width * longest >= PARALLEL_WORK ? (int)p->threads : 1;
    float *y = take(&memory, rows * queries * width), *all_scores = take(&memory, p->rows * heads * FEW_ROWS * longest);
    if (!q || !new[0] || !new[1] || !y || !all_scores) return 1;
    project(x, rows, &l->products[0], q, p);
    round_all(q, rows * queries * width, bf16);
    for (int i = 0; i < 2; i++) {
        i64 count = rows * heads * width;
        project(x, rows, &l->products[1 + i], new[i], p);
        round_all(new[i], count, bf16);
        if (l->kept[i].round) {
            l->kept[i].round(new[i], count, l->kept[i].format, *l->kept[i].encode, 0, new[i]);
            round_all(new[i], count, bf16);
        }
    }
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
    project(y, rows, &l->products[3], out, p);
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
    project(x, rows, up, inner, p);
    squared_relu(inner, rows * up->out, up->bf16);
    project(inner, rows, down, out, p);
    return 0;
}

static int mixture(const layer *l, const float *x, float *out, const pass *p, arena memory) {
    i64 experts = l->sizes[0], rows = p->rows * p->length;
    const linear *up = &l->products[4], *down = &l->products[5];
    i64 latent = up->in, inner = up->out;
    float *scores = take(&memory, rows * experts), *weights = take(&memory, rows * experts);
    float *biased = take(&memory, experts), *flags = take(&memory, experts);
    float *narrow = take(&memory, rows * latent), *sums = take(&memory, rows * latent);
    float *between = take(&memory, rows * inner), *back = take(&memory, rows * latent);
    if (!scores || !weights || !biased || !flags || !narrow || !sums || !between || !back) return 1;
    linear router = {.weight = l->tables[0], .out = experts, .in = p->hidden};
    project(x, rows, &router, scores, p);
    for (i64 i = 0; i < rows * experts; i++) scores[i] = 1 / (1 + expf(-scores[i]));
    for (i64 r = 0; r < rows; r++)
        route(l, scores + r * experts, weights + r * experts, (char *)flags, biased, (char *)flags + experts);
    if (l->products[0].weight)
        project(x, rows, &l->products[0], narrow, p);
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
        multiply_rows(from, to, count, up, e, p->threads);
        squared_relu(between, count * inner, up->bf16);
        multiply_rows(middle, last, count, down, e, p->threads);
        for (i64 j = 0; j < count; j++)
            for (i64 i = 0; i < latent; i++) sums[users[j] * latent + i] += factor[j] * last[j][i];
    }
    round_all(sums, rows * latent, down->bf16);
    if (l->products[1].weight)
        project(sums, rows, &l->products[1], out, p);
    else
        memcpy(out, sums, (size_t)(rows * latent) * sizeof(float));
    if (l->products[2].weight) {
        float *shared = take(&memory, rows * p->hidden);
        if (!shared || mlp(&l->products[2], &l->products[3], x, rows, shared, p, memory)) return 1;
        for (i64 i = 0; i < rows * p->hidden; i++) out[i] += shared[i];
        i64 bf16 = l->products[1].weight ? l->products[1].bf16 : down->bf16;
        round_all(out, rows * p->hidden, bf16 && l->products[3].bf16);
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
    project(both, rows, &p->join, x, p);
    round_all(x, rows * size, p->bf16);
    return 0;
}

/* Runs the layers and the norm behind them.
 * tokens [B, T]; hidden [n, D] in the dtype of the stream, of an MTP block; out [n, D] likewise.
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
        round_all(mixed, count, p->bf16);
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

/* Logits of the lowest ids [0, vocabulary) after each of `rows` hidden states in the dtype of the stream; with a
 * temperature above 0, the probabilities that it makes of them. */
static void predict(const void *hidden, i64 rows, const linear *head, i64 vocabulary, float temperature, const pass *p,
                    float *wide, float *scores) {
    linear part = *head;
    part.out = vocabulary;
    for (i64 i = 0; i < rows * head->in; i++) wide[i] = element(hidden, i, p->bf16);
    project(wide, rows, &part, scores, p);
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
 * tokens [seen], which the block has not seen, the newest last; states [seen, D] in the dtype of the stream, the hidden states
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
 * drafts kept and one token of the network's own, hidden [drafts + 1, D] in the dtype of the stream. With a temperature above
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
        i64 bf16 = l->products[0].bf16, inner = heads * l->sizes[1], channels = inner + 2 * states, kept = inner + states + heads;
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
                i64 from = counts[b] + k, size = bf16 ? 2 : 4;
                char *row = (char *)l->states[0] + b * (taps - 1) * channels * size;
                if (from < taps - 1)
                    memmove(row + k * channels * size, row + from * channels * size, (size_t)(channels * size));
                else
                    for (i64 c = 0; c < channels; c++) {
                        float value = l->held[0][(b * p->length + from - (taps - 1)) * channels + c];
                        if (bf16)
                            ((uint16_t *)row)[k * channels + c] = to_bf16(value);
                        else
                            ((float *)row)[k * channels + c] = value;
                    }
            }
        }
    }
}

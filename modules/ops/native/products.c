/* What Python takes from products.h. */
#include "products.h"

/* Logits, or any product without bias: y [rows, O] = x [rows, I] W^T. */
void superbolt_linear(const float *x, i64 rows, const linear *l, i64 threads, float *y) {
    multiply(x, rows, l, threads, y);
}

/* The most likely token of each row of scores [rows, count]. */
void superbolt_largest(const float *scores, i64 rows, i64 count, i64 *out) {
    for (i64 r = 0; r < rows; r++) out[r] = largest(scores + r * count, count);
}

// The vector work of many Lanczos recurrences over one flat vector, with full two-pass reorthogonalisation.
//
// Row j of `basis` [m, n] holds the vectors q_j of all recurrences side by side. Tile t is the entries first[t] to
// last[t] - 1, all of recurrence owner[t]; tiles are placed from the start of each recurrence, and those of recurrence b
// are numbered from tiles_of[b] to tiles_of[b + 1] - 1. Everything summed over a recurrence is summed over its tiles in
// that order, in double, so that neither threads nor neighbours change a bit. The functions over tiles work on those
// from `from` to `to` - 1.
//
// This file includes itself, once for float and once for double.
#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <string.h>

#define VECTOR_BYTES 64
#define GROUP 4  // rows of the basis read side by side

#define REAL float
#define NAME(name) name##_float
#include "lanczos.c"
#undef REAL
#undef NAME

#define REAL double
#define NAME(name) name##_double
#include "lanczos.c"

// c[b, j] = the sum of partial[t, j] over the tiles of b; added to, or put into, total[b, j]. Rows of `capacity`.
void lanczos_reduce(const double *partial, const int64_t *tiles_of, int64_t recurrences, int64_t rows, int64_t capacity,
                    int accumulate, double *c, double *total)
{
    for (int64_t b = 0; b < recurrences; ++b) {
        double *sums = c + b * capacity, *whole = total + b * capacity;
        memset(sums, 0, sizeof(double) * (size_t)rows);
        for (int64_t t = tiles_of[b]; t < tiles_of[b + 1]; ++t)
            for (int64_t j = 0; j < rows; ++j) sums[j] += partial[t * capacity + j];
        for (int64_t j = 0; j < rows; ++j) whole[j] = accumulate ? whole[j] + sums[j] : sums[j];
    }
}

// divisor[b] = the norm of what the tiles of b hold, from its squares in column 0 of `partial`.
void lanczos_norms(const double *partial, const int64_t *tiles_of, int64_t recurrences, int64_t capacity,
                   double *divisor)
{
    for (int64_t b = 0; b < recurrences; ++b) {
        double squares = 0.0;
        for (int64_t t = tiles_of[b]; t < tiles_of[b + 1]; ++t) squares += partial[t * capacity];
        divisor[b] = sqrt(squares);
    }
}

// Ends step j of every open recurrence: its alpha, the norm of its remainder, and whether it goes on. A recurrence ends
// where the remainder is at most `noise` times the largest |A q| it has seen, or where its vectors span its space.
void lanczos_finish(const int64_t *offsets, int64_t recurrences, int64_t capacity, int64_t j, double noise,
                    const double *total, double *alpha, double *remainder, double *scale, int64_t *steps, int32_t *open,
                    double *divisor)
{
    for (int64_t b = 0; b < recurrences; ++b) {
        const double left = divisor[b], *h = total + b * capacity;
        divisor[b] = 0.0;
        if (!open[b]) continue;
        double squares = left * left;
        for (int64_t i = 0; i <= j; ++i) squares += h[i] * h[i];
        const double size = sqrt(squares);
        if (size > scale[b]) scale[b] = size;
        alpha[b * capacity + j] = h[j];
        remainder[b * capacity + j] = left;
        steps[b] = j + 1;
        open[b] = left > noise * scale[b] && offsets[b + 1] - offsets[b] > j + 1;
        if (open[b]) divisor[b] = left;
    }
}

#else

typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));
#define VECTOR NAME(vector)
#define LANES ((int64_t)(VECTOR_BYTES / sizeof(REAL)))

static double NAME(sum_of_lanes)(VECTOR lanes)
{
    double sum[VECTOR_BYTES / sizeof(REAL)];
    for (int64_t i = 0; i < LANES; ++i) sum[i] = (double)lanes[i];
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    return sum[0];
}

static VECTOR NAME(short_vector)(const REAL *x, int64_t length)
{
    VECTOR lanes = {0};
    memcpy(&lanes, x, sizeof(REAL) * (size_t)length);
    return lanes;
}

// out[j] = q_j . w over one tile, for q_j = q + j * n; summed in LANES lanes of REAL, and those in double.
static void NAME(tile_dots)(const REAL *q, const REAL *w, int64_t n, int64_t rows, int64_t length, double *out)
{
    const int64_t whole = length - length % LANES;
    int64_t j = 0;
    for (; j + GROUP <= rows; j += GROUP) {
        const REAL *q0 = q + j * n, *q1 = q0 + n, *q2 = q1 + n, *q3 = q2 + n;
        VECTOR a0 = {0}, a1 = {0}, a2 = {0}, a3 = {0};
        for (int64_t i = 0; i < whole; i += LANES) {
            const VECTOR x = *(const VECTOR *)(w + i);
            a0 += *(const VECTOR *)(q0 + i) * x;
            a1 += *(const VECTOR *)(q1 + i) * x;
            a2 += *(const VECTOR *)(q2 + i) * x;
            a3 += *(const VECTOR *)(q3 + i) * x;
        }
        if (whole < length) {
            const VECTOR x = NAME(short_vector)(w + whole, length - whole);
            a0 += NAME(short_vector)(q0 + whole, length - whole) * x;
            a1 += NAME(short_vector)(q1 + whole, length - whole) * x;
            a2 += NAME(short_vector)(q2 + whole, length - whole) * x;
            a3 += NAME(short_vector)(q3 + whole, length - whole) * x;
        }
        out[j] = NAME(sum_of_lanes)(a0);
        out[j + 1] = NAME(sum_of_lanes)(a1);
        out[j + 2] = NAME(sum_of_lanes)(a2);
        out[j + 3] = NAME(sum_of_lanes)(a3);
    }
    for (; j < rows; ++j) {
        const REAL *q0 = q + j * n;
        VECTOR a0 = {0};
        for (int64_t i = 0; i < whole; i += LANES) a0 += *(const VECTOR *)(q0 + i) * *(const VECTOR *)(w + i);
        if (whole < length)
            a0 += NAME(short_vector)(q0 + whole, length - whole) * NAME(short_vector)(w + whole, length - whole);
        out[j] = NAME(sum_of_lanes)(a0);
    }
}

// w -= sum_j c[j] q_j over one tile.
static void NAME(tile_subtract)(const REAL *q, REAL *restrict w, int64_t n, int64_t rows, int64_t length,
                                const double *c)
{
    int64_t j = 0;
    for (; j + GROUP <= rows; j += GROUP) {
        const REAL *restrict q0 = q + j * n, *restrict q1 = q0 + n, *restrict q2 = q1 + n, *restrict q3 = q2 + n;
        const REAL c0 = (REAL)c[j], c1 = (REAL)c[j + 1], c2 = (REAL)c[j + 2], c3 = (REAL)c[j + 3];
        for (int64_t i = 0; i < length; ++i) w[i] -= (c0 * q0[i] + c1 * q1[i]) + (c2 * q2[i] + c3 * q3[i]);
    }
    for (; j < rows; ++j) {
        const REAL *restrict q0 = q + j * n;
        const REAL c0 = (REAL)c[j];
        for (int64_t i = 0; i < length; ++i) w[i] -= c0 * q0[i];
    }
}

static double NAME(tile_squares)(const REAL *w, int64_t length)
{
    double lanes[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= length; i += 8)
        for (int64_t k = 0; k < 8; ++k) lanes[k] += (double)w[i + k] * (double)w[i + k];
    for (; i < length; ++i) lanes[i % 8] += (double)w[i] * (double)w[i];
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// w = source, and partial[t, j] = q_j . w for the rows j < `rows` of the basis.
void NAME(lanczos_dots)(const REAL *basis, const REAL *source, REAL *w, int64_t n, int64_t rows, int64_t capacity,
                        const int64_t *first, const int64_t *last, int64_t from, int64_t to, double *partial)
{
    for (int64_t t = from; t < to; ++t) {
        const int64_t at = first[t], length = last[t] - at;
        memcpy(w + at, source + at, sizeof(REAL) * (size_t)length);
        NAME(tile_dots)(basis + at, w + at, n, rows, length, partial + t * capacity);
    }
}

// w -= sum_j c[b, j] q_j; then partial[t, j] = q_j . w with the tile still in the cache, or, with `norm`,
// partial[t, 0] = w . w.
void NAME(lanczos_update)(const REAL *basis, REAL *w, int64_t n, int64_t rows, int64_t capacity, const int64_t *owner,
                          const int64_t *first, const int64_t *last, int64_t from, int64_t to, const double *c,
                          int norm, double *partial)
{
    for (int64_t t = from; t < to; ++t) {
        const int64_t at = first[t], length = last[t] - at;
        NAME(tile_subtract)(basis + at, w + at, n, rows, length, c + owner[t] * capacity);
        if (norm)
            partial[t * capacity] = NAME(tile_squares)(w + at, length);
        else
            NAME(tile_dots)(basis + at, w + at, n, rows, length, partial + t * capacity);
    }
}

// row = w / divisor[b], and 0 where the divisor is.
void NAME(lanczos_next)(REAL *row, const REAL *w, const int64_t *owner, const int64_t *first, const int64_t *last,
                        int64_t from, int64_t to, const double *divisor)
{
    for (int64_t t = from; t < to; ++t) {
        const double d = divisor[owner[t]];
        if (d > 0.0)
            for (int64_t i = first[t]; i < last[t]; ++i) row[i] = (REAL)((double)w[i] / d);
        else
            memset(row + first[t], 0, sizeof(REAL) * (size_t)(last[t] - first[t]));
    }
}

#undef VECTOR
#undef LANES

#endif

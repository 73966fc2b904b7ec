// Eigenvalues of symmetric tridiagonal matrices and the squared first components of their eigenvectors, by the QL method
// with implicit shifts, of whose rotations only the first row of the eigenvectors is carried along.
//
// One rotation waits for the one before it, through a square root and a division. Several matrices are worked on in turns,
// so that the processor does the rotation of one while it waits for the others.

#if defined(__GNUC__) && !defined(__clang__)
// Joining neighbouring scalars of one rotation in a vector makes its loads wait for two stores: half the speed.
#pragma GCC optimize("no-tree-slp-vectorize")
#endif

#include <math.h>
#include <stdint.h>

#define MOST_ITERATIONS 60
#define EPSILON 0x1p-52
// Beside a largest entry between 1/2 and 1, an off-diagonal entry this small is none; and what it is divided into can
// still be squared.
#define NOTHING 0x1p-500
// As in tridiagonal_c.py.
#define AT_ONCE 4

// A matrix in work: d [n] on its diagonal and e [n - 1] beside it become the eigenvalues in no order, z [n] the first
// components of the eigenvectors; e has room for n entries. The sweep over rows l to m is at row i.
typedef struct {
    int64_t number, n, l, m, i;
    int iteration, fell_apart, exponent;
    double s, c, p, g, *d, *e, *z;
} Work;

typedef struct {
    const double *alpha, *beta;
    const int64_t *lengths;
    int64_t k, next, end;
    double *nodes, *weights;
    int32_t *failed;
} Batch;

// Begins a sweep; 0 if there is none left, -1 if an eigenvalue has had its share of them.
static int next_sweep(Work *q)
{
    const double *d = q->d, *e = q->e;
    for (; q->l < q->n; ++q->l, q->iteration = 0) {
        const int64_t l = q->l;
        int64_t m = l;
        for (; m < q->n - 1; ++m) {
            const double off = fabs(e[m]);
            if (off <= EPSILON * (fabs(d[m]) + fabs(d[m + 1])) || off < NOTHING) break;
        }
        if (m == l) continue;
        if (q->iteration++ >= MOST_ITERATIONS) return -1;
        const double g = (d[l + 1] - d[l]) / (2.0 * e[l]), r = sqrt(g * g + 1.0);
        q->g = d[m] - d[l] + e[l] / (g + (g >= 0.0 ? r : -r));
        q->s = q->c = 1.0;
        q->p = 0.0;
        q->m = m;
        q->i = m - 1;
        q->fell_apart = 0;
        return 1;
    }
    return 0;
}

// One rotation; 1 where the matrix falls apart at row i + 1.
static inline int rotate(Work *q)
{
    double *d = q->d + q->i, *e = q->e + q->i, *z = q->z + q->i;
    const double f = q->s * e[0], b = q->c * e[0], g = q->g, r = sqrt(f * f + g * g);
    e[1] = r;
    if (r == 0.0) return q->fell_apart = 1;
    const double s = f / r, c = g / r, below = d[1] - q->p;
    const double t = (d[0] - below) * s + 2.0 * c * b, p = s * t;
    const double after = z[1], before = z[0];
    d[1] = below + p;
    z[1] = s * before + c * after;
    z[0] = c * before - s * after;
    q->s = s;
    q->c = c;
    q->p = p;
    q->g = c * t - b;
    q->i -= 1;
    return 0;
}

static void end_sweep(Work *q)
{
    if (q->fell_apart) {
        q->d[q->i + 1] -= q->p;
    } else {
        q->d[q->l] -= q->p;
        q->e[q->l] = q->g;
    }
    q->e[q->m] = 0.0;
}

static void load(const Batch *batch, int64_t number, Work *q)
{
    const int64_t n = batch->lengths[number];
    const double *a = batch->alpha + number * batch->k, *off = batch->beta + number * (batch->k - 1);
    q->number = number;
    q->n = n;
    q->l = q->iteration = 0;
    q->d = batch->nodes + number * batch->k;
    q->z = batch->weights + number * batch->k;
    double largest = 0.0;
    for (int64_t i = 0; i < n; ++i) largest = fmax(largest, fabs(a[i]));
    for (int64_t i = 0; i + 1 < n; ++i) largest = fmax(largest, fabs(off[i]));
    q->exponent = 0;  // largest = x 2^exponent with 1/2 <= x < 1: scaling by it is exact
    frexp(largest, &q->exponent);
    for (int64_t i = 0; i < n; ++i) {
        q->d[i] = ldexp(a[i], -q->exponent);
        q->e[i] = i + 1 < n ? ldexp(off[i], -q->exponent) : 0.0;
        q->z[i] = i == 0 ? 1.0 : 0.0;
    }
}

static void finish(const Batch *batch, const Work *q, int failed)
{
    double *d = q->d, *z = q->z;
    batch->failed[q->number] = failed;
    for (int64_t i = 1; i < q->n; ++i) {
        const double node = d[i], first = z[i];
        int64_t at = i;
        for (; at > 0 && d[at - 1] > node; --at) {
            d[at] = d[at - 1];
            z[at] = z[at - 1];
        }
        d[at] = node;
        z[at] = first;
    }
    for (int64_t i = 0; i < q->n; ++i) {
        d[i] = ldexp(d[i], q->exponent);
        z[i] *= z[i];
    }
    for (int64_t i = q->n; i < batch->k; ++i) {
        d[i] = d[q->n - 1];
        z[i] = 0.0;
    }
}

// Goes on to a matrix that needs a sweep; 0 if there is none.
static int next_matrix(Batch *batch, Work *q)
{
    while (batch->next < batch->end) {
        load(batch, batch->next++, q);
        const int found = next_sweep(q);
        if (found > 0) return 1;
        finish(batch, q, found < 0);
    }
    return 0;
}

// Nodes [B, k], ascending, and weights [B, k] of the leading lengths[b] rows of the matrices from `from` to `to` - 1, with
// alpha [B, k] on the diagonal and beta [B, k - 1] beside it, all finite. Padding repeats the last node at weight 0.
// failed[b] = 1 where the iteration did not converge. `scratch` holds AT_ONCE * k doubles.
void tridiagonal_quadrature(const double *alpha, const double *beta, const int64_t *lengths, int64_t k, int64_t from,
                            int64_t to, double *nodes, double *weights, int32_t *failed, double *scratch)
{
    Batch batch = {alpha, beta, lengths, k, from, to, nodes, weights, failed};
    Work work[AT_ONCE];
    int count = 0;
    for (; count < AT_ONCE; ++count) {
        work[count].e = scratch + count * k;
        if (!next_matrix(&batch, &work[count])) break;
    }
    while (count > 0) {
        int64_t rotations = work[0].i - work[0].l + 1;
        for (int q = 1; q < count; ++q) {
            const int64_t left = work[q].i - work[q].l + 1;
            if (left < rotations) rotations = left;
        }
        int stop = 0;
        if (count == AT_ONCE)
            for (; rotations > 0 && !stop; --rotations)
                stop = rotate(&work[0]) | rotate(&work[1]) | rotate(&work[2]) | rotate(&work[3]);
        else
            for (; rotations > 0 && !stop; --rotations)
                for (int q = 0; q < count; ++q) stop |= rotate(&work[q]);
        for (int q = 0; q < count; ++q) {
            if (!work[q].fell_apart && work[q].i >= work[q].l) continue;
            end_sweep(&work[q]);
            const int found = next_sweep(&work[q]);
            if (found > 0) continue;
            finish(&batch, &work[q], found < 0);
            if (!next_matrix(&batch, &work[q])) work[q--] = work[--count];
        }
    }
}

// Tridiagonal quadrature by implicit-shift QL, one thread for each matrix: the arithmetic of tridiagonal.c, operation for
// operation. Entry i of matrix b is at x[i * count + b], so that a warp reads side by side.
//
// diagonal [k, count] becomes the nodes, ascending; off [k, count] (its last row is room) is used up; weights [k, count]
// come out. Beyond the rows that count, nodes repeat the last at weight 0. A matrix with NaN or infinite entries, a
// length outside 1 to k, or an eigenvalue that takes more than 60 iterations gets NaN nodes and weights.

#define MOST_ITERATIONS 60
#define EPSILON 0x1p-52
#define NOTHING 0x1p-500

typedef long long int64;

// Returns 1 where some eigenvalue did not converge.
__device__ int implicit_ql(int n, double *d, double *e, double *z, int64 stride)
{
    for (int i = 0; i < n; ++i) z[i * stride] = i == 0 ? 1.0 : 0.0;
    e[(n - 1) * stride] = 0.0;
    for (int l = 0; l < n; ++l) {
        for (int iteration = 0;; ++iteration) {
            int m = l;
            for (; m < n - 1; ++m) {
                const double beside = fabs(e[m * stride]);
                if (beside <= EPSILON * (fabs(d[m * stride]) + fabs(d[(m + 1) * stride])) || beside < NOTHING) break;
            }
            if (m == l) break;
            if (iteration >= MOST_ITERATIONS) return 1;
            const double dl = d[l * stride], el = e[l * stride];
            double g = (d[(l + 1) * stride] - dl) / (2.0 * el);
            double r = sqrt(g * g + 1.0);
            g = d[m * stride] - dl + el / (g + (g >= 0.0 ? r : -r));
            double s = 1.0, c = 1.0, p = 0.0;
            int i = m - 1;
            for (; i >= l; --i) {
                const double ei = e[i * stride], f = s * ei, b = c * ei;
                r = sqrt(f * f + g * g);
                e[(i + 1) * stride] = r;
                if (r == 0.0) break;
                s = f / r;
                c = g / r;
                g = d[(i + 1) * stride] - p;
                r = (d[i * stride] - g) * s + 2.0 * c * b;
                p = s * r;
                d[(i + 1) * stride] = g + p;
                g = c * r - b;
                const double after = z[(i + 1) * stride], before = z[i * stride];
                z[(i + 1) * stride] = s * before + c * after;
                z[i * stride] = c * before - s * after;
            }
            if (i >= l) {  // the matrix fell apart at row i + 1
                d[(i + 1) * stride] -= p;
                e[m * stride] = 0.0;
                continue;
            }
            d[l * stride] -= p;
            e[l * stride] = g;
            e[m * stride] = 0.0;
        }
    }
    return 0;
}

extern "C" __global__ void __launch_bounds__(32, 16)
tridiagonal_quadrature(double *__restrict__ diagonal, double *__restrict__ off, double *__restrict__ weights,
                       const int64 *__restrict__ lengths, int count, int k)
{
    const int b = blockIdx.x * 32 + threadIdx.x;
    if (b >= count) return;
    const int64 stride = count, length = lengths[b];
    const int n = length < 1 || length > k ? 0 : (int)length;
    double *d = diagonal + b, *e = off + b, *z = weights + b;
    double largest = 0.0, sum = 0.0;
    for (int i = 0; i < n; ++i) {
        largest = fmax(largest, fabs(d[i * stride]));
        sum += fabs(d[i * stride]) * 0.0;
    }
    for (int i = 0; i + 1 < n; ++i) {
        largest = fmax(largest, fabs(e[i * stride]));
        sum += fabs(e[i * stride]) * 0.0;
    }
    int failed = n == 0 || sum != 0.0, exponent = 0;  // what is not finite, times 0, is NaN
    if (!failed) {
        frexp(largest, &exponent);
        for (int i = 0; i < n; ++i) d[i * stride] = ldexp(d[i * stride], -exponent);
        for (int i = 0; i + 1 < n; ++i) e[i * stride] = ldexp(e[i * stride], -exponent);
        failed = implicit_ql(n, d, e, z, stride);
    }
    if (failed) {
        const double none = sqrt(-1.0);
        for (int i = 0; i < k; ++i) d[i * stride] = z[i * stride] = none;
        return;
    }
    for (int i = 1; i < n; ++i) {
        const double node = d[i * stride], first = z[i * stride];
        int at = i;
        for (; at > 0 && d[(at - 1) * stride] > node; --at) {
            d[at * stride] = d[(at - 1) * stride];
            z[at * stride] = z[(at - 1) * stride];
        }
        d[at * stride] = node;
        z[at * stride] = first;
    }
    for (int i = 0; i < n; ++i) {
        d[i * stride] = ldexp(d[i * stride], exponent);
        z[i * stride] *= z[i * stride];
    }
    for (int i = n; i < k; ++i) {
        d[i * stride] = d[(n - 1) * stride];
        z[i * stride] = 0.0;
    }
}

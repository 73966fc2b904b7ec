// The vector work of many Lanczos recurrences over one flat vector, with full two-pass reorthogonalisation and no
// floating-point atomics: every sum is made in one order, whatever the schedule.
//
// REAL is float or double. Row j of `basis` [m, n] holds the vectors q_j of all recurrences side by side. Strip t is the
// entries first[t] to last[t] - 1, all of recurrence owner[t], which has the strips strips_of[b] to strips_of[b + 1] - 1.
// A strip is worked off in tiles of TILE entries. Launch:
//   lanczos_dots, lanczos_update, lanczos_next   one block of THREADS for each strip
//   lanczos_reduce                               32 x GROUPS threads for 32 coefficients of one recurrence
//   lanczos_finish                               one block of THREADS for each recurrence
// A step is dots, reduce, update, reduce, update (norm), finish, next: three reads of the basis.

#define TILE 256
#define THREADS 256
#define WARPS (THREADS / 32)
#define GROUPS 32
#define ALL 0xffffffffu

typedef long long int64;

__device__ __forceinline__ REAL multiply_add(REAL a, REAL b, REAL c)
{
    return sizeof(REAL) == 4 ? (REAL)fmaf((float)a, (float)b, (float)c) : (REAL)fma((double)a, (double)b, (double)c);
}

// Adds to out[j], or puts there, q_j . tile for the tile at `at`; every row belongs to one warp.
__device__ __forceinline__ void tile_dots(const REAL *basis, int64 n, int rows, int64 at, int length, const REAL *tile,
                                          int add, double *out)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int j = warp; j < rows; j += WARPS) {
        const REAL *q = basis + j * n + at;
        REAL sum = 0;
#pragma unroll
        for (int i = lane; i < TILE; i += 32)
            if (i < length) sum = multiply_add(q[i], tile[i], sum);
        for (int half = 16; half > 0; half >>= 1) sum += __shfl_xor_sync(ALL, sum, half);
        if (lane == 0) out[j] = add ? out[j] + (double)sum : (double)sum;
    }
}

// w = source, and partial[t, j] = q_j . w over each strip.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
lanczos_dots(const REAL *__restrict__ basis, const REAL *__restrict__ source, REAL *__restrict__ w, int64 n, int rows,
             int capacity, const int64 *__restrict__ first, const int64 *__restrict__ last, double *__restrict__ partial)
{
    __shared__ REAL tile[TILE];
    const int64 from = first[blockIdx.x], to = last[blockIdx.x];
    for (int64 at = from; at < to; at += TILE) {
        const int length = to - at < TILE ? (int)(to - at) : TILE;
        __syncthreads();
        if (threadIdx.x < length) w[at + threadIdx.x] = tile[threadIdx.x] = source[at + threadIdx.x];
        __syncthreads();
        tile_dots(basis, n, rows, at, length, tile, at > from, partial + (int64)blockIdx.x * capacity);
    }
}

// c[b, j] = the sum of partial[t, j] over the strips of b; added to, or put into, total[b, j].
extern "C" __global__ void __launch_bounds__(32 * GROUPS)
lanczos_reduce(const double *__restrict__ partial, const int64 *__restrict__ strips_of, int rows, int capacity,
               int accumulate, double *__restrict__ c, double *__restrict__ total)
{
    __shared__ double sums[GROUPS][32];
    const int slices = (rows + 31) / 32;
    const int64 b = blockIdx.x / slices;
    const int column = threadIdx.x & 31, group = threadIdx.x >> 5, j = (int)(blockIdx.x % slices) * 32 + column;
    double sum = 0.0;
    if (j < rows)
#pragma unroll 4
        for (int64 t = strips_of[b] + group; t < strips_of[b + 1]; t += GROUPS) sum += partial[t * capacity + j];
    sums[group][column] = sum;
    __syncthreads();
    if (group == 0 && j < rows) {
#pragma unroll 8
        for (int other = 1; other < GROUPS; ++other) sum += sums[other][column];
        c[b * capacity + j] = sum;
        total[b * capacity + j] = accumulate ? total[b * capacity + j] + sum : sum;
    }
}

// w -= sum_j c[b, j] q_j; then partial[t, j] = q_j . w with the tile of the basis still in the cache, or, with `norm`,
// partial[t, 0] = w . w.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
lanczos_update(const REAL *__restrict__ basis, REAL *__restrict__ w, int64 n, int rows, int capacity,
               const int64 *__restrict__ owner, const int64 *__restrict__ first, const int64 *__restrict__ last,
               const double *__restrict__ c, int norm, double *__restrict__ partial)
{
    __shared__ REAL tile[TILE];
    __shared__ REAL some[THREADS];
    __shared__ double sums[WARPS];
    const int64 from = first[blockIdx.x], to = last[blockIdx.x];
    const double *mine = c + owner[blockIdx.x] * capacity;
    double squares = 0.0;
    for (int64 at = from; at < to; at += TILE) {
        const int length = to - at < TILE ? (int)(to - at) : TILE;
        const int inside = threadIdx.x < length;
        REAL value = inside ? w[at + threadIdx.x] : (REAL)0;
        for (int begin = 0; begin < rows; begin += THREADS) {
            const int count = rows - begin < THREADS ? rows - begin : THREADS;
            __syncthreads();
            if (threadIdx.x < count) some[threadIdx.x] = (REAL)mine[begin + threadIdx.x];
            __syncthreads();
            if (inside) {
                const REAL *q = basis + begin * n + at + threadIdx.x;
#pragma unroll 8
                for (int j = 0; j < count; ++j) value = multiply_add(-some[j], q[j * n], value);
            }
        }
        if (inside) w[at + threadIdx.x] = value;
        if (norm) {
            squares += (double)value * (double)value;
        } else {
            __syncthreads();
            tile[threadIdx.x] = value;
            __syncthreads();
            tile_dots(basis, n, rows, at, length, tile, at > from, partial + (int64)blockIdx.x * capacity);
        }
    }
    if (norm) {
        for (int half = 16; half > 0; half >>= 1) squares += __shfl_xor_sync(ALL, squares, half);
        if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = squares;
        __syncthreads();
        if (threadIdx.x == 0) {
            double all = 0.0;
            for (int i = 0; i < WARPS; ++i) all += sums[i];
            partial[(int64)blockIdx.x * capacity] = all;
        }
    }
}

// Ends step j of every open recurrence: its alpha, the norm of its remainder, and whether it goes on. A recurrence ends
// where the remainder is at most `noise` times the largest |A q| it has seen, or where its vectors span its space.
// With j = -1 the remainder is the start, which is only to be divided by its norm.
extern "C" __global__ void __launch_bounds__(THREADS)
lanczos_finish(const double *__restrict__ partial, const int64 *__restrict__ strips_of,
               const int64 *__restrict__ offsets, int capacity, int j, double noise, const double *__restrict__ total,
               double *__restrict__ alpha, double *__restrict__ remainder, double *__restrict__ scale,
               int64 *__restrict__ steps, int *__restrict__ open, double *__restrict__ divisor)
{
    __shared__ double lefts[WARPS], seens[WARPS];
    const int64 b = blockIdx.x;
    double left = 0.0, seen = 0.0;
#pragma unroll 4
    for (int64 t = strips_of[b] + threadIdx.x; t < strips_of[b + 1]; t += THREADS) left += partial[t * capacity];
    for (int i = threadIdx.x; i <= j; i += THREADS) seen += total[b * capacity + i] * total[b * capacity + i];
    for (int half = 16; half > 0; half >>= 1) {
        left += __shfl_xor_sync(ALL, left, half);
        seen += __shfl_xor_sync(ALL, seen, half);
    }
    if ((threadIdx.x & 31) == 0) {
        lefts[threadIdx.x >> 5] = left;
        seens[threadIdx.x >> 5] = seen;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < WARPS; ++i) {
        left += lefts[i];
        seen += seens[i];
    }
    const double size = sqrt(seen + left);
    left = sqrt(left);
    if (j < 0) {
        divisor[b] = left;
        return;
    }
    divisor[b] = 0.0;
    if (!open[b]) return;
    if (size > scale[b]) scale[b] = size;
    alpha[b * capacity + j] = total[b * capacity + j];
    remainder[b * capacity + j] = left;
    steps[b] = j + 1;
    open[b] = left > noise * scale[b] && offsets[b + 1] - offsets[b] > j + 1;
    if (open[b]) divisor[b] = left;
}

// row = w / divisor[b], and 0 where the divisor is.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
lanczos_next(REAL *__restrict__ row, const REAL *__restrict__ w, const int64 *__restrict__ owner,
             const int64 *__restrict__ first, const int64 *__restrict__ last, const double *__restrict__ divisor)
{
    const double d = divisor[owner[blockIdx.x]];
    for (int64 i = first[blockIdx.x] + threadIdx.x; i < last[blockIdx.x]; i += THREADS)
        row[i] = d > 0.0 ? (REAL)((double)w[i] / d) : (REAL)0;
}

// Quantising to 4 bits and back; the definition is codec_reference.py, codec.cuh comes first.
//
// Defines: MAP (0 de, 1 linear, 2 square), STOCHASTIC. `aligned`: x or out at 16 bytes, codes at 2. Launch, THREADS
// each:
//   quantize_block, dequantize_block     a warp for every two blocks of 128 entries
//   rank1_rows                           a warp for each CHUNK columns of a row; `rows` is zero before
//   rank1_columns                        a thread for each column of each CHUNK rows; `columns` is zero before
//   rank1_encode, dequantize_rank1       a thread for every four entries
//   rank1_finish                         a thread for each row and column
// While they are collected, maxima are the bits of floats; those of a row that is not valid are at least INFINITE.

#define ZERO_CODE (MAP == DE ? 7u : 0u)
#define CHUNK 1024

// The bits by which a block is judged: those of its magnitude, or, where the map has no sign, negative numbers on top.
__device__ __forceinline__ unsigned judged(float x) { return MAP == DE ? magnitude(x) : __float_as_uint(x + 0.f); }

__device__ __forceinline__ int64 global_warp() { return (int64)blockIdx.x * WARPS + (threadIdx.x >> 5); }

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_block(const float *__restrict__ x, unsigned char *__restrict__ codes, float *__restrict__ scales,
               uint64 *__restrict__ bad, int64 n, int aligned, uint64 seed, unsigned step, unsigned stream)
{
    const int lane = threadIdx.x & 31;
    const int64 first = global_warp() * 2;
    if (first * BLOCK >= n) return;
    const bool whole = aligned && (first + 2) * BLOCK <= n;
    const Tables tables = tables_of<MAP>(lane);
    float values[2][4];
    unsigned top[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        load4(x, (first + i) * BLOCK + lane * 4, n, whole, values[i]);
        top[i] = __reduce_max_sync(
            ALL, top_of(judged(values[i][0]), judged(values[i][1]), judged(values[i][2]), judged(values[i][3])));
    }
    // One reciprocal for both blocks: of the first in even lanes, of the second in odd ones.
    const float scale = flushed(lane & 1 ? top[1] : top[0]);
    const float r = reciprocal(scale);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64 block = first + i, at = block * BLOCK + lane * 4;
        unsigned words[4] = {0, 0, 0, 0};
        if (STOCHASTIC) philox(at >> 2, step, stream, seed, words);
        const unsigned four = encoded<MAP>(values[i], __shfl_sync(ALL, r, i), tables, words);
        const bool broken = top[i] >= INFINITE;
        if (block * BLOCK >= n) continue;
        store_codes(codes, at, n, whole, broken ? ZERO_CODE * 0x1111u : four, ZERO_CODE);
        if (lane == i) scales[block] = broken ? __uint_as_float(NAN_SCALE) : scale;
        if (lane == i && broken) atomicAdd(bad, (uint64)1);
    }
}

// A NaN keeps the bits of NAN_SCALE, which a product would not.
__device__ __forceinline__ float decoded(float value, float scale)
{
    return scale == scale ? value * scale : __uint_as_float(NAN_SCALE);
}

extern "C" __global__ void __launch_bounds__(THREADS)
dequantize_block(const unsigned char *__restrict__ codes, const float *__restrict__ scales, float *__restrict__ out,
                 int64 n, int aligned)
{
    const int lane = threadIdx.x & 31;
    const int64 first = global_warp() * 2;
    if (first * BLOCK >= n) return;
    const bool whole = aligned && (first + 2) * BLOCK <= n;
    const float value = value_of<MAP>(lane & 15);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64 block = (first + i) * BLOCK < n ? first + i : first, at = block * BLOCK + lane * 4;
        const unsigned four = load_codes(codes, at, n, whole);
        const float scale = scales[block];
        float x[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) x[k] = decoded(__shfl_sync(ALL, value, (int)(four >> (4 * k) & 15u)), scale);
        if (block == first + i) store4(out, at, n, whole, x);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rank1_rows(const float *__restrict__ x, unsigned *__restrict__ rows, int64 R, int64 C)
{
    const int lane = threadIdx.x & 31;
    const int64 chunks = (C + CHUNK - 1) / CHUNK, row = global_warp() / chunks;
    if (row >= R) return;
    const int64 from = (global_warp() - row * chunks) * CHUNK, to = from + CHUNK < C ? from + CHUNK : C;
    unsigned top = 0;
    for (int64 column = from + lane; column < to; column += 32)
        top = max(top, __float_as_uint(x[row * C + column] + 0.f));
    top = __reduce_max_sync(ALL, top);
    if (lane == 0) atomicMax(rows + row, top);
}

extern "C" __global__ void __launch_bounds__(THREADS)
rank1_columns(const float *__restrict__ x, const unsigned *__restrict__ rows, unsigned *__restrict__ columns, int64 R,
              int64 C)
{
    const int64 across = (C + THREADS - 1) / THREADS, down = blockIdx.x / across;
    const int64 column = (blockIdx.x - down * across) * THREADS + threadIdx.x;
    const int64 from = down * CHUNK, to = from + CHUNK < R ? from + CHUNK : R;
    if (column >= C) return;
    unsigned top = 0;
    for (int64 row = from; row < to; ++row)
        if (rows[row] < INFINITE) top = max(top, __float_as_uint(x[row * C + column] + 0.f));
    if (top) atomicMax(columns + column, top);
}

extern "C" __global__ void __launch_bounds__(THREADS)
rank1_encode(const float *__restrict__ x, const unsigned *__restrict__ rows, const unsigned *__restrict__ columns,
             unsigned char *__restrict__ codes, int64 R, int64 C, int aligned, uint64 seed, unsigned step,
             unsigned stream)
{
    const int64 n = R * C, block = global_warp(), at = block * BLOCK + (threadIdx.x & 31) * 4;
    if (block * BLOCK >= n) return;
    const bool whole = aligned && (block + 1) * BLOCK <= n;
    const Tables tables = tables_of<MAP>(threadIdx.x & 31);
    float values[4], r[4];
    load4(x, at, n, whole, values);
    int64 row = (at < n ? at : n - 1) / C, column = (at < n ? at : n - 1) - row * C;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        // A row that is not valid gets the codes of zeros.
        const bool broken = rows[row] >= INFINITE;
        r[k] = broken ? 0.f : reciprocal(smaller(flushed(rows[row]), flushed(columns[column])));
        if (broken) values[k] = 0.f;
        if (at + k + 1 < n && ++column == C) column = 0, ++row;
    }
    unsigned words[4] = {0, 0, 0, 0};
    if (STOCHASTIC) philox(at >> 2, step, stream, seed, words);
    store_codes(codes, at, n, whole, encoded<MAP>(values, r, tables, words), ZERO_CODE);
}

// Bits of maxima become scales, in place; rows that are not valid are counted.
extern "C" __global__ void __launch_bounds__(THREADS)
rank1_finish(unsigned *__restrict__ rows, unsigned *__restrict__ columns, uint64 *__restrict__ bad, int64 R, int64 C)
{
    const int64 i = (int64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= R + C) return;
    unsigned *at = i < R ? rows + i : columns + (i - R);
    const bool broken = *at >= INFINITE;
    *at = broken ? NAN_SCALE : __float_as_uint(flushed(*at));
    if (broken) atomicAdd(bad, (uint64)1);
}

extern "C" __global__ void __launch_bounds__(THREADS)
dequantize_rank1(const unsigned char *__restrict__ codes, const float *__restrict__ rows,
                 const float *__restrict__ columns, float *__restrict__ out, int64 R, int64 C, int aligned)
{
    const int64 n = R * C, block = global_warp(), at = block * BLOCK + (threadIdx.x & 31) * 4;
    if (block * BLOCK >= n) return;
    const bool whole = aligned && (block + 1) * BLOCK <= n;
    const float value = value_of<MAP>(threadIdx.x & 15);
    const unsigned four = load_codes(codes, at, n, whole);
    int64 row = (at < n ? at : n - 1) / C, column = (at < n ? at : n - 1) - row * C;
    float x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        x[k] = decoded(__shfl_sync(ALL, value, (int)(four >> (4 * k) & 15u)), smaller(rows[row], columns[column]));
        if (at + k + 1 < n && ++column == C) column = 0, ++row;
    }
    store4(out, at, n, whole, x);
}

// The fused 4-bit AdamW step with rank-1 scales of v: the second part of a program that begins with codec.cuh and
// adamw4.cu, where arguments and launches are explained.
//
// A warp works off a strip of blocks. Upright strips are for C % 128 = 0 and addresses for wide accesses: their STRIP
// blocks lie one above the other, so that a lane keeps its four columns. Ragged ones are STRIP blocks in a row.

#define STRIP 8
// Thread blocks that a multiprocessor should hold.
#define RESIDENT_ENCODE 6
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200 && !STOCHASTIC && PARAM_BF16 && GRAD_BF16
#define RESIDENT_MOMENTS 4  // five would spill there
#else
#define RESIDENT_MOMENTS 5
#endif

// What a skipped block has for v.
__device__ __forceinline__ float kept(float v) { return magnitude(v) < INFINITE ? v : 0.f; }

// Raises a maximum, without an atomic operation where it is seen to be high enough: it never falls.
__device__ __forceinline__ void raise(unsigned *maximum, unsigned top)
{
#ifdef EMU_CPU
    const unsigned seen = __atomic_load_n(maximum, __ATOMIC_RELAXED);
#else
    const unsigned seen = *reinterpret_cast<volatile unsigned *>(maximum);
#endif
    if (seen < top) atomicMax(maximum, top);
}

struct Upright {
    int64 row, column;  // of the first entry; the row may be beyond the tensor
    int number;         // of blocks
    __device__ __forceinline__ Upright(const Entry &e, int64 tile)
    {
        const int64 index = (tile >> 32) * WARPS + (threadIdx.x >> 5), across = e.C / BLOCK;
        row = index / across * STRIP;
        column = (index - row / STRIP * across) * BLOCK;
        number = (int)min((int64)STRIP, e.R - row);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_MOMENTS)
adamw4_moments_upright(const Entry *__restrict__ entries, const int64 *__restrict__ tiles, const Numbers given,
                       const float *__restrict__ numbers, uint64 seed, unsigned *__restrict__ maxima,
                       unsigned char *__restrict__ skips)
{
    const int lane = threadIdx.x & 31;
    const Numbers h = chosen(given, numbers);
    const Tables tables = tables_of<DE>(lane);
    const float v_value = value_of<MAP>(lane & 15);
    const int64 tile = tiles[blockIdx.x];
    const Entry e = entry_of(entries, tile);
    const Upright strip(e, tile);
    unsigned *rows = maxima + e.maxima + strip.row, *columns = maxima + e.maxima + e.R + strip.column + lane * 4;
    float side[4];
    unsigned side_top[4] = {0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < 4; ++k) side[k] = strip.number > 0 ? e.v_columns[strip.column + lane * 4 + k] : 0.f;
#pragma unroll 1
    for (int number = 0; number < strip.number; number += 2) {
        // Two rows at a time; where the second is missing the first is computed twice and stored once.
        const bool two = number + 1 < strip.number;
        const int64 first = (strip.row + number) * e.C + strip.column, stride = two ? e.C : 0;
        float p[2][4], g[2][4], m[2][4], v[2][4], m_scale[2], row[2];
        unsigned m_four[2], v_four[2], m_top[2];
        bool skip[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64 at = first + i * stride + lane * 4;
            m_four[i] = load_codes(e.m_codes, at, e.n, true);
            v_four[i] = load_codes(e.v_codes, at, e.n, true);
            m_scale[i] = e.m_scales[at / BLOCK];
            row[i] = e.v_scales[strip.row + number + (two ? i : 0)];
            load_wide(e.p + at, p[i]);
            load_wide(e.g + at, g[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float m_old = h.b1 * (tables.value * m_scale[i]);
            float old[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                old[k] = __shfl_sync(ALL, v_value, (int)(v_four[i] >> (4 * k))) * smaller(row[i], side[k]);
                m[i][k] = __shfl_sync(ALL, m_old, (int)(m_four[i] >> (4 * k))) + h.omb1 * g[i][k];
                v[i][k] = decayed_v(old[k], h, g[i][k]);
            }
            m_top[i] = __reduce_max_sync(ALL, top_m(m[i]));
            unsigned row_top = __reduce_max_sync(ALL, top_v(v[i]));
            skip[i] = not_finite(m_top[i], row_top, m_scale[i]);
            if (skip[i]) {
#pragma unroll
                for (int k = 0; k < 4; ++k) v[i][k] = kept(old[k]);
                row_top = __reduce_max_sync(ALL, top_v(v[i]));
            }
            if (lane == 0) raise(rows + number + (two ? i : 0), row_top);
#pragma unroll
            for (int k = 0; k < 4; ++k) side_top[k] = max(side_top[k], __float_as_uint(v[i][k]));
        }
        const float scale = flushed(lane & 1 ? m_top[1] : m_top[0]), r = reciprocal(scale);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64 at = first + i * stride + lane * 4;
            unsigned words[4];
            random4(at, h, e.stream, seed, words);
            m_four[i] = encoded<DE>(m[i], __shfl_sync(ALL, r, i), tables, words);
            if (i == 1 && !two) continue;
            if (lane == 0) skips[e.skips + at / BLOCK] = skip[i];
            if (skip[i]) {
                if (lane == 0) atomicAdd(e.skipped, (uint64)1);
                continue;
            }
            store_codes(e.m_codes, at, e.n, true, m_four[i], ZERO_CODE_M);
            if (lane == i) e.m_scales[at / BLOCK] = scale;
#pragma unroll
            for (int k = 0; k < 4; ++k) p[i][k] = moved(p[i][k], m[i][k], v[i][k], h);
            store_wide(e.p + at, p[i]);
        }
    }
    if (strip.number < 1) return;
#pragma unroll
    for (int k = 0; k < 4; ++k) raise(columns + k, side_top[k]);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_ENCODE)
adamw4_encode_upright(const Entry *__restrict__ entries, const int64 *__restrict__ tiles, const Numbers given,
                      const float *__restrict__ numbers, uint64 seed, const unsigned *__restrict__ maxima,
                      const unsigned char *__restrict__ skips)
{
    const int lane = threadIdx.x & 31;
    const Numbers h = chosen(given, numbers);
    const Tables tables = tables_of<MAP>(lane);
    const int64 tile = tiles[blockIdx.x];
    const Entry e = entry_of(entries, tile);
    const Upright strip(e, tile);
    if (strip.number < 1) return;
    const unsigned *rows = maxima + e.maxima + strip.row, *columns = maxima + e.maxima + e.R + strip.column + lane * 4;
    float side[4], side_r[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        side[k] = e.v_columns[strip.column + lane * 4 + k];
        side_r[k] = reciprocal(flushed(columns[k]));
    }
    constexpr int TURNS = STOCHASTIC ? 1 : 2;
#pragma unroll TURNS
    for (int number = 0; number < strip.number; ++number) {
        const int64 at = (strip.row + number) * e.C + strip.column + lane * 4;
        const bool skip = skips[e.skips + at / BLOCK];
        const unsigned four = load_codes(e.v_codes, at, e.n, true);
        const float row = e.v_scales[strip.row + number], row_r = reciprocal(flushed(rows[number]));
        float g[4], v[4], r[4];
        load_wide(e.g + at, g);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            v[k] = __shfl_sync(ALL, tables.value, (int)(four >> (4 * k))) * smaller(row, side[k]);
            v[k] = skip ? kept(v[k]) : decayed_v(v[k], h, g[k]);
            // Rounding keeps order: 1 / min(R, C) is the larger of 1 / R and 1 / C, and 0 where either is.
            r[k] = row_r > 0.f && side_r[k] > 0.f ? fmaxf(row_r, side_r[k]) : 0.f;
        }
        unsigned words[4];
        random4(at, h, e.stream + 1, seed, words);
        store_codes(e.v_codes, at, e.n, true, encoded<MAP>(v, r, tables, words), ZERO_CODE_V);
    }
}

struct Ragged {
    int64 block, row, column;  // of the first entry; the block may be beyond the tensor
    int number;                // of blocks
    int last;                  // entry of the tensor, counted from the first one of the strip
    unsigned inverse;
    __device__ __forceinline__ Ragged(const Entry &e, int64 tile)
    {
        block = ((tile >> 32) * WARPS + (threadIdx.x >> 5)) * STRIP;
        row = block * BLOCK / e.C;
        column = block * BLOCK - row * e.C;
        number = (int)min((int64)STRIP, (e.n + BLOCK - 1) / BLOCK - block);
        last = (int)min((int64)(STRIP * BLOCK), e.n - 1 - block * BLOCK);
        inverse = e.C < STRIP * BLOCK ? 0xffffffffu / (unsigned)e.C + 1 : 0;
    }
    // Row and column of entry `offset`, or of the tensor's last. Exact, as column + offset < 2^11 where C < 2^10.
    __device__ __forceinline__ void place(const Entry &e, int offset, int64 &i, int64 &j) const
    {
        const int64 from = column + min(offset, last);
        int64 down = from >= e.C;
        if (e.C < STRIP * BLOCK) down = e.C == 1 ? from : (int64)__umulhi((unsigned)from, inverse);
        i = row + down;
        j = from - down * e.C;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_MOMENTS)
adamw4_moments_ragged(const Entry *__restrict__ entries, const int64 *__restrict__ tiles, const Numbers given,
                      const float *__restrict__ numbers, uint64 seed, unsigned *__restrict__ maxima,
                      unsigned char *__restrict__ skips)
{
    const int lane = threadIdx.x & 31;
    const Numbers h = chosen(given, numbers);
    const Tables tables = tables_of<DE>(lane);
    const float v_value = value_of<MAP>(lane & 15);
    const int64 tile = tiles[blockIdx.x];
    const Entry e = entry_of(entries, tile);
    const Ragged strip(e, tile);
    unsigned *rows = maxima + e.maxima, *columns = rows + e.R;
#pragma unroll 1
    for (int number = 0; number < strip.number; ++number) {
        const int64 block = strip.block + number, at = block * BLOCK + lane * 4;
        const bool whole = e.aligned && (block + 1) * BLOCK <= e.n;
        float p[4], g[4], m[4], v[4], old[4];
        load4(e.p, at, e.n, whole, p);
        load4(e.g, at, e.n, whole, g);
        const unsigned m_four = load_codes(e.m_codes, at, e.n, whole), v_four = load_codes(e.v_codes, at, e.n, whole);
        const float m_scale = e.m_scales[block], m_old = h.b1 * (tables.value * m_scale);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            int64 i, j;
            strip.place(e, number * BLOCK + lane * 4 + k, i, j);
            old[k] = __shfl_sync(ALL, v_value, (int)(v_four >> (4 * k))) * smaller(e.v_scales[i], e.v_columns[j]);
            m[k] = __shfl_sync(ALL, m_old, (int)(m_four >> (4 * k))) + h.omb1 * g[k];
            v[k] = decayed_v(old[k], h, g[k]);
        }
        const unsigned m_top = __reduce_max_sync(ALL, top_m(m));
        const bool skip = not_finite(m_top, __reduce_max_sync(ALL, top_v(v)), m_scale);
        if (skip) {
#pragma unroll
            for (int k = 0; k < 4; ++k) v[k] = kept(old[k]);
        }
        // One operation for a block within one row.
        int64 first_row, last_row, unused;
        strip.place(e, number * BLOCK, first_row, unused);
        strip.place(e, number * BLOCK + BLOCK - 1, last_row, unused);
        const unsigned row_top = __reduce_max_sync(ALL, top_v(v));
        if (first_row == last_row && lane == 0) raise(rows + first_row, row_top);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            int64 i, j;
            strip.place(e, number * BLOCK + lane * 4 + k, i, j);
            if (first_row != last_row) raise(rows + i, __float_as_uint(v[k]));
            raise(columns + j, __float_as_uint(v[k]));
        }
        const float scale = flushed(m_top);
        unsigned words[4];
        random4(at, h, e.stream, seed, words);
        const unsigned four = encoded<DE>(m, reciprocal(scale), tables, words);
        if (lane == 0) skips[e.skips + block] = skip;
        if (skip) {
            if (lane == 0) atomicAdd(e.skipped, (uint64)1);
            continue;
        }
        store_codes(e.m_codes, at, e.n, whole, four, ZERO_CODE_M);
        if (lane == 0) e.m_scales[block] = scale;
#pragma unroll
        for (int k = 0; k < 4; ++k) p[k] = moved(p[k], m[k], v[k], h);
        store4(e.p, at, e.n, whole, p);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_ENCODE)
adamw4_encode_ragged(const Entry *__restrict__ entries, const int64 *__restrict__ tiles, const Numbers given,
                     const float *__restrict__ numbers, uint64 seed, const unsigned *__restrict__ maxima,
                     const unsigned char *__restrict__ skips)
{
    const int lane = threadIdx.x & 31;
    const Numbers h = chosen(given, numbers);
    const Tables tables = tables_of<MAP>(lane);
    const int64 tile = tiles[blockIdx.x];
    const Entry e = entry_of(entries, tile);
    const Ragged strip(e, tile);
    const unsigned *rows = maxima + e.maxima, *columns = rows + e.R;
#pragma unroll 1
    for (int number = 0; number < strip.number; ++number) {
        const int64 block = strip.block + number, at = block * BLOCK + lane * 4;
        const bool whole = e.aligned && (block + 1) * BLOCK <= e.n, skip = skips[e.skips + block];
        const unsigned four = load_codes(e.v_codes, at, e.n, whole);
        float g[4], v[4], r[4];
        load4(e.g, at, e.n, whole, g);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            int64 i, j;
            strip.place(e, number * BLOCK + lane * 4 + k, i, j);
            v[k] = __shfl_sync(ALL, tables.value, (int)(four >> (4 * k))) * smaller(e.v_scales[i], e.v_columns[j]);
            v[k] = skip ? kept(v[k]) : decayed_v(v[k], h, g[k]);
            r[k] = reciprocal(smaller(flushed(rows[i]), flushed(columns[j])));
        }
        unsigned words[4];
        random4(at, h, e.stream + 1, seed, words);
        store_codes(e.v_codes, at, e.n, whole, encoded<MAP>(v, r, tables, words), ZERO_CODE_V);
    }
}

// ---- The new scales -----------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS)
adamw4_scales(const Entry *__restrict__ entries, const int64 *__restrict__ tiles, const unsigned *__restrict__ maxima)
{
    const int64 tile = tiles[blockIdx.x];
    const Entry e = entry_of(entries, tile);
    const int64 i = (tile >> 32) * THREADS + threadIdx.x;
    if (i >= e.R + e.C) return;
    (i < e.R ? e.v_scales + i : e.v_columns + (i - e.R))[0] = flushed(maxima[e.maxima + i]);
}

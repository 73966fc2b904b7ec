// The fused 4-bit AdamW step over many tensors; the definition is adamw4_reference.py, codec.cuh comes first,
// adamw4_rank1.cu last.
//
// Defines: MAP (1 linear, 2 square) of the second moment, STOCHASTIC, PARAM_BF16, GRAD_BF16. `tiles[b]` is the work of
// thread block b: entry of the table in the low half, number of the tile in its tensor in the high half. `numbers` [9],
// if not null, is read in place of `given`. Launch, THREADS each:
//   adamw4_block      scales of blocks: a thread block for every TILE blocks of 128 entries
//   adamw4_moments_*  rank-1 scales, pass 1: p, m and the maxima of the new v; a warp for every STRIP blocks
//   adamw4_encode_*   rank-1 scales, pass 2: v once more from the old codes, encoded with the new maxima
//   adamw4_scales     rank-1 scales, last: the maxima become the scales; a thread for each row and column
// `maxima` holds bits of floats, rows before columns, and is zero at first; `skips` has a byte for each block.

#define TILE 32
// Thread blocks that a multiprocessor should hold: leaves a thread 80 registers, or 96.
#if STOCHASTIC || MAP == SQUARE
#define RESIDENT_BLOCK 5
#else
#define RESIDENT_BLOCK 6
#endif
#define ZERO_CODE_M 7u
#define ZERO_CODE_V 0u

#if PARAM_BF16
typedef bfloat param;
#else
typedef float param;
#endif
#if GRAD_BF16
typedef bfloat grad;
#else
typedef float grad;
#endif

struct Numbers {
    float b1, omb1, b2, omb2, eps, decay, step_size, rs2;
    unsigned step;
};

// One tensor. With scales of blocks R = C = 0, else v_scales [R] are row maxima and v_columns [C] column maxima.
struct __align__(16) Entry {
    param *p;
    const grad *g;
    unsigned char *m_codes;
    float *m_scales;
    unsigned char *v_codes;
    float *v_scales;
    float *v_columns;
    uint64 *skipped;
    int64 n, R, C, aligned;
    int64 stream;         // of random numbers for m; v draws from the next one
    int64 maxima, skips;  // where this tensor's part of the workspaces begins
};

// An address from a table is that of global memory, which the compiler cannot know.
template <class T> __device__ __forceinline__ T *global(T *p)
{
#ifdef EMU_CPU
    return p;
#else
    return (T *)__cvta_global_to_generic((size_t)p);
#endif
}

__device__ __forceinline__ Entry entry_of(const Entry *entries, int64 tile)
{
    Entry e = entries[(unsigned)tile];
    e.p = global(e.p), e.g = global(e.g);
    e.m_codes = global(e.m_codes), e.m_scales = global(e.m_scales);
    e.v_codes = global(e.v_codes), e.v_scales = global(e.v_scales), e.v_columns = global(e.v_columns);
    e.skipped = global(e.skipped);
    return e;
}

__device__ __forceinline__ Numbers chosen(const Numbers &given, const float *numbers)
{
    if (!numbers) return given;
    return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
            numbers[5], numbers[6], numbers[7], __float_as_uint(numbers[8])};
}

__device__ __forceinline__ float decayed_v(float v, const Numbers &h, float g) { return h.b2 * v + h.omb2 * (g * g); }

// The new p; m and v are the new ones.
__device__ __forceinline__ float moved(float p, float m, float v, const Numbers &h)
{
    return p * h.decay - h.step_size * __fdiv_rn(m, __fsqrt_rn(v) * h.rs2 + h.eps);
}

// The largest |m|, as bits; a NaN may be overlooked, but comes from a gradient or a scale that shows elsewhere.
__device__ __forceinline__ unsigned top_m(const float m[4])
{
    return __float_as_uint(fmaxf(fmaxf(fabsf(m[0]), fabsf(m[1])), fmaxf(fabsf(m[2]), fabsf(m[3]))));
}

// The largest v >= 0, as bits; a NaN is larger than any number.
__device__ __forceinline__ unsigned top_v(const float v[4])
{
    return top_of(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}

__device__ __forceinline__ bool not_finite(unsigned m, unsigned v, float scale_m)
{
    return max(max(m, v), magnitude(scale_m)) >= INFINITE;
}

__device__ __forceinline__ void random4(int64 at, const Numbers &h, int64 stream, uint64 seed, unsigned words[4])
{
    words[0] = words[1] = words[2] = words[3] = 0;
    if (STOCHASTIC) philox(at >> 2, h.step, (unsigned)stream, seed, words);
}

// ---- Scales of blocks ---------------------------------------------------------------------------------------------

// Blocks `first` and `first` + 1, of which the second may not exist. WHOLE: both are full and their addresses suit wide
// accesses.
template <bool WHOLE>
__device__ __forceinline__ void update_pair(const Entry &e, int64 first, const Numbers &h, const Tables &m_tables,
                                            const Tables &v_tables, uint64 seed)
{
    const int lane = threadIdx.x & 31;
    const bool two = WHOLE || (first + 1) * BLOCK < e.n;
    float p[2][4], g[2][4], m[2][4], v[2][4], m_scale[2], v_scale[2];
    unsigned m_four[2], v_four[2], m_top[2], v_top[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64 block = first + (two ? i : 0), at = (first + i) * BLOCK + lane * 4;
        m_four[i] = load_codes(e.m_codes, at, e.n, WHOLE);
        v_four[i] = load_codes(e.v_codes, at, e.n, WHOLE);
        m_scale[i] = e.m_scales[block];
        v_scale[i] = e.v_scales[block];
        load4(e.p, at, e.n, WHOLE, p[i]);
        load4(e.g, at, e.n, WHOLE, g[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        // All decoded values of the block, one in each lane; a shuffle takes the low five bits, lanes repeat after 16.
        const float m_old = h.b1 * (m_tables.value * m_scale[i]), v_old = h.b2 * (v_tables.value * v_scale[i]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            m[i][k] = __shfl_sync(ALL, m_old, (int)(m_four[i] >> (4 * k))) + h.omb1 * g[i][k];
            v[i][k] = __shfl_sync(ALL, v_old, (int)(v_four[i] >> (4 * k))) + h.omb2 * (g[i][k] * g[i][k]);
        }
        m_top[i] = __reduce_max_sync(ALL, top_m(m[i]));
        v_top[i] = __reduce_max_sync(ALL, top_v(v[i]));
    }
    // Lane 0 has the scale of m of the first block, lane 1 of its v, lanes 2 and 3 those of the second block, ...
    const unsigned top = lane & 2 ? (lane & 1 ? v_top[1] : m_top[1]) : (lane & 1 ? v_top[0] : m_top[0]);
    const float scale = flushed(top), r = reciprocal(scale);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64 block = first + i, at = block * BLOCK + lane * 4;
        unsigned words[4];
        random4(at, h, e.stream, seed, words);
        m_four[i] = encoded<DE>(m[i], __shfl_sync(ALL, r, 2 * i), m_tables, words);
        random4(at, h, e.stream + 1, seed, words);
        v_four[i] = encoded<MAP>(v[i], __shfl_sync(ALL, r, 2 * i + 1), v_tables, words);
        if (i == 1 && !two) continue;
        if (not_finite(m_top[i], v_top[i], m_scale[i])) {
            if (lane == 0) atomicAdd(e.skipped, (uint64)1);
            continue;
        }
        store_codes(e.m_codes, at, e.n, WHOLE, m_four[i], ZERO_CODE_M);
        store_codes(e.v_codes, at, e.n, WHOLE, v_four[i], ZERO_CODE_V);
        if (lane >> 1 == i) (lane & 1 ? e.v_scales : e.m_scales)[block] = scale;
#pragma unroll
        for (int k = 0; k < 4; ++k) p[i][k] = moved(p[i][k], m[i][k], v[i][k], h);
        store4(e.p, at, e.n, WHOLE, p[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCK)
adamw4_block(const Entry *__restrict__ entries, const int64 *__restrict__ tiles, const Numbers given,
             const float *__restrict__ numbers, uint64 seed)
{
    const int lane = threadIdx.x & 31;
    const Numbers h = chosen(given, numbers);
    const Tables m_tables = tables_of<DE>(lane), v_tables = tables_of<MAP>(lane);
    const int64 tile = tiles[blockIdx.x];
    const Entry e = entry_of(entries, tile);
    int64 first = (tile >> 32) * TILE + (threadIdx.x >> 5) * 2;
#pragma unroll 1
    for (int turn = 0; turn < TILE / (2 * WARPS) && first * BLOCK < e.n; ++turn, first += 2 * WARPS) {
        if (e.aligned && (first + 2) * BLOCK <= e.n) update_pair<true>(e, first, h, m_tables, v_tables, seed);
        else update_pair<false>(e, first, h, m_tables, v_tables, seed);
    }
}

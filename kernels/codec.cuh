// Device functions of the 4-bit codec that codec.cu and adamw4.cu share; the definition is codec_reference.py.
//
// A warp works on blocks of 128 entries, four neighbours in each lane. Tables have one entry in each lane and are read
// with shuffles, so that whole warps must come here together. Compiled without contraction: every operation is rounded
// once. STOCHASTIC is 0 or 1.

#define BLOCK 128
#define THREADS 128
#define WARPS (THREADS / 32)
#define ALL 0xffffffffu
#define INFINITE 0x7f800000u
#define NAN_SCALE 0x7fc00000u
#define DE 0
#define LINEAR 1
#define SQUARE 2

typedef long long int64;
typedef unsigned long long uint64;

// Values of the codes of the de map.
__device__ const float DE_VALUES[16] = {
    -0x1.c66666p-1f, -0x1.533334p-1f, -0x1.cp-2f,    -0x1.b33334p-3f, -0x1.3d70a4p-4f, -0x1.0a3d7p-5f,
    -0x1.6872bp-8f,  0.f,             0x1.6872bp-8f, 0x1.0a3d7p-5f,   0x1.3d70a4p-4f,  0x1.b33334p-3f,
    0x1.cp-2f,       0x1.533334p-1f,  0x1.c66666p-1f, 1.f};

// Encoding without a search. bucket() cuts the scaled values into 32 intervals, so that the code steps up at most once
// within each: above LIMITS (2 where it does not), from CODES. Without STOCHASTIC the code steps up where the nearest
// value changes, with it where a value is reached.
#if STOCHASTIC
__device__ const float DE_LIMITS[32] = {
    2.f, 2.f, -0x1.c00002p-2f, -0x1.533336p-1f, 2.f, 2.f, 2.f, 2.f, 2.f, 0x1.6872aep-8f, 0x1.0a3d6ep-5f, 2.f,
    0x1.3d70a2p-4f, 2.f, 2.f, 0x1.b33332p-3f, 2.f, 2.f, 0x1.bffffep-2f, 0x1.533332p-1f, 0x1.c66664p-1f,
    0x1.fffffep-1f, 2.f, 2.f, -0x1.0p-149f, -0x1.6872b2p-8f, -0x1.0a3d72p-5f, 2.f, -0x1.3d70a6p-4f, 2.f, 2.f,
    -0x1.b33336p-3f};
__device__ const unsigned char DE_CODES[32] = {2, 2,  1,  0,  0,  0,  0,  0,  7, 7, 8, 9, 9, 10, 10, 10,
                                               11, 11, 11, 12, 13, 14, 0, 0, 6, 5, 4, 4, 3, 3,  3,  2};
__device__ const float SQUARE_LIMITS[32] = {
    2.f, 0x1.fffffep-7f, 0x1.1ffffep-5f, 2.f, 0x1.fffffep-5f, 2.f, 0x1.8ffffep-4f, 2.f, 0x1.1ffffep-3f, 2.f,
    0x1.87fffep-3f, 2.f, 0x1.fffffep-3f, 2.f, 0x1.43fffep-2f, 2.f, 0x1.8ffffep-2f, 0x1.e3fffep-2f, 2.f, 2.f,
    0x1.51fffep-1f, 2.f, 0x1.87fffep-1f, 2.f, 0x1.c1fffep-1f, 0x1.fffffep-1f, 2.f, 2.f, 2.f, 2.f, 2.f, 2.f};
__device__ const unsigned char SQUARE_CODES[32] = {0, 0, 1,  2,  2,  3,  3,  4,  4,  5,  5, 6, 6, 7, 7, 8,
                                                   8, 9, 10, 11, 11, 12, 12, 13, 13, 14, 0, 0, 0, 0, 0, 0};
#else
__device__ const float DE_LIMITS[32] = {
    -0x1.4cccccp-2f, 2.f, -0x1.19999ap-1f, 2.f, -0x1.8cccccp-1f, 2.f, 2.f, 2.f, 2.f, 0x1.6872bp-9f, 0x1.374bc6p-6f,
    0x1.c28f5cp-5f, 2.f, 2.f, 0x1.28f5c4p-3f, 2.f, 0x1.4cccccp-2f, 2.f, 0x1.19999ap-1f, 2.f, 0x1.8cccccp-1f,
    0x1.e33334p-1f, 2.f, 2.f, 2.f, -0x1.6872bp-9f, -0x1.374bc6p-6f, -0x1.c28f5cp-5f, 2.f, 2.f, -0x1.28f5c4p-3f, 2.f};
__device__ const unsigned char DE_CODES[32] = {2,  2,  1,  1,  0,  0,  0, 0, 7, 7, 8, 9, 10, 10, 10, 11,
                                               11, 12, 12, 13, 13, 14, 0, 0, 7, 6, 5, 4, 4,  4,  3,  3};
__device__ const float SQUARE_LIMITS[32] = {
    0x1.1ffffep-7f, 0x1.900002p-6f, 2.f, 0x1.87fffep-5f, 2.f, 0x1.440002p-4f, 2.f, 0x1.e3fffcp-4f, 2.f, 0x1.52p-3f,
    2.f, 0x1.c1fffep-3f, 2.f, 0x1.210002p-2f, 2.f, 0x1.68fffcp-2f, 0x1.b90002p-2f, 2.f, 0x1.087ffep-1f, 0x1.388p-1f,
    2.f, 0x1.6c7ffep-1f, 2.f, 0x1.a48p-1f, 0x1.e07ffep-1f, 2.f, 2.f, 2.f, 2.f, 2.f, 2.f, 2.f};
__device__ const unsigned char SQUARE_CODES[32] = {0, 1, 2,  2,  3,  3,  4,  4,  5,  5,  6, 6, 7, 7, 8, 8,
                                                   9, 10, 10, 11, 12, 12, 13, 13, 14, 15, 0, 0, 0, 0, 0, 0};
#endif

// ---- Tables -------------------------------------------------------------------------------------------------------

// What a lane holds: the value of code lane % 16, how far the next one is, and bucket `lane`.
struct Tables {
    float value, gap, limit;
    unsigned code;
};

template <int KIND> __device__ __forceinline__ float value_of(int code)
{
    if (KIND == DE) return DE_VALUES[code];
    const float root = (float)(code + 1) * 0.0625f;
    return KIND == LINEAR ? root : root * root;
}

template <int KIND> __device__ __forceinline__ Tables tables_of(int lane)
{
    Tables t;
    const int code = lane & 15;
    t.value = value_of<KIND>(code);
    t.gap = value_of<KIND>(code < 15 ? code + 1 : 15) - t.value;
    t.limit = KIND == DE ? DE_LIMITS[lane] : SQUARE_LIMITS[lane];
    t.code = KIND == DE ? DE_CODES[lane] : SQUARE_CODES[lane];
    return t;
}

// ---- Random numbers -----------------------------------------------------------------------------------------------

// Philox4x32-10 for the entries 4 group to 4 group + 3.
__device__ __forceinline__ void philox(int64 group, unsigned step, unsigned stream, uint64 seed, unsigned words[4])
{
    unsigned a = (unsigned)group, b = (unsigned)(group >> 32), c = step, d = stream;
    unsigned key0 = (unsigned)seed, key1 = (unsigned)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high_a = __umulhi(a, 0xD2511F53u), low_a = a * 0xD2511F53u;
        const unsigned high_c = __umulhi(c, 0xCD9E8D57u), low_c = c * 0xCD9E8D57u;
        a = high_c ^ b ^ key0;
        b = low_c;
        c = high_a ^ d ^ key1;
        d = low_a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

// ---- Scales -------------------------------------------------------------------------------------------------------

// A scale from the bits of the largest magnitude: below the smallest normal number it is 0.
__device__ __forceinline__ float flushed(unsigned top) { return top < 0x00800000u ? 0.f : __uint_as_float(top); }

__device__ __forceinline__ float reciprocal(float scale) { return scale > 0.f ? __frcp_rn(scale) : 0.f; }

// min(row, column), and NaN where the row is.
__device__ __forceinline__ float smaller(float row, float column) { return column < row ? column : row; }

__device__ __forceinline__ unsigned magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ __forceinline__ unsigned top_of(unsigned a, unsigned b, unsigned c, unsigned d)
{
    return max(max(a, b), max(c, d));
}

// ---- Encoding -----------------------------------------------------------------------------------------------------

// Only the low five bits count. The constant of the de map brings the sign into them; a shuffle takes no more of them.
template <int KIND> __device__ __forceinline__ int bucket(float y)
{
    if (KIND == DE) return (int)__umulhi(__float_as_uint(y + copysignf(0.05859375f, y)), 1504u);
    return (int)(__float_as_uint(y + 0.125f) >> 20);
}

// The code of y with tables; a difference is below zero, and never rounded to it, where y is above the limit.
template <int KIND> __device__ __forceinline__ unsigned looked_up(float y, const Tables &t)
{
    const int i = bucket<KIND>(y);
    const float limit = __shfl_sync(ALL, t.limit, i);
    return __shfl_sync(ALL, t.code, i) + (__float_as_uint(limit - y) >> 31);
}

__device__ __forceinline__ unsigned joined(const unsigned c[4]) { return ((c[3] * 16 + c[2]) * 16 + c[1]) * 16 + c[0]; }

// The codes of y[k] = x[k] r[k] as four nibbles. `words` are random ones, read with STOCHASTIC only.
template <int KIND>
__device__ __forceinline__ unsigned encoded(const float x[4], const float r[4], const Tables &t,
                                            const unsigned words[4])
{
    unsigned codes[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const float y = x[k] * r[k];
#if STOCHASTIC
        const unsigned low =
            KIND == LINEAR ? (unsigned)min(max(__float2int_rd(y * 16.f), 1), 16) - 1 : looked_up<KIND>(y, t);
        const float u = (float)(words[k] >> 8) * 0x1p-24f;
        const float gap = __shfl_sync(ALL, t.gap, (int)low), value = __shfl_sync(ALL, t.value, (int)low);
        codes[k] = low + (low < 15 && u * gap < y - value);
#else
        // At 2^19 a float's last bit counts sixteenths: the sum is rounded as rint(16 y) is.
        codes[k] = KIND == LINEAR ? __float_as_uint(fmaxf(y, 0.0625f) + 524288.f) : looked_up<KIND>(y, t);
#endif
    }
    return joined(codes) - (KIND == LINEAR && !STOCHASTIC ? 0x1111u * 0x49000001u : 0u);
}

template <int KIND>
__device__ __forceinline__ unsigned encoded(const float x[4], float r, const Tables &t, const unsigned words[4])
{
    const float same[4] = {r, r, r, r};
    return encoded<KIND>(x, same, t, words);
}

// ---- Memory -------------------------------------------------------------------------------------------------------
// `whole`: the four entries from `at` exist and their address suits one wide access. Beside the end of a tensor the
// last entry is read in place of those that are missing: it changes no maximum.

typedef unsigned short bfloat;

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(bfloat x) { return __uint_as_float((unsigned)x << 16); }

// Two numbers in bfloat16, rounded to nearest even; a NaN becomes 0x7fff, as the device's own conversion makes it.
__device__ __forceinline__ unsigned as_bfloats(float low, float high)
{
#ifdef EMU_CPU
    unsigned bits[2] = {__float_as_uint(low), __float_as_uint(high)};
    for (int i = 0; i < 2; ++i) {
        const bool number = (bits[i] & 0x7fffffffu) <= INFINITE;
        bits[i] = number ? (bits[i] + 0x7fffu + (bits[i] >> 16 & 1u)) >> 16 : 0x7fffu;
    }
    return bits[1] << 16 | bits[0];
#else
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
#endif
}

__device__ __forceinline__ void store(float *p, float x) { *p = x; }
__device__ __forceinline__ void store(bfloat *p, float x) { *p = (bfloat)as_bfloats(x, x); }

__device__ __forceinline__ void load_wide(const float *p, float x[4])
{
    const float4 four = *reinterpret_cast<const float4 *>(p);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

__device__ __forceinline__ void load_wide(const bfloat *p, float x[4])
{
    const uint2 four = *reinterpret_cast<const uint2 *>(p);
    x[0] = __uint_as_float(four.x << 16), x[1] = __uint_as_float(four.x & 0xffff0000u);
    x[2] = __uint_as_float(four.y << 16), x[3] = __uint_as_float(four.y & 0xffff0000u);
}

__device__ __forceinline__ void store_wide(float *p, const float x[4])
{
    const float4 four = make_float4(x[0], x[1], x[2], x[3]);
#ifdef EMU_CPU
    *reinterpret_cast<float4 *>(p) = four;
#else
    __stcg(reinterpret_cast<float4 *>(p), four);  // the compiler may take a plain store apart
#endif
}

__device__ __forceinline__ void store_wide(bfloat *p, const float x[4])
{
    *reinterpret_cast<uint2 *>(p) = make_uint2(as_bfloats(x[0], x[1]), as_bfloats(x[2], x[3]));
}

template <class T> __device__ __forceinline__ void load4(const T *p, int64 at, int64 n, bool whole, float x[4])
{
    if (whole) {
        load_wide(p + at, x);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = as_float(p[at + k < n ? at + k : n - 1]);
}

template <class T> __device__ __forceinline__ void store4(T *p, int64 at, int64 n, bool whole, const float x[4])
{
    if (whole) {
        store_wide(p + at, x);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (at + k < n) store(p + at + k, x[k]);
}

__device__ __forceinline__ unsigned load_codes(const unsigned char *codes, int64 at, int64 n, bool whole)
{
    if (whole) return *reinterpret_cast<const unsigned short *>(codes + (at >> 1));
    unsigned four = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int64 i = at + k < n ? at + k : n - 1;
        four |= ((unsigned)codes[i >> 1] >> (i & 1 ? 4 : 0) & 15u) << (4 * k);
    }
    return four;
}

// The spare nibble at the end of an odd tensor becomes `zero`.
__device__ __forceinline__ void store_codes(unsigned char *codes, int64 at, int64 n, bool whole, unsigned four,
                                            unsigned zero)
{
    if (whole) {
        *reinterpret_cast<unsigned short *>(codes + (at >> 1)) = (unsigned short)four;
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        if (at + k >= n) continue;
        const unsigned two = four >> (4 * k) & 255u;
        codes[(at + k) >> 1] = (unsigned char)(at + k + 1 < n ? two : (two & 15u) | zero << 4);
    }
}

/* `decode`, `encode` and `uniform` of codec.h with AVX-512 F and BW: sixteen values at a time. */
#include <immintrin.h>

/* |y| from 2^-7 up has one threshold at most (but T14) in each half octave: the cell of y is its sign, the low three
   bits of its exponent and its first fraction bit, and smaller |y| share the first cells. In a cell the code is the
   base, plus one beyond the threshold. Positive cells come first. */
static const ALIGNED float NEAREST_EDGE[32] = {
    T7,  T7,  T8,  T8,  T8,  T9,  T9,  T9,  T10,  T10,  T11,  T11,  T12,  T13,  T13,  T13,
    -T7, -T7, -T8, -T8, -T8, -T9, -T9, -T9, -T10, -T10, -T11, -T11, -T12, -T13, -T13, -T13,
};
static const ALIGNED int32_t NEAREST_BASE[32] = {
    7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 11, 11, 12, 13, 13, 13, 6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 2, 2, 1, 0, 0, 0,
};
static const ALIGNED float LOWER_EDGE[32] = {
    0.0055f,  0.0055f,  0.0055f,  0.0055f,  0.0325f,  0.0325f,  0.0775f,  0.0775f,
    0.0775f,  0.2125f,  0.2125f,  0.4375f,  0.6625f,  0.8875f,  1.0f,     1.0f,
    -0.0055f, -0.0055f, -0.0055f, -0.0055f, -0.0325f, -0.0325f, -0.0775f, -0.0775f,
    -0.0775f, -0.2125f, -0.2125f, -0.4375f, -0.6625f, INFINITY, INFINITY, INFINITY,
};
static const ALIGNED int32_t LOWER_BASE[32] = {
    7, 7, 7, 7, 8, 8, 9, 9, 9, 10, 10, 11, 12, 13, 14, 14, 5, 5, 5, 5, 4, 4, 3, 3, 3, 2, 2, 1, 0, 0, 0, 0,
};

/* From a code's value to the next; nothing is above the last. */
static const ALIGNED float DE_GAPS[16] = {
    -0.6625f - -0.8875f, -0.4375f - -0.6625f, -0.2125f - -0.4375f, -0.0775f - -0.2125f,
    -0.0325f - -0.0775f, -0.0055f - -0.0325f, 0.0f - -0.0055f,     0.0055f - 0.0f,
    0.0325f - 0.0055f,   0.0775f - 0.0325f,   0.2125f - 0.0775f,   0.4375f - 0.2125f,
    0.6625f - 0.4375f,   0.8875f - 0.6625f,   1.0f - 0.8875f,      INFINITY,
};
static const ALIGNED float LINEAR_GAPS[16] = {
    0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f,
    0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, 0.0625f, INFINITY,
};
static const ALIGNED float SQUARE_GAPS[16] = {
    0x3p-8f,  0x5p-8f,  0x7p-8f,  0x9p-8f,  0xbp-8f,  0xdp-8f,  0xfp-8f,  0x11p-8f,
    0x13p-8f, 0x15p-8f, 0x17p-8f, 0x19p-8f, 0x1bp-8f, 0x1dp-8f, 0x1fp-8f, INFINITY,
};

INLINE void decode(int map, const uint8_t *codes, float *value)
{
    /* Byte i / 2 to lane i, then its nibble to the low bits; the permutation looks at those alone. */
    const __m512i spread = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i shift = _mm512_set1_epi64(4ll << 32);
    const __m512 table = _mm512_load_ps(VALUES[map]);
    for (int i = 0; i < BLOCK; i += 16) {
        int64_t eight;
        memcpy(&eight, codes + i / 2, 8);
        const __m512i pair = _mm512_shuffle_epi8(_mm512_set1_epi64(eight), spread);
        _mm512_storeu_ps(value + i, _mm512_permutexvar_ps(_mm512_srlv_epi32(pair, shift), table));
    }
}

/* The base of y's cell, plus one beyond its edge, or at it. */
INLINE __m512i cell_code(__m512 y, const float *edges, const int32_t *bases, int or_at)
{
    const __m512i bits = _mm512_castps_si512(y);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    const __m512i cell = _mm512_srli_epi32(_mm512_max_epi32(magnitude, _mm512_set1_epi32(0x3c000000)), 22);
    /* Bit 4 from the sign, the rest from the cell. */
    const __m512i at = _mm512_ternarylogic_epi32(_mm512_set1_epi32(16), _mm512_srli_epi32(bits, 27), cell, 0xca);
    const __m512 edge = _mm512_permutex2var_ps(_mm512_load_ps(edges), at, _mm512_load_ps(edges + 16));
    const __m512i base = _mm512_permutex2var_epi32(_mm512_load_si512(bases), at, _mm512_load_si512(bases + 16));
    const __mmask16 beyond =
        or_at ? _mm512_cmp_ps_mask(y, edge, _CMP_GE_OQ) : _mm512_cmp_ps_mask(y, edge, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(base, beyond, base, _mm512_set1_epi32(1));
}

INLINE __m512i nearest(int map, __m512 y)
{
    const __m512i one = _mm512_set1_epi32(1);
    if (map == DE) {
        const __m512i code = cell_code(y, NEAREST_EDGE, NEAREST_BASE, 0);
        return _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(y, _mm512_set1_ps(T14), _CMP_GT_OQ), code, one);
    }
    /* Adding 2^23 leaves rint(16 y), ties to even, in the low bits; 16 y is exact, so that one rounding is left. */
    const __m512 steps = map == LINEAR ? y : _mm512_sqrt_ps(y);
    const __m512 sum = _mm512_fmadd_ps(steps, _mm512_set1_ps(16.0f), _mm512_set1_ps(0x1p23f));
    const __m512 kept = _mm512_max_ps(sum, _mm512_set1_ps(0x1p23f + 1.0f));
    return _mm512_sub_epi32(_mm512_castps_si512(kept), _mm512_set1_epi32(0x4b000001));
}

INLINE __m512i stochastic(int map, __m512 y, __m512 u)
{
    const __m512i one = _mm512_set1_epi32(1);
    const __m512 table = _mm512_load_ps(VALUES[map]);
    __m512i low;
    if (map == DE) {
        low = cell_code(_mm512_add_ps(y, _mm512_setzero_ps()), LOWER_EDGE, LOWER_BASE, 1);
    } else {
        const __m512 steps = _mm512_mul_ps(map == LINEAR ? y : _mm512_sqrt_ps(y), _mm512_set1_ps(16.0f));
        low = _mm512_sub_epi32(_mm512_max_epi32(_mm512_cvttps_epi32(steps), one), one);
        if (map == SQUARE) { /* a root rounded up to a step */
            const __m512 value = _mm512_permutexvar_ps(low, table);
            const __mmask16 over = _mm512_cmp_ps_mask(y, value, _CMP_LT_OQ) & _mm512_test_epi32_mask(low, low);
            low = _mm512_mask_sub_epi32(low, over, low, one);
        }
    }
    const float *gaps = map == DE ? DE_GAPS : map == LINEAR ? LINEAR_GAPS : SQUARE_GAPS;
    const __m512 gap = _mm512_permutexvar_ps(low, _mm512_load_ps(gaps));
    const __m512 rest = _mm512_sub_ps(y, _mm512_permutexvar_ps(low, table));
    return _mm512_mask_add_epi32(low, _mm512_cmp_ps_mask(_mm512_mul_ps(u, gap), rest, _CMP_LT_OQ), low, one);
}

/* Codes 0 to 3 of a lane in its four bytes. */
INLINE __m512i four_bytes(const __m512i *code)
{
    const __m512i low = _mm512_or_si512(code[0], _mm512_slli_epi32(code[1], 8));
    return _mm512_ternarylogic_epi32(low, _mm512_slli_epi32(code[2], 16), _mm512_slli_epi32(code[3], 24), 0xfe);
}

INLINE void encode(int map, const float *y, const float *u, uint8_t *codes)
{
    __m512i code[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512 at = _mm512_loadu_ps(y + 16 * i);
        code[i] = u ? stochastic(map, at, _mm512_loadu_ps(u + 16 * i)) : nearest(map, at);
    }
    /* Lanes 2i and 2i + 1 of vector j make byte 8j + i: first as byte j of the 64-bit lane i, then transposed. */
    __m512i front = four_bytes(code), back = four_bytes(code + 4);
    front = _mm512_or_si512(front, _mm512_srli_epi64(front, 28));
    back = _mm512_or_si512(back, _mm512_srli_epi64(back, 28));
    const __m512i bytes = _mm512_mask_blend_epi32(0xaaaa, front, _mm512_slli_epi64(back, 32));
    const __m512i pairs = _mm512_broadcast_i32x4(_mm_set_epi8(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0));
    const __m512i order =
        _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4, 27, 19, 11, 3, 26, 18, 10, 2, 25,
                         17, 9, 1, 24, 16, 8, 0);
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi16(order, _mm512_shuffle_epi8(bytes, pairs)));
}

INLINE void uniform(const Noise *noise, int64_t block, float *u)
{
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53), multiplier1 = _mm512_set1_epi64(0xCD9E8D57);
    const __m512i front = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0);
    const __m512i back = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
    const __m512i first = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    /* Eight counters in 64-bit lanes, whose high halves nobody reads. */
    for (int i = 0; i < 4; ++i) {
        __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(block * (BLOCK / 4) + 8 * i), first);
        __m512i c1 = _mm512_srli_epi64(c0, 32);
        __m512i c2 = _mm512_set1_epi64(noise->step), c3 = _mm512_set1_epi64(noise->stream);
        uint32_t k0 = (uint32_t)noise->seed, k1 = (uint32_t)(noise->seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const __m512i a = _mm512_mul_epu32(c0, multiplier0), b = _mm512_mul_epu32(c2, multiplier1);
            c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1, _mm512_set1_epi64(k0), 0x96);
            c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3, _mm512_set1_epi64(k1), 0x96);
            c1 = b;
            c3 = a;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const __m512i w01 = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
        const __m512i w23 = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
        for (int half = 0; half < 2; ++half) {
            const __m512i words = _mm512_permutex2var_epi64(w01, half ? back : front, w23);
            const __m512 integer = _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 8));
            _mm512_storeu_ps(u + 32 * i + 16 * half, _mm512_mul_ps(integer, _mm512_set1_ps(0x1p-24f)));
        }
    }
}

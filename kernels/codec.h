/* Encoding and decoding of blocks of 128 values, as codec_reference.py defines them, for codec.c and adamw4.c.

   With AVX-512 codec_avx512.h has `decode`, `encode` and `uniform`; anywhere else, and under -DPORTABLE, they are the
   plain loops of this file, which compilers vectorise. */
#ifndef CODEC_H
#define CODEC_H

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0
#error "float32 arithmetic must round to float32"
#endif

#define BLOCK 128
#define ALIGNED _Alignas(64)
#define INLINE static inline __attribute__((always_inline))
#define LARGEST_FINITE 0x7f7fffffu
#define SMALLEST_NORMAL 0x00800000u

enum { DE, LINEAR, SQUARE };

/* Random numbers of a tensor; none where `on` is 0. */
typedef struct {
    uint64_t seed;
    uint32_t step, stream, on;
} Noise;

static const ALIGNED float VALUES[3][16] = {
    {-0.8875f, -0.6625f, -0.4375f, -0.2125f, -0.0775f, -0.0325f, -0.0055f, 0.0f, 0.0055f, 0.0325f, 0.0775f, 0.2125f,
     0.4375f, 0.6625f, 0.8875f, 1.0f},
    {0.0625f, 0.125f, 0.1875f, 0.25f, 0.3125f, 0.375f, 0.4375f, 0.5f, 0.5625f, 0.625f, 0.6875f, 0.75f, 0.8125f, 0.875f,
     0.9375f, 1.0f},
    {0.00390625f, 0.015625f, 0.03515625f, 0.0625f, 0.09765625f, 0.140625f, 0.19140625f, 0.25f, 0.31640625f, 0.390625f,
     0.47265625f, 0.5625f, 0.66015625f, 0.765625f, 0.87890625f, 1.0f},
};

/* The positive thresholds of the de map, between codes 7 and 8 to 14 and 15; all but the last have a negative twin. */
#define T7 0x1.6872b0p-9f
#define T8 0x1.374bc6p-6f
#define T9 0x1.c28f5cp-5f
#define T10 0x1.28f5c4p-3f
#define T11 0x1.4cccccp-2f
#define T12 0x1.19999ap-1f
#define T13 0x1.8cccccp-1f
#define T14 0x1.e33334p-1f

INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* A scale from the bits of a maximum. */
INLINE float flushed(uint32_t largest)
{
    return largest < SMALLEST_NORMAL ? 0.0f : float_of(largest);
}

INLINE float reciprocal(float scale)
{
    return scale > 0.0f ? 1.0f / scale : 0.0f;
}

/* As MINPS: the row's where either is NaN. */
INLINE float rank1_scale(float row, float column)
{
    return column < row ? column : row;
}

INLINE int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Raise a maximum that several threads share; floats ≥ 0 are ordered as their bits. */
INLINE void raise_shared(uint32_t *largest, uint32_t candidate)
{
    _Atomic uint32_t *shared = (_Atomic uint32_t *)largest;
    uint32_t known = atomic_load_explicit(shared, memory_order_relaxed);
    while (known < candidate && !atomic_compare_exchange_weak(shared, &known, candidate)) {
    }
}

/* scale[k] = min(R_i, C_j) for `count` elements, from `element` on, of a matrix with `width` columns; then 0. */
INLINE void rank1_scales(const float *rows, const float *columns, int64_t width, int64_t element, int64_t count,
                         float *scale)
{
    int64_t row = element / width, column = element % width;
    for (int64_t done = 0; done < count; column = 0, ++row) {
        const int64_t span = smaller(count - done, width - column);
        const float r = rows[row];
        for (int64_t k = 0; k < span; ++k)
            scale[done + k] = rank1_scale(r, columns[column + k]);
        done += span;
    }
    for (int64_t k = count; k < BLOCK; ++k)
        scale[k] = 0.0f;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(PORTABLE)
#include "codec_avx512.h"
#else

/* Values of 128 codes relative to the scale. */
INLINE void decode(int map, const uint8_t *codes, float *value)
{
    for (int i = 0; i < BLOCK / 2; ++i) {
        value[2 * i] = VALUES[map][codes[i] & 15];
        value[2 * i + 1] = VALUES[map][codes[i] >> 4];
    }
}

INLINE int32_t nearest(int map, float y)
{
    if (map == DE)
        return (y > -T13) + (y > -T12) + (y > -T11) + (y > -T10) + (y > -T9) + (y > -T8) + (y > -T7) + (y > T7) +
               (y > T8) + (y > T9) + (y > T10) + (y > T11) + (y > T12) + (y > T13) + (y > T14);
    /* Adding 2^23 leaves rint(16 y), ties to even, in the low bits. */
    const uint32_t sum = bits_of((map == LINEAR ? y : sqrtf(y)) * 16.0f + 0x1p23f);
    const int32_t steps = (int32_t)(sum & 31u);
    return steps < 1 ? 0 : steps - 1;
}

INLINE int32_t stochastic(int map, float y, float u)
{
    int32_t low = 0;
    for (int k = 1; k < 16; ++k)
        low += y >= VALUES[map][k];
    const float gap = VALUES[map][low < 15 ? low + 1 : 15] - VALUES[map][low];
    return low + ((low < 15) & (u * gap < y - VALUES[map][low]));
}

/* Codes of 128 scaled values y ≤ 1 + 2^-22, and ≥ -1 - 2^-22 or ≥ 0; `u` is null where rounding is to nearest. */
INLINE void encode(int map, const float *y, const float *u, uint8_t *codes)
{
    int32_t code[BLOCK];
    if (u)
        for (int i = 0; i < BLOCK; ++i)
            code[i] = stochastic(map, y[i], u[i]);
    else
        for (int i = 0; i < BLOCK; ++i)
            code[i] = nearest(map, y[i]);
    for (int i = 0; i < BLOCK / 2; ++i)
        codes[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
}

/* The random numbers u of block `block`: Philox4x32-10, one counter for four elements. */
INLINE void uniform(const Noise *noise, int64_t block, float *u)
{
    enum { GROUPS = BLOCK / 4 };
    uint32_t c0[GROUPS], c1[GROUPS], c2[GROUPS], c3[GROUPS];
    uint32_t k0 = (uint32_t)noise->seed, k1 = (uint32_t)(noise->seed >> 32);
    for (int i = 0; i < GROUPS; ++i) {
        const uint64_t group = (uint64_t)block * GROUPS + (uint64_t)i;
        c0[i] = (uint32_t)group;
        c1[i] = (uint32_t)(group >> 32);
        c2[i] = noise->step;
        c3[i] = noise->stream;
    }
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < GROUPS; ++i) {
            const uint64_t a = (uint64_t)c0[i] * 0xD2511F53u, b = (uint64_t)c2[i] * 0xCD9E8D57u;
            c0[i] = (uint32_t)(b >> 32) ^ c1[i] ^ k0;
            c1[i] = (uint32_t)b;
            c2[i] = (uint32_t)(a >> 32) ^ c3[i] ^ k1;
            c3[i] = (uint32_t)a;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < GROUPS; ++i) {
        u[4 * i] = (float)(int32_t)(c0[i] >> 8) * 0x1p-24f;
        u[4 * i + 1] = (float)(int32_t)(c1[i] >> 8) * 0x1p-24f;
        u[4 * i + 2] = (float)(int32_t)(c2[i] >> 8) * 0x1p-24f;
        u[4 * i + 3] = (float)(int32_t)(c3[i] >> 8) * 0x1p-24f;
    }
}

#endif

/* The bits under `mask` of the largest entry; beyond LARGEST_FINITE where one is not finite. */
INLINE uint32_t largest_bits(const float *x, uint32_t mask)
{
    uint32_t largest = 0;
    for (int i = 0; i < BLOCK; ++i) {
        const uint32_t bits = bits_of(x[i]) & mask;
        largest = largest > bits ? largest : bits;
    }
    return largest;
}

/* The 64 bytes of a block: in place, or in `room` if it is short, with zeros beside the end. */
INLINE const uint8_t *code_bytes(const uint8_t *codes, int64_t count, uint8_t *room)
{
    if (count == BLOCK)
        return codes;
    memset(room, 0, BLOCK / 2);
    memcpy(room, codes, (size_t)(count + 1) / 2);
    return room;
}

/* `encode` for a block of `count` values; y is 0 beside the end. */
INLINE void encode_and_store(int map, const float *y, const float *u, int64_t count, uint8_t *codes)
{
    ALIGNED uint8_t room[BLOCK / 2];
    if (count == BLOCK) {
        encode(map, y, u, codes);
    } else {
        encode(map, y, u, room);
        memcpy(codes, room, (size_t)(count + 1) / 2);
    }
}

/* Encode a moment with the scale of its block; `largest` holds the bits of its maximum. */
INLINE float encode_block(int map, float *x, uint32_t largest, const float *u, int64_t count, uint8_t *codes)
{
    const float scale = flushed(largest), r = reciprocal(scale);
    for (int i = 0; i < BLOCK; ++i)
        x[i] *= r;
    encode_and_store(map, x, u, count, codes);
    return scale;
}

#endif

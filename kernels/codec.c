/* The 4-bit codec over ranges of blocks or rows, as codec_reference.py defines it. Ranges touch bytes of their own and
   maxima are exact, so the bits do not depend on the ranges. */
#include "codec.h"

/* Copy `count` values, -0 made 0, with zeros beside the end; the largest magnitude's bits, which are beyond
   LARGEST_FINITE where an entry is none that the map can represent. */
INLINE uint32_t read_block(const float *x, int64_t count, int map, float *values)
{
    for (int64_t i = 0; i < count; ++i)
        values[i] = x[i] + 0.0f;
    memset(values + count, 0, (size_t)(BLOCK - count) * sizeof(float));
    return largest_bits(values, map == DE ? 0x7fffffffu : 0xffffffffu);
}

INLINE int64_t quantize_blocks(const float *x, int64_t n, int map, const Noise *noise, int64_t first, int64_t last,
                               uint8_t *codes, float *scales)
{
    ALIGNED float values[BLOCK], u[BLOCK];
    int64_t bad = 0;
    for (int64_t b = first; b < last; ++b) {
        const int64_t element = b * BLOCK, count = smaller(BLOCK, n - element);
        const uint32_t largest = read_block(x + element, count, map, values);
        const int broken = largest > LARGEST_FINITE;
        if (broken)
            memset(values, 0, sizeof values);
        if (noise->on)
            uniform(noise, b, u);
        const float scale =
            encode_block(map, values, broken ? 0 : largest, noise->on ? u : NULL, count, codes + element / 2);
        scales[b] = broken ? NAN : scale;
        bad += broken;
    }
    return bad;
}

/* Encode blocks `first` to `last` - 1 of x [n]; add the number of bad ones to `bad`. */
void codec_quantize_block(const float *x, int64_t n, int32_t map, const Noise *noise, int64_t first, int64_t last,
                          uint8_t *codes, float *scales, int64_t *bad)
{
    const Noise own = *noise;
    int64_t found;
    if (map == DE)
        found = quantize_blocks(x, n, DE, &own, first, last, codes, scales);
    else if (map == LINEAR)
        found = quantize_blocks(x, n, LINEAR, &own, first, last, codes, scales);
    else
        found = quantize_blocks(x, n, SQUARE, &own, first, last, codes, scales);
    atomic_fetch_add((_Atomic int64_t *)bad, found);
}

/* The largest bits of a row, as in read_block, and with the de map whether all is finite: negative entries are no
   candidates for a maximum. */
static uint32_t row_largest(const float *x, int64_t width, int map, int *broken)
{
    uint32_t worst = 0;
    int32_t largest = 0;
    const uint32_t mask = map == DE ? 0x7fffffffu : 0xffffffffu;
    for (int64_t j = 0; j < width; ++j) {
        const uint32_t bits = bits_of(x[j] + 0.0f);
        worst = worst > (bits & mask) ? worst : bits & mask;
        largest = largest > (int32_t)bits ? largest : (int32_t)bits;
    }
    *broken = worst > LARGEST_FINITE;
    return (uint32_t)largest;
}

/* Row maxima of rows `first` to `last` - 1 of x [rows, width], and column maxima raised in `columns`; `scratch` is
   `columns` itself, or zeros if other ranges raise them too. */
void codec_rank1_maxima(const float *x, int64_t width, int32_t map, int64_t first, int64_t last, float *rows,
                        int32_t *scratch, uint32_t *columns, int64_t *bad)
{
    int64_t found = 0;
    for (int64_t i = first; i < last; ++i) {
        const float *row = x + i * width;
        int broken;
        const uint32_t largest = row_largest(row, width, map, &broken);
        rows[i] = broken ? NAN : flushed(largest);
        found += broken;
        if (broken)
            continue;
        for (int64_t j = 0; j < width; ++j) {
            const int32_t bits = (int32_t)bits_of(row[j]);
            scratch[j] = scratch[j] > bits ? scratch[j] : bits;
        }
    }
    if ((void *)scratch != (void *)columns)
        for (int64_t j = 0; j < width; ++j)
            raise_shared(&columns[j], (uint32_t)scratch[j]);
    atomic_fetch_add((_Atomic int64_t *)bad, found);
}

void codec_flush(float *maxima, int64_t count)
{
    for (int64_t j = 0; j < count; ++j)
        maxima[j] = flushed(bits_of(maxima[j]));
}

INLINE void quantize_rank1(const float *x, int64_t n, int64_t width, int map, const Noise *noise, int64_t first,
                           int64_t last, const float *rows, const float *columns, uint8_t *codes)
{
    ALIGNED float y[BLOCK], scale[BLOCK], u[BLOCK];
    for (int64_t b = first; b < last; ++b) {
        const int64_t element = b * BLOCK, count = smaller(BLOCK, n - element);
        rank1_scales(rows, columns, width, element, count, scale);
        memset(y, 0, sizeof y);
        for (int64_t i = 0; i < count; ++i) {
            const float r = reciprocal(scale[i]), scaled = x[element + i] * r;
            y[i] = !(r > 0.0f) ? 0.0f : scaled < -1.0f ? -1.0f : scaled;
        }
        if (noise->on)
            uniform(noise, b, u);
        encode_and_store(map, y, noise->on ? u : NULL, count, codes + element / 2);
    }
}

/* Encode blocks `first` to `last` - 1 of x [n / width, width] with the maxima. */
void codec_quantize_rank1(const float *x, int64_t n, int64_t width, int32_t map, const Noise *noise, int64_t first,
                          int64_t last, const float *rows, const float *columns, uint8_t *codes)
{
    const Noise own = *noise;
    if (map == DE)
        quantize_rank1(x, n, width, DE, &own, first, last, rows, columns, codes);
    else if (map == LINEAR)
        quantize_rank1(x, n, width, LINEAR, &own, first, last, rows, columns, codes);
    else
        quantize_rank1(x, n, width, SQUARE, &own, first, last, rows, columns, codes);
}

/* Decode blocks `first` to `last` - 1 into out [n]; with rank-1 scales `width` is the number of columns, else 0 and
   `scales` are those of blocks. */
void codec_dequantize(const uint8_t *codes, const float *scales, const float *columns, int64_t n, int64_t width,
                      int32_t map, int64_t first, int64_t last, float *out)
{
    ALIGNED float value[BLOCK], scale[BLOCK];
    ALIGNED uint8_t room[BLOCK / 2];
    for (int64_t b = first; b < last; ++b) {
        const int64_t element = b * BLOCK, count = smaller(BLOCK, n - element);
        decode(map, code_bytes(codes + element / 2, count, room), value);
        if (width)
            rank1_scales(scales, columns, width, element, count, scale);
        for (int64_t i = 0; i < count; ++i)
            out[element + i] = value[i] * (width ? scale[i] : scales[b]);
    }
}

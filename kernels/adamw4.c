/* The fused 4-bit AdamW step, as adamw4_reference.py defines it, over ranges of the blocks of many tensors.

   The blocks of all tensors are numbered one after the other. With scales of blocks, `adamw4_update` is the whole step.
   With rank-1 scales it updates p and m and gathers the maxima of the new v, `adamw4_encode_v` computes the new v again
   and encodes it, and `adamw4_store_maxima` ends the step; each needs all ranges of the one before. Blocks touch bytes
   of their own, and maxima are exact, so the bits do not depend on the ranges. */
#include "codec.h"

typedef struct {
    void *p;
    const void *g;
    uint8_t *m_codes;
    float *m_scales;
    uint8_t *v_codes;
    float *v_scales, *v_columns;
    int64_t *skipped;
    int64_t n, width;              /* width: columns of the matrix, 0 for scales of blocks */
    int64_t first_block;           /* number of this tensor's first block */
    uint32_t *rows, *columns;      /* bits of the new maxima, zero at first; of rank-1 scales, as `skips` */
    uint8_t *skips;                /* by block */
    uint32_t id, p_bf16, g_bf16, unused;
} Tensor;

typedef struct {
    float b1, omb1, b2, omb2, eps, decay, step_size, rs2;
    uint32_t step, map, stochastic, unused;
    uint64_t seed;
} Numbers;

INLINE void widen(const uint16_t *x, int64_t count, float *wide)
{
    for (int64_t i = 0; i < count; ++i)
        wide[i] = float_of((uint32_t)x[i] << 16);
}

/* To bfloat16, nearest even; NaN stays NaN. */
INLINE void narrow(const float *x, int64_t count, uint16_t *half)
{
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = bits_of(x[i]);
        const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        half[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
    }
}

/* 128 floats at `element`: in place where that is possible, else in `room`, with zeros beside the end. */
INLINE const float *floats(const void *x, int bf16, int64_t element, int64_t count, float *room)
{
    if (!bf16 && count == BLOCK)
        return (const float *)x + element;
    memset(room, 0, BLOCK * sizeof(float));
    if (bf16)
        widen((const uint16_t *)x + element, count, room);
    else
        memcpy(room, (const float *)x + element, (size_t)count * sizeof(float));
    return room;
}

/* Old v, decoded: `scale` by element, or `block_scale` where it is null. */
INLINE void old_v(int map, const uint8_t *codes, const float *scale, float block_scale, float *v)
{
    decode(map, codes, v);
    for (int i = 0; i < BLOCK; ++i)
        v[i] *= scale ? scale[i] : block_scale;
}

INLINE void new_v(const Numbers *k, const float *g, float *v)
{
    const float b2 = k->b2, omb2 = k->omb2;
    for (int i = 0; i < BLOCK; ++i)
        v[i] = (b2 * v[i]) + (omb2 * (g[i] * g[i]));
}

/* What a skipped block keeps of v. */
INLINE void kept_v(float *v)
{
    for (int i = 0; i < BLOCK; ++i)
        v[i] = (bits_of(v[i]) & 0x7fffffffu) > LARGEST_FINITE ? 0.0f : v[i];
}

INLINE void new_m(const Numbers *k, const float *g, float scale, const uint8_t *codes, float *m)
{
    const float b1 = k->b1, omb1 = k->omb1;
    decode(DE, codes, m);
    for (int i = 0; i < BLOCK; ++i)
        m[i] = (b1 * (m[i] * scale)) + (omb1 * g[i]);
}

INLINE void new_p(const Numbers *k, const float *m, const float *v, const float *p, float *updated)
{
    const float eps = k->eps, decay = k->decay, step_size = k->step_size, rs2 = k->rs2;
    for (int i = 0; i < BLOCK; ++i)
        updated[i] = (p[i] * decay) - (step_size * (m[i] / ((sqrtf(v[i]) * rs2) + eps)));
}

INLINE void store_p(const Tensor *t, int64_t element, int64_t count, const float *updated)
{
    if (t->p_bf16)
        narrow(updated, count, (uint16_t *)t->p + element);
    else if (count < BLOCK)
        memcpy((float *)t->p + element, updated, (size_t)count * sizeof(float));
}

/* Where a range of the blocks of one tensor gathers its maxima. Other ranges may share the first and the last row. */
typedef struct {
    int64_t first_row, last_row;
    uint32_t *columns;
} Maxima;

INLINE void gather(const Tensor *t, const Maxima *to, int64_t element, int64_t count, const float *v)
{
    int64_t row = element / t->width, column = element % t->width;
    for (int64_t done = 0; done < count; column = 0, ++row) {
        const int64_t span = smaller(count - done, t->width - column);
        uint32_t *columns = to->columns + column, largest = 0;
        for (int64_t i = 0; i < span; ++i) {
            const uint32_t bits = bits_of(v[done + i]);
            columns[i] = columns[i] > bits ? columns[i] : bits;
            largest = largest > bits ? largest : bits;
        }
        if (row == to->first_row || row == to->last_row)
            raise_shared(&t->rows[row], largest);
        else
            t->rows[row] = t->rows[row] > largest ? t->rows[row] : largest;
        done += span;
    }
}

INLINE int64_t update_blocks(const Tensor *t, const Numbers *k, int map, int stochastic, int rank1, int64_t first,
                             int64_t last, const Maxima *maxima)
{
    const Noise m_noise = {k->seed, k->step, 2u * t->id, 1}, v_noise = {k->seed, k->step, 2u * t->id + 1u, 1};
    ALIGNED float m[BLOCK], v[BLOCK], scale[BLOCK], u[BLOCK], g_room[BLOCK], p_room[BLOCK];
    ALIGNED uint8_t m_room[BLOCK / 2], v_room[BLOCK / 2];
    int64_t skipped = 0;
    for (int64_t b = first; b < last; ++b) {
        const int64_t element = b * BLOCK, count = smaller(BLOCK, t->n - element);
        uint8_t *m_codes = t->m_codes + element / 2, *v_codes = t->v_codes + element / 2;
        const float *g = floats(t->g, t->g_bf16, element, count, g_room);
        if (rank1)
            rank1_scales(t->v_scales, t->v_columns, t->width, element, count, scale);
        new_m(k, g, t->m_scales[b], code_bytes(m_codes, count, m_room), m);
        old_v(map, code_bytes(v_codes, count, v_room), rank1 ? scale : NULL, rank1 ? 0.0f : t->v_scales[b], v);
        new_v(k, g, v);
        memset(m + count, 0, (size_t)(BLOCK - count) * sizeof(float));
        memset(v + count, 0, (size_t)(BLOCK - count) * sizeof(float));
        const uint32_t m_largest = largest_bits(m, 0x7fffffffu), v_largest = largest_bits(v, 0xffffffffu);
        const int skip = m_largest > LARGEST_FINITE || v_largest > LARGEST_FINITE;
        if (rank1)
            t->skips[b] = (uint8_t)skip;
        if (skip) {
            ++skipped;
            if (rank1) {
                old_v(map, code_bytes(v_codes, count, v_room), scale, 0.0f, v);
                kept_v(v);
                gather(t, maxima, element, count, v);
            }
            continue;
        }
        const float *p = floats(t->p, (int)t->p_bf16, element, count, p_room);
        float *updated = p == p_room ? p_room : (float *)t->p + element;
        new_p(k, m, v, p, updated);
        store_p(t, element, count, updated);
        if (stochastic)
            uniform(&m_noise, b, u);
        t->m_scales[b] = encode_block(DE, m, m_largest, stochastic ? u : NULL, count, m_codes);
        if (rank1) {
            gather(t, maxima, element, count, v);
            continue;
        }
        if (stochastic)
            uniform(&v_noise, b, u);
        t->v_scales[b] = encode_block(map, v, v_largest, stochastic ? u : NULL, count, v_codes);
    }
    return skipped;
}

INLINE void encode_v_blocks(const Tensor *t, const Numbers *k, int map, int stochastic, int64_t first, int64_t last)
{
    const Noise noise = {k->seed, k->step, 2u * t->id + 1u, 1};
    ALIGNED float v[BLOCK], scale[BLOCK], u[BLOCK], g_room[BLOCK];
    ALIGNED uint8_t room[BLOCK / 2];
    for (int64_t b = first; b < last; ++b) {
        const int64_t element = b * BLOCK, count = smaller(BLOCK, t->n - element);
        uint8_t *codes = t->v_codes + element / 2;
        rank1_scales(t->v_scales, t->v_columns, t->width, element, count, scale);
        old_v(map, code_bytes(codes, count, room), scale, 0.0f, v);
        if (t->skips[b])
            kept_v(v);
        else
            new_v(k, floats(t->g, (int)t->g_bf16, element, count, g_room), v);
        rank1_scales((const float *)t->rows, (const float *)t->columns, t->width, element, count, scale);
        for (int i = 0; i < BLOCK; ++i)
            v[i] *= reciprocal(flushed(bits_of(scale[i])));
        if (stochastic)
            uniform(&noise, b, u);
        encode_and_store(map, v, stochastic ? u : NULL, count, codes);
    }
}

typedef int64_t Update(const Tensor *, const Numbers *, int64_t, int64_t, const Maxima *);
typedef void EncodeV(const Tensor *, const Numbers *, int64_t, int64_t);

#define VARIANT(MAP, STOCHASTIC)                                                                                       \
    static int64_t update_##MAP##STOCHASTIC(const Tensor *t, const Numbers *k, int64_t a, int64_t b, const Maxima *to) \
    {                                                                                                                  \
        return update_blocks(t, k, MAP, STOCHASTIC, 0, a, b, to);                                                      \
    }                                                                                                                  \
    static int64_t rank1_##MAP##STOCHASTIC(const Tensor *t, const Numbers *k, int64_t a, int64_t b, const Maxima *to)  \
    {                                                                                                                  \
        return update_blocks(t, k, MAP, STOCHASTIC, 1, a, b, to);                                                      \
    }                                                                                                                  \
    static void encode_v_##MAP##STOCHASTIC(const Tensor *t, const Numbers *k, int64_t a, int64_t b)                    \
    {                                                                                                                  \
        encode_v_blocks(t, k, MAP, STOCHASTIC, a, b);                                                                  \
    }

VARIANT(LINEAR, 0)
VARIANT(LINEAR, 1)
VARIANT(SQUARE, 0)
VARIANT(SQUARE, 1)

static Update *const UPDATE[2][2][2] = {
    {{update_LINEAR0, rank1_LINEAR0}, {update_LINEAR1, rank1_LINEAR1}},
    {{update_SQUARE0, rank1_SQUARE0}, {update_SQUARE1, rank1_SQUARE1}},
};
static EncodeV *const ENCODE_V[2][2] = {{encode_v_LINEAR0, encode_v_LINEAR1}, {encode_v_SQUARE0, encode_v_SQUARE1}};

static int64_t blocks_of(const Tensor *t)
{
    return (t->n + BLOCK - 1) / BLOCK;
}

/* The tensor that holds block `block`. */
static const Tensor *tensor_at(const Tensor *tensors, int64_t count, int64_t block)
{
    int64_t low = 0, high = count;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (tensors[middle].first_block <= block)
            low = middle;
        else
            high = middle;
    }
    return tensors + low;
}

static void update_rank1(const Tensor *t, const Numbers *k, Update *update, int64_t a, int64_t b, uint32_t *scratch,
                         int64_t *skipped)
{
    const int whole = a == 0 && b == blocks_of(t);
    const int64_t last = smaller(t->n, b * BLOCK) - 1;
    const Maxima maxima = {a * BLOCK / t->width, last / t->width, whole ? t->columns : scratch};
    *skipped = update(t, k, a, b, &maxima);
    for (int64_t j = 0; !whole && j < t->width; ++j) {
        raise_shared(&t->columns[j], scratch[j]);
        scratch[j] = 0;
    }
}

/* Blocks `first` to `last` - 1; `scratch` holds zeros, one for each column of the widest matrix. */
void adamw4_update(const Tensor *tensors, int64_t count, const Numbers *k, int64_t first, int64_t last,
                   uint32_t *scratch)
{
    for (const Tensor *t = tensor_at(tensors, count, first); t < tensors + count && t->first_block < last; ++t) {
        const int64_t a = first > t->first_block ? first - t->first_block : 0;
        const int64_t b = smaller(last - t->first_block, blocks_of(t));
        Update *update = UPDATE[k->map == SQUARE][k->stochastic][t->width > 0];
        int64_t skipped;
        if (t->width)
            update_rank1(t, k, update, a, b, scratch, &skipped);
        else
            skipped = update(t, k, a, b, NULL);
        if (skipped)
            atomic_fetch_add((_Atomic int64_t *)t->skipped, skipped);
    }
}

void adamw4_encode_v(const Tensor *tensors, int64_t count, const Numbers *k, int64_t first, int64_t last)
{
    for (const Tensor *t = tensor_at(tensors, count, first); t < tensors + count && t->first_block < last; ++t) {
        const int64_t a = first > t->first_block ? first - t->first_block : 0;
        if (t->width)
            ENCODE_V[k->map == SQUARE][k->stochastic](t, k, a, smaller(last - t->first_block, blocks_of(t)));
    }
}

void adamw4_store_maxima(const Tensor *tensors, int64_t count)
{
    for (const Tensor *t = tensors; t < tensors + count; ++t) {
        if (!t->width)
            continue;
        for (int64_t i = 0; i < t->n / t->width; ++i)
            t->v_scales[i] = flushed(t->rows[i]);
        for (int64_t j = 0; j < t->width; ++j)
            t->v_columns[j] = flushed(t->columns[j]);
    }
}

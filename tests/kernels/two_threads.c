// Two threads on neighbouring ranges, which share rows and columns, for ThreadSanitizer. -DADAMW4 takes adamw4.c, else
// it is codec.c. With the argument `planted` the threads race instead.

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#ifdef ADAMW4
#include "adamw4.c"
#else
#include "codec.c"
#endif

#define REPETITIONS 10

static const int SHAPES[][2] = {{57, 23}, {3, 700}, {900, 1}, {1, 4000}, {16, 128}, {40, 129}};
static int64_t middle;

static void *zeros(int64_t count, size_t size)
{
    void *made = calloc((size_t)count, size);
    if (!made) abort();
    return made;
}

// `half` with the argument (void *)0 and (void *)1, at the same time.
static void both(void *half(void *))
{
    pthread_t threads[2];
    for (intptr_t i = 0; i < 2; ++i)
        if (pthread_create(&threads[i], NULL, half, (void *)i)) abort();
    for (int i = 0; i < 2; ++i) pthread_join(threads[i], NULL);
}

static int shared;

static void *race_half(void *second)
{
    shared += second ? 1 : 2;
    return NULL;
}

#ifdef ADAMW4
static Tensor tensor;
static Numbers numbers = {0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 1.0f, 1e-3f, 30.0f, 1, LINEAR, 0, 0, 5};

static void *update_half(void *second)
{
    uint32_t *scratch = zeros(tensor.width, sizeof *scratch);
    adamw4_update(&tensor, 1, &numbers, second ? middle : 0, second ? blocks_of(&tensor) : middle, scratch);
    free(scratch);
    return NULL;
}

static void *encode_half(void *second)
{
    adamw4_encode_v(&tensor, 1, &numbers, second ? middle : 0, second ? blocks_of(&tensor) : middle);
    return NULL;
}

static void steps(int64_t rows, int64_t columns, int with_nan)
{
    const int64_t n = rows * columns, blocks = (n + BLOCK - 1) / BLOCK;
    float *g = zeros(n, sizeof *g);
    for (int64_t i = 0; i < n; ++i) g[i] = (float)(i * 7919 % 1000 - 500) * 1e-3f;
    if (with_nan) g[n / 2] = NAN;
    tensor = (Tensor){
        .p = zeros(n, 4), .g = g, .m_codes = zeros(n / 2 + 1, 1), .m_scales = zeros(blocks, 4),
        .v_codes = zeros(n / 2 + 1, 1), .v_scales = zeros(rows, 4), .v_columns = zeros(columns, 4),
        .skipped = zeros(1, 8), .n = n, .width = columns, .rows = zeros(rows, 4), .columns = zeros(columns, 4),
        .skips = zeros(blocks, 1),
    };
    for (int i = 0; i < REPETITIONS; ++i) {
        middle = 1 + i % (blocks > 1 ? blocks - 1 : 1);
        memset(tensor.rows, 0, (size_t)rows * 4);
        memset(tensor.columns, 0, (size_t)columns * 4);
        both(update_half);
        both(encode_half);
        adamw4_store_maxima(&tensor, 1);
    }
}
#else
static float *x, *row_maxima;
static uint32_t *column_maxima;
static uint8_t *codes;
static int64_t bad, height, width;
static const Noise NOISE = {5, 1, 2, 1};

static void *maxima_half(void *second)
{
    int32_t *scratch = zeros(width, sizeof *scratch);
    codec_rank1_maxima(x, width, LINEAR, second ? middle : 0, second ? height : middle, row_maxima, scratch,
                       column_maxima, &bad);
    free(scratch);
    return NULL;
}

static void *encode_half(void *second)
{
    const int64_t blocks = (height * width + BLOCK - 1) / BLOCK, half = blocks / 2;
    codec_quantize_rank1(x, height * width, width, LINEAR, &NOISE, second ? half : 0, second ? blocks : half,
                         row_maxima, (const float *)column_maxima, codes);
    return NULL;
}

static void steps(int64_t rows, int64_t columns, int with_nan)
{
    const int64_t n = rows * columns;
    height = rows;
    width = columns;
    x = zeros(n, sizeof *x);
    for (int64_t i = 0; i < n; ++i) x[i] = (float)(i * 7919 % 1000) * 1e-3f;
    if (with_nan) x[n / 2] = NAN;
    row_maxima = zeros(rows, sizeof *row_maxima);
    column_maxima = zeros(columns, sizeof *column_maxima);
    codes = zeros(n / 2 + 1, 1);
    for (int i = 0; i < REPETITIONS; ++i) {
        middle = rows / 2;
        memset(column_maxima, 0, (size_t)columns * 4);
        both(maxima_half);
        codec_flush((float *)column_maxima, columns);
        both(encode_half);
    }
}
#endif

int main(int count, char **words)
{
    if (count > 1 && !strcmp(words[1], "planted")) both(race_half);
    for (size_t i = 0; count == 1 && i < sizeof SHAPES / sizeof *SHAPES; ++i) steps(SHAPES[i][0], SHAPES[i][1], i % 2);
    puts("finished");
    return 0;
}

// Kernels with one bug each, and their correct twins: what the emulator and the sanitizers must notice, and must pass.

// y = x with each block's 64 elements reversed.
extern "C" __global__ void reverse(const float* x, float* y) {
    __shared__ float s[64];
    const int t = threadIdx.x;
    s[t] = x[blockIdx.x * 64 + t];
    __syncthreads();
    y[blockIdx.x * 64 + t] = s[63 - t];
}
extern "C" __global__ void reverse_without_barrier(const float* x, float* y) {
    __shared__ float s[64];
    const int t = threadIdx.x;
    s[t] = x[blockIdx.x * 64 + t];
    y[blockIdx.x * 64 + t] = s[63 - t];
}
extern "C" __global__ void reverse_with_warp_barrier(const float* x, float* y) {
    __shared__ float s[64];
    const int t = threadIdx.x;
    s[t] = x[blockIdx.x * 64 + t];
    __syncwarp();  // the other warp's half is not ordered by this
    y[blockIdx.x * 64 + t] = s[63 - t];
}

// y[t] = (t + 1)(x[0] + x[1] + x[2] + x[3]), the x passed on through one shared number.
extern "C" __global__ void rounds(const float* x, float* y) {
    __shared__ float s;
    float sum = 0;
    for (int k = 0; k < 4; ++k) {
        if (threadIdx.x == 0) s = x[k];
        __syncthreads();
        sum += s * (threadIdx.x + 1);
        __syncthreads();
    }
    y[threadIdx.x] = sum;
}
extern "C" __global__ void rounds_without_second_barrier(const float* x, float* y) {
    __shared__ float s;
    float sum = 0;
    for (int k = 0; k < 4; ++k) {
        if (threadIdx.x == 0) s = x[k];
        __syncthreads();
        sum += s * (threadIdx.x + 1);
    }
    y[threadIdx.x] = sum;
}

// Barriers.
extern "C" __global__ void one_barrier(float* y) {
    float value = threadIdx.x < 7 ? 1.0f : 2.0f;
    __syncthreads();
    y[threadIdx.x] = value;
}
extern "C" __global__ void divergent_barriers(float* y) {
    if (threadIdx.x < 7) __syncthreads();
    else __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void exit_before_barrier(float* y) {
    if (threadIdx.x > 40) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void barrier_against_collective(float* y) {
    if (threadIdx.x < 16) __syncthreads();
    else y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

// Masks.
extern "C" __global__ void half_mask(float* y) {
    const float value = threadIdx.x;
    if ((threadIdx.x & 31) >= 16) return;
    y[threadIdx.x] = value + __shfl_xor_sync(0x0000ffffu, value, 1);
}
extern "C" __global__ void mask_of_exited(float* y) {
    const float value = threadIdx.x;
    if ((threadIdx.x & 31) >= 16) return;
    y[threadIdx.x] = value + __shfl_xor_sync(0xffffffffu, value, 1);
}
extern "C" __global__ void mask_without_caller(float* y) {
    const float value = threadIdx.x;
    y[threadIdx.x] = value + __shfl_xor_sync(0x0000ffffu, value, 1);
}
extern "C" __global__ void mask_of_each_half(float* y) {
    const unsigned mask = (threadIdx.x & 16) ? 0xffff0000u : 0x0000ffffu;
    y[threadIdx.x] = (float)__reduce_add_sync(mask, (threadIdx.x & 16) ? 2u : 1u);
}
extern "C" __global__ void masks_that_differ(float* y) {
    const unsigned mask = (threadIdx.x & 16) ? 0xffffffffu : 0x0000ffffu;
    y[threadIdx.x] = (float)__reduce_add_sync(mask, 1u);
}
extern "C" __global__ void shuffle_from_outside_mask(float* y) {
    y[threadIdx.x] = 0;
    if ((threadIdx.x & 31) < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

// Memory that nothing has written.
extern "C" __global__ void half_written_shared(float* y) {
    __shared__ float s[64];
    if (threadIdx.x < 32) s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void half_written_dynamic(float* y) {
    DYN_SHARED(float, s);
    if (threadIdx.x < 32) s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

// y = the sum of x over blocks; the second takes the last block to be the one that runs last.
extern "C" __global__ void count_blocks(const int* x, int* y) {
    if (threadIdx.x == 0) atomicAdd(y, x[blockIdx.x]);
}
extern "C" __global__ void trust_block_order(const int* x, int* y) {
    if (threadIdx.x == 0) *y = x[blockIdx.x];
}

// Arguments and launches.
struct Pair { float value; int n; };
extern "C" __global__ void fill(float* y, int n, float value) {
    if (y && (int)threadIdx.x < n) y[threadIdx.x] = value;
}
extern "C" __global__ void fill_pair(float* y, Pair pair) {
    if ((int)threadIdx.x < pair.n) y[threadIdx.x] = pair.value;
}
extern "C" __global__ void __launch_bounds__(2 * 32) fill_bounded(float* y) { y[threadIdx.x] = 1; }

// Memory outside of tensors and shared arrays; x and y have n elements.
extern "C" __global__ void inside(const float* x, float* y, int n) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i < n) y[i] = x[i];
}
extern "C" __global__ void read_outside(const float* x, float* y, int n) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    y[i < n ? i : 0] = x[i];
}
extern "C" __global__ void write_outside(const float* x, float* y, int n) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i <= n) y[i] = 1;
}
extern "C" __global__ void shared_outside(const float* x, float* y, int n) {
    __shared__ float s[64];
    float* p = s;
    for (int k = 0; k <= n - 36; ++k) p[k] = 1;  // n = 100: element 64 too
    y[threadIdx.x] = p[threadIdx.x];
}
extern "C" __global__ void dynamic_outside(const float* x, float* y, int n) {
    DYN_SHARED(float, s);
    s[threadIdx.x + 1] = x[threadIdx.x];
}
extern "C" __global__ void misaligned(const float* x, float* y, int n) {
    const float4 four = *(const float4*)(x + 1);
    if (threadIdx.x == 0) y[0] = four.x;
}
extern "C" __global__ void shift_too_far(const float* x, float* y, int n) { y[threadIdx.x] = 1 << (n - 64); }

// What a CUDA C++ program needs in order to be compiled by g++ and to run on a CPU: the part of CUDA's language that
// this library's kernels use. engine.cpp runs the threads of a block and checks what they do.
//
// Not here on purpose: float atomics (their result depends on the order), approximate functions (their bits differ
// between devices), inline PTX. A kernel that uses one does not compile. What a program must know: __shared__ only
// inside __global__ functions; dynamic shared memory through DYN_SHARED(type, name); EMU_CPU is defined.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <type_traits>
#include <utility>

#define EMU_CPU 1

// ---- Vector types ---------------------------------------------------------------------------------------------------
struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
#define EMU_VECTOR2(name, T, bytes)                       \
    struct alignas(bytes) name { T x, y; };               \
    static inline name make_##name(T x, T y) { return {x, y}; }
#define EMU_VECTOR4(name, T, bytes)                       \
    struct alignas(bytes) name { T x, y, z, w; };         \
    static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR2(uchar2, unsigned char, 2)
EMU_VECTOR2(short2, short, 4)
EMU_VECTOR2(ushort2, unsigned short, 4)
EMU_VECTOR2(int2, int, 8)
EMU_VECTOR2(uint2, unsigned, 8)
EMU_VECTOR2(float2, float, 8)
EMU_VECTOR2(double2, double, 16)
EMU_VECTOR2(longlong2, long long, 16)
EMU_VECTOR2(ulonglong2, unsigned long long, 16)
EMU_VECTOR4(uchar4, unsigned char, 4)
EMU_VECTOR4(short4, short, 8)
EMU_VECTOR4(ushort4, unsigned short, 8)
EMU_VECTOR4(int4, int, 16)
EMU_VECTOR4(uint4, unsigned, 16)
EMU_VECTOR4(float4, float, 16)

// ---- The engine -----------------------------------------------------------------------------------------------------
namespace emu {
struct Thread { uint3 index; unsigned lane; };            // what a running thread can ask about itself
struct Config { unsigned grid, block; uint64_t shared_bytes, seed; };
enum Vote { no_vote, vote_or, vote_and, vote_count };
struct Post { uint64_t value; int source; };              // what a lane brings to a warp collective
typedef uint64_t (*Combine)(const Post* posts, unsigned mask, unsigned lane);

#ifdef EMU_THREADS
extern thread_local Thread* self;
#else
extern Thread* self;
#endif
extern uint3 block_index;
extern dim3 grid_size, block_size;
void* dynamic_shared();
int barrier(const void* site, int predicate, Vote vote);
uint64_t collective(const void* site, unsigned mask, Post post, Combine combine);
[[noreturn]] void fail(const char* reason);
int run(const Config* config, void (*body)(void**), void** arguments);

template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) >= sizeof(From) || sizeof(From) == 8, "does not fit");
    To to{};
    memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
    return to;
}
}  // namespace emu

// One address for each place in the text, to tell barriers from one another.
#define EMU_SITE ([]() -> const void* { static char place; return &place; }())

// ---- Keywords -------------------------------------------------------------------------------------------------------
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __constant__ static const
#define __shared__ static __attribute__((section("emu_shared")))  // one section, so that it can be poisoned as one
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::dynamic_shared())
#define threadIdx (emu::self->index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid_size)
#define warpSize 32

// ---- Barriers and warp collectives ----------------------------------------------------------------------------------
#define __syncthreads() ((void)emu::barrier(EMU_SITE, 0, emu::no_vote))
#define __syncthreads_or(p) emu::barrier(EMU_SITE, !!(p), emu::vote_or)
#define __syncthreads_and(p) emu::barrier(EMU_SITE, !!(p), emu::vote_and)
#define __syncthreads_count(p) emu::barrier(EMU_SITE, !!(p), emu::vote_count)
#define __syncwarp(...) emu::sync_warp(EMU_SITE __VA_OPT__(, ) __VA_ARGS__)
#define __ballot_sync(...) emu::ballot(EMU_SITE, __VA_ARGS__)
#define __any_sync(...) (emu::ballot(EMU_SITE, __VA_ARGS__) != 0u)
#define __all_sync(...) emu::all(EMU_SITE, __VA_ARGS__)
#define __shfl_sync(...) emu::shuffle(EMU_SITE, emu::from_lane, __VA_ARGS__)
#define __shfl_up_sync(...) emu::shuffle(EMU_SITE, emu::from_below, __VA_ARGS__)
#define __shfl_down_sync(...) emu::shuffle(EMU_SITE, emu::from_above, __VA_ARGS__)
#define __shfl_xor_sync(...) emu::shuffle(EMU_SITE, emu::from_partner, __VA_ARGS__)
#define __reduce_add_sync(...) emu::reduce<emu::Add>(EMU_SITE, __VA_ARGS__)
#define __reduce_min_sync(...) emu::reduce<emu::Min>(EMU_SITE, __VA_ARGS__)
#define __reduce_max_sync(...) emu::reduce<emu::Max>(EMU_SITE, __VA_ARGS__)
#define __reduce_and_sync(...) emu::reduce<emu::And>(EMU_SITE, __VA_ARGS__)
#define __reduce_or_sync(...) emu::reduce<emu::Or>(EMU_SITE, __VA_ARGS__)
#define __reduce_xor_sync(...) emu::reduce<emu::Xor>(EMU_SITE, __VA_ARGS__)
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
[[noreturn]] static inline void __trap() { emu::fail("__trap"); }

namespace emu {
enum Direction { from_lane, from_below, from_above, from_partner };

static inline void sync_warp(const void* site, unsigned mask = ~0u) {
    collective(site, mask, {0, 0}, [](const Post*, unsigned, unsigned) -> uint64_t { return 0; });
}

static inline unsigned ballot(const void* site, unsigned mask, int predicate) {
    return unsigned(collective(site, mask, {predicate != 0, 0}, [](const Post* posts, unsigned named, unsigned) {
        uint64_t votes = 0;
        for (unsigned i = 0; i < 32; ++i) votes |= (named >> i & 1) ? posts[i].value << i : 0;
        return votes;
    }));
}

static inline int all(const void* site, unsigned mask, int predicate) { return ballot(site, mask, predicate) == mask; }

template <class T>
inline T shuffle(const void* site, Direction direction, unsigned mask, T value, int operand, int width = 32) {
    static_assert(sizeof(T) <= 8 && std::is_arithmetic<T>::value, "shuffles move one number of at most 8 bytes");
    const int lane = int(self->lane), first = lane & ~(width - 1), last = first + width - 1;
    int source = direction == from_lane    ? first + (operand & (width - 1))
                 : direction == from_below ? lane - operand
                 : direction == from_above ? lane + operand
                                     : lane ^ operand;
    if (source < first || source > last) source = lane;
    const Post post{bits<uint64_t>(value), source};
    return bits<T>(collective(site, mask, post, [](const Post* posts, unsigned named, unsigned me) {
        const int from = posts[me].source;  // what a lane outside the mask holds is undefined: all ones, a NaN
        return (named >> from & 1) ? posts[from].value : ~uint64_t(0);
    }));
}

#define EMU_OPERATION(name, expression) \
    struct name { template <class T> static T of(T a, T b) { return T(expression); } };
EMU_OPERATION(Add, unsigned(a) + unsigned(b))
EMU_OPERATION(Min, a < b ? a : b)
EMU_OPERATION(Max, a > b ? a : b)
EMU_OPERATION(And, a & b)
EMU_OPERATION(Or, a | b)
EMU_OPERATION(Xor, a ^ b)

template <class Operation, class T> inline T reduce(const void* site, unsigned mask, T value) {
    static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value, "reductions take int or unsigned");
    return bits<T>(collective(site, mask, {bits<uint64_t>(value), 0}, [](const Post* posts, unsigned named, unsigned) {
        const int first = __builtin_ctz(named);
        T result = bits<T>(posts[first].value);
        for (int i = first + 1; i < 32; ++i)
            if (named >> i & 1) result = Operation::of(result, bits<T>(posts[i].value));
        return bits<uint64_t>(result);
    }));
}
}  // namespace emu

// ---- Atomics: of integers, in no order that anything else could rely on ---------------------------------------------
template <class T, class F> static inline T emu_atomic(T* p, F next) {
    static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "atomics here are of 4- or 8-byte integers");
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(p, &old, next(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
#define EMU_ATOMIC(name, T, expression) \
    static inline T name(T* p, T v) { return emu_atomic(p, [v](T old) -> T { return expression; }); }
#define EMU_ATOMIC_UNSIGNED(name, expression) \
    EMU_ATOMIC(name, unsigned, expression) EMU_ATOMIC(name, unsigned long long, expression)
#define EMU_ATOMIC_ALL(name, expression) EMU_ATOMIC_UNSIGNED(name, expression) EMU_ATOMIC(name, int, expression)
EMU_ATOMIC_ALL(atomicAdd, old + v)
EMU_ATOMIC_ALL(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMax, long long, old > v ? old : v)
EMU_ATOMIC_ALL(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicMin, long long, old < v ? old : v)
EMU_ATOMIC_ALL(atomicAnd, old & v)
EMU_ATOMIC_ALL(atomicOr, old | v)
EMU_ATOMIC_ALL(atomicXor, old ^ v)
EMU_ATOMIC_ALL(atomicExch, v)
#define EMU_CAS(T) \
    static inline T atomicCAS(T* p, T c, T v) {                                  \
        return emu_atomic(p, [c, v](T old) -> T { return old == c ? v : old; }); \
    }
EMU_CAS(int) EMU_CAS(unsigned) EMU_CAS(unsigned long long)

// ---- Arithmetic, rounded as IEEE 754 says (compile with -ffp-contract=off) ------------------------------------------
template <class T> static inline T __ldg(const T* p) { return *p; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __drcp_rn(double a) { return 1.0 / a; }
static inline double __dsqrt_rn(double a) { return sqrt(a); }
static inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

// ---- Conversions: as the device does them, NaN becomes 0 and what is too large saturates ----------------------------
template <class To, class From> static inline To emu_to_integer(From rounded) {
    constexpr To low = std::is_signed<To>::value ? To(To(1) << (8 * sizeof(To) - 1)) : To(0), high = To(~low);
    if (rounded != rounded) return 0;
    if (rounded <= From(low)) return low;
    return rounded >= From(high) ? high : To(rounded);
}
static inline int __float2int_rn(float a) { return emu_to_integer<int>(rintf(a)); }
static inline int __float2int_rz(float a) { return emu_to_integer<int>(truncf(a)); }
static inline int __float2int_rd(float a) { return emu_to_integer<int>(floorf(a)); }
static inline int __float2int_ru(float a) { return emu_to_integer<int>(ceilf(a)); }
static inline unsigned __float2uint_rn(float a) { return emu_to_integer<unsigned>(rintf(a)); }
static inline unsigned __float2uint_rz(float a) { return emu_to_integer<unsigned>(truncf(a)); }
static inline int __double2int_rn(double a) { return emu_to_integer<int>(rint(a)); }
static inline long long __double2ll_rn(double a) { return emu_to_integer<long long>(rint(a)); }
static inline float __int2float_rn(int a) { return float(a); }
static inline float __uint2float_rn(unsigned a) { return float(a); }
static inline float __ll2float_rn(long long a) { return float(a); }
static inline float __ull2float_rn(unsigned long long a) { return float(a); }
static inline float __double2float_rn(double a) { return float(a); }
static inline double __int2double_rn(int a) { return double(a); }
static inline double __uint2double_rn(unsigned a) { return double(a); }
static inline double __ll2double_rn(long long a) { return double(a); }
static inline int __float_as_int(float a) { return emu::bits<int>(a); }
static inline unsigned __float_as_uint(float a) { return emu::bits<unsigned>(a); }
static inline float __int_as_float(int a) { return emu::bits<float>(a); }
static inline float __uint_as_float(unsigned a) { return emu::bits<float>(a); }
static inline long long __double_as_longlong(double a) { return emu::bits<long long>(a); }
static inline double __longlong_as_double(long long a) { return emu::bits<double>(a); }

// ---- Integers -------------------------------------------------------------------------------------------------------
static inline int __popc(unsigned a) { return __builtin_popcount(a); }
static inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
static inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
static inline int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }
static inline int __ffs(int a) { return __builtin_ffs(a); }
static inline int __ffsll(long long a) { return __builtin_ffsll(a); }
static inline int __mulhi(int a, int b) { return int((int64_t(a) * b) >> 32); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    if (selector & 0x8888u) emu::fail("__byte_perm: a selector above 7 is undefined");
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
template <class T> static inline T max(T a, T b) { return a > b ? a : b; }
template <class T> static inline T min(T a, T b) { return a < b ? a : b; }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }

// ---- Entry points ---------------------------------------------------------------------------------------------------
namespace emu {
// One word per parameter: its kind (pointer, integer, float, struct), its size and, of a pointer, the size of what it
// points to (0 where that is void or a struct, to which any tensor may be passed).
template <class T, class Bare = std::remove_cv_t<std::remove_pointer_t<T>>>
inline int describe(char* out, size_t room) {
    if constexpr (std::is_pointer<T>::value) {
        if constexpr (std::is_scalar<Bare>::value) return snprintf(out, room, "p%zu/%zu ", sizeof(T), sizeof(Bare));
        else return snprintf(out, room, "p%zu/0 ", sizeof(T));
    } else {
        const char kind = std::is_floating_point<T>::value ? 'f' : std::is_integral<T>::value ? 'i' : 's';
        return snprintf(out, room, "%c%zu ", kind, sizeof(T));
    }
}
template <class... A> inline const char* signature(void (*)(A...)) {
    static char text[1024];
    size_t used = 0;
    ((used += size_t(describe<A>(text + used, sizeof text - used))), ...);
    return text;
}
template <class... A, size_t... I> inline void apply(void (*f)(A...), void** a, std::index_sequence<I...>) {
    f(*reinterpret_cast<std::remove_const_t<A>*>(a[I])...);
}
template <class... A> inline void call(void (*f)(A...), void** a) { apply(f, a, std::index_sequence_for<A...>{}); }
}  // namespace emu

#define EMU_EXPORT(kernel)                                                                                   \
    extern "C" __attribute__((visibility("default"))) int emu_launch_##kernel(const emu::Config* c, void** a) { \
        return emu::run(c, [](void** values) { emu::call(kernel, values); }, a);                             \
    }                                                                                                        \
    extern "C" __attribute__((visibility("default"))) const char* emu_signature_##kernel() {               \
        return emu::signature(kernel);                                                                       \
    }

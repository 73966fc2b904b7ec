// Runs the threads of a block, one block after the other, and checks what they do.
//
// A thread is a fiber: it runs until it must wait, then another goes on, in an order that the seed permutes, so that a
// missing barrier shows as a result that depends on the seed. With EMU_THREADS it is a thread of the system instead, so
// that ThreadSanitizer sees accesses that no barrier orders. Checked: barriers reached at different places or after
// some threads have left, masks that name lanes that are gone or do not agree, deadlock. Shared memory is all ones
// (NaN, -1) when a block begins. Not modelled: blocks that run at the same time, and the order in which they see memory.
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>
#ifdef EMU_THREADS
#include <chrono>
#include <condition_variable>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

#include "cuda_on_cpu.h"  // last: it defines words that other headers use

extern "C" char __start_emu_shared[] __attribute__((weak));
extern "C" char __stop_emu_shared[] __attribute__((weak));

namespace emu {
namespace {

struct Lane;
struct Stop {};  // thrown to leave a kernel after a failure

// Where threads wait. `Hold` protects what they wait for; fibers, of which one runs at a time, need no protection.
#ifdef EMU_THREADS
struct Gate { std::mutex mutex; std::condition_variable changed; };
struct Hold : std::unique_lock<std::mutex> { explicit Hold(Gate& gate) : std::unique_lock<std::mutex>(gate.mutex) {} };
#else
struct Gate { std::vector<Lane*> waiting; };
struct Hold { explicit Hold(Gate&) {} void unlock() {} };
#endif

struct Warp {
    Gate gate;
    unsigned alive = 0, posted = 0;  // lanes, as bits
    unsigned mask[32];
    const void* site[32];
    Post post[32];
    uint64_t result[32];
    unsigned round[32];  // how many collectives each lane has completed
};
// Where a block waits at __syncthreads: at one of two places by turns, so that threads that are slow to leave the one
// do not seem ordered after those that have reached the next.
struct Meeting {
    Gate gate;
    unsigned arrived = 0, round = 0;
    int votes = 0, result = 0;
    const void* site = nullptr;
};
struct Block {
    Meeting meetings[2];
    unsigned size = 0;
    std::atomic<unsigned> alive{0};
    Warp warps[32];
    std::atomic<bool> failed{false};
    std::mutex failing;
    std::string reason;
};
enum State { READY, AT_BARRIER, AT_COLLECTIVE, GONE };
struct Lane : Thread {
    Warp* warp = nullptr;
    State state = GONE;
    unsigned barriers = 0;  // reached so far
#ifndef EMU_THREADS
    bool started = false;
    ucontext_t context;
    jmp_buf spot;
    std::unique_ptr<char[]> stack;
#endif
};

std::unique_ptr<Block> block;
char* dynamic = nullptr;
void (*kernel)(void**);
void** values;

Lane& me() { return *static_cast<Lane*>(self); }

void note_failure(const std::string& reason) {
    std::lock_guard<std::mutex> lock(block->failing);
    if (block->failed) return;
    block->reason = reason + " [block " + std::to_string(block_index.x);
    if (self) block->reason += ", thread " + std::to_string(self->index.x);
    block->reason += "]";
    block->failed = true;
}

[[noreturn]] void fail(Hold& hold, const char* reason) {
    hold.unlock();
    emu::fail(reason);
}

#ifdef EMU_THREADS
template <class Done> void wait(Hold& hold, Gate& gate, State, Done done) {
    const auto patience = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!done() && !block->failed) {
        gate.changed.wait_for(hold, std::chrono::milliseconds(20));
        if (std::chrono::steady_clock::now() > patience) fail(hold, "deadlock: a thread has waited for 20 seconds");
    }
    if (block->failed) throw Stop{};
}
void open(Gate& gate) { gate.changed.notify_all(); }
void let_others_run() {}
#else
jmp_buf scheduler;
ucontext_t scheduler_context;

// Switching by longjmp costs no system call, but AddressSanitizer only understands swapcontext.
__attribute__((noinline)) void to_scheduler() {
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&me().context, &scheduler_context);
#else
    if (_setjmp(me().spot) == 0) _longjmp(scheduler, 1);
#endif
}

__attribute__((noinline)) void to_lane(Lane& lane) {
    self = &lane;
#ifdef __SANITIZE_ADDRESS__
    swapcontext(&scheduler_context, &lane.context);
#else
    if (_setjmp(scheduler) == 0) {
        if (lane.started) _longjmp(lane.spot, 1);
        lane.started = true;
        setcontext(&lane.context);
    }
#endif
    self = nullptr;
}

void let_others_run() {
    to_scheduler();
    if (block->failed) throw Stop{};
}
template <class Done> void wait(Hold&, Gate& gate, State state, Done done) {
    while (!done()) {
        gate.waiting.push_back(&me());
        me().state = state;
        let_others_run();
    }
}
void open(Gate& gate) {
    for (Lane* lane : gate.waiting) lane->state = READY;
    gate.waiting.clear();
}
#endif

void check_barrier(Hold& hold, const Meeting& meeting) {
    const unsigned alive = block->alive;
    if (meeting.arrived == 0 || meeting.arrived < alive || alive == block->size) return;
    char text[120];
    snprintf(text, sizeof text, "deadlock: %u threads wait at __syncthreads, which %u threads will not reach",
             meeting.arrived, block->size - alive);
    fail(hold, text);
}

void leave() {
    Lane& lane = me();
    try {
        {
            Hold hold(lane.warp->gate);
            lane.warp->alive &= ~(1u << lane.lane);
            for (unsigned i = 0; i < 32; ++i)
                if ((lane.warp->posted >> i & 1) && (lane.warp->mask[i] >> lane.lane & 1))
                    fail(hold, "warp collective: its mask names a lane that has exited");
        }
        --block->alive;
        for (Meeting& meeting : block->meetings) {
            Hold hold(meeting.gate);
            check_barrier(hold, meeting);
        }
    } catch (const Stop&) {
    }
    lane.state = GONE;
}

void live() {
    try {
        kernel(values);
    } catch (const Stop&) {
    }
    leave();
}

// ASan keeps red zones between shared variables: writing them is allowed here alone.
__attribute__((no_sanitize_address)) void poison(char* first, char* last) {
    for (volatile char* p = first; p < last; ++p) *p = char(0xFF);
}

struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        return z ^ (z >> 31);
    }
    template <class T> void permute(std::vector<T>& items) {
        for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next() % i]);
    }
};

std::vector<std::unique_ptr<Lane>> lanes;  // as many as the largest block so far; fibers are kept for the next block

#ifdef EMU_THREADS
// Threads are kept for the next block, since the sanitizer makes starting one slow. Each waits at a gate of its own: at
// a common one, the thread that has finished would seem ordered before the one that has yet to begin.
struct Worker { Gate gate; bool wanted = false; };
std::vector<Worker*>& workers = *new std::vector<Worker*>;  // never destroyed: threads wait in it to the end
Gate& finish = *new Gate;
unsigned running = 0;

void work(unsigned i, Worker* worker) {
    for (;;) {
        {
            Hold hold(worker->gate);
            worker->gate.changed.wait(hold, [worker] { return worker->wanted; });
            worker->wanted = false;
        }
        self = lanes[i].get();
        live();
        Hold hold(finish);
        if (--running == 0) open(finish);
    }
}

void run_block(Random&, bool) {
    while (workers.size() < block->size) {
        workers.push_back(new Worker);
        std::thread(work, workers.size() - 1, workers.back()).detach();
    }
    running = block->size;
    for (unsigned i = 0; i < block->size; ++i) {
        Hold hold(workers[i]->gate);
        workers[i]->wanted = true;
        open(workers[i]->gate);
    }
    Hold hold(finish);
    finish.changed.wait(hold, [] { return running == 0; });
}
#else
void fiber() {
    for (;;) {
        live();
        to_scheduler();
    }
}

void run_block(Random& random, bool permuted) {
    std::vector<Lane*> order(block->size);
    for (unsigned i = 0; i < block->size; ++i) {
        Lane& lane = *(order[i] = lanes[i].get());
        if (lane.stack) continue;
        const size_t stack_bytes = 64 * 1024;
        lane.stack.reset(new char[stack_bytes]);
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get();
        lane.context.uc_stack.ss_size = stack_bytes;
        lane.context.uc_link = nullptr;
        makecontext(&lane.context, fiber, 0);
    }
    bool ran = true;
    for (bool all_gone = false; !all_gone;) {
        if (permuted) random.permute(order);
        const uint64_t held = permuted && ran ? random.next() : 0;  // warps that others may overtake in this pass
        unsigned waiting[4] = {};
        ran = false;
        for (Lane* lane : order)
            if (block->failed ? lane->state != GONE : lane->state == READY && !(held >> lane->index.x / 32 & 1)) {
                ran = true;
                to_lane(*lane);
            }
        for (Lane* lane : order) ++waiting[lane->state];
        all_gone = waiting[GONE] == block->size;
        if (ran || held || all_gone) continue;
        char text[160];
        snprintf(text, sizeof text,
                 "deadlock: %u threads wait at __syncthreads, %u at a warp collective, %u have exited",
                 waiting[AT_BARRIER], waiting[AT_COLLECTIVE], waiting[GONE]);
        note_failure(text);
    }
}
#endif

void begin_block(unsigned size) {
    block.reset(new Block);
    block->alive = block->size = size;
    while (lanes.size() < size) lanes.emplace_back(new Lane);
    for (unsigned i = 0; i < size; ++i) {
        Lane& lane = *lanes[i];
        lane.index = {i, 0, 0};
        lane.lane = i % 32;
        lane.warp = &block->warps[i / 32];
        lane.state = READY;
        lane.barriers = 0;
        lane.warp->alive |= 1u << lane.lane;
        lane.warp->round[lane.lane] = 0;
    }
}

}  // namespace

#ifdef EMU_THREADS
thread_local Thread* self = nullptr;
#else
Thread* self = nullptr;
#endif
uint3 block_index;
dim3 grid_size, block_size;

void* dynamic_shared() {
    if (!dynamic) fail("dynamic shared memory is used, but the launch gives none");
    return dynamic;
}

void fail(const char* reason) {
    note_failure(reason);
    throw Stop{};
}

int barrier(const void* site, int predicate, Vote vote) {
    Meeting& meeting = block->meetings[me().barriers++ % 2];
    Hold hold(meeting.gate);
    if (meeting.arrived == 0) {
        meeting.site = site;
        meeting.votes = vote == vote_and;
    } else if (meeting.site != site) {
        fail(hold, "divergent __syncthreads: threads of one block wait at different places");
    }
    if (vote == vote_or) meeting.votes |= predicate;
    if (vote == vote_and) meeting.votes &= predicate;
    if (vote == vote_count) meeting.votes += predicate;
    if (++meeting.arrived < block->size) {
        check_barrier(hold, meeting);
        wait(hold, meeting.gate, AT_BARRIER, [&meeting, round = meeting.round] { return meeting.round != round; });
        return meeting.result;
    }
    const int result = meeting.result = meeting.votes;
    meeting.arrived = 0;
    ++meeting.round;
    open(meeting.gate);
    hold.unlock();
    let_others_run();  // the one that arrived last does not always go first
    return result;
}

uint64_t collective(const void* site, unsigned mask, Post post, Combine combine) {
    Warp& warp = *me().warp;
    const unsigned lane = me().lane;
    Hold hold(warp.gate);
    if (!(mask >> lane & 1)) fail(hold, "warp collective: the calling lane is not in its mask");
    if (mask & ~warp.alive) fail(hold, "warp collective: its mask names a lane that has exited or does not exist");
    for (unsigned rest = warp.posted; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        if (!(warp.mask[i] & mask)) continue;  // groups of lanes that share none may meet at the same time
        if (warp.mask[i] != mask) fail(hold, "warp collective: lanes that name each other pass different masks");
        if (warp.site[i] != site) fail(hold, "warp collective: lanes that name each other wait at different places");
    }
    warp.posted |= 1u << lane;
    warp.mask[lane] = mask;
    warp.site[lane] = site;
    warp.post[lane] = post;
    if ((warp.posted & mask) != mask) {
        const unsigned round = warp.round[lane];
        wait(hold, warp.gate, AT_COLLECTIVE, [&warp, lane, round] { return warp.round[lane] != round; });
        return warp.result[lane];
    }
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1) {
            warp.result[i] = combine(warp.post, mask, i);
            ++warp.round[i];
        }
    warp.posted &= ~mask;
    open(warp.gate);
    const uint64_t result = warp.result[lane];
    hold.unlock();
    let_others_run();
    return result;
}

int run(const Config* config, void (*body)(void**), void** arguments) {
    kernel = body;
    values = arguments;
    grid_size = {config->grid, 1, 1};
    block_size = {config->block, 1, 1};
    const std::align_val_t alignment{128};
    dynamic = config->shared_bytes ? static_cast<char*>(operator new(config->shared_bytes, alignment)) : nullptr;
    Random random{config->seed};
    std::vector<unsigned> order(config->grid);
    for (unsigned i = 0; i < config->grid; ++i) order[i] = config->seed == 1 ? config->grid - 1 - i : i;
    if (config->seed > 1) random.permute(order);
    bool failed = false;
    for (unsigned i = 0; i < config->grid && !failed; ++i) {
        begin_block(config->block);
        block_index = {order[i], 0, 0};
        poison(__start_emu_shared, __stop_emu_shared);
        poison(dynamic, dynamic + config->shared_bytes);
        run_block(random, config->seed != 0);
        failed = block->failed;
    }
    operator delete(dynamic, alignment);
    return failed;
}

}  // namespace emu

extern "C" __attribute__((visibility("default"))) const char* emu_last_error() { return emu::block->reason.c_str(); }

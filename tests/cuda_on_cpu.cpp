// Runs the kernels of cuda_on_cpu.h: fibres for threads, and a program that calls the operations.
//
//     cuda_on_cpu CALLS RESULTS SEED
//
// CALLS is a file of calls, with what their buffers hold; RESULTS gets what they hold afterwards.
// With seed 0 blocks run one after another and threads in order.
#include "cuda_on_cpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

// The kernels are compiled for a sanitizer, this is not. It has to be told of fibres, though.
#if defined(ADDRESSES)
#include <sanitizer/asan_interface.h>
#elif defined(RACES)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

// -------------------------------------------------------------------------------------- threads

constexpr size_t STACK = 1 << 16;
constexpr size_t BLOCKS = 3;        // under way at once
constexpr size_t FIBRES = 3 * 256;  // for their threads

// A moment that a thread can be after. ThreadSanitizer knows it by its address.
using Moment = uint64_t;

// Everything that this thread has done so far is before the moment.
void release(Moment& moment) {
#ifdef RACES
    __tsan_release(&moment);
#endif
    (void)moment;
}

// Everything that this thread does from now on is after the moment.
void acquire(Moment& moment) {
#ifdef RACES
    __tsan_acquire(&moment);
#endif
    (void)moment;
}

// What happens while this lives is no access of a kernel.
struct Unwatched {
#ifdef RACES
    Unwatched() {
        AnnotateIgnoreReadsBegin("", 0);
        AnnotateIgnoreWritesBegin("", 0);
    }
    ~Unwatched() {
        AnnotateIgnoreReadsEnd("", 0);
        AnnotateIgnoreWritesEnd("", 0);
    }
#else
    Unwatched() {}
#endif
};

struct Launch {
    unsigned blocks, threads;
    std::function<void()> thread;
    unsigned started = 0, ended = 0;  // blocks
    Moment begin = 0, end = 0;
};

struct Stream {
    std::deque<Launch> launches;
    size_t current = 0;
};

struct Fibre {
    ucontext_t context;  // where it begins,
    void* place[5];      // and where it was left
    bool started = false;
    const void* stack;
    void* fake_stack;  // AddressSanitizer's,
    void* races;       // and ThreadSanitizer's name for it
};

struct Thread {
    Fibre fibre;
    struct Block* block;
    unsigned index;
    bool ended;
    unsigned source;                // the lane from which a shuffle gets its value,
    uint64_t received;              // and the value
    Moment* fence;                  // its last one
    std::vector<Moment*> pending;   // fences before atomics that it saw: its next fence is after
};

struct Warp {
    unsigned mask = 0, arrived = 0;
    int line = 0;
    uint64_t values[32];
    std::vector<Thread*> waiting;
};

struct Block {
    Stream* stream;
    unsigned index;
    unsigned left;  // threads that have not ended
    std::map<int, std::unique_ptr<char[]>> shared;
    std::vector<Warp> warps;
    std::vector<Thread*> waiting;  // at a barrier,
    int line = 0;                  // which is there
    Moment barriers[2] = {};       // taken in turn
    int barrier = 0;

    Launch& launch() { return stream->launches[stream->current]; }
};

std::mt19937 draw;
bool in_order;
void* asked;       // the stream on which a call is to launch
unsigned skipped;  // blocks that are left out at the beginning of each launch

Fibre scheduler;
Thread* current;
size_t fibres = 0;
std::deque<Thread*> idle, ready;
std::vector<std::unique_ptr<Block>> resident;
std::map<void*, Stream> streams;
std::deque<Moment> fences;
std::map<void*, std::vector<Moment*>> fences_before;  // an atomic's address: of those who took it

[[noreturn]] void fail(const char* problem) {
    std::fprintf(stderr, "cuda_on_cpu: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, problem);
    std::_Exit(3);
}

[[gnu::noinline]] void go_on(Fibre& fibre) {
    if (fibre.started) __builtin_longjmp(fibre.place, 1);
    fibre.started = true;
    setcontext(&fibre.context);
}

// Leave one fibre where it is, and go on with another. swapcontext would do, but asks the system.
[[gnu::noinline]] void switch_fibre(Fibre& from, Fibre& to) {
#if defined(ADDRESSES)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, STACK);
#elif defined(RACES)
    __tsan_switch_to_fiber(to.races, __tsan_switch_to_fiber_no_sync);
#endif
    if (__builtin_setjmp(from.place) == 0) go_on(to);
#ifdef ADDRESSES
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// What a fibre does: one thread after another.
void run_threads() {
#ifdef ADDRESSES
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &size);
#endif
    for (;;) {
        Stream& stream = *current->block->stream;
        Launch& launch = stream.launches[stream.current];
        acquire(launch.begin);
        if (stream.current > 0) acquire(stream.launches[stream.current - 1].end);
        launch.thread();
        release(launch.end);
        current->ended = true;
        switch_fibre(current->fibre, scheduler);
    }
}

void make_fibre() {
    auto* thread = new Thread;
    ucontext_t& context = thread->fibre.context;
    getcontext(&context);
    context.uc_stack.ss_sp = std::malloc(STACK);
    context.uc_stack.ss_size = STACK;
    makecontext(&context, run_threads, 0);
    thread->fibre.stack = context.uc_stack.ss_sp;
#ifdef RACES
    thread->fibre.races = __tsan_create_fiber(0);
#endif
    idle.push_front(thread);
    ++fibres;
}

// Whichever has been idle for longest, so that neighbouring blocks are not on the same ones.
Thread* take_fibre() {
    if (fibres < FIBRES) make_fibre();
    Thread* thread = idle.front();
    idle.pop_front();
    return thread;
}

void start_block(Stream& stream) {
    Launch& launch = stream.launches[stream.current];
    auto block = std::make_unique<Block>();
    block->stream = &stream;
    block->index = launch.started++;
    block->left = launch.threads;
    block->warps.resize((launch.threads + 31) / 32);
    for (unsigned i = 0; i < launch.threads; ++i) {
        Thread* thread = take_fibre();
        thread->block = block.get();
        thread->index = i;
        thread->ended = false;
        thread->fence = nullptr;
        thread->pending.clear();
        ready.push_back(thread);
    }
    resident.push_back(std::move(block));
}

// As many blocks as there is room for, of whatever streams have some.
void start_blocks() {
    while (resident.size() < (in_order ? 1 : BLOCKS)) {
        std::vector<Stream*> waiting;
        for (auto& [name, stream] : streams)
            if (stream.current < stream.launches.size()) {
                const Launch& launch = stream.launches[stream.current];
                if (launch.started < launch.blocks) waiting.push_back(&stream);
            }
        if (waiting.empty()) return;
        start_block(*waiting[in_order ? 0 : draw() % waiting.size()]);
    }
}

void end_thread(Thread* thread) {
    idle.push_back(thread);
    Block* block = thread->block;
    if (--block->left > 0) return;

    Stream& stream = *block->stream;
    Launch& launch = block->launch();
    if (++launch.ended == launch.blocks) ++stream.current;
    resident.erase(std::find_if(resident.begin(), resident.end(),
                                [=](const auto& other) { return other.get() == block; }));
}

void take_turn() {
    if (!in_order) std::swap(ready.front(), ready[draw() % ready.size()]);
    current = ready.front();
    ready.pop_front();

    threadIdx = current->index;
    blockIdx = current->block->index;
    blockDim = current->block->launch().threads;
    gridDim = current->block->launch().blocks;
    switch_fibre(scheduler, current->fibre);
    if (current->ended) end_thread(current);
}

void synchronize() {
    for (;;) {
        start_blocks();
        if (resident.empty()) break;
        if (ready.empty()) fail("waits for threads of its block that never come");
        take_turn();
    }
    streams.clear();
    fences.clear();
    fences_before.clear();
}

// The current thread has no turn until it is ready again.
void wait() { switch_fibre(current->fibre, scheduler); }

void let_others_run() {
    ready.push_back(current);
    wait();
}

void wake(std::vector<Thread*>& waiting) {
    ready.insert(ready.end(), waiting.begin(), waiting.end());
    waiting.clear();
}

template <class T>
T add(T* address, T value) {
    const Unwatched here;
#ifdef ADDRESSES
    if (__asan_region_is_poisoned(address, sizeof(T))) fail("an atomic outside its buffer");
#endif
    let_others_run();
    std::vector<Moment*>& before = fences_before[address];
    current->pending.insert(current->pending.end(), before.begin(), before.end());
    if (current->fence) before.push_back(current->fence);

    const T old = *address;
    *address = old + value;
    return old;
}

}  // namespace

int atomicAdd(int* address, int value) { return add(address, value); }
unsigned atomicAdd(unsigned* address, unsigned value) { return add(address, value); }
double atomicAdd(double* address, double value) { return add(address, value); }
unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    return add(address, value);
}

void __threadfence() {
    const Unwatched here;
    let_others_run();
    for (Moment* fence : current->pending) acquire(*fence);
    current->pending.clear();
    current->fence = &fences.emplace_back();
    release(*current->fence);
}

void __syncthreads(int line) {
    const Unwatched here;
    Block& block = *current->block;
    Moment& barrier = block.barriers[block.barrier];
    release(barrier);

    if (block.waiting.empty()) block.line = line;
    if (block.line != line) fail("at another barrier than others of its block");
    block.waiting.push_back(current);
    if (block.waiting.size() == block.launch().threads) {
        wake(block.waiting);
        block.barrier = 1 - block.barrier;
    }
    wait();
    acquire(barrier);
}

uint64_t cuda_on_cpu::shuffle(unsigned mask, uint64_t value, int offset, int line) {
    const Unwatched here;
    const unsigned lane = current->index % 32;
    current->source = lane ^ unsigned(offset);
    Warp& warp = current->block->warps[current->index / 32];
    if (warp.arrived == 0) {
        warp.mask = mask;
        warp.line = line;
    }
    if (warp.mask != mask || warp.line != line) fail("at another shuffle than others of its warp");
    if (!(mask >> lane & 1)) fail("at a shuffle whose mask leaves it out");
    if (!(uint64_t(mask) >> current->source & 1)) fail("wants the value of a lane that has none");

    warp.values[lane] = value;
    warp.arrived |= 1u << lane;
    warp.waiting.push_back(current);
    if (warp.arrived == mask) {
        for (Thread* thread : warp.waiting) thread->received = warp.values[thread->source];
        wake(warp.waiting);
        warp.arrived = 0;
    }
    wait();
    return current->received;
}

void* cuda_on_cpu::shared_memory(int name, size_t bytes) {
    const Unwatched here;
    std::unique_ptr<char[]>& memory = current->block->shared[name];
    if (!memory) {
        memory.reset(new char[bytes]);
        std::memset(memory.get(), 0xa5, bytes);
    }
    return memory.get();
}

void cuda_on_cpu::launch(unsigned blocks, unsigned threads, void* stream,
                         std::function<void()> thread) {
    if (stream != asked) fail("launched on another stream than asked");
    std::deque<Launch>& launches = streams[stream].launches;
    launches.push_back({blocks, threads, std::move(thread)});
    Launch& launch = launches.back();
    launch.started = launch.ended = std::min(skipped, blocks - 1);
    release(launch.begin);
}

// ------------------------------------------------------------------------------------ the program

namespace {

std::FILE *calls, *results;

// The end of a buffer: it is given, and asked for. Most buffers are no longer than that.
struct End {
    char* start;
    size_t bytes;
};

std::vector<End> ends;
std::vector<std::unique_ptr<char[]>> scratch;

template <class T>
T read() {
    T value;
    if (std::fread(&value, sizeof(T), 1, calls) != 1) std::abort();
    return value;
}

// A buffer that begins so many bytes beyond a multiple of 16, and ends where its memory ends.
// Large ones are pages of zeros, which take no memory until written to.
char* allocate(size_t bytes, size_t misaligned) {
    const size_t all = misaligned + bytes;
    if (all > 1u << 24) {
        void* pages = mmap(nullptr, all, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED) std::abort();
        return static_cast<char*>(pages) + misaligned;
    }
    scratch.emplace_back(new char[all]);
#ifdef ADDRESSES
    ASAN_POISON_MEMORY_REGION(scratch.back().get(), misaligned);
#endif
    return scratch.back().get() + misaligned;
}

// What the blocks tell each other begins as garbage, or where most of them are left out, as 0.
template <class T>
T* partials(int64_t count) {
    char* memory = allocate(size_t(count) * sizeof(T), 0);
    std::memset(memory, skipped ? 0 : 0xa5, size_t(count) * sizeof(T));
    return reinterpret_cast<T*>(memory);
}

char* read_buffer() {
    const auto bytes = read<int64_t>();
    const auto misaligned = read<int64_t>();
    const auto given = read<int64_t>();
    if (bytes < 0) return nullptr;
    char* start = allocate(size_t(bytes), size_t(misaligned));
    const End end = {start + bytes - given, size_t(given)};
    if (std::fread(end.start, 1, end.bytes, calls) != end.bytes) std::abort();
    ends.push_back(end);
    return start;
}

enum Operation { MASKS, NAIVE_MASKS, STEP, NAIVE_STEP, SUM, NAIVE_SUM };

void call_operation(int64_t operation, const std::vector<double>& x,
                    const std::vector<char*>& buffers, fedgs::cuda::Place place) {
    using namespace fedgs;
    const auto floats = [&](size_t i) { return reinterpret_cast<float*>(buffers[i]); };

    if (operation == MASKS || operation == NAIVE_MASKS) {
        Masks batch;
        batch.masks = buffers[0];
        batch.small = reinterpret_cast<bool*>(buffers[1]);
        batch.area = reinterpret_cast<int64_t*>(buffers[2]);
        batch.difficulty = floats(3);
        batch.eta = floats(4);
        batch.pixel = Pixel(int(x[0]));
        batch.images = int64_t(x[1]);
        batch.pixels = int64_t(x[2]);
        batch.log_base = x[3];
        if (operation == NAIVE_MASKS) return cuda::naive::mask_difficulty(batch, place);
        const int64_t count = cuda::mask_partials(batch.pixel, batch.images, batch.pixels);
        auto* ticket = reinterpret_cast<unsigned*>(buffers[5]);
        cuda::mask_difficulty(batch, partials<int>(count), ticket, place);
    }

    if (operation == STEP || operation == NAIVE_STEP) {
        const auto* t = reinterpret_cast<const int64_t*>(buffers[6]);
        const Step step = {floats(0), floats(1), floats(2), floats(3),     floats(4),
                           floats(5), t,         int64_t(x[0])};
        const AdamWOptions options = {x[1], x[2], x[3], x[4], x[5]};
        if (operation == STEP)
            cuda::adamw_accumulate(step, options, place);
        else
            cuda::naive::adamw_accumulate(step, options, place);
    }

    if (operation == SUM || operation == NAIVE_SUM) {
        Sum sum;
        sum.total = floats(0);
        sum.out = floats(1);
        sum.norms = reinterpret_cast<double*>(buffers[2]);
        sum.n = int64_t(x[0]);
        for (size_t k = 3; k < buffers.size(); ++k) {
            sum.updates.push_back(floats(k));
            sum.weights.push_back(float(x[k - 2]));
        }
        if (operation == NAIVE_SUM) return cuda::naive::aggregate(sum, place);
        const int64_t count = int64_t(sum.updates.size()) * cuda::AGGREGATE_BLOCKS;
        cuda::aggregate(sum, partials<double>(count), place);
    }
}

}  // namespace

int main(int, char** arguments) {
    const Unwatched here;
    calls = std::fopen(arguments[1], "rb");
    results = std::fopen(arguments[2], "wb");
    draw.seed(unsigned(std::atoi(arguments[3])));
    in_order = std::atoi(arguments[3]) == 0;
    scheduler.started = true;
#ifdef RACES
    scheduler.races = __tsan_get_current_fiber();
#endif
    if (!fedgs::cuda::problem(0).empty()) std::abort();

    const auto count = read<int64_t>();
    for (int64_t i = 0; i < count; ++i) {
        const auto operation = read<int64_t>();
        const auto times = read<int64_t>();
        const auto stream = read<int64_t>();
        const auto goes_on = read<int64_t>();  // the next call runs at the same time
        skipped = unsigned(read<int64_t>());
        std::vector<double> numbers(size_t(read<int64_t>()));
        for (double& number : numbers) number = read<double>();
        std::vector<char*> buffers(size_t(read<int64_t>()));
        for (char*& buffer : buffers) buffer = read_buffer();

        asked = reinterpret_cast<void*>(stream);
        for (int64_t j = 0; j < times; ++j) call_operation(operation, numbers, buffers, {0, asked});
        if (goes_on) continue;
        synchronize();
        for (const End& end : ends) std::fwrite(end.start, 1, end.bytes, results);
        ends.clear();
        scratch.clear();
    }
    return std::fclose(results);
}

// The data structures of a launch, and the one launch in progress.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if !defined(__linux__) || !(defined(__x86_64__) || defined(__aarch64__))
#error "the emulator runs on Linux on x86-64 and aarch64"
#endif

extern "C" {
// Present only in a process that AddressSanitizer watches.
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, size_t);

struct Index3 {
    uint32_t x, y, z;
};

Index3 emulator_thread_index, emulator_block_index, emulator_block_size, emulator_grid_size;

// The next four structures are declared again in device.py.

struct Parameter {      // a pointer parameter of the kernel
    const char* name;
    const char* type;   // name of an element's type
    uint8_t* data;      // the caller's array
    uint64_t bytes;
    void** argument;    // address of the pointer that the kernel receives
    uint32_t itemsize;
    uint32_t constant;  // 1 for `const T*`
};

struct Variable {  // a __shared__ variable
    const char* name;
    uintptr_t start;
    uint64_t bytes;
};

struct Image {  // the kernel's shared library in memory
    uintptr_t start, end;
    uintptr_t bss_start, bss_end;  // memory of the shared variables and of the guards between them
    const Variable* variables;
    uint32_t variable_count;
};

struct Launch {
    void (*entry)(void**);
    void** arguments;
    const Parameter* parameters;
    const Image* image;
    uint64_t seed;
    uint32_t parameter_count;
    uint32_t grid[3], block[3];
    uint32_t shared_bytes;
    uint32_t order;           // enum Order
    uint32_t access_limit;    // most accesses that a thread may make without a barrier
    uint32_t sanitized;       // 1 if AddressSanitizer judges the accesses instead
    uint32_t shared_granule;  // in and out: log2 of the bytes of shared memory that a record covers
};

void emulator_switch(void** save, void* load);
}

#define COLD __attribute__((noinline, cold))
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNLIKELY(condition) __builtin_expect((condition), 0)

namespace {

enum Order { ASCENDING, DESCENDING, RANDOM };
enum Kind {
    SHFL, SHFL_UP, SHFL_DOWN, SHFL_XOR, BALLOT, ANY, ALL, SYNCWARP, MMA, LDMATRIX
};
const char* const KIND_NAMES[] = {"__shfl_sync",   "__shfl_up_sync", "__shfl_down_sync",
                                  "__shfl_xor_sync", "__ballot_sync", "__any_sync",
                                  "__all_sync",    "__syncwarp",     "mma.sync",
                                  "ldmatrix"};
enum State : uint8_t { READY, AT_BARRIER, AT_COLLECTIVE, DONE };
enum Outcome { FINE, FAULT, FINER_GRANULE };
enum Access { READ, WRITE, ATOMIC };

constexpr uint32_t WARP = 32;
constexpr uint32_t MAX_THREADS = 1024;
constexpr uint16_t ATOMIC_THREAD = 0xffff;  // writer of a record if atomics of any threads wrote it
constexpr size_t STACK = 256 << 10;
constexpr size_t STACK_RESERVE = 32 << 10;  // left for functions that do not check the stack
constexpr size_t PAGE = 4096;
constexpr size_t GUARD = 16 << 20;  // address space, not memory, between two arrays
constexpr size_t CHUNK = 64 << 10;  // bytes per entry of the table from addresses to regions
constexpr size_t ALIGNMENT = 256;   // what cudaMalloc gives
constexpr uint32_t MANY_STAMPS = 1u << 31;

// The 16-bit pattern that fills arrays and shared variables before anything is written to them: a
// NaN as float32, bfloat16, float16 or float64, and an unlikely value as int32. device.py has it
// too.
constexpr uint16_t POISON = 0x7ffb;

struct Touch {
    uint32_t stamp;
    uint32_t place;  // the instruction, as an offset in the image
    uint16_t thread;
};

// The last write of an element, and the one read of it that must be remembered (see remember_read).
struct Record {
    Touch write, read;
};

struct Region {
    uintptr_t start;  // address of the copy
    uint64_t bytes;
    uint8_t* original;
    Record* records;
    uint32_t granule;  // log2 of the bytes that one record covers
    bool writable;     // at least one parameter is not const
    bool mixed;        // some bytes belong to const parameters only
    bool one_type;     // all elements have one size, so that poison can be told from data
};

struct Fiber {
    void* stack_pointer;
    void* sanitizer_stack;
    State state;
    uint8_t kind;
    uint16_t thread;
    Index3 index;
    uint32_t mask;
    int32_t operand, width;
    int32_t line;
    uint32_t exchanges;  // number of exchanges of words with the rest of the warp so far
    const char* file;
    uint64_t value, result;
};

struct BlockStart {
    uint32_t stamp;
    uint64_t block;
};

// Memory that can grow, and is all zeros after growing.
struct ZeroedMemory {
    uint8_t* data = nullptr;
    size_t size = 0;

    bool reserve(size_t wanted) {
        if (wanted <= size) return true;
        release();
        wanted = (wanted + PAGE - 1) / PAGE * PAGE;
        void* memory = mmap(nullptr, wanted, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) return false;
        data = static_cast<uint8_t*>(memory);
        size = wanted;
        return true;
    }
    void release() {
        if (data) munmap(data, size);
        data = nullptr;
        size = 0;
    }
};

// --- the one launch in progress ---

// Variables that the hooks need at every access stand together, for the cache.
uintptr_t arena_start;
size_t arena_bytes;
Region* regions;
const uint16_t* region_of_chunk;
uintptr_t bss_start;
size_t bss_bytes;
uintptr_t dynamic_start;
size_t dynamic_bytes;  // size of the dynamic shared memory and the guard after it
uintptr_t stack_start;
uint32_t launch_stamp;  // the last stamp of earlier launches
uint32_t block_stamp;   // the first stamp of this block
uint32_t phase_stamp;   // the first stamp since the last __syncthreads
uint32_t warp_stamp;    // the first stamp since the last collective of this warp
uint32_t budget;
uint16_t thread;
uint32_t shared_granule;
Record* shared_records;
Record* dynamic_records;
uintptr_t image_start;
const uint16_t* variable_of_byte;  // for each byte of the bss: number of its shared variable, or 0

Launch* launch;
std::vector<Region> region_list;
std::vector<uint16_t> chunk_table, variable_table;
std::vector<BlockStart> block_starts;
ZeroedMemory arena, global_record_memory, shared_record_memory, dynamic_memory, stacks;
std::vector<void*> sanitized_memory;
Fiber fibers[MAX_THREADS];
Fiber* current;
uint32_t thread_count, warp_count;
uint32_t warp_stamps[MAX_THREADS / WARP];
uint32_t arrived[MAX_THREADS / WARP];  // lanes that wait in a collective
uint32_t last_stamp;
uint32_t phase;
void* scheduler_stack_pointer;
const void* scheduler_stack_bottom;
size_t scheduler_stack_size;
Outcome outcome;
char* message;
size_t message_left;
uint64_t random_state;

}  // namespace

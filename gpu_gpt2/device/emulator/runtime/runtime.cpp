// Runs a kernel's blocks one after another on the calling thread, each CUDA thread as a fiber, and
// judges every memory access the kernel makes.
//
// The compiler's -fsanitize=thread puts a call before each load and store of the kernel's code
// (__tsan_read4 and so on). These calls are meant for ThreadSanitizer's library; here they are
// answered by the functions below, and that library is never linked.
//
// Arrays: a launch works on copies of its arrays, laid out far from each other, so that an index
// outside one array cannot land in another. Arrays that overlap stay overlapping: one region.
//
// Time is counted in stamps. A new stamp begins at every event that orders threads: the start of a
// block, a __syncthreads of the block, a collective of a warp. Of two accesses to one place by two
// threads of a block, the second is ordered after the first if its block has passed a
// __syncthreads since, or, within a warp, if the warp has met in a collective since; blocks are
// never ordered. Stamps only grow, from launch to launch too, so old records need no clearing.

#include "arrays.h"
#include "blocks.h"
#include "judge.h"
#include "switch.h"

#define PLACE place_of(__builtin_return_address(0))
#define ADDRESS reinterpret_cast<uintptr_t>(address)

extern "C" {

void* emulator_dynamic_shared() { return reinterpret_cast<void*>(dynamic_start); }

void emulator_syncthreads(const char* file, int line) {
    current->state = AT_BARRIER;
    current->file = file;
    current->line = line;
    yield();
}

uint64_t emulator_collective(int kind, uint32_t mask, uint64_t value, int operand, int width,
                             const char* file, int line) {
    Fiber& self = *current;
    uint32_t warp = self.thread / WARP, lane = self.thread % WARP;
    uint32_t present = lanes_in_warp(warp);
    bool stranger = !(mask >> lane & 1);
    if (stranger || (mask & ~present)) {
        say("%s has %s in its mask 0x%08x at %s:%d", KIND_NAMES[kind],
            stranger ? "not the calling lane" : "lanes that the block lacks", mask, file, line);
        say_where();
        say(", lane %u of the %d lanes in its warp", lane, __builtin_popcount(present));
        leave(FAULT);
    }
    self.state = AT_COLLECTIVE;
    self.kind = static_cast<uint8_t>(kind);
    self.mask = mask;
    self.value = value;
    self.operand = operand;
    self.width = width;
    self.file = file;
    self.line = line;
    arrived[warp] |= 1u << lane;
    try_collective(warp, self);
    yield();
    return self.result;
}

int emulator_atomic_add(int* address, int value) {
    if (!launch->sanitized) judge<ATOMIC>(ADDRESS, 4, PLACE);
    int before = *address;
    *address = static_cast<int>(static_cast<uint32_t>(before) + static_cast<uint32_t>(value));
    return before;
}

[[noreturn]] void emulator_trap(const char* file, int line) {
    say("calls __trap at %s:%d", file, line);
    say_where();
    leave(FAULT);
}

// Runs a kernel. Returns an Outcome; for a FAULT the message, without the kernel's name, says what
// happened, with {offset} for places in the code.
int emulator_launch(Launch* request, char* text, uint64_t text_size) {
    launch = request;
    message = text;
    message_left = text_size;
    emulator_grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
    emulator_block_size = {launch->block[0], launch->block[1], launch->block[2]};
    thread_count = launch->block[0] * launch->block[1] * launch->block[2];
    warp_count = (thread_count + WARP - 1) / WARP;
    if (last_stamp > MANY_STAMPS) {
        last_stamp = 0;
        global_record_memory.release();
        shared_record_memory.release();
    }
    if (!make_stacks() || !make_regions() || !make_shared_memory()) return FAULT;
    arena_start = reinterpret_cast<uintptr_t>(arena.data);
    arena_bytes = region_list.empty() ? 0 : chunk_table.size() * CHUNK;
    regions = region_list.data();
    region_of_chunk = chunk_table.data();
    copy_in();
    run_blocks();
    if (outcome == FINE) find_unwritten_output();
    if (outcome == FINE) copy_out();
    free_sanitized();
    launch->shared_granule = shared_granule;
    return outcome;
}

#define HOOKS(size)                                                                        \
    void __tsan_read##size(void* address) { judge<READ>(ADDRESS, size, PLACE); }           \
    void __tsan_write##size(void* address) { judge<WRITE>(ADDRESS, size, PLACE); }         \
    void __tsan_unaligned_read##size(void* address) { judge<READ>(ADDRESS, size, PLACE); } \
    void __tsan_unaligned_write##size(void* address) { judge<WRITE>(ADDRESS, size, PLACE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* address, size_t size) { judge<READ>(ADDRESS, size, PLACE); }
void __tsan_write_range(void* address, size_t size) { judge<WRITE>(ADDRESS, size, PLACE); }

// clang copies structures with memcpy; the linker turns the kernel's calls of it into these.
void* __wrap_memcpy(void* to, const void* from, size_t size) {
    judge<READ>(reinterpret_cast<uintptr_t>(from), size, PLACE);
    judge<WRITE>(reinterpret_cast<uintptr_t>(to), size, PLACE);
    return memcpy(to, from, size);
}
void* __wrap_memset(void* to, int value, size_t size) {
    judge<WRITE>(reinterpret_cast<uintptr_t>(to), size, PLACE);
    return memset(to, value, size);
}
void* __tsan_memcpy(void*, const void*, size_t) __attribute__((alias("__wrap_memcpy")));
void* __tsan_memset(void*, int, size_t) __attribute__((alias("__wrap_memset")));

void __tsan_init() {}
void __tsan_func_exit() {}
void __tsan_func_entry(void*) {
    uintptr_t here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    if (UNLIKELY(here - stack_start < STACK_RESERVE)) {
        say("has used up its stack: local arrays too large, or a recursion without end");
        say_place(PLACE);
        say_where();
        leave(FAULT);
    }
}

// -fsanitize=alignment,bounds,integer-divide-by-zero call these; the structures are the compilers'.

struct SourcePlace {
    const char* file;
    uint32_t line, column;
};

struct TypeName {
    uint16_t kind, info;  // info of an integer: 1 if signed
    char text[1];
};

struct OutOfBounds {
    SourcePlace place;
    const TypeName *array, *index;
};

struct DivisionOverflow {
    SourcePlace place;
    const TypeName* type;
};

struct TypeMismatch {
    SourcePlace place;
    const TypeName* type;
    uint8_t log_alignment, access;
};

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
    say("uses %s at ", data->type->text);
    if (address - arena_start < arena_bytes) {
        const Region& region = regions[region_of_chunk[(address - arena_start) / CHUNK]];
        say_element(nearest_parameter(region, address), address);
    } else {
        say_shared(address);
    }
    say(", an address that is not a multiple of %d, at %s:%u", 1 << data->log_alignment,
        data->place.file, data->place.line);
    say_where();
    leave(FAULT);
}

void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
    say("uses index %lld at %s:%u, out of bounds of %s", static_cast<long long>(index),
        data->place.file, data->place.line, data->array->text);
    say_where();
    leave(FAULT);
}

void __ubsan_handle_divrem_overflow(DivisionOverflow* data, uintptr_t, uintptr_t divisor) {
    say("%s at %s:%u", divisor ? "overflows in a division" : "divides by zero", data->place.file,
        data->place.line);
    say_where();
    leave(FAULT);
}

}  // extern "C"

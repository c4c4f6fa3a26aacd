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
#include "tensor_core.h"

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
    return meet(static_cast<Kind>(kind), mask, value, operand, width, file, line);
}

// c (16 x 8) += a (16 x 16) b (16 x 8), where each lane has 4, 8 and 4 elements of them. A lane
// adds to its own elements of c in rising order of the inner index k. Lane 4 r + q has columns 2q
// and 2q + 1 of rows r and r + 8 of c.
void emulator_mma(float* c, const uint32_t* a, const uint32_t* b, int bf16, const char* file,
                  int line) {
    const Words* lanes = exchange(MMA, {{a[0], a[1], a[2], a[3], b[0], b[1]}}, file, line);
    uint32_t row = current->thread % WARP / 4, column = current->thread % 4 * 2;
    for (int k = 0; k < 16; k++) {
        // Lane 4 r + q has, of row r of a, k = 2q, 2q + 1 in word 0 and k = 2q + 8, 2q + 9 in word
        // 2; of row r + 8 the same k in words 1 and 3. Lane 4 n + q has, of column n of b, the same
        // k in words 4 and 5.
        int q = k % 8 / 2, odd = k % 2, upper = k / 8;
        for (int i = 0; i < 4; i++) {
            const uint32_t* of_a = lanes[4 * row + q].word + i / 2 + 2 * upper;
            const uint32_t* of_b = lanes[4 * (column + i % 2) + q].word + 4 + upper;
            c[i] += half_of(of_a, odd, bf16) * half_of(of_b, odd, bf16);
        }
    }
}

// Loads four matrices of 8 x 8 elements of 16 bits; `row` of lane 8 m + i is the address of row i
// of matrix m. Word m of lane 4 r + q receives elements 2q and 2q + 1 of row r of matrix m or,
// transposed, of column r of matrix m.
void emulator_ldmatrix(uint32_t* words, const void* row, int transposed, const char* file,
                       int line) {
    uintptr_t from = reinterpret_cast<uintptr_t>(row);
    if (UNLIKELY(from % 16)) {
        say("ldmatrix reads a row that does not start at a multiple of 16 bytes at %s:%d", file,
            line);
        say_where();
        leave(FAULT);
    }
    if (!launch->sanitized) judge<READ>(from, 16, PLACE);
    Words mine{};
    memcpy(mine.word, row, 16);
    const Words* lanes = exchange(LDMATRIX, mine, file, line);
    uint32_t r = current->thread % WARP / 4, q = current->thread % 4;
    for (uint32_t m = 0; m < 4; m++) {
        if (!transposed) {
            words[m] = lanes[8 * m + r].word[q];
            continue;
        }
        uint32_t first = lanes[8 * m + 2 * q].word[r / 2] >> (r % 2 * 16) & 0xffffu;
        uint32_t second = lanes[8 * m + 2 * q + 1].word[r / 2] >> (r % 2 * 16) & 0xffffu;
        words[m] = first | second << 16;
    }
}

// Notes a copy from global memory, or of zeros, whose bytes arrive in shared memory when the thread
// waits for its copies. Until then a read of these bytes is a race with the copy, or finds poison.
void emulator_cp_async(void* to, const void* from, int bytes, int exists) {
    Copy copy{{}, static_cast<uint32_t>(bytes), reinterpret_cast<uintptr_t>(to)};
    if (!launch->sanitized) {
        judge<WRITE>(copy.to, copy.bytes, PLACE);
        if (exists) judge<READ>(reinterpret_cast<uintptr_t>(from), copy.bytes, PLACE);
    }
    if (exists) memcpy(copy.data, from, copy.bytes);
    fill_poison(to, copy.bytes);
    copies[current->thread].push_back(copy);
}

void emulator_cp_async_wait_all() {
    for (const Copy& copy : copies[current->thread]) {
        if (!launch->sanitized) judge<WRITE>(copy.to, copy.bytes, PLACE);
        memcpy(reinterpret_cast<void*>(copy.to), copy.data, copy.bytes);
    }
    copies[current->thread].clear();
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

// Runs a kernel and returns an Outcome. After a FAULT, `text` says what happened, without the
// kernel's name and with {offset} for each place in the code.
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

// clang copies structures with memcpy; the linker redirects the kernel's calls of memcpy and memset
// to the next two functions.
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

// Code compiled with -fsanitize=alignment,bounds,integer-divide-by-zero calls the functions below.
// The structures are those that gcc and clang pass.

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

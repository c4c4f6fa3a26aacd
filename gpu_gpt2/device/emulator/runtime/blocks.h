// Runs blocks one by one, their threads as fibers that meet at barriers and collectives.
#pragma once

#include "report.h"

namespace {

// A copy that cp.async has started: its bytes and their destination.
struct Copy {
    uint8_t data[16];
    uint32_t bytes;
    uintptr_t to;
};
std::vector<Copy> copies[MAX_THREADS];  // of each thread

uint64_t next_random() {  // splitmix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

// Fills `numbers` with 0 to count - 1 in the launch's order.
void arrange(uint32_t* numbers, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        numbers[i] = launch->order == DESCENDING ? count - 1 - i : i;
    }
    if (launch->order == RANDOM) {
        for (uint32_t i = count; i > 1; i--) std::swap(numbers[i - 1], numbers[next_random() % i]);
    }
}

void yield() {
    Fiber* self = current;
    if (__sanitizer_start_switch_fiber) {
        __sanitizer_start_switch_fiber(&self->sanitizer_stack, scheduler_stack_bottom,
                                       scheduler_stack_size);
    }
    emulator_switch(&self->stack_pointer, scheduler_stack_pointer);
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(self->sanitizer_stack, nullptr, nullptr);
    }
}

void run_fiber() {
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_bottom, &scheduler_stack_size);
    }
    launch->entry(launch->arguments);
    current->state = DONE;
    leave(FINE);
}

uint8_t* stack_of(uint32_t number) { return stacks.data + number * (STACK + PAGE) + PAGE; }

void start_fiber(uint32_t number) {
    Fiber& fiber = fibers[number];
    fiber.state = READY;
    fiber.thread = static_cast<uint16_t>(number);
    fiber.exchanges = 0;
    fiber.index = thread_index(number);
    // Stacks that begin at equal offsets would compete for the same cache lines.
    uintptr_t top = reinterpret_cast<uintptr_t>(stack_of(number)) + STACK - 64 - number % 16 * 256;
    uintptr_t* frame = reinterpret_cast<uintptr_t*>(top);
#if defined(__x86_64__)
    *--frame = 0;  // run_fiber's return address, never used
    *--frame = reinterpret_cast<uintptr_t>(run_fiber);
    for (int i = 0; i < 6; i++) *--frame = 0;  // rbp, rbx, r12 to r15
#else
    frame -= 20;  // x19 to x30 and d8 to d15; x30 is where the switch returns to
    memset(frame, 0, 20 * sizeof *frame);
    frame[11] = reinterpret_cast<uintptr_t>(run_fiber);
#endif
    fiber.stack_pointer = frame;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack_of(number), STACK);
}

void resume(Fiber& fiber) {
    current = &fiber;
    thread = fiber.thread;
    emulator_thread_index = fiber.index;
    warp_stamp = warp_stamps[fiber.thread / WARP];
    stack_start = reinterpret_cast<uintptr_t>(stack_of(fiber.thread));
    budget = launch->access_limit;
    void* sanitizer_stack = nullptr;
    if (__sanitizer_start_switch_fiber) {
        __sanitizer_start_switch_fiber(&sanitizer_stack, stack_of(fiber.thread), STACK);
    }
    emulator_switch(&scheduler_stack_pointer, fiber.stack_pointer);
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(sanitizer_stack, nullptr, nullptr);
    }
}

uint32_t lanes_in_warp(uint32_t warp) {
    uint32_t lanes = std::min(thread_count - warp * WARP, WARP);
    return lanes == WARP ? 0xffffffffu : (1u << lanes) - 1;
}

// Returns the lane whose value a shuffle gives to `lane`, as in the CUDA C++ Programming Guide,
// "Warp Shuffle Functions".
uint32_t shuffle_source(const Fiber& fiber, uint32_t lane) {
    int width = fiber.width;
    int self = static_cast<int>(lane);
    int first = self & ~(width - 1);
    int source = first | (fiber.operand & (width - 1));
    if (fiber.kind == SHFL_UP) source = self - fiber.operand;
    if (fiber.kind == SHFL_DOWN) source = self + fiber.operand;
    if (fiber.kind == SHFL_XOR) source = self ^ fiber.operand;
    int lowest = fiber.kind == SHFL_UP ? first : 0;
    bool outside = source < lowest || source >= first + width;
    return static_cast<uint32_t>(outside ? self : source);
}

// Ends the collective of the calling fiber if all its lanes are there.
void try_collective(uint32_t warp, const Fiber& caller) {
    uint32_t mask = caller.mask;
    if ((arrived[warp] & mask) != mask) return;
    Fiber* lanes = fibers + warp * WARP;
    uint64_t ballot = 0;
    for (uint32_t lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        if (lanes[lane].mask != mask || lanes[lane].kind != caller.kind) return;
        ballot |= (lanes[lane].value & 1) << lane;
    }
    for (uint32_t lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber& fiber = lanes[lane];
        fiber.result = ballot;
        if (fiber.kind <= SHFL_XOR) {
            uint32_t source = shuffle_source(fiber, lane);
            if (!(mask >> source & 1)) {
                say("%s takes the value of lane %u, which is not in the mask 0x%08x at %s:%d",
                    KIND_NAMES[fiber.kind], source, mask, fiber.file, fiber.line);
                say_index(": block", emulator_block_index);
                say(", ");
                say_thread(fiber.thread);
                leave(FAULT);
            }
            fiber.result = lanes[source].value;
        }
        fiber.state = READY;
    }
    arrived[warp] &= ~mask;
    warp_stamps[warp] = ++last_stamp;
}

// --- a block that cannot continue ---

bool same_situation(const Fiber& a, const Fiber& b) {
    if (a.state != b.state) return false;
    if (a.state == DONE) return true;
    return a.line == b.line && !strcmp(a.file, b.file) &&
           (a.state == AT_BARRIER || (a.kind == b.kind && a.mask == b.mask));
}

// Adds to the message where threads first to last - 1 are, naming each place once.
void say_situations(uint32_t first, uint32_t last) {
    bool any = false;
    for (uint32_t i = first; i < last; i++) {
        const Fiber& fiber = fibers[i];
        uint32_t before = 0, count = 0;
        for (uint32_t j = first; j < last; j++) {
            if (!same_situation(fibers[j], fiber)) continue;
            before += j < i;
            count++;
        }
        if (before) continue;
        say(any ? "; %u from " : "%u threads from ", count);
        say_thread(i);
        any = true;
        if (fiber.state == DONE) {
            say(" on have ended");
        } else if (fiber.state == AT_BARRIER) {
            say(" on wait in __syncthreads at %s:%d", fiber.file, fiber.line);
        } else {
            say(" on wait in %s with mask 0x%08x at %s:%d", KIND_NAMES[fiber.kind], fiber.mask,
                fiber.file, fiber.line);
        }
    }
}

void report_stuck() {
    outcome = FAULT;
    for (uint32_t i = 0; i < thread_count; i++) {
        const Fiber& fiber = fibers[i];
        if (fiber.state != AT_COLLECTIVE) continue;
        uint32_t warp = i / WARP;
        say("%s at %s:%d is not reached by all lanes of its mask 0x%08x",
            KIND_NAMES[fiber.kind], fiber.file, fiber.line, fiber.mask);
        say_index(": block", emulator_block_index);
        say(", warp %u: ", warp);
        say_situations(warp * WARP, std::min(thread_count, (warp + 1) * WARP));
        return;
    }
    say("__syncthreads is not reached by all threads of the block");
    say_index(": block", emulator_block_index);
    say(": ");
    say_situations(0, thread_count);
}

// --- blocks ---

void run_warp(uint32_t warp) {
    uint32_t count = std::min(thread_count - warp * WARP, WARP);
    uint32_t lanes[WARP];
    bool ran = true;
    while (ran) {
        ran = false;
        arrange(lanes, count);
        for (uint32_t i = 0; i < count; i++) {
            Fiber& fiber = fibers[warp * WARP + lanes[i]];
            if (fiber.state != READY) continue;
            ran = true;
            resume(fiber);
            if (outcome != FINE) return;
        }
    }
}

// Returns true if all threads wait in one __syncthreads, and makes them ready again.
bool pass_barrier() {
    for (uint32_t i = 0; i < thread_count; i++) {
        if (fibers[i].state != AT_BARRIER || !same_situation(fibers[i], fibers[0])) return false;
    }
    for (uint32_t i = 0; i < thread_count; i++) fibers[i].state = READY;
    return true;
}

bool block_done() {
    for (uint32_t i = 0; i < thread_count; i++) {
        if (fibers[i].state != DONE) return false;
    }
    return true;
}

void begin_phase() {
    phase_stamp = ++last_stamp;
    for (uint32_t warp = 0; warp < warp_count; warp++) warp_stamps[warp] = phase_stamp;
}

void fill_poison(void* data, size_t bytes) {
    uint16_t* words = static_cast<uint16_t*>(data);
    std::fill(words, words + bytes / 2, POISON);
    if (bytes % 2) static_cast<uint8_t*>(data)[bytes - 1] = POISON & 0xff;
}

void run_block(uint64_t number) {
    emulator_block_index = block_index(number);
    phase = 0;
    begin_phase();
    block_stamp = phase_stamp;
    block_starts.push_back({block_stamp, number});
    for (uint32_t i = 0; i < launch->image->variable_count; i++) {
        const Variable& variable = launch->image->variables[i];
        fill_poison(reinterpret_cast<void*>(variable.start), variable.bytes);
    }
    if (launch->shared_bytes) {
        fill_poison(reinterpret_cast<void*>(dynamic_start), launch->shared_bytes);
    }
    for (uint32_t i = 0; i < thread_count; i++) copies[i].clear();
    for (uint32_t i = 0; i < thread_count; i++) start_fiber(i);
    for (uint32_t warp = 0; warp < warp_count; warp++) arrived[warp] = 0;

    uint32_t warps[MAX_THREADS / WARP];
    for (;;) {
        arrange(warps, warp_count);
        for (uint32_t i = 0; i < warp_count; i++) {
            run_warp(warps[i]);
            if (outcome != FINE) return;
        }
        if (block_done()) return;
        if (!pass_barrier()) {
            report_stuck();
            return;
        }
        phase++;
        begin_phase();
    }
}

void run_blocks() {
    outcome = FINE;
    random_state = launch->seed;
    launch_stamp = last_stamp;
    block_starts.clear();
    uint64_t count = uint64_t{launch->grid[0]} * launch->grid[1] * launch->grid[2];
    if (launch->order == RANDOM) {
        std::vector<uint32_t> numbers(count);
        arrange(numbers.data(), static_cast<uint32_t>(count));
        for (uint32_t number : numbers) {
            if (outcome == FINE) run_block(number);
        }
    } else {
        for (uint64_t i = 0; i < count && outcome == FINE; i++) {
            run_block(launch->order == DESCENDING ? count - 1 - i : i);
        }
    }
}

}  // namespace

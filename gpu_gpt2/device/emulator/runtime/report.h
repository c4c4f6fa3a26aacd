// Writes the message about a fault, and leaves the kernel that made it.
#pragma once

#include "state.h"

namespace {

__attribute__((format(printf, 1, 2))) void say(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(message, message_left, format, arguments);
    va_end(arguments);
    size_t written = std::min(static_cast<size_t>(std::max(length, 0)), message_left - 1);
    message += written;
    message_left -= written;
}

Index3 block_index(uint64_t number) {
    const uint32_t* grid = launch->grid;
    return {static_cast<uint32_t>(number % grid[0]),
            static_cast<uint32_t>(number / grid[0] % grid[1]),
            static_cast<uint32_t>(number / grid[0] / grid[1])};
}

Index3 thread_index(uint32_t number) {
    const uint32_t* block = launch->block;
    return {number % block[0], number / block[0] % block[1], number / block[0] / block[1]};
}

void say_index(const char* what, Index3 index) {
    say("%s (%u, %u, %u)", what, index.x, index.y, index.z);
}

void say_thread(uint32_t number) { say_index("thread", thread_index(number)); }

void say_place(uint32_t place) { say("{%x}", place); }  // device.py looks up file and line

void say_where() {
    say_index(": block", emulator_block_index);
    say_index(", thread", emulator_thread_index);
}

[[noreturn]] COLD void leave(Outcome reason) {
    outcome = reason;
    if (__sanitizer_start_switch_fiber) {
        __sanitizer_start_switch_fiber(nullptr, scheduler_stack_bottom, scheduler_stack_size);
    }
    emulator_switch(&current->stack_pointer, scheduler_stack_pointer);
    __builtin_unreachable();
}

uint32_t place_of(const void* return_address) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) -
                                 image_start) - 1;
}

const char* verb(Access access) {
    return access == READ ? "reads" : access == WRITE ? "writes" : "atomically changes";
}

// Returns the parameter of the region whose array is nearest to an address in the copy.
const Parameter& nearest_parameter(const Region& region, uintptr_t address) {
    const Parameter* best = nullptr;
    uint64_t best_distance = UINT64_MAX;
    for (uint32_t i = 0; i < launch->parameter_count; i++) {
        const Parameter& p = launch->parameters[i];
        uintptr_t start = reinterpret_cast<uintptr_t>(*p.argument);
        if (start < region.start || start > region.start + region.bytes) continue;
        uint64_t distance = address < start ? start - address
                            : address >= start + p.bytes ? address - start - p.bytes + 1
                                                         : 0;
        if (distance < best_distance) {
            best = &p;
            best_distance = distance;
        }
    }
    return *best;
}

void say_element(const Parameter& p, uintptr_t address) {
    int64_t offset = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(*p.argument));
    int64_t size = p.itemsize;
    say("%s[%lld]", p.name, static_cast<long long>((offset - (offset < 0 ? size - 1 : 0)) / size));
}

void say_array(const Parameter& p) {
    say(" (%s has %llu elements of %s)", p.name,
        static_cast<unsigned long long>(p.bytes / p.itemsize), p.type);
}

[[noreturn]] COLD void report_global(const Region& region, uintptr_t address, size_t size,
                                     Access access, uint32_t place) {
    uintptr_t inside = address - region.start;
    const Parameter& p = nearest_parameter(region, address);
    say("%s ", verb(access));
    if (inside >= region.bytes || size > region.bytes - inside) {
        if (size != p.itemsize) say("%zu bytes at ", size);
        say_element(p, address);
        say(" out of bounds");
        say_array(p);
    } else {
        say_element(p, address);
        say(" through a pointer to const: %s is an input", p.name);
    }
    say_place(place);
    say_where();
    leave(FAULT);
}

[[noreturn]] COLD void report_poison(const Region& region, uintptr_t address, uint32_t place) {
    const Parameter& p = nearest_parameter(region, address);
    say("reads ");
    say_element(p, address);
    say(", which nobody has written since the array was created");
    say_array(p);
    say_place(place);
    say_where();
    leave(FAULT);
}

void say_shared(uintptr_t address) {
    if (address - dynamic_start < dynamic_bytes) {
        say("byte %zu of the dynamic shared memory (%u bytes)",
            static_cast<size_t>(address - dynamic_start), launch->shared_bytes);
        return;
    }
    const Image& image = *launch->image;
    const Variable* best = nullptr;
    uint64_t best_distance = UINT64_MAX;
    for (uint32_t i = 0; i < image.variable_count; i++) {
        const Variable& v = image.variables[i];
        uint64_t distance = address < v.start ? v.start - address
                            : address >= v.start + v.bytes ? address - v.start - v.bytes + 1
                                                           : 0;
        if (distance < best_distance) {
            best = &v;
            best_distance = distance;
        }
    }
    if (!best) {
        say("a variable of the program");
        return;
    }
    say("byte %lld of shared '%s' (%llu bytes)", static_cast<long long>(address - best->start),
        best->name, static_cast<unsigned long long>(best->bytes));
}

[[noreturn]] COLD void report_shared(const char* complaint, uintptr_t address, size_t size,
                                Access access, uint32_t place) {
    say("%s %zu bytes at ", verb(access), size);
    say_shared(address);
    say("%s", complaint);
    say_place(place);
    say_where();
    leave(FAULT);
}

[[noreturn]] COLD void report_wild(uintptr_t address, size_t size, Access access, uint32_t place) {
    bool stack = address - reinterpret_cast<uintptr_t>(stacks.data) < stacks.size;
    say("%s %zu bytes at 0x%llx, which is %s", verb(access), size,
        static_cast<unsigned long long>(address),
        stack ? "a local variable of another thread" : "in none of the kernel's arrays");
    say_place(place);
    say_where();
    leave(FAULT);
}

[[noreturn]] COLD void report_race(const Region* region, const Touch& earlier,
                                   const char* earlier_verb, uintptr_t address, Access access,
                                   uint32_t place) {
    uint32_t stamp = earlier.stamp;
    bool other_block = stamp < block_stamp;
    say("race on ");
    if (region) {
        say_element(nearest_parameter(*region, address), address);
    } else {
        say_shared(address);
    }
    say(": ");
    if (other_block) {
        auto after = std::upper_bound(
            block_starts.begin(), block_starts.end(), stamp,
            [](uint32_t value, const BlockStart& start) { return value < start.stamp; });
        say_index("block", block_index((after - 1)->block));
        say(", ");
    }
    if (earlier.thread == ATOMIC_THREAD) {
        say("an atomic operation changes it");
    } else {
        say_thread(earlier.thread);
        say(" %s it", earlier_verb);
    }
    say_place(earlier.place);
    say(" and ");
    if (other_block) {
        say_index("block", emulator_block_index);
        say(", ");
    }
    say_thread(thread);
    say(" %s it", verb(access));
    say_place(place);
    if (other_block) {
        say(" in one launch, where blocks have no order");
    } else {
        say_index(" with no barrier between: block", emulator_block_index);
        say(", after %u __syncthreads", phase);
    }
    leave(FAULT);
}

}  // namespace

// Judges one memory access: bounds, initialisation, races.
#pragma once

#include "report.h"

namespace {

// Whether an access of this block happened in no order with this thread's access now.
ALWAYS_INLINE bool unordered(uint32_t stamp, uint16_t other) {
    return stamp >= phase_stamp && other != thread &&
           ((other ^ thread) >= WARP || stamp >= warp_stamp);
}

ALWAYS_INLINE void put(Record& record, int which, uint16_t who,
                                               uint32_t place) {
    record.stamp[which] = warp_stamp;
    record.place[which] = place;
    record.thread[which] = who;
}

// Keeps two reads such that a later write which conflicts with any read of this launch so far also
// conflicts with one of the two. `origin` is the last stamp that no longer matters.
__attribute__((noinline)) void remember_read(Record& record, uint32_t origin, uint32_t place) {
    for (int i = 1; i <= 2; i++) {
        // A read of another block conflicts with every write from now on: nothing to add.
        if (record.stamp[i] > origin && record.stamp[i] < block_stamp) return;
    }
    for (int i = 1; i <= 2; i++) {
        // One's own earlier read, or one that a barrier has ordered: this read says more.
        if (record.thread[i] == thread || record.stamp[i] < phase_stamp) {
            put(record, i, thread, place);
            return;
        }
    }
    bool first_warp_same = (record.thread[1] ^ thread) < WARP;
    bool second_warp_same = (record.thread[2] ^ thread) < WARP;
    if (first_warp_same && second_warp_same) {
        // Two lanes of this warp: enough, unless the warp has met since.
        if (record.stamp[1] < warp_stamp) {
            put(record, 1, thread, place);
        } else if (record.stamp[2] < warp_stamp) {
            put(record, 2, thread, place);
        }
    } else if (!first_warp_same && !second_warp_same &&
               (record.thread[1] ^ record.thread[2]) < WARP) {
        put(record, 2, thread, place);
    }
}

template <Access access>
ALWAYS_INLINE void track(const Region* region, Record& record,
                                                 uint32_t origin, uintptr_t address,
                                                 uint32_t place) {
    uint32_t written = record.stamp[0];
    if (__builtin_expect(written > origin, 0) &&
        (written < block_stamp || unordered(written, record.thread[0])) &&
        !(access == ATOMIC && record.thread[0] == ATOMIC_THREAD)) {
        report_race(region, record, 0, address, access, place);
    }
    if (access == READ) {
        if (record.thread[1] == thread && record.stamp[1] >= phase_stamp) {
            record.stamp[1] = warp_stamp;  // the commonest case: the same thread again
        } else {
            remember_read(record, origin, place);
        }
        return;
    }
    for (int i = 1; i <= 2; i++) {
        uint32_t stamp = record.stamp[i];
        if (__builtin_expect(stamp > origin, 0) &&
            (stamp < block_stamp || unordered(stamp, record.thread[i]))) {
            report_race(region, record, i, address, access, place);
        }
    }
    put(record, 0, access == ATOMIC ? ATOMIC_THREAD : thread, place);
}

bool covered_by_output(const Region& region, uintptr_t address, size_t size) {
    for (uint32_t i = 0; i < launch->parameter_count; i++) {
        const Parameter& p = launch->parameters[i];
        uintptr_t start = reinterpret_cast<uintptr_t>(*p.argument);
        if (!p.constant && start >= region.start && address >= start &&
            address + size <= start + p.bytes) {
            return true;
        }
    }
    return false;
}

bool holds_poison(uintptr_t address, size_t element) {
    if (element == 4) return *reinterpret_cast<const uint32_t*>(address) == POISON * 0x10001u;
    return element == 2 && *reinterpret_cast<const uint16_t*>(address) == POISON;
}

// Whether the element still holds what `empty` put there and nobody wrote it in this launch. (What
// a kernel writes can be that pattern only if it computed with it.)
COLD void check_poison(const Region& region, uintptr_t address, uint32_t place) {
    uintptr_t inside = address - region.start;
    if (region.one_type && region.records[inside >> region.granule].stamp[0] <= launch_stamp) {
        report_poison(region, address, place);
    }
}

template <Access access>
ALWAYS_INLINE void judge_global(uintptr_t address, size_t size, uint32_t place) {
    const Region& region = regions[region_of_chunk[(address - arena_start) / CHUNK]];
    uintptr_t inside = address - region.start;
    if (UNLIKELY(inside >= region.bytes || size > region.bytes - inside)) {
        report_global(region, address, size, access, place);
    }
    size_t step = size_t{1} << region.granule;
    if (access == READ) {
        for (size_t done = 0; done < size; done += step) {
            if (UNLIKELY(holds_poison((address + done) & ~(step - 1), step))) {
                check_poison(region, address + done, place);
            }
        }
        if (!region.writable) return;  // nobody can write it, so there are no races to find
    } else if (UNLIKELY(!region.writable || region.mixed) &&
               !covered_by_output(region, address, size)) {
        report_global(region, address, size, access, place);
    }
    Record* record = region.records + (inside >> region.granule);
    for (size_t done = 0; done < size; done += step, record++) {
        track<access>(&region, *record, launch_stamp, address + done, place);
    }
}

template <Access access>
ALWAYS_INLINE void judge_shared(Record* records, uintptr_t start, uintptr_t address, size_t size,
                                uint32_t place) {
    if (UNLIKELY(size >> shared_granule == 0)) {
        // Two threads may own parts of what one record covers: start again with finer records.
        shared_granule = size == 2 ? 1 : 0;
        leave(FINER_GRANULE);
    }
    size_t step = size_t{1} << shared_granule;
    Record* record = records + ((address - start) >> shared_granule);
    for (size_t done = 0; done < size; done += step, record++) {
        if (access != WRITE && UNLIKELY(record->stamp[0] < block_stamp)) {
            report_shared(", which no thread of the block has written yet", address, size, access,
                          place);
        }
        track<access>(nullptr, *record, block_stamp - 1, address + done, place);
    }
}

// Whether the address is in the program's read-only data, or threadIdx and its like: clang reports
// reads of those.
bool is_constant(uintptr_t address) {
    if (address - image_start < launch->image->end - image_start) return true;
    for (const Index3* index : {&emulator_thread_index, &emulator_block_index,
                                &emulator_block_size, &emulator_grid_size}) {
        if (address - reinterpret_cast<uintptr_t>(index) < sizeof *index) return true;
    }
    return false;
}

template <Access access>
ALWAYS_INLINE void judge(uintptr_t address, size_t size, uint32_t place) {
    if (UNLIKELY(--budget == 0)) {
        say("makes %u memory accesses without a barrier or an end: a loop that never stops?",
            launch->access_limit);
        say_place(place);
        say_where();
        leave(FAULT);
    }
    if (address - arena_start < arena_bytes) {
        judge_global<access>(address, size, place);
    } else if (uintptr_t offset = address - bss_start; offset < bss_bytes) {
        uint16_t variable = variable_of_byte[offset];
        size_t last = std::min(offset + size - 1, bss_bytes);
        if (UNLIKELY(variable == 0 || variable_of_byte[last] != variable)) {
            report_shared(" out of bounds", address, size, access, place);
        }
        judge_shared<access>(shared_records, bss_start, address, size, place);
    } else if (address - stack_start < STACK) {
        return;  // the thread's own local variables
    } else if (uintptr_t byte = address - dynamic_start; byte < dynamic_bytes) {
        if (UNLIKELY(byte + size > launch->shared_bytes)) {
            report_shared(" out of bounds", address, size, access, place);
        }
        judge_shared<access>(dynamic_records, dynamic_start, address, size, place);
    } else if (access != READ || !is_constant(address)) {
        report_wild(address, size, access, place);
    }
}

// An output that nobody wrote still holds what the device's `empty` put there, in every element.
void find_unwritten_output() {
    for (uint32_t i = 0; i < launch->parameter_count; i++) {
        const Parameter& p = launch->parameters[i];
        uintptr_t start = reinterpret_cast<uintptr_t>(*p.argument);
        bool poison = !p.constant && p.bytes > 0;
        for (uint64_t offset = 0; poison && offset < p.bytes; offset += p.itemsize) {
            poison = holds_poison(start + offset, p.itemsize);
        }
        if (poison) {
            say("has ended without writing %s", p.name);
            say_array(p);
            outcome = FAULT;
            return;
        }
    }
}

}  // namespace

// Judges one memory access: bounds, initialisation, races.
#pragma once

#include "report.h"

namespace {

// Returns true if nothing orders this thread's access after an earlier access of this block.
ALWAYS_INLINE bool unordered(const Touch& earlier) {
    return earlier.stamp >= phase_stamp && earlier.thread != thread &&
           ((earlier.thread ^ thread) >= WARP || earlier.stamp >= warp_stamp);
}

// One remembered read of an element is enough to find a race with any later write, because warps
// run one after another between two barriers, and a thread runs until it waits: a thread that
// writes later belongs to this thread's warp, or to a warp that has not run yet. Accesses up to the
// stamp `origin` no longer matter.
ALWAYS_INLINE void remember_read(Touch& read, uint32_t origin, uint32_t place) {
    bool other_block = read.stamp > origin && read.stamp < block_stamp;
    if (!other_block && !unordered(read)) read = {warp_stamp, place, thread};
}

template <Access access>
ALWAYS_INLINE void track(const Region* region, Record& record, uint32_t origin, uintptr_t address,
                         uint32_t place) {
    if (UNLIKELY(record.write.stamp > origin) &&
        (record.write.stamp < block_stamp || unordered(record.write)) &&
        !(access == ATOMIC && record.write.thread == ATOMIC_THREAD)) {
        report_race(region, record.write, "writes", address, access, place);
    }
    if (access == READ) {
        remember_read(record.read, origin, place);
        return;
    }
    if (UNLIKELY(record.read.stamp > origin) &&
        (record.read.stamp < block_stamp || unordered(record.read))) {
        report_race(region, record.read, "reads", address, access, place);
    }
    record.write = {warp_stamp, place, access == ATOMIC ? ATOMIC_THREAD : thread};
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

// Reports an element that still holds the pattern that `empty` put there, unless this launch wrote
// it. (A kernel can write the pattern only if it computed with the pattern.)
COLD void check_poison(const Region& region, uintptr_t address, uint32_t place) {
    uintptr_t inside = address - region.start;
    if (region.one_type && region.records[inside >> region.granule].write.stamp <= launch_stamp) {
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
        if (!region.writable) return;  // no thread can write this region, so it has no races
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
        // Two threads may own parts of the bytes of one record: the launch starts again with finer
        // records.
        shared_granule = size == 2 ? 1 : 0;
        leave(FINER_GRANULE);
    }
    size_t step = size_t{1} << shared_granule;
    Record* record = records + ((address - start) >> shared_granule);
    for (size_t done = 0; done < size; done += step, record++) {
        if (access != WRITE && UNLIKELY(record->write.stamp < block_stamp)) {
            report_shared(", which no thread of the block has written yet", address, size, access,
                          place);
        }
        track<access>(nullptr, *record, block_stamp - 1, address + done, place);
    }
}

// Returns true for the program's read-only data and for threadIdx, blockIdx, blockDim and gridDim,
// whose reads clang reports too.
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

// Reports an output that no thread wrote: all its elements still hold the pattern that `empty` put
// there.
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

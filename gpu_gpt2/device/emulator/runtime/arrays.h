// The memory of a launch: copies of its arrays, shared memory, stacks.
#pragma once

#include "blocks.h"

namespace {

// Allocates memory whose two ends AddressSanitizer watches.
void* allocate_sanitized(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, ALIGNMENT, std::max(bytes, size_t{1}))) abort();
    sanitized_memory.push_back(memory);
    return memory;
}

void free_sanitized() {
    for (void* memory : sanitized_memory) free(memory);
    sanitized_memory.clear();
}

// Makes a region for each array, or for each group of overlapping arrays, and points the kernel's
// arguments into the copies. Returns false, with a message, if there is not enough memory.
bool make_regions() {
    region_list.clear();
    chunk_table.clear();
    uint32_t count = launch->parameter_count;
    std::vector<const Parameter*> sorted;
    for (uint32_t i = 0; i < count; i++) sorted.push_back(launch->parameters + i);
    std::stable_sort(sorted.begin(), sorted.end(), [](const Parameter* a, const Parameter* b) {
        if ((a->bytes == 0) != (b->bytes == 0)) return b->bytes == 0;  // empty arrays overlap none
        return a->data < b->data;
    });
    std::vector<uint32_t> region_of(count);
    for (uint32_t i = 0; i < count; i++) {
        const Parameter& p = *sorted[i];
        bool overlaps = !region_list.empty() && p.bytes > 0 &&
                        p.data < region_list.back().original + region_list.back().bytes;
        uint32_t granule = p.itemsize == 4 ? 2 : p.itemsize == 2 ? 1 : 0;
        if (!overlaps) {
            region_list.push_back(
                {0, p.bytes, p.data, nullptr, granule, !p.constant, false, granule > 0});
        } else {
            Region& region = region_list.back();
            uint64_t end = static_cast<uint64_t>(p.data - region.original) + p.bytes;
            region.mixed = region.mixed || p.data != region.original || end != region.bytes;
            region.bytes = std::max(region.bytes, end);
            region.one_type = region.one_type && region.granule == granule;
            region.granule = std::min(region.granule, granule);
            region.writable = region.writable || !p.constant;
        }
        region_of[i] = static_cast<uint32_t>(region_list.size() - 1);
    }

    size_t position = GUARD, record_count = 0;
    std::vector<size_t> offsets, first_records;
    for (size_t i = 0; i < region_list.size(); i++) {
        const Region& region = region_list[i];
        // The copy keeps the original's place relative to cudaMalloc's alignment.
        position += reinterpret_cast<uintptr_t>(region.original) % ALIGNMENT;
        offsets.push_back(position);
        first_records.push_back(record_count);
        record_count += (region.bytes >> region.granule) + 1;
        position = (position + region.bytes + CHUNK - 1) / CHUNK * CHUNK + GUARD;
        chunk_table.resize((position - GUARD / 2) / CHUNK, static_cast<uint16_t>(i));
    }
    chunk_table.resize(position / CHUNK, static_cast<uint16_t>(region_list.size() - 1));
    size_t record_bytes = record_count * sizeof(Record);
    if (!launch->sanitized &&
        (!arena.reserve(position) || !global_record_memory.reserve(record_bytes))) {
        say("has not enough memory for copies of its arrays");
        return false;
    }
    for (size_t i = 0; i < region_list.size(); i++) {
        Region& region = region_list[i];
        if (launch->sanitized) {
            size_t shift = reinterpret_cast<uintptr_t>(region.original) % ALIGNMENT;
            void* copy = allocate_sanitized(shift + region.bytes);
            region.start = reinterpret_cast<uintptr_t>(copy) + shift;
            __asan_poison_memory_region(copy, shift);
        } else {
            region.start = reinterpret_cast<uintptr_t>(arena.data) + offsets[i];
            region.records =
                reinterpret_cast<Record*>(global_record_memory.data) + first_records[i];
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        const Region& region = region_list[region_of[i]];
        *sorted[i]->argument =
            reinterpret_cast<void*>(region.start + (sorted[i]->data - region.original));
    }
    return true;
}

void copy_in() {
    for (const Region& region : region_list) {
        memcpy(reinterpret_cast<void*>(region.start), region.original, region.bytes);
    }
}

void copy_out() {
    for (const Region& region : region_list) {
        if (region.writable) {
            memcpy(region.original, reinterpret_cast<void*>(region.start), region.bytes);
        }
    }
}

bool make_shared_memory() {
    const Image& image = *launch->image;
    image_start = image.start;
    bss_start = image.bss_start;
    bss_bytes = image.bss_end - image.bss_start;
    variable_table.assign(bss_bytes + 1, 0);
    for (uint32_t i = 0; i < image.variable_count; i++) {
        const Variable& variable = image.variables[i];
        uint16_t* first = variable_table.data() + (variable.start - bss_start);
        std::fill(first, first + variable.bytes, static_cast<uint16_t>(i + 1));
    }
    variable_of_byte = variable_table.data();
    shared_granule = launch->shared_granule;
    size_t records = (bss_bytes >> shared_granule) + (launch->shared_bytes >> shared_granule) + 2;
    bool enough = shared_record_memory.reserve(records * sizeof(Record));
    shared_records = reinterpret_cast<Record*>(shared_record_memory.data);
    dynamic_records = shared_records + (bss_bytes >> shared_granule) + 1;
    if (launch->sanitized) {
        dynamic_start = reinterpret_cast<uintptr_t>(allocate_sanitized(launch->shared_bytes));
        dynamic_bytes = launch->shared_bytes;
    } else {
        enough = enough && dynamic_memory.reserve(launch->shared_bytes + 2 * GUARD);
        dynamic_start = reinterpret_cast<uintptr_t>(dynamic_memory.data) + GUARD;
        dynamic_bytes = launch->shared_bytes + GUARD;
    }
    if (!enough) say("has not enough memory for its shared memory");
    return enough;
}

bool make_stacks() {
    if (stacks.data) return true;
    if (!stacks.reserve(MAX_THREADS * (STACK + PAGE))) {
        say("has not enough memory for the threads' stacks");
        return false;
    }
    for (uint32_t i = 0; i < MAX_THREADS; i++) mprotect(stack_of(i) - PAGE, PAGE, PROT_NONE);
    return true;
}

}  // namespace

// How the lanes of a warp meet in a collective, and exchange words for mma and ldmatrix. The
// layouts of the words are those of the PTX ISA, sections "Matrix fragments for mma.m16n8k16" and
// "ldmatrix".
#pragma once

#include "blocks.h"
#include "judge.h"

namespace {

uint64_t meet(Kind kind, uint32_t mask, uint64_t value, int operand, int width, const char* file,
              int line) {
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

// The words that a lane gives to all other lanes of its warp. A warp has two tables of words and
// uses them in turn: a lane may write its next words while other lanes still read the previous
// ones, but cannot be further ahead.
struct Words {
    uint32_t word[6];
};
Words tables[MAX_THREADS / WARP][2][WARP];

const Words* exchange(Kind kind, const Words& mine, const char* file, int line) {
    uint32_t warp = current->thread / WARP;
    Words* table = tables[warp][current->exchanges++ % 2];
    table[current->thread % WARP] = mine;
    meet(kind, 0xffffffffu, 0, 0, WARP, file, line);
    return table;
}

float bits_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Returns 16-bit element `i` of a lane's words as a float.
float half_of(const uint32_t* words, int i, bool bf16) {
    uint32_t bits = words[i / 2] >> (i % 2 * 16) & 0xffffu;
    if (bf16) return bits_as_float(bits << 16);
    uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    return bits_as_float(sign | magnitude << 13) * 0x1p112f;
}

}  // namespace

"""Finds the shared variables of a built kernel: the static variables in its ELF symbol table."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Values of the System V ABI, chapters 4 and 5, where they are SHT_SYMTAB, SHT_NOBITS, STT_OBJECT
# and PT_LOAD.
SYMBOL_TABLE: Final = 2  # type of the section of symbols
NO_BITS: Final = 8  # type of sections without contents in the file, such as .bss
OBJECT: Final = 1  # type of symbols that name variables
LOADED: Final = 1  # type of segments that are loaded into memory
# Section headers, program headers and symbols, as they stand in a 64-bit little-endian file.
SECTION: Final = struct.Struct("<IIQQQQIIQQ")
SEGMENT: Final = struct.Struct("<IIQQQQQQ")
SYMBOL: Final = struct.Struct("<IBBHQQ")

GUARD_PREFIX: Final = "emulator_guard_"  # names shim.h's variables between shared variables


@dataclass(frozen=True, slots=True)
class Variable:
    """A `__shared__` variable."""

    name: str
    start: int  # address before loading
    size: int  # size in bytes


@dataclass(frozen=True, slots=True)
class Image:
    """The layout of a shared library, in addresses before loading."""

    size: int
    bss: tuple[int, int]  # first byte, and the one after the last
    variables: tuple[Variable, ...]
    symbols: dict[str, int]  # every named function and variable


def read_image(path: Path) -> Image:
    """Returns the layout of a 64-bit little-endian shared library that was not stripped.

    Raises ValueError for any other file.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    segments_at, sections_at = struct.unpack_from("<QQ", data, 32)
    segment_count, _, section_count = struct.unpack_from("<HHH", data, 56)
    segments = [
        SEGMENT.unpack_from(data, segments_at + i * SEGMENT.size) for i in range(segment_count)
    ]
    sections = [
        SECTION.unpack_from(data, sections_at + i * SECTION.size) for i in range(section_count)
    ]
    end = max(segment[3] + segment[6] for segment in segments if segment[0] == LOADED)
    bss = [(s[3], s[3] + s[5]) for s in sections if s[1] == NO_BITS]
    table = next(s for s in sections if s[1] == SYMBOL_TABLE)
    names_at = sections[table[6]][4]

    variables, symbols = [], {}
    for offset in range(table[4], table[4] + table[5], SYMBOL.size):
        name_at, info, _, section, value, size = SYMBOL.unpack_from(data, offset)
        name = data[names_at + name_at : data.index(b"\0", names_at + name_at)].decode()
        if not 0 < section < section_count:
            continue
        symbols[name] = value
        variable = unmangled(name)
        uninitialised = info & 15 == OBJECT and sections[section][1] == NO_BITS and size
        if uninitialised and not variable.startswith(GUARD_PREFIX):
            variables.append(Variable(variable, value, size))
    return Image(
        size=end,
        bss=(min(b[0] for b in bss), max(b[1] for b in bss)) if bss else (0, 0),
        variables=tuple(sorted(variables, key=lambda v: v.start)),
        symbols=symbols,
    )


def unmangled(symbol: str) -> str:
    """Returns a variable's own name: `tile` of `_ZZ9transposeE4tile_0` (Itanium C++ ABI, 5.1)."""
    for match in re.finditer(r"(?:E|_ZL|_Z)(\d+)(?=\D)", symbol):
        stop = match.end() + int(match[1])
        if re.fullmatch(r"(_\d+)?", symbol[stop:]) and stop <= len(symbol):
            return symbol[match.end() : stop]
    return symbol

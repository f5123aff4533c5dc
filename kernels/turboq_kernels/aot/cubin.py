"""What a compiled GPU kernel costs, read from the executable itself: registers, spills, main loop.

No CUDA tool is needed. XLA's serialized executable nests Riegeli files of Snappy chunks around the
ELF that the driver would load; that ELF says how many registers and bytes of stack each function
takes, and its instructions are 16 bytes each.
"""

from __future__ import annotations

import dataclasses
import struct

_RIEGELI = bytes.fromhex("83af70d10d884a3f")  # first 8 bytes of every Riegeli file
_BLOCK, _BLOCK_HEADER = 65536, 24
_ELF = b"\x7fELF"
_INSTRUCTION = 16
_BRA = 0x947  # low 12 bits of an instruction: the operation
_REGISTERS, _STACK = 0x2F, 0x11  # attributes of .nv.info: (symbol, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One GPU function: registers per thread, bytes of local memory, length of its largest loop."""

    registers: int
    spill_bytes: int
    instructions: int
    loop_instructions: int


def costs(executable: bytes) -> dict[str, Cost]:
    """Costs of all functions of a serialized executable, by name.

    Raises:
      ValueError: no ELF inside (another version of XLA may serialize otherwise).
    """
    out = {}
    for elf in elves(executable):
        out |= _functions(elf)
    return out


def elves(executable: bytes) -> list[bytes]:
    """The ELF images in a serialized executable."""
    data = executable
    for _ in range(4):
        start = data.find(_RIEGELI)
        if start < 0:
            break
        inner = _chunk_with_elf(_without_block_headers(data[start:]))
        if inner is None:
            break
        data = inner
    found, at = [], data.find(_ELF)
    while at >= 0:
        size = _elf_size(data, at)
        found.append(data[at : at + size])
        at = data.find(_ELF, at + size)
    if not found:
        raise ValueError(f"no ELF in an executable of {len(executable)} bytes")
    return found


def _without_block_headers(file: bytes) -> bytes:
    """A Riegeli file has a header at every 64 KiB, in the middle of whatever is there."""
    blocks = [file[i : i + _BLOCK] for i in range(0, len(file), _BLOCK)]
    return b"".join([blocks[0], *(block[_BLOCK_HEADER:] for block in blocks[1:])])


def _chunk_with_elf(file: bytes) -> bytes | None:
    """The Snappy stream that decodes completely and holds an ELF, wherever it starts."""
    for start in range(max(file.find(_ELF), 0)):
        decoded = _snappy(file, start)
        if decoded is not None and _ELF in decoded:
            return decoded
    return None


def _snappy(data: bytes, at: int) -> bytes | None:
    """Decodes one Snappy stream at `at`, or None if there is none."""
    size, shift = 0, 0
    while True:  # length: a varint
        if at >= len(data) or shift > 28:
            return None
        size |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            break
    if not 64 <= size <= 1 << 28:
        return None
    out = bytearray()
    while len(out) < size:
        if at + 5 > len(data) + 4:
            return None
        tag, at = data[at], at + 1
        kind, length = tag & 3, tag >> 2
        if kind == 0:  # literal bytes
            if length >= 60:
                count = length - 59
                length = int.from_bytes(data[at : at + count], "little")
                at += count
            out += data[at : at + length + 1]
            at += length + 1
            if at > len(data):
                return None
            continue
        if kind == 1:  # copy: 11 bits of distance
            if at >= len(data):
                return None
            length, distance, at = (length & 7) + 4, (tag >> 5) << 8 | data[at], at + 1
        else:
            width = 2 if kind == 2 else 4
            length, distance = length + 1, int.from_bytes(data[at : at + width], "little")
            at += width
        if not 0 < distance <= len(out):
            return None
        for _ in range(length):
            out.append(out[-distance])
    return bytes(out) if len(out) == size else None


def _elf_size(data: bytes, at: int) -> int:
    """Up to the end of the section table, which is last."""
    (table,) = struct.unpack_from("<Q", data, at + 0x28)
    entry, count = struct.unpack_from("<HH", data, at + 0x3A)
    return table + entry * count


def _sections(elf: bytes) -> list[tuple[str, bytes]]:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    count, names_at = struct.unpack_from("<HH", elf, 0x3C)
    rows = [struct.unpack_from("<IIQQQQIIQQ", elf, table + 64 * i) for i in range(count)]
    names = elf[rows[names_at][4] :]
    return [
        (names[row[0] :].split(b"\0", 1)[0].decode(), elf[row[4] : row[4] + row[5]]) for row in rows
    ]


def _functions(elf: bytes) -> dict[str, Cost]:
    sections = _sections(elf)
    by_name = dict(sections)
    registers = _attributes(by_name[".nv.info"], _REGISTERS)
    stacks = _attributes(by_name[".nv.info"], _STACK)
    symbols = by_name[".symtab"]
    out = {}
    for index in registers:
        name_at, *_ = struct.unpack_from("<I", symbols, 24 * index)
        name = by_name[".strtab"][name_at:].split(b"\0", 1)[0].decode()
        code = by_name[f".text.{name}"]
        out[name] = Cost(
            registers=registers[index], spill_bytes=stacks.get(index, 0),
            instructions=len(code) // _INSTRUCTION, loop_instructions=largest_loop(code),
        )  # fmt: skip
    return out


def _attributes(info: bytes, wanted: int) -> dict[int, int]:
    out, at = {}, 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # the others keep their value in the size
            if attribute == wanted:
                symbol, value = struct.unpack_from("<II", info, at)
                out[symbol] = value
            at += size
    return out


def largest_loop(code: bytes) -> int:
    """Instructions from the target of the farthest backward branch to that branch."""
    longest = 0
    for at in range(0, len(code), _INSTRUCTION):
        low, high = struct.unpack_from("<QQ", code, at)
        if low & 0xFFF != _BRA:
            continue
        # Distance in units of 4 bytes from the next instruction: bits 34..81, then 16..23.
        words = ((high << 64 | low) >> 34 & (1 << 48) - 1) << 8 | low >> 16 & 0xFF
        words -= 1 << 56 if words >> 55 else 0
        if words < -4:  # a branch to itself pads the end of the code
            longest = max(longest, -4 * words // _INSTRUCTION)
    return longest

"""What a compiled GPU kernel costs, read from the executable itself: registers, spills, main loop.

No CUDA tool is needed. XLA's serialized executable nests Riegeli files of Snappy chunks around the
ELF that the driver would load; that ELF says how many registers and bytes of stack each function
takes, and its instructions are 16 bytes each. How a function is launched lies before or after it:
the protocol-buffer fields that follow its name.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

_RIEGELI = bytes.fromhex("83af70d10d884a3f")  # first 8 bytes of every Riegeli file
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 65536, 24, 40
_ELF = b"\x7fELF"
_INSTRUCTION = 16
_BRA, _DEPBAR = 0x947, 0x91A  # low 12 bits of an instruction: the operation
_REGISTERS, _STACK = 0x2F, 0x11  # attributes of .nv.info: (symbol, value)


# A multiprocessor of sm_90: registers, in units of a warp's; bytes of shared memory, of which every
# program takes some for the system; programs; threads.
_FILE, _UNIT, _SHARED, _SYSTEM, _PROGRAMS, _THREADS = 65536, 256, 228 * 1024, 1024, 32, 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One GPU function: registers per thread, bytes of local memory, length of its largest loop.

    `loads_ahead` are the groups of asynchronous copies that may still be under way where the loop
    waits for the oldest: 0 is a single buffer. `threads` and `shared_bytes` are of one program.
    """

    registers: int
    spill_bytes: int
    instructions: int
    loop_instructions: int
    loads_ahead: int
    threads: int
    shared_bytes: int

    @property
    def residency(self) -> int:
        """Programs that a multiprocessor of sm_90 holds at a time."""
        warps = -(-self.threads // 32)
        registers = -(-32 * self.registers // _UNIT) * _UNIT * warps
        shared = self.shared_bytes + _SYSTEM
        return min(_PROGRAMS, _THREADS // (32 * warps), _FILE // registers, _SHARED // shared)

    def columns(self) -> dict[str, int]:
        """Those of `experiments/results/kernel_costs.json`."""
        return {
            "registers": self.registers,
            "spill_bytes": self.spill_bytes,
            "shared_bytes": self.shared_bytes,
            "residency": self.residency,
            "loads_ahead": self.loads_ahead,
        }


def costs(executable: bytes) -> dict[str, Cost]:
    """Costs of all functions of a serialized executable, by name.

    Raises:
      ValueError: no ELF inside (another version of XLA may serialize otherwise).
    """
    data = unwrapped(executable)
    out = {}
    for elf in elves(data):
        out |= _functions(elf, data)
    return out


def unwrapped(executable: bytes) -> bytes:
    """What Riegeli files within each other hold; the bytes themselves where there is none."""
    data = executable
    while (start := data.find(_RIEGELI)) >= 0:
        inner = b"".join(_chunks(_without_block_headers(data[start:])))
        if _ELF not in inner:
            break
        data = inner
    return data


def elves(data: bytes) -> list[bytes]:
    found, at = [], data.find(_ELF)
    while at >= 0:
        size = _elf_size(data, at)
        found.append(data[at : at + size])
        at = data.find(_ELF, at + size)
    if not found:
        raise ValueError(f"no ELF in an executable of {len(data)} bytes")
    return found


def launch(data: bytes, name: str) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a program of a function; (0, 0) where nothing says so.

    After a kernel's name (field 4) and arguments (5) come its grid (3), its threads (4) and, if it
    takes any, its bytes of shared memory (6).
    """
    tag = b'"' + bytes([len(name)]) + name.encode() + b"*"
    at, threads, shared = data.find(tag), 0, 0
    if at < 0:
        return 0, 0
    at += len(tag) - 1
    for wanted in (0x2A, 0x1A, 0x22, 0x30):
        if at >= len(data) or data[at] != wanted:
            break
        value, at = _varint(data, at + 1)
        if wanted == 0x30:
            shared = value
        elif wanted == 0x22:
            threads = _product(data[at : at + value])
        at += 0 if wanted == 0x30 else value
    return threads, shared


def _product(message: bytes) -> int:
    """Of the numbers of a message, which may lie within others."""
    product, at = 1, 0
    while at < len(message):
        kind = message[at] & 7
        value, at = _varint(message, at + 1)
        if kind == 2:
            product *= _product(message[at : at + value])
            at += value
        else:
            product *= value
    return product


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _without_block_headers(file: bytes) -> bytes:
    """A Riegeli file has a header at every 64 KiB, in the middle of whatever is there."""
    blocks = [file[i : i + _BLOCK] for i in range(0, len(file), _BLOCK)]
    return b"".join([blocks[0], *(block[_BLOCK_HEADER:] for block in blocks[1:])])


def _chunks(file: bytes) -> Iterator[bytes]:
    """Records of all chunks of records, which are compressed with Snappy.

    A chunk has a header of 40 bytes: its size at 8, its type at 24. Records are behind their sizes.
    """
    at = _BLOCK_HEADER
    while at + _CHUNK_HEADER <= len(file):
        size, kind = struct.unpack_from("<Q8xB", file, at + 8)
        chunk = file[at + _CHUNK_HEADER : at + _CHUNK_HEADER + size]
        if len(chunk) < size:  # behind the last
            break
        if kind == ord("r") and chunk[:1] == b"s":
            skipped, place = _varint(chunk, 1)
            _, place = _varint(chunk, place + skipped)
            yield _snappy(chunk, place) or b""
        at += _CHUNK_HEADER + size


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
    """Up to the end of the section table or of the program headers, whichever is last."""
    headers, table = struct.unpack_from("<QQ", data, at + 0x20)
    header, count, entry, sections = struct.unpack_from("<HHHH", data, at + 0x36)
    return max(table + entry * sections, headers + header * count)


def _sections(elf: bytes) -> list[tuple[str, bytes]]:
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    count, names_at = struct.unpack_from("<HH", elf, 0x3C)
    rows = [struct.unpack_from("<IIQQQQIIQQ", elf, table + 64 * i) for i in range(count)]
    names = elf[rows[names_at][4] :]
    return [
        (names[row[0] :].split(b"\0", 1)[0].decode(), elf[row[4] : row[4] + row[5]]) for row in rows
    ]


def _functions(elf: bytes, data: bytes) -> dict[str, Cost]:
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
        start, end = largest_loop(code)
        threads, shared = launch(data, name)
        out[name] = Cost(
            registers=registers[index], spill_bytes=stacks.get(index, 0),
            instructions=len(code) // _INSTRUCTION, loop_instructions=end - start,
            loads_ahead=loads_ahead(code, start, end), threads=threads, shared_bytes=shared,
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


def largest_loop(code: bytes) -> tuple[int, int]:
    """Instructions from the target of the farthest backward branch to behind it: [start, end).

    From sm_90 on the lowest 8 bits of a distance lie apart from the others; read so, an older
    target's branches leave the code.
    """
    found = _largest_loop(code, 8)
    return found if found[0] >= 0 else _largest_loop(code, 0)


def _largest_loop(code: bytes, apart: int) -> tuple[int, int]:
    longest = (0, 0)
    for at in range(0, len(code), _INSTRUCTION):
        low, high = struct.unpack_from("<QQ", code, at)
        if low & 0xFFF != _BRA:
            continue
        # Distance in units of 4 bytes from the next instruction: bits 34..81, then 16..23.
        words = (high << 64 | low) >> 34 & (1 << 48) - 1
        words = words << apart | low >> 16 & (1 << apart) - 1
        words -= 1 << 48 + apart if words >> 47 + apart else 0
        length, end = -4 * words // _INSTRUCTION, at // _INSTRUCTION + 1
        # A branch to itself pads the end of the code.
        if words < -4 and length > longest[1] - longest[0]:
            longest = (end - length, end)
    return longest


def loads_ahead(code: bytes, start: int, end: int) -> int:
    """The least number of groups that a wait for copies leaves under way; 0 without a wait."""
    waits = []
    for at in range(start, end):
        (low,) = struct.unpack_from("<Q", code, at * _INSTRUCTION)
        if low & 0xFFF == _DEPBAR:
            waits.append(low >> 38 & 63)
    return min(waits, default=0)

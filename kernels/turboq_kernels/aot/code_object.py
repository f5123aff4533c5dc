"""What a compiled AMD kernel costs: registers, spills and its largest loop, read with LLVM's tools.

XLA's executable has an ELF for every kernel (`cubin.elves`), with AMD's notes in it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import shutil
import subprocess
import tempfile

from turboq_kernels.aot import cubin

TOOLS = ("llvm-objdump-19", "llvm-readelf-19")  # the first that know gfx1201
_INSTRUCTION = re.compile(r"^\s+(\S+).*// ([0-9A-F]+): .*?(?:<\w+\+0x([0-9a-f]+)>)?$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One kernel: of a thread registers, spilled ones, bytes of scratch; of a program the others.

    `vgprs` are those of the matrix unit (`agprs`) too. `unread_words` of the loop are those that
    the disassembler does not know: instructions are too many by at most half of them.
    """

    vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    shared_bytes: int
    threads: int
    loop_instructions: int
    unread_words: int


def missing() -> str | None:
    """Which tool is not here, or None."""
    lost = [tool for tool in (*TOOLS, "gcc", "nm", "readelf") if shutil.which(tool) is None]
    if not lost:
        return None
    return f"{', '.join(lost)} not found: apt-get install llvm-19 gcc binutils"


@functools.cache
def version() -> str:
    """Of the disassembler."""
    found = re.search(r"version ([\d.]+)", _said(TOOLS[0], "--version"))
    return f"llvm-objdump {found[1] if found else 'unknown'}"


def costs(executable: bytes, kernel: str) -> Cost:
    """Of a kernel by its name.

    Raises:
      ValueError: there is none, or its code cannot be read.
    """
    data = cubin.unwrapped(executable)
    for elf in cubin.elves(data):
        if kernel.encode() + b".kd" in elf:
            return _cost(elf, *cubin.launch(data, kernel))
    raise ValueError(f"no {kernel} in an executable of {len(executable)} bytes")


def _cost(elf: bytes, threads: int, shared: int) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "kernel.elf"
        file.write_bytes(elf)
        notes = _said(TOOLS[1], "--notes", str(file))
        code = _said(TOOLS[0], "-d", str(file))
    said = dict(re.findall(r"\.(\w+): +(\d+)", notes))
    loop = largest_loop(code)
    return Cost(
        vgprs=int(said["vgpr_count"]), sgprs=int(said["sgpr_count"]),
        vgpr_spills=int(said["vgpr_spill_count"]), sgpr_spills=int(said["sgpr_spill_count"]),
        scratch_bytes=int(said["private_segment_fixed_size"]), shared_bytes=shared,
        threads=threads or int(said["max_flat_workgroup_size"]), loop_instructions=len(loop),
        unread_words=loop.count(".long"),
    )  # fmt: skip


def largest_loop(code: str) -> list[str]:
    """Names of the instructions from the target of the farthest backward branch to the branch.

    Raises:
      ValueError: no instruction can be read.
    """
    found = [m for line in code.splitlines() if (m := _INSTRUCTION.match(line.rstrip()))]
    if not found:
        raise ValueError(f"no instruction in {len(code)} characters of disassembly")
    at = {int(m[2], 16): i for i, m in enumerate(found)}
    base, longest = min(at), (0, 0)
    for end, m in enumerate(found, 1):
        start = at.get(base + int(m[3], 16)) if m[3] and "branch" in m[1] else None
        if start is not None and end - start > longest[1] - longest[0]:
            longest = (start, end)
    return [m[1] for m in found[slice(*longest)]]


def _said(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

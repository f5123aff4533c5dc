"""The GPU that programs are traced for: one that is here, or one that a compiler is told about."""

from __future__ import annotations

import dataclasses
import re

import jax

H100_PROCESSORS = 132  # taken where nothing is known: what the tuned numbers are of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Whether it takes NVIDIA's instructions, its streaming multiprocessors, its sm_ number.

    `capability` is (9, 0) for sm_90, None where nothing says.
    """

    ptx: bool
    processors: int
    capability: tuple[int, int] | None = None


def target() -> Target:
    """Of the abstract device of the current mesh if there is one, else of the default backend's.

    AMD's compiler knows none of NVIDIA's instructions: its devices are named gfx... ahead of time,
    and their runtime says ROCm. NVIDIA's may say their sm_ number in their name then.
    """
    told = jax.sharding.get_abstract_mesh().abstract_device
    if told is not None:
        amd = told.device_kind.lower().startswith(("gfx", "amd"))
        count = told.num_cores or H100_PROCESSORS
        named = re.search(r"\bsm_(\d+)(\d)\b", told.device_kind)
        sm = (int(named[1]), int(named[2])) if named else None
        return Target(ptx=not amd, processors=count, capability=sm)
    device = jax.devices()[0]
    amd = "rocm" in device.client.platform_version.lower()
    gpu = device.platform == "gpu"
    count = getattr(device, "core_count", None) if gpu else None
    number = str(getattr(device, "compute_capability", "")) if gpu and not amd else ""
    major, _, minor = number.partition(".")
    known = (int(major), int(minor or 0)) if major.isdigit() else None
    return Target(ptx=not amd, processors=count or H100_PROCESSORS, capability=known)

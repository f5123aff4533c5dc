"""The chip that programs are traced for: one that is here, or one that a compiler is told about."""

from __future__ import annotations

import dataclasses
import re

import jax
from jax.experimental.pallas import tpu as pltpu

OLDEST = (8, 0)  # of NVIDIA's GPUs that have what kernels are made of: int8 and bfloat16 products
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


def too_old() -> str | None:
    """Why no GPU kernel can run on what is traced for, or None."""
    seen = target().capability
    if seen is None or seen >= OLDEST:
        return None
    return f"this GPU is sm_{seen[0]}{seen[1]}, kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"


def tpu_generation() -> int | None:
    """Of the TPU that is traced for; None without one (interpret mode)."""
    try:
        return pltpu.get_tpu_info().generation
    except ValueError:
        return None

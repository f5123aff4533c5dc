"""All checks on one adapter."""

from __future__ import annotations

from turboq.conformance import checks_edges
from turboq.conformance.adapters import Adapter
from turboq.conformance.checks_bytes import check_bytes
from turboq.conformance.checks_error import (
    check_bias,
    check_distortion,
    check_shannon,
    check_variance,
)
from turboq.conformance.checks_table import check_codebook
from turboq.conformance.sample import Sample
from turboq.conformance.verdict import FAIL, Verdict

VECTORS = 4096

CHECKS = {
    "codebook": check_codebook,
    "distortion": check_distortion,
    "bias": check_bias,
    "variance": check_variance,
    "shannon": check_shannon,
    "bytes": check_bytes,
    "zero": checks_edges.check_zero,
    "one_hot": checks_edges.check_one_hot,
    "mean": checks_edges.check_mean,
    "walsh": checks_edges.check_walsh,
    "scale": checks_edges.check_scale,
    "nan": checks_edges.check_nan,
}


def check(adapter: Adapter, *, vectors: int = VECTORS) -> list[Verdict]:
    """One verdict per check, in the order of `CHECKS`; an adapter that raises has failed it.

    `vectors` is a multiple of 512; the default bounds errors to about 0.5 % (one standard error).

    Raises:
      ValueError: vectors not a positive multiple of 512.
    """
    if vectors <= 0 or vectors % 512:
        raise ValueError(f"{vectors=} must be a positive multiple of 512")
    sample = Sample(adapter, vectors)
    return [_verdict(name, sample) for name in CHECKS]


def _verdict(name: str, sample: Sample) -> Verdict:
    try:
        return CHECKS[name](sample)
    except Exception as error:  # anyone's code: whatever it raises is its verdict, in one line
        text = str(error).split("\n")[0]
        return Verdict(check=name, status=FAIL, why=f"raised {type(error).__name__}: {text}")

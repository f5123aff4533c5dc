"""Hugging Face transformers, executed: a cache that stores the plan's own codes, in plain PyTorch.

The export is two modules and the reader of plans (`turboq.export.transformers_cache`, `_codecs`,
`reader_example`), which read the plan itself: every head in its own codec and bits, keys in
any form, exact sinks and recent tokens.
"""

from __future__ import annotations

import importlib.resources

from turboq.codecs import PerHead, TurboQuantMSE
from turboq.codecs.exact import Exact
from turboq.codecs.transform import Transform
from turboq.errors import TurboqError
from turboq.export.base import (
    Entry,
    Exporter,
    Formats,
    Held,
    Options,
    Projection,
    Tensors,
    entries,
    first_dims,
)
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints, match
from turboq.plan.geometry import ROPE_FORMS

FILES = {
    "turboq_cache.py": "transformers_cache.py",
    "turboq_codecs.py": "transformers_codecs.py",
    "read_plan.py": "reader_example.py",
}
READS = (
    match("exact"),
    match("turboquant_mse"),
    match("per_head"),
    match("transform", quantizer=("scalar", "window")),
)
CANDIDATES = (2, 3, 4)  # bits of the data-free codec that `turboq plan --engine` is offered


class Transformers(Exporter):
    """`past_key_values=turboq_cache.make_cache(model)`."""

    name = "transformers"
    title = "Hugging Face transformers, the plan's own codes in PyTorch"
    versions = ">=5.23,<6"
    joint = True
    checked = (
        "5.23.0 and 5.24.0, torch 2.13.0, CPU, 2026-11-29: run, see "
        "tests/golden/export/transformers.json"
    )
    ran = True

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        """What needs no statistics; fitted codecs are named with --candidates."""
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        out: Formats = {
            f"turboquant_mse {b}": (
                TurboQuantMSE(dim=k, bits=b, rotation="haar"),
                TurboQuantMSE(dim=v, bits=b, rotation="haar"),
            )
            for b in CANDIDATES
        }
        return out | {"exact": (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype))}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        return (Constraints(k=READS, v=READS, k_rope=ROPE_FORMS, joins=True),)

    def policy(self, wanted):
        return wanted

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        for layer in plan.model.layers:
            if not layer.owns_cache:
                raise TurboqError(
                    f"{self.name} cannot hold this plan: layer {layer.index} has no cache of its"
                    " own, and a cache list for such models is not known here"
                )
        found = entries(plan, arrays)
        for entry in found:
            if not any(m(entry.codec) for m in READS):
                raise _refused(entry)
        folder = importlib.resources.files("turboq.export")
        return Projection(
            held={
                e.place: Held(format=e.codec.name, codec=e.codec, arrays=e.arrays, rope=e.rope)
                for e in found
            },
            files={name: folder.joinpath(source).read_bytes() for name, source in FILES.items()},
            flags=("model.generate(**inputs, past_key_values=turboq_cache.make_cache(model))",),
            notes=(
                "The modules need torch and transformers >= 5.23, not turboq.",
                "Prompts are attended to as they are stored, as in turboq evaluate.",
                "The bits of a layer are padded to whole bytes per token.",
            ),
            policy=plan.tokens,
            padding={i: -_bits(plan, i) % 8 / 8 for i in (layer.index for layer in plan.layers)},
        )


def _bits(plan: Plan, index: int) -> int:
    return sum(c.bits_per_vector for side in ("k", "v") for c in plan.codecs(index, side))


def _refused(entry: Entry) -> TurboqError:
    codec = entry.codec
    what = f" with quantizer={codec.quantizer!r}" if isinstance(codec, Transform) else ""
    return TurboqError(
        f"transformers cannot read {entry}{what}: its modules read exact, {TurboQuantMSE.name}, "
        f"{PerHead.name}, and {Transform.name} with scalar or window codes (turboq plan "
        "--candidates=window, or --codec=per_head)"
    )

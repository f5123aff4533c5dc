"""mlx-lm: a generated Python module that builds the list of prompt caches, one per layer.

A layer is `QuantizedKVCache(group_size, bits)`, K and V alike, or `KVCache` in the model's type.
MLX's affine integers place their grid so that zero or the larger end is on it, which no codec here
does, so quantized layers are approximations.
"""

from __future__ import annotations

from turboq.codecs import checks
from turboq.codecs.exact import Exact
from turboq.errors import TurboqError
from turboq.export import choose
from turboq.export.base import (
    Entry,
    Exporter,
    Formats,
    Held,
    Options,
    Place,
    Projection,
    Tensors,
    entries,
    exact_held,
    first_dims,
    model_dtype,
    schemes,
)
from turboq.plan import ModelGeometry, Plan
from turboq.plan.constraints import Constraints
from turboq.plan.document import fingerprint

FILE = "turboq_cache.py"
GROUPS = (32, 64, 128)
WINDOW_NOTE = "rotating caches of mlx-lm cannot be quantized"

_HEAD = '''"""Prompt cache of {model}, written by turboq from plan {hash}.

    generate(model, tokenizer, prompt, prompt_cache=make_prompt_cache())

Needs mlx-lm >= 0.32.
"""

try:
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache
except ImportError as error:
    raise ImportError(f"{{error}}: pip install mlx-lm") from None


def make_prompt_cache():
    """One cache per decoder layer."""
    return [
'''


def bits_of(dim: int) -> tuple[int, ...]:
    """Bits that work at a head dim: packing 3 and 6 bits fails at others, 5 always."""
    out = [2, 4, 8] + ([3] if dim in (64, 96, 128) else []) + ([6] if dim == 64 else [])
    return tuple(sorted(out))


def mlx_held(entry: Entry, bits: int, group: int, dtype: str) -> Held:
    """One head with a scale and a bias per group of channels, in the model's type."""
    stored = bits * entry.dim + entry.dim // group * 2 * checks.DTYPE_BITS[dtype]
    return Held(format=f"mlx {bits} bits, {group}", bits=stored, codes=bits * entry.dim)


class MlxLm(Exporter):
    """`prompt_cache=turboq_cache.make_prompt_cache()`."""

    name = "mlx-lm"
    title = "mlx-lm"
    versions = ">=0.32,<0.33"
    checked = "0.32.2 on Linux, 2026-11-22: caches built and filled, see tests/golden/export"
    ran = True

    def formats(self, model: ModelGeometry, options: Options) -> Formats:
        k, v = first_dims(model).values()
        dtype = options.dtype or "bfloat16"
        return {"KVCache": (Exact(dim=k, dtype=dtype), Exact(dim=v, dtype=dtype))}

    def constraints(
        self, model: ModelGeometry, options: Options | None = None
    ) -> tuple[Constraints, ...]:
        """Only the model's own type is exact."""
        allowed = schemes(self.formats(model, options or Options()))
        return (Constraints(granularity="per_layer", schemes=allowed),)

    def project(self, plan: Plan, arrays: Tensors, options: Options) -> Projection:
        for layer in plan.model.layers:
            if not layer.owns_cache:
                raise TurboqError(
                    f"{self.name} cannot hold this plan: layer {layer.index} has no cache of its"
                    " own, and a cache list for such models is not known here"
                )
        found = entries(plan, arrays)
        dtype = model_dtype(plan, options)
        held: dict[Place, Held] = {}
        lines = []
        for layer in plan.layers:
            members = [e for e in found if e.place[0] == layer.index]
            source, kept = _layer(members, dtype, options)
            held |= kept
            lines.append(f"        {source},  # {layer.index}\n")
        head = _HEAD.format(model=plan.model.name, hash=fingerprint(plan))
        return Projection(
            held=held,
            files={FILE: (head + "".join(lines) + "    ]\n").encode()},
            flags=(
                "generate(model, tokenizer, prompt, prompt_cache=turboq_cache.make_prompt_cache())",
            ),
            notes=("pip install mlx-lm has what the module imports.",),
        )


def _layer(members: list[Entry], dtype: str, options: Options) -> tuple[str, dict[Place, Held]]:
    """(source of its cache, what becomes of the heads)."""
    window = members[0].layer.window
    if window is not None:
        kept = {e.place: exact_held(e, dtype, reduced=False, note=WINDOW_NOTE) for e in members}
        return f"RotatingKVCache(max_size={window})", kept
    dims = {e.dim for e in members}
    tried = [("KVCache()", {e.place: exact_held(e, dtype) for e in members})]
    for group in (g for g in GROUPS if all(dim % g == 0 for dim in dims)):
        for bits in sorted(set.intersection(*(set(bits_of(dim)) for dim in dims))):
            source = f"QuantizedKVCache(group_size={group}, bits={bits})"
            tried.append((source, {e.place: mlx_held(e, bits, group, dtype) for e in members}))
    if len(tried) == 1:
        note = f"no group of {GROUPS} divides head dim {max(dims)}"
        tried = [(s, {e.place: exact_held(e, dtype, reduced=False, note=note) for e in members})
                 for s, _ in tried]  # fmt: skip
    total = choose.stack([choose.cost_of(members, held) for _, held in tried])
    return tried[choose.pick(total, choose.planned_bits(members), options.prefer)]

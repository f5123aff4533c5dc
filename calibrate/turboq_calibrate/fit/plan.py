"""From a model and its statistics to plans: geometry, provenance, fitted arrays."""

from __future__ import annotations

import hashlib
import importlib.metadata

import numpy as np

from turboq import plan as plans
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec
from turboq.errors import TurboqError
from turboq.plan import LayerGeometry, ModelGeometry, Plan, Provenance, TextSource
from turboq.plan.geometry import RopeForm
from turboq.plan.types import SIDES
from turboq.version import __version__
from turboq_calibrate.fit.shared import collect_shared
from turboq_calibrate.models import LayerSpec, Model, ModelSpec
from turboq_calibrate.observe.statistics_files import MANIFEST, Statistics

Arrays = dict[str, np.ndarray]


def model_geometry(model: Model) -> ModelGeometry:
    """What a plan must know of a loaded model. Hashes the weight files (once per `Model`)."""
    return spec_geometry(model.spec, model.fingerprint)


def spec_geometry(spec: ModelSpec, fingerprint: str) -> ModelGeometry:
    """The same from its parts."""
    return ModelGeometry(
        fingerprint=fingerprint,
        family=spec.family,
        name=spec.name,
        layers=tuple(_layer(i, spec.path(i), layer) for i, layer in enumerate(spec.layers)),
    )


def _layer(index: int, path: str, spec: LayerSpec) -> LayerGeometry:
    # Both file formats are loaded with half-rotation pairs (GGUF rows are put back in that order).
    rope = spec.rope
    return LayerGeometry(
        index=index,
        path=path,
        kv_heads=spec.kv_heads,
        q_heads=spec.heads,
        k_dim=spec.head_dim,
        v_dim=spec.v_head_dim,
        window=spec.window,
        rope_layout="none" if rope is None else rope.layout,
        rope_dim=None if rope is None or rope.dim == spec.head_dim else rope.dim,
        borrows_cache_of=spec.borrows_cache_of,
        rope=rope,
    )


def provenance(statistics: Statistics | None = None) -> Provenance:
    """Where a plan's arrays come from: hashes and counts of the statistics, package versions."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
    versions["turboq"] = __version__
    if statistics is None:
        return Provenance(versions=versions)
    inputs = statistics.manifest.inputs
    text, recipe = inputs["text"], inputs["recipe"]
    manifest = (statistics.folder / MANIFEST).read_bytes()
    return Provenance(
        texts=tuple(TextSource(name=t["name"], sha256=t["sha256"]) for t in text["texts"]),
        tokens=text["windows"] * text["window"],
        max_position=text["window"],
        seed=recipe["seed"],
        statistics="sha256:" + hashlib.sha256(manifest).hexdigest(),
        versions=versions,
        recipe=recipe,
    )


def make_plan(
    geometry: ModelGeometry,
    *,
    k: Codec,
    v: Codec,
    policy: TokenPolicy | None = None,
    statistics: Statistics | None = None,
    k_rope: RopeForm = "after",
) -> tuple[Plan, Arrays]:
    """One codec for all keys and one for all values, fitted per head where the codec is learned.

    Args:
      k, v: templates; a layer of another head dim takes them at its own.
      statistics: of the same model; needed by calibrated codecs only.
      k_rope: keys are stored "after" or "before" their rotary embedding, and fitted so.

    Raises:
      TurboqError: statistics are missing, of another model, or do not serve the codec.
    """
    if statistics is not None:
        check_statistics(statistics, geometry)
    elif k.calibrated or v.calibrated:
        name = (k if k.calibrated else v).name
        raise TurboqError(f"codec {name} is fitted to data: give statistics (`turboq calibrate`)")
    plan = plans.uniform_plan(
        geometry, k=k, v=v, k_rope=k_rope, policy=policy, provenance=provenance(statistics)
    )
    stored = {(x.index, side): x.side(side).rope for x in plan.layers for side in SIDES}

    def fit(index: int, side: str, codec: Codec) -> Arrays:
        assert statistics is not None  # checked above: the codec is calibrated
        try:
            return codec.fit(statistics.layers[index].observed(side, rope=stored[index, side]))
        except TurboqError as error:
            raise TurboqError(f"layer {index}, {side}: {error}") from error

    return plan, collect_shared(plan, fit)


def check_statistics(statistics: Statistics, geometry: ModelGeometry) -> None:
    """Raises TurboqError unless the statistics were captured on that model."""
    theirs = statistics.manifest.inputs["model"]
    if theirs["fingerprint"] != geometry.fingerprint:
        raise TurboqError(
            f"statistics in {statistics.folder} are of another model ({theirs['name']}, "
            f"fingerprint {theirs['fingerprint'][:12]}), not of {geometry.name} "
            f"({geometry.fingerprint[:12]})"
        )

"""From a model and its statistics to plans: geometry, provenance, fitted arrays."""

# pyright: strict

from __future__ import annotations

import hashlib
import importlib.metadata

import numpy as np

from turboq import plan as plans
from turboq.cache.layer import TokenPolicy
from turboq.codecs import Codec
from turboq.errors import TurboqError
from turboq.plan import ModelGeometry, Plan, Provenance, TextSource
from turboq.plan.build import Template, at_dim
from turboq.plan.geometry import RopeForm
from turboq.plan.types import SIDES
from turboq.version import __version__
from turboq_calibrate.fit.shared import collect_shared
from turboq_calibrate.observe.statistics_files import MANIFEST, Statistics

Arrays = dict[str, np.ndarray]


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
    k: Template,
    v: Template,
    policy: TokenPolicy | None = None,
    statistics: Statistics | None = None,
    k_rope: RopeForm = "after",
) -> tuple[Plan, Arrays]:
    """One codec for all keys and one for all values, fitted per head where the codec is learned.

    Args:
      k, v: templates; a layer of another head dim takes them at its own (`turboq.plan.at_dim`).
      statistics: of the same model; needed by calibrated codecs only.
      k_rope: keys are stored "after" or "before" their rotary embedding, and fitted so.

    Returns:
      The plan, and its fitted arrays [K, ...] by name.

    Raises:
      TurboqError: statistics are missing, of another model, or do not serve the codec.

    Examples:
      >>> import turboq
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> statistics = tc.load_statistics("run")  # what `calibrate` wrote
      >>> codec = turboq.PerHead(dim=model.spec.layers[0].head_dim, bits=3)
      >>> plan, arrays = tc.make_plan(
      ...     tc.model_geometry(model), k=codec, v=codec, statistics=statistics
      ... )
      >>> plan.layers[0].k.codec == codec, "layers.0.k.mean" in arrays
      (True, True)
    """
    if statistics is None:
        first = geometry.cache_layers[0]
        for codec in (at_dim(k, first.k_dim), at_dim(v, first.v_dim)):
            if codec.calibrated:
                raise TurboqError(
                    f"codec {codec.name} is fitted to data: give --statistics (a folder of "
                    "`turboq calibrate`)"
                )
    plan = plans.uniform_plan(
        geometry, k=k, v=v, k_rope=k_rope, policy=policy, provenance=provenance(statistics)
    )
    return plan, {} if statistics is None else fit_plan(plan, statistics)


def fit_plan(plan: Plan, statistics: Statistics) -> Arrays:
    """Arrays of all learned codecs of a plan, each head's fitted where its keys are stored.

    Raises:
      TurboqError: statistics of another model, or without what a codec needs (names the layer);
        keys before RoPE, of captured ones.

    Examples:
      >>> import turboq
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> statistics = tc.load_statistics("run")  # what `calibrate` wrote
      >>> codec = turboq.PerHead(dim=model.spec.layers[0].head_dim, bits=2)
      >>> plan = turboq.uniform_plan(tc.model_geometry(model), k=codec, v=codec, k_rope="before")
      >>> arrays = tc.fit_plan(plan, statistics)
      >>> arrays["layers.0.k.codebook"].shape[1]  # of every KV head
      4
    """
    check_statistics(statistics, plan.model)
    stored: dict[tuple[int, str], RopeForm] = {
        (x.index, side): x.side(side).rope for x in plan.layers for side in SIDES
    }
    for form in sorted(set(stored.values()) - {"after"}):
        statistics.geometry.key_form(form)
    joined = {x.index: x.joint for x in plan.layers if x.joint is not None}
    if joined:
        raise TurboqError(
            f"layer {min(joined)} joins {joined[min(joined)]} heads: such plans are chosen within "
            "a budget (turboq plan --budget), which fits their units"
        )

    def fit(index: int, side: str, codec: Codec) -> Arrays:
        try:
            return codec.fit(statistics.layers[index].observed(side, rope=stored[index, side]))
        except TurboqError as error:
            raise TurboqError(f"layer {index}, {side}: {error}") from error

    return collect_shared(plan, fit)


def check_dims(geometry: ModelGeometry) -> None:
    """Raises TurboqError unless codecs can store the heads of every layer."""
    for layer in geometry.cache_layers:
        for dim in (layer.k_dim, layer.v_dim):
            if dim % 8:
                raise TurboqError(
                    f"{geometry.name}: heads of layer {layer.index} have {dim} channels, and "
                    "codecs store multiples of 8: there is no plan of such a model (`turboq "
                    "memory` counts its cache)"
                )


def check_statistics(statistics: Statistics, geometry: ModelGeometry) -> None:
    """Raises TurboqError unless the statistics are of that model, and it can have a plan."""
    theirs = statistics.manifest.inputs["model"]
    if theirs["fingerprint"] != geometry.fingerprint:
        raise TurboqError(
            f"statistics in {statistics.folder} are of another model ({theirs['name']}, "
            f"fingerprint {theirs['fingerprint'][:12]}), not of {geometry.name} "
            f"({geometry.fingerprint[:12]}): name theirs with --model=..."
        )
    check_dims(geometry)

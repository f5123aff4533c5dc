"""What makes values expensive: a few tokens, or all of them?

    python experiments/value_costs.py --statistics=runs/mine

From calibration alone, no text is measured. An error e of a stored vector costs (g . e)^2 / 2 nats
in expectation, g its gradient. Of keys before RoPE and of values of every KV head:

    spread      trace of 1/2 E[g g'] times the covariance: nats per token if only means were stored
    gain        arithmetic over geometric mean of that product's eigenvalues, in dB: what a basis
                and bits by coordinate can win over equal ones (water-filling)
    lost        sum of (g . e)^2 / 2 under the learned plan of --bits, heads apart
    top         share of |g|^2 |e|^2 that the 1 and the 10 % of tokens have which have most

Expected, written down before the first run: values have the smaller gain, as no rotary embedding
and no sink lines up their channels, and a few tokens have much of what is lost of both.

Writes value_costs.json and prints a table over all heads, and layers by what values lose there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from program import main, statistics_of, write_json

from turboq.cache.layer import TokenPolicy
from turboq.codecs.observed import Observed
from turboq.files import make_folder
from turboq.plan.geometry import RopeForm
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Wanted, plan_within
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf file, or 'embedded'.")
STATISTICS = flags.DEFINE_string("statistics", "", "Folder of `turboq calibrate`; none: made.")
BITS = flags.DEFINE_float("bits", 2.25, "Bits per channel of the learned plan.", lower_bound=1.0)
OUT = flags.DEFINE_string("out", "runs/value_costs", "Folder for the result.")

SHARES = (0.01, 0.1)
SIDES: tuple[tuple[str, RopeForm], ...] = (("k", "before"), ("v", "after"))


def spectrum(seen: Observed) -> tuple[np.ndarray, np.ndarray]:
    """Spread and gain of every head, from the eigenvalues of metric times covariance."""
    half = np.linalg.cholesky(seen.covariance + 1e-9 * np.eye(seen.dim) * _mean(seen.covariance))
    values = np.linalg.eigvalsh(np.swapaxes(half, 1, 2) @ seen.metric @ half)
    values = np.maximum(values, values.max(axis=1, keepdims=True) * 1e-9)
    gain = 10 * np.log10(values.mean(axis=1) / np.exp(np.log(values).mean(axis=1)))
    return values.sum(axis=1), gain


def _mean(matrices: np.ndarray) -> np.ndarray:
    return (np.trace(matrices, axis1=1, axis2=2) / matrices.shape[1])[:, None, None]


def tokens(seen: Observed, group: Any, side: str) -> tuple[np.ndarray, np.ndarray]:
    """What each sampled token costs, and |g|^2 |e|^2, of the heads of a group [K, N]."""
    codec, arrays = (group.k, group.k_arrays) if side == "k" else (group.v, group.v_arrays)
    heads = list(group.heads)
    x = seen.x[heads].astype(np.float32)
    stored = jax.vmap(lambda a, v: codec.decode(a, codec.encode(a, v)))(arrays, x)
    error = np.asarray(stored, np.float64) - x
    assert seen.g is not None
    g = seen.g[heads].astype(np.float64)
    return 0.5 * np.sum(g * error, axis=2) ** 2, np.sum(g**2, axis=2) * np.sum(error**2, axis=2)


def run(out: Path) -> None:
    model = load_model(MODEL.value)
    geometry = model_geometry(model)
    statistics = statistics_of(model, STATISTICS.value, make_folder(out) / "observed")
    wanted = Wanted(
        budget=Budget.parse(f"{BITS.value}bpc"), policy=TokenPolicy(sinks=4), joint=0,
        k_rope="before",
    )  # fmt: skip
    found = plan_within(statistics, geometry, wanted)
    indices = [layer.index for layer in found.plan.layers]
    layers = dict(zip(indices, found.plan.kv_layers(found.arrays), strict=True))
    rows: list[dict[str, Any]] = []
    for index, layer in layers.items():
        for side, rope in SIDES:
            seen = statistics[index].observed(side, rope=rope)
            spread, gain = spectrum(seen)
            cost, weight = (
                np.concatenate(parts)
                for parts in zip(*(tokens(seen, g, side) for g in layer.groups), strict=True)
            )
            most = -np.sort(-weight, axis=1)
            counts = [max(1, round(share * most.shape[1])) for share in SHARES]
            rows.append({
                "layer": index, "side": side, "spread": spread.tolist(), "gain_db": gain.tolist(),
                "lost": cost.mean(axis=1).tolist(),
                "top": [(most[:, :n].sum(axis=1) / most.sum(axis=1)).tolist() for n in counts],
            })  # fmt: skip
    bits = {side: _bits(found.plan, side) for side in "kv"}
    result = {"bits": bits, "tokens": statistics.manifest.inputs["text"], "shares": SHARES,
              "rows": rows}  # fmt: skip
    write_json(out / "value_costs.json", result)
    print(f"{'side':<5} {'bits':>5} {'spread':>8} {'gain dB':>8} {'lost':>8}  top 1 %  top 10 %")
    for side in "kv":
        own = [row for row in rows if row["side"] == side]
        spread, lost = (np.concatenate([row[k] for row in own]) for k in ("spread", "lost"))
        gain = np.concatenate([row["gain_db"] for row in own])
        top = [np.concatenate([row["top"][i] for row in own]) for i in (0, 1)]
        shares = [np.sum(t * lost) / lost.sum() for t in top]
        print(
            f"{side:<5} {bits[side]:5.2f} {spread.sum():8.3f} {gain.mean():8.2f} {lost.sum():8.4f}"
            f"  {shares[0]:7.1%}  {shares[1]:8.1%}"
        )
    values = sorted((r for r in rows if r["side"] == "v"), key=lambda r: -sum(r["lost"]))
    for row in values[:6]:
        print(f"layer {row['layer']}: values lose {sum(row['lost']):.4f}")
    print(out / "value_costs.json")


def _bits(plan: Any, side: str) -> float:
    """Mean bits per channel of a side."""
    geometry = plan.model
    total = channels = 0.0
    for layer, own in zip(plan.layers, geometry.cache_layers, strict=True):
        dim = own.k_dim if side == "k" else own.v_dim
        stored = getattr(layer, side)
        total += sum(stored.of(h).bits_per_channel * dim for h in range(own.kv_heads))
        channels += dim * own.kv_heads
    return total / channels


if __name__ == "__main__":
    main(run, OUT)

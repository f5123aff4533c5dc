"""What the ablations share: one question, arms at stated bytes, seeds, paired intervals, a picture.

An ablation is a list of `Arm`s (plans that differ in one thing) measured on the same windows. Plans
are those of the command: `Bench.learned` is `turboq plan --budget`, `Bench.arm` is `turboq plan
--codec` (also of rules by layer), from what `turboq calibrate` observes by default. A seed draws
the rotations of fixed codecs, the text that the model writes for calibration, the labels and tokens
that are sampled there, and shifts the windows measured. Everything is written to one JSON:

    rows        arm, text, bits per channel, KL of every (seed, window), mean and 95 % interval
    contrasts   arm over baseline: exp(mean log ratio) of KL over paired (seed, window), interval

What was observed and measured is kept in --out and not done again after an interruption.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from turboq.cache.layer import TokenPolicy
from turboq.errors import TurboqError
from turboq.plan import ModelGeometry, Plan, document
from turboq.plan.rules import Rule, rule_plan
from turboq_calibrate.choose.budget import Budget
from turboq_calibrate.choose.plan_within import Menu, Wanted, menu, plan_within
from turboq_calibrate.cost.metrics import bootstrap_ci
from turboq_calibrate.fit.plan import fit_plan
from turboq_calibrate.measure.evaluate import evaluate_texts
from turboq_calibrate.models import Model, load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe import texts as data
from turboq_calibrate.observe.observe import observe
from turboq_calibrate.observe.recipe import ObserveRecipe
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
program: Any = importlib.import_module("program")

Arrays = dict[str, np.ndarray]
POLICY = TokenPolicy(sinks=4)

MODEL = flags.DEFINE_string("model", "embedded", "A folder, a .gguf file, or 'embedded'.")
STATISTICS = flags.DEFINE_multi_string(
    "statistics", [], "Folders of `turboq calibrate`, one for each seed; none: made in --out."
)
TEXT = flags.DEFINE_multi_string(
    "text", ["topics:heldout", "source:heldout"], "Texts to measure on, each by itself."
)
SEEDS = flags.DEFINE_integer("seeds", 2, "Seeds 0 to seeds - 1.", lower_bound=1)
WINDOWS = flags.DEFINE_integer("windows", 3, "Windows per text and seed.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 512, "Tokens per window.", lower_bound=2)
OUT = flags.DEFINE_string("out", None, "Folder for the result (default runs/NAME).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One plan of a study; `group` is its line in the picture. Compared with arm `baseline`."""

    name: str
    plan: Plan
    arrays: Arrays
    group: str = ""
    baseline: str | None = None


class Bench:
    """The model, one seed, and what was observed of the texts that arms are fitted to."""

    def __init__(self, model: Model, geometry: ModelGeometry, seed: int, out: Path):
        self.model, self.geometry, self.seed, self.out = model, geometry, seed, out
        self.dim = geometry.cache_layers[0].k_dim
        self.menu = functools.lru_cache(maxsize=1)(self._menu)  # one holds all samples
        self._fits: dict[tuple, Arrays] = {}

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Of this seed's --statistics, or of the default calibration."""
        if STATISTICS.value:
            return load_statistics(STATISTICS.value[self.seed])
        folder = self.out / "observed" / str(self.seed)
        windows = data.calibration_windows(self.model, seed=self.seed, folder=folder)
        return observe(self.model, windows, folder, ObserveRecipe(seed=self.seed))

    def of_text(self, text: str, windows: int) -> Statistics:
        """Of so many windows of another text, which the seed shifts."""
        found = data.mixed_windows(
            [text], self.model.tokenizer, length=data.LENGTH, count=windows,
            start=self.seed * (data.LENGTH // 2),
        )  # fmt: skip
        folder = self.out / "observed" / f"{text.replace(':', '_')}.{windows}.{self.seed}"
        return observe(self.model, found, folder, ObserveRecipe(seed=self.seed), progress=False)

    def _menu(self, statistics: Statistics, wanted: Wanted) -> Menu:
        return menu(statistics, self.geometry, wanted, progress=False)

    def learned(
        self,
        name: str,
        bits: float,
        *,
        statistics: Statistics | None = None,
        group: str = "",
        baseline: str | None = None,
        **wanted: Any,
    ) -> Arm:
        """The plan of `turboq plan --budget`; `wanted` are fields of `Wanted`."""
        own = Wanted(budget=Budget.parse(f"{bits:g}bpc"), policy=POLICY, **wanted)
        seen = self.statistics if statistics is None else statistics
        ready = self.menu(seen, dataclasses.replace(own, granularity="per_head")).under(own)
        found = plan_within(seen, self.geometry, own, prepared=ready, progress=False)
        arrays = found.arrays
        return Arm(name=name, plan=found.plan, arrays=arrays, group=group, baseline=baseline)

    def arm(
        self,
        name: str,
        rule: Rule,
        *,
        policy: TokenPolicy = POLICY,
        statistics: Statistics | None = None,
        change: Callable[[str, str, np.ndarray], np.ndarray] | None = None,
        group: str = "",
        baseline: str | None = None,
    ) -> Arm:
        """The plan of a rule, fitted; `change(side, array, values)` replaces fitted arrays."""
        seen = self.statistics if statistics is None else statistics
        plan = rule_plan(self.geometry, rule, policy=policy)
        key = (json.dumps(document(plan)["layers"]), seen)
        if key not in self._fits:
            self._fits[key] = fit_plan(plan, seen)
        arrays = self._fits[key]
        if change is not None:
            parts = {n: (n.split(".")[2], n.split(".")[-1]) for n in arrays}
            arrays = {n: change(*parts[n], values) for n, values in arrays.items()}
        return Arm(name=name, plan=plan, arrays=arrays, group=group, baseline=baseline)


Arms = Callable[[Bench], list[Arm]]


def measure(arms_of: Arms, out: Path) -> dict:
    """Every arm on every text and seed; what `out` holds of it is taken as it is."""
    if STATISTICS.value and len(STATISTICS.value) != SEEDS.value:
        raise TurboqError(
            f"--statistics: {len(STATISTICS.value)} folders for --seeds={SEEDS.value}: one for each"
        )
    model = load_model(MODEL.value)
    geometry = model_geometry(model)
    cells: dict[tuple[str, str], list[dict]] = {}
    meta: dict[str, Arm] = {}
    calibrated = []
    for seed in range(SEEDS.value):
        bench = Bench(model, geometry, seed, out)
        arms = arms_of(bench)
        meta = meta or {arm.name: arm for arm in arms}
        texts = {}
        for source in TEXT.value:
            windows = data.windows(
                data.load_text(source), model.tokenizer, length=LENGTH.value,
                count=WINDOWS.value, spread=True, start=seed * (LENGTH.value // 2),
            )  # fmt: skip
            texts[windows.source] = windows.tokens
        plans = [(arm.name, arm.plan, arm.arrays) for arm in arms]
        found = evaluate_texts(model, plans, texts, folder=out / "parts")
        for row in found.rows:
            cells.setdefault((row["name"], row["text"]), []).append(row)
        calibrated.append(bench.statistics.manifest.inputs["text"])
    rows = [_row(meta[name], text, found) for (name, text), found in cells.items()]
    return {
        "model": model.spec.name,
        "model_fingerprint": model.fingerprint,
        "calibration": calibrated,
        "seeds": SEEDS.value,
        "windows": WINDOWS.value,
        "window_tokens": LENGTH.value,
        "rows": rows,
        "contrasts": contrasts(meta, rows),
    }


def _row(arm: Arm, text: str, found: list[dict]) -> dict:
    kl = np.array([row["kl_windows"] for row in found]).reshape(-1)
    at = ("bits_per_channel", "bits_per_channel_at_context", "context", "bytes_per_token")
    return {
        "arm": arm.name,
        "group": arm.group,
        "text": text,
        **{name: found[0][name] for name in at},
        "policy": found[0]["policy"],
        "kl_mean": float(kl.mean()),
        "kl_ci": bootstrap_ci(kl),
        "kl_windows": kl.tolist(),
        "top1": float(np.mean([row["top1"] for row in found])),
    }


def contrasts(arms: dict[str, Arm], rows: list[dict]) -> list[dict]:
    """Arms against their baselines, per text and over all texts, paired by (seed, window)."""
    kl = {(row["arm"], row["text"]): np.array(row["kl_windows"]) for row in rows}
    texts = list(dict.fromkeys(row["text"] for row in rows))
    out = []
    for arm in arms.values():
        if arm.baseline is None:
            continue
        pairs = {t: np.log(kl[arm.name, t]) - np.log(kl[arm.baseline, t]) for t in texts}
        if len(texts) > 1:
            pairs["all"] = np.concatenate(list(pairs.values()))
        for text, logs in pairs.items():
            ci = bootstrap_ci(logs)
            out.append(
                {
                    "arm": arm.name,
                    "baseline": arm.baseline,
                    "text": text,
                    "kl_ratio": float(np.exp(logs.mean())),
                    "ratio_ci": None if ci is None else [float(np.exp(x)) for x in ci],
                }
            )
    return out


def table(result: dict) -> str:
    """The rows and the contrasts as text."""
    lines = [f"{'arm':<34} {'text':<18} {'bpc':>6} {'KL':>9}  95 % interval"]
    for row in result["rows"]:
        ci = "" if row["kl_ci"] is None else "{:.4g} - {:.4g}".format(*row["kl_ci"])
        bits, kl = row["bits_per_channel"], row["kl_mean"]
        lines.append(f"{row['arm']:<34} {row['text'][-18:]:<18} {bits:>6.3f} {kl:>9.4g}  {ci}")
    lines.append(f"\n{'arm over baseline':<58} {'text':<18} {'ratio':>6}  95 % interval")
    for c in result["contrasts"]:
        ci = "" if c["ratio_ci"] is None else "{:.3f} - {:.3f}".format(*c["ratio_ci"])
        pair = f"{c['arm']} / {c['baseline']}"
        lines.append(f"{pair:<58} {c['text'][-18:]:<18} {c['kl_ratio']:>6.3f}  {ci}")
    return "\n".join(lines)


def draw(result: dict, path: Path, title: str) -> None:
    """KL of every arm with its interval, one panel a text."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "turboq"
    import matplotlib.pyplot as plt

    texts = list(dict.fromkeys(row["text"] for row in result["rows"]))
    names = list(dict.fromkeys(row["arm"] for row in result["rows"]))
    groups = list(dict.fromkeys(row["group"] for row in result["rows"]))
    figure, panels = plt.subplots(
        1, len(texts), figsize=(3.4 + 3.4 * len(texts), 1.2 + 0.32 * len(names)), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes, text in zip(panels[0], texts, strict=True):
        for row in result["rows"]:
            if row["text"] == text:
                low, high = row["kl_ci"] or (row["kl_mean"], row["kl_mean"])
                spread = [[max(row["kl_mean"] - low, 0.0)], [max(high - row["kl_mean"], 0.0)]]
                axes.errorbar(
                    row["kl_mean"], names.index(row["arm"]), xerr=spread, fmt="o", capsize=3,
                    color=f"C{groups.index(row['group']) % 10}",
                )  # fmt: skip
        axes.set(xscale="log", title=text, xlabel="mean KL, nats per token")
        axes.grid(alpha=0.3, which="both")
    panels[0][0].set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def run(file: str, doc: str | None, arms_of: Arms) -> None:
    """The program of one ablation: `file` is its __file__, `doc` its docstring."""
    name, question = Path(file).stem, (doc or "").splitlines()[0]

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        logging.set_verbosity(logging.WARNING)
        out = Path(OUT.value or f"runs/{name}")
        try:
            result = {"study": name, "question": question} | measure(arms_of, out)
            program.write_json(out / f"{name}.json", result)
            draw(result, out / f"{name}.svg", question)
        except (TurboqError, OSError) as error:
            sys.exit(f"{name}: error: {error}")
        except KeyboardInterrupt:
            sys.exit(f"{name}: interrupted: the same command continues")
        print(table(result))
        print(f"\nresult  {out / name}.json\npicture {out / name}.svg")

    app.run(main)

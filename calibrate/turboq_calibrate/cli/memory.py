"""What a KV cache takes, what fits a memory, and which way of storing it to choose.

The model is --geometry=NAME (--geometry=list names them; 60x4x128 is LAYERSxKVHEADSxDIM), or
--model (a folder with config.json, a .json or .gguf file: headers only, and many more families
than the decoder runs), or a --plan (of a ladder: the best rung that fits --memory_gib). The cache
is --codec: an engine's format (f16, q8_0, q4_0, fp8, ...; --k_codec and --v_codec for each side)
or a turboq codec.

Two views are kept apart. 'engine' is stored bits, block scales included, times the tokens that
each layer keeps. 'ours' is what turboq's own cache holds: whole pages of 256 tokens (of a sliding
window its own and one more), exact sinks and recent window, arrays and tables; the output says
what makes the difference. A plan, --sinks or --recent is counted as 'ours', all else as 'engine'.

Sizes are GiB (2^30 bytes). Where published numbers differ they leave out block scales (q8_0 is 8.5
bits per number, q4_0 4.5), call GiB GB, or count query heads or layers that keep no cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

if TYPE_CHECKING:
    from turboq.what_fits import CacheGeometry
    from turboq.what_fits.storage import Storage, View
    from turboq_calibrate.what_fits.answer import Question

REQUIRED = ()
RESUME = "run the same command again"
FLOATS = (
    "memory_gib", "weights_gib", "working_gib", "overhead_percent", "bandwidth_gbs", "efficiency",
)  # fmt: skip
LARGEST = 2**40  # tokens, sessions or GiB: beyond it is a slip of the keyboard
CARDS = ["8", "16", "24", "32", "48", "80"]


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "plan",
        None,
        "Plan: a folder or plan.json; or a ladder (turboq plan "
        "--budget=LOW..HIGH), of which --memory_gib chooses the rung.",
        flag_values=values,
    )
    common.model(values, None, runs=False)
    flags.DEFINE_string(
        "geometry", None, "Named geometry such as llama-3-8b, or LAYERSxKVHEADSxDIM; 'list' "
        "prints the names.", flag_values=values,
    )  # fmt: skip
    common.codec(values, "exact")
    common.policy(values, sinks=0)
    for name, default, what in (
        ("context", 32768, "Tokens."),
        ("batch", 1, "Sessions held at once."),
        ("page_tokens", 1, "Tokens of the engine's cache page (vLLM: 16)."),
        (
            "tensor_parallel",
            1,
            "Ranks that share the model: all numbers, --memory_gib and "
            "--weights_gib included, are of one of them.",
        ),
    ):
        flags.DEFINE_integer(
            name, default, what, lower_bound=1, upper_bound=LARGEST, flag_values=values
        )
    flags.DEFINE_integer(
        "prefix", 0, "First tokens that all sessions share and store once.", lower_bound=0,
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "memory_gib", None, "Memory in GiB: also print the longest context and the sessions in it.",
        lower_bound=0.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "weights", None, "Weights in the same memory, by type: Q4_K_M, f16, ..., or 'auto' (the "
        "files of --model). Not counted by default.", flag_values=values,
    )  # fmt: skip
    for name, what in (
        ("weights_gib", "Weights in the same memory, GiB, instead of --weights."),
        ("working_gib", "Activations, buffers and runtime in the same memory, GiB."),
        ("overhead_percent", "Allocator's share on top of the cache."),
    ):
        default = None if name == "weights_gib" else 0.0
        flags.DEFINE_float(name, default, what, lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer(
        "window_slack", 0, "Tokens that the engine keeps beyond a sliding window (llama.cpp: its "
        "micro-batch, 512).", lower_bound=0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_enum("view", None, ("engine", "ours"), "How to count.", flag_values=values)
    flags.DEFINE_multi_string(
        "choose", [], "Ways of storing the cache, comma-separated, best quality first: f16, "
        "q8_0/q4_0, turboquant_mse:3, NAME=FOLDER of a plan; 'llama.cpp' is all of its types. "
        "With --memory_gib: which is the best that fits, and at which contexts.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string(
        "quality", [], "Folders with quality.json: --choose goes by the mean KL of the rows that "
        "are named alike.", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "bandwidth_gbs", None, "Memory bandwidth in GB/s: estimate decode speed from it.",
        lower_bound=0.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_float(
        "efficiency", 1.0, "Share of the bandwidth that is reached.", lower_bound=0.0,
        upper_bound=1.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_multi_string("cards", CARDS, "Memory sizes of the table, GB.", flag_values=values)
    flags.DEFINE_string(
        "picture", None, "Draw memory against context to this .svg or .png.", flag_values=values
    )
    flags.DEFINE_boolean(
        "strict_context", False, "A context above the model's is an error.", flag_values=values
    )
    flags.DEFINE_enum(
        "format", "table", ("table", "text", "json", "csv"), "Output (table is text).",
        flag_values=values,
    )  # fmt: skip


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    import json

    from turboq_calibrate.what_fits import text as memory_report
    from turboq_calibrate.what_fits.answer import answer

    if values.geometry == "list":
        from turboq.what_fits.geometries import names

        print("\n".join(names()))
        return
    with common.as_user_error():
        question = _question(values)
        found = answer(question)
        if values.picture is not None:
            _draw(values.picture, question)
    if values.format == "json":
        print(json.dumps(found, indent=1, allow_nan=False))
    elif values.format == "csv":
        print(memory_report.csv_text(found), end="")
    else:
        print(memory_report.text(found))


def _question(values: flags.FlagValues) -> Question:
    from turboq.what_fits import GIB
    from turboq_calibrate.what_fits.answer import Question

    for name in FLOATS:
        value = values[name].value
        if isinstance(value, float) and not 0 <= value <= LARGEST:
            raise TurboqError(f"--{name}={value} must be a number of 0..2^40")
    geometry, storage = _subject(values)
    if values.strict_context and geometry.context is not None and values.context > geometry.context:
        raise TurboqError(
            f"--context={values.context} is above the {geometry.context} tokens that "
            f"{geometry.name} is made for: a shorter context, or leave out --strict_context"
        )
    weights, weights_from = _weights(values, geometry)
    question = Question(
        geometry=geometry,
        storage=storage,
        view=_view(values),
        context=values.context,
        sessions=values.batch,
        prefix=values.prefix,
        memory_gib=values.memory_gib,
        weights=weights,
        weights_from=weights_from,
        working=int(values.working_gib * GIB),
        overhead=values.overhead_percent / 100,
        cards=_cards(common.listed(values, "cards")),
        options=_options(values, geometry),
        quality_rows=_quality(values),
        bandwidth=None if values.bandwidth_gbs is None else values.bandwidth_gbs * 1e9,
        efficiency=values.efficiency,
    )
    return _on_rung(values, question) if _is_ladder(values) else question


def _is_ladder(values: flags.FlagValues) -> bool:
    if values.plan is None:
        return False
    from pathlib import Path

    from turboq.plan.io import is_ladder

    return is_ladder(Path(values.plan))


def _on_rung(values: flags.FlagValues, question: Question) -> Question:
    """The same of the best rung that fits the memory, if there is one; else of rung 0.

    Raises:
      TurboqError: the lowest rung does not fit.
    """
    import dataclasses

    from turboq.plan.ladder import load_ladder
    from turboq.what_fits import GIB, of_plan
    from turboq_calibrate.choose.ladder import first_rung

    ladder, _ = load_ladder(values.plan)

    def storage(n: int) -> Storage:
        plan = ladder.plan_of(ladder.tiers(n))
        name = f"rung {n} of 0..{ladder.rungs - 1}"
        return of_plan(plan, name, page_tokens=values.page_tokens, window_slack=values.window_slack)

    rung = 0
    if question.memory_gib is not None:
        rung = first_rung(
            ladder.rungs, lambda n: question.budget(storage(n)).needed(question.context),
            question.memory_gib * GIB,
            f"{question.memory_gib:g} GiB at {question.context:,} tokens",
        )  # fmt: skip
    return dataclasses.replace(question, storage=storage(rung))


def _subject(values: flags.FlagValues) -> tuple[CacheGeometry, Storage]:
    """The model and how its cache is stored."""
    given = [name for name in ("plan", "model", "geometry") if values[name].value is not None]
    if len(given) != 1:
        raise TurboqError("give either --plan, or --model or --geometry with --codec")
    sizes = {"page_tokens": values.page_tokens, "window_slack": values.window_slack}
    if values.plan is not None:
        if values.tensor_parallel > 1:
            raise TurboqError(
                "--tensor_parallel divides heads of a --model or --geometry: a plan "
                "says what each of its heads is, not on which rank"
            )
        if _is_ladder(values):
            from turboq.plan.ladder import load_ladder
            from turboq.what_fits import of_plan, plan_geometry

            ladder, _ = load_ladder(values.plan)
            top = ladder.plan_of(ladder.tiers(0))
            return plan_geometry(top.model), of_plan(top, "rung 0", **sizes)
        from turboq.plan import load
        from turboq.plan.summary import codec_label
        from turboq.what_fits import of_plan, plan_geometry

        plan, _ = load(values.plan)
        labels = dict.fromkeys(
            "/".join(dict.fromkeys(codec_label(side.codec) for side in (layer.k, layer.v)))
            for layer in plan.layers
        )
        return plan_geometry(plan.model), of_plan(plan, ", ".join(labels), **sizes)
    from turboq.what_fits import rank

    if values.geometry is not None:
        from turboq.what_fits.geometries import geometry

        found = geometry(values.geometry)
    else:
        from turboq_calibrate.what_fits.read_geometry import read_geometry

        found = read_geometry(values.model)
    found = rank(found, values.tensor_parallel)
    return found, _storage(values, found, sizes)


def _storage(values: flags.FlagValues, geometry: CacheGeometry, sizes: dict[str, int]) -> Storage:
    """The cache that the codec flags describe."""
    from turboq.what_fits import of_sides

    sides = common.sides_of_flags(values)
    policy = common.policy_of(values) if _keeps_exact(values) else None
    return of_sides(geometry, sides["k"], sides["v"], policy, **sizes)


def _keeps_exact(values: flags.FlagValues) -> bool:
    return bool(values.sinks or values.recent)


def _view(values: flags.FlagValues) -> View:
    if values.view is not None:
        return values.view
    return "ours" if values.plan is not None or _keeps_exact(values) else "engine"


def _weights(values: flags.FlagValues, geometry: CacheGeometry) -> tuple[int, str]:
    from turboq.what_fits import GIB, weights_bytes

    if values.weights is not None and values.weights_gib is not None:
        raise TurboqError("give --weights or --weights_gib, not both")
    if values.weights_gib is not None:
        return int(values.weights_gib * GIB), "as given"
    if values.weights is not None:
        seen = values.weights.lower() == "auto"
        where = geometry.weights_from if seen else f"about, by type {values.weights}"
        share = 1 if seen else values.tensor_parallel  # files were divided with the geometry
        where += f", 1/{values.tensor_parallel} of them" if values.tensor_parallel > 1 else ""
        return -(-weights_bytes(geometry, values.weights) // share), where
    return 0, "not counted: --weights or --weights_gib"


def _cards(items: list[str]) -> tuple[int | float, ...]:
    try:
        sizes = tuple(float(item) for item in items)
    except ValueError:
        sizes = ()
    if not sizes or not all(0 < size < 2**20 for size in sizes):
        raise TurboqError(f"--cards={','.join(items)} must be sizes in GB, such as 8,16,24")
    return sizes


def _options(values: flags.FlagValues, geometry: CacheGeometry) -> tuple[Storage, ...]:
    from turboq.what_fits import option
    from turboq.words import is_path, labelled

    items = [q for item in common.listed(values, "choose") for q in (
        _llama_cpp(geometry) if item in ("llama.cpp", "llamacpp") else (item,)
    )]  # fmt: skip
    if values.tensor_parallel > 1 and (plans := [x for x in items if is_path(labelled(x)[1])]):
        raise TurboqError(f"--choose={plans[0]}: --tensor_parallel does not divide a plan")
    policy = common.policy_of(values) if _keeps_exact(values) else None
    found = [
        option(
            item, geometry, policy,
            page_tokens=values.page_tokens, window_slack=values.window_slack,
        )
        for item in items
    ]  # fmt: skip
    names = [storage.name for storage in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TurboqError(f"--choose names {twice[0]!r} twice: name one of them (NAME=...)")
    if values.quality and not found:
        raise TurboqError("--quality ranks the options of --choose: name them")
    return tuple(found)


def _llama_cpp(geometry: CacheGeometry) -> tuple[str, ...]:
    """All of llama.cpp's types, best first.

    Raises:
      TurboqError: heads are not whole blocks of some of them.
    """
    from turboq.what_fits import FORMATS, QUALITY_ORDER

    dims = sorted({d for x in geometry.layers if x.stores for d in (x.k_dim, x.v_dim) if d})
    unfit = [name for name in QUALITY_ORDER if any(d % FORMATS[name].block for d in dims)]
    if unfit:
        fit = [name for name in QUALITY_ORDER if name not in unfit]
        raise TurboqError(
            f"--choose=llama.cpp: {', '.join(unfit)} keep blocks of {FORMATS[unfit[0]].block} "
            f"numbers, and heads of {geometry.name} have {', '.join(map(str, dims))}: "
            f"--choose={','.join(fit)} fits"
        )
    return QUALITY_ORDER


def _quality(values: flags.FlagValues) -> list[dict]:
    if not values.quality:
        return []  # so that counting does not wait for JAX
    from turboq_calibrate.measure.quality_table import read_quality

    return [row for folder in common.listed(values, "quality") for row in read_quality(folder).rows]


def _draw(path: str, question: Question) -> None:
    from turboq_calibrate.what_fits.picture import context_wall

    stored = question.options or (question.storage,)
    context_wall(
        path,
        [(storage.name, question.budget(storage)) for storage in stored],
        title=f"{question.geometry.name}: memory against context, {question.sessions} session(s), "
        + (f"weights {question.weights / 2**30:.2f} GiB" if question.weights else "cache alone"),
        cards=question.cards,
        context=question.context,
        limit=question.geometry.context,
    )

"""One run divided into jobs that share nothing, and put together again.

    turboq calibrate --shard=0/4 --out=S0 ...   on any machine, in any order; a dead job costs one
    turboq merge --out=OUT S0 S1 S2 S3          shard, which is run again

A window's gradients depend on that window only, and which tokens are sampled is known beforehand,
so merged counts, maxima and sampled tokens equal those of one process exactly. Float64 sums differ
by their order: within (m - 1) 2^-53 sum|c_i| for m chunks (`statistics`).
"""

# pyright: strict

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turboq.errors import TurboqError
from turboq.files import atomic_write, make_folder
from turboq_calibrate.observe import layer_statistics, reservoir
from turboq_calibrate.observe import statistics_files as files
from turboq_calibrate.observe.recipe import Shard, differences
from turboq_calibrate.observe.statistics_files import Statistics, load_statistics
from turboq_calibrate.run.progress import Progress


def merge_shards(
    folders: Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> Statistics:
    """Statistics of all shards together, written into `out_dir`; their order does not matter.

    Memory: two layers and the joined sample of one. The manifest is written last, so an interrupted
    merge leaves no statistics.

    Raises:
      TurboqError: a shard is missing, given twice, damaged, or of another model, text or recipe;
        `out_dir` holds other statistics.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> texts = ["topics:heldout"]
      >>> windows = tc.mixed_windows(texts, model.tokenizer, length=32, count=8)
      >>> quiet = {"progress": False, "log": lambda line: None}
      >>> for i in range(2):  # each in a process, or on a machine, of its own
      ...     shard = tc.Shard(index=i, count=2)
      ...     part = tc.calibrate(model, windows, f"part{i}", shard=shard, **quiet)
      >>> merged = tc.merge_shards(["part0", "part1"], "merged", progress=False)
      >>> len(merged.layers) == len(model.spec.layers)
      True
    """
    parts = _in_order([load_statistics(folder) for folder in folders])
    inputs = {k: v for k, v in parts[0].manifest.inputs.items() if k != "shard"}
    out = make_folder(Path(out_dir) / files.FOLDER)
    if (out / files.MANIFEST).exists():
        found = differences(load_statistics(out).manifest.inputs, inputs)
        if found:
            raise TurboqError(
                f"{out} holds statistics of other inputs ({'; '.join(found)}): choose another "
                "folder"
            )
    entries: list[dict[str, Any]] = []
    tokens, sampled = 0, inputs["recipe"]["reservoir"] > 0
    with Progress(len(parts[0]), label="merge", unit="layers", enabled=progress) as bar:
        for i in range(len(parts[0])):
            layer = functools.reduce(layer_statistics.merge, (part[i] for part in parts))
            sides = {name: side.arrays for name, side in layer.sides.items()}
            if sampled:
                sample = reservoir.join([part.tokens(i) for part in parts])
                atomic_write(out / files.tokens_file(i), sample.to_bytes())
            atomic_write(out / files.layer_file(i), files.to_bytes(sides))
            tokens = max(tokens, int(layer.k.count.max(initial=0)))
            path = parts[0].manifest.layers[i]["path"]
            entries.append(files.describe_layer(out, i, path, layer, sampled=sampled))
            bar.advance(1)
    files.write_windows(out, parts[0].windows, parts[0].window_texts, parts[0].held_back)
    files.write_manifest(out, inputs, parts[0].geometry, tokens, entries)
    return load_statistics(out)


def _in_order(parts: list[Statistics]) -> list[Statistics]:
    """The shards 0 to n - 1 of one run, each once."""
    if not parts:
        raise TurboqError("nothing to merge: name the folders of all shards")
    shards: dict[int, Statistics] = {}
    for part in parts:
        found = part.manifest.inputs.get("shard")
        if found is None:
            raise TurboqError(f"{part.folder} is a whole run, not a shard of one")
        shard = Shard(**found)
        first = next(iter(shards.values()), part)
        mine, theirs = (
            dict(p.manifest.inputs) | {"shard": p.manifest.inputs["shard"]["count"]}
            for p in (part, first)
        )
        lines = differences(theirs, mine)
        if lines:
            raise TurboqError(
                f"{part.folder} and {first.folder} are not shards of one run ({'; '.join(lines)})"
            )
        if shard.index in shards:
            raise TurboqError(
                f"shard {shard.index}/{shard.count} was given twice: {shards[shard.index].folder} "
                f"and {part.folder}"
            )
        shards[shard.index] = part
    count = next(iter(shards.values())).manifest.inputs["shard"]["count"]
    missing = [f"{i}/{count}" for i in range(count) if i not in shards]
    if missing:
        raise TurboqError(
            f"shards {', '.join(missing)} are missing: run `turboq calibrate --shard=...` for them"
        )
    return [shards[i] for i in range(count)]

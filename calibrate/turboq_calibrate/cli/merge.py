"""Joins the statistics of all shards of one run (`turboq calibrate --shard=i/n`).

    turboq merge --out=OUT SHARD SHARD ...

The order of the folders does not matter: the same shards give the same bytes. A missing, repeated
or foreign shard is refused by name.
"""

from __future__ import annotations

from absl import flags

from turboq.errors import TurboqError
from turboq_calibrate.cli import common

REQUIRED = ("out",)
RESUME = "run the same command again"
ARGUMENTS = "SHARD..."


def define(values: flags.FlagValues) -> None:
    common.out(values, "Folder for the joined statistics.")


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq_calibrate.observe.merge_shards import merge_shards

    if not arguments:
        raise TurboqError("name the folders of all shards")
    merged = merge_shards(arguments, values.out)
    print(f"{len(arguments)} shards, {merged.manifest.tokens:,} tokens per head")
    print(f"{merged.folder}")

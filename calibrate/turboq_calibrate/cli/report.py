"""Draws a run folder (quality.json, tasks.json, or both) as one self-contained report.html.

The page opens without a network: KL against bits per channel and position, the quality table, a
heat map of the error of every layer and head, and which tasks tolerate how many bits.
"""

from __future__ import annotations

from absl import flags

REQUIRED = ("run",)
RESUME = "nothing was written, run the same command again"


def define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("run", None, "Folder with quality.json or tasks.json.", flag_values=values)


def main(values: flags.FlagValues, arguments: list[str]) -> None:
    from turboq_calibrate.measure.html_page import write_report

    print(write_report(values.run))

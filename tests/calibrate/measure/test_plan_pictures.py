"""What a plan stores, drawn and in `quality.json`: heads in place, bits that are the bytes."""

import re
import shlex

import plan_cases
import pytest
import quality_cases
from tolerances import TOL

from turboq.codecs import PerHead, TurboQuantMSE
from turboq.export import ENGINES
from turboq.plan import head_plan
from turboq_calibrate.measure import html_page, plan_pictures, quality_table
from turboq_calibrate.measure.storage_columns import head_bits

CHOSEN = {"k": [[2.0, 3.0], None, [4.0, 8.0]], "v": [[2.0, 2.0], None, [2.0, 2.0]],
          "bytes_per_token": [10.0, None, 16.0]}  # fmt: skip
ALIKE = {"k": [[3.0, 3.0]] * 3, "v": [[2.0, 2.0]] * 3, "bytes_per_token": [9.0] * 3}


def test_bits_of_heads_are_in_the_models_order_and_sum_to_the_bytes():
    # 16 channels of K, 8 of V; a scale takes 16 bits.
    def choose(layer, side, head):
        dim = 16 if side == "k" else 8
        return TurboQuantMSE(dim=dim, bits=5 if (layer, side, head) == (1, "k", 1) else 2)

    plan = head_plan(plan_cases.geometry(layers=2, kv_heads=3), choose)
    found = head_bits([plan.storage[0], None, plan.storage[1]])
    assert found["k"] == [[3.0] * 3, None, [3.0, 6.0, 3.0]]
    assert found["v"] == [[4.0] * 3, None, [4.0] * 3]
    assert found["bytes_per_token"] == [
        (3 * 16 * 3 + 3 * 8 * 4) / 8, None, ((3 + 6 + 3) * 16 + 3 * 8 * 4) / 8,
    ]  # fmt: skip
    assert sum(x or 0 for x in found["bytes_per_token"]) == plan.bytes.bytes_per_token


def test_only_plans_that_choose_are_mapped():
    bits = {"chosen": CHOSEN, "alike": ALIKE}
    assert plan_pictures.chosen_per_head(bits) == ["chosen"]
    drawn = plan_pictures.bits_map(bits)
    assert drawn is not None
    assert "chosen, K" in drawn
    assert "alike" not in drawn
    assert plan_pictures.bits_map({"alike": ALIKE}) is None
    assert plan_pictures.layer_bytes({"alike": ALIKE}) is None
    assert "layer 2 with 16" in (plan_pictures.layer_bytes(bits) or "")


def test_more_bits_are_brighter_and_the_first_head_is_on_top():
    drawn = plan_pictures.bits_map({"chosen": CHOSEN}) or ""
    group = drawn[drawn.index("bits-QuadMesh_1") :]
    cells = re.findall(
        r'd="M (\S+) (\S+)[^"]*"[^>]*style="fill: #([0-9a-f]{6})', group[: group.index("</g>\n")]
    )
    light = {(float(x), float(y)): int(c[:2], 16) + 2 * int(c[2:4], 16) for x, y, c in cells}
    columns, rows = (sorted({at[i] for at in light}) for i in (0, 1))
    assert (len(columns), len(rows)) == (2, 2)  # layers with a cache; downwards in SVG
    first, second = [light[columns[0], y] for y in rows], [light[columns[1], y] for y in rows]
    assert first[0] < first[1] < second[0] < second[1]  # 2, 3 and 4, 8 bits


def test_what_layers_cost_is_drawn_to_scale():
    """Heights of the bars, K then V on top, are as the losses; a layer without a cache has none."""
    losses = {"a": {"k": [1.0, None, 4.0], "v": [2.0, None, 0.5]}}
    drawn = plan_pictures.layer_losses(losses) or ""
    assert "a: 7.5, layer 2 most with 4.5" in drawn
    boxes = re.findall(r'd="M (\S+) (\S+) \nL \S+ \S+ \nL \S+ (\S+) [^"]*"[^>]*fill: #(\w+)', drawn)
    heights = {"2f7fd1": [], "d4660a": []}
    for _, bottom, top, colour in boxes:
        heights[colour].append(float(bottom) - float(top))
    unit = heights["2f7fd1"][0]
    for colour, due in (("2f7fd1", [1, 0, 4]), ("d4660a", [2, 0, 0.5])):
        *bars, _legend = heights[colour]
        assert [h / unit for h in bars] == pytest.approx(due, abs=TOL["drawn"])
    assert plan_pictures.layer_losses({}) is None


@pytest.fixture
def report():
    rows = [quality_cases.row("best", "per_head", 3, 0.1), quality_cases.row("other", kl=0.3)]
    found = quality_cases.quality(rows)
    found.table["head_bits"] = {"best": CHOSEN, "other": ALIKE}
    found.run["plans"] = {"other": "runs/other", "best": "runs/the best"}
    return found


def test_the_report_says_where_bits_go_and_how_to_use_the_best_plan(report, tmp_path):
    report.table["layer_loss"] = {"best": {"k": [0.1, None], "v": [0.2, None]}}
    page = html_page.render(report)
    assert "Where bits go" in page
    assert "best: 0.3 in all" in page
    assert "These store all heads alike: other." in page
    whole = {name for name, engine in ENGINES.items() if engine.joint}
    assert whole == {"transformers", "reader"}  # these come first
    lines = re.findall(r"^turboq export (.*?)(?:</pre>)?$", page, re.MULTILINE)
    assert [dict(x.split("=", 1) for x in shlex.split(line.replace("&#x27;", "'")))
            for line in lines] == [
        {"--engine": name, "--plan": "runs/the best", "--out": f"runs/for_{name}"}
        for name in ["transformers", "reader", *(e for e in ENGINES if e not in whole)]
    ]  # fmt: skip
    assert page.count("(not run here)\n") == sum(not engine.ran for engine in ENGINES.values())
    quality_table.write_quality(report, tmp_path)
    read = quality_table.read_quality(tmp_path)
    assert (read.table, read.run) == (report.table, report.run)


def test_a_plan_that_joins_heads_is_offered_to_those_that_read_it(report):
    report.table["joint"] = ["best"]
    page = html_page.render(report)
    assert re.findall(r"^turboq (.*?) --engine=(\S+)", page, re.MULTILINE) == [
        ("export", "transformers"), ("export", "reader"), ("plan", "NAME"),
    ]  # fmt: skip
    assert all(f" {name}" in page for name, engine in ENGINES.items() if not engine.joint)
    report.table["joint"] = ["other"]
    assert page.count("turboq export") < html_page.render(report).count("turboq export")


def test_without_plans_in_folders_there_is_nothing_to_type(report):
    del report.run["plans"], report.table["head_bits"]
    page = html_page.render(report)
    assert "turboq export" not in page
    assert "Where bits go" not in page


def test_per_head_scales_are_not_counted_twice():
    codec = PerHead(dim=16, bits=3, scale="head")
    plan = head_plan(plan_cases.geometry(k_dim=16, v_dim=16), lambda layer, side, head: codec)
    assert head_bits(plan.storage)["k"] == [[3.0] * 3] * 2

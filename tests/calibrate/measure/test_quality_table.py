"""Quality files and their table: what is refused, and what a table says of its bytes."""

import csv
import io
import json
import re

import pytest
import quality_cases

from turboq.errors import TurboqError
from turboq_calibrate.measure import html_page
from turboq_calibrate.measure import quality_table as quality


def test_what_is_all_resident_at_the_window_is_printed():
    """48 tokens, 4 sinks and 40 recent: at t = 44 .. 47 from 1 of 45 to 3 of 47 keys quantized."""
    row = quality_cases.row("mine") | {"bits_per_channel_at_window": 9.5}
    row["policy"] = {"sinks": 4, "recent": 40, "exact_dtype": "bfloat16"}
    found = quality_cases.quality([row, quality_cases.row("free")], tokens=48)
    found.table["texts"][0]["windows"] = 2
    text = quality.format_table(found)
    assert "all at 48" in text
    assert "9.50" in text
    assert text.splitlines()[1].split()[1:8] == [
        "bits/ch", "all", "at", "48", "all", "at", "4096",
    ]  # fmt: skip
    assert text.splitlines()[3].split()[1:4] == ["3.25", "9.50", "3.30"]
    share = (1 + 2 + 3) / (45 + 46 + 47)
    assert f"mine: at most {100 * share:.0f} % of the keys that scored" in text
    assert "free: at most" not in text
    assert "intervals are over 2 windows of one text" in text


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "does not exist: run"),
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "schema: null, this version reads 2"),
        ('{"schema": 1, "rows": []}', "schema: 1, this version reads 2: run `turboq evaluate`"),
    ],
)
def test_unreadable_quality_is_one_clear_line(tmp_path, content, match):
    if content is not None:
        (tmp_path / quality.QUALITY).write_text(content)
    with pytest.raises(TurboqError, match=match) as error:
        quality.read_quality(tmp_path)
    assert "\n" not in str(error.value)


def places(value, path=()):
    """Paths of every value of a JSON document; of a list, those of its first item."""
    yield path
    if not isinstance(value, (dict, list)):
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value[:1]):
        yield from places(item, (*path, key))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("file", [quality.QUALITY, quality.RUN])
def test_every_damaged_field_is_one_clear_line(tmp_path, file):
    """Each value replaced by each other kind, or left out: a TurboqError that names the file, or
    (a number for a number) the table as it stands, which the report can draw."""
    given = quality_cases.quality(
        [quality_cases.row("a"), quality_cases.row("b", "exact", 16, 0.0)]
    )
    quality.write_quality(given, tmp_path)
    whole = json.loads((tmp_path / file).read_text())
    tried, refused = 0, []
    for path in places(whole):
        if not path:
            continue
        *outer, last = path
        for wrong in (None, True, "words", -1.5, [], {}, [[]], {"words": 3}, "absent"):
            damaged = json.loads(json.dumps(whole))
            at = damaged
            for key in outer:
                at = at[key]
            if wrong == "absent":
                del at[last]
            else:
                at[last] = wrong
            (tmp_path / file).write_text(json.dumps(damaged))
            tried += 1
            try:
                found = quality.read_quality(tmp_path)
            except TurboqError as error:
                refused.append(str(error))
            else:
                quality.csv_text(found.rows)
                quality.format_table(found)
    assert len(refused) > 0.8 * tried > 40
    assert all(str(tmp_path) in line and "\n" not in line for line in refused)


@pytest.mark.parametrize("text", ["printed", "page"])
def test_unequal_exact_tokens_are_said_once(text):
    """KIVI keeps up to 31 more; a plan that quantizes nothing does not count."""

    def said(*kept):
        rows = [
            quality_cases.row(f"plan {i}", text=where) | {"exact_tokens": list(x)}
            for where in ("a", "b")
            for i, x in enumerate(kept)
        ]
        rows.append(quality_cases.row("all", "exact", text="a") | {"exact_tokens": [9, 9]})
        found = quality_cases.quality(rows, ("a", "b"))
        shown = quality.format_table(found) if text == "printed" else html_page.render(found)
        return re.findall("exact tokens differ, so plans do not compare: ([a-z0-9,; ]+)", shown)

    assert said((4, 0), (4, 31), (4, 0)) == [
        "first 4 and last 0 of plan 0, plan 2; first 4 and last 31 of plan 1"
    ]
    assert said((4, 0), (4, 0)) == []


def test_the_csv_has_buckets_of_position_and_tails():
    row = quality_cases.row("a", kl=0.1) | {"kl_p999": 0.6}
    row["by_position"] += [row["by_position"][0] | {"start": 4096, "end": 5000, "kl_p99": 7.0}]
    (read,) = csv.DictReader(io.StringIO(quality.csv_text([row])))
    assert read["kl_p999"] == "0.6"
    assert float(read["kl_p999_0_1k"]) == pytest.approx(0.9)
    assert (read["kl_mean_0_1k"], read["kl_p99_4k_16k"]) == ("0.1", "7.0")
    assert {read[f"{name}_1k_4k"] for name in ("kl_mean", "top1", "perplexity_ratio")} == {""}
    assert read["top1_16k_up"] == ""
    old = {name: x for name, x in row.items() if name not in ("kl_p999", "by_position")}
    (read,) = csv.DictReader(io.StringIO(quality.csv_text([old])))
    assert (read["kl_p999"], read["kl_mean_0_1k"], read["compression"]) == ("", "", str(16 / 3))

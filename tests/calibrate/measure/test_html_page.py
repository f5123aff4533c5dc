"""The report is one valid page that needs nothing else, says what the table says, and is stable."""

import copy
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from turboq.errors import TurboqError
from turboq_calibrate.measure import html_page as report
from turboq_calibrate.measure import pictures
from turboq_calibrate.measure import quality_table as quality

NASTY = 'x <script>alert(1)</script> & "$\\frac$"'


def row(name, codec, bits, kl, *, ci=(0.8, 1.25)):
    return {
        "name": name, "codec": codec, "k_codec": codec, "v_codec": codec, "k_bits": bits,
        "v_bits": bits, "bits_per_channel": bits + 0.25, "bits_per_channel_at_context": bits + 0.3,
        "context": 4096, "policy": {"sinks": 4, "recent": 0, "exact_dtype": "bfloat16"},
        "text": "noise", "kl_mean": kl, "kl_median": kl / 2,
        "kl_ci": None if ci is None else [c * kl for c in ci], "kl_p99": 5 * kl, "top1": 0.75,
        "perplexity": 20.0 + kl, "perplexity_ratio": 1 + kl, "bytes_per_token": 100 * bits,
        "compression": 16 / bits,
        "cache_bytes": {str(c): 100 * bits * c for c in (256, 1024, 4096)},
    }  # fmt: skip


def errors(scale, layers=5, heads=2):
    grid = [[scale * (1 + 10 * i + h) for h in range(heads)] for i in range(layers)]
    grid[3] = None  # a layer without a cache
    return {"k_logit_rms": grid, "k_rel_mse": grid, "v_rel_mse": grid}


def make(rows):
    table = {
        "schema": 1, "model": "tiny & <b>bold</b>", "model_fingerprint": "ab" * 32, "text": "noise",
        "windows": 3, "window_tokens": 64, "tokens": 189, "windows_sha256": "cd" * 32,
        "attention": "simulated", "exact": {"perplexity": 20.0},
        "bootstrap": {"level": 0.95, "samples": 100, "seed": 0}, "rows": rows,
        "head_errors": {r["name"]: errors(r["kl_mean"] or 1e-9) for r in rows},
    }  # fmt: skip
    run = {"seconds": 12.0, "cpus": 2, "devices": ["cpu:0"], "peak_memory_bytes": 2**30,
           "versions": {"jax": "0"}}  # fmt: skip
    return quality.Quality(table=table, run=run)


@pytest.fixture(scope="module")
def full():
    return make(
        [
            row("exact bf16", "exact", 16, 1e-6),
            row("mse 2", "turboquant_mse", 2, 1.0),
            row("mse 3", "turboquant_mse", 3, 0.2),
            row("mse 4", "turboquant_mse", 4, 0.04),
            row(NASTY, "turboquant_prod", 3, 1.6),
            row("learned 3", "per_head", 3, 0.12, ci=None),
            row("new 3", "a_codec_of_tomorrow", 3, 0.11),
        ]
    )


@pytest.fixture(scope="module")
def page(full):
    return report.render(full)


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_well_formed_and_needs_nothing_else(page):
    parsed = Page(page)
    assert parsed.open == []
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "link", "img", "image", "iframe", "object", "embed", "video"}
    for _, attributes in parsed.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("href", "xlink:href", "src", "action"):
                assert value.startswith("#")
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith("#")
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert "://" not in outside
    assert "@import" not in page


def test_ids_are_unique_and_references_resolve(page):
    ids = [a["id"] for _, a in Page(page).tags if "id" in a]
    assert len(ids) == len(set(ids)) > 10
    used = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert used
    assert set(used) <= set(ids)


def test_pictures_are_valid_svg_with_text_alternatives(page):
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 40
        assert root.get("viewBox")
        assert root.get("width") is None
    assert "Lowest: mse 4, 0.04 nats" in drawings[0]


def test_both_themes(page):
    assert "prefers-color-scheme: dark" in page
    for marker in (pictures._INK, pictures._GRID):
        assert marker not in page
    assert page.count("var(--ink)") > 20
    assert "var(--grid)" in page.partition("</style>")[2]


def test_names_are_text_wherever_they_stand(page):
    assert "<script" not in page
    assert "<b>bold" not in page
    text = "".join(Page(page).text)
    assert NASTY in text
    assert text.count(NASTY) >= 3  # table, heat map, memory


def test_table_has_every_row_as_printed(full, page):
    cells = re.findall(r"<td>(.*?)</td>", page)
    want = [cell for r in full.rows for cell in quality.display(r).values()]
    assert [c.replace("&quot;", '"') for c in cells] == [
        c.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for c in want
    ]


def test_same_input_same_bytes(full, page):
    assert report.render(copy.deepcopy(full)) == page
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", page)


def test_heat_map_orientation():
    grid = pictures.heads_matrix([[1.0, 2.0], None, [3.0], [0.0, 4.0]])
    nan = np.nan
    np.testing.assert_array_equal(grid, [[1, nan, 3, nan], [2, nan, nan, 4]])


def test_heat_map_cells_follow_the_values():
    """More error, brighter: layers of increasing error get colours of increasing luminance."""
    drawn = pictures.error_heat_maps({"a": errors(1e-3)}, ["a"])
    assert drawn is not None
    group = drawn[drawn.index("heads-QuadMesh_1") :]
    colours = re.findall(r"fill: #([0-9a-f]{6})", group[: group.index("</g>\n   </g>")])
    assert len(colours) == 8  # 2 heads x 4 layers with a cache
    luminance = [int(c[:2], 16) + 2 * int(c[2:4], 16) for c in colours]
    head_0, head_1 = luminance[:4], luminance[4:]
    assert head_0 == sorted(head_0)
    assert head_1 == sorted(head_1)
    assert head_0[0] < head_1[0]


def test_representative_rows_one_per_codec_near_three_bits(full):
    names = report.representative(full.rows)
    assert names == ["mse 3", NASTY, "learned 3", "new 3"]
    assert "exact bf16" not in report.representative(full.rows, 6)
    assert report.representative(full.rows, 5) == ["mse 2", *names]  # the first of equals
    assert report.representative(full.rows, 2) == ["mse 3", NASTY]


def test_few_rows_still_make_a_page():
    only_exact = make([row("exact", "exact", 16, 0.0)])
    page = report.render(only_exact)
    assert page.count("<svg") == 1  # nothing lossy to draw, memory only
    quality_without_errors = make([row("mse", "turboquant_mse", 3, 0.5)])
    del quality_without_errors.table["head_errors"]
    assert report.render(quality_without_errors).count("<svg") == 2
    with pytest.raises(ValueError, match="missing="):
        report.render(only_exact, heat_map_plans=["unknown"])


def test_write_report_reads_the_folder(full, page, tmp_path):
    quality.write_quality(full, tmp_path)
    path = report.write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == page
    (tmp_path / quality.RUN).unlink()  # a table without its run information is still a report
    report.write_report(tmp_path)
    with pytest.raises(TurboqError, match="does not exist"):
        report.write_report(tmp_path / "nowhere")

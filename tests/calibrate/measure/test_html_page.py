"""The report is one valid page that needs nothing else, says what the table says, and is stable."""

import copy
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import quality_cases

from turboq.errors import TurboqError
from turboq_calibrate.measure import html_page as report
from turboq_calibrate.measure import pictures
from turboq_calibrate.measure import quality_table as quality

NASTY = 'x <script>alert(1)</script> & "$\\frac$"'


@pytest.fixture(scope="module")
def full():
    return quality_cases.quality(
        [
            quality_cases.row("exact bf16", "exact", 16, 1e-6),
            quality_cases.row("mse 2", "turboquant_mse", 2, 1.0),
            quality_cases.row("mse 3", "turboquant_mse", 3, 0.2),
            quality_cases.row("mse 4", "turboquant_mse", 4, 0.04),
            quality_cases.row(NASTY, "turboquant_prod", 3, 1.6),
            quality_cases.row("learned 3", "per_head", 3, 0.12, ci=None),
            quality_cases.row("new 3", "a_codec_of_tomorrow", 3, 0.11),
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
    assert len(drawings) == 4
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 40
        assert root.get("viewBox")
        assert root.get("width") is None
    assert "Lowest: mse 4, 0.04 nats" in drawings[0]


def test_both_themes(page):
    assert "prefers-color-scheme: dark" in page
    for marker in (pictures.INK, pictures._GRID):
        assert marker not in page
    assert page.count("var(--ink)") > 20
    assert "var(--grid)" in page.partition("</style>")[2]


def test_names_are_text_wherever_they_stand(page):
    assert "<script" not in page
    assert "<b>bold" not in page
    text = "".join(Page(page).text)
    assert NASTY in text
    assert text.count(NASTY) >= 2  # table, heat map
    assert text.count("alert(1)") >= 4  # and wrapped at the ends of lines: position, memory


def test_table_has_every_row_as_printed(full, page):
    cells = re.findall(r"<td>(.*?)</td>", page.partition("</table>")[0])
    rows = [quality.display(r) for r in full.rows]
    want = [row.get(name, "") for row in rows for name in rows[0]]  # one row has no interval
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
    drawn = pictures.error_heat_maps({"a": quality_cases.head_errors(1e-3)}, ["a"])
    assert drawn is not None
    group = drawn[drawn.index("heads-QuadMesh_1") :]
    colours = re.findall(r"fill: #([0-9a-f]{6})", group[: group.index("</g>\n   </g>")])
    assert len(colours) == 8  # 2 heads x 4 layers with a cache
    luminance = [int(c[:2], 16) + 2 * int(c[2:4], 16) for c in colours]
    head_0, head_1 = luminance[:4], luminance[4:]
    assert head_0 == sorted(head_0)
    assert head_1 == sorted(head_1)
    assert head_0[0] < head_1[0]


def test_heat_maps_show_every_plan_that_quantizes(full, page):
    """Seven rows, one of them exact: six rows of two panels, each named, and two colour bars."""
    heads = next(svg for svg in page.split("<svg")[1:] if "Heat maps of quantization" in svg)
    assert len(set(re.findall(r'id="heads-QuadMesh_(\d+)"', heads))) == 2 * 6 + 2
    assert "learned 3: layer" in heads
    assert "new 3: layer" in heads
    assert "exact bf16: layer" not in heads


def test_one_plan_does_not_flatten_the_others():
    """Errors of 1e-3 and 2e-3 beside 1: the scale ends at 4 times the median, and says so."""
    errors = {n: quality_cases.head_errors(x) for n, x in (("a", 1e-3), ("b", 2e-3), ("c", 1.0))}

    def contrast(names):
        """Between the least and the largest error of the first plan: luminance."""
        drawn = pictures.error_heat_maps(errors, names)
        assert drawn is not None
        group = drawn[drawn.index("heads-QuadMesh_1") :]
        found = re.findall(r"fill: #([0-9a-f]{6})", group[: group.index("</g>\n   </g>")])
        light = [int(c[:2], 16) + 2 * int(c[2:4], 16) for c in found]
        return max(light) - min(light)

    # Decades of the scale: 0.001 to 0.084, and to 4 * 0.084 (without an end: to 42).
    assert contrast(["a", "b", "c"]) > 0.6 * contrast(["a", "b"])


def test_headline_and_command(full):
    assert "Least KL: mse 4, 0.0400 nats per token at 4.25 bits per channel (4.00 times" in (
        report.render(full)
    )
    run = copy.deepcopy(full)
    run.run["command"] = "turboq evaluate --out='a b'"
    page = Page(report.render(run))
    assert "turboq evaluate \\\n  '--out=a b'" in page.text


def test_few_rows_still_make_a_page():
    only_exact = quality_cases.quality([quality_cases.row("exact", "exact", 16, 0.0)])
    page = report.render(only_exact)
    assert page.count("<svg") == 1  # nothing lossy to draw, memory only
    quality_without_errors = quality_cases.quality(
        [quality_cases.row("mse", "turboquant_mse", 3, 0.5)]
    )
    del quality_without_errors.table["head_errors"]
    assert report.render(quality_without_errors).count("<svg") == 3
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


@pytest.fixture(scope="module")
def two_texts():
    kl = {"noise": {"mse 3": 0.2, "mse 4": 0.03}, "<i>novel</i>": {"mse 3": 0.1, "mse 4": 0.05}}
    rows = [
        quality_cases.row(name, bits=int(name[-1]), kl=value, text=text)
        for text, found in kl.items()
        for name, value in found.items()
    ]
    return quality_cases.quality(rows, tuple(kl), tokens=2048)


def test_several_texts(two_texts):
    """Plans by texts with the worst marked, then every text; points are means over texts."""
    page = report.render(two_texts)
    cells = [c.strip() for c in re.findall(r"<td>(.*?)</td>", page)]
    assert cells[5:7] == ["0.2000*", "0.1000"]
    assert cells[12:14] == ["0.0300", "0.0500*"]
    assert "<i>" not in page
    assert "2 plans against" in page
    kl = re.search(r'aria-label="(Mean KL divergence against bits[^"]*)"', page)
    assert kl is not None
    assert "for 2 plans. Lowest: mse 4, 0.04 nats" in kl[1]
    position = re.search(r'aria-label="(Mean KL divergence against position[^"]*)"', page)
    assert position is not None
    assert "mse 3 on noise 0.1 to 0.3" in position[1]
    assert "mse 4 on &lt;i>novel&lt;/i> 0.025 to 0.075" in position[1]
    assert page.count("<h3>By position</h3>") == 2
    assert page.count("Step by step through the packed cache") == 2
    means = quality.over_texts(two_texts.rows)
    assert [(r["name"], r["kl_mean"]) for r in means] == [
        ("mse 3", pytest.approx(0.15)), ("mse 4", pytest.approx(0.04)),
    ]  # fmt: skip
    assert means[1]["kl_ci"] == [0.03, 0.05]


def test_lines_of_position_follow_the_buckets():
    """The line rises by the ratio of its buckets, and exact plans have none."""
    rows = [quality_cases.row("a", kl=0.1), quality_cases.row("exact", "exact", 16, 1e-5)]
    drawn = pictures.kl_against_position(rows, ["noise"])
    assert drawn is not None
    assert "exact" not in drawn
    path = re.search(
        r'<path d="M ([0-9.]+) ([0-9.]+) \nL ([0-9.]+) ([0-9.]+) \n"[^>]*stroke: #2f7fd1', drawn
    )
    assert path is not None
    x0, y0, x1, y1 = map(float, path.groups())
    assert x1 > x0
    assert y1 < y0  # SVG's y grows downwards
    one = [quality_cases.row("a")]
    one[0]["kl_by_position"] = one[0]["kl_by_position"][:1]
    assert pictures.kl_against_position(one, ["noise"]) is None


def test_pictures_fit_a_narrow_page(page):
    """At 400 pixels, 8 of them margin on each side, the smallest text is 9 pixels high or more."""
    assert "min-width" not in page.partition("</style>")[0].replace("(min-width", "")
    for drawing in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        box = re.search(r'viewBox="0 0 ([0-9.]+) ', drawing)
        assert box is not None
        sizes = [float(x) for x in re.findall(r"font(?:-size)?: (?:[0-9]+ )?([0-9.]+)px", drawing)]
        assert sizes
        assert min(sizes) * 384 / float(box[1]) >= 9


def test_tasks_are_a_table_and_a_picture(full, tmp_path):
    """The most sensitive task on top; what is at chance is named and not drawn."""
    found = quality_cases.task_results()
    page = report.render(full, tasks=found)
    label = re.search(r'aria-label="(Loss of log-probability by task[^"]*)"', page)
    assert label is not None
    assert label[1].endswith("Largest: a &amp; b needle 1, c needle 0.1 nats.")
    assert "-1.00 75 %" in page
    assert "<td>-1.00 (-2.00 .. +0.00)</td>" in page
    assert ">at 0.5</th>" in page
    assert ">all at 256</th>" in page
    assert "<td>1000 B</td>" in page
    assert "&lt;lots&gt;" in page.partition("counted for nothing")[2][:20]
    assert "<lots>" not in page
    for row in found["rows"]:
        row["logp_change"] = 0.0
    assert "which tasks tolerate" not in report.render(full, tasks=found).lower()


def test_plans_stand_at_all_that_they_hold():
    """Of equal bits a token, the plan with large tables stands further right."""

    def drawn(bits):
        rows = [quality_cases.row(name, kl=kl) for name, kl in (("small", 0.2), ("large", 0.1))]
        rows[1] |= {"bits_per_channel_at_context": bits, "codec": "transform"}
        page = pictures.kl_against_bits({"": rows})
        assert page is not None
        uses = re.findall(r'<use [^>]*x="([0-9.]+)" y="[^"]*" style="fill: (#[0-9a-f]+)', page)
        places = {colour: float(x) for x, colour in reversed(uses)}  # the first, not the legend's
        small, large = (places[pictures.family_styles(rows)[row["codec"]][0]] for row in rows)
        return page, large - small

    assert drawn(3.3)[1] == 0
    page, further = drawn(5.75)
    assert further > 100
    assert ">bits per channel at 4,096 tokens, everything counted</text>" in page
    assert "Lowest: large, 0.1 nats per token at 5.75 bits per channel" in page


def test_every_length_has_a_panel_of_kl_against_bits():
    """Nothing is averaged over lengths; texts of one length are."""
    texts = ("a at 600", "b at 600", "a at 2048")
    rows = [
        quality_cases.row("mse 3", kl=kl, text=text)
        for text, kl in zip(texts, (0.1, 0.3, 0.7), strict=True)
    ]
    found = quality_cases.quality(rows, texts)
    found.table["texts"][2]["window_tokens"] = 2048
    assert {
        title: [(row["kl_mean"], row["kl_ci"]) for row in each]
        for title, each in report.by_length(found).items()
    } == {
        "windows of 600 tokens": [(pytest.approx(0.2), [0.1, 0.3])],
        "windows of 2048 tokens": [(0.7, [0.7, 0.7])],
    }
    page = report.render(found)
    label = re.search(r'aria-label="(Mean KL divergence against bits[^"]*)"', page)
    assert label is not None
    assert "(windows of 600 tokens). Lowest: mse 3, 0.2 nats" in label[1]
    assert "(windows of 2048 tokens). Lowest: mse 3, 0.7 nats" in label[1]
    assert page.count(">windows of 2048 tokens</text>") == 1

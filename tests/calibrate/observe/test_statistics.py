"""Statistics: chunk reductions against float64, merging, counters that never freeze, files."""

import json

import numpy as np
import pytest
from stat_cases import side_of
from tolerances import TOL

from turboq.errors import TurboqError
from turboq.numbers.rope import Rope
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe import statistics_files as files

ROTARY = Rope(theta=1.0, dim=4, inv_freq=(1.0, 0.1))


def vectors(rng, b=3, t=200, heads=2, dim=12, common=0.0):
    """Correlated, heavy-tailed vectors with a common mean, float32."""
    x = rng.standard_t(4, (b, t, heads, dim)) @ rng.standard_normal((dim, dim))
    return (x + common * (1 + np.arange(dim))).astype(np.float32)


def slopes(rng, b=3, t=200, heads=2, dim=12):
    """Gradients of very different sizes, float32."""
    size = np.exp(2 * rng.standard_normal((b, t, heads, 1)))
    return (size * rng.standard_normal((b, t, heads, dim))).astype(np.float32)


def flat64(x):
    return x.reshape(-1, *x.shape[2:]).astype(np.float64)


@pytest.mark.parametrize("common", [0.0, 1e4])
def test_moments_equal_float64(rng, common):
    """The stated bound, element by element, with and without a mean 1e4 times the spread."""
    x = vectors(rng, common=common)
    y = flat64(x)
    side = side_of(x)
    shift = np.mean(y, axis=0)
    d = np.abs(y - shift)
    # The device's shift is not exactly the mean; the bound is about d, so allow for the difference.
    d = d + np.abs(shift) * TOL["float32_mean"]
    np.testing.assert_array_equal(side.count, [600, 600])
    bound = TOL["moments_block"] * d.sum(axis=0)
    rounding = TOL["float64"] * np.abs(y).sum(axis=0)
    assert np.all(np.abs(side.arrays["sum"] - y.sum(axis=0)) <= bound + rounding)
    exact = np.einsum("nhd,nhe->hde", y, y)
    bound = TOL["moments_block"] * np.einsum("nhd,nhe->hde", d, d)
    rounding = TOL["float64"] * np.einsum("nhd,nhe->hde", np.abs(y), np.abs(y))
    cross = np.abs(shift)[:, :, None] * (TOL["moments_block"] * d.sum(axis=0))[:, None, :]
    bound = bound + rounding + cross + cross.swapaxes(1, 2)
    assert np.all(np.abs(side.arrays["second"] - exact) <= bound)
    # And what users see: a covariance that a large mean did not destroy.
    centered = y - shift
    covariance = np.einsum("nhd,nhe->hde", centered, centered) / len(y)
    power = np.sqrt(np.einsum("hdd->hd", covariance))
    relative = np.abs(side.covariance - covariance) / (power[:, :, None] * power[:, None, :])
    assert relative.max() < TOL["covariance"]
    np.testing.assert_allclose(
        side.rms, np.sqrt(np.einsum("hdd->h", covariance) / 12), rtol=TOL["covariance"]
    )


def test_extremes_quantiles_and_norms_equal_float64(rng):
    x = vectors(rng)
    y, side = flat64(x), side_of(x)
    np.testing.assert_array_equal(side.absmax, np.abs(y).max(axis=0))
    slack = 1 + TOL["float64"]
    for q in (0.01, 0.5, 0.99):
        exact = np.quantile(y, q, axis=0, method="inverted_cdf")
        error = np.abs(side.quantile(q) - exact)
        assert np.all(error <= np.abs(exact) * st.CHANNEL_BINS.relative_error * slack)
        exact = np.quantile(np.linalg.norm(y, axis=2), q, axis=0, method="inverted_cdf")
        error = np.abs(side.norm_quantile(q) / exact - 1)
        # A norm rounds in float32, and may cross into the next bin.
        assert np.all(error <= st.NORM_BINS.relative_error + TOL["float32_norm"])


@pytest.mark.parametrize("common", [0.0, 1e4])
def test_gradient_sums_equal_float64(rng, common):
    """The stated bound with weights, and a weighted covariance that a large mean left alone."""
    x, g = vectors(rng, common=common), slopes(rng)
    y, w = flat64(x), np.sum(flat64(g) ** 2, axis=2, keepdims=True)
    side = side_of(x, g)
    slope = flat64(g)
    # Weights are rounded too, each to (D + 1) 2^-24 of itself: 13 of 262 blocks' roundings more.
    block = TOL["moments_block"] * (1 + 13 / 256)
    fisher = np.einsum("nhd,nhe->hde", slope, slope)
    bound = block * np.einsum("nhd,nhe->hde", np.abs(slope), np.abs(slope))
    assert np.all(np.abs(side.arrays["fisher"] - fisher) <= bound)
    np.testing.assert_allclose(side.arrays["energy"], w.sum(axis=(0, 2)), rtol=block)
    np.testing.assert_allclose(side.metric, side.arrays["fisher"] / 1200, rtol=TOL["float64"])
    total = w.sum(axis=0)
    mean = (w * y).sum(axis=0) / total
    centered = y - mean
    covariance = np.einsum("nh,nhd,nhe->hde", w[:, :, 0], centered, centered) / total[:, :, None]
    power = np.sqrt(np.einsum("hdd->hd", covariance))
    assert np.max(np.abs(side.weighted_mean - mean) / power) < TOL["weighted_mean"]
    error = np.abs(side.weighted_covariance - covariance) / (power[:, :, None] * power[:, None])
    assert error.max() < TOL["covariance"]
    # The files' own fields, where nothing cancels.
    second = np.einsum("nh,nhd,nhe->hde", w[:, :, 0], y, y)
    size = np.einsum("nh,nhd,nhe->hde", w[:, :, 0], np.abs(y), np.abs(y))
    assert np.all(np.abs(side.arrays["weighted_second"] - second) <= block * size)
    first = np.abs(side.arrays["weighted_sum"] - (w * y).sum(axis=0))
    assert np.all(first <= block * (w * np.abs(y)).sum(axis=0))


def test_a_head_without_gradients_has_its_plain_moments(rng):
    x, g = vectors(rng), slopes(rng)
    g[:, :, 1] = 0.0
    side = side_of(x, g)
    assert side.arrays["energy"][1] == 0.0
    np.testing.assert_array_equal(side.weighted_mean[1], side.mean[1])
    np.testing.assert_array_equal(side.weighted_covariance[1], side.covariance[1])
    assert np.all(side.weighted_covariance[0] != side.covariance[0])


def test_a_head_of_zeros(rng):
    x = vectors(rng)
    x[:, :, 1] = 0.0
    side = side_of(x)
    assert side.rms[1] == 0.0
    assert side.quantile(0.3)[1].tolist() == [0.0] * 12


def parts_of(rng, count=7):
    """Statistics of `count` chunks of different sizes and scales, and all their vectors."""
    chunks = [
        vectors(rng, b=1, t=20 + 3 * (i % 2), common=float(i)) * 10.0 ** (i % 3)
        for i in range(count)
    ]
    chunks = [c.astype(np.float32) for c in chunks]
    return [side_of(c, slopes(rng, 1, c.shape[1])) for c in chunks], chunks


def fold(parts, order):
    total = parts[order[0]]
    for i in order[1:]:
        total = st.merge_sides(total, parts[i])
    return total


def tree(parts, order):
    """Pairwise grouping."""
    parts = [parts[i] for i in order]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [st.merge_sides(b, a) for a, b in pairs] + parts[len(parts) & ~1 :]
    return parts[0]


def test_merging_does_not_depend_on_order_or_grouping(rng):
    parts, _ = parts_of(rng)
    reference = fold(parts, range(7))
    for trial in range(6):
        order = rng.permutation(7)
        other = fold(parts, order) if trial % 2 else tree(parts, order)
        for f in st.FIELDS:
            a, b = reference.arrays[f.name], other.arrays[f.name]
            if f.dtype == "float64" and f.reduce == "sum":
                size = sum(np.abs(p.arrays[f.name]) for p in parts)
                # Both orders are within (m - 1) 2^-53 sum|c| of the exact sum.
                assert np.all(np.abs(a - b) <= 2 * (7 - 1) * 2.0**-53 * size)
            else:
                np.testing.assert_array_equal(a, b)


def test_merged_chunks_are_the_whole(rng):
    parts, chunks = parts_of(rng)
    merged = fold(parts, range(7))
    y = np.concatenate([flat64(c) for c in chunks])
    assert merged.count.tolist() == [len(y)] * 2
    np.testing.assert_array_equal(merged.absmax, np.abs(y).max(axis=0))
    scale = np.abs(y).mean(axis=0)
    assert np.max(np.abs(merged.mean - y.mean(axis=0)) / scale) < TOL["covariance"]
    for name, per_head in (("channels", 12), ("norms", 1)):
        total = merged.arrays[name].reshape(2, -1).sum(axis=1)
        assert total.tolist() == [len(y) * per_head] * 2


def test_counters_do_not_freeze():
    """2^24 + 1 + 1 is where a float32 counter stops; 2^31 where an int32 one turns negative."""
    ones = np.ones((1, 1, 2, 12), np.float32)
    one = side_of(ones, ones)
    for start in (2**24, 2**31 - 1, 2**53):
        big = {
            f.name: np.full_like(one.arrays[f.name], start)
            if f.dtype == "int64"
            else one.arrays[f.name]
            for f in st.FIELDS
        }
        total = st.SideStatistics(arrays=big)
        for _ in range(3):
            total = st.merge_sides(total, one)
        for f in st.FIELDS:
            if f.dtype == "int64":
                added = total.arrays[f.name] - start
                np.testing.assert_array_equal(added, 3 * one.arrays[f.name], err_msg=f.name)
        assert total.count.dtype == np.int64


def test_unlike_parts_do_not_merge(rng):
    (a, b), _ = parts_of(rng, 2)
    with pytest.raises(TurboqError, match="'norms' is int64"):
        st.merge_arrays(a.arrays, b.arrays | {"norms": np.zeros((2, 3), np.int64)})
    with pytest.raises(TurboqError, match="fields"):
        st.merge_arrays(a.arrays, {k: v for k, v in b.arrays.items() if k != "norms"})


def layer_arrays(rng):
    """Arrays of all sides of a layer with RoPE."""
    side = side_of(vectors(rng), slopes(rng)).arrays
    return {s: {f.name: side[f.name] for f in st.fields_of(s)} for s in st.SIDES}


def test_files_round_trip(rng, tmp_path):
    sides = layer_arrays(rng)
    sides["k"] = sides["k"] | {"count": np.array([2**33, 5])}
    raw = files.to_bytes(sides)
    assert raw == files.to_bytes({s: dict(reversed(a.items())) for s, a in sides.items()})
    loaded = files.from_bytes(raw, tmp_path)
    for side, arrays in sides.items():
        for name, value in arrays.items():
            assert loaded[side][name].dtype == value.dtype, name
            np.testing.assert_array_equal(loaded[side][name], value)
    # Histograms of 600 vectors in 8 or 16 bits: int64 would take over three times this.
    wide = sum(a.nbytes for arrays in sides.values() for a in arrays.values())
    assert len(raw) < wide / 3


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], "uint8"),
        ([0, 256], "uint16"),
        ([0, 2**16], "uint32"),
        ([0, 2**32], "int64"),
        ([-1, 127], "int8"),
        ([-129, 0], "int16"),
        ([-1, 2**15], "int32"),
        ([-1, 2**31], "int64"),
    ],
)
def test_integers_are_stored_narrow(values, dtype):
    packed = files.narrow(np.array(values))
    assert packed.dtype == dtype
    assert packed.tolist() == values


def test_damaged_files_are_refused(rng, tmp_path):
    sides = layer_arrays(rng)
    with pytest.raises(TurboqError, match="damaged"):
        files.from_bytes(files.to_bytes(sides)[:100], tmp_path)
    with pytest.raises(TurboqError, match=r"unknown tensor 'k\.extra'"):
        files.from_bytes(files.to_bytes({"k": {"extra": np.zeros(1)}}), tmp_path)
    missing = sides | {"v": {k: v for k, v in sides["v"].items() if k != "norms"}}
    with pytest.raises(TurboqError, match="side v has fields"):
        files.layer_from_sides(missing, tmp_path, ROTARY)
    wrong = sides | {"q": sides["q"] | {"norms": np.zeros((2, 3), np.int64)}}
    with pytest.raises(TurboqError, match=r"q\.norms has shape \[2, 3\]"):
        files.layer_from_sides(wrong, tmp_path, ROTARY)
    with pytest.raises(TurboqError, match="side k_before in a layer without RoPE"):
        files.layer_from_sides(sides, tmp_path, None)


def test_missing_statistics_are_named(tmp_path):
    with pytest.raises(TurboqError, match="no finished statistics"):
        files.load_statistics(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(TurboqError, match=r"manifest\.json: not JSON: .*: run `turboq calibrate "):
        files.load_statistics(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(TurboqError, match="version: missing: run `turboq calibrate "):
        files.load_statistics(tmp_path)


def test_older_statistics_are_refused_with_the_command_that_makes_new_ones(tmp_path):
    fields = {"version": 1, "inputs": {}, "tokens": 0, "bins": {}, "layers": []}
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(TurboqError, match=r"version: 1, .* reads 2: run `turboq calibrate "):
        files.load_statistics(tmp_path)
    now = fields | {"version": st.VERSION, "windows": {}, "geometry": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(now))
    with pytest.raises(TurboqError, match=r"bins: counted over other bins: run `turboq calibrate "):
        files.load_statistics(tmp_path)

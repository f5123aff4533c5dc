"""The one way to name codecs: against codecs made by hand, llama.cpp's own rule and plain lists."""

import re
import subprocess
import sys

import pytest

from turboq import words
from turboq.codecs import (
    FP8,
    QJL,
    Exact,
    Ggml,
    KiviKey,
    KiviValue,
    TurboQuantMSE,
)
from turboq.codecs.ggml import mainline
from turboq.errors import TurboqError

D = 128
MSE = TurboQuantMSE(dim=D, bits=3)


@pytest.mark.parametrize(
    ("text", "label", "k", "v"),
    [
        ("exact", "exact", Exact(dim=D), Exact(dim=D)),
        ("FP16", "f16", Exact(dim=D, dtype="float16"), Exact(dim=D, dtype="float16")),
        ("q8_0", "q8_0", mainline(D, "k", "q8_0"), mainline(D, "v", "q8_0")),
        ("q8_0/iq4_nl", "q8_0/iq4_nl", mainline(D, "k", "q8_0"), mainline(D, "v", "iq4_nl")),
        ("ggml:q4_0", "ggml q4_0", Ggml(dim=D, type="q4_0"), Ggml(dim=D, type="q4_0")),
        ("ggml:type=q4_0", "ggml q4_0", Ggml(dim=D, type="q4_0"), Ggml(dim=D, type="q4_0")),
        ("turboquant_mse:3", "turboquant_mse 3b", MSE, MSE),
        ("mine=turboquant_mse:3/f16", "mine", MSE, Exact(dim=D, dtype="float16")),
        ("kivi:2", "kivi 2b", KiviKey(dim=D, bits=2), KiviValue(dim=D, bits=2)),
        (
            "fp8:e5m2:scale=head",
            "fp8 e5m2 scale=head",
            FP8(dim=D, format="e5m2", scale="head"),
            FP8(dim=D, format="e5m2", scale="head"),
        ),
        ("qjl:128", "qjl 128", QJL(dim=D, rows=128), QJL(dim=D, rows=128)),
    ],
)
def test_a_word_is_the_codec_made_by_hand(text, label, k, v):
    word = words.parse(text)
    assert (word.label, word.at()("k", D), word.at()("v", D)) == (label, k, v)


def test_a_model_that_llama_cpp_does_not_rotate_is_not_rotated():
    assert words.parse("q8_0").at(rotated=False)("k", D) == Ggml(dim=D, type="q8_0")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3bit", "did you mean turboquant_mse:3?"),
        ("tq4", "did you mean turboquant_mse:4?"),
        ("per_hed:3", "did you mean per_head"),
        ("q9_0", "did you mean q8_0"),
        ("zzz", "formats are f32, f16"),
        ("q8_0:3", "engine's format and takes no settings"),
        ("turboquant_mse:x", "bits='x' must be int"),
        ("turboquant_mse:3:bits=4", "sets bits twice"),
        ("turboquant_mse:bit=3", "'bit=3' is no setting of codec turboquant_mse: it takes bits="),
        ("int8_token_head:3", "it takes no settings"),
        ("a/b/c", "must name K and V as K/V"),
        ("exact/", "must name K and V as K/V"),
        ("nobody.codec:3", "is of package nobody: install it (pip install nobody)"),
    ],
)
def test_what_is_no_word_names_the_nearest(text, says):
    with pytest.raises(TurboqError) as error:
        words.parse(text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("turboquant_mse", "needs bits: turboquant_mse:3"),
        ("transform", "needs segments"),
        ("int8", "per_channel:8"),
        ("turboquant_3bit_nc", "turboq plan --engine=vllm"),
        ("turboquant_mse:9", "bits"),
    ],
)
def test_what_makes_no_codec_says_what_would(text, says):
    with pytest.raises(TurboqError) as error:
        words.parse(text).at()("k", D)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("entries", "items"),
    [
        (
            "exact,turboquant_mse:2,3,q8_0",
            ["exact", "turboquant_mse:2", "turboquant_mse:3", "q8_0"],
        ),
        (["f16", "q8_0/q4_0,kivi:2"], ["f16", "q8_0/q4_0", "kivi:2"]),
        ("fp8:scale=token,none,exact", ["fp8:scale=token", "fp8:scale=none", "exact"]),
        ("window:2,2.5, exact", ["window:2", "window:2.5", "exact"]),
        ("learned,mine=apart", ["learned", "mine=apart"]),
        ("mine=apart,learned", ["mine=apart", "learned"]),
        (["32", "64, 96"], ["32", "64", "96"]),
        ([], []),
    ],
)
def test_lists(entries, items, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "apart").mkdir()
    assert words.split(entries) == items


def test_a_path_with_a_comma_is_one_item(tmp_path):
    path = tmp_path / "a,b"
    path.mkdir()
    assert words.split([str(path), f"mine={path}"]) == [str(path), f"mine={path}"]
    (tmp_path / "a b").mkdir()
    assert words.split(f"mine={tmp_path / 'a b'},exact") == [f"mine={tmp_path / 'a b'}", "exact"]


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("f16,,q8_0", "empty item"),
        ("tq3 learned", "'tq3 learned' is no path: of several, commas stand between: tq3,learned"),
        ("exact,mine=tq3 q8_0", "commas stand between: tq3,q8_0"),
    ],
)
def test_what_is_no_list(entries, says):
    with pytest.raises(TurboqError, match=re.escape(says)):
        words.split(entries)


def test_a_list_longer_than_any_file_name():
    assert len(words.split(",".join(["turboquant_mse:3/exact"] * 400))) == 400


def test_formats_do_not_wait_for_jax():
    code = (
        "import sys; from turboq import words; words.split('f16,q8_0'); words.parse('q8_0/q4_0'); "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

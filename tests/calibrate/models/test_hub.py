"""Names of the hub: what is asked for, and what is said where there is no network."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from turboq.errors import TurboqError
from turboq_calibrate.cli import main as cli
from turboq_calibrate.models import hub, load_model

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "llama3"


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """A hub that holds tiny/llama3 and no network to any other."""
    calls = []

    def download(name, *, allow_patterns, ignore_patterns):
        calls.append((name, tuple(allow_patterns), tuple(ignore_patterns)))
        if name != "tiny/llama3":
            raise LocalEntryNotFoundError("no route\nto the hub")
        return str(GOLDEN)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_name_of_the_hub_is_its_folder(asked, capsys):
    assert load_model("tiny/llama3", resident=False).fingerprint == load_model(GOLDEN).fingerprint
    assert asked == [("tiny/llama3", hub.WEIGHTS, hub.COPIES)]
    assert cli.run(["memory", "--model=tiny/llama3"]) == 0
    assert cli.run(["inspect", "tiny/llama3"]) == 0
    assert asked[1:] == [("tiny/llama3", hub.CONFIG, hub.COPIES)] * 2  # no weights to count
    assert f"{GOLDEN}: model llama3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["memory", "--model=Qwen/Qwen3-0.6B"], ["inspect", "Qwen/Qwen3-0.6B"]]
)
def test_without_a_network_the_command_to_run_is_said(argv, asked, capsys):
    assert cli.run(argv) == 1
    err = capsys.readouterr().err
    assert "run `hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B`" in err
    assert "LocalEntryNotFoundError: no route)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", ["/no/where", "no/model.gguf", "a/b/c", "../x/y"])
def test_paths_are_not_asked_for(path, asked):
    assert hub.local(path) == path
    assert asked == []


def test_a_name_in_a_folder_that_is_here_is_a_path(asked, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TurboqError, match="model runs/mine does not exist"):
        load_model("runs/mine")
    assert asked == []


def test_inspect_reads_what_memory_reads(tmp_path, capsys):
    """A family that is counted and not run: 2 layers of a latent vector of 24 + 8 numbers."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "deepseek_v3", "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"kv_lora_rank": 24, "qk_rope_head_dim": 8, "hidden_size": 64}'
    )
    assert cli.run(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "(deepseek_v3), counted but not run: " in out
    assert "layers: 2 (2 latent)" in out
    assert f"{2 * 32 * 2} bytes for the first token" in out

"""A Hugging Face folder as a weight source: `config.json` and one or many `*.safetensors`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors hands out)
import numpy as np
import safetensors

from turboq.errors import TurboqError
from turboq_calibrate.models import params as P
from turboq_calibrate.models.config import model_spec, read_config
from turboq_calibrate.models.tokenizer import Tokenizer, from_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER_TENSORS = {
    "attn_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
EMBEDDING, NORM, UNEMBEDDING = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ROWS = 8192  # rows of the embedding read at a time
FLOATS = ("F32", "F16", "BF16", "F64")


class HFFolder:
    """Weight source of a Hugging Face folder. Headers are read at once, tensors on demand.

    Raises:
      TurboqError: unsupported configuration; a missing, truncated or misshapen tensor or file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.spec = model_spec(read_config(self.folder / "config.json"), self.folder.resolve().name)
        self._file_of = self._locate()
        self._check()

    @property
    def files(self) -> list[Path]:
        found = [self.folder / "config.json", *sorted(set(self._file_of.values()))]
        index = self.folder / INDEX
        return [*found, index] if self._sharded else found

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Float32 weights of one layer."""
        return self._read(
            {
                name: (f"model.layers.{index}.{LAYER_TENSORS[name]}", shape)
                for name, shape in P.layer_shapes(self.spec.layers[index]).items()
            }
        )

    def embed(self) -> dict[str, np.ndarray]:
        return self._read({"embedding": (EMBEDDING, (self.spec.vocab, self.spec.hidden))})

    def embed_rows(self, ids: np.ndarray) -> np.ndarray:
        """Float32 embeddings of some tokens only, [len(ids), M], read a block of rows at a time."""
        path, spec = self._file_of[EMBEDDING], self.spec
        out = np.empty((len(ids), spec.hidden), np.float32)
        with open_safetensors(path) as f:
            table = f.get_slice(EMBEDDING)
            for start in range(0, spec.vocab, ROWS):
                inside = (ids >= start) & (ids < start + ROWS)
                if inside.any():
                    block = table[start : min(start + ROWS, spec.vocab)]
                    out[inside] = _float32(block[ids[inside] - start])
        P.check_finite(EMBEDDING, out, path)
        return out

    def head(self) -> dict[str, np.ndarray]:
        name = EMBEDDING if self.spec.tied_embeddings else UNEMBEDDING
        shapes = P.head_shapes(self.spec)
        return self._read(
            {"norm": (NORM, shapes["norm"]), "unembedding": (name, shapes["unembedding"])}
        )

    def tokenizer(self) -> Tokenizer:
        return from_folder(self.folder)

    def _locate(self) -> dict[str, Path]:
        """Which file holds each tensor, from the index or the one file's header."""
        index = self.folder / INDEX
        self._sharded = index.is_file()
        if not self._sharded:
            single = self.folder / SINGLE
            if not single.is_file():
                raise TurboqError(f"{self.folder} has neither {SINGLE} nor {INDEX}")
            with open_safetensors(single) as f:
                return dict.fromkeys(f.keys(), single)
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            located = {str(name): self.folder / str(file) for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TurboqError(f"{index} is not a safetensors index: {error!r}") from error
        for name, path in located.items():
            if path.parent != self.folder:
                raise TurboqError(f"{index}: tensor {name} points outside the folder ({path})")
            if not path.is_file():
                raise TurboqError(f"{path} is missing; {INDEX} says it holds {name}")
        return located

    def _check(self) -> None:
        """Every tensor the decoder needs is there with its shape, and no tensor is left over."""
        spec = self.spec
        expected = {EMBEDDING: (spec.vocab, spec.hidden), NORM: (spec.hidden,)}
        if not spec.tied_embeddings:
            expected[UNEMBEDDING] = (spec.vocab, spec.hidden)
        for i, layer in enumerate(spec.layers):
            for name, shape in P.layer_shapes(layer).items():
                expected[f"model.layers.{i}.{LAYER_TENSORS[name]}"] = shape
        for name in expected:
            if name not in self._file_of:
                where = self.folder / (INDEX if self._sharded else SINGLE)
                raise TurboqError(f"{where}: tensor {name} is missing")
        for path in sorted(set(self._file_of.values())):
            with open_safetensors(path) as f:
                stored = set(f.keys())
                for name in sorted(n for n, p in self._file_of.items() if p == path):
                    if name not in stored:
                        raise TurboqError(f"{path}: tensor {name} is missing")
                    if name not in expected:
                        continue
                    info = f.get_slice(name)
                    P.check_shape(name, tuple(info.get_shape()), expected[name], path)
                    if info.get_dtype() not in FLOATS:
                        raise TurboqError(
                            f"{path}: tensor {name} has type {info.get_dtype()}, which is not "
                            f"supported (supported: {', '.join(FLOATS)})"
                        )
        # Rotary tables that old checkpoints carry, and a copy of a tied head, say nothing new.
        extra = sorted(n for n in self._file_of if n not in expected and not _redundant(n))
        if extra and not (spec.tied_embeddings and extra == [UNEMBEDDING]):
            raise TurboqError(
                f"{self._file_of[extra[0]]}: tensor {extra[0]} ({len(extra)} in all) has no place "
                f"in a {spec.family} decoder: the model has a part that is not supported"
            )

    def _read(self, wanted: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
        """Tensors by our names, float32; each file is opened once."""
        out = {}
        for path in sorted({self._file_of[name] for name, _ in wanted.values()}):
            with open_safetensors(path) as f:
                for ours, (name, shape) in wanted.items():
                    if self._file_of[name] != path:
                        continue
                    value = np.asarray(f.get_tensor(name))
                    P.check_shape(name, value.shape, shape, path)
                    value = _float32(value)
                    P.check_finite(name, value, path)
                    out[ours] = value
        return out


def open_safetensors(path: Path):
    """Opens a safetensors file; a bad header or a truncated file is one TurboqError."""
    try:
        return safetensors.safe_open(path, framework="numpy")
    except OSError as error:
        raise TurboqError(f"cannot read {path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise TurboqError(f"{path} is not a safetensors file or is truncated: {error}") from error


def _float32(value: np.ndarray) -> np.ndarray:
    """As float32; a float64 out of range becomes infinite, which the check after it reports."""
    with np.errstate(over="ignore"):
        return value.astype(np.float32, copy=False)


def _redundant(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")

"""A Hugging Face folder as a weight source: `config.json` and one or many `*.safetensors`."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors hands out)
import numpy as np
import safetensors

from turboq.errors import TurboqError, TurboqWarning, quoted, shortened
from turboq.hub_cache import model_name
from turboq.json_object import read_object
from turboq_calibrate.models import hf_fp8, hf_gpt_oss, hf_names, hf_stacked_experts
from turboq_calibrate.models import params as P
from turboq_calibrate.models.by_head import by_kind
from turboq_calibrate.models.config import keeps_weights, model_spec, read_config
from turboq_calibrate.models.config_fields import OTHER_WEIGHTS
from turboq_calibrate.models.families import WRAPPERS
from turboq_calibrate.models.tokenizer import Tokenizer, from_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROWS = 8192  # rows of the embedding read at a time
LONGEST_NAME = 200  # characters of a shard's name
FLOATS = ("F32", "F16", "BF16", "F64")


class HFFolder:
    """Weight source of a Hugging Face folder. Headers are read at once, tensors on demand.

    Raises:
      TurboqError: unsupported configuration; a missing, truncated or misshapen tensor or file.
    """

    def __init__(self, folder: str | os.PathLike[str], *, long_context: bool = False):
        self.folder = Path(folder)
        config = read_config(self.folder / "config.json")
        self.spec = model_spec(config, model_name(self.folder), long_context=long_context)
        self._fused = hf_names.FUSED.get(self.spec.family, ())
        quantized = config.get("quantization_config")
        self._cache_scales = keeps_weights(quantized)
        self._fp8 = hf_fp8.block_of(quantized, self.folder / "config.json")
        # config.py knows the method.
        self._packed = bool(quantized) and not self._cache_scales and self._fp8 is None
        drafting = self.spec.family in hf_names.DRAFTING_LAYERS
        self._drafts = config.get("num_nextn_predict_layers") if drafting else None
        self._file_of = locate(self.folder)
        self._part = config["model_type"] in WRAPPERS  # of a model that also sees
        prefix, self._head = hf_names.PREFIX, hf_names.HEAD
        if self._part:
            prefix = hf_names.part_prefix(self._file_of)
            self._head = hf_names.part_head(self._file_of)
        self.spec = dataclasses.replace(self.spec, prefix=prefix)
        self._embedding, self._norm = prefix + hf_names.EMBEDDING, prefix + hf_names.NORM
        self._norm_bias = prefix + hf_names.NORM_BIAS
        self._check()
        if self.spec.tied_embeddings and self._head_differs():
            self.spec = dataclasses.replace(self.spec, tied_embeddings=False)
            warnings.warn(
                f"{self.folder}: config.json ties the head to the embedding, but the file holds "
                f"another {self._head}: that is used, as by transformers",
                TurboqWarning,
                stacklevel=2,
            )

    @property
    def files(self) -> list[Path]:
        return weight_files(self.folder)

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Float32 weights of one layer but its experts'."""
        spec = self.spec.layers[index]
        names, shapes = self._layer_names(index), P.layer_shapes(spec)
        stored = P.fused_shapes(shapes, self._fused)
        read = self._read({name: (names[name], shape) for name, shape in stored.items()})
        return P.unfuse(by_kind(spec, read), shapes, self._fused)

    def _layer_names(self, index: int) -> dict[str, str]:
        names = hf_names.layer_names(self.spec.layers[index], self.spec.family)
        return {ours: f"{self.spec.prefix}layers.{index}.{name}" for ours, name in names.items()}

    def _expert_names(self, index: int, number: int) -> dict[str, str]:
        names = hf_names.expert_names(self.spec.family, number)
        return {ours: f"{self.spec.prefix}layers.{index}.{name}" for ours, name in names.items()}

    def experts(self, index: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Float32 weights of some experts of one layer, stacked."""
        shapes = P.expert_shapes(self.spec.layers[index])
        out = {name: np.empty((len(numbers), *s), np.float32) for name, s in shapes.items()}
        for row, number in enumerate(numbers):
            for name, value in self._expert(index, int(number), shapes).items():
                out[name][row] = value
        return out

    def _expert(self, index: int, number: int, shapes: P.Shapes) -> dict[str, np.ndarray]:
        gpt_oss = self.spec.family == "gpt_oss"
        if not gpt_oss and not self._stacked(index):
            names = self._expert_names(index, number)
            return self._read({name: (names[name], shape) for name, shape in shapes.items()})

        def read(name: str) -> np.ndarray:
            name = f"{self.spec.prefix}layers.{index}.{name}"
            with open_safetensors(self._file_of[name]) as f:
                value = f.get_slice(name)[number : number + 1][0]
            return value if value.dtype == np.uint8 else _float32(value)

        if gpt_oss:
            found = hf_gpt_oss.expert(read, packed=self._packed)
        else:
            found = hf_stacked_experts.expert(read, self.spec.family)
        for name, value in found.items():
            where = self.folder / f"layers.{index}.mlp.experts"
            P.check_finite(f"{name} of expert {number}", value, where)
        return found

    def _stacked(self, index: int) -> bool:
        """Whether a layer's experts are in two tensors."""
        gate_up, _ = hf_stacked_experts.names(self.spec.family)
        return f"{self.spec.prefix}layers.{index}.{gate_up}" in self._file_of

    def embed(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Float32 weights before the layers, or some of them."""
        shapes = P.embed_shapes(self.spec)
        wanted = shapes if names is None else names
        return self._read({name: (self._before(name), shapes[name]) for name in wanted})

    def _before(self, ours: str) -> str:
        """What the folder calls a weight before the layers."""
        if ours == "embedding":
            return self._embedding
        return self.spec.prefix + hf_names.INPUTS[ours]

    def embed_rows(self, ids: np.ndarray, name: str = "embedding") -> np.ndarray:
        """Float32 rows of some tokens only, [len(ids), M], read a block of rows at a time."""
        spec, stored = self.spec, self._before(name)
        path = self._file_of[stored]
        out = np.empty((len(ids), P.embed_shapes(spec)[name][1]), np.float32)
        with open_safetensors(path) as f:
            table = f.get_slice(stored)
            for start in range(0, spec.vocab, ROWS):
                inside = (ids >= start) & (ids < start + ROWS)
                if inside.any():
                    block = table[start : min(start + ROWS, spec.vocab)]
                    out[inside] = _float32(block[ids[inside] - start])
        P.check_finite(stored, out, path)
        return out

    def head(self) -> dict[str, np.ndarray]:
        name = self._embedding if self.spec.tied_embeddings else self._head
        names = {"norm": self._norm, "norm_bias": self._norm_bias, "unembedding": name}
        shapes = P.head_shapes(self.spec)
        return self._read({ours: (names[ours], shape) for ours, shape in shapes.items()})

    def tokenizer(self) -> Tokenizer:
        return from_folder(self.folder)

    def _check(self) -> None:
        """Every tensor the decoder needs is there with its shape, and no tensor is left over."""
        spec = self.spec
        kinds: dict[str, tuple[str, ...]] = {}  # of tensors that are not floats
        expected = {self._before(n): shape for n, shape in P.embed_shapes(spec).items()}
        expected[self._norm] = (spec.hidden,)
        if spec.norm == "layer":
            expected[self._norm_bias] = (spec.hidden,)
        if not spec.tied_embeddings or self._head in self._file_of:
            expected[self._head] = (spec.vocab, spec.hidden)
        for i, layer in enumerate(spec.layers):
            names = self._layer_names(i)
            stored = P.fused_shapes(P.layer_shapes(layer), self._fused)
            expected |= {names[ours]: shape for ours, shape in stored.items()}
            if spec.family == "gpt_oss":
                for name, (shape, types) in hf_gpt_oss.stored(layer, packed=self._packed).items():
                    whole = f"{spec.prefix}layers.{i}.{name}"
                    expected[whole] = shape
                    if types is not None:
                        kinds[whole] = types
                continue
            if layer.experts and self._stacked(i):
                stored = hf_stacked_experts.stored(layer, spec.family)
                expected |= {f"{spec.prefix}layers.{i}.{n}": shape for n, shape in stored.items()}
                continue
            for number in range(layer.experts.count if layer.experts else 0):
                names = self._expert_names(i, number)
                expected |= {names[ours]: s for ours, s in P.expert_shapes(layer).items()}
        if self._fp8 is not None:
            for name, shape in list(expected.items()):
                scales = hf_fp8.scales_name(name)
                if scales in self._file_of and len(shape) == 2:
                    expected[scales] = hf_fp8.scales_shape(shape, self._fp8)
                    kinds |= {name: (hf_fp8.TYPE,), scales: ("F32",)}
        for name in expected:
            if name not in self._file_of:
                index = self.folder / INDEX
                where = index if index.is_file() else self.folder / SINGLE
                raise TurboqError(f"{where}: tensor {name} is missing{self._hint(name)}")
        for path in sorted(set(self._file_of.values())):
            with open_safetensors(path) as f:
                stored = set(f.keys())
                for name in sorted(n for n, p in self._file_of.items() if p == path):
                    if name not in stored:
                        raise TurboqError(f"{path}: tensor {shortened(name)} is missing")
                    if name not in expected:
                        continue
                    info = f.get_slice(name)
                    P.check_shape(name, tuple(info.get_shape()), expected[name], path)
                    types = kinds.get(name, FLOATS)
                    if info.get_dtype() not in types:
                        raise self._type_error(path, name, info.get_dtype(), types)
        extra = sorted(n for n in self._file_of if n not in expected and not self._redundant(n))
        if extra:
            raise TurboqError(
                f"{self._file_of[extra[0]]}: tensor {shortened(extra[0])} ({len(extra)} in all) "
                f"has no place in a {spec.family} decoder: the model has a part that is not "
                "supported"
            )

    def _type_error(self, path: Path, name: str, given: str, types: Sequence[str]) -> TurboqError:
        said = f"{path}: tensor {name} has type {given}"
        if given != hf_fp8.TYPE:
            return TurboqError(
                f"{said}, which is not supported (supported: {', '.join(types)}): {OTHER_WEIGHTS}"
            )
        scales = hf_fp8.scales_name(name)
        why = f" without {scales}" if scales not in self._file_of else ""
        if self._fp8 is None:
            why = f", and config.json has no quantization_config of method {hf_fp8.METHOD}"
        return TurboqError(
            f"{said}{why}: FP8 weights are read with one scale for each block alone: "
            f"{OTHER_WEIGHTS}"
        )

    def _redundant(self, name: str) -> bool:
        """Rotary tables that old checkpoints carry; scales of the cache in an overlay for vLLM;
        layers that draft; caches' weights of layers that read another's; what belongs to other
        parts of a model that also sees."""
        drafts = self.spec.family in hf_names.DRAFTING
        layers = self.spec.prefix + "layers."
        number = name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else ""
        if isinstance(self._drafts, int) and number.isdecimal():
            drafted = int(number) - len(self.spec.layers)
            if 0 <= drafted < self._drafts:
                return True
        if number.isdecimal() and int(number) < len(self.spec.layers):
            own = name.removeprefix(f"{layers}{number}.")
            borrows = self.spec.layers[int(number)].borrows_cache_of is not None
            if borrows and own.startswith(hf_names.UNUSED_OF_BORROWERS):
                return True
        scales = (".self_attn.k_scale", ".self_attn.v_scale")
        return (
            name.endswith("rotary_emb.inv_freq")
            or (self._cache_scales and name.endswith(scales))
            or (drafts and name.startswith(hf_names.DRAFTS))
            or (self._part and name.startswith(hf_names.OTHER_PARTS))
        )

    def _hint(self, missing: str) -> str:
        """What else the file may mean, for the end of an error."""
        if missing == self._head:
            return (
                ": if the model's head is its embedding, config.json must say "
                '"tie_word_embeddings": true'
            )
        last = hf_names.EMBEDDING
        for name in self._file_of if missing == self._embedding else ():
            if name.endswith(last):
                prefix = shortened(name.removesuffix(last))
                return (
                    f": names begin with {prefix!r} here, not with 'model.', as where the decoder "
                    "is a part of another model: save the decoder by itself"
                )
        if missing == self._embedding:
            some = quoted(next(iter(self._file_of), None))
            return f": names of another library, such as {some}? convert it for transformers"
        return ""

    def _head_differs(self) -> bool:
        """Whether there is a head besides the embedding that it is said to be."""
        if self._head not in self._file_of:
            return False
        with (
            open_safetensors(self._file_of[self._embedding]) as one,
            open_safetensors(self._file_of[self._head]) as other,
        ):
            embedding, head = one.get_slice(self._embedding), other.get_slice(self._head)
            starts = range(0, self.spec.vocab, ROWS)
            blocks = [slice(i, min(i + ROWS, self.spec.vocab)) for i in starts]
            return any(
                not np.array_equal(_float32(embedding[rows]), _float32(head[rows]))
                for rows in blocks
            )

    def _read(self, wanted: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
        """Tensors by our names, float32; each file is opened once."""
        out = {}
        for path in sorted({self._file_of[name] for name, _ in wanted.values()}):
            with open_safetensors(path) as f:
                for ours, (name, shape) in wanted.items():
                    if self._file_of[name] != path:
                        continue
                    P.check_shape(name, tuple(f.get_slice(name).get_shape()), shape, path)
                    scales = self._scales(name, len(shape))
                    if scales is None:
                        value = _float32(np.asarray(f.get_tensor(name)))
                    else:
                        value = hf_fp8.scaled(hf_fp8.codes(path, name), *scales)
                    P.check_finite(name, value, path)
                    out[ours] = value
        return out

    def _scales(self, name: str, axes: int) -> tuple[np.ndarray, hf_fp8.Block] | None:
        """Scales of a matrix in FP8 and their blocks; None where it has none."""
        scales = hf_fp8.scales_name(name)
        if self._fp8 is None or scales not in self._file_of or axes != 2:
            return None
        with open_safetensors(self._file_of[scales]) as f:
            return np.asarray(f.get_tensor(scales)), self._fp8


def locate(folder: Path) -> dict[str, Path]:
    """Which file of a folder holds each tensor, from the index or the one file's header.

    Raises:
      TurboqError: no weights, a damaged index, or a shard that is missing.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / SINGLE
        if not single.is_file():
            raise TurboqError(f"{folder} has neither {SINGLE} nor {INDEX}")
        with open_safetensors(single) as f:
            return dict.fromkeys(f.keys(), single)
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise TurboqError(f"{index} is not a safetensors index: it has no weight_map")
    located = {}
    for name, file in names.items():
        located[name] = shard_path(folder, name, file)
        if not located[name].is_file():
            raise TurboqError(
                f"{located[name]} is missing; {INDEX} says it holds {shortened(name)}"
            )
    return located


def weight_files(folder: Path) -> list[Path]:
    """The configuration and all files of weights, the index included."""
    found = [folder / "config.json", *sorted(set(locate(folder).values()))]
    return [*found, folder / INDEX] if (folder / INDEX).is_file() else found


def shard_path(folder: Path, name: str, file: Any) -> Path:
    """Where an index says that a tensor is. Raises TurboqError for any place but the folder."""
    plain = isinstance(file, str) and Path(file).name == file and file.isprintable()
    if not plain or len(file) > LONGEST_NAME:
        raise TurboqError(
            f"{folder / INDEX}: tensor {shortened(name)} must be in a file of the same folder, not "
            f"in {quoted(file)}"
        )
    return folder / file


def open_safetensors(path: Path):
    """Opens a safetensors file; a bad header or a truncated file is one TurboqError."""
    try:
        return safetensors.safe_open(path, framework="numpy")
    except OSError as error:
        raise TurboqError(f"cannot read {path}: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise TurboqError(
            f"{path} is not a safetensors file or is truncated: {shortened(error)}"
        ) from error


def _float32(value: np.ndarray) -> np.ndarray:
    """As float32; a float64 out of range becomes infinite, which the check after it reports."""
    with np.errstate(over="ignore"):
        return value.astype(np.float32, copy=False)

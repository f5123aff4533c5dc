"""A GGUF file as a weight source: header, geometry, and tensors dequantised one at a time.

llama.cpp's converter stores llama-family Q and K rows with the two halves of each head interleaved
(its rotary kernel pairs neighbours); they are put back here, so every source looks the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np

from turboq.errors import TurboqError, quoted, shortened
from turboq_calibrate.models import gguf_latent, gguf_recurrent, gguf_split
from turboq_calibrate.models import params as P
from turboq_calibrate.models.by_head import by_kind
from turboq_calibrate.models.config_fields import nearest
from turboq_calibrate.models.gguf_architectures import ARCHITECTURES
from turboq_calibrate.models.gguf_names import (
    BEFORE,
    DIVISORS,
    EMBEDDING,
    FACTORS,
    HEAD,
    NORM,
    NORM_BIAS,
    SHARED_ROUTER,
    UNUSED_OF_BORROWERS,
    layer_name,
)
from turboq_calibrate.models.gguf_spec import Geometry
from turboq_calibrate.models.spec import LayerSpec

GATE_UP = "expert_gate_up"


class GGUFFile:
    """Weight source of one `.gguf` file, or of all parts of a split one, of which any may be given.
    Metadata is read at once, tensors on demand.

    Raises:
      TurboqError: unreadable, truncated, a part missing, or a model the decoder does not do.
    """

    def __init__(self, path: str | os.PathLike[str], *, long_context: bool = False):
        parts = gguf_split.read(Path(path))
        self.files = [part.path for part in parts]
        self.path, self.metadata = parts[0].path, parts[0].metadata
        self._data = [part.data for part in parts]
        self._tensors = {
            name: dataclasses.replace(info, part=number)
            for number, part in enumerate(parts)
            for name, info in part.tensors.items()
        }
        for name, info in self._tensors.items():
            if not isinstance(info.kind, gguf.GGMLQuantizationType):
                raise TurboqError(
                    f"{self.files[info.part]}: tensor {shortened(name)} has type {info.kind}, "
                    "which the gguf package does not know: install a newer gguf, or take a file of "
                    "another type"
                )
            if name.endswith(SHARED_ROUTER) and len(info.shape) == 1:  # one row
                self._tensors[name] = dataclasses.replace(info, shape=(1, *info.shape))
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise TurboqError(
                f"{self.path}: architecture {quoted(arch)} is not supported "
                f"({nearest(arch, ARCHITECTURES)}; `turboq memory` counts its cache, and `turboq "
                "calibrate --captured` plans its Hugging Face folder if transformers, of the extra "
                "hf, runs it)"
            )
        self._row = gguf_recurrent.as_stored(ARCHITECTURES[arch], self._tensors)
        self.spec = Geometry(
            path=self.path,
            row=self._row,
            metadata=self.metadata,
            tensors=self._tensors,
            read=self._read,
            long=long_context,
        ).spec()
        self._check_tensors()

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Float32 weights of one layer but its experts'."""
        spec = self.spec.layers[index]
        out = {}
        shapes = P.layer_shapes(spec)
        for name, shape in self._stored_shapes(spec).items():
            value = self._read(self._name(index, name), shape)
            if self._row.interleaved and name in ("q", "k", "q_bias", "k_bias"):
                heads = spec.heads if name[0] == "q" else spec.kv_heads
                value = unpermute(value, heads)
            out[name] = value
        out = gguf_latent.joined(spec, by_kind(spec, out))
        found = P.unfuse(out, shapes, self._row.fused)
        return gguf_recurrent.restored(spec, found, tiled=self._row.tiled, file=self.path)

    def _stored_shapes(self, spec: LayerSpec) -> P.Shapes:
        """Shapes of a layer's weights but its experts', as the file has them."""
        shapes = P.fused_shapes(P.layer_shapes(spec), self._row.fused)
        return gguf_recurrent.stored(spec, gguf_latent.apart(spec, shapes))

    def _name(self, index: int, ours: str) -> str:
        """What the file calls one of our weights."""
        return layer_name(self._row, index, ours)

    def experts(self, index: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Float32 matrices of some experts of one layer, stacked."""
        read = {
            name: self._read(self._name(index, name), shape, numbers)
            for name, shape in self._stacked(index).items()
        }
        if GATE_UP in read:
            gate, up = np.split(read.pop(GATE_UP), 2, axis=1)
            read |= {"expert_gate": gate, "expert_up": up}
        return read

    def _stacked(self, index: int) -> P.Shapes:
        """Shapes of all experts' matrices, as one tensor holds them."""
        layer = self.spec.layers[index]
        shapes, count = P.expert_shapes(layer), layer.experts.count if layer.experts else 0
        if self._name(index, GATE_UP) in self._tensors:
            shapes = P.fused_shapes(shapes, (GATE_UP,))
        return {name: (count, *shape) for name, shape in shapes.items()}

    def embed(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Float32 weights before the layers, or some of them."""
        shapes = P.embed_shapes(self.spec)
        return {name: self._read(BEFORE[name], shapes[name]) for name in names or shapes}

    def embed_rows(self, ids: np.ndarray, name: str = "embedding") -> np.ndarray:
        """Float32 rows of some tokens only, [len(ids), M]."""
        return self._read(BEFORE[name], P.embed_shapes(self.spec)[name], ids)

    def head(self) -> dict[str, np.ndarray]:
        name = EMBEDDING if self.spec.tied_embeddings else HEAD
        names = {"norm": NORM, "norm_bias": NORM_BIAS, "unembedding": name}
        shapes = P.head_shapes(self.spec)
        return {ours: self._read(names[ours], shape) for ours, shape in shapes.items()}

    def tokenizer(self):
        from turboq_calibrate.models.tokenizer import from_gguf

        return from_gguf(self.metadata, self.path)

    def _read(
        self, name: str, expected: tuple[int, ...], rows: np.ndarray | None = None
    ) -> np.ndarray:
        """A whole tensor, or some of its rows, dequantised and checked."""
        info = self._tensors[name]
        file = self.files[info.part]
        P.check_shape(name, info.shape, expected, file)
        stored = np.asarray(self._data[info.part][info.start : info.start + info.nbytes])
        assert isinstance(info.kind, gguf.GGMLQuantizationType)  # __init__ refuses others
        raw = stored.reshape(gguf.quants.quant_shape_to_byte_shape(info.shape, info.kind))
        if rows is not None:
            raw = raw[rows]
        try:
            value = gguf.quants.dequantize(raw, info.kind)
        except NotImplementedError:
            raise TurboqError(
                f"{file}: tensor {name} has type {info.kind.name}, which the gguf package "
                "cannot dequantise"
            ) from None
        # A float32 tensor comes back as a view of the mapped file: weights must not change with it.
        value = value.astype(np.float32, copy=np.may_share_memory(value, stored))
        value = value.reshape(expected if rows is None else (len(rows), *expected[1:]))
        P.check_finite(name, value, file)
        return value

    def _check_tensors(self) -> None:
        """Every tensor the decoder needs is there with its shape, and no tensor is left over."""
        spec = self.spec
        expected = {BEFORE[name]: shape for name, shape in P.embed_shapes(spec).items()}
        expected[NORM] = (spec.hidden,)
        if spec.norm == "layer":
            expected[NORM_BIAS] = (spec.hidden,)
        if not spec.tied_embeddings:
            expected[HEAD] = (spec.vocab, spec.hidden)
        for i, layer in enumerate(spec.layers):
            for name, shape in (self._stored_shapes(layer) | self._stacked(i)).items():
                expected[self._name(i, name)] = shape
        for name, shape in expected.items():
            if name not in self._tensors:
                raise TurboqError(f"{self.path}: tensor {name} is missing")
            info = self._tensors[name]
            P.check_shape(name, info.shape, shape, self.files[info.part])
        divisors = FACTORS if self._row.longrope else (DIVISORS,)
        blocks = self.metadata[f"{spec.family}.block_count"]
        drafts = tuple(f"blk.{i}." for i in range(len(spec.layers), blocks))
        unused = {
            f"blk.{i}.{name}"
            for i, layer in enumerate(spec.layers)
            for name in UNUSED_OF_BORROWERS
            if layer.borrows_cache_of is not None
        }
        extra = sorted(
            name
            for name in set(self._tensors) - set(expected) - set(divisors) - unused
            if not name.startswith(drafts)
        )
        if extra:
            file = self.files[self._tensors[extra[0]].part]
            raise TurboqError(
                f"{file}: tensor {shortened(extra[0])} ({len(extra)} in all) has no place in a "
                f"{spec.family} decoder: the model has a part that is not supported"
            )


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (pair, half) order back to (half, pair) order."""
    pairs = value.shape[0] // heads // 2
    return np.ascontiguousarray(
        value.reshape(heads, pairs, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    )

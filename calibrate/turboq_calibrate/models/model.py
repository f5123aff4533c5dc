"""Loads a model, resident or streamed one layer at a time, and runs it layer by layer."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.errors import TurboqError
from turboq.files import sha256_file
from turboq_calibrate.models import decoder, hub, stream
from turboq_calibrate.models.params import DTYPES, embed_shapes, layer_size
from turboq_calibrate.models.spec import ModelSpec
from turboq_calibrate.models.streamed_experts import Streamed, whole
from turboq_calibrate.models.tokenizer import Tokenizer


@runtime_checkable
class WeightSource(Protocol):
    """What a file format provides: geometry at once, weights on demand (float32, checked).

    `layer` leaves out experts; `experts` are those of some numbers, stacked; `embed` are weights
    before the layers (`params.embed_shapes`), `embed_rows` rows of one of their tables.
    """

    spec: ModelSpec

    @property
    def files(self) -> list[Path]: ...
    def layer(self, index: int) -> dict[str, np.ndarray]: ...
    def experts(self, index: int, numbers: np.ndarray) -> dict[str, np.ndarray]: ...
    def embed(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]: ...
    def embed_rows(self, ids: np.ndarray, name: str = "embedding") -> np.ndarray: ...
    def head(self) -> dict[str, np.ndarray]: ...
    def tokenizer(self) -> Tokenizer: ...


def fingerprint_of(files: list[Path]) -> str:
    """`Model.fingerprint` of its files."""
    digest = hashlib.sha256(b"turboq model 1\n")
    for path in sorted(files, key=lambda p: p.name):
        name = path.name if len(files) > 1 else path.suffix
        digest.update(f"{name} {path.stat().st_size} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


class Model:
    """A model's geometry, weights and tokenizer.

    `resident=True` reads all weights now and keeps them; `resident=False` re-reads each layer when
    it is asked for, so that the peak is about one layer, and of a mixture of experts one group of
    them (`streamed_experts`).
    """

    def __init__(self, source: WeightSource, *, dtype: str = "float32", resident: bool = True):
        if dtype not in DTYPES:
            raise TurboqError(f"{dtype=} must be one of {DTYPES}")
        self.source, self.dtype, self.resident = source, dtype, resident
        self.spec = source.spec
        self._layers: list[decoder.Params] | None = None
        if resident:
            self._head = self._convert(source.head())
            tied = {"embedding": self._head["unembedding"]} if self.spec.tied_embeddings else {}
            others = [name for name in embed_shapes(self.spec) if name not in tied]
            self._embed = tied | self._convert(source.embed(others))
            self._layers = [
                whole(spec, self._read_layer(i)) for i, spec in enumerate(self.spec.layers)
            ]

    def layer(self, index: int) -> decoder.Params:
        """Weights of layer `index`; of a streamed mixture of experts a `Streamed`."""
        return self._read_layer(index) if self._layers is None else self._layers[index]

    def _read_layer(self, index: int) -> decoder.Params:
        spec, weights = self.spec.layers[index], self._convert(self.source.layer(index))
        if spec.experts is None:
            return weights
        size = (layer_size(spec, 1) - layer_size(spec, 0)) * jnp.dtype(self.dtype).itemsize
        return Streamed(weights, lambda n: self._convert(self.source.experts(index, n)), size)

    def embed_params(self) -> decoder.Params:
        """Weights before the layers."""
        return self._embed if self.resident else self._convert(self.source.embed())

    def head_params(self) -> decoder.Params:
        """Weights after the layers."""
        return self._head if self.resident else self._convert(self.source.head())

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; read when first asked for.

        Raises:
          TurboqError: there is none, or it is of an unsupported kind.
        """
        return self.source.tokenizer()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over the input files: names (of shards), sizes and full contents.

        Inputs only, never derived floats, so it is the same on every machine and version.
        """
        return fingerprint_of(self.source.files)

    def _convert(self, weights: dict[str, np.ndarray]) -> decoder.Params:
        """To the kept type; each array is let go as soon as it is converted."""
        out: dict[str, Array] = {}
        for name in list(weights):
            w = weights.pop(name)
            if self.dtype == "float16" and np.abs(w).max() > np.finfo(np.float16).max:
                raise TurboqError(
                    f"weight {name} does not fit float16 (largest value {np.abs(w).max():.4g}): "
                    "use dtype bfloat16 or float32"
                )
            out[name] = jnp.asarray(w).astype(self.dtype)
        return out


def open_source(path: str | os.PathLike[str], *, long_context: bool = False) -> WeightSource:
    """The weight source at `path`: a Hugging Face folder, .gguf file or name of `hub.local`."""
    from turboq_calibrate.models.gguf_file import GGUFFile
    from turboq_calibrate.models.hf import HFFolder

    path = Path(hub.local(path))
    if path.is_dir():
        return HFFolder(path, long_context=long_context)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFFile(path, long_context=long_context)
    if path.exists():
        raise TurboqError(f"model {path} must be a Hugging Face folder or a .gguf file")
    raise TurboqError(f"model {path} does not exist")


def load_model(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    resident: bool = True,
    *,
    long_context: bool = False,
) -> Model:
    """Loads a model from a Hugging Face folder, a .gguf file, or the embedded default.

    Args:
      path: the folder or file, a name of the hub (ORG/NAME), "embedded" or "gemma3-270m".
      dtype: how weights are kept ("float32", "bfloat16", "float16"); arithmetic is float32.
      resident: keep all weights, or re-read one layer at a time.
      long_context: rotate by longrope's factors for sequences longer than the original context
        (Phi-3, Phi-4-mini), at all lengths; by default by those for shorter ones, up to there.

    Raises:
      TurboqError: unsupported family or field, missing, truncated, misshapen or non-finite weights.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> model.tokenizer.decode(model.tokenizer.encode("a cache of keys"))
      'a cache of keys'
    """
    source = open_source(path, long_context=long_context)
    return Model(source, dtype=dtype, resident=resident)


def forward(
    model: Model,
    tokens: Int[Array | np.ndarray, "B T"],
    attend: decoder.Attend = decoder.exact_attend,
    states: Sequence[Any] | None = None,
    *,
    positions: Int[Array | np.ndarray, "B T"] | None = None,
    donate: bool = False,
) -> tuple[Float[Array, "B T V"], list[Any]]:
    """Runs the whole model, one layer after another.

    Args:
      tokens: token ids.
      attend: the attention plug; exact causal attention by default.
      states: one per layer, handed to `attend` and returned as it leaves them.
      positions: of the tokens; 0, 1, 2, ... by default.
      donate: let the layers overwrite `states` in place (they must not be used again).

    Returns:
      Logits in nats and the states.
    """
    x = embed_tokens(model, tokens)
    if positions is None:
        where = decoder.default_positions(jnp.asarray(tokens))
    else:
        where = jnp.asarray(positions, jnp.int32)
    states = list[Any]([None] * len(model.spec.layers)) if states is None else list(states)
    if len(states) != len(model.spec.layers):
        raise ValueError(f"{len(states)=} must be the number of layers, {len(model.spec.layers)}")
    for i, spec in enumerate(model.spec.layers):
        x, states[i] = decoder.run_layer(
            spec, model.layer(i), x, where, attend, states[i], donate=donate
        )
    return cast(Array, decoder.run_head(model.spec, model.head_params(), x)), states


def embed_tokens(model: Model, tokens: Int[Array | np.ndarray, "B T"]) -> Float[Array, "B T Z"]:
    """What enters the first layer, of checked token ids: the embeddings, and of some families more
    (`models.stream`). A streamed model reads only the rows it needs.

    Raises:
      TurboqError: an id outside the vocabulary (a gather would clamp it silently).
    """
    if isinstance(tokens, jax.core.Tracer):
        return decoder.embed(model.spec, model.embed_params(), tokens.astype(jnp.int32))
    ids = np.asarray(tokens, np.int32)
    if ids.size and not (ids.min() >= 0 and ids.max() < model.spec.vocab):
        raise TurboqError(
            f"token ids {ids.min()}..{ids.max()} must be within 0..{model.spec.vocab - 1}"
        )
    if model.resident:
        return cast(Array, decoder.run_embed(model.spec, model.embed_params(), jnp.asarray(ids)))
    used, where = np.unique(ids, return_inverse=True)
    at = jnp.asarray(where.reshape(ids.shape))

    def rows(name: str) -> Array:
        return jnp.asarray(model.source.embed_rows(used, name)).astype(model.dtype)[at]

    x = decoder.scaled(model.spec, rows("embedding"))
    if not model.spec.own_input:
        return stream.begin(model.spec, {}, x, None)
    small = model.source.embed(["input_projection", "input_norm"])
    weights = {name: jnp.asarray(w).astype(model.dtype) for name, w in small.items()}
    return stream.begin(model.spec, weights, x, rows("layer_embedding"))

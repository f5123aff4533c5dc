"""The codecs of turboq as adapters, truly packed: one small table says at which settings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from turboq import words
from turboq.codecs import CODECS, Arrays, Codec, from_config, outliers
from turboq.codecs.observed import Observed
from turboq.conformance import checks_error
from turboq.conformance.adapters import Claims
from turboq.numbers import codebook as codebooks
from turboq.numbers import packing

DIM = 128  # at which a word's settings are checked first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A codec's choices (`config`, without dim) and what it claims.

    `claims` are those that differ from the defaults; bits_per_channel is the codec's own count.
    A function among the values of either is called with dim.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    claims: dict[str, Any] = dataclasses.field(default_factory=dict)


def _scalar(rule: str, **config: Any) -> Setting:
    """Of the TurboQuant family, with the closed form of its rule."""
    claims = {"scale_rule": rule, "unbiased": rule not in ("raw", "matched", "least_squares")}
    return Setting(config=config, claims=claims)


def _format(*, static: bool = False, **config: Any) -> Setting:
    """Of a format whose error depends on the direction of x (no random rotation, no closed form).

    `static`: a fitted scale, so the norm matters too and NaN cannot show.
    """
    claims = {"direction_free": False}
    if static:
        claims |= {"scale_free": False, "nan_visible": False}
    return Setting(config=config, claims=claims)


def _rotated(**config: Any) -> Setting:
    """Of a code behind a random rotation, with no closed form here."""
    return Setting(config=config)


def _runs(dim: int) -> tuple[tuple[int, int], ...]:
    """Half of the coordinates (in whole bytes) at 4 bits, the rest at 3."""
    first = dim // 16 * 8
    return ((first, 4), (dim - first, 3))


def _outliers(high: int, low: int) -> Setting:
    """The paper's two tiers; on iid channels the error is the mean of both, by channels."""

    def error(dim: int) -> float:
        split = outliers.TurboQuantOutliers(dim=dim, bits=low, outlier_bits=high).split
        tiers = ((split, high), (dim - split, low))
        return (
            sum(
                d * codebooks.distortion("sphere", codebooks.lloyd_max("sphere", b, d), d)
                for d, b in tiers
            )
            / dim
        )

    return Setting(config={"bits": low, "outlier_bits": high}, claims={"error": error})


def _qjl(sketches: int) -> Callable[[int], float]:
    """E|x - x_hat|^2 of stacked independent orthogonal sketches: that of one, over their number."""
    return lambda dim: checks_error.sketch_error("orthogonal_sketch", 1.0, dim) / sketches


# Registered name -> settings. The first is the one that `--quick` takes. A test fails while a
# registered codec is missing here.
SETTINGS: dict[str, list[Setting]] = {
    "exact": [_format(dtype=t) for t in ("bfloat16", "float16", "float32")],
    "turboquant_mse": [
        *(_scalar("raw", bits=b) for b in (3, 2, 4, 1, 8)),
        _scalar("raw", bits=3, rotation="haar"),
        _scalar("raw", bits=2, mean=True),
        *(_scalar(rule, bits=3, scale_rule=rule) for rule in ("matched", "unbiased")),
        _scalar("least_squares", bits=4, scale_rule="least_squares"),
    ],
    "turboquant_prod": [
        *(_scalar("gaussian_sketch", bits=b) for b in (3, 2, 4)),
        *(_scalar("orthogonal_sketch", bits=b, sketch="orthogonal") for b in (3, 1)),
    ],
    "per_head": [
        _scalar("raw", bits=3),
        _scalar("unbiased", bits=4, scale_rule="unbiased"),
        _format(static=True, bits=3, scale="head"),
    ],
    "turboquant_outliers": [_outliers(3, 2), _outliers(4, 3)],
    "ggml": [
        *(_format(type=t) for t in ("q4_0", "q8_0", "q5_0", "q5_1", "q4_1", "iq4_nl", "f16")),
        _format(type="q4_0", rotation="walsh"),
        *(_rotated(type=t, rotation="hadamard") for t in ("q4_0", "iq4_nl")),
    ],
    "fp8": [
        *(_format(format=f) for f in ("e4m3", "e5m2")),
        _format(static=True, scale="head"),
        _format(static=True, scale="none"),  # saturates, infinity included
    ],
    "nvfp4": [_format(static=True)],
    "int8_token_head": [_format()],
    "int4_token_head": [_format()],  # vectors with all y of one sign lose range
    "vllm_turboquant_key": [_format(bits=b) for b in (3, 4)],
    "vllm_turboquant_value": [_format(bits=b) for b in (3, 4)],
    "int_affine": [
        *(_rotated(bits=b) for b in (4, 3, 2)),
        _format(bits=4, rotation="walsh"),
    ],
    "kivi_key": [_format(bits=2), _format(bits=4, group=128)],
    "kivi_value": [_format(bits=2), _format(bits=4, group=64)],
    "kvarn": [_format(bits=2), _format(bits=4, axis="token")],
    "oscar": [_format()],
    "nuq": [_format(static=True, bits=b) for b in (3, 2)],
    "per_channel": [
        _format(static=True, bits=8),
        _format(static=True, bits=4, form="affine"),
    ],
    "tcq": [
        *(_rotated(bits=b) for b in (3, 2, 4, 1)),
        *(_rotated(bits=2, states=s) for s in (4, 16, 256)),
    ],
    "transform": [
        *(_format(static=True, segments=_runs, quantizer=q) for q in ("scalar", "trellis")),
        _format(static=True, segments=_runs, quantizer="window", states=64),
        # As `turboq plan --budget` stores keys and values by default.
        _format(static=True, segments=_runs, quantizer="window", states=64, gain="code"),
        _format(segments=_runs, gain="float16"),
        _format(static=True, segments=_runs, gain="code", codebook="fitted"),
    ],
    "rope_block": [
        _format(segments=_runs, gain="float16"),
        _format(static=True, segments=_runs, layout="interleaved"),
    ],
    "hadamard_per_head": [
        *(_scalar(rule, bits=b, scale_rule=rule) for rule, b in (("raw", 3), ("unbiased", 4))),
        _format(static=True, bits=3, scale="head"),
    ],
    "e8": [_rotated()],
    "polarquant": [_rotated()],
    "qjl": [
        Setting(
            config={"rows": lambda dim, r=r: r * dim}, claims={"unbiased": True, "error": _qjl(r)}
        )
        for r in (1, 2)
    ],
}


class CodecAdapter:
    """One codec with its fitted arrays; stored as the cache stores it."""

    def __init__(self, codec: Codec, arrays: dict[str, np.ndarray], claims: dict[str, Any]):
        self.codec = codec
        self.dim = codec.dim
        self.bits = getattr(codec, "bits", 0)
        self.claims = Claims(bits_per_channel=codec.bits_per_channel, **claims)
        self.arrays: Arrays = {k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()}
        table = arrays.get("codebook", codec.tables.get("codebook"))
        if table is not None and self.claims.scale_rule is not None:
            self.codebook = table  # of the TurboQuant family: at unit variance

    def quantize(self, x: np.ndarray | jax.Array) -> Any:
        return _quantize(self.codec, self.arrays, jnp.asarray(x, jnp.float32))

    def dequantize(self, codes: Any) -> np.ndarray:
        return np.asarray(self.decoded(codes))

    def decoded(self, codes: Any) -> jax.Array:
        """x_hat where it was computed, not yet copied to NumPy."""
        return _dequantize(self.codec, self.arrays, codes)

    def inner_product(self, q: np.ndarray, codes: Any) -> np.ndarray:
        return np.asarray(_scores(self.codec, self.arrays, jnp.asarray(q, jnp.float32), codes))

    def nbytes(self, codes: Any) -> int:
        return sum(values.nbytes for values in codes.values())


def adapters(
    dims: Sequence[int], names: Sequence[str] | None = None, *, quick: bool = False
) -> dict[str, CodecAdapter]:
    """Adapters of the table's settings at each dim (all names, or only those given).

    Another package's codec is named as in a command (`turboq.words`: my_codecs.sign:3).

    Raises:
      TurboqError: unknown name, or a setting that the codec does not take.
    """
    made = {}
    for name in SETTINGS if names is None else names:
        settings = SETTINGS.get(name) or [_named(name)]
        for setting in settings[: 1 if quick else None]:
            for dim in dims:
                adapter = make(name.partition(":")[0], setting, dim)
                made[title(adapter.codec)] = adapter
    return made


def _named(word: str) -> Setting:
    """Of a codec that the table does not have: what the word says and the class claims."""
    side = words.side(word)
    cls, config = CODECS[side.name], side.codec("k", DIM).config()
    chosen = {field: config[field] for field, _ in side.settings}
    return Setting(config=chosen, claims={"direction_free": False} | dict(cls.claims))


def make(name: str, setting: Setting, dim: int) -> CodecAdapter:
    """One adapter; arrays are fitted on Gaussian samples other than those that are measured."""
    codec = from_config({"codec": name, "dim": dim} | _at(setting.config, dim))
    samples = np.random.default_rng(7).standard_normal((1, 8192, dim)).astype(np.float32)
    seen = Observed.of(samples)
    arrays = {name: np.asarray(values[0]) for name, values in codec.fit(seen).items()}
    if "mean" in arrays:
        # Of the source, not of the samples: the claims are about vectors that have no mean.
        arrays["mean"] = np.zeros_like(arrays["mean"])
    return CodecAdapter(codec, arrays, _at(setting.claims, dim))


def _at(values: dict[str, Any], dim: int) -> dict[str, Any]:
    return {k: v(dim) if callable(v) else v for k, v in values.items()}


def title(codec: Codec) -> str:
    """Name, D and what differs from the codec's defaults."""
    parts = [f"{codec.name} D={codec.dim}"]
    for field in dataclasses.fields(codec):
        value = getattr(codec, field.name)
        if field.name != "dim" and value != field.default:
            parts.append(f"{field.name}={value}")
    return " ".join(parts)


@functools.partial(jax.jit, static_argnums=0)
def _quantize(codec: Codec, arrays: Arrays, x: jax.Array) -> dict[str, jax.Array]:
    stored = codec.encode(arrays, x)
    return {
        f.name: packing.pack(stored[f.name], f.bits) if f.packed else stored[f.name]
        for f in codec.fields
    }


def _unpacked(codec: Codec, words: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {
        f.name: packing.unpack(words[f.name]) if f.packed else words[f.name] for f in codec.fields
    }


@functools.partial(jax.jit, static_argnums=0)
def _dequantize(codec: Codec, arrays: Arrays, words: dict[str, jax.Array]) -> jax.Array:
    return codec.decode(arrays, _unpacked(codec, words))


@functools.partial(jax.jit, static_argnums=0)
def _scores(codec: Codec, arrays: Arrays, q: jax.Array, words: dict[str, jax.Array]) -> jax.Array:
    return codec.logits(arrays, codec.fold_query(arrays, q), _unpacked(codec, words))

"""The codec contract: how one head's vectors are stored, read and scored.

A codec is a frozen, hashable description (what was chosen) plus a dict of fitted arrays (what was
learned). Its methods are pure functions of *one* head's arrays; many heads are one `jax.vmap` over
a leading axis of both, so adding a codec never means writing a loop over heads.

    x --encode--> {field: array} --packing--> words        (numbers.packing knows the bit layout)
    logits(fold_query(q), fields)           ~=  q . x       keys are never decoded
    unfold_output(accumulate(p, fields), mass)  ~=  p @ x   values are never decoded
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from turboq.codecs.bit_form import BitForm, of_reading
from turboq.codecs.observed import Observed
from turboq.codecs.reading import Reading
from turboq.codecs.writing import WriteTables, Writing
from turboq.errors import TurboqError

Arrays = dict[str, Array]  # fitted arrays of one head (or of K heads, with a leading K axis)
Stored = dict[str, Array]  # what is stored: field name -> [..., S, width]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One stored array: `width` entries per vector, `bits` stored bits per entry.

    With `per_block` the entries belong to a block of `Codec.block` tokens, not to each vector.

    `dtype == "codes"`: unsigned codes below 2**bits, uint8 in memory until `numbers.packing` turns
    them into exactly `bits` bits each. Otherwise `dtype` is the NumPy name the entries keep in the
    cache ("float16", "bfloat16", "float32") and `bits` is its width.
    """

    name: str
    width: int
    bits: int
    dtype: str
    per_block: bool = False

    def __post_init__(self):
        if self.per_block and self.packed:
            raise ValueError(
                f"field {self.name!r}: packed codes are per token, not {self.per_block=}"
            )

    @property
    def packed(self) -> bool:
        return self.dtype == "codes"

    @property
    def bits_per_row(self) -> int:
        """Stored bits of one row of entries."""
        return self.width * self.bits


def stack(heads: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of single heads with a leading head axis."""
    return {name: np.stack([h[name] for h in heads]) for name in heads[0]}


def _with_arrays(method: Callable[..., Any]) -> Callable[..., Any]:
    """A codec's method that names fitted arrays which it was not given."""

    @functools.wraps(method)
    def checked(self: Codec, arrays: Mapping[str, Any], *rest: Any, **named: Any) -> Any:
        if missing := [name for name in self.array_shapes if name not in arrays]:
            raise TurboqError(
                f"codec {self.name!r} is fitted and lacks its arrays {', '.join(missing)}: give "
                "one head's of what codec.fit returns"
            )
        return method(self, arrays, *rest, **named)

    return checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(abc.ABC):
    """Base of all codecs: how one head's vectors x [n, D] are stored, read and scored.

    Subclasses are frozen dataclasses registered in `turboq.CODECS`: state `fields`, write `encode`,
    `decode`, `fold_query`, `logits`, `accumulate` and `unfold_output`, each for one head. Units of
    x throughout; bits per channel are all stored bits of a vector over `dim`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from turboq import Codec, TurboQuantMSE
      >>> codec: Codec = TurboQuantMSE(dim=64, bits=3)
      >>> stored = codec.encode({}, jnp.ones((5, 64)))
      >>> {name: entries.shape for name, entries in stored.items()}
      {'codes': (5, 64), 'scale': (5, 1)}
      >>> codec.bits_per_vector, codec.bits_per_channel
      (208, 3.25)
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    # What `fit` reads: some of `turboq.codecs.observed.PARTS`.
    needs: ClassVar[tuple[str, ...]] = ()
    # What `python -m turboq.conformance` holds another package's codec to (`adapters.Claims`).
    claims: ClassVar[Mapping[str, Any]] = {}

    dim: int

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for name in ("encode", "decode", "fold_query"):
            if name in cls.__dict__:
                setattr(cls, name, _with_arrays(cls.__dict__[name]))

    @property
    def block(self) -> int:
        """Tokens that are encoded together (a divisor of 256); 1 for a vector-by-vector codec.

        A codec with a larger block sees whole blocks only: S of `encode` is a multiple of it, and
        per-block fields are [*n, S / block, width]. Its newest tokens stay exact until their block
        is complete.
        """
        return 1

    @property
    @abc.abstractmethod
    def fields(self) -> tuple[Field, ...]:
        """What is stored per vector."""

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fitted arrays of one head (all float32); empty for a data-free codec."""
        return {}

    @property
    def calibrated(self) -> bool:
        """Whether `fit` has something to learn."""
        return bool(self.array_shapes)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Constants that follow from the description alone (rotation, codebook), for exporters."""
        return {}

    @property
    def fewest_tokens(self) -> int:
        """Tokens below which `fit` refuses: what it would learn is noise."""
        return 8

    def fit(self, seen: Observed) -> dict[str, np.ndarray]:
        """Arrays [K, ...] of all KV heads, float32, by name as in `array_shapes`; {} if data-free.

        Deterministic, and each head by itself unless the codec shares an array between heads.

        Raises:
          TurboqError: `seen` is of another dim, too few tokens, or lacks what the codec needs.
        """
        if not self.array_shapes:
            return {}
        if seen.dim != self.dim:
            raise TurboqError(f"codec {self.name!r} has {self.dim=}, but vectors have {seen.dim}")
        seen.require(self.needs, f"codec {self.name!r}", fewest=self.fewest_tokens)
        fitted = self._fit(seen)
        return {name: np.asarray(fitted[name], np.float32) for name in self.array_shapes}

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        """The arrays of `fit`, in any precision; `seen` has been checked."""
        raise NotImplementedError(f"codec {self.name!r} has array_shapes and must have a _fit")

    @abc.abstractmethod
    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        """Stored fields of `x`: field -> [*n, width]."""

    def finite(self, stored: Stored) -> Bool[Array, "*n"]:
        """Which vectors are stored without Inf or NaN, from their fields [*n, width].

        A per-block field says it of all tokens of its block. Override where codes are floats.
        """
        found: list[Bool[Array, "*n"]] = []
        for field in self.fields:
            if not field.packed:
                rows = jnp.all(jnp.isfinite(stored[field.name]), axis=-1)
                found.append(jnp.repeat(rows, self.block, axis=-1) if field.per_block else rows)
        if not found:
            return jnp.ones(stored[self.fields[0].name].shape[:-1], bool)
        return functools.reduce(jnp.logical_and, found)

    @abc.abstractmethod
    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        """Reconstruction in float32."""

    @abc.abstractmethod
    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        """Move everything linear (rotation, mean) from the keys into the query, once per query.

        The result may hold several arrays, all with leading axis T; a codec that removes a mean
        keeps q . mean here and `logits` adds it back, so logits are always true logits.
        """

    @abc.abstractmethod
    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        """q . x_hat (offset included) for every stored vector, from unpacked fields."""

    @abc.abstractmethod
    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        """Weighted sum of stored values in code space (before the inverse transform)."""

    @abc.abstractmethod
    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        """Code-space sum -> output: inverse transform once, plus `mass` times the removed mean.

        `mass` is the probability that the weights put on *stored* tokens (exact tokens keep their
        mean, so it is below one when sinks or a recent window exist).
        """

    @property
    def reading(self) -> Reading | None:
        """How a kernel reads the stored words; None: only this codec's own methods can."""
        return None

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        """Levels of every part of `reading` for one head, float32 (`turboq.codecs.reading`).

        [2**bits] ascending for a part of kind "table"; for other kinds one static gain, [1].

        Raises:
          TurboqError: the codec has no `reading`.
        """
        raise TurboqError(f"codec {self.name!r} as configured has no reading for kernels")

    def reading_query(
        self, arrays: Arrays, q: Float[Array, "T D"]
    ) -> tuple[Float[Array, "T C"], Float[Array, "T"] | None]:
        """The folded query in the coordinates of `reading`, and its offset (None: zero)."""
        folded = self.fold_query(arrays, q)
        return folded["q"], folded.get("offset")

    def bit_form(self, arrays: Arrays) -> BitForm | None:
        """How one head's x_hat is linear in the stored bits; None: it is not."""
        return of_reading(self, arrays)

    def row_values(
        self, arrays: Arrays, name: str, entries: Shaped[Array, "*n"]
    ) -> Float[Array, "*n"]:
        """Scales or offsets [*n] in float32 from the entries [*n] of the field `name`."""
        return entries.astype(np.float32)

    @property
    def writing(self) -> Writing | None:
        """How a kernel encodes; None: only `encode` can."""
        return None

    def write_tables(self, arrays: Arrays) -> WriteTables:
        """The arrays of `writing` for one head, float32 (`turboq.codecs.writing`).

        Raises:
          TurboqError: the codec has no `writing`.
        """
        raise TurboqError(f"codec {self.name!r} as configured has no writing for kernels")

    @property
    def bits_per_vector(self) -> int:
        """Stored bits of one vector, its part of the per-block fields included."""
        per_block = sum(f.bits_per_row for f in self.fields if f.per_block)
        if per_block % self.block:
            raise ValueError(f"{per_block=} bits must be a multiple of {self.block=} tokens")
        return sum(f.bits_per_row for f in self.fields if not f.per_block) + per_block // self.block

    @property
    def bits_per_channel(self) -> float:
        """Every stored bit of one vector, codes and scales, over `dim`."""
        return self.bits_per_vector / self.dim

    def config(self) -> dict[str, Any]:
        """JSON-ready description; `turboq.codecs.from_config` is its inverse.

        Fields that came later (`optional`) are left out at their defaults.
        """
        found = {"codec": self.name} | dataclasses.asdict(self)
        later = (f for f in dataclasses.fields(self) if f.metadata.get("optional"))
        for field in later:
            if found[field.name] == field.default:
                del found[field.name]
        return found

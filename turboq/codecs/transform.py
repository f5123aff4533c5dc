"""Calibrated transform code: no mean, a fitted basis, bits by coordinate, little or no norm."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.bit_form import BitForm, BitPart
from turboq.codecs.observed import Observed
from turboq.codecs.reading import Part, Reading
from turboq.codecs.scalar import dot, lead
from turboq.codecs.writing import Run, WriteTables, Writing
from turboq.numbers import codebook as codebooks
from turboq.numbers import scale as scales
from turboq.numbers import trellis, trellis_runs, window, window_gain

Segments = tuple[tuple[int, int], ...]

MAX_SEGMENTS = 4
QUANTIZERS = ("scalar", "trellis", "window")
CODEBOOKS = ("gaussian", "fitted")
GAINS = ("none", "code", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform(Codec):
    """y = A (x - mean),  u = y / gain,  x_hat = mean + S (gain * c(u)): C <= D coded coordinates.

    A [C, D] are analysis rows of unit-variance outputs in falling order of bits, S [D, C] the
    synthesis; the rest of the space decodes to the mean and is not stored. Logits are
    (S^T q) . (gain * c) + q . mean: keys are never turned back.

    `segments` are runs of (width, bits), bits falling. Bits per channel
    (sum width * bits + gain + start) / D, whatever D: with ((16, 4), (32, 3), (16, 2)) 3.0 at D=64.

    quantizer  "scalar": a codebook of 2**bits points per segment (1..8 bits).
               "trellis": one path through all coordinates, `states` states, 2**(bits+1) points per
               segment (1..6 bits). It starts in state 0; `free_start` lets it start anywhere, for
               log2(states) stored bits.
               "window": one path through all coordinates, linear in the stored bits (1..8 bits,
               16, 64 or 256 states, `turboq.numbers.window`); no codebook of its own.
    codebook   "gaussian", or "fitted" arrays per segment.
    gain       "none": static, 0 bits, clips what is larger than calibration. "code": `gain_bits`
               bits choose one of the fitted `gains`: the nearest to the root mean square of y, of
               a window code the one of least error (`turboq.numbers.window_gain`). "float16": the
               root mean square of y, 16 bits.

    Static unless gain is stored; without one, NaN does not show in what is stored. Fitted by
    `turboq.codecs.fit_transform`. A kernel reads a scalar one as runs of table lookups with a
    folded query (`reading`); trellis and window codes are read by XLA, and any reader that knows
    `bit_form` reads window codes.

    Arrays of one head, float32: mean [D], analysis [C, D], synthesis [D, C]; "fitted": codebook{i}
    of each segment, ascending; gain "code": gains [2**gain_bits], ascending and positive;
    "window": weights [C], what an error of each coordinate costs, for the search alone.

    Source: transform coding with reverse water-filling (Goyal 2001; Cover and Thomas, theorem
    10.3.3), weighted by what attention does with the vector (`turboq.codecs.fit_basis`).

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.

    Examples:
      >>> from turboq import Transform
      >>> codec = Transform(dim=64, segments=((16, 4), (32, 3), (16, 2)))
      >>> codec.bits_per_channel, codec.array_shapes["analysis"]
      (3.0, (64, 64))
    """

    name: ClassVar[str] = "transform"
    source: ClassVar[str] = "transform coding, reverse water-filling; Marcellin and Fischer 1990"
    needs: ClassVar[tuple[str, ...]] = ("moments", "sample")

    segments: Segments
    quantizer: str = "scalar"
    states: int = 8
    free_start: bool = False
    codebook: str = "gaussian"
    gain: str = "none"
    gain_bits: int = 4

    def __post_init__(self):
        checks.check_dim(self.dim)
        checks.check_choice("quantizer", self.quantizer, QUANTIZERS)
        checks.check_choice("codebook", self.codebook, CODEBOOKS)
        checks.check_choice("gain", self.gain, GAINS)
        check_segments(self.segments, self.dim)
        if type(self.gain_bits) is not int or not 1 <= self.gain_bits <= 8:
            raise ValueError(f"{self.gain_bits=} must be 1..8")
        if self.quantizer == "window" and (self.free_start or self.codebook == "fitted"):
            raise ValueError(
                f"{self.quantizer=} has no start state and no codebook: {self.free_start=} must be "
                f"False and {self.codebook=} gaussian"
            )
        for _, bits in self.segments:
            if self.quantizer == "trellis":
                trellis.check(self.states, bits)
            elif self.quantizer == "window":
                window.check(self.states, bits)
            else:
                checks.check_bits(bits)

    @property
    def coded(self) -> int:
        """C, the number of coordinates that are stored."""
        return sum(width for width, _ in self.segments)

    @property
    def fields(self) -> tuple[Field, ...]:
        fields = [
            Field(name=f"codes{i}", width=width, bits=bits, dtype="codes")
            for i, (width, bits) in enumerate(self.segments)
        ]
        if self.quantizer == "trellis" and self.free_start:
            start = self.states.bit_length() - 1
            fields.append(Field(name="start", width=1, bits=start, dtype="codes"))
        if self.gain == "code":
            fields.append(Field(name="gain", width=1, bits=self.gain_bits, dtype="codes"))
        if self.gain == "float16":
            fields.append(Field(name="gain", width=1, bits=16, dtype="float16"))
        return tuple(fields)

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        coded = self.coded
        shapes: dict[str, tuple[int, ...]] = {
            "mean": (self.dim,),
            "analysis": (coded, self.dim),
            "synthesis": (self.dim, coded),
        }
        if self.codebook == "fitted":
            more = self.quantizer == "trellis"
            for i, (_, bits) in enumerate(self.segments):
                shapes[f"codebook{i}"] = (2 ** (bits + more),)
        if self.quantizer == "window":
            shapes["weights"] = (coded,)
        if self.gain == "code":
            shapes["gains"] = (2**self.gain_bits,)
        return shapes

    @property
    def fewest_tokens(self) -> int:
        """As many as dimensions: a covariance of fewer has no inverse."""
        return max(super().fewest_tokens, self.dim)

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        from turboq.codecs.fit_transform import fit_observed

        return fit_observed(self, seen)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        tables: dict[str, np.ndarray] = {}
        if self.quantizer == "window":
            return dataclasses.asdict(self.rows)
        if self.codebook == "gaussian":
            for i, (_, bits) in enumerate(self.segments):
                tables[f"codebook{i}"] = unit_table(self, bits).astype(np.float32)
        if self.quantizer == "trellis":
            parity = trellis.parity_matrix(self.states, self.coded)
            tables["parity"] = parity.astype(np.float32)
        return tables

    @property
    def rows(self) -> window.Rows:
        """The linear window code of the coordinates, NumPy."""
        return window.rows(self.states, self.segments)

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "P"], ...]:
        """Points of each segment, float32, ascending, for unit variance."""
        return tuple(
            arrays[f"codebook{i}"]
            if self.codebook == "fitted"
            else jnp.asarray(unit_table(self, bits), jnp.float32)
            for i, (_, bits) in enumerate(self.segments)
        )

    @property
    def reading(self) -> Reading | None:
        """One table part per segment, all with the gain; None for a path through all of them."""
        if self.quantizer != "scalar":
            return None
        gain = None if self.gain == "none" else "gain"
        return Reading(
            parts=tuple(
                Part(
                    field=f"codes{i}", width=width, bits=bits, levels="table", scale=gain,
                    symmetric=self.codebook == "gaussian",
                )
                for i, (width, bits) in enumerate(self.segments)
            )
        )  # fmt: skip

    @property
    def writing(self) -> Writing | None:
        """One part per segment; None for a path, which is a search."""
        if self.quantizer != "scalar":
            return None
        runs = tuple(
            Run(field=f"codes{i}", width=width, bits=bits)
            for i, (width, bits) in enumerate(self.segments)
        )
        return Writing(
            parts=runs,
            gain={"none": "none", "code": "code", "float16": "rms"}[self.gain],
            scale=None if self.gain == "none" else "gain",
            gain_bits=self.gain_bits if self.gain == "code" else 0,
        )

    def write_tables(self, arrays: Arrays) -> WriteTables:
        return WriteTables(
            matrix=self.analysis_of(arrays), mean=self.mean_of(arrays),
            levels=self.level_tables(arrays), gains=arrays.get("gains"),
        )  # fmt: skip

    def bit_form(self, arrays: Arrays) -> BitForm | None:
        """One part, with the gain, for a window code; None for a trellis."""
        if self.quantizer != "window":
            return super().bit_form(arrays)
        matrix, constant = window.bit_matrix(self.states, self.segments)
        synthesis = self.synthesis_of(arrays)
        part = BitPart(
            matrix=dot(synthesis, jnp.asarray(matrix, jnp.float32)),
            constant=dot(synthesis, jnp.asarray(constant, jnp.float32)[:, None])[:, 0],
            ones=jnp.sum(synthesis, axis=1),
            fields=tuple(f"codes{i}" for i in range(len(self.segments))),
            bits=tuple(bits for _, bits in self.segments),
            derived=((),) * len(self.segments),
            scale=None if self.gain == "none" else "gain",
            offset=None,
        )
        return BitForm(mean=self.mean_of(arrays), parts=(part,))

    def row_values(
        self, arrays: Arrays, name: str, entries: Shaped[Array, "*n"]
    ) -> Float[Array, "*n"]:
        """The gains of codes, or stored gains as they are."""
        if self.gain != "code":
            return super().row_values(arrays, name, entries)
        return arrays["gains"].at[entries.astype(jnp.int32)].get(mode="promise_in_bounds")

    def config(self) -> dict[str, Any]:
        return super().config() | {"segments": [list(s) for s in self.segments]}

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        y = self.analyse(arrays, x)
        if self.gain == "none":
            return self._codes(arrays, y)
        if self.gain == "float16":
            unit, rms = scales.unit_rms(y)
            return self._codes(arrays, unit) | {"gain": rms.astype(jnp.float16)[..., None]}
        gains = arrays["gains"]
        if self.quantizer == "window":
            codes, gain = window_gain.encode(
                self.rows, y.reshape(-1, self.coded), gains, arrays["weights"]
            )
            return self._named(codes.reshape(y.shape)) | {"gain": gain.reshape(*y.shape[:-1], 1)}
        rms = jnp.sqrt(jnp.mean(jnp.square(y), axis=-1))
        edges = jnp.sqrt(gains[1:] * gains[:-1])  # nearest on a logarithmic scale
        code = jnp.sum(rms[..., None] > lead(edges, rms.ndim + 1), axis=-1).astype(jnp.uint8)
        gain = gains.at[code.astype(jnp.int32)].get(mode="promise_in_bounds")
        return self._codes(arrays, y / gain[..., None]) | {"gain": code[..., None]}

    def mean_of(self, arrays: Arrays) -> Float[Array, "D"]:
        """The mean of one head."""
        return arrays["mean"]

    def analysis_of(self, arrays: Arrays) -> Float[Array, "C D"]:
        """A of one head."""
        return arrays["analysis"]

    def synthesis_of(self, arrays: Arrays) -> Float[Array, "D C"]:
        """S of one head."""
        return arrays["synthesis"]

    def analyse(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n C"]:
        """y = A (x - mean), float32."""
        x = x.astype(jnp.float32) - lead(self.mean_of(arrays), x.ndim)
        y = dot(x.reshape(-1, self.dim), self.analysis_of(arrays).T)
        return y.reshape(*x.shape[:-1], self.coded)

    def _codes(self, arrays: Arrays, u: Float[Array, "*n C"]) -> Stored:
        if self.quantizer == "window":
            codes = window.encode(self.rows, u.reshape(-1, self.coded), arrays["weights"])
            return self._named(codes.reshape(u.shape))
        tables = self.level_tables(arrays)
        if self.quantizer == "trellis":
            codes, start = trellis_runs.encode(
                self.states, self._runs(tables), u.reshape(-1, self.coded), free=self.free_start
            )
            stored = self._named(codes.reshape(u.shape))
            return stored | ({"start": start.reshape(*u.shape[:-1], 1)} if self.free_start else {})
        return {
            f"codes{i}": codebooks.nearest(table, part)
            for i, (table, part) in enumerate(zip(tables, self._split(u), strict=True))
        }

    def _named(self, codes: Array) -> Stored:
        return {f"codes{i}": part for i, part in enumerate(self._split(codes))}

    def _runs(self, tables: tuple[Array, ...]) -> trellis_runs.Runs:
        return tuple((t, width) for t, (width, _) in zip(tables, self.segments, strict=True))

    def _split(self, u: Array) -> list[Array]:
        ends = np.cumsum([width for width, _ in self.segments])[:-1]
        return jnp.split(u, [int(end) for end in ends], axis=-1)

    def values(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n C"]:
        """Points of the codes, before the gain."""
        codes = [stored[f"codes{i}"] for i in range(len(self.segments))]
        if self.quantizer == "window":
            return window.decode(self.rows, jnp.concatenate(codes, axis=-1))
        tables = self.level_tables(arrays)
        if self.quantizer == "trellis":
            start = stored["start"][..., 0] if self.free_start else None
            path = jnp.concatenate(codes, axis=-1)
            return trellis_runs.decode(self.states, self._runs(tables), path, start)
        parts = [cast(Array, codebooks.lookup(t, c)) for t, c in zip(tables, codes, strict=True)]
        return jnp.concatenate(parts, axis=-1)

    def gain_of(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n"] | None:
        """Gain of every stored vector, float32; None without one."""
        if self.gain == "none":
            return None
        gain = stored["gain"][..., 0]
        if self.gain == "float16":
            return gain.astype(jnp.float32)
        return arrays["gains"].at[gain.astype(jnp.int32)].get(mode="promise_in_bounds")

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        values = self.values(arrays, stored)
        # Multiplied by the gain last: a gain near the largest float16 must not overflow in S.
        x = dot(values.reshape(-1, self.coded), self.synthesis_of(arrays).T)
        x = x.reshape(*values.shape[:-1], self.dim)
        gain = self.gain_of(arrays, stored)
        x = x if gain is None else x * gain[..., None]
        return x + lead(self.mean_of(arrays), x.ndim)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        q = q.astype(jnp.float32)
        offset = dot(q, self.mean_of(arrays)[:, None])[:, 0]
        return {"q": dot(q, self.synthesis_of(arrays)), "offset": offset}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        scores = dot(folded["q"], self.values(arrays, stored).T)
        gain = self.gain_of(arrays, stored)
        scores = scores if gain is None else scores * gain[None, :]
        return scores + folded["offset"][:, None]

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        gain = self.gain_of(arrays, stored)
        weights = weights if gain is None else weights * gain[None, :]
        return dot(weights, self.values(arrays, stored))

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        return dot(acc, self.synthesis_of(arrays).T) + mass[:, None] * self.mean_of(arrays)[None, :]


def check_segments(segments: Any, dim: int) -> None:
    """Raises ValueError unless 1..4 runs of falling bits, in whole bytes, fit into dim."""
    found = cast(tuple[Any, ...], segments) if isinstance(segments, tuple) else ()
    if not 1 <= len(found) <= MAX_SEGMENTS:
        raise ValueError(f"{segments=} must be a tuple of 1..{MAX_SEGMENTS} pairs (width, bits)")
    for segment in found:
        pair = cast(tuple[Any, ...], segment) if isinstance(segment, tuple) else ()
        if len(pair) != 2 or any(type(x) is not int for x in pair):
            raise ValueError(f"{segment=} must be a pair of integers (width, bits)")
        if segment[0] < 8 or segment[0] % 8:
            raise ValueError(f"{segment=} must have a width that is a multiple of 8")
    if sum(width for width, _ in found) > dim:
        raise ValueError(f"{segments=} are more than {dim=} coordinates")
    if any(a[1] <= b[1] for a, b in itertools.pairwise(found)):
        raise ValueError(f"{segments=} must have falling bits")


def unit_table(codec: Transform, bits: int) -> np.ndarray:
    """Gaussian points of one segment, float64, ascending, for unit variance."""
    if codec.quantizer == "trellis":
        return trellis.codebook(codec.states, bits)
    return codebooks.lloyd_max("gaussian", bits)

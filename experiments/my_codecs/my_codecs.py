"""A codec and an engine of another package: copy this folder, `pip install` it, and name them.

turboq plan --statistics=RUN --codec=my_codecs.sign --out=OUT
    turboq export --plan=OUT --engine=my_codecs.mean_bits --out=FILES
    python -m turboq.conformance --codec=my_codecs.sign
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from turboq.codecs.base import Field
from turboq.codecs.transformed import TransformedCodec
from turboq.export.base import Exporter, Held, Projection, entries
from turboq.plan.constraints import Constraints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(TransformedCodec):
    """x_hat = mean + H^T (s * sign(H (x - mean))), s the vector's mean |y|: 1 + 16/D bits."""

    name: ClassVar[str] = "my_codecs.sign"
    needs: ClassVar[tuple[str, ...]] = ("moments",)
    rotation: str = "hadamard"

    @property
    def fields(self):
        codes = Field(name="codes", width=self.dim, bits=1, dtype="codes")
        return codes, Field(name="scale", width=1, bits=16, dtype="float16")

    @property
    def array_shapes(self):
        return {"mean": (self.dim,)}

    def _fit(self, seen):
        return {"mean": seen.mean}

    def quantize(self, arrays, y):
        scale = jnp.mean(jnp.abs(y), axis=-1, keepdims=True).astype(jnp.float16)
        return {"codes": (y > 0).astype(jnp.uint8), "scale": scale}

    def dequantize(self, arrays, stored):
        sign = 2 * stored["codes"].astype(jnp.float32) - 1
        return sign * stored["scale"].astype(jnp.float32)


class MeanBits(Exporter):
    """An engine that holds any plan and wants to know its bits per token."""

    name = "my_codecs.mean_bits"
    title = "an example"
    versions = "any"
    checked = "run by the tests"
    ran = True

    def formats(self, model, options):
        return {}

    def constraints(self, model, options=None):
        return (Constraints(),)

    def policy(self, wanted):
        return wanted

    def project(self, plan, arrays, options):
        held = {
            e.place: Held(format=e.codec.name, codec=e.codec, arrays=e.arrays, rope=e.rope)
            for e in entries(plan, arrays)
        }
        flags = (f"engine --bits={plan.bytes.bits_per_token}",)
        return Projection(held=held, flags=flags, policy=plan.tokens)

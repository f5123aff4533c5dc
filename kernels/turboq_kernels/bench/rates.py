"""Integer rates of the matrix unit: nothing but `mma.sync`, in registers, chained.

imma    m16n8k32 of signed bytes: 4,096 products of 8 bits an instruction
bmma    m16n8k256 of bits, AND and population count: 32,768 products of 1 bit

A bit-column kernel that took stored bits as such operands could issue no more than this. Every warp
has `CHAINS` sums of its own, each waiting for itself alone. Of wgmma (IGMMA), whose right operand
lies in shared memory behind a descriptor, there is no such loop: inline assembly of Triton is by
element and has neither.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int32

from turboq_kernels.bench import timing
from turboq_kernels.target import target, too_old

MMA = {
    "imma": "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    "bmma": "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc",
}
PRODUCTS = {"imma": 16 * 8 * 32, "bmma": 16 * 8 * 256}  # of an instruction
# Sums $0 to $3, from $8 to $11; A, and in two of its registers B.
REGISTERS = "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$4, $5}, {$8, $9, $10, $11}"
WARPS, CHAINS, ROUNDS, PROGRAMS = 4, 8, 4096, 8  # PROGRAMS: of a multiprocessor


def rate(name: str) -> float:
    """Products per second of the whole card.

    Raises:
      ValueError: no NVIDIA GPU, or one too old.
    """
    gpu = target()
    if jax.default_backend() != "gpu" or not gpu.ptx:
        raise ValueError(f"{name} is an instruction of NVIDIA's GPUs")
    if (reason := too_old()) is not None:
        raise ValueError(reason)
    programs = PROGRAMS * gpu.processors
    run = jax.jit(functools.partial(chained, name, programs))
    found = timing.measure(lambda: run(jnp.ones(1, jnp.int32)), 1)
    return programs * WARPS * CHAINS * ROUNDS * PRODUCTS[name] / found.seconds


def chained(name: str, programs: int, seed: Int32[Array, "1"]) -> Int32[Array, "P n"]:
    """What the loops leave: not a number that means anything."""
    size = 32 * WARPS * CHAINS * 4

    def kernel(seed, out):
        operand = jnp.arange(size, dtype=jnp.int32) * seed[0] + pl.program_id(0)

        def step(_, total):
            (total,) = plgpu.elementwise_inline_asm(
                f"{MMA[name]} {REGISTERS};",
                args=[operand, total],
                constraints=",".join(["=r"] * 4 + ["r"] * 8),
                pack=4,
                result_shape_dtypes=[jax.ShapeDtypeStruct((size,), jnp.int32)],
            )
            return total

        out[0, :] = jax.lax.fori_loop(0, ROUNDS, step, jnp.zeros((size,), jnp.int32))

    return pl.pallas_call(
        kernel,
        grid=(programs,),
        in_specs=[pl.BlockSpec((1,), lambda i: (0,))],
        out_specs=pl.BlockSpec((1, size), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((programs, size), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"turboq_{name}",
    )(seed)

"""Chips that kernels do not run on and cases that they do not read: refused by name."""

import functools
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from columns_cases import HEADS, ROPES, SCALE, inputs, make_layers, untouched
from jax.sharding import AbstractDevice
from unchecked import unchecked

from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs import TurboQuantMSE
from turboq_kernels import columns
from turboq_kernels.aot import (
    cards,
    compilers,
    cuda,
    cuda_prefill,
    cuda_step,
    cuda_targets,
    tpu,
    tpu_columns,
)
from turboq_kernels.columns import api
from turboq_kernels.decode import api as decoding
from turboq_kernels.encode import api as encoding

ROOT = Path(__file__).parents[2]
T4 = AbstractDevice(device_kind="NVIDIA T4 (sm_75)", num_cores=40, platform="gpu")
OLD = "this GPU is sm_75, kernels need sm_80 or newer"
V4 = "TPU v4 multiplies no int8, which stored bits are read as; TPU v5 does"


def layer_of(rng, rope=None, block=1, joined=None):
    """A state of one layer, its pool and its tail."""
    return untouched(make_layers(rng, TokenPolicy(), rope, block, joined=joined))


def read(layer, rng, tokens=1, **options):
    """The program of a step of so many tokens, which is only traced."""
    state, words, tail = layer
    at = jnp.zeros((2, tokens), jnp.int32)
    run = functools.partial(
        columns.attend, state=state, words=words, tail=tail, q_positions=at, scale=SCALE, **options
    )
    return str(jax.make_jaxpr(run)(inputs(rng, tokens)[0]))


PROGRAMS = {
    "decode": lambda: cuda.program(cuda.Configuration(bits=3)),
    "prefill": lambda: cuda_prefill.program(cuda_prefill.Configuration(bits=3)),
    "exact tokens": lambda: cuda_prefill.program(
        cuda_prefill.Configuration(bits=16, levels="bfloat16")
    ),
    **{
        f"step, {c.levels}": functools.partial(cuda_step.program, c)
        for c in cuda_step.CONFIGURATIONS
    },
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_old_gpu_gets_no_kernel(name):
    """When traced: neither kernels that read nor those that write."""
    with unchecked():
        program = PROGRAMS[name]()
        with compilers.abstractly(T4), pytest.raises(ValueError, match=OLD):
            jax.eval_shape(program.function, *program.arguments)


def test_an_old_gpu_is_written_by_xla(rng):
    state, codec = layer_of(rng)[0], TurboQuantMSE(dim=64, bits=3)
    layer = uniform_layer(kv_heads=1, k=codec, v=codec, policy=TokenPolicy())
    for device, reason in ((T4, OLD), (cards.device("sm_80"), None)):
        with compilers.abstractly(device):
            assert columns.cannot_write(state.form, "triton") == reason
            assert encoding.unsupported(layer, 256, "triton") == reason


def test_an_old_gpu_is_read_by_xla(rng, monkeypatch):
    """Learned plans and pages; matrices are those that XLA takes."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (before, *_), (after, *rest) = layer_of(rng, ROPES["half"]), layer_of(rng)
    for device, reader in ((T4, "linear"), (cards.device("sm_80"), "triton")):
        with compilers.abstractly(device):
            made = columns.prepare(before, rest[0])
            assert (made is None) == (device is T4)
            assert api._reader(after.form.layer) == reader
            with pytest.raises(ValueError, match=OLD) if device is T4 else unchecked():
                read((after, *rest), rng, implementation="triton")
            read((after, *rest), rng)
    q, k, v, pages, *_ = cuda.program(cuda.Configuration(bits=3)).arguments
    with compilers.abstractly(T4), unchecked():
        assert decoding.choose(q, k, v, pages, None) == "xla"


@pytest.mark.parametrize("block", [None, 256, 64, 1])
def test_a_tpu_without_int8_gets_no_column_kernel(block, rng, monkeypatch):
    """v4: neither folded queries nor decoded keys; XLA reads what it can, with its own matrices."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    layer = layer_of(rng, block and ROPES["half"], block or 1)
    with compilers.abstractly(tpu.device("v4")):
        with pytest.raises(ValueError, match=f"cannot run this case: {V4}; use 'xla' or None"):
            read(layer, rng, implementation="mosaic_tpu")
        made = columns.prepare(*layer[:2])
        assert (made is None) == (block == 1)
        assert made is None or made.k.matrix is not None
        read(layer, rng, matrices=made)
    with compilers.abstractly(tpu.device("v5e")), unchecked():
        read(layer, rng, implementation="mosaic_tpu", interpret=True)


def test_columns_are_not_compiled_for_v4():
    for cache in ("1", "256"):
        with pytest.raises(ValueError, match=V4):
            tpu_columns.program(tpu_columns.Configuration(target="v4", bits=2, cache=cache))


@pytest.mark.parametrize(("joined", "most"), [(None, 8), (HEADS, 2)])
def test_more_query_rows_than_a_gpu_kernel_reads(joined, most, rng):
    """16 rows of a KV head, or of heads that are joined; pages are decoded for more."""
    layer = layer_of(rng, joined=joined)
    with unchecked():
        few, many = (
            read(layer, rng, tokens, implementation="triton", interpret=True)
            for tokens in (most, most + 1)
        )
    assert ("turboq_columns" in few, "turboq_own" in few) == (True, False)
    assert ("turboq_columns" in many, "turboq_own" in many) == (False, True)


def test_targets_that_are_not_compiled_for():
    known = "must be one of .*'sm_80', 'sm_89', 'sm_90', 'sm_100', 'sm_120'"
    for ask in (cards.device, cards.config):
        with pytest.raises(ValueError, match=f"target='sm_75' {known}"):
            ask("sm_75")
    with pytest.raises(ValueError, match=r"target='v3' must be one of .*'v5e'"):
        tpu.device("v3")
    with pytest.raises(ValueError, match="target=sm_75: target is sm_80 or sm_89 or sm_100"):
        cuda_targets.rows(["target=sm_75"])
    both = ["bits=3", "levels=int8"]
    with pytest.raises(ValueError, match="no configuration has bits=3 and levels=int8 at once"):
        cuda.rows(both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--platform=cuda", "target=sm_75"],
            "--platform=cuda: target='sm_75' must be one of v5e v6e v5p v4 tpu7x (--platform=tpu); "
            "sm_90 (--platform=cuda); sm_80 sm_89 sm_100 sm_120 (--platform=targets); "
            "gfx942 gfx1100 gfx1201 (--platform=rocm)",
        ),
        (
            ["--platform=tpu", "op=columns", "target=v4"],
            "--platform=tpu: no configuration has target=v4: target is v5e or v6e or v5p or tpu7x",
        ),
        (
            ["--platform=cuda", "op=read"],
            "--platform=cuda: op='read' must be one of decode prefill encode columns logits window "
            "step",
        ),
        (["bits"], "--platform=tpu,cuda: 'bits' must be a condition like bits=3"),
    ],
)
def test_costs_of_what_is_not_compiled(arguments, message, capsys):
    """One line, and nothing is compiled."""
    loader = importlib.machinery.SourceFileLoader(
        "kernel_costs", str(ROOT / "scripts/kernel_costs.py")
    )
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module, path = importlib.util.module_from_spec(spec), sys.path.copy()
    loader.exec_module(module)
    sys.path[:] = path
    assert module.main(arguments) == 1
    assert capsys.readouterr() == ("", message + "\n")

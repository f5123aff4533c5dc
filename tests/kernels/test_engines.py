"""Adapters of engines in JAX, over small fakes of the interfaces that they were read from."""

import dataclasses
import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import kv_cases as cases
import numpy as np
import pytest
from plan_cases import geometry
from tolerances import TOL

from turboq.cache import contiguous
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.codecs import PerHead, TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import save, uniform_plan
from turboq_kernels import cache_attention
from turboq_kernels.engines import ejkernel, maxtext, ragged, tpu_inference, vllm_plugin

DIM, HEADS, QUERIES, SCALE, PAGE = cases.DIM, 3, 6, 0.3, 64
ROWS, PAGES_EACH, POOL, BUCKET = 4, 3, 12, 108
# Tokens of the four rows of the batch in each step: prompts, a mix, one token each.
STEPS = [(70, 0, 33, 0), (1, 40, 2, 0), (1, 1, 1, 0)]


@pytest.fixture(scope="module")
def layer():
    codec, rng = PerHead(dim=DIM, bits=3), np.random.default_rng(3)
    k, v = (cases.learned(rng, HEADS, 3) for _ in range(2))
    return uniform_layer(
        kv_heads=HEADS, k=codec, v=codec, policy=TokenPolicy(), k_arrays=k, v_arrays=v
    )


@dataclasses.dataclass
class Traffic:
    """What an engine hands over in each step, and the outputs due to every sequence."""

    steps: list[Any]
    due: np.ndarray


@pytest.fixture(scope="module")
def traffic(layer):
    """Pages in mixed order; tokens and rows of the bucket that are not real hold anything."""
    rng = np.random.default_rng(4)
    longest = int(np.sum(STEPS, axis=0).max())
    q, k, v = (
        rng.normal(size=(ROWS, longest, n, DIM)).astype(np.float32) for n in (QUERIES, HEADS, HEADS)
    )
    table = rng.permutation(POOL).reshape(ROWS, PAGES_EACH)
    done, steps = np.zeros(ROWS, int), []
    for counts in STEPS:
        pieces = [
            [x[b, a : a + c] for b, (a, c) in enumerate(zip(done, counts, strict=True))]
            for x in (q, k, v)
        ]
        flat = [np.concatenate(some) for some in pieces]
        flat = [np.pad(x, ((0, BUCKET - len(x)), (0, 0), (0, 0)), constant_values=9) for x in flat]
        starts = np.concatenate([[0], np.cumsum(counts)])
        starts[-1] = BUCKET
        done = done + counts
        steps.append(
            SimpleNamespace(
                qkv=[jnp.asarray(x) for x in flat], counts=counts,
                lengths=jnp.asarray(done, jnp.int32), table=jnp.asarray(table, jnp.int32),
                starts=jnp.asarray(starts, jnp.int32), sequences=jnp.int32(3),
            )
        )  # fmt: skip
    # The same sequences in a contiguous cache, all queries at once.
    cache = contiguous.init(layer, batch=ROWS, capacity=longest)
    cache, tail = contiguous.write(layer, cache, jnp.asarray(k), jnp.asarray(v))
    at = jnp.broadcast_to(jnp.arange(longest)[None], (ROWS, longest))
    due = cache_attention(jnp.asarray(q), layer, cache, tail, q_positions=at, scale=SCALE)
    return Traffic(steps=steps, due=np.asarray(due))


def check_all(traffic, run):
    """`run(step)` gives the outputs of one step; every sequence's are those of its own cache."""
    done = np.zeros(ROWS, int)
    for step in traffic.steps:
        out = run(step)
        for row, count in enumerate(step.counts):
            first = int(step.starts[row])
            np.testing.assert_allclose(
                out[first : first + count], traffic.due[row, done[row] : done[row] + count],
                atol=TOL["packed_attention"],
            )  # fmt: skip
        done += step.counts
        assert not out[sum(step.counts) :].any()


def test_a_ragged_batch_is_every_sequence_by_itself(layer, traffic):
    state = [ragged.pages(layer, count=POOL, sequences=ROWS, page=PAGE)]

    def run(step):
        out, state[0] = ragged.attend(
            *step.qkv, layer, state[0], lengths=step.lengths, table=step.table,
            query_starts=step.starts, sequences=step.sequences, scale=SCALE, chunk=32,
            implementation="xla",
        )  # fmt: skip
        return out

    check_all(traffic, run)


def test_a_shared_cache_is_read_and_not_written(layer, traffic):
    cache = ragged.pages(layer, count=POOL, sequences=ROWS, page=PAGE)
    step = traffic.steps[0]
    options = {
        "lengths": step.lengths, "table": step.table, "query_starts": step.starts,
        "sequences": step.sequences, "scale": SCALE,
    }  # fmt: skip
    out, cache = ragged.attend(*step.qkv, layer, cache, **options)
    q, k, v = step.qkv
    again, same = ragged.attend(q, k + 1, v - 1, layer, cache, store=False, **options)
    np.testing.assert_array_equal(again, out)
    assert all(map(np.array_equal, jax.tree.leaves(same), jax.tree.leaves(cache)))


def test_exact_tokens_have_no_place_in_an_engine():
    codec = TurboQuantMSE(dim=DIM, bits=2)
    layer = uniform_layer(kv_heads=HEADS, k=codec, v=codec, policy=TokenPolicy(sinks=4))
    with pytest.raises(ValueError, match="--sinks=0 --recent=0"):
        ragged.pages(layer, count=1, sequences=1, page=PAGE)


# ejkernel 0.0.80.3: `register(algorithm, platform, backend)(function)`, best first.
class Platform(enum.StrEnum):
    PALLAS, TRITON, XLA = "pallas", "triton", "xla"


class Backend(enum.StrEnum):
    TPU, GPU, ANY = "tpu", "gpu", "any"


class FakeRegistry:
    def __init__(self):
        self.found = []

    def register(self, algorithm, platform, backend, priority=0):
        def add(function):
            self.found.append(
                SimpleNamespace(
                    algorithm=algorithm, platform=Platform(platform), backend=Backend(backend),
                    implementation=function,
                )
            )  # fmt: skip
            return function

        return add

    def list_implementations(self, algorithm):
        return [x for x in self.found if x.algorithm == algorithm]


def test_ejkernel(layer, traffic):
    registry = FakeRegistry()
    ejkernel.register(registry)
    ejkernel.register(registry)
    assert [(x.platform, x.backend) for x in registry.found] == [*ejkernel.PLACES]
    run = registry.found[-1].implementation
    state = [(layer, ragged.pages(layer, count=POOL, sequences=ROWS, page=PAGE))]

    def one(step):
        out, state[0] = run(
            *step.qkv, state[0], step.lengths, step.table.reshape(-1), step.starts,
            jnp.asarray([0, 0, 3], jnp.int32), softmax_scale=SCALE, chunk_prefill_size=32,
        )  # fmt: skip
        return out

    check_all(traffic, one)
    with pytest.raises(ValueError, match="k_scale: codecs of the plan"):
        run(
            *traffic.steps[0].qkv,
            state[0],
            *[jnp.zeros(n, jnp.int32) for n in (4, 12, 5, 3)],
            k_scale=0.5,
        )


@pytest.fixture
def engine(monkeypatch):
    """Modules of tpu-inference 0.32.0 as far as they are used: what was registered, by name."""
    registered: dict[str, Any] = {}

    def register_attention_backend(name, *, attention, vllm_backend, linear_attention=None):
        registered[name] = (attention, vllm_backend)

    class Implementation:
        attention_backend = "rpa"

        def forward(self, layer, *inputs, **options):
            return self.attention_backend, inputs

    backends = SimpleNamespace(
        AttentionBackend=type("AttentionBackend", (), {}),
        register_attention_backend=register_attention_backend,
    )
    flash = SimpleNamespace(
        PallasAttentionBackend=type("PallasAttentionBackend", (), {}),
        PallasAttentionBackendImpl=Implementation,
    )
    for name, found in {
        "tpu_inference": {}, "tpu_inference.layers": {}, "tpu_inference.layers.common": {},
        "tpu_inference.layers.common.attention_backend": vars(backends),
        "tpu_inference.layers.vllm": {},
        "tpu_inference.layers.vllm.backends": {"flash_attn": flash},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, name, module)
    tpu_inference._backend.cache_clear()
    monkeypatch.delitem(vars(tpu_inference), "PallasTurboq", raising=False)
    yield registered
    tpu_inference._backend.cache_clear()
    vars(tpu_inference).pop("PallasTurboq", None)


@pytest.mark.parametrize("dtype", ["bfloat16", "uint32", "int8"])
def test_a_cache_is_one_array_and_comes_back(dtype):
    """Heads of other bits, in another order than their groups."""
    rng = np.random.default_rng(5)
    wide, narrow = PerHead(dim=DIM, bits=3), TurboQuantMSE(dim=DIM, bits=2)
    fitted = cases.learned(rng, 2, 3)
    layer = KVLayer(
        groups=(
            HeadGroup(heads=(2, 0), k=wide, v=narrow, k_arrays=fitted, v_arrays={}),
            HeadGroup(heads=(1,), k=narrow, v=narrow, k_arrays={}, v_arrays={}),
        ),
        policy=TokenPolicy(),
    )
    empty = ragged.pages(layer, count=5, sequences=2, page=PAGE)

    def some(x):
        bits = rng.integers(0, 256, x.size * x.dtype.itemsize, np.uint8)
        return jnp.asarray(bits.view(x.dtype).reshape(x.shape))

    groups = jax.tree.map(some, empty.groups)
    cache = dataclasses.replace(empty, groups=groups)
    width = tpu_inference.most_bits(layer) * 4 // jnp.dtype(dtype).itemsize
    array = tpu_inference.to_array(layer, cache, jnp.zeros((5, 2, HEADS, width), dtype))
    back = tpu_inference.from_array(layer, array, sequences=2)
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(back), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(
            np.asarray(ours).view(np.uint8), np.asarray(theirs).view(np.uint8)
        )
    # The bytes of head 2 are those of the first head of its group.
    words = np.asarray(array).view(np.uint32).reshape(5, 2, HEADS, -1).swapaxes(1, 2)
    first = np.asarray(cache.groups[0].k["codes"])[:, 0].reshape(5, -1)
    np.testing.assert_array_equal(words[:, 2].reshape(5, -1)[:, : first.shape[1]], first)


def test_tpu_inference(engine, layer, traffic):
    dtype = "bfloat16"
    tpu_inference.register({7: layer})
    shape = engine["turboq"][0]().get_kv_cache_shape(POOL, PAGE, HEADS, DIM, jnp.dtype(dtype))
    assert (
        np.prod(shape) * jnp.dtype(dtype).itemsize == POOL * PAGE * HEADS * 2 * (3 * DIM + 16) / 8
    )
    backend = engine["turboq_7"][0]()
    state = [jnp.zeros(shape, dtype)]
    options = {
        "sm_scale": SCALE, "attention_chunk_size": None, "q_scale": None, "k_scale": None,
        "v_scale": None, "sinks": None, "update_kv_cache": True, "use_causal_mask": True,
        "attn_logits_soft_cap": None, "head_dim_original": DIM, "decode_query_size": 1,
    }  # fmt: skip
    mesh = SimpleNamespace(size=1)

    def one(step):
        shared = SimpleNamespace(
            seq_lens=step.lengths, query_start_loc=step.starts,
            request_distribution=jnp.asarray([0, 0, 3], jnp.int32),
        )  # fmt: skip
        md = SimpleNamespace(block_tables=step.table.reshape(-1))
        state[0], out = backend.attention(state[0], *step.qkv, md, shared, mesh, **options)
        assert state[0].shape == shape
        assert state[0].dtype == dtype
        return out

    check_all(traffic, one)
    inputs = state[0], *traffic.steps[0].qkv, None, None
    for wrong, says in (({"k_scale": 0.5}, "auto"), ({"use_causal_mask": False}, "causal")):
        with pytest.raises(ValueError, match=says):
            backend.attention(*inputs, mesh, **options | wrong)
    with pytest.raises(ValueError, match="size=4"):
        backend.attention(*inputs, SimpleNamespace(size=4), **options)
    with pytest.raises(ValueError, match="page_size=16"):
        backend.get_kv_cache_shape(1, 16, HEADS, DIM, jnp.dtype(dtype))


def test_the_plugin_of_vllm_reads_the_plan_that_the_environment_names(
    engine, tmp_path, monkeypatch
):
    vllm_plugin.plugin()
    assert not engine
    codec = TurboQuantMSE(dim=DIM, bits=3)
    model = geometry(layers=2, kv_heads=2, k_dim=DIM, v_dim=DIM)
    save(uniform_plan(model, k=codec, v=codec, policy=TokenPolicy()), {}, tmp_path)
    monkeypatch.setenv("TURBOQ_PLAN", str(tmp_path))
    vllm_plugin.plugin()
    assert set(engine) == {"turboq", "turboq_0", "turboq_1"}
    path = engine["turboq"][1]
    module, _, name = path.rpartition(".")
    implementation = getattr(sys.modules[module], name).get_impl_cls()()
    called = implementation.forward(SimpleNamespace(layer_name="model.layers.1.self_attn.attn"), 5)
    assert called == ("turboq_1", (5,))
    save(uniform_plan(model, k=codec, v=codec, policy=TokenPolicy(sinks=4)), {}, tmp_path / "s")
    monkeypatch.setenv("TURBOQ_PLAN", str(tmp_path / "s"))
    with pytest.raises(TurboqError, match=r"layer 0: .*--sinks=0"):
        vllm_plugin.plugin()


# MaxText 0.2.5: what `KVCache.get_cached_values` hands to the einsums.
@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KVTensor:
    qvalue: Any
    scale: list[Any]


NAMES = ("cache_batch", "cache_sequence", "cache_heads", "cache_kv")


@pytest.mark.parametrize(
    ("bits", "order"), [(3, (0, 1, 2, 3)), (6, (1, 2, 0, 3)), (3, (3, 0, 2, 1))]
)
def test_maxtext(rng, bits, order):
    """Through its cache's order of axes and its division of scales, against the codec's decode."""
    codec = TurboQuantMSE(dim=DIM, bits=bits, seed=2)
    module = SimpleNamespace(configure_kv_quant=None)
    maxtext.install(codec, module)
    assert module.configure_kv_quant(SimpleNamespace(quantize_kvcache=False)) is None
    quant = module.configure_kv_quant(SimpleNamespace(quantize_kvcache=True))
    k, v = rng.normal(size=(2, 2, 20, HEADS, DIM)).astype(np.float32)
    q = rng.normal(size=(2, 1, HEADS, 2, DIM)).astype(np.float32)

    def cached(x):
        stored = jnp.transpose(jnp.asarray(x), order)
        codes, scale = quant.quantize(stored, [NAMES[i] for i in order])
        assert codes.dtype == quant.dtype == (jnp.int4 if bits == 3 else jnp.int8)
        assert scale.dtype == jnp.bfloat16
        tensor = KVTensor(codes, [scale / (7.5 if codes.dtype == jnp.int4 else 127.5)])
        return jax.tree.map(lambda y: jnp.moveaxis(y, (0, 1, 2, 3), order), tensor)

    decoded = [np.asarray(codec.decode({}, codec.encode({}, jnp.asarray(x)))) for x in (k, v)]
    logits = quant.einsum_fn_with_rhs_qtensor()("btkgd,bskd->bkgts", jnp.asarray(q), cached(k))
    expected = np.einsum("btkgd,bskd->bkgts", q, decoded[0])
    rounding = 2 * TOL["stored_bfloat16"]  # a scale is rounded twice
    size = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(decoded[0], axis=-1).max()
    np.testing.assert_allclose(logits, expected, atol=rounding * size)
    p = rng.dirichlet(np.ones(20), (2, HEADS, 2, 1)).astype(np.float32)
    out = quant.einsum_fn_with_rhs_qtensor_and_dequant()(
        "bkgts,bskd->btkgd", jnp.asarray(p), cached(v)
    )
    expected = np.einsum("bkgts,bskd->btkgd", p, decoded[1])
    largest = np.linalg.norm(decoded[1], axis=-1).max()
    np.testing.assert_allclose(out, expected, atol=rounding * largest)
    prompt = quant.einsum_fn_with_rhs_qtensor()("btkgd,bskd->bkgts", *map(jnp.asarray, (q, k)))
    exact = np.einsum("btkgd,bskd->bkgts", q, k)
    np.testing.assert_allclose(prompt, exact, atol=TOL["product_f32"] * size)
    with pytest.raises(ValueError, match=r"codec\.mean=True must be False"):
        maxtext.KVQuant(TurboQuantMSE(dim=DIM, bits=bits, mean=True))
    with pytest.raises(ValueError, match="8 channels are not the 16"):
        quant.quantize(jnp.zeros((1, 1, 1, 8)), NAMES)

"""Programs that write into a donated cache: imported by tests and by what they start to compile."""

import jax

from turboq.cache import contiguous
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs import TurboQuantMSE, TurboQuantProd
from turboq_kernels.aot import cuda_encode, tpu_encode
from turboq_kernels.aot.compilers import Program


def tpu_programs() -> dict[str, tuple[int, Program]]:
    """By name: bytes of the cache, and `encode` of a layer or the words alone at D = 64."""
    found: dict[str, tuple[int, Program]] = {}
    for dim, tokens in ((128, 1), (128, 256), (64, 1), (16, 1)):
        layer = uniform_layer(
            kv_heads=4, k=TurboQuantProd(dim=dim, bits=3), v=TurboQuantMSE(dim=dim, bits=2),
            policy=TokenPolicy(sinks=4, recent=16),
        )  # fmt: skip
        shapes = jax.eval_shape(lambda layer=layer: contiguous.init(layer, batch=4, capacity=32768))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        found[f"layer D={dim} T={tokens}"] = size, tpu_encode.layer_program(layer, shapes, tokens)
    c = tpu_encode.Configuration(target="v5e", bits=3, dim=64, tokens=1)
    for page in (64, 256):
        size = 16 * 8 * 64 * page * 3 * 64 // 8
        found[f"words page={page}"] = size, tpu_encode.program(c, page)
    return found


def cuda_programs() -> dict[str, Program]:
    """`encode` of a layer of 65536 tokens: one, and a chunk."""
    layer = uniform_layer(
        kv_heads=8, k=TurboQuantProd(dim=128, bits=3), v=TurboQuantMSE(dim=128, bits=2),
        policy=TokenPolicy(sinks=4, recent=64),
    )  # fmt: skip
    return {
        f"layer T={tokens}": cuda_encode.layer_program(layer, tokens=tokens, capacity=65536)
        for tokens in (1, 256)
    }

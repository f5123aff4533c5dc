"""tokamax attention on our QArrays against our own: python oracle_jax.py WORK (turboq on the path)

Writes WORK/jax/result.json: per codec the largest difference of the outputs.
"""

import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from turboq.codecs import (
    FP8,
    NVFP4,
    Codec,
    Ggml,
    Int4TokenHead,
    Int8TokenHead,
    PerChannel,
)
from turboq.codecs.fit_scale import fit_scale
from turboq.codecs.per_channel import fit_per_channel
from turboq.export.qwix_arrays import qarray

HEADS, TOKENS, QUERIES, DIM = 2, 64, 5, 64
ROWS: dict[str, tuple[Codec, Codec]] = {
    "per_channel 8": (PerChannel(dim=DIM, bits=8), PerChannel(dim=DIM, bits=4)),
    "int8_token_head": (Int8TokenHead(dim=DIM), Int8TokenHead(dim=DIM)),
    "int4_token_head": (Int4TokenHead(dim=DIM), Int4TokenHead(dim=DIM)),
    "fp8 head": (FP8(dim=DIM, scale="head"), FP8(dim=DIM, scale="token")),
    "fp8 none": (FP8(dim=DIM, format="e5m2", scale="none"), FP8(dim=DIM, scale="none")),
    "nvfp4": (NVFP4(dim=DIM), NVFP4(dim=DIM)),
    "ggml q8_0 q4_0": (Ggml(dim=DIM, type="q8_0"), Ggml(dim=DIM, type="q4_0")),
    "ggml q5_0 rotated, q8_0": (
        Ggml(dim=DIM, type="q5_0", rotation="walsh"),
        Ggml(dim=DIM, type="q8_0"),
    ),
}


def arrays_of(codec: Codec, x: np.ndarray) -> dict:
    """Fitted arrays of all heads, x [K, S, D]."""
    if isinstance(codec, PerChannel):
        fits = [fit_per_channel(codec, head) for head in x]
        return {name: jnp.stack([jnp.asarray(f[name]) for f in fits]) for name in fits[0]}
    if codec.array_shapes:
        return {name: jnp.asarray(v) for name, v in fit_scale(codec, x).items()}
    return {}


def row(k_codec: Codec, v_codec: Codec) -> float:
    """Largest difference between tokamax on QArrays and the codec's own attention."""
    import tokamax

    rng = np.random.default_rng(3)
    q, k, v = (
        rng.normal(size=(HEADS, n, DIM)).astype(np.float32) for n in (QUERIES, TOKENS, TOKENS)
    )
    ka, va = arrays_of(k_codec, k), arrays_of(v_codec, v)

    def ours(q, k, v, ka, va):
        ks, vs = k_codec.encode(ka, k), v_codec.encode(va, v)
        folded = k_codec.fold_query(ka, q)
        weights = jax.nn.softmax(k_codec.logits(ka, folded, ks) / DIM**0.5, axis=-1)
        return folded["q"], v_codec.accumulate(va, weights, vs)

    def arrays(k, v, ka, va):
        pairs = ((k_codec, ka, k), (v_codec, va, v))
        return tuple(qarray(codec, a, codec.encode(a, x)) for codec, a, x in pairs)

    folded, expected = jax.vmap(ours)(q, k, v, ka, va)
    kq, vq = jax.vmap(arrays, out_axes=1)(k, v, ka, va)
    kq, vq = jax.tree.map(lambda x: x[None], (kq, vq))
    out = tokamax.dot_product_attention(
        jnp.swapaxes(folded, 0, 1)[None], kq, vq, implementation="xla", precision="highest"
    )
    return float(jnp.max(jnp.abs(jnp.swapaxes(out[0], 0, 1) - expected)))


def main(work: Path) -> None:
    names = ("jax", "qwix", "tokamax")
    result = {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "largest_difference": {name: row(*codecs) for name, codecs in ROWS.items()},
    }
    (work / "jax").mkdir(exist_ok=True)
    (work / "jax" / "result.json").write_text(json.dumps(result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

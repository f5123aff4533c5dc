"""Parameter counts of the named geometries: sums over every tensor, written out by hand.

The language model alone: no vision tower, no layers that only predict further tokens.
"""

import pytest

from turboq.errors import TurboqError
from turboq.what_fits import geometries, weights_bytes


def dense(*, v: int, h: int, n: int, q: int, kv: int, d: int, f: int, tables=2, extra=0) -> int:
    """Llama's tensors: embedding(s), q k v o, gate up down, two norms, and `extra` per layer."""
    layer = 2 * h * q * d + 2 * h * kv * d + 3 * h * f + 2 * h + extra
    return tables * v * h + n * layer + h


def gemma3(*, v: int, h: int, n: int, q: int, kv: int, d: int, f: int) -> int:
    """Tied embeddings, four norms per layer and one of q and k."""
    return dense(v=v, h=h, n=n, q=q, kv=kv, d=d, f=f, tables=1, extra=2 * h + 2 * d)


def gemma4(*, v: int, h: int, q: int, f: int, sliding: tuple, full: tuple) -> int:
    """Layers (count, KV heads, dim); a full layer projects K alone.

    As stated, without the norms of q and k (50 x 2 x 256 + 10 x 2 x 512 numbers) and the layers'
    scalars: one part in a million.
    """
    mlp_and_norms = 3 * h * f + 4 * h
    (n1, kv1, d1), (n2, kv2, d2) = sliding, full
    return (
        v * h + h + (n1 + n2) * mlp_and_norms
        + n1 * (2 * h * q * d1 + 2 * h * kv1 * d1)
        + n2 * (2 * h * q * d2 + 1 * h * kv2 * d2)
    )  # fmt: skip


def experts(*, h: int, e: int, f: int, shared: int = 0) -> int:
    """Router and experts; with a shared expert also its gate of one number."""
    return h * e + e * 3 * h * f + (3 * h * shared + h if shared else 0)


def delta(*, v: int, h: int, n: int, q: int, kv: int, d: int, nv: int, mlp: int, tables=2) -> int:
    """Every fourth layer attends with an output gate as wide as q, the others are delta-net:

    q, k of 16 heads and v of nv, all of 128, through a convolution of 4; gate z, decay and beta.
    """
    full = h * 2 * q * d + 2 * h * kv * d + q * d * h + 2 * d
    keys, values = 16 * 128, nv * 128
    mixed = 2 * keys + values
    linear = h * mixed + 4 * mixed + h * values + h * 2 * nv + 2 * nv + 128 + values * h
    return tables * v * h + n * (mlp + 2 * h) + n // 4 * full + (n - n // 4) * linear + h


def oss(*, n: int, e: int) -> tuple[int, int]:
    """All parameters, and those of the experts' matrices (no biases)."""
    h, v, attention = 2880, 201088, 64 * 64
    layer = h * attention + attention + 2 * (h * 512 + 512) + attention * h + h + 64
    layer += 2 * h + h * e + e + e * (2 * h + h)  # norms, router, biases of gate-up and down
    matrices = n * e * 3 * h * h
    return 2 * v * h + n * layer + h + matrices, matrices


QWEN = {"v": 151936, "d": 128, "f": 0}
COUNTS = {
    "gemma-3-1b": gemma3(v=262144, h=1152, n=26, q=4, kv=1, d=256, f=6912),
    "gemma-3-4b": gemma3(v=262208, h=2560, n=34, q=8, kv=4, d=256, f=10240),
    "gemma-3-12b": gemma3(v=262208, h=3840, n=48, q=16, kv=8, d=256, f=15360),
    "gemma-3-27b": gemma3(v=262208, h=5376, n=62, q=32, kv=16, d=128, f=21504),
    "gemma-4-31b": gemma4(
        v=262144, h=5376, q=32, f=21504, sliding=(50, 16, 256), full=(10, 4, 512)
    ),
    "mistral-7b": dense(v=32768, h=4096, n=32, q=32, kv=8, d=128, f=14336),
    "mistral-7b-v0.2": dense(v=32000, h=4096, n=32, q=32, kv=8, d=128, f=14336),
    "mistral-7b-v0.1": dense(v=32000, h=4096, n=32, q=32, kv=8, d=128, f=14336),
    "qwen3-30b-a3b": dense(**QWEN, h=2048, n=48, q=32, kv=4,
                           extra=2 * 128 + experts(h=2048, e=128, f=768)),
    "qwen3-235b-a22b": dense(**QWEN, h=4096, n=94, q=64, kv=4,
                             extra=2 * 128 + experts(h=4096, e=128, f=1536)),
    "qwen3-next-80b-a3b": delta(v=151936, h=2048, n=48, q=16, kv=2, d=256, nv=32,
                                mlp=experts(h=2048, e=512, f=512, shared=512)),
    "qwen3.5-0.8b": delta(v=248320, h=1024, n=24, q=8, kv=2, d=256, nv=16,
                          mlp=3 * 1024 * 3584, tables=1),
    "qwen3.5-4b": delta(v=248320, h=2560, n=32, q=16, kv=4, d=256, nv=32,
                        mlp=3 * 2560 * 9216, tables=1),
    "qwen3.5-9b": delta(v=248320, h=4096, n=32, q=16, kv=4, d=256, nv=32, mlp=3 * 4096 * 12288),
    "qwen3.5-27b": delta(v=248320, h=5120, n=64, q=24, kv=4, d=256, nv=48, mlp=3 * 5120 * 17408),
    "qwen3.5-35b-a3b": delta(v=248320, h=2048, n=40, q=16, kv=2, d=256, nv=32,
                             mlp=experts(h=2048, e=256, f=512, shared=512)),
    "qwen3.5-397b-a17b": delta(v=248320, h=4096, n=60, q=32, kv=2, d=256, nv=64,
                               mlp=experts(h=4096, e=512, f=1024, shared=1024)),
    "gpt-oss-20b": oss(n=24, e=32)[0],
    "gpt-oss-120b": oss(n=36, e=128)[0],
}  # fmt: skip
# As published with the models.
STATED = {
    "gemma-3-4b": 3_880_263_168, "gemma-3-12b": 11_766_034_176, "gemma-3-27b": 27_009_346_304,
    "gemma-4-31b": 30_697_309_440, "qwen3.5-35b-a3b": 34_660_610_688,
    "qwen3.5-27b": 26_895_998_464, "qwen3-next-80b-a3b": 79_674_391_296,
    "qwen3.5-0.8b": 752_393_024, "qwen3.5-4b": 4_205_751_296, "qwen3.5-9b": 8_953_803_264,
    "mistral-7b-v0.2": 7_241_732_096,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    assert geometries.geometry(name).parameters == COUNTS[name]
    assert STATED.get(name, COUNTS[name]) == COUNTS[name]


@pytest.mark.parametrize(("name", "n", "e"), [("gpt-oss-20b", 24, 32), ("gpt-oss-120b", 36, 128)])
def test_mxfp4_is_a_type_of_the_experts_alone(name, n, e):
    """Blocks of 32 numbers of 4 bits with a scale of 8; all the rest in 16 bits."""
    every, matrices = oss(n=n, e=e)
    expected = matrices // 32 * 17 + 2 * (every - matrices)
    assert weights_bytes(geometries.geometry(name), "MXFP4") == expected
    # The published files: 13.76 and 65.25 GB.
    assert round(expected / 1e9, 2) == {"gpt-oss-20b": 13.76, "gpt-oss-120b": 65.25}[name]


def test_mxfp4_of_a_model_without_such_experts():
    with pytest.raises(TurboqError, match=r"--weights=mxfp4: how many of .* llama-3-8b are exp"):
        weights_bytes(geometries.geometry("llama-3-8b"), "mxfp4")

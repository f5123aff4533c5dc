"""Windows of given tokens, statistics of given vectors, and a statistics folder made by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from turboq.numbers.rope import Rope
from turboq.plan import LayerGeometry, ModelGeometry, TextSource
from turboq_calibrate.cli.inspect import describe
from turboq_calibrate.observe import reduce
from turboq_calibrate.observe import statistics as st
from turboq_calibrate.observe import statistics_files as files
from turboq_calibrate.observe.held_back import HeldBack
from turboq_calibrate.observe.reservoir import Tokens
from turboq_calibrate.observe.texts import Windows

HEADS, DIM, TOKENS, WINDOWS, LENGTH = 2, 4, 3, 4, 6
INPUTS = {
    "statistics_version": st.VERSION,
    "model": {"fingerprint": "ab" * 32, "family": "llama", "name": "tiny", "dtype": "float32"},
    "text": {
        "texts": [{"name": n, "sha256": "1" * 64, "windows": 2} for n in ("a", "b")],
        "bos": False, "held_back_sha256": "2" * 64, "tokens_sha256": "3" * 64,
        "windows": WINDOWS, "window": LENGTH,
    },
    "recipe": {"seed": 0, "skip": 1, "windows_per_chunk": 2, "reservoir": TOKENS},
}  # fmt: skip

_side = jax.jit(reduce.side, static_argnums=0)


def windows_of(tokens: np.ndarray, source: str = "random") -> Windows:
    """Windows of one made-up text."""
    text = np.zeros(len(tokens), np.int32)
    source_of = TextSource(name=source, sha256="1" * 64)
    return Windows(tokens=tokens, texts=(source_of,), text=text, available=len(tokens))


def random_windows(vocab: int, count: int = 4, length: int = 16, seed: int = 1) -> Windows:
    """Windows of random tokens."""
    rng = np.random.default_rng(seed)
    return windows_of(rng.integers(0, vocab, (count, length), dtype=np.int32))


def side_of(x: np.ndarray, g: np.ndarray | None = None) -> st.SideStatistics:
    """One chunk x [B, T, h, D]: of keys with gradients g, else of queries."""
    g = None if g is None else jnp.asarray(g)
    reduced = _side("q" if g is None else "k", jnp.asarray(x), g)
    return st.SideStatistics(arrays=reduce.to_host(jax.device_get(reduced)))


def write_folder(out: Path) -> None:
    """The statistics of two layers, the second without RoPE, of zeros."""
    rows = np.zeros((TOKENS, HEADS, DIM), np.float32)
    number = np.zeros(TOKENS, np.int32)
    sample = Tokens(
        k=rows, v=rows, g_k=rows, g_v=rows, window=number, position=number, text=number
    ).to_bytes()
    layers, entries = [], []
    for i, rope in enumerate((Rope(dim=DIM, theta=100.0), None)):
        names = [s for s in st.SIDES if rope is not None or not s.endswith("_before")]
        sides = {
            s: {f.name: np.zeros(st.shape_of(f, HEADS, DIM), f.dtype) for f in st.fields_of(s)}
            for s in names
        }
        (out / files.layer_file(i)).write_bytes(files.to_bytes(sides))
        (out / files.tokens_file(i)).write_bytes(sample)
        layer = files.layer_from_sides(sides, out, rope)
        path = f"layers.{i}"
        entries.append(files.describe_layer(out, i, path, layer, sampled=True))
        layers.append(
            LayerGeometry(
                index=i, path=path, kv_heads=HEADS, q_heads=HEADS, k_dim=DIM, v_dim=DIM, rope=rope,
                rope_layout="none" if rope is None else "half",
            )
        )  # fmt: skip
    tokens = np.zeros((WINDOWS, LENGTH), np.int32)
    back = HeldBack(short={0: tokens[:1]}, long={1: tokens[:1]})
    files.write_windows(out, tokens, np.array([0, 0, 1, 1], np.int32), back)
    geometry = ModelGeometry(
        fingerprint="ab" * 32, family="llama", name="tiny", layers=tuple(layers)
    )
    files.write_manifest(out, INPUTS, geometry, WINDOWS * (LENGTH - 1), entries)


def use(folder: Path) -> str:
    """Everything that readers take from a folder."""
    found = files.load_statistics(folder)
    for i, layer in enumerate(found):
        _ = len(found.tokens(i)), layer.k.heads
    for i in found.window_texts:
        _ = found.texts[i]
    assert found.windows.shape == (WINDOWS, LENGTH)
    _ = found.held_back.sha256, found.geometry.layers, found.sha256
    return describe(str(folder), 1)

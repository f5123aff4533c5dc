"""Quality of one set of logits against another: KL, top-1 agreement, perplexity, with intervals.

Arrays of logits are large ([T, 49152] float32 is 200 MB for 1024 tokens), so everything that
touches the vocabulary is one jitted function over a block of positions; what leaves it is four
numbers per position. Sums over positions and windows are float64 on the host.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32

# Below this |log p - log q| the KL term is a Taylor polynomial, above it the plain formula. At the
# switch the dropped x^8/8! is 8e-7 of the term, and the plain formula loses 1/0.21 of an eps.
_SERIES_BELOW = 0.5
BLOCK = 256  # positions whose logits exist at the same time
LENGTHS = (1024, 4096, 16384)  # where buckets of position end
TAILS = {"kl_p99": 0.99, "kl_p999": 0.999}  # quantiles of KL over positions


def _series(x: Array) -> Array:
    """x + exp(-x) - 1 for |x| < 1/2: x^2/2 - x^3/6 + ... + x^7 term, relative error 8e-7."""
    c = [1.0 / 2, -1.0 / 6, 1.0 / 24, -1.0 / 120, 1.0 / 720, -1.0 / 5040]
    total = jnp.full_like(x, c[-1])
    for coefficient in reversed(c[:-1]):
        total = total * x + coefficient
    return total * x * x


def log_softmax(logits: Float[Array, "n V"]) -> Float[Array, "n V"]:
    """log p in float32, two passes: the maximum, then the sum of exponentials below it.

    log p_v = (l_v - max) - log sum exp(l - max). Rounding: at most V eps/2 from the sum (3e-3 for
    V = 49152 if every rounding error agreed; about 1e-6 measured on such rows) plus
    eps |l_v - max|.
    """
    x = logits.astype(jnp.float32)
    x = x - jnp.max(x, axis=-1, keepdims=True)
    return x - jnp.log(jnp.sum(jnp.exp(x), axis=-1, keepdims=True))


def _at(rows: Float[Array, "n V"], index: Int[Array, "n"]) -> Float[Array, "n"]:
    return jnp.take_along_axis(rows, index.astype(jnp.int32)[:, None], axis=-1)[:, 0]


@jax.jit
def reference(logits: Float[Array, "n V"], targets: Int[Array, "n"]) -> dict[str, Array]:
    """What every plan is compared with, computed once per block of positions.

    Returns:
      `log_p` [n, V], `first` [n] int32 (arg-max, lower token on a tie) and `nll` [n] in nats.
    """
    log_p = log_softmax(logits)
    first = jnp.argmax(log_p, axis=-1).astype(jnp.int32)
    return {"log_p": log_p, "first": first, "nll": -_at(log_p, targets)}


@jax.jit
def compare(
    exact: dict[str, Array], logits: Float[Array, "n V"], targets: Int[Array, "n"]
) -> dict[str, Float[Array, "n"]]:
    """Per-position measures of quantized `logits` (Q) against `reference(...)` (P).

    kl   = sum_v p (log p - log q) in nats
         = sum_v p (d + exp(-d) - 1), d = log p - log q, because sum p = sum q = 1
    nll  = -log q[target]
    top1 = 1 where P's first choice has the largest logit of Q

    The second form of the KL is summed: each term is >= 0, so nothing cancels. An error e common
    to all of `d` (the normaliser's rounding) costs e^2/2 instead of e, equal logits give exactly
    0, and what remains is the relative rounding of `d` and of the sum over V.

    Returns:
      `kl`, `nll` in nats and `top1` as 0.0 or 1.0, each [n] float32.
    """
    x = logits.astype(jnp.float32)
    top = jnp.max(x, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(x - top), axis=-1, keepdims=True))
    log_p, log_q = exact["log_p"], x - top - log_sum
    d = log_p - log_q
    p = jnp.exp(log_p)
    near = jnp.abs(d) < _SERIES_BELOW
    terms = jnp.where(near, p * _series(jnp.where(near, d, 0.0)), p * d + (jnp.exp(log_q) - p))
    return {
        "kl": jnp.sum(terms, axis=-1),
        "nll": -(_at(x, targets) - top[:, 0] - log_sum[:, 0]),
        "top1": (_at(x, exact["first"]) >= top[:, 0]).astype(jnp.float32),
    }


def perplexity(nll: Float64[np.ndarray, "..."]) -> float:
    """exp(mean NLL) over all predicted tokens (not the mean of per-window perplexities)."""
    return float(np.exp(np.mean(nll, dtype=np.float64)))


@functools.lru_cache(maxsize=8)
def _resamples(windows: int, samples: int, seed: int) -> Int32[np.ndarray, "R N"]:
    """Window indices of every resample, from Philox's raw words.

    NumPy promises the raw stream of a bit generator for ever, not what `Generator.integers` makes
    of it. The high 53 bits of a word become a uniform u in [0, 1), and the index is floor(u N).
    """
    raw = np.random.Philox(key=seed).random_raw(samples * windows)
    u = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.floor(u * windows).astype(np.int32).reshape(samples, windows)


def bootstrap_ci(
    per_window: Float64[np.ndarray, "N"],
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean over windows; None for fewer than two windows.

    Windows are drawn with replacement, so tokens of one window (which depend on each other) stay
    together. The bounds are the (1-level)/2 and (1+level)/2 quantiles, linearly interpolated, of
    `samples` resampled means. The same seed gives the same interval, and every plan of one table
    sees the same resamples. With few windows the interval is too narrow: a statement about these
    windows' spread, not about all text.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"{level=} must be between 0 and 1")
    if samples < 1:
        raise ValueError(f"{samples=} must be 1 or more")
    if per_window.shape[0] < 2:
        return None
    means = per_window[_resamples(per_window.shape[0], samples, seed)].mean(axis=1)
    lo, hi = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def bootstrap_quantiles(
    values: Float64[np.ndarray, "N P"],
    quantiles: tuple[float, ...],
    *,
    level: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> list[tuple[float, float]] | None:
    """`bootstrap_ci` of quantiles over all positions of the drawn windows, linearly interpolated.

    A resample holds window w c_w times: its order statistics are those of the sorted values with
    their windows' c as multiplicities, so every value is sorted once.
    """
    count, each = values.shape
    if count < 2 or not each:
        return None
    order = np.argsort(values, axis=None, kind="stable")
    ranked, window = values.ravel()[order], order // each
    at = np.array(quantiles) * (values.size - 1)
    ranks = np.stack([np.floor(at), np.ceil(at)])  # every resample has N P values
    found = np.empty((samples, len(quantiles)))
    for i, drawn in enumerate(_resamples(count, samples, seed)):
        held = np.cumsum(np.bincount(drawn, minlength=count)[window])
        low, high = ranked[np.searchsorted(held, ranks, side="right")]
        found[i] = low + (high - low) * (at - ranks[0])
    bounds = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [(float(lo), float(hi)) for lo, hi in bounds.T]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMetrics:
    """Measures of every scored position: [windows, positions], float64 on the host."""

    kl: Float64[np.ndarray, "N P"]
    nll: Float64[np.ndarray, "N P"]
    nll_exact: Float64[np.ndarray, "N P"]
    top1: Float64[np.ndarray, "N P"]

    @classmethod
    def stack(cls, rows: list[dict[str, np.ndarray]]) -> TokenMetrics:
        """From one dict of [positions] arrays per window, in window order."""
        return cls(
            **{
                f.name: np.stack([np.asarray(r[f.name], np.float64) for r in rows])
                for f in dataclasses.fields(cls)
            }
        )

    def since(self, first: int) -> TokenMetrics:
        """The positions from `first` on."""
        return TokenMetrics(
            **{f.name: getattr(self, f.name)[:, first:] for f in dataclasses.fields(self)}
        )

    def by_position(self, first: int = 0, **bootstrap: Any) -> list[dict[str, Any]]:
        """Quality in buckets of position that end at `LENGTHS` and at P, of positions >= `first`.

        kl_mean, top1 and perplexity_ratio as in `summary`, kl_p99 and kl_p999 over the bucket's
        positions, each with `bootstrap` interval over windows (`*_ci`; None with one window). A
        bucket without a scored position is left out: nothing quantized can be seen there.
        """
        found, positions = [], self.kl.shape[1]
        edges = [0, *(n for n in LENGTHS if n < positions), positions]
        for start, end in itertools.pairwise(edges):
            at = slice(max(start, first), end)
            kl, top1, lost = self.kl[:, at], self.top1[:, at], (self.nll - self.nll_exact)[:, at]
            if not kl.size:
                continue
            row: dict[str, Any] = {"start": start, "end": end, "positions": int(kl.size)}
            for name, x in (("kl_mean", kl), ("top1", top1), ("perplexity_ratio", lost)):
                ci = bootstrap_ci(x.mean(axis=1), **bootstrap)
                of = np.exp if name == "perplexity_ratio" else np.asarray
                row[name] = float(of(x.mean()))
                row[f"{name}_ci"] = None if ci is None else [float(y) for y in of(ci)]
            tails = bootstrap_quantiles(kl, tuple(TAILS.values()), **bootstrap)
            for i, (name, q) in enumerate(TAILS.items()):
                row[name] = float(np.quantile(kl, q))
                row[f"{name}_ci"] = None if tails is None else list(tails[i])
            found.append(row)
        return found

    def summary(self, *, level: float = 0.95, samples: int = 2000, seed: int = 0) -> dict[str, Any]:
        """What a row of the quality table says.

        kl_mean: mean over all positions of all windows, nats per token. kl_median, kl_p99, kl_p999:
        quantiles over positions (50, 99, 99.9 %), linearly interpolated. kl_ci: `level` bootstrap
        interval of kl_mean over windows (None with one window). kl_windows: mean KL of every
        window, for paired comparisons. top1: share of positions where both arg-maxima agree.
        perplexity, perplexity_exact: exp(mean NLL) of the plan and of the exact model.
        perplexity_ratio: the first over the second. scored_positions: of all windows together.
        """
        ci = bootstrap_ci(self.kl.mean(axis=1), level=level, samples=samples, seed=seed)
        return {
            "kl_mean": float(self.kl.mean()),
            "kl_median": float(np.quantile(self.kl, 0.5)),
            "kl_ci": None if ci is None else list(ci),
            "kl_windows": [float(x) for x in self.kl.mean(axis=1)],
            **{name: float(np.quantile(self.kl, q)) for name, q in TAILS.items()},
            "top1": float(self.top1.mean()),
            "perplexity": perplexity(self.nll),
            "perplexity_exact": perplexity(self.nll_exact),
            "perplexity_ratio": float(np.exp((self.nll - self.nll_exact).mean())),
            "scored_positions": int(self.kl.size),
        }


def kl_by_position(kl: Float64[np.ndarray, "N P"], first: int = 0) -> list[dict[str, Any]]:
    """Mean KL in buckets of position: [0, 256), [256, 512), [512, 1024), ... to the window's end.

    `positions` counts those scored in all windows, from position `first` on; where a bucket has
    none, its `kl_mean` is None. The last bucket ends at P, the last position that predicts a token.
    """
    edges = [0, 256]
    while edges[-1] < kl.shape[1]:
        edges.append(2 * edges[-1])
    edges[-1] = kl.shape[1]
    found = []
    for start, end in itertools.pairwise(edges):
        scored = kl[:, max(start, first) : end]
        mean = float(scored.mean()) if scored.size else None
        found.append({"start": start, "end": end, "kl_mean": mean, "positions": int(scored.size)})
    return found


def steps(
    tokens: TokenMetrics,
    kl: Float64[np.ndarray, "N S"],
    top1: Float64[np.ndarray, "N S"],
    **bootstrap: Any,
) -> dict[str, Any]:
    """The last S positions in one pass (`tokens`) and step by step: means, and their difference."""
    passed = tokens.since(tokens.kl.shape[1] - kl.shape[1])
    difference = kl - passed.kl
    ci = bootstrap_ci(difference.mean(axis=1), **bootstrap)
    return {
        "positions": int(kl.size),
        "kl_one_pass": float(passed.kl.mean()),
        "kl_steps": float(kl.mean()),
        "difference_ci": None if ci is None else list(ci),
        "largest": float(np.abs(difference).max()),
        "top1_one_pass": float(passed.top1.mean()),
        "top1_steps": float(top1.mean()),
    }

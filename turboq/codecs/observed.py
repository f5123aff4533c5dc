"""What calibration saw of one side (K or V) of one layer: everything that a codec's `fit` may use.

Coordinates are those that are stored: keys before or after their rotary embedding, whichever the
side says. Arrays have the KV heads as leading axis and are NumPy, on the host.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from turboq.errors import TurboqError

# What a fit may need, and what to do where it was not observed.
PARTS = {
    "moments": "observe more text (`turboq calibrate --windows`)",
    "sample": "observe again and keep a sample of tokens (`turboq calibrate`)",
    "gradients": "observe again with gradients (`turboq calibrate`)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """Moments over all tokens that were seen, and a sample of tokens with their gradients.

    x, g: N sampled tokens and the gradient of the log likelihood at each, nats per unit of x.
    text: which calibration text each sampled token is from, 0, 1, ...
    tokens: how many tokens the moments are over (the sample's N where nothing else was seen).
    mean, covariance: of all tokens, covariance about the mean.
    metric: 1/2 E[g g^T]: an error e costs e^T metric e nats per token. Without gradients: the
      second moment of the queries for K, the identity for V (no nats then: `gradients` is False).
    weighted_mean, weighted_covariance: the same with every token counted by |g|^2 over its mean.
    queries: second moment of the queries that read the head (keys only).
    rope_layout, rope_dim: which coordinates turn together ("none": values, unrotated keys).
    """

    x: Float[np.ndarray, "K N D"]
    g: Float[np.ndarray, "K N D"] | None
    text: Int[np.ndarray, "N"]
    tokens: int
    mean: Float[np.ndarray, "K D"]
    covariance: Float[np.ndarray, "K D D"]
    metric: Float[np.ndarray, "K D D"]
    weighted_mean: Float[np.ndarray, "K D"]
    weighted_covariance: Float[np.ndarray, "K D D"]
    queries: Float[np.ndarray, "K D D"] | None = None
    rope_layout: str = "none"
    rope_dim: int | None = None

    @property
    def gradients(self) -> bool:
        return self.g is not None

    @property
    def heads(self) -> int:
        return self.x.shape[0]

    @property
    def dim(self) -> int:
        return self.x.shape[2]

    def require(self, parts: tuple[str, ...], who: str, *, fewest: int = 1) -> None:
        """Raises TurboqError unless all `parts` were observed, over at least `fewest` tokens.

        Parts are "moments", "sample" and "gradients"; `who` is named in the message.
        """
        n = self.x.shape[1]
        tokens = {"moments": self.tokens, "sample": n, "gradients": n if self.gradients else 0}
        for part in parts:
            if tokens[part] < fewest:
                have = f"{tokens[part]} tokens are too few" if tokens[part] else "none was observed"
                raise TurboqError(
                    f"{who} needs {part} of {fewest} tokens or more, {have}: {PARTS[part]}"
                )

    @classmethod
    def of(
        cls,
        x: Float[np.ndarray, "K N D"],
        g: Float[np.ndarray, "K N D"] | None = None,
        *,
        text: Int[np.ndarray, "N"] | None = None,
        queries: Float[np.ndarray, "K D D"] | None = None,
        rope_layout: str = "none",
        rope_dim: int | None = None,
    ) -> Observed:
        """From vectors alone: every moment is the sample's own, float64."""
        heads, n, dim = x.shape
        ones = np.ones((heads, n))
        mean, covariance = _moments(x, ones)
        if g is None:
            eye = np.broadcast_to(np.eye(dim), (heads, dim, dim))
            metric, weights = eye if queries is None else queries, ones
        else:
            wide = g.astype(np.float64)
            metric = np.swapaxes(wide, 1, 2) @ wide / (2 * n)
            energy = np.einsum("knd,knd->kn", wide, wide)
            total = energy.mean(axis=1, keepdims=True)
            weights = np.where(total > 0, energy / np.where(total > 0, total, 1.0), 1.0)
        weighted_mean, weighted_covariance = _moments(x, weights)
        return cls(
            x=x, g=g, text=np.zeros(n, np.int32) if text is None else text, tokens=n,
            mean=mean, covariance=covariance, metric=metric, weighted_mean=weighted_mean,
            weighted_covariance=weighted_covariance, queries=queries, rope_layout=rope_layout,
            rope_dim=rope_dim,
        )  # fmt: skip


def subset(seen: Observed, keep: Bool[np.ndarray, "N"]) -> Observed:
    """Of the sampled tokens where `keep` only; moments are theirs, as `Observed.of` has them.

    Raises:
      ValueError: no token is kept.
    """
    if not np.any(keep):
        raise ValueError(f"{len(keep)=} tokens, and none is kept")
    return Observed.of(
        seen.x[:, keep], None if seen.g is None else seen.g[:, keep], text=seen.text[keep],
        queries=seen.queries, rope_layout=seen.rope_layout, rope_dim=seen.rope_dim,
    )  # fmt: skip


def _moments(x: np.ndarray, weights: Float[np.ndarray, "K N"]) -> tuple[np.ndarray, np.ndarray]:
    wide = x.astype(np.float64)
    mean = np.einsum("kn,knd->kd", weights, wide) / x.shape[1]
    centred = wide - mean[:, None]
    return mean, np.swapaxes(centred * weights[:, :, None], 1, 2) @ centred / x.shape[1]

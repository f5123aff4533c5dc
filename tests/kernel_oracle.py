"""Independent oracle of the decode kernels: float64 NumPy, bit by bit and query row by query row.

It shares nothing with the implementations but the documented layout (`numbers.packing`, docstring)
and formulas (`turboq.codecs.reading`, `turboq_kernels.decode.api.decode`, docstrings).
"""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np

from turboq.cache.simulate import simulate


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Normalised output, log-sum-exp and what was summed, float64."""

    out: np.ndarray  # [B, N, M, C], zero for rows that see nothing
    lse: np.ndarray  # [B, N, M], -inf for rows that see nothing
    mean_abs: np.ndarray  # [B, N, M, C], sum p |v|: the size that rounding is relative to


def code_at(words: np.ndarray, slot: int) -> np.ndarray:
    """Codes [C] of one slot of a head-page [bits, rows, C]: token rows*j + r is bit j of row r."""
    bits, rows, channels = words.shape
    j, r = divmod(slot, rows)
    code = np.zeros(channels, np.int64)
    for p in range(bits):
        code += ((words[p, r].astype(np.int64) >> j) & 1) << p
    return code


def level_of(levels: str, table, code: np.ndarray) -> np.ndarray:
    """Levels of codes, float64."""
    if levels == "table":
        return np.asarray(table, np.float64)[code]
    if levels == "affine":
        return code.astype(np.float64)
    if levels == "sign":
        return 2.0 * code - 1.0
    byte = code.astype(np.uint8)
    view = {"int8": np.int8, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
    return byte.view(view[levels]).astype(np.float64)


def vector_at(side, head: int, head_page: int, slot: int) -> np.ndarray:
    """The stored vector [C] in one slot of one head-page, float64."""
    pieces = []
    for part, words, scales, offsets, table in zip(
        side.reading.parts, side.words, side.scales, side.offsets, side.tables, strict=True
    ):
        code = code_at(np.asarray(words[head_page]), slot)
        value = level_of(part.levels, None if table is None else table[head], code)
        if scales is not None:
            value = value * float(scales[head_page, slot])
        if offsets is not None:
            value = value + float(offsets[head_page, slot])
        pieces.append(value)
    return np.concatenate(pieces)


def decode(q, k, v, pages, starts, ends, *, bias=None, scale=1.0, softcap=None) -> Softmax:
    """Attention over the stored tokens that each row sees, in float64."""
    host = _Host(k, v)
    q, starts, ends = np.asarray(q, np.float64), np.asarray(starts), np.asarray(ends)
    table, bias = np.asarray(pages.table), None if bias is None else np.asarray(bias)
    batch, heads, m, _ = q.shape
    page = k.words[0].shape[-2] * 32
    out = np.zeros((batch, heads, m, sum(p.width for p in v.reading.parts)))
    size = np.zeros_like(out)
    lse = np.full((batch, heads, m), -np.inf)
    for b in range(batch):
        for n in range(heads):
            for i in range(m):
                slots = range(int(starts[b, i]), int(ends[b, i]))
                if not slots:
                    continue
                where = [
                    (int(table[b, s // page]) * pages.stride_page + n * pages.stride_head, s % page)
                    for s in slots
                ]
                logit = np.array([q[b, n, i] @ host.k_at(n, *w) for w in where])
                if bias is not None:
                    logit = logit + float(bias[b, n, i])
                logit = logit * scale
                if softcap is not None:
                    logit = softcap * np.tanh(logit / softcap)
                lse[b, n, i] = logit.max() + np.log(np.sum(np.exp(logit - logit.max())))
                p = np.exp(logit - lse[b, n, i])
                values = np.stack([host.v_at(n, *w) for w in where])
                out[b, n, i] = p @ values
                size[b, n, i] = p @ np.abs(values)
    return Softmax(out=out, lse=lse, mean_abs=size)


class _Host:
    """K and V on the host, each stored vector unpacked once."""

    def __init__(self, k, v):
        self.k, self.v, self.known = _to_host(k), _to_host(v), {}

    def k_at(self, head, head_page, slot):
        return self._at("k", self.k, head, head_page, slot)

    def v_at(self, head, head_page, slot):
        return self._at("v", self.v, head, head_page, slot)

    def _at(self, name, side, *where):
        if (name, *where) not in self.known:
            self.known[name, *where] = vector_at(side, *where)
        return self.known[name, *where]


def _to_host(side):
    def each(arrays):
        return tuple(None if a is None else np.asarray(a) for a in arrays)

    return dataclasses.replace(
        side,
        words=each(side.words),
        scales=each(side.scales),
        offsets=each(side.offsets),
        tables=each(side.tables),
    )


def policy_attention(
    layer, q, k, v, *, scale, window=None, softcap=None, own_from=None, sink_logits=None,
    stored_values=None, since=0,
) -> np.ndarray:  # fmt: skip
    """Causal attention [B, T - since, H, E] of a window of tokens by the layer's policy, float64.

    Query by query: decoded keys and values, exact where the policy says so (sinks, recent tokens),
    and where `own_from[t]` says from which position on query t has exact tokens beside it.
    `stored_values`: what quantized tokens decode to, if not as `simulate` says. Of the queries
    before `since` nobody asks.
    """
    policy = layer.policy
    k_hat, v_hat = (np.asarray(x, np.float64) for x in stored_values or simulate(layer, k, v))
    dtype = np.dtype(policy.exact_dtype)
    k_exact, v_exact = (np.asarray(x).astype(dtype).astype(np.float64) for x in (k, v))
    batch, t, heads, dim = q.shape
    q = np.asarray(q, np.float64).reshape(batch, t, k.shape[2], -1, dim)  # of every KV head
    out = np.zeros((batch, t - since, heads, v.shape[-1]))
    for i in range(since, t):
        s = np.arange(i + 1)
        stored = max(i + 1 - policy.recent, 0) // layer.block * layer.block
        if own_from is not None:
            first = int(own_from[i])
            kept = first if layer.block == 1 else max(first - policy.recent, 0)
            stored = min(stored, kept // layer.block * layer.block)
        exact = (s < policy.sinks) | (s >= stored)
        keep = s > i - window if window else np.ones(i + 1, bool)
        pick = exact[None, :, None, None]
        keys = np.where(pick, k_exact[:, : i + 1], k_hat[:, : i + 1])[:, keep]
        values = np.where(pick, v_exact[:, : i + 1], v_hat[:, : i + 1])[:, keep]
        logits = np.einsum("bkgd,bskd->bkgs", q[:, i], keys) * scale
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        p = np.exp(logits - logits.max(-1, keepdims=True))
        total = p.sum(-1)
        if sink_logits is not None:
            sinks = np.asarray(sink_logits, np.float64).reshape(total.shape[1:])
            total = total + np.exp(sinks - logits.max(-1))
        out[:, i - since] = np.einsum("bkgs,bskd->bkgd", p / total[..., None], values).reshape(
            batch, heads, -1
        )
    return out

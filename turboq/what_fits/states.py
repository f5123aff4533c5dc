"""Recurrent state of the layers that keep no KV cache, in bytes per sequence.

Each rule counts the recurrence in float32 (in `mamba_ssm_cache_dtype` where that is given) and the
tail of the short convolution in 16 bits:

    gated_delta  4 Hv Dk Dv + 2 (c - 1) (2 Hk Dk + Hv Dv)
    kda          4 H D D + 2 (c - 1) 3 H D
    mamba2       4 I N + 2 (c - 1) (I + 2 G N)       I inner channels, N state, G groups
    mamba        4 I N + 2 (c - 1) I
    lightning    4 H D D                             all query heads
    lru          4 W + 2 (c - 1) W
    short_conv   2 (c - 1) hidden

with c the width of the convolution. A rule whose fields are not all there gives None: unknown.
"""

from __future__ import annotations

from collections.abc import Callable

from turboq.what_fits.hf_fields import Fields
from turboq.what_fits.layers import MAX_DIM, MAX_HEADS

WIDE = 2**24  # channels
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}


def state_bytes(rule: str | None, read: Fields) -> int | None:
    """Bytes of one layer's state by `rule`; None if there is no rule or a field of it is absent.

    Raises:
      TurboqError: a nonsensical field.
    """
    if rule is None:
        return None
    try:
        return RULES[rule](read)
    except _Absent:
        return None


class _Absent(Exception):
    """A field that a rule needs is not in the file."""


def _need(read: Fields, *keys: str, high: int = WIDE) -> int:
    found = read.optional(*keys, high=high)
    if found is None:
        raise _Absent
    return found


def _tail(read: Fields, *keys: str) -> int:
    """Tokens that the short convolution looks back."""
    return _need(read, *keys, high=64) - 1


def _gated_delta(read: Fields) -> int:
    nk, dk = _need(read, "linear_num_key_heads"), _need(read, "linear_key_head_dim", high=MAX_DIM)
    nv, dv = (
        _need(read, "linear_num_value_heads"),
        _need(read, "linear_value_head_dim", high=MAX_DIM),
    )
    return _recurrence(read) * nv * dk * dv + 2 * _tail(read, "linear_conv_kernel_dim") * (
        2 * nk * dk + nv * dv
    )


def _kda(read: Fields) -> int:
    own = read.inner("linear_attn_config")
    heads = own.optional("num_heads", high=MAX_HEADS) or _need(
        read, "linear_num_heads", "num_attention_heads", high=MAX_HEADS
    )
    # `head_dim` is the rotary part in files that transformers has written, beside the first name.
    dim = own.optional("head_dim", high=MAX_DIM) or _need(
        read, "linear_head_dim", "head_dim", high=MAX_DIM
    )
    width = own.optional("short_conv_kernel_size", high=64) or _need(
        read, "linear_conv_kernel_dim", "short_conv_kernel_size", high=64
    )
    return 4 * heads * dim * dim + 2 * (width - 1) * 3 * heads * dim


def _inner(read: Fields) -> int:
    """Inner channels of a Mamba layer."""
    own = read.optional("mamba_d_ssm", high=WIDE)
    if own is not None:
        return own
    dims = ("mamba_head_dim", "mamba_d_head", "mamba_headdim")
    heads = read.optional("mamba_num_heads", "mamba_n_heads", "n_mamba_heads", high=MAX_HEADS)
    if heads is not None and all(read.get(key) != "auto" for key in dims):
        dim = read.optional(*dims, high=MAX_DIM)
        if dim is not None:
            return heads * dim
    return _need(read, "mamba_expand", "expand", high=64) * _need(read, "hidden_size")


def _recurrence(read: Fields) -> int:
    """Bytes of one number of the recurrence."""
    dtype = read.get("mamba_ssm_cache_dtype") or "float32"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise read.fail("mamba_ssm_cache_dtype", f"must be one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _mamba2(read: Fields) -> int:
    inner, size = _inner(read), _need(read, "ssm_state_size", "mamba_d_state", high=MAX_DIM)
    groups = _need(read, "n_groups", "mamba_n_groups", "mamba_ngroups", high=MAX_HEADS)
    tail = _tail(read, "conv_kernel", "mamba_d_conv")
    return _recurrence(read) * inner * size + 2 * tail * (inner + 2 * groups * size)


def _mamba(read: Fields) -> int:
    inner = _need(read, "mamba_expand", high=64) * _need(read, "hidden_size")
    size = _need(read, "mamba_d_state", high=MAX_DIM)
    return _recurrence(read) * inner * size + 2 * _tail(read, "mamba_d_conv") * inner


def _lightning(read: Fields) -> int:
    heads = _need(read, "num_attention_heads", high=MAX_HEADS)
    dim = read.optional("head_dim", high=MAX_DIM) or _need(read, "hidden_size") // heads
    return 4 * heads * dim * dim


def _lru(read: Fields) -> int:
    width = read.optional("lru_width", high=WIDE) or _need(read, "hidden_size")
    return 4 * width + 2 * _tail(read, "conv1d_width") * width


def _short_conv(read: Fields) -> int:
    return 2 * _tail(read, "conv_L_cache") * _need(read, "hidden_size")


RULES: dict[str, Callable[[Fields], int]] = {
    "gated_delta": _gated_delta, "kda": _kda, "mamba2": _mamba2, "mamba": _mamba,
    "lightning": _lightning, "lru": _lru, "short_conv": _short_conv,
}  # fmt: skip

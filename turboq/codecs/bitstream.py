"""Codes as engines lay them out in bytes: little-endian bit streams, on the host."""

from __future__ import annotations

import numpy as np


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n] below 2**bits -> uint8 [..., ceil(n * bits / 8)].

    Code i takes bits i*bits .. i*bits + bits - 1 of the stream, bit k of the stream being bit k % 8
    of byte k // 8: at 4 bits the even channel is the low nibble, at 3 bits eight codes fill three
    bytes. Padding bits are zero.
    """
    codes = np.asarray(codes, np.uint8)
    split = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(split.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bits(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack_bits`: the first `count` codes."""
    split = np.unpackbits(stream, axis=-1, count=count * bits, bitorder="little")
    split = split.reshape(*stream.shape[:-1], count, bits)
    return np.packbits(split, axis=-1, bitorder="little")[..., 0]


def as_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers [..., n] -> their little-endian bytes uint8 [..., n * itemsize]."""
    little = np.ascontiguousarray(np.asarray(values), dtype=np.dtype(dtype).newbyteorder("<"))
    return little.view(np.uint8)


def from_bytes(stream: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `as_bytes`."""
    little = np.ascontiguousarray(stream).view(np.dtype(dtype).newbyteorder("<"))
    return little.astype(np.dtype(dtype))


def check_width(stream: np.ndarray, expected: int) -> None:
    """Raises ValueError unless the last axis holds exactly `expected` bytes."""
    if stream.dtype != np.uint8 or stream.shape[-1:] != (expected,):
        found = f"{stream.dtype} {list(stream.shape)}"
        raise ValueError(f"stored bytes are {found}, expected uint8 [..., {expected}]")

"""Reads plan.json, plan.safetensors and packed pages with Python's library and NumPy alone.

Meant to be ported to C++ or CUDA: nothing here imports turboq. Three steps, one more where heads
are stored together ("joint" in a layer) and one for keys not stored after RoPE ("rope" in its k):

    plan, tensors = read_plan("folder")               JSON, and a safetensors file by hand
    codes = unpack(words)                             bit planes -> one code per token and channel
    x = decode(codec, arrays, fields)                 codes -> numbers
    keys, values = part(plan, tensors, layer, units)  if the layer joins heads
    x = turn(plan, layer, arrays, x, positions)       if there is a rope

A page is 256 tokens of one KV head: words uint32 [bits, 8, C]; bit j of words[p, r, c] is bit p of
the code of token 8 j + r, channel c. Pages follow each other; a field that is not packed has one
row per token. The two codecs below cover every codec with a rotation and a codebook or with
symmetric integers; another codec's formula stands in its file."""

import json
import pathlib
import struct

import numpy as np


def read_safetensors(path):
    """Name -> array. The file: 8 bytes little-endian length, that much JSON, then raw data."""
    raw = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, start = json.loads(raw[8 : 8 + length]), 8 + length
    header.pop("__metadata__", None)
    kinds = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "U32": "<u4", "I8": "i1"}
    out = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = np.frombuffer(raw[start + first : start + last], kinds[entry["dtype"]])
        out[name] = data.reshape(entry["shape"])
    return out


def read_plan(folder):
    """(plan.json as it is, every tensor of its side file)."""
    folder = pathlib.Path(folder)
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    if plan["schema_version"] != 1:
        raise ValueError(f"schema_version {plan['schema_version']} is not 1")
    return plan, read_safetensors(folder / plan["arrays"]["file"])


def codec_of(plan, layer, side, head):
    """The codec of one KV head: the side's own, or its override under "heads"."""
    chosen = next(entry for entry in plan["layers"] if entry["index"] == layer)[side]
    config = chosen.get("heads", {}).get(str(head), chosen)
    return {key: value for key, value in config.items() if key not in ("heads", "rope")}


def arrays_of(plan, tensors, layer, side, head):
    """Fitted arrays of one head (per head under overrides, else a row of a stack), and its tables.

    Tables are constants that follow from the codec's description; the file holds them so that a
    reader need not know how to make a rotation.
    """
    config = codec_of(plan, layer, side, head)
    start = f"layers.{layer}.{side}."
    out = {}
    for name, values in tensors.items():
        if name.startswith(f"{start}heads.{head}."):
            out[name.rpartition(".")[2]] = values
        elif name.startswith(start) and ".heads." not in name:
            out[name[len(start) :]] = values[head]
    for use in plan["tables"]:
        if use["codec"] == config:
            out |= {table: tensors[name] for table, name in use["tensors"].items()}
    return out


def unpack(words):
    """uint32 [pages, bits, 8, C] -> uint8 [256 * pages, C]."""
    pages, bits, rows, channels = words.shape
    codes = np.zeros((pages, 32, rows, channels), np.uint8)
    for plane in range(bits):
        for j in range(32):
            bit = (words[:, plane] >> np.uint32(j)) & np.uint32(1)
            codes[:, j] |= (bit << np.uint32(plane)).astype(np.uint8)
    return codes.reshape(pages * 32 * rows, channels)


def decode(codec, arrays, codes, scale=None):
    """Numbers [tokens, D] from codes [tokens, D] and, if stored, the scale of each token [tokens].

    per_head, turboquant_mse    x = mean + scale * R^T codebook[code]
    per_channel (symmetric)     x = channel_scale * (code - 2^(bits - 1))
    """
    if codec["codec"] in ("per_head", "turboquant_mse"):
        scale = arrays["scale"] if scale is None else np.asarray(scale, np.float32)[:, None]
        return (arrays["codebook"][codes] @ arrays["rotation"]) * scale + arrays.get("mean", 0)
    if codec["codec"] == "per_channel" and codec["form"] == "symmetric":
        return (codes.astype(np.float32) - 2 ** (codec["bits"] - 1)) * arrays["channel_scale"]
    raise ValueError(f"codec {codec['codec']!r} is not in this example")


def part(plan, tensors, layer, keys, values):
    """Keys [tokens, K, D] and values [tokens, K, E] from decoded units of those shapes.

    A layer's "joint" heads are one vector: [keys, values] = center + S [units of keys, of values].
    Keys are those that `turn` takes, with the arrays of `joint_mean`."""
    heads = next(e for e in plan["layers"] if e["index"] == layer)["joint"]
    start, out = f"layers.{layer}.joint.", []
    for j, first in enumerate(range(0, keys.shape[1], heads)):
        units = [x[:, first : first + heads].reshape(len(x), -1) for x in (keys, values)]
        group = {n[len(start) :]: x[j] for n, x in tensors.items() if n.startswith(start)}
        u = np.concatenate([*units, np.zeros((len(keys), 1))], axis=1)[:, group["coded"]]
        x = u * group["synthesis_scale"] @ group["synthesis"].T * group["synthesis_channels"]
        out.append(np.split(x + group["center"], [units[0].shape[1]], axis=1))
    k, v = (np.concatenate(x, axis=1) for x in zip(*out, strict=True))
    return k.reshape(keys.shape), v.reshape(values.shape)


def joint_mean(plan, tensors, layer, head, dim):
    """What `turn` needs of the keys of a head that is joined with others: their mean [D]."""
    group, at = divmod(head, next(e for e in plan["layers"] if e["index"] == layer)["joint"])
    return {"mean": tensors[f"layers.{layer}.joint.mean"][group, at * dim : (at + 1) * dim]}


def turn(plan, layer, arrays, x, positions):
    """Decoded keys [tokens, D] of one head as attention takes them, at their positions [tokens].

    Keys "before" are rotated to their positions. Those of a "block:P" lie relative to the first
    position p0 of their P positions, the head's mean turned apart: R(p0) (x - mean) + R(p) mean.
    """
    form = next(e for e in plan["layers"] if e["index"] == layer)["k"].get("rope", "after")
    if form == "after":
        return x
    rope, positions = plan["model"]["layers"][layer]["rope"], np.asarray(positions)
    if form == "before":
        return rotate(rope, x, positions)
    mean = np.broadcast_to(arrays["mean"], x.shape)
    start = positions - positions % int(form.removeprefix("block:"))
    return rotate(rope, x - mean, start) + rotate(rope, mean, positions)


def inverse_frequencies(rope):
    """Radians per token of every rotary pair, float32 [dim / 2]."""
    if "inv_freq" in rope:
        return np.asarray(rope["inv_freq"], np.float32)
    turns = rope["theta"] ** -(np.arange(0, rope["dim"], 2) / rope["dim"])
    scaling = rope.get("scaling", {"type": "linear", "factor": 1.0})
    kept = 0.0  # 1 for pairs that turn too often within the original context to be slowed down
    if scaling["type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        often = scaling["original_context"] * turns / (2 * np.pi)
        kept = np.clip((often - low) / (high - low), 0, 1)
    return (turns * ((1 - kept) / scaling["factor"] + kept)).astype(np.float32)


def rotate(rope, x, positions):
    """Keys [tokens, D] turned to their positions [tokens], the index of each in its sequence."""
    angle = np.asarray(positions, np.float32)[:, None] * inverse_frequencies(rope)
    cos, sin, dim = np.cos(angle), np.sin(angle), rope["dim"]
    first = slice(0, dim // 2) if rope["layout"] == "half" else slice(0, dim, 2)
    second = slice(dim // 2, dim) if rope["layout"] == "half" else slice(1, dim, 2)
    out = np.array(x, np.float32)
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out

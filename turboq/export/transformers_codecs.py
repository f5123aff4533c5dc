"""Codecs of a turboq plan in plain PyTorch, for turboq_cache.py: vectors into bits, and back.

    side = Side(plan, tensors, position, "k")     all KV heads of one layer's keys
    bits = side.encode(x)                         [B, K, T, D] -> [B, T, n], 0 or 1
    x_hat = side.decode(bits)

Codecs: exact; turboquant_mse and per_head; transform with scalar or window codes. The
same numbers as turboq's JAX code up to the order of float32 sums.
"""

import math

import torch
from read_plan import arrays_of, codec_of, inverse_frequencies


def rope_of(plan, position, keys, joint):
    """How a layer's keys stand when they are stored; None: as the model hands them over."""
    layer = plan["layers"][position]
    form = layer["k"].get("rope", "after")
    if form == "after":
        return None
    block = 1 if form == "before" else int(form.removeprefix("block:"))
    mean = keys.mean if joint is None else joint.key_mean(keys.heads, keys.dim)
    return Rope(plan["model"]["layers"][layer["index"]]["rope"], block, mean)


class Rope:
    """A rotary embedding, and keys relative to their block of positions (turboq/cache/key_form.py).

    x = R(-p0) k - (R(p - p0) - I) mean with p0 the first position of p's block; of blocks of one
    position, x is the key before its rotary embedding.
    """

    def __init__(self, rope, block, mean):
        self.half, self.layout, self.block, self.mean = (
            rope["dim"] // 2,
            rope["layout"],
            block,
            mean,
        )
        self.inv_freq = torch.from_numpy(inverse_frequencies(rope))

    def to(self, device):
        self.inv_freq, self.mean = self.inv_freq.to(device), self.mean.to(device)

    def tables(self, positions):
        angles = positions.float()[..., None] * self.inv_freq
        return angles.cos(), angles.sin()

    def stored(self, k, offset, start):
        """Rotated keys [B, K, T, D] of slots from `start` on, as codecs store them."""
        at, within = self._places(k, offset, start)
        return self._turn(k, at - within, -1.0) - self._swing(k, within)

    def read(self, x, offset, start):
        """The inverse of `stored`."""
        at, within = self._places(x, offset, start)
        return self._turn(x + self._swing(x, within), at - within, 1.0)

    def _places(self, x, offset, start):
        slots = torch.arange(start, start + x.shape[2], device=x.device)
        at = slots + offset[:, None]
        return at, at % self.block

    def _swing(self, x, within):
        """What a head's mean turns within a block."""
        if self.block == 1:
            return 0.0
        mean = self.mean[:, None].expand(x.shape)
        return self._turn(mean, within, 1.0) - mean

    def _turn(self, x, positions, sign):
        """x [B, K, T, D] turned by positions [B, T] (sign -1: back)."""
        cos, sin = (t[:, None] for t in self.tables(positions))
        sin = sin * sign
        if self.layout == "half":
            a, b = x[..., : self.half], x[..., self.half : 2 * self.half]
        else:
            a, b = x[..., 0 : 2 * self.half : 2], x[..., 1 : 2 * self.half : 2]
        turned = (a * cos - b * sin, b * cos + a * sin)
        if self.layout == "half":
            return torch.cat([*turned, x[..., 2 * self.half :]], dim=-1)
        pairs = torch.stack(turned, dim=-1).flatten(-2)
        return torch.cat([pairs, x[..., 2 * self.half :]], dim=-1)


def joint_of(plan, tensors, position):
    """How the heads of a layer are joined; None: each is stored by itself."""
    layer = plan["layers"][position]
    if layer.get("joint") is None:
        return None
    prefix = f"layers.{layer['index']}.joint."
    return Joint({n[len(prefix) :]: x for n, x in tensors.items() if n.startswith(prefix)})


class Joint:
    """Keys (as `Rope` stores them) and values of several heads as one (turboq/cache/composed.py).

    Coordinates of units u[coded] = A (x - center), x_hat = center + S u[coded], those of the first
    head's keys first. Both matrices are int8 times a number of each coordinate and each channel.
    """

    def __init__(self, arrays):
        self.tensors = {name: torch.tensor(values) for name, values in arrays.items()}
        self.tensors["coded"] = self.tensors["coded"].long()

    def to(self, device):
        self.tensors = {name: x.to(device) for name, x in self.tensors.items()}

    def key_mean(self, heads, dim):
        """The mean of each head's keys [K, D]."""
        mean = self.tensors["mean"]
        return mean[:, : heads // len(mean) * dim].reshape(heads, dim)

    def stored(self, k, v):
        """Coordinates of units [B, K, T, D] and [B, K, T, E] of keys and values, then zeros."""
        t, x = self.tensors, self._joined(k, v)
        x = (x - t["center"]) * t["analysis_channels"]
        y = torch.einsum("btjc,jwc->btjw", x, t["analysis"].float())
        y *= t["analysis_scale"]
        out = x.new_zeros(*x.shape[:3], x.shape[3] + 1)  # what is not there goes behind the end
        out.scatter_(3, t["coded"].expand(y.shape), y)
        return self._split(out[..., :-1], k, v)

    def read(self, k, v):
        """The inverse of `stored` where all coordinates are coded."""
        t, y = self.tensors, self._joined(k, v)
        y = torch.cat([y, torch.zeros_like(y[..., :1])], dim=-1)
        y = y.gather(3, t["coded"].expand(*y.shape[:3], -1)) * t["synthesis_scale"]
        x = torch.einsum("btjw,jcw->btjc", y, t["synthesis"].float())
        return self._split(x * t["synthesis_channels"] + t["center"], k, v)

    def _joined(self, k, v):
        groups = len(self.tensors["mean"])
        parts = [x.transpose(1, 2).unflatten(2, (groups, -1)).flatten(3) for x in (k, v)]
        return torch.cat(parts, dim=-1)

    def _split(self, x, k, v):
        sizes = [y.shape[1] * y.shape[3] // x.shape[2] for y in (k, v)]
        parts = zip(x.split(sizes, dim=-1), (k, v), strict=True)
        return [
            part.flatten(2).unflatten(2, (y.shape[1], y.shape[3])).transpose(1, 2)
            for part, y in parts
        ]


class Side:
    """K or V of one layer: which bits are whose, and the heads by kind of codec."""

    def __init__(self, plan, tensors, position, side):
        index = plan["layers"][position]["index"]
        geometry = plan["model"]["layers"][index]
        self.heads, self.dim = geometry["kv_heads"], geometry[f"{side}_dim"]
        heads = {}  # kind -> [(head, codec, arrays)]
        self.mean = torch.zeros(self.heads, self.dim)
        for head in range(self.heads):
            codec = codec_of(plan, index, side, head)
            arrays = arrays_of(plan, tensors, index, side, head)
            arrays = {name: torch.tensor(values) for name, values in arrays.items()}
            if codec["codec"] == "transform" and "analysis" not in arrays:  # a unit's coordinates
                arrays |= _coordinates(sum(count for count, _ in codec["segments"]), self.dim)
            heads.setdefault(_kind(codec), []).append((head, codec, arrays))
            self.mean[head] = arrays.get("mean", self.mean[head])
        self.groups = [
            (torch.tensor([head for head, _, _ in members]), kind[0](members, *kind[1:]))
            for kind, members in heads.items()
        ]
        fields = {}
        for numbers, group in self.groups:
            fields |= dict(zip(numbers.tolist(), group.fields, strict=True))
        self.width = max(first + width for f in fields.values() for first, width, _ in f)
        places = [
            (head * self.width + first + c, plane)
            for head in range(self.heads)
            for first, width, bits in fields[head]
            for plane in range(bits)
            for c in range(width)
        ]
        self.bits = len(places)
        self.entry, self.plane = torch.tensor(places).T

    def to(self, device):
        self.entry, self.plane = self.entry.to(device), self.plane.to(device)
        self.groups = [(numbers.to(device), group.to(device)) for numbers, group in self.groups]

    def encode(self, x):
        """x [B, K, T, D] -> bits [B, T, n], uint8."""
        batch, _, count, _ = x.shape
        entries = torch.zeros(
            self.heads, batch * count, self.width, dtype=torch.int32, device=x.device
        )
        for numbers, group in self.groups:
            found = group.encode(x[:, numbers].transpose(0, 1).flatten(1, 2))
            entries[numbers, :, : found.shape[-1]] = found
        flat = entries.transpose(0, 1).reshape(batch, count, -1)
        return ((flat[..., self.entry] >> self.plane.int()) & 1).to(torch.uint8)

    def decode(self, bits):
        """bits [B, T, n] -> x_hat [B, K, T, D], float32."""
        batch, count = bits.shape[:2]
        flat = torch.zeros(
            batch * count, self.heads * self.width, dtype=torch.int32, device=bits.device
        )
        for plane in range(int(self.plane.max()) + 1):
            here = (self.plane == plane).nonzero(as_tuple=True)[0]
            flat[:, self.entry[here]] |= bits[..., here].flatten(0, 1).int() << plane
        entries = flat.unflatten(-1, (self.heads, self.width)).transpose(0, 1)
        out = torch.empty(self.heads, batch * count, self.dim, device=bits.device)
        for numbers, group in self.groups:
            out[numbers] = group.decode(entries[numbers])
        return out.unflatten(1, (batch, count)).transpose(0, 1)


def _kind(codec):
    """(class, settings): heads of one kind are computed together."""
    name = codec["codec"]
    if name == "exact":
        return Exact, codec["dtype"]
    if name in ("turboquant_mse", "per_head"):
        gain = "head" if codec.get("scale") == "head" else "vector"
        return Coded, 0, gain, codec["scale_dtype"], codec["scale_rule"]
    if name == "transform" and codec["quantizer"] in ("scalar", "window"):
        states = codec["states"] if codec["quantizer"] == "window" else 0
        return Coded, states, codec["gain"], "float16", codec["gain_bits"]
    what = f"{name} ({codec['quantizer']})" if "quantizer" in codec else name
    raise ValueError(f"codec {what} is not in this module")


def _to_entries(x):
    """Floats as unsigned numbers of their bits, int32."""
    if x.element_size() == 4:
        return x.view(torch.int32)
    return x.view(torch.int16).int() & 0xFFFF


def _from_entries(entries, dtype):
    if dtype.itemsize == 4:
        return entries.contiguous().view(dtype)
    return entries.to(torch.int16).view(dtype)  # wraps around


class Exact:
    """Floating-point numbers as they are, in the plan's type."""

    def __init__(self, members, dtype):
        self.dtype = getattr(torch, dtype)
        self.fields = [[(0, codec["dim"], 8 * self.dtype.itemsize)] for _, codec, _ in members]

    def to(self, device):
        return self

    def encode(self, x):
        return _to_entries(x.to(self.dtype))

    def decode(self, entries):
        return _from_entries(entries, self.dtype).float()


class Coded:
    """x_hat = mean + gain S c: a transform, a code per coordinate, and a gain or scale.

    Codes are of tables, or of a window code of so many `states` (turboq/numbers/window.py). `gain`:
    "none"; "head", one static number; "code", one of a few; "float16" (of coordinates) and "vector"
    (of the vector, by `rule`), stored as `dtype`. Arrays have a leading axis of heads, and are
    padded with coordinates that are not stored.
    """

    def __init__(self, members, states, gain, dtype, rule):
        self.states, self.gain, self.rule = states, gain, rule
        self.dtype = getattr(torch, dtype)
        forms = [_form(codec, arrays) for _, codec, arrays in members]
        wide = max(form["analysis"].shape[0] for form in forms)
        self.wide = wide
        self.fields = [
            [*form["fields"], *([(wide, 1, form["gain_bits"])] if form["gain_bits"] else [])]
            for form in forms
        ]
        rows = {"analysis": 0.0, "step": 1.0, "last": 0.0, "taps": 0.0, "weights": 0.0}
        rows |= {"levels": math.inf, "coded": 0.0}
        self.arrays = {}
        for name in forms[0]:
            if name in ("fields", "gain_bits"):
                continue
            values = [form[name] for form in forms]
            if name in rows:
                values = [_padded(x, wide, rows[name]) for x in values]
            if name == "synthesis":
                values = [_padded(x.T, wide, 0.0).T for x in values]
            if name == "levels":
                values = [_padded(x.T, max(v.shape[1] for v in values), math.inf).T for x in values]
            self.arrays[name] = torch.stack(values)
        if states:
            taps = self.arrays["taps"]
            reach = range(min(taps.shape[2], wide))
            self.arrays["band"] = sum(torch.diag_embed(taps[:, j:, j], -j) for j in reach)

    def to(self, device):
        self.arrays = {name: x.to(device) for name, x in self.arrays.items()}
        return self

    def encode(self, x):
        """x [H, N, D] -> entries [H, N, C], codes and then the gain."""
        a = self.arrays
        x = x - a["mean"][:, None]
        if self.gain == "vector":
            unit, rms = _unit_rms(x, x.shape[-1])
            u = unit @ a["analysis"].mT
            codes = self._codes(u)
            scale = _vector_scale(self.rule, u, self._values(codes), rms).to(self.dtype)
            return torch.cat([codes, _to_entries(scale)[..., None]], dim=-1)
        y = x @ a["analysis"].mT
        count = a["coded"].sum(1)[:, None]
        if self.gain == "none":
            return self._codes(y)
        if self.gain == "head":
            return self._codes(y * torch.where(a["scale"] > 0, 1 / a["scale"], 0.0)[:, None, None])
        if self.gain == "float16":
            unit, rms = _unit_rms(y, count)
            gain = _to_entries(rms.to(self.dtype))
            return torch.cat([self._codes(unit), gain[..., None]], dim=-1)
        if self.states:
            return self._searched(y)
        rms = torch.sqrt(y.square().sum(-1) / count)
        edges = torch.sqrt(a["gains"][:, 1:] * a["gains"][:, :-1])
        code = (rms[..., None] > edges[:, None]).sum(-1)
        u = y / a["gains"].gather(1, code)[..., None]
        return torch.cat([self._codes(u), code.int()[..., None]], dim=-1)

    def _searched(self, y):
        """Entries of y [H, N, C] at the gain of least error (turboq/numbers/window_gain.py)."""
        a, tries = self.arrays, min(8, self.arrays["gains"].shape[1])
        far = 1e6 * a["gains"][:, -1:, None]
        y = torch.minimum(torch.maximum(y, -far), far)
        w, size, gain = a["weights"][:, None], y.abs(), torch.zeros_like(y[..., :1])
        reach = 0.8 * (0.5 * a["step"] * a["last"] + a["taps"].abs().sum(-1))[:, None]
        even = (a["step"].square()[:, None] * w).sum(-1) / 48
        for _ in range(6):
            beyond = w * reach * (size > gain * reach)
            gain = ((beyond * size).sum(-1) / (even + (beyond * reach).sum(-1)))[..., None]
        below = (gain > a["gains"][:, None]).sum(-1)
        first = (below - tries // 2).clamp(0, a["gains"].shape[1] - tries)
        least = None
        for number in range(tries):
            index = first + number
            gain = a["gains"].gather(1, index)[..., None]
            codes = self._codes(y / gain)
            error = (w * (y - gain * self._values(codes)).square()).sum(-1)
            entries = torch.cat([codes, index.int()[..., None]], dim=-1)
            if least is None:
                best, least = entries, error
            else:
                better = error < least
                best = torch.where(better[..., None], entries, best)
                least = torch.where(better, error, least)
        return best

    def decode(self, entries):
        """entries [H, N, C] -> x_hat [H, N, D]."""
        a = self.arrays
        x = self._values(entries[..., : self.wide]) @ a["synthesis"].mT
        if self.gain == "head":
            x = x * a["scale"][:, None, None]
        elif self.gain == "code":
            x = x * a["gains"].gather(1, entries[..., self.wide].long())[..., None]
        elif self.gain != "none":
            x = x * _from_entries(entries[..., self.wide], self.dtype).float()[..., None]
        return x + a["mean"][:, None]

    def _codes(self, u):
        a = self.arrays
        if not self.states:
            levels = a["levels"]
            edges = 0.5 * (levels[..., 1:] + levels[..., :-1])
            return torch.searchsorted(edges, u.mT.contiguous(), out_int32=True).mT
        size = max(16, (1 << 22) // (2 * self.states * len(u)))
        own = torch.cat([self._search(part) for part in u.split(size, dim=1)], dim=1)
        left = u - (2.0 * own - 1) @ a["band"].mT
        place = torch.round(left / a["step"][:, None] + 0.5 * a["last"][:, None])
        return (own + 2 * place.clamp_min(0).minimum(a["last"][:, None])).int()

    def _values(self, codes):
        a = self.arrays
        if not self.states:
            found = a["levels"].gather(2, codes.mT.long()).mT
            return torch.where(a["coded"][:, None] > 0, found, 0.0)
        own, place = 2.0 * (codes & 1) - 1, (codes >> 1) - 0.5 * a["last"][:, None]
        return own @ a["band"].mT + a["step"][:, None] * place

    def _search(self, u):
        """Own bits [H, N, C] of the path of least weighted error: Viterbi, all heads at once."""
        a, memory = self.arrays, self.states.bit_length() - 1
        registers = torch.arange(2 * self.states, device=u.device)
        taken = (registers >> torch.arange(memory + 1, device=u.device)[:, None]) & 1
        step, last = a["step"], a["last"]
        centres = a["taps"] @ (2.0 * taken - 1) / step[..., None] - 0.5 * last[..., None]
        square = a["weights"] * step.square()
        heads, count, wide = u.shape
        cost, dropped = u.new_zeros(heads, self.states, count), []
        for t in range(wide):
            off = (u[:, :, t] / step[:, t, None])[:, None] - centres[:, t, :, None]
            off = off - off.round().clamp_min(0).minimum(last[:, t, None, None])
            added = square[:, t, None, None] * off * off
            ways = cost.view(heads, 2, -1, 1, count) + added.view(heads, 2, -1, 2, count)
            ways = ways.view(heads, 2, self.states, count)
            best = torch.minimum(ways[:, 0], ways[:, 1])
            dropped.append(ways[:, 1] < ways[:, 0])
            cost = best - best[:, :1]
        state = cost.argmin(1)
        own = torch.empty(wide, heads, count, dtype=torch.long, device=u.device)
        for t in range(wide - 1, -1, -1):
            own[t] = state & 1
            oldest = dropped[t].gather(1, state[:, None])[:, 0].long()
            state = (oldest << (memory - 1)) | (state >> 1)
        return own.permute(1, 2, 0)


def _coordinates(count, dim):
    """A transform that codes the first coordinates as they come."""
    return {
        "mean": torch.zeros(dim),
        "analysis": torch.eye(count, dim),
        "synthesis": torch.eye(dim, count),
    }


def _form(codec, arrays):
    """One head's arrays, and its fields (first entry, width, bits), as `Coded` wants them."""
    if codec["codec"] != "transform":
        dim = codec["dim"]
        segments = [(dim, codec["bits"])]
        out = {
            "mean": arrays.get("mean", torch.zeros(dim)),
            "analysis": arrays["rotation"],
            "synthesis": arrays["rotation"].T,
            "levels": arrays["codebook"].expand(dim, -1),
        }
        out["gain_bits"] = 8 * getattr(torch, codec["scale_dtype"]).itemsize
        if codec.get("scale") == "head":
            out |= {"scale": arrays["scale"], "gain_bits": 0}
    else:
        segments = codec["segments"]
        out = {name: arrays[name] for name in ("mean", "analysis")}
        out["synthesis"] = arrays["synthesis"]
        out["gain_bits"] = {"none": 0, "code": codec["gain_bits"], "float16": 16}[codec["gain"]]
        if codec["gain"] == "code":
            out["gains"] = arrays["gains"]
        if codec["quantizer"] == "window":
            out |= {name: arrays[name] for name in ("step", "last", "taps", "weights")}
        else:
            most = max(arrays[f"codebook{i}"].shape[0] for i in range(len(segments)))
            tables = [
                _padded(arrays[f"codebook{i}"], most, math.inf).expand(width, -1)
                for i, (width, _) in enumerate(segments)
            ]
            out["levels"] = torch.cat(tables)
    out["coded"] = torch.ones(len(out["analysis"]))
    firsts = [sum(w for w, _ in segments[:i]) for i in range(len(segments))]
    out["fields"] = [(first, w, b) for first, (w, b) in zip(firsts, segments, strict=True)]
    return out


def _padded(x, size, value):
    """x with its first axis filled up to `size`."""
    missing = x.new_full((size - len(x), *x.shape[1:]), value)
    return torch.cat([x, missing])


def _unit_rms(x, count):
    """x = rms u with a mean square of u of 1 over `count` channels (turboq/numbers/scale.py)."""
    peak = x.abs().amax(-1)
    zero = peak < 4 * torch.finfo(torch.float32).tiny
    v = x / torch.where(zero, 1.0, peak)[..., None] * (~zero)[..., None]
    square = v.square().sum(-1) / count
    root = torch.sqrt(torch.where(zero, 1.0, square))
    return v / root[..., None], torch.where(zero, square, peak * root)


def _vector_scale(rule, u, c, rms):
    """Scale of vectors u of unit mean square stored as c, by the plan's rule."""
    if rule == "raw":
        return rms
    uc, uu, cc = (u * c).sum(-1), (u * u).sum(-1), (c * c).sum(-1)
    top, bottom = {
        "matched": (torch.sqrt(uu * cc), cc),
        "unbiased": (uu, uc),
        "least_squares": (uc, cc),
    }[rule]
    return rms * torch.where(bottom <= 0, 0.0, top / torch.where(bottom <= 0, 1.0, bottom))

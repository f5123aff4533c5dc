"""The key-value cache of a turboq plan for Hugging Face transformers, in plain PyTorch.

    import turboq_cache     # beside turboq_codecs.py, read_plan.py and the folder engine_plan

    cache = turboq_cache.make_cache(model)
    model.generate(**inputs, past_key_values=cache)       # batches padded on the left are fine
    cache.nbytes                                          # what is stored: the plan's bytes

Each token of a layer is one row of bytes that holds the plan's bits, K and V of all heads, in the
order of the codecs' fields, each plane by plane and channel by channel. To attend, rows are decoded
into a temporary K and V of the model's type; nothing decoded is kept. The first `sinks` tokens of a
sequence and its last `recent` are kept exact besides, and replace what is decoded: for many queries
at once, whose last tokens differ, the recent ones stand behind the decoded ones and the mask of the
layer says which of the two a query sees.

A model hands its cache rotated keys. Keys that the plan stores before their rotary embedding, or
relative to a block of positions, are turned back by the plan's rotation at the position that the
model gave them, and forward again when read; the model's own angles are compared with the plan's
first. Heads that the plan joins are turned together, with their values, between the two. Positions,
padding and masks come from a hook on each attention module, which leaves other caches alone.

Needs torch and transformers >= 5.23 (with "sdpa" or "eager" attention where a plan keeps a recent
window). What is linear in its bits could be read without decoding; this is the reference that can.
"""

import pathlib

import torch
from read_plan import read_plan
from transformers.cache_utils import Cache, DynamicLayer
from turboq_codecs import Side, joint_of, rope_of

PLAN = pathlib.Path(__file__).resolve().parent / "engine_plan"
BLOCK = 1024  # tokens that are encoded or decoded at a time: bounds what is temporary
ANGLE = 0.02  # cosines of a bfloat16 model differ by 0.004 from ours


def make_cache(model, plan=PLAN):
    """An empty cache for `model`, of the plan in a folder; installs the hooks once.

    Raises:
      ValueError: the plan is another model's, or has a codec that this module cannot read.
    """
    plan, tensors = read_plan(plan)
    if len(plan["layers"]) != len(plan["model"]["layers"]):
        raise ValueError("the plan has layers without a cache of their own")
    cache = PlannedCache(plan, tensors)
    for index, layer in enumerate(plan["layers"]):
        module = _attention(model, layer["path"])
        if not hasattr(module, "turboq_hook"):
            hook = _Hook(index)
            module.turboq_hook = module.register_forward_pre_hook(hook, with_kwargs=True)
    return cache


def _attention(model, path):
    """The attention module of a plan's path, also where the decoder is part of a larger model."""
    modules, tail = dict(model.named_modules()), path.removeprefix("model.")
    inner = [n for n in modules if n.endswith(f"language_model.{tail}")]
    for name in (path, tail, *inner):
        if name in modules:
            return modules[name]
    raise ValueError(f"the model has no module {path}: the plan is another model's")


class _Hook:
    """Before an attention module runs: tells our cache about positions and mask."""

    def __init__(self, index):
        self.index = index

    def __call__(self, module, arguments, kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if not isinstance(cache, PlannedCache):
            return None
        hidden = kwargs.get("hidden_states", arguments[0] if arguments else None)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if positions is None:
            raise ValueError(
                f"layer {self.index}: this model does not tell its layers position_ids"
            )
        batch, tokens = hidden.shape[:2]
        layer = cache.planned[self.index]
        if cache.tokens.length == layer.get_seq_length():  # the first layer of this pass
            cache.tokens.append(positions.expand(batch, tokens), _real(mask, batch, tokens))
        mask = layer.prepare(mask, tokens, kwargs.get("position_embeddings"), hidden.device)
        return arguments, kwargs | {"attention_mask": mask}


def _real(mask, batch, tokens):
    """Which new tokens are no padding, [B, T]: those that see themselves; None: all."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise ValueError("turboq_cache needs attention masks of 'sdpa', 'eager' or flash attention")
    if mask.ndim == 2:
        return mask[:, -tokens:].bool()
    own = mask[:, 0, :, -tokens:].diagonal(dim1=-2, dim2=-1)
    return (own if own.dtype == torch.bool else own == 0).expand(batch, tokens)


class Tokens:
    """Of each sequence: its first slot that is no padding, and its positions minus its slots."""

    def __init__(self):
        self.length = 0
        self.first = self.offset = torch.zeros(0, dtype=torch.long)  # [B]

    def append(self, positions, real):
        batch, new = positions.shape
        slots = torch.arange(self.length, self.length + new, device=positions.device)
        if not len(self.first):
            self.first = torch.zeros(batch, dtype=torch.long, device=positions.device)
            self.offset = torch.zeros_like(self.first)
        open_ = self.first >= self.length  # only padding so far
        if real is None:
            real = torch.ones_like(positions, dtype=torch.bool)
        first = torch.where(open_, self.length + (~real).long().cumprod(1).sum(1), self.first)
        at = (first - self.length).clamp(0, new - 1)[:, None]
        offset = positions.gather(1, at)[:, 0] - (self.length + at[:, 0])
        offset = torch.where(open_, offset, self.offset)
        if not torch.equal(real, slots >= first[:, None]):
            raise ValueError("turboq_cache: padding must stand on the left of every sequence")
        if torch.any(real & (positions != slots + offset[:, None])):
            raise ValueError("turboq_cache: positions of a sequence must rise one by one")
        self.first, self.offset, self.length = first, offset, self.length + new

    def select(self, index):
        if len(self.first):
            self.first, self.offset = self.first[index], self.offset[index]


class PlannedCache(Cache):
    """One `PlannedLayer` per decoder layer."""

    def __init__(self, plan, tensors):
        self.tokens = Tokens()
        layers = range(len(plan["layers"]))
        self.planned = [PlannedLayer(plan, tensors, i, self.tokens) for i in layers]
        super().__init__(layers=list(self.planned))

    @property
    def nbytes(self):
        """Bytes of all stored tokens."""
        return sum(layer.nbytes for layer in self.planned)

    def _select(self, index):
        self.tokens.select(index)
        for layer in self.planned:
            layer.select(index)

    def reorder_cache(self, beam_idx):
        self._select(beam_idx)

    def batch_select_indices(self, indices):
        self._select(indices)

    def batch_repeat_interleave(self, repeats):
        if len(self.tokens.first):
            index = torch.arange(len(self.tokens.first), device=self.tokens.first.device)
            self._select(index.repeat_interleave(repeats))

    def reset(self):
        self.tokens.__init__()
        super().reset()

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self.tokens.length = self.planned[0].get_seq_length()


class PlannedLayer(DynamicLayer):
    """Rows of bits, exact sinks and exact recent tokens of one layer."""

    supports_early_init = False

    def __init__(self, plan, tensors, index, tokens):
        super().__init__()
        self.tokens, self.index, self.ready = tokens, index, False
        kept = plan["tokens"]
        self.sinks, self.recent = kept["sinks"], kept["recent"]
        self.exact_dtype = getattr(torch, kept["exact_dtype"])
        self.sides = [Side(plan, tensors, index, side) for side in ("k", "v")]
        self.joint = joint_of(plan, tensors, index)
        self.rope = rope_of(plan, index, self.sides[0], self.joint)
        self.is_croppable = self.recent == 0

    def lazy_initialization(self, key_states, value_states):
        batch, heads = key_states.shape[:2]
        device, kept = key_states.device, {"dtype": self.exact_dtype, "device": key_states.device}
        for side, x in zip(self.sides, (key_states, value_states), strict=True):
            if x.shape[1] != side.heads or x.shape[-1] != side.dim:
                raise ValueError(
                    f"layer {self.index} has {x.shape[1]} heads of {x.shape[-1]}, the plan "
                    f"{side.heads} of {side.dim}: the plan is another model's"
                )
            side.to(device)
        for turned in (self.rope, self.joint):
            if turned is not None:
                turned.to(device)
        width = -(-sum(side.bits for side in self.sides) // 8)
        self.rows = torch.zeros(batch, 0, width, dtype=torch.uint8, device=device)
        self.first = [torch.zeros(batch, heads, self.sinks, s.dim, **kept) for s in self.sides]
        self.last = [torch.zeros(batch, heads, 0, s.dim, **kept) for s in self.sides]
        self.is_initialized = True

    @property
    def nbytes(self):
        if not self.is_initialized:
            return 0
        return sum(x.numel() * x.element_size() for x in (self.rows, *self.first, *self.last))

    def get_seq_length(self):
        return self.rows.shape[1] if self.is_initialized else 0

    def prepare(self, mask, new, angles, device):
        """What the hook says before `update`; returns the mask for what `update` will return."""
        self.ready = True
        if self.rope is not None and angles is not None and not self.get_seq_length():
            self._check_angles(self.rope, angles, new, device)
        if new == 1 or not self.recent:
            return mask
        past = self.get_seq_length()
        if mask is not None and mask.ndim != 4:
            raise ValueError("a recent window needs attn_implementation='sdpa' or 'eager'")
        slots = torch.arange(past + new, device=device)
        ago = slots[past:, None] - slots[None]
        if mask is None:
            mask = (ago >= 0)[None, None]
        sink = slots < self.tokens.first.to(device)[:, None] + self.sinks
        exact = ((ago < self.recent) & ~sink[:, None])[:, None]  # [B, 1, T, S]
        tail = slice(past - min(past, self.recent), None)
        if mask.dtype == torch.bool:
            return torch.cat([mask & ~exact, (mask & exact)[..., tail]], dim=-1)
        low = torch.finfo(mask.dtype).min
        return torch.cat(
            [mask.masked_fill(exact, low), mask.masked_fill(~exact, low)[..., tail]], dim=-1
        )

    def _check_angles(self, rope, angles, new, device):
        """Refuses a model that rotates keys in another way than the plan says."""
        rope.to(device)
        cos, sin = (x.float() for x in angles)
        at = torch.arange(new, device=device) + self.tokens.offset.to(device)[:, None]
        keep = torch.arange(new, device=device) >= self.tokens.first.to(device)[:, None]
        for ours, theirs in zip(rope.tables(at), (cos, sin), strict=True):
            half = ours.shape[-1]
            forms = (theirs[..., :half], theirs[..., : 2 * half : 2])  # halves, or pairs repeated
            off = min(float(((f - ours).abs() * keep[..., None]).max()) for f in forms)
            if off > ANGLE:
                raise ValueError(
                    f"layer {self.index}: the model's rotary embedding differs from the plan's by "
                    f"{off:.2g}: the plan is another model's, or its rope scaling is not known here"
                )

    def update(self, key_states, value_states, *args, **kwargs):
        """Stores new tokens [B, K, T, D]; returns K and V of all, as attention reads them."""
        if not self.ready:
            raise ValueError("this cache knows no positions: make_cache(model) of this very model")
        self.ready = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past, new = self.get_seq_length(), key_states.shape[2]
        device = key_states.device
        first, offset = (x.to(device) for x in (self.tokens.first, self.tokens.offset))
        self._store(key_states, value_states, offset)
        slots = torch.arange(past, past + new, device=device)
        out, tails = [], []
        decoded = self._load(offset, key_states.dtype, value_states.dtype)
        for i, (x, full) in enumerate(zip((key_states, value_states), decoded, strict=True)):
            x = x.to(self.exact_dtype)
            for n in range(self.sinks):
                own = (slots == first[:, None] + n).nonzero(as_tuple=True)
                self.first[i][own[0], :, n] = x[own[0], :, own[1]]
                has = (first + n < past + new).nonzero(as_tuple=True)[0]
                full[has, :, first[has] + n] = self.first[i][has, :, n].to(full.dtype)
            tail = torch.cat([self.last[i], x], dim=2)
            self.last[i] = tail[:, :, max(tail.shape[2] - self.recent, 0) :].clone()
            out.append(full)
            tails.append(tail.to(full.dtype))
        if not self.recent:
            return tuple(out)
        if new > 1:
            return tuple(torch.cat(both, dim=2) for both in zip(out, tails, strict=True))
        kept = torch.arange(past + 1 - self.last[0].shape[2], past + 1, device=device)
        late = (kept >= first[:, None] + self.sinks)[:, None, :, None]
        for full, tail in zip(out, self.last, strict=True):
            end = full[:, :, kept[0] :]
            end.copy_(torch.where(late, tail.to(full.dtype), end))
        return tuple(out)

    def _store(self, k, v, offset):
        """Encodes new tokens into rows."""
        past, rows = self.get_seq_length(), [self.rows]
        for start in range(0, k.shape[2], BLOCK):
            part = [x[:, :, start : start + BLOCK].float() for x in (k, v)]
            if self.rope is not None:
                part[0] = self.rope.stored(part[0], offset, past + start)
            if self.joint is not None:
                part = self.joint.stored(*part)
            bits = [s.encode(x) for s, x in zip(self.sides, part, strict=True)]
            rows.append(_packed(torch.cat(bits, dim=-1), self.rows.shape[-1]))
        self.rows = torch.cat(rows, dim=1)

    def _load(self, offset, *dtypes):
        """Decoded K and V of all tokens."""
        batch, count = self.rows.shape[:2]
        out = [
            torch.empty(batch, s.heads, count, s.dim, dtype=d, device=self.rows.device)
            for s, d in zip(self.sides, dtypes, strict=True)
        ]
        for start in range(0, count, BLOCK):
            bits = _unpacked(self.rows[:, start : start + BLOCK])
            parts = bits.split([self.sides[0].bits, bits.shape[-1] - self.sides[0].bits], -1)
            both = [side.decode(part) for side, part in zip(self.sides, parts, strict=True)]
            if self.joint is not None:
                both = self.joint.read(*both)
            if self.rope is not None:
                both[0] = self.rope.read(both[0], offset, start)
            for full, x in zip(out, both, strict=True):
                full[:, :, start : start + BLOCK] = x.to(full.dtype)
        return out

    def select(self, index):
        if self.is_initialized:
            index = index.to(self.rows.device)
            self.rows = self.rows[index]
            self.first, self.last = ([x[index] for x in kept] for kept in (self.first, self.last))

    def crop(self, tokens_to_remove):
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) must be negative: how many to remove")
        if not tokens_to_remove or not self.is_initialized:
            return
        if self.recent:
            raise ValueError("a cache with a recent window cannot go back: it keeps no older ones")
        self.rows = self.rows[:, :tokens_to_remove]

    def reset(self):
        self.is_initialized = self.ready = False


def _packed(bits, width):
    """Bits [B, T, n] (0 or 1) -> bytes [B, T, width], lowest bit first."""
    bits = torch.nn.functional.pad(bits, (0, 8 * width - bits.shape[-1]))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(-1, (width, 8)) * weights).sum(-1, dtype=torch.uint8)


def _unpacked(rows):
    """The inverse of `_packed`, up to padding."""
    shifts = torch.arange(8, dtype=torch.uint8, device=rows.device)
    return ((rows[..., None] >> shifts) & 1).flatten(-2)

"""A GGUF file as a weight source: header, geometry, and tensors dequantised one at a time.

llama.cpp's converter stores llama-family Q and K rows with the two halves of each head interleaved
(its rotary kernel pairs neighbours); they are put back here, so every source looks the same.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from turboq.errors import TurboqError, quoted, shortened
from turboq.numbers.rope import Rope, Scaling
from turboq_calibrate.models import gguf_header, gguf_latent
from turboq_calibrate.models import params as P
from turboq_calibrate.models.config import ONE_FORM, OTHER_FORM
from turboq_calibrate.models.config_fields import positive
from turboq_calibrate.models.config_longrope import divided
from turboq_calibrate.models.config_yarn import temperature, yarn_frequencies
from turboq_calibrate.models.gguf_architectures import (
    ARCHITECTURES,
    FROM_HUGGING_FACE,
    SIGMOID,
    SOFTMAX,
    Architecture,
)
from turboq_calibrate.models.spec import Experts, Latent, LayerSpec, ModelSpec

NORM, NORM_BIAS = "output_norm.weight", "output_norm.bias"
SHARED_ROUTER = "ffn_gate_inp_shexp.weight"
LAYER_TENSORS = {
    "attn_norm_bias": "attn_norm.bias",
    "mlp_norm_bias": "ffn_norm.bias",
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "qkv": "attn_qkv.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_down": "attn_q_a.weight",
    "q_latent_norm": "attn_q_a_norm.weight",
    "q_up": "attn_q_b.weight",
    "kv_down": "attn_kv_a_mqa.weight",
    "latent_norm": "attn_kv_a_norm.weight",
    "k_up": "attn_k_b.weight",
    "v_up": "attn_v_b.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "sinks": "attn_sinks.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "mlp_post_norm": "post_ffw_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "gate_up": "ffn_up.weight",
    "router": "ffn_gate_inp.weight",
    "router_bias": "ffn_gate_inp.bias",
    "router_correction": "exp_probs_b.bias",
    "shared_router": SHARED_ROUTER,
    "shared_gate": "ffn_gate_shexp.weight",
    "shared_up": "ffn_up_shexp.weight",
    "shared_down": "ffn_down_shexp.weight",
    "expert_gate_bias": "ffn_gate_exps.bias",
    "expert_up_bias": "ffn_up_exps.bias",
    "expert_down_bias": "ffn_down_exps.bias",
    "expert_gate": "ffn_gate_exps.weight",
    "expert_up": "ffn_up_exps.weight",
    "expert_down": "ffn_down_exps.weight",
    "gate_bias": "ffn_gate.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
}
# Metadata that changes the result and that the decoder does not do; 0 or absent means unused.
REFUSED = (
    "expert_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.key_length_mla",
)
# What is understood of rotary embeddings; whatever else llama.cpp reads there changes the result.
ROPE = (
    "dimension_count",
    "freq_base",
    "scaling.type",
    "scaling.factor",
    "scale_linear",
    "scaling.attn_factor",
    # Linear scaling has no use for these two.
    "scaling.original_context_length",
    "scaling.finetuned",
)

# Of YaRN, on whole queries and keys: latent attention.
LOG_MULTIPLIER = "scaling.yarn_log_multiplier"

# What longrope divides frequencies by, in short sequences and in long ones.
FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


class GGUFFile:
    """Weight source of one `.gguf` file. Metadata is read at once, tensors on demand.

    Raises:
      TurboqError: unreadable, truncated, or a model the decoder does not do.
    """

    def __init__(self, path: str | os.PathLike[str], *, long_context: bool = False):
        self.path, self._long = Path(path), long_context
        self.metadata, self._tensors, self._data = gguf_header.read(self.path)
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise TurboqError(
                f"{self.path} is one of {quoted(parts)} parts: join them first (llama-gguf-split "
                "--merge)"
            )
        for name, info in self._tensors.items():
            if not isinstance(info.kind, gguf.GGMLQuantizationType):
                raise TurboqError(
                    f"{self.path}: tensor {shortened(name)} has type {info.kind}, which the gguf "
                    "package does not know: install a newer gguf, or take a file of another type"
                )
            if name.endswith(SHARED_ROUTER) and len(info.shape) == 1:  # one row
                self._tensors[name] = dataclasses.replace(info, shape=(1, *info.shape))
        self.spec = self._spec()
        self._check_tensors()

    @property
    def files(self) -> list[Path]:
        return [self.path]

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Float32 weights of one layer but its experts'."""
        spec = self.spec.layers[index]
        out = {}
        shapes = P.layer_shapes(spec)
        for name, shape in self._stored_shapes(spec).items():
            value = self._read(self._name(index, name), shape)
            if self._row.interleaved and name in ("q", "k", "q_bias", "k_bias"):
                heads = spec.heads if name[0] == "q" else spec.kv_heads
                value = unpermute(value, heads)
            out[name] = value
        return P.unfuse(gguf_latent.joined(spec, out), shapes, self._row.fused)

    def _stored_shapes(self, spec: LayerSpec) -> P.Shapes:
        """Shapes of a layer's weights but its experts', as the file has them."""
        return gguf_latent.apart(spec, P.fused_shapes(P.layer_shapes(spec), self._row.fused))

    def _name(self, index: int, ours: str) -> str:
        """What the file calls one of our weights."""
        name = self._row.mlp_norm if ours == "mlp_norm" else LAYER_TENSORS[ours]
        return f"blk.{index}.{name}"

    def experts(self, index: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Float32 matrices of some experts of one layer, stacked."""
        layer = self.spec.layers[index]
        return {
            name: self._read(self._name(index, name), shape, numbers)
            for name, shape in _stacked(layer).items()
        }

    def embed(self, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Float32 weights before the layers, or some of them."""
        shapes = P.embed_shapes(self.spec)
        return {name: self._read("token_embd.weight", shapes[name]) for name in names or shapes}

    def embed_rows(self, ids: np.ndarray, name: str = "embedding") -> np.ndarray:
        """Float32 embeddings of some tokens only, [len(ids), M]."""
        assert name == "embedding"  # of no architecture here anything else
        return self._read("token_embd.weight", (self.spec.vocab, self.spec.hidden), ids)

    def head(self) -> dict[str, np.ndarray]:
        name = "token_embd.weight" if self.spec.tied_embeddings else "output.weight"
        names = {"norm": NORM, "norm_bias": NORM_BIAS, "unembedding": name}
        shapes = P.head_shapes(self.spec)
        return {ours: self._read(names[ours], shape) for ours, shape in shapes.items()}

    def tokenizer(self):
        from turboq_calibrate.models.tokenizer import from_gguf

        return from_gguf(self.metadata, self.path)

    def _read(
        self, name: str, expected: tuple[int, ...], rows: np.ndarray | None = None
    ) -> np.ndarray:
        """A whole tensor, or some of its rows, dequantised and checked."""
        info = self._tensors[name]
        P.check_shape(name, info.shape, expected, self.path)
        stored = np.asarray(self._data[info.start : info.start + info.nbytes])
        assert isinstance(info.kind, gguf.GGMLQuantizationType)  # __init__ refuses others
        raw = stored.reshape(gguf.quants.quant_shape_to_byte_shape(info.shape, info.kind))
        if rows is not None:
            raw = raw[rows]
        try:
            value = gguf.quants.dequantize(raw, info.kind)
        except NotImplementedError:
            raise TurboqError(
                f"{self.path}: tensor {name} has type {info.kind.name}, which the gguf package "
                "cannot dequantise"
            ) from None
        # A float32 tensor comes back as a view of the mapped file: weights must not change with it.
        value = value.astype(np.float32, copy=np.may_share_memory(value, stored))
        value = value.reshape(expected if rows is None else (len(rows), *expected[1:]))
        P.check_finite(name, value, self.path)
        return value

    def _get(self, key: str, default: Any = None) -> Any:
        """Architecture field `key`; without a default it must be there."""
        name = f"{self.metadata['general.architecture']}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise TurboqError(f"{self.path}: metadata field {name} is missing")
        return value

    def _integer(self, key: str, default: Any = None, layer: int | None = None) -> int:
        """A positive whole number; with `layer`, that layer's entry where the field is a list."""
        value = self._get(key, default)
        if layer is not None and isinstance(value, list):
            value = value[layer] if layer < len(value) else None
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise TurboqError(f"{self.path}: {key}={quoted(value)} must be a positive whole number")
        return value

    def _positive(self, key: str, default: float | None = None) -> float:
        return positive(self._get(key, default), key, str(self.path))

    def _spec(self) -> ModelSpec:
        arch = self.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            also = "; its Hugging Face folder is" if arch in FROM_HUGGING_FACE else ""
            raise TurboqError(
                f"{self.path}: architecture {quoted(arch)} is not supported (supported: "
                f"{', '.join(ARCHITECTURES)}){also}"
            )
        self._row: Architecture = ARCHITECTURES[arch]
        for key in REFUSED:
            if key not in self._row.reads and self._get(key, 0):
                raise TurboqError(f"{self.path}: {arch}.{key} is set, which is not supported")
        if "token_embd.weight" not in self._tensors:
            raise TurboqError(f"{self.path}: tensor token_embd.weight is missing")
        hidden, count = self._integer("embedding_length"), self._integer("block_count")
        ahead = self._get("nextn_predict_layers", 0)
        if ahead:  # the last layers draft further tokens, and are not run
            count -= self._integer("nextn_predict_layers")
        if not 0 < count <= len(self._tensors):
            raise TurboqError(f"{self.path}: {count} layers but {len(self._tensors)} tensors")
        rms = self._row.norm == "rms"
        eps = self._positive(f"attention.layer_norm_{'rms_' if rms else ''}epsilon")
        return ModelSpec(
            family=arch,
            name=self.path.stem,
            vocab=self._tensors["token_embd.weight"].shape[0],
            hidden=hidden,
            context=self._context,
            norm_eps=eps,
            norm=self._row.norm,
            tied_embeddings="output.weight" not in self._tensors,
            layers=tuple(self._layer_spec(i, hidden, eps) for i in range(count)),
            embed_scale=hidden**0.5
            if self._row.scaled_embedding
            else self._factor("embedding_scale"),
            logit_scale=self._factor("logit_scale") ** (1 if self._row.logits_times else -1),
            logit_softcap=self._cap("final_logit_softcapping", self._row.logit_softcap),
            longer=OTHER_FORM if self._row.longrope and self._divisors and not self._long else "",
        )

    def _factor(self, key: str) -> float:
        """A factor; 0 in the file is none, as in llama.cpp."""
        return self._positive(key) if self._get(key, 0) else 1.0

    def _cap(self, key: str, default: float | None) -> float | None:
        """A soft cap; 0 in the file is none, as in llama.cpp."""
        value = self._get(key, 0 if default is None else default)
        return None if value == 0 else self._positive(key, default)

    def _window(self, index: int) -> int | None:
        """The window of a layer, None where it is full."""
        row, key = self._row, "attention.sliding_window"
        if not self._get(key, row.window or 0):
            return None
        window = self._integer(key, row.window)
        pattern = self._get(f"{key}_pattern", row.full_every or 0)
        if isinstance(pattern, list):
            slides = pattern[index] if index < len(pattern) else None
            if slides not in (False, True):
                raise TurboqError(
                    f"{self.path}: {key}_pattern must say true or false for every layer"
                )
            return window if slides else None
        if pattern == 0:
            return window
        return window if (index + 1) % self._integer(f"{key}_pattern", row.full_every) else None

    def _layer_spec(self, index: int, hidden: int, eps: float) -> LayerSpec:
        heads = self._integer("attention.head_count", layer=index)
        kv_heads = self._integer("attention.head_count_kv", heads, layer=index)
        if heads % kv_heads:
            raise TurboqError(
                f"{self.path}: {heads} query heads are not a multiple of {kv_heads} KV heads"
            )
        if self._row.latent:
            return self._latent_spec(index, hidden, heads, eps)
        if hidden % heads and not self._get("attention.key_length", 0):
            raise TurboqError(f"{self.path}: {hidden=} is not a multiple of {heads=}")
        head_dim = self._integer("attention.key_length", hidden // heads)

        def has(name: str) -> bool:
            return self._name(index, name) in self._tensors

        row, window = self._row, self._window(index)
        experts = self._grouped(index) if row.grouped else self._experts(index)
        rope, magnitude = self._rope(head_dim, sliding=window is not None)
        turns = self._turns(index) and not (row.sliding_rope_only and window is None)
        return LayerSpec(
            hidden=hidden,
            intermediate=0 if experts else self._integer("feed_forward_length", layer=index),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=self._integer("attention.value_length", head_dim),
            norm_eps=eps,
            rope=rope if turns else None,
            rope_magnitude=magnitude if turns else 1.0,
            logit_sinks=row.logit_sinks,
            qkv_bias=has("q_bias"),
            o_bias=has("o_bias"),
            mlp_bias=has("up_bias"),
            norm=row.norm,
            gated=row.gated,
            qk_norm=row.qk_norm if has("q_norm") else None,
            experts=experts,
            pre_norms=row.pre_norms,
            parallel=row.parallel,
            post_norms=row.post_norms,
            activation=row.activation,
            residual_scale=self._factor("residual_scale"),
            softmax_scale=self._softmax_scale(hidden / heads),
            window=window,
            softcap=self._cap("attn_logit_softcapping", row.softcap),
        )

    def _latent_spec(self, index: int, hidden: int, heads: int, eps: float) -> LayerSpec:
        """A layer of latent attention: YaRN multiplies its softmax scale, not what is rotated."""
        rotated, whole = (
            self._integer(key) for key in ("rope.dimension_count", "attention.key_length_mla")
        )
        if whole <= rotated:
            raise TurboqError(f"{self.path}: {whole} channels of a key, {rotated} of them rotated")
        rope, factor = self._rope(rotated, sliding=False)[0], self._yarn()
        multiplier = self._get(f"rope.{LOG_MULTIPLIER}", 0)
        if (factor is None) != (multiplier == 0):
            raise TurboqError(
                f"{self.path}: deepseek2.rope.{LOG_MULTIPLIER} and YaRN are not supported one "
                "without the other"
            )
        more = 1.0 if factor is None else temperature(factor, 10 * float(multiplier))
        experts = self._grouped(index)
        rank = self._get("attention.q_lora_rank", 0)
        return LayerSpec(
            hidden=hidden,
            intermediate=0 if experts else self._integer("feed_forward_length", layer=index),
            heads=heads,
            kv_heads=1,
            head_dim=rotated,
            v_head_dim=self._integer("attention.kv_lora_rank"),
            norm_eps=eps,
            rope=rope,
            experts=experts,
            softmax_scale=whole**-0.5 * more**2,
            latent=Latent(
                nope_dim=whole - rotated,
                value_dim=self._integer("attention.value_length_mla"),
                query_rank=self._integer("attention.q_lora_rank") if rank else None,
                norm_eps=eps,
            ),
        )

    def _grouped(self, index: int) -> Experts | None:
        """DeepSeek's experts, chosen in the groups whose two best scores are highest."""
        if index < self._get("leading_dense_block_count", 0):
            return None
        gating = self._get("expert_gating_func", 0) or self._row.gating
        groups = self._get("expert_group_count", 0) or 1
        if gating not in (SOFTMAX, SIGMOID) or (gating == SOFTMAX and groups != 1):
            raise TurboqError(
                f"{self.path}: expert_gating_func={quoted(gating)} with {quoted(groups)} groups "
                f"is not supported: {SIGMOID} is, or {SOFTMAX} without groups"
            )
        count, chosen = self._integer("expert_count"), self._integer("expert_used_count")
        best = self._integer("expert_group_used_count") if groups != 1 else 1
        groups = self._integer("expert_group_count", 1) if groups != 1 else 1
        if count % groups or best > groups or chosen > best * (count // groups):
            raise TurboqError(
                f"{self.path}: {chosen} experts of {count} in {best} of {groups} groups"
            )
        inner = self._integer("expert_feed_forward_length", None, index)
        shared = self._get("expert_shared_count", 0)
        return Experts(
            count=count,
            chosen=chosen,
            intermediate=inner,
            renormalised=bool(self._get("expert_weights_norm", False)),
            shared=inner * self._integer("expert_shared_count") if shared else 0,
            shared_gate=False,
            scores="sigmoid" if gating == SIGMOID else "softmax",
            correction=self._name(index, "router_correction") in self._tensors,
            groups=groups,
            chosen_groups=best,
            group_best=2 if groups > 1 else 1,
            scale=self._factor("expert_weights_scale"),
        )

    def _softmax_scale(self, wide: float) -> float | None:
        """Where it is not head_dim^-1/2; `wide` is hidden / heads."""
        if self._integer("block_count") == self._row.wide_scale_layers:
            return wide**-0.5
        return self._positive("attention.scale") if self._get("attention.scale", 0) else None

    def _turns(self, index: int) -> bool:
        """Whether a layer has a rotary embedding."""
        every = self._row.no_rope_every
        if self._row.rope_switch and not self._get("rope.scaling.finetuned", True):
            return False
        return every is None or (index + 1) % every != 0

    def _experts(self, index: int) -> Experts | None:
        if not self._get("expert_count", 0):
            return None
        count, chosen = self._integer("expert_count"), self._integer("expert_used_count")
        if chosen > count:
            raise TurboqError(f"{self.path}: expert_used_count={chosen} of {count} experts")
        dense = self._get("feed_forward_length", 0) or None
        shared = self._name(index, "shared_router") in self._tensors
        return Experts(
            count=count,
            chosen=chosen,
            intermediate=self._integer("expert_feed_forward_length", dense, index),
            renormalised=self._row.renormalised or bool(self._get("expert_weights_norm", False)),
            shared=self._integer("expert_shared_feed_forward_length", dense) if shared else 0,
            bias=self._name(index, "router_bias") in self._tensors,
        )

    def _rope(self, head_dim: int, *, sliding: bool) -> tuple[Rope, float]:
        """The rotary embedding, and the factor on what it rotates."""
        theta = self._positive("rope.freq_base", 10000.0)
        dim = self._integer("rope.dimension_count", head_dim)
        if dim > head_dim or dim % 2 or (dim < head_dim and not self._row.partial_rotary):
            some = (
                "an even number of them" if self._row.partial_rotary else "all, and an even number"
            )
            raise TurboqError(
                f"{self.path}: rotary embedding of {dim} of {head_dim} channels is not supported "
                f"({some})"
            )
        rope, scaling = Rope(theta=theta, dim=dim, layout=self._row.layout), self._rope_scaling()
        if sliding and self._own_sliding_rope:
            base = self._positive("rope.freq_base_swa", self._row.sliding_theta or theta)
            return dataclasses.replace(rope, theta=base), 1.0
        name, magnitude = self._divisors, self._positive("rope.scaling.attn_factor", 1.0)
        yarn = self._yarn()
        if name is None and yarn is not None:
            original = self._integer(
                "rope.scaling.original_context_length", self._integer("context_length")
            )
            return (
                yarn_frequencies(rope, yarn, original, 32.0, 1.0, truncate=True),
                magnitude * temperature(yarn),
            )
        if name is None:
            return dataclasses.replace(rope, scaling=scaling), magnitude
        if scaling is not None or yarn is not None:
            raise TurboqError(f"{self.path}: both {name} and another rope scaling")
        divisors = self._read(name, (dim // 2,)).astype(np.float64)
        if not (divisors > 0).all():
            raise TurboqError(f"{self.path}: tensor {name} must be positive")
        return divided(rope, divisors), magnitude

    @property
    def _divisors(self) -> str | None:
        """The tensor that each frequency is divided by."""
        name = FACTORS[self._long] if self._row.longrope else "rope_freqs.weight"
        return name if name in self._tensors else None

    @property
    def _context(self) -> int:
        """The longest sequence, of longrope's short form the longest short one.

        Raises:
          TurboqError: the long form of a file that has none.
        """
        context, two_forms = self._integer("context_length"), self._row.longrope and self._divisors
        if self._long and not two_forms:
            raise TurboqError(f"{self.path}: {ONE_FORM}")
        if two_forms and not self._long:
            return min(context, self._integer("rope.scaling.original_context_length"))
        return context

    @property
    def _own_sliding_rope(self) -> bool:
        return self._row.sliding_theta is not None or self._row.sliding_unscaled

    def _rope_scaling(self) -> Scaling | None:
        """Linear scaling as llama.cpp reads it: a factor without a type is linear."""
        prefix = f"{self.metadata['general.architecture']}.rope."
        given = {k[len(prefix) :]: v for k, v in self.metadata.items() if k.startswith(prefix)}
        for key, value in given.items():
            own = key == "freq_base_swa" and self._own_sliding_rope
            own |= key == LOG_MULTIPLIER and self._row.latent
            if key not in ROPE and not own:
                raise TurboqError(f"{self.path}: {prefix}{key}={quoted(value)} is not supported")
        if given.get("scaling.attn_factor", 1.0) != 1.0 and not self._row.longrope:
            raise TurboqError(
                f"{self.path}: {prefix}scaling.attn_factor={quoted(given['scaling.attn_factor'])} "
                "is not supported: it would multiply rotated queries and keys"
            )
        kind = given.get("scaling.type", "linear")
        if kind in ("none", "yarn"):
            return None
        if kind != "linear":
            raise TurboqError(
                f"{self.path}: rope scaling type {quoted(kind)} is not supported (supported: none, "
                "linear, yarn, and rope_freqs.weight as Llama 3 has it)"
            )
        keys = [key for key in ("scaling.factor", "scale_linear") if key in given]  # new, old name
        factors = [self._positive(f"rope.{key}") for key in keys]
        if len(set(factors)) > 1:
            said = " but ".join(f"{prefix}{k}={f}" for k, f in zip(keys, factors, strict=True))
            raise TurboqError(f"{self.path}: {said}: make a file that says one factor")
        if not factors and "scaling.type" in given:
            raise TurboqError(f"{self.path}: metadata field {prefix}scaling.factor is missing")
        return Scaling(type="linear", factor=factors[0]) if factors else None

    def _yarn(self) -> float | None:
        """The factor of YaRN as llama.cpp has it (32 and 1 turns, whole pairs); None: not YaRN."""
        kind = self._get("rope.scaling.type", "none")
        return self._positive("rope.scaling.factor") if kind == "yarn" else None

    def _check_tensors(self) -> None:
        """Every tensor the decoder needs is there with its shape, and no tensor is left over."""
        spec = self.spec
        expected = {
            "token_embd.weight": (spec.vocab, spec.hidden),
            NORM: (spec.hidden,),
        }
        if spec.norm == "layer":
            expected[NORM_BIAS] = (spec.hidden,)
        if not spec.tied_embeddings:
            expected["output.weight"] = (spec.vocab, spec.hidden)
        for i, layer in enumerate(spec.layers):
            for name, shape in (self._stored_shapes(layer) | _stacked(layer)).items():
                expected[self._name(i, name)] = shape
        for name, shape in expected.items():
            if name not in self._tensors:
                raise TurboqError(f"{self.path}: tensor {name} is missing")
            P.check_shape(name, self._tensors[name].shape, shape, self.path)
        divisors = FACTORS if self._row.longrope else ("rope_freqs.weight",)
        drafts = tuple(f"blk.{i}." for i in range(len(spec.layers), self._integer("block_count")))
        extra = sorted(
            name
            for name in set(self._tensors) - set(expected) - set(divisors)
            if not name.startswith(drafts)
        )
        if extra:
            raise TurboqError(
                f"{self.path}: tensor {shortened(extra[0])} ({len(extra)} in all) has no place in "
                f"a {spec.family} decoder: the model has a part that is not supported"
            )


def _stacked(layer: LayerSpec) -> P.Shapes:
    """Shapes of all experts' matrices, as one tensor holds them."""
    count = layer.experts.count if layer.experts else 0
    return {name: (count, *shape) for name, shape in P.expert_shapes(layer).items()}


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (pair, half) order back to (half, pair) order."""
    pairs = value.shape[0] // heads // 2
    return np.ascontiguousarray(
        value.reshape(heads, pairs, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    )

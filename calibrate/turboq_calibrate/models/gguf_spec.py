"""The geometry of a GGUF file: what its metadata and the names of its tensors say, as llama.cpp
reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from turboq.errors import TurboqError, quoted
from turboq.numbers.rope import Rope, Scaling
from turboq_calibrate.models.config import ONE_FORM, OTHER_FORM
from turboq_calibrate.models.config_fields import positive
from turboq_calibrate.models.config_gemma4 import shared_channels, sharing, with_inputs
from turboq_calibrate.models.config_longrope import divided
from turboq_calibrate.models.config_yarn import temperature, yarn_frequencies
from turboq_calibrate.models.gguf_architectures import SIGMOID, SOFTMAX, Architecture
from turboq_calibrate.models.gguf_header import TensorInfo
from turboq_calibrate.models.gguf_names import DIVISORS, EMBEDDING, FACTORS, HEAD, layer_name
from turboq_calibrate.models.spec import DeltaNet, Experts, Latent, LayerSpec, Mamba, ModelSpec

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
    "attention.temperature_scale",
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

# Of YaRN: how often kept and stretched frequencies turn; older converters do not say.
TURNS = {"scaling.yarn_beta_fast": 32.0, "scaling.yarn_beta_slow": 1.0}
# Of YaRN, on whole queries and keys: latent attention.
LOG_MULTIPLIER = "scaling.yarn_log_multiplier"

# Of Qwen3.5: which channels turn by which of three positions, that are one in text.
SECTIONS = "dimension_sections"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Reads a header; `read` gives a tensor of a shape, `long` asks for longrope's long form.

    Raises:
      TurboqError: a model the decoder does not do.
    """

    path: Path
    row: Architecture
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str, tuple[int, ...]], np.ndarray]
    long: bool

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

    def spec(self) -> ModelSpec:
        """The whole model's."""
        arch = self.metadata["general.architecture"]
        for key in REFUSED:
            if key not in self.row.reads and self._get(key, 0):
                raise TurboqError(f"{self.path}: {arch}.{key} is set, which is not supported")
        if EMBEDDING not in self.tensors:
            raise TurboqError(f"{self.path}: tensor {EMBEDDING} is missing")
        hidden, count = self._integer("embedding_length"), self._integer("block_count")
        ahead = self._get("nextn_predict_layers", 0)
        if ahead:  # the last layers draft further tokens, and are not run
            count -= self._integer("nextn_predict_layers")
        if not 0 < count <= len(self.tensors):
            raise TurboqError(f"{self.path}: {count} layers but {len(self.tensors)} tensors")
        rms = self.row.norm == "rms"
        eps = self._positive(f"attention.layer_norm_{'rms_' if rms else ''}epsilon")
        layers = self._by_layer(tuple(self._layer(i, hidden, eps) for i in range(count)))
        return ModelSpec(
            family=arch,
            name=self.path.stem,
            vocab=self.tensors[EMBEDDING].shape[0],
            hidden=hidden,
            context=self._context,
            norm_eps=eps,
            norm=self.row.norm,
            tied_embeddings=HEAD not in self.tensors,
            layers=layers,
            shared=shared_channels(layers),
            own_input=layers[0].own_input,
            embed_scale=hidden**0.5
            if self.row.scaled_embedding
            else self._factor("embedding_scale"),
            logit_scale=self._factor("logit_scale") ** (1 if self.row.logits_times else -1),
            logit_softcap=self._cap("final_logit_softcapping", self.row.logit_softcap),
            longer=OTHER_FORM if self.row.longrope and self._divisors and not self.long else "",
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
        row, key = self.row, "attention.sliding_window"
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

    def _layer(self, index: int, hidden: int, eps: float) -> LayerSpec:
        row, mixer = self.row, self._mixer(index)
        heads = kv_heads = head_dim = v_head_dim = 0
        if mixer is None:
            heads = self._integer("attention.head_count", layer=index)
            kv_heads = self._integer("attention.head_count_kv", heads, layer=index)
            if heads % kv_heads:
                raise TurboqError(
                    f"{self.path}: {heads} query heads are not a multiple of {kv_heads} KV heads"
                )
            if row.latent:
                return self._latent_spec(index, hidden, heads, eps)
            if hidden % heads and not self._get("attention.key_length", 0):
                raise TurboqError(f"{self.path}: {hidden=} is not a multiple of {heads=}")
            kind = "_swa" if row.by_layer and self._window(index) else ""
            head_dim = self._integer(f"attention.key_length{kind}", hidden // heads)
            v_head_dim = self._integer(f"attention.value_length{kind}", head_dim)

        def has(name: str) -> bool:
            return layer_name(self.row, index, name) in self.tensors

        window = self._window(index)
        experts = self._grouped(index) if row.grouped else self._experts(index)
        rope, magnitude = None, 1.0
        if mixer is None and self._turns(index) and (window or not row.sliding_rope_only):
            rope, magnitude = self._rope(head_dim, sliding=window is not None)
        return LayerSpec(
            hidden=hidden,
            intermediate=0
            if experts and not experts.beside
            else self._integer("feed_forward_length", layer=index),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            norm_eps=eps,
            rope=rope,
            rope_magnitude=magnitude,
            recurrent=mixer,
            output_gate=row.output_gate and mixer is None,
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
            softmax_scale=self._softmax_scale(hidden, heads),
            window=window,
            softcap=self._cap("attn_logit_softcapping", row.softcap),
            query_growth=self._growth(),
            value_norm=row.by_layer,
            output_scale=has("output_scale"),
        )

    def _growth(self) -> tuple[float, float] | None:
        """How queries grow with their position."""
        if not self._get("attention.temperature_scale", 0):
            return None
        original = self._integer("rope.scaling.original_context_length")
        return self._positive("attention.temperature_scale"), float(original)

    def _by_layer(self, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
        """Gemma 4's layers that share caches, make values of keys or read an input of their own."""
        if not self.row.by_layer:
            return layers
        shared, size = (
            self._integer(key) if self._get(key, 0) else 0
            for key in ("attention.shared_kv_layers", "embedding_length_per_layer_input")
        )
        found = sharing(list(layers), shared, f"{self.path}: attention.shared_kv_layers")
        for i, layer in enumerate(found):
            without = layer_name(self.row, i, "v") not in self.tensors
            if without and layer.borrows_cache_of is None:
                found[i] = dataclasses.replace(layer, values_are_keys=True)
        return with_inputs(found, size) if size else tuple(found)

    def _mixer(self, index: int) -> DeltaNet | Mamba | None:
        """What a layer has in place of attention."""
        if self.row.recurrent is None or not self._is_recurrent(index):
            return None
        heads, inner = self._integer("ssm.time_step_rank"), self._integer("ssm.inner_size")
        groups, size = self._integer("ssm.group_count"), self._integer("ssm.state_size")
        if inner % heads or heads % groups:
            raise TurboqError(
                f"{self.path}: ssm.inner_size={inner}, ssm.time_step_rank={heads} and "
                f"ssm.group_count={groups} must each be a multiple of the next"
            )
        kernel = self._integer("ssm.conv_kernel")
        if self.row.recurrent == "delta":
            return DeltaNet(
                key_heads=groups,
                value_heads=heads,
                key_dim=size,
                value_dim=inner // heads,
                kernel=kernel,
            )
        return Mamba(
            heads=heads,
            head_dim=inner // heads,
            groups=groups,
            state_dim=size,
            kernel=kernel,
            conv_bias=layer_name(self.row, index, "conv_bias") in self.tensors,
            bias=False,
            step_limits=(0.0, float("inf")),
        )

    def _is_recurrent(self, index: int) -> bool:
        if self.row.recurrent == "mamba":
            kv_heads = self._get("attention.head_count_kv")
            return isinstance(kv_heads, list) and kv_heads[index : index + 1] == [0]
        key = "attention.recurrent_layers"
        said = self._get(key, [])
        if not said:
            return (index + 1) % self._integer("full_attention_interval", self.row.interval) != 0
        if not isinstance(said, list) or said[index : index + 1] not in ([True], [False]):
            raise TurboqError(f"{self.path}: {key} must say true or false for every layer")
        return bool(said[index])

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
        gating = self._get("expert_gating_func", 0) or self.row.gating
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
            correction=layer_name(self.row, index, "router_correction") in self.tensors,
            groups=groups,
            chosen_groups=best,
            group_best=2 if groups > 1 else 1,
            scale=self._factor("expert_weights_scale"),
        )

    def _softmax_scale(self, hidden: int, heads: int) -> float | None:
        """Where it is not head_dim^-1/2."""
        if self.row.by_layer:
            return 1.0
        if self._integer("block_count") == self.row.wide_scale_layers:
            return (hidden / heads) ** -0.5
        return self._positive("attention.scale") if self._get("attention.scale", 0) else None

    def _turns(self, index: int) -> bool:
        """Whether a layer has a rotary embedding."""
        every = self.row.no_rope_every
        if self.row.rope_switch and not self._get("rope.scaling.finetuned", True):
            return False
        return every is None or (index + 1) % every != 0

    def _experts(self, index: int) -> Experts | None:
        if not self._get("expert_count", 0):
            return None
        count, chosen = self._integer("expert_count"), self._integer("expert_used_count")
        if chosen > count:
            raise TurboqError(f"{self.path}: expert_used_count={chosen} of {count} experts")
        dense = self._get("feed_forward_length", 0) or None
        gate = self.row.shared_gate
        shared = layer_name(self.row, index, "shared_router" if gate else "shared_gate")
        width = (
            self._integer("expert_shared_feed_forward_length", dense)
            if shared in self.tensors
            else 0
        )
        return Experts(
            count=count,
            chosen=chosen,
            intermediate=self._integer("expert_feed_forward_length", dense, index),
            renormalised=self.row.renormalised or bool(self._get("expert_weights_norm", False)),
            shared=width,
            shared_gate=gate,
            beside=self.row.by_layer,
            bias=layer_name(self.row, index, "router_bias") in self.tensors,
        )

    def _rope(self, head_dim: int, *, sliding: bool) -> tuple[Rope, float]:
        """The rotary embedding, and the factor on what it rotates."""
        theta = self._positive("rope.freq_base", 10000.0)
        kind = "_swa" if sliding and self.row.by_layer else ""
        dim = self._integer(f"rope.dimension_count{kind}", head_dim)
        if dim > head_dim or dim % 2 or (dim < head_dim and not self.row.partial_rotary):
            some = (
                "an even number of them" if self.row.partial_rotary else "all, and an even number"
            )
            raise TurboqError(
                f"{self.path}: rotary embedding of {dim} of {head_dim} channels is not supported "
                f"({some})"
            )
        rope, scaling = Rope(theta=theta, dim=dim, layout=self.row.layout), self._rope_scaling()
        if sliding and self._own_sliding_rope:
            base = self._positive("rope.freq_base_swa", self.row.sliding_theta or theta)
            return dataclasses.replace(rope, theta=base), 1.0
        name, magnitude = self._divisors, self._positive("rope.scaling.attn_factor", 1.0)
        yarn = self._yarn()
        if name is None and yarn is not None:
            original = self._integer(
                "rope.scaling.original_context_length", self._integer("context_length")
            )
            multiplier = self._positive(f"rope.{LOG_MULTIPLIER}", 1.0) if self.row.growing else 0.0
            fast, slow = (self._positive(f"rope.{key}", n) for key, n in TURNS.items())
            return (
                yarn_frequencies(rope, yarn, original, fast, slow, truncate=True),
                magnitude * temperature(yarn) / temperature(yarn, multiplier),
            )
        if name is None:
            return dataclasses.replace(rope, scaling=scaling), magnitude
        if scaling is not None or yarn is not None:
            raise TurboqError(f"{self.path}: both {name} and another rope scaling")
        divisors = self.read(name, (dim // 2,)).astype(np.float64)
        if not (divisors > 0).all():
            raise TurboqError(f"{self.path}: tensor {name} must be positive")
        return divided(rope, divisors), magnitude

    @property
    def _divisors(self) -> str | None:
        """The tensor that each frequency is divided by."""
        name = FACTORS[self.long] if self.row.longrope else DIVISORS
        return name if name in self.tensors else None

    @property
    def _context(self) -> int:
        """The longest sequence, of longrope's short form the longest short one.

        Raises:
          TurboqError: the long form of a file that has none.
        """
        context, two_forms = self._integer("context_length"), self.row.longrope and self._divisors
        if self.long and not two_forms:
            raise TurboqError(f"{self.path}: {ONE_FORM}")
        if two_forms and not self.long:
            return min(context, self._integer("rope.scaling.original_context_length"))
        return context

    @property
    def _own_sliding_rope(self) -> bool:
        return self.row.sliding_theta is not None or self.row.sliding_unscaled

    def _rope_scaling(self) -> Scaling | None:
        """Linear scaling as llama.cpp reads it: a factor without a type is linear."""
        prefix = f"{self.metadata['general.architecture']}.rope."
        given = {k[len(prefix) :]: v for k, v in self.metadata.items() if k.startswith(prefix)}
        for key, value in given.items():
            own = key == "freq_base_swa" and self._own_sliding_rope
            own |= key == LOG_MULTIPLIER and (self.row.latent or self.row.growing)
            own |= key in TURNS and self._yarn() is not None
            own |= key == SECTIONS and self.row.recurrent == "delta"
            own |= key == "dimension_count_swa" and self.row.by_layer
            if key not in ROPE and not own:
                raise TurboqError(f"{self.path}: {prefix}{key}={quoted(value)} is not supported")
        if given.get("scaling.attn_factor", 1.0) != 1.0 and not self.row.longrope:
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
        """The factor of YaRN as llama.cpp has it (`TURNS`, whole pairs); None: not YaRN."""
        kind = self._get("rope.scaling.type", "none")
        return self._positive("rope.scaling.factor") if kind == "yarn" else None

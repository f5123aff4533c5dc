"""How the work of a pass divides among a model's layers and its head: for progress and ETAs."""

from __future__ import annotations

from turboq_calibrate.models.spec import LayerSpec, Mamba, ModelSpec


def shares(spec: ModelSpec, tokens: int) -> tuple[float, ...]:
    """Of the products for a window of so many tokens: each layer's share, then the head's.

    Recurrent states are left out, their projections are not. The shares sum to 1.

    Examples:
      >>> import turboq_calibrate as tc
      >>> from turboq_calibrate.models.work import shares
      >>> found = shares(tc.load_model("embedded").spec, 1024)
      >>> len(found), round(found[-1], 2)  # 30 layers; 49,152 logits a token
      (31, 0.19)
    """
    each = [_layer(layer, tokens) for layer in spec.layers]
    each.append(spec.vocab * spec.hidden)
    total = sum(each)
    return tuple(work / total for work in each)


def _layer(layer: LayerSpec, tokens: int) -> float:
    """Products for a token, in the mean over a window."""
    both = layer.head_dim + layer.v_head_dim
    matrices = (layer.heads + layer.kv_heads) * both
    if layer.recurrent is not None:
        mixer = layer.recurrent
        inner = mixer.inner if isinstance(mixer, Mamba) else mixer.value_heads * mixer.value_dim
        matrices = mixer.channels + 2 * inner
    if layer.latent is not None:
        own = layer.latent.nope_dim + layer.latent.value_dim + layer.head_dim
        matrices = layer.heads * (own + layer.latent.value_dim)
    width = layer.intermediate
    if layer.experts is not None:
        width += layer.experts.chosen * layer.experts.intermediate + layer.experts.shared
    mlp = (3 if layer.gated else 2) * width
    seen = min(layer.window or tokens, tokens / 2)
    return float(layer.hidden * (matrices + mlp) + seen * layer.heads * both)

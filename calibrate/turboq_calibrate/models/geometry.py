"""What a plan must know of a model: its layers' heads, dims, windows and rotary embedding."""

# pyright: strict

from __future__ import annotations

from turboq.plan import LayerGeometry, ModelGeometry
from turboq_calibrate.models.model import Model
from turboq_calibrate.models.spec import LayerSpec, ModelSpec


def model_geometry(model: Model) -> ModelGeometry:
    """What a plan must know of a loaded model. Hashes the weight files (once per `Model`).

    Raises:
      TurboqError: the weight files cannot be read.

    Examples:
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> geometry = tc.model_geometry(model)
      >>> len(geometry.cache_layers) == len(model.spec.layers)
      True
    """
    return spec_geometry(model.spec, model.fingerprint)


def spec_geometry(spec: ModelSpec, fingerprint: str) -> ModelGeometry:
    """The same from its parts."""
    return ModelGeometry(
        fingerprint=fingerprint,
        family=spec.family,
        name=spec.name,
        layers=tuple(_layer(i, spec.path(i), layer) for i, layer in enumerate(spec.layers)),
    )


def _layer(index: int, path: str, spec: LayerSpec) -> LayerGeometry:
    # Pairs are as the family's own code makes them (rows of GGUF are put back in that order).
    rope = spec.rope
    return LayerGeometry(
        index=index,
        path=path,
        kv_heads=spec.kv_heads,
        q_heads=spec.heads,
        k_dim=spec.head_dim,
        v_dim=spec.v_head_dim,
        window=spec.window,
        rope_layout="none" if rope is None else rope.layout,
        rope_dim=None if rope is None or rope.dim == spec.head_dim else rope.dim,
        borrows_cache_of=spec.borrows_cache_of,
        rope=rope,
        latent=spec.latent is not None,
    )

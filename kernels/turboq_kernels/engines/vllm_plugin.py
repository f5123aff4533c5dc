"""What vLLM runs in each of its processes (`vllm.general_plugins`): nothing without TURBOQ_PLAN.

Kept apart from the adapter, so that a vLLM without it does not wait for JAX.
"""

import os

PLAN = "TURBOQ_PLAN"


def plugin() -> None:
    """Registers the plan that the environment names with tpu-inference.

    Raises:
      TurboqError: the plan cannot be read, or keeps exact tokens.
      ImportError: tpu-inference is not installed.
    """
    if folder := os.environ.get(PLAN):
        from turboq.plan import load
        from turboq_kernels.engines import tpu_inference

        plan, arrays = load(folder)
        layers = {layer.index: plan.kv_layer(layer.index, arrays) for layer in plan.layers}
        tpu_inference.register(layers)

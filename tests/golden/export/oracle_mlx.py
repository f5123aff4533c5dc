"""mlx-lm builds and fills the exported caches: python oracle_mlx.py WORK (mlx/result.json)."""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path


def main(work: Path) -> None:
    import mlx.core as mx
    from mlx_lm.models import llama

    spec = importlib.util.spec_from_file_location("t", work / "mlx" / "turboq_cache.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads((work / "checkpoint" / "config.json").read_text())
    theta = config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    model = llama.Model(llama.ModelArgs.from_dict({**config, "rope_theta": theta}))
    model.load_weights(str(work / "checkpoint" / "model.safetensors"))
    cache = module.make_prompt_cache()
    prompt = mx.array([list(range(3, 259))])
    tokens = []
    logits = model(prompt.astype(mx.int32), cache=cache)
    # Sizes when 256 tokens are stored, which is the step in which the caches grow.
    sizes = [layer.nbytes for layer in cache]
    for _ in range(4):
        token = mx.argmax(logits[:, -1], axis=-1)
        tokens.append(int(token.item()))
        logits = model(token[:, None], cache=cache)
    result = {
        "versions": {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
        "layers": [type(layer).__name__ for layer in cache],
        "settings": [[layer.group_size, layer.bits] for layer in cache],
        "dtype": str(cache[0].keys[1].dtype),
        "bytes_at_256": sizes,
        "generated": tokens,
    }
    (work / "mlx" / "result.json").write_text(json.dumps(result))
    print(result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

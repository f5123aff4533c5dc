"""Quality tables as `turboq evaluate` writes them, made by hand."""

from turboq_calibrate.measure.quality_schema import SCHEMA
from turboq_calibrate.measure.quality_table import Quality


def row(name, codec="turboquant_mse", bits=3, kl=0.2, *, text="noise", ci=(0.8, 1.25)):
    return {
        "name": name, "codec": codec, "k_codec": codec, "v_codec": codec, "k_bits": bits,
        "v_bits": bits, "bits_per_channel": bits + 0.25, "bits_per_channel_at_context": bits + 0.3,
        "context": 4096, "policy": {"sinks": 4, "recent": 0, "exact_dtype": "bfloat16"},
        "bytes_per_token": 100 * bits, "compression": 16 / bits,
        "cache_bytes": {str(c): 100 * bits * c for c in (256, 1024, 4096)},
        "text": text, "quantized_tokens": 0 if codec == "exact" else 1784, "scored_positions": 1781,
        "kl_mean": kl, "kl_median": kl / 2, "kl_ci": None if ci is None else [c * kl for c in ci],
        "kl_windows": [kl] * 3, "kl_p99": 5 * kl,
        "kl_by_position": [
            {"start": 0, "end": 256, "kl_mean": 0.5 * kl, "positions": 756},
            {"start": 256, "end": 599, "kl_mean": 1.5 * kl, "positions": 1029},
        ],
        "by_position": [
            {"start": 0, "end": 599, "positions": 1781}
            | {name: x for key, mean in
               [("kl_mean", kl), ("kl_p99", 5 * kl), ("kl_p999", 9 * kl), ("top1", 0.75),
                ("perplexity_ratio", 1 + kl)]
               for name, x in [(key, mean), (f"{key}_ci", ci and [c * mean for c in ci])]},
        ],
        "steps": {"positions": 12, "kl_one_pass": kl, "kl_steps": 1.1 * kl, "difference_ci": None,
                  "largest": kl / 2, "top1_one_pass": 0.75, "top1_steps": 0.5},
        "top1": 0.75, "perplexity": 20.0 + kl, "perplexity_exact": 20.0, "perplexity_ratio": 1 + kl,
    }  # fmt: skip


def head_errors(scale, layers=5, heads=2):
    grid = [[scale * (1 + 10 * i + h) for h in range(heads)] for i in range(layers)]
    grid[3] = None  # a layer without a cache
    return {"k_logit_rms": grid, "k_rel_mse": grid, "v_rel_mse": grid}


def quality(rows, texts=("noise",), tokens=600):
    table = {
        "schema": SCHEMA, "model": "tiny & <b>bold</b>", "model_fingerprint": "ab" * 32,
        "attention": "simulated", "bootstrap": {"level": 0.95, "samples": 100, "seed": 0},
        "texts": [
            {"text": text, "windows": 3, "window_tokens": tokens, "tokens": 3 * (tokens - 1),
             "windows_sha256": "cd" * 32, "perplexity": 20.0}
            for text in texts
        ],
        "rows": rows,
        "head_errors": {
            text: {r["name"]: head_errors(r["kl_mean"] or 1e-9) for r in rows if r["text"] == text}
            for text in texts
        },
    }  # fmt: skip
    run = {"seconds": 12.0, "seconds_per_plan_and_window": 0.5, "windows_measured": 24,
           "windows_reused": 0, "peak_memory_bytes": 2**30, "versions": {"jax": "0"},
           "platform": "here", "cpus": 2, "devices": ["cpu:0"]}  # fmt: skip
    return Quality(table=table, run=run)


def task_results():
    """`tasks.json` of two plans, a task at chance and one that counts."""
    shares = {
        name: 0.5 for kind in ("chosen", "matches") for name in (kind, f"{kind}_exact", f"{kind}_p")
    }
    rows = [
        {
            "plan": plan, "bits_per_channel": bits, "cache_bytes": 1000, "exact_tokens": [4, 0],
            "task": task, "length": 256, "examples": 4, "at_chance": task == "<lots>",
            "logp": -4.0 - loss, "logp_exact": -4.0, "logp_change": -loss,
            "logp_change_ci": [-2 * loss, 0.0], "rank": 3.0, "rank_exact": 2.0, "agrees": 0.75,
            "by_depth": [{"depth": 0.5, "logp_change": -loss, "agrees": 0.75}],
        } | shares
        for plan, bits, loss, task in (
            ("exact", 32.0, 0.0, "<lots>"),
            ("a & b", 2.25, 1.0, "needle"),
            ("c", 4.25, 0.1, "needle"),
        )
    ]  # fmt: skip
    return {
        "schema": 1, "model": "tiny", "model_fingerprint": "ab" * 32, "seed": 0, "depths": [0.5],
        "rows": rows,
    }  # fmt: skip

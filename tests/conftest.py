"""Strict numerics for every test: no silent dtype or rank promotion. Which files take longest."""

import collections
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator

import hypothesis
import jax
import numpy as np
import pytest
from unchecked import unchecked

# Most of the time goes into compiling programs that run once on a few numbers: without LLVM's
# passes and with XLA's older emitter of loops that takes a quarter as long. XLA's own passes stay
# but the one that verifies the others (6 % of the time), and `XLA_FLAGS= ./scripts/test` runs all.
# XLA reads this at its first compilation, here and in the processes that tests start. jaxlib
# 0.12.0.1 crashes now and then while it compiles so.
USUAL = jax.__version_info__ < (0, 12)
if "XLA_FLAGS" not in os.environ:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # level 0; `optimised` takes it back
    jax.config.update("jax_disable_most_optimizations", True)
    if USUAL:
        os.environ["XLA_FLAGS"] = (
            "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
            " --xla_cpu_parallel_codegen_split_count=1"
            " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
            " --xla_disable_hlo_passes=hlo-verifier"
        )
# One thread a process: the workers of a run share the cores, and threads of small products wait for
# each other longer than they multiply. OpenBLAS reads this when NumPy is imported, so it holds for
# the workers and for what tests start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# What one process of a run has compiled, the others (workers and what tests start) read instead of
# compiling it again. A run begins with an empty folder. jaxlib 0.12.0.1 crashes here too.
CACHE = "JAX_COMPILATION_CACHE_DIR"
SHARED = CACHE not in os.environ and USUAL
MINE = tempfile.mkdtemp(prefix="turboq-compiled-") if SHARED else None
if MINE is not None:
    os.environ |= {CACHE: MINE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
    jax.config.update("jax_compilation_cache_dir", MINE)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
# Tracing makes many small objects that die young: Python's own pace of looking for cycles among all
# that was imported costs a tenth of a run.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# The same examples on every machine and run: a red suite is a reproducible one.
hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("reproducible")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    """A fixed NumPy generator: tests are reproducible and independent of JAX's key format."""
    return np.random.default_rng(20261122)


@pytest.fixture(name="unchecked")
def _unchecked() -> Iterator[None]:
    """`unchecked.unchecked` for a test, or for a file: `pytestmark = usefixtures("unchecked")`."""
    with unchecked():
        yield


def pytest_unconfigure(config: pytest.Config) -> None:
    if MINE is not None:
        shutil.rmtree(MINE, ignore_errors=True)


# Longest first: a worker that began one of these last would end alone.
LONG = (
    "test_families_end_to_end.py",
    "test_columns.py",
    "test_reverse.py",
    "test_encode_window.py",
    "test_mosaic_tpu.py",
    "test_plan_within.py",
    "test_observe.py",
    "test_model_decode_speed.py",
    "test_codecs.py",
    "test_joint.py",
    "test_evaluate.py",
    "test_mesh.py",
    "test_codec_edges.py",
    "test_mosaic_tpu_step.py",
    "test_on_gpu.py",
    "test_attention.py",
    "test_model_cache.py",
    "test_windows.py",
    "test_paged.py",
    "test_encode_triton.py",
    "test_keys_before_rope.py",
    "test_fuzz_program.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay


def pytest_terminal_summary(terminalreporter) -> None:
    """The ten files that took longest, set-up included."""
    seconds: collections.Counter[str] = collections.Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("slowest files")
        for name, total in seconds.most_common(10):
            terminalreporter.write_line(f"{total:7.1f} s  {name}")

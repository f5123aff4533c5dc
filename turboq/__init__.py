"""turboq: learned per-head KV-cache quantization."""

from turboq.version import __version__ as __version__

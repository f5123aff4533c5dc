"""Models by name: ORG/NAME is a folder of the hub's cache, downloaded if need be; or `packaged`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from turboq.errors import TurboqError, shortened
from turboq_calibrate.models import packaged

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIG = ("*.json",)
WEIGHTS = ("*.json", "*.safetensors", "tokenizer*", "*.model")
COPIES = ("consolidated*", "original/*")  # of the same weights


def local(path: str | os.PathLike[str], files: Sequence[str] = WEIGHTS) -> str | os.PathLike[str]:
    """`path` as it is; the file of a packaged model; of a name ORG/NAME that is no path, the folder
    that holds `files` of it.

    Raises:
      TurboqError: it is neither here nor can be had; says what to run where a network is.
    """
    name = str(path)
    if name in packaged.MODELS:
        return packaged.path(name)
    if os.path.exists(path) or not HUB_ID.fullmatch(name):
        return path
    folder = Path(name)
    if folder.suffix in (".gguf", ".json", ".safetensors") or folder.parent.is_dir():
        return path  # a file that is missing, or a name in a folder that is here
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(
            name, allow_patterns=list(files), ignore_patterns=list(COPIES)
        )
    except (OSError, errors.HfHubHTTPError, errors.HFValidationError) as error:
        why = f"{type(error).__name__}: {shortened(str(error).partition(chr(10))[0], 100)}"
        raise TurboqError(
            f"model {name} does not exist here and could not be had from the hub ({why}): where a "
            f"network is, run `hf download {name} --local-dir {folder.name}` and give that folder"
        ) from error

"""Orbax behind one module: the accumulators of an unfinished capture, atomically visible.

A checkpoint is a position (int64 numbers) and nested dicts of NumPy arrays. It is written under a
temporary name and renamed, and the one before it is removed only afterwards, so a kill at any time
leaves the newest complete one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from turboq.errors import TurboqError, shortened
from turboq.files import make_folder


class Checkpoints:
    """The newest checkpoint of one folder.

    Raises:
      TurboqError: the folder cannot be written (disk full, no permission).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        make_folder(folder)
        # Every process reads for itself and only one is asked to save: no collectives in here.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"process{jax.process_index()}",
        )
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=jax.process_index() == 0,
                create=False,
                multiprocessing_options=alone,
            ),
            item_handlers=ocp.PyTreeCheckpointHandler(
                use_ocdbt=True, use_zarr3=True, multiprocessing_options=alone
            ),
        )

    def save(self, step: int, position: tuple[int, ...], tree: dict[str, Any]) -> None:
        """Saves `tree` as step `step`, which must be above every earlier one."""
        item = {"position": np.asarray(position, np.int64), "tree": tree}
        try:
            self._manager.save(step, args=ocp.args.PyTreeSave(item), force=True)
        except (OSError, ValueError) as error:
            raise TurboqError(
                f"cannot write checkpoint {step} in {self.folder}: {shortened(error)}"
            ) from error

    def restore(self) -> tuple[tuple[int, ...], dict[str, Any]] | None:
        """Position and tree of the newest checkpoint; None when there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        try:
            item = self._manager.restore(step, args=ocp.args.PyTreeRestore())
        except (OSError, ValueError, KeyError) as error:
            raise TurboqError(
                f"checkpoint {step} in {self.folder} is damaged ({shortened(error)}): remove the "
                "folder to start again"
            ) from error
        return tuple(int(p) for p in item["position"]), item["tree"]

    def close(self) -> None:
        self._manager.close()

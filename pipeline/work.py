"""The ignored folder for what must outlive an interrupted stage: the row store and training checkpoints.

DVC deletes a stage's outputs before it runs, so unfinished work lies elsewhere. `$SHOTLESS_WORK` sets the place, for example one shared
by the copies of the workspace that `dvc exp run --temp` makes.
"""

import os
from pathlib import Path


def work_folder() -> Path:
    """`$SHOTLESS_WORK`, or `.work` in the current folder."""
    return Path(os.environ.get("SHOTLESS_WORK", ".work"))

"""`python -m stages.prepare`: sources become examples with roles and contexts → artifacts/data, metrics/prepare.json."""

from pipeline.data.prepare import prepare
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Draw every role and build every list of contexts."""
    folders = Folders.here()
    # Later stages depend on these folders as a whole. A run may have no students, and free text has no target sets.
    for root, names in ((folders.artifacts, ("students", "targets")), (folders.metrics, ("curves", "risk", "targets", "train"))):
        for name in names:
            (root / name).mkdir(parents=True, exist_ok=True)
    prepare(resolved_params(), folders)


if __name__ == "__main__":
    run(main)

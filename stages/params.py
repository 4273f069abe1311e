"""Check params.yaml and write it with all defaults → artifacts/params.json."""

from pipeline.params import resolve
from stages import run

if __name__ == "__main__":
    run(resolve)

"""What a run was made of, for whoever wants it again: digests of params, models and caches, and the versions of the packages."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from pipeline.files import sha256_json
from pipeline.params import Params
from pipeline.report.collect import Inputs, Json

PACKAGES = (
    "shotless", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "polars", "numpy", "scipy", "scikit-learn", "dvc",
    "altair", "vl-convert-python",
)  # fmt: skip
HASH_DIGITS = 16
LONGEST_VALUE, MOST_VALUES = 120, 24
"""Of what a file records about itself: the page shows a digest, the file has it all."""


def identity(inputs: Inputs) -> list[tuple[str, list[tuple[str, str]]]]:
    """Digests, fingerprints and versions: (heading, [(name, value)])."""
    found: list[tuple[str, list[tuple[str, str]]]] = [("Params", [("sha256", params_digest(inputs.params))])]
    found += [(f"Model {name}", _scalars(source)) for name, source in inputs.sources.items()]
    for name, manifest in inputs.manifests.items():
        found.append((f"Scores of {name}", _scalars(manifest.get("fingerprint", {})) + _scalars(manifest.get("totals", {}))))
    found += [(f"Student {name}", _scalars(entry)) for name, entry in inputs.provenance.items()]
    versions = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            versions.append((package, version(package)))
        except PackageNotFoundError:  # the project itself, run from a folder without being installed
            versions.append((package, "not installed as a package"))
    return [*((title, rows) for title, rows in found if rows), ("Versions", versions)]


def flatten(value: Any, path: str = "") -> Any:
    """(path, text) for each scalar in a JSON value, paths joined by " · "; lists of scalars stay in one line."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from flatten(entry, f"{path} · {key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        for i, entry in enumerate(value):
            yield from flatten(entry, f"{path} · {i}")
    elif isinstance(value, list):
        yield path, ", ".join(map(str, value))
    elif isinstance(value, bool) or value is None:
        yield path, {True: "yes", False: "no", None: "–"}[value]
    else:
        yield path, f"{value:,}" if isinstance(value, int) else str(value)


def params_text(params: Params) -> str:
    """What params.yaml sets, as YAML; `runtime` has no meaning for the results."""
    text = StringIO()
    yaml = YAML(pure=True)
    yaml.width = 120
    yaml.dump(params.model_dump(mode="json", exclude={"runtime"}, exclude_unset=True), text)
    return text.getvalue()


def params_digest(params: Params) -> str:
    """sha256 of all params that have a meaning for the results."""
    return sha256_json(params.model_dump(mode="json", exclude={"runtime"}))


def _scalars(value: Json) -> list[tuple[str, str]]:
    """The flattened entries that are short enough to read; hashes are cut."""
    rows = []
    for path, text in flatten(value):
        short = text[:HASH_DIGITS] + "…" if re.fullmatch(r"[0-9a-f]{40,}", text) else text
        if len(short) <= LONGEST_VALUE:
            rows.append((path, short))
    return rows[:MOST_VALUES]

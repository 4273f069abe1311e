"""Presets: a run with other params, in a workspace of its own beside the default run.

`presets/NAME.yaml` holds only what differs from params.yaml and is laid over it. The workspace, `runs/NAME/`, is a copy of the code and the
DAG with the merged params; it shares the DVC cache and the row store with the project, so what both runs need is fetched and scored once.
"""

import copy
import shutil
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.errors import UsageError, choices
from pipeline.params import parse_params
from pipeline.params.yaml_file import read_yaml

COPIED = ("dvc.yaml", ".dvcignore", "pipeline", "stages")


def merge(base: Any, changes: Any) -> Any:
    """`changes` laid over `base`: mappings are merged key by key, a null removes a key, anything else replaces."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return copy.deepcopy(changes)
    merged = {key: copy.deepcopy(value) for key, value in base.items() if changes.get(key, value) is not None or key not in changes}
    for key, value in changes.items():
        if value is not None:
            merged[key] = merge(base.get(key), value)
    return merged


def _merged(base: Any, changes: Any, preset: Path) -> Any:
    """`merge`, where a preset that holds itself is refused."""
    try:
        return merge(base, changes)
    except RecursionError:
        raise UsageError(f"{preset}: an entry of it holds itself, or is nested deeper than can be read; write it out.") from None


def make_workspace(name: str, project: Path) -> Path:
    """Write `runs/NAME/` for a preset and return it; what it has made before stays.

    Raises UsageError where there is no such preset or its params do not hold.
    """
    presets = {file.stem: file for file in sorted((project / "presets").glob("*.yaml"))}
    if name not in presets:
        raise UsageError(f"presets: no {name!r}; choose one of: {choices(presets)}")
    changes = read_yaml(presets[name])
    if not isinstance(changes, dict):
        raise UsageError(f"{presets[name]}: expected a mapping of what differs from params.yaml, found {type(changes).__name__}.")
    raw = _merged(read_yaml(project / "params.yaml"), changes, presets[name])
    parse_params(raw, presets[name])
    return write_workspace(raw, project / "runs" / name, project)


def write_workspace(raw: dict[str, Any], workspace: Path, project: Path) -> Path:
    """Write or bring up to date a workspace whose params are `raw`, and return it; paths of local files are made absolute in `raw`."""
    for origin in _local_origins(raw):
        origin["path"] = str((project / origin["path"]).resolve())
    workspace.mkdir(parents=True, exist_ok=True)
    for item in COPIED:
        source, target = project / item, workspace / item
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    yaml = YAML(typ="safe", pure=True)
    # methods and sets are shown in the order in which they were written
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(raw, workspace / "params.yaml")
    (workspace / ".dvc").mkdir(exist_ok=True)
    settings = ConfigParser(interpolation=None)
    settings.read_string((project / ".dvc" / "config").read_text("utf-8"))
    settings.read_dict({"core": {"no_scm": "true"}, "cache": {"dir": f"{project.resolve()}/.dvc/cache"}})
    with (workspace / ".dvc" / "config").open("w", encoding="utf-8") as file:
        settings.write(file)
    return workspace


def _local_origins(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """Every origin that names a path of this machine, which is relative to the project."""
    origins = [*raw["models"].values(), *(source["origin"] for source in raw["data"]["sources"].values())]
    return [origin for origin in origins if isinstance(origin, dict) and origin.get("source") == "local"]

"""Presets: a run with other params, in a workspace of its own beside the default run.

`presets/NAME.yaml` has only what differs from params.yaml and is laid over it. The workspace, `runs/NAME/`, is a copy of the code and the
DAG with the merged params. It shares the DVC cache and `.work` with the project, so what both runs need is downloaded and scored once.
"""

import copy
import shutil
from configparser import ConfigParser
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError, choices
from pipeline.params.data import DOWNLOADS
from pipeline.params.reading import parse_params, read_yaml, write_yaml

COPIED = ("dvc.yaml", ".dvcignore", "constraints.txt", "pipeline", "stages")


def merge(base: Any, changes: Any) -> Any:
    """`changes` laid over `base`: mappings are merged key by key, a null removes a key, anything else replaces."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return copy.deepcopy(changes)
    merged = {}
    for key in base | changes:
        if key not in changes:
            merged[key] = copy.deepcopy(base[key])
        elif changes[key] is not None:
            merged[key] = merge(base.get(key), changes[key])
    return merged


def make_workspace(name: str, project: Path) -> Path:
    """Write `runs/NAME/` for a preset, or bring it up to date, and return it. Raises UsageError if the preset cannot be used."""
    presets = {file.stem: file for file in sorted((project / "presets").glob("*.yaml"))}
    if name not in presets:
        raise UsageError(f"presets: no {name!r}; choose one of: {choices(presets)}")
    changes = read_yaml(presets[name])
    if not isinstance(changes, dict):
        raise UsageError(f"{presets[name]}: expected a mapping of what differs from params.yaml, found {type(changes).__name__}.")
    try:
        raw = merge(read_yaml(project / "params.yaml"), changes)
    except RecursionError:
        raise UsageError(f"{presets[name]}: an entry contains itself, or is nested too deep; write it out.") from None
    parse_params(raw, presets[name])
    return write_workspace(raw, project / "runs" / name, project)


def write_workspace(raw: dict[str, Any], workspace: Path, project: Path) -> Path:
    """Write a workspace whose params are `raw`, or bring it up to date, and return it. Local paths become absolute, but not downloads'."""
    raw = copy.deepcopy(raw)
    for entry in [*raw["models"].values(), *raw["data"]["sources"].values()]:
        if not entry["path"].startswith(f"{DOWNLOADS}/"):
            entry["path"] = str((project / entry["path"]).resolve())
    workspace.mkdir(parents=True, exist_ok=True)
    for item in COPIED:
        source, target = project / item, workspace / item
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copyfile(source, target)
    write_yaml(raw, workspace / "params.yaml")
    for cost in (project / "metrics" / "cost").glob("*.json"):  # DVC keeps none; the report leaves out those of another model
        if not (own := workspace / "metrics" / "cost" / cost.name).exists():
            own.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cost, own)
    settings = ConfigParser(interpolation=None)
    settings.read([project / ".dvc" / name for name in ("config", "config.local")], encoding="utf-8")
    cache = (project / ".dvc" / settings.get("cache", "dir", fallback="cache")).resolve()
    settings.read_dict({"core": {"no_scm": "true"}, "cache": {"dir": str(cache)}})
    (workspace / ".dvc").mkdir(exist_ok=True)
    with (workspace / ".dvc" / "config").open("w", encoding="utf-8") as file:
        settings.write(file)
    return workspace

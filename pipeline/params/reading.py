"""From params.yaml to typed params, with every fault named by its path, the value and the choices; and the resolved params.

YAML is read as DVC reads it (1.2, so that `1e-4` is a float). The first stage of a run writes the params, defaults filled in, to
artifacts/params.json. Every other stage tracks its part of that file, so a default that changes in code is a change to DVC like any other.
It also has `versions`, of the libraries that results depend on, and `context_models`, which `prepare` goes by. It is JSON because DVC reads
it once for each stage, and its reader of YAML takes a hundred times as long.
"""

import copy
import io
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import Repr
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UsageError, choices
from pipeline.files import read_json, write_json, write_text
from pipeline.params.data import DOWNLOADS, HubDownload, PypiDownload
from pipeline.params.methods import Params

RESOLVED = Path("artifacts/params.json")
VERSIONS = {
    "models": ("torch", "transformers", "tokenizers", "jinja2", "peft", "gguf", "scipy", "scikit-learn"),
    "tables": ("numpy", "polars", "pyarrow", "scipy", "scikit-learn"),
    "charts": ("vl-convert-python",),
}
"""Libraries that results depend on."""
_DOWNLOADS: dict[str, type[BaseModel]] = {"pypi": PypiDownload, "hub": HubDownload}
Entry = TypeVar("Entry")


def pick(block: str, entries: Mapping[str, Entry], name: str) -> Entry:
    """One entry of a map in params.yaml. Raises UsageError naming the block and the choices."""
    if name not in entries:
        raise UsageError(f"params.yaml: {block}: no {name!r}; choose one of: {choices(entries)}")
    return entries[name]


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. Raises UsageError if it is absent, not UTF-8 or not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file. Run from the project's folder.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    except RecursionError:
        raise UsageError(f"{path}: not valid YAML: nested too deep.") from None
    except (YAMLError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None


def yaml_text(value: Any) -> str:
    """A value as YAML; keys keep their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.default_flow_style = False
    yaml.representer.ignore_aliases = lambda _: True  # a value that occurs twice is written twice
    yaml.width = 2**20  # a key that is broken over two lines cannot be read again
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()


def write_yaml(value: Any, path: Path) -> None:
    """Write a YAML file; keys keep their order."""
    write_text(yaml_text(value), path)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml. Raises UsageError with every fault."""
    return parse_params(read_yaml(path), path)


def resolved_params(path: Path = RESOLVED) -> Params:
    """The params of a running stage, as the first stage resolved them.

    Raises UsageError if a library is no longer the pinned one: DVC does not see what was installed since.
    """
    if faults := other_versions(Path("constraints.txt")):
        raise UsageError("\n".join(faults))
    return parse_params({key: value for key, value in read_json(path).items() if key in Params.model_fields}, path)


def checked_params(project: Path = Path()) -> Params:
    """The project's params, with local files there and libraries as pinned. Raises UsageError with every fault."""
    params = load_params(project / "params.yaml")
    faults = [*absent_files(params, project), *other_versions(project / "constraints.txt")]
    if faults:
        raise UsageError("\n".join(faults))
    return params


def resolve(project: Path = Path()) -> None:
    """Check params.yaml as `checked_params` does, and write artifacts/params.json."""
    params = checked_params(project)
    versions = {group: ", ".join(f"{name} {version(name)}" for name in names) for group, names in VERSIONS.items()}
    derived = {"versions": versions, "context_models": params.context_models()}
    write_json({**params.model_dump(mode="json"), **derived}, project / RESOLVED)


def absent_files(params: Params, project: Path = Path()) -> list[str]:
    """A line for each local path that does not exist."""
    named = [(f"models.{name}.path", model.path, "") for name, model in params.models.items()]
    named += [(f"data.sources.{name}.path", source.path, source.obtain) for name, source in params.data.sources.items()]
    return [
        f"params.yaml: {where}: {path!r} does not exist. Give a path from the project's folder, or an absolute one."
        + (f" To get it: {obtain.strip()}" if obtain else "")
        for where, path, obtain in named
        if not path.startswith(f"{DOWNLOADS}/") and not (project / path).exists()
    ]


def other_versions(constraints: Path) -> list[str]:
    """A line for each library that results depend on whose installed version is not the pinned one."""
    text = constraints.read_text(encoding="utf-8") if constraints.is_file() else ""
    pins = {name.lower(): pinned for name, pinned in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE)}
    lines = []
    for name in (name for group in VERSIONS.values() for name in group if name in pins):
        try:
            found = f"{version(name)} is installed"
        except PackageNotFoundError:
            found = "is not installed"
        if found.split()[0].partition("+")[0] != pins[name].partition("+")[0]:  # "+cpu" is a build, not another version
            lines.append(f"{name} {found}, constraints.txt pins {pins[name]}. Run `make setup`, or correct the pin.")
    return lines


def parse_params(raw: Any, path: Path = Path("params.yaml")) -> Params:
    """Check params that were already read; `path` is named in messages. Raises UsageError with every fault."""
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected a mapping of {choices(Params.model_fields)}, found {type(raw).__name__}.")
    faults: list[str] = []
    rest, seen = raw, set[tuple[str, ...]]()
    while rest is not None:
        try:
            params = Params.model_validate(rest)
        except ValidationError as error:
            found = [(tuple(_walk(fault["loc"])[0]), fault) for fault in error.errors()]
            new = [(place, fault) for place, fault in found if place not in seen]
            faults += [line for _, fault in new for line in _explain(path, fault) if line not in faults]
            seen.update(place for place, _ in new)
            # a fault that appears only because a wrong key was taken out does not count
            is_last = len(new) < len(found) or any(fault["type"] == "missing" for _, fault in new)
            rest = None if is_last else _without(rest, [place for place, _ in new])
        else:
            if not faults:
                return params
            rest = None
    raise UsageError("\n".join(faults))


def _without(raw: Any, places: Sequence[tuple[str, ...]]) -> Any:
    """`raw` without the keys at `places`, so that the others can be checked together; None if a fault has no key of its own."""
    pruned = copy.deepcopy(raw)
    for keys in places:
        parent = pruned
        for key in keys[:-1]:
            parent = parent.get(key) if isinstance(parent, dict) else None
        if not keys or not isinstance(parent, dict) or keys[-1] not in parent:
            return None
        del parent[keys[-1]]
    return pruned


def _explain(path: Path, fault: Any) -> list[str]:
    where, kind = ".".join(_walk(fault["loc"])[0]), fault["type"]
    if kind == "extra_forbidden":
        _, parent = _walk(fault["loc"][:-1])
        return [f"{path}: {where}: unknown key; there are: {choices(getattr(parent, 'model_fields', ()))}"]
    if kind == "value_error":
        return [f"{path}: {where}: {line}" if where else f"{path}: {line}" for line in str(fault["ctx"]["error"]).splitlines()]
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        tag = fault.get("ctx", {}).get("tag")
        return [f"{path}: {where}.source: {'missing' if tag is None else f'no {tag!r}'}; choose one of: {choices(_DOWNLOADS)}"]
    if kind == "missing":
        return [f"{path}: {where}: missing; it has to be given"]
    hint = "; put it in quotes" if kind == "string_type" and isinstance(fault["input"], (int, float)) else ""
    return [f"{path}: {where}: {fault['msg'][0].lower()}{fault['msg'][1:]}, found {_shown(fault['input'])}{hint}"]


def _shown(value: Any) -> str:
    """A value for a message: its beginning alone, since aliases in YAML can make a few lines unfold to gigabytes."""
    shown = Repr()
    shown.maxlevel, shown.maxdict, shown.maxlist, shown.maxstring, shown.maxother = 2, 6, 6, 200, 200
    return shown.repr(value)


def _walk(location: tuple[str | int, ...]) -> tuple[list[str], Any]:
    """A fault's place as a path of keys, without the kind of a download that pydantic puts among them, and the type declared there."""
    annotation: Any = Params
    keys: list[str] = []
    for part in map(str, location):
        if PypiDownload in get_args(annotation):
            annotation = _DOWNLOADS.get(part, Any)
            continue
        keys.append(part)
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            field = getattr(annotation, "model_fields", {}).get(part)
            annotation = Any if field is None else field.annotation
        while hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
        members = [member for member in get_args(annotation) if member is not NoneType]
        if NoneType in get_args(annotation) and len(members) == 1:
            annotation = members[0]
    return keys, annotation

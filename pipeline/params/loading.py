"""From the file to typed params: every fault is named with its path, the value and the choices."""

from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.errors import UsageError, choices
from pipeline.params.data import HubOrigin, LocalOrigin, Origin, PypiOrigin
from pipeline.params.root import Params
from pipeline.yaml_file import read_yaml

Entry = TypeVar("Entry")


def pick(block: str, entries: Mapping[str, Entry], name: str) -> Entry:
    """One entry of a map in params.yaml.

    Raises UsageError naming the block and the choices.
    """
    if name not in entries:
        raise UsageError(f"params.yaml: {block}: no {name!r}; choose one of: {choices(entries)}")
    return entries[name]


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and check params.yaml.

    Raises UsageError with every fault found, each with its path, the value and the choices.
    """
    return parse_params(read_yaml(path), path)


def parse_params(raw: Any, path: Path = Path("params.yaml")) -> Params:
    """Check already loaded params; `path` is named in messages."""
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected a mapping of {choices(Params.model_fields)}, found {type(raw).__name__}.")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(path, fault) for fault in error.errors())) from None


def _explain(path: Path, fault: Any) -> str:
    """One line for one fault: file, key path, what is wrong, value, choices."""
    location, _ = _walk(fault["loc"])
    where = ".".join(location)
    kind, found = fault["type"], f", found {_shown(fault['input'])}"
    if kind == "extra_forbidden":
        _, parent = _walk(fault["loc"][:-1])
        return f"{path}: {where}: unknown key; there are: {choices(getattr(parent, 'model_fields', ()))}"
    if kind == "value_error":
        message = str(fault["ctx"]["error"])
        return f"{path}: {where}: {message}" if where else f"{path}: {message}"
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        tag = fault.get("ctx", {}).get("tag")
        said = "missing" if tag is None else f"no {tag!r}"
        return f"{path}: {where}.source: {said}; choose one of: {choices(_ORIGINS)}"
    if kind == "missing":
        return f"{path}: {where}: missing; it has to be given"
    hint = "; put it in quotes" if kind == "string_type" and isinstance(fault["input"], (int, float)) else ""
    return f"{path}: {where}: {fault['msg'][0].lower()}{fault['msg'][1:]}{found}{hint}"


def _shown(value: Any) -> str:
    """A value as it stands in a message: its beginning alone, since aliases in YAML can make a few lines unfold to gigabytes."""
    shown = Repr()
    shown.maxlevel, shown.maxdict, shown.maxlist, shown.maxstring, shown.maxother = 2, 6, 6, 200, 200
    return shown.repr(value)


_ORIGINS: dict[str, type[BaseModel]] = {"pypi": PypiOrigin, "hub": HubOrigin, "local": LocalOrigin}


def _walk(location: tuple[str | int, ...]) -> tuple[list[str], Any]:
    """A fault's place as a path of keys, and the type that is declared there.

    pydantic puts the kind of an origin into the place as if it were a key; it is left out, and a model that is called `local` is not.
    """
    annotation: Any = Params
    keys: list[str] = []
    for part in map(str, location):
        if annotation is Origin:
            annotation = _ORIGINS.get(part, Any)
            continue
        keys.append(part)
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:
            field = getattr(annotation, "model_fields", {}).get(part)
            annotation = Any if field is None else field.annotation
        annotation = _declared(annotation)
    return keys, annotation


def _declared(annotation: Any) -> Any:
    """A type without the `None` of an optional key; any union of origins is `Origin`."""
    if annotation is Origin or PypiOrigin in get_args(annotation):
        return Origin
    members = [member for member in get_args(annotation) if member is not NoneType]
    is_optional = NoneType in get_args(annotation) and len(members) == 1
    return members[0] if is_optional else annotation

"""`python -m docs.params_page` writes docs/params.md: every key of params.yaml with type, default and meaning, from the params classes."""

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from pipeline.params import Params, StudentParams, TuningParams

HEAD = """# params.yaml, key by key

Written by `python -m docs.params_page`; do not edit. `shotless check` names everything that is wrong with a file. NAME is a name of your
own. A dash under "default": the key must be given.
"""


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Key → the docstring below it in the class."""
    found: dict[str, str] = {}
    for kind in reversed([kind for kind in model.__mro__ if issubclass(kind, BaseModel) and kind is not BaseModel]):
        body = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(body, ast.ClassDef)
        for key, after in zip(body.body, [*body.body[1:], None], strict=True):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name) and isinstance(text, str):
                found[key.target.id] = " ".join(text.split())
    return found


def kind(schema: dict[str, Any]) -> str:
    """A key's type in words, from its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema or "oneOf" in schema:
        return "a map, below"
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "a pair"
        return f"a list of: {kind(schema['items'])}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties", True)
        return "maps, below" if isinstance(values, dict) and ("$ref" in values or "oneOf" in values) else f"a map to: {kind(values)}"
    bounds = {"exclusiveMinimum": "> ", "minimum": "≥ ", "maximum": "≤ ", "exclusiveMaximum": "< "}
    limits = [f"{sign}{schema[key]:g}" for key, sign in bounds.items() if key in schema]
    name = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}[schema["type"]]
    return " ".join([name, ", ".join(limits)]).strip()


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The params classes in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) if part is not NoneType for model in models_in(part)]


def sections(model: type[BaseModel], path: str, written: set[type[BaseModel]]) -> Iterator[str]:
    """Markdown of a class and of the classes in it; what is `written` already is left out."""
    if model in written:
        return
    written.add(model)
    schema, about = model.model_json_schema(), meanings(model)
    shared = TuningParams.model_fields if model is StudentParams else {}
    if path:
        more = " It also has every key of `tuned.NAME`." if shared else ""
        yield f"\n## {path}\n\n{' '.join((model.__doc__ or '').split())}{more}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    inner = []
    for key, field in model.model_fields.items():
        if path and key not in shared:
            default = "–" if field.is_required() else f"`{shown(field.default)}`"
            meaning = about.get(key, "").replace("|", r"\|")
            yield f"| `{key}` | {kind(schema['properties'][key])} | {default} | {meaning} |\n"
        below = f"{path}.{key}".strip(".") + (".NAME" if "dict" in str(get_origin(field.annotation)) else "")
        inner += [(found, below) for found in models_in(field.annotation)]
    for found, below in inner:
        several = sum(other == below for _, other in inner) > 1
        title = f"{below} ({found.model_json_schema()['properties']['source']['const']})" if several else below
        yield from sections(found, title, written)


def shown(value: Any) -> str:
    """A default as YAML would have it, in a line."""
    if isinstance(value, BaseModel):
        return "{}"
    return json.dumps(value, ensure_ascii=False)


def page() -> str:
    """The whole page."""
    return HEAD + "".join(sections(Params, "", set()))


if __name__ == "__main__":
    Path(__file__).with_name("params.md").write_text(page(), encoding="utf-8")

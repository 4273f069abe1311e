"""Each stage depends on the code that it imports, by folder or file, and on no other."""

import ast
from pathlib import Path

import pytest
from conftest import PROJECT

from pipeline.params import read_yaml

# What these decide reaches a stage through its params, or does not touch its outputs.
EXEMPT = ("pipeline/errors.py", "pipeline/files.py", "pipeline/progress.py", "pipeline/params/", "stages/__init__.py")
STAGES = read_yaml(PROJECT / "dvc.yaml")["stages"]


def file_of(module: str) -> Path | None:
    """The file of a module of this project; None for other modules, and for a package whose __init__.py is a docstring."""
    path = PROJECT / module.replace(".", "/")
    if module.split(".")[0] not in {"pipeline", "stages"}:
        return None
    if (package := path / "__init__.py").is_file():
        return package if len(ast.parse(package.read_text("utf-8")).body) > 1 else None
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


def imports_of(file: Path) -> set[Path]:
    """The files of this project that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {found for name in names if (found := file_of(name)) is not None}


def closure(entry: Path) -> set[str]:
    """Everything that a stage imports, and what that imports, from the project's folder."""
    found, left = {entry}, [entry]
    while left:
        for file in imports_of(left.pop()) - found:
            found.add(file)
            left.append(file)
    return {name for file in found if not (name := file.relative_to(PROJECT).as_posix()).startswith(EXEMPT)}


def covers(dep: str, file: str) -> bool:
    return file == dep or file.startswith(f"{dep}/")


@pytest.mark.parametrize("name", [name for name in STAGES if name != "params"])
def test_a_stage_depends_on_all_the_code_that_it_imports_and_on_no_other(name):
    body = STAGES[name].get("do", STAGES[name])
    entry = PROJECT / "stages" / f"{body['cmd'].split()[2]}.py"
    declared = [dep for dep in body["deps"] if dep.startswith(("pipeline", "stages"))]
    used = closure(entry)
    lacking = {file for file in used if not any(covers(dep, file) for dep in declared)}
    assert not lacking, f"{name} imports {sorted(lacking)} and does not depend on them"
    unused = {dep for dep in declared if not any(covers(dep, file) for file in used)}
    assert not unused, f"{name} depends on {sorted(unused)} and does not import them"


def test_the_first_stage_depends_on_the_params_package():
    assert {"params.yaml", "constraints.txt", "pipeline/params", "stages/params.py"} == set(STAGES["params"]["deps"])
    assert closure(PROJECT / "stages" / "params.py") == {"stages/params.py"}

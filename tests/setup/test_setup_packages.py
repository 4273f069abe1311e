"""pyproject.toml declares every package that the pipeline imports, with a lower bound that constraints.txt keeps, and no other."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

from conftest import PROJECT

DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = [entry for extra, entries in DECLARED["optional-dependencies"].items() if extra != "dev" for entry in entries]
PINS = dict(re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^\s;]+)", (PROJECT / "constraints.txt").read_text("utf-8")))
NOT_IMPORTED = {
    "fsspec": "pyarrow opens URLs with it",
    "ruamel-yaml-clib": "DVC reads dvc.lock with it, four times as quickly",
}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements):
    return {canonical(re.split(r"[<>=!~;\[]", entry, maxsplit=1)[0]) for entry in requirements}


def imported():
    """Distributions of the modules that pipeline/ and stages/ import, anywhere."""
    modules = set()
    for file in [*(PROJECT / "pipeline").rglob("*.py"), *(PROJECT / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
            elif isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
    tops = {module.split(".")[0] for module in modules} - {"pipeline", "stages"} - sys.stdlib_module_names
    known = packages_distributions()
    return {canonical("ruamel.yaml" if top == "ruamel" else known[top][0]) for top in tops}


def test_every_imported_package_is_declared_and_every_declared_one_has_a_use():
    declared = names(DECLARED["dependencies"])
    assert imported() - declared - names(EXTRAS) == set()
    assert declared - imported() == set(NOT_IMPORTED)


def test_lower_bounds_are_kept_by_the_pins():
    pins = {canonical(name): pinned for name, pinned in PINS.items()}
    for entry in [*DECLARED["dependencies"], *EXTRAS]:
        name, bound = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", entry).groups()
        pinned = [int(part) for part in re.findall(r"\d+", pins[canonical(name)].partition("+")[0].partition(".post")[0])]
        assert pinned >= [int(part) for part in bound.split(".")], entry


def test_what_tests_and_tools_need_is_pinned():
    pins = {canonical(name) for name in PINS}
    assert names(DECLARED["optional-dependencies"]["dev"]) <= pins | {"shotless"}

"""A quick start for `predict` and `serve`: transformers without what only compiling, training, clusters and detection losses need.

`from transformers import PreTrainedModel` brings torch's compiler, sympy, scipy, accelerate and distributed tensors: 1.7 of 2.9 seconds of
CPU, for decorators and flags that answering never uses. In `quick_start` the compiler is a stand-in whose decorators give their function
back, and which becomes the real one as soon as anything else of it is asked for; the other libraries are said to be absent.
"""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

COMPILER = "torch._dynamo"
ABSENT = ("is_scipy_available", "is_accelerate_available", "is_torch_distributed_available")


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that changes nothing."""
    return function if callable(function) else _as_it_is


class _StandIn(ModuleType):
    disable = allow_in_graph = assume_constant_result = staticmethod(_as_it_is)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


@contextmanager
def quick_start() -> Iterator[None]:
    """Import transformers and open a student inside this block; outside of it all is as it was."""
    gc.disable()  # what is imported stays: looking for garbage in it takes a quarter of the time
    import torch

    stand_in = _StandIn(COMPILER)
    stand_in.__path__ = [f"{folder}/_dynamo" for folder in torch.__path__]
    sys.modules.setdefault(COMPILER, stand_in)
    from transformers import utils

    flags = dict.fromkeys(ABSENT, lambda: False)
    scan = utils.import_utils.create_import_structure_from_path
    try:
        with mock.patch.object(utils.import_utils, scan.__name__, lambda file: scan(Path(file).parent)):  # what it has just read
            importlib.import_module("transformers.models")
        with mock.patch.multiple(utils, **flags), mock.patch.multiple(utils.import_utils, **flags):
            yield
    finally:
        gc.freeze()
        gc.enable()
        if sys.modules.get(COMPILER) is stand_in:
            del sys.modules[COMPILER]

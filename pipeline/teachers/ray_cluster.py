"""Reaching Ray, and how its machines are divided among workers."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UsageError
from pipeline.models.machine import cores

LOCAL_STORE_BYTES = 256 << 20
"""Ray's shared memory for results on their way, where Ray is started here."""


@dataclass(frozen=True)
class Shape:
    """How many workers, and what each has of its machine."""

    workers: int
    threads: int
    gpus: int


def connect(workers: int | None) -> Any:
    """The module `ray`, connected: to the cluster at `$RAY_ADDRESS`, else to a Ray that is started here for the time of the process.

    Raises UsageError where Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise UsageError(
            "runtime.engine is `ray`, and Ray is not installed; `pip install -c constraints.txt 'shotless[ray]'`, or set it to `local`."
        ) from None
    if ray.is_initialized():
        return ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports on its users
    address = os.environ.get("RAY_ADDRESS")
    how: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        how |= {"num_cpus": max(cores(), workers or 1), "object_store_memory": LOCAL_STORE_BYTES}
    try:
        ray.init(address=address or "local", **how)
    except ConnectionError as error:
        raise UsageError(f"$RAY_ADDRESS is {address!r}, and no Ray answers there: {error}") from None
    return ray


def shape_of(nodes: Sequence[Mapping[str, Any]], workers: int | None, threads: int | None) -> Shape:
    """The division of `ray.nodes()`: `workers`, or one for each GPU, or for each machine where there is none.

    Each has `threads` of one machine, or as many as leave room for all. Raises UsageError where they do not fit.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]  # a head may give none
    free = [int(resources.get("CPU", 0)) for resources in alive]
    gpus = sum(int(resources.get("GPU", 0)) for resources in alive)
    workers = workers or gpus or len(alive)
    fitting = [each for each in range(1, max(free, default=0) + 1) if sum(count // each for count in free) >= workers]
    if not fitting or (threads or 1) > fitting[-1]:
        asked = f"{workers} workers" + (f" of {threads} threads" if threads else "")
        raise UsageError(f"runtime.workers: {asked} do not fit Ray's machines, which have {free} cores; lower it, or add machines.")
    if gpus and workers > gpus:
        raise UsageError(f"runtime.workers: {workers} workers need a GPU each, and Ray's machines have {gpus}; lower it to {gpus}.")
    return Shape(workers, threads or fitting[-1], 1 if gpus else 0)

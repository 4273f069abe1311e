"""A lane of a run: `python -m pipeline.commands.lane FOLDER` has DVC reproduce stages, and runs their commands in forks of itself.

Loading torch and transformers takes five seconds, as much as many a stage; a fork has them loaded. DVC's commands reach the lane through
`stages/run`, which writes to and reads from two pipes in FOLDER, made by `lane_command`. This project's own code is loaded by each fork.
"""

import gc
import os
import re
import runpy
import select
import sys
from importlib import import_module
from pathlib import Path

ENDED = re.compile(r"lane: (\d+)$")
"""What a lane prints when a stage has ended, with DVC's exit code."""
FOLDER = "SHOTLESS_LANE"
GPU = Path("/proc/driver/nvidia")
"""With a GPU, or on macOS, stages are processes of their own: what torch has loaded there may not survive a fork."""
LIBRARIES = (
    "polars", "pyarrow.parquet", "pydantic", "scipy.special", "sklearn.linear_model", "safetensors.torch", "tokenizers",
    "transformers.models.auto.tokenization_auto", "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
)  # fmt: skip
OF_DVC = ("dvc.cli.parser", "dvc.repo.reproduce", "dvc.scm", "ruamel.yaml")
"""What DVC imports only when it reproduces a stage: a quarter of a second."""
WITHOUT_THEM = ("params", "download", "source", "targets", "compare", "report")
"""Stages that load no model: if they come first, they need not wait."""


def lane_command(folder: Path) -> list[str]:
    """How a lane is started, whose pipes are in a new folder: the commands that it is to run, and the exit code of each."""
    folder.mkdir()
    for name in ("commands", "codes"):
        os.mkfifo(folder / name)
    return [sys.executable, "-m", "pipeline.commands.lane", str(folder)]


def reproduce_told(folder: Path) -> list[str]:
    """Reproduce the stages that standard input names, each with its cores (none: all), and say how each ended (`ENDED`).

    Returns in forks alone, with the command that a fork is to run.
    """
    import_module("stages")  # sets what libraries read when they are imported
    from dvc.cli import main

    for module in OF_DVC:
        import_module(module)

    told = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if sys.platform == "linux" and not GPU.exists():
        os.environ[FOLDER] = str(folder)
    commands = os.open(folder / "commands", os.O_RDWR)  # for writing too, so that it does not end
    for line in told:
        stage, *cores = line.split()
        if cores:
            os.sched_setaffinity(0, map(int, cores))
        ended, end = os.pipe()  # the first ends when no one has the second
        reproducing = os.fork()
        if not reproducing:
            os._exit(main(["--wait-for-lock", "repro", "--single-item", stage]))  # it need not take apart what it has from here
        os.close(end)
        while commands in select.select([commands, ended], [], [])[0]:
            name, *arguments = os.read(commands, select.PIPE_BUF).decode().split()
            for library in LIBRARIES if name not in WITHOUT_THEM else ():
                import_module(library)
            gc.freeze()  # a fork that looks through all of it, at its end at the latest, takes a second more
            running = os.fork()
            if not running:
                return [f"stages.{name}", *arguments]
            (folder / "codes").write_text(f"{_exit_code(running)}\n", "utf-8")
        os.close(ended)
        print(f"\nlane: {_exit_code(reproducing)}", flush=True)
    sys.exit()


def _exit_code(process: int) -> int:
    """That of a child when it has ended; of one that a signal ended as a shell gives it."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.argv = reproduce_told(Path(sys.argv[1]))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

"""What each process of test_student_processes.py runs: `torchrun process_main.py JOBS`, JOBS a JSON list of trainings."""

import json
import sys
from pathlib import Path

from student_world import TASK, World, student

from pipeline.params import CompletionParams, TaskParams
from pipeline.students import loop
from pipeline.students.processes import Processes, joined
from pipeline.students.runs import train_student
from pipeline.task import Task

FREE = Task(TaskParams(template=TASK.params.template, completion=CompletionParams(max_tokens=6)))


def run(job: dict, processes: Processes) -> None:
    """One training; with `stop_at` it ends there as a kill would end it, after a checkpoint at every step."""
    free, stop_at = job.pop("free", False), job.pop("stop_at", None)
    root = Path(job.pop("root"))
    name, world, original = job.pop("name"), World(root, root), loop.Training._step

    def stopping(self, optimizer, batches, cached, step):
        if step == stop_at:
            raise KeyboardInterrupt
        return original(self, optimizer, batches, cached, step)

    loop.Training._step = stopping
    try:
        train_student(name, student(**job), FREE if free else TASK, world.places, 1, 0.0, processes)
    except KeyboardInterrupt:
        assert stop_at is not None
    finally:
        loop.Training._step = original


if __name__ == "__main__":
    with joined() as processes:
        for each in json.loads(sys.argv[1]):
            run(each, processes)
            processes.total(0.0)  # wait for each other: after a stop, one may still be writing the checkpoint that the next job starts from

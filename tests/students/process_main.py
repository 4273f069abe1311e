"""What each process of test_student_processes.py runs: `torchrun process_main.py FILE`, a JSON list of trainings.

A checkpoint after seven steps is put aside. A training that is `again` starts with it, as after a kill.
"""

import json
import shutil
import sys
from pathlib import Path

from pipeline.files import Folders
from pipeline.params import Params
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.processes import joined
from pipeline.students.train import train_student

save = Checkpoint.save


def saving(self, model, optimizer, reached):
    """Save, and keep the one after seven steps."""
    save(self, model, optimizer, reached)
    if len(reached.losses) == 7 and self.name == "student-cd":
        shutil.copy(self.path, self.folder / f"{self.path.name}.aside")


if __name__ == "__main__":
    Checkpoint.save, Checkpoint.due = saving, lambda _: True
    with joined() as processes:
        for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
            folders = Folders.here(Path(job["root"]))
            if job.get("again") and processes.first:
                [aside] = folders.work.rglob("*.aside")
                shutil.move(aside, aside.with_suffix(""))
                shutil.move(folders.artifacts / "students" / job["name"], folders.artifacts / "unbroken")
            processes.total(0.0)  # wait for the first one
            train_student(job["name"], Params.model_validate(job["params"]), folders, processes)

"""`python -m stages.teacher NAME`: a teacher scores the transfer set in its contexts → artifacts/scores/NAME."""

from pathlib import Path

from pipeline.params import resolved_params, pick
from pipeline.task import Task
from pipeline.teachers.capture import capture
from pipeline.files import work_folder
from stages import run


def main(name: str) -> None:
    """Capture one teacher."""
    params = resolved_params()
    teacher = pick("teachers", params.teachers, name)
    artifacts, task = Path("artifacts"), Task(params.task)
    capture(
        name,
        artifacts / teacher.model,
        artifacts / "data" / "contexts" / f"{teacher.contexts}.parquet",
        artifacts / "data" / "transfer.parquet",
        artifacts / "scores" / name,
        task.of_texts() if teacher.reads == "texts" else task,
        teacher.cache,
        teacher.dtype,
        work_folder(),
        params.runtime.threads,
        Path("metrics") / "runtime" / f"teacher-{name}.json",
        Path("metrics") / "fidelity" / f"{name}.json",
        on_ray=params.runtime.engine == "ray",
        workers=params.runtime.workers,
    )


if __name__ == "__main__":
    run(main)

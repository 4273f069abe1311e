"""What has to be there before what: stages in a circle could none of them run, and DVC does not say where the circle is closed."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter

from pipeline.params.teaching import TargetParams, TeacherParams
from pipeline.params.training import StudentParams, TunedTeacherParams

KINDS = {"tuned": "tunings", "students": "students", "scores": "teachers", "targets": "targets"}
"""The map of params.yaml whose entry makes a folder of artifacts/."""


def check_order(
    tunings: Mapping[str, TunedTeacherParams],
    teachers: Mapping[str, TeacherParams],
    targets: Mapping[str, TargetParams],
    students: Mapping[str, StudentParams],
) -> None:
    """Raise ValueError naming the circle where an entry waits for itself. As in dvc.yaml, a target set waits for all teachers."""
    waits = {f"tunings.{name}": _makers(tuning.base) for name, tuning in tunings.items()}
    waits |= {f"teachers.{name}": _makers(teacher.model) for name, teacher in teachers.items()}
    waits |= {f"targets.{name}": {f"teachers.{teacher}" for teacher in teachers} for name in targets}
    waits |= {f"students.{name}": _makers(student.base, student.learn_from) for name, student in students.items()}
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        circle = error.args[1][:-1]
        start = circle.index(min(circle))
        named = ", ".join([*circle[start:], *circle[: start + 1]])
        raise ValueError(
            f"{named}: each of them has to be there before the next (a target set waits for all teachers). Where a student is to teach "
            "others, do it in a run of its own, with the first run's student as a model: "
            "`models: {first: {source: local, path: artifacts/students/NAME}}`."
        ) from None


def _makers(*folders: str) -> set[str]:
    """The entries that make these folders; models and data are there before all of them."""
    named = [folder.split("/", 1) for folder in folders]
    return {f"{KINDS[kind]}.{name}" for kind, name in named if kind in KINDS}

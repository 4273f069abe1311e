"""What methods, students and targets are, in words taken from params and from training's own record."""

from pipeline.params import Params, StudentParams, TargetParams
from pipeline.report.collect import Inputs


def root_model(params: Params, folder: str) -> str:
    """The name in `models` that a model folder under artifacts/ goes back to, through students and tuned teachers."""
    kind, _, name = folder.partition("/")
    if kind == "tuned":
        return root_model(params, params.tunings[name].base)
    if kind == "students":
        return root_model(params, params.students[name].base)
    return name


def about(inputs: Inputs, method: str) -> str:
    """One line on what a method is."""
    params = inputs.params
    if method in params.students:
        student = params.students[method]
        source = student.learn_from.removeprefix("targets/")
        if student.learn_from.startswith("data/"):
            text = "learns from the demonstrations’ labels alone"
        else:
            text = ", plus ".join([f"distilled from the targets {source}", *beside(student)])
        return f"{text}; {layers(inputs, method).partition(' (')[0]}"
    baseline = params.baselines[method]
    target = params.targets[baseline.target_set]
    prompts = " + ".join(target.teachers)
    calibration = calibrated(target)
    several = sum(params.contexts[params.teachers[name].contexts].count for name in target.teachers)
    if several == 1:
        return f"prompt {prompts}, {calibration}"
    how = "each context on its own" if baseline.contexts == "each" else f"{several} contexts averaged"
    return f"prompts {prompts}, {calibration}, {how}"


def calibrated(target: TargetParams) -> str:
    """How a target set is calibrated."""
    words = {"none": "uncalibrated", "batch": "batch-calibrated", "contextual": "contextually calibrated"}
    text = words[target.calibration] + (" within each source" if target.calibrate_by == "source" else "")
    return text + "".join(f", {teacher} {words[kind]}" for teacher, kind in target.calibrations.items())


def beside(student: StudentParams) -> list[str]:
    """What a student learns beside its `learn_from`, each with its weight."""
    labels = {"demonstrations": "the demonstrations’ labels", "targets": "the targets’ most probable labels"}[student.ce_on]
    parts = [f"{student.ce_weight:g} × {labels}"] if student.ce_weight else []
    for teacher, also in student.also.items():
        parts += [f"{also.weight:g} × the distributions of {teacher}"] if also.weight else []
        parts += [f"{also.hidden_weight:g} × its hidden states ({teacher})"] if also.hidden_weight else []
    return parts


def gold_weight(student: StudentParams) -> float:
    """Weight of gold labels beside the targets; 0 where none are learnt from."""
    return student.ce_weight if student.ce_on == "demonstrations" else 0.0


def layers(inputs: Inputs, student: str) -> str:
    """Which layers of its base a student keeps, with their number where training recorded it."""
    kept = inputs.params.students[student].layers
    recorded = inputs.training.get(student, {}).get("layers")
    number = recorded if isinstance(recorded, int) else len(recorded) if isinstance(recorded, list) else None
    if kept is None:
        return "all layers" if number is None else f"all {number} layers"
    return f"layers {kept}" if number is None else f"{number} layers ({kept})"


def context_sizes(params: Params, targets: str) -> tuple[int, int]:
    """Contexts behind a target set, and the largest number of demonstrations in one."""
    entries = [params.contexts[params.teachers[name].contexts] for name in params.targets[targets].teachers]
    return sum(entry.count for entry in entries), max(entry.demonstrations for entry in entries)

"""The report's words: numbers as people read them, what each method is, and what a run shows.

No conclusion is fixed beforehand: a sentence follows from the sign of a difference and from whether its paired interval includes zero. A
sentence whose numbers are missing is left out. Names are in backticks, which the page and the card set as code.
"""

import math
from collections.abc import Iterable

from pipeline.params import Params, TargetParams
from pipeline.report.collect import DOMAINS, Collected, Json, comparison, domains_of, ranked, sets_of

FAR_SHARES = 0.1  # between the shares of labels that are assumed and those that are answered
DASH = "–"
ONE_LABEL_SHARE = 0.9  # a method that gives one label this often may hardly look at its input


def percent(share: float | None, digits: int = 1) -> str:
    """A fraction as a percentage without its sign: 0.8633 → 86.3."""
    return DASH if share is None else f"{100 * share:.{digits}f}"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with a true minus sign: -0.021 → −2.1."""
    return f"{100 * difference:+z.1f}".replace("-", "−")


def span(interval: list[float], digits: int = 1) -> str:
    """An interval of fractions as percentages: 82.0–90.1."""
    return f"{percent(interval[0], digits)}–{percent(interval[1], digits)}"


def number(value: float | None, digits: int = 0) -> str:
    """A count or measurement with thousands separators; a dash if it is missing (None or NaN)."""
    return DASH if value is None or math.isnan(value) else f"{value:,.{digits}f}".replace("-", "−")


def scaled(value: float | None, unit: str = "") -> str:
    """A large number in thousands, millions, …: 113142528 → 113.1 M; with the unit B: 452.6 MB."""
    if value is None:
        return DASH
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:,.1f} {prefix}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


def milliseconds(value: float | None) -> str:
    """A time that may be short: 31.2 → 31, 4.84 → 4.8."""
    return number(value, 1 if value is not None and value < 10 else 0)


def p_value(value: float | None) -> str:
    """A p-value with three digits."""
    return DASH if value is None else "under 0.001" if value < 0.001 else f"{value:.3f}"


def listed(names: Iterable[str]) -> str:
    """`a`, `b` and `c`."""
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted) or DASH


def plural(count: int, noun: str) -> str:
    """`1 set`, `3 sets`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def licence_of(params: Params, path: str, otherwise: str = "the user’s own") -> str:
    """The licence of a file: that of the download which it is part of, else `otherwise`."""
    first, _, rest = path.partition("/")
    return params.downloads[rest.partition("/")[0]].licence if first == "downloads" else otherwise


def about(found: Collected, method: str) -> str:
    """One line on what a student is, or a baseline that answers with labels."""
    params = found.params
    if method in params.students:
        return f"{learnt(params, method)}; {layers(found, method).partition(' (')[0]}"
    baseline = params.baselines[method]
    target = params.targets[baseline.target_set]
    contexts = sum(params.contexts[params.teachers[name].contexts].count for name in target.teachers)
    how = "" if contexts == 1 else ", one context at a time" if baseline.contexts == "each" else f", mean of {contexts} contexts"
    if target.weights == "learned" and baseline.contexts == "ensemble":
        how = ", weighted by the labels" if found.of("targets", baseline.target_set).get("labelled") else ", equal weights"
    return f"answers of {' + '.join(name + in_chat(params, name) for name in target.teachers)}; {calibrated(target)}{how}"


def in_chat(params: Params, teacher: str) -> str:
    """A note behind a teacher that is asked in chat turns."""
    return " (chat)" if params.contexts[params.teachers[teacher].contexts].format == "chat" else ""


def asked(params: Params, teacher: str) -> str:
    """A teacher with its model and what its prompts show."""
    entry = params.teachers[teacher]
    context = params.contexts[entry.contexts]
    shown = [f"{plural(context.count, 'context')} of {plural(context.demonstrations, 'demonstration')}"] if context.demonstrations else []
    turns = ["in chat turns"] if context.format == "chat" else []
    return f"`{teacher}` ({', '.join([entry.model, *shown, *turns])})"


def learnt(params: Params, name: str) -> str:
    """What a student learns from, each further term with its weight."""
    student = params.students[name]
    kind, _, source = student.learn_from.partition("/")
    first = {"targets": f"distilled from the target set {source}", "teachers": f"distilled from the teacher {source}’s distributions"}
    if kind == "rounds":
        first[kind] = f"distilled from the answers of the student {params.rounds[source].student} (round {source})"
    labels = {"demonstrations": "the demonstrations’ labels", "targets": "the targets’ most probable labels"}[student.ce_target]
    terms = [f"{student.ce_weight:g} × {labels}"] if student.ce_weight else []
    for teacher, term in student.auxiliary.items():
        terms += [f"{term.weight:g} × the distributions of {teacher}"] if term.weight else []
        terms += [f"{term.hidden_weight:g} × the hidden states of {teacher}"] if term.hidden_weight else []
    alone = "the demonstrations’ labels alone"
    by_labels = f"{'texts contrasted, and a head fitted' if student.steps else 'a head fitted'}, by {alone}"
    first["data"] = by_labels if student.tuning == "contrastive" else f"trained on {alone}"
    return ", plus ".join([first[kind], *terms]) + (", in chat turns" if student.format == "chat" else "")


def calibrated(target: TargetParams) -> str:
    """How a target set is calibrated, in the words of params.yaml."""
    within = " within each source" if target.calibrate_by == "source" else ""
    text = "not calibrated" if target.calibration == "none" else f"{target.calibration} calibration{within}"
    return text + "".join(f", {teacher}: {kind}" for teacher, kind in target.calibrations.items())


def learnt_from_labels(found: Collected) -> list[str]:
    """What labelled examples, and shares of labels, changed in each target set: a line for each."""

    def worth(entry: Json) -> str:
        return f"{entry['log_loss']:.2f} nats, {percent(entry['accuracy'], 0)} % right"

    lines = []
    for name in found.params.targets:
        own = found.of("targets", name)
        if judged := own.get("labelled"):
            alone = [f"{teacher} {worth(entry)}" for teacher, entry in judged["teachers"].items()]
            line = f"`{name}` learnt from {judged['rows']:,} labelled examples that its teachers had not seen. Log loss there"
            line += f": {worth(judged['before'])} before; {worth(judged['after'])} after, on folds that the fit left out"
            lines.append(line + "".join(f"; {one} alone" for one in alone) + ".")
        if prior := own.get("prior"):
            intervals = {label: f" ({percent(prior['low'][label])} to {percent(high)})" for label, high in prior.get("high", {}).items()}
            shares = [f"{label} {percent(share)} %{intervals.get(label, '')}" for label, share in prior["shares"].items()]
            far = max(abs(share - own["label_shares"][label]) for label, share in prior["shares"].items())
            warning = "; the shares of its answers are far from that: look at its teachers, or at the shares" if far > FAR_SHARES else ""
            lines.append(f"`{name}` takes for the labels’ shares ({prior['kind']}): {', '.join(shares)}{warning}.")
    return lines


def layers(found: Collected, student: str) -> str:
    """How many layers of its base a student keeps, and which."""
    kept, count = found.params.students[student].layers, found.of("train", student)["layers"]
    return f"all {count} layers" if kept is None else f"{count} layers ({kept})"


def title(params: Params) -> str:
    """The page's heading: which models, how many students."""
    asked = [teacher.model for teacher in params.teachers.values()]
    models = dict.fromkeys(model if model.startswith("servers/") else params.base_model(model) for model in asked)
    return f"{' + '.join(models)}: from prompt to {plural(len(params.students), 'student')}"


def lead(found: Collected) -> list[str]:
    """What was distilled into what, from how much: a few sentences for the top of the page."""
    params, reference = found.params, found.params.evaluation.reference
    first = f"The teacher is `{reference}`. Students learn from its answers, token by token, and see the bare input."
    if target := params.baselines[reference].target_set:
        first = f"The teacher is {' + '.join(asked(params, name) for name in params.targets[target].teachers)}."
        first += f" Students learn from its answers to {found.of('targets', target)['rows']:,} unlabelled examples."
    lines = [first]
    for name, student in params.students.items():
        kept, size = f"layers {student.layers} of " if student.layers else "", scaled(found.of("train", name)["parameters"])
        lines.append(f"`{name}` is {kept}`{student.base}` ({size} parameters), {learnt(params, name)}.")
    return lines


def key_figures(found: Collected) -> list[tuple[str, str, str]]:
    """At most four of (figure, what it is, note) about the best student; for free text the share of well-formed answers of each student."""
    document, methods, students = found.document, found.document["methods"], ranked(found.document, "student")
    domain, reference = domains_of(document)[-1], document["reference"]
    theirs = methods[reference]["means"][domain]
    if document.get("answers"):
        shares = {name: methods[name]["means"][domain].get("well_formed") for name in found.params.students}
        note = f"`{reference}` has {percent(theirs.get('well_formed'))} %, {DOMAINS[domain].lower()}"
        return [(f"{percent(share)} %", f"well formed, {name}", note) for name, share in shares.items() if share is not None][:4]
    if not students:
        return []
    ours, row = methods[students[0]]["means"][domain], comparison(document, students[0], reference, domain)
    right = f"best student, `{students[0]}`; 95 % interval {span(ours['ci95'])}"
    note = f"which has {percent(theirs['accuracy'])} %" + ("" if row is None or row["clear"] else "; the difference is not clear")
    figures = [
        (f"{percent(ours['accuracy'])} %", f"right {DOMAINS[domain].lower()}", right),
        (points(ours["accuracy"] - theirs["accuracy"]), f"points compared with {reference}", note),
    ]
    mine, its = (found.of("cost", name) for name in (students[0], reference))
    if mine and its:
        figures.append((f"{mine['prompt_tokens']:,.0f}", "prompt tokens an example", f"instead of {its['prompt_tokens']:,.0f}"))
        figures.append((f"{milliseconds(mine['latency_ms'])} ms", "an example, median", f"instead of {milliseconds(its['latency_ms'])} ms"))
    return figures


def missing_files(found: Collected, prefix: str) -> str:
    """Which timing files below a folder are missing, and how to measure them again; empty if none is."""
    absent = {file: stage for file, stage in found.missing.items() if file.startswith(prefix)}
    commands = " ".join(dict.fromkeys([*absent.values(), "report"]))
    text = (
        f"Not found, or of another model: {listed(absent)}. Run `dvc repro -f -s {commands}`: DVC does not keep the times of one machine."
    )
    return text if absent else ""


def measured_on(document: Json) -> str:
    """What costs were measured with: processor, number formats, threads, number of texts; a sentence for each way there is."""
    ways = [
        f"{', '.join([one['processor'], *one['dtypes'], plural(one['threads'], 'thread') + ' in all'])}; "
        f"latency over {plural(one['examples'], 'text')}, throughput over {plural(one['batched'], 'text')}"
        for one in (method["cost"]["measured"] for method in document["methods"].values() if method["cost"])
    ]
    return f"Measured on: {'. '.join(dict.fromkeys(ways))}." if ways else ""


def context_tokens(found: Collected) -> str:
    """How long the contexts are, and how many labels they show no example of."""
    counted = found.files["metrics/prepare.json"]["contexts"]
    ends = {name: dict.fromkeys([min(own), max(own)]) for name, entry in counted.items() if any(own := entry["tokens"].values())}
    absent = {name: len(entry["labels_not_shown"]) for name, entry in counted.items() if entry["labels_not_shown"]}
    said = [f"`{name}`: {' to '.join(map(number, own))} tokens" for name, own in ends.items()]
    said += [
        f"`{name}`: no context shows an example of {count} of {len(found.params.task.labels)} labels" for name, count in absent.items()
    ]
    return "; ".join(said)


def too_long(found: Collected) -> str:
    """How many texts of each role do not fit which model, and what becomes of them; empty if all fit."""
    counted, rule = found.files["metrics/prepare.json"]["cut"], found.params.task.long_texts
    readers = [f"`{reader}`: {', '.join(f'{number(texts)} of {role}' for role, texts in own.items())}" for reader, own in counted.items()]
    return f"Texts that do not fit, and of which `task.long_texts: {rule}` decides: {'; '.join(readers)}." if readers else ""


def findings(document: Json) -> list[str]:
    """Sentences for "What this run shows", the most important first."""
    lines, ranges, warnings = ["This run has no student: it shows baselines alone."], list[str](), list[str]()
    if students := ranked(document, "student"):
        domain, reference, methods = domains_of(document)[-1], document["reference"], document["methods"]
        lines = [_best_student(document, one) for one in reversed(domains_of(document))]
        winner, means = ranked(document)[0], {name: method["means"][domain] for name, method in methods.items()}
        row = comparison(document, students[0], winner, domain)
        if methods[winner]["kind"] == "baseline" and means[winner]["accuracy"] > means[reference]["accuracy"] and row is not None:
            lines.append(f"{DOMAINS[domain]}, the baseline `{winner}` is the most accurate method; `{students[0]}` is {difference(row)}.")
        ours, theirs = (percent(means[name]["ece"]) for name in (students[0], reference))
        off = f"the confidence of `{students[0]}` is off by {ours} points on average (expected calibration error), that of `{reference}`"
        lines.append(f"{DOMAINS[domain]}, {off} by {theirs}; {by_chance(means[students[0]])}.")
    for name, method in document["methods"].items():
        if runs := {where: entry["contexts"] for where, entry in method["sets"].items() if "contexts" in entry}:
            widest = max(runs, key=lambda where: runs[where]["best"] - runs[where]["worst"])
            low, high = (percent(runs[widest][end]) for end in ("worst", "best"))
            what = "seed" if method["kind"] == "student" else "choice of context"
            ranges.append(f"The {what} alone moves `{name}` between {low} % and {high} % on `{widest}`.")
        label, where, share = most_answered(method)
        if share >= ONE_LABEL_SHARE:
            answers = f"`{name}` answers `{label}` to {percent(share)} % of `{where}`"
            warnings.append(f"{answers}. Unless the labels there are that uneven, it hardly looks at the input.")
    return lines + ranges + warnings


def by_chance(entry: Json) -> str:
    """The calibration error that chance makes on a set, or in the mean of sets, in words."""
    return f"a perfect one would seem off by {percent(entry['ece_by_chance'])} on as many texts"


def chosen(found: Collected) -> str:
    """Which student was chosen, why, and its rank by accuracy; or why none was."""
    document, best = found.document, found.files["artifacts/best.json"]
    against = "; ".join(f"`{name}`: {reason}" for name, reason in best["no_candidates"].items())
    if (name := best["student"]) is None:
        return f"No student is chosen for commands without `--student`{f' ({against})' if against else ''}."
    own = best["candidates"][name]
    beside = [] if own["standard_error"] is None else [f"standard error {percent(own['standard_error'])}"]
    beside += [f"of `{other}` {percent(entry['score'])} %" for other, entry in best["candidates"].items() if other != name]
    text = f"`{name}` is chosen: commands take it if no student is named. On the {plural(best['texts'], 'text')} that all candidates held "
    text += f"back, the target set `{best['targets']}` expects {percent(own['score'])} % of its answers to be right"
    text += f" ({'; '.join(beside)})" if beside else ""
    places = {domain: ranked(document, "student", domain).index(name) + 1 for domain in domains_of(document)}
    rank = " and ".join(f"number {place} {DOMAINS[domain].lower()}" for domain, place in places.items())
    text += f". Evaluation sets had no say; by their accuracy it is {rank} of {plural(len(found.params.students), 'student')}."
    return text + (f" Not candidates: {against}." if against else "")


def difference(row: Json) -> str:
    """A comparison's sign, size and interval: `2.1 points above `teacher` (95 % interval …)`."""
    interval = f"(95 % interval of the difference {points(row['ci95'][0])} to {points(row['ci95'][1])})"
    if row["difference"] == 0:
        return f"level with `{row['other']}` {interval}"
    side = "above" if row["difference"] > 0 else "below"
    return f"{percent(abs(row['difference']))} points {side} `{row['other']}` {interval}"


def _best_student(document: Json, domain: str) -> str:
    name = ranked(document, "student", domain)[0]
    found = document["methods"][name]["means"][domain]
    text = f"{DOMAINS[domain]} ({listed(sets_of(document, domain))}), the best student is `{name}`: {percent(found['accuracy'])} % right"
    text += f" (95 % interval {span(found['ci95'])}), with no demonstrations in the prompt."
    if (row := comparison(document, name, document["reference"], domain)) is not None:
        text += f" It is {difference(row)}."
    pairs = {other: comparison(document, name, other, domain) for other in document["methods"]}
    if unclear := [other for other, row in pairs.items() if row is not None and not row["clear"]]:
        text += f" It is not clearly better or worse than {listed(unclear)}: the intervals of these differences include zero."
    return text


def most_answered(method: Json) -> tuple[str, str, float]:
    """The label that a method gives most often on any set: (label, set, share)."""
    shares = [(label, where, share) for where, entry in method["sets"].items() for label, share in entry["predicted_shares"].items()]
    return max(shares, key=lambda one: one[2])

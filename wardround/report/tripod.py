"""TRIPOD+AI (Collins et al. 2024, BMJ 385:e078378): its 27 items in 52 parts, filled in where the run knows the answer and left as gaps elsewhere.

Topics are named in our own words; the checklist itself says what each part asks for. Nothing is inferred that the run's files or the declared
task do not say.
"""

from collections.abc import Callable
from dataclasses import dataclass

from shared.view import View
from wardround.report.judged import judged
from wardround.report.run_files import RunFiles
from wardround.report.summary import SIMULATION_ENGINES, banners, lead, num_tested
from wardround.report.tables import Cell, Row, Table, gain_table, metric_names
from wardround.report.task_facts import TaskFacts
from wardround.report.wording import SOURCE_TITLES, finite, finite_interval, interval_text, metric_title, number, upper_bound

GAP = "to be filled in by the authors"
PARTS: tuple[tuple[str, str, str], ...] = (
    ("1", "Title", "development or evaluation, population, outcome"),
    ("2", "Abstract", "structured summary"),
    ("3a", "Background", "healthcare context and rationale"),
    ("3b", "Background", "target population, purpose in the care pathway, intended users"),
    ("3c", "Background", "known health inequalities"),
    ("4", "Objectives", "development, evaluation, or both"),
    ("5a", "Data", "sources, rationale, representativeness"),
    ("5b", "Data", "dates of data and follow-up"),
    ("6a", "Participants", "setting, number and place of centres"),
    ("6b", "Participants", "eligibility"),
    ("6c", "Participants", "treatments received"),
    ("7", "Data preparation", "pre-processing and quality checks, alike across groups"),
    ("8a", "Outcome", "definition, horizon, why chosen"),
    ("8b", "Outcome", "who assessed it, where it is a judgement"),
    ("8c", "Outcome", "blinding of its assessment"),
    ("9a", "Predictors", "choice of the initial predictors"),
    ("9b", "Predictors", "definition and measurement"),
    ("9c", "Predictors", "who assessed them, where they are judgements"),
    ("10", "Sample size", "how it was arrived at"),
    ("11", "Missing data", "how they were handled"),
    ("12a", "Analytical methods", "how data were used and divided"),
    ("12b", "Analytical methods", "form and scaling of predictors"),
    ("12c", "Analytical methods", "type of model, how it was built, hyperparameters, validation"),
    ("12d", "Analytical methods", "heterogeneity across centres"),
    ("12e", "Analytical methods", "measures of performance"),
    ("12f", "Analytical methods", "updating of the model after evaluation"),
    ("12g", "Analytical methods", "how predictions were computed for evaluation"),
    ("13", "Class imbalance", "methods and why; recalibration"),
    ("14", "Fairness", "how it was addressed"),
    ("15", "Model output", "what it gives; thresholds"),
    ("16", "Development against evaluation", "differences between the data"),
    ("17", "Ethical approval", "committee, consent"),
    ("18a", "Open science", "funding"),
    ("18b", "Open science", "conflicts of interest"),
    ("18c", "Open science", "protocol"),
    ("18d", "Open science", "registration"),
    ("18e", "Open science", "data sharing"),
    ("18f", "Open science", "code sharing"),
    ("19", "Patients and public", "involvement"),
    ("20a", "Participants (results)", "flow, with and without the outcome"),
    ("20b", "Participants (results)", "characteristics, by setting"),
    ("20c", "Participants (results)", "comparison with development data"),
    ("21", "Model development", "participants and outcome events in each analysis"),
    ("22", "Model specification", "the full model, access to it"),
    ("23a", "Model performance", "estimates with intervals, in subgroups"),
    ("23b", "Model performance", "heterogeneity across centres"),
    ("24", "Model updating", "results"),
    ("25", "Interpretation", "with fairness and earlier studies"),
    ("26", "Limitations", "of the study, and their effect"),
    ("27a", "Use in care", "input of poor quality or absent"),
    ("27b", "Use in care", "what users must do and know"),
    ("27c", "Use in care", "next steps"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A part of the checklist; `answer` is empty where the run does not know it."""

    part: str
    section: str
    topic: str
    answer: str


def tripod_items(run: RunFiles, task: TaskFacts) -> list[Item]:
    """All parts in their order."""
    return [
        Item(part=part, section=section, topic=topic, answer=_ANSWERS[part](run, task) if part in _ANSWERS else "") for part, section, topic in PARTS
    ]


def tripod_table(items: list[Item]) -> Table:
    """The checklist, gaps marked."""
    rows = tuple(
        Row(name=item.part, cells=(Cell(text=item.section, below=item.topic), Cell(text=item.answer or GAP, css="" if item.answer else "gap")))
        for item in items
    )
    return Table(heads=("Item", "Answer"), rows=rows)


def _objectives(run: RunFiles, task: TaskFacts) -> str:
    return "Development, with internal validation on held-out patients of the same sites; no external evaluation is in this run."


def _sources(run: RunFiles, task: TaskFacts) -> str:
    if run.result.synthetic:
        return "Synthetic patients, drawn by a program; none is real."
    return f"{task.source}. Representativeness: {GAP}." if task.source else ""


def _setting(run: RunFiles, task: TaskFacts) -> str:
    sites = run.result.sites
    if run.result.engine not in SIMULATION_ENGINES:
        kind = "hospitals of a federation, sizes as declared"
    elif run.study.federation.partition == "natural":
        kind = "sites as the data name them, in a simulation"
    else:
        kind = f"virtual sites of a simulation, by partition “{run.study.federation.partition}”"
    names = f": {', '.join(site.name for site in sites)}" if len(sites) <= 12 else ""
    return f"{len(sites)} {kind}{names}. Setting and place: {GAP}."


def _preparation(run: RunFiles, task: TaskFacts) -> str:
    notes = "; ".join(f"{name.replace('_', ' ')} {amount:,}" for name, amount in run.result.notes.items())
    return f"By the task’s declared schema, alike at each site. In this run: {notes}." if notes else ""


def _outcome(run: RunFiles, task: TaskFacts) -> str:
    return f"{task.outcome}. Horizon, and why chosen: {GAP}." if task.outcome else ""


def _predictors(run: RunFiles, task: TaskFacts) -> str:
    return "; ".join(f"{predictor.name} ({predictor.what})" for predictor in task.predictors)


def _sample_size(run: RunFiles, task: TaskFacts) -> str:
    train, test = sum(site.num_train for site in run.result.sites), sum(site.num_test for site in run.result.sites)
    return f"{train:,} patients for training and {test:,} for testing: all that the sites had. No sample size was computed by this run; justification: {GAP}."


def _missing(run: RunFiles, task: TaskFacts) -> str:
    return "; ".join(sorted({f"{predictor.name}: {predictor.missing}" for predictor in task.predictors}))


def _division(run: RunFiles, task: TaskFacts) -> str:
    folds = run.study.evaluation.folds
    if folds > 1:
        return f"Cross-validation by patient in {folds} folds; each patient is tested once, by a model that was not trained on this patient."
    return "Each site’s patients are divided once into training and test patients, by patient; the final model is judged on the test patients of all sites."


def _scaling(run: RunFiles, task: TaskFacts) -> str:
    return "Numbers are scaled by their declared ranges, known without the data; categories have an indicator each." if task.predictors else ""


def _building(run: RunFiles, task: TaskFacts) -> str:
    training, study = run.study.training, run.study
    steps = f"{training.local_steps} local steps" if training.local_steps is not None else f"{training.local_epochs} local passes"
    privacy = "without differential privacy for patients" if study.site_level else "without differential privacy"
    if study.private:
        privacy = f"DP-SGD with gradients clipped to {study.privacy.max_grad_norm:g}"
    view = View.of(study)
    if view.shared:
        privacy += f", and noise that {view.sites} sites add shares of, so that sums of updates are private"
    if view.masked:
        privacy += "; updates under masks (SecAgg+)"
    if study.site_level:
        privacy += f"; updates clipped to {study.privacy.max_site_norm:g}, and the coordinator’s noise on their sum"
    kind = f"{' '.join(task.model.split())}. " if task.model else ""
    return (
        f"{kind}{study.strategy.name}, {study.rounds.count} rounds of {steps}, {training.optimizer} with learning rate {training.learning_rate:g} and batches of "
        f"{training.batch_size}; {privacy}. How hyperparameters were chosen: {GAP}."
    )


def _heterogeneity_method(run: RunFiles, task: TaskFacts) -> str:
    compared = "; with a model that the site trained alone beside it" if run.result.per_site_baselines else ""
    return f"{judged(run.study).by_site}{compared}."


def _measures(run: RunFiles, task: TaskFacts) -> str:
    names = ", ".join(metric_title(name) for name in metric_names(run))
    sources = [
        judged(run.study).title(name).lower()
        for name, values in run.result.metrics.items()
        if values and name != "federated" and name in SOURCE_TITLES
    ]
    return f"{names}; from sums over all sites’ patients, not means of the sites’ values." + (
        f" Compared with: {', '.join(sources)}." if sources else ""
    )


def _predictions(run: RunFiles, task: TaskFacts) -> str:
    return f"By {'its own' if run.study.own_models else 'the'} final model at each site; sums alone were collected, the same for each site."


def _output(run: RunFiles, task: TaskFacts) -> str:
    if run.result.primary_metric == "auroc":
        return f"The probability of the positive class; accuracy counts 0.5 and above as positive. A threshold for use: {GAP}."
    return ""


def _flow(run: RunFiles, task: TaskFacts) -> str:
    known = [site for site in run.result.sites if site.classes]
    return "; ".join(f"{site.name}: " + ", ".join(f"{count} {name}" for name, count in (site.classes or {}).items()) for site in known[:12]) + (
        f"; and {len(known) - 12} more sites" if len(known) > 12 else ""
    )


def _events(run: RunFiles, task: TaskFacts) -> str:
    support = run.result.per_site_support
    totals: dict[str, int] = {}
    for classes in support.values():
        for name, amount in classes.items():
            totals[name] = totals.get(name, 0) + amount
    tested = f"{num_tested(run):,} test patients" + (f" ({', '.join(f'{amount:,} {name}' for name, amount in totals.items())})" if totals else "")
    return f"Training: {sum(site.num_train for site in run.result.sites):,} patients. Evaluation: {tested}."


def _specification(run: RunFiles, task: TaskFacts) -> str:
    if not run.result.metrics.get("federated"):
        return ""
    return f"All parameters are in model/final.safetensors of the run; its hash is in this card. Access for others: {GAP}."


def _performance(run: RunFiles, task: TaskFacts) -> str:
    values, intervals = run.result.metrics.get("federated", {}), run.result.metrics_ci95.get("federated", {})
    known = [
        f"{metric_title(name)} {number(value)} {interval_text(finite_interval(intervals.get(name)))}".strip()
        for name in values
        if (value := finite(values[name])) is not None
    ]
    by_group = f"by {', '.join(run.result.subgroups)}: see the tables there" if run.result.subgroups else GAP
    return f"{'; '.join(known)} (95 % intervals; n = {num_tested(run):,}). In subgroups: {by_group}." if known else ""


def _heterogeneity(run: RunFiles, task: TaskFacts) -> str:
    gains = gain_table(run)
    gained = f" At {gains.better} of {gains.compared} sites {judged(run.study).gained}." if gains and gains.compared else ""
    return f"See the table of performance by site.{gained}" if run.result.per_site else ""


def _limitations(run: RunFiles, task: TaskFacts) -> str:
    known = [f"{banner.title} {banner.text}" for banner in banners(run)]
    return f"{' '.join(known)} Others: {GAP}." if known else ""


def _ethics(run: RunFiles, task: TaskFacts) -> str:
    return f"The patients are synthetic. Whether approval was sought: {GAP}." if run.result.synthetic else ""


def _code(run: RunFiles, task: TaskFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.claim.versions.items()) if run.claim else ""
    return f"Trained by {versions}; the study file is in the run’s folder. Where the authors publish it: {GAP}." if versions else ""


def _use(run: RunFiles, task: TaskFacts) -> str:
    return (
        f"Values outside the declared ranges are clipped, and missing ones handled as under 11. What users must do: {GAP}." if task.predictors else ""
    )


def _title(run: RunFiles, task: TaskFacts) -> str:
    return f"Development of a federated prediction model: {run.result.task_title}. Population: {GAP}."


def _abstract(run: RunFiles, task: TaskFacts) -> str:
    promise = [upper_bound(max(site.epsilon for site in run.result.privacy.sites.values()))] if run.result.privacy.sites else []
    return lead(run) + "".join(f" Privacy: epsilon {epsilon} at the site where most was spent." for epsilon in promise) + f" The rest: {GAP}."


def _purpose(run: RunFiles, task: TaskFacts) -> str:
    return f"{run.study.purpose} Population, place in care and users: {GAP}." if run.study.purpose else ""


_ANSWERS: dict[str, Callable[[RunFiles, TaskFacts], str]] = {
    "1": _title,
    "2": _abstract,
    "3b": _purpose,
    "4": _objectives,
    "5a": _sources,
    "6a": _setting,
    "7": _preparation,
    "8a": _outcome,
    "9b": _predictors,
    "10": _sample_size,
    "11": _missing,
    "12a": _division,
    "12b": _scaling,
    "12c": _building,
    "12d": _heterogeneity_method,
    "12e": _measures,
    "12g": _predictions,
    "15": _output,
    "17": _ethics,
    "18f": _code,
    "20a": _flow,
    "21": _events,
    "22": _specification,
    "23a": _performance,
    "23b": _heterogeneity,
    "26": _limitations,
    "27a": _use,
}

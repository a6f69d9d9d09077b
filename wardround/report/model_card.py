"""A model card (Mitchell et al. 2019) with Hugging Face's header, and the TRIPOD+AI checklist; what the run does not know is left as a marked gap."""

import json

from shared.whole_promise import WholePromise, in_words, whole_promise
from wardround.plural import plural
from wardround.report.attacks import attack_blocks
from wardround.report.charts import calibration_chart
from wardround.report.document import Block, Bullets, Document, Drawing, Facts, Grid, Prose, Section
from wardround.report.judged import judged
from wardround.report.model_file import read_final_model
from wardround.report.risk import risk_grid
from wardround.report.run_files import RunFiles
from wardround.report.statistics import calibration_series, drawable
from wardround.report.subgroups import subgroup_blocks, worst_site_sentence
from wardround.report.summary import SIMULATION_ENGINES, banners, lead, meaning_sentence, num_tested
from wardround.report.tables import FEWEST, Cell, Row, Table, descriptive, metric_names, positives, privacy_table, site_table
from wardround.report.task_facts import TaskFacts, read_task_facts
from wardround.report.tripod import GAP, tripod_items, tripod_table
from wardround.report.wording import DASH, count, finite, finite_interval, higher_is_better, interval_text, metric_title, number, upper_bound

HUB_METRICS = {"auroc": "roc_auc", "accuracy": "accuracy", "brier": "brier_score", "macro_f1": "f1", "mae": "mae", "rmse": "rmse", "r2": "r_squared"}
BOUNDED_BY_DATA = (
    "Nothing in this run shows that the model helps anybody: it was judged on patients of the hospitals that trained it, at one time.",
    "It says nothing of patients unlike those of the sites above.",
)


def model_card_document(run: RunFiles) -> Document:
    """The model card.

    Raises:
        StorageError: a file of the run is damaged.
    """
    task = read_task_facts(run)
    items = tripod_items(run, task)
    gaps = sum(not item.answer or GAP in item.answer for item in items)
    sections = (
        Section(id="model", title="The model", blocks=_model(run, task)),
        Section(id="use", title="Intended use", blocks=_use(run)),
        Section(id="data", title="Data sources", blocks=_data(run, task)),
        Section(id="performance", title="Performance", blocks=_performance(run)),
        Section(id="calibration", title="Calibration", blocks=_calibration(run)),
        Section(id="fairness", title="Subgroups and fairness", blocks=_fairness(run)),
        Section(id="privacy", title="Privacy", blocks=_privacy(run)),
        Section(id="attacks", title="Measured by attack", blocks=_attacks(run)),
        Section(id="limits", title="Limits", blocks=(Bullets(items=(*(f"{b.title} {b.text}" for b in banners(run)), *BOUNDED_BY_DATA)),)),
        Section(
            id="tripod",
            title="TRIPOD+AI",
            blocks=(
                Prose(text=f"The 27 items of Collins et al. 2024 in {len(items)} parts; {gaps} of them wait, wholly or in part, for the authors."),
                Grid(table=tripod_table(items), caption="Checklist, filled in where the run knows the answer", corner="Part", css="prose-cells"),
            ),
        ),
    )
    return Document(
        reader="model-card",
        eyebrow="model card",
        title=run.result.study,
        subtitle=run.result.task_title,
        run=run.result.run,
        lead=lead(run),
        banners=tuple(banners(run)),
        sections=sections,
        tags=(run.result.outcome, run.study.strategy.name),
    )


def _gap(what: str) -> Prose:
    return Prose(text=f"{what}: {GAP}.", css="gap-part")


def _model(run: RunFiles, task: TaskFacts) -> tuple[Block, ...]:
    model = read_final_model(run.folder)
    versions = ", ".join(f"{name} {version}" for name, version in run.claim.versions.items()) if run.claim else ""
    pairs = [
        ("Predicts", run.result.task_title),
        ("Task", run.result.task),
        ("Architecture", " ".join(task.model.split()) if task.model else f"not known here: {task.why_absent}"),
        ("Trained by", f"{run.study.strategy.name} over {plural(run.result.rounds_completed, 'round')}, {run.study.training.optimizer}"),
        ("Study hash", run.study.fingerprint()),
        ("Versions", versions or DASH),
    ]
    if model is not None:
        pairs += [("Parameters", f"{model.num_parameters:,}"), ("File", "model/final.safetensors"), ("SHA-256", model.sha256)]
        if owner := model.header.get("own_model_of"):  # the run's model was replaced by it: whoever reads the card must know
            pairs.append(("Whose", f"the own model of site {owner}, made of that hospital’s patients, and not the model that the sites share"))
    else:
        pairs.append(("File", "the run has no final model"))
    return (Facts(pairs=tuple(pairs)), _gap("Developers, contact, licence"))


def _use(run: RunFiles) -> tuple[Block, ...]:
    purpose = Prose(text=run.study.purpose) if run.study.purpose else _gap("Purpose")
    return (purpose, _gap("Intended users, place in care, uses out of scope"))


def _data(run: RunFiles, task: TaskFacts) -> tuple[Block, ...]:
    source = "Synthetic patients, drawn by a program." if run.result.synthetic else task.source
    rows = tuple(
        Row(
            name=site.name,
            cells=(
                Cell(text=count(site.num_patients)),
                Cell(text=count(site.num_train)),
                Cell(text=count(site.num_test), below=_by_class(run, site.name)),
            ),
        )
        for site in run.result.sites
    )
    sizes = "Exact, as a simulation may show them." if run.result.engine in SIMULATION_ENGINES else "As the hospitals declared them, rounded."
    blocks: list[Block] = [Prose(text=source) if source else _gap("Source")]
    blocks.append(Grid(table=Table(heads=("Patients", "Training", "Test"), rows=rows, note=sizes), caption="Patients by site"))
    if task.predictors:
        predictors = tuple(Row(name=p.name, cells=(Cell(text=p.what), Cell(text=p.missing))) for p in task.predictors)
        table = Table(heads=("Declared range or values", "Where it is missing"), rows=predictors)
        blocks.append(Grid(table=table, caption="Predictors, as the task’s schema declares them", corner="Predictor", css="left-cells"))
    return (*blocks, _gap("Dates, eligibility, consent"))


def _by_class(run: RunFiles, site: str) -> str:
    return ", ".join(f"{amount:,} {name}" for name, amount in run.result.per_site_support.get(site, {}).items())


def _performance(run: RunFiles) -> tuple[Block, ...]:
    values, intervals = run.result.metrics.get("federated", {}), run.result.metrics_ci95.get("federated", {})
    if not values:
        return (Prose(text="The run has no final model, so none was judged.", css="absent-part"),)
    row = Row(
        name="All sites",
        cells=tuple(
            Cell(text=number(finite(values.get(name))), below=interval_text(finite_interval(intervals.get(name)))) for name in metric_names(run)
        ),
    )
    overall = Table(heads=tuple(metric_title(name) for name in metric_names(run)), rows=(row,))
    blocks: list[Block] = [Grid(table=overall, caption=judged(run.study).overall.format(tested=f"{num_tested(run):,}"), corner="Test patients")]
    blocks.append(Grid(table=site_table(run), caption="The same by site, each on its own test patients", css="sites"))
    if gap := worst_site(run):
        blocks.append(Prose(text=gap))
    return tuple(blocks)


def worst_site(run: RunFiles) -> str:
    """The site where the model does worst, and how far it is from all sites together, of those with enough test patients; empty under two of them."""
    primary = run.result.primary_metric
    overall = finite(run.result.metrics.get("federated", {}).get(primary))
    known = {
        name: value for name, row in run.result.per_site.items() if (value := finite(row.get(primary))) is not None and not descriptive(run, name)
    }
    few = len(run.result.per_site) - len(known)
    left_out = f" {plural(few, 'site')} with fewer than ten test patients of a class, or without a value, left out." if few else ""
    if overall is None or len(known) < 2:
        return f"Worst site: not said, for fewer than two sites have ten test patients of each class.{left_out}"
    sign = 1 if higher_is_better(run.result, primary) else -1
    name = min(known, key=lambda site: sign * known[site])
    gap = abs(overall - known[name])
    tested = finite(run.result.per_site[name].get("num_test")) or 0
    return f"Worst site: {name}, {metric_title(primary)} {number(known[name])} (n = {tested:,.0f}), {number(gap)} from that of all sites together.{left_out}"


def _calibration(run: RunFiles) -> tuple[Block, ...]:
    histograms = drawable(run, "score_histogram")
    figure = calibration_chart({name: histogram for name, histogram in histograms.items() if name == "federated"})
    if figure is None:
        return (Prose(text="Not known: the run stored no statistics from which calibration can be drawn.", css="absent-part"),)
    series = calibration_series(histograms["federated"])
    note = "Expected calibration error beside the name; larger points hold more patients."
    return (
        Drawing(figure=figure, title="Calibration", note=note, series={"federated": [(score, rate) for score, rate, _ in series]}),
        *([risk] if (risk := risk_grid(run)) else []),
    )


def _fairness(run: RunFiles) -> tuple[Block, ...]:
    rarest = {site: found for site in run.result.per_site if (found := positives(run, site)) is not None}
    few = sum(amount < FEWEST for _, amount in rarest.values())
    sites = (
        f"By site: see above; {plural(few, 'site')} of {len(rarest)} with fewer than ten test patients of a class."
        if rarest
        else "By site: see above."
    )
    groups = subgroup_blocks(run)
    gap = () if groups else (_gap("By sex, age and other groups: this run stored nothing by subgroup, so performance in them"),)
    return (Prose(text=f"{sites} {worst_site_sentence(run)}"), *groups, *gap)


def _privacy(run: RunFiles) -> tuple[Block, ...]:
    if run.claim is None:
        return (Prose(text="The run wrote no claim sheet, so nothing is promised.", css="absent-part"),)
    blocks: list[Block] = [Prose(text=run.claim.statement)]
    if meaning := meaning_sentence(run):
        blocks.append(Prose(text=meaning))
    if (spent := privacy_table(run)) is not None:
        blocks.append(Grid(table=spent, caption="Spent at each site: upper bounds by two accountants, and what the whole admitted plan costs"))
    if run.claim.site_level is not None and run.claim.unit != "site":
        blocks.append(Prose(text=f"Whole hospitals: {run.claim.site_level.statement}"))
    return (*blocks, Prose(text="Not covered:"), Bullets(items=tuple(run.claim.not_covered)))


def _attacks(run: RunFiles) -> tuple[Block, ...]:
    return tuple(attack_blocks(run)) or (Prose(text="No attack was carried out on this run; 'wardround attack' would.", css="absent-part"),)


# Hugging Face's header ----------------------------------------------------------------------------------------------------------


def front_matter(run: RunFiles) -> str:
    """YAML as the Hub's model card metadata has it, every text a JSON string (which is YAML); licence and data set names are not invented."""
    promised = whole_promise(run.claim, run.result.started_from)
    tags = [
        "wardround",
        "federated-learning",
        "medical",
        *(["differential-privacy"] if promised.epsilon is not None else []),
        *(["synthetic-data"] if run.result.synthetic else []),
    ]
    names = [HUB_METRICS[name] for name in metric_names(run) if name in HUB_METRICS]
    lines = [f"# license: {GAP}", f"# datasets: {GAP}", "library_name: pytorch", "tags:", *(f"- {_text(tag)}" for tag in tags)]
    lines += ["metrics:", *(f"- {name}" for name in names)] if names else []
    values = {name: value for name in metric_names(run) if (value := finite(run.result.metrics.get("federated", {}).get(name))) is not None}
    if values and not run.study.own_models:  # else no number is of the model that this card is of
        kind, num_sites = "synthetic test patients" if run.result.synthetic else "test patients", plural(len(run.result.sites), "site")
        lines += [
            "model-index:",
            f"- name: {_text(run.result.study)}",
            "  results:",
            "  - task:",
            "      type: other",
            f"      name: {_text(run.result.task_title)}",
            "    dataset:",
            f"      type: {_text(run.result.task)}",
            f"      name: {_text(f'{num_tested(run):,} {kind} of {num_sites}')}",
            "    metrics:",
        ]
        for name, value in values.items():
            lines += [
                f"    - type: {_text(HUB_METRICS.get(name, name))}",
                f"      name: {_text(metric_title(name))}",
                f"      value: {round(value, 4)!r}",
            ]
    if run.result.privacy.sites or run.result.privacy.unit == "site":
        lines.append(f"# privacy: {_privacy_comment(run, promised)}")
    return "\n".join(["---", *lines, "---", ""])


def _privacy_comment(run: RunFiles, promised: WholePromise) -> str:
    """What holds for the model: of a run that started with another's model, for the patients of both."""
    start = run.result.started_from
    if run.claim is None or (promised.epsilon is None and start is None):
        return "none; the run wrote no claim sheet"
    if promised.epsilon is None:
        assert start is not None
        return f"none; it started with a model of study {_text(start.study)}, {'which promised nothing' if start.unit == 'none' else 'whose promise is not known'}"
    noise = "real noise" if promised.protects else "seeded noise, protects nobody"
    needs = "" if not promised.conditions else f", as long as {in_words(promised.conditions)}"
    together = (
        ""
        if not needs or promised.colluding is None
        else f" (epsilon {upper_bound(promised.colluding)} against the coordinator and all other sites together)"
    )
    needs = ", against everybody but the coordinator" if promised.unit == "site" else f"{needs}{together}"
    return f"epsilon {upper_bound(promised.epsilon)} per {promised.unit}{'' if start is None else ', with that of the run it started with'}{needs}, {noise}"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=True)

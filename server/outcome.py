"""What a run came to, as the files of its folder: result.json, privacy.json, evaluation.json."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from server.coordinator import Coordinator, FoldResult
from server.evaluation import Evaluation, add_statistics, count_tested, evaluate, planned_noise_std
from server.run_folder import RunFolder
from shared.claim import privacy_claim, shared_noise
from shared.messages import Statistics
from shared.metrics import finish_metrics
from shared.results import (
    Interval,
    MetricValues,
    Outcome,
    PairedTest,
    Result,
    RunPrivacy,
    SiteLevelPrivacy,
    SiteSummary,
    StoredStatistics,
    SubgroupResult,
    Timing,
)
from shared.schema import TableSchema
from shared.seeding import Step
from shared.site_level import SiteLevelPlan
from shared.study import Study
from shared.task import Task

PACKAGES = ("flwr", "torch", "opacus", "dp-accounting", "numpy")


Subgroups = Mapping[str, dict[str, SubgroupResult]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Summed statistics of one baseline.

    Attributes:
        models: per model trained ("all" for pooled, else the site), its statistics on the test patients of all sites together; or "each", the sites'
            models together, each on its own site's test patients, beside a strategy that is judged so.
        own: per site, the statistics of its model (or the pooled one) on its own test patients.
        gains: of sites' own models, what federation gains each site on its own test patients.
    """

    models: dict[str, Statistics]
    own: dict[str, Statistics]
    gains: dict[str, PairedTest] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """A run that has ended, one way or another.

    Attributes:
        sites: as declared, or exact in a simulation.
        seeded_noise: whether the noise of a private study came from the study's seed.
        notes: what reading a simulation's data did, in counts.
    """

    study: Study
    task: Task
    coordinator: Coordinator
    folder: RunFolder
    engine: str
    execution: str | None = None
    sites: list[SiteSummary]
    seeded_noise: bool
    synthetic: bool = False
    notes: Mapping[str, int] = field(default_factory=dict)

    def evaluation(self, total: Statistics, *path: Step, num_noised: int = 0) -> Evaluation:
        """Metrics of a sum, with the study's intervals; of the noise alone where `num_noised` sites have put noise into it."""
        study = self.study
        noise = planned_noise_std(study, self.task, num_sites=num_noised) if num_noised else None
        return evaluate(self.task, total, resamples=study.evaluation.bootstrap, seed=study.seed, path=path, noise_std=noise)


def write_outcome(
    run: RunOutcome, outcome: Outcome, baselines: dict[str, Baseline], *, seconds: float, subgroups: Subgroups | None = None
) -> None:  # fmt: skip
    """Write result.json, and where anything was learned privacy.json and evaluation.json.

    Raises:
        StorageError: the folder cannot be written.
    """
    totals = _totals(run, baselines)
    run.folder.write_statistics(
        StoredStatistics(sources={name: _as_lists(total) for name, total in totals.items() if not name.startswith("local_only")})
    )
    result = _result(run, outcome, baselines, totals, seconds, subgroups or {})
    claim = privacy_claim(
        run.study, result.privacy, {name: site.declared_size for name, site in run.coordinator.history.enrolled.items()}, versions(),
        started_from=result.started_from,
    )  # fmt: skip
    run.folder.write_privacy(claim)
    run.folder.write_result(result)


def versions() -> dict[str, str]:
    """Versions of what the promise rests on."""
    found = {"wardround": importlib.metadata.version("wardround")} if _installed("wardround") else {}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _totals(run: RunOutcome, baselines: dict[str, Baseline]) -> dict[str, Statistics]:
    """Summed statistics by source; of local-only models the sum over all of them, each tested on the patients of all sites."""
    folds = run.coordinator.history.folds
    totals = {"federated": add_statistics(part for fold in folds for part in fold.statistics.values())} if folds else {}
    return totals | {name: add_statistics(baseline.models.values()) for name, baseline in baselines.items()}


def _result(
    run: RunOutcome, outcome: Outcome, baselines: dict[str, Baseline], totals: dict[str, Statistics], seconds: float, subgroups: Subgroups
) -> Result:
    study, task, history = run.study, run.task, run.coordinator.history
    records = run.folder.rounds()
    noised = {"federated": len(history.folds[0].statistics)} if study.noised_statistics and history.folds else {}  # baselines carry no noise
    evaluations = {
        name: run.evaluation(total, "final", name, num_noised=noised.get(name, 0))
        for name, total in totals.items()
        if not name.startswith("local_only")
    }
    metrics = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    metrics |= {name: _mean_of_models(run, baseline) for name, baseline in baselines.items() if name.startswith("local_only")}
    order = ["federated", "local_only", "pooled", "local_only_private", "pooled_private"]
    return Result(
        run=run.folder.name,
        study=study.name,
        task=task.name,
        task_title=task.title,
        engine=run.engine,
        execution=run.execution,
        seed=study.seed,
        outcome=outcome,
        synthetic=run.synthetic,
        sites=run.sites,
        notes=dict(run.notes),
        rounds_completed=len({record.round for record in records if record.fold == records[-1].fold}) if records else 0,
        primary_metric=task.primary_metric,
        higher_is_better={metric.name: metric.higher_is_better for metric in task.metrics},
        metrics={name: metrics.get(name, {}) for name in order},
        metrics_ci95={name: evaluation.ci95 for name, evaluation in evaluations.items()},
        per_site=_per_site(run, history.folds),
        per_site_support={} if study.noised_statistics else _support(run, history.folds),
        per_site_baselines={name: {site: finish_metrics(task.metrics, own) for site, own in item.own.items()} for name, item in baselines.items()},
        per_site_gains={name: item.gains for name, item in baselines.items() if item.gains},
        subgroups=dict(subgroups),
        folds=[run.evaluation(add_statistics(fold.statistics.values()), "fold", fold.fold).metrics for fold in history.folds]
        if study.evaluation.folds > 1
        else [],
        evaluation_epsilon=study.privacy.evaluation_epsilon,
        privacy=RunPrivacy(
            unit=study.privacy.unit,
            seeded_noise=(study.private or study.site_level) and run.seeded_noise,
            sites=dict(sorted(history.privacy.items())),
            site_level=_site_level(run.coordinator.site_level, num_rounds=len(records)),
            distributed_noise=shared_noise(study, dict(sorted(history.privacy.items()))),
        ),
        started_from=run.folder.start.started_from,
        timing=Timing(total_seconds=seconds, seconds_per_round=[record.seconds for record in records]),
    )


def _site_level(plan: SiteLevelPlan | None, *, num_rounds: int) -> SiteLevelPrivacy | None:
    """What so many rounds spent of the promise to whole sites."""
    if plan is None:
        return None
    return SiteLevelPrivacy(
        epsilon=plan.epsilon_after(num_rounds), epsilon_planned=plan.epsilon, delta=plan.delta, noise_multiplier=plan.noise_multiplier,
        max_site_norm=plan.max_norm, rounds=num_rounds, rounds_planned=plan.releases, epsilon_cross_check=plan.epsilon_cross_check(num_rounds),
    )  # fmt: skip


def _mean_of_models(run: RunOutcome, baseline: Baseline) -> MetricValues:
    """How good one hospital's model is alone: the mean over the sites' models of each metric on the test patients of all sites."""
    values = [finish_metrics(run.task.metrics, total) for total in baseline.models.values()]
    known = {metric: [value[metric] for value in values if value.get(metric) is not None] for metric in values[0]}
    return {metric: float(np.mean(np.asarray(found, dtype=np.float64))) if found else None for metric, found in known.items()}


def _per_site(run: RunOutcome, folds: list[FoldResult]) -> dict[str, dict[str, float | int | Interval]]:
    names = sorted({name for fold in folds for name in fold.statistics})
    table: dict[str, dict[str, float | int | Interval]] = {}
    for name in names:
        total = add_statistics(fold.statistics.get(name) for fold in folds)
        evaluation = run.evaluation(total, "site", name, num_noised=int(run.study.noised_statistics))
        row: dict[str, float | int | Interval] = dict(evaluation.metrics)
        row["num_test"] = _num_test(run, name, total)
        row |= {f"{metric}_ci95": interval for metric, interval in evaluation.ci95.items()}
        table[name] = row
    return table


def _support(run: RunOutcome, folds: list[FoldResult]) -> dict[str, dict[str, int]]:
    """Test patients of each site by class: the row sums of a statistic whose rows are the classes."""
    sites = sorted({name for fold in folds for name in fold.statistics})
    support = {site: count_by_class(run.task, add_statistics(fold.statistics.get(site) for fold in folds)) for site in sites}
    return {site: counts for site, counts in support.items() if counts}


def count_by_class(task: Task, total: Statistics) -> dict[str, int]:
    """Patients by class, where a statistic counts them: the row sums of one whose rows are the classes."""
    statistics = {metric.statistic.name: metric.statistic for metric in task.metrics}
    by_class = next((statistic.name for statistic in statistics.values() if statistic.is_counts and len(statistic.shape) == 2), None)
    if by_class is None or by_class not in total:
        return {}
    counts = total[by_class].sum(axis=1)
    return {name: round(float(count)) for name, count in zip(class_names(task, len(counts)), counts, strict=True)}


def class_names(task: Task, num_classes: int) -> list[str]:
    """The label's categories, or numbers where the schema names none."""
    values = task.schema.label.values if isinstance(task.schema, TableSchema) else ()
    return list(values) if len(values) == num_classes else [str(index) for index in range(num_classes)]


def _num_test(run: RunOutcome, name: str, total: Statistics) -> int | None:
    """Test patients of a site, as declared; with cross-validation every patient is one, and in an unfinished one those counted so far.

    Never counted from statistics with noise: they come with one fold alone, and are declared.
    """
    enrolled = run.coordinator.history.enrolled[name]
    folds = run.study.evaluation.folds
    if len(run.coordinator.history.folds) < folds:
        return count_tested(run.task, total)
    return enrolled.declared_num_test if folds == 1 else enrolled.declared_num_patients


def _as_lists(total: Statistics) -> dict[str, list[object]]:
    return {name: value.tolist() for name, value in total.items()}

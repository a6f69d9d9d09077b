"""The files of a run's folder as models: one line of rounds.jsonl, result.json, privacy.json, evaluation.json."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MetricValues = dict[str, float | None]  # null where the data do not determine the metric (a site with one class)
Interval = tuple[float, float] | None

SCHEMA_VERSION = 1
Outcome = Literal["completed", "interrupted", "failed"]
Status = Literal["ok", "refused", "missing", "failed", "not asked", "at work"]  # the last: of a strategy that does not wait


class Record(BaseModel):
    """Base of what we write: unknown keys refused, so that a reader notices a newer version."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StartedFrom(Record):
    """A model of another run, whose tensors this one started with: of which study, its file's SHA-256 (hex), which tensors, and which came from the seed.

    And what holds for that model's own patients, the starts before it counted in: `unit` "none" where nothing was promised, "unknown" where that
    run's claim sheet was not at hand or its start promises for another unit. `protects`: there is a promise, and its noise was not seeded.
    `epsilon_if_all_others_collude`: against the coordinator and all other sites together, which is more where noise was added in shares; what
    `epsilon` needs is in `conditions`.
    """

    study: str
    sha256: str
    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    share: float | None = None  # of the model's parameters that were taken
    unit: Literal["patient", "record", "site", "none", "unknown"] = "unknown"
    protects: bool = False
    epsilon: float | None = None
    delta: float | None = None
    epsilon_if_all_others_collude: float | None = None  # None in files of older versions; else as `epsilon` where no noise was shared
    conditions: tuple[str, ...] = ()  # of `epsilon`, each after "as long as", of the runs that had one


class RunStart(Record):
    """run.json: what a run began with, beside its study, so that it can be resumed as it was, also from a renamed folder."""

    run: str
    baselines: bool
    patients_sha256: str | None  # of a simulation's patients; a resumed run must have the same
    started_from: StartedFrom | None = None  # the parameters are in model/start.safetensors


class SiteRound(Record):
    """One site in one round. `metrics` are of the model that the site received, on its own test patients."""

    name: str
    status: Status
    reason: str | None = None  # code and sentence, where the status is not "ok"
    num_test: int | None = None
    metrics: MetricValues | None = None
    epsilon: float | None = None  # spent on this study so far, this round included
    staleness: int | None = None  # of fedbuff: rounds since the model that the update was trained on, and that `metrics` are of, was the newest


class RoundRecord(Record):
    """A line of rounds.jsonl. `metrics` are pooled over the sites that answered, of the model after `evaluated_round` rounds."""

    round: int
    fold: int = 1
    evaluated_round: int
    sites: tuple[SiteRound, ...]
    metrics: MetricValues
    metrics_ci95: dict[str, Interval]
    seconds: float
    site_level_epsilon: float | None = None  # of the promise to whole sites: spent on this run so far, this round included
    virtual_seconds: float | None = None  # of a simulation with sites of different speed: what the round would have taken


class SiteSummary(Record):
    """A site's size: declared in a deployment, exact in a simulation. `classes`: patients by label, simulation only."""

    name: str
    num_patients: int
    num_train: int
    num_test: int
    classes: dict[str, int] | None = None


class SitePrivacy(Record):
    """What was spent at a site. `epsilon` is an upper bound by `accountant`; the cross-check is another accountant's upper bound."""

    model_config = ConfigDict(allow_inf_nan=False)  # it comes from a site

    epsilon: float = Field(ge=0)
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int = Field(ge=0)
    accountant: Literal["pld", "prv"] = "pld"
    epsilon_cross_check: float | None
    cross_check_accountant: Literal["pld", "prv"] = "prv"
    epsilon_planned: float | None = Field(default=None, ge=0)  # of the whole plan that the site admitted


class SiteLevelPrivacy(Record):
    """What a run spent of its promise to whole sites. `epsilon` is an upper bound by `accountant`; the cross-check is another accountant's, which is wider.

    The moment at which a run stops may depend on data: the promise that holds whatever made it stop is `epsilon_planned`.
    """

    epsilon: float
    epsilon_planned: float
    delta: float
    noise_multiplier: float
    max_site_norm: float
    rounds: int  # that released something, of all folds
    rounds_planned: int
    accountant: Literal["pld"] = "pld"
    epsilon_cross_check: float
    cross_check_accountant: Literal["rdp"] = "rdp"


class SharedNoiseSite(Record):
    """What a site's promise is worth against whom, where noise is added in shares."""

    epsilon_against_coordinator: float  # who sees sums alone; the site's epsilon
    epsilon_if_all_others_collude: float  # the coordinator and every other site together, who can take their own shares away


class SharedNoise(Record):
    """Distributed noise: the sum of updates is private, and no single one. No sum had more than `missing` sites absent; more than `colluding` in league, and it does not hold."""

    missing: int
    colluding: int = 0
    num_sites: int = 0  # among which the noise was shared; 0 in files of older versions
    condition: str = ""  # of the first epsilon, after "as long as"
    sites: dict[str, SharedNoiseSite]
    statement: str


class RunPrivacy(Record):
    """The privacy part of result.json; `unit` "none" has no sites, and "site" has `site_level` alone."""

    unit: Literal["patient", "record", "site", "none"]
    seeded_noise: bool
    sites: dict[str, SitePrivacy]
    site_level: SiteLevelPrivacy | None = None
    distributed_noise: SharedNoise | None = None


class Timing(Record):
    """In seconds."""

    total_seconds: float
    seconds_per_round: list[float]


class PairedTest(Record):
    """The federated model's primary metric minus another's on the same test patients, and the two-sided p-value of an exchange test."""

    difference: float
    p_value: float
    num_test: int
    resamples: int


class SubgroupResult(Record):
    """The final model on one group of test patients over all sites. Of fewer than ten patients, and of a group that would give them away, nothing is told: `num_test` is null."""

    num_test: int | None
    support: dict[str, int]  # class -> patients, where the statistics count classes
    metrics: MetricValues
    ci95: dict[str, Interval]


class Result(Record):
    """result.json. Two runs with one seed on one machine differ in `run` and `timing` alone."""

    schema_version: int = SCHEMA_VERSION
    run: str
    study: str
    task: str
    task_title: str
    engine: str
    execution: str | None = Field(default=None, description="of a simulation: how its sites were trained")
    seed: int
    outcome: Outcome
    synthetic: bool
    sites: list[SiteSummary]
    notes: dict[str, int]  # what reading the data did, in counts; empty for real sites, who keep theirs
    rounds_completed: int
    primary_metric: str
    higher_is_better: dict[str, bool] = Field(
        default_factory=dict, description="by metric, as the task declares it; empty in files of older versions"
    )
    metrics: dict[str, MetricValues]
    metrics_ci95: dict[str, dict[str, Interval]]
    per_site: dict[str, dict[str, float | int | Interval]]
    per_site_support: dict[str, dict[str, int]]  # site -> class -> test patients, where the statistics count classes
    per_site_baselines: dict[str, dict[str, MetricValues]]  # baseline -> site -> metrics on the site's own test patients
    per_site_gains: dict[str, dict[str, PairedTest]] = Field(
        default_factory=dict, description="baseline of a site alone -> site -> whether federation does better there"
    )
    subgroups: dict[str, dict[str, SubgroupResult]] = Field(default_factory=dict, description="attribute -> group; simulation only")
    folds: list[MetricValues]  # one per fold of a cross-validation; empty without
    evaluation_epsilon: float | None = (
        None  # the test patients' budget, where metrics of the sites' statistics carry noise; their intervals are of that noise alone
    )
    privacy: RunPrivacy
    started_from: StartedFrom | None = Field(default=None, description="the model of another run that this one started with")
    timing: Timing


class SiteClaim(Record):
    """The promise to the patients of one site.

    `epsilon` is what was spent, the tighter of two upper bounds, by `accountant`. The moment at which a run stops may depend on patients: the
    promise that holds whatever made it stop is `epsilon_planned`, of the whole plan that the site admitted.
    """

    epsilon: float
    epsilon_planned: float | None = None
    delta: float
    accountant: Literal["pld", "prv"] = "pld"
    epsilon_cross_check: float | None
    cross_check_accountant: Literal["pld", "prv"] = "prv"
    noise_multiplier: float
    sample_rate: float
    steps: int
    declared_size: int
    noise_source: Literal["seeded", "os"]


class FederationClaim(Record):
    """The promise to a patient of the federation, whichever hospitals know this patient."""

    epsilon: float
    delta: float
    basis: Literal["maximum, patients are disjoint by declaration", "composition, patients may be shared"]


class SiteLevelClaim(SiteLevelPrivacy):
    """The promise to a whole hospital, with all of its patients: against everybody but the coordinator."""

    neighbouring_relation: str
    mechanism: str
    sampling: str
    composition: str
    noise_source: Literal["seeded", "os"]
    protects: bool
    statement: str
    covered: list[str]
    not_covered: list[str]
    assumed: list[str]


class PrivacyClaim(Record):
    """privacy.json: a claim sheet in the sense of NIST SP 800-226. Without a promise, `unit` is "none" and `statement` says so.

    With `unit` "site", `site_level` is the whole promise, `protects` is that of whole hospitals, and there is none to patients against the coordinator.

    Of a run with `started_from`, `protects` and every number are of its own updates alone; `shared.whole_promise` says what holds for its model.
    """

    schema_version: int = SCHEMA_VERSION
    unit: Literal["patient", "record", "site", "none"]
    neighbouring_relation: str | None
    mechanism: str | None
    sampling: str | None
    composition: str | None
    statement: str
    protects: bool
    covered: list[str]
    not_covered: list[str]
    assumed: list[str] = []
    accountants: list[str]
    sites: dict[str, SiteClaim]
    federation: FederationClaim | None = None
    site_level: SiteLevelClaim | None = None  # what is promised to whole hospitals, alone (unit "site") or beside the promise to patients
    distributed_noise: SharedNoise | None = None  # where noise is added in shares: both epsilons of every site
    evaluation_epsilon: float | None = None  # of the test patients, where their statistics left with noise
    started_from: StartedFrom | None = None
    versions: dict[str, str]


class StoredStatistics(Record):
    """evaluation.json: summed statistics (nested lists) from which ROC and calibration are drawn, by source ("federated", "pooled", ...)."""

    schema_version: int = SCHEMA_VERSION
    sources: dict[str, dict[str, list[object]]]

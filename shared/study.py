"""The study: one question, one model, one TOML file. What the researcher asks for; a site's policy outranks it."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from shared.config import Momentum, Positive, Real, Settings, TomlTable, read_toml, validate
from shared.privacy import MIN_NOISE_MULTIPLIER
from shared.strategy_options import PERSONAL, SUMS_ALONE, Apfl, FedAdagrad, FedAdam, FedAvg, FedAvgM, FedBuff, FedNova, FedYogi, Scaffold, Strategy
from shared.study_tables import merge_tables, toml_text

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(ms|s|m|h)$")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SHORT_HASH = 16  # digits of a study's hash that are shown, and that two people compare


def parse_duration(text: str) -> float:
    """Seconds in a duration such as "10m", "90s", "1.5h".

    >>> parse_duration("10m")
    600.0
    """
    match = _DURATION.match(text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"expected a duration above zero such as '90s', '10m' or '2h', got {text!r}")
    return float(match[1]) * _SECONDS[match[2]]


class Rounds(Settings):
    """How many rounds, and when a round may go on without everybody."""

    count: int = Field(default=30, ge=1, le=100_000, description="rounds of training")
    require: Literal["all"] | Annotated[int, Field(ge=1)] = Field(
        default="all", description="'all', or the quorum: that many usable updates, or the round does not count"
    )
    deadline: str = Field(default="10m", description="longest wait for a round's answers")
    on_missing: Literal["proceed", "wait", "abort"] = Field(default="proceed", description="what to do at the deadline")

    @field_validator("deadline")
    @classmethod
    def _check_deadline(cls, text: str) -> str:
        parse_duration(text)
        return text

    @property
    def deadline_seconds(self) -> float:
        """The deadline, in seconds."""
        return parse_duration(self.deadline)


class Training(Settings):
    """Local training at a site."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    momentum: Momentum = Field(default=0.0, description="sgd only")
    weight_decay: Real = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="of the learning rate, by round")
    warmup_rounds: int = Field(default=0, ge=0)
    local_epochs: int = Field(default=1, ge=1, le=1000, description="expected passes over the site's patients a round")
    local_steps: int | None = Field(default=None, ge=1, le=1_000_000, description="instead of local_epochs")
    batch_size: int = Field(default=32, ge=1, description="expected batch size under Poisson sampling")

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"momentum belongs to optimizer 'sgd', got optimizer {self.optimizer!r}; remove momentum")
        if self.local_steps is not None and "local_epochs" in self.model_fields_set:
            raise ValueError("expected local_epochs or local_steps, got both; remove one")
        return self


class Privacy(Settings):
    """The promise a study asks every site to keep. The site's policy can only make it stricter."""

    unit: Literal["patient", "record", "site", "none"] = Field(
        default="patient", description="'site': whole sites, by the coordinator's noise and against everybody but the coordinator"
    )
    epsilon: Real | None = Field(default=None, gt=0, le=100, description="the whole study's budget at each site; above 100 promises nothing")
    noise_multiplier: Real | None = Field(default=None, ge=MIN_NOISE_MULTIPLIER, le=1e6, description="instead of epsilon")
    delta: Real | None = Field(default=None, gt=0, lt=0.1, description="omitted: min(1e-4, 1/(10 x smallest declared size))")
    max_grad_norm: Real = Field(default=1.0, ge=1e-6, le=1e6, description="C; far below, float32 could not keep a clipped norm under it")
    spare_rounds: int = Field(default=0, ge=0, le=1000, description="rounds planned beyond [rounds] count, for those that a crash spends in vain")
    evaluation_epsilon: Real | None = Field(
        default=None,
        gt=0,
        le=100,
        description="the test patients' budget: statistics leave a site once, with noise, with the final model; omitted: exact, every round",
    )
    patients_overlap: bool = Field(default=False, description="whether a patient may be known to several sites; if so, their promises are composed")
    max_site_norm: Real | None = Field(
        default=None, ge=1e-6, le=1e6, description="of a promise to whole sites: S, the L2 norm to which the coordinator clips each site's update"
    )
    site_epsilon: Real | None = Field(
        default=None, gt=0, le=100, description="beside a promise to patients or records, one to whole sites: its budget over the whole study"
    )
    site_delta: Real | None = Field(default=None, gt=0, lt=0.1, description="of site_epsilon; omitted: min(1e-3, 1/(10 x sites))")
    noise_source: Literal["seeded", "os"] = Field(default="seeded", description="simulation only; a site's own ledger takes 'os' always")
    records_per_patient: Literal["one", "all"] = Field(
        default="one", description="of unit 'patient', in a step: one record, drawn anew, or the mean gradient of all, clipped as one"
    )
    physical_batch_size: int = Field(
        default=256, ge=1, le=16_384, description="most records in memory at once, in steps of 16; no effect on the result"
    )

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.unit == "none":
            if self.epsilon is not None or self.noise_multiplier is not None:
                raise ValueError("unit 'none' keeps no promise, so expected neither epsilon nor noise_multiplier; remove it")
            if self.evaluation_epsilon is not None:
                raise ValueError("unit 'none' keeps no promise, so expected no evaluation_epsilon; remove it")
        elif (self.epsilon is None) == (self.noise_multiplier is None):
            got = "neither" if self.epsilon is None else "both"
            raise ValueError(f"expected either epsilon or noise_multiplier, got {got}; give one, or unit = 'none'")
        if self.unit == "record" and self.records_per_patient == "all":
            raise ValueError(
                "records_per_patient = 'all' protects patients, but unit is 'record'; use unit = 'patient', or remove records_per_patient"
            )
        return self

    @model_validator(mode="after")
    def _check_sites(self) -> Self:
        if self.unit == "site" and self.evaluation_epsilon is not None:
            raise ValueError("unit 'site' promises nothing to single patients, so expected no evaluation_epsilon; remove it")
        if self.unit in ("site", "none") and (self.site_epsilon is not None or self.site_delta is not None):
            remedy = "give epsilon and delta, which are for sites then" if self.unit == "site" else "use unit = 'site'"
            raise ValueError(f"site_epsilon and site_delta stand beside a promise to patients or records, got unit {self.unit!r}; {remedy}")
        if self.site_epsilon is None and self.site_delta is not None:
            raise ValueError("expected site_epsilon with site_delta, got none; give it, or remove site_delta")
        wanted = self.unit == "site" or self.site_epsilon is not None
        if wanted and self.max_site_norm is None:
            raise ValueError(
                "a promise to whole sites: expected max_site_norm, the L2 norm to which a site's update is clipped, got none; "
                "about what an update usually comes to is a place to begin"
            )
        if not wanted and self.max_site_norm is not None:
            raise ValueError("expected unit 'site' or site_epsilon with max_site_norm, got neither; give one, or remove max_site_norm")
        return self


class SecureAggregation(Settings):
    """The coordinator learns sums of updates, and no single one: SecAgg+ (Bell et al. 2020)."""

    threshold: int | None = Field(
        default=None, ge=3, description="fewest sites in a sum; omitted, and at least: more than half of those asked, never under 3"
    )
    noise: Literal["local", "distributed"] = Field(
        default="local",
        description="'distributed': each site adds a share, and the sum is private (local_steps = 1); 'local': each update is private",
    )
    sites: int | None = Field(default=None, ge=3, le=1000, description="of 'distributed', where it is needed: sites among which the noise is shared")
    missing: int = Field(default=0, ge=0, description="of 'distributed': how many of these may be absent from a sum; sites refuse one with fewer")
    colluding: int = Field(default=0, ge=0, description="of 'distributed': how many of these, besides, may be in league with the coordinator")
    max_value: Positive = Field(default=10.0, description="of an entry of an update; what is beyond is clipped to it, at the site")
    max_weight: int = Field(default=10_000, ge=1, le=10_000_000, description="a larger declared size counts as this many patients")

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.noise == "local" and (self.missing or self.colluding or self.sites is not None):
            raise ValueError("sites, missing and colluding belong to noise 'distributed', got noise 'local'; remove them")
        if self.noise == "distributed" and self.sites is None:
            raise ValueError("noise 'distributed' is shared among a number of sites, which hospitals approve: expected sites, got none; give it")
        if self.sites is not None and self.missing + self.colluding >= self.sites:
            raise ValueError(f"expected fewer missing and colluding than sites, {self.sites}, got {self.missing + self.colluding}; lower them")
        return self


class Evaluation(Settings):
    """How the study is judged."""

    folds: int = Field(default=1, ge=1, le=20, description="above 1: cross-validation by patient")
    bootstrap: int = Field(default=500, ge=0, le=100_000, description="resamples for the 95 % intervals; 0: none")


class Federation(Settings):
    """The virtual federation of a simulation."""

    sites: int | None = Field(default=None, ge=1, le=100_000, description="number of virtual sites; 'natural' brings its own")
    partition: Literal["iid", "dirichlet", "quantity", "shards", "column", "natural"] = "iid"
    alpha: Real = Field(default=0.5, gt=0, description="concentration, of 'dirichlet' (labels) and 'quantity' (sizes)")
    shards_per_site: int = Field(default=2, ge=1, description="of 'shards'")
    column: str | None = Field(default=None, description="of 'column': the attribute whose values are the sites")
    min_patients: int = Field(default=10, ge=2, description="least number of patients at a site")
    min_per_class: int = Field(default=1, ge=0, description="least number of patients of each class at a site, where that is possible")
    num_patients: int | None = Field(default=None, ge=2, description="of a synthetic cohort, all sites together")
    slowness: Real | None = Field(
        default=None, ge=0, le=5, description="sigma of the sites' log-normal virtual seconds for a training, with median 1; omitted: all alike"
    )

    @model_validator(mode="after")
    def _check_partition(self) -> Self:
        if (self.partition == "column") != (self.column is not None):
            raise ValueError(f"partition {self.partition!r} with column {self.column!r}: expected partition 'column' and a column, or neither")
        if self.partition in ("natural", "column") and self.sites is not None:
            raise ValueError(f"partition {self.partition!r} takes its sites from the data, got sites = {self.sites}; remove sites")
        return self


class Faults(Settings):
    """Virtual sites whose answers are spoiled on their way, so that what bad ones do is seen. Only a simulation has them."""

    sites: tuple[str, ...] | int = Field(default=1, description="by name, or how many, drawn by the seed")
    kind: Literal[
        "nan", "inf", "scaled", "sign-flipped", "wrong-shape", "wrong-dtype", "missing-tensor", "extra-tensor", "empty", "silent", "late",
        "duplicate", "other-round", "other-study", "claimed-size",
    ] = Field(default="nan", description="what comes in place of a site's update; 'claimed-size': what it says of itself when it enrols")  # fmt: skip
    factor: Real | None = Field(default=None, description="of 'scaled': what the update is multiplied by; omitted: a million")
    claimed_size: int | None = Field(default=None, ge=-(2**31), le=2**31, description="of 'claimed-size': training patients; omitted: a billion")
    from_round: int = Field(default=1, ge=1, description="the first round with a fault; enrolment and the closing evaluation have none")
    share: Real = Field(default=1.0, gt=0, le=1, description="of those rounds that have one, each drawn by the seed")

    @field_validator("sites", mode="before")
    @classmethod
    def _check_sites(cls, value: object) -> object:
        if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
            return tuple(value)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        raise ValueError(f"expected names of sites, or how many, got {value!r}")

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        for key, kind in (("factor", "scaled"), ("claimed_size", "claimed-size")):
            if getattr(self, key) is not None and self.kind != kind:
                raise ValueError(f"{key} belongs to kind {kind!r}, got kind {self.kind!r}; remove {key}")
        return self


class Study(Settings):
    """One study, as in a TOML file; frozen. `fingerprint()` identifies it everywhere."""

    name: str = Field(pattern=NAME_PATTERN)
    task: str = Field(min_length=1, description="a registered task, an entry point, 'package.module:factory', or a schema TOML file")
    seed: int = Field(default=7, ge=0, lt=2**63)
    purpose: str = Field(default="", max_length=500, description="for the people who approve it")
    rounds: Rounds = Rounds()
    training: Training = Training()
    strategy: Strategy = FedAvg()
    privacy: Privacy
    secure_aggregation: SecureAggregation | None = Field(default=None, description="an empty table is enough")
    evaluation: Evaluation = Evaluation()
    federation: Federation = Federation()
    faults: Faults | None = Field(default=None, description="bad sites, in a simulation only; no real site takes part in a study with some")

    @field_validator("purpose")
    @classmethod
    def _check_purpose(cls, text: str) -> str:
        if not text.replace("\n", " ").isprintable():  # it is shown on the terminals of those who decide, which control characters command
            raise ValueError("expected text and line breaks, got control characters; remove them")
        return text

    @model_validator(mode="after")
    def _check_strategy(self) -> Self:
        training, name = self.training, self.strategy.name
        if isinstance(self.strategy, Scaffold | FedNova | Apfl) and (training.optimizer != "sgd" or training.momentum):
            wrong = f"momentum 0, got {training.momentum:g}" if training.momentum else f"optimizer 'sgd', got {training.optimizer!r}"
            raise ValueError(f"strategy {name!r} is defined for plain SGD: expected training.{wrong}; change it, or the strategy")
        if isinstance(self.strategy, Scaffold) and training.local_steps is None:
            raise ValueError(
                "strategy 'scaffold' divides by the steps of a round: expected training.local_steps, which sites and coordinator know alike, "
                "got local_epochs; give local_steps"
            )
        if isinstance(self.strategy, FedBuff) and self.rounds.require != "all" and self.rounds.require > self.strategy.buffer_size:
            raise ValueError(
                f"strategy 'fedbuff' ends a round with strategy.buffer_size updates: expected at least rounds.require, {self.rounds.require}, "
                f"got {self.strategy.buffer_size}; raise buffer_size, or lower require"
            )
        return self

    @model_validator(mode="after")
    def _check_secure_aggregation(self) -> Self:
        if self.secure_aggregation is None:
            return self
        if not isinstance(self.strategy, SUMS_ALONE):
            raise ValueError(
                f"secure_aggregation with strategy {self.strategy.name!r}, which looks at single updates: expected one that needs only their mean, "
                f"such as 'fedavg'; choose one, or remove [secure_aggregation]"
            )
        if self.secure_aggregation.noise == "distributed":
            self._check_distributed_noise()
        if self.faults is not None:
            raise ValueError("secure_aggregation with [faults]: expected no faults, for nobody sees the update that they spoil; remove one of them")
        return self

    @model_validator(mode="after")
    def _check_site_level(self) -> Self:
        if not self.site_level:
            return self
        name = self.strategy.name
        if not isinstance(self.strategy, SUMS_ALONE):
            raise ValueError(
                f"strategy {name!r} with a promise to whole sites: expected a strategy of which the coordinator needs the mean alone, for the promise is "
                f"that of a noised sum of clipped updates; {name!r} looks at single ones, weighs them, or moves the model by one at a time; use 'fedavg'"
            )
        if self.strategy.weights != "equal":
            raise ValueError(
                f"strategy.weights: expected 'equal' with a promise to whole sites, for a site's part in the sum must not grow with its size, "
                f"got {self.strategy.weights!r}; set it"
            )
        if self.distributed_noise:
            raise ValueError(
                "secure_aggregation.noise 'distributed' with a promise to whole sites: expected noise 'local', for a site clips what it sends to max_site_norm, which "
                "would cut off its share of the noise, on which the promise to patients rests; set it, or remove max_site_norm"
            )
        return self

    def _check_distributed_noise(self) -> None:
        training, name = self.training, "secure_aggregation.noise 'distributed' holds for one sum a step, so"
        if training.local_steps != 1:
            raise ValueError(f"{name} expected training.local_steps = 1, got {training.local_steps or 'local_epochs'}; set it, or use noise 'local'")
        if (training.optimizer, training.momentum, training.weight_decay) != ("sgd", 0.0, 0.0):
            others = {"momentum": training.momentum, "weight_decay": training.weight_decay}
            got = ", ".join([f"optimizer {training.optimizer!r}", *(f"{key} {value:g}" for key, value in others.items() if value)])
            raise ValueError(f"{name} expected optimizer 'sgd' without momentum or weight_decay, got {got}; use a server optimizer such as 'fedadam'")
        if self.privacy.unit not in ("patient", "record"):
            raise ValueError(
                "secure_aggregation.noise 'distributed' is noise for a promise to patients, so expected privacy.unit 'patient' or 'record', "
                f"got {self.privacy.unit!r}; use noise 'local'"
            )
        if not isinstance(self.strategy, FedAvg | FedAvgM | FedAdagrad | FedAdam | FedYogi):
            raise ValueError(f"{name} expected strategy 'fedavg' or a server optimizer, got {self.strategy.name!r}; choose one, or use noise 'local'")
        if self.privacy.patients_overlap:
            raise ValueError(
                f"{name} expected privacy.patients_overlap = false, for a patient of two sites would move one sum at both, against one noise; use noise 'local'"
            )

    @property
    def distributed_noise(self) -> bool:
        """True when noise is added in shares, and the sum of updates is private."""
        return self.secure_aggregation is not None and self.secure_aggregation.noise == "distributed"

    @model_validator(mode="after")
    def _check_noised_statistics(self) -> Self:
        if self.noised_statistics and self.evaluation.folds > 1:
            raise ValueError(
                f"privacy.evaluation_epsilon with evaluation.folds = {self.evaluation.folds}: expected folds = 1, for a patient tested in one fold "
                "is trained on in the others, and the two budgets would mix; remove one of them"
            )
        return self

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """The study in a TOML file. A task that is a schema file is found beside the study.

        Raises:
            ConfigurationError: the file is missing or does not fit; it names file, key, expected and got.
        """
        path = Path(path)
        return cls.from_table(read_toml(path), source=str(path))

    @classmethod
    def from_table(cls, table: Mapping[str, object], *, source: str = "study") -> "Study":
        """The study of these tables; `source` stands in messages."""
        table = dict(table)
        strategy = table.get("strategy")
        if isinstance(strategy, Mapping) and "name" not in strategy:
            table["strategy"] = {"name": "fedavg", **strategy}
        task = table.get("task")
        if isinstance(task, str) and task.endswith(".toml") and not Path(task).is_absolute():
            beside = Path(source).parent / task
            table["task"] = str(beside if beside.exists() else Path(task))
        return validate(cls, table, source)

    def replace(self, **changes: object) -> "Study":
        """A study with these keys changed: `study.replace(seed=8, privacy={"epsilon": 1.0})`; tables are merged.

        Setting `epsilon`, `noise_multiplier` or `unit = "none"` takes the place of the other two, and "none" of `evaluation_epsilon`;
        setting `sites` alone turns a natural partition into an iid one. Another unit than before drops the promise to whole sites, or that to patients.
        """
        return Study.from_table(merge_tables(self.to_table(), changes), source="study")

    def to_table(self) -> TomlTable:
        """Every value that is not absent, as plain tables."""
        table: TomlTable = self.model_dump(mode="json", exclude_none=True)
        training = table["training"]
        assert isinstance(training, dict)
        if "local_steps" in training:
            training.pop("local_epochs", None)
        return table

    def to_toml(self) -> str:
        """The study as TOML text that loads to an equal study."""
        return toml_text(self.to_table())

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the study's canonical JSON."""
        canonical = json.dumps(self.to_table(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def private(self) -> bool:
        """True when the study asks every site to train with differential privacy, for its patients or records."""
        return self.privacy.unit in ("patient", "record")

    @property
    def site_level(self) -> bool:
        """True when the coordinator's noise makes a promise to whole sites, alone or beside the sites' own."""
        return self.privacy.max_site_norm is not None

    @property
    def own_models(self) -> bool:
        """True when each site is judged by a model of its own, which stays there."""
        return isinstance(self.strategy, PERSONAL)

    @property
    def noised_statistics(self) -> bool:
        """True when evaluation statistics carry noise, charged to the test patients."""
        return self.privacy.evaluation_epsilon is not None

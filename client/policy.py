"""What a hospital allows. site.toml belongs to the hospital and outranks every request."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from shared.config import Real, Settings, read_toml, validate
from shared.errors import ConfigurationError, PolicyRefusedError
from shared.plan import Limit, SitePlan
from shared.study import NAME_PATTERN, Study

if TYPE_CHECKING:  # the courier reads a site file, and imports no torch
    from shared.task import Task

LEDGERS = "ledgers"  # folder in a site's state
SigningKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Policy(Settings):
    """The limits of a site. Everything not allowed is refused, by the name of the rule."""

    max_epsilon: Real = Field(gt=0, description="of this cohort, over all studies together")
    max_delta: Real = Field(default=1e-4, gt=0, lt=0.1)
    max_grad_norm: Real = Field(default=1000.0, gt=0, description="largest clipping norm a study may ask for")
    max_steps: int = Field(default=100_000, ge=1, description="most training steps of one study")
    min_patients: int = Field(default=20, ge=2, description="smallest training cohort that may take part")
    min_metric_patients: int = Field(default=20, ge=1, description="fewest test patients for which statistics may leave")
    allowed_tasks: tuple[str, ...] = Field(min_length=1, strict=False)
    allowed_metrics: tuple[str, ...] = Field(default=(), strict=False, description="statistics leave only when every metric made of them is here")
    exact_metrics: bool = Field(default=False, description="whether a private study's statistics may leave without noise")
    round_counts_to: int = Field(default=1, ge=1, description="statistics that count patients leave rounded to multiples of this")
    accept_unconfined_courier: bool = Field(
        default=False, description="whether the process that faces the network may run as it is, where neither Landlock nor another user confines it"
    )
    allow_record_unit: bool = Field(default=False, description="whether a promise to single records, not to patients, may ever be accepted")
    allow_site_unit: bool = Field(
        default=False,
        description="whether a promise to this whole hospital, not to its patients, and not against the coordinator, may ever be accepted",
    )
    accept_distributed_noise: bool = Field(
        default=False, description="whether noise may be shared among the sites, so that a promise holds only while few of them collude or are absent"
    )
    sum_with: dict[str, SigningKey] = Field(
        default={}, description="sites without which this one is in no secure sum, and their signing keys, as their hospitals read them out"
    )
    allow_no_privacy: bool = Field(default=False, description="whether a study without privacy may ever be accepted")

    @property
    def limit(self) -> Limit:
        """What the cohort may spend over all studies."""
        return Limit(epsilon=self.max_epsilon, delta=self.max_delta)

    def check(self, study: Study, task: "Task", shape: SitePlan) -> None:
        """Return where the policy allows what is asked; the plan's noise is not yet looked at, and computing it may take long.

        Raises:
            ConfigurationError: the study has faults.
            PolicyRefusedError: it does not; the message names the rule.
        """
        refuse_faults(study)
        self._check_kind(study, task)
        steps = shape.planned_steps
        _at_most("max_steps", self.max_steps, steps, "lower [rounds] count, local_epochs or local_steps")
        if shape.declared_size < self.min_patients:
            raise _refusal("min_patients", f"at least {self.min_patients} declared patients", str(shape.declared_size), "ask the hospital")
        if study.private:
            privacy = study.privacy
            _at_most("max_delta", self.max_delta, privacy.delta or 0.0, "lower [privacy] delta")
            _at_most("max_grad_norm", self.max_grad_norm, privacy.max_grad_norm, "lower [privacy] max_grad_norm")
            _at_most("max_epsilon", self.max_epsilon, privacy.epsilon or 0.0, "lower [privacy] epsilon")
            _at_most("max_epsilon", self.max_epsilon, privacy.evaluation_epsilon or 0.0, "lower [privacy] evaluation_epsilon")

    def check_noise(self, plan: SitePlan) -> None:
        """Return where the plan's promise is one that the policy allows.

        Raises:
            PolicyRefusedError: it is not.
        """
        if plan.private:
            assert plan.epsilon is not None
            _at_most("max_epsilon", self.max_epsilon, plan.epsilon, "lower [privacy] epsilon, or raise noise_multiplier")

    def _check_kind(self, study: Study, task: "Task") -> None:
        if not {task.name, study.task} & set(self.allowed_tasks):
            raise _refusal("allowed_tasks", f"one of {', '.join(self.allowed_tasks)}", repr(task.name), "ask the hospital")
        if study.privacy.unit == "site" and not self.allow_site_unit:
            raise _refusal("allow_site_unit", "a promise to patients", "unit = 'site'", "set [privacy] unit = 'patient', with site_epsilon for both")
        if study.privacy.unit == "none" and not self.allow_no_privacy:
            raise _refusal("allow_no_privacy", "a study with differential privacy", "unit = 'none'", "set [privacy] epsilon")
        if study.distributed_noise and not self.accept_distributed_noise:
            raise _refusal(
                "accept_distributed_noise", "noise that protects each update alone", "secure_aggregation.noise = 'distributed'", "set it to 'local'"
            )
        if study.privacy.unit == "record" and not self.allow_record_unit:
            raise _refusal("allow_record_unit", "a promise to patients", "unit = 'record'", "set [privacy] unit = 'patient'")

    def withholds(self, task: "Task", statistic: str, *, num_test: int, exact: bool) -> str | None:
        """The rule that keeps the sums of this statistic at the site; None where they may leave.

        Args:
            exact: they would leave without noise, in a private study.
        """
        if num_test < self.min_metric_patients:
            return "policy.min_metric_patients: too few test patients"
        if exact and not self.exact_metrics:
            return "policy.exact_metrics: a private study's statistics leave with noise only; set [privacy] evaluation_epsilon"
        names = [metric.name for metric in task.metrics if metric.statistic.name == statistic]
        kept = [name for name in names if name not in self.allowed_metrics]
        return f"policy.allowed_metrics: {statistic} also gives {', '.join(kept)}" if kept else None


def refuse_faults(study: Study) -> None:
    """Return where a real site may look at the study at all.

    Raises:
        ConfigurationError: it has faults, which are a simulation's.
    """
    if study.faults is not None:
        raise ConfigurationError("faults: expected none at a real site, got some", "remove [faults], or simulate the study", rule="faults")


def _at_most(rule: str, most: float, got: float, remedy: str) -> None:
    if got > most:
        raise _refusal(rule, f"at most {most:g}", f"{got:.6g}", remedy)


def _refusal(rule: str, expected: str, got: str, remedy: str) -> PolicyRefusedError:
    return PolicyRefusedError(f"policy.{rule}: expected {expected}, got {got}", remedy, rule=f"policy.{rule}")


class CohortFile(Settings):
    """Where the cohort is, and what the site declares about it."""

    path: str = Field(min_length=1, description="file or folder, relative to the site file")
    declared_size: int = Field(ge=2, description="training patients, rounded; sample rate, noise and weight come from it")
    declared_test_size: int = Field(default=0, ge=0, description="test patients, rounded")
    options: dict[str, str | int | float | bool] = Field(default={}, description="of the task's loader")


class AdvanceApproval(Settings):
    """[approve_in_advance] of site.toml: studies that need nobody's yes, as long as they ask for no more than this."""

    tasks: tuple[str, ...] = Field(min_length=1, strict=False, description="names of tasks")
    max_epsilon: Real = Field(gt=0, description="of one study; one without privacy is never approved in advance")
    until: date = Field(description="the last day, as 2027-06-30", strict=False)


class SiteFile(Settings):
    """A hospital's site.toml."""

    name: str = Field(pattern=NAME_PATTERN)
    state: str = Field(default="state", description="folder of ledger and keys, relative to the site file")
    cohort: CohortFile
    policy: Policy
    approve_in_advance: AdvanceApproval | None = Field(default=None, description="studies that need nobody's yes")

    @field_validator("state")
    @classmethod
    def _check_state(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("expected a folder, got an empty text")
        return text

    def ledger_path(self, path: Path) -> Path:
        """The cohort's ledger, for the site file at `path`: one file a cohort, side by side, so that no patient is in two."""
        return path.parent / self.state / LEDGERS / f"{self.name}.sqlite"

    @classmethod
    def load(cls, path: Path) -> "SiteFile":
        """The site file at `path`.

        Raises:
            ConfigurationError: it is missing or does not fit; it names file, key, expected and got.
        """
        return validate(cls, read_toml(path), str(path))

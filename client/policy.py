"""What a hospital allows. site.toml belongs to the hospital and outranks every request."""

from pathlib import Path

from pydantic import Field, field_validator

from shared.config import Settings, read_toml, validate
from shared.errors import PolicyRefusedError
from shared.plan import SitePlan
from shared.study import NAME_PATTERN, Real, Study
from shared.task import Task


class Policy(Settings):
    """The limits of a site. Everything not allowed is refused, by the name of the rule."""

    max_epsilon: Real = Field(gt=0, description="of this cohort, over all studies together")
    max_delta: Real = Field(default=1e-4, gt=0, lt=0.1)
    min_patients: int = Field(default=20, ge=2, description="smallest training cohort that may take part")
    min_metric_patients: int = Field(default=20, ge=1, description="fewest test patients for which statistics may leave")
    allowed_tasks: tuple[str, ...] = Field(min_length=1, strict=False)
    allowed_metrics: tuple[str, ...] = Field(
        default=(), strict=False, description="exact statistics leave only when every metric made of them is here"
    )
    allow_no_privacy: bool = Field(default=False, description="whether a study without privacy may ever be accepted")

    def check(self, study: Study, task: Task, plan: SitePlan) -> None:
        """Return where the policy allows this plan.

        Raises:
            PolicyRefusedError: it does not; the message names the rule.
        """
        if task.name not in self.allowed_tasks:
            raise PolicyRefusedError(f"policy.allowed_tasks: expected one of {', '.join(self.allowed_tasks)}, got {task.name!r}", "ask the hospital")
        if not plan.private and not self.allow_no_privacy:
            raise PolicyRefusedError(
                "policy.allow_no_privacy: expected a study with differential privacy, got unit = 'none'", "set [privacy] epsilon"
            )
        if plan.delta is not None and plan.delta > self.max_delta:
            raise PolicyRefusedError(f"policy.max_delta: expected delta at most {self.max_delta:g}, got {plan.delta:g}", "lower [privacy] delta")
        if plan.epsilon is not None and plan.epsilon > self.max_epsilon:
            raise PolicyRefusedError(
                f"policy.max_epsilon: expected epsilon at most {self.max_epsilon:g}, got {plan.epsilon:.3g}", "lower [privacy] epsilon"
            )
        if plan.declared_size < self.min_patients:
            raise PolicyRefusedError(
                f"policy.min_patients: expected at least {self.min_patients} declared patients, got {plan.declared_size}", "ask the hospital"
            )

    def withholds(self, task: Task, statistic: str, *, num_test: int) -> str | None:
        """The rule that keeps the exact sums of this statistic at the site; None where they may leave."""
        if num_test < self.min_metric_patients:
            return "policy.min_metric_patients: too few test patients"
        names = [metric.name for metric in task.metrics if metric.statistic.name == statistic]
        kept = [name for name in names if name not in self.allowed_metrics]
        return f"policy.allowed_metrics: {statistic} also gives {', '.join(kept)}" if kept else None


class CohortFile(Settings):
    """Where the cohort is, and what the site declares about it."""

    path: str = Field(min_length=1, description="file or folder, relative to the site file")
    declared_size: int = Field(ge=2, description="training patients, rounded; sample rate, noise and weight come from it")
    declared_test_size: int = Field(default=0, ge=0, description="test patients, rounded")
    options: dict[str, str | int | float | bool] = Field(default={}, description="of the task's loader")


class SiteFile(Settings):
    """A hospital's site.toml."""

    name: str = Field(pattern=NAME_PATTERN)
    state: str = Field(default="state", description="folder of ledger and keys, relative to the site file")
    cohort: CohortFile
    policy: Policy

    @field_validator("state")
    @classmethod
    def _check_state(cls, text: str) -> str:
        if not text.strip():
            raise ValueError("expected a folder, got an empty text")
        return text

    @classmethod
    def load(cls, path: Path) -> "SiteFile":
        """The site file at `path`.

        Raises:
            ConfigurationError: it is missing or does not fit; it names file, key, expected and got.
        """
        return validate(cls, read_toml(path), str(path))

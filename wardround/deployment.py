"""A study on its way to real hospitals: resolved for their federation, planned with their declared sizes, and submitted.

Federation's quorum and study's `rounds.require`: a study that says a smaller number than the quorum is refused. One that says "all" and may
proceed without the missing could go on with one site, so its `require` becomes the quorum: it begins as soon as so many have enrolled, and
the others join when they come. One that waits for all, or aborts, needs all anyway and is left as it is.
"""

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from server.federation_file import FederationFile
from server.sampler import num_asked
from shared.errors import ConfigurationError, ConnectionFailedError
from shared.kit import CA_CERTIFICATE, FEDERATION, ROSTER, STATE, Roster, RosterSite, verify_kit
from shared.plan import SitePlan, plan_site
from shared.privacy import default_delta_of_sites
from shared.site_level import default_site_delta, resolve_site_delta
from shared.study import Federation, Study
from shared.view import View
from wardround.deployed_runs import coordinator_folder, coordinator_status
from wardround.plural import plural

if TYPE_CHECKING:
    from shared.task import Task

TRIES, PAUSE_SECONDS = 3, 1.0
UNKNOWN_STATE = "unknown"  # of a site, while no coordinator runs

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeployedStudy:
    """A study as it is submitted.

    Attributes:
        notes: what was changed or filled in, a sentence each.
        warnings: what may keep it from working at the sites.
    """

    study: Study
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSite:
    """A site on the roster in this study; without a declared size on the roster there is no plan, and the site makes its own."""

    name: str
    state: str
    declared_size: int | None
    plan: SitePlan | None

    def numbers(self) -> dict[str, object]:
        """As plain values, for JSON."""
        plan = self.plan
        known = {} if plan is None else {
            "sample_rate": plan.sample_rate, "steps": plan.planned_steps,
            "noise_multiplier": plan.noise_multiplier, "epsilon": plan.epsilon, "delta": plan.delta,
        }  # fmt: skip
        return {"name": self.name, "state": self.state, "declared_size": self.declared_size, **known}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """What would happen if the study were submitted.

    Attributes:
        rounds: rounds times folds.
        down_bytes: of a round, to each site: the model.
        up_bytes: of a round, from each site: its update and the statistics that the study asks for.
        leaves: what the study asks each site to let out, line by line.
        deadline_seconds: all deadlines together: enrolment, every round, and the closing evaluation of every fold.
    """

    deployed: DeployedStudy
    task: str
    num_parameters: int
    rounds: int
    quorum: int
    sites: tuple[PlannedSite, ...]
    down_bytes: int
    up_bytes: int
    leaves: tuple[str, ...]
    deadline_seconds: float

    def numbers(self) -> dict[str, object]:
        """As plain values, for JSON."""
        study = self.deployed.study
        each, num_sites = self.down_bytes + self.up_bytes, len(self.sites)
        return {
            "study": study.to_table(), "study_hash": study.fingerprint(), "task": self.task, "num_parameters": self.num_parameters,
            "rounds": self.rounds, "quorum": self.quorum, "sites": [site.numbers() for site in self.sites],
            "bytes_per_round": {"down_per_site": self.down_bytes, "up_per_site": self.up_bytes, "total": each * num_sites},
            "bytes_total": each * num_sites * self.rounds, "leaves": list(self.leaves), "deadline_seconds": self.deadline_seconds,
            "notes": list(self.deployed.notes), "warnings": list(self.deployed.warnings),
        }  # fmt: skip


def new_token() -> str:
    """A token that nobody has used."""
    return secrets.token_urlsafe(16)


def prepare(kit: Path, study: Study) -> DeploymentPlan:
    """The plan of `study` at the sites that may take part now: its task resolved and its model tried, nothing submitted.

    Raises:
        KitError: `kit` is no coordinator's, damaged or expired.
        ConfigurationError, ModelRefusedError: what stands in the way, at which site.
    """
    verify_kit(coordinator_folder(kit))
    federation = FederationFile.load(kit / FEDERATION)
    roster, now = Roster.read(kit / ROSTER, kit / CA_CERTIFICATE), datetime.now(UTC)
    sites = roster.active(now)
    deployed = deployed_study(study, sites, quorum=federation.quorum, gone=gone(roster, now))
    task = _probed_task(deployed.study)
    return plan_deployment(deployed, task, sites, states=_states(kit), quorum=federation.quorum)


def gone(roster: Roster, now: datetime) -> tuple[str, ...]:
    """`va is revoked`, of every site that was approved and may not take part at `now`."""
    active = {site.name for site in roster.active(now)}
    latest = {site.name: site for site in roster.sites if site.name not in active}
    return tuple(f"{name} {'expired' if site.revoked is None else 'is revoked'}" for name, site in latest.items())


def deployed_study(study: Study, sites: Sequence[RosterSite], *, quorum: int, gone: Sequence[str] = ()) -> DeployedStudy:
    """The study as real hospitals get it; `sites` are those that may take part, `gone` says who no longer may.

    Raises:
        ConfigurationError: there are too few sites, `rounds.require` is below the quorum or above the number of sites, delta is open and a size unknown, or the study has faults.
    """
    if not sites:
        raise ConfigurationError(
            f"expected sites on the roster, found none that may take part{_told(gone)}", "approve one: 'wardround provision --approve REQUEST'"
        )
    if study.faults is not None:
        raise ConfigurationError("faults: expected none in a deployment, got some", "remove [faults], or simulate the study")
    notes = []
    table = study.to_table()
    if study.federation != Federation():
        notes.append("[federation] was left out: it describes virtual sites; the sites are those on the roster")
    table.pop("federation", None)
    study = Study.from_table(table).replace(privacy={"noise_source": "os"})  # a hospital's noise is never seeded, whatever a study says
    study, note = _hold_to_quorum(study, num_sites=len(sites), quorum=quorum, gone=gone)
    notes += [note] if note else []
    study, note = _with_delta(study, sites)
    notes += [note] if note else []
    study, note = _with_site_delta(study, len(sites))
    notes += [note] if note else []
    return DeployedStudy(study=_with_full_path(study), notes=tuple(notes), warnings=tuple(_warnings(study)))


def _told(gone: Sequence[str]) -> str:
    return f" ({', '.join(gone)})" if gone else ""


def _hold_to_quorum(study: Study, *, num_sites: int, quorum: int, gone: Sequence[str]) -> tuple[Study, str]:
    rounds, note = study.rounds, ""
    if rounds.require != "all" and rounds.require < quorum:
        raise ConfigurationError(
            f"rounds.require: expected at least the federation's quorum, {quorum}, got {rounds.require}",
            "raise rounds.require in the study, or lower quorum in federation.toml and provision again",
        )
    if rounds.require == "all" and rounds.on_missing == "proceed" and quorum > 1:
        study = study.replace(rounds={"require": quorum})
        note = (
            f"rounds.require was 'all' and is {quorum}, the federation's quorum: the study begins with so many sites, and the others may join later"
        )
    required = study.rounds.require
    if required != "all" and required > num_sites:
        named = "rounds.require" if not note else "federation.toml: quorum"
        raise ConfigurationError(
            f"{named}: expected at most the number of sites on the roster that may take part, {num_sites}{_told(gone)}, got {required}",
            "approve more sites ('wardround provision --approve REQUEST'), or ask for fewer",
        )
    asked = num_asked(num_sites, study.strategy.fraction)
    if asked < study.strategy.least_updates:
        raise ConfigurationError(
            f"strategy {study.strategy.name}: expected at least {study.strategy.least_updates} sites asked in a round, got {asked}",
            "approve more sites, or let the strategy need fewer (tolerated, buffer_size)",
        )
    if required != "all" and asked < required:
        raise ConfigurationError(
            f"strategy.fraction: {study.strategy.fraction:g} asks {asked} of {plural(num_sites, 'site')} in a round, fewer than the {required} that must answer",
            "raise strategy.fraction, or ask for fewer with rounds.require (and quorum in federation.toml)",
        )
    return study, note


def _with_delta(study: Study, sites: Sequence[RosterSite]) -> tuple[Study, str]:
    if not study.private or study.privacy.delta is not None:
        return study, ""
    unknown = [site.name for site in sites if site.declared_size is None]
    if unknown:
        raise ConfigurationError(
            f"privacy.delta: expected a value, for {', '.join(unknown)} declared no size from which it could be derived, got none",
            "set privacy.delta in the study, below 1 over the training patients of the largest site",
        )
    delta = default_delta_of_sites([site.declared_size for site in sites if site.declared_size is not None])
    return study.replace(privacy={"delta": delta}), f"privacy.delta is {delta:g}, from the declared sizes"


def _with_site_delta(study: Study, num_sites: int) -> tuple[Study, str]:
    resolved = resolve_site_delta(study, num_sites)
    if resolved == study:
        return study, ""
    key = "delta" if study.privacy.unit == "site" else "site_delta"
    return resolved, f"privacy.{key} is {default_site_delta(num_sites):g}, from the number of sites"


def _with_full_path(study: Study) -> Study:
    """A task's schema file is named by its full path: the study's process works in another folder."""
    return study.replace(task=str(Path(study.task).resolve())) if study.task.endswith(".toml") else study


def _warnings(study: Study) -> list[str]:
    found = []
    if study.privacy.unit == "site":
        found.append(
            "unit = 'site' protects no patient against the coordinator: hospitals whose site.toml does not say allow_site_unit = true refuse it"
        )
    if study.private and not study.noised_statistics:
        found.append(
            "hospitals whose site.toml does not say exact_metrics = true let no metric out, so there may be none to see; "
            "set [privacy] evaluation_epsilon to have them once, with noise, of the final model"
        )
    if not (study.task.endswith(".toml") or ":" in study.task):
        return found
    what = f"the file {study.task} is at the same path" if study.task.endswith(".toml") else f"the package of {study.task} is installed"
    return [*found, f"the task is no built-in one: a site can take part only where {what}, and its site.toml allows the task by that name"]


def plan_deployment(deployed: DeployedStudy, task: "Task", sites: Sequence[RosterSite], *, states: dict[str, str], quorum: int) -> DeploymentPlan:
    """What the study means at these sites.

    Raises:
        ConfigurationError: it cannot be at one of them, which is named.
    """
    from shared.models import get_parameters

    study = deployed.study
    parameters = get_parameters(task.model())
    rounds = study.rounds.count * study.evaluation.folds
    down = sum(value.nbytes for value in parameters.values())
    statistics = 0 if study.noised_statistics else sum(8 * math.prod(shape) for shape in task.statistics.values())  # float64
    return DeploymentPlan(
        deployed=deployed,
        task=task.name,
        num_parameters=sum(value.size for value in parameters.values()),
        rounds=rounds,
        quorum=quorum,
        sites=tuple(
            PlannedSite(name=site.name, state=states.get(site.name, UNKNOWN_STATE), declared_size=site.declared_size, plan=_plan_at(study, site))
            for site in sorted(sites, key=lambda site: site.name)
        ),
        down_bytes=down,
        up_bytes=down + statistics,
        leaves=tuple(_leaves(study, task, rounds=rounds, num_bytes=down)),
        deadline_seconds=study.rounds.deadline_seconds * (1 + rounds + study.evaluation.folds),
    )


def _plan_at(study: Study, site: RosterSite) -> SitePlan | None:
    if site.declared_size is None:
        return None
    try:
        return plan_site(study, site.declared_size)
    except ConfigurationError as error:
        raise ConfigurationError(f"site {site.name}: {error.what}", error.remedy) from None


def _leaves(study: Study, task: "Task", *, rounds: int, num_bytes: int) -> Iterator[str]:
    """What the study asks for; a site's policy may keep statistics back, or refuse."""
    view = View.of(study)
    yield "once: the declared numbers of training and test patients in site.toml"
    yield f"in each of {rounds} rounds: an update of the model, {num_bytes:,} bytes, {view.in_short}; what was spent; a hash of the ledger"
    if view.remark:
        yield view.remark
    if study.site_level:
        clipped = "clips and noises by site" if study.secure_aggregation is None else "noises by site, of updates that the sites clipped,"
        yield f"not by a site: each round's mean, which the coordinator {clipped} before anybody sees it"
    when = "once, with the final model, with noise" if study.noised_statistics else "in each round, exact"
    for name in sorted({metric.statistic.name for metric in task.metrics}):
        metrics = ", ".join(metric.name for metric in task.metrics if metric.statistic.name == name)
        yield f"{when}, as far as the site's policy lets it: sums over test patients for {metrics}"


def _states(kit: Path) -> dict[str, str]:
    """How each site is, by name; none where no coordinator runs to tell."""
    with contextlib.suppress(ConnectionFailedError):
        return {site.name: site.state for site in coordinator_status(kit).sites}
    return {}


def _probed_task(study: Study) -> "Task":
    from shared.root_log import root_log_unchanged

    with root_log_unchanged():
        from client.private_probe import probe_model
        from shared.task import resolve_task

        task = resolve_task(study.task)
        probe_model(task, study)
    return task


def submit(kit: Path, study: Study, token: str, *, pause: Callable[[float], None] = time.sleep) -> str:
    """The name of the run, made once however often this is tried with the same token.

    Raises:
        ConnectionFailedError: the coordinator did not answer in `TRIES` tries; the remedy gives the token for another.
        WardroundError: the coordinator's refusal.
    """
    from server.control import SubmitRequest, ask_coordinator

    request = SubmitRequest(study=study.to_table(), token=token)
    for attempt in range(1, TRIES + 1):
        try:
            return ask_coordinator(coordinator_folder(kit) / STATE, "/studies", request)
        except ConnectionFailedError as error:
            failed = error
            if attempt < TRIES:
                logger.info("try %d of %d: %s", attempt, TRIES, error.what)
                pause(PAUSE_SECONDS)
    raise ConnectionFailedError(failed.what, f"{failed.remedy}; then submit again with --token {token}, which never makes a second run")


def ask(kit: Path, run: str, verb: str) -> None:
    """Have the running coordinator `stop` or `resume` a run.

    Raises:
        ConnectionFailedError: none runs, or it does not answer.
        WardroundError: its refusal.
    """
    from server.control import ask_coordinator

    ask_coordinator(coordinator_folder(kit) / STATE, f"/studies/{run}/{verb}")

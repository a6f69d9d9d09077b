"""How the plan of a study, a run's state and the lines of a watched run are printed."""

from typing import TYPE_CHECKING

from server.status import LATE, NOT_THERE
from shared.study import SHORT_HASH
from shared.view import View
from wardround.cli.output import number, report_error, table
from wardround.plural import plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from server.status import StudyStatus
    from shared.results import Interval
    from wardround.deployed_runs import DeployedRun
    from wardround.deployment import DeploymentPlan, PlannedSite
    from wardround.watching import Event, Noted, RoundDone, StudyEnded


def print_plan(plan: "DeploymentPlan", terminal: "Console") -> None:
    """What would happen, for the people who decide on it."""
    study, num_sites = plan.deployed.study, len(plan.sites)
    privacy = study.privacy
    budget = f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else f"noise multiplier {privacy.noise_multiplier}"
    view = View.of(study)
    promise = f"{budget} for each {privacy.unit} at delta {privacy.delta:g}" if privacy.unit != "none" else f"NO PRIVACY: {view.plainly}"
    if view.shared:
        promise += f", {view.against}"
    if privacy.unit == "site":
        promise += f", against everybody but the coordinator: NO PRIVACY FOR PATIENTS there, {view.plainly}"
    if privacy.site_epsilon is not None:
        promise += (
            f"; and epsilon {privacy.site_epsilon:g} for each whole site at delta {privacy.site_delta:g}, against everybody but the coordinator"
        )
    required = "all sites" if study.rounds.require == "all" else f"at least {plural(study.rounds.require, 'site')}"
    up, down = plan.up_bytes, plan.down_bytes
    facts = [
        ["hash", f"{study.fingerprint()[:SHORT_HASH]}   hospitals see the same when they approve it"],
        ["task", plan.task],
        ["model", plural(plan.num_parameters, "parameter")],
        ["strategy", study.strategy.name],
        ["rounds", f"{study.rounds.count}" + (f" in each of {study.evaluation.folds} folds" if study.evaluation.folds > 1 else "")],
        ["a round needs", f"{required} within {study.rounds.deadline}; for missing ones: {study.rounds.on_missing}"],
        ["privacy", promise],
        ["bytes a round", f"{_bytes(down)} down, {_bytes(up)} up a site; {_bytes((up + down) * num_sites)} in all"],
        ["bytes in all", _bytes((up + down) * num_sites * plan.rounds)],
        ["all deadlines", f"{_duration(plan.deadline_seconds)} at most, with enrolment and closing evaluation"],
    ]
    terminal.print(f"plan of study {study.name}", style="bold", markup=False)
    for name, text in facts:
        terminal.print(f"  {name:<14} {text}", markup=False)
    terminal.print()
    columns = ["site", "state", "declared", "noise", "rate", "steps", "epsilon"]
    terminal.print(table("sites on the roster", columns, [_site_row(site) for site in plan.sites]))
    terminal.print()
    terminal.print("what the study asks every site to let out (its policy may keep more back)", style="bold")
    for line in plan.leaves:
        terminal.print(f"- {line}", markup=False)
    print_remarks(plan, terminal)


def _site_row(site: "PlannedSite") -> list[str]:
    numbers = site.plan
    row = [site.name, site.state, "-" if site.declared_size is None else str(site.declared_size)]
    if numbers is None:
        return [*row, "-", "-", "-", "-"]
    steps = numbers.planned_steps
    return [*row, number(numbers.noise_multiplier, 2), number(numbers.sample_rate), str(steps), number(numbers.epsilon, 2)]


def print_remarks(plan: "DeploymentPlan", terminal: "Console") -> None:
    """What was changed in the study, and what may go wrong."""
    for note in plan.deployed.notes:
        terminal.print(f"note: {note}", markup=False, style="dim")
    for warning in plan.deployed.warnings:
        terminal.print(f"WARN {warning}", markup=False, style="yellow")


def print_run(run: "DeployedRun", status: "StudyStatus", terminal: "Console") -> None:
    """A run: what it is, how far, each site's last answer and epsilon, and where its files are."""
    from wardround.cli.output import with_interval

    last = status.history[-1] if status.history else None
    metric = "-" if last is None or status.metric is None else f"{status.metric.upper()} {with_interval(last.value, _interval(last.low, last.high))}"
    terminal.print(f"{run.name}: {status.state}", style="bold", markup=False)
    for name, text in (
        ("study", f"{status.study}, task {status.task}"),
        ("hash", f"{run.study.fingerprint()[:SHORT_HASH]}   hospitals see the same when they approve it"),
        ("submitted", f"{status.submitted.astimezone():%Y-%m-%d %H:%M}"),
        ("rounds", f"{status.round} of {status.rounds}" + (f", fold {status.fold} of {status.folds}" if status.folds > 1 else "")),
        ("metric", metric),
        ("folder", str(run.path)),
    ):
        terminal.print(f"  {name:<10} {text}", markup=False, soft_wrap=True)
    if status.sites:
        terminal.print()
        rows = [[site.name, site.status, number(site.epsilon, 2)] for site in status.sites]
        terminal.print(table("sites, in the last round", ["site", "answer", "epsilon"], rows))
        for site in status.sites:
            if site.reason:
                terminal.print(f"{site.name}: {site.reason}", style="yellow", markup=False)
    if status.error is not None:
        terminal.print(f"\n{status.error.code}: {status.error.what}", style="red", markup=False)
        if status.error.remedy:
            terminal.print(f"  what to do: {status.error.remedy}", markup=False)


class WatchLines:
    """Prints the events of a watched run; what keeps a site away is said once, not every round."""

    def __init__(self, terminal: "Console") -> None:
        self._terminal = terminal
        self._told: set[str] = set()

    def tell(self, event: "Event") -> None:
        """Print one event."""
        from wardround.watching import CoordinatorSeen, Noted, RoundDone, StateChanged, StudyEnded

        match event:
            case StateChanged():
                self._terminal.print(f"{event.run}: {event.state}", style="dim", markup=False)
            case Noted():
                self._print_note(event)
            case RoundDone():
                self._terminal.print(round_line(event), markup=False)
                self._print_reasons({site.name: f"{site.status}: {site.reason}" for site in event.sites if site.reason})
            case CoordinatorSeen():
                text = "the coordinator runs again" if event.running else "WARN no coordinator runs: nothing goes on until it is started"
                self._terminal.print(text, style="yellow", markup=False)
            case StudyEnded():
                self._print_end(event)

    def _print_note(self, event: "Noted") -> None:
        if event.level == "warning":
            if event.text not in self._told:
                self._told.add(event.text)
                self._terminal.print(f"  {event.text}", style="yellow", markup=False)
            return
        head, _, rest = event.text.partition("; ")
        self._terminal.print(head, style="dim", markup=False)
        for reason, sites in by_reason(rest.replace(LATE, NOT_THERE)).items():  # nobody was late for a study that has not begun
            self._terminal.print(f"  {', '.join(sites)}: {reason}", style="yellow", markup=False)

    def _print_reasons(self, reasons: "Mapping[str, str]") -> None:
        """What is new of a site, with all sites of which the same is new in one line."""
        new = {name: reason for name, reason in reasons.items() if f"{name}: {reason}" not in self._told}
        self._told |= {f"{name}: {reason}" for name, reason in new.items()}
        for reason in dict.fromkeys(new.values()):
            sites = ", ".join(name for name in new if new[name] == reason)
            self._terminal.print(f"  {sites}: {reason}", style="yellow", markup=False)

    def _print_end(self, event: "StudyEnded") -> None:
        from wardround.watching import outcome_error

        error = outcome_error(event)
        if error is None:
            final = "" if event.value is None or event.metric is None else f": {_metric(event.metric, event.value, event.ci95)}"
            spent = f", epsilon {max(event.epsilon.values()):.2f} at most" if event.epsilon else ""
            self._terminal.print(f"completed, {plural(event.rounds_completed, 'round')}{final}{spent}", style="bold green", markup=False)
        else:
            report_error(error, as_json=False)


def round_line(event: "RoundDone") -> str:
    """`round 7/30  4 of 5 sites  AUROC 0.81 [0.78, 0.84]  epsilon 1.92/3  0:42`."""
    parts = [f"fold {event.fold}/{event.folds}"] if event.folds > 1 else []
    parts += [f"round {event.round}/{event.rounds}", f"{event.usable} of {plural(event.asked, 'site')}"]
    if event.metric is not None and event.value is not None:
        parts.append(_metric(event.metric, event.value, event.ci95))
    if event.epsilon is not None:
        parts.append(f"epsilon {event.epsilon:.2f}" + (f"/{event.epsilon_asked:g}" if event.epsilon_asked else ""))
    return "  ".join([*parts, clock(event.seconds)])


def clock(seconds: float) -> str:
    """`0:42`, or `1:00:42` from an hour on."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def by_reason(text: str) -> dict[str, list[str]]:
    """`north: late; south: late` as `{"late": ["north", "south"]}`: one line for all who say the same. A reason may hold "; " itself."""
    reasons: dict[str, str] = {}
    name = ""
    for part in text.split("; ") if text else ():
        head, colon, reason = part.partition(": ")
        if colon and " " not in head:
            name = head
            reasons[name] = reason
        elif name:
            reasons[name] += f"; {part}"
    found: dict[str, list[str]] = {}
    for site, reason in reasons.items():
        found.setdefault(reason, []).append(site)
    return found


def _metric(name: str, value: float, interval: "Interval") -> str:
    return f"{name.upper()} {value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval is not None else "")


def _interval(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _bytes(count: int) -> str:
    """`1.2 MB`."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _duration(seconds: float) -> str:
    """`12 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"

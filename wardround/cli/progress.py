"""One line a round: `round 7/30  4 of 5 sites  AUROC 0.81 [0.78, 0.84]  epsilon 1.9/3.0  0:42`, under a bar on a terminal."""

import logging
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wardround.cli.output import with_interval

if TYPE_CHECKING:
    from shared.results import Interval, MetricValues, Result, RoundRecord
    from shared.study import Study

ANNOUNCING_ROOM = "simulations"
BUFFERED = (
    "a fedbuff round is judged by those sites that answered its own model, where there are any; the last line is the final model, judged by all"
)


class AnnouncementHandler(logging.Handler):
    """Prints what the simulation says of itself between rounds."""

    def __init__(self, terminal: Console) -> None:
        super().__init__(level=logging.INFO)
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Print information; errors are printed once, by the command itself."""
        if record.levelno == logging.INFO:
            self._terminal.print(record.getMessage(), style="dim", markup=False)


class RoundLines:
    """Prints a round's line when the model it made has been evaluated: with the next round's message, or at the end."""

    def __init__(self, study: "Study", terminal: Console) -> None:
        self._study = study
        self._terminal = terminal
        self._started = time.monotonic()
        self._pending: RoundRecord | None = None
        self._handler = AnnouncementHandler(terminal)
        self._told: set[str] = set()  # why a site is missing is said once, not every round
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=terminal,
            transient=True,
            disable=not terminal.is_terminal,
        )
        self._bar_task = self._bar.add_task("rounds", total=study.rounds.count * study.evaluation.folds, rate="")

    def __enter__(self) -> "RoundLines":
        if self._study.strategy.name == "fedbuff":
            self._terminal.print(BUFFERED, style="dim", soft_wrap=True)
        logging.getLogger(ANNOUNCING_ROOM).addHandler(self._handler)
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        logging.getLogger(ANNOUNCING_ROOM).removeHandler(self._handler)

    def observe(self, record: "RoundRecord") -> None:
        """Take a round's record; print the line of the round before."""
        if self._pending is not None:
            evaluated = record.fold == self._pending.fold
            self._print(self._pending, record.metrics if evaluated else {}, record.metrics_ci95 if evaluated else {})
        self._pending = record
        num_asked = sum(site.status != "not asked" for site in record.sites)
        self._bar.update(self._bar_task, advance=1, rate=f"{num_asked / max(record.seconds, 1e-9):,.0f} sites a second")

    def finish(self, result: "Result") -> None:
        """Print the line of the last round, with the final model's metrics."""
        if self._pending is not None:
            metrics = result.folds[-1] if result.folds else result.metrics["federated"]
            self._print(self._pending, metrics, {} if result.folds else result.metrics_ci95.get("federated", {}))
            self._pending = None

    def _print(self, record: "RoundRecord", metrics: "MetricValues", intervals: "dict[str, Interval]") -> None:
        asked = [site for site in record.sites if site.status != "not asked"]
        usable = sum(site.status == "ok" for site in asked)
        parts = [f"round {record.round}/{self._study.rounds.count}", f"{usable} of {len(asked)} sites"]
        if self._study.evaluation.folds > 1:
            parts.insert(0, f"fold {record.fold}/{self._study.evaluation.folds}")
        name = next(iter(intervals), next(iter(metrics), None))
        if name is not None:
            parts.append(f"{name.upper()} {with_interval(metrics[name], intervals.get(name))}")
        spent = [site.epsilon for site in record.sites if site.epsilon is not None]
        if spent:
            budget = f"/{self._study.privacy.epsilon:g}" if self._study.privacy.epsilon else ""
            parts.append(f"epsilon {max(spent):.2f}{budget}")
        seconds = int(time.monotonic() - self._started)
        parts.append(f"{seconds // 60}:{seconds % 60:02d}")
        self._terminal.print("  ".join(parts), markup=False)
        for site in asked:
            told = f"{site.name}: {site.status}: {site.reason}" if site.status != "ok" else f"{site.name}: no statistics: {site.reason}"
            if site.reason and told not in self._told:
                self._told.add(told)
                self._terminal.print(f"  {told}", style="yellow", markup=False)

"""Options that several commands share, and how they change a study."""

import inspect
from pathlib import Path
from typing import Annotated, TypeVar

import click
import typer
from typer.models import ArgumentInfo

from shared.errors import ConfigurationError

T = TypeVar("T")

StudyArgument = Annotated[
    str | None, typer.Argument(metavar="[STUDY]", help="A study's TOML file, or the name of a shipped study.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON envelope on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SitesOption = Annotated[int | None, typer.Option("--sites", metavar="N", help="Number of virtual sites.")]
RoundsOption = Annotated[int | None, typer.Option("--rounds", metavar="R", help="Rounds of training.")]
EpsilonOption = Annotated[str | None, typer.Option("--epsilon", metavar="E|none", help="The study's budget at each site, or no privacy.")]
TaskOption = Annotated[str | None, typer.Option("--task", metavar="T", help="Run the study shipped with a task, or use another task.")]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="S", help="Seed of everything in a simulation.")]

DEFAULT_STUDY = "breast-cancer"


def restore_argument_help(command: click.Command) -> None:
    """Give every argument of `command` and of what is below it the help that its signature has.

    Typer up to 0.20 sets it before it calls click's constructor, and that of click 8.5 sets it to nothing.
    """
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        restore_argument_help(below)
    declared = inspect.signature(command.callback).parameters if command.callback is not None else {}
    for argument in command.params:
        if isinstance(argument, click.Argument) and argument.name in declared:
            told = [info.help for info in getattr(declared[argument.name].annotation, "__metadata__", ()) if isinstance(info, ArgumentInfo)]
            argument.help = next(iter(told), None)


def overrides(*, sites: int | None, rounds: int | None, epsilon: str | None, task: str | None, seed: int | None) -> dict[str, object]:
    """The options given, as a study's tables; what was not given is absent."""
    changes: dict[str, object] = {}
    if sites is not None:
        changes["federation"] = {"sites": sites}
    if rounds is not None:
        changes["rounds"] = {"count": rounds}
    if epsilon is not None:
        changes["privacy"] = {"unit": "none"} if epsilon.lower() == "none" else {"epsilon": parse_epsilon(epsilon)}
    if task is not None:
        changes["task"] = task
    if seed is not None:
        changes["seed"] = seed
    return changes


def parse_epsilon(text: str) -> float:
    """The number in `--epsilon`.

    Raises:
        ConfigurationError: it is neither a number nor "none".
    """
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"--epsilon: expected a number above zero or 'none', got {text!r}", "for example --epsilon 3") from None


def study_table(name: str | None, task: str | None) -> tuple[dict[str, object], str]:
    """The tables of the study meant, and what stands as its source in messages.

    A name that is a file is that file; else it is a shipped study. With no study, `--task T` means the study shipped with the task, or
    its named sites (or five) at epsilon 3 where none is.
    """
    from shared.config import read_toml
    from wardround.studies import shipped_study

    if name is None and task is not None:
        from shared.schema import TableSchema
        from shared.task import resolve_task

        resolved = resolve_task(task)
        if resolved.default_study is None:
            named_sites = isinstance(resolved.schema, TableSchema) and resolved.schema.site is not None
            federation: dict[str, object] = {"partition": "natural"} if named_sites else {"sites": 5}
            return {
                "name": resolved.name,
                "task": task,
                "training": {"learning_rate": 0.5},
                "privacy": {"epsilon": 3.0},
                "federation": federation,
            }, "default study"
        name = Path(resolved.default_study).stem
    name = name or DEFAULT_STUDY
    path = Path(name)
    if not (path.is_file() or path.suffix == ".toml" or len(path.parts) > 1):
        path = shipped_study(name)
    return read_toml(path), str(path)

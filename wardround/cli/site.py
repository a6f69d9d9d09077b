"""`wardround site`: init here, and the nouns of a hospital's daily life beside it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from wardround.cli import checking, site_approve, site_model, site_running
from wardround.cli.options import DebugOption, JsonOption

if TYPE_CHECKING:
    from collections.abc import Callable

    from client.kit import Scalar, SiteAnswers, TakenUp

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

KitArgument = Annotated[Path, typer.Argument(metavar="KIT", help="The site's kit: its folder, or its zip.", show_default=False)]


@app.command("init")
def init(
    path: KitArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where a zip is unpacked; default: beside it.")] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="PATH", help="The cohort: a file or a folder.")] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="T", help="The clinical problem that may be studied.")] = None,
    declared_size: Annotated[int | None, typer.Option("--declared-size", metavar="N", help="Training patients, rounded; it becomes public.")] = None,
    declared_test_size: Annotated[int | None, typer.Option("--declared-test-size", metavar="N", help="Test patients, rounded.")] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", metavar="E", help="The cohort's privacy budget, over all studies together.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the task's loader; repeat.")] = None,
    wizard: Annotated[bool, typer.Option("--wizard", help="Ask for what was not given.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take up a kit: make the site's own keys, describe its cohort in site.toml, and write the request that the coordinator approves."""
    from client.kit import SiteAnswers, init_site, unpack_kit
    from shared.errors import UsageError

    answers = SiteAnswers(
        data=data,
        task=task,
        declared_size=declared_size,
        declared_test_size=declared_test_size,
        epsilon=epsilon,
        options=dict(map(_parse_option, option or [])),
    )
    folder = path
    if path.suffix == ".zip" and not path.is_dir():
        folder = out or path.parent / path.stem
        unpack_kit(path, folder)
    elif out is not None:
        raise UsageError("--out: expected a zip to unpack there, got a folder", "leave --out away: a folder is used where it is")
    if wizard:
        answers = _ask(answers)
    taken = init_site(folder, answers)
    _print(taken, units=_write_units(taken), as_json=as_json)


def _write_units(taken: "TakenUp") -> str:
    """Where the texts for an administrator are, or why they could not be made: nothing hangs on them."""
    from client.installation import write_site_units
    from shared.errors import ConfigurationError

    assert taken.manifest.site is not None
    try:
        return f"to keep it running (systemd, Compose, the courier's own user): {write_site_units(taken.folder, taken.manifest.site)}"
    except ConfigurationError as error:
        return f"no systemd or Compose file was written: {error.what}; {error.remedy}"


def _parse_option(text: str) -> "tuple[str, Scalar]":
    """Key and value of `--option`: true, false and numbers as such, all else as text."""
    from shared.errors import UsageError

    key, separator, value = text.partition("=")
    if not key or not separator:
        raise UsageError(f"--option: expected KEY=VALUE, got {text!r}", "for example --option encoding=latin-1")
    if value in ("true", "false"):
        return key, value == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def _ask(answers: "SiteAnswers") -> "SiteAnswers":
    """The answers with those that are missing, from the terminal; a wrong one is asked for again."""
    import dataclasses

    data, task = _ask_cohort(answers)
    size, test_size, epsilon = answers.declared_size, answers.declared_test_size, answers.epsilon
    if size is None:
        size = _prompt("Training patients, rounded (it becomes public)", lambda text: _count(text, least=2))
    if test_size is None:
        test_size = _prompt("Test patients, rounded", lambda text: _count(text, least=0), default="0")
    if epsilon is None:
        epsilon = _prompt("Privacy budget epsilon, over all studies together", _budget, default="3")
    return dataclasses.replace(answers, data=data, task=task, declared_size=size, declared_test_size=test_size, epsilon=epsilon)


def _ask_cohort(answers: "SiteAnswers") -> tuple[Path, str]:
    """Data and task that fit each other, as far as this can be asked for: what was given as an option is taken as it is."""
    from client.kit import check_cohort
    from shared.errors import WardroundError
    from shared.task import task_names

    while True:
        data = answers.data or _prompt("The cohort (a file or a folder)", _existing)
        task = answers.task or _prompt(f"The task ({', '.join(task_names())}, or a schema .toml)", _known_task)
        try:
            check_cohort(task, data, answers.options)
            return data, task
        except WardroundError as error:
            if answers.data is not None and answers.task is not None:
                raise
            typer.echo(f"Error: {error}", err=True)


def _prompt(text: str, parse: "Callable[[str], T]", *, default: str | None = None) -> "T":
    """What was typed, once `parse` takes it."""
    import click

    from shared.errors import WardroundError

    def parsed(typed: str) -> "T":
        try:
            return parse(typed)
        except WardroundError as error:
            raise click.UsageError(str(error)) from None  # which the prompt prints, and asks again

    try:
        answer: T = typer.prompt(text, default=default, value_proc=parsed, err=True)
    except typer.Abort:
        typer.echo(err=True)  # the question's line ends
        raise
    return answer


def _existing(text: str) -> Path:
    from shared.errors import DataMissingError

    path = Path(text.strip()).expanduser()
    if not text.strip() or not path.exists():
        raise DataMissingError(f"{text}: expected data, found nothing", "give the path of a file or folder")
    return path


def _known_task(text: str) -> str:
    from shared.task import resolve_task

    resolve_task(text.strip())
    return text.strip()


def _count(text: str, *, least: int) -> int:
    from shared.errors import UsageError

    if not text.strip().isdecimal() or int(text) < least:
        raise UsageError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def _budget(text: str) -> float:
    from shared.errors import UsageError

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"expected a number above 0, got {text!r}")
    return value


def _print(taken: "TakenUp", *, units: str, as_json: bool) -> None:
    """What was made and what comes next."""
    from shared.certificates import grouped
    from wardround.cli.output import console, print_envelope

    manifest, request, terminal = taken.manifest, taken.request, console(as_json=as_json)
    coordinator = f"{manifest.coordinator.hosts[0]}, port {manifest.coordinator.port}"
    terminal.print(f"{manifest.site} in {manifest.federation}: kit of generation {manifest.generation}, coordinator {coordinator}", markup=False)
    for note in taken.notes:
        terminal.print(f"note: {note}", markup=False)
    terminal.print("Compare both with the coordinator over the phone:")
    terminal.print(f"  CA       {grouped(taken.ca_fingerprint)}")
    terminal.print(f"  request  {grouped(request.fingerprint)}")
    next_steps = [
        f"send {taken.folder / 'request.json'} to the coordinator (it holds no private key)",
        *([] if taken.site_file else [f"describe the cohort in {taken.folder / 'site.toml'}"]),
        f"when approved: wardround site check {taken.folder}, then wardround site start {taken.folder}",
    ]
    for number, step in enumerate(next_steps, start=1):
        terminal.print(f"{number}. {step}", markup=False)
    terminal.print(units, markup=False)
    if as_json:
        print_envelope(
            {
                "kit": str(taken.folder),
                "site": manifest.site,
                "federation": manifest.federation,
                "generation": manifest.generation,
                "expires": manifest.expires.isoformat(),
                "ca_fingerprint": taken.ca_fingerprint,
                "request": str(taken.folder / "request.json"),
                "fingerprint": request.fingerprint,
                "declared_size": request.declared_size,
                "site_file": str(taken.site_file) if taken.site_file else None,
                "notes": list(taken.notes),
                "units": units,
                "next": next_steps,
            }
        )


app.command("check")(checking.check)
app.command("model")(site_model.model)
app.command("start")(site_running.start)
app.command("status")(site_running.status)
app.command("stop")(site_running.stop)
app.command("approve")(site_approve.approve)

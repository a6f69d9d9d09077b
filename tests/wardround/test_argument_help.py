"""Every argument of every command says what it is."""

from collections.abc import Iterator

import click

from tests.wardround.conftest import Command
from wardround.__main__ import _command


def leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every verb below a noun, with what is typed for it."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from leaves(below, f"{path} {name}")


def test_no_argument_is_without_a_word() -> None:
    arguments = [(path, part) for path, verb in leaves(_command(), "wardround") for part in verb.params if isinstance(part, click.Argument)]
    assert len(arguments) > 30
    assert [f"{path} {part.name}" for path, part in arguments if not getattr(part, "help", None)] == []


def test_help_shows_it(command: Command) -> None:
    shown = " ".join(command("sweep", "--help").out.replace("│", " ").split())
    assert "A sweep's TOML file, or its folder to go on with it." in shown

"""`python -m wardround` and the `wardround` command: run, and turn every error into a code, a line of what and one of what to do."""

import functools
import sys
import traceback
from typing import TYPE_CHECKING

from shared.errors import INTERRUPTED_EXIT_CODE, UsageError, WardroundError
from wardround.quiet import switch_off_telemetry

if TYPE_CHECKING:
    import click


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """The exit code of one command."""
    switch_off_telemetry()
    import click

    from wardround.cli.output import report_error, report_interruption

    as_json, debug, verb = "--json" in arguments, "--debug" in arguments, next(iter(arguments), "")
    try:
        code = _command().main(args=arguments, prog_name="wardround", standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # what typer makes of Ctrl-C
            return report_interruption(verb, as_json=as_json)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        if not as_json:
            error.show()
            return UsageError("").exit_code
        return report_error(UsageError(error.format_message(), "see --help"), as_json=True)
    except WardroundError as error:
        if debug:
            traceback.print_exc()
        return report_error(error, as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return report_interruption(verb, as_json=as_json)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        unexpected = WardroundError(
            f"an unexpected {type(error).__name__} stopped the command", "run it again with --debug and report what it prints"
        )
        return report_error(unexpected, as_json=as_json)


@functools.cache
def _command() -> "click.Command":
    """Every verb, read from its signature once in a process."""
    import typer

    from wardround.cli.app import app
    from wardround.cli.options import restore_argument_help

    command = typer.main.get_command(app)
    restore_argument_help(command)
    return command


if __name__ == "__main__":
    main()

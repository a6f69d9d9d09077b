"""What a check of an installation found: PASS, WARN or FAIL, each with what to do about it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.errors import WardroundError

Level = Literal["PASS", "WARN", "FAIL"]
Check = Callable[[], Iterable["Finding"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a check; `exit_code` is that of a command which found nothing worse before it."""

    check: str = ""
    level: Level
    what: str
    fix: str = ""
    exit_code: int = 0
    cause: Exception | None = None  # of a FAIL that nobody foresaw

    def to_table(self) -> dict[str, object]:
        """For the envelope."""
        return {"check": self.check, "level": self.level, "what": self.what, "fix": self.fix, "exit_code": self.exit_code}


class NotLookedAtError(Exception):
    """A check needs what another one has found missing."""


def passed(what: str) -> Finding:
    """A PASS."""
    return Finding(level="PASS", what=what)


def warned(what: str, fix: str) -> Finding:
    """A WARN."""
    return Finding(level="WARN", what=what, fix=fix)


def failed(what: str, fix: str, *, exit_code: int = 1) -> Finding:
    """A FAIL."""
    return Finding(level="FAIL", what=what, fix=fix, exit_code=exit_code)


def failure_of(error: WardroundError) -> Finding:
    """A FAIL that says what an error of ours says."""
    return failed(error.what, error.remedy, exit_code=error.exit_code)


def run_checks(checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """What each check finds, in order, as it is found; one that raises is a FAIL, and hides none that comes after."""
    for name, check in checks:
        yield from run_check(name, check)


def run_check(name: str, check: Check) -> Iterator[Finding]:
    """What one check finds, under its name."""
    try:
        for finding in check():
            yield dataclasses.replace(finding, check=name)
    except NotLookedAtError as error:
        yield dataclasses.replace(warned(f"not looked at: {error}", "mend that first"), check=name)
    except WardroundError as error:
        yield dataclasses.replace(failure_of(error), check=name)
    except Exception as error:
        unforeseen = failed(f"an unexpected {type(error).__name__} stopped this check", "run it again with --debug and report what it prints")
        yield dataclasses.replace(unforeseen, check=name, cause=error)


def exit_code_of(findings: Iterable[Finding]) -> int:
    """That of the first FAIL; 0 without one."""
    return next((finding.exit_code for finding in findings if finding.level == "FAIL"), 0)

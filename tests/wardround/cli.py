"""Running the command line in this process, as the tests of every command do."""

import json
from dataclasses import dataclass

import pytest

from wardround.__main__ import run


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> dict[str, object]:
        """The data of the one envelope on stdout."""
        lines = self.out.strip().splitlines()
        assert len(lines) == 1, "exactly one JSON object"
        envelope = json.loads(lines[0])
        assert envelope["schema_version"] == 1
        assert envelope["exit_code"] == self.code
        assert (envelope["status"] == "ok") == (self.code == 0)
        data: dict[str, object] = envelope["data"]
        return data


def wardround(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run `wardround ARGUMENTS`."""
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return Outcome(code=code, out=printed.out, err=printed.err)

"""The coordinator's loop: what is started is written down, and only where it can be; a study that gets on may be started ever again."""

import os
from pathlib import Path

import pytest

from server.service import MAX_ATTEMPTS, Service
from server.submissions import Submissions
from shared.errors import StorageError
from shared.study import Study
from tests.provisioned import provisioned

STUDY = {"name": "s", "task": "heart-disease", "purpose": "a test", "privacy": {"epsilon": 1.0, "delta": 1e-4}}


class Link:
    """A SuperLink whose runs end at once."""

    def __init__(self) -> None:
        self.started, self.running = 0, set[int]()

    def nodes(self) -> list[object]:
        return []

    def active_runs(self) -> set[int]:
        return self.running

    def start_run(self, run: str) -> int:
        self.started += 1
        self.running = {self.started}
        return self.started

    def stop_run(self, flower_run: int) -> None:
        self.running.discard(flower_run)

    def close(self) -> None: ...


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    provisioned(tmp_path)
    made = Service(tmp_path / "coordinator")
    made._superlink.close()
    monkeypatch.setattr(made, "_superlink", Link())
    return made


def submitted(service: Service) -> str:
    return service._submissions.submit(Study.from_table(STUDY), "token-token")


def test_what_cannot_be_written_down_is_not_started(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    link, run, write = service._superlink, submitted(service), Submissions._write
    service._settle(set())
    left = 0

    def full(path: Path, submission: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise StorageError("full", "free space")
        write(path, submission)  # type: ignore[arg-type]

    monkeypatch.setattr(Submissions, "_write", staticmethod(full))
    for room, started in ((0, 0), (0, 0), (1, 1), (1, 2)):  # for so many writes
        left = room
        with pytest.raises(StorageError):
            service.tick()
        assert (link.started, link.running) == (started, set())  # type: ignore[attr-defined]  # one that could not be noted was stopped
    monkeypatch.undo()
    monkeypatch.setattr(service, "_superlink", link)
    service.tick()
    assert service._submissions.get(run).flower_run == 3
    service.tick()
    assert link.started == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("gets_on", [False, True])
def test_only_a_study_that_gets_no_further_is_given_up(service: Service, gets_on: bool) -> None:
    link, run = service._superlink, submitted(service)
    checkpoint = service._submissions.path(run) / "checkpoint" / "latest.safetensors"
    for number in range(2 * MAX_ATTEMPTS):
        service.tick()
        if gets_on:
            checkpoint.touch()
            os.utime(checkpoint, ns=(0, number + 1))
        service.tick()
        link.running.clear()  # type: ignore[attr-defined]  # its process dies
    service.tick()
    expected = ("running", 2 * MAX_ATTEMPTS + 1) if gets_on else ("failed", MAX_ATTEMPTS)
    assert (service._submissions.get(run).state, link.started) == expected  # type: ignore[attr-defined]

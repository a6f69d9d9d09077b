"""A submission is made once however often it is sent, and a run is only ever one of this coordinator's folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from server.run_folder import RunFolder
from server.submissions import ENDED, STOP, SUBMISSION, UNFINISHED, Submissions
from shared.errors import ConfigurationError, StorageError
from shared.study import Study

TOKEN = "a-token-of-its-own"
RUN = "tests-20300101T000000Z-abcd"


def study(**changes: Any) -> Study:
    return Study.from_table({"name": "tests", "task": "breast-cancer", "privacy": {"epsilon": 3.0, "delta": 1e-4}, **changes})


@pytest.fixture
def submissions(tmp_path: Path) -> Submissions:
    return Submissions(tmp_path / "runs")


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "runs").iterdir())


def test_a_submission_is_a_run_s_folder_with_the_study(submissions: Submissions, tmp_path: Path) -> None:
    assert submissions.all() == {}
    run = submissions.submit(study(), TOKEN)
    assert folders(tmp_path) == [run]
    assert submissions.folder(run).study == study()
    assert submissions.get(run).state == "queued"
    assert Submissions(tmp_path / "runs").all() == submissions.all()


def test_a_retry_names_the_first_run_whatever_became_of_it(submissions: Submissions, tmp_path: Path) -> None:
    run = submissions.submit(study(), TOKEN)
    assert submissions.submit(study(), TOKEN) == run
    submissions.update(run, state="failed")
    assert Submissions(tmp_path / "runs").submit(study(), TOKEN) == run
    assert folders(tmp_path) == [run]
    assert submissions.submit(study(), "another-token") != run


@pytest.mark.parametrize("change", [{"seed": 1}, {"name": "others"}, {"purpose": "x"}])
def test_one_token_is_for_one_study(submissions: Submissions, tmp_path: Path, change: dict[str, Any]) -> None:
    run = submissions.submit(study(), TOKEN)
    with pytest.raises(ConfigurationError, match="another study"):
        submissions.submit(study(**change), TOKEN)
    assert folders(tmp_path) == [run]


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 101, "with spaces", "../../../etc", "a-token-of-its-own\n", "tökentökentöken", "nul\0nul\0nul\0"]
)
def test_a_token_that_is_none_makes_nothing(submissions: Submissions, tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigurationError, match="token"):
        submissions.submit(study(), token)
    assert not (tmp_path / "runs").exists()


NAMES = [
    "",
    ".",
    "..",
    "/",
    "tests",
    "../runs/{run}",
    "{run}/",
    "./{run}",
    "{run}/../{run}",
    "{run}\n",
    "{run}\0",
    "{outside}",
    "/tmp/{run}",
    "x" * 300 + "{run}",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_folder(submissions: Submissions, tmp_path: Path, name: str) -> None:
    run = submissions.submit(study(), TOKEN)
    outside = tmp_path / RUN
    outside.mkdir()
    (outside / SUBMISSION).write_bytes((tmp_path / "runs" / run / SUBMISSION).read_bytes())
    asked = name.format(run=run, outside=f"../{RUN}")
    for act in (submissions.get, submissions.stop, submissions.resume, lambda asked: submissions.update(asked, state="failed")):
        with pytest.raises(ConfigurationError, match="expected a run of this coordinator"):
            act(asked)
    assert not (outside / STOP).exists()
    assert submissions.get(run).state == "queued"


def test_a_folder_without_a_submission_is_no_run(submissions: Submissions, tmp_path: Path) -> None:
    left_over = RunFolder.create(tmp_path / "runs", study()).name  # as a coordinator that was killed in between leaves it
    (tmp_path / "runs" / "lost+found").mkdir()
    assert submissions.all() == {}
    with pytest.raises(ConfigurationError):
        submissions.get(left_over)
    assert submissions.submit(study(), TOKEN) != left_over


@pytest.mark.parametrize("state", [*UNFINISHED, "completed"])
def test_what_is_under_way_or_done_is_not_resumed(submissions: Submissions, state: str) -> None:
    run = submissions.submit(study(), TOKEN)
    submissions.update(run, state=state)
    with pytest.raises(ConfigurationError, match=state):
        submissions.resume(run)
    assert submissions.get(run).state == state


@pytest.mark.parametrize("state", ["failed", "stopped", "interrupted"])
def test_what_was_stopped_or_failed_goes_on_when_resumed(submissions: Submissions, tmp_path: Path, state: str) -> None:
    run = submissions.submit(study(), TOKEN)
    submissions.stop(run)
    folder = tmp_path / "runs" / run
    (folder / ENDED).write_text(json.dumps({"state": state}))
    (folder / "checkpoint" / "latest.safetensors").write_bytes(b"kept")
    ended = submissions.ended(run)
    assert ended is not None
    submissions.update(run, state=ended.state, attempts=5, flower_run=7)
    submissions.resume(run)
    resumed = submissions.get(run)
    assert (resumed.state, resumed.attempts, resumed.flower_run, resumed.error) == ("queued", 0, None, None)
    assert submissions.ended(run) is None
    assert not (folder / STOP).exists()
    assert (folder / "checkpoint" / "latest.safetensors").read_bytes() == b"kept"
    assert submissions.submit(study(), TOKEN) == run


def test_a_stop_is_a_file_that_the_run_s_process_looks_for(submissions: Submissions, tmp_path: Path) -> None:
    run = submissions.submit(study(), TOKEN)
    submissions.stop(run)
    submissions.stop(run)
    assert (tmp_path / "runs" / run / STOP).is_file()


DAMAGE = [b"", b"{", b"null", b"\xff", b'{"token": "a-token-of-its-own"}', b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_submission_is_named(submissions: Submissions, tmp_path: Path, content: bytes) -> None:
    run = submissions.submit(study(), TOKEN)
    (tmp_path / "runs" / run / SUBMISSION).write_bytes(content)
    assert submissions.all() == {}  # and stops no other
    for look in (lambda: submissions.get(run), lambda: submissions.update(run, state="failed"), lambda: submissions.resume(run)):
        with pytest.raises(StorageError, match=run):
            look()
    assert (tmp_path / "runs" / run / SUBMISSION).read_bytes() == content


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_end_is_none_yet(submissions: Submissions, tmp_path: Path, content: bytes) -> None:
    run = submissions.submit(study(), TOKEN)
    (tmp_path / "runs" / run / ENDED).write_bytes(content)
    assert submissions.ended(run) is None  # its process is started again and says it anew


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(StorageError):
        Submissions(tmp_path / "runs").submit(study(), TOKEN)


def test_the_oldest_comes_first(submissions: Submissions) -> None:
    runs = [submissions.submit(study(name=name), f"token-of-{name}") for name in ("zebra", "apple", "mango")]
    assert list(submissions.all()) == runs

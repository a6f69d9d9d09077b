"""The coordinator's status: what a run's files say, from real records and a real run; damage told and never raised; nothing heavy imported."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from server.run_folder import RunFolder
from server.status import MOST_FAULTS, AuditHead, CoordinatorStatus, Failure, HistoryPoint, SiteStatus, StudySite, study_status, waiting_status
from shared.errors import QuorumLostError
from shared.results import Interval, Result, RoundRecord, RunPrivacy, SiteRound, SiteSummary, Status, Timing
from shared.study import Study

SUBMITTED = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)
STUDY = Study.from_table(
    {
        "name": "tiny",
        "task": "tiny",
        "rounds": {"count": 5},
        "privacy": {"unit": "patient", "epsilon": 3.0, "delta": 1e-4},
        "training": {"batch_size": 8},
    }
)
STATUSES: tuple[Status, ...] = ("ok", "refused", "missing", "failed", "not asked", "at work")


def folder_of(tmp_path: Path, records: Sequence[RoundRecord] = (), *, study: Study = STUDY, result: Result | None = None) -> RunFolder:
    folder = RunFolder.create(tmp_path / "runs", study)
    folder.keep_rounds(list(records))
    if result is not None:
        folder.write_result(result)
    return folder


def record(
    number: int, sites: Sequence[SiteRound] = (), *, value: float | None = 0.5, interval: Interval = None, fold: int = 1, seconds: float = 1.0
) -> RoundRecord:
    return RoundRecord(
        round=number,
        fold=fold,
        evaluated_round=number - 1,
        sites=tuple(sites),
        metrics={"auroc": value},
        metrics_ci95={"auroc": interval},
        seconds=seconds,
    )


def result_of(rounds: int, *, value: float | None, interval: Interval = None, folds: Sequence[float] = ()) -> Result:
    return Result(
        run="x", study="tiny", task="tiny", task_title="Tiny", engine="network", seed=1, outcome="completed", synthetic=False,
        sites=[SiteSummary(name="a", num_patients=10, num_train=7, num_test=3)], notes={}, rounds_completed=rounds, primary_metric="auroc",
        metrics={"federated": {"auroc": value, "accuracy": 0.1}}, metrics_ci95={"federated": {"auroc": interval}}, per_site={}, per_site_support={},
        per_site_baselines={}, folds=[{"auroc": each} for each in folds], privacy=RunPrivacy(unit="none", seeded_noise=False, sites={}),
        timing=Timing(total_seconds=1.0, seconds_per_round=[]),
    )  # fmt: skip


# A study's rounds -----------------------------------------------------------------------------------------------------------------


def test_a_study_without_a_folder_and_one_without_rounds_say_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    fresh = study_status(folder, "running", submitted=SUBMITTED)
    assert fresh == waiting_status(STUDY, "running", run=folder.path.name, submitted=SUBMITTED)
    assert (fresh.study, fresh.task, fresh.round, fresh.rounds, fresh.epsilon_asked) == ("tiny", "tiny", 0, 5, 3.0)
    assert (fresh.metric, fresh.history, fresh.sites, fresh.faults, fresh.seconds_per_round) == (None, (), (), (), None)


def test_the_curve_is_by_rounds_of_training_and_ends_with_the_result(tmp_path: Path) -> None:
    """A record speaks of the model before its round: the random one of round 0 is left out, the final one comes from the result."""
    records = [record(1, value=0.1), record(2, value=0.6, interval=(0.5, 0.7)), record(3, value=None)]
    running = study_status(folder_of(tmp_path, records), "running", submitted=SUBMITTED)
    known = (HistoryPoint(round=1, value=0.6, low=0.5, high=0.7), HistoryPoint(round=2, value=None))
    assert (running.metric, running.history, running.round) == ("auroc", known, 3)
    ended = study_status(folder_of(tmp_path, records, result=result_of(3, value=0.8, interval=(0.75, 0.9))), "completed", submitted=SUBMITTED)
    assert ended.history == (*known, HistoryPoint(round=3, value=0.8, low=0.75, high=0.9))


def test_of_a_failed_run_nothing_is_added_to_the_curve(tmp_path: Path) -> None:
    records = [record(1), record(2, value=0.6)]
    status = study_status(folder_of(tmp_path, records, result=result_of(2, value=None)), "failed", submitted=SUBMITTED)
    assert [point.round for point in status.history] == [1]


def test_folds_are_counted_together_and_drawn_one_at_a_time(tmp_path: Path) -> None:
    study = STUDY.replace(rounds={"count": 2}, evaluation={"folds": 3})
    records = [record(number, fold=fold, value=fold + number / 10) for fold in (1, 2) for number in (1, 2)]
    status = study_status(folder_of(tmp_path, records, study=study), "running", submitted=SUBMITTED)
    assert (status.round, status.rounds, status.fold, status.folds) == (4, 6, 2, 3)
    assert status.history == (HistoryPoint(round=1, value=2.2),)
    result = result_of(4, value=9.0, folds=(1.5, 2.5))
    ended = study_status(folder_of(tmp_path, records, study=study, result=result), "interrupted", submitted=SUBMITTED)
    assert ended.history == (HistoryPoint(round=1, value=2.2), HistoryPoint(round=2, value=2.5))


def test_sites_are_those_of_the_last_round_with_the_last_epsilon_told(tmp_path: Path) -> None:
    first = (SiteRound(name="a", status="ok", epsilon=0.5), SiteRound(name="b", status="ok", epsilon=0.7))
    second = (SiteRound(name="a", status="ok", epsilon=0.9), SiteRound(name="b", status="missing", reason="E801 late"))
    status = study_status(folder_of(tmp_path, [record(1, first), record(2, second, seconds=4.0)]), "running", submitted=SUBMITTED)
    expected = (StudySite(name="a", status="ok", epsilon=0.9), StudySite(name="b", status="missing", reason="E801 late", epsilon=0.7))
    assert (status.sites, status.seconds_per_round) == (expected, 2.5)


@given(rounds=st.lists(st.lists(st.sampled_from(STATUSES), max_size=4), max_size=40))
def test_faults_are_all_that_went_wrong_newest_first(tmp_path_factory: pytest.TempPathFactory, rounds: list[list[Status]]) -> None:
    records = [record(n, [SiteRound(name=f"s{i}", status=each) for i, each in enumerate(row)]) for n, row in enumerate(rounds, start=1)]
    faults = study_status(folder_of(tmp_path_factory.mktemp("x"), records), "running", submitted=SUBMITTED).faults
    told = [(r.round, site.name, site.status) for r in records for site in r.sites if site.status in ("refused", "missing", "failed")]
    assert len(faults) == min(MOST_FAULTS, len(told))
    assert [fault.round for fault in faults] == sorted((fault.round for fault in faults), reverse=True)
    assert {(fault.round, fault.site, fault.status) for fault in faults} <= set(told)
    if len(told) > len(faults):
        assert min(fault.round for fault in faults) >= max(number for number, *_ in set(told) - {(f.round, f.site, f.status) for f in faults})


def test_what_is_no_number_becomes_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan, site = math.nan, SiteRound(name="a", status="ok", epsilon=math.inf)
    records = [
        record(1, [site], seconds=nan),
        record(2, [site], value=nan, interval=(0.1, 0.2)),
        record(3, [site], value=0.5, interval=(nan, 0.6)),
        record(4, [site], value=-math.inf, interval=(0.1, math.inf)),
    ]
    folder = folder_of(tmp_path)
    monkeypatch.setattr(folder, "rounds", lambda: records)
    status = study_status(folder, "running", submitted=SUBMITTED)
    points = (HistoryPoint(round=1, value=None, low=0.1, high=0.2), HistoryPoint(round=2, value=0.5), HistoryPoint(round=3, value=None))
    assert status.history == points
    assert (status.sites[0].epsilon, status.seconds_per_round) == (None, 1.0)
    assert status == type(status).model_validate_json(status.model_dump_json())


# Damage ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("rounds.jsonl", '{"round": 1}\n{}\n', "E103"),
        ("study.toml", "name = ", "E300"),
        ("study.toml", 'name = "x"\nunknown = 1\n', "E300"),
        ("result.json", "{}", "E103"),
        ("result.json", "\x00", "E103"),
    ],
)
def test_a_damaged_folder_is_told_and_hides_no_other(tmp_path: Path, name: str, content: str, code: str) -> None:
    folder = folder_of(tmp_path, [record(1)])
    (folder.path / name).write_text(content)
    status = study_status(folder, "running", submitted=SUBMITTED)
    assert status.error is not None and status.error.code == code and status.error.remedy
    assert (status.run, status.study, status.state) == (folder.path.name, "tiny", "running")
    known = Failure.of(QuorumLostError("too few", "wait"))
    assert study_status(folder, "failed", submitted=SUBMITTED, error=known).error == known  # why it ended says more than the damage


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    status = study_status(RunFolder(tmp_path / "tiny-20260304T120000Z-1a2b"), "interrupted", submitted=SUBMITTED)
    assert status.study == "tiny" and status.error is not None and status.error.code == "E300"


def test_a_torn_last_line_is_no_damage(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [record(1), record(2)])
    with open(folder.path / "rounds.jsonl", "a") as file:
        file.write('{"round": 3, "fo')
    status = study_status(folder, "running", submitted=SUBMITTED)
    assert (status.round, status.error) == (2, None)


# The whole ------------------------------------------------------------------------------------------------------------------------


def whole(**changes: object) -> CoordinatorStatus:
    fields: dict[str, object] = {
        "federation": "f", "wardround": "0.1.0", "time": SUBMITTED, "started": SUBMITTED, "generation": 1, "quorum": 2,
        "audit": AuditHead(head="ab" * 32, rows=3), "sites": (SiteStatus(name="a", state="online", last_contact=SUBMITTED),),
        "studies": (waiting_status(STUDY, "queued", run="r", submitted=SUBMITTED),),
    }  # fmt: skip
    return CoordinatorStatus.model_validate({**fields, **changes})


def test_it_comes_back_from_json_and_has_the_declared_keys() -> None:
    status = whole()
    assert CoordinatorStatus.model_validate_json(status.model_dump_json()) == status
    body = status.model_dump(mode="json")
    assert list(body) == [
        "schema_version",
        "federation",
        "wardround",
        "time",
        "started",
        "generation",
        "quorum",
        "sites",
        "studies",
        "audit",
        "warnings",
    ]
    assert list(body["sites"][0]) == ["name", "state", "last_contact", "expires", "declared_size"]
    assert body["time"] == body["sites"][0]["last_contact"] == "2026-03-04T12:00:00Z"


@pytest.mark.parametrize(
    "changes",
    [{"time": "2026-03-04T12:00:00"}, {"unknown": 1}, {"audit": {"head": "no hex", "rows": 1}}, {"sites": [{"name": "a", "state": "asleep"}]}],
)
def test_what_is_not_declared_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        whole(**changes)


@pytest.mark.slow
def test_it_imports_nothing_heavy() -> None:
    code = "import sys, server.page, server.status; assert not {'torch', 'flwr', 'numpy', 'dp_accounting', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)


@pytest.mark.slow
def test_a_real_run_as_it_goes(make_rig: Callable[..., object]) -> None:
    """After every round of a real study the status is what the coordinator has just said."""
    rig = make_rig(privacy={"unit": "patient", "epsilon": 5.0, "delta": 1e-3}, rounds={"count": 3})
    folder = rig.new_folder()  # type: ignore[attr-defined]  # the conftest's rig
    seen: list[int] = []

    def look(line: RoundRecord) -> None:
        status = study_status(folder, "running", submitted=SUBMITTED)
        seen.append(status.round)
        assert (status.round, status.rounds, status.epsilon_asked, status.metric) == (line.round, 3, 5.0, "auroc")
        assert [point.round for point in status.history] == list(range(1, line.round))
        assert {site.name: (site.status, site.epsilon) for site in status.sites} == {site.name: (site.status, site.epsilon) for site in line.sites}
        if line.round > 1:
            assert status.history[-1].value == line.metrics["auroc"]

    rig.run(folder, look)  # type: ignore[attr-defined]  # the conftest's rig
    assert seen == [1, 2, 3]

"""`study submit|list|watch|stop|resume|show|download`: what hospitals are asked, how a submission survives a lost answer, and how a run is followed."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import wardround
from server.control import CONTROL_KEY, control_routes
from server.federation_file import FederationFile
from server.provisioning import open_consortium, provision
from server.run_folder import RunFolder
from server.status import Failure, StudyState, StudyStatus
from server.submissions import Submission, Submissions
from shared.errors import ConfigurationError, ConnectionFailedError, DeadlineMissedError, WardroundError
from shared.kit import RUNS, STATE, Roster, RosterSite
from shared.messages import TrainTask, encode
from shared.models import get_parameters
from shared.plan import plan_site
from shared.privacy import default_delta_of_sites
from shared.results import RoundRecord, SiteRound, Status
from shared.study import Federation, Study
from shared.task import resolve_task
from tests.provisioned import PASSPHRASE, approved, federation, joined, provisioned
from tests.wardround.conftest import Command
from tests.wardround.serving import serving
from wardround.cli.submitted import by_reason, clock, round_line
from wardround.deployed_runs import DeployedRun, choose_run, deployed_runs, download_run
from wardround.deployment import TRIES, deployed_study, gone, plan_deployment, submit
from wardround.watching import CoordinatorSeen, Event, Noted, RoundDone, RunWatch, StateChanged, exit_code_of, watch

TABLE = {
    "name": "tiny", "task": "breast-cancer", "seed": 3, "rounds": {"count": 2}, "training": {"learning_rate": 0.5},
    "privacy": {"epsilon": 3.0}, "evaluation": {"bootstrap": 20}, "federation": {"sites": 2},
}  # fmt: skip
STUDY = Study.from_table(TABLE)
SUBMITTED = datetime(2026, 1, 31, 8, tzinfo=UTC)
TOKEN = "a-token-of-a-test"


@pytest.fixture(scope="module")
def roster(tmp_path_factory: pytest.TempPathFactory) -> tuple[RosterSite, ...]:
    """Two approved sites, "north" of 200 training patients and "south" of 80."""
    folder = tmp_path_factory.mktemp("federation")
    kit = approved(folder) / "coordinator"
    found = Roster.read(kit / "roster.json", kit / "ca.crt").sites
    return tuple(site.model_copy(update={"declared_size": size}) for site, size in zip(found, (200, 80), strict=True))


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A coordinator's kit; its federation has two sites, of which none is approved."""
    return provisioned(tmp_path / "kits").coordinator_kit


def run_in(kit: Path, name: str = "tiny", *, token: str = TOKEN, state: StudyState = "running", error: Failure | None = None) -> RunFolder:
    """A submitted run, by the coordinator's own code."""
    submissions = Submissions(kit / RUNS)
    (kit / RUNS).mkdir(exist_ok=True)
    run = submissions.submit(STUDY.replace(name=name), token)
    submissions.update(run, state=state, error=error)
    return submissions.folder(run)


def record(number: int, *statuses: Status, value: float | None = 0.5, fold: int = 1) -> RoundRecord:
    sites = tuple(
        SiteRound(name=f"s{index}", status=status, reason=None if status == "ok" else "E801 late", epsilon=number / 10)
        for index, status in enumerate(statuses)
    )
    interval = None if value is None else (value - 0.1, value + 0.1)
    return RoundRecord(
        round=number, fold=fold, evaluated_round=number - 1, sites=sites, metrics={"auroc": value}, metrics_ci95={"auroc": interval}, seconds=1.5
    )


# What hospitals are asked ---------------------------------------------------------------------------------------------------------


def test_noise_is_the_systems_virtual_sites_are_dropped_and_delta_is_derived(roster: tuple[RosterSite, ...]) -> None:
    deployed = deployed_study(STUDY, roster, quorum=1)
    assert deployed.study.privacy.noise_source == "os" and deployed.study.federation == Federation()
    assert deployed.study.privacy.delta == default_delta_of_sites([200, 80])
    assert [note.split()[0] for note in deployed.notes] == ["[federation]", "privacy.delta"] and [
        warning.split()[0] for warning in deployed.warnings
    ] == ["hospitals"]
    again = deployed_study(deployed.study, roster, quorum=1)
    assert again.study == deployed.study and again.notes == ()
    unchanged = {"privacy", "federation"}
    assert {key: value for key, value in deployed.study.to_table().items() if key not in unchanged} == {
        key: value for key, value in STUDY.to_table().items() if key not in unchanged
    }


def test_a_study_with_planted_faults_is_not_deployed(roster: tuple[RosterSite, ...]) -> None:
    with pytest.raises(ConfigurationError, match="faults: expected none in a deployment, got some"):
        deployed_study(STUDY.replace(faults={"sites": 1}), roster, quorum=1)


def test_a_site_of_unknown_size_needs_a_delta_in_the_study(roster: tuple[RosterSite, ...]) -> None:
    sites = (roster[0], roster[1].model_copy(update={"declared_size": None}))
    with pytest.raises(ConfigurationError, match="privacy.delta: .*south.*") as refused:
        deployed_study(STUDY, sites, quorum=1)
    assert "set privacy.delta" in refused.value.remedy
    asked = deployed_study(STUDY.replace(privacy={"delta": 1e-5}), sites, quorum=1)
    task = resolve_task("breast-cancer")
    assert [site.plan is None for site in plan_deployment(asked, task, sites, states={}, quorum=1).sites] == [False, True]
    deployed_study(STUDY.replace(privacy={"unit": "none"}), sites, quorum=1)


@pytest.mark.parametrize(
    ("rounds", "quorum", "expected"),
    [
        ({}, 1, "all"),
        ({}, 2, 2),
        ({"on_missing": "wait"}, 2, "all"),
        ({"on_missing": "abort"}, 2, "all"),
        ({"require": 1}, 1, 1),
        ({"require": 2}, 1, 2),
        ({"require": 1}, 2, "rounds.require: expected at least the federation's quorum, 2, got 1"),
        ({"require": 3}, 1, "rounds.require: expected at most the number of sites on the roster that may take part, 2, got 3"),
        ({}, 3, "federation.toml: quorum: expected at most the number of sites on the roster that may take part, 2, got 3"),
    ],
)
def test_no_study_goes_on_with_fewer_than_the_quorum(
    roster: tuple[RosterSite, ...], rounds: dict[str, object], quorum: int, expected: object
) -> None:
    asked = STUDY.replace(rounds=rounds)
    if isinstance(expected, str) and expected != "all":
        with pytest.raises(ConfigurationError) as refused:
            deployed_study(asked, roster, quorum=quorum)
        assert refused.value.what == expected and refused.value.remedy
    else:
        deployed = deployed_study(asked, roster, quorum=quorum)
        assert deployed.study.rounds.require == expected
        assert any("rounds.require" in note for note in deployed.notes) == (expected != asked.rounds.require)


def test_a_quorum_that_a_revocation_broke_names_the_revoked(roster: tuple[RosterSite, ...]) -> None:
    now = datetime.now(UTC)
    north, south = roster
    broken = Roster(federation="tests", generation=3, sites=(north, south.model_copy(update={"revoked": now})))
    assert gone(broken, now) == ("south is revoked",)
    with pytest.raises(ConfigurationError, match=r"that may take part, 1 \(south is revoked\), got 2"):
        deployed_study(STUDY, broken.active(now), quorum=2, gone=gone(broken, now))
    nobody = broken.model_copy(update={"sites": (north.model_copy(update={"expires": now}), broken.sites[1])})
    with pytest.raises(ConfigurationError, match=r"north expired, south is revoked"):
        deployed_study(STUDY, [], quorum=1, gone=gone(nobody, now))
    back = broken.model_copy(update={"sites": (*broken.sites, south)})  # the name came back with other keys
    assert gone(back, now) == ()


def test_a_round_that_asks_fewer_sites_than_must_answer_is_refused(roster: tuple[RosterSite, ...]) -> None:
    with pytest.raises(ConfigurationError, match="strategy.fraction: 0.5 asks 1 of 2 sites"):
        deployed_study(STUDY.replace(strategy={"fraction": 0.5}), roster, quorum=2)
    assert deployed_study(STUDY.replace(strategy={"fraction": 0.5}), roster, quorum=1).study.strategy.fraction == 0.5


def test_without_any_site_nothing_is_submitted() -> None:
    with pytest.raises(ConfigurationError, match="sites on the roster"):
        deployed_study(STUDY, [], quorum=1)


@pytest.mark.parametrize("task", ["ward.toml", "some.package:task"])
def test_a_task_that_a_site_may_not_have_is_warned_of(roster: tuple[RosterSite, ...], task: str) -> None:
    deployed = deployed_study(STUDY.replace(task=task), roster, quorum=1)
    assert len(deployed.warnings) == 2 and task in deployed.warnings[1]
    assert deployed.study.task == (str(Path.cwd() / task) if task.endswith(".toml") else task)


def test_the_plan_is_that_of_every_site_and_the_bytes_are_those_of_a_message(roster: tuple[RosterSite, ...]) -> None:
    task = resolve_task("breast-cancer")
    deployed = deployed_study(STUDY.replace(privacy={"spare_rounds": 1}, rounds={"deadline": "60s"}), roster, quorum=1)
    plan = plan_deployment(deployed, task, roster, states={"north": "online"}, quorum=1)
    assert [(site.name, site.state, site.plan) for site in plan.sites] == [
        ("north", "online", plan_site(deployed.study, 200)), ("south", "unknown", plan_site(deployed.study, 80)),
    ]  # fmt: skip
    parameters = get_parameters(task.model())
    content = TrainTask(run="r", study_hash="0" * 64, round=1, fold=1, heads={})
    arrays = encode(content, parameters=parameters).array_records["parameters"]
    sent = sum(len(array.data) for array in arrays.values())
    assert plan.down_bytes <= sent <= plan.down_bytes + 128 * len(parameters)  # .npy headers
    assert plan.up_bytes == plan.down_bytes + sum(8 * metric.statistic.shape[0] * metric.statistic.shape[1] for metric in task.metrics[:1])
    assert plan.deadline_seconds == 60 * (1 + 2 + 1)
    numbers = plan.numbers()
    assert json.loads(json.dumps(numbers))["bytes_per_round"]["total"] == 2 * (plan.down_bytes + plan.up_bytes)
    [north, _] = numbers["sites"]  # type: ignore[misc]  # a list of tables
    assert north["steps"] == 3 * plan_site(deployed.study, 200).steps_per_round and north["epsilon"] <= 3.0
    assert any("with noise (differential privacy)" in line for line in plan.leaves) and any("exact" in line for line in plan.leaves)


def test_the_plan_of_a_study_without_privacy_says_so(roster: tuple[RosterSite, ...]) -> None:
    plan = plan_deployment(
        deployed_study(STUDY.replace(privacy={"unit": "none"}), roster, quorum=1), resolve_task("breast-cancer"), roster, states={}, quorum=1
    )
    assert any("WITHOUT NOISE" in line for line in plan.leaves)
    assert plan.sites[0].numbers()["noise_multiplier"] is None


# Submitting, stopping, resuming ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def controlled(kit: Path, *, lose: int = 0) -> Iterator[list[str]]:
    """The real control routes, whose first `lose` answers are lost on the way back; gives what was done."""
    done: list[str] = []
    (kit / RUNS).mkdir(exist_ok=True)
    (kit / STATE).mkdir(exist_ok=True)
    (kit / STATE / CONTROL_KEY).write_text("a key")
    routes = control_routes(Submissions(kit / RUNS), "a key", observe=lambda action, run: done.append(f"{action} {run}"))
    inner = routes[0].endpoint

    async def losing(request: Request) -> Response:
        answer: Response = await inner(request)
        return answer if len(done) > lose else JSONResponse({}, status_code=502)

    with serving(kit, [Route("/studies", losing, methods=["POST"]), *routes[1:]]):
        yield done


@pytest.mark.slow
def test_a_lost_answer_is_asked_for_again_and_makes_one_run(kit: Path) -> None:
    pauses: list[float] = []
    with controlled(kit, lose=TRIES - 1) as done:
        run = submit(kit, STUDY, TOKEN, pause=pauses.append)
        assert done == [f"submitted {run}"] * TRIES and len(pauses) == TRIES - 1
        assert submit(kit, STUDY, TOKEN) == run and submit(kit, STUDY, "another-token") != run
        with pytest.raises(WardroundError, match="of its own") as refused:
            submit(kit, STUDY.replace(seed=8), TOKEN)
        assert refused.value.code == ConfigurationError.code
    assert len(deployed_runs(kit)) == 2


@pytest.mark.slow
def test_when_no_answer_comes_the_token_is_told(kit: Path) -> None:
    with controlled(kit, lose=TRIES) as done, pytest.raises(ConnectionFailedError, match="HTTP 502") as failed:
        submit(kit, STUDY, TOKEN, pause=lambda seconds: None)
    assert len(done) == TRIES and f"--token {TOKEN}" in failed.value.remedy and len(deployed_runs(kit)) == 1


@pytest.mark.slow
def test_stop_and_resume_reach_the_run_by_a_beginning_of_its_name(command: Command, kit: Path) -> None:
    run = run_in(kit, state="running")
    with controlled(kit) as done:
        assert command("study", "stop", "tiny-", "--coordinator", kit).code == 0
        assert (run.path / "stop").exists()
        refused = command("study", "resume", "latest", "--coordinator", kit, "--json")
        assert refused.code == 3 and "is running" in refused.err
        Submissions(kit / RUNS).update(run.path.name, state="stopped")
        resumed = command("study", "resume", "latest", "--coordinator", kit, "--json")
    assert resumed.code == 0 and resumed.data == {"run": run.path.name} and "study watch" in resumed.err
    assert done == [f"stopped {run.path.name}", f"resumed {run.path.name}"]
    assert command("study", "stop", "latest", "--coordinator", kit).code == 4


def test_submit_wants_a_study_and_sites(command: Command, kit: Path) -> None:
    assert command("study", "submit", "--coordinator", kit).code == 2
    assert command("study", "submit", "breast-cancer").code == 2
    refused = command("study", "submit", "breast-cancer", "--coordinator", kit, "--dry-run")
    assert refused.code == 3 and "found none that may take part" in refused.err and deployed_runs(kit) == []


# Looking at runs ------------------------------------------------------------------------------------------------------------------


def test_a_submission_is_read_as_the_coordinator_writes_it(kit: Path) -> None:
    why = Failure(code="E800", what="too few sites", remedy="mend")
    run = run_in(kit, state="failed", error=why)
    written = Submissions(kit / RUNS).get(run.path.name)
    assert choose_run(kit, "latest").submission.model_dump() == written.model_dump()


def test_runs_are_found_by_name_beginning_and_latest(kit: Path) -> None:
    names = [run_in(kit, name, token=f"token-{name}").path.name for name in ("alpha", "beta", "beta-b")]
    assert [run.name for run in deployed_runs(kit)] == names
    assert [choose_run(kit, text).name for text in (names[0], "a", "latest", "beta-b")] == [names[0], names[0], names[2], names[2]]
    for text, message in (("beta", "got 2 that begin with 'beta'"), ("gamma", "the last are: alpha"), ("", "the last are")):
        with pytest.raises(ConfigurationError, match=message):
            choose_run(kit, text)


def test_list_and_show_read_files_and_say_that_nobody_runs(command: Command, kit: Path) -> None:
    assert "no study was submitted yet" in command("study", "list", "--coordinator", kit).out
    run_in(kit, "old", token="an-old-token", state="failed", error=Failure(code="E800", what="too few sites", remedy="mend"))
    folder = run_in(kit)
    folder.keep_rounds([record(1, "ok", "missing"), record(2, "ok", "ok", value=0.7)])
    listed = command("study", "list", "--coordinator", kit, "--json")
    studies = [StudyStatus.model_validate_json(json.dumps(study)) for study in listed.data["studies"]]  # type: ignore[attr-defined]  # a list
    assert [study.study for study in studies] == ["tiny", "old"] and studies[0].history[-1].value == 0.7
    assert "AUROC 0.70" in listed.err and "0.20/3" in listed.err and "no coordinator runs" in listed.err
    shown = command("study", "show", "tiny", "--coordinator", kit)
    assert shown.code == 0 and "0.700 [0.600, 0.800]" in shown.out and str(folder.path) in shown.out
    assert f"hash       {STUDY.fingerprint()[:16]} " in shown.out
    assert "E800: too few sites" in command("study", "show", "old", "--coordinator", kit).out
    as_json = command("study", "show", "tiny", "--coordinator", kit, "--json").data
    assert as_json["run_dir"] == str(folder.path) and Study.from_table(as_json["study_table"]) == STUDY  # type: ignore[arg-type]  # a table
    assert command("study", "show", "tiny", "--coordinator", kit, "--rounds", 3).code == 2
    assert command("study", "list", "--coordinator", kit.parent / "sites" / "north").code == 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of two virtual sites, completed."""
    return wardround.simulate(STUDY, out=tmp_path_factory.mktemp("runs")).path


def as_submitted(kit: Path, finished: Path) -> RunFolder:
    """The finished run at a coordinator, which had it from a submission."""
    (kit / RUNS).mkdir(exist_ok=True)
    folder = kit / RUNS / finished.name
    shutil.copytree(finished, folder)
    text = Submission(token=TOKEN, submitted=SUBMITTED, state="completed").model_dump_json()
    (folder / "submission.json").write_text(text)
    return RunFolder.open(folder)


def test_a_downloaded_run_is_the_same_files_and_a_report_and_overwrites_no_other(command: Command, kit: Path, finished: Path, tmp_path: Path) -> None:
    folder = as_submitted(kit, finished)
    (folder.path / "report.html").unlink()
    outcome = command("study", "download", "latest", "--coordinator", kit, "--out", "got", "--json")
    assert outcome.code == 0
    for name in ("result.json", "privacy.json", "rounds.jsonl", "study.toml", "model/final.safetensors"):
        assert (tmp_path / "got" / name).read_bytes() == (finished / name).read_bytes()
    assert (tmp_path / "got" / "report.html").read_bytes() == (finished / "report.html").read_bytes()
    assert not (folder.path / "report.html").exists()
    assert command("report", "got").code == 0  # what was downloaded is a run's folder
    assert command("study", "download", "latest", "--coordinator", kit, "--out", "got").code == 0
    other = run_in(kit, "other", token="another-token")
    refused = command("study", "download", "other", "--coordinator", kit, "--out", "got", "--partial")
    assert refused.code == 1 and f"those of another run, {finished.name}" in " ".join(refused.err.split()) and other.path.name in refused.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("my own")
    assert command("study", "download", "other", "--coordinator", kit, "--out", "mine", "--partial").code == 1
    assert command("study", "download", "other", "--coordinator", kit, "--out", "part").code == 3 and not (tmp_path / "part").exists()
    partial = download_run(DeployedRun.read(other.path), tmp_path / "part", partial=True)
    assert [path.name for path in partial] == ["run.json", "study.toml"]
    assert (tmp_path / "mine" / "report.html").read_text() == "my own"


# Watching -------------------------------------------------------------------------------------------------------------------------


def test_watching_a_finished_run_tells_every_round_with_the_metrics_of_its_own_model(command: Command, kit: Path, finished: Path) -> None:
    folder = as_submitted(kit, finished)
    outcome = command("study", "watch", "latest", "--coordinator", kit, "--json")
    assert outcome.code == 0
    events = [json.loads(line) for line in outcome.out.splitlines()]
    rounds, end = [event for event in events if event["event"] == "round"], events[-1]
    records, result = folder.rounds(), json.loads((finished / "result.json").read_text())
    assert [event["value"] for event in rounds] == [records[1].metrics["auroc"], result["metrics"]["federated"]["auroc"]]
    assert end["event"] == "end" and end["metrics"] == result["metrics"]["federated"] and end["exit_code"] == 0
    assert end["epsilon"] == {name: site["epsilon"] for name, site in result["privacy"]["sites"].items()}
    text = command("study", "watch", "latest", "--coordinator", kit).out
    assert "round 2/2  2 of 2 sites  AUROC " in text and "study download" in text


@pytest.mark.slow
@given(cuts=st.lists(st.floats(0, 1), max_size=6), statuses=st.lists(st.sampled_from(["ok", "missing", "not asked"]), min_size=2, max_size=3))
def test_however_the_files_grow_the_same_is_told(tmp_path_factory: pytest.TempPathFactory, cuts: list[float], statuses: list[Status]) -> None:
    path = tmp_path_factory.mktemp("run") / "tiny-20260131T080000Z-abcd"
    path.mkdir()
    (path / "study.toml").write_text(STUDY.to_toml())
    write_submission(path, "running")
    rounds = "".join(record(number, *statuses, value=number / 10).model_dump_json() + "\n" for number in range(1, 6)).encode()
    log = b"".join(log_line("server.coordinator", "info", f"line {number} \u2028") for number in range(4))

    def told(parts: list[float]) -> list[Event]:
        watcher, found = RunWatch(DeployedRun.read(path)), []
        for part in [*sorted(parts), 1.0]:
            (path / "rounds.jsonl").write_bytes(rounds[: int(part * len(rounds))])
            (path / "log.jsonl").write_bytes(log[: int(part * len(log))])
            found += watcher.poll()
        return found

    def of(kind: type[Event], events: list[Event]) -> list[Event]:
        return [event for event in events if isinstance(event, kind)]

    at_once, in_parts = told([]), told(cuts)
    for kind in (StateChanged, RoundDone, Noted):
        assert of(kind, at_once) == of(kind, in_parts)
    assert [event.value for event in at_once if isinstance(event, RoundDone)] == [0.2, 0.3, 0.4, 0.5]
    assert [event.text for event in at_once if isinstance(event, Noted)] == [f"line {number} \u2028" for number in range(4)]


def write_submission(path: Path, state: StudyState, error: Failure | None = None) -> None:
    (path / "submission.json").write_text(Submission(token=TOKEN, submitted=SUBMITTED, state=state, error=error).model_dump_json())


def log_line(logger: str, level: str, message: str) -> bytes:
    return json.dumps({"time": "t", "level": level, "logger": logger, "message": message}).encode() + b"\n"


def test_a_round_that_was_taken_back_is_told_again_and_time_does_not_count_it_twice(kit: Path) -> None:
    folder = run_in(kit)
    watcher = RunWatch(choose_run(kit, "latest"))
    folder.keep_rounds([record(1, "ok"), record(2, "ok")])
    first = watcher.poll()
    folder.keep_rounds([record(1, "ok")])  # killed before the checkpoint of round 2
    assert watcher.poll() == []
    folder.keep_rounds([record(1, "ok"), record(2, "ok"), record(3, "ok")])
    second = watcher.poll()
    rounds = [(event.round, event.seconds) for event in first + second if isinstance(event, RoundDone)]
    assert rounds == [(1, 1.5), (2, 3.0)]


def test_folds_do_not_lend_each_other_metrics(kit: Path) -> None:
    folder = run_in(kit)
    folder.keep_rounds([record(1, "ok"), record(2, "ok", value=0.6), record(1, "ok", value=0.7, fold=2), record(2, "ok", value=0.8, fold=2)])
    rounds = [event for event in RunWatch(choose_run(kit, "latest")).poll() if isinstance(event, RoundDone)]
    assert [(event.fold, event.round, event.value) for event in rounds] == [(1, 1, 0.6), (1, 2, None), (2, 1, 0.8)]


@pytest.mark.parametrize(
    ("state", "error", "code"),
    [
        ("completed", None, 0),
        ("stopped", None, 1),
        ("failed", Failure(code="E800", what="round 2: too few"), 8),
        ("failed", Failure(code="E700", what="no room"), 7),
        ("failed", Failure(code="E100", what="its process ended"), 1),
    ],
)
def test_the_exit_code_of_a_watch_is_the_studys_outcome(command: Command, kit: Path, state: StudyState, error: Failure | None, code: int) -> None:
    assert exit_code_of(state, error) == code
    run_in(kit, state=state, error=error).keep_rounds([record(1, "ok", "refused"), record(2, "ok", "missing")])
    outcome = command("study", "watch", "latest", "--coordinator", kit)
    assert outcome.code == code and "round 1/2  1 of 2 sites" in outcome.out and "round 2/2" in outcome.out
    assert outcome.out.count("s1: refused: E801 late") == 1
    assert (f"error {error.code}: {error.what}" in outcome.err) if error else True
    in_json = command("study", "watch", "latest", "--coordinator", kit, "--json")
    assert in_json.code == code and json.loads(in_json.out.splitlines()[-1])["exit_code"] == code and in_json.err == ""


def test_a_watch_gives_up_in_time_says_that_nobody_runs_and_waits_between_looks(kit: Path) -> None:
    run_in(kit)
    now = [0.0]

    def pause(seconds: float) -> None:
        assert seconds > 0
        now[0] += seconds

    told: list[Event] = []
    with pytest.raises(DeadlineMissedError, match="still running"):
        for event in watch(kit, choose_run(kit, "latest"), timeout_seconds=2, pause=pause, clock=lambda: now[0]):
            told.append(event)
    assert told == [StateChanged(run=choose_run(kit, "latest").name, state="running"), CoordinatorSeen(running=False)]
    assert now[0] == pytest.approx(2.0)


def test_what_the_end_says_anyway_and_torn_lines_of_the_log_are_left_out(kit: Path) -> None:
    folder = run_in(kit)
    lines = [
        log_line("server.coordinator", "info", "waiting for sites, 0 enrolled; a: E1 x"), b'{"time": "to\n',
        log_line("server.deployed_run", "error", "error E800: too few"), log_line("server.sealed_grid", "warning", "site a: odd"),
    ]  # fmt: skip
    (folder.path / "log.jsonl").write_bytes(b"".join(lines))
    notes = [event for event in RunWatch(choose_run(kit, "latest")).poll() if isinstance(event, Noted)]
    assert [(note.level, note.text) for note in notes] == [("info", "waiting for sites, 0 enrolled; a: E1 x"), ("warning", "site a: odd")]


def test_what_went_wrong_before_a_resume_is_over(command: Command, kit: Path) -> None:
    folder = run_in(kit, state="failed", error=Failure(code="E800", what="too few"))
    late = "E801 A site's answer did not come before the deadline."

    def line(text: str) -> bytes:
        return json.dumps({"time": datetime.now(UTC).isoformat(), "level": "info", "logger": "server.coordinator", "message": text}).encode() + b"\n"

    (folder.path / "log.jsonl").write_bytes(line("waiting for sites, 0 enrolled; a: E601 not approved") + line(f"2 sites enrolled; b: {late}"))
    folder.keep_rounds([record(1, "ok")])
    assert "not approved" in command("study", "watch", "latest", "--coordinator", kit).out
    Submissions(kit / RUNS).resume(folder.path.name)
    with open(folder.path / "log.jsonl", "ab") as log:
        log.write(line(f"waiting for sites, 1 enrolled; c: {late}"))
    Submissions(kit / RUNS).update(folder.path.name, state="stopped")
    notes = [event.text for event in RunWatch(choose_run(kit, "latest")).poll() if isinstance(event, Noted)]
    assert notes == [f"waiting for sites, 1 enrolled; c: {late}"]
    out = command("study", "watch", "latest", "--coordinator", kit).out
    assert "round 1/2  1 of 1 site" in out and "not approved" not in out
    assert "  c: is waited for" in out and "E801" not in out


def test_a_site_that_has_not_joined_is_waited_for_and_one_that_has_is_late(kit: Path) -> None:
    late = "E801 A site's answer did not come before the deadline."
    folder = run_in(kit)
    sites = (
        SiteRound(name="there", status="ok", num_test=4, epsilon=0.5), SiteRound(name="slow", status="missing", reason=late, num_test=4),
        SiteRound(name="coming", status="missing", reason=late),
    )  # fmt: skip
    folder.keep_rounds([record(1).model_copy(update={"sites": sites}), record(2, "ok")])
    [told, *_] = [event for event in RunWatch(choose_run(kit, "latest")).poll() if isinstance(event, RoundDone)]
    reasons = {site.name: site.reason for site in told.sites}
    assert reasons["there"] is None and reasons["slow"] == late and "is waited for" in str(reasons["coming"])
    assert {fault.site: fault.reason for fault in choose_run(kit, "latest").status().faults} == {name: reasons[name] for name in ("slow", "coming")}


def test_sites_that_say_the_same_share_a_line(command: Command, kit: Path) -> None:
    run_in(kit, state="stopped").keep_rounds([record(1, "refused", "ok", "refused"), record(2, "refused", "refused", "refused")])
    out = command("study", "watch", "latest", "--coordinator", kit).out
    assert "  s0, s2: refused: E801 late" in out and "  s1: refused: E801 late" in out and out.count("E801 late") == 2


def test_who_waits_for_the_same_shares_a_line() -> None:
    assert by_reason("a: E8 late; b: E6 no; or not; c: E8 late") == {"E8 late": ["a", "c"], "E6 no; or not": ["b"]}
    assert by_reason("") == {}


def test_the_line_of_a_round_is_that_of_the_design() -> None:
    event = RoundDone(
        run="r", round=17, rounds=30, fold=2, folds=5, usable=4, asked=5, metric="auroc", value=0.812, ci95=(0.78, 0.841), epsilon=1.9,
        epsilon_asked=3.0, seconds=42.4, sites=(),
    )  # fmt: skip
    assert round_line(event) == "fold 2/5  round 17/30  4 of 5 sites  AUROC 0.81 [0.78, 0.84]  epsilon 1.90/3  0:42"
    assert round_line(event.model_copy(update={"folds": 1})) == "round 17/30  4 of 5 sites  AUROC 0.81 [0.78, 0.84]  epsilon 1.90/3  0:42"
    bare = event.model_copy(update={"folds": 1, "metric": None, "value": None, "epsilon": None})
    assert round_line(bare) == "round 17/30  4 of 5 sites  0:42"
    assert [clock(seconds) for seconds in (0, 59.9, 60, 3599, 3661)] == ["0:00", "0:59", "1:00", "59:59", "1:01:01"]


@pytest.mark.slow
def test_looking_needs_no_torch(kit: Path) -> None:
    run_in(kit, state="stopped")
    code = (
        "import sys; from wardround.__main__ import run\n"
        "codes = [run(['study', *verb, '--coordinator', sys.argv[1]]) for verb in (['watch', 'latest'], ['list'], ['show', 'latest'])]\n"
        "codes += [run(['coordinator', 'status', sys.argv[1]])]\n"
        "assert codes == [1, 0, 0, 4], codes; assert not {'torch', 'flwr'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(kit)], check=True, capture_output=True)


# All of it, for real --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_that_nobody_answers_ends_with_exit_8_and_names_who_is_missing(command: Command, tmp_path: Path) -> None:
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(contextlib.closing(socket.socket())) for _ in range(2)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        port, page_port = (int(probe.getsockname()[1]) for probe in probes)
    table = federation(hosts=["localhost"]).model_dump()
    table["coordinator"] |= {"listen": "127.0.0.1", "port": port, "page_port": page_port}
    file, kits = FederationFile.model_validate(table), tmp_path / "kits"
    provisioned(kits, file)
    requests = [joined(kits, site, tmp_path / site) for site in file.sites]
    with open_consortium(file, kits, passphrase=PASSPHRASE) as consortium:
        kit = provision(consortium, requests=requests).coordinator_kit
    (tmp_path / "study.toml").write_text(STUDY.replace(rounds={"deadline": "3s"}, privacy={"delta": 1e-5}).to_toml())
    arguments = ("study", "submit", "study.toml", "--coordinator", kit)
    planned = command(*arguments, "--dry-run", "--rounds", 1, "--json")
    assert planned.code == 0 and planned.data["rounds"] == 1 and "nothing was submitted" in planned.err
    assert f"hash           {planned.data['study_hash'][:16]} " in planned.err  # type: ignore[index]  # a text
    assert [site["state"] for site in planned.data["sites"]] == ["unknown", "unknown"]  # type: ignore[attr-defined]  # a list of tables
    assert deployed_runs(kit) == []
    started = [sys.executable, "-m", "wardround", "coordinator", "start", str(kit), "--json"]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(tmp_path)}) as process:
        assert process.stdout is not None
        try:
            events = [json.loads(process.stdout.readline()) for _ in range(2)]
            assert [event["event"] for event in events] == ["starting", "ready"]
            assert (events[1]["address"], events[1]["page"]) == (f"https://localhost:{port}", f"http://127.0.0.1:{page_port}")
            status = command("coordinator", "status", kit, "--json")
            assert [site["state"] for site in status.data["sites"]] == ["never seen", "never seen"]  # type: ignore[attr-defined]  # a list of tables
            assert [site["state"] for site in command(*arguments, "--dry-run", "--json").data["sites"]] == ["never seen", "never seen"]  # type: ignore[attr-defined]
            submitted = [command(*arguments, "--token", TOKEN, "--json").data["run"] for _ in range(2)]
            assert submitted[0] == submitted[1] and len(deployed_runs(kit)) == 1
            watched = command("study", "watch", submitted[0], "--coordinator", kit, "--timeout", 120)
            assert watched.code == 8 and "error E800" in watched.err and "north" in watched.err and "south" in watched.err
            shown = command("study", "show", "latest", "--coordinator", kit, "--json").data
            assert shown["state"] == "failed" and shown["error"]["code"] == "E800"  # type: ignore[index]  # a table
            process.send_signal(signal.SIGINT)
            later = [json.loads(line) for line in process.stdout]
            assert process.wait(30) == 0 and later[-1] == {"event": "stopped"}
            told = [(event["run"], event["state"]) for event in later if event["event"] == "study"]
            assert told[-1] == (submitted[0], "failed") and len(set(told)) == len(told)
        finally:
            process.kill()
    assert command("coordinator", "stop", kit).code == 0

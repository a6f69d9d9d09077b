"""Whatever a bad site sends, under every strategy: it costs that site its round, by name and reason, and nobody else anything."""

import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from client.ledger import reading
from server.run_folder import read_tensors
from shared.errors import ConfigurationError, QuorumLostError
from shared.models import Parameters
from shared.results import SiteRound, Status
from shared.study import Faults, Study
from simulations import simulate
from simulations.attacks.poisoning import strategy_names
from simulations.faults import FaultyGrid, faulty_sites, spoiled_update
from simulations.setting import Setting
from simulations.simulate import execute, prepare, start_run
from tests.simulations.conftest import Finished, Runner, Wards
from wardround.report import write_report


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A fault, and what the coordinator says of its site in every round."""

    fault: Faults
    status: Status
    reason: str = ""


NOT_FINITE, OTHER_TENSORS = "E102 tensor .+: expected finite values, got NaN or infinity", r"E102 expected \d+ named tensors, got "
OTHER_FORM, CLAIM = r"E102 tensor .+: expected \(.*\) float32, got \(.*\) float", "E102 expected a declared size of 1 to 10000000, got another"
LATE = r"E801 A site's answer did not come before the deadline\."
EXPECTED = {
    "nan": Expected(fault=Faults(kind="nan"), status="failed", reason=NOT_FINITE),
    "inf": Expected(fault=Faults(kind="inf"), status="failed", reason=NOT_FINITE),
    "a million times": Expected(
        fault=Faults(kind="scaled"), status="failed", reason="E102 update: expected a norm of at most 1000 times the model's"
    ),
    "too large for float32": Expected(fault=Faults(kind="scaled", factor=1e60), status="failed", reason=NOT_FINITE),
    "wrong shape": Expected(fault=Faults(kind="wrong-shape"), status="failed", reason=OTHER_FORM),
    "wrong dtype": Expected(fault=Faults(kind="wrong-dtype"), status="failed", reason=OTHER_FORM + "64"),
    "missing tensor": Expected(fault=Faults(kind="missing-tensor"), status="failed", reason=OTHER_TENSORS + r"\d+ \(missing: \['.+'\]"),
    "extra tensor": Expected(fault=Faults(kind="extra-tensor"), status="failed", reason=OTHER_TENSORS + r"\d+ \(missing: \[\], undeclared: 1\)"),
    "empty": Expected(fault=Faults(kind="empty"), status="failed", reason="E102 expected the records message, "),
    "another round": Expected(fault=Faults(kind="other-round"), status="failed", reason="E102 expected a reply for this site and round"),
    "another study": Expected(fault=Faults(kind="other-study"), status="failed", reason="E102 expected a reply for this run and study"),
    "late": Expected(fault=Faults(kind="late"), status="missing", reason=LATE),
    "silent": Expected(fault=Faults(kind="silent"), status="missing", reason=LATE),
    "claims a billion": Expected(fault=Faults(kind="claimed-size"), status="refused", reason=CLAIM),
    "claims nothing": Expected(fault=Faults(kind="claimed-size", claimed_size=0), status="refused", reason=CLAIM),
    "claims less than nothing": Expected(fault=Faults(kind="claimed-size", claimed_size=-60), status="refused", reason=CLAIM),
    "twice": Expected(fault=Faults(kind="duplicate"), status="ok"),
}
NUM_HONEST, ROUNDS = 7, 2  # as many as the strategy that needs most asks for
STUDY = {
    "name": "bad-sites", "task": "breast-cancer", "seed": 11, "rounds": {"count": ROUNDS, "require": NUM_HONEST},
    "training": {"learning_rate": 0.5, "batch_size": 16, "local_steps": 2}, "privacy": {"unit": "none"}, "evaluation": {"bootstrap": 0},
    "federation": {"sites": NUM_HONEST + len(EXPECTED), "partition": "iid"},
}  # fmt: skip
OTHER_WITH_OTHERS = {"scaffold", "feddyn", "cyclic"}  # a site that does not count is still one of the federation, or has a place in its order


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A run with one bad site of each kind, and one of its other sites alone."""

    bad: dict[str, str]  # site by kind
    run: Finished
    without: Finished


@functools.cache
def setting_of(strategy: str) -> Setting:
    task = "clinical-text" if strategy == "fedbn" else "breast-cancer"  # which has a normalisation layer
    larger = {"buffer_size": NUM_HONEST + len(EXPECTED)} if strategy == "fedbuff" else {}  # than can be filled: then nobody is left at work
    return prepare(Study.from_table(STUDY).replace(task=task, strategy={"name": strategy, **larger}), None)


def bad_sites() -> dict[str, str]:
    return dict(zip(EXPECTED, setting_of("fedavg").site_names, strict=False))


def only(setting: Setting, names: Sequence[str]) -> Setting:
    """The same study at these of its sites."""
    assert setting.federation is not None
    cohorts = {name: setting.federation.cohorts[name] for name in names}
    return replace(setting, federation=replace(setting.federation, cohorts=cohorts))


def finished(setting: Setting, out: Path) -> Finished:
    folder = start_run(setting, out)
    execute(setting, folder, baselines=False, execution="sequential")
    return Finished(folder=folder)


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tried]:
    @functools.cache
    def run(strategy: str) -> Tried:
        setting, bad, out = setting_of(strategy), bad_sites(), tmp_path_factory.mktemp("bad")
        with pytest.MonkeyPatch.context() as patch:
            faults = {site: EXPECTED[kind].fault for kind, site in bad.items()}
            patch.setattr(simulate, "with_faults", lambda grid, study, names: FaultyGrid(grid, faults, names, seed=study.seed))
            spoiled = finished(setting, out)
        good = [name for name in setting.site_names if name not in bad.values() or name == bad["twice"]]
        return Tried(bad=bad, run=spoiled, without=finished(only(setting, good), out))

    return run


def model(run: Finished) -> Parameters:
    return read_tensors(run.folder.path / "model" / "final.safetensors")[1]


def of_site(run: Finished, name: str) -> list[SiteRound]:
    return [site for record in run.folder.rounds() for site in record.sites if site.name == name]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", strategy_names())
def test_every_bad_site_is_named_with_its_reason_and_the_model_is_that_of_the_others(tried: Callable[[str], Tried], strategy: str) -> None:
    made = tried(strategy)
    assert made.run.result.outcome == "completed" and len(made.run.folder.rounds()) == ROUNDS
    for kind, name in made.bad.items():
        for site in of_site(made.run, name):
            assert (kind, site.status) == (kind, EXPECTED[kind].status)
            assert re.fullmatch(EXPECTED[kind].reason + ".*", site.reason or ""), (kind, site.reason)
    honest = set(setting_of(strategy).site_names) - set(made.bad.values())
    assert len(honest) == NUM_HONEST
    assert {(site.status, site.reason) for name in honest for site in of_site(made.run, name)} == {("ok", None)}
    assert all(np.isfinite(value).all() and np.abs(value).max() < 100 for value in model(made.run).values())
    if strategy not in OTHER_WITH_OTHERS:
        assert all(np.array_equal(value, model(made.without)[name]) for name, value in model(made.run).items())


@pytest.mark.slow
def test_the_report_names_them_too(tried: Callable[[str], Tried]) -> None:
    made = tried("fedavg")
    page = write_report(made.run.folder.path).read_text()
    for kind, name in made.bad.items():
        if EXPECTED[kind].status != "ok":
            reason = of_site(made.run, name)[0].reason or ""
            assert f"{EXPECTED[kind].status} in rounds 1–2: {reason}".replace("'", "&#39;") in page, kind


def test_each_site_s_own_log_says_why(tried: Callable[[str], Tried]) -> None:
    """But for those that the coordinator does not ask: who was refused at enrolment knows it from there."""
    made = tried("fedavg")
    rows = [json.loads(line) for line in (made.run.folder.path / "log.jsonl").read_text().splitlines()]
    told = {(row["level"], row["message"]) for row in rows if row["logger"] == "client.site"}
    asked = {made.bad[kind]: expected for kind, expected in EXPECTED.items() if expected.status in ("failed", "missing")}
    expected = {
        ("warning", f"site {name}: its update of round {number} did not count: {of_site(made.run, name)[0].reason}")
        for name, fault in asked.items()
        for number in (1, 2)
        if fault.fault.kind != "silent" or number == ROUNDS  # who is not reached learns it when the model is evaluated
    }
    assert told == expected


# The study's own table -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_blocks_and_single_sites_come_to_the_same(runner: Runner) -> None:
    study = runner.study(federation={"sites": 5}, faults={"sites": ["site-2"], "kind": "nan"})
    runs = [runner.run(study, execution=how) for how in ("blocks", "sequential")]
    assert "blocks of up to" in (runs[0].result.execution or "")
    for run in runs:
        assert [(site.status, (site.reason or "")[:11]) for site in of_site(run, "site-2")] == [("failed", "E102 tensor")] * 2
    for name, value in model(runs[1]).items():
        np.testing.assert_allclose(model(runs[0])[name], value, rtol=1e-4, atol=1e-6)
    assert runs[0].result.privacy == runs[1].result.privacy


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps_before_the_end"), [("late", True), ("silent", False)])
def test_who_is_late_has_been_charged_and_who_is_silent_has_not(runner: Runner, kind: str, steps_before_the_end: bool) -> None:
    run = runner.run(runner.study(faults={"sites": ["site-1"], "kind": kind}))
    with reading(run.folder.path / "ledgers" / "site-1.sqlite") as ledger:
        assert len(list(ledger.charges())) == (2 if steps_before_the_end else 0)
    assert (run.result.privacy.sites["site-1"].steps > 0) == steps_before_the_end, "the closing evaluation tells what was spent"


@pytest.mark.slow
def test_a_fault_may_begin_late_and_come_in_some_rounds_alone(runner: Runner) -> None:
    plain = runner.study(privacy={"unit": "none"}, rounds={"count": 8}, training={"local_steps": 1})
    late = runner.run(plain.replace(faults={"sites": 1, "kind": "empty", "from_round": 6}))
    [bad] = faulty_sites(plain.replace(faults={"sites": 1}), ["site-1", "site-2", "site-3"])
    assert [site.status for site in of_site(late, bad)] == ["ok"] * 5 + ["failed"] * 3
    some = [runner.run(plain.replace(faults={"sites": 1, "kind": "empty", "share": 0.5}, seed=seed)) for seed in (11, 11, 12)]
    drawn = [[site.status for site in record.sites] for run in some for record in run.folder.rounds()]
    first, again, other = drawn[:8], drawn[8:16], drawn[16:]
    assert first == again and first != other and 0 < sum("failed" in statuses for statuses in first) < 8


@pytest.mark.slow
def test_what_stays_within_bounds_counts_until_the_study_bounds_it(runner: Runner) -> None:
    plain = runner.study(privacy={"unit": "none"}, strategy={"weights": "equal"})
    for kind, bound, status in (("sign-flipped", None, "ok"), ("scaled", None, "ok"), ("scaled", 3.0, "failed")):
        fault = {"sites": ["site-2"], "kind": kind, **({"factor": 100.0} if kind == "scaled" else {})}
        run = runner.run(plain.replace(faults=fault, strategy={} if bound is None else {"largest_update": bound}))
        assert [site.status for site in of_site(run, "site-2")] == [status] * 2
        assert {site.status for name in ("site-1", "site-3") for site in of_site(run, name)} == {"ok"}
    assert (of_site(run, "site-2")[0].reason or "").startswith("E102 update: expected a norm of at most 3 (strategy.largest_update)")


def test_below_the_quorum_the_round_fails_by_name(runner: Runner) -> None:
    with pytest.raises(QuorumLostError, match=r"round 1: expected usable answers of 3 sites, got 2: site-2: E102 tensor .* finite"):
        runner.run(runner.study(privacy={"unit": "none"}, rounds={"require": 3}, faults={"sites": ["site-2"]}))
    assert runner.latest().result.outcome == "failed"


def test_sites_are_named_or_drawn_and_more_are_the_same_and_others(runner: Runner) -> None:
    names = [f"site-{number}" for number in range(9)]
    study = runner.study(faults={"sites": 3})
    drawn = faulty_sites(study, names)
    assert len(drawn) == 3 and drawn < faulty_sites(study.replace(faults={"sites": 5}), names)
    assert drawn == faulty_sites(study, list(reversed(names)))
    assert len({faulty_sites(study.replace(seed=seed), names) for seed in range(5)}) > 1
    assert faulty_sites(study.replace(faults={"sites": ["site-4"]}), names) == {"site-4"} and faulty_sites(runner.study(), names) == frozenset()


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"sites": ["site-9"]}, "faults.sites: expected some of site-1, site-2, site-3, got site-9"),
        ({"sites": 4}, "faults.sites: expected at most the number of sites, 3, got 4"),
        ({"from_round": 3}, "faults.from_round: expected at most rounds.count, 2, got 3"),
    ],
)
def test_what_could_not_come_to_pass_is_refused_before_anything_is_done(runner: Runner, faults: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        prepare(runner.study(faults=faults), None)


def test_site_files_of_real_sites_take_no_study_with_faults(wards: Wards) -> None:
    with pytest.raises(ConfigurationError, match="faults: expected none at a real site"):
        prepare(wards.study.replace(faults={"sites": 1}), wards.path)


def test_what_a_fault_makes_of_an_update() -> None:
    update = {"w": np.array([[1.0, -2.0]], np.float32), "b": np.array([3.0], np.float32)}
    before = {name: value.copy() for name, value in update.items()}
    assert spoiled_update(update, Faults(kind="sign-flipped"))["w"].tolist() == [[-1.0, 2.0]]
    assert spoiled_update(update, Faults(kind="scaled", factor=0.5))["b"].tolist() == [1.5]
    assert spoiled_update(update, Faults(kind="scaled"))["b"].tolist() == [3e6] and spoiled_update(update, Faults(kind="late")) is update
    assert np.isnan(spoiled_update(update, Faults(kind="nan"))["w"]).all() and np.isposinf(spoiled_update(update, Faults(kind="inf"))["w"]).all()
    assert all(np.array_equal(update[name], value) for name, value in before.items()), "the site's own update is as it was"


def test_the_run_says_that_faults_are_planted(tried: Callable[[str], Tried], runner: Runner, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="simulations"):
        run = runner.run(runner.study(privacy={"unit": "none"}, rounds={"count": 1}, faults={"sites": ["site-3"], "kind": "inf"}))
    assert "faults are planted, inf: site-3" in [record.getMessage() for record in caplog.records]
    assert "Faults were planted" in write_report(run.folder.path).read_text()
    assert "Faults were planted" not in write_report(tried("fedavg").without.folder.path).read_text()

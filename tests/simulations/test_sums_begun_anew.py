"""Secure sums that are lost after a list of survivors was signed, sites that cannot be in one, and what people are told to do about it."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

from server.run_folder import RunFolder
from shared.errors import BoundToSumError, ConfigurationError, PolicyRefusedError, QuorumLostError, StorageError
from shared.messages import Refused, encode
from shared.results import RoundRecord
from shared.study import Study
from tests.simulations.conftest import OneByOne, Wards
from tests.simulations.test_secure_aggregation import assert_close, final, intercept, kind, kind_of, study_of


@pytest.fixture
def runner(tmp_path: Path) -> OneByOne:
    """Messages as in a deployment, which a test can come between."""
    return OneByOne(out=tmp_path / "runs")


def lost(message: Message) -> Message:
    return Message(Error(code=2, reason=""), reply_to=message)


def study_without(runner, **changes: object) -> Study:
    """Of five sites, three of which are enough."""
    return study_of(runner, **{"rounds": {"count": 2, "require": 3, "on_missing": "wait"}, **changes})


def interrupted_after_unmasking(runner, study: Study, monkeypatch: pytest.MonkeyPatch, *, out: str) -> Path:
    """The folder of a run whose coordinator was killed between the second sum and its checkpoint; the site `out` was in no second sum."""
    real, written = RunFolder.write_checkpoint, list[int]()

    def killed(self: RunFolder, checkpoint) -> None:
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt
        real(self, checkpoint)

    def carry(site: str, message: Message, answer) -> Message:
        second = bool(written) and kind(message) == kind_of("mask")
        return lost(message) if site == out and second else answer(message)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_checkpoint", killed)
        intercept(patch, carry)
        with pytest.raises(KeyboardInterrupt):
            runner.run(study)
    return runner.latest().folder.path


@pytest.mark.slow
def test_a_sum_that_was_lost_while_it_was_signed_is_begun_anew_with_the_same_sites(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five sites one is lost while it trains, and three while they sign: the sum is of the four, now as then, though the fifth is back."""
    study, asked, records = (
        study_without(runner, rounds={"count": 1, "require": 3, "on_missing": "wait"}),
        list[tuple[str, str]](),
        list[RoundRecord](),
    )

    def first(site: str, message: Message, answer) -> Message:
        return lost(message) if site == "site-5" and kind(message) == kind_of("mask") else answer(message)

    with monkeypatch.context() as patch:
        intercept(patch, first)
        whole = final(runner.run(study))

    def carry(site: str, message: Message, answer) -> Message:
        asked.append((site, kind(message)))
        if asked.count((site, kind(message))) == 1:
            if site == "site-5" and kind(message) == kind_of("mask"):
                return lost(message)
            if site in ("site-1", "site-2", "site-3") and kind(message) == kind_of("sign"):
                answer(message)  # it signed, and is bound by it, though its signature never came
                return lost(message)
        return answer(message)

    intercept(monkeypatch, carry)
    found = runner.run(study, observe=records.append)
    assert_close(final(found), whole)
    assert ("site-5", kind_of("sign")) not in asked and asked.count(("site-5", kind_of("advertise"))) == 1
    [told] = [site for site in records[0].sites if site.status != "ok"]
    assert (told.name, told.status) == ("site-5", "missing") and told.reason.startswith("E803 ")


@pytest.mark.slow
def test_a_resumed_run_sums_for_those_that_had_signed(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_without(runner)
    folder = interrupted_after_unmasking(runner, study, monkeypatch, out="site-5")
    kept = json.loads((folder / "checkpoint" / "sum.json").read_text())
    assert kept == {"fold": 1, "round": 2, "sites": ["site-1", "site-2", "site-3", "site-4"]}
    run = runner.run(study, resume=folder)
    assert run.result.outcome == "completed"
    assert [site["name"] for site in run.lines[1]["sites"] if site["status"] == "ok"] == kept["sites"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["not enrolled", "lost in the round"])
def test_who_is_missed_after_a_crash_is_named_and_the_remedy_told(runner, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    study = study_without(runner, rounds={"count": 2, "require": 3})
    folder = interrupted_after_unmasking(runner, study, monkeypatch, out="site-5")

    def carry(site: str, message: Message, answer) -> Message:
        gone = site == "site-3" and kind(message) == ("enrol" if how == "not enrolled" else kind_of("share"))
        return lost(message) if gone else answer(message)

    intercept(monkeypatch, carry)
    with pytest.raises(BoundToSumError, match=r"^round 2: .*site-1, site-2, site-3, site-4 was being unmasked .* this time site-3: ") as error:
        runner.run(study, resume=folder)
    assert error.value.exit_code == 8 and "site-5" not in error.value.what.split("was being unmasked")[0].split("The sum of")[1]
    assert re.search(r"bring the named sites back and resume .* \('wardround ledger close KIT RUN'\)", error.value.remedy)
    monkeypatch.undo()
    assert runner.run(study, resume=folder).result.outcome == "completed", "they came back"


def test_a_damaged_list_of_a_sum_is_named(tmp_path: Path, runner, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path, runner.study())
    folder.write_sum_sites(1, 2, ("a", "b", "c"))
    assert (folder.sum_sites(1, 2), folder.sum_sites(1, 3), folder.sum_sites(2, 2)) == (("a", "b", "c"), (), ())
    for damaged in ("", "[]", '{"fold": 1, "round": 2}'):
        (folder.path / "checkpoint" / "sum.json").write_text(damaged)
        with pytest.raises(StorageError, match="damaged"):
            folder.sum_sites(1, 2)


# Sites that refuse ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind_of_error", "exit_code"),
    [("E600", PolicyRefusedError, 6), ("E500", None, 5), ("E101", QuorumLostError, 8)],
)  # fmt: skip
def test_a_refusal_that_leaves_too_few_for_a_sum_is_named_before_the_first_round(
    runner, monkeypatch: pytest.MonkeyPatch, code: str, kind_of_error, exit_code: int
) -> None:  # fmt: skip
    asked = list[str]()

    def carry(site: str, message: Message, answer) -> Message:
        asked.append(kind(message))
        if site == "site-2" and kind(message) == "enrol":
            return Message(encode(Refused(name=site, code=code, reason="Rule: policy.accept_distributed_noise.")), reply_to=message)
        return answer(message)

    intercept(monkeypatch, carry)
    study = study_of(runner, federation={"sites": 3, "alpha": 2.0}, rounds={"count": 1, "require": 1})
    with pytest.raises(
        kind_of_error or Exception, match=rf"enrolment: expected 3 sites or more .* got 2; site-2: {code} Rule: policy\.accept"
    ) as error:
        runner.run(study)
    assert error.value.exit_code == exit_code and "threshold" not in error.value.remedy
    assert "ledger close" not in error.value.remedy, "virtual sites have no limits"
    assert set(asked) == {"enrol"}


def test_a_threshold_is_only_said_to_be_lowered_where_it_can_be(runner) -> None:
    few = study_of(runner, federation={"sites": 2}, rounds={"require": 1})
    with pytest.raises(ConfigurationError, match="at least 3 sites") as error:
        runner.run(few)
    assert error.value.remedy == "ask more sites: no sum has fewer than 3 in it, or half of those asked"
    with pytest.raises(ConfigurationError, match="at least 6 sites") as error:
        runner.run(study_of(runner).replace(secure_aggregation={"threshold": 6}))
    assert error.value.remedy == "ask more sites, or lower secure_aggregation.threshold, to 3 at least"


# Hospitals -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hospitals(wards: Wards) -> Wards:
    """Three of them."""
    rng = np.random.default_rng(3)
    (wards.path / "east").mkdir()
    age, marker = rng.uniform(20, 90, 90), rng.normal(size=90).clip(-3, 3)
    ill = (marker + rng.normal(size=90) > 0).astype(int)
    rows = [f"east-{index},{age[index]:.1f},{marker[index]:.4f},{ill[index]}" for index in range(90)]
    (wards.path / "east" / "patients.csv").write_text("\n".join(["id,age,marker,ill", *rows]) + "\n")
    wards.write_policy("east")
    return Wards(path=wards.path, study=wards.study.replace(secure_aggregation={}, rounds={"count": 1}))


@pytest.mark.slow
def test_where_one_hospital_refuses_the_others_are_told_to_close_the_plan(runner, hospitals: Wards) -> None:
    hospitals.write_policy("south", max_epsilon=0.5)
    with pytest.raises(PolicyRefusedError, match=r"got 2; south: E600 .*policy\.max_epsilon") as error:
        runner.run(hospitals.study.replace(rounds={"require": 1}), data=hospitals.path)
    assert f"its plan is to be ended at east, north: 'wardround ledger close KIT {runner.latest().result.run}'" in error.value.remedy


SHOWN = re.compile(r"secure sums with site (\w+), key ([0-9a-f]{64}) \((.*)\)$")


def shown(caplog: pytest.LogCaptureFixture) -> dict[tuple[str, str], str]:
    """Every (site, key) in the log, and whose it is said to be."""
    found = [SHOWN.search(record.getMessage()) for record in caplog.records if record.name == "client.secure_updates"]
    return {(match[1], match[2]): match[3] for match in found if match is not None}


@pytest.mark.slow
def test_a_hospital_is_shown_with_whom_it_sums_and_may_demand_those_that_it_knows(runner, hospitals: Wards, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("east", "north", "south"):
        hospitals.write_policy(name, max_epsilon=30)  # for four runs
    with caplog.at_level(logging.INFO, logger="client"):
        runner.run(hospitals.study, data=hospitals.path)
    keys = dict(shown(caplog))
    assert sorted({name for name, _ in keys}) == ["east", "north", "south"] and len(keys) == 3
    assert len([record for record in caplog.records if SHOWN.search(record.getMessage())]) == 9, "each of the three in each one's log"
    known = {name: key for name, key in keys if name != "north"}
    text = (hospitals.path / "north" / "site.toml").read_text()

    def demand(**named: str) -> None:
        table = "".join(f'{name} = "{key}"\n' for name, key in named.items())
        (hospitals.path / "north" / "site.toml").write_text(text + "[policy.sum_with]\n" + table)

    demand(**known)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="client"):
        runner.run(hospitals.study, data=hospitals.path)
    assert "compared by this hospital" in [SHOWN.search(record.getMessage())[3] for record in caplog.records if SHOWN.search(record.getMessage())]
    for named, rule in (({**known, "south": "ab" * 32}, "another"), ({**known, "west": "ab" * 32}, "west")):
        demand(**named)
        caplog.clear()
        with pytest.raises(QuorumLostError, match=r"north: E600 .*Rule: policy\.sum_with"), caplog.at_level(logging.WARNING, logger="client"):
            runner.run(hospitals.study, data=hospitals.path)
        assert any("policy.sum_with" in record.getMessage() and rule in record.getMessage() for record in caplog.records)

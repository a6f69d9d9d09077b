"""A site trains what somebody there approved, exactly that, until the day that was said."""

import json
import tomllib
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from client import approvals as module
from client.approvals import MAX_ASKED, Approval, Approvals, Asked, installed_code_hash, what_is_asked
from client.policy import AdvanceApproval, SiteFile
from shared.config import validate
from shared.errors import NotApprovedError, StorageError, describe_exception
from shared.study import Study
from shared.task import Task
from tests.client.conftest import POLICY, SITE_FILE

NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)
LATER = NOW + timedelta(days=30)
KEY, FOREIGN = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2))
Studies = Callable[..., Study]


def site_file(**policy: object) -> SiteFile:
    return validate(SiteFile, tomllib.loads(SITE_FILE.format(**{**POLICY, **policy})), "site.toml")


@pytest.fixture
def asked(task: Task, make_study: Studies) -> Asked:
    return what_is_asked(make_study(), task, site_file())


@pytest.fixture
def approvals(tmp_path: Path) -> Approvals:
    return Approvals(tmp_path, KEY)


def rule_of(approvals: Approvals, asked: Asked, now: datetime = NOW) -> str:
    """The rule by which a study is refused."""
    with pytest.raises(NotApprovedError) as refused:
        approvals.check(asked, now=now)
    assert refused.value.code == "E601"
    assert refused.value.rule in describe_exception(refused.value)[1]
    return refused.value.rule


def the_file(tmp_path: Path, asked: Asked) -> Path:
    return tmp_path / "approvals" / f"{asked.study_hash}.json"


def test_what_nobody_approved_is_refused_and_what_was_approved_is_not(approvals: Approvals, asked: Asked) -> None:
    assert rule_of(approvals, asked) == "approval.missing"
    approvals.approve(asked, by="Dr. A", expires=LATER, now=NOW)
    assert approvals.check(asked, now=NOW) == "approved by Dr. A"
    assert approvals.given()[0].asked == asked


def test_an_approval_holds_after_a_restart(approvals: Approvals, asked: Asked, tmp_path: Path) -> None:
    approvals.approve(asked, by="Dr. A", expires=LATER, now=NOW)
    assert Approvals(tmp_path, KEY).check(asked, now=NOW) == "approved by Dr. A"


@pytest.mark.slow
@given(
    by=st.text(max_size=100), days=st.floats(0.001, 1000), shift=st.integers(-14 * 60, 14 * 60), micro=st.integers(0, 999_999)
)  # fmt: skip
def test_the_signature_survives_the_file_whatever_is_said(tmp_path: Path, by: str, days: float, shift: int, micro: int) -> None:
    asked = Asked(
        study="s", study_hash="a" * 64, purpose=by, task="t", task_fingerprint="f", architecture="x", num_parameters=3, code_hash="c", rounds=1,
        unit="patient", epsilon=days, noise_multiplier=None, delta=1e-5, evaluation_epsilon=None, leaves=(by, "b"),
    )  # fmt: skip
    approvals = Approvals(tmp_path, KEY)
    expires = (NOW + timedelta(days=days)).replace(microsecond=micro).astimezone(timezone(timedelta(minutes=shift)))
    approvals.approve(asked, by=by, expires=expires, now=NOW)
    if expires > NOW:
        assert approvals.check(asked, now=NOW) == f"approved by {by}"


CHANGES = [
    {"seed": 4}, {"purpose": "another"}, {"rounds": {"count": 4}}, {"training": {"learning_rate": 0.31}}, {"privacy": {"epsilon": 1.9}},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_study_changed_by_one_letter_is_another(
    approvals: Approvals, asked: Asked, task: Task, make_study: Studies, change: dict[str, Any]
) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    other = what_is_asked(make_study(**change), task, site_file())
    assert other.study_hash != asked.study_hash
    assert rule_of(approvals, other) == "approval.missing"


@pytest.mark.parametrize(
    "change", [{"code_hash": "0" * 64}, {"architecture": "x"}, {"task_fingerprint": "x"}, {"num_parameters": 1}, {"leaves": ("all",)}]
)
def test_what_differs_under_the_same_study_must_be_approved_anew(approvals: Approvals, asked: Asked, change: dict[str, Any]) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    other = asked.model_copy(update=change)
    with pytest.raises(NotApprovedError, match=next(iter(change))):
        approvals.check(other, now=NOW)
    assert rule_of(approvals, other) == "approval.altered"
    approvals.approve(other, by="y", expires=LATER, now=NOW)
    assert approvals.check(other, now=NOW) == "approved by y"


def test_a_policy_that_lets_more_leave_must_be_approved_anew(approvals: Approvals, asked: Asked, task: Task, make_study: Studies) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    metrics = json.dumps([metric.name for metric in task.metrics])
    more = what_is_asked(make_study(), task, site_file(exact_metrics="true", allowed_metrics=metrics))
    assert more.study_hash == asked.study_hash
    assert rule_of(approvals, more) == "approval.altered"


def test_an_upgrade_changes_the_code_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = installed_code_hash()
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").write_text("# another installation\n")
    monkeypatch.setattr(module.client, "__file__", str(tmp_path / "client" / "__init__.py"))
    try:
        installed_code_hash.cache_clear()
        first = installed_code_hash()
        (tmp_path / "client" / "__init__.py").write_text("# another installatioN\n")
        installed_code_hash.cache_clear()
        assert len({before, first, installed_code_hash()}) == 3
    finally:
        monkeypatch.undo()
        installed_code_hash.cache_clear()
    assert installed_code_hash() == before


EDITS: list[tuple[str, object]] = [
    ("expires", "2099-01-01T00:00:00Z"), ("by", "the director"), ("approved", "2020-01-01T00:00:00Z"), ("signature", "00" * 64), ("signature", ""),
    ("signature", "abc"), ("asked.code_hash", "0" * 64), ("asked.epsilon", 99.0), ("asked.leaves", []),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), EDITS)
def test_an_edited_approval_is_none(approvals: Approvals, asked: Asked, tmp_path: Path, key: str, value: object) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    path = the_file(tmp_path, asked)
    content = json.loads(path.read_text())
    *tables, name = key.split(".")
    table = content[tables[0]] if tables else content
    assert table[name] != value
    table[name] = value
    path.write_text(json.dumps(content))
    assert rule_of(approvals, asked) == "approval.altered"


def test_an_approval_signed_by_another_key_is_none(asked: Asked, tmp_path: Path) -> None:
    Approvals(tmp_path, FOREIGN).approve(asked, by="x", expires=LATER, now=NOW)
    assert rule_of(Approvals(tmp_path, KEY), asked) == "approval.altered"


def test_an_approval_of_another_study_under_this_one_s_name_is_none(
    approvals: Approvals, asked: Asked, task: Task, make_study: Studies, tmp_path: Path
) -> None:
    other = what_is_asked(make_study(seed=99), task, site_file())
    approvals.approve(other, by="x", expires=LATER, now=NOW)
    the_file(tmp_path, asked).write_bytes(the_file(tmp_path, other).read_bytes())
    assert rule_of(approvals, asked) == "approval.altered"


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff", b'{"asked": 5}', b"[" * 100_000])
def test_a_damaged_approval_is_said_to_be(approvals: Approvals, asked: Asked, tmp_path: Path, content: bytes) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    the_file(tmp_path, asked).write_bytes(content)
    for look in (lambda: approvals.check(asked, now=NOW), approvals.given):
        with pytest.raises(StorageError, match="damaged"):
            look()


def test_damaged_questions_are_said_to_be(approvals: Approvals, asked: Asked, tmp_path: Path) -> None:
    approvals.remember(asked)
    (tmp_path / "asked" / f"{asked.study_hash}.json").write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        approvals.pending()


@pytest.mark.parametrize(("moment", "holds"), [(LATER - timedelta(microseconds=1), True), (LATER, False), (LATER + timedelta(days=1), False)])
def test_an_approval_ends_when_it_was_said_to(approvals: Approvals, asked: Asked, moment: datetime, holds: bool) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    elsewhere = moment.astimezone(timezone(timedelta(hours=-9)))  # a time zone is no way around it
    if holds:
        assert approvals.check(asked, now=elsewhere)
    else:
        assert rule_of(approvals, asked, elsewhere) == "approval.expired"


def test_an_expired_approval_is_not_replaced_by_one_in_advance(asked: Asked, tmp_path: Path) -> None:
    advance = AdvanceApproval(tasks=("tiny",), max_epsilon=10.0, until=date(2031, 1, 1))
    approvals = Approvals(tmp_path, KEY, advance)
    approvals.approve(asked, by="x", expires=NOW, now=NOW - timedelta(days=1))
    assert rule_of(approvals, asked) == "approval.expired"


def test_a_withdrawn_approval_is_none(approvals: Approvals, asked: Asked) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    assert approvals.withdraw(asked.study_hash)
    assert rule_of(approvals, asked) == "approval.missing"
    assert not approvals.withdraw(asked.study_hash)


def test_what_was_asked_is_remembered_until_it_is_decided(approvals: Approvals, asked: Asked) -> None:
    approvals.remember(asked)
    approvals.remember(asked)
    assert approvals.pending() == [asked]
    approvals.approve(approvals.pending()[0], by="x", expires=LATER, now=NOW)
    assert approvals.pending() == []
    assert approvals.check(asked, now=NOW)


UNTIL = date(2030, 5, 1)


@pytest.mark.parametrize(
    ("privacy", "advance", "now", "approved"),
    [
        ({}, {}, NOW, True),
        ({}, {"max_epsilon": 2.0}, NOW, True),  # the study's own
        ({}, {"max_epsilon": 1.999}, NOW, False),
        ({}, {}, datetime(2030, 5, 1, 23, 59, 59, tzinfo=UTC), True),  # the last day counts
        ({}, {}, datetime(2030, 5, 2, tzinfo=UTC), False),
        ({}, {"tasks": ("heart-disease",)}, NOW, False),
        ({"evaluation_epsilon": 2.0}, {"max_epsilon": 2.0}, NOW, True),
        ({"evaluation_epsilon": 2.1}, {"max_epsilon": 2.0}, NOW, False),
        ({"epsilon": None, "noise_multiplier": 5.0}, {"max_epsilon": 1e9}, NOW, False),  # what it costs depends on the site
        ({"unit": "none", "epsilon": None, "delta": None}, {"max_epsilon": 1e9}, NOW, False),
    ],
)  # fmt: skip
def test_what_is_approved_in_advance(
    tmp_path: Path, task: Task, make_study: Studies, privacy: dict[str, Any], advance: dict[str, Any], now: datetime, approved: bool
) -> None:
    allowed = AdvanceApproval(**{"tasks": ("tiny",), "max_epsilon": 3.0, "until": UNTIL, **advance})
    study = Study.from_table({**make_study().to_table(), "privacy": merged(make_study(), privacy)})
    asked = what_is_asked(study, task, site_file())
    approvals = Approvals(tmp_path, KEY, allowed)
    if approved:
        assert approvals.check(asked, now=now) == "approved in advance"
    else:
        assert rule_of(approvals, asked, now) == "approval.missing"


def merged(study: Study, changes: dict[str, Any]) -> dict[str, Any]:
    """The study's table of privacy with changes; None takes a key away."""
    if changes.get("unit") == "none":
        return {"unit": "none"}
    table = study.to_table()["privacy"]
    assert isinstance(table, dict)
    return {key: value for key, value in {**table, **changes}.items() if value is not None}


def test_what_is_shown_says_what_leaves(task: Task, make_study: Studies) -> None:
    metrics = json.dumps([metric.name for metric in task.metrics])
    private = what_is_asked(make_study(), task, site_file())
    assert any("with noise" in line for line in private.leaves)
    assert all(line.startswith("nothing of") for line in private.leaves[2:])
    assert len(private.leaves) > 2
    plain = what_is_asked(Study.from_table({**make_study().to_table(), "privacy": {"unit": "none"}}), task, site_file(allowed_metrics=metrics))
    assert any("WITHOUT NOISE" in line for line in plain.leaves)
    assert plain.promise.startswith("NO PRIVACY")
    assert private.promise == "epsilon 2 for each patient at delta 0.001"
    assert any("exact" in line for line in plain.leaves[2:])


def test_a_full_disk_approves_nothing(approvals: Approvals, asked: Asked, tmp_path: Path) -> None:
    (tmp_path / "approvals").write_text("in the way of the folder")
    with pytest.raises(StorageError):
        approvals.approve(asked, by="x", expires=LATER, now=NOW)
    (tmp_path / "approvals").unlink()
    assert rule_of(approvals, asked) == "approval.missing"


def test_an_approval_file_says_all_that_was_shown(approvals: Approvals, asked: Asked, tmp_path: Path) -> None:
    approvals.approve(asked, by="x", expires=LATER, now=NOW)
    assert Approval.model_validate_json(the_file(tmp_path, asked).read_bytes()).asked == asked


def test_a_coordinator_that_asks_without_end_fills_no_disk(approvals: Approvals, asked: Asked) -> None:
    for number in range(MAX_ASKED + 20):
        approvals.remember(asked.model_copy(update={"study_hash": f"{number:064x}"}))
    assert len(approvals.pending()) == MAX_ASKED

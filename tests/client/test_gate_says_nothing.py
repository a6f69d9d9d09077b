"""A patient's text, wherever it is planted, is neither in an answer's bytes nor in the audit log; what is told is a code and a fixed sentence."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.gate
import client.local_work
from shared.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    LedgerError,
    PolicyRefusedError,
    ProtocolError,
    SchemaError,
    StorageError,
    WardroundError,
)
from shared.messages import Enrolled, Evaluated, Refused, Trained
from shared.metrics import Statistic
from shared.study import Study
from tests.gated import GatedSite, enrolment, gated, patients, study, the_task

pytestmark = pytest.mark.slow  # seconds altogether

TEXT = "PATIENT TEXT Anna Meier"
MARKS = (b"PATIENT", b"Anna Meier", b"Meier")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[GatedSite]:
    """A hospital that has approved the small study."""
    made = gated(tmp_path)["north"]
    made.approve(study())
    yield made
    made.gate.close()


def check_silent(site: GatedSite, *contents: bytes) -> None:
    """Nothing of the text is in what left, nor in any file of the state but the hospital's own data."""
    for content in (*contents, *(path.read_bytes() for path in (site.kit / "state").rglob("*") if path.is_file())):
        assert not [mark for mark in MARKS if mark in content]


def check_refused(site: GatedSite, answered: tuple[object, object, bytes], code: str | tuple[str, ...] = "E") -> None:
    answer, _, content = answered
    assert isinstance(answer, Refused)
    assert answer.code.startswith(code)
    check_silent(site, content)


class AnnaMeierError(Exception):
    """A class of a foreign library."""


ERRORS: list[BaseException] = [
    ValueError(TEXT), KeyError(TEXT), RuntimeError(TEXT, {"row": TEXT}), OSError(2, TEXT, TEXT), UnicodeDecodeError("utf-8", TEXT.encode(), 0, 1, TEXT),
    AnnaMeierError(TEXT), AssertionError(TEXT), MemoryError(TEXT), RecursionError(TEXT), StopIteration(TEXT),
    WardroundError(TEXT, TEXT), SchemaError(TEXT, TEXT), StorageError(TEXT), ConfigurationError(TEXT), PolicyRefusedError(TEXT), LedgerError(TEXT),
    BudgetExhaustedError(TEXT), ProtocolError(TEXT),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["Learner", "evaluate_parameters"])
def test_an_exception_s_text_stays(site: GatedSite, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
    site.enrol(study())

    def fail(*arguments: object, **rest: object) -> None:
        try:
            raise ValueError(TEXT)
        except ValueError as cause:
            raise error from cause

    monkeypatch.setattr(client.local_work, where, fail)
    check_refused(site, site.train(study()), getattr(error, "code", "E101"))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_loader_s_text_stays(site: GatedSite, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def load(path: Path | None, options: object) -> None:
        raise error

    monkeypatch.setattr(client.gate, "resolve_task", lambda name: replace(the_task(), load_cohort=load))
    check_refused(site, site.ask_whole(enrolment(study())), getattr(error, "code", "E101"))


def header_of(change: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    def spoil(csv: str) -> str:
        first, rest = csv.split("\n", 1)
        return ",".join(change(first.split(","))) + "\n" + rest

    return spoil


def value_of(column: int) -> Callable[[str], str]:
    def spoil(csv: str) -> str:
        lines = csv.split("\n")
        fields = lines[7].split(",")
        fields[column] = TEXT
        lines[7] = ",".join(fields)
        return "\n".join(lines)

    return spoil


SPOILS: dict[str, Callable[[str], str]] = {
    "a column's name": header_of(lambda names: [TEXT, *names[1:]]),
    "the label's name": header_of(lambda names: [*names[:-1], TEXT]),
    "every column's name": header_of(lambda names: [f"{TEXT} {number}" for number, _ in enumerate(names)]),
    "a number": value_of(0),
    "a label": value_of(30),
    "the whole file": lambda csv: f"{TEXT}\n{TEXT}\n",
    "no table": lambda csv: f'"{TEXT}\n' + csv,
    "bytes that are no text": lambda csv: TEXT + "\udcff\n" + csv,
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_what_is_in_the_cohort_s_file_stays(site: GatedSite, spoil: Callable[[str], str]) -> None:
    (site.kit / "patients.csv").write_text(spoil(patients()), errors="surrogateescape")
    check_refused(site, site.ask_whole(enrolment(study())), "E50")


@pytest.mark.parametrize("kind", ["missing", "unreadable", "a folder with two"])
def test_a_file_s_name_stays(site: GatedSite, kind: str) -> None:
    path = site.kit / f"{TEXT}.csv"
    if kind == "unreadable":
        path.write_bytes(b"\x00\xff\xfe")
    elif kind == "a folder with two":
        path.mkdir()
        for number in range(2):
            (path / f"{TEXT}{number}.csv").write_text(patients())
    site.edit("patients.csv", path.name)
    check_refused(site, site.ask_whole(enrolment(study())), "E50")


def test_a_file_with_such_a_name_may_be_used(site: GatedSite) -> None:
    (site.kit / "patients.csv").rename(site.kit / f"{TEXT}.csv")
    site.edit("patients.csv", f"{TEXT}.csv")
    for answer, _, content in (site.ask_whole(enrolment(study())), site.train(study()), site.evaluate(study())):
        assert isinstance(answer, Enrolled | Trained | Evaluated)
        check_silent(site, content)


def test_a_column_that_nobody_declared_stays(site: GatedSite) -> None:
    lines = patients().strip().split("\n")
    table = [f"{lines[0]},{TEXT}", *(f"{line},{TEXT}" for line in lines[1:])]
    (site.kit / "patients.csv").write_text("\n".join(table) + "\n")
    for answered in (site.ask_whole(enrolment(study())), site.train(study())):
        check_silent(site, answered[2])


@pytest.mark.parametrize("line", [f'"{TEXT}" = 5', f'options = {{ "{TEXT}" = 5 }}', f'options = {{ "{TEXT}" = [1] }}', f"{TEXT}"])
def test_a_key_of_the_site_file_stays(site: GatedSite, line: str) -> None:
    site.edit("declared_size = 140", f"declared_size = 140\n{line}")
    check_refused(site, site.ask_whole(enrolment(study())), ("E112", "E300"))


def test_a_statistic_that_nobody_declared_stays(site: GatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.enrol(study())
    monkeypatch.setattr(client.local_work, "evaluate_parameters", lambda *arguments, **rest: {TEXT: np.zeros(3)})
    check_refused(site, site.train(study()))


def test_a_statistic_that_fails_says_nothing(site: GatedSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.enrol(study())

    def summarise(self: Statistic, *arguments: object) -> None:
        raise KeyError(TEXT)

    monkeypatch.setattr(type(the_task().metrics[0].statistic), "summarise", property(lambda self: summarise), raising=False)
    check_refused(site, site.train(study()))


STUDIES: list[dict[str, Any]] = [
    {"name": TEXT}, {"name": f"{TEXT}\n"}, {"task": TEXT}, {TEXT: 5}, {"rounds": {TEXT: 5}}, {"rounds": {"count": TEXT}}, {"privacy": {"unit": TEXT}},
    {"strategy": {"name": TEXT}}, {"strategy": {"name": "fedavg", TEXT: 1}},
]  # fmt: skip


@pytest.mark.parametrize("change", STUDIES, ids=range(len(STUDIES)))
def test_a_study_that_says_it_is_not_echoed(site: GatedSite, change: dict[str, Any]) -> None:
    asked = enrolment(study()).model_copy(update={"study": {**study().to_table(), **change}})
    check_refused(site, site.ask_whole(asked))


def test_a_study_whose_purpose_says_it_is_shown_to_the_hospital_alone(site: GatedSite) -> None:
    asked = Study.from_table({**study().to_table(), "purpose": TEXT})
    answer, _, content = site.ask_whole(enrolment(asked))
    assert isinstance(answer, Refused)
    assert not [mark for mark in MARKS if mark in content + site.audit_path().read_bytes()]
    [path] = (site.kit / "state" / "asked").iterdir()
    assert TEXT in path.read_text()

"""WFDB records: what comes back, and every bad file, claim and address that is refused."""

import builtins
import io
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError, WardroundError
from shared.tasks import wfdb_records
from shared.tasks.wfdb_records import Annotations, Lead, find_records, read_annotations, read_lead
from tests.shared.wfdb_files import CODES, ECG, NO_VALUE, NUM, RATE, SECRET, annotation_bytes, needs_ecg, write_record


def lead_of(folder: Path, name: str = "r", lead: str | None = None) -> Lead:
    return read_lead(folder, name, lead=lead, source="record 1")


def marks_of(folder: Path, name: str = "r") -> Annotations:
    return read_annotations(folder, name, "atr", of=lead_of(folder, name), source="record 1")


# What comes back ----------------------------------------------------------------------------------------------------------------


def test_a_signal_comes_back_in_millivolts(tmp_path: Path) -> None:
    values = write_record(tmp_path, signals=["16 400(-50)/mV 12 0 0 0 0 MLII"]).astype(np.float64)
    lead = lead_of(tmp_path)
    assert np.allclose(lead.millivolts, (values[:, 0] + 50) / 400, atol=1e-12) and lead.rate == RATE and lead.preferred
    write_record(tmp_path, signals=["16 0.4/uV 12 0 0 0 0 V5"])
    lead = lead_of(tmp_path)
    assert np.allclose(lead.millivolts, values[:, 0] / 400, atol=1e-12) and not lead.preferred


def test_a_value_that_the_device_did_not_give_is_nan(tmp_path: Path) -> None:
    values = write_record(tmp_path)[:, 0]
    values[100:120] = NO_VALUE
    (tmp_path / "r.dat").write_bytes(values.astype("<i2").tobytes())
    assert np.flatnonzero(np.isnan(lead_of(tmp_path).millivolts)).tolist() == list(range(100, 120))
    (tmp_path / "r.dat").write_bytes(np.full(NUM, NO_VALUE, dtype="<i2").tobytes())
    with pytest.raises(SchemaError, match="none that is a number"):
        lead_of(tmp_path)


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [(("V5", "II", "MLII"), None, 2), (("V1", "ii"), None, 1), (("ABP", "V1", "V2"), None, 1), (("MLII", "V5"), "v5", 1), (("RESP", "Frank X"), "frank x", 1)],
)  # fmt: skip
def test_the_lead_is_chosen_by_its_name(tmp_path: Path, names: tuple[str, ...], asked: str | None, expected: int) -> None:
    values = write_record(tmp_path, signals=[f"16 200 12 0 0 0 0 {name}" for name in names])
    assert np.allclose(lead_of(tmp_path, lead=asked).millivolts, values[:, expected] / 200)


def test_annotations_come_back(tmp_path: Path) -> None:
    marks = [(10, "+"), *((20 + 90 * place, symbol) for place, symbol in enumerate(sorted(CODES)))]
    write_record(tmp_path, marks=marks)
    found = marks_of(tmp_path)
    assert list(zip(found.sample.tolist(), found.symbol.tolist(), strict=True)) == marks
    write_record(tmp_path, marks=[(5, "N"), (1900, "V")])  # farther apart than ten bits say
    assert marks_of(tmp_path).sample.tolist() == [5, 1900]


def test_records_are_found_or_listed(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_record(tmp_path / "ward", name)
    write_record(tmp_path, "c")
    assert find_records(tmp_path, task="t") == ["c", "ward/a", "ward/b"]
    (tmp_path / "RECORDS").write_text("ward/b\r\n\nc\n")
    assert find_records(tmp_path, task="t") == ["ward/b", "c"]


@needs_ecg
def test_record_100_has_the_beats_that_its_publisher_counts() -> None:
    lead = read_lead(ECG / "mitdb_100", "100", lead=None, source="100")
    found = read_annotations(ECG / "mitdb_100", "100", "atr", of=lead, source="100")
    assert Counter(found.symbol.tolist()) == {"N": 2239, "A": 33, "V": 1, "+": 1} and lead.millivolts.shape == (650_000,) and lead.rate == 360
    assert lead.millivolts[0] == pytest.approx((995 - 1024) / 200)


@needs_ecg
@pytest.mark.parametrize(("name", "rate", "num", "first"), [("s0010_re", 1000, 38_400, -0.229), ("a103l", 250, 82_500, -0.0236), ("03700181", 125, 75_000, 0.0189)])  # fmt: skip
def test_other_formats_are_read_and_a_record_without_annotations_is_named(name: str, rate: float, num: int, first: float) -> None:
    lead = read_lead(ECG / "wfdb_samples", name, lead=None, source="record 1")
    assert lead.rate == rate and lead.millivolts.shape == (num,) and lead.millivolts[0] == pytest.approx(first, abs=1e-4)
    with pytest.raises(DataMissingError, match="record 1: annotations: expected a file, found none"):
        read_annotations(ECG / "wfdb_samples", name, "atr", of=lead, source="record 1")


# Headers that lie, or lead elsewhere --------------------------------------------------------------------------------------------

GOOD = f"r 1 {RATE} {NUM}\nr.dat 16 200 12 0 0 0 0 MLII\n"


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("", "empty"), ("# only a comment\n", "empty"), (f"r 1 {RATE} {NUM}\n", "line for each signal"), (f"r 2 {RATE} {NUM}\nr.dat 16 200 12 0 0 0 0 II\n", "signal lines"),
        ("\x01\x02", "plain characters"), ("r one 250 2000\nr.dat 16 200\n", "cannot be read"), (f"r/2 1 {RATE} {NUM}\nr1 1000\nr2 1000\n", "one segment"),
        (GOOD.replace(f"{NUM}", f"{10**12}"), "cut short"), (GOOD.replace(f"{NUM}", "9" * 400), "cut short"), (GOOD.replace(f" {NUM}", ""), "states its samples"),
        (GOOD.replace(f" {NUM}", " 0"), "states its samples"), (GOOD.replace(f" {NUM}", " 100"), "states its samples"),
        (GOOD.replace(" 250 ", " 0 "), "another rate"), (GOOD.replace(" 250 ", " 1e9 "), "cannot be read|another rate|states"), (GOOD.replace(" 250 ", " 999999 "), "another rate"),
        (GOOD.replace(" 250 ", " 3 "), "another rate"), (GOOD.replace("16 200", "16x1000000000 200"), "cut short"), (GOOD.replace("16 200", "16+99999999999 200"), "cut short"),
        (GOOD.replace("16 200", "16:99999999999 200"), "askew"), (GOOD.replace("16 200", "516 200"), "signal format"), (GOOD.replace("16 200", "17 200"), "signal format"),
        (GOOD.replace(" 200 ", " 0 "), "calibrated in mV, found none"), (GOOD.replace(" 200 ", " 0/mV "), "calibrated"), (GOOD.replace(" 200 ", " 200/mmHg "), "calibrated"),
        (GOOD.replace(" 200 ", " 1e-300 "), "calibrated"), (GOOD.replace("MLII", "PLETH"), "electrocardiogram lead"), (GOOD.replace(" 200 ", " 1.2.3 "), "calibrated|number as"),
        (GOOD.replace("r.dat", "/etc/passwd"), "path or an address"), (GOOD.replace("r.dat", "../r.dat"), "path or an address"), (GOOD.replace("r.dat", "ward\\r.dat"), "path or"),
        (GOOD.replace("r.dat", "http://127.0.0.1/r.dat"), "path or an address"), (GOOD.replace("r.dat", "s3://bucket/r.dat"), "path or an address"),
        (GOOD.replace("r.dat", "x::http://127.0.0.1/r.dat"), "path or an address"), (GOOD.replace("r.dat", "~"), "path or an address"), (GOOD.replace("r.dat", "other.dat"), "found none"),
        (f"r 3 {RATE} {NUM}\nr.dat 16 200 12 0 0 0 0 II\nq.dat 16 200 12 0 0 0 0 V1\nr.dat 16 200 12 0 0 0 0 V2\n", "mixes files"),
        (f"r 2 {RATE} {NUM}\nr.dat 16 200 12 0 0 0 0 II\nr.dat 212 200 12 0 0 0 0 V1\n", "one signal format"),
        (GOOD.replace("MLII", "MLII é"), "plain characters"),
    ],
)  # fmt: skip
def test_a_bad_header_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, match: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is asked of the network, and no signal is read")

    write_record(tmp_path)
    (tmp_path / "r.hea").write_text(header + f"# {SECRET}\n")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(wfdb_records._library(), "rdrecord", refuse)
    with pytest.raises((SchemaError, DataMissingError), match=match) as error:
        lead_of(tmp_path)
    assert error.value.what.startswith("record 1") and "Muster" not in str(error.value) and error.value.__cause__ is None


def test_a_header_of_other_bytes_is_refused(tmp_path: Path) -> None:
    write_record(tmp_path)
    (tmp_path / "r.hea").write_bytes(GOOD.encode() + "# Müller\n".encode("latin-1"))
    with pytest.raises(SchemaError, match="UTF-8"):
        lead_of(tmp_path)
    (tmp_path / "r.hea").write_text(GOOD + "# Müller, Œuvre\n")
    assert lead_of(tmp_path).rate == RATE
    with open(tmp_path / "r.hea", "ab") as file:
        file.truncate(2**21)
    with pytest.raises(SchemaError, match="1 MiB"):
        lead_of(tmp_path)


def test_only_the_record_s_own_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    plain_open = builtins.open

    def watched(file: object, *arguments: object, **options: object) -> object:
        opened.append(str(file))
        return plain_open(file, *arguments, **options)  # type: ignore[call-overload]

    write_record(tmp_path)
    marks_of(tmp_path)  # all is imported
    monkeypatch.setattr(builtins, "open", watched)
    monkeypatch.setattr(io, "open", watched)
    marks_of(tmp_path)
    assert {Path(name).parent for name in opened} == {tmp_path} and len({Path(name).name for name in opened}) == 3


@pytest.mark.parametrize("folder", ["a::b", "ward[1]", "what?", "all*"])
def test_a_path_that_the_library_would_take_for_several_is_refused(tmp_path: Path, folder: str) -> None:
    write_record(tmp_path / folder)
    with pytest.raises(SchemaError, match="expected a path without"):
        lead_of(tmp_path / folder)


def test_signals_that_are_missing_or_cut_short(tmp_path: Path) -> None:
    write_record(tmp_path)
    content = (tmp_path / "r.dat").read_bytes()
    (tmp_path / "r.dat").write_bytes(content[:-2])
    with pytest.raises(SchemaError, match="cut short"):
        lead_of(tmp_path)
    (tmp_path / "r.dat").write_bytes(b"")
    with pytest.raises(DataMissingError, match="empty"):
        lead_of(tmp_path)
    (tmp_path / "r.dat").unlink()
    with pytest.raises(DataMissingError, match="record 1: signal: expected a file, found none"):
        lead_of(tmp_path)
    (tmp_path / "r.dat").mkdir()
    with pytest.raises((DataMissingError, SchemaError)):
        lead_of(tmp_path)
    with pytest.raises(DataMissingError, match="header: expected a file, found none"):
        lead_of(tmp_path, "elsewhere")


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"", DataMissingError, "empty"), (annotation_bytes([(5, "N")])[:-2], SchemaError, "cut short"), (annotation_bytes([(5, "N")])[:-1], SchemaError, "cut short"),
        (annotation_bytes([(5, "N"), (NUM, "N")]), SchemaError, "within the record"), (annotation_bytes([(500, "N"), (5, "N")]), SchemaError, "order of time"),
        (b"\0\xec\0\0", SchemaError, "cut short|annotations"), (b"\xff\xff" * 40 + b"\0\0", SchemaError, "annotations"),
        (annotation_bytes([(0, "+"), (5, "N")], note="## time resolution: 360"), SchemaError, "within the record"),
    ],
)  # fmt: skip
def test_bad_annotations_are_refused(tmp_path: Path, content: bytes, error: type[WardroundError], match: str) -> None:
    write_record(tmp_path)
    if b"time" in content:  # as the library writes it: a note at time 0
        content = (22 << 10).to_bytes(2, "little") + content[2:]
    (tmp_path / "r.atr").write_bytes(content)
    with pytest.raises(error, match=match):
        marks_of(tmp_path)


@pytest.mark.slow
def test_whatever_is_in_the_files_the_errors_are_ours(tmp_path: Path) -> None:
    write_record(tmp_path)
    good = {ending: (tmp_path / f"r.{ending}").read_bytes() for ending in ("hea", "dat", "atr")}
    rng, num_refused = np.random.default_rng(3), 0
    for trial in range(240):
        ending = ("hea", "atr", "hea", "dat")[trial % 4]
        content = bytearray(good[ending])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(min(len(content), 60))] = rng.choice([rng.integers(256), *b" 0:+/()x.-\n"])
        (tmp_path / f"r.{ending}").write_bytes(bytes(content[: rng.integers(len(content))] if rng.random() < 0.2 else content))
        try:
            marks_of(tmp_path)
        except WardroundError as error:
            num_refused += 1
            assert "Muster" not in str(error)
        (tmp_path / f"r.{ending}").write_bytes(good[ending])
    assert 60 < num_refused < 240


# Folders and permissions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"../r\n", "1 others"), (b"/etc/r\nhttp://x/r\n", "2 others"), (b".\n", "1 others"), (b"a::b\n", "1 others"),
        (b"r\nr\n", "every record once"), (b"r\n./r\n", "every record once"), (b"M\xfcller\n", "UTF-8"),
    ],
)  # fmt: skip
def test_a_list_that_leads_elsewhere_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    write_record(tmp_path)
    (tmp_path / "RECORDS").write_bytes(content)
    with pytest.raises(SchemaError, match=match):
        find_records(tmp_path, task="t")


def test_no_records(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="found nothing"):
        find_records(tmp_path / "absent", task="t")
    with pytest.raises(DataMissingError, match="task t: expected records"):
        find_records(tmp_path, task="t")
    write_record(tmp_path)
    with pytest.raises(DataMissingError, match="got a file"):
        find_records(tmp_path / "r.hea", task="t")
    (tmp_path / "RECORDS").write_text("\n")
    with pytest.raises(DataMissingError, match="found none"):
        find_records(tmp_path, task="t")


@pytest.mark.parametrize("ending", [".hea", ".dat", ".atr"])
def test_a_permission_is_no_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    def forbid(function: Callable[..., object]) -> Callable[..., object]:
        def guarded(path: object, *arguments: object, **options: object) -> object:
            if str(path).endswith(ending):
                raise PermissionError
            return function(path, *arguments, **options)

        return guarded

    write_record(tmp_path)
    marks_of(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", forbid(Path.read_bytes))
    monkeypatch.setattr(io, "open", forbid(io.open))
    monkeypatch.setattr(builtins, "open", forbid(builtins.open))
    with pytest.raises(DataAccessError, match="may not read"):
        marks_of(tmp_path)


def test_a_folder_that_may_not_be_read_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: object) -> None:
        raise PermissionError

    write_record(tmp_path)
    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataAccessError, match="may not read"):
        find_records(tmp_path, task="t")


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    write_record(tmp_path)
    monkeypatch.setattr(wfdb_records.importlib, "import_module", absent)
    with pytest.raises(ConfigurationError, match=r'pip install "wardround\[ecg\]"'):
        lead_of(tmp_path)


def test_nothing_prints_a_signal_or_a_comment(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    write_record(tmp_path)
    found = lead_of(tmp_path), marks_of(tmp_path)
    assert repr(found[0]) == "Lead(rate=250.0, preferred=True)" and repr(found[1]) == "Annotations()"
    assert not caplog.text and capsys.readouterr() == ("", "")

"""Files of the first 48 hours in intensive care: what is read, binned and carried forward, and every bad file that is refused or counted."""

import gzip
import io
import math
import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ConfigurationError, DataAccessError, DataError, DataMissingError, SchemaError
from shared.task import resolve_task
from shared.tasks import icu_mortality, length_of_stay, surgical_risk
from shared.tasks.icu_series import binned, cohort_of, descriptors, series_inputs
from shared.tasks.icu_stays import DESCRIPTOR_NAMES, FAR_OUT, NUM_VARIABLES, UNITS, VARIABLES, IcuStays, Variable
from shared.tasks.icu_synthetic import synthetic_stays
from shared.tasks.physionet_2012 import load_stays, read_archive

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "physionet2012"
INDEX = {variable.name: index for index, variable in enumerate(VARIABLES)}
HEADER = "Time,Parameter,Value"
ROWS = ("00:07,HR,80", "01:30,HR,100", "05:00,HR,120", "47:59,HR,60", "48:00,HR,90", "02:00,Urine,120", "03:00,Urine,80", "00:10,Weight,-1")


def record(number: int, *rows: str, unit: int = 3, age: str = "60", gender: str = "1", height: str = "-1") -> bytes:
    first = (f"RecordID,{number}", f"Age,{age}", f"Gender,{gender}", f"Height,{height}", f"ICUType,{unit}")
    glucose = np.random.default_rng(number).normal(120, 15, size=40).tolist()  # so that no two are alike, nor an archive of them small
    return "\n".join([HEADER, *(f"00:00,{row}" for row in first), *(rows or [*(f"06:00,Glucose,{value}" for value in glucose), *ROWS]), ""]).encode()


def outcomes(numbers: list[int]) -> str:
    rows = [f"{number},6,1,{-1 if number % 7 == 0 else 5 + number % 4},-1,{number % 2}" for number in numbers]
    return "\n".join(["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death", *rows, ""])


def ward(folder: Path, changes: Mapping[str, bytes] | None = None, *, count: int = 40) -> Path:
    """A folder of `count` records and their outcomes, then `changes` of files."""
    folder.mkdir(exist_ok=True)
    numbers = list(range(101, 101 + count))
    (folder / "Outcomes-a.txt").write_text(outcomes(numbers))
    for number in numbers:
        (folder / f"{number}.txt").write_bytes(record(number, unit=1 + number % 4))
    for name, body in (changes or {}).items():
        (folder / name).write_bytes(body)
    return folder


def packed(folder: Path, members: list[tuple[tarfile.TarInfo, bytes]], *, count: int = 40) -> Path:
    """A folder of the outcomes of `count` stays and an archive with these members."""
    folder.mkdir(exist_ok=True)
    (folder / "Outcomes-a.txt").write_text(outcomes(list(range(101, 101 + count))))
    with tarfile.open(folder / "set-a.tar.gz", "w:gz") as archive:
        for info, body in members:
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return folder


def good_members(count: int = 40) -> list[tuple[tarfile.TarInfo, bytes]]:
    directory = tarfile.TarInfo("set-a")
    directory.type = tarfile.DIRTYPE
    return [(directory, b""), *((tarfile.TarInfo(f"set-a/{number}.txt"), record(number, unit=1 + number % 4)) for number in range(101, 101 + count))]


def load(path: Path | None, **options: object) -> IcuStays:
    return load_stays(path, options, task="icu-mortality")


def test_a_folder_and_an_archive_give_the_same_stays(tmp_path: Path) -> None:
    plain, archived = load(ward(tmp_path / "plain")), load(packed(tmp_path / "packed", good_members()))
    beside = load(tmp_path / "packed" / "set-a.tar.gz")
    (tmp_path / "nested").mkdir()
    ward(tmp_path / "nested" / "set-a").joinpath("Outcomes-a.txt").rename(tmp_path / "nested" / "Outcomes-a.txt")
    nested = load(tmp_path / "nested")
    for other in (archived, beside, nested):
        assert other.ids == plain.ids and np.array_equal(other.value, plain.value) and np.array_equal(other.died, plain.died)
        assert other.notes == plain.notes
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == ["Outcomes-a.txt", "set-a.tar.gz"]  # nothing was unpacked


def test_values_are_binned_scaled_and_carried_forward(tmp_path: Path) -> None:
    stays = load(ward(tmp_path / "ward"))
    means, counts = binned(stays, 4)
    heart, urine = INDEX["HR"], INDEX["Urine"]
    assert counts[0, :, heart].tolist() == [2, 1, *[0] * 9, 2] and means[0, [0, 1, 11], heart].tolist() == [90, 120, 75]
    assert means[0, 0, urine] == 50  # 200 mL in four hours
    series, _ = series_inputs(stays, 4)
    value, mask, gap = (series[0, :, heart + part * NUM_VARIABLES] for part in range(3))
    low, high = VARIABLES[heart].usual
    scaled = [2 * (rate - low) / (high - low) - 1 for rate in (90, 120, 75)]
    assert np.allclose(value, [scaled[0], *[scaled[1]] * 10, scaled[2]], atol=1e-6) and mask.tolist() == [1, 1, *[0] * 9, 1]
    assert np.allclose(gap, [0, *(np.arange(10) / 12), 0])
    never = INDEX["Lactate"]
    assert not series[0, :, [never, never + NUM_VARIABLES]].any() and (series[0, :, never + 2 * NUM_VARIABLES] == 1).all()


def test_three_tasks_read_the_same_files(tmp_path: Path) -> None:
    folder, numbers = ward(tmp_path / "ward"), range(101, 141)
    mortality, stay, surgical = (resolve_task(name).load_cohort(folder, {}) for name in ("icu-mortality", "length-of-stay", "surgical-risk"))
    assert mortality.num_patients == 40 and mortality.labels.tolist() == [number % 2 for number in numbers]
    home = [number for number in numbers if number % 2 == 0 and number % 7]  # the odd ones died, and of the sevenths it is not known
    assert stay.patient_ids == tuple(map(str, home)) and stay.labels.tolist() == [5 + number % 4 for number in home]
    assert all(1 + int(name) % 4 in (2, 4) for name in surgical.patient_ids) and surgical.notes["stays_not_surgical"] == surgical.num_patients == 20
    assert set(surgical.attributes["site"].tolist()) == {"cardiac-surgery", "surgical"} and set(mortality.attributes["site"].tolist()) == set(
        UNITS.values()
    )
    medical = {f"{number}.txt": record(number, unit=3) for number in numbers}
    with pytest.raises(DataMissingError, match="ICUType 2 or 4, found none"):
        resolve_task("surgical-risk").load_cohort(ward(tmp_path / "medical", medical), {})


def test_no_step_knows_what_comes_after_it(tmp_path: Path) -> None:
    stays = synthetic_stays(20, 3)
    early = stays.minute < 24 * 60
    cut = replace(stays, stay=stays.stay[early], variable=stays.variable[early], minute=stays.minute[early], value=stays.value[early])
    whole, known = series_inputs(stays, 4)[0], series_inputs(cut, 4)[0]
    assert np.array_equal(whole[:, :6], known[:, :6]) and not np.array_equal(whole[:, 6:], known[:, 6:])


def test_scaling_is_the_declared_one() -> None:
    for variable in VARIABLES:
        assert variable.low <= variable.usual[0] < variable.usual[1] <= variable.high
        assert np.allclose(variable.scaled(np.array(variable.usual, dtype=np.float64)), [-1, 1], atol=1e-6)
    flow = Variable(name="x", unit="", low=0.1, high=100, usual=(1, 10), scale="log")
    assert flow.scaled(np.array([0.0, 1e9])).tolist() == [-FAR_OUT, FAR_OUT] and math.isclose(
        flow.scaled(np.array([math.sqrt(10)]))[0], 0, abs_tol=1e-6
    )


def test_unknown_and_implausible_values_count_as_not_measured(tmp_path: Path) -> None:
    bodies = {f"{number}.txt": record(number, "00:10,Weight,-1", "00:20,HR,80", "00:30,pH,7.4", "00:40,Caffeine,3") for number in range(101, 141)}
    bodies["110.txt"] = record(110, "00:10,Weight,80", "00:20,HR,0", "00:30,pH,735")
    stays = load(ward(tmp_path / "ward", bodies))
    assert stays.notes["values_unknown"] == 39 and stays.notes["values_implausible"] == 2 and stays.notes["values_of_unknown_parameters"] == 39
    series, _ = series_inputs(stays, 4)
    assert not series[9, :, NUM_VARIABLES + INDEX["HR"]].any() and series[9, 0, NUM_VARIABLES + INDEX["Weight"]] == 1


def test_another_unit_is_noticed(tmp_path: Path) -> None:
    fahrenheit = {f"{number}.txt": record(number, "00:10,Temp,98.6") for number in range(101, 105)}
    with pytest.raises(SchemaError, match=r"'Temp': expected values from 25 to 45 degrees C, got 4 of 4 outside; check the unit"):
        load(ward(tmp_path / "ward", fahrenheit))
    inches = {f"{number}.txt": record(number, height="67") for number in range(101, 105)}
    with pytest.raises(SchemaError, match="'Height'"):
        descriptors(load(ward(tmp_path / "inches", inches)))


BAD_RECORDS = {
    "empty": b"",
    "header alone": HEADER.encode(),
    "another header": record(105).replace(b"Parameter", b"Name"),
    "cut off": record(105)[:-9],
    "not UTF-8": record(105) + b"04:00,HR,\xff\xfe\n",
    "quoted newline": record(105) + b'04:00,"H\nR",80\n',
    "text as a value": record(105) + b"04:00,HR,high\n",
    "NaN": record(105) + b"04:00,HR,nan\n",
    "infinity": record(105) + b"04:00,HR,inf\n",
    "no time": record(105) + b"soon,HR,80\n",
    "after 48 hours": record(105) + b"48:01,HR,80\n",
    "another patient's": record(106),
    "another unit": record(105, unit=5),
    "age as text": record(105, age="old"),
    "gender unheard of": record(105, gender="7"),
    "too large": record(105) + b"04:00,HR,80\n" * 100_000,
}


@pytest.mark.parametrize("kind", list(BAD_RECORDS))
def test_one_bad_record_is_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    folder = ward(tmp_path / "ward", {"105.txt": BAD_RECORDS[kind]})
    stays = load(folder)
    assert len(stays.ids) == 39 and "105" not in stays.ids and stays.notes["records_unreadable"] == 1
    assert stays.stay.max() == 38 and len(stays.died) == len(stays.days) == 39
    with pytest.raises(SchemaError, match=r"at most a share of 0 of records that cannot be used, got 1 of 40; the first: expected") as error:
        load(folder, tolerance=0)
    assert "105" not in str(error.value)  # a patient's number


def test_more_bad_records_than_tolerated_are_an_error(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward", {f"{number}.txt": b"" for number in (101, 102, 103)})
    with pytest.raises(SchemaError, match="got 3 of 40"):
        load(folder)
    assert load(folder, tolerance=0.1).notes["records_unreadable"] == 3
    for wrong in (-1, 0.6, "all"):
        with pytest.raises(ConfigurationError, match="tolerance"):
            load(folder, tolerance=wrong)
    with pytest.raises(ConfigurationError, match="hours"):
        load(folder, hours=24)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("105,6,1,5,-1,2", "label"),
        ("105,6,1,5,-1,", "no label"),
        ("105,6,1,nan,-1,0", "NaN"),
        ("105,6,1,long,-1,0", "text"),
        ("999,6,1,5,-1,0", "absent"),
    ],
)
def test_a_stay_without_a_usable_outcome_is_left_out(tmp_path: Path, row: str, reason: str) -> None:
    folder = ward(tmp_path / "ward")
    lines = [row if line.startswith("105,") else line for line in (folder / "Outcomes-a.txt").read_text().splitlines()]
    (folder / "Outcomes-a.txt").write_text("\n".join(lines))
    notes = load(folder).notes
    assert notes["records_without_outcome"] == 1 and notes["outcomes_without_record"] == (reason == "absent")


def test_bad_outcomes(tmp_path: Path) -> None:
    folder = ward(tmp_path / "ward")
    table, text = folder / "Outcomes-a.txt", (folder / "Outcomes-a.txt").read_text()
    cases: list[tuple[bytes, type[DataError], str]] = [
        (b"", DataMissingError, "empty"),
        (text.splitlines()[0].encode(), DataMissingError, "expected a row"),
        (text.replace("In-hospital_death", "In-hospital death").encode(), SchemaError, "In-hospital_death"),
        (text.encode() + b"101,6,1,5,-1,0\n", SchemaError, "each patient once"),
        (text.encode() + b"\xff\xfe\n", SchemaError, "UTF-8"),
        (text.encode() + b"1,2,3,4,5,6,7,8\n", SchemaError, "fields"),
        (text.replace("105,6", '"10\n5",6').encode(), SchemaError, "share of 0 of records"),
    ]
    for body, kind, words in cases:
        table.write_bytes(body)
        with pytest.raises(kind, match=words):
            load(folder, tolerance=0)
    table.unlink()
    with pytest.raises(DataMissingError, match=r"one Outcomes\*\.txt, found 0"):
        load(folder)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "Outcomes-a.txt").write_text(outcomes([101]))
    both = packed(ward(tmp_path / "both"), good_members())
    for path in (None, tmp_path / "none", tmp_path / "empty", tmp_path / "alone", both, both / "101.txt"):
        with pytest.raises(DataMissingError):
            load(path)
    with pytest.raises(DataMissingError, match="expected records, found none"):
        load(packed(tmp_path / "nobody", good_members()[:1]))


def test_a_permission_is_not_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, archived = ward(tmp_path / "plain"), packed(tmp_path / "packed", good_members())

    def refuse(*_: object, **__: object) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(gzip, "open", refuse)
    for folder in (plain, archived):
        with pytest.raises(DataAccessError, match="may not read"):
            load(folder, tolerance=0.5)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataAccessError, match="may not read the folder"):
        load(plain)


def linked(kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo("set-a/999.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    return info, b""


@pytest.mark.parametrize(
    "member",
    [linked(tarfile.SYMTYPE), linked(tarfile.LNKTYPE), linked(tarfile.FIFOTYPE), linked(tarfile.CHRTYPE)]
    + [(tarfile.TarInfo(name), b"x") for name in ("../999.txt", "/999.txt", "set-a/notes.doc", "set-a/12a.txt")],
)
def test_an_archive_of_something_else_is_refused(tmp_path: Path, member: tuple[tarfile.TarInfo, bytes]) -> None:
    with pytest.raises(SchemaError, match=r"expected plain files <RecordID>\.txt"):
        load(packed(tmp_path / "ward", [*good_members(), member]))


def test_a_patient_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="each patient once, got one twice"):
        load(packed(tmp_path / "ward", [*good_members(), (tarfile.TarInfo("again/105.txt"), record(105))]))


@pytest.mark.parametrize("where", ["record", "unread member's size", "header of the archive"])
def test_an_archive_that_unpacks_to_a_hundred_times_its_size_is_refused(tmp_path: Path, where: str) -> None:
    zeros = b"0" * 4_000_000
    info = tarfile.TarInfo("set-a/999.txt")
    if where == "header of the archive":
        info.pax_headers = {"comment": zeros.decode()}
        folder = packed(tmp_path / "ward", [(info, record(999))])
    else:
        folder = packed(
            tmp_path / "ward", [(info, zeros)] if where == "record" else [(tarfile.TarInfo(f"{n}.txt"), zeros[:900_000]) for n in range(101, 106)]
        )
    size = (folder / "set-a.tar.gz").stat().st_size
    assert len(zeros) > 100 * size
    with pytest.raises(DataError, match="unpacks to at most 50 times its size"):
        list(read_archive(folder / "set-a.tar.gz"))


def test_a_damaged_archive_is_no_bad_record(tmp_path: Path) -> None:
    noisy = [
        (info, body + b"".join(b"04:00,HR,%d\n" % n for n in np.random.default_rng(1).integers(40, 140, 300))) for info, body in good_members()[1:]
    ]
    folder = packed(tmp_path / "ward", noisy)
    archive = folder / "set-a.tar.gz"
    whole = archive.read_bytes()
    for body in (whole[: len(whole) // 2], b"", whole[:10], b"not an archive at all", whole[:2000] + b"\0" * 400 + whole[2400:], os.urandom(5000)):
        archive.write_bytes(body)
        with pytest.raises(DataError, match=r"expected a whole \.tar\.gz"):
            load(folder, tolerance=0.5)


def test_synthetic_stays_look_like_stays() -> None:
    stays, again, other = synthetic_stays(800, 1), synthetic_stays(800, 1), synthetic_stays(800, 2)
    assert np.array_equal(stays.value, again.value) and not np.array_equal(stays.died, other.died)
    series, described = series_inputs(stays, 4)
    cohort = cohort_of(stays, (series, described), stays.died)
    assert cohort.synthetic and series.shape == (800, 12, 3 * NUM_VARIABLES) and described.shape == (800, len(DESCRIPTOR_NAMES))
    assert series.dtype == described.dtype == np.float32 and np.isfinite(series).all() and np.abs(described).max() <= 1
    mask = series[:, :, NUM_VARIABLES : 2 * NUM_VARIABLES]
    assert mask[:, :, INDEX["HR"]].mean() > 0.5 and mask[:, :, INDEX["Lactate"]].mean() < 0.2  # charted often, and drawn seldom
    deaths = {unit: stays.died[cohort.attributes["site"] == unit].mean() for unit in UNITS.values()}
    assert deaths["medical"] > 1.5 * deaths["cardiac-surgery"]  # sites differ
    assert set(synthetic_stays(2, 0).died.tolist()) == {0, 1}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"physionet2012 data are not at {DATA}")
@pytest.mark.slow
def test_the_four_thousand_stays_of_set_a(monkeypatch: pytest.MonkeyPatch) -> None:
    stays = load(DATA)
    units = stays.described["ICUType"]
    assert [(int((units == kind).sum()), int(stays.died[units == kind].sum())) for kind in UNITS] == [(577, 81), (874, 43), (1481, 275), (1068, 155)]
    assert stays.notes["records_unreadable"] == stays.notes["records_without_outcome"] == stays.notes["outcomes_without_record"] == 0
    assert len(stays.value) == 1_735_376 and stays.notes["values_implausible"] < 0.002 * len(stays.value)
    assert int(np.isnan(stays.days).sum()) == 60 and int(np.isnan(stays.days[stays.died == 1]).sum()) == 0
    for module in (icu_mortality, length_of_stay, surgical_risk):
        monkeypatch.setattr(module, "load_stays", lambda *_, **__: stays)  # they are read once
    mortality, home, surgical = (module.load_cohort(DATA, {}) for module in (icu_mortality, length_of_stay, surgical_risk))
    assert mortality.num_patients == mortality.num_records == 4000 and int(mortality.labels.sum()) == 554
    assert int(held_out_patients(mortality, SIMULATION_SPLIT_KEY).sum()) == 1164
    assert home.num_patients == 4000 - 554 - 60 and home.notes["deaths_left_out"] == 554 and float(np.median(home.labels)) == 10
    assert surgical.num_patients == 874 + 1068 and int(surgical.labels.sum()) == 43 + 155 and surgical.notes["stays_not_surgical"] == 577 + 1481
    for cohort in (mortality, home, surgical):
        assert all(np.isfinite(np.asarray(values)).all() and values.dtype == np.float32 for values in cohort.inputs)

"""The stays of eICU and the APACHE table made of them: who is in, what is never read, and what bad tables do."""

import gzip
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cohort import SIMULATION_SPLIT_KEY, held_out_patients
from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError
from shared.models import predict_in_batches
from shared.task import resolve_task
from shared.tasks.apache_iii import COMORBID, MOST_POINTS, POINTS, apache_iii_points
from shared.tasks.eicu import MOST_EXPANSION, SMALL_TABLE, read_table
from shared.tasks.icu_apache import APS_COLUMNS, SCHEMA, icu_apache, icu_apache_hospitals, icu_apache_mlp, load_cohort, synthetic_cohort
from shared.tasks.tabular import logistic_loss

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eicu_demo"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"eicu_demo data are not at {DATA}")

PATIENT = "patientunitstayid,uniquepid,hospitalid,gender,age,hospitaldischargestatus,hospitaldischargeoffset,unitdischargelocation"
APS = "patientunitstayid," + ",".join(APS_COLUMNS)
FLAGS = "electivesurgery,aids,hepaticfailure,lymphoma,metastaticcancer,leukemia,immunosuppression,cirrhosis,diabetes"
PREDICTION = f"patientunitstayid,{FLAGS},diedinhospital,dischargelocation"
HEALTHY = {"urine": 2500, "wbc": 9, "temperature": 37, "respiratoryrate": 18, "sodium": 140, "heartrate": 70, "meanbp": 90, "ph": 7.4, "hematocrit": 45,
           "creatinine": 1, "albumin": 3.5, "pao2": 95, "pco2": 38, "bun": 10, "glucose": 100, "bilirubin": 1, "fio2": 21, "eyes": 4, "motor": 6, "verbal": 5}  # fmt: skip


def aps_row(stay: int, **changes: object) -> str:
    values = {**dict.fromkeys(("vent", "intubated", "dialysis"), 0), **HEALTHY, **changes}
    return ",".join(str(values.get(name, stay)) for name in APS.split(","))


def write_tables(folder: Path, *, patients: list[str] | None = None) -> Path:
    """A folder of twelve stays of eleven patients in two hospitals, one of no stated region; stay 1 and 2 are of one patient."""
    rows = patients or [
        f"{stay},p{max(stay, 2)},{7 if stay < 11 else 8},Female,{'> 89' if stay == 3 else 50},{'Expired' if stay % 3 == 0 else 'Alive'},3000,Death"
        for stay in range(1, 13)
    ]
    (folder / "patient.csv").write_text("\n".join([PATIENT, *rows]) + "\n")
    (folder / "hospital.csv").write_text("hospitalid,numbedscategory,region\n7,<100,South\n8,<100,\n")
    (folder / "apacheApsVar.csv").write_text("\n".join([APS, *(aps_row(stay) for stay in range(1, 13))]) + "\n")
    (folder / "apachePredVar.csv").write_text("\n".join([PREDICTION, *(f"{stay},,0,0,0,0,0,0,0,1,0,1" for stay in range(1, 13))]) + "\n")
    return folder


def change(folder: Path, name: str, edit: Callable[[list[str]], list[str]]) -> None:
    file = folder / f"{name}.csv"
    file.write_text("\n".join(edit(file.read_text().splitlines())) + "\n")


def test_stays_become_records_of_patients(tmp_path: Path) -> None:
    cohort = load_cohort(write_tables(tmp_path), {})
    assert (cohort.num_patients, cohort.num_records) == (9, 10)
    assert cohort.patient_of_record.tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8] and cohort.labels.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert set(cohort.attributes["site"].tolist()) == {"South"} and set(cohort.attributes["hospital"].tolist()) == {"hospital-7"}
    assert cohort.notes["stays_without_region"] == 2 and cohort.notes["records_bad"] == 0
    assert cohort.attributes["age"].tolist()[1] == "90"  # "> 89"
    assert "p3" not in repr(cohort)


def test_hospitals_as_sites_keep_those_of_no_region(tmp_path: Path) -> None:
    cohort = load_cohort(write_tables(tmp_path), {"sites": "hospital"})
    assert cohort.notes["stays_at_small_sites"] == 2 and set(cohort.attributes["site"].tolist()) == {"hospital-7"}  # two patients are no site
    assert "stays_without_region" not in cohort.notes
    task = icu_apache_hospitals()
    assert np.array_equal(task.load_cohort(tmp_path, {}).inputs[0], cohort.inputs[0]) and task.name == "icu-apache"


def test_a_patient_is_at_the_site_of_the_first_stay(tmp_path: Path) -> None:
    rows = [f"{stay},p{stay},7,Male,50,Alive,3000,x" for stay in range(1, 6)] + [f"{stay},p{stay},8,Male,50,Expired,3000,x" for stay in range(6, 11)]
    cohort = load_cohort(write_tables(tmp_path, patients=[*rows, "11,p1,8,Male,50,Expired,9000,x"]), {"sites": "hospital"})
    assert cohort.notes["stays_at_another_site"] == 1 and cohort.num_records == 10
    assert cohort.attributes["site"][cohort.patient_ids.index("p1")] == "hospital-7"


def test_nothing_known_later_reaches_the_features(tmp_path: Path) -> None:
    """Outcomes turned round in every column but the label's change nothing, and the table of predicted risks may be absent."""
    before = load_cohort(write_tables(tmp_path), {})
    change(tmp_path, "apachePredVar", lambda lines: [lines[0], *(line[:-3] + "1,9" for line in lines[1:])])
    change(tmp_path, "patient", lambda lines: [lines[0], *(line.replace(",3000,Death", ",99,Home") for line in lines[1:])])
    after = load_cohort(tmp_path, {})
    assert np.array_equal(before.inputs[0], after.inputs[0]) and np.array_equal(before.labels, after.labels)
    names = " ".join(SCHEMA.feature_names)
    assert not any(word in names for word in ("predicted", "died", "discharge", "actual", "location", "los"))


def test_missing_is_minus_one_and_says_so(tmp_path: Path) -> None:
    write_tables(tmp_path)
    change(tmp_path, "apacheApsVar", lambda lines: [lines[0], aps_row(1, wbc=-1), *lines[2:]])
    features = load_cohort(tmp_path, {}).inputs[0]
    value, flag = (SCHEMA.feature_names.index(name) for name in ("wbc", "wbc missing"))
    assert features[0, value] == 0 and features[0, flag] == 1 and features[1, flag] == 0 and features[1, value] != 0


@pytest.mark.parametrize(
    ("table", "bad"),
    [
        ("patient", "2,p2,7,Female,50,Alive,3000,x"),  # a stay twice
        ("patient", "99,,7,Female,50,Alive,3000,x"),
        ("patient", "99,p9,7,Female,50,Undead,3000,x"),
        ("patient", "99,p9,7,Female,50,Alive,soon,x"),
        ("patient", "99,p9,7,Female,50,Alive,,x"),
        ("apacheApsVar", aps_row(2)),
        ("apacheApsVar", aps_row(99, sodium="inf")),
        ("apacheApsVar", aps_row(99, sodium="987654321x")),
    ],
)
def test_a_bad_row_is_counted_up_to_the_tolerance(tmp_path: Path, table: str, bad: str) -> None:
    expected = load_cohort(write_tables(tmp_path), {})
    change(tmp_path, table, lambda lines: [*lines, bad])
    cohort = load_cohort(tmp_path, {"tolerance": 0.1})
    assert cohort.notes["records_bad"] == 1 and np.array_equal(cohort.inputs[0], expected.inputs[0])
    with pytest.raises(SchemaError, match=r"at most 5% of 13 rows") as caught:
        load_cohort(tmp_path, {})
    assert "987654321" not in str(caught.value) and "Undead" not in str(caught.value)


def test_a_blank_outcome_is_no_error(tmp_path: Path) -> None:
    write_tables(tmp_path)
    change(tmp_path, "patient", lambda lines: [line.replace("Expired", "") for line in lines])
    with pytest.raises(ConfigurationError, match="tolerance"):
        load_cohort(tmp_path, {"tolerance": 2.0})
    cohort = load_cohort(tmp_path, {})
    assert cohort.notes["stays_without_outcome"] == 4 and not cohort.labels.any()


def test_a_quoted_newline_is_part_of_its_field(tmp_path: Path) -> None:
    expected = load_cohort(write_tables(tmp_path), {})
    change(tmp_path, "patient", lambda lines: [line.replace(",Death", ',"De\nath, or ""not"""') for line in lines])
    assert np.array_equal(load_cohort(tmp_path, {}).labels, expected.labels)


def pack(folder: Path, name: str, content: bytes) -> None:
    (folder / f"{name}.csv").unlink()
    (folder / f"{name}.csv.gz").write_bytes(content)


def test_gzip_reads_as_plain_text(tmp_path: Path) -> None:
    expected = load_cohort(write_tables(tmp_path), {})
    pack(tmp_path, "apacheApsVar", gzip.compress((tmp_path / "apacheApsVar.csv").read_bytes()))
    assert np.array_equal(load_cohort(tmp_path, {}).inputs[0], expected.inputs[0])


def packed(text: bytes) -> bytes:
    return gzip.compress(text)


BOMB = packed(PATIENT.encode() + b"\n" + b"\n" * (3 * SMALL_TABLE))
LYING_BOMB = BOMB[:-4] + (1000).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", DataMissingError, "empty file"),
        (packed(b""), DataMissingError, "empty file"),
        (packed(PATIENT.encode()), DataMissingError, "at least one row"),
        (packed(PATIENT.encode() + b"\n1,p1,7,Female,50,Alive,3000,x\n" * 50)[:-30], SchemaError, "cut short"),
        (b"PK\x03\x04 this is no gzip file", SchemaError, "cut short or damaged"),
        (packed(PATIENT.encode() + b"\n1,p1,7,F\xe9minin,50,Alive,3000,x\n"), SchemaError, "UTF-8"),
        (packed(PATIENT.encode() + b"\n1,p1,7,Female,50,Alive,3000,x,more\n"), SchemaError, "line with more"),
        (packed(PATIENT.encode() + b'\n1,"p1,7,Female,50,Alive,3000,x\n'), SchemaError, "quote left open"),
        (packed(PATIENT.replace("age", "ages").encode() + b"\n1,p1,7,Female,50,Alive,3000,x\n"), SchemaError, "did you mean 'ages'"),
        (BOMB, SchemaError, f"at most {MOST_EXPANSION} times its size"),
        (LYING_BOMB, SchemaError, f"at most {MOST_EXPANSION} times its size"),
    ],
    ids=range(11),  # a packed text holds the time
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, error: type[Exception], words: str) -> None:
    write_tables(tmp_path)
    pack(tmp_path, "patient", content)
    with pytest.raises(error, match=words):
        load_cohort(tmp_path, {})


def test_a_bomb_is_refused_before_it_unpacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(tmp_path)
    pack(tmp_path, "patient", BOMB)

    def unpack(*_: object) -> bytes:
        raise AssertionError

    monkeypatch.setattr(gzip.GzipFile, "read", unpack)
    with pytest.raises(SchemaError, match="times its size"):
        read_table(tmp_path, "patient", ("uniquepid",))


@pytest.mark.parametrize("table", ["patient", "hospital", "apacheApsVar", "apachePredVar"])
def test_a_table_that_is_not_there(tmp_path: Path, table: str) -> None:
    (write_tables(tmp_path) / f"{table}.csv").unlink()
    with pytest.raises(DataMissingError, match=f"expected {table}.csv.gz or {table}.csv"):
        load_cohort(tmp_path, {})
    for path in (None, tmp_path / "none", tmp_path / "hospital.csv"):
        with pytest.raises(DataMissingError):
            load_cohort(path, {})


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_permission_is_not_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    folder = write_tables(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    if what == "folder":
        monkeypatch.setattr(Path, "iterdir", refuse)
    else:
        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(folder, {})


# APACHE III ----------------------------------------------------------------------------------------------------------------------


def findings(**changes: float) -> dict[str, np.ndarray]:
    values = {**HEALTHY, **dict.fromkeys((*COMORBID, "vent", "dialysis", "electivesurgery"), 0), "age": 30, **changes}
    return {name: np.array([float(value)]) for name, value in values.items()}


@pytest.mark.parametrize(
    ("changes", "points"),
    [
        ({}, 0),
        (dict.fromkeys(HEALTHY, math.nan), 0),  # not measured counts as healthy
        ({"heartrate": 155}, 17),
        ({"meanbp": 39.9}, 23),
        ({"respiratoryrate": 5}, 17),
        ({"respiratoryrate": 5, "vent": 1}, 0),
        ({"creatinine": 1.6}, 4),
        ({"creatinine": 1.6, "urine": 405}, 10 + 8),  # acute renal failure
        ({"creatinine": 1.6, "urine": 405, "dialysis": 1}, 4 + 8),
        ({"pao2": 60}, 5),
        ({"pao2": 80, "fio2": 100, "vent": 1, "pco2": 40}, 14),  # 713 - 50 - 80 = 583
        ({"ph": 7.1, "pco2": 60}, 4),
        ({"ph": 7.55, "pco2": 41}, 12),
        ({"eyes": 1, "verbal": 1, "motor": 1}, 48),
        ({"eyes": 2, "verbal": 4, "motor": 6}, 3),
        ({"age": 85}, 24),
        ({"aids": 1, "cirrhosis": 1}, 23),  # the one that counts most
        ({"aids": 1, "electivesurgery": 1}, 0),
    ],
)
def test_apache_iii_points(changes: dict[str, float], points: int) -> None:
    assert apache_iii_points(findings(**changes)).tolist() == [points]


def test_no_patient_has_more_points_than_there_are() -> None:
    rng = np.random.default_rng(0)
    drawn = {name: rng.choice([np.nan, *rng.uniform(0, 500, 9)], size=2000) for name in POINTS}
    drawn |= {name: rng.uniform(0, 250, 2000) for name in ("creatinine", "pao2", "pco2", "fio2")} | {"ph": rng.uniform(6.8, 7.8, 2000)}
    drawn |= {name: rng.integers(1, most + 1, 2000).astype(float) for name, most in (("eyes", 4), ("verbal", 5), ("motor", 6))}
    drawn |= {name: rng.integers(0, 2, 2000).astype(float) for name in (*COMORBID, "vent", "dialysis", "electivesurgery")}
    points = apache_iii_points(drawn)
    assert points.min() >= 0 and points.max() <= MOST_POINTS
    most = sum(max(table[1]) for table in POINTS.values()) + 10 + 15 + 12 + 48 + 23
    assert most == MOST_POINTS


# The task ------------------------------------------------------------------------------------------------------------------------


def test_the_task_and_its_model() -> None:
    task = resolve_task("icu-apache")
    assert task.fingerprint() == icu_apache().fingerprint() == icu_apache_hospitals().fingerprint() != icu_apache_mlp().fingerprint()
    for each in (task, icu_apache_mlp()):
        cohort = each.synthetic_cohort(60, 3)
        outputs = predict_in_batches(each.model(), cohort.inputs)
        assert outputs.shape == (60, 1) and each.loss(outputs, torch.from_numpy(cohort.labels)).shape == (60,)


@pytest.mark.slow
def test_synthetic_patients_carry_signal_and_sites_differ() -> None:
    """AUROC of the points alone over 4,000: about 0.78, standard error 0.01; below 0.7 in fewer than one of 1e9 draws."""
    cohort = synthetic_cohort(4000, 5)
    assert cohort.synthetic and cohort.num_patients == 4000
    points, died = cohort.inputs[0][:, SCHEMA.feature_names.index("apache_points")], cohort.labels == 1
    assert 0.08 < died.mean() < 0.3
    greater = (points[died][:, None] > points[~died][None]).mean() + 0.5 * (points[died][:, None] == points[~died][None]).mean()
    assert greater > 0.7
    rates = [died[cohort.attributes["site"] == site].mean() for site in ("Midwest", "Northeast")]
    assert rates[1] > rates[0]
    missing = cohort.inputs[0][:, SCHEMA.feature_names.index("albumin missing")] == 1
    assert died[missing].mean() < died[~missing].mean()  # the sick are measured more
    assert np.array_equal(synthetic_cohort(50, 1).inputs[0], synthetic_cohort(50, 1).inputs[0])


@needs_data
class TestDemo:
    """The open demo of 186 hospitals."""

    def test_regions(self) -> None:
        cohort = load_cohort(DATA, {})
        assert (cohort.num_patients, cohort.num_records, int(cohort.labels.sum())) == (1594, 1979, 174)
        assert cohort.notes["stays_without_outcome"] == 28 and cohort.notes["records_bad"] == 0
        assert sorted(set(cohort.attributes["site"].tolist())) == ["Midwest", "Northeast", "South", "West"]
        assert np.abs(cohort.inputs[0]).max() <= 1

    def test_hospitals(self) -> None:
        cohort = icu_apache_hospitals().load_cohort(DATA, {})
        assert len(set(cohort.attributes["site"].tolist())) == 184

    def test_a_centralised_fit_reaches_what_it_should(self) -> None:
        """A yardstick: logistic regression on pooled training patients, AUROC of test patients 0.85."""
        cohort = load_cohort(DATA, {})
        test = held_out_patients(cohort, SIMULATION_SPLIT_KEY)[cohort.patient_of_record]
        inputs, labels = torch.from_numpy(cohort.inputs[0]), torch.from_numpy(cohort.labels)
        model = icu_apache().model()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = logistic_loss(model(inputs[~test]), labels[~test]).mean() + 1e-3 * sum((p**2).sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        statistic, auroc = icu_apache().metrics[0].statistic, icu_apache().metrics[0]
        tested = cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY))
        scores = icu_apache().predict(predict_in_batches(model, tested.inputs)).numpy().astype(np.float64)
        value = auroc.of(statistic.summarise(scores, tested))
        assert value is not None and value > 0.8

    def test_the_publishers_predictions_are_not_needed(self, tmp_path: Path) -> None:
        for name in ("patient", "hospital", "apacheApsVar", "apachePredVar"):
            os.symlink(DATA / f"{name}.csv.gz", tmp_path / f"{name}.csv.gz")
        assert load_cohort(tmp_path, {}).num_patients == 1594

    def test_a_table_cut_short(self, tmp_path: Path) -> None:
        for name in ("patient", "hospital", "apachePredVar"):
            shutil.copy(DATA / f"{name}.csv.gz", tmp_path)
        whole = (DATA / "apacheApsVar.csv.gz").read_bytes()
        (tmp_path / "apacheApsVar.csv.gz").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SchemaError, match="cut short"):
            load_cohort(tmp_path, {})

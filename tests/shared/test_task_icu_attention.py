"""Events of the first day: nothing later is read, codes are numbers by a public rule, and the model treats absent events as absent."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from shared.cohort import Cohort
from shared.errors import ConfigurationError, DataAccessError, DataMissingError, SchemaError
from shared.models import initial_parameters, predict_in_batches, set_parameters
from shared.task import resolve_task
from shared.tasks.icu_attention import (
    AGE_EDGES,
    NUM_CODES,
    NUM_EVENTS,
    NUM_LEVELS,
    SmallStart,
    code_number,
    cohort_of_events,
    drug_of,
    icu_attention,
    levels_of,
    load_cohort,
    synthetic_cohort,
)

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "eicu_demo"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"eicu_demo data are not at {DATA}")

PATIENT = "patientunitstayid,uniquepid,hospitalid,gender,age,hospitaldischargestatus,hospitaldischargeoffset,unittype,unitadmitsource"
TABLES = {
    "diagnosis": ("patientunitstayid,activeupondischarge,diagnosisoffset,diagnosisstring", "1,True,60,renal|disorder of kidney|acute renal failure"),
    "treatment": ("patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge", "1,90,cardiovascular|shock|vasopressors|norepinephrine,True"),
    "admissionDx": ("patientunitstayid,admitdxenteredoffset,admitdxpath", "1,30,admission diagnosis|All Diagnosis|Non-operative|Diagnosis|Renal|Renal failure"),
    "medication": (
        "patientunitstayid,drugorderoffset,drugstartoffset,drugordercancelled,drugname,drugstopoffset",
        "1,-100,-200,No,METOPROLOL 25 MG PO TABS,2000",
    ),
}  # fmt: skip


def write_tables(folder: Path) -> Path:
    rows = [f"{stay},p{stay},7,Female,65,{'Expired' if stay == 2 else 'Alive'},{1439 if stay == 5 else 3000},MICU,Floor" for stay in range(1, 6)]
    (folder / "patient.csv").write_text("\n".join([PATIENT, *rows]) + "\n")
    (folder / "hospital.csv").write_text("hospitalid,region\n7,South\n")
    for name, (header, row) in TABLES.items():
        (folder / f"{name}.csv").write_text(f"{header}\n{row}\n")
    return folder


def change(folder: Path, name: str, edit: Callable[[str], str]) -> None:
    file = folder / f"{name}.csv"
    file.write_text(edit(file.read_text()))


def events_of(cohort: Cohort, stay: int) -> set[tuple[int, ...]]:
    codes = cohort.inputs[0][stay]
    return {tuple(levels) for levels in codes.tolist() if any(levels)}


def test_events_of_a_stay(tmp_path: Path) -> None:
    cohort = load_cohort(write_tables(tmp_path), {})
    assert (cohort.num_patients, cohort.notes["stays_ended_in_first_day"]) == (4, 1) and cohort.labels.tolist() == [0, 1, 0, 0]
    there = {
        levels_of("diagnosis", "renal|disorder of kidney|acute renal failure"), levels_of("treatment", "cardiovascular|shock|vasopressors|x"),
        levels_of("admissionDx", TABLES["admissionDx"][1].split(",")[2]), levels_of("medication", "METOPROLOL"),
    }  # fmt: skip
    facts = {levels_of("admission", f"age|{edge} and over") for edge in AGE_EDGES if edge <= 65}
    facts |= {levels_of("admission", code) for code in ("gender|Female", "unittype|MICU", "unitadmitsource|Floor")}
    assert events_of(cohort, 0) == there | facts and events_of(cohort, 1) == facts
    hours = cohort.inputs[1][0][cohort.inputs[0][0].any(axis=1)]
    assert sorted(set(hours.tolist())) == [pytest.approx(-100 / 60), 0, 0.5, 1, 1.5]  # a drug by the later of order and start


@pytest.mark.parametrize(
    ("table", "edit"),
    [
        ("diagnosis", lambda text: text.replace("True", "False")),
        ("treatment", lambda text: text.replace("True", "False")),
        ("medication", lambda text: text.replace("No,", "Yes,").replace(",2000", ",-50")),
        ("patient", lambda text: text.replace(",3000,", ",9999,")),
    ],
)
def test_what_is_known_later_changes_nothing(tmp_path: Path, table: str, edit: Callable[[str], str]) -> None:
    before = load_cohort(write_tables(tmp_path), {})
    change(tmp_path, table, edit)
    after = load_cohort(tmp_path, {})
    assert all(np.array_equal(one, other) for one, other in zip(before.inputs, after.inputs, strict=True))


@pytest.mark.parametrize("table", list(TABLES))
def test_events_after_the_first_day_are_not_read(tmp_path: Path, table: str) -> None:
    write_tables(tmp_path)
    header, row = TABLES[table]
    time = {"diagnosis": "60", "treatment": "90", "admissionDx": "30", "medication": "-200"}[table]
    change(tmp_path, table, lambda _: f"{header}\n{row.replace(f',{time},', ',1439,')}\n")
    last_minute = events_of(load_cohort(tmp_path, {}), 0)
    change(tmp_path, table, lambda _: f"{header}\n{row.replace(f',{time},', ',1440,')}\n")
    assert len(events_of(load_cohort(tmp_path, {}), 0)) == len(last_minute) - 1


@pytest.mark.parametrize(
    ("table", "bad"),
    [("diagnosis", "1,True,987654321x,renal"), ("diagnosis", ",True,5,renal"), ("medication", "1,5,,No,X,1"), ("treatment", "1,inf,x,True")],
)
def test_a_bad_row_is_counted_up_to_the_tolerance(tmp_path: Path, table: str, bad: str) -> None:
    expected = load_cohort(write_tables(tmp_path), {})
    change(tmp_path, table, lambda text: f"{text}{bad}\n")
    cohort = load_cohort(tmp_path, {"tolerance": 0.5})
    assert cohort.notes["records_bad"] == 1 and np.array_equal(cohort.inputs[0], expected.inputs[0])
    with pytest.raises(SchemaError, match="at most 5% of 2 rows") as caught:
        load_cohort(tmp_path, {})
    assert "987654321" not in str(caught.value)


def test_bad_folders_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(tmp_path)
    with pytest.raises(ConfigurationError, match="sites"):
        load_cohort(tmp_path, {"sites": "ward"})
    with pytest.raises(DataMissingError, match="no data of its own"):
        load_cohort(None, {})
    (tmp_path / "treatment.csv").write_text("")
    with pytest.raises(DataMissingError, match="empty file"):
        load_cohort(tmp_path, {})
    (tmp_path / "treatment.csv").write_bytes(TABLES["treatment"][0].encode() + b"\n1,90,sh\xf6ck,True\n")
    with pytest.raises(SchemaError, match="UTF-8"):
        load_cohort(tmp_path, {})
    (tmp_path / "treatment.csv").write_text("patientunitstayid,treatmentoffset\n1,90\n")
    with pytest.raises(SchemaError, match="'treatmentstring'"):
        load_cohort(tmp_path, {})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataAccessError, match="may not read"):
        load_cohort(tmp_path, {})


def test_the_first_event_of_a_code_counts_and_the_latest_codes_are_kept() -> None:
    stay = {"patientunitstayid": ["a"], "uniquepid": ["p"], "age": ["30"], "gender": [""], "unittype": [""], "unitadmitsource": [""],
            "site": ["s"], "hospital": ["h"], "region": ["r"], "hospitaldischargestatus": ["Alive"]}  # fmt: skip
    codes = [f"drug{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(NUM_EVENTS + 5)]
    events = pd.DataFrame({"patientunitstayid": "a", "table": "medication", "code": codes, "minute": np.arange(len(codes), dtype=float)})
    again = events.assign(minute=1000.0)
    cohort = cohort_of_events(pd.DataFrame(stay), pd.concat([events, again], ignore_index=True), notes={})
    distinct = {code: code_number(f"medication|{code}") for code in codes}
    assert cohort.notes["events_left_out"] == len(set(distinct.values())) - NUM_EVENTS
    assert distinct[codes[-1]] in cohort.inputs[0][0, :, 0] and cohort.inputs[1].max() < 1000 / 60


def test_code_numbers_are_public_and_fixed() -> None:
    assert [code_number(text) for text in ("", "diagnosis|renal", "medication|metoprolol")] == [0, 507, 498]
    assert levels_of("diagnosis", "a|b")[2] == 0 and levels_of("diagnosis", "a|b")[0] == levels_of("diagnosis", "a|c|d")[0]
    assert drug_of("5 ML VIAL : DILTIAZEM HCL 25 MG/5ML IV SOLN") == ["diltiazem"] and drug_of("") == [] and levels_of("medication", "") == (0, 0, 0)


def test_an_absent_event_is_no_event_and_order_does_not_matter() -> None:
    task = resolve_task("icu-attention")
    assert task.fingerprint() == icu_attention().fingerprint()
    model, cohort = task.model(), synthetic_cohort(40, 2)
    set_parameters(model, initial_parameters(model, 3))
    codes, hours = cohort.inputs
    expected = predict_in_batches(model, cohort.inputs)
    order = np.random.default_rng(0).permutation(NUM_EVENTS)
    assert torch.allclose(predict_in_batches(model, (codes[:, order], hours[:, order])), expected, atol=1e-5)
    elsewhere = np.where(codes.any(axis=2), hours, 17).astype(np.float32)
    assert torch.allclose(predict_in_batches(model, (codes, elsewhere)), expected, atol=1e-5)
    alone = torch.cat([predict_in_batches(model, (codes[i : i + 1], hours[i : i + 1])) for i in range(len(codes))])
    assert torch.allclose(alone, expected, atol=1e-5)
    nothing = predict_in_batches(model, (np.zeros((1, NUM_EVENTS, NUM_LEVELS), dtype=np.int64), np.zeros((1, NUM_EVENTS), dtype=np.float32)))
    assert torch.isfinite(nothing).all()


def test_the_embedding_starts_small_on_both_sides() -> None:
    """16,384 draws of standard deviation 0.01: theirs is off by a tenth in fewer than one of 1e12 cases."""
    start = initial_parameters(icu_attention().model(), 5)
    assert start["embedding.weight"].std() == pytest.approx(0.01, rel=0.1)
    assert not list(SmallStart(torch.nn.Embedding(3, 2)).parameters())


def test_synthetic_stays_carry_signal() -> None:
    """The dead have more events of the codes that grow with severity: 3,000 stays, a difference of more than ten standard errors."""
    cohort = synthetic_cohort(3000, 4)
    codes, died = cohort.inputs[0], cohort.labels == 1
    assert cohort.synthetic and 0.1 < died.mean() < 0.35 and codes.min() >= 0 and codes.max() < NUM_CODES
    shock = (codes == levels_of("treatment", "cardiovascular|shock|vasopressors")[2]).any(axis=(1, 2))
    assert shock[died].mean() > 1.5 * shock[~died].mean()
    assert len(set(cohort.attributes["site"].tolist())) == 4 and np.abs(cohort.inputs[1]).max() <= 24
    assert np.array_equal(synthetic_cohort(30, 1).inputs[0], synthetic_cohort(30, 1).inputs[0])


@pytest.mark.slow
@needs_data
def test_the_demo() -> None:
    cohort = load_cohort(DATA, {})
    assert (cohort.num_patients, cohort.num_records, int(cohort.labels.sum())) == (1466, 1997, 140)
    assert cohort.notes["stays_ended_in_first_day"] == 285 and cohort.notes["records_bad"] == 0
    assert sorted(set(cohort.attributes["site"].tolist())) == ["Midwest", "Northeast", "South", "West"]
    assert (cohort.inputs[0][:, :, 0] > 0).any(axis=1).all() and np.abs(cohort.inputs[1]).max() <= 24

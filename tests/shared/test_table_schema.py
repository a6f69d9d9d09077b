"""A table becomes features by declared ranges alone, and no message ever holds a patient's value."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.errors import DataError, DataMissingError, SchemaError
from shared.schema import MISSING_MARKS, Column, TableSchema, canonical, encode_column, encode_table, schema_fingerprint
from shared.tasks import tabular
from shared.tasks.tabular import cohort_from_frame, only_csv, read_csv

LABEL = Column(name="ill", type="binary")
SECRET = "987654321"  # a value that occurs nowhere but in a patient's record


def schema_of(*columns: Column, label: Column = LABEL, **more: str) -> TableSchema:
    return TableSchema(name="t", label=label, columns=columns, **more)


def number(name: str = "age", **more: object) -> Column:
    return Column.model_validate({"name": name, "type": "number", "low": 0, "high": 100, **more})


def encode(values: list[str], column: Column) -> np.ndarray:
    frame = pd.DataFrame({column.name: values, "ill": ["0"] * len(values)}, dtype=str)
    return encode_table(frame, schema_of(column), source="a.csv").features


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_numbers_are_scaled_from_the_declared_range(values: list[float]) -> None:
    scaled = encode([repr(value) for value in values], number())[:, 0]
    assert scaled == pytest.approx(np.array(values) / 50 - 1, abs=1e-6)
    assert np.array_equal(encode([repr(values[0])], number())[:, 0], scaled[:1])  # nothing depends on the other patients


def test_a_log_scale() -> None:
    column = number(low=0.01, high=100, scale="log")
    assert encode(["0.01", "0.1", "1", "10", "100"], column)[:, 0] == pytest.approx([-1, -0.5, 0, 0.5, 1], abs=1e-6)


@pytest.mark.parametrize("mark", [*MISSING_MARKS, " ", "-9", " ? "])
def test_missing_policies(mark: str) -> None:
    values = ["100", mark, "0"]
    assert encode(values, number(missing_codes=("-9",), low=-100))[1, 0] == 0  # the middle of the range
    assert encode(values, number(missing_codes=("-9",), missing="indicator")).tolist() == [[1, 0], [0, 1], [-1, 0]]
    assert encode(values, number(missing_codes=("-9",), missing="drop")).tolist() == [[1], [-1]]


def test_missing_categories() -> None:
    binary = Column(name="sex", type="binary", categories=("f", "m"))
    assert encode(["m", "", "f"], binary)[:, 0].tolist() == [1, 0.5, 0]
    ward = Column(name="ward", type="category", categories=("a", "b", "c"), missing="indicator")
    assert encode(["c", "?", "a"], ward).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert ward.feature_names == ["ward=a", "ward=b", "ward=c", "ward missing"]


def test_numbers_as_categories_match_whatever_their_spelling() -> None:
    column = Column(name="cp", type="category", categories=("1", "2"))
    assert encode(["1.0", " 2", "2.00"], column).tolist() == [[1, 0], [0, 1], [0, 1]]
    assert [canonical(text) for text in ("1.0", "-0.0", "1.5", "x ", "inf", "1e2")] == ["1", "0", "1.5", "x", "inf", "100"]


def test_notes_count_what_was_done() -> None:
    frame = pd.DataFrame({"age": ["10", "120", "", "30", "40"] + ["50"] * 30, "bmi": ["1"] * 34 + [""], "ill": ["0", "1", "0", "", "1"] + ["0"] * 30})
    encoded = encode_table(frame, schema_of(number(), number("bmi", missing="drop")), source="a.csv")
    assert encoded.notes == {"records_dropped": 2, "values_imputed": 1, "values_clipped": 1}
    assert encoded.kept.sum() == len(encoded.labels) == len(encoded.features) == 33
    assert encoded.features[1, 0] == 1  # clipped to the range


def test_a_few_values_outside_are_clipped_and_many_refused() -> None:
    assert encode(["101"] + ["50"] * 3, number())[0, 0] == 1  # one is a slip of the pen
    assert encode(["-5"] * 5 + ["50"] * 95, number())[:5, 0].tolist() == [-1] * 5
    with pytest.raises(SchemaError, match=r"a.csv: column 'age': expected values from 0 to 100 years, got 6 of 100 outside; check the unit"):
        encode(["-5"] * 6 + ["50"] * 94, number(unit="years"))


@pytest.mark.parametrize("text", ["old", "inf", "-inf", "1,5", "12 y", "0x1F"])
def test_text_in_numbers_is_refused(text: str) -> None:
    with pytest.raises(SchemaError, match=r"column 'age': expected numbers, got text or infinity in 1 of 2 rows"):
        encode(["1", text], number())


def test_a_column_that_is_all_missing() -> None:
    with pytest.raises(SchemaError, match="column 'age': all 2 values are missing"):
        encode(["", "NA"], number())
    assert encode(["", "NA"], number(missing="indicator")).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(("present", "hint"), [("Age ", "did you mean 'Age '?"), ("AGE", "did you mean 'AGE'?"), ("agee", "did you mean 'agee'?")])
def test_a_renamed_column_is_proposed(present: str, hint: str) -> None:
    with pytest.raises(SchemaError) as caught:
        encode_table(pd.DataFrame({present: ["1"], "ill": ["0"]}), schema_of(number()), source="a.csv")
    assert "expected column 'age'" in str(caught.value) and hint in str(caught.value)


def test_labels_by_type() -> None:
    frame = pd.DataFrame({"age": ["1", "2", "3"], "grade": ["high", "", "low"], "days": ["3", "5.5", ""]}, dtype=str)
    grade = encode_table(frame, schema_of(number(), label=Column(name="grade", type="category", categories=("low", "high"))), source="a.csv")
    assert grade.labels.tolist() == [1, 0] and grade.labels.dtype == np.int64 and grade.kept.tolist() == [True, False, True]
    days = encode_table(frame, schema_of(number(), label=number("days", high=5)), source="a.csv")
    assert days.labels.tolist() == [3, 5] and days.labels.dtype == np.float32
    binary = encode_table(frame, schema_of(number(), label=Column(name="grade", type="binary", categories=("low", "high"))), source="a.csv")
    assert binary.labels.tolist() == [1, 0] and binary.labels.dtype == np.float32


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "a", "type": "number"}, "expected low and high, the plausible range known without looking at the data"),
        ({"name": "a", "type": "number", "low": 3, "high": 3}, "expected low < high"),
        ({"name": "a", "type": "number", "low": 0, "high": 3, "scale": "log"}, "expected low > 0 for scale 'log'"),
        ({"name": "a", "type": "number", "low": 0, "high": math.inf}, "finite"),
        ({"name": "a", "type": "number", "low": 0, "high": 3, "categories": ["x", "y"]}, "a number has no categories"),
        ({"name": "a", "type": "binary", "categories": ["x"]}, "expected two categories, got 1"),
        ({"name": "a", "type": "category", "categories": ["x"]}, "expected at least two categories, got 1"),
        ({"name": "a", "type": "category", "categories": ["x", "x"]}, "expected distinct categories"),
        ({"name": "a", "type": "text"}, "'number', 'binary' or 'category'"),
    ],
)
def test_a_column_that_cannot_be(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Column.model_validate(table)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="expected every column once, got 'ill' twice"):
        schema_of(number("ill"))
    with pytest.raises(ValidationError, match="got 'age' twice"):
        schema_of(number(), patient="age")


def test_the_fingerprint_is_the_schemas_content() -> None:
    assert schema_fingerprint(schema_of(number())) == schema_fingerprint(schema_of(number(low=0.0)))
    others = [schema_of(number(high=101)), schema_of(number(missing="drop")), schema_of(number(unit="years")), schema_of(number(), patient="id")]
    assert len({schema_fingerprint(schema) for schema in [schema_of(number()), *others]}) == 5


def test_rows_of_one_patient_are_its_records() -> None:
    frame = pd.DataFrame({"id": ["b", "a", "b ", "c"], "age": ["1", "2", "3", "4"], "ill": ["0", "1", "1", "0"], "town": ["x", "y", "z", "x"]})
    cohort = cohort_from_frame(frame, schema_of(number(), patient="id"), source="a.csv")
    assert cohort.patient_ids == ("b", "a", "c") and cohort.patient_of_record.tolist() == [0, 1, 0, 2]
    assert cohort.attributes["town"].tolist() == ["x", "y", "x"] and "id" not in cohort.attributes and "ill" not in cohort.attributes


@pytest.mark.parametrize("nobody", ["", " ", "NA", "?", "nan"])
def test_a_row_without_an_identifier_is_refused(nobody: str) -> None:
    """Else all such rows, of many patients, would be records of one patient named 'NA'."""
    frame = pd.DataFrame({"id": ["b", nobody, nobody], "age": ["1", "2", "3"], "ill": ["0", "1", "1"]})
    with pytest.raises(SchemaError, match=r"expected a patient's identifier in every row, got none in 2 rows"):
        cohort_from_frame(frame, schema_of(number(), patient="id"), source="a.csv")


def test_without_a_patient_column_a_row_is_a_patient_by_its_content() -> None:
    frame = pd.DataFrame({"age": ["1", "2", "1"], "ill": ["0", "1", "0"]})
    one = cohort_from_frame(frame, schema_of(number()), source="a.csv")
    more = cohort_from_frame(pd.concat([pd.DataFrame({"age": ["9"], "ill": ["1"]}), frame]), schema_of(number()), source="b.csv")
    assert len(set(one.patient_ids)) == 3 and set(one.patient_ids) < set(more.patient_ids)


BAD_FILES: dict[str, Callable[[], str]] = {
    "text in a number": lambda: f"id,age,sex,ill\np1,{SECRET}x,f,0\np2,3,m,1\n",
    "far outside": lambda: "id,age,sex,ill\n" + f"p1,{SECRET},f,0\n" * 9,
    "unknown category": lambda: f"id,age,sex,ill\np1,3,{SECRET},0\np2,3,m,1\n",
    "unknown label": lambda: f"id,age,sex,ill\np1,3,f,{SECRET}\np2,3,m,1\n",
    "identifier missing": lambda: f"id,age,sex,ill\n,3,f,0\n{SECRET},3,m,1\n",
    "field too many in one line": lambda: f"id,age,sex,ill\np1,3,f,0\np2,3,m,1,{SECRET}\n",
    "field too many in every line": lambda: f"id,age,sex,ill\np1,3,f,0,{SECRET}\np2,3,m,1,{SECRET}\n",
    "field too few": lambda: f"id,age,sex,ill\n{SECRET},3\n",
    "open quote": lambda: f'id,age,sex,ill\np1,"3,f,{SECRET}\np2,3,m,1\n',
    "no label": lambda: f"id,age,sex,ill\n{SECRET},3,f,\n",
    "no header": lambda: f"{SECRET},3,f,0\np2,3,m,1\n",
    "no row": lambda: "id,age,sex,ill\n",
    "nothing": lambda: "",
}


@pytest.mark.parametrize("bad", list(BAD_FILES))
def test_no_message_holds_a_patients_value(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(BAD_FILES[bad]())
    schema = schema_of(number(), Column(name="sex", type="binary", categories=("f", "m")), patient="id")
    with pytest.raises(DataError) as caught:
        cohort_from_frame(read_csv(path), schema, source=path.name)
    error: BaseException | None = caught.value
    while error is not None and not (error is not caught.value and caught.value.__suppress_context__):
        assert SECRET not in str(error)
        error = error.__cause__
    assert caught.value.remedy and "a.csv" in str(caught.value)


def test_what_is_encoded_prints_no_patient() -> None:
    frame = pd.DataFrame({"age": ["41.9"], "ill": ["1"]})
    assert repr(encode_table(frame, schema_of(number()), source="a.csv")) == (
        "EncodedTable(notes={'records_dropped': 0, 'values_imputed': 0, 'values_clipped': 0})"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="expected a CSV file, found none"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"age,ill\n\xe4,1\n")
    with pytest.raises(SchemaError, match="expected UTF-8 text"):
        read_csv(tmp_path / "latin.csv")
    assert only_csv(tmp_path) == only_csv(tmp_path / "latin.csv") == tmp_path / "latin.csv"
    (tmp_path / "other.CSV").write_text("x")
    with pytest.raises(DataMissingError, match="expected one CSV file, found 2"):
        only_csv(tmp_path)
    with pytest.raises(DataMissingError, match="found nothing"):
        only_csv(tmp_path / "none")


def test_a_file_as_spreadsheets_write_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffage, ill\r\n"41", 1\r\n'.encode())
    assert read_csv(path).to_dict("list") == {"age": ["41"], "ill": ["1"]}


def test_a_line_without_an_end_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tabular, "MOST_LINE_BYTES", 100)
    (tmp_path / "a.csv").write_text("a,b\n1," + "2" * 96 + "\n")
    assert len(read_csv(tmp_path / "a.csv")) == 1
    (tmp_path / "a.csv").write_text("a,b\n1," + "2" * 200 + "\n")
    with pytest.raises(SchemaError, match="got a longer one"):
        read_csv(tmp_path / "a.csv")


def test_a_number_of_many_letters_is_none() -> None:
    column = Column(name="x", type="number", low=0, high=10)
    with pytest.raises(SchemaError, match="expected numbers, got text or infinity in 1 of 2 rows"):
        encode_column(pd.Series(["1", "0" * 64 + "1"]), column, source="a")
    assert encode_column(pd.Series(["1", "0" * 63 + "1"]), column, source="a").features[1, 0] == -0.8

"""Which group a patient is told by: values, names, bands, and who is not known."""

import pytest
from pydantic import ValidationError

from shared.subgroups import NOT_KNOWN, Subgroup


def test_bands_close_below_and_are_open_above() -> None:
    age = Subgroup(attribute="age", edges=(50, 65))
    groups = age.groups_of(["49.9", "50", "50.0", "64.99", "65", "120", "-3", "?", "", "nan", "old", "inf"])
    assert groups.tolist() == ["under 50", *["50 to under 65"] * 3, *["65 and over"] * 2, "under 50", *[NOT_KNOWN] * 5]
    assert age.ordered(groups.tolist()) == ["under 50", "50 to under 65", "65 and over", NOT_KNOWN]


def test_a_number_is_one_value_however_it_is_written() -> None:
    sex = Subgroup(attribute="sex", names={"0": "female", "1": "male"})
    assert sex.groups_of(["0", "0.0", " 1 ", "1.00", "2", "NA", "x"]).tolist() == ["female", "female", "male", "male", "2", NOT_KNOWN, "x"]
    assert sex.ordered(["x", NOT_KNOWN, "male", "2", "female"]) == ["female", "male", "2", "x", NOT_KNOWN]
    assert Subgroup(attribute="scanner").groups_of(["Siemens", "GE"]).tolist() == ["Siemens", "GE"]


@pytest.mark.parametrize("table", [{"edges": (65, 50)}, {"edges": (1, 1)}, {"edges": (1,), "names": {"0": "a"}}, {"attribute": ""}])
def test_what_says_nothing_clear_is_refused(table: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Subgroup.model_validate({"attribute": "age", **table})

"""Patients to predict for: whoever reads them hands over their records in batches, so that a model never asks how they were read."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # some of them begin a line where a table is read again: a row that nobody predicted
CONTROL_TOLD = "a control character in the patient's identifier"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """n records: whose each is, and what a model takes of them, each `(n, ...)`."""

    patients: Sequence[str] = field(repr=False)
    inputs: tuple[NDArray[np.generic], ...] = field(repr=False)


class Patients(Protocol):
    """Patients whose data were checked.

    Attributes:
        left_out: what was left out of the data, in words and numbers of rows, because the caller said so; empty where nothing was.
        notes: what was done to the data, in counts.
    """

    @property
    def num_patients(self) -> int: ...
    @property
    def num_records(self) -> int: ...
    @property
    def left_out(self) -> str: ...
    @property
    def notes(self) -> Mapping[str, int]: ...
    @property
    def synthetic(self) -> bool: ...

    def num_records_of(self, patient: str) -> int:
        """How many records a patient has, over all batches."""

    def batches(self, size: int) -> Iterator[Batch]:
        """All records, at most `size` at once; one patient's may lie apart."""

    def cohort(self) -> Cohort:
        """All of them at once."""


class WholeCohort:
    """Patients that a task's loader has read, whole, as it reads them to train."""

    def __init__(self, cohort: Cohort, *, left_out: str = "") -> None:
        self._cohort = cohort
        self.left_out = left_out
        self.num_patients, self.num_records = cohort.num_patients, cohort.num_records
        self.notes, self.synthetic = cohort.notes, cohort.synthetic
        self._counts = Counter(cohort.patient_of_record.tolist())
        self._places = {name: place for place, name in enumerate(cohort.patient_ids)}

    def num_records_of(self, patient: str) -> int:
        """How many records a patient has."""
        return self._counts[self._places[patient]]

    def cohort(self) -> Cohort:
        """As the loader gave it."""
        return self._cohort

    def batches(self, size: int) -> Iterator[Batch]:
        """Patient by patient."""
        order = np.argsort(self._cohort.patient_of_record, kind="stable")
        for at in range(0, len(order), size):
            records = order[at : at + size]
            patients = [self._cohort.patient_ids[patient] for patient in self._cohort.patient_of_record[records]]
            yield Batch(patients=patients, inputs=tuple(values[records] for values in self._cohort.inputs))

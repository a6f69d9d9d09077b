"""A site's data for a task. A cohort has patients; a patient may have several records.

Legend: N records, P patients.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

TEST_FRACTION = 0.3  # of the patients, by keyed hash, where a task publishes no split
SIMULATION_SPLIT_KEY = b"wardround: the split of virtual patients is public"

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """Records of patients as arrays. It prints no patient: its `repr` is its size alone.

    Attributes:
        inputs: one array per argument of the model, each `(N, ...)`.
        labels: `(N, ...)`; its dtype is what the task's loss expects.
        patient_of_record: `(N,)`, index into `patient_ids`.
        patient_ids: `(P,)` identifiers as the hospital has them; they never leave the site.
        attributes: per patient, `(P,)` text each: "site" (for partition "natural"), and columns for partition "column".
        published_test: `(P,)`, True for test patients, where the task publishes its split; else None.
        notes: what the loader did to the whole of it, in counts: records dropped, values imputed or clipped; empty for a part.
        synthetic: True when no real patient is in it.
    """

    inputs: tuple[NDArray[np.generic], ...] = field(repr=False)
    labels: NDArray[np.generic] = field(repr=False)
    patient_of_record: IntArray = field(repr=False)
    patient_ids: tuple[str, ...] = field(repr=False)
    attributes: Mapping[str, NDArray[np.str_]] = field(default_factory=dict, repr=False)
    published_test: BoolArray | None = field(default=None, repr=False)
    notes: Mapping[str, int] = field(default_factory=dict, repr=False)
    synthetic: bool = False

    def __repr__(self) -> str:
        return f"Cohort({self.num_patients} patients, {self.num_records} records{', synthetic' if self.synthetic else ''})"

    @property
    def num_patients(self) -> int:
        """P."""
        return len(self.patient_ids)

    @property
    def num_records(self) -> int:
        """N."""
        return len(self.labels)

    def select(self, chosen: BoolArray | IntArray) -> "Cohort":
        """The cohort of the chosen patients, in the order in which they stand here.

        Args:
            chosen: a mask `(P,)`, or indices of patients.
        """
        mask = np.zeros(self.num_patients, dtype=np.bool_)
        mask[chosen] = True
        new_index = np.cumsum(mask) - 1
        records = mask[self.patient_of_record]
        return replace(
            self,
            inputs=tuple(values[records] for values in self.inputs),
            labels=self.labels[records],
            patient_of_record=new_index[self.patient_of_record[records]].astype(np.int64),
            patient_ids=tuple(name for name, keep in zip(self.patient_ids, mask, strict=True) if keep),
            attributes={name: values[mask] for name, values in self.attributes.items()},
            published_test=None if self.published_test is None else self.published_test[mask],
            notes={},
        )

    def divide(self, parts: Mapping[str, IntArray]) -> "dict[str, Cohort]":
        """As `select` of each part, which share no patient, but in one pass over all records."""
        owner = np.full(self.num_patients, -1, dtype=np.int64)
        for number, chosen in enumerate(parts.values()):
            owner[chosen] = number
        owner_of_record = owner[self.patient_of_record]
        order = np.argsort(owner_of_record, kind="stable")
        ends = np.searchsorted(owner_of_record[order], np.arange(-1, len(parts)), side="right")
        place = np.empty(self.num_patients, dtype=np.int64)  # of a patient among its part's
        cohorts = {}
        for number, (name, chosen) in enumerate(parts.items()):
            patients, records = np.sort(chosen), order[ends[number] : ends[number + 1]]
            place[patients] = np.arange(len(patients))
            cohorts[name] = replace(
                self,
                inputs=tuple(values[records] for values in self.inputs),
                labels=self.labels[records],
                patient_of_record=place[self.patient_of_record[records]],
                patient_ids=tuple(self.patient_ids[index] for index in patients.tolist()),
                attributes={key: values[patients] for key, values in self.attributes.items()},
                published_test=None if self.published_test is None else self.published_test[patients],
                notes={},
            )
        return cohorts

    def label_of_patient(self) -> NDArray[np.generic]:
        """The label of each patient's first record, `(P, ...)`."""
        first = np.full(self.num_patients, -1, dtype=np.int64)
        first[self.patient_of_record[::-1]] = np.arange(self.num_records)[::-1]
        return self.labels[first]

    def record_weights(self) -> NDArray[np.float64]:
        """`(N,)`: 1 / (records of the same patient), so that every patient counts 1."""
        counts = np.bincount(self.patient_of_record, minlength=self.num_patients)
        return 1.0 / counts[self.patient_of_record]


def patient_hash(key: bytes, patient_id: str) -> bytes:
    """Keyed hash (HMAC-SHA-256, 32 bytes) of a patient's id: stable for one key, unlinkable without it."""
    return hmac.digest(key, patient_id.encode(), hashlib.sha256)


def held_out_patients(cohort: Cohort, key: bytes, *, fold: int = 1, folds: int = 1, published: bool = True) -> BoolArray:
    """`(P,)`, True for the patients tested on; but for a published split, a function of each patient's id and the site's key alone.

    With one fold: the task's published split, or `TEST_FRACTION` by keyed hash. With more: a patient is tested in one fold.

    Args:
        published: False at a hospital: a published split is a list of places in a file, so that one patient more would move others to the
            other side, and two cohorts that differ in one patient would differ in many.
    """
    if folds == 1 and published and cohort.published_test is not None:
        return cohort.published_test
    hashes = np.array([int.from_bytes(patient_hash(key, name)[:8], "big") for name in cohort.patient_ids], dtype=np.uint64)
    if folds == 1:
        return hashes < np.uint64(int(TEST_FRACTION * 2**64))
    return np.asarray(hashes % np.uint64(folds) == np.uint64(fold - 1))

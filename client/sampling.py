"""Which patients are in a batch. Poisson sampling over patients, and one record of each sampled patient."""

import numpy as np

from shared.cohort import Cohort, IntArray


class PatientIndex:
    """Records grouped by patient, so that one of each sampled patient is drawn without a search."""

    def __init__(self, cohort: Cohort) -> None:
        self.num_patients = cohort.num_patients
        self._order = np.argsort(cohort.patient_of_record, kind="stable")
        self._counts = np.bincount(cohort.patient_of_record, minlength=cohort.num_patients)
        self._starts = np.cumsum(self._counts) - self._counts

    def one_record_each(self, patients: IntArray, rng: np.random.Generator) -> IntArray:
        """A record of each patient, uniformly among its own, `(len(patients),)`; none of a patient without records, never another's."""
        patients = patients[self._counts[patients] > 0]
        offset = (rng.random(len(patients)) * self._counts[patients]).astype(np.int64)
        return np.asarray(self._order[self._starts[patients] + offset])


def poisson_sample(num_units: int, sample_rate: float, rng: np.random.Generator) -> IntArray:
    """Indices of the units in a batch: each independently with probability `sample_rate`; often more, fewer or none."""
    return np.flatnonzero(rng.random(num_units) < sample_rate)


def shuffled_batches(num_records: int, batch_size: int, rng: np.random.Generator) -> list[IntArray]:
    """One pass over all records in random order, in batches; for training without privacy only."""
    order = rng.permutation(num_records)
    return [order[start : start + batch_size] for start in range(0, num_records, batch_size)]

"""Who is in a batch. Poisson sampling over units, one record or all records of each sampled patient; every draw from a keyed stream."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from client.noise import KeyedStream
from shared.cohort import BoolArray, Cohort, IntArray
from shared.plan import SitePlan

SHAPE = 16  # records: kernels work on rows in blocks of up to 16, and treat what is left over differently


class PatientIndex:
    """Records grouped by patient, so that those of a sampled patient are found without a search."""

    def __init__(self, cohort: Cohort) -> None:
        self.num_patients = cohort.num_patients
        self._order = np.argsort(cohort.patient_of_record, kind="stable")
        self._counts = np.bincount(cohort.patient_of_record, minlength=cohort.num_patients)
        self._starts = np.cumsum(self._counts) - self._counts
        self.several_records = bool(self._counts.max(initial=0) > 1)  # else nothing is drawn to choose among a patient's
        self.first_records = np.where(self._counts > 0, np.append(self._order, -1)[self._starts], -1)  # `(P,)`; -1 of a patient without

    def one_record_each(self, patients: IntArray, stream: KeyedStream) -> IntArray:
        """A record of each patient, uniformly among its own, `(len(patients),)`; none of a patient without records, never another's."""
        patients = patients[self._counts[patients] > 0]
        counts = self._counts[patients]
        if not self.several_records:
            return np.asarray(self._order[self._starts[patients]])
        offset = np.minimum((stream.uniforms(len(patients)) * counts).astype(np.int64), counts - 1)  # a uniform may be 1
        return np.asarray(self._order[self._starts[patients] + offset])

    def all_records(self, patients: IntArray) -> list[IntArray]:
        """The records of each patient, in the cohort's order; a patient without records is left out."""
        spans = zip(self._starts[patients], self._counts[patients], strict=True)
        return [self._order[start : start + count] for start, count in spans if count]


def poisson_sample(num_units: int, sample_rate: float, stream: KeyedStream) -> IntArray:
    """Indices of the units in a batch: each independently with probability `sample_rate` (or less, by 2**-64); often more, fewer or none."""
    return np.flatnonzero(_below(stream.words(num_units), sample_rate))


def poisson_batches(
    num_units: IntArray, sample_rates: Sequence[float], steps: IntArray, streams: Sequence[KeyedStream]
) -> tuple[IntArray, IntArray, IntArray]:
    """What `poisson_sample` gives each of S sites in each of its steps: step, site and index of every unit, in this order.

    Args:
        num_units, sample_rates, steps, streams: of each site.
    """
    ends = np.cumsum(num_units * steps)
    words, chosen = np.empty(ends[-1], dtype=np.uint64), np.empty(ends[-1], dtype=np.bool_)
    for start, end, sample_rate, stream in zip((ends - num_units * steps).tolist(), ends.tolist(), sample_rates, streams, strict=True):
        stream.fill(words[start:end])
        chosen[start:end] = _below(words[start:end], sample_rate)
    places = np.flatnonzero(chosen)
    counts = np.diff(np.searchsorted(places, ends), prepend=0)
    site = np.repeat(np.arange(len(ends)), counts)
    step, unit = np.divmod(places - (ends - num_units * steps)[site], np.maximum(num_units, 1)[site])
    rank = step * len(ends) + site
    order = np.argsort(rank.astype(np.min_scalar_type(int(steps.max()) * len(ends))), kind="stable")  # of 16 bits, as a rule: much sooner sorted
    return step[order], site[order], unit[order]


def _below(words: "np.ndarray[tuple[int], np.dtype[np.uint64]]", probability: float) -> BoolArray:
    most = int(probability * 2.0**64)
    return words < np.uint64(most) if most < 2**64 else np.ones(len(words), dtype=np.bool_)


def sample_units(cohort: Cohort, index: PatientIndex, plan: SitePlan, per_patient: str, stream: KeyedStream) -> IntArray | list[IntArray]:
    """A Poisson batch over the plan's unit: one record a unit, or all the records of each patient (`per_patient`: "one" or "all")."""
    if plan.unit == "record":
        return poisson_sample(cohort.num_records, plan.sample_rate, stream)
    patients = poisson_sample(index.num_patients, plan.sample_rate, stream)
    return index.all_records(patients) if per_patient == "all" else index.one_record_each(patients, stream)


def whole_patients(patients: Sequence[IntArray], most_records: int) -> Iterator[list[IntArray]]:
    """The patients in groups of at most `most_records` records; a patient with more is a group of its own."""
    group: list[IntArray] = []
    size = 0
    for records in patients:
        if group and size + len(records) > most_records:
            yield group
            group, size = [], 0
        group.append(records)
        size += len(records)
    if group:
        yield group


def shuffled_batches(num_records: int, batch_size: int, rng: np.random.Generator) -> list[IntArray]:
    """One pass over all records in random order, in batches; for training without privacy only."""
    order = rng.permutation(num_records)
    return [order[start : start + batch_size] for start in range(0, num_records, batch_size)]


def physical_size(expected_batch_size: float, most: int) -> int:
    """How many records every physical batch has, filled up where there are fewer: a multiple of 16, from public numbers alone.

    Room for the expected batch and two standard deviations, so that most batches are one, but no more than `most`.
    """
    wanted = math.ceil((expected_batch_size + 2 * math.sqrt(expected_batch_size)) / SHAPE) * SHAPE
    return max(SHAPE, min(wanted, most // SHAPE * SHAPE))

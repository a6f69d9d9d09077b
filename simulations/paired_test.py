"""Does one model do better than another on the same patients? Approximate randomisation (Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses").

Under the null hypothesis it makes no difference which of the two models looked at a patient, so for each patient apart the two may be exchanged by
a coin; the share of such exchanges that come to at least the difference observed is the p-value. It holds for any metric of summed statistics.
"""

import numpy as np
from numpy.typing import NDArray

from client.evaluation import predictions_of
from shared.cohort import Cohort
from shared.metrics import FloatArray, Metric, Statistic
from shared.models import Parameters, set_parameters
from shared.results import PairedTest
from shared.seeding import generator
from shared.task import Task

ROUNDING = 1e-12  # of a difference: equal ones count as reached


def paired_test(task: Task, tested: Cohort, one: Parameters, other: Parameters, *, resamples: int, seed: int) -> PairedTest | None:
    """The primary metric of `one` minus that of `other` on these patients, and its two-sided p-value; None where a metric is not determined.

    Args:
        resamples: exchanges that are drawn; with R of them no p-value is below 1 / (R + 1).
    """
    [metric] = [metric for metric in task.metrics if metric.name == task.primary_metric]
    if not resamples or not tested.num_records:
        return None
    parts = [_by_patient(metric.statistic, task, tested, parameters) for parameters in (one, other)]
    return exchange_test(metric, *parts, resamples=resamples, rng=generator(seed, "paired test", tested.num_patients))


def exchange_test(metric: Metric, one: FloatArray, other: FloatArray, *, resamples: int, rng: np.random.Generator) -> PairedTest | None:
    """The test on each patient's own part of the metric's statistic under either model, `(P, *shape)` each."""
    shape, total = metric.statistic.shape, (one + other).sum(axis=0)
    observed = _difference(metric, one.sum(axis=0), total)
    if observed is None:
        return None
    exchanged = rng.random((resamples, len(one))) < 0.5
    moved = exchanged @ (other - one).reshape(len(one), -1)
    sums = one.sum(axis=0) + moved.reshape(resamples, *shape)
    differences = [_difference(metric, np.maximum(drawn, 0.0) if metric.statistic.is_counts else drawn, total) for drawn in sums]
    known = [abs(value) for value in differences if value is not None]
    reached = sum(value >= abs(observed) - ROUNDING for value in known)
    return PairedTest(difference=observed, p_value=(1 + reached) / (1 + len(known)), num_test=len(one), resamples=len(known))


def _difference(metric: Metric, one: FloatArray, total: FloatArray) -> float | None:
    first, second = metric.of(one), metric.of(np.maximum(total - one, 0.0) if metric.statistic.is_counts else total - one)
    return None if first is None or second is None else first - second


def _by_patient(statistic: Statistic, task: Task, tested: Cohort, parameters: Parameters) -> FloatArray:
    """`(P, *shape)`: what each patient adds to the statistic."""
    model = task.model()
    set_parameters(model, parameters)
    predictions: NDArray[np.float64] = predictions_of(task, model, tested)
    if statistic.cells is None:
        rows = [tested.patient_of_record == patient for patient in range(tested.num_patients)]
        return np.stack([statistic.summarise(predictions[mine], tested.select(np.array([patient]))) for patient, mine in enumerate(rows)])
    parts = np.zeros((tested.num_patients, int(np.prod(statistic.shape))))
    np.add.at(parts, (tested.patient_of_record, statistic.cells(predictions, tested.labels)), tested.record_weights())
    return parts.reshape(tested.num_patients, *statistic.shape)

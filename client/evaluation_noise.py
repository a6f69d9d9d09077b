"""Evaluation statistics with discrete Gaussian noise: one release for the test patients of a site.

Theorem (Canonne, Kamath and Steinke 2020, proposition 5 and its sum over independent coordinates). Let integer vectors x, x' differ by at
most Delta in L2 norm. With independent N_Z(0, sigma^2) noise on every coordinate, the Renyi divergence of order alpha between the two results
is at most alpha Delta^2 / (2 sigma^2), for every alpha > 1: what a Gaussian release of noise multiplier sigma / Delta costs.

Unit and neighbouring relation: add or remove one test patient with all of its records. No sampling. Released: all statistics of one
evaluation together, as one event of `noise_multiplier`. Statistic j of k, with sensitivity Delta_j, has noise of noise_multiplier x sqrt(k) x
Delta_j, so it costs at most alpha / (2 k noise_multiplier^2), and the k of them alpha / (2 noise_multiplier^2).

Assumed: a patient's part depends on that patient's records alone and is at most `sensitivity` long. `bounded_statistics` enforces both, for it
predicts, summarises and bounds patient by patient, whatever a task's model and statistics do. (In one batch, a patient could move another's score
over the edge of a bin: a model may look across its batch, and the last bits of a matrix product depend on its shape.) Shapes,
sensitivities and the number of statistics are public.

Entries: neighbouring entries that share a draw of noise (`noised_widths`) are released as equal shares of their noised sum: a histogram of
512 bins would carry the noise of 512 draws in every total, and a hospital's few hundred test patients would drown in it.

Edge cases: nobody tested: zeros with noise. A patient whose part is not finite adds nothing. Several records: they share a weight of 1.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from client.discrete_gaussian import RandomBytes, keyed_bytes, sample_discrete_gaussian
from shared.cohort import Cohort
from shared.messages import Statistics
from shared.metrics import FloatArray, Statistic
from shared.privacy import EVALUATION_ORDERS, renyi_epsilon

GRID_BITS = 20  # steps of the grid per sensitivity: 2**20 to 2**21


def grid_of(statistic: Statistic) -> float:
    """The step of the public grid that a noised statistic lies on: a power of two, at most `sensitivity` / 2**20."""
    return math.ldexp(1.0, math.frexp(statistic.sensitivity)[1] - 1 - GRID_BITS)


def grid_sensitivity(statistic: Statistic) -> float:
    """L2 sensitivity of the statistic rounded to its grid, in steps of the grid; under 0.01 % more for a thousand draws.

    Rounding moves each of two neighbouring sums by at most half a step an entry, and so them apart by at most one. As much again is for the
    floating-point error of a sum over up to 60,000 patients; a sum of `bounded_statistics` has neither.
    """
    return statistic.sensitivity / grid_of(statistic) + 2 * math.sqrt(math.prod(merged_shape(statistic)))


def merged_shape(statistic: Statistic) -> tuple[int, ...]:
    """One entry for each draw of noise."""
    return (*statistic.shape[:-1], len(statistic.noised_widths)) if statistic.noised_widths else statistic.shape


def merge(values: FloatArray, widths: tuple[int, ...]) -> FloatArray:
    """Sums of neighbours along the last axis, `(..., B) -> (..., len(widths))`; without widths the values themselves."""
    starts = np.cumsum([0, *widths[:-1]])
    return np.asarray(np.add.reduceat(values, starts, axis=-1)) if widths else values


def spread(merged: FloatArray, widths: tuple[int, ...]) -> FloatArray:
    """Each entry in equal shares, `(..., len(widths)) -> (..., B)`; exact, for widths are powers of two."""
    return np.repeat(merged / np.array(widths), widths, axis=-1) if widths else merged


def bounded_statistics(statistics: Mapping[str, Statistic], cohort: Cohort, predict: Callable[[Cohort], FloatArray]) -> Statistics:
    """Every statistic as a sum over patients, to which each patient adds at most its `sensitivity` (L2), whatever `summarise` does.

    Each patient is predicted and summarised alone, scaled down to the sensitivity where longer, and cut towards zero to the grid, which makes
    no part longer; the parts are added as integers, so there is no floating-point error that depends on who else is there. Entries that
    share a draw of noise are merged first, and shared out again.

    Args:
        predict: the cohort of one patient -> its predictions, `(records, ...)`, as the metrics take them; nothing may be kept between calls.
    """
    order = np.argsort(cohort.patient_of_record, kind="stable")
    ends = np.cumsum(np.bincount(cohort.patient_of_record, minlength=cohort.num_patients))
    sums = {name: np.zeros(merged_shape(statistic), dtype=np.int64) for name, statistic in statistics.items()}
    for records in np.split(order, ends[:-1]) if cohort.num_patients else []:
        if len(records):
            alone = _patient_alone(cohort, records)
            predictions = predict(alone)
            for name, statistic in statistics.items():
                sums[name] += _bounded_part(statistic, predictions, alone)
    return {name: spread(np.asarray(total * grid_of(statistics[name])), statistics[name].noised_widths) for name, total in sums.items()}


def _patient_alone(cohort: Cohort, records: NDArray[np.int64]) -> Cohort:
    """The cohort of the one patient with these records."""
    return Cohort(
        inputs=tuple(values[records] for values in cohort.inputs),
        labels=cohort.labels[records],
        patient_of_record=np.zeros(len(records), dtype=np.int64),
        patient_ids=(cohort.patient_ids[int(cohort.patient_of_record[records[0]])],),
    )


def _bounded_part(statistic: Statistic, predictions: FloatArray, alone: Cohort) -> NDArray[np.int64]:
    """One patient's merged part in steps of the grid; zero where it is not finite."""
    part = np.asarray(statistic.summarise(predictions, alone), dtype=np.float64)
    assert part.shape == statistic.shape
    part = merge(part, statistic.noised_widths)
    largest = float(np.abs(part).max(initial=0.0))
    if not math.isfinite(largest) or largest == 0:
        return np.zeros(part.shape, dtype=np.int64)
    norm = largest * float(np.linalg.norm(part / largest))  # no square overflows
    scale = min(1.0, statistic.sensitivity / norm)
    return np.trunc(part * scale / grid_of(statistic)).astype(np.int64)


def noise_statistics(statistics: Statistics, metrics_statistics: Mapping[str, Statistic], *, noise_multiplier: float, key: bytes) -> Statistics:
    """The statistics with discrete Gaussian noise, all together one Gaussian event of `noise_multiplier`.

    Each entry, or the sum of those that share a draw, is an exact multiple of the statistic's grid.

    Args:
        statistics: finite sums, by name, as `bounded_statistics` gives them.
        metrics_statistics: their definitions, by name.
        noise_multiplier: noise over sensitivity, of the whole release.
        key: 32 bytes, for this release alone. From the operating system wherever patients are real: who knows the key knows the noise.

    Example:
        noised = noise_statistics(bounded_statistics(declared, test_part, predict), declared, noise_multiplier=4.0, key=os.urandom(32))
    """
    assert noise_multiplier > 0
    random_bytes = keyed_bytes(key)
    share = noise_multiplier * math.sqrt(max(1, len(statistics)))
    return {name: _noised(statistics[name], metrics_statistics[name], share, random_bytes) for name in sorted(statistics)}


def _noised(total: FloatArray, statistic: Statistic, noise_multiplier: float, random_bytes: RandomBytes) -> FloatArray:
    assert total.shape == statistic.shape and bool(np.isfinite(total).all())
    grid = grid_of(statistic)
    sigma = math.ceil(noise_multiplier * grid_sensitivity(statistic)) + 1  # in steps; up, and over the error of this very product
    merged = merge(total, statistic.noised_widths)
    steps = np.rint(merged / grid).ravel()  # dividing by a power of two is exact
    noised = [int(step) + sample_discrete_gaussian(sigma**2, random_bytes) for step in steps]
    return spread(np.array([float(step) for step in noised]).reshape(merged.shape) * grid, statistic.noised_widths)


def noised_epsilon(noise_multiplier: float, *, delta: float, releases: int = 1) -> float:
    """Upper bound on epsilon at `delta` of `releases` noised evaluations, from Renyi divergence, least over orders.

    The privacy loss distribution of the continuous Gaussian is no bound for the discrete one in many dimensions, so it is not used here.
    """
    divergence = releases / (2 * noise_multiplier**2)  # a unit of order
    return min(renyi_epsilon(order * divergence, order=order, delta=delta) for order in EVALUATION_ORDERS)

"""Survival: how long until an event, where some were last seen without it. A proportional-hazards model, two losses, and Harrell's C as sums.

Cox's partial likelihood (Cox 1972) compares each patient who had the event with everybody still at risk, so it is no sum over patients: a patient's
gradient cannot be clipped alone, and no promise to a patient can be made with it. Both losses here are sums over patients, and estimate the same
log hazard ratios `w`, over intervals of time that are public:

- Discrete-time hazards (Gensheimer and Narasimhan 2019; Singer and Willett 1993): logit h_k(x) = a_k + w x, where h_k is the probability of the
  event within interval k for who reached it. Its loss is bounded in the slope, whatever the model says.
- The piecewise exponential model (Holford 1980; Laird and Olivier 1981): hazard exp(a_k + w x) within interval k. It is Cox's model with a baseline
  hazard that is constant in each interval; as intervals shrink around the events, its profile likelihood in `w` is the partial likelihood
  (Breslow 1974).

Metrics. Harrell's C (Harrell et al. 1982) is a statistic of pairs. It follows from a histogram to which each patient adds 1: by (seen last or event)
x bin of time x bin of risk. A pair counts where the earlier time is an event; two in one bin of time are not ordered, and count not at all; two in
one bin of risk count one half. So the value is exact for the binned data, and a binned pair is off by at most one bin: a quarter of a year up to
ten years, a year up to twenty; 0.06 in the logarithm of the cumulative hazard.

Legend: N records, F features, K intervals of the model, T bins of time, R bins of risk.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.cohort import Cohort
from shared.metrics import FloatArray, Metric, Statistic

DAYS_PER_YEAR = 365.25
INTERVAL_YEARS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0)  # of the model; who is seen longer was seen for ten years without the event
NUM_INTERVALS = len(INTERVAL_YEARS) - 1
USUAL_HAZARD = 0.03  # events a patient and year: where a model starts
RISK_YEARS = 5.0  # of the risk that is predicted
RISK_INTERVALS = INTERVAL_YEARS.index(RISK_YEARS)

TIME_EDGES = (*(quarter / 4 for quarter in range(1, 41)), *(float(year) for year in range(11, 21)))  # years, between the bins of time
NUM_TIMES = len(TIME_EDGES) + 1
NUM_RISKS = 128
LOWEST, HIGHEST = -6.0, 2.0  # log of the cumulative hazard over five years: risks of 0.2 % and 99.9 %
NOISED_WIDTHS = (16, *[8] * 12, 16)  # bins of risk that share a draw of noise


# Model and losses ---------------------------------------------------------------------------------------------------------------


class ProportionalHazards(nn.Module):
    """`(N, F) -> (N, K)`: a_k + w x, the log-odds or log-hazard of each interval above its usual one."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.risk = nn.Linear(num_features, 1, bias=False)
        self.baseline = nn.Linear(1, NUM_INTERVALS, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Each interval's intercept, plus the same risk in all of them."""
        return self.risk(features) + self.baseline(torch.ones_like(features[:, :1]))  # type: ignore[no-any-return]


def survival_labels(days: FloatArray, died: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Labels as the losses and the metrics take them: `(N, 2)`, days until the event or until last seen, and 1 where it was the event."""
    return np.stack([days, died], axis=1).astype(np.float32)


def hazard_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of discrete-time hazards, for each record `(N,)`.

    Who was last seen without the event counts as having survived an interval where that was after its middle.

    Args:
        outputs: `(N, K)`.
        labels: `(N, 2)`, see `survival_labels`.
    """
    starts, ends, years = _intervals(outputs, labels)
    event = _event_within(starts, ends, years, labels)
    at_risk = torch.maximum(event, (years >= (starts + ends) / 2).to(event.dtype))
    losses = nn.functional.binary_cross_entropy_with_logits(_log_odds(outputs), event, reduction="none")
    return (at_risk * losses).sum(dim=1)


def exponential_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the piecewise exponential model, for each record `(N,)`, as a Poisson count of events over years lived.

    Args:
        outputs: `(N, K)`.
        labels: `(N, 2)`, see `survival_labels`.
    """
    starts, ends, years = _intervals(outputs, labels)
    lived = torch.minimum(years, ends) - torch.minimum(years, starts)
    log_hazard = outputs + math.log(USUAL_HAZARD)
    return (log_hazard.exp() * lived - _event_within(starts, ends, years, labels) * log_hazard).sum(dim=1)


def hazard_risk(outputs: torch.Tensor) -> torch.Tensor:
    """`(N,)`: the probability of the event within five years, by discrete-time hazards."""
    return -torch.expm1(nn.functional.logsigmoid(-_log_odds(outputs))[:, :RISK_INTERVALS].sum(dim=1))


def exponential_risk(outputs: torch.Tensor) -> torch.Tensor:
    """`(N,)`: the probability of the event within five years, by the piecewise exponential model."""
    return -torch.expm1(-(outputs.exp() * USUAL_HAZARD * _lengths(outputs))[:, :RISK_INTERVALS].sum(dim=1))


def log_cumulative_hazard(risk: torch.Tensor) -> torch.Tensor:
    """`(N,)`: log(-log(1 - risk)), on which effects of proportional hazards add up."""
    return torch.log(-torch.log1p(-risk.clamp(1e-12, 1 - 1e-12)))


def _intervals(outputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Starts and ends `(K,)` of the intervals, and each record's time `(N, 1)`, in years."""
    edges = outputs.new_tensor(INTERVAL_YEARS)
    return edges[:-1], edges[1:], labels[:, :1].to(outputs.dtype) / DAYS_PER_YEAR


def _event_within(starts: torch.Tensor, ends: torch.Tensor, years: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(N, K)`: 1 where the event fell into the interval."""
    return ((years >= starts) & (years < ends) & (labels[:, 1:] > 0)).to(years.dtype)


def _lengths(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.new_tensor(INTERVAL_YEARS).diff()


def _log_odds(outputs: torch.Tensor) -> torch.Tensor:
    """Of the event within each interval; at an output of 0 those of the usual hazard: log(exp(hazard x years) - 1)."""
    return outputs + torch.log(torch.expm1(USUAL_HAZARD * _lengths(outputs)))


# Metrics ------------------------------------------------------------------------------------------------------------------------


def survival_histogram(risks: FloatArray, cohort: Cohort) -> FloatArray:
    """`(2, T, R)`: patients by whether they had the event (row 1) or were last seen without it (row 0), bin of time, and bin of risk.

    Args:
        risks: `(N,)` probabilities of the event within five years.
    """
    counts = np.bincount(survival_cells(risks, cohort.labels), weights=cohort.record_weights(), minlength=2 * NUM_TIMES * NUM_RISKS)
    return np.asarray(counts, dtype=np.float64).reshape(2, NUM_TIMES, NUM_RISKS)


def survival_cells(risks: FloatArray, labels: NDArray[np.generic]) -> NDArray[np.int64]:
    """`(N,)`: the entry of each record in the flattened histogram."""
    days, died = labels.astype(np.float64).T
    time = np.searchsorted(np.array(TIME_EDGES) * DAYS_PER_YEAR, days, side="right")
    return np.asarray(((died > 0) * NUM_TIMES + time) * NUM_RISKS + _bin_of_risk(risks), dtype=np.int64)


def _bin_of_risk(risks: FloatArray) -> NDArray[np.int64]:
    """Bin of each risk, equal steps of the log of its cumulative hazard; a risk that is not finite counts as 0."""
    clipped = np.clip(np.nan_to_num(risks.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0), 1e-9, 1 - 1e-9)
    log_hazard = np.log(-np.log1p(-clipped))
    return np.clip((log_hazard - LOWEST) / (HIGHEST - LOWEST) * NUM_RISKS, 0, NUM_RISKS - 1).astype(np.int64)


def _bin_risks() -> FloatArray:
    """`(R,)`: the risk at the middle of each bin."""
    return np.asarray(-np.expm1(-np.exp(LOWEST + (np.arange(NUM_RISKS) + 0.5) / NUM_RISKS * (HIGHEST - LOWEST))))


def concordance(histogram: FloatArray) -> float | None:
    """Harrell's C of the binned data: of the pairs of which one had the event in an earlier bin of time, the share in which its risk was higher.

    A tie of risk counts one half. None where no pair can be compared.
    """
    events, everybody = histogram[1], histogram.sum(axis=0)
    later = everybody[::-1].cumsum(axis=0)[::-1] - everybody
    comparable = float((events.sum(axis=1) * later.sum(axis=1)).sum())
    below = later.cumsum(axis=1) - later / 2  # half of those of the same risk
    return float((events * below).sum() / comparable) if comparable > 0 else None


def observed_risk(histogram: FloatArray) -> float | None:
    """The probability of the event within five years by the life table (Cutler and Ederer 1958) of the binned data; None where nobody is known.

    Who is last seen within a bin is at risk for half of it.
    """
    last_seen, events = histogram.sum(axis=2)
    total = last_seen + events
    at_risk = total[::-1].cumsum()[::-1] - last_seen / 2
    within = TIME_EDGES.index(RISK_YEARS) + 1
    if total.sum() <= 0:
        return None
    rates = np.divide(events, at_risk, out=np.zeros_like(events), where=at_risk > 0)[:within]
    return float(1 - np.prod(1 - np.clip(rates, 0, 1)))


def observed_to_expected(histogram: FloatArray) -> float | None:
    """Risk observed by the life table over the mean risk predicted, within five years: 1 is calibrated in the large, above 1 is predicted too low."""
    observed, patients = observed_risk(histogram), float(histogram.sum())
    expected = float((histogram.sum(axis=(0, 1)) * _BIN_RISKS).sum())
    return None if observed is None or expected <= 0 else observed * patients / expected


_BIN_RISKS = _bin_risks()
SURVIVAL_HISTOGRAM = Statistic(
    name="survival_histogram",
    shape=(2, NUM_TIMES, NUM_RISKS),
    summarise=survival_histogram,
    noised_widths=NOISED_WIDTHS,
    cells=survival_cells,
)
SURVIVAL_METRICS = (
    Metric(name="c_index", statistic=SURVIVAL_HISTOGRAM, finish=concordance, low=0, high=1),
    Metric(name="observed_to_expected", statistic=SURVIVAL_HISTOGRAM, finish=observed_to_expected, low=0),
)

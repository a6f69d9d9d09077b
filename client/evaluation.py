"""What the task's metrics are made of: statistics of a model's predictions on a site's test patients."""

import numpy as np
from numpy.typing import NDArray
from torch import nn

from client.evaluation_noise import merge, spread
from shared.cohort import Cohort
from shared.errors import ConfigurationError
from shared.messages import Statistics
from shared.metrics import Statistic
from shared.models import Parameters, predict_in_batches, set_parameters
from shared.task import Task


def evaluate_parameters(task: Task, test_part: Cohort, parameters: Parameters, *, model: nn.Module) -> Statistics:
    """Every statistic of the task on `test_part` for `model`, once these parameters are in it; zeros where nobody is tested."""
    statistics = {metric.statistic.name: metric.statistic for metric in task.metrics}
    if test_part.num_records == 0:
        return {name: np.zeros(statistic.shape) for name, statistic in statistics.items()}
    set_parameters(model, parameters)
    predictions = predictions_of(task, model, test_part)
    summed = {name: np.asarray(statistic.summarise(predictions, test_part), dtype=np.float64) for name, statistic in statistics.items()}
    for name, value in summed.items():
        if value.shape != statistics[name].shape or not np.isfinite(value).all():
            raise ConfigurationError(
                f"task {task.name}: statistic {name}: expected finite values of shape {statistics[name].shape}, got others", "correct summarise"
            )
    return summed


def predictions_of(task: Task, model: nn.Module, cohort: Cohort) -> NDArray[np.float64]:
    """What the task's metrics look at, `(N, ...)`."""
    return np.asarray(task.predict(predict_in_batches(model, cohort.inputs)).numpy(), dtype=np.float64)


def rounded(counts: NDArray[np.float64], statistic: Statistic, step: int) -> NDArray[np.float64]:
    """Counts rounded to multiples of `step`, in the few cells that noise would be added to; what counts nobody is left as it is."""
    if step == 1 or not statistic.is_counts:
        return counts
    merged = merge(counts, statistic.noised_widths)
    return spread(np.round(merged / step) * step, statistic.noised_widths)

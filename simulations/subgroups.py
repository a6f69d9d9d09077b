"""The final model on groups of test patients over all sites: who does it serve less well?

For virtual sites alone, whose patients this machine has; a hospital's own groups would be more answers about its patients. Groups are of the test
patients, so they are no release of training; where a study promises its test patients something, nothing exact is computed.
"""

import numpy as np

from client.evaluation import evaluate_parameters
from server.evaluation import evaluate
from server.outcome import count_by_class
from shared.cohort import SIMULATION_SPLIT_KEY, Cohort, held_out_patients
from shared.models import Parameters
from shared.results import SubgroupResult
from shared.study import Study
from shared.subgroups import Subgroup
from shared.task import Task
from simulations.baselines import pool

SMALLEST = 10  # patients: of fewer no number is given
NOTHING_TOLD = SubgroupResult(num_test=None, support={}, metrics={}, ci95={})


def evaluate_subgroups(task: Task, study: Study, cohorts: dict[str, Cohort], parameters: Parameters) -> dict[str, dict[str, SubgroupResult]]:
    """By attribute and group, the metrics of these parameters on the test patients of all sites.

    Nothing where the task marks no attribute, patients lack it, folds differ in who is tested, or the test patients are promised something.
    """
    if study.noised_statistics or study.evaluation.folds > 1:
        return {}
    tested = [cohort.select(held_out_patients(cohort, SIMULATION_SPLIT_KEY)) for cohort in cohorts.values()]
    marked = [mark for mark in task.subgroups if all(mark.attribute in part.attributes for part in tested)]
    if not marked or not any(part.num_patients for part in tested):
        return {}
    together, model = pool(tested), task.model()
    found = {}
    for mark in marked:
        groups = mark.groups_of(np.concatenate([part.attributes[mark.attribute] for part in tested]).tolist())
        totals = {
            group: evaluate_parameters(task, together.select(groups == group), parameters, model=model) for group in mark.ordered(groups.tolist())
        }
        sizes = {group: int((groups == group).sum()) for group in totals}
        hidden = suppressed(sizes)
        found[mark.title or mark.attribute] = {
            group: NOTHING_TOLD if group in hidden else _result(task, study, mark, group, total, sizes[group]) for group, total in totals.items()
        }
    return found


def suppressed(sizes: dict[str, int]) -> set[str]:
    """The groups of which nothing is told: those with fewer than `SMALLEST` patients, and as many of the next smallest as it takes for all that is
    hidden together, which the total gives away, to be at least so many patients of at least two groups."""
    hidden = {group for group, size in sizes.items() if size < SMALLEST}
    rest = sorted((group for group in sizes if group not in hidden), key=lambda group: (sizes[group], group))
    while hidden and rest and (len(hidden) < 2 or sum(sizes[group] for group in hidden) < SMALLEST):
        hidden.add(rest.pop(0))
    return hidden


def _result(task: Task, study: Study, mark: Subgroup, group: str, total: dict[str, np.ndarray], num_patients: int) -> SubgroupResult:
    evaluation = evaluate(task, total, resamples=study.evaluation.bootstrap, seed=study.seed, path=("subgroup", mark.attribute, group))
    return SubgroupResult(num_test=num_patients, support=count_by_class(task, total), metrics=evaluation.metrics, ci95=evaluation.ci95)

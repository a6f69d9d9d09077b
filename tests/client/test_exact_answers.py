"""What leaves without noise is about as many models as the approved study has rounds, however often a coordinator asks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.exact_answers import ExactAnswers
from shared.errors import NotApprovedError, StorageError
from shared.messages import EvaluateTask
from shared.models import Parameters
from shared.study import Study
from shared.task import Task

Hospitals = Callable[..., Any]
Studies = Callable[..., Study]
REQUESTS = [f"{number:064x}" for number in range(5)]


def moved(parameters: Parameters, step: int) -> Parameters:
    """Another model."""
    return {name: np.asarray(value + np.float32(step) * np.float32(0.125), dtype=value.dtype) for name, value in parameters.items()}


def closing(study: Study) -> EvaluateTask:
    return EvaluateTask(run="run-1", study_hash=study.fingerprint(), round=study.rounds.count, fold=1)


def test_the_same_question_is_counted_once_also_by_a_new_process(tmp_path: Path) -> None:
    for request in [*REQUESTS[:3], *REQUESTS[:3]]:
        ExactAnswers(tmp_path / "state").count("run", request, most=3)
    with pytest.raises(NotApprovedError, match="at most the 3 models") as refused:
        ExactAnswers(tmp_path / "state").count("run", REQUESTS[3], most=3)
    assert refused.value.rule == "approval.rounds"
    ExactAnswers(tmp_path / "state").count("run", REQUESTS[0], most=3)
    ExactAnswers(tmp_path / "state").count("another", REQUESTS[3], most=3)


def test_what_cannot_be_written_down_is_not_answered(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        ExactAnswers(tmp_path / "file" / "state").count("run", REQUESTS[0], most=3)


def test_exact_statistics_of_a_private_study_are_of_so_many_models(make_hospital: Hospitals, make_study: Studies, task: Task) -> None:
    names = str([metric.name for metric in task.metrics]).replace("'", '"')
    hospital, study = make_hospital(allowed_metrics=names, exact_metrics="true"), make_study(privacy={"spare_rounds": 1})
    hospital.site.enrol(hospital.enrolment(study))
    for step in range(5):  # three rounds, the closing evaluation, one to spare
        _, statistics = hospital.site.evaluate(closing(study), moved(hospital.parameters, step))
        assert statistics is not None
    with pytest.raises(NotApprovedError):
        hospital.site.evaluate(closing(study), moved(hospital.parameters, 5))
    with pytest.raises(NotApprovedError):
        hospital.site.train(hospital.training(study), hospital.parameters)
    assert hospital.charges() == []
    _, again = hospital.site.evaluate(closing(study), moved(hospital.parameters, 4))
    assert again is not None


def test_a_study_without_privacy_gets_so_many_updates(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(allow_no_privacy="true"), make_study(privacy={"unit": "none"})
    hospital.site.enrol(hospital.enrolment(study))
    for step in range(4):
        hospital.site.train(hospital.training(study), moved(hospital.parameters, step))
    with pytest.raises(NotApprovedError):
        hospital.site.train(hospital.training(study), moved(hospital.parameters, 4))


def test_where_nothing_exact_leaves_the_ledger_alone_counts(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital, study = make_hospital(), make_study()
    hospital.site.enrol(hospital.enrolment(study))
    for step in range(8):
        _, statistics = hospital.site.evaluate(closing(study), moved(hospital.parameters, step))
        assert statistics is None

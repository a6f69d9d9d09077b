"""Death in hospital from series: what the model takes, that it trains in blocks and with privacy, and that it learns."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from client.private_probe import probe_model
from shared.models import initial_parameters, predict_in_batches, set_parameters
from shared.study import Study
from shared.task import resolve_task
from simulations.blocks.choice import check_alike

STUDIES = Path(__file__).resolve().parents[2] / "studies"
NAMES = ("icu-mortality", "shared.tasks.icu_mortality:icu_mortality_gru")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_blocks_and_with_privacy(name: str) -> None:
    task = resolve_task(name)
    assert check_alike(task).held > 0  # raises where it cannot be stacked
    probe_model(task, Study.load(STUDIES / "icu-mortality.toml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_predicted_alike_in_any_company(name: str) -> None:
    task = resolve_task(name)
    cohort = task.synthetic_cohort(30, 1)
    model = task.model()
    set_parameters(model, initial_parameters(model, 3))
    together = predict_in_batches(model, cohort.inputs)
    assert together.shape == (30, 1)
    assert torch.allclose(together[4:5], predict_in_batches(model, cohort.select(np.array([4])).inputs), atol=1e-6)


def test_lstm_and_gru_are_two_architectures_of_one_task() -> None:
    lstm, gru = (resolve_task(name) for name in NAMES)
    assert lstm.name == gru.name and lstm.schema == gru.schema and lstm.fingerprint() != gru.fingerprint()
    assert "LSTM" in repr(lstm.model()) and "GRU" in repr(gru.model())
    assert tuple(part.shape for part in lstm.schema) == tuple(values.shape[1:] for values in lstm.synthetic_cohort(5, 0).inputs)  # type: ignore[union-attr]


@pytest.mark.slow
def test_it_learns_from_synthetic_stays() -> None:
    """Two hundred steps on 600 stays tell 600 others apart; an AUROC of chance has standard error 0.03, so 0.7 is out of its reach."""
    task = resolve_task("icu-mortality")
    train, test = task.synthetic_cohort(600, 1), task.synthetic_cohort(600, 2)
    model = task.model()
    set_parameters(model, initial_parameters(model, 0))
    untrained = copy.deepcopy(model)
    optimizer, rng = torch.optim.SGD(model.parameters(), lr=0.5), np.random.default_rng(0)
    inputs, labels = [torch.from_numpy(values) for values in train.inputs], torch.from_numpy(np.asarray(train.labels))
    model.train()
    for _ in range(200):
        rows = torch.from_numpy(rng.integers(0, 600, size=64))
        optimizer.zero_grad()
        task.loss(model(*(values[rows] for values in inputs)), labels[rows]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    metric = next(metric for metric in task.metrics if metric.name == "auroc")
    scores = {
        name: metric.of(metric.statistic.summarise(task.predict(predict_in_batches(each, test.inputs)).numpy().astype(np.float64), test))
        for name, each in (("trained", model), ("untrained", untrained))
    }
    assert (scores["trained"] or 0) > 0.75 and (scores["trained"] or 0) > (scores["untrained"] or 0) + 0.05

"""What a task does to a site's model after its training sees no patient, and is the same at every run."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from client.local_training import LocalRound, torch_keyed
from client.local_update import local_update
from client.noise import subkey
from client.refinement import refined
from shared.errors import ProtocolError
from shared.models import initial_parameters
from shared.plan import plan_site
from shared.study import Study
from shared.task import Task, resolve_task

KEY = bytes(range(32))


class Keeps(nn.Module):
    """A model that keeps what passes through it, and has a layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.shadow, self.seen = nn.Linear(30, 2), nn.Linear(30, 2).requires_grad_(False), 0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen += len(rows)
        return self.out(rows)  # type: ignore[no-any-return]


def follow(model: nn.Module) -> None:
    """The shadow becomes what is trained, plus a draw."""
    assert isinstance(model, Keeps) and model.seen == 0, "a model that saw patients"
    with torch.no_grad():
        model.shadow.weight.copy_(model.out.weight + torch.randn(2, 30))


def task_of() -> Task:
    loss = lambda outputs, labels: nn.functional.cross_entropy(outputs, labels.long(), reduction="none")  # noqa: E731
    return dataclasses.replace(resolve_task("breast-cancer"), model=Keeps, loss=loss, refine=follow)


@pytest.mark.parametrize("privacy", [{"unit": "none"}, {"noise_multiplier": 1.0, "delta": 1e-4}], ids=["none", "private"])
def test_the_task_refines_a_model_that_saw_nobody(privacy: dict[str, object]) -> None:
    study = Study.from_table({"name": "refine", "task": "breast-cancer", "privacy": privacy})
    task = task_of()
    plain = dataclasses.replace(task, refine=None)
    cohort = task.synthetic_cohort(60, 0)
    received = initial_parameters(task.model(), 1)
    plan = plan_site(study, cohort.num_patients)
    updates = [
        local_update(one.model(), cohort, received, LocalRound(study=study, task=one, round_number=1), plan=plan, key=KEY, simulated=True)[0]
        for one in (task, task, plain)
    ]
    for name, value in updates[0].items():
        np.testing.assert_array_equal(value, updates[1][name])
    np.testing.assert_array_equal(updates[0]["out.weight"], updates[2]["out.weight"])
    assert not updates[2]["shadow.weight"].any() and updates[0]["shadow.weight"].any()
    moved = updates[0]["shadow.weight"] + received["shadow.weight"] - (updates[0]["out.weight"] + received["out.weight"])
    with torch_keyed(subkey(KEY, b"refine")):
        np.testing.assert_allclose(moved, torch.randn(2, 30).numpy(), atol=1e-5)


def test_what_comes_out_is_a_function_of_parameters_and_key_and_must_be_finite() -> None:
    task = task_of()
    trained = initial_parameters(task.model(), 1)
    same, other = refined(task, trained, key=KEY), refined(task, trained, key=bytes(32))
    np.testing.assert_array_equal(same["shadow.weight"], refined(task, trained, key=KEY)["shadow.weight"])
    assert (same["shadow.weight"] != other["shadow.weight"]).any()

    def spoil(model: nn.Module) -> None:
        next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(ProtocolError, match="finite"):
        refined(dataclasses.replace(task, refine=spoil), trained, key=KEY)

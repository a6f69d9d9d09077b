"""pfl-research's simulation: one process, or several under torchrun. It takes the patients of a batch in the order of the file."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from side import Clock, first_model, opened, write
from torch import nn


class Trained(nn.Module):
    """The model with the loss and the metric that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.model.train()
        return nn.functional.cross_entropy(self.model(inputs), labels)

    @torch.no_grad()
    def metrics(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Weighted]:
        return {"accuracy": Weighted(int((self.model(inputs).argmax(dim=1) == labels).sum()), len(labels))}


class Laps(TrainingProcessCallback):
    """Looks at the clock after every round."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def after_central_iteration(self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int) -> tuple[bool, Metrics]:
        self._clock.lap()
        return False, Metrics()


def main() -> None:
    """All rounds."""
    folder = Path(sys.argv[1])
    setting, patients = opened(folder)
    assert not setting.private
    np.random.seed(setting.seed)
    torch.manual_seed(setting.seed)
    module = Trained(first_model(folder, setting))

    def data_of(site: int) -> Dataset:
        return Dataset(patients.training(site).tensors, user_id=site)

    sites = FederatedDataset(data_of, get_user_sampler("minimize_reuse", range(setting.sites)))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=setting.rounds, evaluation_frequency=setting.rounds + 1, train_cohort_size=setting.sites, val_cohort_size=0
        ),
        backend=SimulatedBackend(training_data=sites, val_data=sites),
        model=PyTorchModel(module, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=setting.learning_rate, local_batch_size=setting.batch_size),
        callbacks=[Laps(clock)],
    )
    if pytorch_ops.distributed.global_rank == 0:
        write(folder, "pfl_research", clock, patients.accuracy(module.model))
    sys.stdout.flush()
    os._exit(0)  # threads of Gloo that are still there would abort a process that ends otherwise


if __name__ == "__main__":
    main()

"""Flower's simulation on Ray, one actor a core, with Opacus in the client as Flower's example does it."""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import models
import ray
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from side import Clock, first_model, opened, write

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """One round at the site of this node."""
    setting, patients = opened(FOLDER)
    if setting.private:
        from opacus_loop import train_site
    else:
        from plain import train_site  # type: ignore[assignment]
    model = models.build(setting.workload, private=setting.private)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train_site(model, patients.training(int(context.node_config["partition-id"])), setting)
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": setting.train})}
    return Message(content=RecordDict(content), reply_to=message)


class TimedFedAvg(FedAvg):
    """Federated averaging that looks at the clock, and that takes no failed site for a finished round."""

    clock: Clock

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """As `FedAvg`."""
        replies = list(replies)
        assert len(replies) == self.min_train_nodes and not any(reply.has_error() for reply in replies)
        result = super().aggregate_train(server_round, replies)
        self.clock.lap()
        return result


def main() -> None:
    """All rounds."""
    setting, patients = opened(FOLDER)
    strategy = TimedFedAvg(fraction_evaluate=0.0, min_train_nodes=setting.sites, min_available_nodes=setting.sites)
    model = first_model(FOLDER, setting)
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy.clock = Clock()
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=setting.rounds, train_config=ConfigRecord())
        model.load_state_dict(result.arrays.to_torch_state_dict())

    resources = {"num_cpus": setting.processes, "_temp_dir": str(FOLDER / "ray"), "log_to_driver": False}
    logging.getLogger("flwr").setLevel(logging.WARNING)
    run_simulation(
        server_app=server, client_app=client, num_supernodes=setting.sites, backend_name="ray",
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": resources},
    )  # fmt: skip
    ray.shutdown()
    write(FOLDER, "flower_ray", strategy.clock, patients.accuracy(model))


if __name__ == "__main__":
    main()

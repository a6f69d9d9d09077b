"""The coordinator's part of a study's strategy: what takes the updates of a round, and what moves the model by them."""

from collections.abc import Mapping

from server.aggregation import Aggregator, ExactMean
from server.kept_updates import KeptUpdates
from server.strategies.answers import Member
from server.strategies.bulyan import Bulyan
from server.strategies.coordinate_median import coordinate_median
from server.strategies.fedadagrad import fedadagrad
from server.strategies.fedadam import fedadam
from server.strategies.fedavg import FedAvg
from server.strategies.fedavgm import FedAvgM
from server.strategies.fedbuff import Buffer, FedBuff
from server.strategies.feddyn import FedDyn
from server.strategies.fednova import NormalisedMean
from server.strategies.fedyogi import fedyogi
from server.strategies.geometric_median import GeometricMedian
from server.strategies.krum import Krum
from server.strategies.norm_bounding import BoundedMean
from server.strategies.q_fedavg import FairMean
from server.strategies.scaffold import Scaffold
from server.strategies.server_optimizer import ServerOptimizer
from server.strategies.trimmed_mean import TrimmedMean
from shared import strategy_options as options

NONE: Mapping[str, int] = {}
NOBODY: Mapping[str, Member] = {}


def server_optimizer(strategy: options.Strategy, *, local_steps: int | None = None) -> ServerOptimizer:
    """The server's part of a study's strategy; FedAvg where it is in the sites' training alone, as with FedProx."""
    match strategy:
        case options.Scaffold():
            assert local_steps is not None
            return Scaffold(strategy, local_steps=local_steps)
        case options.FedDyn():
            return FedDyn(strategy)
        case options.FedAvgM():
            return FedAvgM(strategy)
        case options.FedBuff():
            return FedBuff(strategy)
        case options.FedAdagrad():
            return fedadagrad(strategy)
        case options.FedAdam():
            return fedadam(strategy)
        case options.FedYogi():
            return fedyogi(strategy)
        case _:
            return FedAvg()


def aggregator(
    strategy: options.Strategy, *, members: Mapping[str, Member] = NOBODY, losses: Mapping[str, float] = NONE, learning_rate: float = 1.0,
    staleness: Mapping[str, int] = NONE,
) -> Aggregator:  # fmt: skip
    """What takes the updates of a round, and makes one of them.

    Args:
        members: those asked, by name.
        losses: by site, where the strategy asks for them; each is there before the update is added.
        learning_rate: of the sites in this round.
        staleness: by site, where the strategy takes what comes late; as `losses`.
    """
    match strategy:
        case options.FedBuff():
            return Buffer(strategy, staleness=staleness)
        case options.FedNova():
            return NormalisedMean({name: member.steps for name, member in members.items()})
        case options.QFedAvg():
            noise = {name: member.noise for name, member in members.items()}
            return FairMean(strategy, learning_rate=learning_rate, losses=losses, noise=noise)
        case options.NormBounding():
            return BoundedMean(strategy)
        case options.CoordinateMedian():
            return KeptUpdates(coordinate_median)
        case options.TrimmedMean():
            return KeptUpdates(TrimmedMean(strategy))
        case options.Krum() | options.MultiKrum():
            return KeptUpdates(Krum(strategy))
        case options.Bulyan():
            return KeptUpdates(Bulyan(strategy))
        case options.GeometricMedian():
            return KeptUpdates(GeometricMedian(strategy))
        case _:
            return ExactMean()

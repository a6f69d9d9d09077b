"""The site's part of a study's strategy."""

from client.strategies.apfl import Apfl
from client.strategies.ditto import Ditto
from client.strategies.fedavg import FedAvg
from client.strategies.feddyn import FedDyn
from client.strategies.fedper import FedPer
from client.strategies.fedrep import FedRep
from client.strategies.fine_tuning import FineTuning
from client.strategies.local_rule import LocalRule
from client.strategies.q_fedavg import QFedAvg
from client.strategies.scaffold import Scaffold
from shared import strategy_options as options
from shared.study import Study
from shared.task import Task


def local_rule(study: Study, task: Task) -> LocalRule:
    """What this study's strategy does at a site."""
    strategy = study.strategy
    match strategy:
        case options.Scaffold():
            return Scaffold()
        case options.FedDyn():
            return FedDyn(strategy)
        case options.FedPer() | options.FedBN():
            return FedPer(study, task)
        case options.FedRep():
            return FedRep(strategy, study, task)
        case options.Ditto():
            return Ditto(strategy)
        case options.Apfl():
            return Apfl(strategy)
        case options.QFedAvg():
            return QFedAvg(strategy)
        case options.FineTuning():
            return FineTuning()
        case _:
            return FedAvg()

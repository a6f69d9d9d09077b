"""Federated learning across hospitals, in rounds: `from wardround import Study, simulate`. Names load when they are first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.study import Study
    from shared.task import Task
    from wardround.deploying import export_model
    from wardround.explaining import explain_run
    from wardround.predicting import predict
    from wardround.run import Run, simulate
    from wardround.sweeping import SweepRun, sweep

__all__ = ["Run", "Study", "SweepRun", "Task", "explain_run", "export_model", "predict", "simulate", "sweep"]

_HOMES = {
    "Study": "shared.study",
    "Task": "shared.task",
    "Run": "wardround.run",
    "simulate": "wardround.run",
    "SweepRun": "wardround.sweeping",
    "sweep": "wardround.sweeping",
    "explain_run": "wardround.explaining",
    "export_model": "wardround.deploying",
    "predict": "wardround.predicting",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'wardround' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

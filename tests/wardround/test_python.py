"""The snippet of the README and of the design, in Python: `from wardround import Study, simulate`."""

from pathlib import Path

import pandas as pd
import pytest

from wardround import Run, Study, Task, simulate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    study = Study.load(ROOT / "studies" / "breast-cancer.toml").replace(privacy={"epsilon": 1.0}, rounds={"count": 2}, federation={"sites": 3})
    return simulate(study, out=tmp_path)


def test_a_run_has_history_metrics_privacy_and_report(run: Run) -> None:
    assert isinstance(run.history, pd.DataFrame)
    assert len(run.history) == 2 * 3
    assert {"round", "site", "status", "epsilon", "auroc"} <= set(run.history.columns)
    assert run.metrics["federated"]["auroc"] is not None
    assert all(0.99 <= site.epsilon <= 1.0 for site in run.privacy.sites.values())
    assert run.report().read_text().startswith("<!DOCTYPE html>")
    assert Run(run.path).study == run.study
    assert run.study.privacy.delta == 1e-4


def test_names_load_lazily_and_unknown_ones_are_refused() -> None:
    import wardround

    assert Task.__name__ == "Task"
    with pytest.raises(AttributeError, match="Nothing"):
        wardround.Nothing  # noqa: B018  # the access is the test

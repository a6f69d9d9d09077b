"""What the scripts here share: the same envelope as the command line's, and runs without a trace."""

import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from wardround import Run, Study, simulate  # noqa: E402  # the checkout beside this file is what is measured

SEEDS = (1, 2, 3, 4, 5)


def run_quietly(study: Study, *, data: Path | None = None, baselines: bool = False) -> Run:
    """The run of a study in a folder that the system clears away."""
    return simulate(study, data=data, out=tempfile.mkdtemp(prefix="wardround-benchmark-"), baselines=baselines)


def with_privacy(study: Study, epsilon: float | None) -> Study:
    """The study at this budget, or without privacy."""
    return study.replace(privacy={"unit": "none"} if epsilon is None else {"epsilon": epsilon})


def mean_and_range(values: list[float]) -> str:
    """`0.9876 (0.981 to 0.991)`."""
    return f"{statistics.fmean(values):.4f} ({min(values):.3f} to {max(values):.3f})"


def finish(data: dict[str, object], *, as_json: bool) -> None:
    """Print the envelope when asked for."""
    if as_json:
        print(json.dumps({"schema_version": 1, "status": "ok", "exit_code": 0, "data": data}))

"""The shipped heart-disease sweep: how long it takes, and whether it comes to the same bits where it was killed at a random moment.

python benchmarks/sweep.py --data DIR [--processes P] [--seed S] [--json]

`seconds` is of the whole command, from its start to its report (to keep: 180 on two cores). A second one is killed with SIGKILL after a share of that time
that `--seed` draws, and gone on with; its table must be the first one's, byte for byte.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import finish

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


def command(data: Path, out: Path, processes: int | None, *more: str) -> list[str]:
    """`wardround sweep heart-epsilon`."""
    study = str(ROOT / "studies" / "heart-epsilon.toml")
    chosen = [] if processes is None else ["--processes", str(processes)]
    return [sys.executable, "-m", "wardround", "sweep", study, "--out", str(out), *chosen, *more, *(["--data", str(data)] if not more else [])]


def run(arguments: list[str]) -> float:
    """Seconds that it took."""
    started = time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, **QUIET})
    return time.perf_counter() - started


def kill_after(arguments: list[str], seconds: float) -> None:
    """Start it, and kill it and all that it started."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, cwd=ROOT, env={**os.environ, **QUIET}, start_new_session=True)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Once whole, once killed and gone on with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        seconds = run(command(arguments.data, whole, arguments.processes))
        moment = random.Random(arguments.seed).uniform(0.15, 0.9) * seconds
        kill_after(command(arguments.data, broken, arguments.processes), moment)
        done = len(list(broken.glob("*/cells/*.json")))
        rest = run(command(arguments.data, broken, arguments.processes, "--resume"))
        [one], [other] = (list(path.glob("*/table.csv")) for path in (whole, broken))
        cells = len(one.read_text().splitlines()) - 1
        data = {
            "cells": cells, "seconds": seconds, "seconds_a_cell": seconds / cells, "seed": arguments.seed, "killed_after_seconds": moment,
            "cells_done_when_killed": done, "seconds_after_resuming": rest, "same_bits": one.read_bytes() == other.read_bytes(),
        }  # fmt: skip
    for name, value in data.items():
        print(f"{name:26} {value:.2f}" if isinstance(value, float) else f"{name:26} {value}", file=sys.stderr)
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()

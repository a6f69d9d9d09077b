"""A side of the benchmark as a process of its own: its environment, its memory, its end."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import ROOT
from workloads import TRAIN, WORKLOADS

from shared.models import initial_parameters

FOLDER = Path(__file__).resolve().parent
SAMPLE_SECONDS = 2.0  # a look at all pages of a process holds it up
REQUIREMENTS = {
    "flower": ["flwr[simulation]==1.41.0", "torch==2.13.0", "opacus==1.6.0"],
    "pfl": ["pfl[pytorch]==0.6.0", "torch==2.13.0"],
}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
QUIET = {  # no telemetry, and Ray and Gloo on the loopback interface alone: without a cluster Ray takes that address
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Who runs: a script of `sides/`, in which environment, and what it can do."""

    script: str
    environment: str | None = None  # None: this one
    privacy: tuple[bool, ...] = (False, True)
    workloads: tuple[str, ...] = ("tabular", "image", "sequence")
    torchrun: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run of a side took."""

    seconds: list[float]  # of each round
    first_round_seconds: float  # from the start of its process to the end of the first round
    accuracy: float
    memory_mb: float  # of all its processes, shared pages counted once, at the peak
    execution: str  # of ours: how its sites were trained


def python_of(environment: str | None, peers: Path | None) -> str:
    """The interpreter of an environment; one that is not there yet is made, by pip."""
    if environment is None:
        return sys.executable
    place = (peers or FOLDER / ".peers") / environment
    python, complete = place / "bin" / "python", place / "complete"
    if peers is None and not complete.exists():
        print(f"making {place}, once", file=sys.stderr)
        venv.create(place, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[environment]], check=True, stdout=sys.stderr)
        complete.touch()
    if not python.exists():
        raise SystemExit(
            f"{place}: expected an environment with {', '.join(REQUIREMENTS[environment])}, found none; leave --peers out, and it is made"
        )
    return str(python)


def write_setting(folder: Path, *, workload: str, private: bool, sites: int, rounds: int, processes: int, seed: int) -> None:
    """The files that every side reads."""
    kind = WORKLOADS[workload]
    inputs, labels = kind.arrays(sites, np.random.default_rng(seed))
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "labels.npy", labels)
    np.savez(folder / "initial.npz", **initial_parameters(kind.model(), seed))
    setting = {
        "workload": workload, "private": private, "sites": sites, "rounds": rounds, "train": TRAIN, "batch_size": 32,
        "learning_rate": kind.learning_rate, "noise_multiplier": 1.0, "max_grad_norm": 1.0, "processes": processes, "seed": seed,
    }  # fmt: skip
    (folder / "setting.json").write_text(json.dumps(setting))


def run_side(side: Side, folder: Path, python: str, processes: int) -> Result:
    """Run it to its end; nothing that it started is left.

    Raises:
        SystemExit: it failed; its log is in the message.
    """
    result = folder / f"{side.script}.json"
    result.unlink(missing_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if side.torchrun and processes > 1 else []
    command = [python, *launcher, str(FOLDER / "sides" / f"{side.script}.py"), str(folder)]
    log = folder / f"{side.script}.log"
    started = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env={**os.environ, **ONE_THREAD, **QUIET}, cwd=ROOT
        )
        with watching(process.pid) as memory:
            process.wait()
    if process.returncode or not result.exists():
        raise SystemExit(f"{side.script}: exit status {process.returncode}\n{log.read_text()[-3000:]}")
    values = json.loads(result.read_text())
    return Result(
        seconds=values["seconds"], first_round_seconds=values["first_round_at"] - started, accuracy=values["accuracy"], memory_mb=memory.peak / 1e6,
        execution=values.get("execution", ""),
    )  # fmt: skip


class Memory:
    """The peak of a process and its descendants, in bytes, and who they were."""

    def __init__(self, root: int) -> None:
        self.peak = 0
        self.seen: dict[int, str] = {}  # process -> when it started, so that a number given anew is not taken for it
        self._root = root

    def sample(self) -> None:
        """Look at all of them once."""
        family = descendants(self._root)
        self.seen.update(family)
        self.peak = max(self.peak, sum(proportional_bytes(pid) for pid in family))

    def end_all(self) -> None:
        """Kill those that outlived their side."""
        for pid, started in self.seen.items():
            if status_of(pid)[1:] == (started,):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)


@contextlib.contextmanager
def watching(root: int) -> Iterator[Memory]:
    """Sample the memory of this process and its descendants while the block runs; end what is left of them after it."""
    memory, done = Memory(root), threading.Event()

    def watch() -> None:
        memory.sample()
        while not done.wait(SAMPLE_SECONDS):
            memory.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.end_all()


def status_of(pid: int) -> tuple[int, str] | tuple[()]:
    """A process' parent and start, in ticks; nothing where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ()
    return int(fields[1]), fields[19]


def descendants(root: int) -> dict[int, str]:
    """The process and all below it, with their starts."""
    everyone = {int(entry): status for entry in os.listdir("/proc") if entry.isdigit() and (status := status_of(int(entry)))}
    family, added = {root} & everyone.keys(), {root} & everyone.keys()
    while added:
        added = {pid for pid, status in everyone.items() if status[0] in added} - family
        family |= added
    return {pid: everyone[pid][1] for pid in family}


def proportional_bytes(pid: int) -> int:
    """Its memory, a page that n processes share counted as 1/n (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))

"""Blocks on a real Ray cluster of two nodes, one of which is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.results import RoundRecord
from shared.study import Study
from simulations.simulate import RAY_ON_LOOPBACK
from simulations.sweeps.cell import CellResult
from simulations.sweeps.execution import run_sweep
from simulations.sweeps.folder import TABLE, SweepFolder
from simulations.sweeps.grid import Sweep
from tests.simulations.conftest import STUDY
from tests.simulations.test_secure_blocks import KINDS
from tests.simulations.test_secure_blocks import study_of as masked

ray = pytest.importorskip("ray", reason="Ray is an extra, and not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::ResourceWarning")]


class Cluster:
    """Ray nodes on loopback with one CPU each; whatever they start is in a group of its own and ends with them."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = str(free.getsockname()[1])
        self.address = f"127.0.0.1:{self._port}"
        self._folder = folder
        self._nodes: list[subprocess.Popen[bytes]] = []

    def start_node(self) -> None:
        first = ["--head", "--port", self._port, "--include-dashboard", "false", "--temp-dir", str(self._folder)]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus", "1", "--node-ip-address", "127.0.0.1"]
        with open(self._folder / f"node-{len(self._nodes)}.log", "wb") as log:
            command += ["--address", self.address] if self._nodes else first
            environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
            self._nodes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment))
        self._wait_for(len(self._nodes))

    def _wait_for(self, num_nodes: int) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
                if len([node for node in ray.nodes() if node["Alive"]]) == num_nodes:
                    return
            except (ConnectionError, RuntimeError):
                time.sleep(0.5)
            finally:
                ray.shutdown()
        pytest.fail(f"{num_nodes} nodes did not come up: {[path.read_text()[-500:] for path in self._folder.glob('*.log')]}")

    def kill(self, number: int) -> None:
        os.killpg(self._nodes[number].pid, signal.SIGKILL)
        self._nodes[number].wait()

    def close(self) -> None:
        for number, node in enumerate(self._nodes):
            if node.poll() is None:
                self.kill(number)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # a socket's path must be short
        made = Cluster(Path(folder))
        try:
            made.start_node()
            made.start_node()
            yield made
        finally:
            made.close()


def test_a_node_that_is_killed_costs_no_round_and_no_bit(runner, cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    study = runner.study(federation={"sites": 8, "partition": "quantity", "alpha": 2.0}, rounds={"count": 4})
    here = runner.run(study, execution="blocks")

    def watch(record: RoundRecord) -> None:
        if record.round == 2:
            cluster.kill(1)

    there = runner.run(study, engine="ray", ray_address=cluster.address, execution="blocks", observe=watch)
    assert there.result.engine == "ray" and there.result.rounds_completed == 4
    assert there.model() == here.model()
    assert "a worker on the Ray cluster died" in (there.folder.path / "log.jsonl").read_text()
    assert {site["status"] for line in there.lines for site in line["sites"]} == {"ok"}


def test_sites_that_mask_their_updates_are_trained_there_to_the_same_bits(runner, cluster: Cluster) -> None:
    for kind in ("private", "distributed", "whole sites"):
        study = masked(runner, **KINDS[kind])
        here, there = runner.run(study, execution="blocks"), runner.run(study, engine="ray", ray_address=cluster.address, execution="blocks")
        assert there.result.engine == "ray" and there.model() == here.model() and there.result.privacy == here.result.privacy


def test_a_cluster_that_is_not_there_is_named(runner) -> None:
    with pytest.raises(ConfigurationError, match="--ray-address: expected a Ray cluster at '127.0.0.1:1'"):
        runner.run(runner.study(), engine="ray", ray_address="127.0.0.1:1")


def test_a_sweep_on_a_cluster_has_the_table_of_one_here(tmp_path: Path, cluster: Cluster) -> None:
    """A node is killed while cells run on it; they run again on the other."""
    sweep = Sweep.model_validate({"name": "tried", "study": STUDY, "baselines": False, "grid": {"seed": [1, 2, 3, 4], "epsilon": [2, "none"]}})
    here, there = (SweepFolder.create(tmp_path / name, sweep, Study.from_table(STUDY), None) for name in ("here", "there"))
    run_sweep(here, processes=1)
    killed: list[int] = []

    def kill_one(result: CellResult) -> None:
        if not killed:
            killed.append(result.number)
            cluster.kill(1)

    run_sweep(there, engine="ray", ray_address=cluster.address, observe=kill_one)
    assert (there.path / TABLE).read_bytes() == (here.path / TABLE).read_bytes()


LISTENING = """
import os, sys
from pathlib import Path

def parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0

def ours(pid):
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = parent(pid)
    return False

def sockets(pid):
    try:
        return {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()

def look(result):
    held = set().union(*(sockets(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit() and ours(int(path.name))))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in held]
    print(len(listening), [address for address in listening if set(address) <= {"0"}])

from shared.study import Study
from simulations.sweeps.execution import run_sweep
from simulations.sweeps.folder import SweepFolder
run_sweep(SweepFolder(Path(sys.argv[1])), engine="ray", processes=1, observe=look)
"""


def test_a_ray_that_is_started_here_listens_on_loopback_alone(tmp_path: Path) -> None:
    """It is asked nothing by whoever connects. In a process of its own: Ray reads the setting when it is imported."""
    sweep = Sweep.model_validate({"name": "tried", "study": STUDY, "baselines": False, "grid": {"seed": [1]}})
    folder = SweepFolder.create(tmp_path, sweep, Study.from_table(STUDY), None)
    environment = {key: value for key, value in os.environ.items() if key != RAY_ON_LOOPBACK[0]} | {"RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, str(folder.path)], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    count, _, elsewhere = done.stdout.strip().splitlines()[-1].partition(" ")
    assert int(count) > 2 and elsewhere == "[]"

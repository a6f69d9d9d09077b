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


def test_a_cluster_that_is_not_there_is_named(runner) -> None:
    with pytest.raises(ConfigurationError, match="--ray-address: expected a Ray cluster at '127.0.0.1:1'"):
        runner.run(runner.study(), engine="ray", ray_address="127.0.0.1:1")

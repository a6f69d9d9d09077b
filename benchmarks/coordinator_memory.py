"""Memory of the coordinator's processes in a round of many sites and a large model.

python benchmarks/coordinator_memory.py [--sites 64] [--parameters 10000000] [--json]

The coordinator is the real one: SuperLink, front door, ServerApp. The sites are one process that answers for all of them, with their keys, with
an update of its own for each: what they cost is not measured. Peak resident memory (VmHWM) of the ServerApp's process, beside the goal of four
models plus 600 MB, and of the SuperLink's.
"""

import argparse
import contextlib
import ssl
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from deployment import free_ports, running, until
from flwr.app import Message
from measuring import Study, finish

from client.fleet import Fleet, Received
from server.control import SubmitRequest, ask_coordinator
from server.federation_file import FederationFile
from server.provisioning import open_consortium, provision
from server.submissions import Submissions
from shared.certificates import load_node_key
from shared.kit import CA_CERTIFICATE, NODE_KEY, SIGNING_KEY, load_signing_key, read_manifest
from shared.messages import Enrolled, EnrolTask, Evaluated, EvaluateTask, Trained, TrainTask, decode, encode, from_array_record
from shared.seals import open_task, seal_reply
from shared.task import resolve_task

TASK = 'name = "wide"\n[label]\nname = "ill"\ntype = "binary"\n[[columns]]\nname = "age"\ntype = "number"\nlow = 0\nhigh = 120\n[model]\nhidden = [{0}, {0}]\n'
MEGABYTE = 1_000_000


class Sites:
    """Answers for every site of the federation in `kits`."""

    def __init__(self, kits: Path, names: list[str]) -> None:
        self._kits = kits
        self._names = names
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._answer_all, daemon=True)

    def start(self) -> None:
        """In a thread of its own."""
        self._thread.start()

    def close(self) -> None:
        """All go offline."""
        self._stop.set()
        self._thread.join(timeout=60)

    def _answer_all(self) -> None:
        with contextlib.ExitStack() as online:
            fleets = {}
            for name in self._names:
                kit = self._kits / "sites" / name
                manifest = read_manifest(kit)
                trust = ssl.create_default_context(cafile=str(kit / CA_CERTIFICATE))
                fleet = Fleet(f"localhost:{manifest.coordinator.port}", trust, load_node_key(kit / NODE_KEY), stop=self._stop)
                online.enter_context(fleet.active())
                fleets[name] = fleet
            while not self._stop.is_set():
                idle = True
                for name, fleet in fleets.items():
                    received = fleet.receive()
                    if received is not None:
                        idle = False
                        self._answer(name, fleet, received)
                if idle:
                    self._stop.wait(1.0)

    def _answer(self, name: str, fleet: Fleet, received: Received) -> None:
        kit = self._kits / "sites" / name
        coordinator = Ed25519PublicKey.from_public_bytes(bytes.fromhex(read_manifest(kit).coordinator.signing_key))
        record, task = open_task(received.message.content, site=name, coordinator=coordinator)
        asked = decode(record, EnrolTask, TrainTask, EvaluateTask)
        match asked:
            case EnrolTask():
                content = encode(Enrolled(name=name, declared_size=100, declared_num_patients=150, declared_num_test=50))
            case TrainTask():
                factor = np.float32(1e-4 * (1 + self._names.index(name)))  # another update for each, or the SuperLink would keep one
                update = {key: np.asarray(value * factor, dtype=value.dtype) for key, value in from_array_record(record["parameters"]).items()}  # type: ignore[arg-type]
                trained = Trained(name=name, run=asked.run, study_hash=asked.study_hash, round=asked.round, fold=asked.fold, privacy=None)
                content = encode(trained, parameters=update)
            case _:
                assert isinstance(asked, EvaluateTask)
                content = encode(Evaluated(name=name, run=asked.run, study_hash=asked.study_hash, round=asked.round, fold=asked.fold, privacy=None))
        reply = seal_reply(content, task, signer=load_signing_key(kit / SIGNING_KEY))
        fleet.send(Message(reply, reply_to=received.message), 0.0)


def peak_megabytes(part: str) -> float:
    """The largest VmHWM of a process with `part` in its command line."""
    peaks = [0.0]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, StopIteration):
            if part in (path / "cmdline").read_text():
                line = next(line for line in (path / "status").read_text().splitlines() if line.startswith("VmHWM"))
                peaks.append(int(line.split()[1]) * 1024 / MEGABYTE)
    return max(peaks)


def main() -> None:
    """Provision, run one round, print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=64)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wardround-memory-") as folder:
        finish(measure(Path(folder), arguments.sites, arguments.parameters), as_json=arguments.json)


def measure(root: Path, num_sites: int, num_parameters: int) -> dict[str, object]:
    """Peaks in one round, in MB."""
    (root / "wide.toml").write_text(TASK.format(int(num_parameters**0.5)))
    task = resolve_task(str(root / "wide.toml"))
    model_bytes = sum(value.nbytes for value in (parameter.detach().numpy() for parameter in task.model().state_dict().values()))
    port, page_port = free_ports()
    names = [f"site-{index:02}" for index in range(num_sites)]
    table = {"hosts": ["localhost"], "listen": "127.0.0.1", "port": port, "page_port": page_port}
    file = FederationFile.model_validate({"name": "memory", "sites": names, "coordinator": table})
    with open_consortium(file, root / "kits", passphrase="a passphrase for this benchmark") as consortium:
        provision(consortium, with_keys=True)
    study = Study.from_table(
        {"name": "memory", "task": str(root / "wide.toml"), "privacy": {"unit": "none"}, "rounds": {"count": 1, "deadline": "30m"},
         "evaluation": {"bootstrap": 0}}
    )  # fmt: skip
    coordinator, sites = root / "kits" / "coordinator", Sites(root / "kits", names)
    with running("coordinator", "start", coordinator, log=root / "coordinator.log"):
        until(lambda: "ready" in (root / "coordinator.log").read_text(), "the coordinator is ready")
        sites.start()
        run = ask_coordinator(coordinator / "state", "/studies", SubmitRequest(study=study.to_table(), token="memory-benchmark"))
        submissions, peaks, started = Submissions(coordinator / "runs"), {"flwr-serverapp": 0.0, "server.superlink_process": 0.0}, time.monotonic()
        while submissions.get(run).state not in ("completed", "failed") and time.monotonic() - started < 1800:
            peaks = {part: max(peak, peak_megabytes(part)) for part, peak in peaks.items()}
            time.sleep(0.2)
        state = submissions.get(run)
        sites.close()
    if state.state != "completed":
        sys.exit(f"the study ended as {state}")
    goal = 4 * model_bytes / MEGABYTE + 600
    print(
        f"{num_sites} sites x {model_bytes / 4:,.0f} parameters, one round and its evaluation in {time.monotonic() - started:.0f} s", file=sys.stderr
    )
    print(f"ServerApp's process {peaks['flwr-serverapp']:8.0f} MB  to reach: under {goal:.0f} MB (4 models + 600 MB)", file=sys.stderr)
    print(f"SuperLink           {peaks['server.superlink_process']:8.0f} MB", file=sys.stderr)
    return {"serverapp_megabytes": peaks["flwr-serverapp"], "goal_megabytes": goal, "superlink_megabytes": peaks["server.superlink_process"]}


if __name__ == "__main__":
    main()

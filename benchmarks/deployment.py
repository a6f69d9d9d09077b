"""From nothing to the downloaded model: four hospitals on loopback, over TLS, by the command line that people use.

python benchmarks/deployment.py --data DIR --out DIR [--json]

DIR holds processed.<hospital>.data of heart disease. Ten rounds of the shipped study at epsilon 3; then, in a federation of its own, six rounds of
a model of 100,000 parameters on four columns of the same patients, to see what a round costs beyond training with a larger message; then a minute in which nobody has anything to do.
`accuracy` is over the hospitals' own test patients, who are drawn by each hospital's secret key: it differs from one federation to the next.
"""

import argparse
import csv
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from measuring import ROOT, Study, finish

SITES = {"cleveland": ("cleveland", 199, 104), "hungary": ("hungarian", 172, 89), "switzerland": ("switzerland", 30, 16), "va": ("va", 85, 45)}
PASSPHRASE = "a passphrase for this benchmark"
COMMAND = (sys.executable, "-m", "wardround")
LARGE_ROUNDS = 6
IDLE_SECONDS = 30.0
FILE_COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num")
RANGES = {"age": (0, 120), "trestbps": (0, 260), "thalach": (40, 230), "oldpeak": (-5, 10)}


def wardround(*arguments: object) -> dict[str, object]:
    """The data of a command's envelope."""
    done = subprocess.run([*COMMAND, *map(str, arguments), "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"wardround {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stderr}")
    lines = done.stdout.strip().splitlines()
    return dict(json.loads(lines[-1])["data"]) if lines and "data" in json.loads(lines[-1]) else {}


@contextmanager
def running(*arguments: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs until the block ends."""
    with open(log, "wb") as file:
        process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def until(look: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Return once `look` says so."""
    deadline = time.monotonic() + seconds
    while not look():
        if time.monotonic() > deadline:
            sys.exit(f"waited {seconds} s in vain until {what}")
        time.sleep(0.1)


def free_ports() -> tuple[int, int]:
    """Two free ports of loopback."""
    with ExitStack() as held:
        probes = [held.enter_context(closing(socket.socket())) for _ in range(2)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        first, second = (int(probe.getsockname()[1]) for probe in probes)
    return first, second


def write_large_task(data: Path, out: Path) -> Path:
    """A task of 100,000 parameters as a schema, and every hospital's patients as a table for it beside it; the schema's file."""
    out.mkdir(parents=True, exist_ok=True)
    for name, (file, *_) in SITES.items():
        with open(data / f"processed.{file}.data", newline="") as source, open(out / f"{name}.csv", "w", newline="") as target:
            writer = csv.writer(target)
            writer.writerow([*RANGES, "ill"])
            for values in csv.reader(source):
                row = dict(zip(FILE_COLUMNS, values, strict=True))
                writer.writerow([*(row[column] for column in RANGES), int(float(row["num"]) > 0)])
    columns = "".join(f'[[columns]]\nname = "{name}"\ntype = "number"\nlow = {low}\nhigh = {high}\n' for name, (low, high) in RANGES.items())
    path = out / "heart-disease-large.toml"
    path.write_text(f'name = "heart-disease-large"\n[label]\nname = "ill"\ntype = "binary"\n{columns}[model]\nhidden = [310, 316]\n')
    return path


def provision(out: Path, *, task: str, cohorts: dict[str, Path]) -> Path:
    """Kits for everybody, taken up by the sites and approved by the coordinator; the folder of the kits."""
    port, page_port = free_ports()
    out.mkdir(parents=True, exist_ok=True)
    (out / "passphrase").touch(mode=0o600)
    (out / "passphrase").write_text(PASSPHRASE)
    names = ", ".join(f'"{name}"' for name in SITES)
    table = f'hosts = ["localhost", "127.0.0.1"]\nlisten = "127.0.0.1"\nport = {port}\npage_port = {page_port}\n'
    (out / "federation.toml").write_text(f'name = "heart"\nsites = [{names}]\n[coordinator]\n{table}')
    kits = out / "kits"
    shared = ("provision", out / "federation.toml", "--out", kits, "--passphrase-file", out / "passphrase")
    wardround(*shared)
    for name, (_, size, test_size) in SITES.items():
        kit = kits / "sites" / name
        wardround("site", "init", kit, "--data", cohorts[name], "--task", task, "--declared-size", size,
                  "--declared-test-size", test_size, "--epsilon", 20)  # fmt: skip
        site = (kit / "site.toml").read_text()
        site = site.replace("exact_metrics = false", "exact_metrics = true").replace("min_metric_patients = 20", "min_metric_patients = 10")
        (kit / "site.toml").write_text(site)
    wardround(*shared, *(item for name in SITES for item in ("--approve", kits / "sites" / name / "request.json")))
    return kits


@contextmanager
def federation(kits: Path, out: Path) -> Iterator[int]:
    """The coordinator and its sites, from when the coordinator is ready, whose process id it gives; the sites connect meanwhile."""
    with ExitStack() as processes:
        coordinator = processes.enter_context(running("coordinator", "start", kits / "coordinator", log=out / "coordinator.log"))
        until(lambda: "ready" in (out / "coordinator.log").read_text(), "the coordinator is ready")
        for name in SITES:
            processes.enter_context(running("site", "start", kits / "sites" / name, log=out / f"{name}.log"))
        yield coordinator.pid


def run_study(kits: Path, study: Study, out: Path) -> dict[str, object]:
    """Approved at every site, submitted, watched to its end, downloaded: its result."""
    path = out / f"{study.name}.toml"
    path.write_text(study.to_toml())
    for name in SITES:
        wardround("site", "approve", kits / "sites" / name, path, "--yes", "--by", "benchmark")
    run = str(wardround("study", "submit", path, "--coordinator", kits / "coordinator")["run"])
    watched = subprocess.run([*COMMAND, "study", "watch", run, "--coordinator", str(kits / "coordinator")], stdout=sys.stderr, check=False)
    if watched.returncode:
        sys.exit(f"{run}: exit {watched.returncode}")
    wardround("study", "download", run, "--coordinator", kits / "coordinator", "--out", out / study.name)
    return dict(json.loads((out / study.name / "result.json").read_bytes()))


def beyond_training(kits: Path, result: dict[str, object]) -> list[float]:
    """Seconds of each round beyond the slowest site's own work on it, as the sites' audit logs say."""
    timing = result["timing"]
    assert isinstance(timing, dict)
    slowest: dict[int, float] = {}
    for name in SITES:
        begun: dict[int, datetime] = {}
        for line in (kits / "sites" / name / "state" / "audit.jsonl").read_text().splitlines():
            row = json.loads(line)
            number = row["details"].get("round")
            if row["details"].get("run") != result["run"] or row["details"].get("kind") not in ("train", "trained"):
                continue
            moment = datetime.fromisoformat(row["time"])
            if row["event"] == "task received":
                begun[number] = moment
            elif number in begun:
                slowest[number] = max(slowest.get(number, 0.0), (moment - begun[number]).total_seconds())
    return [seconds - slowest[number] for number, seconds in enumerate(timing["seconds_per_round"], start=1)]


def cpu_seconds(pid: int) -> float:
    """Of a process and all below it, so far."""
    fields: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            fields[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
    children = [child for child, found in fields.items() if int(found[1]) == pid]
    own = fields.get(pid, ["0"] * 13)
    return (int(own[11]) + int(own[12])) / os.sysconf("SC_CLK_TCK") + sum(map(cpu_seconds, children))


def cores_while_waiting(pid: int) -> float:
    """How much of a core a process and all below it take, while sites have waited for a while."""
    time.sleep(IDLE_SECONDS)
    before = cpu_seconds(pid)
    time.sleep(IDLE_SECONDS)
    return (cpu_seconds(pid) - before) / IDLE_SECONDS


def main() -> None:
    """Run it all and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    out, source = arguments.out.resolve(), arguments.data.resolve()
    study = Study.load(ROOT / "studies" / "heart-disease.toml").replace(
        rounds={"count": 10, "require": len(SITES)}, privacy={"noise_source": "os"}, federation={"sites": 1, "partition": "iid"}
    )
    started = time.monotonic()
    kits = provision(out, task=study.task, cohorts={name: source / f"processed.{file}.data" for name, (file, *_) in SITES.items()})
    provisioned = time.monotonic()
    with federation(kits, out):
        ready = time.monotonic()
        result = run_study(kits, study, out)
        ended = time.monotonic()
    timing, metrics = result["timing"], result["metrics"]
    assert isinstance(timing, dict) and isinstance(metrics, dict)
    data: dict[str, object] = {
        "total_seconds": ended - started,
        "accuracy": metrics["federated"]["accuracy"],
        "seconds_per_round": statistics.median(timing["seconds_per_round"]),
        "provision_seconds": provisioned - started,
        "coordinator_ready_seconds": ready - provisioned,
        "seconds_beyond_training": statistics.median(beyond_training(kits, result)),
    }
    task = write_large_task(source, out / "large")
    kits = provision(out / "large", task=str(task), cohorts={name: task.parent / f"{name}.csv" for name in SITES})
    with federation(kits, out / "large") as coordinator:
        large = run_study(kits, study.replace(name="large", task=str(task), rounds={"count": LARGE_ROUNDS}), out / "large")
        data["coordinator_cores_while_waiting"] = cores_while_waiting(coordinator)
    data["large_seconds_beyond_training"] = statistics.median(beyond_training(kits, large))
    targets = {"total_seconds": 120, "coordinator_ready_seconds": 8, "seconds_beyond_training": 4, "large_seconds_beyond_training": 4}
    for name, value in data.items():
        print(f"{name:32} {value:8.3f}" + (f"  to reach: under {targets[name]}" if name in targets else ""), file=sys.stderr)
    finish(data, as_json=arguments.json)


if __name__ == "__main__":
    main()

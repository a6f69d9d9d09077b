"""The ledger in milliseconds: a reservation and a commit (durable, signed), opening a long ledger, beside what they are compared to.

python benchmarks/ledger.py [--json]
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from measuring import finish

from client.account import Event, Reserve
from client.ledger import Ledger, PlannedStudy
from shared.plan import Limit
from shared.privacy import PrivacyEvent

ROUNDS = 300
MILLISECONDS_TO_KEEP = 5.0


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="wardround-benchmark-"))
    data: dict[str, object] = {"rounds": ROUNDS, "reserve_ms_to_keep": MILLISECONDS_TO_KEEP}
    for name, signer in (("hospital", Ed25519PrivateKey.generate()), ("simulation", None)):
        data[name] = _measure(folder / f"{name}.sqlite", signer)
    data["append_and_fsync_ms"] = _median_ms(_appender(folder / "plain"), ROUNDS)
    _print(data)
    finish(data, as_json=options.json)
    return 0


def _measure(path: Path, signer: Ed25519PrivateKey | None) -> dict[str, float]:
    step = PrivacyEvent(noise_multiplier=200.0, sample_rate=0.1, steps=10)
    limit = Limit(epsilon=5.0, delta=1e-5) if signer is not None else None
    ledger = Ledger(path, cohort="c", unit="patient", limit=limit, signer=signer)
    whole = PrivacyEvent(noise_multiplier=200.0, sample_rate=0.1, steps=10 * ROUNDS)
    ledger.admit(PlannedStudy(run="r", study="s", study_hash="0" * 64, training=whole))
    reserves, commits = [], []
    for number in range(ROUNDS):
        entry = Reserve(run="r", account="training", fold=1, round=number + 1, request=f"{number:064x}", event=Event.of(step))
        begun = time.perf_counter()
        row = ledger.reserve(entry, again=True)
        reserves.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        ledger.commit(row, steps=10, update="a" * 64)
        commits.append(time.perf_counter() - begun)
    rows = ledger.num_rows
    ledger.close()
    begun = time.perf_counter()
    Ledger(path, cohort="c", unit="patient", limit=limit, signer=signer).close()
    opened = time.perf_counter() - begun
    return {
        "reserve_ms": 1000 * statistics.median(reserves),
        "reserve_ms_95th": 1000 * statistics.quantiles(reserves, n=20)[-1],
        "commit_ms": 1000 * statistics.median(commits),
        "open_ms": 1000 * opened,
        "rows": float(rows),
    }


def _appender(path: Path) -> Callable[[], object]:
    file = open(path, "ab", buffering=0)  # noqa: SIM115  # open while it is measured

    def append() -> None:
        file.write(b"x" * 400)
        os.fsync(file.fileno())

    return append


def _median_ms(act: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return 1000 * statistics.median(taken)


def _print(data: dict[str, object]) -> None:
    out = sys.stdout if "--json" not in sys.argv else sys.stderr
    for name in ("hospital", "simulation"):
        item = data[name]
        assert isinstance(item, dict)
        print(
            f"{name:10s} reserve {item['reserve_ms']:.2f} ms (95 %: {item['reserve_ms_95th']:.2f}), commit {item['commit_ms']:.2f} ms, "
            f"open and verify {item['rows']:.0f} rows {item['open_ms']:.0f} ms",
            file=out,
        )
    print(
        f"for comparison: append 400 bytes and fsync {data['append_and_fsync_ms']:.2f} ms; to keep: a reservation within {MILLISECONDS_TO_KEEP:g} ms",
        file=out,
    )


if __name__ == "__main__":
    sys.exit(main())

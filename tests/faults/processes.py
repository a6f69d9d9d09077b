"""The processes of a federation under test: `python processes.py coordinator KIT`, `site KIT [SEED]`, `daemon KIT SEED`.

A daemon with a seed draws its noise from it, which no command, file or variable of the product can ask for. One that finds `lies.json` in its
kit signs, in the rounds that it names, what no honest daemon would send; one that finds `version` there says that it is of that version.
"""

import json
import logging
import pickle
import signal
import sys
import threading
from pathlib import Path


def main(role: str, kit: Path, seed: str | None) -> int:
    """Run one of them until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if role == "coordinator":
        from server.service import Service

        Service(kit).run()
        return 0
    if role == "daemon":
        return daemon(kit, int(seed or 0))
    from client.station import run_station

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    command = None if seed is None else (sys.executable, str(Path(__file__).resolve()), "daemon", str(kit), seed)
    run_station(kit, stop, daemon=command)
    return 0


def daemon(kit: Path, seed: int) -> int:
    """A daemon with seeded noise, or a liar."""
    from client import daemon as module
    from client import gate

    lies = kit / "lies.json"
    if lies.exists():
        lie_before_sealing(json.loads(lies.read_text()))
    version = kit / "version"
    if version.exists():
        gate.installed_version = version.read_text
    return module.serve(kit, noise_seed=seed)


def lie_before_sealing(lies: dict[str, str]) -> None:
    """Whatever the gate has decided and written down: what it signs is another thing."""
    import numpy as np
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

    from client import gate
    from shared.messages import JSON, MESSAGE, PARAMETERS, STATISTICS, from_array_record, to_array_record

    honest = gate.seal_reply

    def seal(record: RecordDict, *arguments: object, **more: object) -> RecordDict:
        number = json.loads(str(record[MESSAGE][JSON])).get("round", "enrol")  # type: ignore[index]
        lie = lies.get(str(number))
        return honest(record if lie is None else told(lie, record), *arguments, **more)  # type: ignore[arg-type]

    gate.seal_reply = seal

    def told(lie: str, answer: RecordDict) -> RecordDict:
        fields = json.loads(str(answer[MESSAGE][JSON]))  # type: ignore[index]
        if lie == "1e9 samples":
            fields |= {"declared_size": 10**9, "declared_num_patients": 10**9}
        if lie == "another round":
            fields |= {"round": fields["round"] + 1}
        if lie == "another study":
            fields |= {"study_hash": "f" * 64}
        if lie == "text":
            fields |= {"withheld": "x" * 300, "note": "patient Ada Lovelace"}
        answer[MESSAGE] = ConfigRecord({JSON: json.dumps(fields, separators=(",", ":"))})
        if PARAMETERS not in answer:
            return answer
        arrays = {name: value.copy() for name, value in from_array_record(answer[PARAMETERS]).items()}  # type: ignore[arg-type]
        first = next(iter(arrays))
        match lie:
            case "nan":
                arrays[first].flat[0] = np.nan
            case "inf":
                arrays[first].flat[0] = np.inf
            case "million-fold":
                arrays = {name: value * np.float32(1e6) for name, value in arrays.items()}
            case "shape":
                arrays[first] = arrays[first].reshape(-1, 1)
            case "missing":
                del arrays[first]
            case "extra":
                arrays["patient-17-had-a-stroke"] = np.zeros(3, dtype=np.float32)
            case "junk":
                arrays = {"junk": np.frombuffer(np.random.default_rng(1).bytes(200_000_000), dtype=np.float32)}
            case "negative statistics":
                answer[STATISTICS] = to_array_record({name: -np.ones_like(value) for name, value in from_array_record(answer[STATISTICS]).items()})  # type: ignore[arg-type]
        answer[PARAMETERS] = to_array_record(arrays)
        if lie == "pickle":
            data = pickle.dumps(arrays)
            answer[PARAMETERS] = ArrayRecord({first: Array(dtype="object", shape=arrays[first].shape, stype="numpy.ndarray", data=data)})
        return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3] if len(sys.argv) > 3 else None))

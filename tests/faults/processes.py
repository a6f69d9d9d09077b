"""The processes of a federation under test: `python processes.py coordinator KIT`, `site KIT [SEED]`, `daemon KIT SEED`.

A daemon with a seed draws its noise from it, which no command, file or variable of the product can ask for.
"""

import logging
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
        from client.daemon import serve

        return serve(kit, noise_seed=int(seed or 0))
    from client.station import run_station

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    daemon = None if seed is None else (sys.executable, str(Path(__file__).resolve()), "daemon", str(kit), seed)
    run_station(kit, stop, daemon=daemon)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3] if len(sys.argv) > 3 else None))

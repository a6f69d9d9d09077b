"""`python -m client.daemon KIT`: the hospital's own process, warm, and the only one that touches patients."""

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from client.confinement import guard_memory
from client.door import SOCKET, Door, door_folder
from client.gate import Gate
from client.hospital import Hospital
from shared.errors import WardroundError
from shared.files import storage_errors

logger = logging.getLogger(__name__)


def serve(kit: Path, *, noise_seed: int | None = None) -> int:
    """Answer the coordinator's questions until told to stop; the exit code comes back.

    Args:
        noise_seed: for tests alone, see `SiteSettings`.
    """
    torch.set_num_threads(1)  # sums of floats depend on their number
    guard_memory()
    try:
        hospital = Hospital.open(kit)
        door = door_folder(hospital.state) / SOCKET
        with storage_errors(door.parent, "make", remedy="check the permissions of the state folder"):
            hospital.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            door.parent.mkdir(mode=0o711, exist_ok=True)
        gate = Gate(hospital, noise_seed=noise_seed)
        server = Door(door, gate.answer)
    except WardroundError as error:
        logger.error("error %s: %s", error.code, error)
        return error.exit_code
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, name="door", daemon=True).start()
    logger.info("site %s listens", hospital.name)
    stop.wait()
    server.shutdown()
    server.server_close()
    gate.close()
    return 0


def main() -> None:
    """Run the daemon of the kit named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True)
    os.umask(0o077)
    sys.exit(serve(Path(sys.argv[1]).resolve()))


if __name__ == "__main__":
    main()

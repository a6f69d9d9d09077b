"""A process that runs cells: `python -m simulations.sweeps.worker FOLDER SCRATCH JOBS REPLIES`. A cell's number comes on one pipe, and leaves on the other when it is done."""

import os
import select
import shutil
import signal
import sys
import threading
from pathlib import Path

from simulations.sweeps.cell import run_cell
from simulations.sweeps.folder import SweepFolder

READY = b"ready\n"


def main() -> None:
    """Run the cells that are asked for, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep decides when it ends
    scratch, jobs = Path(sys.argv[2]), int(sys.argv[3])
    threading.Thread(target=_end_with_the_sweep, args=(jobs, scratch), daemon=True).start()
    folder = SweepFolder(Path(sys.argv[1]))
    cells = {cell.number: cell for cell in folder.cells}
    with open(jobs, "rb") as asked, open(int(sys.argv[4]), "wb", buffering=0) as answers:
        answers.write(READY)
        for line in iter(asked.readline, b""):
            cell = cells[int(line)]
            folder.write(run_cell(cell, folder.data_of(cell), baselines=folder.sweep.baselines, scratch=scratch))
            answers.write(line)


def _end_with_the_sweep(jobs: int, scratch: Path) -> None:
    """End this process as soon as nobody holds the other end of its pipe of jobs: a cell may take hours."""
    poll = select.poll()
    poll.register(jobs, 0)  # whatever is asked for, a hang-up is told
    poll.poll()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    main()

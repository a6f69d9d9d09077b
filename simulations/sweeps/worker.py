"""A process that runs cells: `python -m simulations.sweeps.worker FOLDER JOBS REPLIES`. A cell's number comes on one pipe, and leaves on the other when it is done."""

import signal
import sys
from pathlib import Path

from simulations.sweeps.cell import run_cell
from simulations.sweeps.folder import SweepFolder


def main() -> None:
    """Run the cells that are asked for, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the sweep decides when it ends
    folder = SweepFolder(Path(sys.argv[1]))
    data, cells = folder.data, {cell.number: cell for cell in folder.cells}
    with open(int(sys.argv[2]), "rb") as asked, open(int(sys.argv[3]), "wb", buffering=0) as answers:
        for line in iter(asked.readline, b""):
            folder.write(run_cell(cells[int(line)], data, baselines=folder.sweep.baselines, scratch=folder.scratch))
            answers.write(line)


if __name__ == "__main__":
    main()

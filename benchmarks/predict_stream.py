"""The memory that `wardround predict` takes, by the rows of the table: each in a process of its own, by its highest resident set.

The rows are synthetic patients of heart-disease; the model is untrained, which costs what a trained one does. Beside it, the same table as one frame of
text, as a reader that holds it whole would have it.

python benchmarks/predict_stream.py [--rows 10000,100000,1000000] [--json]
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

from measuring import finish

from shared.task import resolve_task

TASK = "heart-disease"


def write_table(path: Path, num_rows: int) -> None:
    """A CSV with so many synthetic patients, without a label."""
    from shared.schema import TableSchema

    schema = resolve_task(TASK).schema
    assert isinstance(schema, TableSchema)
    usual = [
        f"{(column.low + column.high) / 2:.4g}" if column.low is not None and column.high is not None else column.values[-1]
        for column in schema.columns
    ]
    with path.open("w") as file:
        file.write(",".join(column.name for column in schema.columns) + "\n")
        line = ",".join(usual) + "\n"
        for _ in range(num_rows // 1000):
            file.write(line * 1000)


def peak_of(what: str, table: Path) -> tuple[float, float]:
    """Megabytes and seconds, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (what, table))


def _measure(what: str, table: Path) -> tuple[float, float]:
    started = time.perf_counter()
    if what == "frame":
        from shared.tasks.tabular import read_csv

        read_csv(table)
    else:
        from client.data_check import DataSource
        from wardround.deploying import torch_session
        from wardround.predicting import Predictor, open_patients, write_rows

        task = resolve_task(TASK)
        patients = open_patients(task, DataSource.of(table, {}))
        predictor = Predictor(task=task, session=torch_session(task, task.model().eval()), patients=patients, columns=("disease",), labels_read=False)
        with table.with_suffix(".out").open("w") as file:
            write_rows(predictor, file)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000", help="of the tables, in thousands each")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    measured: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for num_rows in map(int, given.rows.split(",")):
            table = folder / f"{num_rows}.csv"
            write_table(table, num_rows)
            for what in ("predict", "frame"):
                megabytes, seconds = peak_of(what, table)
                measured |= {f"{what}_{num_rows}_mb": megabytes, f"{what}_{num_rows}_s": seconds}
                print(
                    f"{what:8} {num_rows:>9,} rows, {table.stat().st_size / 1e6:6.1f} MB: {megabytes:6.0f} MB at most, {seconds:5.1f} s", flush=True
                )
    finish(measured, as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

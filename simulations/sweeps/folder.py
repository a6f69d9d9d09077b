"""A sweep's folder, `<sweep>-<utc time>-<4 hex>`: sweep.toml as it began, a file for each finished cell, and the table of all of them.

A cell's file appears whole or not at all, so a sweep that was killed goes on with the cells that have none, and its table is the same to the bit.
"""

import contextlib
import csv
import functools
import hashlib
import io
import secrets
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from shared.config import read_toml, validate
from shared.errors import ConfigurationError, ModelMismatchError, StorageError
from shared.files import json_text, storage_errors, write_atomic
from shared.results import Record, SitePrivacy
from shared.study import Study
from shared.study_tables import toml_text
from shared.task import resolve_task
from simulations.site_files import site_files
from simulations.sweeps.cell import CellResult
from simulations.sweeps.grid import Cell, Sweep, cells_of

SWEEP, START, CELLS, TABLE = "sweep.toml", "sweep.json", "cells", "table.csv"


class SweepStart(Record):
    """sweep.json: what the sweep began with, so that it goes on with the same."""

    sweep_sha256: str  # of sweep.toml: results of another grid or study must not pass for its own
    data: str | None
    data_sha256: str | None  # None without data, and where they are real sites, which keep theirs


class SweepFolder:
    """The folder of one sweep.

    Attributes:
        sweep: with its study's tables in it, whatever becomes of the file that it came from.
        cells: all of them, done or not.

    Raises:
        ModelMismatchError: sweep.toml was changed since.
        StorageError: the folder is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if self._start.sweep_sha256 != _text_sha256(path / SWEEP):
            raise ModelMismatchError(
                f"{path / SWEEP}: expected the sweep that was begun here, got a changed one", "put it back, or begin a new sweep"
            )
        self.sweep = validate(Sweep, read_toml(path / SWEEP), str(path / SWEEP))
        assert isinstance(self.sweep.study, dict)
        self.cells = cells_of(self.sweep, Study.from_table(self.sweep.study, source=str(path / SWEEP)))

    @classmethod
    def create(cls, out: Path, sweep: Sweep, base: Study, data: Path | None) -> "SweepFolder":
        """A new folder in `out`, made if absent.

        Raises:
            ConfigurationError: a cell of the sweep is no study; nothing is written.
            StorageError: the folder cannot be written.
        """
        cells_of(sweep, base)
        path = out / f"{sweep.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        with storage_errors(path, "make the sweep's folder"):
            (path / CELLS).mkdir(parents=True)
        table = sweep.model_dump(mode="json")
        last = {key: table.pop(key) for key in ("grid", "variants")}
        write_atomic(path / SWEEP, toml_text({**table, "study": base.to_table(), **{key: value for key, value in last.items() if value}}))
        start = SweepStart(
            sweep_sha256=_text_sha256(path / SWEEP),
            data=None if data is None else str(data.resolve()),
            data_sha256=None if site_files(data) else _sha256(data),
        )
        write_atomic(path / START, json_text(start.model_dump(mode="json")))
        return cls(path)

    @functools.cached_property
    def _start(self) -> SweepStart:
        path = self.path / START
        try:
            return SweepStart.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise StorageError(
                f"{path}: expected what a sweep began with, could not read it ({type(error).__name__})", "begin a new sweep"
            ) from error

    def check_data(self, data: Path | None) -> None:
        """Return where `data` is None, or what the sweep began with.

        Raises:
            ConfigurationError: it is another path.
        """
        known = self._start.data
        if data is not None and str(data.resolve()) != known:
            raise ConfigurationError(
                f"--data: expected {known or 'none'}, with which this sweep began, got {data}", "leave it out, or begin a new sweep"
            )

    def data_of(self, cell: Cell) -> Path | None:
        """The patients given are those of the base study's task, whatever its model; a variant with another task has its own, bundled or synthetic."""
        return self.data if resolve_task(cell.study.task).name == self._base_task else None

    @functools.cached_property
    def _base_task(self) -> str:
        assert isinstance(self.sweep.study, dict)
        return resolve_task(str(self.sweep.study["task"])).name

    @classmethod
    def is_one(cls, path: Path) -> bool:
        """Whether `path` is a sweep's folder."""
        return (path / SWEEP).is_file()

    @classmethod
    def latest(cls, out: Path, sweep: Sweep, base: Study) -> "SweepFolder":
        """The newest folder in `out` of exactly this sweep.

        Raises:
            ConfigurationError: there is none.
        """
        cells = cells_of(sweep, base)
        for path in sorted(out.glob(f"{sweep.name}-*Z-*"), key=lambda path: path.stat().st_mtime, reverse=True):
            with contextlib.suppress(ConfigurationError, StorageError, OSError):  # another's folder
                if cls.is_one(path) and (found := cls(path)).cells == cells and found.sweep.baselines == sweep.baselines:
                    return found
        raise ConfigurationError(f"{out}: expected a folder of sweep {sweep.name!r} with this grid and study, found none", "leave out --resume")

    @functools.cached_property
    def data(self) -> Path | None:
        """The data that the sweep began with.

        Raises:
            ModelMismatchError: they have changed since.
        """
        start = self._start
        path = None if start.data is None else Path(start.data)
        if start.data_sha256 is not None and _sha256(path) != start.data_sha256:
            raise ModelMismatchError(f"{path}: expected the data that this sweep began with, got others", "put them back, or begin a new sweep")
        return path

    def results(self) -> list[CellResult]:
        """The cells that are done or have failed, in order.

        Raises:
            StorageError: a file among them is damaged.
        """
        return [self.result(cell.number) for cell in self.cells if self._path(cell.number).exists()]

    def result(self, number: int) -> CellResult:
        """What came of this cell.

        Raises:
            StorageError: its file is not there, or damaged.
        """
        path = self._path(number)
        try:
            return CellResult.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise StorageError(f"{path}: expected a cell's result, could not read it ({type(error).__name__})", "remove it, and resume") from error

    def waiting(self) -> list[Cell]:
        """The cells that are still to be run: those that failed are tried again."""
        done = {result.number for result in self.results() if result.status == "ok"}
        return [cell for cell in self.cells if cell.number not in done]

    def write(self, result: CellResult) -> None:
        """Keep what came of a cell."""
        write_atomic(self._path(result.number), json_text(result.model_dump(mode="json")))

    def write_table(self) -> Path:
        """table.csv: a row a cell that is done or has failed, all settings and metrics as columns."""
        rows = [_row(result) for result in self.results()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path / TABLE, text.getvalue())
        return self.path / TABLE

    def _path(self, number: int) -> Path:
        return self.path / CELLS / f"{number}.json"


def _row(result: CellResult) -> dict[str, object]:
    row: dict[str, object] = {"cell": result.number, "status": result.status, "error": result.error, **_written(result.study)}
    row |= {"patients": result.num_patients, "num_sites": result.num_sites, "synthetic": result.synthetic, "primary_metric": result.primary_metric}
    row |= {f"{source}.{name}": value for source, values in result.metrics.items() for name, value in values.items()}
    known = [value for value in result.per_site.values() if value is not None]
    if known:
        row["worst_site"] = min(known) if result.higher_is_better else max(known)
    if result.privacy is not None and result.privacy.sites:
        worst = max(result.privacy.sites.values(), key=_epsilon)
        row |= {f"spent.{name}": getattr(worst, name) for name in ("epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "accountant")}
        row["spent.epsilon_cross_check"] = worst.epsilon_cross_check
    return row


def _written(study: dict[str, bool | int | float | str]) -> dict[str, object]:
    """An absent epsilon of a study without privacy is told."""
    return {**study, "privacy.epsilon": "none"} if study["privacy.unit"] == "none" else dict(study)


def _epsilon(site: SitePrivacy) -> float:
    return site.epsilon


def _text_sha256(path: Path) -> str:
    with storage_errors(path, "read"):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def _sha256(data: Path | None) -> str | None:
    """Over names and contents of all files at `data`."""
    if data is None:
        return None
    digest = hashlib.sha256()
    with storage_errors(data, "read", remedy="check the path given with --data"):
        for path in [data] if data.is_file() else sorted(path for path in data.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(data)}\n{path.stat().st_size}\n".encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

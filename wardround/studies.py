"""Shipped studies and sweeps by name, and the study that a sweep starts from."""

from pathlib import Path

from shared.config import nearest, read_toml
from shared.errors import ConfigurationError
from shared.study import Study
from simulations.sweeps.grid import Sweep


def studies_folder() -> Path:
    """Where the shipped studies are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "studies"
    return inside if inside.is_dir() else package.parent / "studies"


def is_sweep_file(path: Path) -> bool:
    """Whether the TOML file at `path` is a sweep's."""
    return path.suffix == ".toml" and path.is_file() and "grid" in read_toml(path)


def shipped_studies() -> list[Path]:
    """The files of the shipped studies."""
    return [path for path in sorted(studies_folder().glob("*.toml")) if not is_sweep_file(path)]


def shipped_sweeps() -> list[Path]:
    """The files of the shipped sweeps."""
    return [path for path in sorted(studies_folder().glob("*.toml")) if is_sweep_file(path)]


def shipped_study(name: str) -> Path:
    """The file of a shipped study.

    Raises:
        ConfigurationError: there is none of that name; near names are proposed.
    """
    return _shipped(name, shipped_studies(), "study")


def sweep_file(name: Path) -> Path:
    """The file `name`; where there is none, the shipped sweep of that name.

    Raises:
        ConfigurationError: there is neither; near names are proposed.
    """
    named = name.suffix == ".toml" or len(name.parts) > 1 or name.exists()
    return name if named else _shipped(str(name), shipped_sweeps(), "sweep")


def _shipped(name: str, files: list[Path], kind: str) -> Path:
    known = {file.stem: file for file in files}
    if name not in known:
        raise ConfigurationError(
            f"no {kind} file or shipped {kind} {name!r}{nearest(name, list(known))}", f"shipped: {', '.join(known)}; or give a TOML file"
        )
    return known[name]


def base_study(sweep: Sweep, path: Path) -> Study:
    """The study that the sweep in the file at `path` starts from: its own tables, a file beside it, or a shipped study.

    Raises:
        ConfigurationError: there is none.
    """
    if isinstance(sweep.study, dict):
        return Study.from_table(sweep.study, source=f"{path}: study")
    beside = path.parent / sweep.study
    file = beside if beside.is_file() else shipped_study(Path(sweep.study).stem)
    return Study.from_table(read_toml(file), source=str(file))

"""A provisioned federation for tests of what hangs on it."""

import contextlib
import stat
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from client.kit import SiteAnswers, init_site, unpack_kit
from server.federation_file import FederationFile
from server.provisioning import Consortium, Provisioned, open_consortium, provision
from shared.kit import REQUEST, SiteRequest

PASSPHRASE = "a passphrase for tests"


def federation(
    *, sites: Iterable[str] = ("north", "south"), hosts: Iterable[str] = ("coordinator.example.org", "10.0.0.5"), **days: int
) -> FederationFile:
    """A federation file."""
    table = {"name": "tests", "sites": [*sites], "coordinator": {"hosts": [*hosts]}, "certificates": days}
    return FederationFile.model_validate(table)


def provisioned(
    out: Path,
    file: FederationFile | None = None,
    *,
    requests: Iterable[SiteRequest] = (),
    with_keys: bool = False,
    now: datetime | None = None,
) -> Provisioned:
    """What `wardround provision` does."""
    with open_consortium(file or federation(), out, passphrase=PASSPHRASE, now=now) as consortium:
        return provision(consortium, requests=[*requests], with_keys=with_keys)


def opened(out: Path, file: FederationFile | None = None, *, now: datetime | None = None) -> contextlib.AbstractContextManager[Consortium]:
    """The consortium in `out`."""
    return open_consortium(file or federation(), out, passphrase=PASSPHRASE, now=now)


def joined(out: Path, site: str, folder: Path, *, now: datetime | None = None) -> SiteRequest:
    """The request of a site that took up its kit in `folder`."""
    unpack_kit(out / "sites" / f"{site}.zip", folder, now=now)
    init_site(folder, SiteAnswers(), now=now)
    return SiteRequest.read(folder / REQUEST)


_Files = list[tuple[Path, int, bytes | None]]  # path below the root, mode, content; None for a folder
_approved: dict[str, _Files] = {}


def approved(root: Path, names: Iterable[str] = ("north", "south"), file: FederationFile | None = None) -> Path:
    """The kits, in `root`/kits, of a federation whose sites of these names took up theirs in `root`/NAME and were approved; made once, and copied."""
    kits, names, file = root / "kits", tuple(names), file or federation()
    key = file.model_dump_json() + " ".join(names)
    if key not in _approved:
        provisioned(kits, file)
        provisioned(kits, file, requests=[joined(kits, name, root / name) for name in names])
        tops = [kits, *(root / name for name in names)]
        paths = [path for top in tops for path in (top, *sorted(top.rglob("*")))]
        _approved[key] = [(path.relative_to(root), stat.S_IMODE(path.stat().st_mode), None if path.is_dir() else path.read_bytes()) for path in paths]
        return kits
    root.mkdir(parents=True, exist_ok=True)
    for path, mode, content in _approved[key]:
        (root / path).mkdir() if content is None else (root / path).write_bytes(content)
        (root / path).chmod(mode)
    return kits


def secrets_in(folder: Path) -> list[Path]:
    """Every file below `folder` that holds a private key or a zip of one."""
    return [path for path in folder.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()]


def check_modes(folder: Path) -> None:
    """Nobody but the owner reads a file with a private key, and nobody else writes to a folder."""
    for path in secrets_in(folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            assert not stat.S_IMODE(path.stat().st_mode) & 0o022, path

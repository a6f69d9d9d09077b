"""How a site is doing, from the files that its processes leave: it works whether they run or not."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.approvals import Approvals
from client.connection import Connection, read_connection
from client.hospital import AUDIT
from client.policy import SiteFile
from client.station import StationState, read_station
from shared.audit import AuditRow
from shared.certificates import load_signing_key
from shared.errors import ConfigurationError, DataMissingError
from shared.kit import FEDERATION, MANIFEST, SIGNING_KEY, SITE_FILE
from shared.supervision import Instance, read_instance
from wardround.kits import site_meant
from wardround.spending import Spending, spending_of

LAST_ROWS, TAIL_BYTES = 5, 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovedStudy:
    """A study that the site agreed to by hand."""

    study: str
    study_hash: str
    expires: datetime
    by: str
    holds: bool  # not expired


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteState:
    """A site at this moment."""

    name: str
    instance: Instance | None
    station: StationState | None
    connection: Connection | None
    approved: tuple[ApprovedStudy, ...]
    in_advance: bool
    num_pending: int
    spendings: tuple[Spending, ...]
    last_rows: tuple[AuditRow, ...]

    @property
    def running(self) -> bool:
        """Whether `wardround site start` works in its state folder."""
        return self.instance is not None

    def to_table(self) -> Mapping[str, object]:
        """For the envelope."""
        return {
            "site": self.name,
            "running": self.running,
            "pid": None if self.instance is None else self.instance.pid,
            "since": None if self.instance is None else self.instance.started,
            "processes": [] if self.station is None else [child.model_dump() for child in self.station.children],
            "connected": self.connection is not None and self.connection.connected,
            "connection": None if self.connection is None else self.connection.model_dump(mode="json"),
            "approved": [{**dataclasses.asdict(item), "expires": item.expires.isoformat()} for item in self.approved],
            "approved_in_advance": self.in_advance,
            "pending": self.num_pending,
            "spent": [spending.to_table() for spending in self.spendings],
            "last_rows": [{"sequence": row.sequence, "time": row.time, "event": row.event, "details": row.details} for row in self.last_rows],
        }


def site_folder(kit: Path) -> tuple[SiteFile, Path]:
    """The site file in a site's kit, and its state folder.

    Raises:
        ConfigurationError: it is no site's kit, or was not taken up.
    """
    if not (kit / SITE_FILE).is_file():
        coordinators, init = (kit / FEDERATION).is_file(), f"run 'wardround site init {kit}' first, or correct the path"
        if (kit / MANIFEST).exists() and not coordinators:
            raise ConfigurationError(f"{kit}: expected the folder of a site's kit, got one that was not taken up", init)
        what = "the coordinator's" if coordinators else "no kit"
        raise ConfigurationError(f"{kit}: expected the folder of a site's kit, got {what}", site_meant(kit) or init)
    file = SiteFile.load(kit / SITE_FILE)
    return file, kit / file.state


def site_state(kit: Path) -> SiteState:
    """How the site of this kit is.

    Raises:
        ConfigurationError: it is no site's kit.
        KitError, StorageError, LedgerError: what it remembers is damaged.
    """
    file, state = site_folder(kit)
    approvals = Approvals(state, load_signing_key(kit / SIGNING_KEY))
    instance, now = read_instance(state), datetime.now(UTC)
    return SiteState(
        name=file.name,
        instance=instance,
        station=read_station(state) if instance is not None else None,
        connection=read_connection(state) if instance is not None else None,
        approved=tuple(
            ApprovedStudy(study=item.asked.study, study_hash=item.asked.study_hash, expires=item.expires, by=item.by, holds=now < item.expires)
            for item in approvals.given()
        ),
        in_advance=file.approve_in_advance is not None and now.date() <= file.approve_in_advance.until,
        num_pending=len(approvals.pending()),
        spendings=tuple(_spent(kit)),
        last_rows=tuple(last_rows(state / AUDIT)),
    )


def last_rows(log: Path, *, count: int = LAST_ROWS) -> list[AuditRow]:
    """The last rows of an audit log, for a look; what does not read as a row is left out: `wardround audit verify` judges the log."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)[-count:]
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(AuditRow.of(line))
        except ValueError:
            continue
    return rows


def _spent(kit: Path) -> list[Spending]:
    try:
        return spending_of(kit / SITE_FILE, delta=None)
    except DataMissingError:
        return []

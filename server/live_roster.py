"""Which sites may take part at this moment: the CA's signed roster, and the SuperLink's number for each."""

import json
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import RootModel, ValidationError

from shared.errors import KitError, StorageError
from shared.files import write_atomic
from shared.kit import CA_CERTIFICATE, ROSTER, Roster, RosterSite

NODES = "nodes.json"  # in the coordinator's state: node key (PEM) -> node id


class _Nodes(RootModel[dict[str, int]]):
    """Node key -> node id."""


class LiveRoster:
    """The roster in a coordinator's kit as it stands now; read anew when a file changes, so that a revocation holds from the next message on.

    Raises:
        KitError: the roster is damaged, altered or another CA's: then nobody is let in.
    """

    def __init__(self, kit: Path, state: Path) -> None:
        self._kit = kit
        self._nodes_path = state / NODES
        self._stamp: tuple[int, ...] = ()
        self._roster: Roster | None = None
        self._nodes: dict[str, int] = {}

    @property
    def roster(self) -> Roster:
        """As it stands now."""
        self._refresh()
        assert self._roster is not None
        return self._roster

    def active(self) -> list[RosterSite]:
        """The sites that may take part now."""
        return self.roster.active(datetime.now(UTC))

    def expected(self) -> frozenset[str]:
        """Their names."""
        return frozenset(site.name for site in self.active())

    def site_of(self, node_id: int) -> RosterSite | None:
        """The site with this node id, where it may take part now."""
        self._refresh()
        return next((site for site in self.active() if self._nodes.get(site.node_key) == node_id), None)

    def node_of(self, site: RosterSite) -> int | None:
        """The node id of a site, once it is registered."""
        self._refresh()
        return self._nodes.get(site.node_key)

    def name_of(self, node_id: int) -> str:
        """The name of whoever has or had this node id."""
        self._refresh()
        names = [site.name for site in self.roster.sites if self._nodes.get(site.node_key) == node_id]
        return names[0] if names else f"node {node_id}"

    def declared_size(self, name: str) -> int | None:
        """Training patients of a site that may take part now, as the roster has it; None where it declared none."""
        return next((site.declared_size for site in self.active() if site.name == name), None)

    def public_key(self, name: str) -> str | None:
        """What the daemon of a site that may take part now signs with, hex."""
        return next((site.signing_key for site in self.active() if site.name == name), None)

    def remember(self, nodes: dict[str, int]) -> None:
        """Durably take these as the node ids by node key."""
        if nodes != self._nodes:
            write_atomic(self._nodes_path, json.dumps(nodes, indent=2, sort_keys=True) + "\n")
            self._nodes = dict(nodes)

    def _refresh(self) -> None:
        roster = self._kit / ROSTER
        stamp = tuple(value for path in (roster, self._nodes_path) for value in _stamp(path))
        if stamp == self._stamp:
            return
        read = Roster.read(roster, self._kit / CA_CERTIFICATE)
        if self._roster is not None and read.generation < self._roster.generation:
            raise KitError(
                f"{roster}: expected generation {self._roster.generation} or later, got {read.generation}: an earlier roster was put back",
                "restore the newest roster.json, or provision again",
            )
        self._roster = read
        try:
            self._nodes = _Nodes.model_validate_json(self._nodes_path.read_bytes()).root if self._nodes_path.exists() else {}
        except ValidationError as error:
            raise StorageError(f"{self._nodes_path}: expected node ids, got a damaged file", "delete it and start the coordinator again") from error
        self._stamp = stamp


def public_key(site: RosterSite) -> Ed25519PublicKey:
    """What this site's daemon signs with."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(site.signing_key))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino

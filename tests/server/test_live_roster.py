"""Who may take part is what the CA signed last, at this very moment; where that cannot be read, nobody may."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.live_roster import NODES, LiveRoster, public_key
from server.provisioning import revoke
from shared.errors import KitError, StorageError
from shared.kit import ROSTER, SIGNING_KEY, load_signing_key
from tests.provisioned import approved, federation, joined, opened, provisioned

NORTH, SOUTH = 11, 12


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A federation of two hospitals, both on the roster."""
    out = approved(tmp_path)
    (tmp_path / "state").mkdir()
    return out


@pytest.fixture
def roster(out: Path, tmp_path: Path) -> LiveRoster:
    made = LiveRoster(out / "coordinator", tmp_path / "state")
    keys = {site.name: site.node_key for site in made.active()}
    made.remember({keys["north"]: NORTH, keys["south"]: SOUTH})
    return made


def name_at(roster: LiveRoster, node_id: int) -> str | None:
    site = roster.site_of(node_id)
    return None if site is None else site.name


def test_nodes_are_the_sites_that_the_superlink_numbered(roster: LiveRoster, out: Path, tmp_path: Path) -> None:
    assert roster.expected() == {"north", "south"}
    assert (name_at(roster, NORTH), name_at(roster, SOUTH), name_at(roster, 13)) == ("north", "south", None)
    assert (roster.name_of(NORTH), roster.name_of(13)) == ("north", "node 13")
    assert [roster.node_of(site) for site in roster.active()] == [NORTH, SOUTH]
    again = LiveRoster(out / "coordinator", tmp_path / "state")  # another process
    assert (name_at(again, NORTH), name_at(again, SOUTH)) == ("north", "south")


def test_the_key_of_a_site_is_that_of_its_daemon(roster: LiveRoster, tmp_path: Path) -> None:
    site = roster.site_of(NORTH)
    assert site is not None
    assert public_key(site) == load_signing_key(tmp_path / "north" / SIGNING_KEY).public_key()


def test_a_revocation_holds_at_once_and_the_name_stays_known(roster: LiveRoster, out: Path) -> None:
    assert name_at(roster, NORTH) == "north"
    with opened(out) as consortium:
        revoke(consortium, "north")
    assert name_at(roster, NORTH) is None
    assert roster.expected() == {"south"}
    assert roster.name_of(NORTH) == "north"


def test_a_site_that_came_back_with_a_new_key_has_a_new_node(roster: LiveRoster, out: Path, tmp_path: Path) -> None:
    with opened(out) as consortium:
        revoke(consortium, "north")
    provisioned(out, requests=[joined(out, "north", tmp_path / "north again")])
    assert name_at(roster, NORTH) is None  # the old key's
    [new] = [site for site in roster.active() if site.name == "north"]
    assert roster.node_of(new) is None
    roster.remember({new.node_key: 21})
    assert name_at(roster, 21) == "north"


def test_an_expired_approval_is_none(tmp_path: Path) -> None:
    begin = datetime.now(UTC) - timedelta(days=800)
    out, file = tmp_path / "kits", federation(ca_days=3650, site_days=400)
    provisioned(out, file, now=begin)
    provisioned(out, file, requests=[joined(out, "north", tmp_path / "north", now=begin)], now=begin)
    (tmp_path / "state").mkdir()
    roster = LiveRoster(out / "coordinator", tmp_path / "state")
    [site] = roster.roster.sites
    roster.remember({site.node_key: NORTH})
    assert roster.active() == []
    assert name_at(roster, NORTH) is None
    assert roster.name_of(NORTH) == "north"


def edited(path: Path, before: bytes, after: bytes) -> None:
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))


SPOILS: dict[str, Callable[[Path], None]] = {
    "a name": lambda path: edited(path, b'"north"', b'"southern"'),
    "a generation": lambda path: edited(path, b'"generation": 2', b'"generation": 3'),
    "a space": lambda path: edited(path, b"{", b"{ "),
    "no signature": lambda path: edited(path, path.read_bytes().split(b'"signature": "')[1][:96], b""),
    "half a file": lambda path: path.write_bytes(path.read_bytes()[:100]) and None,
    "an empty file": lambda path: path.write_bytes(b"") and None,
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_an_altered_roster_lets_nobody_in_until_it_is_mended(roster: LiveRoster, out: Path, spoil: Callable[[Path], None]) -> None:
    path = out / "coordinator" / ROSTER
    good = path.read_bytes()
    assert name_at(roster, NORTH) == "north"
    spoil(path)
    for look in (lambda: roster.site_of(NORTH), roster.active, roster.expected, lambda: roster.name_of(NORTH), lambda: roster.roster):
        for _ in range(2):
            with pytest.raises(KitError):
                look()
    path.unlink(missing_ok=True)
    path.write_bytes(good)
    assert name_at(roster, NORTH) == "north"


def test_an_older_roster_put_back_lets_nobody_in(roster: LiveRoster, out: Path) -> None:
    path = out / "coordinator" / ROSTER
    before = path.read_bytes()
    with opened(out) as consortium:
        revoke(consortium, "north")
    assert name_at(roster, NORTH) is None
    path.write_bytes(before)  # signed by the CA, and from before the revocation
    with pytest.raises(KitError, match="put back"):
        roster.site_of(NORTH)


def test_another_federation_s_roster_is_refused(roster: LiveRoster, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    provisioned(other)
    provisioned(other, requests=[joined(other, "north", tmp_path / "foreign")])
    (out / "coordinator" / ROSTER).write_bytes((other / "coordinator" / ROSTER).read_bytes())
    with pytest.raises(KitError):
        roster.site_of(NORTH)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": "x"}', b'{"key": 1.5}', b"\xff"])
def test_damaged_node_ids_are_said(roster: LiveRoster, tmp_path: Path, content: bytes) -> None:
    assert name_at(roster, NORTH) == "north"
    (tmp_path / "state" / NODES).write_bytes(content)
    for _ in range(2):
        with pytest.raises(StorageError, match="node ids"):
            roster.site_of(NORTH)


def test_without_node_ids_nobody_has_a_node(roster: LiveRoster, tmp_path: Path) -> None:
    assert name_at(roster, NORTH) == "north"
    (tmp_path / "state" / NODES).unlink()
    assert name_at(roster, NORTH) is None
    assert roster.expected() == {"north", "south"}

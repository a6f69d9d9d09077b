"""Kits, rosters and requests: what the right keys signed is taken, and nothing else, to the byte."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.supercore.primitives.asymmetric import sign_message, uses_nist_ec_curve, verify_signature

from shared import kit
from shared.certificates import grouped, load_node_key, load_signing_key, parse_node_key, signing_key_text
from shared.errors import KitError
from shared.kit import Roster, RosterSite, SiteRequest, verify_kit
from tests.provisioned import federation, joined, opened, provisioned

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation in which north made its own keys, and south was given its keys."""
    out = tmp_path_factory.mktemp("federation") / "kits"
    provisioned(out, now=NOW)
    provisioned(out, requests=[joined(out, "north", out.parent / "north", now=NOW)], with_keys=True, now=NOW)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sites/north", "sites/south", "coordinator"])
def test_any_altered_byte_of_a_kit_is_found(kits: Path, name: str) -> None:
    folder = kits / name
    manifest = verify_kit(folder, now=NOW)
    files = [*manifest.files, kit.MANIFEST, kit.SIGNATURE, *([kit.ROSTER] if manifest.site is None else [])]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(files)
    for path in (folder / file for file in files):
        content = path.read_bytes()
        for position in range(0, len(content), 1 if path.name == kit.SIGNATURE else 17):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
            with pytest.raises(KitError):
                verify_kit(folder, now=NOW)
        path.write_bytes(content[:-1])
        with pytest.raises(KitError):
            verify_kit(folder, now=NOW)
        path.unlink()
        with pytest.raises(KitError, match=path.name):
            verify_kit(folder, now=NOW)
        path.write_bytes(content)
    assert verify_kit(folder, now=NOW) == manifest


def test_a_kit_ends_and_says_when(kits: Path) -> None:
    manifest = verify_kit(kits / "sites" / "north", now=NOW + timedelta(days=364))
    assert manifest.expires == NOW + timedelta(days=365)
    with pytest.raises(KitError, match=r"kit\.json: expired on 2031-01-01.*wardround renew") as caught:
        verify_kit(kits / "sites" / "north", now=manifest.expires)
    assert (caught.value.code, caught.value.exit_code) == ("E402", 4)


def test_a_file_replaced_by_a_link_is_found(kits: Path, tmp_path: Path) -> None:
    readme = kits / "sites" / "north" / kit.README
    content = readme.read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    readme.unlink()
    readme.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KitError, match="README.txt.*link"):
        verify_kit(kits / "sites" / "north", now=NOW)
    readme.unlink()
    readme.write_bytes(content)


def test_the_roster_is_the_cas_and_whole(kits: Path, tmp_path: Path) -> None:
    roster = Roster.read(kits / "coordinator" / kit.ROSTER, kits / "coordinator" / kit.CA_CERTIFICATE)
    assert [site.name for site in roster.active(NOW)] == ["north", "south"]
    assert roster.active(NOW + timedelta(days=365)) == []
    provisioned(tmp_path / "other", now=NOW)
    with pytest.raises(KitError, match="another CA's"):
        Roster.read(kits / "coordinator" / kit.ROSTER, tmp_path / "other" / "coordinator" / kit.CA_CERTIFICATE)
    table = json.loads((kits / "coordinator" / kit.ROSTER).read_text())
    table["sites"][0]["name"] = "west"
    forged = Roster.model_validate_json(json.dumps(table))
    (tmp_path / "forged.json").write_bytes(forged.content())
    with pytest.raises(KitError, match="altered"):
        Roster.read(tmp_path / "forged.json", kits / "coordinator" / kit.CA_CERTIFICATE)


def test_an_earlier_roster_put_back_under_a_newer_kit_is_found(tmp_path: Path) -> None:
    provisioned(tmp_path, now=NOW)
    path = tmp_path / "coordinator" / kit.ROSTER
    earlier = path.read_bytes()
    provisioned(tmp_path, federation(sites=["north", "south", "west"]), now=NOW)
    path.write_bytes(earlier)
    with pytest.raises(KitError, match=r"expected generation 2 or later of tests, got 1"):
        verify_kit(tmp_path / "coordinator", now=NOW)


def test_a_manifest_brings_no_policy_to_a_site(tmp_path: Path) -> None:
    """Not even the CA may put a site.toml, or code, into a site's kit."""
    provisioned(tmp_path, now=NOW)
    folder = tmp_path / "sites" / "north"
    manifest = verify_kit(folder, now=NOW)
    greedy = manifest.model_copy(update={"files": {**manifest.files, kit.SITE_FILE: "0" * 64}})
    (folder / kit.MANIFEST).write_bytes(greedy.content())
    with opened(tmp_path, now=NOW) as consortium:
        (folder / kit.SIGNATURE).write_bytes(consortium.authority.sign(greedy.content()))
    with pytest.raises(KitError, match="expected only the files"):
        verify_kit(folder, now=NOW)


def test_a_request_altered_anywhere_is_refused(kits: Path, tmp_path: Path) -> None:
    content = (kits.parent / "north" / kit.REQUEST).read_bytes()
    request = SiteRequest.read(kits.parent / "north" / kit.REQUEST)
    assert b"PRIVATE" not in content and request.site == "north"
    path = tmp_path / "request.json"
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(KitError, match="request.json"):
            SiteRequest.read(path)


@pytest.mark.parametrize("change", [{"declared_size": 5000}, {"site": "south"}, {"federation": "other"}, {"created": NOW + timedelta(days=1)}])
def test_a_request_said_again_needs_both_keys(kits: Path, tmp_path: Path, change: dict[str, object]) -> None:
    request = SiteRequest.read(kits.parent / "north" / kit.REQUEST).model_copy(update=change)
    (tmp_path / "altered.json").write_bytes(request.content())
    with pytest.raises(KitError, match="signed by both"):
        SiteRequest.read(tmp_path / "altered.json")
    node, signing = load_node_key(kits.parent / "north" / kit.NODE_KEY), load_signing_key(kits.parent / "north" / kit.SIGNING_KEY)
    foreign_node, foreign = load_node_key(kits / "sites" / "south" / kit.NODE_KEY), load_signing_key(kits / "sites" / "south" / kit.SIGNING_KEY)
    for pair in ((node, foreign), (foreign_node, signing)):
        (tmp_path / "half.json").write_bytes(request.signed(*pair).content())
        with pytest.raises(KitError, match="signed by both"):
            SiteRequest.read(tmp_path / "half.json")
    (tmp_path / "whole.json").write_bytes(request.signed(node, signing).content())
    assert SiteRequest.read(tmp_path / "whole.json").site == request.site


@pytest.mark.parametrize("change", [{"site": "west"}, {"ca_fingerprint": "0" * 64}, {"signing_key": "1" * 64}, {"federation": "other"}])
def test_the_fingerprint_covers_who_which_ca_and_both_keys(kits: Path, change: dict[str, object]) -> None:
    request = SiteRequest.read(kits.parent / "north" / kit.REQUEST)
    assert request.model_copy(update=change).fingerprint != request.fingerprint
    assert request.model_copy(update={"declared_size": 77}).fingerprint == request.fingerprint
    assert grouped(request.fingerprint).replace(" ", "") == request.fingerprint and len(grouped(request.fingerprint).split()) == 16


def test_flower_reads_the_node_key_as_it_lies(kits: Path) -> None:
    """The oracle is how `flower-supernode` and `flwr supernode register` load their files."""
    private = load_ssh_private_key((kits.parent / "north" / kit.NODE_KEY).read_bytes(), None)
    roster = Roster.read(kits / "coordinator" / kit.ROSTER, kits / "coordinator" / kit.CA_CERTIFICATE)
    public = load_ssh_public_key(roster.sites[0].node_key.encode())
    assert uses_nist_ec_curve(public) and private.public_key() == public
    assert verify_signature(public, b"1", sign_message(private, b"1"))
    assert roster.sites[0].signing_key == signing_key_text(load_signing_key(kits.parent / "north" / kit.SIGNING_KEY))


@pytest.mark.parametrize("spoil", [lambda text: text + " comment", lambda text: text[:-4], lambda text: "ssh-ed25519 AAAA", lambda text: ""])
def test_only_a_plain_p384_line_is_a_node_key(kits: Path, spoil: Callable[[str], str]) -> None:
    line = SiteRequest.read(kits.parent / "north" / kit.REQUEST).node_key
    parse_node_key(line)
    with pytest.raises(ValueError, match="P-384"):
        parse_node_key(spoil(line))
    with pytest.raises(ValueError, match="P-384"):
        RosterSite(name="x", node_key=spoil(line), signing_key="0" * 64, declared_size=None, approved=NOW, expires=NOW)


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.key").write_bytes(b"nonsense")
    for load in (load_signing_key, load_node_key):
        with pytest.raises(KitError, match=r"x\.key: expected an"):
            load(tmp_path / "x.key")

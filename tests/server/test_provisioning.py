"""Provisioning: real TLS with what it makes, nothing secret where it does not belong, and whatever interrupts it, the next run completes it."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import server.authority
import server.provisioning
from client.kit import SiteAnswers, init_site
from server.federation_file import FederationFile, check_host
from server.provisioning import open_consortium, renew, revoke
from shared import kit
from shared.certificates import load_node_key, load_signing_key, read_certificate
from shared.errors import ConfigurationError, KitError, StorageError
from shared.kit import Roster, SiteRequest, verify_kit
from tests.provisioned import PASSPHRASE, check_modes, federation, joined, opened, provisioned, secrets_in

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(autouse=True)
def open_umask() -> Iterator[None]:
    """The worst umask there is: what is secret must be so by its own mode."""
    before = os.umask(0)
    yield
    os.umask(before)


def roster_in(out: Path) -> Roster:
    return Roster.read(out / "coordinator" / kit.ROSTER, out / "ca" / "ca.crt")


def handshake(coordinator: Path, authority: Path, name: str) -> None:
    """A TLS handshake over loopback, as strict as OpenSSL is; the client's error is raised."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(coordinator / kit.SERVER_CERTIFICATE, coordinator / kit.SERVER_KEY)
    trusting = ssl.create_default_context(cafile=str(authority))
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError), serving.wrap_socket(connection, server_side=True) as secured:
            secured.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            with socket.create_connection(listener.getsockname()) as plain, trusting.wrap_socket(plain, server_hostname=name) as secured:
                assert secured.version() == "TLSv1.3"
        finally:
            thread.join()


@pytest.mark.parametrize("name", ["coordinator.example.org", "10.0.0.5", "localhost", "127.0.0.1", "::1"])
def test_every_name_and_address_passes_a_strict_handshake(tmp_path: Path, name: str) -> None:
    provisioned(tmp_path)
    handshake(tmp_path / "coordinator", tmp_path / "sites" / "north" / kit.CA_CERTIFICATE, name)


def test_wrong_name_other_ca_and_expired_fail_the_handshake(tmp_path: Path) -> None:
    provisioned(tmp_path / "one")
    provisioned(tmp_path / "two")
    authority = tmp_path / "one" / "ca" / "ca.crt"
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path / "one" / "coordinator", authority, "evil.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="signature failure|unable to get local issuer|self-signed"):
        handshake(tmp_path / "two" / "coordinator", authority, "localhost")
    provisioned(tmp_path / "old", federation(server_days=30), now=NOW - timedelta(days=31))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(tmp_path / "old" / "coordinator", tmp_path / "old" / "ca" / "ca.crt", "localhost")
    with opened(tmp_path / "old") as consortium:
        renew(consortium)
    handshake(tmp_path / "old" / "coordinator", tmp_path / "old" / "ca" / "ca.crt", "localhost")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl binary")
def test_openssl_accepts_certificate_and_kit_signature(tmp_path: Path) -> None:
    provisioned(tmp_path)
    folder = tmp_path / "coordinator"
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", folder / kit.CA_CERTIFICATE, folder / kit.SERVER_CERTIFICATE]
    assert subprocess.run(verify, capture_output=True, text=True, check=True).stdout.endswith("OK\n")
    public = subprocess.run(["openssl", "x509", "-pubkey", "-noout", "-in", folder / kit.CA_CERTIFICATE], capture_output=True, check=True).stdout
    (tmp_path / "public.pem").write_bytes(public)
    check = ["openssl", "dgst", "-sha384", "-verify", tmp_path / "public.pem", "-signature", folder / kit.SIGNATURE, folder / kit.MANIFEST]
    assert subprocess.run(check, capture_output=True, text=True, check=True).stdout == "Verified OK\n"


def test_no_kit_holds_a_private_key_and_no_secret_is_open(tmp_path: Path) -> None:
    provisioned(tmp_path)
    mine = {"ca/ca.key", "coordinator/tls/server.key", "coordinator/keys/signing.key"}
    assert {str(path.relative_to(tmp_path)) for path in secrets_in(tmp_path)} == mine
    check_modes(tmp_path)
    for name in ("north", "south"):
        with zipfile.ZipFile(tmp_path / "sites" / f"{name}.zip") as archive:
            assert archive.namelist() == [kit.README, kit.CA_CERTIFICATE, kit.MANIFEST, kit.SIGNATURE]
    with pytest.raises(ConfigurationError, match="does not open"):
        open_consortium(federation(), tmp_path, passphrase="another passphrase").__enter__()
    assert b"ENCRYPTED PRIVATE KEY" in (tmp_path / "ca" / "ca.key").read_bytes()


def test_with_keys_they_are_in_the_kit_and_nowhere_else(tmp_path: Path) -> None:
    outcome = provisioned(tmp_path, with_keys=True)
    assert [site.status for site in outcome.sites] == ["approved", "approved"]
    check_modes(tmp_path)
    key = (tmp_path / "sites" / "north" / kit.NODE_KEY).read_bytes()
    holders = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file() and key in path.read_bytes()}
    assert holders == {"sites/north.zip", "sites/north/keys/node.key"}
    zips = {path.name: path.read_bytes() for path in (tmp_path / "sites").glob("*.zip")}
    assert provisioned(tmp_path, with_keys=True) == outcome  # again: nothing changes
    assert zips == {path.name: path.read_bytes() for path in (tmp_path / "sites").glob("*.zip")}
    with opened(tmp_path) as consortium:
        renew(consortium)
    verify_kit(tmp_path / "sites" / "north")
    assert (tmp_path / "sites" / "north" / kit.NODE_KEY).read_bytes() == key


def test_a_sites_own_keys_made_in_place_never_reach_a_zip(tmp_path: Path) -> None:
    """On one machine a site may take up its kit in the very folder that provision writes."""
    provisioned(tmp_path)
    folder = tmp_path / "sites" / "north"
    init_site(folder, SiteAnswers())
    key = (folder / kit.NODE_KEY).read_bytes()
    provisioned(tmp_path, with_keys=True)
    assert [site.name for site in roster_in(tmp_path).sites] == ["south"]  # north sends a request
    provisioned(tmp_path, requests=[SiteRequest.read(folder / kit.REQUEST)])
    with opened(tmp_path) as consortium:
        renew(consortium)
    verify_kit(folder)
    assert key not in (tmp_path / "sites" / "north.zip").read_bytes() and (folder / kit.NODE_KEY).read_bytes() == key


def test_again_with_nothing_new_not_a_byte_changes(tmp_path: Path) -> None:
    first = provisioned(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = provisioned(tmp_path, now=NOW + timedelta(days=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (first.generation, again.generation) == (1, 1)
    assert [site.status for site in first.sites] == ["kit written"] * 2 and [site.status for site in again.sites] == ["waiting for its request"] * 2


def test_the_generation_grows_with_every_change_and_only_then(tmp_path: Path) -> None:
    out, file = tmp_path / "kits", federation()
    generations = [provisioned(out).generation]
    keys = {name: (out / name).read_bytes() for name in ("ca/ca.key", "ca/ca.crt", "coordinator/keys/signing.key")}
    certificate = (out / "coordinator" / kit.SERVER_CERTIFICATE).read_bytes()
    (out / "coordinator" / "state").mkdir()
    (out / "coordinator" / "state" / "links.db").write_text("kept")
    request = joined(out, "north", tmp_path / "north")
    for _ in range(2):
        generations.append(provisioned(out, requests=[request]).generation)
    file = federation(sites=["north", "south", "west"])
    generations.append(provisioned(out, file).generation)
    assert (out / "coordinator" / kit.SERVER_CERTIFICATE).read_bytes() == certificate
    file = federation(sites=["north", "south", "west"], hosts=["new.example.org"])
    generations.append(provisioned(out, file).generation)
    handshake(out / "coordinator", out / "ca" / "ca.crt", "new.example.org")
    assert verify_kit(out / "sites" / "north").coordinator.hosts == ("new.example.org",)
    for _ in range(2):
        with opened(out, file) as consortium:
            generations.append(revoke(consortium, "north", reason="moved").generation)
    with opened(out, file) as consortium:
        generations.append(renew(consortium, names=["south"]).generation)
    assert generations == [1, 2, 2, 3, 4, 5, 5, 6]
    assert verify_kit(out / "sites" / "south").generation == 6 and verify_kit(out / "sites" / "west").generation == 4
    assert keys == {name: (out / name).read_bytes() for name in keys}
    assert (out / "coordinator" / "state" / "links.db").read_text() == "kept"
    verify_kit(out / "coordinator")


def test_a_revoked_key_never_comes_back_and_the_name_may(tmp_path: Path) -> None:
    out = tmp_path / "kits"
    provisioned(out)
    request = joined(out, "north", tmp_path / "north")
    provisioned(out, requests=[request])
    new = joined(out, "north", tmp_path / "reinstalled")
    with pytest.raises(KitError, match="other keys than the approved ones; if the site lost them, revoke north first"):
        provisioned(out, requests=[new])
    with opened(out) as consortium:
        assert revoke(consortium, "north", reason="machine stolen").sites[0].status == "revoked"
    assert roster_in(out).active(NOW) == []
    keys = {name: load_node_key(tmp_path / name / kit.NODE_KEY) for name in ("north", "reinstalled")}
    signers = {name: load_signing_key(tmp_path / name / kit.SIGNING_KEY) for name in keys}
    half = request.model_copy(update={"signing_key": new.signing_key}).signed(keys["north"], signers["reinstalled"])
    for refused in (request, half):
        with pytest.raises(KitError, match="revoked with north"):
            provisioned(out, requests=[refused])
    assert provisioned(out, with_keys=True).sites[0].status == "revoked"  # not by itself
    assert provisioned(out, requests=[new]).sites[0].status == "approved"
    assert [(site.name, site.revoked is None, site.reason) for site in roster_in(out).sites if site.name == "north"] == [
        ("north", False, "machine stolen"),
        ("north", True, None),
    ]


def test_requests_that_are_refused_change_nothing(tmp_path: Path) -> None:
    out = tmp_path / "kits"
    provisioned(out)
    provisioned(tmp_path / "other")
    north, south = joined(out, "north", tmp_path / "north"), joined(out, "south", tmp_path / "south")
    node, signing = load_node_key(tmp_path / "north" / kit.NODE_KEY), load_signing_key(tmp_path / "north" / kit.SIGNING_KEY)
    own = load_signing_key(out / "coordinator" / kit.SIGNING_KEY)
    stolen = north.model_copy(update={"site": "south"}).signed(node, signing)
    coordinators = south.model_copy(update={"signing_key": verify_kit(out / "coordinator").coordinator.signing_key}).signed(node, own)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    cases: list[tuple[list[SiteRequest], type[Exception], str]] = [
        ([north, stolen], KitError, "two sites cannot have one key"),
        ([north, north.model_copy(update={"site": "west"})], ConfigurationError, "expected one of north, south"),
        ([joined(tmp_path / "other", "north", tmp_path / "foreign")], KitError, "another CA"),
        ([north.model_copy(update={"federation": "elsewhere"})], KitError, "elsewhere"),
        ([coordinators], KitError, "the coordinator's own key"),
    ]
    for requests, error, message in cases:
        with pytest.raises(error, match=message):
            provisioned(out, requests=requests)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    provisioned(out, requests=[north])
    with pytest.raises(KitError, match="the key of north"):
        provisioned(out, requests=[stolen])
    larger = north.model_copy(update={"declared_size": 120}).signed(node, signing)
    provisioned(out, requests=[larger, south])
    assert [(site.name, site.declared_size) for site in roster_in(out).active(NOW)] == [("north", 120), ("south", None)]


class CrashError(Exception):
    """The process dies here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, write: int, *, after: bool) -> None:
    """Let the write of this number, counted over all that provisioning writes, be the last: done or not done."""
    left = [write]

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def counting(*arguments: object) -> None:
            left[0] -= 1
            if left[0] > 0 or (left[0] == 0 and after):
                original(*arguments)
            if left[0] <= 0:
                raise CrashError

        return counting

    for module, names in (
        (server.authority, ["write_atomic", "write_secret"]),
        (server.provisioning, ["write_atomic", "write_secret", "replace_secret"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, counted(getattr(module, name)))


def completed_after_every_crash(base: Path, monkeypatch: pytest.MonkeyPatch, out: Path, act: Callable[[Path], object]) -> int:
    """Crash `act` at every write of it, on a copy of `base`; each time the same again completes it. Gives the number of crashes."""
    for number in range(1, 200):
        for after in (False, True):
            shutil.rmtree(out, ignore_errors=True)
            if base.exists():
                shutil.copytree(base, out)
            with monkeypatch.context() as patched:
                crash_at(patched, number, after=after)
                try:
                    act(out)
                except CrashError:
                    pass
                else:
                    return number
            check_modes(out) if out.exists() else None
            generation = roster_in(out).generation if (out / "coordinator" / kit.ROSTER).exists() else 0
            act(out)
            check_modes(out)
            assert roster_in(out).generation >= max(generation, 1)
            for folder in (out / "coordinator", *(path for path in (out / "sites").iterdir() if path.is_dir())):
                manifest = verify_kit(folder)
                assert manifest.generation <= roster_in(out).generation
                if manifest.site is not None:
                    with zipfile.ZipFile(folder.parent / f"{folder.name}.zip") as archive:
                        assert {name: archive.read(name) for name in archive.namelist()} == {
                            name: (folder / name).read_bytes() for name in (*manifest.files, kit.MANIFEST, kit.SIGNATURE)
                        }
            handshake(out / "coordinator", out / "ca" / "ca.crt", "localhost")
            if base.exists():
                assert (out / "ca" / "ca.crt").read_bytes() == (base / "ca" / "ca.crt").read_bytes()
    raise AssertionError("it writes without end")


@pytest.mark.slow
@pytest.mark.parametrize("with_keys", [False, True])
def test_a_first_run_that_was_killed_anywhere_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_keys: bool) -> None:
    def act(out: Path) -> None:
        outcome = provisioned(out, federation(sites=["north"]), with_keys=with_keys)
        assert with_keys == (outcome.sites[0].status == "approved")
        assert with_keys == (kit.NODE_KEY in verify_kit(out / "sites" / "north").files)

    assert completed_after_every_crash(tmp_path / "none", monkeypatch, tmp_path / "kits", act) > 10


@pytest.mark.slow
def test_a_renewal_and_an_approval_that_were_killed_anywhere_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, file = tmp_path / "base", federation(sites=["north", "south"])
    provisioned(base, file)
    request = joined(base, "south", tmp_path / "south")
    provisioned(base, federation(sites=["north"]), with_keys=True)

    def act(out: Path) -> None:
        provisioned(out, file, requests=[request])
        with opened(out, file) as consortium:
            outcome = renew(consortium)
        assert [site.status for site in outcome.sites] == ["approved", "approved"]
        assert kit.NODE_KEY in verify_kit(out / "sites" / "north").files

    assert completed_after_every_crash(base, monkeypatch, tmp_path / "kits", act) > 10


def test_what_cannot_be_made_again_is_not_made_again(tmp_path: Path) -> None:
    provisioned(tmp_path)
    for path, message in (
        ("ca/ca.key", "expected the CA's key"),
        ("coordinator/keys/signing.key", "expected the coordinator's signing key"),
        ("coordinator/roster.json", "who was revoked"),
    ):
        (tmp_path / path).rename(tmp_path / "aside")
        with pytest.raises((ConfigurationError, KitError), match=message):
            provisioned(tmp_path)
        assert not (tmp_path / path).exists()
        (tmp_path / "aside").rename(tmp_path / path)
    (tmp_path / "ca").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="bring the folder ca/ back"):
        provisioned(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "ca")
    assert provisioned(tmp_path).generation == 1
    with pytest.raises(ConfigurationError, match="expected the CA of other, got that of .'tests'"):
        provisioned(tmp_path, FederationFile.model_validate({"name": "other", "sites": ["north"], "coordinator": {"hosts": ["localhost"]}}))


def test_what_ends_soon_or_stays_without_being_listed_is_told(tmp_path: Path) -> None:
    out = tmp_path / "kits"
    provisioned(out, federation(site_days=100), with_keys=True, now=NOW)
    assert provisioned(out, federation(site_days=100), now=NOW + timedelta(days=69)).warnings == ()
    soon = provisioned(out, federation(sites=["south"], site_days=100), now=NOW + timedelta(days=71)).warnings
    assert [line.split(" on ")[0] for line in soon[:1]] == ["site south expires"]
    assert soon[1] == "site north is approved, but no longer in the federation file; put it back, or run 'wardround revoke'"
    late = provisioned(out, federation(site_days=100), now=NOW + timedelta(days=400))
    assert [line.split(" on ")[0] for line in late.warnings] == [
        "the coordinator's server certificate expired",
        "site north expired",
        "site south expired",
    ]
    assert [site.status for site in late.sites] == ["expired", "expired"]
    with opened(out, federation(site_days=100), now=NOW + timedelta(days=400)) as consortium:
        outcome = renew(consortium, names=["north"])
    assert [site.status for site in outcome.sites] == ["approved", "expired"]
    assert [line.split(" on ")[0] for line in outcome.warnings] == ["site south expired"]


def test_nothing_outlives_the_ca(tmp_path: Path) -> None:
    file = federation(ca_days=50, server_days=365, site_days=365)
    provisioned(tmp_path, file, with_keys=True, now=NOW)
    end = NOW + timedelta(days=50)
    assert read_certificate(tmp_path / "coordinator" / kit.SERVER_CERTIFICATE).not_valid_after_utc == end
    assert verify_kit(tmp_path / "sites" / "north", now=NOW).expires == end and roster_in(tmp_path).sites[0].expires == end


def test_two_at_once_and_misuse_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="at least 12 characters"), open_consortium(federation(), tmp_path, passphrase="short"):
        pass
    with opened(tmp_path) as consortium:
        with pytest.raises(StorageError, match="another process"), opened(tmp_path):
            pass
        for act in (lambda: renew(consortium), lambda: revoke(consortium, "north")):
            with pytest.raises(ConfigurationError, match="run 'wardround provision' first"):
                act()
    provisioned(tmp_path)
    with opened(tmp_path) as consortium:
        with pytest.raises(ConfigurationError, match="site 'north': expected one that was approved"):
            revoke(consortium, "north")
        with pytest.raises(ConfigurationError, match="site 'west': expected one of north, south"):
            renew(consortium, names=["west"])
    assert PASSPHRASE not in repr(consortium) and "PrivateKey" not in repr(consortium)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('sites = ["a"]\n[coordinator]\nhosts = ["x"]', ["name: expected a value"]),
        ('name = "f"\nsites = []\n[coordinator]\nhosts = ["x"]', ["sites: expected at least 1"]),
        ('name = "f"\nsites = ["a", "A"]\n[coordinator]\nhosts = ["x"]', ["sites: expected every site once"]),
        ('name = "f"\nsites = ["../a"]\n[coordinator]\nhosts = ["x"]', ["sites: expected names of letters", "'../a'"]),
        ('name = "f"\nsites = ["a.zip"]\n[coordinator]\nhosts = ["x"]', ["do not end in .zip"]),
        ('name = "f"\nquorum = 2\nsites = ["a"]\n[coordinator]\nhosts = ["x"]', ["quorum: expected at most 1", "got 2"]),
        ('name = "f"\nsites = ["a"]\n[coordinator]\nhosts = []', ["coordinator.hosts: expected at least 1"]),
        ('name = "f"\nsites = ["a"]\n[coordinator]\nhosts = ["https://x"]', ["coordinator.hosts", "without scheme"]),
        ('name = "f"\nsites = ["a"]\n[coordinator]\nhosts = ["x"]\nport = 0', ["coordinator.port"]),
        ('name = "f"\nsites = ["a"]\n[coordinator]\nhosts = ["x"]\nport = 8480', ["expected two ports, got 8480"]),
        ('name = "f"\nsites = ["a"]\n[coordinator]\nhost = "x"', ["coordinator.host: unknown key (did you mean 'hosts'?)"]),
        ('name = "f"\nsites = ["a"]\n[coordinator]\nhosts = ["x"]\n[certificates]\nsite_days = 0', ["certificates.site_days"]),
    ],
)
def test_a_wrong_federation_file_is_told_by_key(tmp_path: Path, text: str, fragments: list[str]) -> None:
    (tmp_path / "federation.toml").write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        FederationFile.load(tmp_path / "federation.toml")
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


def test_the_resolved_federation_file_says_the_same(tmp_path: Path) -> None:
    provisioned(tmp_path)
    assert FederationFile.load(tmp_path / "coordinator" / kit.FEDERATION) == federation()


@pytest.mark.parametrize("host", ["*.example.org", "a..b", "-a.org", "a_b", "10.0.0.256", "x" * 64, "", "a b", "x:8443", "fe80::1%eth0"])
def test_a_host_that_no_certificate_can_name_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="expected DNS names or IP addresses"):
        check_host(host)


@pytest.mark.parametrize(
    ("host", "same"), [("A.Example.org", "a.example.org"), ("0::1", "::1"), ("localhost", "localhost"), ("10.1.2.3", "10.1.2.3")]
)
def test_a_host_has_one_form(host: str, same: str) -> None:
    assert check_host(host) == same

"""`wardround provision|renew|revoke`."""

import getpass
import os
import secrets
import string
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.options import DebugOption, JsonOption
from wardround.plural import plural

if TYPE_CHECKING:
    from server.federation_file import FederationFile
    from server.provisioning import Provisioned
    from shared.kit import SiteRequest

PASSPHRASE_VARIABLE = "WARDROUND_CA_PASSPHRASE"

FederationArgument = Annotated[Path, typer.Argument(metavar="FEDERATION", help="The coordinator's federation.toml.", show_default=False)]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder of the CA and the kits; made where absent.")]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase-file", metavar="FILE", help=f"A file whose first line opens the CA; else ${PASSPHRASE_VARIABLE}, or asked."),
]


def provision(
    federation: FederationArgument,
    out: OutOption = Path("kits"),
    approve: Annotated[
        list[Path] | None, typer.Option("--approve", metavar="REQUEST", help="A site's request.json to put on the roster; repeat for several.")
    ] = None,
    fingerprint: Annotated[
        list[str] | None, typer.Option("--fingerprint", metavar="HEX", help="What the site read out over the phone; one for each --approve.")
    ] = None,
    with_keys: Annotated[bool, typer.Option("--with-keys", help="Make the keys of new sites here and put them into their kits.")] = False,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a federation: its CA, the coordinator's kit and a kit for every site; or approve the requests of sites. Run it again at any time."""
    from server.federation_file import FederationFile
    from server.provisioning import open_consortium
    from server.provisioning import provision as provision_consortium
    from shared.kit import SiteRequest

    file = FederationFile.load(federation)
    requests = [SiteRequest.read(path) for path in approve or []]
    if fingerprint:
        _check_fingerprints(requests, fingerprint)
    with open_consortium(file, out, passphrase=_passphrase(out, passphrase_file, may_be_new=True)) as consortium:
        outcome = provision_consortium(consortium, requests=requests, with_keys=with_keys)
    _print(outcome, requests, units=_write_units(outcome.coordinator_kit, file), as_json=as_json)


def renew(
    federation: FederationArgument,
    out: OutOption = Path("kits"),
    site: Annotated[list[str] | None, typer.Option("--site", metavar="NAME", help="Extend only this site; repeat for several.")] = None,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Issue a new server certificate with a new key, extend the sites, and write their kits anew."""
    from server.federation_file import FederationFile
    from server.provisioning import open_consortium
    from server.provisioning import renew as renew_consortium

    file = FederationFile.load(federation)
    with open_consortium(file, out, passphrase=_passphrase(out, passphrase_file, may_be_new=False)) as consortium:
        outcome = renew_consortium(consortium, names=site or [])
    _print(outcome, [], as_json=as_json)


def revoke(
    federation: FederationArgument,
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site's name.", show_default=False)],
    out: OutOption = Path("kits"),
    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Kept in the roster.")] = None,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take a site off the roster. Its keys are never approved again; the name may come back with new ones."""
    from server.federation_file import FederationFile
    from server.provisioning import open_consortium
    from server.provisioning import revoke as revoke_site

    file = FederationFile.load(federation)
    with open_consortium(file, out, passphrase=_passphrase(out, passphrase_file, may_be_new=False)) as consortium:
        outcome = revoke_site(consortium, site, reason=reason)
    _print(outcome, [], as_json=as_json)


def _check_fingerprints(requests: "list[SiteRequest]", given: list[str]) -> None:
    """Raise unless what was read out is what the requests have. What they have is not told: it would be copied, and no phone called."""
    from shared.errors import KitError

    if len(given) != len(requests):
        raise KitError(
            f"--fingerprint: expected one for each --approve, got {len(given)} for {plural(len(requests), 'request')}", "give all of each, in quotes"
        )
    plain = [text.replace(" ", "").replace(":", "").lower() for text in given]
    foreign = [request.site for request in requests if request.fingerprint not in plain]
    if foreign:
        raise KitError(
            f"--fingerprint: what was read out is not the fingerprint of the request of {', '.join(foreign)}",
            "do not approve: call the site at a number that you know, let it read out what 'wardround site init KIT' shows, and if that differs, "
            "ask for its request in another way",
        )


def _passphrase(out: Path, file: Path | None, *, may_be_new: bool) -> str:
    """The CA's passphrase: from the file, the environment or the terminal; for a new CA with none of them a random one, which is shown."""
    from server.provisioning import has_authority
    from shared.errors import ConfigurationError, UsageError

    new = not has_authority(out)
    if new and not may_be_new:
        raise ConfigurationError(f"{out}: expected a provisioned federation, found no CA", "run 'wardround provision' first, or correct --out")
    if file is not None:
        return _first_line(file)
    if os.environ.get(PASSPHRASE_VARIABLE):
        return os.environ[PASSPHRASE_VARIABLE]
    if sys.stdin.isatty():
        return _ask(new=new)
    if not new:
        raise UsageError(
            f"{out}: expected the passphrase of its CA, got none", f"give --passphrase-file, set {PASSPHRASE_VARIABLE}, or run it on a terminal"
        )
    return _random_passphrase()


def _first_line(file: Path) -> str:
    from shared.errors import ConfigurationError

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file}: the passphrase could not be read ({type(error).__name__})", "check the path and its permissions") from None
    line = text.partition("\n")[0].rstrip("\r")
    if not line:
        raise ConfigurationError(f"{file}: expected the passphrase in the first line, got an empty one", "write it there")
    if file.is_file() and file.stat().st_mode & 0o077:
        typer.echo(f"WARN {file} can be read by other users of this machine; change it to mode 0600", err=True)
    return line


def _ask(*, new: bool) -> str:
    from shared.errors import UsageError

    if not new:
        return getpass.getpass("passphrase of the CA: ")
    first = getpass.getpass("a passphrase for the new CA (empty: one is made): ")
    if not first:
        return _random_passphrase()
    if getpass.getpass("again: ") != first:
        raise UsageError("the two passphrases differ", "run it again")
    return first


def _random_passphrase() -> str:
    """A passphrase of 141 random bits, shown once, before anything is made with it."""
    passphrase = "-".join("".join(secrets.choice(string.ascii_lowercase) for _ in range(5)) for _ in range(6))
    typer.echo(
        f"passphrase of the new CA: {passphrase}\n  write it down and keep it apart from this machine: it is shown only now, and nothing", err=True
    )
    typer.echo("  can be approved, renewed or revoked without it", err=True)
    return passphrase


def _write_units(kit: Path, file: "FederationFile") -> str:
    """Where the texts for an administrator are, or why they could not be made: nothing hangs on them."""
    from server.installation import write_coordinator_units
    from shared.errors import ConfigurationError

    try:
        return f"to keep it running (systemd, Compose, nginx): {write_coordinator_units(kit, file)}"
    except ConfigurationError as error:
        return f"no systemd, Compose or nginx file was written: {error.what}; {error.remedy}"


def _print(outcome: "Provisioned", requests: "list[SiteRequest]", *, units: str = "", as_json: bool) -> None:
    """What the federation's folder holds now, for people, and as an envelope where asked."""
    from shared.certificates import grouped
    from wardround.cli.output import console, print_envelope, table

    terminal = console(as_json=as_json)
    rows = [[site.name, site.status, f"{site.expires:%Y-%m-%d}", str(site.kit)] for site in outcome.sites]
    terminal.print(table(f"generation {outcome.generation}", ["site", "status", "expires", "kit"], rows))
    terminal.print(f"\ncoordinator's kit: {outcome.coordinator_kit}", markup=False)
    if units:
        terminal.print(units, markup=False)
    terminal.print(f"CA fingerprint (compare it with every site over the phone):\n  {grouped(outcome.ca_fingerprint)}")
    for request in requests:
        terminal.print(f"request of {request.site} (compare it with the site over the phone):\n  {grouped(request.fingerprint)}")
    for warning in outcome.warnings:
        terminal.print(f"WARN {warning}", style="yellow", markup=False)
    if as_json:
        print_envelope(
            {
                "generation": outcome.generation,
                "ca_fingerprint": outcome.ca_fingerprint,
                "sites": [
                    {"name": site.name, "status": site.status, "expires": site.expires.isoformat(), "kit": str(site.kit), "zip": f"{site.kit}.zip"}
                    for site in outcome.sites
                ],
                "coordinator_kit": str(outcome.coordinator_kit),
                "requests": [{"site": request.site, "fingerprint": request.fingerprint} for request in requests],
                "warnings": list(outcome.warnings),
            }
        )

"""For a hospital's or coordinator's IT security: engine, ports, TLS, certificates, versions with hashes, audit anchors, and what is stored where.

Facts come from the run's folder and, where that lies in a coordinator's kit, from the kit. What is not recorded there is said to be absent.
"""

import hashlib
import importlib.metadata
import json
import platform
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from server.federation_file import FederationFile
from server.submissions import AUDIT
from shared.audit import verify_audit
from shared.certificates import fingerprint_of, read_certificate
from shared.errors import AuditError, DataMissingError, StorageError
from shared.files import storage_errors
from shared.kit import CA_CERTIFICATE, FEDERATION, MANIFEST, ROSTER, RUNS, SERVER_CERTIFICATE, STATE, KitManifest, Roster, read_manifest
from shared.view import View
from wardround.quiet import SILENCED
from wardround.report.document import NAMES, Block, Bullets, Document, Facts, Grid, Heading, Prose, Section
from wardround.report.model_file import read_final_model
from wardround.report.run_files import RunFiles
from wardround.report.summary import SIMULATION_ENGINES, banners
from wardround.report.tables import Cell, Row, Table
from wardround.report.task_facts import read_task_facts
from wardround.report.wording import DASH, count

WITNESS_HEADS = Path("witness") / "heads.json"  # in a coordinator's state, as server.witness writes it
REHEARSAL_HEADS = Path(".witness") / "heads.json"  # beside a rehearsal's runs
CONTENTS = {
    "run.json": "with what the run began",
    "study.toml": "the study as resolved",
    "submission.json": "when it was submitted, and how far it is",
    "rounds.jsonl": "a line a round: sites, metrics, epsilon",
    "result.json": "the result: sizes, metrics, epsilon",
    "privacy.json": "the claim sheet",
    "evaluation.json": "evaluation statistics, summed over sites",
    "attacks.json": "what attacks measured",
    "log.jsonl": "the log",
    "model": "model parameters",
    "checkpoint": "model and strategy after the last complete round",
    "ledgers": "a simulation's privacy accounts; they end with the run",
}
EC_AUTHENTICATION = ("auth-any", "auth-ecdsa")  # of OpenSSL's names: TLS 1.3, and the suites of TLS 1.2 for a certificate with an EC key
PARTLY = "its code is linked, not installed: the record covers little of it"
SIMULATED = "Absent: this was a simulation. It ran in {where}; no site, no certificate and no key took part."
ELSEWHERE = (
    "Absent: this folder is a copy, away from the coordinator’s kit, which holds it. There: wardround report KIT/runs/RUN --for it-security, with the "
    "names of kit and run."
)


def it_security_document(run: RunFiles) -> Document:
    """The report for IT security.

    Raises:
        StorageError: a file of the run or of the kit around it cannot be read.
        KitError: the kit is damaged or was altered.
    """
    kit = kit_around(run.folder)
    sections = (
        Section(id="engine", title="What ran", blocks=_engine(run)),
        Section(id="network", title="Ports and addresses", blocks=_network(run, kit)),
        Section(id="tls", title="TLS", blocks=_tls(run, kit)),
        Section(id="certificates", title="Certificates and keys", blocks=_certificates(run, kit)),
        Section(id="identity", title="Study, task and model by hash", blocks=_identity(run)),
        Section(id="versions", title="Versions with hashes", blocks=_versions(run)),
        Section(id="telemetry", title="Telemetry", blocks=_telemetry()),
        Section(id="audit", title="Audit anchors", blocks=_audit(run, kit)),
        Section(id="stored", title="What is stored where", blocks=_stored(run, kit)),
    )
    return Document(
        reader="it-security",
        eyebrow="report for IT security",
        title=run.result.study,
        subtitle=run.result.task_title,
        run=run.result.run,
        lead=_lead(run, kit),
        banners=tuple(banners(run)),
        sections=sections,
        tags=(run.result.outcome, f"engine {run.result.engine}"),
    )


def kit_around(folder: Path) -> Path | None:
    """The coordinator's kit in whose runs this run's folder lies; None where it lies elsewhere."""
    runs = folder.resolve().parent
    return runs.parent if runs.name == RUNS and (runs.parent / MANIFEST).is_file() else None


def _simulated(run: RunFiles) -> bool:
    return run.result.engine in SIMULATION_ENGINES


def _lead(run: RunFiles, kit: Path | None) -> str:
    if _simulated(run):
        return "A simulation: virtual hospitals on one machine or cluster. What a federation of hospitals would need is named below as absent."
    if kit is None:
        return "A deployment, seen from a copy of its run: what the coordinator’s kit holds is absent here."
    return f"A deployment of {len(run.result.sites)} hospitals, seen from the coordinator’s kit: the hospitals’ own machines are not looked at."


def _absent(run: RunFiles) -> Prose:
    where = (
        "one process and its children on one machine"
        if run.result.engine == "in-process"
        else "processes of a Ray cluster, whose ports and keys are Ray’s own"
    )
    return Prose(text=SIMULATED.format(where=where) if _simulated(run) else ELSEWHERE, css="absent-part")


def _engine(run: RunFiles) -> tuple[Block, ...]:
    result = run.result
    words = {
        "in-process": "in-process: coordinator and virtual sites in one process and its children; nothing listens, nothing dials out",
        "ray": "Ray: virtual sites on a Ray cluster, which opens ports of its own",
        "flower": "Flower: a SuperLink on the coordinator’s loopback behind a front door, and at each hospital a courier that dials out",
    }
    facts = [
        ("Engine", words.get(result.engine, result.engine)),
        ("Outcome", result.outcome),
        ("Rounds completed", f"{result.rounds_completed:,} of {run.study.rounds.count:,}"),
        ("Sites", f"{len(result.sites):,}"),
        ("Privacy noise", _noise(run)),
    ]
    return (Facts(pairs=tuple(facts)),)


def _noise(run: RunFiles) -> str:
    if run.result.privacy.unit == "none":
        return "none: the study asked for no privacy"
    if run.result.privacy.seeded_noise:
        return "seeded: it can be drawn again, and protects nobody"
    if run.result.privacy.unit == "site":
        return "the coordinator’s alone, from its operating system, and forgotten"
    whose = "each site’s share from its own operating system, and forgotten; a sum has the whole noise" if View.of(run.study).shared else ""
    return (whose or "from each site’s operating system, and forgotten") + ("; the coordinator’s likewise" if run.result.privacy.site_level else "")


# Network and keys ---------------------------------------------------------------------------------------------------------------


def _network(run: RunFiles, kit: Path | None) -> tuple[Block, ...]:
    if kit is None:
        return (_absent(run),)
    file, manifest = FederationFile.load(kit / FEDERATION), read_manifest(kit)
    place = file.coordinator
    rows = (
        _row("Front door", str(place.port), place.listen, "sites, by HTTPS: ten paths of Flower’s Fleet API, and /health"),
        _row("Page and status", str(place.page_port), "127.0.0.1", "people on this machine"),
        _row("SuperLink and its own", "chosen at start", "127.0.0.1", "the coordinator’s own processes"),
        _row(
            "A hospital",
            "none",
            DASH,
            f"opens no port; dials {manifest.coordinator.hosts[0]}:{manifest.coordinator.port}, by HTTPS, through a proxy where one is set",
        ),
    )
    grid = Grid(table=Table(heads=("Port", "Address", "For whom"), rows=rows), caption="What listens", corner="What", css="left-cells")
    return (
        grid,
        Facts(pairs=(("Names and addresses of the coordinator", ", ".join(place.hosts)), ("Quorum", f"{file.quorum} of {len(file.sites)} sites"))),
    )


def _row(name: str, *cells: str) -> Row:
    return Row(name=name, cells=tuple(Cell(text=text) for text in cells))


def _tls(run: RunFiles, kit: Path | None) -> tuple[Block, ...]:
    if kit is None:
        return (_absent(run),)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # as server.front_door makes its own
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    usable = [cipher for cipher in context.get_ciphers() if cipher["auth"] in EC_AUTHENTICATION]
    ciphers = tuple(f"{cipher['name']} ({cipher['protocol']})" for cipher in usable)
    facts = (
        ("Least version", "TLS 1.2; renegotiation off; HTTP/1.1 alone by ALPN"),
        ("Trust of a site", "the consortium’s CA of its kit, and no other"),
        (
            "Below TLS",
            "every task is signed by the coordinator, and every answer by its site (Ed25519): TLS may end at a proxy, and nothing can be altered",
        ),
        ("Library", f"{ssl.OPENSSL_VERSION}, Python {platform.python_version()}, of the machine that made this report"),
    )
    note = "Which cipher a connection took is not recorded. With the library above and the coordinator’s EC key, these can be:"
    return (Facts(pairs=facts), Prose(text=note, css="note"), Bullets(items=ciphers))


def _certificates(run: RunFiles, kit: Path | None) -> tuple[Block, ...]:
    if kit is None:
        return (_absent(run),)
    manifest = read_manifest(kit)
    certificates = (("CA of the consortium", CA_CERTIFICATE), ("Coordinator’s TLS server", SERVER_CERTIFICATE))
    rows = tuple(_certificate_row(title, read_certificate(kit / name)) for title, name in certificates)
    heads = ("Names", "Valid from", "Valid until", "Key", "SHA-256 fingerprint")
    return (
        Grid(table=Table(heads=heads, rows=rows), caption="Certificates, times in UTC", corner="Certificate", css="left-cells"),
        Facts(pairs=_kit_facts(manifest)),
        *_roster(kit),
    )


def _certificate_row(title: str, certificate: x509.Certificate) -> Row:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        text = ", ".join(str(name.value) for name in names)
    except x509.ExtensionNotFound:
        text = certificate.subject.rfc4514_string()
    key = certificate.public_key()
    kind = f"{type(key).__name__.removesuffix('PublicKey').lstrip('_')} {getattr(key, 'key_size', '')}".strip()
    cells = (
        Cell(text=text),
        Cell(text=_day(certificate.not_valid_before_utc), css="date"),
        Cell(text=_day(certificate.not_valid_after_utc), css="date", mark="expired" if certificate.not_valid_after_utc < datetime.now(UTC) else ""),
        Cell(text=kind),
        Cell(text=fingerprint_of(certificate), css="hash"),
    )
    return Row(name=title, cells=cells)


def _kit_facts(manifest: KitManifest) -> tuple[tuple[str, str], ...]:
    return (
        ("Federation", manifest.federation),
        ("Kit made", f"{_moment(manifest.created)}, by wardround {manifest.wardround_version}; signed by the CA, and the signature verifies"),
        ("Kit expires", _moment(manifest.expires)),
        ("Coordinator’s signing key (Ed25519)", manifest.coordinator.signing_key),
    )


def _roster(kit: Path) -> list[Block]:
    path = kit / ROSTER
    if not path.is_file():
        return [Prose(text="The kit has no roster yet: no site was approved.", css="absent-part")]
    roster = Roster.read(path, kit / CA_CERTIFICATE)
    now = datetime.now(UTC)
    rows = tuple(
        Row(
            name=site.name,
            cells=(
                Cell(
                    text="revoked" if site.revoked else "active" if site.is_active(now) else "expired", css="loss" if not site.is_active(now) else ""
                ),
                Cell(text=_day(site.approved), css="date"),
                Cell(text=_day(site.revoked or site.expires), css="date"),
                Cell(text=site.signing_key, css="hash"),
                Cell(text=hashlib.sha256(site.node_key.encode()).hexdigest(), css="hash"),
            ),
        )
        for site in roster.sites
    )
    heads = ("State", "Approved", "Ends or ended", "Signing key (Ed25519)", "Node key, SHA-256 of its line")
    caption = f"Roster, generation {roster.generation}, signed by the CA: sites have keys and no certificate"
    return [Grid(table=Table(heads=heads, rows=rows), caption=caption, css="left-cells")]


# Identities and versions ---------------------------------------------------------------------------------------------------------


def _identity(run: RunFiles) -> tuple[Block, ...]:
    model, task = read_final_model(run.folder), read_task_facts(run)
    missing = "absent: the run has no final model"
    return (
        Facts(
            pairs=(
                ("Study hash (SHA-256)", run.study.fingerprint()),
                ("Study hash in the model’s header", model.header.get("study_hash", "absent") if model else missing),
                ("Task fingerprint (SHA-256)", task.fingerprint if task.fingerprint else f"absent: {task.why_absent}"),
                ("Architecture hash in the model’s header", model.header.get("architecture", "absent") if model else missing),
                ("Final model (SHA-256)", model.sha256 if model else missing),
                ("Final model, size", f"{model.num_bytes:,} bytes, {model.num_parameters:,} numbers" if model else missing),
            )
        ),
    )


def _versions(run: RunFiles) -> tuple[Block, ...]:
    versions = run.claim.versions if run.claim else {}
    if not versions:
        return (Prose(text="Absent: the run wrote no versions down.", css="absent-part"),)
    rows = tuple(Row(name=name, cells=(Cell(text=version), _package_hash(name, version))) for name, version in versions.items())
    note = "The hash is that of the package’s RECORD, which lists each installed file with its own hash, on the machine that made this report."
    return (
        Grid(
            table=Table(heads=("Version of the run", "SHA-256 of RECORD"), rows=rows, note=note),
            caption="Packages that the promise rests on",
            corner="Package",
            css="left-cells",
        ),
    )


def _package_hash(name: str, version: str) -> Cell:
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return Cell(text="absent: not installed here", css="absent")
    if package.version != version:
        return Cell(text=f"absent: {package.version} is installed here", css="absent")
    record = package.read_text("RECORD")
    if record is None:
        return Cell(text="absent: installed without a record", css="absent")
    linked = "dir_info" in (package.read_text("direct_url.json") or "")
    return Cell(text=hashlib.sha256(record.encode()).hexdigest(), below=PARTLY if linked else "", css="hash")


def _telemetry() -> tuple[Block, ...]:
    text = "Off, before the libraries are imported, in every process that the command line starts:"
    return (Prose(text=text), Bullets(items=tuple(f"{name}={value}" for name, value in SILENCED.items())))


# Audit and storage ---------------------------------------------------------------------------------------------------------------


def _audit(run: RunFiles, kit: Path | None) -> tuple[Block, ...]:
    heads = (kit / STATE / WITNESS_HEADS) if kit else run.folder.resolve().parent / REHEARSAL_HEADS
    blocks: list[Block] = [Heading(text="Coordinator’s audit log"), _absent(run) if kit is None else _log_facts(kit)]
    blocks.append(Heading(text="Last rows of the sites’ ledgers, as the coordinator saw them"))
    known = _heads(heads)
    if known:
        rows = tuple(Row(name=name, cells=(Cell(text=head, css="hash"),)) for name, head in sorted(known.items()))
        blocks.append(Grid(table=Table(heads=("SHA-256",), rows=rows), caption="A ledger that lacks its row is refused", css="left-cells"))
    elif _simulated(run):
        blocks.append(
            Prose(text="Absent: a simulation’s ledgers are born in the run’s folder and end with it; their files are below.", css="absent-part")
        )
    else:
        blocks.append(Prose(text="Absent: the coordinator remembers none here.", css="absent-part"))
    return tuple(blocks)


def _log_facts(kit: Path) -> Block:
    path = kit / STATE / AUDIT
    try:
        summary = verify_audit(path, public_key=read_manifest(kit).coordinator.signing_key)
    except DataMissingError:
        return Prose(text="Absent: the coordinator has not begun its log.", css="absent-part")
    except AuditError as error:
        return Prose(text=f"The log does not verify: {error}", css="statement protects-not")
    return Facts(
        pairs=(
            ("Rows", f"{summary.num_rows:,}, each chained and signed; all verify with the key that the kit names"),
            ("Head (SHA-256 of the last row)", summary.head),
            ("First and last row", f"{summary.first_time} to {summary.last_time}"),
            ("Public key (Ed25519)", summary.public_key),
            ("Check it again", "wardround audit verify KIT --against LOG, with the log of a site"),
        )
    )


def _heads(path: Path) -> dict[str, str]:
    with storage_errors(path, "read"):
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise StorageError(f"{path}: expected the heads of the sites’ ledgers, got a damaged file", "restore it from backup") from None
    return {str(name): str(head) for name, head in found.items()} if isinstance(found, dict) else {}


def _stored(run: RunFiles, kit: Path | None) -> tuple[Block, ...]:
    with storage_errors(run.folder, "read"):
        files = sorted(path for path in run.folder.rglob("*") if path.is_file() and not _is_own(path, run.folder))
        rows = tuple(_file_row(path, run.folder) for path in files)
    grid = Grid(
        table=Table(heads=("What", "Bytes", "SHA-256"), rows=rows, note="Without the reports themselves."),
        caption="Files of the run",
        corner="File",
        css="left-cells",
    )
    places = [
        ("The run’s folder", "the files below; no patient’s record is in any of them"),
        ("A hospital", "patients, site.toml with the policy, keys (0600), approvals, ledger, audit log, updates that may be asked for again"),
    ]
    if kit is not None:
        places.insert(
            1,
            (
                "The coordinator’s kit",
                "certificates, TLS and signing keys (0600), roster; in state/: audit log, heads of the sites’ ledgers, Flower’s database",
            ),
        )
        places.append(("The consortium’s CA", "its key, encrypted, in no kit"))
    return (Facts(pairs=tuple(places)), grid)


def _is_own(path: Path, folder: Path) -> bool:
    """Whether it is a report, which is written anew, or something hidden."""
    return path.name.startswith(".") or (path.parent == folder and path.stem in NAMES.values())


def _file_row(path: Path, folder: Path) -> Row:
    relative = path.relative_to(folder)
    content = path.read_bytes()
    cells = (
        Cell(text=CONTENTS.get(relative.parts[0], DASH)),
        Cell(text=count(len(content))),
        Cell(text=hashlib.sha256(content).hexdigest(), css="hash"),
    )
    return Row(name=relative.as_posix(), cells=cells)


def _day(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d}"


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"

"""A hospital takes up its kit: unpack it, make its own keys, describe its cohort, and ask to be put on the roster.

A kit comes from outside. A zip is looked through before anything is written, and nothing of it is kept that the CA did not sign; a kit never
brings a policy, and never replaces a key. What the site has made itself (keys, site.toml, state) is never overwritten.
"""

import io
import json
import os
import stat
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client.policy import SiteFile
from shared import kit
from shared.certificates import (
    fingerprint_of,
    load_node_key,
    load_signing_key,
    make_folder,
    new_node_key,
    node_key_bytes,
    node_key_text,
    read_bytes,
    read_certificate,
    replace_secret,
    signing_key_bytes,
    signing_key_text,
)
from shared.config import validate
from shared.errors import DataError, DataMissingError, KitError, WardroundError
from shared.files import storage_errors, write_atomic, write_secret
from shared.kit import KitManifest, SiteRequest, installed_version, verify_kit
from shared.task import resolve_task

MAX_MEMBERS, MAX_TOTAL_BYTES = 100, 10_000_000  # of a zip
_ENCRYPTED = 0x1  # flag bit of a zip's member
Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteAnswers:
    """What a site says of itself; None: not said."""

    data: Path | None = None
    task: str | None = None
    declared_size: int | None = None
    declared_test_size: int | None = None
    epsilon: float | None = None
    options: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """The options that a site file needs and that were not given."""
        needed = {"--data": self.data, "--task": self.task, "--declared-size": self.declared_size, "--epsilon": self.epsilon}
        return [option for option, value in needed.items() if value is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenUp:
    """A kit that its site has taken up."""

    folder: Path
    manifest: KitManifest
    ca_fingerprint: str
    request: SiteRequest
    site_file: Path | None  # None: only an example was written
    notes: tuple[str, ...]


def unpack_kit(archive: Path, folder: Path, *, now: datetime | None = None) -> KitManifest:
    """The kit in the zip `archive`, verified and then written to `folder`, over an older kit of the same site where there is one.

    Raises:
        KitError: a member would escape, is a link, encrypted, double, too many or too large, or is not signed; or `folder` holds another kit.
        StorageError: the folder cannot be written.
    """
    files = _read_zip(archive)
    with storage_errors(folder, "unpack the kit"), tempfile.TemporaryDirectory(prefix="wardround-kit-") as scratch:  # mode 0700
        for name, content in files.items():
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            write_secret(Path(scratch) / name, content)
        manifest = verify_kit(Path(scratch), now=now)
    unsigned = sorted(set(files) - set(manifest.files) - {kit.MANIFEST, kit.SIGNATURE})
    if unsigned:
        raise KitError(f"{archive}: expected only files that {kit.MANIFEST} lists, got {unsigned[0]!r}", kit.ASK_AGAIN)
    _check_replaceable(folder, manifest, files)
    make_folder(folder)
    for name in (*manifest.files, kit.MANIFEST, kit.SIGNATURE):  # what names the files comes last
        _place(folder / name, files[name], secret=name in kit.SECRETS)
    return manifest


def _read_zip(archive: Path) -> dict[str, bytes]:
    """Path -> content of every file in a zip that passes the checks."""
    size = archive.stat().st_size if archive.is_file() else 0
    if size > 2 * MAX_TOTAL_BYTES:
        raise KitError(f"{archive}: expected at most {MAX_TOTAL_BYTES} bytes, got {size}", kit.ASK_AGAIN)
    try:
        with storage_errors(archive, "read", remedy="check the path and its permissions"):
            content = archive.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            _check_members(archive, opened.infolist())
            files = {member.filename: opened.read(member) for member in opened.infolist() if not member.is_dir()}  # never more than it says
            if any(len(files[member.filename]) != member.file_size for member in opened.infolist() if not member.is_dir()):
                raise zipfile.BadZipFile
            return files
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error) as error:
        raise KitError(f"{archive}: not a zip, or damaged ({type(error).__name__})", kit.ASK_AGAIN) from None


def _check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_MEMBERS:
        raise KitError(f"{archive}: expected at most {MAX_MEMBERS} members, got {len(members)}", kit.ASK_AGAIN)
    total = sum(member.file_size for member in members)
    if total > MAX_TOTAL_BYTES:
        raise KitError(f"{archive}: expected at most {MAX_TOTAL_BYTES} bytes unpacked, got {total}", kit.ASK_AGAIN)
    seen: set[str] = set()
    for member in members:
        fault = _fault_of(member, seen)
        if fault is not None:
            raise KitError(f"{archive}: member {member.orig_filename[:80]!r}: {fault}", "do not use this file; ask the coordinator for the kit again")
        seen.add(member.filename.rstrip("/").casefold())


def _fault_of(member: zipfile.ZipInfo, seen: set[str]) -> str | None:
    """Why a member may not be unpacked; None where it may."""
    name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
    parts = PurePosixPath(name).parts
    if name != member.filename or not name.isprintable() or "\\" in name or ":" in name:
        return "its name has characters that a kit's never has"
    if name.startswith("/") or ".." in parts or not parts:
        return "it would escape from the folder"
    if name.rstrip("/") != "/".join(parts):
        return "its name is not in its plain form"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "it is a link or a device, not a plain file"
    if member.flag_bits & _ENCRYPTED:
        return "it is encrypted"
    if name.rstrip("/").casefold() in seen:
        return "its name is there twice"
    return None


def _check_replaceable(folder: Path, manifest: KitManifest, files: Mapping[str, bytes]) -> None:
    """Raise unless `folder` holds no kit, or an older one of the same site and CA, and no keys that differ."""
    if (folder / kit.CA_CERTIFICATE).exists() and read_bytes(folder / kit.CA_CERTIFICATE) != files[kit.CA_CERTIFICATE]:
        raise KitError(f"{folder}: holds a kit of another CA", "compare the CA's fingerprint with the coordinator, and unpack into a new folder")
    if (folder / kit.MANIFEST).exists():
        try:
            known = KitManifest.model_validate_json(read_bytes(folder / kit.MANIFEST))
        except ValidationError:
            known = manifest  # damaged: this one mends it
        if (known.federation, known.site) != (manifest.federation, manifest.site):
            raise KitError(f"{folder}: holds the kit of {known.site} in {known.federation}, not of {manifest.site}", "unpack into a new folder")
        if known.generation > manifest.generation:
            raise KitError(f"{folder}: holds generation {known.generation}, newer than {manifest.generation} of the zip", "ask for the newest kit")
    for name in kit.SECRETS & set(manifest.files):
        if (folder / name).exists() and read_bytes(folder / name) != files[name]:
            raise KitError(f"{folder / name}: differs from the key in the zip, and keys are never overwritten", "unpack into a new folder")


def _place(path: Path, content: bytes, *, secret: bool) -> None:
    make_folder(path.parent, secret=secret)
    if secret:
        replace_secret(path, content)
    else:
        write_atomic(path, content)


def init_site(folder: Path, answers: SiteAnswers, *, now: datetime | None = None) -> TakenUp:
    """Take up the kit in `folder`: keys, site.toml (or an example of it) and request.json stand when this returns.

    Raises:
        KitError: the kit does not verify, is the coordinator's, or its keys are damaged.
        ConfigurationError: an answer is wrong.
        DataError: there are no data where they were said to be, or none that the task's loader takes; nothing is written then.
        StorageError: a file cannot be written.
    """
    moment = (now or datetime.now(UTC)).replace(microsecond=0)
    manifest = verify_kit(folder, now=moment)
    if manifest.site is None:
        raise KitError(f"{folder}: expected a site's kit, got the coordinator's", "give the kit of your site")
    site_text = None if answers.missing or (folder / kit.SITE_FILE).exists() else _site_text(folder, manifest.site, answers)
    notes = _make_keys(folder)
    site_file, more = _write_site_file(folder, manifest.site, answers, site_text)
    authority = fingerprint_of(read_certificate(folder / kit.CA_CERTIFICATE))
    declared_size = SiteFile.load(site_file).cohort.declared_size if site_file else answers.declared_size
    request = _write_request(folder, manifest, authority=authority, declared_size=declared_size, now=moment)
    return TakenUp(folder=folder, manifest=manifest, ca_fingerprint=authority, request=request, site_file=site_file, notes=(*notes, *more))


def _make_keys(folder: Path) -> list[str]:
    """Both keys are in the folder, for its owner alone; what was there stays. What had to be done is told."""
    notes = []
    with storage_errors(folder / kit.KEYS, "make the site's keys"):
        make_folder(folder / kit.KEYS, secret=True)
        made = [name for name in (kit.NODE_KEY, kit.SIGNING_KEY) if not (folder / name).exists()]
        if kit.NODE_KEY in made:
            write_secret(folder / kit.NODE_KEY, node_key_bytes(new_node_key()))
        if kit.SIGNING_KEY in made:
            write_secret(folder / kit.SIGNING_KEY, signing_key_bytes(Ed25519PrivateKey.generate()))
        for name in (kit.NODE_KEY, kit.SIGNING_KEY):
            if stat.S_IMODE(os.stat(folder / name).st_mode) & 0o077:  # a kit unpacked by hand
                os.chmod(folder / name, 0o600)
                notes.append(f"{name} could be read by other users of this machine; now only by its owner")
    return [*notes, f"made {' and '.join(made)}: this site's identity; back it up, and never send it"] if made else notes


def _write_site_file(folder: Path, name: str, answers: SiteAnswers, text: str | None) -> tuple[Path | None, list[str]]:
    """The site file, and what there is to say; where answers are missing, an example and None."""
    path = folder / kit.SITE_FILE
    if path.exists():
        differ = _differences(folder, SiteFile.load(path), answers)
        told = f": {'; '.join(differ)}: what is there counts, edit the file to change it" if differ else ""
        return path, [f"{path} is there and was left as it is{told}"]
    if text is not None:
        write_atomic(path, text)
        return path, []
    example = folder / kit.SITE_EXAMPLE
    write_atomic(example, _render(name, answers, cohort="", metrics=()))
    return None, [f"{', '.join(answers.missing)} not given: fill in {example} and save it as {path}, or run init again with them"]


def _differences(folder: Path, file: SiteFile, answers: SiteAnswers) -> list[str]:
    """Every answer that was given and is not what the site file says."""
    cohort, policy = file.cohort, file.policy
    found = [
        f"{key} is {there} there, {given} was given"
        for key, there, given in (
            ("declared_size", cohort.declared_size, answers.declared_size),
            ("declared_test_size", cohort.declared_test_size, answers.declared_test_size),
            ("max_epsilon", policy.max_epsilon, answers.epsilon),
            ("options", dict(cohort.options), dict(answers.options) or None),
        )
        if given is not None and given != there
    ]
    if answers.data is not None and (folder / cohort.path).resolve() != answers.data.resolve():
        found.insert(0, f"path is {cohort.path} there, {answers.data} was given")
    if answers.task is not None and not {resolve_task(answers.task).name, _as_studies_say(answers.task)} & set(policy.allowed_tasks):
        found.append(f"allowed_tasks is {', '.join(policy.allowed_tasks)} there, {answers.task} was given")
    return found


def check_cohort(task: str, data: Path, options: Mapping[str, Scalar]) -> None:
    """Return where the task's own loader takes these data, as the site would open them in a round; nothing of them is kept.

    Raises:
        ConfigurationError: there is no such task, or its loader has no such option.
        DataError: there are no data, or they do not fit; the loader's own words.
    """
    if not data.exists():
        raise DataMissingError(f"{data}: expected data, found nothing", "check the path given with --data")
    try:
        resolve_task(task).load_cohort(data, dict(options))
    except WardroundError:
        raise
    except Exception as error:  # another's loader: its text may hold a patient's value
        raise DataError(
            f"{data}: the loader of task {task} failed with {type(error).__name__}", "check that these are the task's data, and the --option values"
        ) from None


def _site_text(folder: Path, name: str, answers: SiteAnswers) -> str:
    """The text of a site file with these answers, none of them missing, checked as it will be when it is read."""
    assert answers.data is not None and answers.task is not None
    data, root = answers.data.resolve(), folder.resolve()
    cohort = str(data.relative_to(root)) if data.is_relative_to(root) else str(data)
    task = resolve_task(answers.task)
    text = _render(name, answers, cohort=cohort, metrics=tuple(metric.name for metric in task.metrics), task=_as_studies_say(answers.task))
    validate(SiteFile, tomllib.loads(text), "what was given for site.toml")
    check_cohort(answers.task, answers.data, answers.options)
    return text


def _as_studies_say(task: str) -> str:
    """A task as a study names it, which is what a site compares before it imports anything: a schema file by its full path."""
    return str(Path(task).resolve()) if task.endswith(".toml") else task


def _render(name: str, answers: SiteAnswers, *, cohort: str, metrics: tuple[str, ...], task: str | None = None) -> str:
    """A site file with a word on every line; the lines of missing answers are comments."""
    task = task or answers.task
    lines = [
        "# What this hospital has, and what it allows. This file belongs to the hospital and outranks every study.",
        f"name = {_quote(name)}",
        'state = "state"                # ledger, keys of the ledger, audit log: keep it and back it up',
        "",
        "[cohort]",
        _line("path", cohort or (str(answers.data.resolve()) if answers.data else None), "file or folder; relative to this file, or absolute"),
        _line("declared_size", answers.declared_size, "training patients, rounded: public, and what noise and weight come from"),
        _line("declared_test_size", answers.declared_test_size or 0, "test patients, rounded"),
    ]
    if answers.options:
        lines += [
            "[cohort.options]                # of the task's loader",
            *(f"{_quote(key)} = {_quote(value)}" for key, value in answers.options.items()),
        ]
    return "\n".join(
        [
            *lines,
            "",
            "[policy]",
            _line("max_epsilon", answers.epsilon, "privacy budget of this cohort, over all studies together"),
            _line("max_delta", 1e-4, "and its delta"),
            _line("allowed_tasks", [task] if task else None, "clinical problems that may be studied"),
            _line("allowed_metrics", list(metrics) if metrics else None, "statistics that may leave: with noise, charged to the budget"),
            _line("exact_metrics", False, "true: a private study's statistics may leave without noise"),
            _line("min_patients", 20, "smallest training cohort that may take part"),
            _line("min_metric_patients", 20, "fewest test patients for which statistics may leave"),
            _line("allow_no_privacy", False, "true: studies without privacy may be accepted"),
            "",
        ]
    )


def _line(key: str, value: Scalar | list[str] | None, comment: str) -> str:
    text = f"# {key} =" if value is None else f"{key} = {_quote(value)}"
    return f"{text:<30}  # {comment}"


def _quote(value: Scalar | list[str]) -> str:
    """A TOML value; JSON's texts, numbers and lists are TOML's, but for the delete character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_request(folder: Path, manifest: KitManifest, *, authority: str, declared_size: int | None, now: datetime) -> SiteRequest:
    """request.json says what is so; one that does already is left as it is."""
    assert manifest.site is not None
    keys = load_node_key(folder / kit.NODE_KEY), load_signing_key(folder / kit.SIGNING_KEY)
    request = SiteRequest(
        federation=manifest.federation,
        site=manifest.site,
        ca_fingerprint=authority,
        node_key=node_key_text(keys[0].public_key()),
        signing_key=signing_key_text(keys[1]),
        declared_size=declared_size,
        wardround_version=installed_version(),
        created=now,
    )
    known = _known_request(folder / kit.REQUEST)
    if known is not None and known.says_the_same(request):
        return known
    request = request.signed(*keys)
    write_atomic(folder / kit.REQUEST, request.content())
    return request


def _known_request(path: Path) -> SiteRequest | None:
    try:
        return SiteRequest.read(path)
    except KitError:  # missing, or damaged: made anew
        return None

"""`wardround site check`: is this hospital fit to take part? Every question is put to the real thing, and says what to do where the answer is no.

"Healthy" is a site that the coordinator lets in and whose data can be read, with nothing found that would stop a study. What needs torch or Flower
is imported inside its check, so that a broken installation is found and not fatal.
"""

import functools
import importlib
import importlib.metadata
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from client import reaching
from client.confinement import COURIER_USER, describe_confinement, landlock_abi, reachable_services
from client.findings import Check, Finding, NotLookedAtError, failed, failure_of, passed, run_check, run_checks, warned
from client.policy import LEDGERS, Policy, SiteFile
from shared.certificates import load_signing_key, signing_key_text
from shared.config import nearest
from shared.errors import ConfigurationError, DataMissingError, KitError, NotApprovedError, WardroundError
from shared.files import storage_errors
from shared.kit import KEYS, SIGNING_KEY, SITE_FILE, KitManifest, read_manifest, verify_kit

LEAST_PYTHON, FLOWER = (3, 11), "1.41."
PACKAGES = ("flwr", "torch", "opacus")
WARN_FREE_BYTES, LEAST_FREE_BYTES = 2_000_000_000, 200_000_000
HIGH_EPSILON = 20.0  # beyond it the promise says little
NUM_STEP_PATIENTS = 32
FALLBACK_TASK = "breast-cancer"
NODE, COHORT, CLOCK = "node", "cohort", "clock"  # names of checks; the first two are what "healthy" hangs on
VANISHING = ("tmpfs", "ramfs", "overlay", "overlayfs", "aufs")  # kinds of file systems that may end with the machine or container


class Subject:
    """What is known of the site whose kit is in the folder `kit`; each part is read once."""

    def __init__(self, kit: Path) -> None:
        self.kit = kit

    @functools.cached_property
    def manifest(self) -> KitManifest:
        """Of the kit, whatever its dates and files.

        Raises:
            NotLookedAtError: it cannot be read.
        """
        try:
            return read_manifest(self.kit)
        except WardroundError:
            raise NotLookedAtError("the kit cannot be used") from None

    @functools.cached_property
    def file(self) -> SiteFile:
        """The site's own.

        Raises:
            NotLookedAtError: it does not fit.
        """
        try:
            return SiteFile.load(self.kit / SITE_FILE)
        except WardroundError:
            raise NotLookedAtError(f"{SITE_FILE} cannot be used") from None

    @property
    def state(self) -> Path:
        """The folder of all that the site remembers; it need not be there yet."""
        return self.kit / self.file.state

    @property
    def coordinator(self) -> reaching.Coordinator:
        """Where the kit says that it is."""
        return reaching.Coordinator.of(self.manifest, self.kit)

    @functools.cached_property
    def health(self) -> reaching.Health | None:
        """What the coordinator tells; None where it does not answer, of which other checks tell why."""
        try:
            return reaching.ask_health(self.coordinator, check_dates=False)
        except WardroundError:
            return None

    @property
    def was_let_in(self) -> bool:
        """Whether the coordinator has ever asked this site anything."""
        log = self.state / "audit.jsonl"
        return log.exists() and b'"event":"task received"' in log.read_bytes()


def check_site(kit: Path) -> Iterator[Finding]:
    """What there is to find, as it is found. A clock that is off comes before all else: much of what follows hangs on it."""
    subject = Subject(kit)
    of_clock = list(run_check(CLOCK, lambda: reaching.clock(reaching.looked_at(subject.health))))
    first = any(finding.level == "FAIL" for finding in of_clock)
    if first:
        yield from of_clock
    for name, check in _checks(subject):
        if name == CLOCK:
            yield from [] if first else of_clock
        else:
            yield from run_check(name, check)


def why_not_healthy(findings: Iterable[Finding]) -> list[str]:
    """The checks that keep a site from being healthy: every FAIL, and whatever keeps it from being let in; none: it is healthy."""
    return list(
        dict.fromkeys(finding.check for finding in findings if finding.level == "FAIL" or (finding.check == NODE and finding.level != "PASS"))
    )


def _checks(subject: Subject) -> list[tuple[str, Check]]:
    """In the order in which they are told."""
    return [
        ("python", python),
        ("packages", packages),
        ("kit", lambda: _kit(subject.kit)),
        ("site.toml", lambda: _site_file(subject)),
        ("certificates", lambda: reaching.certificates(subject.manifest, subject.kit, subject.health)),
        (CLOCK, lambda: []),
        ("name", lambda: reaching.name(subject.coordinator)),
        ("port", lambda: reaching.port(subject.coordinator)),
        ("proxy", lambda: reaching.proxy(subject.coordinator, subject.health)),
        ("tls", lambda: reaching.tls(subject.coordinator)),
        ("version", lambda: reaching.version(reaching.looked_at(subject.health))),
        (NODE, lambda: _node(subject)),
        ("state", lambda: state_folder(subject.state)),
        ("disk", lambda: free_disk(subject.state)),
        ("permissions", lambda: permissions(subject.kit / KEYS, subject.state)),
        (COHORT, lambda: _cohort(subject)),
        ("ledger", lambda: _ledger(subject)),
        ("audit log", lambda: _audit_log(subject)),
        ("policy", lambda: _policy(subject)),
        ("approvals", lambda: _approvals(subject)),
        ("confinement", lambda: _confinement(subject)),
        ("telemetry", telemetry),
        ("training", lambda: training_step(_task_names(subject)[0])),
    ]


def check_machine(folder: Path) -> Iterator[Finding]:
    """What can be found without a kit; `folder` is where one would be."""
    return run_checks(
        [
            ("python", python),
            ("packages", packages),
            ("disk", lambda: free_disk(folder)),
            ("confinement", machine_confinement),
            ("telemetry", telemetry),
            ("training", lambda: training_step(FALLBACK_TASK)),
        ]
    )


# The installation ---------------------------------------------------------------------------------------------------------------


def python() -> Iterator[Finding]:
    """Python is new enough."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < LEAST_PYTHON:
        yield failed(f"expected Python {'.'.join(map(str, LEAST_PYTHON))} or newer, got {found}", "make the environment anew with a newer Python")
    else:
        yield passed(f"{found} at {sys.executable}")


def packages() -> Iterator[Finding]:
    """What training and messages need can be imported, in the version that is needed."""
    found = {}
    for name in PACKAGES:
        try:
            importlib.import_module(name)
            found[name] = importlib.metadata.version(name)
        except Exception as error:  # a broken binary package raises whatever it likes
            yield failed(f"{name} cannot be imported ({type(error).__name__})", f"pip install --force-reinstall {name}")
    if "flwr" in found and not found["flwr"].startswith(FLOWER):
        yield failed(f"expected flwr {FLOWER}x, got {found['flwr']}", f"pip install 'flwr=={FLOWER}*'")
    elif len(found) == len(PACKAGES):
        own = importlib.metadata.version("wardround")
        yield passed(", ".join(f"{name} {version}" for name, version in {"wardround": own, **found}.items()))


def telemetry() -> Iterator[Finding]:
    """Neither Flower nor Ray reports to its makers."""
    loud = [name for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED") if os.environ.get(name) != "0"]
    if loud:
        yield failed(f"not switched off: {', '.join(loud)}", "start wardround by its own command, which switches it off")
    else:
        yield passed("off, here and in all that wardround starts")


def training_step(task_name: str) -> Iterator[Finding]:
    """One real differentially private step on synthetic patients of the task, and the model is another one afterwards."""
    import torch

    from client.local_training import LocalRound
    from client.private_training import Randomness, train_round_private
    from shared.plan import SitePlan
    from shared.study import Study
    from shared.task import resolve_task

    task = resolve_task(task_name)
    study = Study.from_table({"name": "check", "task": task_name, "privacy": {"epsilon": 1.0, "delta": 1e-5}})
    size = NUM_STEP_PATIENTS
    plan = SitePlan(unit="patient", declared_size=size, sample_rate=1.0, steps_per_round=1, expected_batch_size=float(size), rounds=1,
                    noise_multiplier=1.0, max_grad_norm=1.0)  # fmt: skip
    model, started = task.model(), time.monotonic()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    cohort, local = task.synthetic_cohort(size, 0), LocalRound(study=study, task=task, round_number=1)
    train_round_private(model, cohort, local, plan=plan, randomness=Randomness.from_key(os.urandom(32)))
    after = [parameter.detach() for parameter in model.parameters()]
    if not all(bool(torch.isfinite(value).all()) for value in after) or all(
        torch.equal(one, other) for one, other in zip(before, after, strict=True)
    ):
        yield failed("a private step left the model unchanged or not finite", "see that torch and opacus are sound: reinstall them")
        return
    num_parameters = sum(value.numel() for value in after)
    yield passed(f"a private step of task {task.name}: {size} synthetic patients, {num_parameters:,} parameters, {time.monotonic() - started:.2f} s")


def machine_confinement() -> Iterator[Finding]:
    """What a courier on this machine would be confined by."""
    kind, abi = describe_confinement(COURIER_USER), landlock_abi()
    if kind == "none":
        yield warned(
            "neither Landlock nor another system user for a courier", f"use Linux 5.13 or newer with Landlock, or make the user {COURIER_USER} once"
        )
    else:
        yield passed(f"a courier would be confined by {kind}" + (f" (Landlock ABI {abi})" if abi else ""))


# Kit, node and folders ----------------------------------------------------------------------------------------------------------


def _kit(kit: Path) -> Iterator[Finding]:
    """Hashes, signature, generation; and that the site has taken it up."""
    manifest = verify_kit(kit)
    if manifest.site is None:
        raise KitError(f"{kit}: expected a site's kit, got the coordinator's", "give the folder of this site's kit; or run 'wardround doctor' on it")
    yield passed(f"{manifest.site} in {manifest.federation}, generation {manifest.generation}: signed, {len(manifest.files)} files as they should be")
    if not (kit / SIGNING_KEY).exists() or not (kit / SITE_FILE).exists():
        raise KitError(f"{kit}: not taken up: it lacks keys or {SITE_FILE}", f"run 'wardround site init {kit}'")
    load_signing_key(kit / SIGNING_KEY)


def _site_file(subject: Subject) -> Iterator[Finding]:
    """It fits, and is of the same site."""
    path = subject.kit / SITE_FILE
    if not path.exists():
        raise NotLookedAtError(f"there is no {SITE_FILE}")
    file = SiteFile.load(path)
    if file.name != subject.manifest.site:
        raise ConfigurationError(f"{path}: name: expected {subject.manifest.site!r}, as in the kit, got {file.name!r}", "correct this key")
    yield passed(f"{file.cohort.declared_size} training and {file.cohort.declared_test_size} test patients declared")


def _node(subject: Subject) -> Iterator[Finding]:
    reaching.looked_at(subject.health)
    return reaching.node(subject.coordinator, subject.state, was_let_in=subject.was_let_in)


def state_folder(state: Path) -> Iterator[Finding]:
    """It can be written to, survives, and is on a file system that lasts."""
    with storage_errors(state, "write to the state folder", remedy="correct 'state' in site.toml, or the permissions of that folder"):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=state, prefix=".check-") as file:
            file.write(b"check")
            file.flush()
            os.fsync(file.fileno())
        folder = os.open(state, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    kind = file_system_of(state)
    if kind in VANISHING:
        yield warned(
            f"{state} is on {kind}, which may be gone with the machine or container", "keep the kit on a disk, or in a volume: the ledger is in it"
        )
    else:
        yield passed(f"{state}: written, and on the disk ({kind})")


def file_system_of(path: Path) -> str:
    """The kind of the file system that holds `path`, as /proc/self/mountinfo names it."""
    found, depth, real = "unknown", -1, path.resolve()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, after = line.partition(" - ")
        mounted = Path(fields.split()[4].encode().decode("unicode_escape"))
        if real.is_relative_to(mounted) and len(mounted.parts) >= depth:
            found, depth = after.split()[0], len(mounted.parts)
    return found


def free_disk(folder: Path) -> Iterator[Finding]:
    """There is room for what a study writes."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    what, fix = f"{free / 1e9:.1f} GB free at {there}", "free some space"
    if free < LEAST_FREE_BYTES:
        yield failed(f"{what}: too little for a ledger to be safe", fix)
    elif free < WARN_FREE_BYTES:
        yield warned(what, fix)
    else:
        yield passed(what)


def permissions(keys: Path, state: Path) -> Iterator[Finding]:
    """Nobody but their owner reads keys and state."""
    folders = [folder for folder in (keys, state) if folder.is_dir()]
    files = [path for path in (*keys.glob("*.key"), state / "patient-hash.key") if path.is_file()]
    wide = [(path, "700") for path in folders if _mode(path) & 0o077] + [(path, "600") for path in files if _mode(path) & 0o077]
    for path, mode in wide:
        yield failed(f"{path} may be read by others (mode {_mode(path):04o})", f"chmod {mode} {path}")
    foreign = [path for path in (*folders, *files) if path.stat().st_uid not in (os.geteuid(), 0)]
    if foreign and os.geteuid() != 0:
        yield warned(f"{foreign[0]} belongs to another user", "start the site as its owner")
    if not wide:
        yield passed(f"keys and state are their owner's alone ({len(files)} secrets)")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# What the hospital has ----------------------------------------------------------------------------------------------------------


def _task_names(subject: Subject) -> Sequence[str]:
    return subject.file.policy.allowed_tasks


def _cohort(subject: Subject) -> Iterator[Finding]:
    """It can be read, fits every allowed task, and has about the size that was declared. Counts alone are told."""
    from shared.cohort import TEST_FRACTION
    from shared.task import resolve_task

    declared = subject.file.cohort
    for name in _task_names(subject):
        task = resolve_task(name)
        try:
            cohort = task.load_cohort(subject.kit / declared.path, dict(declared.options))
        except WardroundError as error:
            yield failure_of(error)
            continue
        training = _num_training(subject, cohort) or round((1 - TEST_FRACTION) * cohort.num_patients)
        what = f"{cohort.num_patients} patients, {cohort.num_records} records fit task {task.name}"
        if not cohort.num_patients:
            yield failed(f"no patients for task {task.name}", "correct [cohort] path in site.toml", exit_code=5)
        elif not 0.75 * training <= declared.declared_size <= 1.25 * training:
            yield warned(
                f"{what}; about {training} to train on, but {declared.declared_size} declared",
                "correct [cohort] declared_size: noise and weight use it",
            )
        else:
            yield passed(f"{what}; {declared.declared_size} declared to train on")


def _num_training(subject: Subject, cohort: object) -> int | None:
    """How many train, once the key that splits them was made."""
    from client.keys import site_key
    from shared.cohort import Cohort, held_out_patients

    assert isinstance(cohort, Cohort)
    if not (subject.state / "patient-hash.key").exists():
        return None
    return int((~held_out_patients(cohort, site_key(subject.state), published=False)).sum())


def _ledger(subject: Subject) -> Iterator[Finding]:
    """Every row verifies, and is signed with this site's key."""
    from client.keys import check_ledger_key
    from client.ledger import check_there, reading

    path = subject.file.ledger_path(subject.kit / SITE_FILE)
    try:
        check_there(path)
    except DataMissingError:
        others = sorted(other.stem for other in (subject.state / LEDGERS).glob("*.sqlite"))
        yield (
            warned(f"none of this name; there are ledgers of {', '.join(others)}", "a renamed cohort keeps its former name")
            if others
            else passed("none yet: nothing was spent")
        )
        return
    with reading(path) as ledger:
        check_ledger_key(subject.kit / SITE_FILE, ledger)
        yield passed(f"{ledger.num_rows} rows verify, every one signed by this site")


def _audit_log(subject: Subject) -> Iterator[Finding]:
    """Every line verifies, and is signed with this site's key."""
    from shared.audit import verify_audit

    key = signing_key_text(load_signing_key(subject.kit / SIGNING_KEY))
    try:
        found = verify_audit(subject.state / "audit.jsonl", public_key=key)
    except DataMissingError:
        yield passed("none yet: it is begun when the site starts")
        return
    yield passed(f"{found.num_rows} rows verify, every one signed by this site")


def _policy(subject: Subject) -> Iterator[Finding]:
    """It allows what it seems to mean to allow, and no more."""
    file = subject.file
    policy, size = file.policy, file.cohort.declared_size
    found = []
    if policy.min_patients > size:
        found.append(failed(f"min_patients = {policy.min_patients} is above declared_size = {size}: every study is refused", "lower it", exit_code=3))
    found += [warned(what, fix) for what, fix in (*_loose(policy, size), *_idle(file), *_unknown_metrics(policy))]
    yield from found
    if not found:
        budget = f"epsilon {policy.max_epsilon:g} at delta {policy.max_delta:g}"
        yield passed(f"{budget} over all studies; tasks: {', '.join(policy.allowed_tasks)}")


def _loose(policy: Policy, size: int) -> Iterator[tuple[str, str]]:
    """What allows much."""
    if policy.max_epsilon > HIGH_EPSILON:
        yield (
            f"max_epsilon = {policy.max_epsilon:g} is above {HIGH_EPSILON:g}: so large a budget promises patients little",
            "lower it, unless it is meant",
        )
    if policy.max_delta * size >= 1:
        yield (
            f"max_delta = {policy.max_delta:g} is not below 1/{size}: publishing one patient outright would be allowed",
            f"set it below {1 / size:.1g}",
        )
    if policy.allow_site_unit:
        yield (
            "allow_site_unit = true: a study that sends the coordinator updates without noise may be approved",
            "set it to false, unless one is meant",
        )
    if policy.allow_no_privacy:
        yield "allow_no_privacy = true: a study without any noise may be approved", "set it to false, unless such a study is meant"
    if policy.exact_metrics:
        yield "exact_metrics = true: statistics of private studies may leave without noise", "set it to false, unless it is meant"


def _idle(file: SiteFile) -> Iterator[tuple[str, str]]:
    """What has no effect, or another than it seems."""
    policy, advance = file.policy, file.approve_in_advance
    if policy.allowed_metrics and file.cohort.declared_test_size < policy.min_metric_patients:
        yield (
            f"declared_test_size = {file.cohort.declared_test_size} is below min_metric_patients = {policy.min_metric_patients}: no metric leaves",
            "declare the test patients, or clear allowed_metrics",
        )
    if advance is not None and advance.until < datetime.now(UTC).date():
        yield f"approve_in_advance ended on {advance.until}", "extend or remove it"
    if advance is not None and (foreign := set(advance.tasks) - set(policy.allowed_tasks)):
        yield f"approve_in_advance names {', '.join(sorted(foreign))}, which allowed_tasks does not", "make them agree"


def _unknown_metrics(policy: Policy) -> Iterator[tuple[str, str]]:
    from shared.task import resolve_task

    known = sorted({metric.name for name in policy.allowed_tasks for metric in resolve_task(name).metrics})
    for name in policy.allowed_metrics:
        if name not in known:
            yield f"allowed_metrics: no metric {name!r}{nearest(name, known)}", f"known: {', '.join(known)}"


def _approvals(subject: Subject) -> Iterator[Finding]:
    """Every approval is as it was signed; which of them hold."""
    from client.approvals import Approvals, installed_code_hash

    approvals = Approvals(subject.state, load_signing_key(subject.kit / SIGNING_KEY))
    given, pending, found = approvals.given(), approvals.pending(), []
    for approval in given:
        study = approval.asked.study
        try:
            approvals.check(approval.asked)
        except NotApprovedError as error:
            expired = error.rule == "approval.expired"
            found.append(warned(error.what, "approve it again, or withdraw it") if expired else failure_of(error))
            continue
        if approval.asked.code_hash != installed_code_hash():
            found.append(warned(f"study {study} was approved for another installation of wardround", "approve it again when it is asked for"))
    yield from found
    if not found:
        waiting = f"; {len(pending)} wait to be decided: 'wardround site approve {subject.kit}'" if pending else ""
        yield passed(f"{len(given)} studies approved{waiting}")


def _confinement(subject: Subject) -> Iterator[Finding]:
    """The process that faces the network cannot reach cohort, ledger and keys."""
    kind, accepted = describe_confinement(COURIER_USER), subject.file.policy.accept_unconfined_courier
    fix = (
        f"use Linux 5.13 or newer with Landlock, or have an administrator run {subject.kit / 'units' / 'courier-user.sh'} and start the site as root"
    )
    if kind == "none" and accepted:
        yield warned("the courier runs unconfined, as accept_unconfined_courier in [policy] accepts", fix)
    elif kind == "none":
        yield failed("nothing confines the courier: neither Landlock nor another system user", fix)
    elif kind == "user" and (open_to_all := _readable_by_all(subject.kit / subject.file.cohort.path)):
        yield failed(f"the courier is another user, and every user may read {open_to_all}", f"chmod o-rwx {open_to_all}")
    else:
        yield passed(f"the courier is confined by {kind}")
    for path in reachable_services():
        yield warned(
            f"{path} starts programs for whoever connects as this user: it would undo the courier's confinement",
            "start the site as a user without it",
        )


def _readable_by_all(path: Path) -> Path | None:
    """The path, or a file just below it, where every user of the machine may read it."""
    real = path.resolve()
    if any(not _mode(folder) & 0o001 for folder in real.parents):
        return None
    return next((item for item in (real, *(real.iterdir() if real.is_dir() else ())) if _mode(item) & 0o004), None)

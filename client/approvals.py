"""The hospital's word: a site trains the studies that somebody there has approved, and no other.

What is asked is shown before it is approved, and the approval is a signed record of exactly that: study, task, model, code and budget, until a
day. A study changed by one letter has another hash, an upgraded installation another code hash; both must be approved anew. `site.toml` may
approve in advance by task and budget.
"""

import functools
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AwareDatetime, Field, ValidationError

import client
import shared
from client.policy import AdvanceApproval, SiteFile
from shared.config import Model, Settings
from shared.errors import NotApprovedError, StorageError
from shared.files import json_text, storage_errors, write_atomic
from shared.study import Study
from shared.view import View

if TYPE_CHECKING:  # who reads what was approved need not wait for torch
    from shared.task import Task

APPROVALS, ASKED = "approvals", "asked"  # folders in a site's state
MAX_ASKED = 100  # studies that wait to be decided at once
SITE_LEVEL_LINE = (
    "each round's mean leaves the coordinator clipped and noised by site, if the coordinator keeps to the study; this site cannot check it"
)
MASKED_SITE_LEVEL_LINE = "this site clips its update before it masks it; each round's mean leaves the coordinator noised by site, if it keeps to the study, which this site cannot check"
REMEDY = "the hospital decides: 'wardround site approve KIT STUDY'"


class Asked(Settings):
    """What a study asks of a site, as the people who decide are shown it."""

    study: str
    study_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    purpose: str
    task: str
    task_fingerprint: str
    architecture: str = Field(description="hash of the model's architecture")
    num_parameters: int
    code_hash: str = Field(description="of the installed code that would run: rooms client and shared")
    rounds: int
    unit: str
    epsilon: float | None
    noise_multiplier: float | None
    delta: float | None
    evaluation_epsilon: float | None
    leaves: tuple[str, ...] = Field(strict=False, description="what would leave the site, line by line")

    @property
    def promise(self) -> str:
        """The budget in words."""
        if self.unit == "none":
            return "NO PRIVACY: no noise is added"
        if self.unit == "site":
            return f"NO PRIVACY FOR PATIENTS against the coordinator, for updates leave without noise; against everybody else {self._budget}"
        return self._budget

    @property
    def _budget(self) -> str:
        """As the study names it."""
        asked = f"epsilon {self.epsilon:g}" if self.epsilon is not None else f"noise multiplier {self.noise_multiplier:g}"
        return f"{asked} for each {self.unit}" + (f" at delta {self.delta:g}" if self.delta is not None else "")


class Approval(Settings):
    """A signed yes to what was asked, until `expires`."""

    asked: Asked
    approved: AwareDatetime
    expires: AwareDatetime
    by: str = Field(max_length=100, description="who said yes")
    signature: str = Field(default="", pattern=r"^[0-9a-f]*$")

    def statement(self) -> bytes:
        """What the site signs."""
        return b"wardround approval\n" + json.dumps(self.model_dump(mode="json", exclude={"signature"}), sort_keys=True).encode()


def what_is_asked(study: Study, task: "Task", file: SiteFile) -> Asked:
    """What this study would do at the site of this site file."""
    from shared.models import get_parameters
    from shared.task import architecture_hash

    model = task.model()
    parameters = get_parameters(model)
    privacy = study.privacy
    return Asked(
        study=study.name,
        study_hash=study.fingerprint(),
        purpose=study.purpose,
        task=task.name,
        task_fingerprint=task.fingerprint(),
        architecture=architecture_hash(model),
        num_parameters=sum(value.size for value in parameters.values()),
        code_hash=installed_code_hash(),
        rounds=study.rounds.count * study.evaluation.folds,
        unit=privacy.unit,
        epsilon=privacy.epsilon,
        noise_multiplier=privacy.noise_multiplier,
        delta=privacy.delta,
        evaluation_epsilon=privacy.evaluation_epsilon,
        leaves=tuple(_leaves(study, task, file, num_bytes=sum(value.nbytes for value in parameters.values()))),
    )


def _leaves(study: Study, task: "Task", file: SiteFile, *, num_bytes: int) -> list[str]:
    view = View.of(study)
    lines = [
        "once: the declared numbers of training and test patients in site.toml",
        f"in each of {study.rounds.count * study.evaluation.folds} rounds: an update of the model, {num_bytes:,} bytes, {view.in_short}; what was spent; a hash of the ledger",
    ]
    if view.remark:
        lines.append(view.remark)
    if study.site_level:
        lines.append(SITE_LEVEL_LINE if study.secure_aggregation is None else MASKED_SITE_LEVEL_LINE)
    exact = study.private and not study.noised_statistics
    for name in sorted({metric.statistic.name for metric in task.metrics}):
        rule = file.policy.withholds(task, name, num_test=file.cohort.declared_test_size, exact=exact)
        metrics = ", ".join(metric.name for metric in task.metrics if metric.statistic.name == name)
        when = "once, with the final model, with noise" if study.noised_statistics else "in each round, exact"
        lines.append(f"nothing of {metrics}: {rule}" if rule else f"{when}: sums over test patients for {metrics}")
    return lines


@functools.cache
def installed_code_hash() -> str:
    """SHA-256 (hex) over the installed Python files of the rooms that touch patients."""
    digest = hashlib.sha256()
    for room in (client, shared):
        assert room.__file__ is not None
        folder = Path(room.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{room.__name__}/{path.relative_to(folder)}\n{len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


class Approvals:
    """The approvals of one site, in its state folder, and what it was asked for and has not decided.

    Args:
        signer: the site's key.
        advance: what site.toml approves in advance.
    """

    def __init__(self, state: Path, signer: Ed25519PrivateKey, advance: AdvanceApproval | None = None) -> None:
        self._state = state
        self._signer = signer
        self._advance = advance

    def approve(self, asked: Asked, *, by: str, expires: datetime, now: datetime | None = None) -> Approval:
        """A durable, signed yes."""
        approval = Approval(asked=asked, approved=now or datetime.now(UTC), expires=expires, by=by)
        signed = approval.model_copy(update={"signature": self._signer.sign(approval.statement()).hex()})
        self._write(APPROVALS, asked.study_hash, signed.model_dump(mode="json"))
        self._path(ASKED, asked.study_hash).unlink(missing_ok=True)
        return signed

    def withdraw(self, study_hash: str) -> bool:
        """Take a yes back, from the next task on; False where there was none."""
        path = self._path(APPROVALS, study_hash)
        there = path.exists()
        with storage_errors(path, "withdraw an approval", remedy="check the permissions of the state folder"):
            path.unlink(missing_ok=True)
        return there

    def remember(self, asked: Asked) -> None:
        """Keep what was asked, for somebody to decide; not more than `MAX_ASKED` studies, for a coordinator could ask without end."""
        if sum(1 for _ in (self._state / ASKED).glob("*.json")) >= MAX_ASKED:
            return
        self._write(ASKED, asked.study_hash, asked.model_dump(mode="json"))

    def pending(self) -> list[Asked]:
        """What was asked for and not decided.

        Raises:
            StorageError: one is damaged.
        """
        return [_read(Asked, path) for path in sorted((self._state / ASKED).glob("*.json"))]

    def given(self) -> list[Approval]:
        """All approvals, of whatever day.

        Raises:
            StorageError: one is damaged.
        """
        return [_read(Approval, path) for path in sorted((self._state / APPROVALS).glob("*.json"))]

    def check(self, asked: Asked, *, now: datetime | None = None) -> str:
        """Return how this very study is approved, in a few words.

        Raises:
            NotApprovedError: it is not; the rule says why.
        """
        now = now or datetime.now(UTC)
        path = self._path(APPROVALS, asked.study_hash)
        if path.exists():
            approval = _read(Approval, path)
            self._check_signed(approval, path)
            if approval.asked != asked:
                changed = ", ".join(name for name in Asked.model_fields if getattr(approval.asked, name) != getattr(asked, name))
                raise _refusal(f"study {asked.study}: expected what was approved, got another {changed}", "approval.altered")
            if now >= approval.expires:
                raise _refusal(f"study {asked.study}: its approval expired on {approval.expires:%Y-%m-%d}", "approval.expired")
            return f"approved by {approval.by}"
        if self._approved_in_advance(asked, now):
            return "approved in advance"
        raise _refusal(f"study {asked.study}: expected an approval of this site, found none", "approval.missing")

    def _approved_in_advance(self, asked: Asked, now: datetime) -> bool:
        advance = self._advance
        if advance is None or asked.unit in ("none", "site") or asked.task not in advance.tasks or now.date() > advance.until:
            return False
        budgets = [budget for budget in (asked.epsilon, asked.evaluation_epsilon) if budget is not None]
        return asked.epsilon is not None and max(budgets) <= advance.max_epsilon

    def _check_signed(self, approval: Approval, path: Path) -> None:
        try:
            self._signer.public_key().verify(bytes.fromhex(approval.signature), approval.statement())
        except (InvalidSignature, ValueError):
            raise _refusal(f"{path}: expected an approval signed with this site's key, got another", "approval.altered") from None

    def _write(self, folder: str, study_hash: str, content: object) -> None:
        path = self._path(folder, study_hash)
        with storage_errors(path, "write", remedy="check free space and permissions of the state folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json_text(content))

    def _path(self, folder: str, study_hash: str) -> Path:
        return self._state / folder / f"{study_hash}.json"


def _read(model: type[Model], path: Path) -> Model:
    what = "an approval" if model is Approval else "what a study asks"
    try:
        with storage_errors(path, f"read {what}", remedy="check the permissions of the state folder"):
            return model.model_validate_json(path.read_bytes())
    except ValidationError:
        raise StorageError(f"{path}: expected {what}, got a damaged file", "delete it and approve the study again") from None


def _refusal(what: str, rule: str) -> NotApprovedError:
    return NotApprovedError(what, REMEDY, rule=rule)

"""What a hospital is asked to approve, and what it would cost: a study is found by name, hash or file, and held against what is left of the budget."""

import getpass
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from client.account import AccountName
from shared.errors import ConfigurationError, DataMissingError, PolicyRefusedError, UsageError
from shared.privacy import (
    MIN_NOISE_MULTIPLIER,
    PrivacyEvent,
    epsilon_of,
    evaluation_noise_multiplier,
    filter_order,
    renyi_budget,
    renyi_divergence,
    solve_noise_multiplier,
)
from shared.study import SHORT_HASH, Study, parse_duration

if TYPE_CHECKING:
    from client.approvals import Approval, Asked
    from client.hospital import Hospital
    from shared.audit import AuditLog
    from wardround.spending import Spending

AUDIT_APPROVED, AUDIT_WITHDRAWN = "study approved by hand", "study approval withdrawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """About what a study would take of one account's budget; each number is an epsilon that one further study could have."""

    account: str  # "training" | "test"
    before: float
    after: float | None  # None: it does not fit
    asks: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A study to decide on.

    Attributes:
        approval: the approval that it has already, expired or not.
        remarks: what whoever decides should know beside what is asked.
    """

    asked: "Asked"
    approval: "Approval | None" = None
    remarks: tuple[str, ...] = ()


def find_question(hospital: "Hospital", name: str, *, asked: "Sequence[Asked]", given: "Sequence[Approval]") -> Question:
    """The study of this name, hash (or its beginning) or TOML file.

    Raises:
        UsageError: none or several are meant.
        ConfigurationError: the file does not fit, or leaves open what only the coordinator can fill in.
    """
    if name.endswith(".toml") or Path(name).is_file():
        return _of_file(hospital, Path(name), given)
    approved = {approval.asked.study_hash: approval for approval in given}
    known = {approval.asked.study_hash: approval.asked for approval in given} | {item.study_hash: item for item in asked}
    found = [item for item in known.values() if item.study == name or (re.fullmatch("[0-9a-f]{4,64}", name) and item.study_hash.startswith(name))]
    if len(found) > 1:  # what waits to be decided is meant, where that is one
        found = [item for item in found if item in asked] if sum(item in asked for item in found) == 1 else found
    if len(found) == 1:
        return Question(asked=found[0], approval=approved.get(found[0].study_hash))
    listed = ", ".join(f"{item.study} ({item.study_hash[:SHORT_HASH]})" for item in (found or known.values()))
    if found:
        raise UsageError(f"{name!r}: expected one study, got {len(found)}: {listed}", "give the beginning of its hash")
    raise UsageError(
        f"{name!r}: no study of this name or hash was asked for{': there are ' + listed if listed else ''}",
        "wait until the coordinator asks, or give the study's TOML file",
    )


def _of_file(hospital: "Hospital", path: Path, given: "Sequence[Approval]") -> Question:
    from client.approvals import what_is_asked
    from shared.plan import shape_site
    from shared.task import resolve_task

    study = as_deployed(Study.load(path))
    policy = hospital.file.policy
    if study.task not in policy.allowed_tasks:  # before anything is imported by that name
        raise PolicyRefusedError(
            f"policy.allowed_tasks: expected one of {', '.join(policy.allowed_tasks)}, got {study.task!r}", f"add it in {hospital.site_file}"
        )
    if study.private and study.privacy.delta is None:
        raise ConfigurationError(
            f"{path}: privacy.delta: expected a value, for the coordinator derives it from all sites' sizes, got none",
            "approve the study when the coordinator asks for it",
        )
    task, remarks = resolve_task(study.task), []
    try:
        policy.check(study, task, shape_site(study, hospital.file.cohort.declared_size))
    except PolicyRefusedError as error:
        remarks.append(f"your policy refuses it all the same: {error.what}")
    if study.rounds.require == "all" and study.rounds.on_missing == "proceed":
        remarks.append("rounds.require is 'all': a coordinator with a quorum above 1 changes that, and then asks for another approval")
    asked = what_is_asked(study, task, hospital.file)
    approval = next((item for item in given if item.asked.study_hash == asked.study_hash), None)
    return Question(asked=asked, approval=approval, remarks=tuple(remarks))


def as_deployed(study: Study) -> Study:
    """The study as a coordinator submits it, as far as a study file alone tells."""
    table = {key: value for key, value in study.to_table().items() if key != "federation"}
    return Study.from_table(table).replace(privacy={"noise_source": "os"})


def costs(hospital: "Hospital", asked: "Asked") -> list[Cost]:
    """What the study would take of the cohort's budget, for training and, where its metrics carry noise, for test patients.

    What is asked of a site names the promise and not the noise, so this is as exact as one Gaussian release of the same promise; the ledger is
    exact when the study is enrolled.

    Raises:
        LedgerError, StorageError: the ledger cannot be read.
    """
    if asked.unit in ("none", "site"):  # nothing that the ledger counts
        return []
    wanted: list[tuple[AccountName, float | None]] = [("training", asked.epsilon)]
    if asked.evaluation_epsilon is not None:
        wanted.append(("evaluation", asked.evaluation_epsilon))
    return [_cost(hospital, account, epsilon, asked.delta) for account, epsilon in wanted]


def _cost(hospital: "Hospital", account: AccountName, epsilon: float | None, delta: float | None) -> Cost:
    limit = hospital.file.policy.limit
    order = filter_order(limit.epsilon, limit.delta)
    spent = 0.0
    for spending in _spendings(hospital):
        order = spending.order or order
        if spending.account == account and spending.epsilon_filter:
            spent = renyi_budget(spending.epsilon_filter, order=order, delta=limit.delta)
    budget = renyi_budget(limit.epsilon, order=order, delta=limit.delta)
    before, name = _one_more(budget - spent, order, limit.delta), "training" if account == "training" else "test"
    if epsilon is None or delta is None:
        return Cost(account=name, before=before, after=None, asks=None)
    asks = renyi_divergence(PrivacyEvent(noise_multiplier=_noise(account, epsilon, delta), sample_rate=1.0, steps=1), order)
    if epsilon <= limit.epsilon and delta <= limit.delta:
        asks = min(asks, budget)  # a plan that fits the limit alone gets noise enough to pass its filter alone
    room = budget - spent - asks
    return Cost(account=name, before=before, after=None if room < -1e-9 * budget else _one_more(room, order, limit.delta), asks=epsilon)


def _noise(account: AccountName, epsilon: float, delta: float) -> float:
    if account == "training":
        return solve_noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=1.0, steps=1)
    return evaluation_noise_multiplier(epsilon, delta)


def _spendings(hospital: "Hospital") -> "list[Spending]":
    from wardround.spending import spending_of

    try:
        return spending_of(hospital.site_file, delta=None)
    except DataMissingError:
        return []


def _one_more(room: float, order: float, delta: float) -> float:
    """Epsilon of the one Gaussian release that would take this room."""
    if room <= 1e-12:
        return 0.0
    return epsilon_of([PrivacyEvent(noise_multiplier=max(MIN_NOISE_MULTIPLIER, (order / (2 * room)) ** 0.5), sample_rate=1.0, steps=1)], delta)


# Deciding -----------------------------------------------------------------------------------------------------------------------


def approve(hospital: "Hospital", asked: "Asked", *, by: str, expires: datetime) -> "Approval":
    """A durable, signed yes, which the audit log tells of.

    Raises:
        AuditError, StorageError: it cannot be written down; then nothing is approved.
    """
    from client.approvals import Approvals

    details = {"study": asked.study, "study_hash": asked.study_hash, "by": by, "expires": expires.isoformat(timespec="seconds")}
    _audit(hospital).append(AUDIT_APPROVED, details)
    return Approvals(hospital.state, hospital.signer).approve(asked, by=by, expires=expires)


def withdraw(hospital: "Hospital", asked: "Asked", *, by: str) -> bool:
    """Take a yes back, from the next task on; False where there was none.

    Raises:
        AuditError, StorageError: it cannot be written down; the approval is gone all the same.
    """
    from client.approvals import Approvals

    there = Approvals(hospital.state, hospital.signer).withdraw(asked.study_hash)
    if there:
        _audit(hospital).append(AUDIT_WITHDRAWN, {"study": asked.study, "study_hash": asked.study_hash, "by": by})
    return there


def _audit(hospital: "Hospital") -> "AuditLog":
    from client.hospital import AUDIT
    from shared.audit import AuditLog
    from shared.files import storage_errors

    with storage_errors(hospital.state, "make the site's state"):
        hospital.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    return AuditLog(hospital.state / AUDIT, owner=hospital.name, role="site", signer=hospital.signer)


def login_name() -> str | None:
    """Who is logged in, by name or by number, also behind sudo; None for root, which names nobody."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = f"user {os.getuid()}"
    if name != "root":
        return name
    return name if (name := os.environ.get("SUDO_USER", "root")) != "root" else None


def parse_expiry(text: str, *, now: datetime | None = None) -> datetime:
    """The moment in `--expires`: so long from now, or the end of that day (UTC).

    >>> parse_expiry("180d", now=datetime(2026, 1, 1, tzinfo=UTC)).isoformat()
    '2026-06-30T00:00:00+00:00'

    Raises:
        UsageError: it is neither, or has passed.
    """
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    try:
        days = re.fullmatch(r"([0-9]{1,5})d", text)
        if days:
            moment = now + timedelta(days=int(days[1]))
        elif re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            moment = datetime.combine(date.fromisoformat(text), time(23, 59, 59), tzinfo=UTC)
        else:
            moment = now + timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        raise UsageError(f"--expires: expected a duration or a day, got {text!r}", "for example --expires 180d, or --expires 2027-06-30") from None
    if moment <= now:
        raise UsageError(f"--expires: expected a time to come, got {text!r}", "for example --expires 180d") from None
    return moment

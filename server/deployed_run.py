"""One study in a deployment, from its run folder to its result: what a ServerApp's process does."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from flwr.app import Message, MessageType
from flwr.superlink.grid import HttpGrid

from server.coordinator import Coordinator
from server.live_roster import LiveRoster
from server.mailbox import Mailbox
from server.outcome import RunOutcome, write_outcome
from server.run_folder import RunFolder
from server.sealed_grid import SealedGrid
from server.status import Failure
from server.submissions import AUDIT, COORDINATOR, ENDED, STOP, Ended
from server.witness import Witness
from shared.audit import AuditLog
from shared.errors import StorageError, StudyStoppedError, WardroundError
from shared.files import json_text, storage_errors, write_atomic
from shared.kit import RUNS, SIGNING_KEY, STATE, load_signing_key, verify_kit
from shared.messages import StopTask, encode
from shared.results import Outcome, SiteSummary
from shared.supervision import die_with_parent
from shared.task import resolve_task

WITNESS, RUN_LOCK = "witness", ".lock"
ENGINE = "flower"
STOP_SECONDS = 3.0

logger = logging.getLogger(__name__)


def run_deployed(grid: HttpGrid, run: str) -> None:
    """Run the study in the run folder of this name, from its last checkpoint; its folder says how it ended.

    Raises:
        WardroundError: what stopped it.
    """
    die_with_parent()  # Flower's own watch over it may hang on its way out, and this process would hold the run's lock
    kit = Path(os.environ[COORDINATOR])
    folder = RunFolder.open(kit / RUNS / run)
    torch.set_num_threads(1)
    with _alone(folder), _logging_to(folder):
        try:
            _run(grid, kit, folder)
        except StudyStoppedError:
            _end(folder, Ended(state="stopped"))
        except WardroundError as error:
            logger.error("error %s: %s", error.code, error)
            _end(folder, Ended(state="failed", error=Failure.of(error)))
            raise
        except Exception as error:
            logger.exception("the study's process failed")
            _end(
                folder,
                Ended(state="failed", error=Failure(code="E100", what=f"an unexpected {type(error).__name__}", remedy="see log.jsonl of the run")),
            )
            raise
        else:
            _end(folder, Ended(state="completed"))


def _run(grid: HttpGrid, kit: Path, folder: RunFolder) -> None:
    started = time.monotonic()
    study, state = folder.study, kit / STATE
    task = resolve_task(study.task)
    signer, roster = load_signing_key(kit / SIGNING_KEY), LiveRoster(kit, state)
    audit = AuditLog(state / AUDIT, owner=verify_kit(kit).federation, role="coordinator", signer=signer)
    sealed = SealedGrid(grid, roster, signer=signer, audit=audit, stopped=(folder.path / STOP).exists, mailbox=Mailbox(grid))
    coordinator = Coordinator(study, task, folder, witness=Witness(state / WITNESS), membership=roster)
    audit.append("study begun", {"run": folder.name, "study": study.name, "study_hash": study.fingerprint()})
    outcome: Outcome = "failed"
    try:
        coordinator.run(sealed)
        outcome = "completed"
    except StudyStoppedError:
        outcome = "interrupted"
        _stop_sites(grid, sealed, roster, folder)
        raise
    finally:
        sites = [
            SiteSummary(name=site.name, num_patients=site.declared_num_patients, num_train=site.declared_size, num_test=site.declared_num_test)
            for _, site in sorted(coordinator.history.enrolled.items())
        ]
        result = RunOutcome(study=study, task=task, coordinator=coordinator, folder=folder, engine=ENGINE, sites=sites, seeded_noise=False)
        with contextlib.suppress(StorageError):  # the folder cannot be written: the first error says more
            write_outcome(result, outcome, {}, seconds=time.monotonic() - started)
            audit.append("study ended", {"run": folder.name, "study_hash": study.fingerprint(), "how": outcome})


def _stop_sites(grid: HttpGrid, sealed: SealedGrid, roster: LiveRoster, folder: RunFolder) -> None:
    """Tell every site that the study was stopped; nobody is waited for long, and nobody told what cannot be written down: it is stopped all the same."""
    record = encode(StopTask(run=folder.name, study_hash=folder.study_hash))
    messages = [Message(record, node_id, MessageType.QUERY) for node_id in grid.get_node_ids()]
    try:
        for reply in sealed.until(messages, seconds=STOP_SECONDS):
            logger.info("site %s stopped", roster.name_of(reply.metadata.src_node_id))
    except StorageError as error:
        logger.error("error %s: %s", error.code, error)


def _end(folder: RunFolder, ended: Ended) -> None:
    write_atomic(folder.path / ENDED, json_text(ended.model_dump(mode="json")))


@contextlib.contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """Nobody else works in the run's folder; who still does is waited for a while, since a process that was told to end may take a moment."""
    with storage_errors(folder.path, "lock"), open(folder.path / RUN_LOCK, "w") as file:
        deadline = time.monotonic() + 30
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StorageError(f"{folder.path}: expected to work here alone, found another process at it", "stop that one first") from None
                time.sleep(0.2)
        yield


@contextlib.contextmanager
def _logging_to(folder: RunFolder) -> Iterator[None]:
    """log.jsonl takes what the server's room logs."""
    handler, room = folder.log_handler(), logging.getLogger("server")
    room.addHandler(handler)
    room.setLevel(logging.INFO)
    try:
        yield
    finally:
        room.removeHandler(handler)
        handler.close()

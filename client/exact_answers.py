"""How many different models a run was answered about without noise: no more than the study, as it was approved, has rounds.

A ledger holds back who asks too often for what carries noise. What leaves exactly (statistics that a policy releases so, updates of a study
without privacy) has no price there, and one who may ask about as many models as he likes learns single patients from it. So every model
answered about is written down before the answer leaves; the same question asked again is no new one.
"""

import hashlib
from pathlib import Path

from shared.errors import NotApprovedError
from shared.files import append_line, storage_errors

REMEDY = "the run was repeated in part; submit the study anew, or plan for that with [privacy] spare_rounds"


class ExactAnswers:
    """What was answered exactly, in `folder`: one file a run, a line for each question."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def count(self, run: str, request: str, *, most: int) -> None:
        """Durably count `request` (a hash, in hex) as one of the at most `most` of this run.

        Raises:
            NotApprovedError: there were as many already, and this is another; nothing is written.
            StorageError: it cannot be written; then the answer must not leave either.
        """
        path = self._folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}-exact.txt"
        with storage_errors(path, "count an answer", remedy="check free space and permissions of the state folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
            known = set(path.read_text().split()) if path.exists() else set()
        if request in known:
            return
        if len(known) >= most:
            raise NotApprovedError(
                f"run {run}: expected at most the {most} models of the approved study, got another", REMEDY, rule="approval.rounds"
            )
        append_line(path, request)

"""A round of secure aggregation: its stages one after another, a sum that is begun anew, and what is kept of one that was signed.

Single stages are in `server.sum_stages`, the machine of the protocol is `server.secure_sum`.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from server.asking import MAX_ATTEMPTS, Asking, in_blocks
from server.quorum import LATE, MEND
from server.secure_sum import STAGES, SecureSum, Stage
from server.strategies.answers import Answer
from server.sum_stages import LEFT_OUT, ask_stage, lost_sum, sum_form, sum_setting
from shared.errors import ProtocolError, QuorumLostError, WardroundError
from shared.messages import TrainTask

logger = logging.getLogger(__name__)


class SecureRounds:
    """The rounds of a run whose updates are summed under masks."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._form = sum_form(asking.study, asking.task)

    def train(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> tuple[dict[str, Answer], ArrayRecord]:
        """All that are sampled train on the same model, and only the sum of their updates is learnt. A sum that fails is begun anew where the study
        waits for who is missing: a site gives the same update again, and nothing more is charged."""
        deadline = time.monotonic() + self._asking.study.rounds.deadline_seconds
        for attempts in reversed(range(MAX_ATTEMPTS if self._asking.study.rounds.on_missing == "wait" else 1)):
            try:
                answers, secure = self._sum_updates(grid, fold, number, arrays, deadline)
            except QuorumLostError as error:
                if not attempts or time.monotonic() >= deadline:
                    what = error.what.removeprefix(f"round {number}: ")
                    raise type(error)(f"round {number}: {what}", error.remedy or MEND) from error
                logger.warning("round %d is begun anew: %s", number, error.what)
            else:
                return answers, self._aggregate_sum(secure)
        raise AssertionError("there is a last attempt")

    def _aggregate_sum(self, secure: SecureSum) -> ArrayRecord:
        """The next model. Where that fails no sum is begun anew: noise of a promise to whole sites was drawn, and that is the round's one release."""
        if secure.setting.form.noise is None:
            return self._asking.strategy.aggregate_secure(secure.total)
        return self._asking.strategy.aggregate_gradients(secure.total, spacing=secure.setting.form.noise.grid.spacing)

    def _sum_updates(
        self, grid: Grid, fold: int, number: int, arrays: ArrayRecord, deadline: float
    ) -> tuple[dict[str, Answer], SecureSum]:  # fmt: skip
        """Who answered, and the sum of who is in it, checked. Where signatures were asked for a sum of this round before, it is among its sites alone."""
        asking, enrolled = self._asking, self._asking.enrolment.enrolled
        task, sampled, signed = asking.train_task(fold, number), asking.strategy.sampled(number), asking.folder.sum_sites(fold, number)
        among = signed if signed and set(signed) <= enrolled.keys() else sampled
        noise = {name: enrolled[name].noise_multiplier or 0.0 for name in among}
        answers = {name: Answer(name=name, status="missing", reason=LEFT_OUT) for name in sampled if name not in noise}
        with self._lost_by_name(task, noise, answers):
            secure = SecureSum(sum_setting(asking.study, self._form, task, noise), roster=asking.enrolment.sum_keys)
            under_way = _UnderWay(grid=grid, secure=secure, task=task, arrays=arrays, deadline=deadline, answers=answers)
            self._ask(under_way, STAGES[: Stage.SIGN_SURVIVORS])
        asking.hold_round(number, answers)  # before anybody signs: nothing of a round that does not count is learnt
        asking.folder.write_sum_sites(fold, number, secure.survivors)
        with self._lost_by_name(task, noise, answers):
            self._ask(under_way, STAGES[Stage.SIGN_SURVIVORS :])
            asking.strategy.check_sum(secure.total)
        return answers, secure

    @contextlib.contextmanager
    def _lost_by_name(self, task: TrainTask, asked: Mapping[str, float], answers: Mapping[str, Answer]) -> Iterator[None]:
        """Where the sum fails, say who was missed."""
        try:
            yield
        except (QuorumLostError, ProtocolError) as error:
            raise lost_sum(error, self._asking.folder.sum_sites(task.fold, task.round), asked=asked, answers=answers) from error

    def _ask(self, under_way: "_UnderWay", stages: Sequence[Stage]) -> None:
        """These stages. Who is lost once its masked input came is in the sum, and its answer counts."""
        secure = under_way.secure
        for stage in stages:
            ask = self._ask_updates if stage == Stage.MASK_INPUT else self._ask_others
            failed = ask(under_way)
            under_way.answers |= failed if stage <= Stage.MASK_INPUT else {}
            try:
                secure.close_stage()
            except WardroundError:
                under_way.answers |= failed
                raise

    def _ask_others(self, under_way: "_UnderWay") -> dict[str, Answer]:
        """A stage in which nobody trains."""
        return ask_stage(under_way.grid, under_way.secure, self._asking.enrolment.nodes, under_way.deadline)

    def _ask_updates(self, under_way: "_UnderWay") -> dict[str, Answer]:
        """The stage in which sites train."""
        asking, secure = self._asking, under_way.secure
        messages = asking.addressed(asking.strategy.configure_secure(under_way.arrays, under_way.task, secure))
        asking.strategy.take_replies(in_blocks(under_way.grid)(messages, timeout=max(0.0, under_way.deadline - time.monotonic())))
        assert asking.strategy.round is not None
        came = asking.strategy.round.answers
        late = {name: Answer(name=name, status="missing", reason=LATE) for name in secure.asked if name not in came}
        return late | {name: asking.believed(name, answer) for name, answer in came.items()}


@dataclass(slots=True, kw_only=True)
class _UnderWay:
    """A sum, where it is asked for and until when (time.monotonic()), and what each site's answers came to so far."""

    grid: Grid
    secure: SecureSum
    task: TrainTask
    arrays: ArrayRecord
    deadline: float
    answers: dict[str, Answer]

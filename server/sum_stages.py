"""A secure sum over the grid: what is summed, the stages that take no update, and the error of a sum that was lost.

The round around it is `server.secure_rounds`, the machine of the protocol `server.secure_sum`.
"""

import time
from collections.abc import Container, Mapping, Sequence

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from server.quorum import LATE
from server.secure_sum import SecureSum
from server.strategies.answers import Answer, failure_reason
from shared.distributed_noise import MORE
from shared.errors import BoundToSumError, ProtocolError, QuorumLostError, SealError, fixed_sentence
from shared.messages import Content, Refused, TrainTask, decode, encode, plain_text
from shared.models import get_parameters
from shared.personal import personal_names
from shared.secure_sum.messages import AdvertisedKeys, SharedKeys, SignedSurvivors, SumReply, Unmasked
from shared.secure_sum.setting import MIN_THRESHOLD, SumForm, SumRound, SumSetting, least_threshold
from shared.study import Study
from shared.task import Task

LEFT_OUT = fixed_sentence(BoundToSumError)


def sum_form(study: Study, task: Task) -> SumForm:
    """What a study that aggregates securely fixes of its sums."""
    model = task.model()
    personal = personal_names(study.strategy, model)
    return SumForm.of_study(
        study, num_values=sum(value.size for name, value in get_parameters(model).items() if name not in personal),
        num_trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    )  # fmt: skip


def more_sites(study: Study, num_asked: int) -> str:
    """What to do where so few sites are asked: a threshold can be lowered only where the study set it above what every sum needs."""
    assert study.secure_aggregation is not None
    least = least_threshold(num_asked)
    if (study.secure_aggregation.threshold or 0) > least:
        return f"ask more sites, or lower secure_aggregation.threshold, to {least} at least"
    return f"ask more sites: no sum has fewer than {MIN_THRESHOLD} in it, or half of those asked"


def sum_setting(study: Study, form: SumForm, asked: TrainTask, noise: Mapping[str, float]) -> SumSetting:
    """What is summed in this round.

    Args:
        form: `sum_form` of the study.
        noise: of each site that is asked, the noise multiplier of its plan; all together add at least the largest, where noise is distributed.

    Raises:
        QuorumLostError: fewer sites are asked than a sum must have in it.
    """
    names = sorted(noise)
    threshold = form.least_in_sum(len(names))
    if len(names) < threshold:
        raise QuorumLostError(f"secure sum: expected {threshold} sites or more, got {len(names)}", more_sites(study, len(names)))
    of = SumRound(run=asked.run, study_hash=asked.study_hash, fold=asked.fold, round=asked.round)
    multiplier = max(noise.values()) * MORE if form.noise else 0.0
    return SumSetting(of=of, sites=tuple(names), threshold=threshold, form=form, noise_multiplier=multiplier)


def ask_stage(grid: Grid, secure: SecureSum, nodes: Mapping[str, int], deadline: float) -> dict[str, Answer]:
    """One stage without an update; who is out with it, and why.

    Args:
        nodes: by site.
        deadline: by time.monotonic().
    """
    asked = secure.tasks()
    by_node = {nodes[name]: name for name in asked}
    messages = [Message(encode(task), nodes[name], MessageType.QUERY) for name, task in asked.items()]
    answers = {name: Answer(name=name, status="missing", reason=LATE) for name in asked}
    for reply in grid.send_and_receive(messages, timeout=max(0.0, deadline - time.monotonic())):
        name = by_node.get(reply.metadata.src_node_id)
        if name not in answers:
            continue
        answer = _taken(name, reply, secure)
        if answer is None:
            del answers[name]
        else:
            answers[name] = answer
    return answers


def _taken(name: str, reply: Message, secure: SecureSum) -> Answer | None:
    """None where the reply counts."""
    if reply.has_error():
        return Answer(name=name, status="failed", reason=failure_reason(reply))
    try:
        content: Content = decode(reply.content, AdvertisedKeys, SharedKeys, SignedSurvivors, Unmasked, Refused)
        if isinstance(content, Refused):
            return Answer(name=name, status="refused", reason=plain_text(f"{content.code} {content.reason}"))
        assert isinstance(content, SumReply)
        secure.take(name, content)
    except (ProtocolError, SealError) as error:
        return Answer(name=name, status="failed", reason=f"{error.code} {error.what}")
    return None


def lost_sum(
    error: QuorumLostError | ProtocolError, signed: Sequence[str], *, asked: Container[str], answers: Mapping[str, Answer]
) -> QuorumLostError:
    """The error of a round whose sum failed: who was missed, and what can be done.

    Args:
        signed: sites for whose sum signatures were asked in this round, in this attempt or before it; who signed is in no other sum of it.
        asked: sites of this attempt.
        answers: of it, as far as it came.
    """
    missed = {name: answer.reason or answer.status for name, answer in answers.items() if answer.status != "ok"}
    told = f"{error.what}: {_listed(missed)}" if missed else error.what
    gone = {name: missed.get(name, "not enrolled") for name in signed if name in missed or name not in asked}
    gone = {name: reason for name, reason in gone.items() if reason != LEFT_OUT}  # that one is there, and misses others
    if not gone:
        return QuorumLostError(told, error.remedy)
    return BoundToSumError(
        f"{told}. The sum of {', '.join(signed)} was being unmasked in this round when it was lost, and who signed for it is in no other sum of the round; "
        f"of these sites there did not take part this time {_listed(gone)}",
        "bring the named sites back and resume the run; where one is gone for good, this run cannot go on: end its plan at each hospital "
        "('wardround ledger close KIT RUN') and begin a new run",
    )


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))

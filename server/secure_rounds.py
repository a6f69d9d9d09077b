"""A round of secure aggregation over the grid: what is summed, and the stages that take no update. The machine of the protocol is `server.secure_sum`."""

import time
from collections.abc import Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from server.secure_sum import SecureSum
from server.strategies.strategy import Answer, failure_reason
from shared.distributed_noise import MORE
from shared.errors import DeadlineMissedError, ProtocolError, QuorumLostError, SealError, fixed_sentence
from shared.messages import Content, Refused, TrainTask, decode, encode, plain_text
from shared.models import Parameters
from shared.personal import personal_names
from shared.secure_sum.messages import AdvertisedKeys, SharedKeys, SumReply, Unmasked
from shared.secure_sum.setting import SumForm, SumRound, SumSetting
from shared.study import Study
from shared.task import Task

LATE = fixed_sentence(DeadlineMissedError)


def sum_setting(study: Study, task: Task, asked: TrainTask, parameters: Parameters, noise: Mapping[str, float]) -> SumSetting:
    """What is summed in this round.

    Args:
        parameters: of the whole model.
        noise: of each site that is asked, the noise multiplier of its plan; all together add at least the largest, where noise is distributed.

    Raises:
        QuorumLostError: fewer sites are asked than a sum must have in it.
    """
    model, names = task.model(), sorted(noise)
    personal = personal_names(study.strategy, model)
    form = SumForm.of_study(
        study, num_values=sum(value.size for name, value in parameters.items() if name not in personal),
        num_trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    )  # fmt: skip
    threshold = form.least_in_sum(len(names))
    if len(names) < threshold:
        raise QuorumLostError(f"secure sum: expected {threshold} sites or more, got {len(names)}", "ask more sites, or lower the threshold")
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
        content: Content = decode(reply.content, AdvertisedKeys, SharedKeys, Unmasked, Refused)
        if isinstance(content, Refused):
            return Answer(name=name, status="refused", reason=plain_text(f"{content.code} {content.reason}"))
        assert isinstance(content, SumReply)
        secure.take(name, content)
    except (ProtocolError, SealError) as error:
        return Answer(name=name, status="failed", reason=f"{error.code} {error.what}")
    return None

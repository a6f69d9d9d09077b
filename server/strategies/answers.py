"""Who is asked, what, and what an answer comes to; and what is judged of it alone, whatever the strategy."""

import math
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from server.aggregation import Aggregator, blocks
from server.blocks import Block
from server.secure_sum import SecureSum
from shared.errors import ProtocolError, SiteFailedError, is_fixed_sentence
from shared.messages import (
    MESSAGE,
    Evaluated,
    Statistics,
    Trained,
)
from shared.models import Parameters, Template, check_parameters, template_of
from shared.results import SitePrivacy, Status

MAX_PRIVACY_NUMBER = 1e9  # steps, or an epsilon that promises nothing
MAX_STATISTIC = 1e12  # of any entry of a statistic: far more than there are patients, and far from overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An enrolled site: its node, and its weight in the mean."""

    name: str
    node_id: int
    weight: int
    steps: int = 1  # of a round, by its declared size
    batch: float = 1.0  # expected, by the same
    noise: float = 0.0  # of q-fedavg, see `noise_energy`


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one site's reply came to. An update is not kept here: it is in the running sum."""

    name: str
    status: Status
    reason: str | None = None
    statistics: Statistics | None = None
    privacy: SitePrivacy | None = None
    ledger_head: str | None = None
    staleness: int | None = None  # of fedbuff: rounds since the model that was asked about was the newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the sites were asked, as far as an answer is judged by it.

    Attributes:
        origin: run and study hash of the task, which a reply must name.
        template: of the parameters that are shared.
        norm: L2 norm of the model.
    """

    number: int
    fold: int
    origin: tuple[object, object]
    training: bool
    template: Template
    norm: float


@dataclass(slots=True, kw_only=True)
class Round:
    """What is known of the round under way; made anew by `configure_train` and `configure_evaluate`.

    Attributes:
        secure: takes the updates, under masks, in place of `mean`.
    """

    question: Question
    parameters: Parameters
    asked: dict[str, Member]
    mean: Aggregator
    losses: dict[str, float] = field(default_factory=dict)
    secure: SecureSum | None = None
    staleness: dict[str, int] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)


def config_of(record: RecordDict) -> ConfigRecord:
    """The text of a message."""
    config = record[MESSAGE]
    assert isinstance(config, ConfigRecord)
    return config


def failure_reason(reply: Message) -> str:
    """Why a reply is an error: a code and sentence of our own grid's where there is one, and never a foreign text."""
    told = reply.error.reason or ""
    return told if is_fixed_sentence(told) else f"{SiteFailedError.code} The site's app failed."


def norm(arrays: Parameters) -> float:
    """L2 norm over all arrays together, in float64."""
    flat = [value.reshape(-1) for value in arrays.values()]
    return math.sqrt(math.fsum(float(np.square(value[block], dtype=np.float64).sum()) for value in flat for block in blocks(value.size)))


def row_norm(row: NDArray[np.floating]) -> float:
    """L2 norm of a flat update, in float64; not by BLAS, whose threads would stand in the way of those that train."""
    return math.sqrt(float(np.square(row, dtype=np.float64).sum()))


def norm_in_block(block: Block, row: int) -> float:
    """`row_norm` of the update in this row.

    Raises:
        ProtocolError: a value is not finite.
    """
    length = row_norm(block.updates[row])
    if not math.isfinite(length):  # else every value is
        named, start = {}, 0
        for name, shape in block.shapes.items():
            end = start + math.prod(shape)
            named[name], start = block.updates[row, start:end].reshape(shape), end
        check_parameters(named, template_of(named))
    return length


def check_asked(content: Trained | Evaluated, member: Member, question: Question) -> None:
    """Return where this is the answer to what was asked.

    Raises:
        ProtocolError: it is another site's, or one to another round, run or study.
    """
    if (content.name, content.round, content.fold) != (member.name, question.number, question.fold):
        raise ProtocolError("expected a reply for this site and round, got one for another")
    if (content.run, content.study_hash) != question.origin:
        raise ProtocolError("expected a reply for this run and study, got one for another")


def failed(member: Member, error: ProtocolError) -> Answer:
    return Answer(name=member.name, status="failed", reason=f"{error.code} {error.what}")


def check_privacy(privacy: SitePrivacy | None) -> None:
    if privacy is not None:
        numbers = (privacy.epsilon, privacy.delta, privacy.noise_multiplier, privacy.sample_rate, privacy.steps, privacy.epsilon_cross_check or 0.0)
        if not all(0 <= number <= MAX_PRIVACY_NUMBER for number in numbers):
            raise ProtocolError(f"privacy: expected numbers from 0 to {MAX_PRIVACY_NUMBER:g}, got others")


def check_released(statistics: Statistics) -> None:
    for name, value in statistics.items():
        if np.abs(value).max(initial=0.0) > MAX_STATISTIC:
            raise ProtocolError(f"statistic {name}: expected entries of at most {MAX_STATISTIC:g}, got larger ones")

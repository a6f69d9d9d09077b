"""The strategy over Flower's hooks, composed of three parts: a sampler, an exact aggregator, a server optimizer.

Flower's own FedAvg trusts the sites' num-examples without bound, keeps every reply in memory and averages anything numeric. Here a
reply is judged, added to a running sum and dropped; its weight is the size that the site declared when it enrolled.
"""

import json
import logging
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from server.aggregation import Aggregator, ExactMean, blocks
from server.blocks import Block
from server.sampler import sample_sites
from server.secure_sum import SecureSum, SumResult
from server.strategies.answers import (
    Answer,
    Member,
    Question,
    Round,
    check_asked,
    check_privacy,
    check_released,
    config_of,
    failed,
    failure_reason,
    norm,
    norm_in_block,
)
from server.strategies.choice import aggregator, server_optimizer
from server.strategies.dp_fedavg import NoisedMean, SiteNoise
from server.strategies.scaffold import CONTROL as SERVER_CONTROL
from server.strategies.server_optimizer import FloatArrays, State, Taken
from shared import strategy_options as options
from shared.errors import ProtocolError
from shared.messages import (
    CONTROL,
    JSON,
    MESSAGE,
    PARAMETERS,
    Content,
    Evaluated,
    Refused,
    Trained,
    TrainTask,
    decode,
    decode_masked,
    decode_parameters,
    decode_statistics,
    encode,
    from_array_record,
    plain_text,
    to_array_record,
)
from shared.models import Parameters, Template, arrays_digest, template_of
from shared.secure_sum.messages import MaskInputTask, SecureTrained, SecureTrainTask
from shared.seeding import derive

logger = logging.getLogger(__name__)

MAX_RELATIVE_NORM = 1000.0  # of an update, by the model's own norm or 1: far more than training or its noise moves a model in one round


class FederatedStrategy(Strategy):
    """Flower's five hooks. The coordinator owns the loop that calls them.

    Args:
        strategy: the study's options.
        seed: the study's seed; sampling depends on (seed, fold, round) alone.
        trainable: names of the parameters that the server optimizer moves; other entries (buffers) take the plain mean.
        statistics: declared names and shapes of evaluation statistics.
        noised_statistics: True where they carry noise, so that entries may be negative.
        personal: names of the parameters that stay at the sites: they are not sent, and are as they were in the model that comes out.
        local_steps: of a round at every site, where the study fixes them.
        learning_rate: of the sites, by round.
        site_noise: of a promise to whole sites; the mean of updates is then `NoisedMean`'s.
    """

    def __init__(
        self,
        strategy: options.Strategy,
        *,
        seed: int,
        trainable: frozenset[str],
        statistics: Mapping[str, tuple[int, ...]],
        noised_statistics: bool = False,
        personal: frozenset[str] = frozenset(),
        local_steps: int | None = None,
        learning_rate: Callable[[int], float] = lambda number: 1.0,
        site_noise: SiteNoise | None = None,
    ) -> None:
        self._options = strategy
        self._personal = personal
        self._learning_rate = learning_rate
        self._site_noise = site_noise
        self._optimizer = server_optimizer(strategy, local_steps=local_steps)
        self._seed = seed
        self._trainable = trainable
        self._statistics = dict(statistics)
        self._noised_statistics = noised_statistics
        self._members: dict[str, Member] = {}
        self.state: State = {}
        self.fold = 1
        self.round: Round | None = None
        self.at_work: dict[str, Question] = {}  # of fedbuff: by site, what it has not answered yet, of whichever round

    def set_members(self, members: Iterable[Member]) -> None:
        """The sites that enrolled."""
        self._members = {member.name: member for member in members}

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message for each sampled site, all sharing one record."""
        return self._configure(server_round, arrays, config, MessageType.TRAIN, self.sampled(server_round))

    def sampled(self, server_round: int) -> list[str]:
        """Names of the sites of a round, in order."""
        return sample_sites(list(self._members), fraction=self._options.fraction, seed=self._seed, fold=self.fold, round_number=server_round)

    def configure_secure(self, arrays: ArrayRecord, task: TrainTask, secure: SecureSum) -> list[Message]:
        """A message of its own for each site that is in the sum so far: who its neighbours are differs, the parameters are shared."""
        [record, *_] = [
            message.content for message in self._configure(task.round, arrays, config_of(encode(task)), MessageType.TRAIN, list(secure.asked))
        ]
        current, asked = self._current(), secure.tasks()
        current.secure = secure
        if self._site_noise is not None:  # who dropped out before, or is left out of a sum that is begun anew, was asked as well
            num_asked = len({*self.sampled(task.round), *secure.setting.sites})
            current.mean = self._noised_mean(self._site_noise, task.round, num_asked=num_asked)
        sent, control = (from_array_record(record[key]) if key in record else {} for key in (PARAMETERS, CONTROL))  # type: ignore[arg-type]
        secure.model = arrays_digest({**sent, **{f"{CONTROL} {name}": value for name, value in control.items()}})
        messages = []
        for name, member in current.asked.items():
            mask_input = asked[name]
            assert isinstance(mask_input, MaskInputTask)
            own = config_of(encode(SecureTrainTask(train=task, mask_input=mask_input, weight=member.weight)))
            messages.append(Message(RecordDict({**record, MESSAGE: own}), member.node_id, MessageType.TRAIN, group_id=str(task.round)))
        return messages

    def turns(self, server_round: int) -> list[str]:
        """The sampled sites one after another, in an order that depends on (seed, fold, round) alone: for cyclic weight transfer."""
        names = self.sampled(server_round)
        rng = np.random.default_rng(derive(self._seed, "turns", self.fold, server_round))
        return [names[place] for place in rng.permutation(len(names))]

    def configure_turn(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, name: str) -> list[Message]:
        """The message for the site whose turn it is."""
        return self._configure(server_round, arrays, config, MessageType.TRAIN, [name])

    def idle(self, server_round: int) -> list[str]:
        """The sampled sites that are not at work: for buffered aggregation."""
        return [name for name in self.sampled(server_round) if name not in self.at_work]

    def configure_work(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, names: Iterable[str]) -> list[Message]:
        """The messages for these sites, which are at work from now on; who is not enrolled is left out."""
        messages = self._configure(server_round, arrays, config, MessageType.TRAIN, [name for name in names if name in self._members])
        self.at_work |= dict.fromkeys(self._current().asked, self._current().question)
        return messages

    def reopen(self, name: str) -> None:
        """The site's answer of this round is forgotten, and it is at work again: it is asked the same once more."""
        current = self._current()
        del current.answers[name]
        self.at_work[name] = current.question

    def forget_all_but(self, nodes: Container[int]) -> list[str]:
        """Who is at work elsewhere than at these nodes is so no more; their names."""
        gone = [name for name in self.at_work if self._members[name].node_id not in nodes]
        for name in gone:
            del self.at_work[name]
        return gone

    @property
    def is_full(self) -> bool:
        """Whether the buffer of this round takes no more."""
        assert isinstance(self._options, options.FedBuff)
        return self._current().mean.total_weight >= self._options.buffer_size

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """One message for every site."""
        return self._configure(server_round, arrays, config, MessageType.EVALUATE, sorted(self._members))

    def _configure(self, number: int, arrays: ArrayRecord, config: ConfigRecord, message_type: str, names: list[str]) -> list[Message]:
        asked = {name: self._members[name] for name in names}
        parameters = from_array_record(arrays)
        training = message_type == MessageType.TRAIN
        told = json.loads(str(config[JSON]))
        losses, staleness = dict[str, float](), dict[str, int]()
        mean: Aggregator
        if self._site_noise is None:
            mean = aggregator(self._options, members=asked, losses=losses, learning_rate=self._learning_rate(number), staleness=staleness)
        else:
            mean = self._noised_mean(self._site_noise, number, num_asked=len(asked))
        question = Question(
            number=number, fold=self.fold, origin=(told.get("run"), told.get("study_hash")), training=training,
            template=template_of({name: parameters[name] for name in self._shared(parameters)}), norm=norm(parameters),
        )  # fmt: skip
        self.round = Round(question=question, parameters=parameters, asked=asked, mean=mean, losses=losses, staleness=staleness)
        shared = arrays if not self._personal else to_array_record({name: parameters[name] for name in self._shared(parameters)})
        record = RecordDict({MESSAGE: config, PARAMETERS: shared})
        control = self.state.get(SERVER_CONTROL, {})
        if training and control:  # in the model's order, which a state read back from a checkpoint does not keep
            record[CONTROL] = to_array_record({name: control[name].astype(value.dtype) for name, value in parameters.items() if name in control})
        return [Message(record, member.node_id, message_type, group_id=str(number)) for member in asked.values()]

    def _noised_mean(self, noise: SiteNoise, number: int, *, num_asked: int) -> NoisedMean:
        return NoisedMean(noise, num_asked=num_asked, fold=self.fold, round_number=number)

    def take_replies(self, replies: Iterable[Message | Block]) -> None:
        """Judge each reply as it comes, add its update to the running sum, and forget it. A second reply of a site is dropped."""
        current = self._current()
        by_node = {member.node_id: member for member in current.asked.values()}
        for reply in replies:
            if isinstance(reply, Block):
                self._take_block(reply, by_node, current)
                continue
            member = by_node.get(reply.metadata.src_node_id)
            if member is not None and member.name not in current.answers:
                current.answers[member.name] = self._judge(reply, member, current, current.question)
            del reply  # before the next one is fetched

    def take_arrival(self, reply: Message) -> Answer | None:
        """Judge the reply of a site at work by what that site was asked, however long ago; an update goes into this round's buffer.

        None where nobody who is at work sent it: a second reply, say.
        """
        current, node_id = self._current(), reply.metadata.src_node_id
        member = next((self._members[name] for name in self.at_work if self._members[name].node_id == node_id), None)
        if member is None:
            return None
        question = self.at_work.pop(member.name)
        staleness = current.staleness[member.name] = current.question.number - question.number
        answer = replace(self._judge(reply, member, current, question), staleness=staleness)
        current.answers[member.name] = answer
        return answer

    def _judge(self, reply: Message, member: Member, current: Round, question: Question) -> Answer:
        if reply.has_error():
            return Answer(name=member.name, status="failed", reason=failure_reason(reply))
        try:
            return self._accept(reply.content, member, current, question)
        except ProtocolError as error:
            return failed(member, error)
        except Exception:  # the border of the coordinator: bytes that break their reader cost this site its round, and nobody else anything
            logger.warning("site %s: its reply could not be read", member.name, exc_info=logger.isEnabledFor(logging.DEBUG))
            return Answer(name=member.name, status="failed", reason=f"{ProtocolError.code} expected a reply that can be read, got one that cannot")

    def _take_block(self, block: Block, by_node: Mapping[int, Member], current: Round) -> None:
        """Judge the sites of a block, each as it would be judged alone."""
        members = [by_node[node_id] for node_id in block.node_ids]
        judged: dict[int, Answer] = {}
        for row, (member, reply, statistics) in enumerate(zip(members, block.replies, block.statistics, strict=True)):
            if isinstance(reply, Refused):
                judged[row] = Answer(name=member.name, status="refused", reason=f"{reply.code} {reply.reason}")
                continue
            try:
                check_asked(reply, member, current.question)
                self._check_norm(norm_in_block(block, row), current.question.norm)
            except ProtocolError as error:
                judged[row] = failed(member, error)
                continue
            judged[row] = Answer(
                name=member.name, status="ok", reason=reply.withheld, statistics=statistics, privacy=reply.privacy, ledger_head=reply.ledger_head
            )  # fmt: skip
        usable = [row for row, answer in judged.items() if answer.status == "ok"]
        rows = block.updates if len(usable) == len(block.updates) else block.updates[usable]
        weights, sites = [members[row].weight for row in usable], [members[row].name for row in usable]
        for row, refusal in zip(usable, current.mean.add_rows(block.shapes, rows, weights, sites=sites), strict=True):
            if refusal is not None:
                judged[row] = failed(members[row], refusal)
        current.answers.update({answer.name: answer for answer in judged.values()})

    def _accept(self, record: RecordDict, member: Member, current: Round, question: Question) -> Answer:
        kind: type[Content] = Evaluated if not question.training else Trained if current.secure is None else SecureTrained
        content = decode(record, kind, Refused)
        if isinstance(content, Refused):
            return Answer(name=member.name, status="refused", reason=plain_text(f"{content.code} {content.reason}"))
        masked = None
        if isinstance(content, SecureTrained):
            masked, content = content.masked, content.trained
        assert isinstance(content, Trained | Evaluated)
        check_asked(content, member, question)
        check_privacy(content.privacy)
        statistics = decode_statistics(record, self._statistics, signed=self._noised_statistics)
        if statistics is not None and self._noised_statistics and question.training:
            raise ProtocolError("expected noised statistics with the closing evaluation alone, got some with an update")
        check_released(statistics or {})
        if masked is not None:
            assert current.secure is not None
            current.secure.take(member.name, masked, decode_masked(record))
        elif question.training:
            update = decode_parameters(record, question.template)
            assert isinstance(content, Trained)
            if content.loss is not None:
                current.losses[member.name] = content.loss
            self._check_norm(norm(update), question.norm)
            current.mean.add(update, member.weight, site=member.name)
        withheld = None if content.withheld is None else plain_text(content.withheld)
        return Answer(name=member.name, status="ok", reason=withheld, statistics=statistics, privacy=content.privacy, ledger_head=content.ledger_head)

    def _check_norm(self, of_update: float, of_model: float) -> None:
        """Return where an update of this L2 norm is within the study's bound, and within what training could come to.

        Raises:
            ProtocolError: it is not.
        """
        bound = self._options.largest_update
        if bound is not None and of_update > bound:
            raise ProtocolError(f"update: expected a norm of at most {bound:g} (strategy.largest_update), got a larger one")
        if of_update > MAX_RELATIVE_NORM * max(1.0, of_model):
            raise ProtocolError(f"update: expected a norm of at most {MAX_RELATIVE_NORM:g} times the model's, got a larger one")

    def _shared(self, parameters: Parameters) -> list[str]:
        return [name for name in parameters if name not in self._personal]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model from the updates taken so far and in `replies`; None where there is none. Metrics come from `round.answers`."""
        self.take_replies(replies)
        current = self._current()
        if current.mean.total_weight == 0:
            return None, None
        weight = current.mean.total_weight
        mean, current.mean = current.mean.take_mean(), ExactMean()  # the sum is not needed any more, and larger than the model
        return self._moved_by(mean, weight, current), None

    def check_sum(self, total: SumResult) -> None:
        """Return where this may be a secure sum over the sites that it names.

        Raises:
            ProtocolError: its weight is not theirs.
        """
        current = self._current()
        expected = sum(current.asked[name].weight for name in total.sites)
        if total.weight != expected:
            raise ProtocolError(f"secure sum: expected a weight of {expected} for the sites in it, got {total.weight}")

    def aggregate_secure(self, total: SumResult) -> ArrayRecord:
        """The next model from a secure sum that was checked. Once a round: where the sum is noised, that is the round's one release."""
        current = self._current()
        if isinstance(current.mean, NoisedMean):
            mean, weight = current.mean.release(_named(total.values.copy(), current.question.template)), current.mean.num_asked
        else:
            mean, weight = _named(total.mean(), current.question.template), total.weight
        return self._moved_by(mean, weight, current)

    def aggregate_gradients(self, total: SumResult, *, spacing: float) -> ArrayRecord:
        """The next model from a secure sum of clipped gradients with distributed noise, in grid points, that was checked: a step against their mean."""
        current = self._current()
        batch = math.fsum(current.asked[name].batch for name in total.sites)
        flat = total.values * (-self._learning_rate(current.question.number) * spacing / batch)
        trainable = {name: form for name, form in current.question.template.items() if name in self._trainable}
        return self._moved_by(_named(flat, trainable), total.weight, current)

    def _moved_by(self, mean: FloatArrays, weight: int, current: Round) -> ArrayRecord:
        share = weight / max(1, sum(member.weight for member in self._members.values()))
        taken = Taken(share=share, learning_rate=self._learning_rate(current.question.number))
        self.state, parameters = self._apply(mean, current.parameters, taken)
        return to_array_record(parameters)

    def _apply(self, mean: FloatArrays, parameters: Parameters, taken: Taken) -> tuple[State, Parameters]:
        state, change = self._optimizer.step(self.state, {name: value for name, value in mean.items() if name in self._trainable}, taken)
        moved = dict(parameters)
        with np.errstate(over="ignore"):  # looked for just below
            moved |= {name: _moved(parameters[name], change.get(name, value)) for name, value in mean.items()}
        for name, value in moved.items():
            if not np.isfinite(value).all():
                raise ProtocolError(f"model: expected finite values after the server's step, got others in {name}")
        return state, moved

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Take the replies; their statistics are in `round.answers`."""
        self.take_replies(replies)
        return None

    def summary(self) -> None:
        """Nothing: the coordinator says what runs."""

    def _current(self) -> Round:
        assert self.round is not None, "configure_* comes before aggregate_*"
        return self.round


def _named(flat: NDArray[np.float64], template: Template) -> FloatArrays:
    """Views of a flat array, by name."""
    named, start = {}, 0
    for name, (shape, _) in template.items():
        end = start + math.prod(shape)
        named[name], start = flat[start:end].reshape(shape), end
    return named


def _moved(value: NDArray[np.floating], change: NDArray[np.float64]) -> NDArray[np.floating]:
    """value + change, added in float64, in the type of `value`."""
    moved = np.empty(value.shape, value.dtype)
    out, flat, added = moved.reshape(-1), value.reshape(-1), change.reshape(-1)
    for block in blocks(flat.size):
        out[block] = flat[block] + added[block]
    return moved

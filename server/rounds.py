"""The orders of a round: all sites together, one after another, or as they come. Under masks: `server.secure_rounds`."""

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from server.arrivals import ArrivalGrid, AtWork, OpenQuestion, take_open_questions, with_open_questions
from server.asking import MAX_ATTEMPTS, Asking, arrays_of
from server.quorum import LATE
from server.strategies.answers import Answer, config_of
from server.strategies.server_optimizer import State
from shared.errors import ConfigurationError
from shared.messages import encode, to_array_record
from shared.models import Parameters

RoundOutcome = tuple[dict[str, Answer], ArrayRecord]  # what each site's answer came to, and the next model


def train_together(asking: Asking, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> RoundOutcome:
    """All that are sampled train on the same model."""
    record = encode(asking.train_task(fold, number), parameters=arrays)
    answers = asking.collect(grid, asking.addressed(asking.strategy.configure_train(number, arrays_of(record), config_of(record), grid)))
    asking.hold_round(number, answers)
    updated, _ = asking.strategy.aggregate_train(number, [])
    assert updated is not None
    return answers, updated


def train_in_turn(asking: Asking, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> RoundOutcome:
    """Each trains on what the one before it made; one without a usable update is passed over."""
    answers: dict[str, Answer] = {}
    for name in asking.strategy.turns(number):
        record = encode(asking.train_task(fold, number), parameters=arrays)
        answers |= asking.collect(grid, asking.addressed(asking.strategy.configure_turn(number, arrays_of(record), config_of(record), name)))
        updated, _ = asking.strategy.aggregate_train(number, [])
        arrays = arrays if updated is None else updated
    asking.hold_round(number, answers)
    return answers, arrays


class BufferedRounds:
    """Rounds of buffered aggregation, where sites work on from one round into the next."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._open_questions: list[OpenQuestion] = []  # of the checkpoint that a run goes on from
        self._open_models: dict[int, Parameters] = {}  # by round, what they ask about

    def take(self, state: State, parameters: Parameters) -> State:
        """Take what was under way out of a checkpoint's state; the rest of it."""
        state, self._open_questions, self._open_models = take_open_questions(state, parameters)
        return state

    def with_work(self, state: State, grid: Grid) -> State:
        """The state with what is under way, for a checkpoint."""
        return with_open_questions(state, self._at_work(grid))

    def train(self, grid: Grid, fold: int, number: int, arrays: ArrayRecord) -> RoundOutcome:
        """Who is idle trains on this model; the round ends with the last update that the buffer takes, and who is at work then works on.

        A site has the study's deadline from when it was asked. When nobody is at work any more the round ends too, and the quorum decides.
        """
        asking = self._asking
        arriving, deadline = arriving_of(grid), asking.study.rounds.deadline_seconds
        self._ask_once_more(arriving, fold)
        record = encode(asking.train_task(fold, number), parameters=arrays)
        messages = asking.addressed(asking.strategy.configure_work(number, arrays_of(record), config_of(record), asking.strategy.idle(number)))
        asked = {message.metadata.dst_node_id: message for message in messages}
        left = dict.fromkeys(asked, MAX_ATTEMPTS - 1 if asking.study.rounds.on_missing == "wait" else 0)
        arriving.ask(messages, seconds=deadline)
        for reply in arriving.arrivals():
            node_id, answer = reply.metadata.src_node_id, asking.strategy.take_arrival(reply)
            del reply  # before the next one is fetched
            if asking.strategy.is_full:
                break
            if answer is not None and answer.status == "failed" and left.get(node_id, 0) > 0:
                left[node_id] -= 1
                asking.strategy.reopen(answer.name)
                arriving.ask([asked[node_id]], seconds=deadline)
        answers = self._answers_so_far(arriving)
        asking.hold_round(number, {name: answer for name, answer in answers.items() if answer.status != "at work"})
        updated, _ = asking.strategy.aggregate_train(number, [])
        assert updated is not None
        return answers, updated

    def _ask_once_more(self, grid: ArrivalGrid, fold: int) -> None:
        """Of a run that is resumed: who was at work at the checkpoint is asked the same again, and has done as much of it where that is known."""
        asking = self._asking
        for number, model in sorted(self._open_models.items()):
            begun = {question.name: question.nanoseconds for question in self._open_questions if question.round_number == number}
            record = encode(asking.train_task(fold, number), parameters=to_array_record(model))
            messages = asking.addressed(asking.strategy.configure_work(number, arrays_of(record), config_of(record), sorted(begun)))
            nodes = {asking.enrolment.nodes[name]: nanoseconds for name, nanoseconds in begun.items() if name in asking.enrolment.nodes}
            grid.ask(messages, seconds=asking.study.rounds.deadline_seconds, begun=nodes)
        self._open_questions, self._open_models = [], {}

    def _answers_so_far(self, grid: ArrivalGrid) -> dict[str, Answer]:
        """What came in this round; "missing" are those whose time was over in it, and "at work" who has time left."""
        asking = self._asking
        assert asking.strategy.round is not None
        answers = {name: asking.believed(name, answer) for name, answer in asking.strategy.round.answers.items()}
        late = asking.strategy.forget_all_but(grid.at_work())
        answers |= {name: Answer(name=name, status="missing", reason=LATE) for name in late}
        return answers | {name: Answer(name=name, status="at work") for name in asking.strategy.at_work}

    def _at_work(self, grid: Grid) -> dict[str, tuple[int, AtWork]]:
        """By site, the round in which it was asked what it has not answered yet, and the question."""
        asking = self._asking
        if not asking.strategy.at_work:
            return {}
        working = arriving_of(grid).at_work()
        return {name: (question.number, working[asking.enrolment.nodes[name]]) for name, question in asking.strategy.at_work.items()}

    def dismiss(self, grid: Grid) -> None:
        """Nobody is at work any more: at a site, the closing question makes stale what it is still at work on."""
        arriving_of(grid).dismiss()
        self._asking.strategy.forget_all_but(())


def arriving_of(grid: Grid) -> ArrivalGrid:
    """The grid, where it hands over answers as they come.

    Raises:
        ConfigurationError: it does not.
    """
    if not isinstance(grid, ArrivalGrid):
        raise ConfigurationError(
            "strategy fedbuff: expected an engine that hands over answers as they come, got one that waits for all", "choose another strategy here"
        )
    return grid

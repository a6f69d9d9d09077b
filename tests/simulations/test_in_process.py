"""The in-process grid calls the app it was given, unchanged, and gives back what Flower's own grid would."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

import simulations.in_process
from simulations.in_process import CLIENT_APP_RAISED, FIRST_SITE_NODE_ID, InProcessGrid


def echo_app() -> ClientApp:
    """A real ClientApp: it answers with its site's name and the question, and keeps a count in its context's state."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        counts = context.state.get("count")
        count = int(counts["n"]) + 1 if isinstance(counts, ConfigRecord) else 1  # type: ignore[arg-type]
        context.state["count"] = ConfigRecord({"n": count})
        asked = message.content["question"]["text"]
        return Message(RecordDict({"answer": ConfigRecord({"site": context.node_config["site"], "text": asked, "count": count})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ValueError("patient 17 has HIV")

    return app


def question(grid: InProcessGrid, node_id: int, text: str, kind: str = MessageType.QUERY) -> Message:
    return grid.create_message(RecordDict({"question": ConfigRecord({"text": text})}), kind, node_id, "1")


def answers(replies: Iterator[Message]) -> list[tuple[object, object, object]]:
    return [tuple(reply.content["answer"][key] for key in ("site", "text", "count")) for reply in replies]


def test_each_site_is_a_node_in_the_order_given() -> None:
    grid = InProcessGrid(echo_app(), ["b", "a", "c"])
    nodes = list(grid.get_node_ids())
    assert nodes == [FIRST_SITE_NODE_ID, FIRST_SITE_NODE_ID + 1, FIRST_SITE_NODE_ID + 2]
    assert answers(grid.send_and_receive([question(grid, node, str(node)) for node in reversed(nodes)])) == [
        ("c", "4", 1),
        ("a", "3", 1),
        ("b", "2", 1),
    ]


def test_the_app_is_called_unchanged_and_state_stays_with_its_site() -> None:
    class Spy(ClientApp):
        calls = 0

        def __call__(self, message: Message, context: Context) -> Message:
            Spy.calls += 1
            return super().__call__(message, context)

    app = Spy()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"answer": ConfigRecord({"site": "x", "text": "y", "count": Spy.calls})}), reply_to=message)

    grid = InProcessGrid(app, ["a", "b"])
    list(grid.send_and_receive([question(grid, node, "") for node in grid.get_node_ids()]))
    assert Spy.calls == 2
    grid = InProcessGrid(echo_app(), ["a", "b"])
    for expected in (1, 2, 3):
        assert answers(grid.send_and_receive([question(grid, 2, "")])) == [("a", "", expected)]
    assert answers(grid.send_and_receive([question(grid, 3, "")])) == [("b", "", 1)]


def test_replies_name_their_question_and_their_site() -> None:
    grid = InProcessGrid(echo_app(), ["a", "b"])
    messages = [question(grid, node, "x") for node in grid.get_node_ids()]
    replies = list(grid.send_and_receive(messages))
    assert [reply.metadata.reply_to_message_id for reply in replies] == [message.metadata.message_id for message in messages]
    assert len({message.metadata.message_id for message in messages}) == 2
    assert [reply.metadata.src_node_id for reply in replies] == [2, 3]
    assert {reply.metadata.message_type for reply in replies} == {MessageType.QUERY}


@pytest.mark.parametrize("kind", [MessageType.TRAIN, MessageType.EVALUATE])
def test_an_app_that_raises_becomes_an_error_without_its_text(kind: str) -> None:
    """Training raises by itself; for evaluation the app has no function at all."""
    grid = InProcessGrid(echo_app(), ["a", "b"])
    bad, good = list(grid.send_and_receive([question(grid, 2, "x", kind), question(grid, 3, "y")]))
    assert bad.has_error() and bad.error.code == CLIENT_APP_RAISED
    assert bad.metadata.src_node_id == 2
    assert "HIV" not in str(bad.error.reason)
    assert answers(iter([good])) == [("b", "y", 1)]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_an_answer(stop: type[BaseException]) -> None:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        raise stop

    grid = InProcessGrid(app, ["a"])
    with pytest.raises(stop):
        list(grid.send_and_receive([question(grid, 2, "")]))


def test_replies_are_streamed_one_at_a_time() -> None:
    """The next site is asked only when the reply before it was taken, so a round's memory does not grow with its sites."""
    asked: list[object] = []
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        asked.append(context.node_config["site"])
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, ["a", "b", "c"])
    replies = grid.send_and_receive(question(grid, node, "") for node in grid.get_node_ids())
    assert asked == []
    next(replies)
    assert asked == ["a"]
    next(replies)
    assert asked == ["a", "b"]


def test_push_and_pull_give_each_reply_once() -> None:
    grid = InProcessGrid(echo_app(), ["a", "b"])
    ids = list(grid.push_messages([question(grid, node, "x") for node in grid.get_node_ids()]))
    assert len(set(ids)) == 2
    assert answers(iter(grid.pull_messages([ids[1]]))) == [("b", "x", 1)]
    assert answers(iter(grid.pull_messages(ids))) == [("a", "x", 1)]
    assert list(grid.pull_messages([*ids, "never-sent"])) == []


@pytest.mark.parametrize(
    ("seconds_each", "timeout", "answered", "asked"),
    [(10.0, 25.0, 2, 3), (10.0, 10.0, 0, 1), (10.0, 31.0, 3, 3), (10.0, None, 3, 3), (0.0, 0.0, 0, 0)],
)
def test_after_the_timeout_nobody_is_asked_and_late_replies_are_dropped(
    monkeypatch: pytest.MonkeyPatch, seconds_each: float, timeout: float | None, answered: int, asked: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr(simulations.in_process, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    calls: list[object] = []
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        clock[0] += seconds_each
        calls.append(context.node_config["site"])
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, ["a", "b", "c"])
    replies = list(grid.send_and_receive([question(grid, node, "") for node in grid.get_node_ids()], timeout=timeout))
    assert (len(replies), len(calls)) == (answered, asked)


def test_there_is_no_flower_run() -> None:
    with pytest.raises(RuntimeError):
        _ = InProcessGrid(echo_app(), ["a"]).run

"""Whatever one reply holds, it costs that site its round, by name and reason, and nobody else anything."""

import dataclasses
import io
import json
import pickle
import re
import struct
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from server.aggregation import MAX_WEIGHT
from server.blocks import Block
from server.strategies.answers import Answer, Member
from server.strategies.strategy import FederatedStrategy
from shared import strategy_options as options
from shared.errors import ProtocolError
from shared.messages import MESSAGE, PARAMETERS, STATISTICS, Evaluated, Refused, Trained, encode
from shared.models import Parameters
from shared.results import SitePrivacy
from shared.study import Study
from simulations.attacks.poisoning import strategy_names
from simulations.in_process import InProcessGrid

MEMBERS = {"a": Member(name="a", node_id=2, weight=10), "b": Member(name="b", node_id=3, weight=30), "c": Member(name="c", node_id=4, weight=60)}
SHAPES = {"layer.weight": (2, 3), "layer.bias": (3,)}
STATISTICS_DECLARED = {"histogram": (2, 4), "errors": (5,)}
BARE = {"name": "s", "task": "t", "privacy": {"unit": "none"}, "training": {"local_steps": 1}}
PRIVACY = SitePrivacy(epsilon=1.0, delta=1e-5, noise_multiplier=2.0, sample_rate=0.1, steps=7, epsilon_cross_check=None)


def start() -> Parameters:
    return {name: np.full(shape, 0.5, np.float32) for name, shape in SHAPES.items()}


def update_of(name: str) -> Parameters:
    rng = np.random.default_rng(MEMBERS[name].node_id)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in SHAPES.items()}


@pytest.fixture
def grid() -> InProcessGrid:
    """Sets the identity that `Message(...)` asks for."""
    return InProcessGrid(lambda message, context: message, ["a", "b", "c"])


def make_strategy(strategy: options.Strategy | None = None, trainable: frozenset[str] = frozenset(SHAPES)) -> FederatedStrategy:
    made = FederatedStrategy(strategy or options.FedAvg(), seed=1, trainable=trainable, statistics=STATISTICS_DECLARED, local_steps=1)
    made.set_members(MEMBERS.values())
    return made


ORIGIN = {"run": "run-1", "study_hash": "e" * 64}
TASK = ConfigRecord({"json": json.dumps(ORIGIN)})


def ask(strategy: FederatedStrategy, grid: InProcessGrid, *, number: int = 3, parameters: Parameters | None = None) -> dict[str, Message]:
    """The messages of a round, by site."""
    arrays = ArrayRecord({name: Array(value) for name, value in (parameters or start()).items()})
    messages = strategy.configure_train(number, arrays, TASK, grid)
    return {member.name: message for message in messages for member in MEMBERS.values() if member.node_id == message.metadata.dst_node_id}


def trained(name: str, *, number: int = 3, fold: int = 1, privacy: SitePrivacy | None = None) -> Trained:
    return Trained(name=name, **ORIGIN, round=number, fold=fold, loss=1.0, privacy=privacy)


def good(name: str, message: Message) -> Message:
    return Message(encode(trained(name), parameters=update_of(name)), reply_to=message)


def aggregated(strategy: FederatedStrategy, number: int = 3) -> Parameters:
    arrays, metrics = strategy.aggregate_train(number, [])
    assert arrays is not None and metrics is None
    return {name: array.numpy() for name, array in arrays.items()}


def expected_mean(names: list[str]) -> Parameters:
    total = sum(MEMBERS[name].weight for name in names)
    return {
        key: (0.5 + sum(MEMBERS[name].weight * update_of(name)[key].astype(np.float64) for name in names) / total).astype(np.float32)
        for key in SHAPES
    }


def same(left: Parameters, right: Parameters) -> bool:
    return list(left) == list(right) and all(
        left[key].dtype == right[key].dtype and np.allclose(left[key], right[key], rtol=1e-6, atol=1e-7) for key in left
    )


def test_good_replies_make_the_mean_weighted_by_declared_sizes(grid: InProcessGrid) -> None:
    strategy = make_strategy()
    messages = ask(strategy, grid)
    strategy.take_replies(good(name, message) for name, message in messages.items())
    assert same(aggregated(strategy), expected_mean(["a", "b", "c"]))
    assert strategy.round is not None
    assert {name: answer.status for name, answer in strategy.round.answers.items()} == {"a": "ok", "b": "ok", "c": "ok"}


def test_the_aggregate_is_the_same_bits_in_every_order(grid: InProcessGrid) -> None:
    outcomes = set()
    for order in (["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]):
        strategy = make_strategy()
        messages = ask(strategy, grid)
        strategy.take_replies([good(name, messages[name]) for name in order])
        outcomes.add(b"".join(value.tobytes() for value in aggregated(strategy).values()))
    assert len(outcomes) == 1


# Bad replies ----------------------------------------------------------------------------------------------------------------------

Spoil = Callable[[Parameters], Parameters]


def with_tensor(key: str, value: np.ndarray) -> Spoil:
    return lambda update: {name: value if name == key else old for name, old in update.items()}


def with_value(value: float) -> Spoil:
    def spoil(update: Parameters) -> Parameters:
        bias = update["layer.bias"].copy()
        bias[1] = value
        return {**update, "layer.bias": bias}

    return spoil


BAD_UPDATES: dict[str, tuple[Spoil, str]] = {
    "NaN": (with_value(np.nan), "layer.bias: expected finite"),
    "infinity": (with_value(np.inf), "layer.bias: expected finite"),
    "minus infinity": (with_value(-np.inf), "layer.bias: expected finite"),
    "1e6-fold": (lambda update: {key: value * np.float32(1e6) for key, value in update.items()}, "norm of at most 1000 times the model's"),
    "1e30-fold": (lambda update: {key: value * np.float32(1e30) for key, value in update.items()}, "norm of at most|expected values below"),
    "the largest float32": (with_value(3.4e38), "norm of at most|expected values below"),
    "wrong shape": (with_tensor("layer.bias", np.zeros(4, np.float32)), r"layer.bias: expected \(3,\)"),
    "a shape that broadcasts": (with_tensor("layer.bias", np.zeros(1, np.float32)), r"layer.bias: expected \(3,\)"),
    "a scalar": (with_tensor("layer.bias", np.zeros((), np.float32)), r"layer.bias: expected \(3,\)"),
    "a transposed tensor": (with_tensor("layer.weight", np.zeros((3, 2), np.float32)), r"layer.weight: expected \(2, 3\)"),
    "one more axis": (with_tensor("layer.weight", np.zeros((1, 2, 3), np.float32)), r"layer.weight: expected \(2, 3\)"),
    "float64": (lambda update: {key: value.astype(np.float64) for key, value in update.items()}, "expected .*(float32|NumPy array)"),
    "integers": (lambda update: {key: value.astype(np.int64) for key, value in update.items()}, "expected .*(float32|NumPy array)"),
    "complex numbers": (lambda update: {key: value.astype(np.complex64) for key, value in update.items()}, "expected .*(float32|NumPy array)"),
    "text": (with_tensor("layer.bias", np.array(["x", "y", "z"])), "expected .*(float32|NumPy array)"),
    "big-endian": (with_tensor("layer.bias", np.zeros(3, ">f4")), "expected .*(float32|NumPy array)"),
    "missing tensor": (lambda update: {"layer.weight": update["layer.weight"]}, r"missing: \['layer.bias'\]"),
    "extra tensor": (lambda update: {**update, "extra": np.zeros(3, np.float32)}, "undeclared: 1"),
    "renamed tensor": (lambda update: {"layer.weight": update["layer.weight"], "bias": update["layer.bias"]}, r"missing: \['layer.bias'\]"),
    "no tensor": (lambda update: {}, "expected 2 named tensors, got 0"),
    "another order": (lambda update: dict(reversed(update.items())), "expected 2 named tensors"),
}


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.zeros(3, np.float32))
    return buffer.getvalue()


class Explosive:
    """Unpickling it would end this test run."""

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        import os

        return os._exit, (99,)


BAD_BYTES: dict[str, bytes] = {
    "pickle": pickle.dumps(Explosive()),
    "an object array": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }") + pickle.dumps([Explosive()]),
    "nothing": b"",
    "noise": bytes(range(256)),
    "an npz archive": npz(),
    "a broken archive": b"PK\x03\x04junk",
    "petabytes in the header": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }"),
    "a number too large": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000000000000000000,), }"),
    "a negative shape": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
    "an open bracket": npy(b"{'descr': '<f4', 'shape': (3,"),
    "an open string": npy(b"'''abc"),
    "a deep expression": npy(b"-" * 9000 + b"1"),
    "cut short": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }") + b"\0\0",
}


def bad_update(spoil: Spoil) -> Callable[[Message], Message]:
    return lambda message: Message(encode(trained("b"), parameters=spoil(update_of("b"))), reply_to=message)


def raw(data: bytes, group: str = PARAMETERS) -> Callable[[Message], Message]:
    def reply(message: Message) -> Message:
        record = encode(trained("b"), parameters=update_of("b"), statistics={"histogram": np.zeros((2, 4))})
        key = "layer.bias" if group == PARAMETERS else "histogram"
        old = record[group]
        assert isinstance(old, ArrayRecord)
        record[group] = ArrayRecord(
            {name: Array(dtype="float32", shape=(3,), stype="numpy.ndarray", data=data) if name == key else array for name, array in old.items()}
        )
        return Message(record, reply_to=message)

    return reply


def other_kind(message: Message) -> Message:
    """An answer to an evaluation, marked as one, in reply to a call for training."""
    reply = Message(encode(Evaluated(name="b", **ORIGIN, round=3, fold=1, privacy=None)), reply_to=message)
    reply.metadata.__dict__["_message_type"] = "evaluate"
    return reply


def spoiled_json(text: str) -> Callable[[Message], Message]:
    def reply(message: Message) -> Message:
        record = encode(trained("b"), parameters=update_of("b"))
        record[MESSAGE] = ConfigRecord({"json": text})
        return Message(record, reply_to=message)

    return reply


def claiming(privacy: dict[str, str]) -> Callable[[Message], Message]:
    numbers = {"epsilon": "1", "delta": "1e-5", "noise_multiplier": "1", "sample_rate": "0.1", "steps": "1", "epsilon_cross_check": "null", **privacy}
    body = ", ".join(f'"{key}": {value}' for key, value in numbers.items())
    origin = json.dumps(ORIGIN)[1:-1]
    return spoiled_json('{"kind":"trained","name":"b",' + origin + ',"round":3,"fold":1,"privacy":{' + body + "}}")


def with_statistics(statistics: dict[str, np.ndarray]) -> Callable[[Message], Message]:
    return lambda message: Message(encode(trained("b"), parameters=update_of("b"), statistics=statistics), reply_to=message)


def one(value: float) -> np.ndarray:
    histogram = np.ones((2, 4))
    histogram[1, 2] = value
    return histogram


def originating(message: Message, **origin: str | None) -> Message:
    """A good reply that says it is of another run or study."""
    return Message(encode(trained("b").model_copy(update=origin), parameters=update_of("b")), reply_to=message)


def extra_record(message: Message) -> Message:
    record = encode(trained("b"), parameters=update_of("b"))
    record["more"] = ConfigRecord({"num-examples": 1_000_000_000})
    return Message(record, reply_to=message)


BAD_REPLIES: dict[str, tuple[Callable[[Message], Message], str]] = {
    **{f"update: {name}": (bad_update(spoil), reason) for name, (spoil, reason) in BAD_UPDATES.items()},
    **{f"bytes: {name}": (raw(data), "") for name, data in BAD_BYTES.items()},
    **{f"statistics' bytes: {name}": (raw(data, STATISTICS), "") for name, data in BAD_BYTES.items()},
    "another site": (lambda message: Message(encode(trained("a"), parameters=update_of("b")), reply_to=message), "for this site and round"),
    "another round": (
        lambda message: Message(encode(trained("b", number=2), parameters=update_of("b")), reply_to=message),
        "for this site and round",
    ),
    "another fold": (lambda message: Message(encode(trained("b", fold=2), parameters=update_of("b")), reply_to=message), "for this site and round"),
    "another run": (lambda message: originating(message, run="run-2"), "for this run and study"),
    "another study": (lambda message: originating(message, study_hash="f" * 64), "for this run and study"),
    "no study": (lambda message: originating(message, run=None, study_hash=None), "for this run and study"),
    "empty": (lambda message: Message(RecordDict(), reply_to=message), "expected the records"),
    "no update": (lambda message: Message(encode(trained("b")), reply_to=message), "expected arrays under 'parameters'"),
    "an error": (lambda message: Message(Error(code=2, reason="patient 17 has HIV"), reply_to=message), "The site's app failed."),
    "an answer to another question": (
        lambda message: Message(encode(Evaluated(name="b", **ORIGIN, round=3, fold=1, privacy=None), parameters=update_of("b")), reply_to=message),
        "another message",
    ),
    "an evaluation that says so": (other_kind, ""),
    "an extra record": (extra_record, "expected the records"),
    "no JSON": (spoiled_json("not json"), "another message"),
    "a long JSON": (spoiled_json('{"kind":"trained","name":"' + "b" * 1_100_000 + '"}'), "at most"),
    "deep JSON": (spoiled_json('{"kind":"trained","name":' + "[" * 400_000), "declared keys"),
    "an extra key": (spoiled_json('{"kind":"trained","name":"b","round":3,"fold":1,"privacy":null,"num_examples":1000000000}'), "an undeclared key"),
    "epsilon NaN": (claiming({"epsilon": "NaN"}), ""),
    "epsilon infinite": (claiming({"epsilon": "1e999"}), ""),
    "epsilon below zero": (claiming({"epsilon": "-1"}), ""),
    "cross-check NaN": (claiming({"epsilon_cross_check": "NaN"}), ""),
    "steps below zero": (claiming({"steps": "-1"}), ""),
    "undeclared statistic": (with_statistics({"secrets": np.zeros(3)}), "declared names only"),
    "NaN statistic": (with_statistics({"histogram": one(np.nan)}), "histogram: expected finite"),
    "infinite statistic": (with_statistics({"histogram": one(np.inf)}), "histogram: expected finite"),
    "misshapen statistic": (with_statistics({"histogram": np.zeros((2, 5))}), r"histogram: expected \(2, 4\)"),
    "float32 statistic": (with_statistics({"histogram": np.zeros((2, 4), np.float32)}), "float64"),
    "negative count": (with_statistics({"histogram": one(-1.0)}), "negative"),
    "absurd count": (with_statistics({"histogram": one(1e300)}), "histogram"),
    "absurd sum": (with_statistics({"errors": np.full(5, 1e300)}), "errors"),
}


@pytest.mark.parametrize("kind", list(BAD_REPLIES))
def test_a_bad_reply_costs_its_site_the_round_and_nobody_else_anything(grid: InProcessGrid, kind: str) -> None:
    build, reason = BAD_REPLIES[kind]
    strategy = make_strategy()
    messages = ask(strategy, grid)
    strategy.take_replies([good("a", messages["a"]), build(messages["b"]), good("c", messages["c"])])
    assert strategy.round is not None
    answers = strategy.round.answers
    assert (answers["a"].status, answers["b"].status, answers["c"].status) == ("ok", "failed", "ok")
    told = answers["b"].reason or ""
    assert told[:5] in ("E101 ", "E102 ") and len(told) > 15
    assert "HIV" not in told
    assert re.search(reason, told), told
    after = aggregated(strategy)
    assert all(np.isfinite(value).all() for value in after.values())
    assert same(after, expected_mean(["a", "c"]))


# Blocks, and the study's own bound --------------------------------------------------------------------------------------------------


def flat(update: Parameters) -> np.ndarray:
    return np.concatenate([update[key].reshape(-1) for key in SHAPES])


def as_messages(updates: dict[str, Parameters], messages: dict[str, Message]) -> list[Message]:
    return [Message(encode(trained(name), parameters=update), reply_to=messages[name]) for name, update in updates.items()]


def as_block(updates: dict[str, Parameters], messages: dict[str, Message]) -> list[Block]:
    nodes = tuple(MEMBERS[name].node_id for name in updates)
    rows = np.stack([flat(update) for update in updates.values()])
    return [Block(node_ids=nodes, replies=tuple(map(trained, updates)), shapes=SHAPES, updates=rows, statistics=(None,) * len(updates))]


IN_FORM: dict[str, tuple[Spoil, str]] = {name: BAD_UPDATES[name] for name in ("NaN", "infinity", "minus infinity", "1e6-fold", "the largest float32")}


@pytest.mark.parametrize("kind", list(IN_FORM))
def test_a_block_of_sites_is_judged_as_each_alone(grid: InProcessGrid, kind: str) -> None:
    updates = {name: update_of(name) for name in MEMBERS} | {"b": IN_FORM[kind][0](update_of("b"))}
    told = []
    for replies in (as_messages, as_block):
        strategy = make_strategy()
        strategy.take_replies(replies(updates, ask(strategy, grid)))
        assert strategy.round is not None
        told.append(strategy.round.answers)
        assert same(aggregated(strategy), expected_mean(["a", "c"]))
    assert told[0] == told[1] and told[0]["b"].status == "failed"
    assert re.search(IN_FORM[kind][1], told[0]["b"].reason or "")


@pytest.mark.parametrize("change", [{"round": 2}, {"fold": 2}, {"name": "a"}, {"run": "run-2"}, {"study_hash": None}])
def test_a_block_may_not_answer_what_was_not_asked_either(grid: InProcessGrid, change: dict[str, object]) -> None:
    strategy = make_strategy()
    [block] = as_block({name: update_of(name) for name in MEMBERS}, ask(strategy, grid))
    replies = tuple(reply.model_copy(update=change) if reply.name == "b" else reply for reply in block.replies)
    strategy.take_replies([dataclasses.replace(block, replies=replies)])
    assert strategy.round is not None
    assert {name: answer.status for name, answer in strategy.round.answers.items()} == {"a": "ok", "b": "failed", "c": "ok"}
    assert same(aggregated(strategy), expected_mean(["a", "c"]))


@pytest.mark.parametrize("replies", [as_messages, as_block])
@pytest.mark.parametrize("name", strategy_names())
def test_a_study_bounds_the_norm_of_an_update(grid: InProcessGrid, name: str, replies: Callable[..., list[Message | Block]]) -> None:
    """At the bound an update counts, beyond it it costs its site the round; whatever the strategy, and not as norm-bounding, which scales it down."""
    lengths = {site: float(np.linalg.norm(flat(update_of(site)).astype(np.float64))) for site in MEMBERS}
    longest = max(lengths, key=lambda site: lengths[site])
    for bound, status in ((lengths[longest] * 1.0001, "ok"), (lengths[longest] * 0.9999, "failed")):
        chosen = Study.from_table({**BARE, "strategy": {"name": name, "largest_update": bound}}).strategy
        strategy = make_strategy(chosen)
        strategy.take_replies(replies({site: update_of(site) for site in MEMBERS}, ask(strategy, grid)))
        assert strategy.round is not None
        assert {site: answer.status for site, answer in strategy.round.answers.items()} == {
            site: status if site == longest else "ok" for site in MEMBERS
        }
        if status == "failed":
            reason = f"E102 update: expected a norm of at most {bound:g} (strategy.largest_update), got a larger one"
            assert strategy.round.answers[longest].reason == reason


def test_a_bound_above_the_limit_lifts_it_for_nobody(grid: InProcessGrid) -> None:
    strategy = make_strategy(options.FedAvg(largest_update=1e9))
    messages = ask(strategy, grid)
    strategy.take_replies([BAD_REPLIES["update: 1e6-fold"][0](messages["b"])])
    assert strategy.round is not None
    assert "1000 times the model's" in (strategy.round.answers["b"].reason or "")


def test_the_oracle_of_bad_replies_would_notice_one_that_counts(grid: InProcessGrid) -> None:
    assert not same(expected_mean(["a", "c"]), expected_mean(["a", "b", "c"]))


def test_a_second_reply_of_a_site_is_dropped(grid: InProcessGrid) -> None:
    strategy = make_strategy()
    messages = ask(strategy, grid)
    strategy.take_replies([good("a", messages["a"]), good("a", messages["a"]), good("b", messages["b"])])
    strategy.take_replies([good("a", messages["a"])])
    assert same(aggregated(strategy), expected_mean(["a", "b"]))


def test_a_good_reply_after_a_bad_one_is_dropped_too(grid: InProcessGrid) -> None:
    strategy = make_strategy()
    messages = ask(strategy, grid)
    strategy.take_replies([BAD_REPLIES["empty"][0](messages["b"]), good("b", messages["b"]), good("a", messages["a"])])
    assert same(aggregated(strategy), expected_mean(["a"]))


def test_a_node_that_was_not_asked_is_ignored(grid: InProcessGrid) -> None:
    strategy = make_strategy()
    messages = ask(strategy, grid)
    stranger = Message(RecordDict(), 77, "train")
    strategy.take_replies([Message(encode(trained("b"), parameters=update_of("b")), reply_to=stranger), good("a", messages["a"])])
    assert strategy.round is not None
    assert list(strategy.round.answers) == ["a"]
    assert same(aggregated(strategy), expected_mean(["a"]))


def test_a_refusal_is_an_answer(grid: InProcessGrid) -> None:
    strategy = make_strategy()
    messages = ask(strategy, grid)
    refusal = Message(encode(Refused(name="b", code="E700", reason="No room.")), reply_to=messages["b"])
    strategy.take_replies([good("a", messages["a"]), refusal])
    assert strategy.round is not None
    assert strategy.round.answers["b"] == Answer(name="b", status="refused", reason="E700 No room.")
    assert same(aggregated(strategy), expected_mean(["a"]))


def test_without_any_update_there_is_no_model(grid: InProcessGrid) -> None:
    strategy = make_strategy(options.FedAdam(name="fedadam"))
    messages = ask(strategy, grid)
    strategy.take_replies(BAD_REPLIES["update: NaN"][0](message) for message in messages.values())
    assert strategy.aggregate_train(3, []) == (None, None)
    assert strategy.state == {}


def test_the_weight_is_the_enrolled_one_whatever_rides_along(grid: InProcessGrid) -> None:
    """Claims of size in a reply are refused (see "an extra record", "an extra key"); the weight comes from `set_members` alone."""
    strategy = make_strategy()
    strategy.set_members([Member(name="a", node_id=2, weight=1), Member(name="b", node_id=3, weight=MAX_WEIGHT)])
    arrays = ArrayRecord({name: Array(value) for name, value in start().items()})
    small = {key: np.full(shape, 1e-3, np.float32) for key, shape in SHAPES.items()}
    messages = strategy.configure_train(3, arrays, TASK, grid)
    strategy.take_replies(
        Message(encode(trained(name), parameters=update), reply_to=message)
        for (name, update), message in zip({"a": update_of("a"), "b": small}.items(), messages, strict=True)
    )
    for key, value in aggregated(strategy).items():
        exact = 0.5 + (update_of("a")[key].astype(np.float64) + MAX_WEIGHT * float(np.float32(1e-3))) / (1 + MAX_WEIGHT)
        np.testing.assert_allclose(value, exact, rtol=1e-7)


def test_messages_share_one_record_and_name_the_round(grid: InProcessGrid) -> None:
    messages = list(ask(make_strategy(), grid, number=5).values())
    assert {message.metadata.group_id for message in messages} == {"5"}
    assert {message.metadata.message_type for message in messages} == {"train"}
    assert len({id(message.content) for message in messages}) == 1


def test_a_fraction_of_the_sites_is_asked_and_changes_by_round(grid: InProcessGrid) -> None:
    strategy = make_strategy(options.FedAvg(fraction=0.5))
    asked = {tuple(ask(strategy, grid, number=number)) for number in range(1, 30)}
    assert {len(names) for names in asked} == {2} and len(asked) == 3


def test_buffers_take_the_plain_mean_and_trainable_parameters_the_optimizers_step(grid: InProcessGrid) -> None:
    strategy = make_strategy(options.FedAvgM(name="fedavgm", server_learning_rate=0.1, server_momentum=0.5), trainable=frozenset({"layer.weight"}))
    messages = ask(strategy, grid)
    strategy.take_replies(good(name, message) for name, message in messages.items())
    after, plain = aggregated(strategy), expected_mean(["a", "b", "c"])
    np.testing.assert_allclose(after["layer.bias"], plain["layer.bias"], rtol=1e-6)
    np.testing.assert_allclose(after["layer.weight"] - 0.5, 0.1 * (plain["layer.weight"] - 0.5), rtol=1e-4, atol=1e-7)
    assert list(strategy.state["velocity"]) == ["layer.weight"]


def test_a_step_that_leaves_the_range_of_the_model_is_an_error_and_not_an_infinite_model(grid: InProcessGrid) -> None:
    strategy = make_strategy(options.FedAvgM(name="fedavgm", server_learning_rate=1e39, server_momentum=0.0))
    messages = ask(strategy, grid)
    strategy.take_replies(good(name, message) for name, message in messages.items())
    with pytest.raises(ProtocolError, match="finite"):
        strategy.aggregate_train(3, [])


def test_statistics_and_privacy_of_good_replies_are_kept_for_the_round(grid: InProcessGrid) -> None:
    strategy = make_strategy()
    messages = ask(strategy, grid)
    statistics = {"histogram": one(5.0)}
    reply = Message(encode(trained("a", privacy=PRIVACY), parameters=update_of("a"), statistics=statistics), reply_to=messages["a"])
    strategy.take_replies([reply, good("b", messages["b"])])
    assert strategy.round is not None
    answer = strategy.round.answers["a"]
    assert answer.privacy == PRIVACY
    assert answer.statistics is not None and np.array_equal(answer.statistics["histogram"], one(5.0))
    assert strategy.round.answers["b"].statistics is None


@pytest.mark.parametrize("noised", [False, True])
def test_statistics_below_zero_are_taken_where_they_carry_noise(grid: InProcessGrid, noised: bool) -> None:
    strategy = FederatedStrategy(options.FedAvg(), seed=1, trainable=frozenset(SHAPES), statistics=STATISTICS_DECLARED, noised_statistics=noised)
    strategy.set_members(MEMBERS.values())
    arrays = ArrayRecord({name: Array(value) for name, value in start().items()})
    messages = strategy.configure_evaluate(3, arrays, TASK, grid)
    values = {"a": one(-3.25), "b": one(np.nan), "c": one(-1e300)}
    for message, (name, value) in zip(messages, values.items(), strict=True):
        strategy.take_replies(
            [Message(encode(Evaluated(name=name, **ORIGIN, round=3, fold=1, privacy=None), statistics={"histogram": value}), reply_to=message)]
        )
    assert strategy.round is not None
    statuses = {name: answer.status for name, answer in strategy.round.answers.items()}
    assert statuses == {"a": "ok" if noised else "failed", "b": "failed", "c": "failed"}


def test_evaluation_replies_add_no_update(grid: InProcessGrid) -> None:
    strategy = make_strategy()
    arrays = ArrayRecord({name: Array(value) for name, value in start().items()})
    messages = strategy.configure_evaluate(3, arrays, TASK, grid)
    assert [message.metadata.dst_node_id for message in messages] == [2, 3, 4]
    reply = Message(encode(Evaluated(name="a", **ORIGIN, round=3, fold=1, privacy=None), statistics={"histogram": one(2.0)}), reply_to=messages[0])
    smuggled = Message(encode(trained("b"), parameters=update_of("b")), reply_to=messages[1])
    smuggled.metadata.__dict__["_message_type"] = "train"
    assert strategy.aggregate_evaluate(3, [reply, smuggled]) is None
    assert strategy.round is not None
    assert {name: answer.status for name, answer in strategy.round.answers.items()} == {"a": "ok", "b": "failed"}
    assert strategy.round.mean.total_weight == 0


@pytest.mark.parametrize("noised", [False, True])
def test_exact_statistics_with_an_update_are_not_taken_in_a_noised_study(grid: InProcessGrid, noised: bool) -> None:
    strategy = FederatedStrategy(options.FedAvg(), seed=1, trainable=frozenset(SHAPES), statistics=STATISTICS_DECLARED, noised_statistics=noised)
    strategy.set_members(MEMBERS.values())
    message = ask(strategy, grid)["a"]
    strategy.take_replies([Message(encode(trained("a"), parameters=update_of("a"), statistics={"histogram": one(3.0)}), reply_to=message)])
    assert strategy.round is not None and strategy.round.answers["a"].status == ("failed" if noised else "ok")
    assert (strategy.round.mean.total_weight == 0) == noised


@pytest.mark.parametrize("told", ["\x1b]0;title\x07\x1b[31mall is well", "one\nanother", "\x9b31m", "\u202egnp.exe"])
def test_what_a_site_says_commands_no_terminal(grid: InProcessGrid, told: str) -> None:
    strategy = make_strategy()
    messages = ask(strategy, grid)
    refusal = Message(encode(Refused(name="b", code="E700", reason=told)), reply_to=messages["b"])
    withheld = Message(encode(trained("a").model_copy(update={"withheld": told}), parameters=update_of("a")), reply_to=messages["a"])
    strategy.take_replies([refusal, withheld])
    assert strategy.round is not None
    reasons = [answer.reason for answer in strategy.round.answers.values()]
    assert len(reasons) == 2 and all(reason is not None and reason.isprintable() for reason in reasons)

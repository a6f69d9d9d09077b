"""A server that asks for too much, or for nonsense, gets a refusal that names the rule, or the site's stricter value; never more than allowed."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.app import client_app
from client.site import Site
from shared.messages import Enrolled, Refused, Trained, decode, encode
from shared.study import Study
from simulations.in_process import InProcessGrid

Hospitals = Callable[..., Any]
Studies = Callable[..., Study]


def ask(site: Site, content: RecordDict, kind: str) -> RecordDict:
    """The site's reply through the Flower app."""
    grid = InProcessGrid(client_app(lambda context: site), ["north"])
    (node,) = grid.get_node_ids()
    (reply,) = grid.send_and_receive([grid.create_message(content, kind, node, "1")])
    assert not reply.has_error()
    return reply.content


def enrolment(hospital: Any, table: dict[str, object], run: str = "run-1") -> RecordDict:
    """The request as raw JSON: what no honest coordinator's classes would let through."""
    text = json.dumps({"kind": "enrol", "run": run, "study": table, "task_fingerprint": hospital.task.fingerprint()}).replace(" ", "")
    return RecordDict({"message": ConfigRecord({"json": text})})


@pytest.mark.parametrize(
    ("section", "change", "rule"),
    [
        ("privacy", {"epsilon": None, "noise_multiplier": 0}, "privacy.noise_multiplier"),
        ("privacy", {"epsilon": None, "noise_multiplier": math.nan}, "privacy.noise_multiplier"),
        ("privacy", {"epsilon": None, "noise_multiplier": 0.3}, "policy.max_epsilon"),
        ("privacy", {"max_grad_norm": 1e9}, "privacy.max_grad_norm"),
        ("privacy", {"max_grad_norm": 1e5}, "policy.max_grad_norm"),
        ("privacy", {"max_grad_norm": math.inf}, "privacy.max_grad_norm"),
        ("privacy", {"epsilon": 1e9}, "privacy.epsilon"),
        ("privacy", {"epsilon": 50.0}, "policy.max_epsilon"),
        ("privacy", {"delta": 0.09}, None),
        ("privacy", {"delta": 0.004}, "policy.max_delta"),
        ("privacy", {"epsilon": None, "unit": "none"}, "policy.allow_no_privacy"),
        ("privacy", {"unit": "ward"}, "privacy.unit"),
        ("privacy", {"unit": "site"}, "privacy"),
        ("privacy", {"secure": False}, "privacy"),  # a key that nobody declared is not repeated
        ("privacy", {"evaluation_epsilon": 50.0}, "policy.max_epsilon"),
        ("training", {"local_steps": 1_000_000_000}, None),
        ("training", {"local_steps": 100_000}, "policy.max_steps"),
        ("training", {"batch_size": 0}, "training.batch_size"),
        ("rounds", {"count": 10**9}, "rounds.count"),
        ("rounds", {"count": 99_999}, "policy.max_steps"),
    ],
)
def test_each_demand_is_refused_by_its_rule(
    make_hospital: Hospitals, make_study: Studies, section: str, change: dict[str, object], rule: str | None
) -> None:
    hospital = make_hospital()
    table = make_study().to_table()
    merged = {**table[section], **change}  # type: ignore[dict-item]
    table[section] = {key: value for key, value in merged.items() if value is not None}
    refused = decode(ask(hospital.site, enrolment(hospital, table), MessageType.QUERY), Refused)
    assert refused.code in ("E300", "E600")
    if rule is not None:
        assert refused.reason.endswith(f"Rule: {rule}.")
    assert not hospital.ledger_path.exists()  # nothing was even begun


def test_a_sample_rate_is_never_above_one_and_noise_is_never_less_than_the_sites(make_hospital: Hospitals, make_study: Studies) -> None:
    hospital = make_hospital(max_epsilon=2.0)
    table = make_study(training={"batch_size": 100_000}, privacy={"epsilon": 2.0}).to_table()
    assert isinstance(decode(ask(hospital.site, enrolment(hospital, table), MessageType.QUERY), Enrolled, Refused), Enrolled)
    plan = hospital.site._admission.plan
    assert plan.sample_rate == 1.0 and plan.epsilon <= 2.0


scalars = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8))
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)), max_leaves=6
)


@pytest.fixture(scope="module")
def keep() -> dict[str, Any]:
    """The one hospital that all examples meet: what one message does must not open the door to the next."""
    return {}


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_message_brings_an_exception_or_an_overspent_ledger(
    keep: dict[str, Any], make_hospital: Hospitals, make_study: Studies, data: st.DataObject
) -> None:
    """A fuzzer over all three messages: fields replaced, dropped, added, arrays of any kind."""
    hospital = keep.get("hospital") or keep.setdefault("hospital", make_hospital(max_epsilon=2.5))
    study = make_study(privacy={"noise_multiplier": 8.0})
    kind, message = data.draw(
        st.sampled_from(
            [
                (MessageType.QUERY, hospital.enrolment(study, run=data.draw(st.sampled_from(["a", "b", "c"])))),
                (MessageType.TRAIN, hospital.training(study, data.draw(st.integers(-1, 5)), run=data.draw(st.sampled_from(["a", "b"])))),
                (MessageType.EVALUATE, hospital.training(study, 3, run="a")),
            ]
        )
    )
    table = json.loads(message.model_dump_json())
    if kind == MessageType.EVALUATE:
        table["kind"] = "evaluate"
        table.pop("heads")
    for _ in range(data.draw(st.integers(0, 2))):
        target = table["study"] if "study" in table and isinstance(table["study"], dict) and data.draw(st.booleans()) else table
        key = data.draw(st.sampled_from([*sorted(target), "extra"]))
        if isinstance(target.get(key), dict) and target[key] and data.draw(st.booleans()):
            target, key = target[key], data.draw(st.sampled_from([*sorted(target[key]), "extra"]))
        if data.draw(st.booleans()):
            target.pop(key, None)
        else:
            target[key] = data.draw(values)
    try:
        record = RecordDict({"message": ConfigRecord({"json": json.dumps(table, separators=(",", ":"))})})
    except (ValueError, TypeError):
        return
    if data.draw(st.booleans()):
        arrays = {name: np.array(value) for name, value in hospital.parameters.items()}
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(arrays)))
            arrays[name] = data.draw(st.sampled_from([arrays[name] * np.nan, arrays[name][:1], arrays[name].astype(np.float64), arrays[name] * 1e30]))
        record["parameters"] = encode(message, parameters=arrays)["parameters"] if data.draw(st.booleans()) else ArrayRecord({})
    reply = ask(hospital.site, record, kind)
    content = (
        decode(reply, *([Enrolled, Refused] if kind == MessageType.QUERY else [Trained, Refused] if kind == MessageType.TRAIN else []) or [Refused])
        if (kind != MessageType.EVALUATE)
        else None
    )
    assert content is None or content.name == "north"
    if hospital.ledger_path.exists():
        assert hospital.epsilon(1e-3) <= 2.5 * (1 + 1e-9)

"""Studies whose updates leave sites under masks alone: the same models as in the clear, whoever drops out; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message

import simulations.in_process
from client.ledger import reading
from client.secure_updates import SecureUpdates
from client.site import Site
from server.run_folder import RunFolder
from shared.errors import ConfigurationError, ProtocolError, QuorumLostError
from shared.messages import MASKED, MESSAGE, PARAMETERS, decode, encode, to_array_record
from shared.results import RoundRecord
from shared.secure_sum.messages import AdvertiseKeysTask, SecureTrainTask, ShareKeysTask, SignSurvivorsTask, UnmaskTask
from shared.study import Study
from shared.task import architecture_hash, resolve_task
from simulations.attacks.poisoning import attack_poisoning
from simulations.in_process import InProcessGrid
from simulations.simulate import prepare, virtual_sites
from tests.simulations.conftest import OneByOne

STAGES = {"advertise": AdvertiseKeysTask, "share": ShareKeysTask, "mask": SecureTrainTask, "sign": SignSurvivorsTask, "unmask": UnmaskTask}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def runner(tmp_path: Path) -> OneByOne:
    """Messages as in a deployment, which a test can come between; of blocks is `test_secure_blocks`."""
    return OneByOne(out=tmp_path / "runs")


def study_of(runner, *, secure: bool = True, **changes: object) -> Study:
    study = runner.study(**{"federation": {"sites": 5, "alpha": 2.0}, "rounds": {"count": 2, "require": 3}, **changes})
    return study.replace(secure_aggregation={}) if secure else study


def final(run) -> Arrays:
    return run.folder.read_model("final", architecture_hash(resolve_task(run.folder.study.task).model()))


def assert_close(found: Arrays, expected: Arrays) -> None:
    """To the fixed point's step, 10 x 10,000 x 5 / 2^31, over a weight of 300 or so, in each of two rounds, and what they make of it."""
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=2e-5, err_msg=name)


def intercept(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, Message, Callable[[Message], Message]], Message]) -> None:
    """Have `change(site, message, answer)` carry every message of the in-process grid."""
    real = InProcessGrid._answer

    def answer(self: InProcessGrid, message: Message) -> Message:
        site = str(self._contexts[message.metadata.dst_node_id].node_config["site"])
        return change(site, message, lambda asked: real(self, asked))

    monkeypatch.setattr(simulations.in_process.InProcessGrid, "_answer", answer)


def kind(message: Message) -> str:
    return str(message.content[MESSAGE]["json"])[9:].split('"')[0]


def kind_of(stage: str) -> str:
    return str(STAGES[stage].model_fields["kind"].default)


# The same models -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [{"name": "fedavg"}, {"name": "fedavg", "weights": "equal"}, {"name": "fedprox"}, {"name": "fedadam"}, {"name": "scaffold"}, {"name": "fedper"}, {"name": "ditto"}],
    ids=lambda strategy: "-".join(strategy.values()),
)  # fmt: skip
def test_a_secure_run_comes_to_the_model_of_one_in_the_clear(runner, strategy: dict[str, str]) -> None:
    steps = {"training": {"local_steps": 2}} if strategy["name"] == "scaffold" else {}
    runs = [runner.run(study_of(runner, secure=secure, strategy=strategy, **steps)) for secure in (True, False)]
    if strategy["name"] == "fedadam":  # it divides by roots of squares, and so makes much of a step of the fixed point
        for name, value in final(runs[0]).items():
            np.testing.assert_allclose(value, final(runs[1])[name], atol=2e-2)
    else:
        assert_close(final(runs[0]), final(runs[1]))
    assert runs[0].lines[0]["sites"] == runs[1].lines[0]["sites"]
    assert {name: site.steps for name, site in runs[0].result.privacy.sites.items()} == {
        name: site.steps for name, site in runs[1].result.privacy.sites.items()
    }


@pytest.mark.slow
def test_without_privacy_the_sum_alone_is_learnt_too_and_two_runs_are_the_same_bits(runner) -> None:
    study = study_of(runner, privacy={"unit": "none"})
    runs = [runner.run(study) for _ in range(2)]
    assert runs[0].model() == runs[1].model()
    assert_close(final(runs[0]), final(runner.run(study_of(runner, secure=False, privacy={"unit": "none"}))))


def test_no_update_crosses_the_wire_in_the_clear(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(runner, privacy={"unit": "none"}, rounds={"count": 1, "require": 3})
    updates, sent = dict[str, np.ndarray](), dict[str, bytes]()
    real = SecureUpdates.mask

    def watched(self: SecureUpdates, task, update, weight, *, model):
        updates[self._name] = np.concatenate([value.reshape(-1) for value in update.values()])
        return real(self, task, update, weight, model=model)

    def carry(site: str, message: Message, answer) -> Message:
        reply = answer(message)
        if message.metadata.message_type == "train":
            assert PARAMETERS not in reply.content and set(reply.content) == {MESSAGE, "statistics", MASKED}
            sent[site] = reply.content[MASKED][MASKED].data
        return reply

    monkeypatch.setattr(SecureUpdates, "mask", watched)
    intercept(monkeypatch, carry)
    run = runner.run(study)
    assert len(sent) == len(updates) == 5
    words = {site: np.frombuffer(data, "<u4")[:-2].view("<i4").astype(np.float64) for site, data in sent.items() if len(data) % 4 == 0}
    assert len(words) == 5, "four bytes a value"
    for site, update in updates.items():  # 31 values: by chance their correlation is beyond 0.85 less than once in a million
        assert abs(np.corrcoef(words[site], update)[0, 1]) < 0.85
    stored = b"".join(path.read_bytes() for path in run.folder.path.rglob("*") if path.is_file())
    assert not any(update.astype(np.float32).tobytes()[:40] in stored for update in updates.values())


# Drop-outs -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_site_that_drops_out_at_any_stage_is_left_out_or_not_missed(runner, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    study = study_of(runner, privacy={"unit": "none"}, rounds={"count": 1, "require": 3})
    everyone = final(runner.run(study))

    def fail(site: str, message: Message, answer) -> Message:
        if site == "site-2" and kind(message) == kind_of(stage):
            raise RuntimeError("unplugged")
        return answer(message)

    def failing(site: str, message: Message, answer) -> Message:
        try:
            return fail(site, message, answer)
        except RuntimeError as error:
            return Message(Error(code=2, reason=str(error)), reply_to=message)

    intercept(monkeypatch, failing)
    records: list[RoundRecord] = []
    found = final(runner.run(study, observe=records.append))
    monkeypatch.undo()
    statuses = {site.name: site.status for site in records[0].sites}
    if stage in ("sign", "unmask"):
        assert_close(found, everyone)
        assert set(statuses.values()) == {"ok"}
        return

    def refuse(site: str, message: Message, answer) -> Message:

        return Message(Error(code=2, reason=""), reply_to=message) if site == "site-2" and kind(message) == "train" else answer(message)

    intercept(monkeypatch, refuse)
    assert_close(
        found, final(runner.run(study_of(runner, secure=False, privacy={"unit": "none"}, rounds={"count": 1, "require": 3}), execution="sequential"))
    )
    assert statuses == {f"site-{number}": "failed" if number == 2 else "ok" for number in range(1, 6)}


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_the_round_fails_by_name_and_nothing_is_learnt(runner, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:

    gone = {"site-1", "site-2", "site-3"}
    intercept(
        monkeypatch,
        lambda site, message, answer: (
            Message(Error(code=2, reason=""), reply_to=message) if site in gone and kind(message) == kind_of(stage) else answer(message)
        ),
    )
    study = study_of(runner, rounds={"count": 1, "require": 1})
    with pytest.raises(QuorumLostError, match=r"round 1: .*expected 3 sites or more, got 2"):
        runner.run(study)
    run = runner.latest()
    assert run.result.outcome == "failed" and run.result.rounds_completed == 0 and not (run.folder.path / "checkpoint" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_sum_that_fails_is_begun_anew_where_the_study_waits_and_is_charged_once(runner, monkeypatch: pytest.MonkeyPatch) -> None:

    study = study_of(runner, rounds={"count": 1, "require": 3, "on_missing": "wait"})
    whole, asked = final(runner.run(study)), list[str]()

    def carry(site: str, message: Message, answer) -> Message:
        asked.append(kind(message))
        if site != "site-1" and kind(message) == kind_of("mask") and asked.count(kind_of("mask")) <= 5:
            answer(message)  # trained, and lost on its way
            return Message(Error(code=2, reason=""), reply_to=message)
        return answer(message)

    intercept(monkeypatch, carry)
    run = runner.run(study)
    assert_close(final(run), whole)
    for site in run.result.privacy.sites:
        with reading(run.folder.path / "ledgers" / f"{site}.sqlite") as ledger:
            assert len(ledger.charges()) == 1


@pytest.mark.slow
def test_a_run_interrupted_after_its_sum_was_unmasked_goes_on(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(runner)
    whole, real, written = runner.run(study), RunFolder.write_checkpoint, list[int]()

    def interrupted(self: RunFolder, checkpoint) -> None:
        written.append(1)
        if len(written) == 2:
            raise KeyboardInterrupt
        real(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(study)
    resumed = runner.run(study, resume=runner.latest().folder.path)
    assert resumed.model() == whole.model()


# Who asks for more ---------------------------------------------------------------------------------------------------------------------


def test_a_coordinator_that_sends_one_site_another_model_learns_nothing(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def carry(site: str, message: Message, answer) -> Message:
        if site == "site-3" and kind(message) == kind_of("mask"):
            arrays = message.content[PARAMETERS]
            assert isinstance(arrays, ArrayRecord)
            message.content[PARAMETERS] = to_array_record({name: array.numpy() * np.float32(1.5) for name, array in arrays.items()})
        return answer(message)

    intercept(monkeypatch, carry)
    with pytest.raises(QuorumLostError, match="got words that are none"):
        runner.run(study_of(runner))


def test_a_site_that_claims_another_weight_ends_the_round(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SecureUpdates.mask
    monkeypatch.setattr(SecureUpdates, "mask", lambda self, task, update, weight, *, model: real(self, task, update, weight + 1, model=model))
    with pytest.raises(QuorumLostError, match="expected a weight of"):
        runner.run(study_of(runner))


def sites_of(study: Study, runner) -> dict[str, Site]:
    setting = prepare(study, None)
    assert setting.federation is not None
    return virtual_sites(setting.federation, setting.task, setting.study, runner.out / "ledgers")


def test_a_site_gives_no_update_in_the_clear_at_another_weight_or_in_another_sum(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    heavier, clear = list[str](), list[str]()

    def carry(site: str, message: Message, answer) -> Message:
        if kind(message) == kind_of("mask"):
            task = decode(message.content, SecureTrainTask)
            changed = encode(task.train)
            changed[PARAMETERS] = message.content[PARAMETERS]
            asked = Message(changed, message.metadata.dst_node_id, "train")
            clear.append(str(answer(asked).content[MESSAGE]["json"]))
            elsewhere = task.mask_input.model_copy(update={"of": task.mask_input.of.model_copy(update={"round": 3 - task.train.round})})
            for update in ({"weight": task.weight + 1}, {"weight": task.weight - 1}, {"mask_input": elsewhere}):
                other = encode(task.model_copy(update=update))
                other[PARAMETERS] = message.content[PARAMETERS]
                heavier.append(str(answer(Message(other, message.metadata.dst_node_id, "train")).content[MESSAGE]["json"]))
        return answer(message)

    intercept(monkeypatch, carry)
    run = runner.run(study_of(runner, rounds={"count": 2, "require": 3}))
    assert len(clear) == 10 and len(heavier) == 30
    for site in run.result.privacy.sites:
        with reading(run.folder.path / "ledgers" / f"{site}.sqlite") as ledger:
            assert len(ledger.charges()) == 2, "nothing that was refused was trained"
    assert all('"kind":"refused"' in told for told in clear + heavier)


@pytest.mark.slow
def test_the_keys_of_a_site_may_not_change_while_a_run_lasts(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    real, rounds = SecureUpdates.answer, list[int]()

    def carry(self: SecureUpdates, task):
        if isinstance(task, AdvertiseKeysTask) and self._name == "site-1" and task.of.round == 2:
            rounds.append(2)
            task = task.model_copy(update={"roster": {**task.roster, "site-2": "ab" * 32}})
        return real(self, task)

    monkeypatch.setattr(SecureUpdates, "answer", carry)
    records: list[RoundRecord] = []
    runner.run(study_of(runner), observe=records.append)
    assert rounds and {site.name: site.status for site in records[1].sites}["site-1"] == "refused"


def test_sites_keep_to_the_threshold_and_the_rounds_of_the_study_and_to_the_first_keys(runner, monkeypatch: pytest.MonkeyPatch) -> None:
    study, seen = study_of(runner).replace(secure_aggregation={"threshold": 5}), list[AdvertiseKeysTask]()
    real, refused = Site.answer_sum, list[str]()

    def carry(self: Site, task):
        if isinstance(task, AdvertiseKeysTask) and self.settings.name == "site-1":
            seen.append(task)
            changed = {name: "ab" * 32 if name == "site-2" else key for name, key in task.roster.items()}
            others = [{"threshold": 4}, {"sites": task.sites[:3], "threshold": 3}, {"of": task.of.model_copy(update={"round": 3})}]
            for update in others + ([{"roster": changed}] if task.of.round == 2 else []):
                with pytest.raises(ProtocolError) as error:
                    real(self, task.model_copy(update=update))
                refused.append(error.value.what)
        return real(self, task)

    monkeypatch.setattr(Site, "answer_sum", carry)
    run = runner.run(study)
    assert run.result.outcome == "completed" and len(refused) == 7
    [path] = (run.folder.path / "ledgers" / "site-1.releases").glob("*-sum.json")
    assert set(json.loads(path.read_text())["keys"]) == set(seen[0].roster), "a daemon that starts again knows them still"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": {"name": "krum"}}, "looks at single updates"),
        ({"strategy": {"name": "norm-bounding"}}, "looks at single updates"),
        ({"strategy": {"name": "q-fedavg"}}, "looks at single updates"),
        ({"strategy": {"name": "fednova"}}, "looks at single updates"),
        ({"strategy": {"name": "cyclic"}}, "looks at single updates"),
        ({"faults": {"sites": 1}}, "expected no faults"),
        ({"secure_aggregation": {"threshold": 2}}, "secure_aggregation.threshold"),
        ({"secure_aggregation": {"max_value": 0}}, "secure_aggregation.max_value"),
    ],
)
def test_a_study_that_cannot_be_is_refused(runner, changes: dict, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        study_of(runner, **changes).replace(**{"secure_aggregation": {}, **changes})


def test_too_few_sites_and_attacks_are_refused_before_anything_is_begun(runner) -> None:
    with pytest.raises(ConfigurationError, match="at least 3 sites"):
        runner.run(study_of(runner, federation={"sites": 2}, rounds={"require": 1}))
    with pytest.raises(ConfigurationError, match="at least 6 sites"):
        runner.run(study_of(runner).replace(secure_aggregation={"threshold": 6}))
    for machine in ({"execution": "blocks"}, {"engine": "ray"}):
        with pytest.raises(ConfigurationError, match="strategy ditto, which has a part of its own at each site"):
            runner.run(study_of(runner, strategy={"name": "ditto"}), **machine)
    with pytest.raises(ConfigurationError, match="in the clear"):
        attack_poisoning(study_of(runner))


def test_an_update_beyond_the_study_bound_is_not_masked(runner) -> None:
    study = study_of(runner, strategy={"name": "fedavg", "largest_update": 1e-6})
    with pytest.raises(QuorumLostError, match="E102"):
        runner.run(study)


@pytest.mark.slow
def test_the_claim_says_what_the_coordinator_sees_and_what_it_rests_on(runner) -> None:
    claim = runner.run(study_of(runner)).claim
    [told] = [text for text in claim.covered + claim.assumed + claim.not_covered if "secure aggregation" in text.lower()]
    assert "malicious site" in told
    with pytest.raises(ProtocolError):
        next(iter(sites_of(study_of(runner), runner).values())).answer_sum(UnmaskTask.model_construct(kind="unmask"))

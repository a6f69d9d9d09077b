"""A secure sum over the gates of four real hospitals: sealed messages, daemons that are started anew, and what stands in their logs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from client.ledger import reading
from server.secure_sum import SecureSum, Stage
from server.sum_stages import sum_form, sum_setting
from shared.errors import QuorumLostError
from shared.messages import Content, Enrolled, Refused, TrainTask, decode, decode_masked, encode
from shared.models import arrays_digest
from shared.secure_sum.messages import (
    AdvertisedKeys,
    MaskInputTask,
    SecureTrained,
    SecureTrainTask,
    SharedKeys,
    SignedSurvivors,
    SumReply,
    SumTask,
    Unmasked,
)
from shared.study import Study
from tests.gated import GatedSite, enrolment, gated, study, the_task

pytestmark = pytest.mark.slow  # seconds altogether

NAMES = ("east", "north", "south", "west")
REPLIES = (AdvertisedKeys, SharedKeys, SecureTrained, SignedSurvivors, Unmasked, Refused)
NOBODY: Mapping[Stage, frozenset[str]] = {}


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[dict[str, GatedSite]]:
    """Four hospitals that have approved and agreed to the small study, with its updates under masks."""
    made = gated(tmp_path, names=NAMES)
    for site in made.values():
        site.approve(secure_study())
    yield made
    for site in made.values():
        site.gate.close()


def secure_study() -> Study:
    return study(secure_aggregation={}, strategy={"name": "fedavg", "weights": "equal"})


def asked(site: GatedSite, name: str, task: SumTask) -> tuple[SumReply, np.ndarray | None] | Refused:
    """The answer of a gate to one request, its masked input beside it."""
    content: Content = task
    if isinstance(task, MaskInputTask):
        content = SecureTrainTask(train=train_task(), mask_input=task, weight=1)
    question, sealed = site.sealed(encode(content, parameters=site.parameters if isinstance(task, MaskInputTask) else None), site=name)
    record = site.opened(site.gate.answer(question), sealed).record
    reply = decode(record, *REPLIES)
    if isinstance(reply, Refused):
        return reply
    if isinstance(reply, SecureTrained):
        return reply.masked, decode_masked(record)
    assert isinstance(reply, SumReply)
    return reply, None


def train_task() -> TrainTask:
    return TrainTask(run="run-1", study_hash=secure_study().fingerprint(), round=1, fold=1)


def begun(sites: Mapping[str, GatedSite]) -> SecureSum:
    """All enrol, and a sum of the first round begins."""
    for name, site in sites.items():
        assert isinstance(enrolled(site, name), Enrolled)
    form, noise = sum_form(secure_study(), the_task()), dict.fromkeys(sites, 0.0)
    secure = SecureSum(
        sum_setting(secure_study(), form, train_task(), noise), roster={name: site.hospital.signer.public_key() for name, site in sites.items()}
    )
    secure.model = arrays_digest(next(iter(sites.values())).parameters)
    return secure


def enrolled(site: GatedSite, name: str) -> Content:
    question, sealed = site.sealed(encode(enrolment(secure_study())), site=name)
    return decode(site.opened(site.gate.answer(question), sealed).record, Enrolled, Refused)


def carry(sites: Mapping[str, GatedSite], secure: SecureSum, until: Stage, lost: Mapping[Stage, frozenset[str]] = NOBODY) -> dict[str, Refused]:
    """Stages up to this one; who refused in the last that was asked."""
    refusals: dict[str, Refused] = {}
    while secure.stage < until:
        refusals = {}
        for name, task in secure.tasks().items():
            if name in lost.get(secure.stage, ()):
                continue
            answer = asked(sites[name], name, task)
            if isinstance(answer, Refused):
                refusals[name] = answer
            else:
                secure.take(name, *answer)
        try:
            secure.close_stage()
        except QuorumLostError:
            return refusals
    return refusals


def steps(site: GatedSite) -> int:
    hospital = site.hospital
    with reading(hospital.file.ledger_path(hospital.site_file)) as ledger:
        return sum(charge.event.steps for charge in ledger.charges())


def test_a_daemon_that_starts_again_signs_no_second_list_and_adds_its_update_to_no_other_sum(sites: dict[str, GatedSite]) -> None:
    first = begun(sites)
    carry(sites, first, Stage.UNMASK)
    assert first.survivors == NAMES
    charged = {name: steps(site) for name, site in sites.items()}
    for site in sites.values():
        site.started_anew()
    fewer = begun(sites)
    refusals = carry(sites, fewer, Stage.DONE, {Stage.SHARE_KEYS: frozenset({"west"})})
    assert fewer.stage == Stage.FAILED
    assert {name: told.code for name, told in refusals.items()} == dict.fromkeys(("east", "north", "south"), "E803")
    again = begun(sites)
    carry(sites, again, Stage.DONE)
    assert again.total.sites == NAMES and again.total.weight == 4
    assert {name: steps(site) for name, site in sites.items()} == charged, "the same update, charged once"


def test_a_lost_signature_is_survived_and_the_audit_logs_name_every_stage(sites: dict[str, GatedSite]) -> None:
    secure = begun(sites)
    carry(sites, secure, Stage.DONE, {Stage.SIGN_SURVIVORS: frozenset({"south"})})
    assert secure.total.sites == NAMES
    kinds = {name: [row["details"]["kind"] for row in site.audit() if row["event"] == "answer sent"] for name, site in sites.items()}
    whole = ["enrolled", "advertised-keys", "shared-keys", "secure-trained", "signed-survivors", "unmasked"]
    assert kinds == {name: whole[:4] if name == "south" else whole for name in NAMES}


def test_a_hospital_s_own_list_holds_from_the_next_task_on(sites: dict[str, GatedSite]) -> None:
    """The key of east is the one in its request.json, which its hospital can read out; west's is another's."""
    keys = {name: json.loads((site.kit / "request.json").read_text())["signing_key"] for name, site in sites.items()}
    path = sites["north"].kit / "site.toml"
    plain = path.read_text()
    path.write_text(plain + f'[policy.sum_with]\neast = "{keys["east"]}"\n')
    carry(sites, secure := begun(sites), Stage.DONE)
    assert "north" in secure.total.sites
    path.write_text(plain + f'[policy.sum_with]\neast = "{keys["west"]}"\n')
    carry(sites, refused := begun(sites), Stage.SHARE_KEYS)
    assert "north" not in refused.asked and set(refused.asked) == {"east", "south", "west"}
    assert sites["north"].last("answer sent")["reason"].endswith("Rule: policy.sum_with.")


def test_who_was_left_out_of_the_signing_gives_no_second_update_on_the_same_model(sites: dict[str, GatedSite]) -> None:
    """West is in the sum and never asked to sign. Asked with another model in between, its gate forgets the update that it released; a new one on the first
    model would differ from it alone between two sums over the same hospitals."""
    lost = {Stage.SIGN_SURVIVORS: frozenset({"west"})}
    first = begun(sites)
    carry(sites, first, Stage.DONE, lost)
    assert "west" in first.total.sites
    other, known = begun(sites), sites["west"].parameters
    carry(sites, other, Stage.MASK_INPUT)
    sites["west"].parameters = {name: value + 1e-3 for name, value in known.items()}
    assert not isinstance(asked(sites["west"], "west", other.tasks()["west"]), Refused)
    sites["west"].parameters = known
    second = begun(sites)
    refusals = carry(sites, second, Stage.SIGN_SURVIVORS)
    assert set(refusals) == {"west"} and refusals["west"].code == "E102", "the others give the same again, and west nothing else"

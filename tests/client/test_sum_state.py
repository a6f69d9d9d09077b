"""What a site keeps on disk of its secure sums, and the keys that it was told."""

import json
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import client.secure_updates
from client.secure_updates import MOST_KEYS, SecureUpdates
from server.secure_sum import SecureSum, Stage
from shared.errors import PolicyRefusedError, ProtocolError, StorageError, WardroundError
from shared.plan import SitePlan, plan_site
from shared.secure_sum.messages import AdvertisedKeys, AdvertiseKeysTask, MaskInputTask, SignSurvivorsTask, SumTask, UnmaskTask
from shared.secure_sum.setting import SumForm, SumRound, SumSetting
from shared.study import Study

NAMES = ("east", "north", "south", "west")
KEYS = {name: Ed25519PrivateKey.generate() for name in NAMES}
ROSTER = {name: key.public_key().public_bytes_raw().hex() for name, key in KEYS.items()}
FORM = SumForm(num_values=5, max_value=1.0, max_weight=1)
OF = SumRound(run="r", study_hash="h", fold=1, round=1)
BEGIN = AdvertiseKeysTask(of=OF, sites=NAMES, threshold=3, roster=ROSTER)
PLAN: SitePlan = plan_site(Study.from_table({"name": "s", "task": "breast-cancer", "privacy": {"unit": "none"}}), 100)


def opened(folder: Path, name: str = "north", *, run: str = "r", sum_with: dict[str, str] | None = None) -> SecureUpdates:
    return SecureUpdates(
        FORM,
        plan=PLAN,
        name=name,
        run=run,
        study_hash="h",
        signer=KEYS[name],
        folder=folder / name,
        largest_norm=None,
        seed=None,
        sum_with=sum_with or {},
    )


def test_a_policy_that_is_written_in_mid_run_is_held_against_keys_that_were_told_before(tmp_path: Path) -> None:
    """The hospital compares keys over the phone, finds that one is not the other hospital's, and writes the true one into its site.toml."""
    assert isinstance(opened(tmp_path).answer(BEGIN), AdvertisedKeys)
    true = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    for roster in (ROSTER, {}, {"east": true}):
        with pytest.raises((PolicyRefusedError, ProtocolError)):
            opened(tmp_path, sum_with={"east": true}).answer(BEGIN.model_copy(update={"roster": roster}))
    assert isinstance(opened(tmp_path, sum_with={"east": ROSTER["east"]}).answer(BEGIN.model_copy(update={"roster": {}})), AdvertisedKeys)


def test_no_more_sites_are_remembered_than_a_run_may_have(tmp_path: Path) -> None:
    site, many = opened(tmp_path), {f"s{number}": ROSTER["east"] for number in range(MOST_KEYS)}
    with pytest.raises(ProtocolError, match="at most"):
        site.answer(BEGIN.model_copy(update={"roster": {**ROSTER, **many}}))


def test_what_was_not_written_down_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when a signature, or a masked input, is to be written down: none leaves, and no share follows."""
    sites = {name: opened(tmp_path, name) for name in NAMES}
    server = SecureSum(SumSetting(of=OF, sites=NAMES, threshold=3, form=FORM), roster={name: key.public_key() for name, key in KEYS.items()})
    server.model = "m"

    def answer(name: str, task: SumTask) -> tuple[object, object]:
        if isinstance(task, MaskInputTask):
            return sites[name].mask(task, {"w": VALUES}, 1, model="m")
        return sites[name].answer(task), None

    def stage(skip: str | None = None) -> None:
        for name, task in server.tasks().items():
            if name != skip:
                server.take(name, *answer(name, task))  # type: ignore[arg-type]
        server.close_stage()

    def full(*arguments: object, **rest: object) -> None:
        raise StorageError("no room")

    while server.stage < Stage.SIGN_SURVIVORS:
        stage()
    signatures = {name: sites[name].answer(task).signature for name, task in server.tasks().items() if name != "north"}  # type: ignore[attr-defined]
    with monkeypatch.context() as broken:
        broken.setattr(client.secure_updates, "write_atomic", full)
        with pytest.raises(StorageError):
            sites["north"].answer(server.tasks()["north"])
    with pytest.raises(ProtocolError):
        sites["north"].answer(UnmaskTask(of=OF, signatures=dict(list(signatures.items())[:2])))
    assert isinstance(server.tasks()["north"], SignSurvivorsTask) and sites["north"].answer(server.tasks()["north"]), (
        "and when there is room again, it signs"
    )


VALUES = np.linspace(-1, 1, 5)


@pytest.mark.parametrize(
    "change", [{"survivors": "abc"}, {"survivors": None}, {"keys": {"east": 5}}, {"run": "another"}, {"masked": [1]}, {"inputs": []}, None]
)
def test_a_file_that_is_another_run_s_or_damaged_stops_the_run(tmp_path: Path, change: dict[str, object] | None) -> None:
    opened(tmp_path).answer(BEGIN)
    path = next((tmp_path / "north").glob("*-sum.json"))
    path.write_text("" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WardroundError, match="damaged file"):
        opened(tmp_path)

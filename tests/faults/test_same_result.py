"""A deployment comes to the same model, bit for bit, as the in-process engine; and so does one whose coordinator is killed again and again."""

import shutil
from pathlib import Path

import pytest

from client.app import client_app
from client.hospital import Hospital
from client.real_site import open_site
from server.coordinator import Coordinator
from server.run_folder import RunFolder
from shared.task import resolve_task
from simulations.in_process import InProcessGrid
from tests.faults.federation import Federation, study

pytestmark = pytest.mark.slow


@pytest.fixture
def federation(seeded: Federation) -> Federation:
    """Three hospitals whose noise is seeded."""
    return seeded


@pytest.mark.parametrize(
    "changes",
    [{}, {"strategy": {"name": "scaffold"}, "training": {"local_steps": 3}}, {"strategy": {"name": "ditto"}}, {"secure_aggregation": {}}],
    ids=["fedavg", "scaffold", "ditto", "secure"],
)
def test_a_deployment_equals_the_in_process_engine_bit_for_bit(federation: Federation, tmp_path: Path, changes: dict[str, object]) -> None:
    run = federation.submit(asked := study(rounds={"count": 3, "require": "all"}, **changes))
    federation.finished(run)
    task = resolve_task(asked.task)
    sites = {}
    for name in federation.sites:  # the same hospitals, with their keys and so their splits, and ledgers of their own
        kit = tmp_path / name
        shutil.copytree(federation.kit(name), kit, ignore=shutil.ignore_patterns("ledgers", "releases", "door"))
        hospital = Hospital.open(kit)
        sites[name] = open_site(hospital.site_file, hospital.file, task, noise_seed=federation.seed)
    folder = RunFolder.create(tmp_path / "runs", asked)
    Coordinator(asked, task, folder).run(InProcessGrid(client_app(lambda context: sites[str(context.node_config["site"])]), sorted(sites)))
    assert (folder.path / "model" / "final.safetensors").read_bytes() == federation.model(run)
    deployed, simulated = federation.rounds(run), folder.rounds()
    assert [record.metrics for record in deployed] == [record.metrics for record in simulated]


@pytest.mark.parametrize(
    ("changes", "count", "kills"), [({}, 5, (1, 3)), ({"secure_aggregation": {}}, 2, (1,))], ids=["in the clear", "under masks"]
)  # fmt: skip
def test_a_coordinator_killed_between_and_inside_rounds_ends_with_the_same_model(
    federation: Federation, changes: dict[str, object], count: int, kills: tuple[int, ...]
) -> None:
    """Under masks the round that was cut off has signed sums, or none: the same sites come again, so either way it goes on."""
    asked = study(rounds={"count": count, "require": "all"}, **changes)
    undisturbed = federation.submit(asked)
    federation.finished(undisturbed)
    killed = federation.submit(asked)
    for number in kills:
        federation.reached(killed, number)
        federation.kill("coordinator")
        federation.start_coordinator()
    federation.finished(killed, seconds=180)
    assert federation.model(killed) == federation.model(undisturbed)
    assert [record.round for record in federation.rounds(killed)] == list(range(1, count + 1))
    assert all(site.status == "ok" for record in federation.rounds(killed) for site in record.sites)

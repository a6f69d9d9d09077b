"""A site that signs nonsense costs itself its round, and nobody else anything (fault 7); and its words never reach the coordinator's disk."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.faults.federation import Federation, study

pytestmark = pytest.mark.slow
HONEST, LIAR = "cleveland", "va"
LIES = ("nan", "inf", "million-fold", "shape", "missing", "extra", "pickle", "text", "negative statistics", "junk", "another round", "another study")


@pytest.fixture
def federation(seeded: Federation) -> Federation:
    """Two honest hospitals and a liar, whose daemon reads its lies as it starts."""
    lies = seeded.kit(LIAR) / "lies.json"
    if not lies.exists():
        lies.write_text(json.dumps({str(number): lie for number, lie in enumerate(LIES, start=1)}))
        os.kill(seeded.child_of(LIAR, "daemon"), signal.SIGKILL)
    return seeded


def test_only_the_lying_update_is_refused_named_and_the_model_stays_finite(federation: Federation) -> None:
    run = federation.submit(study(rounds={"count": len(LIES) + 1, "deadline": "45s"}, privacy={"epsilon": 10.0}))
    federation.finished(run, seconds=240)
    for number, lie in enumerate(LIES, start=1):
        status, reason = federation.status_of(run, number, LIAR)
        assert status == "failed", lie
        assert str(reason).startswith("E102"), (lie, reason)
        assert federation.status_of(run, number, HONEST) == ("ok", None), lie
    assert federation.status_of(run, len(LIES) + 1, LIAR) == ("ok", None)
    own_log = (federation.kit(LIAR) / "state" / "daemon.log").read_text()
    for number in range(1, len(LIES) + 1):
        reason = federation.status_of(run, number, LIAR)[1]
        assert own_log.count(f"site {LIAR}: its update of round {number} did not count: {reason}") == 1
    tensors = safetensors.numpy.load(federation.model(run))
    assert all(np.isfinite(value).all() and np.abs(value).max() < 100 for value in tensors.values())
    said = b"".join(path.read_bytes() for path in files(federation.coordinator))
    for text in (b"Lovelace", b"stroke"):
        assert text not in said


def files(folder: Path) -> list[Path]:
    """Every file of the coordinator but Flower's own database, which holds messages as they came until they are fetched."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("superlink.db")]


def test_a_patients_text_in_an_honest_sites_data_stays_there(federation: Federation) -> None:
    """Planted where loaders complain: in a value, in a column too many, and in the file's name."""
    site = "hungarian"
    kit = federation.kit(site)
    original = federation.root / "data" / f"processed.{site}.data"
    planted = federation.root / "data" / "Grace-Hopper-ward-7" / original.name
    planted.parent.mkdir()
    rows = original.read_text().splitlines()
    rows[3] = "Grace Hopper," + rows[3].split(",", 1)[1]
    rows[7] += ",Grace Hopper"
    planted.write_text("\n".join(rows) + "\n")
    path = kit / "site.toml"
    path.write_text(path.read_text().replace(str(original), str(planted)))
    run = federation.submit(study(name="planted", rounds={"count": 1, "deadline": "20s", "require": 1}))
    federation.finished(run)
    status, reason = federation.status_of(run, 1, site)
    assert status == "refused" and str(reason).startswith("E50")
    assert "processed" in (kit / "state" / "daemon.log").read_text()  # the hospital's own log says more
    for file in [item for item in federation.coordinator.rglob("*") if item.is_file()]:  # Flower's database too
        content = file.read_bytes()
        assert b"Hopper" not in content and b"ward-7" not in content, file
    assert "Hopper" not in (kit / "state" / "audit.jsonl").read_text()

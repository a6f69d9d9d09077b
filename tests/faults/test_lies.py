"""A site that signs nonsense costs itself its round, and nobody else anything (fault 7); and its words never reach the coordinator's disk."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.faults.federation import Federation, study

pytestmark = pytest.mark.slow
HONEST, LIAR = "cleveland", "va"
LIES = ("nan", "inf", "million-fold", "shape", "missing", "extra", "pickle", "text", "negative statistics", "junk")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two honest hospitals and a liar."""
    made = Federation(tmp_path_factory.mktemp("lies"), (HONEST, "hungarian", LIAR), seed=3)
    (made.kit(LIAR) / "lies.json").write_text(json.dumps({str(number): lie for number, lie in enumerate(LIES, start=1)}))
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_only_the_lying_update_is_refused_named_and_the_model_stays_finite(federation: Federation) -> None:
    run = federation.submit(study(rounds={"count": len(LIES) + 1, "deadline": "45s"}, privacy={"epsilon": 10.0}))
    federation.finished(run, seconds=240)
    for number, lie in enumerate(LIES, start=1):
        status, reason = federation.status_of(run, number, LIAR)
        assert status == "failed", lie
        assert str(reason).startswith("E102"), (lie, reason)
        assert federation.status_of(run, number, HONEST) == ("ok", None), lie
    assert federation.status_of(run, len(LIES) + 1, LIAR) == ("ok", None)
    tensors = safetensors.numpy.load(federation.model(run))
    assert all(np.isfinite(value).all() and np.abs(value).max() < 100 for value in tensors.values())
    said = b"".join(path.read_bytes() for path in files(federation.coordinator))
    for text in (b"Lovelace", b"stroke"):
        assert text not in said


def files(folder: Path) -> list[Path]:
    """Every file of the coordinator but Flower's own database, which holds messages as they came until they are fetched."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("superlink.db")]

"""What every test may use. Telemetry and update checks are switched off before flwr is imported anywhere."""

import functools
import gc
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors as small as ours two threads wait for each other, worst where cores are shared

from hypothesis import HealthCheck, settings

with warnings.catch_warnings():  # what other packages say while they are imported is not ours to mend; what they say afterwards is an error
    warnings.simplefilter("ignore")
    import typer  # noqa: F401

sys.dont_write_bytecode = False  # what is compiled here, every process that a test starts reads
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # and leaves alone: one on a full disk would leave half a file, which nobody could import

MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # tmp_path, where a thousand ledgers and logs wait for no disk

settings.register_profile(
    "wardround", derandomize=True, database=None, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("wardround")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """No garbage is looked for while everything is imported; and what is imported then stays, so that nobody looks through it again.

    Opacus' PRV accountant asks for the same order twice, and many tests for the same noise: it is computed once.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        if rdp := sys.modules.get("opacus.accountants.analysis.rdp"):
            rdp._compute_rdp = functools.cache(rdp._compute_rdp)

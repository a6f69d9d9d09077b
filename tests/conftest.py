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

    from shared.root_log import root_log_unchanged

    with root_log_unchanged():
        from opacus.accountants.analysis import rdp

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process that a test starts compiles the package anew
sys.dont_write_bytecode = False

MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # tmp_path, where a thousand ledgers and logs wait for no disk

rdp._compute_rdp = functools.cache(rdp._compute_rdp)  # Opacus' PRV accountant asks for each order twice, and many tests for the same noise

settings.register_profile(
    "wardround", derandomize=True, database=None, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("wardround")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """No collection of garbage while everything is imported; and what is imported then stays, so that no later collection looks through it again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()

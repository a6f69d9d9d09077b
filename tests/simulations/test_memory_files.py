"""What is in memory goes with the process that put it there, or is removed by the next."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simulations import memory_files
from simulations.memory_files import MEMORY, folder, make_folder, remove_folder

pytestmark = pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="no file system in memory")
HOLD = "from simulations.memory_files import make_folder; made = make_folder(); (made / 'patients').write_text('x'); print(made, flush=True); input()"


def holder() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_gone_after_its_block() -> None:
    with folder() as made:
        (made / "file").write_text("x")
        assert made.parent == MEMORY
    assert not made.exists() and made not in memory_files._held


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_files, "NEW_SECONDS", -1.0)
    killed, left = holder()
    living, kept = holder()
    try:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert (left / "patients").exists()
        mine = make_folder()
        assert not left.exists() and (kept / "patients").exists()
        remove_folder(mine)
    finally:
        living.kill()
        living.communicate()
        with folder():
            assert not kept.exists()


def test_a_folder_that_was_only_just_made_is_left_alone() -> None:
    fresh = MEMORY / f"wardround-test-{os.getpid()}"
    fresh.mkdir()
    try:
        with folder():
            assert fresh.exists()
    finally:
        fresh.rmdir()

"""Ctrl-C in the middle of a run, by a real signal to a real process: exit 130, the folder says so, and the run can be resumed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from client.ledger import reading
from tests.wardround.conftest import Command

ARGUMENTS = ["simulate", "--sites", "4", "--rounds", "6", "--no-baselines"]


def interrupted_run(folder: Path, *, after: str) -> tuple[int, Path]:
    """Exit code and run folder of a simulation that got SIGINT when it had printed `after`."""
    command = [sys.executable, "-u", "-m", "wardround", *ARGUMENTS]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(after):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
        code = process.wait()
    assert "Traceback" not in rest
    assert "--resume" in rest
    [run] = (folder / "runs").iterdir()
    return code, run


@pytest.mark.slow
def test_ctrl_c_is_told_kept_and_resumable(command: Command, tmp_path: Path) -> None:
    whole = command(*ARGUMENTS, "--out", "whole", "--json").data
    code, run = interrupted_run(tmp_path, after="round 2/6")
    assert code == 130
    result = json.loads((run / "result.json").read_text())
    assert result["outcome"] == "interrupted"
    assert 2 <= result["rounds_completed"] < 6
    assert (run / "report.html").is_file()
    with reading(run / "ledgers" / "site-1.sqlite") as ledger:
        assert len(ledger.charges()) >= result["rounds_completed"]
    resumed = command("simulate", "--resume", run, "--no-baselines", "--json")
    assert resumed.code == 0
    for key in ("metrics", "metrics_ci95", "per_site", "privacy", "outcome"):
        assert resumed.data[key] == whole[key]
    final = Path("model") / "final.safetensors"
    assert (run / final).read_bytes() == (Path(str(whole["run_dir"])) / final).read_bytes()

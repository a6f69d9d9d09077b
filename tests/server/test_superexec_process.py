"""A study's token is not on a command line, which every user of the machine can read."""

import json
import os
import sys
from pathlib import Path

import pytest
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec

import server.superexec_process

TOKEN = "5ec3e7" * 8
PROGRAM = f"""#!{sys.executable}
import argparse, json
from pathlib import Path
from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
parser = argparse.ArgumentParser()
parser.add_argument("--runtime-api-address")
add_args_flwr_app_common(parser)
token = try_obtain_flwr_app_token(parser.parse_args())
told = {{"token": token, "line": Path("/proc/self/cmdline").read_text(), "environment": Path("/proc/self/environ").read_text()}}
Path(__file__).with_name("told.part").write_text(json.dumps(told))
Path(__file__).with_name("told.part").rename(Path(__file__).with_name("told.json"))
"""


@pytest.mark.slow
def test_flower_s_own_program_gets_the_token_and_nobody_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's executor, as it is, starts a program in the place of `flwr-serverapp`, which reads its options with Flower's own code."""
    program = tmp_path / TASK_TYPE_TO_COMMAND[TaskType.SERVER_APP]
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(subprocess_executor, "subprocess", subprocess_executor.subprocess)  # put back afterwards
    monkeypatch.setattr(server.superexec_process, "flower_superexec", lambda: None)
    server.superexec_process.main()
    started = []
    begin = server.superexec_process.start_with_token_file
    monkeypatch.setattr(subprocess_executor.subprocess, "Popen", lambda *a, **k: started.append(begin(*a, **k)))
    before = set(os.listdir("/proc/self/fd"))
    spec = ExecutionSpec(
        task_type=TaskType.SERVER_APP, runtime_api_address="127.0.0.1:1", token=TOKEN, insecure=True, root_certificates_path=None,
        runtime_dependency_install=False, parent_pid=os.getpid(), suppress_output=False, task_id=1,
    )  # fmt: skip
    SubprocessExecutor().launch(spec)
    assert set(os.listdir("/proc/self/fd")) == before
    assert started[0].wait(60) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["token"] == TOKEN
    assert "--token-file" in told["line"]
    assert TOKEN not in told["line"] + told["environment"]

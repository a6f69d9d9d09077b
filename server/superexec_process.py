"""`python -m server.superexec_process ...`: Flower's SuperExec, with its own options, which keeps a study's token off the command line.

A study's process may do at the SuperLink what its token allows, and Flower gives it on the command line, which every user of the machine can read.
Flower's program also reads it from a file (`--token-file`). So what starts the process is replaced here: the token is in a file without a name
that only this process and the one it starts can open.
"""

import os
import subprocess
from collections.abc import Sequence
from types import SimpleNamespace

from flwr.supercore.cli import flower_superexec
from flwr.supercore.superexec.executor import subprocess_executor

TOKEN, TOKEN_FILE = "--token", "--token-file"


def start_with_token_file(command: Sequence[str], **options: int) -> "subprocess.Popen[bytes]":
    """The process of `command`, with the token in a file in its place."""
    at = command.index(TOKEN)
    file = os.memfd_create("token")
    try:
        os.write(file, command[at + 1].encode())
        started = [*command[:at], TOKEN_FILE, f"/proc/self/fd/{file}", *command[at + 2 :]]
        return subprocess.Popen(started, pass_fds=(file,), **options)  # type: ignore[call-overload,no-any-return]  # as Flower calls it
    finally:
        os.close(file)


def main() -> None:
    """Flower's own program, which starts processes so."""
    setattr(subprocess_executor, "subprocess", SimpleNamespace(Popen=start_with_token_file, DEVNULL=subprocess.DEVNULL))  # noqa: B010  # not exported
    flower_superexec()


if __name__ == "__main__":
    main()

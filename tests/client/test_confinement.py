"""A confined process really is: every attempt succeeds where it is free, and is denied where it is not. Real processes, real kernel."""

import contextlib
import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from client.confinement import confine, describe_confinement, interpreter_paths, landlock_abi, reachable_services, system_user
from shared.errors import ConfinementError

ROOT = Path(__file__).parents[2]
SECRET = "patient 4711"
ABI = landlock_abi()
needs_landlock = pytest.mark.skipif(not ABI, reason="this kernel has no Landlock")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
FREE = "ok"
TRACING = {"trace the daemon", "open the daemon's memory", "read the daemon's memory", "take a descriptor of the daemon"}

OUTSIDE = """
import ctypes, socket, sys
secret = ctypes.create_string_buffer(sys.stdin.readline().encode())
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + sys.argv[1])
listener.listen()
print(ctypes.addressof(secret), flush=True)
sys.stdin.read()
"""

ATTEMPTS = """
import ctypes, errno, json, os, socket, subprocess, sys
from pathlib import Path
import client.confinement
from client.confinement import confine, interpreter_paths

case = json.loads(sys.argv[1])
protected, own, daemon = Path(case["protected"]), Path(case["own"]), case["daemon"]
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

class Part(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

def read_memory():
    mine = ctypes.create_string_buffer(5)
    local, remote = Part(ctypes.addressof(mine), 5), Part(case["address"], 5)
    checked(libc.process_vm_readv(daemon, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0))
    assert mine.raw == b"patie"

def open_memory():
    with open(f"/proc/{daemon}/mem", "rb", buffering=0) as memory:
        memory.seek(case["address"])
        assert memory.read(5) == b"patie"

def attach():
    checked(libc.ptrace(16, daemon, None, None))
    os.waitpid(daemon, 0x40000000)
    checked(libc.ptrace(17, daemon, None, None))

def take_descriptor():
    checked(libc.syscall(438, os.pidfd_open(daemon), 0, 0))

def shell(command):
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True)
    if done.returncode:
        raise OSError(errno.EACCES if "ermi" in done.stderr else 0, done.stderr)

def abstract():
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("\\0" + case["abstract"])

def through_link():
    (own / "link").symlink_to(protected / "cohort.csv")
    (own / "link").read_bytes()

def renamed():
    os.rename(protected / "spare", own / "spare")

attempts = {
    "read the cohort": lambda: (protected / "cohort.csv").read_bytes(),
    "read the ledger": lambda: (protected / "ledger.sqlite").read_bytes(),
    "read the key": lambda: (protected / "site.key").read_bytes(),
    "list the folder": lambda: os.listdir(protected),
    "append to the ledger": lambda: open(protected / "ledger.sqlite", "ab").close(),
    "truncate the ledger": lambda: os.truncate(protected / "ledger.sqlite", 3),
    "make a file": lambda: (protected / "new").write_bytes(b""),
    "make a folder": lambda: (protected / "folder").mkdir(),
    "remove a file": lambda: (protected / "unused").unlink(),
    "move a file out": renamed,
    "link a file out": lambda: os.link(protected / "cohort.csv", own / "hard"),
    "read by a symbolic link": through_link,
    "open the daemon's memory": open_memory,
    "read the daemon's memory": read_memory,
    "read the daemon's environment": lambda: Path(f"/proc/{daemon}/environ").read_bytes(),
    "list the daemon's descriptors": lambda: os.listdir(f"/proc/{daemon}/fd"),
    "trace the daemon": attach,
    "take a descriptor of the daemon": take_descriptor,
    "signal the daemon": lambda: os.kill(daemon, 0),
    "connect to its abstract socket": abstract,
    "read by a shell": lambda: shell(f"cat {protected}/cohort.csv"),
    "list by a shell": lambda: shell(f"ls {protected}"),
    "write by a shell": lambda: shell(f"echo x > {protected}/by-shell"),
    "signal by a shell": lambda: shell(f"kill -0 {daemon}"),
}
if case["abi"]:
    client.confinement.landlock_abi = lambda: case["abi"]
    done = confine(readable=[*interpreter_paths(), Path("/bin"), Path("/usr/bin")], writable=[own], protected=[protected / "cohort.csv"])
    assert done.abi == case["abi"] and done.signals_scoped == (case["abi"] >= 6)
outcome = {}
for name, attempt in attempts.items():
    try:
        attempt()
        outcome[name] = "ok"
    except OSError as error:
        outcome[name] = errno.errorcode.get(error.errno, str(error))
print(json.dumps(outcome))
"""

STILL_WORKS = """
import json, sys
from pathlib import Path
from client.confinement import confine, interpreter_paths
case = json.loads(sys.argv[1])
own = Path(case["own"])
confine(readable=interpreter_paths(), writable=[own])
import asyncio, ctypes, os, random, resource, socket, sqlite3, ssl, threading, zoneinfo
import httpx
import flwr.supernode.fleet_http_client
import cryptography.hazmat.primitives.asymmetric.ec
import shared.seals

assert ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1, "no new privileges"
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
ssl.create_default_context()
httpx.Client().close()
zoneinfo.ZoneInfo("UTC")
os.urandom(8)
for path in ("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf"):
    assert not Path(path).exists() or Path(path).read_text() is not None
assert socket.getaddrinfo("localhost", 80)
with socket.create_connection(("localhost", case["port"]), timeout=10) as connection:
    assert connection.recv(5) == b"hello"
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(10)
    connection.connect(case["socket"])
    assert connection.recv(5) == b"hello"
(own / "a").write_bytes(b"1")
(own / "folder").mkdir()
os.rename(own / "a", own / "folder" / "b")
os.truncate(own / "folder" / "b", 0)
(own / "folder" / "b").unlink()
(own / "folder").rmdir()
thread = threading.Thread(target=lambda: None)
thread.start(); thread.join()
try:
    confine(readable=[Path("/")])
except Exception:
    pass
try:
    os.listdir("/etc")
except PermissionError:
    print("done")
"""

GUARDED = """
import ctypes, os, pwd, resource, signal, sys
from client.confinement import guard_memory

def as_nobody(action):
    pid = os.fork()
    if pid == 0:
        os.setgroups([]); os.setgid(pwd.getpwnam("nobody").pw_gid); os.setuid(pwd.getpwnam("nobody").pw_uid)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as after an exec
        os._exit(action())
    return pid

def victim(guarded):
    ready, told = os.pipe()
    def wait():
        if guarded:
            guard_memory()
        os.write(told, b"x")
        signal.pause()
    pid = as_nobody(wait)
    os.read(ready, 1)
    return pid

def attempt(pid):
    def act():
        for name in ("mem", "environ", "maps"):
            try:
                open(f"/proc/{pid}/{name}", "rb").close()
            except PermissionError:
                return 13
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(as_nobody(act), 0)[1])

for guarded in (False, True):
    pid = victim(guarded)
    print(attempt(pid), flush=True)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
"""


@dataclass(frozen=True, kw_only=True)
class Daemon:
    """A process outside that holds a secret in its memory."""

    pid: int
    address: int
    abstract: str


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    name = f"wardround-test-{os.getpid()}-{tmp_path.name}"
    process = subprocess.Popen([sys.executable, "-c", OUTSIDE, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    with process:
        process.stdin.write(SECRET + "\n")
        process.stdin.flush()
        yield Daemon(pid=process.pid, address=int(process.stdout.readline()), abstract=name)
        assert process.poll() is None, "the process outside was harmed"
        process.stdin.close()


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """A folder with what must stay out of reach."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    for name in ("cohort.csv", "ledger.sqlite", "site.key", "unused", "spare"):
        (folder / name).write_text(SECRET)
        (folder / name).chmod(0o600)
    return folder


def _run(script: str, case: dict[str, object] | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", script, json.dumps(case)], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _attempts(tmp_path: Path, hospital: Path, daemon: Daemon, abi: int) -> dict[str, str]:
    own = tmp_path / "own"
    own.mkdir()
    case: dict[str, object] = {"protected": str(hospital), "own": str(own), "daemon": daemon.pid, "address": daemon.address}
    return dict(json.loads(_run(ATTEMPTS, {**case, "abstract": daemon.abstract, "abi": abi})))


def test_a_free_process_of_the_same_user_succeeds_at_everything(tmp_path: Path, hospital: Path, daemon: Daemon) -> None:
    """What the confinement is for; without it, no denial below would mean anything."""
    outcome = _attempts(tmp_path, hospital, daemon, abi=0)
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    held_back = TRACING if os.geteuid() and yama.exists() and yama.read_text().strip() != "0" else set()  # Debian's default lets only parents trace
    assert {name for name, code in outcome.items() if code != FREE} <= held_back, outcome


@needs_landlock
def test_a_confined_process_is_denied_everything(tmp_path: Path, hospital: Path, daemon: Daemon) -> None:
    outcome = _attempts(tmp_path, hospital, daemon, abi=ABI)
    scoped = {"signal the daemon", "signal by a shell", "connect to its abstract socket"} if ABI < 6 else set()
    crossing = {name: code for name, code in outcome.items() if code == "EXDEV"}  # Landlock's answer to a move between two of its worlds
    assert set(crossing) <= {"move a file out", "link a file out"}
    assert {name for name, code in outcome.items() if code not in ("EACCES", "EPERM", "EXDEV")} == scoped, outcome
    assert sorted(path.name for path in hospital.iterdir()) == ["cohort.csv", "ledger.sqlite", "site.key", "spare", "unused"]
    assert {path.read_text() for path in hospital.iterdir()} == {SECRET}


@needs_landlock
@pytest.mark.parametrize("abi", range(1, ABI))
def test_older_kernels_confine_as_well(tmp_path: Path, hospital: Path, daemon: Daemon, abi: int) -> None:
    """With the rights that an older ABI knows, all reading is denied; only what that ABI cannot hold back succeeds."""
    outcome = _attempts(tmp_path, hospital, daemon, abi=abi)
    beyond = {"truncate the ledger"} if abi < 3 else set()
    beyond |= {"signal the daemon", "signal by a shell", "connect to its abstract socket"} if abi < 6 else set()
    assert {name for name, code in outcome.items() if code == FREE} == beyond, outcome


@pytest.mark.slow
@needs_landlock
def test_a_confined_process_can_still_do_its_work(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    path = tmp_path / "s"
    with socket.create_server(("localhost", 0)) as tcp, socket.socket(socket.AF_UNIX) as named:
        named.bind(str(path))
        named.listen()
        case = {"own": str(tmp_path / "own"), "port": tcp.getsockname()[1], "socket": str(path)}
        child = subprocess.Popen(
            [sys.executable, "-c", STILL_WORKS, json.dumps(case)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with child:
            for listener in (tcp, named):
                listener.settimeout(120)
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    connection.sendall(b"hello")
                    connection.close()
            out, err = child.communicate(timeout=120)
    assert out == "done\n", err


@needs_landlock
def test_too_wide_a_grant_is_found(hospital: Path) -> None:
    script = f"""
from pathlib import Path
from client.confinement import confine, interpreter_paths
from shared.errors import ConfinementError
try:
    confine(readable=[*interpreter_paths(), Path({str(hospital.parent)!r})], protected=[Path({str(hospital)!r}), Path({str(hospital / "site.key")!r})])
except ConfinementError as error:
    print(error)
"""
    assert _run(script) == f"{hospital}: expected to be out of reach when confined, but it opens; move it away from the folders that stay readable\n"


@needs_landlock
def test_another_thread_would_stay_free_so_nothing_is_done() -> None:
    script = """
import threading
from client.confinement import confine
from shared.errors import ConfinementError
gate = threading.Event()
thread = threading.Thread(target=gate.wait)
thread.start()
try:
    confine(readable=[])
except ConfinementError as error:
    print(error.what)
open("/etc/hostname").close()
gate.set()
"""
    assert _run(script) == "expected one thread to confine, got 2: the others would stay free\n"


@needs_landlock
def test_a_missing_path_is_named_and_nothing_is_done(tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from client.confinement import confine
from shared.errors import ConfinementError
try:
    confine(readable=[Path({str(tmp_path / "absent")!r})])
except ConfinementError as error:
    print(error.what)
os.listdir("/")
"""
    assert _run(script) == f"{tmp_path / 'absent'}: expected a path to leave open, got: No such file or directory\n"


def test_a_kernel_without_landlock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.confinement.landlock_abi", lambda: 0)
    with pytest.raises(ConfinementError, match="expected a kernel with Landlock, got one without; use Linux 5.13"):
        confine(readable=[])


def test_what_python_needs_is_there_and_holds_no_private_key() -> None:
    paths = interpreter_paths()
    assert all(path.exists() for path in paths)
    assert ROOT not in paths and Path(__file__).parent not in paths
    for private in ("/etc/ssl/private", "/etc/pki/tls/private", "/etc/shadow", "/root/.ssh", "/proc/self", "/run/x", str(ROOT / "kits")):
        assert not any(Path(private).is_relative_to(path) for path in paths), private


@pytest.mark.slow
@needs_root
def test_another_user_is_denied_as_well(hospital: Path, daemon: Daemon) -> None:
    attempts = [f"cat {hospital}/{name}" for name in ("cohort.csv", "ledger.sqlite", "site.key")]
    attempts += [f"ls {hospital}", f"head -c 0 /proc/{daemon.pid}/mem", f"cat /proc/{daemon.pid}/environ", f"ls /proc/{daemon.pid}/fd"]
    attempts += [f"kill -0 {daemon.pid}", f"echo x > {hospital}/new", f"echo x >> {hospital}/ledger.sqlite"]
    nobody = system_user("nobody")
    assert nobody is not None
    for attempt in attempts:
        free = subprocess.run(["/bin/sh", "-c", attempt], check=False, capture_output=True, text=True)
        other = subprocess.run(
            ["/bin/sh", "-c", attempt], check=False, capture_output=True, text=True, user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=[], cwd="/"
        )
        assert free.returncode == 0, (attempt, free.stderr)
        assert other.returncode != 0 and "ermi" in other.stderr, (attempt, other)


@needs_root
def test_guarded_memory_is_closed_to_the_same_user() -> None:
    assert _run(GUARDED).split() == ["0", "13"]


def test_the_kind_of_confinement_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user is had only by root and only where it exists; root itself is no other user."""
    told = {}
    for root in (True, False):
        for landlock in (0, 7):
            monkeypatch.setattr("os.geteuid", lambda root=root: 0 if root else 1000)
            monkeypatch.setattr("client.confinement.landlock_abi", lambda landlock=landlock: landlock)
            told[root, landlock] = [describe_confinement(user) for user in ("nobody", "root", "no-such-user", None)]
    assert told[True, 7] == ["user+landlock", "landlock", "landlock", "landlock"]
    assert told[True, 0] == ["user", "none", "none", "none"]
    assert told[False, 7] == ["landlock"] * 4
    assert told[False, 0] == ["none"] * 4


def test_users_of_this_machine() -> None:
    assert system_user(pwd.getpwuid(os.geteuid()).pw_name) == pwd.getpwuid(os.geteuid())
    assert system_user("no-such-user") is None


def test_reachable_services_are_sockets_that_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(path.is_socket() for path in reachable_services())
    monkeypatch.setattr("client.confinement.Path", lambda text: tmp_path / Path(text).name if text.startswith("/run/user") else Path(text))
    with socket.socket(socket.AF_UNIX) as bus:
        (tmp_path / str(os.geteuid())).mkdir()
        bus.bind(str(tmp_path / str(os.geteuid()) / "bus"))
        assert tmp_path / str(os.geteuid()) / "bus" in reachable_services()

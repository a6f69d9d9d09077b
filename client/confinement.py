"""A process gives up its own power, for good and without root: Landlock, or another system user. Linux only.

After `confine`, this process and all that it starts can

- read and run only what lies under `readable`, change only what lies under `writable`, and nobody, root among them, gives that back;
- not look into, trace or take descriptors from a process outside (`/proc/<pid>/mem`, `/proc/<pid>/environ`, ptrace, process_vm_readv,
  pidfd_getfd): Landlock denies ptrace's access check for everything that is not itself at least as confined, whatever the user;
- signal no process outside and reach no abstract Unix socket outside, where the kernel's Landlock has scopes (ABI 6, Linux 6.12);
- gain no right by a setuid program, mount nothing, and leave no core file.

It does *not* hold back: the network (the courier needs it); descriptors that were open before; connecting to a named Unix socket, which
that socket's permissions alone guard; and chmod, chown, utime and xattr on files of its own user, which change who may read a file but never let
this process read it. A service of the same user that starts programs for whoever connects (`reachable_services`) therefore undoes it. Another
system user has none of these holes but needs root once; where both are there, both are used.
"""

import ctypes
import os
import pwd
import resource
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.errors import ConfinementError

Kind = Literal["user", "landlock", "user+landlock", "none"]

# The same numbers on every architecture that Python is packaged for (include/uapi/asm-generic/unistd.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION, _PATH_BENEATH = 1, 1
_SET_DUMPABLE, _SET_NO_NEW_PRIVS = 4, 38

# include/uapi/linux/landlock.h. A kernel refuses rights that it does not know, so each set has the ABI that brought it.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_RIGHTS_BY_ABI = ((1, (1 << 13) - 1), (2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV))
_DEVICE_NODES = 1 << 6 | 1 << 11  # MAKE_CHAR, MAKE_BLOCK: a disk's device node is a way around every other rule, so nobody gets them
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_OF_A_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV  # the others make sense for folders only, and are refused for files
_SCOPES_ABI, _SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 6, 1 << 0, 1 << 1

COURIER_USER = "wardround-courier"  # the system user that an administrator may make for the courier, once
_REMEDY_ABSENT = "use Linux 5.13 or newer with Landlock switched on (lsm=...,landlock), or let the courier run as another system user"

# What the dynamic linker, name resolution, TLS and time zones read. Not /etc/ssl and /etc/pki whole: a machine's private keys lie there.
_SYSTEM_PATHS = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"),
    *("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services", "/etc/protocols"),
    *("/etc/ssl/certs", "/etc/ssl/cert.pem", "/etc/ssl/openssl.cnf", "/etc/ca-certificates", "/usr/share/ca-certificates", "/etc/crypto-policies"),
    *("/etc/pki/ca-trust", "/etc/pki/tls/certs", "/etc/pki/tls/cert.pem", "/etc/pki/tls/openssl.cnf", "/usr/share/crypto-policies"),
    *("/etc/localtime", "/etc/timezone", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)
_OWN_ROOMS = ("client", "shared")


class _RulesetAttributes(ctypes.Structure):
    _fields_ = (("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What a process has left."""

    abi: int  # of Landlock, 1 or more
    signals_scoped: bool  # whether it can no longer signal a process outside
    readable: tuple[Path, ...]
    writable: tuple[Path, ...]


def landlock_abi() -> int:
    """The version of Landlock that this kernel offers; 0 where there is none or it is switched off."""
    if sys.platform != "linux":
        return 0
    version = _libc().syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))
    return max(int(version), 0)


def confine(*, readable: Iterable[Path], writable: Iterable[Path] = (), protected: Iterable[Path] = ()) -> Confinement:
    """This process, and all that it starts from now on, has no more power than the module says. There is no way back.

    Args:
        readable: files, or folders with all below, that may be read and run. `interpreter_paths` names what Python itself needs.
        writable: folders in which files may also be made, changed, moved and removed.
        protected: paths that must be out of reach afterwards; each is tried, so that a `readable` that is too wide is found.

    Raises:
        ConfinementError: there is no Landlock, a path is not there, another thread runs (it would stay free), or a protected path can
            still be opened. A process that gets this error must end: it may be confined already.
    """
    abi, readable, writable = landlock_abi(), tuple(readable), tuple(writable)
    _check_can_confine(abi)
    scopes = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if abi >= _SCOPES_ABI else 0
    ruleset = _create_ruleset(_known_rights(abi), scopes)
    try:
        for path in readable:
            _allow(ruleset, path, _READING)
        for path in writable:
            _allow(ruleset, path, _known_rights(abi) & ~_DEVICE_NODES)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _control(_SET_NO_NEW_PRIVS, 1)
        _system_call("restrict itself", _RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    for path in protected:
        _check_out_of_reach(path)
    return Confinement(abi=abi, signals_scoped=bool(scopes), readable=readable, writable=writable)


def guard_memory() -> None:
    """Nobody but root, not even another process of this user, can from now on read this process's memory, environment or core; for the daemon.

    That is PR_SET_DUMPABLE 0. `confine` leaves it alone: what a courier knows, its user's other processes read from the files it came from.
    The price: /proc/<pid> belongs to root, so that a debugger needs root as well. It holds until the next exec.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _control(_SET_DUMPABLE, 0)


def interpreter_paths() -> tuple[Path, ...]:
    """What a Python process with sockets and TLS reads after its start: libraries, this installation, name resolution, public certificates.

    Of a checkout these are the rooms `client` and `shared` alone, because a kit may lie beside them. A resolv.conf that is a link into a
    folder of its own (systemd, NetworkManager) brings that folder, since it is replaced there when the network changes.
    """
    own = [Path(__file__).resolve().parents[1] / room for room in _OWN_ROOMS]
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    python = [Path(sysconfig.get_paths()[key]) for key in keys] + [Path(str(sysconfig.get_config_var("LIBDIR"))), Path(sys.executable)]
    system = [Path(path) for path in _SYSTEM_PATHS]
    resolver = Path("/etc/resolv.conf").resolve().parent
    if len(resolver.parts) > 2:  # neither /etc nor /run as a whole
        system.append(resolver)
    return tuple(dict.fromkeys(path for path in (*own, *python, *system) if path.exists()))


def system_user(name: str) -> pwd.struct_passwd | None:
    """That user of this machine, or None."""
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def describe_confinement(user: str | None) -> Kind:
    """What a courier started from here would be confined by, where `user` is the system user made for it.

    Another user can only be had as root, and one with number 0 or our own is no other.
    """
    entry = system_user(user) if user is not None else None
    other_user = os.geteuid() == 0 and entry is not None and entry.pw_uid != 0
    if landlock_abi():
        return "user+landlock" if other_user else "landlock"
    return "user" if other_user else "none"


def reachable_services() -> tuple[Path, ...]:
    """Named sockets that this user may write to and that start programs for whoever does: Landlock alone does not close them."""
    session = Path(f"/run/user/{os.geteuid()}")
    names = ("bus", "systemd/private", "docker.sock", "podman/podman.sock", "containerd/containerd.sock")
    candidates = [session / name for name in names] + [
        Path("/run/docker.sock"),
        Path("/run/podman/podman.sock"),
        Path("/run/containerd/containerd.sock"),
    ]
    return tuple(path for path in candidates if path.is_socket() and os.access(path, os.W_OK))


def _check_can_confine(abi: int) -> None:
    if not abi:
        raise ConfinementError("expected a kernel with Landlock, got one without", _REMEDY_ABSENT)
    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        raise ConfinementError(f"expected one thread to confine, got {threads}: the others would stay free", "confine before any thread is started")


def _known_rights(abi: int) -> int:
    """All rights over files that this ABI can deny."""
    return sum(rights for since, rights in _RIGHTS_BY_ABI if abi >= since)


def _create_ruleset(rights: int, scopes: int) -> int:
    attributes = _RulesetAttributes(handled_access_fs=rights, handled_access_net=0, scoped=scopes)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))  # older kernels take the longer structure where the rest is zero
    return _system_call("create a ruleset", _CREATE_RULESET, ctypes.byref(attributes), size, ctypes.c_uint32(0))


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise ConfinementError(f"{path}: expected a path to leave open, got: {error.strerror}", "make it, or leave it out") from error
    try:
        rule = _PathBeneath(allowed_access=rights if path.is_dir() else rights & _OF_A_FILE, parent_fd=descriptor)
        _system_call(f"allow {path}", _ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), ctypes.byref(rule), ctypes.c_uint32(0))
    finally:
        os.close(descriptor)


def _check_out_of_reach(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except PermissionError:
        return
    except OSError as error:
        raise ConfinementError(f"{path}: expected that it may not be opened, got: {error.strerror}", "correct the path, or leave it out") from error
    raise ConfinementError(f"{path}: expected to be out of reach when confined, but it opens", "move it away from the folders that stay readable")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _control(option: int, value: int) -> None:
    """prctl(2), or a ConfinementError."""
    zero = ctypes.c_ulong(0)
    if _libc().prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero) != 0:
        raise ConfinementError(f"expected prctl {option} to be taken, got: {os.strerror(ctypes.get_errno())}", "run it on a plain Linux kernel")


def _system_call(action: str, number: int, *arguments: object) -> int:
    """The call's result, or a ConfinementError that says which `action` failed and why."""
    result = int(_libc().syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise ConfinementError(f"expected Landlock to {action}, got: {os.strerror(ctypes.get_errno())}", _REMEDY_ABSENT)
    return result

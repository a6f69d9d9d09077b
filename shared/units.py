"""Texts that have the machine keep a coordinator or a site running: a systemd unit, a Compose file, and the Dockerfile of its image.

All of it is text for an administrator to read and install; nothing here touches the machine.
"""

import json
import os
import pwd
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from shared.errors import ConfigurationError

ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
KIT_IN_CONTAINER = "/kit"
RESTART_SECONDS = 2
STOP_SECONDS = 20
UNIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.-]{0,200}")
SERVICE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
PYTHON_VERSION = re.compile(r"3\.[0-9]{1,2}")
PLAIN_WORD = re.compile(r"[A-Za-z0-9_/.:=@,+-]+")
MEND_BY_HAND = (2, 3)  # exit codes of wrong usage and wrong configuration: starting again would find the same

# What needs neither root nor a namespace of its own; every kernel that systemd runs on can do it, also for a user's unit.
EVERYWHERE = (
    "NoNewPrivileges=yes",  # a supervisor of root's may still give a child to another user: that is a system call, no setuid program
    "UMask=0077",
    "LimitCORE=0",  # a core dump would hold patients and keys
    "LockPersonality=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "RestrictNamespaces=yes",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "SystemCallArchitectures=native",
    "SystemCallFilter=~@clock @cpu-emulation @debug @module @mount @obsolete @raw-io @reboot @swap",  # not an allow-list: it would bar Landlock
    "SystemCallErrorNumber=EPERM",
)
# Neither PrivateDevices nor ProtectClock, which would hide a GPU; nor MemoryDenyWriteExecute, for torch compiles kernels as it runs.
SYSTEM_ONLY = (
    "ProtectSystem=strict",
    "ProtectHome=read-only",  # cohorts often lie in a home
    "ProtectProc=invisible",
    "ProtectKernelTunables=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
)


def current_user() -> str:
    """Who runs this, by name, or by number where the machine has no name for it; as the user of a system unit."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def systemd_unit(*, name: str, description: str, command: Sequence[str], working_directory: PurePosixPath | str, user: str | None) -> str:
    """The text of `<name>.service`, which keeps `command` running from boot on and ends it within 20 seconds when asked to.

    A system unit sees the whole file system read-only, but for `working_directory`, the kit. A user's unit (user=None) belongs to who installs it: the
    part of the hardening that needs namespaces is left out, for a user's service manager may not be able to give it and would not start at all.

    Args:
        command: program (an absolute path) and arguments, as they are: quoting is done here.
        user: whom the service runs as; "root" keeps its capabilities, so that the supervisor can run the courier as another user.

    Raises:
        ConfigurationError: a value that a unit cannot hold: a relative path, a line break, a name that is none.

    Example:
        systemd_unit(name="wardround-site", description="Wardround site va", command=("/opt/wardround/bin/wardround", "site", "start", "/srv/kit"),
                     working_directory="/srv/kit", user="wardround")
    """
    folder = _absolute("working_directory", str(working_directory))
    _name("name", name, UNIT_NAME)
    service = [
        "Type=exec",
        *([f"User={_name('user', user, UNIT_NAME)}"] if user is not None else []),
        f"WorkingDirectory={_specifiers(folder)}",
        f"ExecStart={_command_line(command)}",
        *(f"Environment={key}={value}" for key, value in ENVIRONMENT.items()),
        f"SyslogIdentifier={name}",
        "Restart=always",
        f"RestartSec={RESTART_SECONDS}",
        f"RestartPreventExitStatus={' '.join(map(str, MEND_BY_HAND))}",
        "KillMode=mixed",  # the supervisor ends its children itself; what is left after the time is killed
        f"TimeoutStopSec={STOP_SECONDS}",
        "OOMPolicy=continue",  # of several processes the kernel kills one, and the supervisor starts it again
        *(_system_hardening(folder, root=user == "root") if user is not None else []),
        *EVERYWHERE,
    ]
    unit = [
        f"Description={_specifiers(_one_line('description', description))}",
        "Wants=network-online.target",
        "After=network-online.target",
        "StartLimitIntervalSec=0",  # a hospital's network may be away for a night; never give up
    ]
    install = [f"WantedBy={'default.target' if user is None else 'multi-user.target'}"]
    parts = (("Unit", unit), ("Service", service), ("Install", install))
    return _how_to_install(name, user) + "".join(f"\n[{title}]\n" + "\n".join(lines) + "\n" for title, lines in parts)


def compose_file(*, service: str, command: Sequence[str], kit: PurePosixPath | str, ports: Sequence[int], image: str) -> str:
    """The text of a compose.yaml with one service: read-only root, no capabilities, the kit as its only writable folder.

    Args:
        command: the arguments of `wardround` before the kit, ("coordinator", "start") or ("site", "start"); the kit follows, as `KIT_IN_CONTAINER`.
        kit: its folder on the host.
        ports: those reachable from outside, the same number inside; empty for a site, which only calls out.

    Raises:
        ConfigurationError: a name, path or port that Compose could not take.
    """
    _name("service", service, SERVICE_NAME)
    folder = _absolute("kit", str(kit))
    wrong = [port for port in ports if not 0 < port < 65536]
    if wrong or len(command) < 2:
        raise ConfigurationError(f"expected a noun, a verb and ports from 1 to 65535, got {list(command)} and {wrong}", "correct them")
    arguments = [*command, KIT_IN_CONTAINER]
    health = ["CMD", "wardround", command[0], "status", KIT_IN_CONTAINER]
    lines = [
        "# The container runs as the kit's owner, so that nothing in the kit need be readable by others: start it with",
        "#   WARDROUND_UID=$(id -u) WARDROUND_GID=$(id -g) docker compose up -d --build",
        "services:",
        f"  {service}:",
        f"    image: {_scalar(_one_line('image', image))}",
        "    build: .",
        f"    command: {_flow(arguments)}",
        '    user: "${WARDROUND_UID:-1000}:${WARDROUND_GID:-1000}"',
        "    environment:",
        *(f"      {key}: {_scalar(value)}" for key, value in ENVIRONMENT.items()),
        "    read_only: true",
        '    tmpfs: ["/tmp:mode=1777,size=1g"]',
        '    cap_drop: ["ALL"]',
        '    security_opt: ["no-new-privileges:true"]',
        "    init: true",
        "    volumes:",
        "      - type: bind",
        f"        source: {_scalar(folder)}",
        f"        target: {KIT_IN_CONTAINER}",
        "        bind:",
        "          create_host_path: false",
        *_cohort_remark(command[0]),
        *_published(ports),
        "    restart: unless-stopped",
        f"    stop_grace_period: {STOP_SECONDS}s",
        "    healthcheck:",
        f"      test: {_flow(health)}",
        "      interval: 30s",
        "      timeout: 20s",
        "      start_period: 60s",
        "      retries: 3",
    ]
    return "\n".join(lines) + "\n"


def dockerfile(*, python: str = "3.11") -> str:
    """The text of the Dockerfile for `compose_file`, built from a checkout; it copies the rooms by name, so that no kit ever enters an image."""
    return f"""\
# Build it in a checkout of wardround. For torch without CUDA: --build-arg PIP_ARGUMENTS="--extra-index-url ADDRESS-OF-THE-CPU-BUILDS"
FROM python:{_name("python", python, PYTHON_VERSION)}-slim
ARG PIP_ARGUMENTS=""
WORKDIR /opt/wardround
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY shared shared
COPY client client
COPY server server
COPY simulations simulations
COPY wardround wardround
COPY studies studies
RUN pip install --no-cache-dir --constraint constraints.txt $PIP_ARGUMENTS .
ENV {" ".join(f"{key}={value}" for key, value in ENVIRONMENT.items())} HOME=/tmp
USER 1000:1000
WORKDIR {KIT_IN_CONTAINER}
ENTRYPOINT ["wardround"]
"""


def _system_hardening(folder: str, *, root: bool) -> list[str]:
    """For a system unit; root's keeps its capabilities, for it gives children to other users."""
    temporary = PurePosixPath(folder).is_relative_to("/tmp") or PurePosixPath(folder).is_relative_to("/var/tmp")
    return [
        *SYSTEM_ONLY,
        f"ReadWritePaths={_quoted(_specifiers(folder))}",
        *([] if temporary else ["PrivateTmp=yes"]),  # it would hide a kit that lies there
        *([] if root else ["CapabilityBoundingSet=", "AmbientCapabilities="]),
    ]


def _how_to_install(name: str, user: str | None) -> str:
    steps: tuple[str, ...]
    if user is None:
        steps = (
            f"mkdir -p ~/.config/systemd/user && cp {name}.service ~/.config/systemd/user/",
            f"systemctl --user daemon-reload && systemctl --user enable --now {name}",
            "loginctl enable-linger   # or it ends when you log out",
        )
    else:
        steps = (f"sudo cp {name}.service /etc/systemd/system/", f"sudo systemctl daemon-reload && sudo systemctl enable --now {name}")
    return "# To install:\n" + "".join(f"#   {step}\n" for step in steps)


def _cohort_remark(noun: str) -> list[str]:
    if noun != "site":
        return []
    return [
        "      # The cohort, at the path that site.toml names, read-only:",
        "      # - type: bind",
        "      #   source: /path/of/the/cohort",
        "      #   target: /path/of/the/cohort",
        "      #   read_only: true",
    ]


def _published(ports: Sequence[int]) -> list[str]:
    if not ports:
        return []
    return [
        f"    ports: {_flow([f'{port}:{port}' for port in ports])}",
        "    # The page answers on loopback alone, which here is the container's own; to open it from the host: network_mode: host instead of ports",
    ]


def _command_line(command: Sequence[str]) -> str:
    """Words for ExecStart: of `$` and `%` systemd would make something else. It takes no quotes in a program's own path, however they are written.

    Raises:
        ConfigurationError: there is no program, or one that a unit cannot name.
    """
    program, *arguments = [_one_line("command", word) for word in command] or [""]
    if set("$\"'\\") & set(_absolute("command", program)):
        raise ConfigurationError(f"command: expected a program's path without $, quotes and backslashes, got {program!r}", "install it elsewhere")
    return " ".join(_quoted(_specifiers(word)) for word in (program, *(word.replace("$", "$$") for word in arguments)))


def _quoted(word: str) -> str:
    return word if PLAIN_WORD.fullmatch(word) else '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _one_line(key: str, text: str) -> str:
    """`text`, where it can stand in a line of a unit: a line break in a name would be a new setting.

    Raises:
        ConfigurationError: it holds a control character.
    """
    if not text.isprintable():
        raise ConfigurationError(f"{key}: expected one line of printable text, got {text!r}", "remove line breaks and control characters")
    return text


def _absolute(key: str, path: str) -> str:
    if not PurePosixPath(_one_line(key, path)).is_absolute():
        raise ConfigurationError(f"{key}: expected an absolute path, got {path!r}", "give the whole path")
    if path.endswith("\\") or path != path.strip():
        raise ConfigurationError(f"{key}: expected a path that ends in neither a space nor a backslash, got {path!r}", "rename the folder")
    return path


def _name(key: str, text: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text):
        raise ConfigurationError(f"{key}: expected a name like {pattern.pattern}, got {text!r}", "choose another")
    return text


def _scalar(text: str) -> str:
    """A quoted YAML scalar; a JSON string is one, but for pairs of surrogates. Compose would take `$` for a variable."""
    return json.dumps(text.replace("$", "$$"), ensure_ascii=False)


def _flow(words: Sequence[str]) -> str:
    return "[" + ", ".join(_scalar(word) for word in words) + "]"

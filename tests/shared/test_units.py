"""Units: systemd itself reads them as meant, no text can add a setting, and the Compose file gives away nothing that it need not."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.errors import ConfigurationError
from shared.units import KIT_IN_CONTAINER, compose_file, dockerfile, systemd_unit

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze: apt-get install systemd")
ROOT = Path(__file__).parents[2]
PRINTABLE = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=30)
HARDENED = {"NoNewPrivileges": "yes", "UMask": "0077", "LimitCORE": "0", "RestrictNamespaces": "yes", "SystemCallArchitectures": "native"}


def unit(*, folder: str = "/srv/kit", user: str | None = "wardround", **changes: object) -> str:
    fields: dict[str, object] = {
        "name": "wardround-site",
        "description": "Wardround, site va",
        "command": (sys.executable, "-m", "wardround", "site", "start", folder),
        "working_directory": folder,
        "user": user,
    }
    return systemd_unit(**{**fields, **changes})  # type: ignore[arg-type]  # a test's changes


def settings(text: str) -> dict[str, dict[str, list[str]]]:
    """Section -> key -> values, of a unit without continued lines."""
    found: dict[str, dict[str, list[str]]] = {}
    section = ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(section, {}).setdefault(key, []).append(value)
    return found


def words_of(line: str) -> list[str]:
    """What systemd makes of a command line without variables: the shell's own reader of quotes is another's work, and reads these alike."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line)]


# Settings -------------------------------------------------------------------------------------------------------------------------


def test_a_system_unit_restarts_for_ever_and_writes_only_its_kit() -> None:
    parts = settings(unit())
    service = {key: values[0] for key, values in parts["Service"].items() if len(values) == 1}
    expected = {
        "User": "wardround", "WorkingDirectory": "/srv/kit", "Restart": "always", "RestartSec": "2", "KillMode": "mixed", "TimeoutStopSec": "20",
        "ProtectSystem": "strict", "ReadWritePaths": "/srv/kit", "PrivateTmp": "yes", "CapabilityBoundingSet": "", **HARDENED,
    }  # fmt: skip
    assert {key: service.get(key) for key in expected} == expected
    assert parts["Service"]["Environment"] == ["FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"]
    assert parts["Unit"]["After"] == parts["Unit"]["Wants"] == ["network-online.target"]
    assert parts["Unit"]["StartLimitIntervalSec"] == ["0"] and parts["Install"]["WantedBy"] == ["multi-user.target"]


def test_a_user_s_unit_asks_for_nothing_that_needs_root() -> None:
    parts = settings(unit(user=None))
    needs_root = {"User", "ProtectSystem", "ProtectHome", "ReadWritePaths", "PrivateTmp", "CapabilityBoundingSet", "ProtectProc", "ProtectHostname"}
    assert not needs_root & set(parts["Service"])
    assert {key: parts["Service"][key] for key in HARDENED} == {key: [value] for key, value in HARDENED.items()}
    assert parts["Install"]["WantedBy"] == ["default.target"] and "enable-linger" in unit(user=None)


def test_root_keeps_what_it_needs_to_change_users() -> None:
    service = settings(unit(user="root"))["Service"]
    assert "CapabilityBoundingSet" not in service and service["NoNewPrivileges"] == ["yes"]


@pytest.mark.parametrize(("folder", "private"), [("/tmp/kit", False), ("/var/tmp/kit", False), ("/tmpfiles/kit", True)])
def test_a_kit_in_a_temporary_folder_is_not_hidden(folder: str, private: bool) -> None:
    assert ("PrivateTmp" in settings(unit(folder=folder))["Service"]) == private


# Quoting --------------------------------------------------------------------------------------------------------------------------


@given(arguments=st.lists(PRINTABLE, max_size=4), folder=PRINTABLE)
@example(arguments=["a b", 'say "hi"', "100 %", "$HOME", "\\", ";", "'", "%h", "a\\"], folder="my kit %n")
def test_words_come_back_as_they_were(arguments: list[str], folder: str) -> None:
    path = f"/srv/{folder.rstrip().rstrip(chr(92)).rstrip()}x"
    service = settings(unit(command=("/opt/a b/wardround", *arguments), working_directory=path))["Service"]
    assert words_of(service["ExecStart"][0]) == ["/opt/a b/wardround", *arguments]
    assert [word.replace("%%", "%") for word in shlex.split(service["ReadWritePaths"][0])] == [path]
    assert service["WorkingDirectory"][0].replace("%%", "%") == path


@pytest.mark.parametrize(
    "changes",
    [
        {"command": ("wardround", "site")}, {"command": ()}, {"command": ("/opt/$x/wardround",)}, {"command": ("/opt/my 'own'/x",)}, {"command": ('/opt/"x"',)}, {"command": ("/a\\b",)},
        {"command": ("/bin/true", "a\nUser=root")},
        {"working_directory": "kit"}, {"working_directory": "/srv/kit\nUser=root"}, {"working_directory": "/srv/kit\\"}, {"working_directory": "/kit "},
        {"description": "x\n[Service]\nUser=root"}, {"description": "x\x00"}, {"description": "x\u2028y"},
        {"name": ""}, {"name": "../x"}, {"name": "a b"}, {"user": "root\nGroup=root"}, {"user": ""},
    ],
)  # fmt: skip
def test_what_a_unit_cannot_hold_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        unit(**changes)  # type: ignore[arg-type]  # a test's changes


# systemd's own word ---------------------------------------------------------------------------------------------------------------


def analyze(*arguments: str, runtime: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({} if runtime is None else {"XDG_RUNTIME_DIR": str(runtime)})}
    return subprocess.run([str(ANALYZE), *arguments], capture_output=True, text=True, check=False, timeout=60, env=environment)


@needs_systemd
@pytest.mark.parametrize("user", ["daemon", "root", None])
@pytest.mark.parametrize("folder", ["kit", "a kit, 100 %n ; 'my' \"own\" \\x41 #1"])
def test_systemd_reads_it_without_complaint(tmp_path: Path, user: str | None, folder: str) -> None:
    """It looks for the program where it is, so what it made of the quotes is what was meant."""
    program = tmp_path / "the programs, 100 %n ; #1" / "wardround"
    program.parent.mkdir()
    program.symlink_to("/bin/true")
    path = tmp_path / "wardround-site.service"
    path.write_text(unit(folder=str(tmp_path / folder), user=user, command=(str(program), "site", "start", folder)))
    manager = "--user" if user is None else "--system"
    finished = analyze(manager, "--man=no", "verify", str(path), runtime=tmp_path)
    assert finished.returncode == 0 and "wardround-site" not in finished.stderr, finished.stderr
    program.rename(program.with_name("elsewhere"))
    path.write_text(path.read_text().replace("KillMode=mixed", "KillMode=mixt"))  # the same check does find faults
    found = analyze(manager, "--man=no", "verify", str(path), runtime=tmp_path).stderr
    assert "kill mode" in found and "not executable" in found


@needs_systemd
def test_systemd_finds_little_exposure(tmp_path: Path) -> None:
    """Its own score, from 0 (none) to 10 (all); an ordinary unit has 9 or more, and what is left here is network, GPU and the cohort."""
    path = tmp_path / "wardround-site.service"
    path.write_text(unit())
    finished = analyze("security", "--offline=yes", "--no-pager", str(path))
    score = re.search(r"Overall exposure level.*?: ([\d.]+)", finished.stdout)
    assert score is not None, finished.stderr
    assert float(score[1]) <= 3.0


# Compose --------------------------------------------------------------------------------------------------------------------------


def compose(**changes: object) -> dict[str, object]:
    yaml = pytest.importorskip("yaml")
    fields: dict[str, object] = {
        "service": "coordinator", "command": ("coordinator", "start"), "kit": "/srv/kits/coordinator", "ports": (8443,), "image": "wardround:0.1.0"
    }  # fmt: skip
    tree = yaml.safe_load(compose_file(**{**fields, **changes}))  # type: ignore[arg-type]  # a test's changes
    assert set(tree) == {"services"} and len(tree["services"]) == 1
    return next(iter(tree["services"].values()))  # type: ignore[no-any-return]  # parsed YAML


def test_a_container_has_its_kit_and_nothing_else() -> None:
    service = compose()
    assert service["command"] == ["coordinator", "start", KIT_IN_CONTAINER] and service["image"] == "wardround:0.1.0"
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    bind = {"create_host_path": False}
    assert service["volumes"] == [{"type": "bind", "source": "/srv/kits/coordinator", "target": KIT_IN_CONTAINER, "bind": bind}]
    assert service["ports"] == ["8443:8443"] and service["restart"] == "unless-stopped"
    assert service["environment"] == {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    assert service["healthcheck"]["test"] == ["CMD", "wardround", "coordinator", "status", KIT_IN_CONTAINER]  # type: ignore[index]  # parsed YAML
    assert not {"privileged", "network_mode", "cap_add", "devices", "pid", "ipc"} & set(service)


def test_a_site_opens_no_port() -> None:
    service = compose(service="site", command=("site", "start"), ports=())
    assert "ports" not in service and service["command"] == ["site", "start", KIT_IN_CONTAINER]
    assert service["healthcheck"]["test"][2] == "site"  # type: ignore[index]  # parsed YAML


@given(kit=PRINTABLE, image=PRINTABLE)
@example(kit='a": {b', image="x: [y]\\")
@example(kit="$HOME ${X} $$", image="# no")
def test_no_text_becomes_structure(kit: str, image: str) -> None:
    path = f"/srv/{kit.rstrip().rstrip(chr(92)).rstrip()}x"
    service = compose(kit=path, image=image)
    assert service["volumes"][0]["source"].replace("$$", "$") == path  # type: ignore[index]  # parsed YAML
    assert str(service["image"]).replace("$$", "$") == image
    assert "$" not in str(service["image"]).replace("$$", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"kit": "kit"},
        {"kit": "/a\nb"},
        {"service": "A b"},
        {"service": "x:\n  y"},
        {"image": "x\ny"},
        {"image": "x\u2028y"},
        {"ports": (0,)},
        {"ports": (70000,)},
        {"command": ("site",)},
    ],
)
def test_what_compose_could_not_take_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        compose(**changes)


def test_the_image_holds_the_rooms_and_no_kit() -> None:
    lines = dockerfile().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"shared", "client", "server", "simulations", "wardround", "studies"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources) and "." not in sources
    assert "USER 1000:1000" in lines and 'ENTRYPOINT ["wardround"]' in lines and "FROM python:3.11-slim" in lines
    assert not any(line.startswith("ADD ") for line in lines)
    with pytest.raises(ConfigurationError):
        dockerfile(python="3.11\nRUN true")

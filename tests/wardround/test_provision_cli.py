"""`provision`, `renew`, `revoke` and `site init`, as two people would use them."""

import dataclasses
import io
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wardround.cli.federation
from client.policy import SiteFile
from shared.certificates import fingerprint_of, read_certificate
from shared.kit import SiteRequest
from shared.task import Task
from shared.tasks.heart_disease import heart_disease, load_cohort
from tests.site_under_check import NUM_PATIENTS, heart_rows
from tests.wardround.conftest import Command

FEDERATION = 'name = "two"\nsites = ["north", "south"]\n[coordinator]\nhosts = ["localhost"]\n'
PASSPHRASE = "a passphrase for tests"
COHORT = "processed.va.data"


def takes_any_option() -> Task:
    """The task heart-disease, but that its loader has options."""
    return dataclasses.replace(heart_disease(), load_cohort=lambda path, options: load_cohort(path, {}))


@pytest.fixture
def ready(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """A folder with a federation file, the passphrase in the environment, and no terminal."""
    (tmp_path / "federation.toml").write_text(FEDERATION)
    monkeypatch.setenv("WARDROUND_CA_PASSPHRASE", PASSPHRASE)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return command


def statuses(data: dict[str, object]) -> dict[str, str]:
    sites = data["sites"]
    assert isinstance(sites, list)
    return {site["name"]: site["status"] for site in sites}


def test_from_a_federation_file_to_an_approved_site_and_back(ready: Command, tmp_path: Path) -> None:
    made = ready("provision", "federation.toml", "--out", "kits", "--json")
    assert made.code == 0 and made.data["generation"] == 1 and made.data["coordinator_kit"] == "kits/coordinator"
    assert statuses(made.data) == {"north": "kit written", "south": "kit written"}
    assert made.data["ca_fingerprint"] == fingerprint_of(read_certificate(Path("kits/ca/ca.crt")))
    Path(COHORT).write_text(heart_rows(NUM_PATIENTS))
    answers = ["--data", COHORT, "--task", f"{__name__}:takes_any_option", "--declared-size", 80, "--declared-test-size", 40, "--epsilon", 3]
    site = ready("site", "init", "kits/sites/north.zip", "--out", "hospital", *answers, "--option", "a=1", "--option", "b=x", "--json")
    assert site.code == 0 and site.data["ca_fingerprint"] == made.data["ca_fingerprint"] and site.data["site_file"] == "hospital/site.toml"
    assert SiteFile.load(tmp_path / "hospital" / "site.toml").cohort.options == {"a": 1, "b": "x"}
    shown = " ".join(site.err.split()).split("request ")[1][: 64 + 15]
    approving = ("provision", "federation.toml", "--out", "kits", "--approve", "hospital/request.json")
    for read_out in (["0" * 64], ["0" * 64, shown]):
        refused = ready(*approving, *(item for text in read_out for item in ("--fingerprint", text)))
        assert refused.code == 4 and "E402" in refused.err
        told = refused.err + refused.out
        assert not any(group in told for group in shown.split()[:4]) and "".join(shown.split()) not in told  # nobody can copy it from here
    assert "of north" in ready(*approving, "--fingerprint", "0" * 64).err
    approved = ready("provision", "federation.toml", "--out", "kits", "--approve", "hospital/request.json", "--fingerprint", shown, "--json")
    assert statuses(approved.data) == {"north": "approved", "south": "waiting for its request"} and approved.data["generation"] == 2
    assert approved.data["requests"] == [{"site": "north", "fingerprint": site.data["fingerprint"]}]
    renewed = ready("renew", "federation.toml", "--out", "kits", "--json")
    assert renewed.data["generation"] == 3
    unknown = ready("revoke", "federation.toml", "nroth", "--out", "kits")
    assert unknown.code == 3 and "site 'nroth': expected one that was approved: north (did you mean 'north'?)" in unknown.err
    revoked = ready("revoke", "federation.toml", "north", "--out", "kits", "--reason", "moved", "--json")
    assert statuses(revoked.data)["north"] == "revoked" and revoked.data["generation"] == 4
    again = ready("provision", "federation.toml", "--out", "kits", "--approve", "hospital/request.json", "--json")
    assert again.code == 4 and "revoked" in str(again.out)


def test_people_see_fingerprints_warnings_and_the_next_step(ready: Command, tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION + "[certificates]\nserver_days = 10\n")
    made = ready("provision", "federation.toml")
    assert made.code == 0 and "WARN the coordinator's server certificate expires on" in made.out and made.err == ""
    groups = [line.split() for line in made.out.splitlines() if len(line.split()) == 16]
    assert ["".join(group) for group in groups] == [fingerprint_of(read_certificate(Path("kits/ca/ca.crt")))]
    site = ready("site", "init", "kits/sites/south")
    assert site.code == 0 and "".join(groups[0]) in "".join(site.out.split())
    assert "site.toml.example" in site.out and "send kits/sites/south/request.json to the coordinator" in site.out


def test_the_wizard_asks_for_what_is_missing(ready: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ready("provision", "federation.toml")
    Path(COHORT).write_text(heart_rows(NUM_PATIENTS))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{COHORT}\n80\n\n\n"))
    done = ready("site", "init", "kits/sites/north", "--task", "heart-disease", "--wizard", "--json")
    assert done.code == 0 and "Training patients" in done.err and "The task" not in done.err
    file = SiteFile.load(Path("kits/sites/north/site.toml"))
    assert (file.cohort.declared_size, file.cohort.declared_test_size, file.policy.max_epsilon) == (80, 0, 3.0)


def on_terminal(arguments: list[str], typed: list[tuple[str, bytes]], *, seconds: float = 60) -> tuple[int, str]:
    """Exit code and output of a command on a terminal, where each answer is typed when its question stands at the end of what is shown."""
    here, there = pty.openpty()
    own = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"  # so that Ctrl-C is a signal
    command, environment = (
        [sys.executable, "-c", own, sys.executable, "-m", "wardround", *arguments],
        {**os.environ, "COLUMNS": "100", "TERM": "dumb"},
    )
    process = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, start_new_session=True, env=environment)
    os.close(there)
    shown, asked, deadline, waiting = "", 0, time.monotonic() + seconds, list(typed)
    while time.monotonic() < deadline:
        if not select.select([here], [], [], 5)[0]:
            if shown.endswith("^C"):
                os.write(here, CTRL_C)  # the first came between question and reading, where Python only notes it until the next key
            continue
        try:
            shown += os.read(here, 65536).decode()
        except OSError:  # the other end is closed
            break
        if waiting and waiting[0][0] in shown[asked:] and shown.endswith(": "):
            asked = len(shown)
            os.write(here, waiting.pop(0)[1])
    code = process.wait(timeout=30)
    os.close(here)
    assert not waiting, (waiting, shown)
    return code, shown.replace("\r", "")


CTRL_C = b"\x03"
QUESTIONS = ("The cohort", "The task", "Training patients", "Test patients", "Privacy budget")


@pytest.mark.slow
def test_on_a_terminal_every_wrong_answer_is_asked_again(ready: Command) -> None:
    ready("provision", "federation.toml")
    Path(COHORT).write_text(heart_rows(NUM_PATIENTS))
    Path("other.csv").write_text("a,b\n1,2\n")
    data, task, size, test_size, budget = QUESTIONS
    code, shown = on_terminal(
        ["site", "init", "kits/sites/north", "--wizard"],
        [
            (data, b"nowhere.csv\n"), (data, b"other.csv\n"), (task, b"hart-disease\n"), (task, b"heart-disease\n"), (data, f"{COHORT}\n".encode()),
            (task, b"heart-disease\n"), (size, b"many\n"), (size, b"1\n"), (size, b"112\n"), (test_size, b"-1\n"), (test_size, b"48\n"),
            (budget, b"some\n"), (budget, b"nan\n"), (budget, b"0\n"), (budget, b"2.5\n"),
        ],
    )  # fmt: skip
    assert code == 0, shown
    for words in (
        "nowhere.csv: expected data, found nothing", "did you mean 'heart-disease'", "expected processed.<hospital>.data", "at least 2, got 'many'",
        "at least 2, got '1'", "at least 0, got '-1'", "above 0, got 'some'", "above 0, got 'nan'", "above 0, got '0'",
    ):  # fmt: skip
        assert words in shown, words
    file = SiteFile.load(Path("kits/sites/north/site.toml"))
    assert (file.cohort.declared_size, file.cohort.declared_test_size, file.policy.max_epsilon) == (112, 48, 2.5)


@pytest.mark.slow
@pytest.mark.parametrize("answered", [0, 2, 4])
def test_ctrl_c_ends_the_wizard_with_one_line_and_nothing_made(ready: Command, answered: int) -> None:
    ready("provision", "federation.toml")
    Path(COHORT).write_text(heart_rows(NUM_PATIENTS))
    answers = [f"{COHORT}\n".encode(), b"heart-disease\n", b"112\n", b"48\n"]
    typed = [*zip(QUESTIONS, answers[:answered], strict=False), (QUESTIONS[answered], CTRL_C)]
    code, shown = on_terminal(["site", "init", "kits/sites/north", "--wizard"], typed)
    assert code == 130
    after = shown.split(QUESTIONS[answered])[1].splitlines()
    assert [line for line in after[1:] if line] == ["error E130: interrupted"]
    assert not Path("kits/sites/north/keys").exists() and not Path("kits/sites/north/site.toml").exists()


def test_without_a_passphrase_a_new_ca_gets_one_and_an_old_one_is_refused(ready: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WARDROUND_CA_PASSPHRASE")
    made = ready("provision", "federation.toml", "--json")
    assert made.code == 0 and made.err.count("passphrase of the new CA: ") == 1
    passphrase = made.err.split("passphrase of the new CA: ")[1].split()[0]
    assert len(passphrase) == 35 and passphrase not in made.out
    assert not any(passphrase.encode() in path.read_bytes() for path in Path("kits").rglob("*") if path.is_file())
    refused = ready("provision", "federation.toml", "--json")
    assert refused.code == 2 and "--passphrase-file" in refused.out
    Path("secret").write_text(passphrase + "\n")
    Path("secret").chmod(0o644)
    opened = ready("provision", "federation.toml", "--passphrase-file", "secret")
    assert opened.code == 0 and "WARN secret can be read by other users" in opened.err
    Path("secret").chmod(0o600)
    assert "WARN" not in ready("renew", "federation.toml", "--passphrase-file", "secret").err
    for content, message in (("wrong wrong wrong", "the passphrase does not open"), ("", "expected the passphrase in the first line")):
        Path("secret").write_text(content)
        wrong = ready("provision", "federation.toml", "--passphrase-file", "secret")
        assert wrong.code == 3 and message in wrong.err and "passphrase of the new CA" not in wrong.err


def test_on_a_terminal_it_is_asked_and_a_new_one_twice(ready: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WARDROUND_CA_PASSPHRASE")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    typed: list[str] = []
    monkeypatch.setattr(wardround.cli.federation.getpass, "getpass", lambda prompt: typed.pop(0))
    typed[:] = [PASSPHRASE, "another passphrase"]
    assert ready("provision", "federation.toml").code == 2 and not Path("kits").exists()
    typed[:] = [PASSPHRASE, PASSPHRASE]
    assert ready("provision", "federation.toml").code == 0
    typed[:] = [PASSPHRASE]
    assert ready("provision", "federation.toml").code == 0 and typed == []
    typed[:] = ["not the passphrase"]
    assert ready("renew", "federation.toml").code == 3


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["provision", "none.toml"], 3, "none.toml: expected a TOML file"),
        (["provision", "federation.toml", "--approve", "none.json"], 4, "none.json: expected a file"),
        (["provision", "federation.toml", "--fingerprint", "00"], 4, "got 1 for 0 requests"),
        (["renew", "federation.toml"], 3, "run 'wardround provision' first"),
        (["revoke", "federation.toml", "north"], 3, "run 'wardround provision' first"),
        (["site", "init", "none"], 4, "none/ca.crt: expected a file"),
        (["site", "init", "none.zip"], 1, "none.zip"),
        (["site", "init", "none", "--out", "x"], 2, "--out"),
        (["site", "init", "none", "--option", "x"], 2, "expected KEY=VALUE"),
    ],
)
def test_wrong_use_is_told_and_leaves_nothing(ready: Command, tmp_path: Path, arguments: list[str], code: int, fragment: str) -> None:
    outcome = ready(*arguments)
    assert outcome.code == code and fragment in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["federation.toml"]


def test_an_altered_request_is_refused(ready: Command) -> None:
    ready("provision", "federation.toml")
    ready("site", "init", "kits/sites/north", "--declared-size", 80)
    path = Path("kits/sites/north/request.json")
    assert SiteRequest.read(path).declared_size == 80
    path.write_text(path.read_text().replace('"declared_size": 80', '"declared_size": 90'))
    outcome = ready("provision", "federation.toml", "--approve", path)
    assert outcome.code == 4 and "signed by both" in outcome.err

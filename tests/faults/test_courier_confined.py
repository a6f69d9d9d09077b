"""What the process that faces the network can reach once it has given up its power: not the cohort, not the ledger, not a key, not the daemon."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.confinement import landlock_abi
from client.door import DOOR, SOCKET
from shared.kit import NODE_KEY, SIGNING_KEY, SITE_FILE
from tests.faults.federation import Federation, study

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not landlock_abi(), reason="this kernel has no Landlock")]
SITE = "cleveland"

INTRUDER = """
import json, os, socket, sys
from pathlib import Path
from client.courier import give_up_power
from client.policy import SiteFile

kit, attempts = Path(sys.argv[1]), json.loads(sys.argv[2])
give_up_power(kit, SiteFile.load(kit / "site.toml"))

def tried(what, path):
    try:
        match what:
            case "read": open(path, "rb").read(1)
            case "list": os.listdir(path)
            case "write": open(path, "ab").write(b"x")
            case "kill": os.kill(int(path), 0)
    except OSError as error:
        return error.strerror
    return "done"

answers = [tried(what, path) for what, path in attempts]
door = socket.socket(socket.AF_UNIX)
door.connect("daemon.sock")
print(json.dumps({"answers": answers, "torch": "torch" in sys.modules}))
"""


@pytest.fixture
def federation(hospitals: Federation) -> Federation:
    """Hospitals that have taken part in a study."""
    if not hospitals.submissions.all():
        hospitals.finished(hospitals.submit(study(rounds={"count": 1})))
    return hospitals


def test_a_courier_gets_permission_denied(federation: Federation) -> None:
    kit = federation.kit(SITE)
    daemon = federation.child_of(SITE, "client.daemon")
    cohort, state = federation.root / "data" / f"processed.{SITE}.data", kit / "state"
    files = [cohort, *sorted((state / "ledgers").glob("*.sqlite")), state / "patient-hash.key", kit / SIGNING_KEY, kit / NODE_KEY,
             kit / SITE_FILE, state / "audit.jsonl", *sorted((state / "releases").rglob("*.safetensors"))]  # fmt: skip
    assert len(files) >= 8 and all(path.is_file() for path in files)
    attempts = [("read", str(path)) for path in files] + [("list", str(state)), ("write", str(state / "audit.jsonl")), ("write", str(kit / "new"))]
    attempts += [("read", f"/proc/{daemon}/{part}") for part in ("mem", "environ", "maps")] + [("kill", str(daemon))]
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTRUDER, str(kit), json.dumps(attempts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    told = dict(zip(map(tuple, attempts), found["answers"], strict=True))
    assert set(told.values()) <= {"Permission denied", "Operation not permitted"}, told
    assert not found["torch"]


def test_the_running_courier_is_confined_and_holds_none_of_these_files_open(federation: Federation) -> None:
    courier = federation.child_of(SITE, "client.courier")
    status = Path(f"/proc/{courier}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    opened = {os.readlink(path) for path in Path(f"/proc/{courier}/fd").iterdir()}
    mine = [path for path in opened if path.startswith(str(federation.root))]
    assert all(Path(path).name in ("courier.log", "courier.json") for path in mine), mine
    assert (federation.kit(SITE) / "state" / DOOR / SOCKET).is_socket()

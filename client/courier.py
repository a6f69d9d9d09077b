"""`python -m client.courier KIT`: carries sealed bytes between the coordinator and the daemon, and can do nothing else.

It faces the network, so it gives up its powers before the first packet: no file but the installed code, no other process, no secret but the
node key, which it holds in memory. It imports no torch, runs no bundle, and cannot read or make a seal.
"""

import logging
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto

from client.confinement import COURIER_USER, confine, describe_confinement, interpreter_paths, system_user
from client.connection import ConnectionFile
from client.door import DOOR_WAIT_SECONDS, NO_ANSWER, SOCKET, ask, door_folder
from client.fleet import Fleet, Received
from client.policy import SiteFile
from shared.bundle import bundle_hash
from shared.certificates import load_node_key
from shared.errors import BundleError, ConfinementError, SealError, WardroundError
from shared.files import storage_errors
from shared.kit import CA_CERTIFICATE, KEYS, NODE_KEY, SITE_FILE, verify_kit
from shared.pausing import next_pause

POLL_SECONDS, IDLE_POLL_SECONDS = 0.3, 3.0
MAX_AT_ONCE = 16  # questions under way: twice as many as the daemon lets wait at once (`client.bench`), so that a stop finds a free worker
RAISED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """Takes messages from the fleet to the door and back.

    Attributes:
        ask: the door: question -> answer, both as bytes.
        bundle: hash of the one bundle whose runs are carried.
    """

    fleet: Fleet
    ask: Callable[[bytes], bytes]
    bundle: str

    def carry(self, stop: threading.Event) -> None:
        """Until `stop`: every message that comes, several at once, so that a newer one is not kept waiting by an older one.

        Raises:
            NodeRefusedError: the node is let in no more.
        """
        last = time.monotonic()
        with ThreadPoolExecutor(max_workers=MAX_AT_ONCE) as workers:
            while not stop.is_set():
                received = self.fleet.receive()
                if received is not None:
                    last = time.monotonic()
                    workers.submit(self._answer, received)
                    continue
                stop.wait(next_pause(time.monotonic() - last, shortest=POLL_SECONDS, longest=IDLE_POLL_SECONDS))

    def _answer(self, received: Received) -> None:
        started = time.monotonic()
        try:
            content = self._asked(received)
            if content is None:
                return
            reply = Message(content, reply_to=received.message)
        except WardroundError as error:
            logger.warning("%s: %s", error.code, error)
            reply = Message(Error(code=RAISED, reason=f"{error.code} {type(error).__doc__}"), reply_to=received.message)
        try:
            self.fleet.send(reply, time.monotonic() - started)
        except WardroundError as error:
            logger.warning("%s: %s", error.code, error)

    def _asked(self, received: Received) -> RecordDict | None:
        """The daemon's answer; None where it wants none sent, for the same was asked again."""
        if received.bundle_hash != self.bundle:
            raise BundleError("expected a run of the bundle that this installation builds, got another; nothing of it was run or fetched")
        if not received.message.has_content():
            raise SealError("expected a sealed task, got an error")
        answer = self.ask(recorddict_to_proto(received.message.content).SerializeToString())
        if not answer:
            raise SealError("the daemon found no valid seal on the task")
        if answer == NO_ANSWER:
            return None
        return recorddict_from_proto(RecordDictProto.FromString(answer))


def run(kit: Path) -> int:
    """Carry until told to stop; the exit code comes back."""
    stop, connection = threading.Event(), None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        manifest, file = verify_kit(kit), SiteFile.load(kit / SITE_FILE)
        address = f"{manifest.coordinator.hosts[0]}:{manifest.coordinator.port}"
        key, trust, bundle = load_node_key(kit / NODE_KEY), ssl.create_default_context(cafile=str(kit / CA_CERTIFICATE)), bundle_hash()
        with storage_errors(kit / file.state, "make the site's state"):
            (kit / file.state).mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = ConnectionFile(kit / file.state)
        give_up_power(kit, file)
        tell = connection.tell
        fleet = Fleet(address, trust, key, stop=stop, tell=lambda problem: tell(problem=problem))
        with fleet.active() as node_id:
            connection.tell(node=node_id)
            logger.info("site %s is node %d at %s", file.name, node_id, address)
            Carrier(fleet=fleet, ask=lambda question: ask(Path(SOCKET), question, wait_seconds=DOOR_WAIT_SECONDS), bundle=bundle).carry(stop)
    except WardroundError as error:
        if not stop.is_set():
            logger.error("error %s: %s", error.code, error)
            if connection is not None:
                connection.tell(problem=f"{error.code} {error.what}")
            return error.exit_code
    return 0


def give_up_power(kit: Path, file: SiteFile) -> None:
    """From here on this process reaches the network and the daemon's socket in its working folder, and no file of the hospital.

    Raises:
        ConfinementError: there is no means to it, and the policy does not accept that by name.
    """
    state = (kit / file.state).resolve()
    secrets = [(kit / KEYS).resolve(), state, (kit / SITE_FILE).resolve()]
    folder = door_folder(state)
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    os.chdir(folder)  # the way to the socket: no other path is needed any more
    kind = describe_confinement(COURIER_USER)
    if "user" in kind:
        user = system_user(COURIER_USER)
        assert user is not None
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    if "landlock" in kind:
        confine(readable=interpreter_paths(), protected=[path for path in secrets if path.exists()])
    if kind == "none" and not file.policy.accept_unconfined_courier:
        raise ConfinementError(
            "expected Landlock or another system user for the courier, found neither",
            f"have an administrator run 'useradd --system {COURIER_USER}' and start the site as root, use Linux 5.13 or newer, "
            "or set accept_unconfined_courier = true in [policy]",
        )
    logger.info("confined by: %s", kind)


def main() -> None:
    """Run the courier of the kit named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.exit(run(Path(sys.argv[1]).resolve()))


if __name__ == "__main__":
    main()

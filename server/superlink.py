"""What the coordinator asks of its own SuperLink, over loopback: who is registered, what runs, start and stop.

This file, `client/fleet.py` and `simulations/in_process.py` are the ones that touch private parts of flwr: its command line has no module
to call, and starting it for every question would cost a second and a half each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, RegisterNodeRequest, StartRunRequest, StopRunRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from shared.bundle import RUN, bundle, bundle_hash
from shared.errors import ConnectionFailedError

FINISHED = "finished"
ONLINE = "online"
UNREGISTERED = "unregistered"

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A site as the SuperLink knows it."""

    node_id: int
    public_key: bytes
    online: bool
    last_contact: datetime | None  # of the last heartbeat; None where it was never active


class SuperLink:
    """The Control API of the SuperLink at `address` (host:port on loopback), whose certificate `ca` has signed.

    Every method raises `ConnectionFailedError` where it does not answer.
    """

    def __init__(self, address: str, ca: Path) -> None:
        self._address = address
        interceptors = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
        self._client = ControlHttpClient.from_server_address(address, insecure=False, root_certificates=ca.read_bytes(), interceptors=interceptors)

    def register(self, public_key: bytes, name: str) -> int:
        """The node id of a site's public key (PEM), from now on let in."""
        return int(self._ask(lambda: self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name))).node_id)

    def unregister(self, node_id: int) -> None:
        """Let this node in no more."""
        self._ask(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def nodes(self) -> list[Node]:
        """Every registered node."""
        found = self._ask(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        return [_node(info) for info in found if info.status != UNREGISTERED]

    def start_run(self, run: str) -> int:
        """Flower's id of a new run of the study in the run folder of this name."""
        request = StartRunRequest(fab=fab_to_proto(Fab(bundle_hash(), bundle(), {})), override_config=user_config_to_proto({RUN: run}))
        return int(self._ask(lambda: self._client.StartRun(request)).run_id)

    def stop_run(self, run_id: int) -> None:
        """End a run's ServerApp, where it still runs."""
        if run_id in self.active_runs():
            self._ask(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))

    def active_runs(self) -> set[int]:
        """Flower's ids of the runs that have not ended."""
        found = self._ask(lambda: self._client.ListRuns(ListRunsRequest())).run_dict
        return {int(run_id) for run_id, run in found.items() if run.status.status != FINISHED}

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            self.nodes()
        except ConnectionFailedError:
            return False
        return True

    def close(self) -> None:
        """Release the connection."""
        self._client.close()

    def _ask(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except (httpx.HTTPError, ValueError) as error:
            raise ConnectionFailedError(
                f"SuperLink at {self._address}: expected an answer, got {type(error).__name__}", "see superlink.log in the coordinator's state"
            ) from error


def _node(info: NodeInfo) -> Node:
    contact = (
        info.online_until - 2 * info.heartbeat_interval if info.last_activated_at else 0.0
    )  # a node is online for two intervals after a heartbeat
    last = datetime.fromtimestamp(contact, UTC) if 0 < contact < 1e11 else None
    return Node(node_id=int(info.node_id), public_key=bytes(info.public_key), online=info.status == ONLINE, last_contact=last)

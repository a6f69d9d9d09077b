"""Who has no business here, and what was tampered with (faults 8 to 12): refused and written down, and the rest goes on."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import flwr.supernode.node_auth_http_interceptor as node_auth
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, RegisterNodeRequest, StartRunRequest, StopRunRequest, UnregisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from client.fleet import Fleet
from server.superlink import SuperLink
from shared import bundle
from shared.certificates import load_node_key, new_node_key, node_key_pem
from shared.errors import NodeRefusedError
from shared.kit import CA_CERTIFICATE, NODE_KEY, installed_version
from shared.supervision import read_instance
from tests.faults.federation import Federation, study
from tests.provisioned import provisioned

pytestmark = pytest.mark.slow
NORTH, EAST, SOUTH, OLD = "cleveland", "hungarian", "switzerland", "va"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Three hospitals with a budget of 8, and one with another version of wardround."""
    made = Federation(tmp_path_factory.mktemp("intruders"), (NORTH, EAST, SOUTH, OLD), seed=5, max_epsilon=8.0)
    (made.kit(OLD) / "version").write_text("9.9.9")
    try:
        made.start()
        yield made
    finally:
        made.close()


def fleet(federation: Federation, key: ec.EllipticCurvePrivateKey, *, ca: Path | None = None) -> Fleet:
    """A node with this key, outside of any site."""
    trust = ssl.create_default_context(cafile=str(ca or federation.kit(NORTH) / CA_CERTIFICATE))
    stop = threading.Event()
    stop.set()  # whatever cannot be reached at once is given up
    return Fleet(f"localhost:{federation.port}", trust, key, stop=stop)


def test_8_tls_alone_lets_nobody_in_whose_ca_or_name_is_another(federation: Federation, tmp_path: Path) -> None:
    other = tmp_path / "other"
    provisioned(other)
    for ca, name in ((other / "coordinator" / CA_CERTIFICATE, "localhost"), (federation.kit(NORTH) / CA_CERTIFICATE, "elsewhere.example")):
        trust = ssl.create_default_context(cafile=str(ca))
        with socket.create_connection(("127.0.0.1", federation.port)) as plain, pytest.raises(ssl.SSLCertVerificationError):
            trust.wrap_socket(plain, server_hostname=name)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://localhost:{federation.port}/health", trust_env=False)
    trust = ssl.create_default_context(cafile=str(federation.kit(NORTH) / CA_CERTIFICATE))
    assert httpx.get(f"https://localhost:{federation.port}/health", verify=trust, trust_env=False).json()["wardround"] == installed_version()


def test_8_an_unknown_key_and_a_key_that_is_already_in_use_are_refused(federation: Federation) -> None:
    for key in (new_node_key(), load_node_key(federation.kit(NORTH) / NODE_KEY)):
        with pytest.raises(NodeRefusedError, match="HTTP 4"), fleet(federation, key).active():
            pytest.fail("was let in")
    assert federation.site_state(NORTH) == "online"


CONTROL: dict[str, Callable[[ControlHttpClient], object]] = {
    "submit": lambda control: control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(bundle.bundle_hash(), bundle.bundle(), {})))),
    "list runs": lambda control: control.ListRuns(ListRunsRequest()),
    "stop": lambda control: control.StopRun(StopRunRequest(run_id=1)),
    "list nodes": lambda control: control.ListNodes(ListNodesRequest()),
    "register": lambda control: control.RegisterNode(RegisterNodeRequest(public_key=node_key_pem(new_node_key().public_key()))),
    "unregister": lambda control: control.UnregisterNode(UnregisterNodeRequest(node_id=1)),
}


@pytest.mark.parametrize("what", CONTROL)
def test_8_a_holder_of_the_ca_and_a_sites_key_controls_nothing(federation: Federation, what: str) -> None:
    kit = federation.kit(NORTH)
    for interceptors in ([], [node_auth.NodeAuthHttpInterceptor(key := load_node_key(kit / NODE_KEY), key.public_key())]):
        control = ControlHttpClient.from_server_address(
            f"localhost:{federation.port}", insecure=False, root_certificates=(kit / CA_CERTIFICATE).read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI"), *interceptors],
        )  # fmt: skip
        with pytest.raises(httpx.HTTPStatusError) as refused:
            CONTROL[what](control)
        assert refused.value.response.status_code == 404
        control.close()


def test_8_logs_and_the_runtime_are_not_behind_the_door(federation: Federation) -> None:
    trust = ssl.create_default_context(cafile=str(federation.kit(NORTH) / CA_CERTIFICATE))
    with httpx.Client(verify=trust, trust_env=False) as client:
        for path in ("/v1/control/stream-logs", "/v1/runtime/acquire-task", "/v1/fleet/register-node", "/v1/fleet/unregister-node", "/docs", "/"):
            assert client.post(f"https://localhost:{federation.port}{path}", content=b"").status_code == 404


def test_9_a_run_of_another_bundle_is_refused_before_anything_of_it_is_fetched(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    run = federation.submit(study(rounds={"count": 1, "deadline": "8s"}, privacy={"epsilon": 0.5}))
    federation.finished(run)
    monkeypatch.setattr(bundle, "PYPROJECT", bundle.PYPROJECT.replace("One study", "Another study"))
    bundle.bundle.cache_clear()
    instance = read_instance(federation.coordinator / "state")
    assert instance is not None
    superlink = SuperLink(f"127.0.0.1:{instance.ports['superlink']}", federation.coordinator / CA_CERTIFICATE)
    before = {site: len(federation.audit(site)) for site in federation.sites}
    flower_run = superlink.start_run(run)  # whoever controls the coordinator may start one; the sites do not answer it
    federation.wait(lambda: flower_run not in superlink.active_runs(), "the altered run has ended", 120)
    superlink.close()
    bundle.bundle.cache_clear()
    for site in (NORTH, EAST, SOUTH):
        assert "E108" in (federation.kit(site) / "state" / "courier.log").read_text()
        assert len(federation.audit(site)) == before[site]  # nothing came as far as the daemon


def test_10_two_studies_at_once_share_one_budget(federation: Federation) -> None:
    asked = [study(name=f"share-{index}", rounds={"count": 2, "require": 3}, privacy={"epsilon": 5.0, "spare_rounds": 0}) for index in (1, 2)]
    runs = [federation.submit(item) for item in asked]
    for run in runs:
        federation.wait(lambda: federation.submission(run).state in ("completed", "failed"), f"{run} has ended", 180)  # noqa: B023
    found = [federation.submission(run) for run in runs]
    assert sorted(item.state for item in found) == ["completed", "failed"], [federation.log(run) for run in runs]
    [failed] = [item for item in found if item.state == "failed"]
    assert failed.error is not None and "E700" in failed.error.what


def test_11_a_clock_that_is_off_is_named_as_a_possible_reason(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    before = node_auth.now
    monkeypatch.setattr(node_auth, "now", lambda: before() - timedelta(minutes=11))
    with pytest.raises(NodeRefusedError, match="compare the clocks"), fleet(federation, new_node_key()).active():
        pytest.fail("was let in")


def test_12_another_version_of_wardround_is_refused_with_both_versions_named(federation: Federation) -> None:
    run = federation.submit(study(rounds={"count": 1}, privacy={"epsilon": 0.2}))
    federation.finished(run)
    status, reason = federation.status_of(run, 1, OLD)
    assert status == "refused"
    assert f"wardround {installed_version()} at the coordinator, 9.9.9 at the site" in str(reason)


def test_8_a_revoked_site_is_refused_within_a_round_and_the_study_goes_on(federation: Federation) -> None:
    run = federation.submit(study(rounds={"count": 100, "deadline": "30s"}, privacy={"epsilon": 0.5, "spare_rounds": 0}))
    federation.reached(run, 2)
    federation.revoke(SOUTH)
    at = len(federation.rounds(run))
    federation.reached(run, at + 3)
    for number in (at + 2, at + 3):
        assert federation.status_of(run, number, SOUTH)[0] in ("failed", "missing"), federation.rounds(run)[number - 1]
        assert federation.status_of(run, number, NORTH)[0] == "ok"
    federation.ask(run, "stop")
    federation.finished(run, "stopped", seconds=60)
    assert federation.site_state(SOUTH) == "revoked"
    events = [(row["event"], row["details"].get("site")) for row in federation.audit("coordinator")]  # type: ignore[attr-defined]
    assert ("site unregistered", SOUTH) in events
    with pytest.raises(NodeRefusedError), fleet(federation, load_node_key(federation.kit(SOUTH) / NODE_KEY)).active():
        pytest.fail("was let in again")

"""What an administrator may install so that the coordinator's machine keeps it running: texts beside the kit, none of them signed, none overwritten."""

import ipaddress
import sys
from pathlib import Path

from server.federation_file import CoordinatorTable, FederationFile
from server.front_door import NginxDoor, nginx_configuration
from shared.files import write_absent
from shared.kit import CA_CERTIFICATE, SERVER_CERTIFICATE, SERVER_KEY, installed_version
from shared.units import compose_file, current_user, dockerfile, systemd_unit

UNITS, NAME = "units", "wardround-coordinator"

_NGINX_REMARK = """\
# Only where nginx shall stand before the coordinator's own front door, which needs none. It takes the public address, and passes on to the front
# door on this machine's loopback: set listen = "127.0.0.1" under [coordinator] of federation.toml, provision again, and start the coordinator anew.
# Both have the same port, so nginx must listen on the public address alone{addresses}.
"""


def write_coordinator_units(kit: Path, file: FederationFile) -> Path:
    """The folder of the texts beside the coordinator's kit; those that are there already stay as they are.

    Raises:
        ConfigurationError: the kit's path is none that a unit could name.
        StorageError: they cannot be written.
    """
    folder, program = kit.resolve(), str(Path(sys.executable).parent / "wardround")
    command, description = (program, "coordinator", "start", str(folder)), f"Wardround coordinator of {file.name}"

    def unit(user: str | None) -> str:
        return systemd_unit(name=NAME, description=description, command=command, working_directory=str(folder), user=user)

    texts = {
        f"{NAME}.service": unit(current_user()),
        f"user/{NAME}.service": unit(None),
        "compose.yaml": compose_file(
            service="coordinator",
            command=("coordinator", "start"),
            kit=str(folder),
            ports=(file.coordinator.port,),
            image=f"wardround:{installed_version()}",
        ),
        "Dockerfile": dockerfile(),
        "nginx.conf": _nginx(folder, file.coordinator),
    }
    for name, text in texts.items():
        write_absent(kit / UNITS / name, text)
    return kit / UNITS


def _nginx(folder: Path, coordinator: CoordinatorTable) -> str:
    addresses = [address for host in coordinator.hosts if (address := _public_address(host)) is not None]
    remark = _NGINX_REMARK.format(addresses="" if addresses else ": put it before the port in each 'listen' line")
    listen = tuple(f"{address}:{coordinator.port}" for address in addresses) or (str(coordinator.port),)
    return remark + nginx_configuration(
        NginxDoor(
            server_names=coordinator.hosts,
            listen=listen,
            certificate=folder / SERVER_CERTIFICATE,
            key=folder / SERVER_KEY,
            upstream=f"127.0.0.1:{coordinator.port}",
            upstream_ca=folder / CA_CERTIFICATE,
            version=installed_version(),
        )
    )


def _public_address(host: str) -> str | None:
    """The address as nginx's `listen` takes it; None for a name, and for loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if address.is_loopback:
        return None
    return f"[{address}]" if address.version == 6 else str(address)

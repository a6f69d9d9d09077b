"""What an administrator may install so that a site's machine keeps it running: texts beside the kit, none of them signed, none overwritten."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from client.confinement import COURIER_USER
from shared.files import write_absent
from shared.kit import installed_version
from shared.units import compose_file, current_user, dockerfile, systemd_unit

UNITS, COURIER_USER_SCRIPT = "units", "courier-user.sh"  # folder in a kit, and a file in it

_SCRIPT = """\
#!/bin/sh
# One step, once, for this machine's administrator: a system user for the courier.
#
# Of a site's two processes the courier alone faces the network. Started by root, it becomes this user before its first packet, and so can read
# neither cohort nor ledger nor keys, whatever may be wrong with it. Where the kernel has Landlock (Linux 5.13 or newer), that confines it as well,
# and without root; this user is then a second wall.
#
# Afterwards start the site as root: sudo {command}
# The user needs to run Python: {python}
set -eu
getent passwd {user} > /dev/null || useradd --system --no-create-home --shell /usr/sbin/nologin {user}
getent passwd {user}
"""


def write_site_units(kit: Path, site: str) -> Path:
    """The folder of the texts beside the kit; those that are there already stay as they are.

    Raises:
        ConfigurationError: the kit's path is none that a unit could name.
        StorageError: they cannot be written.
    """
    folder, program = kit.resolve(), str(Path(sys.executable).parent / "wardround")
    name, command = f"wardround-site-{site}", (program, "site", "start", str(folder))
    description = f"Wardround site {site}"

    def unit(user: str | None) -> str:
        return systemd_unit(name=name, description=description, command=command, working_directory=str(folder), user=user)

    service = f"site-{re.sub('[^a-z0-9_-]', '-', site.lower())}"[:60]
    write_texts(
        kit / UNITS,
        {
            f"{name}.service": unit(current_user()),
            f"user/{name}.service": unit(None),
            "compose.yaml": compose_file(
                service=service, command=("site", "start"), kit=str(folder), ports=(), image=f"wardround:{installed_version()}"
            ),
            "Dockerfile": dockerfile(),
            COURIER_USER_SCRIPT: _SCRIPT.format(command=shlex.join(command), python=sys.executable, user=COURIER_USER),
        },
    )
    return kit / UNITS


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """These files stand in `folder`, or what stood there before; scripts can be run."""
    for name, text in texts.items():
        if write_absent(folder / name, text) and name.endswith(".sh"):
            (folder / name).chmod(0o755)

"""The Flower bundle (FAB) of every study: one file without code, whose components are installed modules at both sides.

A coordinator's SuperLink needs a bundle to start a ServerApp. No site ever runs one: the courier asks for its hash and refuses every run
whose bundle is not this.
"""

import functools
import hashlib
import warnings

from flwr.cli.build import build_fab_from_files

RUN = "run"  # the one key of its run configuration: the name of the run's folder

PYPROJECT = f"""
[project]
name = "wardround-study"
version = "1.0.0"
description = "One study of a federation; its code is installed at both sides and not in this bundle."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "wardround"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.courier:app"

[tool.flwr.app.config]
{RUN} = ""
"""


@functools.cache
def bundle() -> bytes:
    """The bundle's bytes; the same wherever they are built."""
    with warnings.catch_warnings():  # flwr's own use of another package
        warnings.simplefilter("ignore", DeprecationWarning)
        content, _ = build_fab_from_files({"pyproject.toml": PYPROJECT.encode()})
    return content


def bundle_hash() -> str:
    """SHA-256 (hex) of the bundle, as Flower names it."""
    return hashlib.sha256(bundle()).hexdigest()

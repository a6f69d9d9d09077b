"""Flower's telemetry and update check, and Ray's usage statistics, are off before either is imported."""

import contextlib
import logging
import os
from collections.abc import Iterator

SILENCED = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def switch_off_telemetry() -> None:
    """Set the switches for this process and its children."""
    os.environ.update(SILENCED)


@contextlib.contextmanager
def root_log_unchanged() -> Iterator[None]:
    """Undo what an import does to the root logger: importing opacus installs a handler and a level there."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def quiet_flower_log() -> None:
    """Only warnings of Flower reach the console."""
    logging.getLogger("flwr").setLevel(logging.WARNING)

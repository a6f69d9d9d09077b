"""Flower's telemetry and update check, and Ray's usage statistics, are off before either is imported."""

import logging
import os

SILENCED = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def switch_off_telemetry() -> None:
    """Set the switches for this process and its children."""
    os.environ.update(SILENCED)


def quiet_flower_log() -> None:
    """Only warnings of Flower reach the console."""
    logging.getLogger("flwr").setLevel(logging.WARNING)

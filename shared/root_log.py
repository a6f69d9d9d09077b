"""The root logger belongs to whoever runs us, not to what we import."""

import contextlib
import logging
from collections.abc import Iterator


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

"""A grid around another one: what every such grid leaves to the one within."""

from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run


class OuterGrid(Grid):
    """Carries messages over the grid within; how, its kinds say. Messages are sent and received together, never pushed and pulled."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def set_run(self, run: Run) -> None:
        """Of the grid within."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Of the grid within."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """Of the grid within."""
        return self._grid.get_node_ids()

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message as the current API makes it."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not offered: an answer is looked at beside its question, and has a deadline."""
        raise NotImplementedError("this grid sends and receives")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not offered, as `push_messages`."""
        raise NotImplementedError("this grid sends and receives")

"""The in-process engine: a Flower `Grid` that calls the unchanged ClientApp for each site, in this process, one after another.

This is the one file that touches private parts of flwr: `TaskIdentity`, from which `Message(...)` reads run, node and task id, and the
message's id, both of which Flower's own runtime would have set.
"""

import time
from collections.abc import Iterable, Iterator

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE_ID = 1
FIRST_SITE_NODE_ID = 2
TASK_ID = 1
CLIENT_APP_RAISED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class InProcessGrid(Grid):
    """Carries messages by calling `client_app`. Replies come one at a time, so a round's memory does not grow with the sites.

    Args:
        site_names: a node for each, in this order.
    """

    def __init__(self, client_app: ClientApp, site_names: Iterable[str]) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, TASK_ID
        self._client_app = client_app
        self._contexts = {
            node_id: Context(run_id=RUN_ID, node_id=node_id, node_config={"site": name}, state=RecordDict(), run_config={})
            for node_id, name in enumerate(site_names, start=FIRST_SITE_NODE_ID)
        }
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """There is one run; nothing to set."""

    @property
    def run(self) -> Run:
        """Not used in-process: what runs is the coordinator that holds this grid."""
        raise RuntimeError("the in-process grid has no Flower run")

    def get_node_ids(self) -> Iterable[int]:
        """A node a site."""
        return list(self._contexts)

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message as the current API makes it."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer each message now; the ids by which `pull_messages` gives the replies."""
        replies = list(self.send_and_receive(messages))
        self._replies.update({reply.metadata.reply_to_message_id: reply for reply in replies})
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The reply to each message, in order. After `timeout` seconds no further site is asked, and a reply that is late is dropped."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for message in messages:
            if deadline is not None and time.monotonic() >= deadline:
                return
            reply = self._answer(message)
            if deadline is None or time.monotonic() < deadline:
                yield reply

    def _post(self, message: Message) -> None:
        """Give the message its id, which its reply will name."""
        self._sent += 1
        message.metadata.__dict__["_message_id"] = f"message-{self._sent}"  # what a SuperLink would set; there is no public setter

    def _answer(self, message: Message) -> Message:
        self._post(message)
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception as error:  # as Flower's runtime does: an app that raises becomes an error reply
            return Message(Error(code=CLIENT_APP_RAISED, reason=type(error).__name__), reply_to=message)

"""What one site alone is told, in the tasks that all share: each such site has a text of its own, around the very same arrays."""

from collections.abc import Iterable, Mapping

from flwr.app import Message, RecordDict

from server.strategies.answers import config_of
from shared.messages import MESSAGE, EvaluateTask, NotCounted, TrainTask, decode, encode
from shared.secure_sum.messages import SecureTrainTask


def tell(messages: Iterable[Message], words: Mapping[int, NotCounted]) -> list[Message]:
    """These messages, in their order; that to a node with a word of its own is the same task with that word in it.

    Args:
        words: by node; what is of no node that is asked, nobody is told.
    """
    return [_told(message, words[node]) if (node := message.metadata.dst_node_id) in words else message for message in messages]


def _told(message: Message, word: NotCounted) -> Message:
    task = decode(message.content, TrainTask, EvaluateTask, SecureTrainTask)
    own: dict[str, object] = {"not_counted": word}
    if isinstance(task, SecureTrainTask):
        own = {"train": task.train.model_copy(update=own)}
    record = RecordDict({**message.content, MESSAGE: config_of(encode(task.model_copy(update=own)))})
    return Message(record, message.metadata.dst_node_id, message.metadata.message_type, group_id=message.metadata.group_id)

"""What a task makes of trained parameters without patients: the site's last step of a round, after its training and its noise."""

from client.local_training import torch_keyed
from shared.models import Parameters, check_parameters, get_parameters, set_parameters, template_of
from shared.task import Task


def refined(task: Task, trained: Parameters, *, key: bytes) -> Parameters:
    """What the task makes of trained parameters without patients; those themselves where it has nothing to make.

    A function of `trained`, task and key: the task is given a model of its own, which holds nothing that training left in another. So where
    `trained` is private, this is, by post-processing.

    Args:
        key: of what it draws, `(32,)` bytes.

    Raises:
        ProtocolError: what it made has other shapes, or is not finite.
    """
    if task.refine is None:
        return trained
    model = task.model()
    set_parameters(model, trained)
    with torch_keyed(key):
        task.refine(model)
    made = get_parameters(model)
    check_parameters(made, template_of(trained))
    return made

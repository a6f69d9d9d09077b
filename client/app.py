"""A site's answer to a message: decode, ask the site, encode. Whatever goes wrong at a site becomes a code and a fixed sentence.

The in-process engine calls it as a Flower ClientApp; a deployment's daemon calls `answer_record` behind its seal.
"""

import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.site import Site
from shared.errors import WardroundError, describe_exception
from shared.messages import MAX_REASON, Content, EnrolTask, EvaluateTask, Refused, TrainTask, decode, decode_control, decode_parameters, encode
from shared.secure_sum.messages import AdvertiseKeysTask, SecureTrainTask, ShareKeysTask, SignSurvivorsTask, UnmaskTask

logger = logging.getLogger(__name__)


def client_app(find_site: Callable[[Context], Site]) -> ClientApp:
    """The app of every site; `find_site` gives the site that a message's context is meant for."""
    app = ClientApp()

    def answered(*expected: type[Content]) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            site = find_site(context)
            try:
                content = answer_record(site, decode(message.content, *expected), message.content)
            except Exception as error:  # the border of the site: nothing of an exception may pass it but a code
                content = refusal(site.settings.name, error)
            return Message(content, reply_to=message)

        return answer

    app.query()(answered(EnrolTask, AdvertiseKeysTask, ShareKeysTask, SignSurvivorsTask, UnmaskTask))
    app.train()(answered(TrainTask, SecureTrainTask))
    app.evaluate()(answered(EvaluateTask))
    return app


def answer_record(site: Site, task: Content, record: RecordDict) -> RecordDict:
    """The site's answer to a decoded task, whose parameters ride in `record`.

    Raises:
        WardroundError: the refusal.
    """
    match task:
        case EnrolTask():
            return encode(site.enrol(task))
        case TrainTask():
            trained, update, statistics = site.train(task, decode_parameters(record, site.template), decode_control(record, site.control_template))
            return encode(trained, parameters=update, statistics=statistics)
        case SecureTrainTask():
            parameters, control = decode_parameters(record, site.template), decode_control(record, site.control_template)
            secured, payload, statistics = site.train_securely(task, parameters, control)
            return encode(secured, masked=payload, statistics=statistics)
        case AdvertiseKeysTask() | ShareKeysTask() | SignSurvivorsTask() | UnmaskTask():
            return encode(site.answer_sum(task))
        case EvaluateTask():
            evaluated, statistics = site.evaluate(task, decode_parameters(record, site.template))
            return encode(evaluated, statistics=statistics)
        case _:
            raise AssertionError("decoded to a task of no kind")


def refusal(name: str, error: Exception) -> RecordDict:
    """What the coordinator is told of an error; the rest goes to the site's own log."""
    told = error if isinstance(error, WardroundError) else type(error).__name__  # another's text may hold a patient's value
    logger.warning("site %s: %s", name, told, exc_info=logger.isEnabledFor(logging.DEBUG))
    code, reason = describe_exception(error)
    return encode(Refused(name=name, code=code, reason=reason[:MAX_REASON]))

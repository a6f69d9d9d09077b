"""The Flower ClientApp: decode, ask the site, encode. Whatever goes wrong at a site becomes a code and a fixed sentence."""

import logging
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.site import Site
from shared.errors import WardroundError, describe_exception
from shared.messages import EnrolTask, EvaluateTask, Refused, TrainTask, decode, decode_parameters, encode

logger = logging.getLogger(__name__)


def client_app(find_site: Callable[[Context], Site]) -> ClientApp:
    """The app of every site; `find_site` gives the site that a message's context is meant for."""
    app = ClientApp()

    def answered(handle: Callable[[Site, RecordDict], RecordDict]) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            site = find_site(context)
            try:
                content = handle(site, message.content)
            except Exception as error:  # the border of the site: nothing of an exception may pass it but a code
                told = error if isinstance(error, WardroundError) else type(error).__name__  # another's text may hold a patient's value
                logger.warning("site %s: %s", site.settings.name, told, exc_info=logger.isEnabledFor(logging.DEBUG))
                code, reason = describe_exception(error)
                content = encode(Refused(name=site.settings.name, code=code, reason=reason))
            return Message(content, reply_to=message)

        return answer

    app.query()(answered(_enrol))
    app.train()(answered(_train))
    app.evaluate()(answered(_evaluate))
    return app


def _enrol(site: Site, record: RecordDict) -> RecordDict:
    return encode(site.enrol(decode(record, EnrolTask)))


def _train(site: Site, record: RecordDict) -> RecordDict:
    task = decode(record, TrainTask)
    reply, update, statistics = site.train(task, decode_parameters(record, site.template))
    return encode(reply, parameters=update, statistics=statistics)


def _evaluate(site: Site, record: RecordDict) -> RecordDict:
    task = decode(record, EvaluateTask)
    reply, statistics = site.evaluate(task, decode_parameters(record, site.template))
    return encode(reply, statistics=statistics)

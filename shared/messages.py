"""Every message between coordinator and site, and how it rides in Flower's records.

A message is a pydantic model (JSON in one ConfigRecord field) and up to two groups of named arrays. What does not decode to exactly the
declared keys, shapes, dtypes and finite values is a `ProtocolError`; nothing else of Flower's types passes further in.
"""

from typing import Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import ProtocolError
from shared.models import Parameters, Template, check_parameters
from shared.results import SitePrivacy

MESSAGE = "message"
JSON = "json"
PARAMETERS = "parameters"
STATISTICS = "statistics"
MAX_JSON_BYTES = 1_000_000

Statistics = dict[str, NDArray[np.float64]]


class Content(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EnrolTask(Content):
    """Will you take part in this study? `study` is its resolved table; `task_fingerprint` must equal the site's own."""

    kind: Literal["enrol"] = "enrol"
    run: str
    study: dict[str, object]
    task_fingerprint: str


class Enrolled(Content):
    """A site's plan: all the coordinator ever learns about its size. Exact counts only where the policy calls them public."""

    kind: Literal["enrolled"] = "enrolled"
    name: str
    declared_size: int
    declared_num_patients: int
    declared_num_test: int


class TrainTask(Content):
    """Evaluate the parameters that come along, then train on them. Both go back in one reply."""

    kind: Literal["train"] = "train"
    run: str
    study_hash: str
    round: int
    fold: int


class EvaluateTask(Content):
    """Evaluate the parameters that come along; the closing message of a fold."""

    kind: Literal["evaluate"] = "evaluate"
    run: str
    study_hash: str
    round: int
    fold: int


class Trained(Content):
    """A site's update rides as `parameters`, its statistics of the received model as `statistics` (absent: not released)."""

    kind: Literal["trained"] = "trained"
    name: str
    round: int
    fold: int
    privacy: SitePrivacy | None


class Evaluated(Content):
    """The statistics of the model that came, as `statistics`; what the study has cost so far, with the cross-check."""

    kind: Literal["evaluated"] = "evaluated"
    name: str
    round: int
    fold: int
    privacy: SitePrivacy | None


class Refused(Content):
    """No, and why: a stable code and one fixed sentence. An ordinary reply; never an exception's own text."""

    kind: Literal["refused"] = "refused"
    name: str
    code: str
    reason: str


ContentT = TypeVar("ContentT", bound=Content)


def encode(content: Content, *, parameters: Parameters | None = None, statistics: Statistics | None = None) -> RecordDict:
    """Flower records of a message."""
    record = RecordDict({MESSAGE: ConfigRecord({JSON: content.model_dump_json()})})
    if parameters is not None:
        record[PARAMETERS] = ArrayRecord({name: Array(value) for name, value in parameters.items()})
    if statistics is not None:
        record[STATISTICS] = ArrayRecord({name: Array(value) for name, value in statistics.items()})
    return record


def decode(record: RecordDict, *expected: type[ContentT]) -> ContentT:
    """The message in these records, one of the `expected` kinds.

    Raises:
        ProtocolError: it is another kind, too long, or not of the declared form.
    """
    unknown = set(record) - {MESSAGE, PARAMETERS, STATISTICS}
    fields = record.get(MESSAGE)
    text = fields.get(JSON) if isinstance(fields, ConfigRecord) else None
    if unknown or not isinstance(fields, ConfigRecord) or set(fields) != {JSON} or not isinstance(text, str):
        raise ProtocolError("expected the records message, parameters and statistics with one JSON text, got others")
    if len(text) > MAX_JSON_BYTES:
        raise ProtocolError(f"expected a message of at most {MAX_JSON_BYTES} characters, got {len(text)}")
    for kind in expected:
        if f'"kind":"{kind.model_fields["kind"].default}"' in text[:200]:
            try:
                return kind.model_validate_json(text)
            except ValidationError as error:
                keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors()[:3])
                raise ProtocolError(f"{kind.__name__}: expected its declared keys and types, got other at {keys}") from None
    raise ProtocolError(f"expected {' or '.join(kind.__name__ for kind in expected)}, got another message")


def decode_parameters(record: RecordDict, template: Template) -> Parameters:
    """The named arrays that ride as `parameters`, checked against `template`.

    Raises:
        ProtocolError: names, shapes, dtypes differ, a value is not finite, or bytes do not decode.
    """
    arrays = _arrays(record, PARAMETERS)
    check_parameters(arrays, template)
    return arrays


def decode_statistics(record: RecordDict, shapes: dict[str, tuple[int, ...]]) -> Statistics | None:
    """The statistics of a reply, each finite, non-negative where it counts, of its declared shape; None where none came.

    Raises:
        ProtocolError: an undeclared name, another shape or dtype, or a value that is not finite.
    """
    if STATISTICS not in record:
        return None
    arrays = _arrays(record, STATISTICS)
    undeclared = set(arrays) - set(shapes)
    if undeclared:
        raise ProtocolError("statistics: expected declared names only, got others")
    template: Template = {name: (shapes[name], "float64") for name in arrays}
    check_parameters(arrays, template)
    return {name: value.astype(np.float64) for name, value in arrays.items()}


def _arrays(record: RecordDict, key: str) -> Parameters:
    group = record.get(key)
    if not isinstance(group, ArrayRecord):
        raise ProtocolError(f"expected arrays under {key!r}, got none")
    try:
        return {name: array.numpy() for name, array in group.items()}
    except (ValueError, TypeError, EOFError) as error:
        raise ProtocolError(f"{key}: expected NumPy arrays without pickled objects, got other bytes") from error

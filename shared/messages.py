"""Every message between coordinator and site, and how it rides in Flower's records.

A message is a pydantic model (JSON in one ConfigRecord field) and up to four groups of named arrays. What does not decode to exactly the
declared keys, shapes, dtypes and finite values is a `ProtocolError`; nothing else of Flower's types passes further in.
"""

import functools
import io
import math
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import ProtocolError
from shared.models import Parameters, Template, check_parameters
from shared.results import SitePrivacy

MESSAGE = "message"
JSON = "json"
PARAMETERS = "parameters"
STATISTICS = "statistics"
CONTROL = "control"
MASKED = "masked"
GROUPS = (PARAMETERS, STATISTICS, CONTROL, MASKED)  # of named arrays
MAX_LOSS = 1e9
MAX_JSON_BYTES = 1_000_000
MAX_NAME = 200  # characters of the name of a site, run or study
MAX_NUMBER = 2**31  # of a round or fold
MAX_REASON = 300  # characters of a refusal
NPY = "numpy.ndarray"  # Flower's name for data in .npy format
BYTES = "bytes"  # of an array that is bytes as they are
NPY_PREFIX = 10  # magic, version and header length, in bytes

Statistics = dict[str, NDArray[np.float64]]
Name = Annotated[str, Field(max_length=MAX_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Number = Annotated[int, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]  # which rounds a study has, the site knows


class Content(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class WitnessedHead(Content):
    """The last row of a site's ledger that the coordinator saw, as a hash, and its Ed25519 signature on `head_statement` (both hex)."""

    head: str = Field(pattern=r"^[0-9a-f]{64}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


def head_statement(site: str, head: str) -> bytes:
    """What a coordinator signs."""
    return f"wardround: the ledger of {site} was seen to end in {head}".encode()


class EnrolTask(Content):
    """Will you take part in this study? `study` is its resolved table; `task_fingerprint` must equal the site's own.

    `heads` are by site, here and in the tasks that follow; a site does nothing with a ledger that lacks its own.
    """

    kind: Literal["enrol"] = "enrol"
    run: Name
    study: dict[str, object]
    task_fingerprint: str
    coordinator_key: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    heads: dict[str, WitnessedHead] = {}
    version: Name | None = Field(default=None, description="of wardround at the coordinator, in a deployment")


class Enrolled(Content):
    """A site's plan: all the coordinator ever learns about its size. Exact counts only where the policy calls them public."""

    kind: Literal["enrolled"] = "enrolled"
    name: str = Field(min_length=1, max_length=MAX_NAME)
    declared_size: int = Field(le=MAX_NUMBER)
    declared_num_patients: int = Field(le=MAX_NUMBER)
    declared_num_test: int = Field(le=MAX_NUMBER)
    ledger_head: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e6, description="of its plan, where noise is distributed")
    sum_key: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="its Ed25519 key, where the study aggregates securely")


class NotCounted(Content):
    """The last update of a site that did not count, and the coordinator's reason: a code and one line."""

    fold: Number
    round: Number
    reason: str = Field(max_length=MAX_REASON)


class TrainTask(Content):
    """Evaluate the parameters that come along, then train on them. Both go back in one reply. A strategy may send something beside the
    parameters, as `control`.

    `not_counted` is of the site that is asked, here and in the task that follows: a hospital learns of no other's.
    """

    kind: Literal["train"] = "train"
    run: Name
    study_hash: Name
    round: Number
    fold: Number
    heads: dict[str, WitnessedHead] = {}
    not_counted: NotCounted | None = None


class EvaluateTask(Content):
    """Evaluate the parameters that come along; the closing message of a fold."""

    kind: Literal["evaluate"] = "evaluate"
    run: Name
    study_hash: Name
    round: Number
    fold: Number
    heads: dict[str, WitnessedHead] = {}
    not_counted: NotCounted | None = None


class StopTask(Content):
    """Stop whatever is under way for this run; what was charged stays charged, and the run may be resumed."""

    kind: Literal["stop"] = "stop"
    run: Name
    study_hash: Name


class Stopped(Content):
    """Nothing of that run is under way here."""

    kind: Literal["stopped"] = "stopped"
    name: str = Field(min_length=1, max_length=MAX_NAME)


class Trained(Content):
    """A site's update rides as `parameters`, its statistics of the received model as `statistics`; `withheld` names the rule that kept some.

    It says whose answer it is, and to which task of which run and study: another counts for nothing.

    `loss` is that of the received model on the training patients, where the study's strategy asks for it (noised and charged under privacy).
    """

    kind: Literal["trained"] = "trained"
    name: str
    run: Name | None = None
    study_hash: Name | None = None
    round: int
    fold: int
    withheld: str | None = Field(default=None, max_length=300)
    privacy: SitePrivacy | None
    ledger_head: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    loss: float | None = Field(default=None, ge=0, le=MAX_LOSS)


class Evaluated(Content):
    """The statistics of the model that came, as `statistics`; what the study has cost so far, with the cross-check."""

    kind: Literal["evaluated"] = "evaluated"
    name: str
    run: Name | None = None
    study_hash: Name | None = None
    round: int
    fold: int
    withheld: str | None = Field(default=None, max_length=300)
    privacy: SitePrivacy | None
    ledger_head: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class Refused(Content):
    """No, and why: a stable code and one fixed sentence. An ordinary reply; never an exception's own text."""

    kind: Literal["refused"] = "refused"
    name: str = Field(min_length=1, max_length=MAX_NAME)
    code: str = Field(pattern=r"^E\d{3}$")
    reason: str = Field(max_length=MAX_REASON)


ContentT = TypeVar("ContentT", bound=Content)


def plain_text(told: str) -> str:
    """The other side's own words as one line without control characters: they are shown on terminals, which such characters command."""
    return "".join(character if character.isprintable() else " " for character in told)


def encode(
    content: Content, *, parameters: Parameters | ArrayRecord | None = None, statistics: Statistics | None = None,
    masked: NDArray[np.uint8] | None = None,
) -> RecordDict:  # fmt: skip
    """Flower records of a message; parameters that are a record already are not copied."""
    record = RecordDict({MESSAGE: ConfigRecord({JSON: content.model_dump_json()})})
    if parameters is not None:
        record[PARAMETERS] = parameters if isinstance(parameters, ArrayRecord) else to_array_record(parameters)
    if statistics is not None:
        record[STATISTICS] = to_array_record(statistics)
    if masked is not None:
        record[MASKED] = ArrayRecord({MASKED: Array(dtype="uint8", shape=masked.shape, stype=BYTES, data=masked.tobytes())})
    return record


def decode(record: RecordDict, *expected: type[ContentT]) -> ContentT:
    """The message in these records, one of the `expected` kinds.

    Raises:
        ProtocolError: it is another kind, too long, or not of the declared form.
    """
    unknown = set(record) - {MESSAGE, *GROUPS}
    fields = record.get(MESSAGE)
    text = fields.get(JSON) if isinstance(fields, ConfigRecord) else None
    if unknown or not isinstance(fields, ConfigRecord) or set(fields) != {JSON} or not isinstance(text, str):
        raise ProtocolError("expected the records message, parameters, statistics, control and masked with one JSON text, got others")
    if len(text) > MAX_JSON_BYTES:
        raise ProtocolError(f"expected a message of at most {MAX_JSON_BYTES} characters, got {len(text)}")
    for kind in expected:
        if text.startswith(f'{{"kind":"{kind.model_fields["kind"].default}"'):
            try:
                return kind.model_validate_json(text)
            except ValidationError as error:
                keys = ", ".join(_declared_key(kind, detail["loc"]) for detail in error.errors()[:3])
                raise ProtocolError(f"{kind.__name__}: expected its declared keys and types, got other at {keys}") from None
    raise ProtocolError(f"expected {' or '.join(kind.__name__ for kind in expected)}, got another message")


def _declared_key(kind: type[Content], location: tuple[int | str, ...]) -> str:
    """The field that an error is about; a key that is not declared may say anything, and is not repeated."""
    return str(location[0]) if location and location[0] in kind.model_fields else "an undeclared key"


def decode_parameters(record: RecordDict, template: Template) -> Parameters:
    """The named arrays that ride as `parameters`, checked against `template`.

    Raises:
        ProtocolError: names, shapes, dtypes differ, a value is not finite, or bytes do not decode.
    """
    arrays = _arrays(record, PARAMETERS)
    check_parameters(arrays, template)
    return arrays


def decode_control(record: RecordDict, template: Template) -> Parameters:
    """What a strategy sends the sites beside the parameters; empty where nothing came.

    Raises:
        ProtocolError: it is not of the template; an empty template takes nothing.
    """
    if CONTROL not in record:
        return {}
    arrays = _arrays(record, CONTROL)
    check_parameters(arrays, template)
    return arrays


def decode_masked(record: RecordDict) -> NDArray[np.uint8]:
    """The masked update that rides as `masked`, `(length,)`.

    Raises:
        ProtocolError: there is none, or other bytes than it declares.
    """
    group = record.get(MASKED)
    array = group.get(MASKED) if isinstance(group, ArrayRecord) and len(group) == 1 else None
    if array is None or array.stype != BYTES or array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise ProtocolError("expected a masked update in plain bytes, got none")
    return np.frombuffer(array.data, dtype=np.uint8)


def decode_statistics(record: RecordDict, shapes: dict[str, tuple[int, ...]], *, signed: bool) -> Statistics | None:
    """The statistics of a reply, each finite and of its declared shape; None where none came.

    Args:
        signed: True where they carry noise, and so may be negative; exact ones are sums of what is not.

    Raises:
        ProtocolError: an undeclared name, another shape or dtype, or a value that is not finite, or negative where it may not be.
    """
    if STATISTICS not in record:
        return None
    arrays = _arrays(record, STATISTICS)
    undeclared = set(arrays) - set(shapes)
    if undeclared:
        raise ProtocolError("statistics: expected declared names only, got others")
    template: Template = {name: (shapes[name], "float64") for name in arrays}
    check_parameters(arrays, template)
    if not signed and any((value < 0).any() for value in arrays.values()):
        raise ProtocolError("statistics: expected sums that are not negative, got negative ones")
    return {name: value.astype(np.float64) for name, value in arrays.items()}


def _arrays(record: RecordDict, key: str) -> Parameters:
    group = record.get(key)
    if not isinstance(group, ArrayRecord):
        raise ProtocolError(f"expected arrays under {key!r}, got none")
    return from_array_record(group)


def to_array_record(arrays: Mapping[str, NDArray[np.floating]]) -> ArrayRecord:
    """Flower's record of these arrays, each in NumPy's .npy format."""
    return ArrayRecord({name: _to_array(value) for name, value in arrays.items()})


def from_array_record(record: ArrayRecord) -> Parameters:
    """The arrays of a record, read-only.

    Raises:
        ProtocolError: an array is not plain .npy of its declared length (pickled objects are never read).
    """
    return {name: _from_array(array) for name, array in record.items()}


def _to_array(value: NDArray[np.floating]) -> Array:
    contiguous = np.ascontiguousarray(value)
    header = _npy_header(contiguous.dtype.str, value.shape)
    return Array(dtype=str(contiguous.dtype), shape=value.shape, stype=NPY, data=header + contiguous.tobytes())


def _from_array(array: Array) -> NDArray[np.floating]:
    data = array.data
    length = NPY_PREFIX + int.from_bytes(data[NPY_PREFIX - 2 : NPY_PREFIX], "little")
    try:
        dtype, shape = _npy_layout(data[:length])
        if array.stype != NPY or len(data) != length + dtype.itemsize * math.prod(shape):
            raise ValueError("wrong length")
        return np.frombuffer(data, dtype=dtype, offset=length).reshape(shape)
    except Exception as error:  # foreign bytes: NumPy's header parser raises whatever its tokenizer does
        raise ProtocolError("tensor: expected a NumPy array without pickled objects, got other bytes") from error


@functools.lru_cache(maxsize=4096)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The .npy header (version 1.0) of an array in C order; NumPy's own writer, asked once a shape: a round has the same few shapes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@functools.lru_cache(maxsize=4096)
def _npy_layout(header: bytes) -> tuple[np.dtype[np.floating], tuple[int, ...]]:
    """Dtype and shape in a .npy header (version 1.0, C order, floating point); NumPy's own reader, asked once a header."""
    buffer = io.BytesIO(header)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("another version")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    if fortran_order or not np.issubdtype(dtype, np.floating) or any(size < 0 for size in shape):
        raise ValueError("not a plain floating-point array")
    return dtype, shape

"""Bad sites, planted: what an honest site answers is spoiled on its way, as a study's [faults] say, for the coordinator to judge.

The site is the real one: it trains, charges its ledger and answers as agreed. What carries its messages is wrapped, whatever the engine, so the
other sites are trained as ever, in blocks too. Enrolment, but for a false claim of size, and the closing evaluation come through as they are:
what a bad site has spent stays known, and its patients judge the final model like all others.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from server.blocks import Block, BlockGrid
from shared.errors import ConfigurationError
from shared.messages import MESSAGE, PARAMETERS, Content, Enrolled, Refused, Trained, TrainTask, decode, encode, from_array_record, to_array_record
from shared.models import Parameters
from shared.seeding import generator
from shared.study import Faults, Study
from simulations.in_process import FIRST_SITE_NODE_ID
from simulations.outer_grid import OuterGrid

MILLION, BILLION = 1e6, 1_000_000_000
ANOTHER_STUDY = "0" * 64


def faulty_sites(study: Study, names: Sequence[str]) -> frozenset[str]:
    """Which of the sites have the study's faults: those that it names, or as many as it says, drawn by its seed; with more, the same and others.

    Raises:
        ConfigurationError: there is no such site, or there are not so many.
    """
    if study.faults is None:
        return frozenset()
    asked = study.faults.sites
    if isinstance(asked, int):
        if asked > len(names):
            raise ConfigurationError(f"faults.sites: expected at most the number of sites, {len(names)}, got {asked}", "plant fewer")
        return frozenset(generator(study.seed, "faults", "sites").permutation(np.array(sorted(names)))[:asked].tolist())
    unknown = sorted(set(asked) - set(names))
    if unknown:
        shown = ", ".join(sorted(names)[:10]) + (" ..." if len(names) > 10 else "")
        raise ConfigurationError(f"faults.sites: expected some of {shown}, got {', '.join(unknown)}", "correct the names, or give their number")
    return frozenset(asked)


def check_faults(study: Study, names: Sequence[str]) -> None:
    """Raise `ConfigurationError` where the study's faults could not come to pass at these sites."""
    faulty_sites(study, names)
    if study.faults is not None and study.faults.from_round > study.rounds.count:
        raise ConfigurationError(
            f"faults.from_round: expected at most rounds.count, {study.rounds.count}, got {study.faults.from_round}", "lower it, or remove [faults]"
        )


def with_faults(grid: Grid, study: Study, names: Sequence[str]) -> Grid:
    """The grid, whose nodes are these sites in this order, with the study's faults; the grid itself where it has none."""
    if study.faults is None:
        return grid
    return FaultyGrid(grid, dict.fromkeys(sorted(faulty_sites(study, names)), study.faults), names, seed=study.seed)


class FaultyGrid(OuterGrid):
    """Carries messages as the grid in it does, and spoils what comes back from some sites.

    Args:
        faults: by site.
        names: the sites, in the order of the nodes.
        seed: draws the rounds with a fault, where not all have one.
    """

    def __init__(self, grid: Grid, faults: Mapping[str, Faults], names: Sequence[str], *, seed: int) -> None:
        super().__init__(grid)
        self._faults = dict(faults)
        self._names = dict(enumerate(names, start=FIRST_SITE_NODE_ID))
        self._seed = seed

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies to these messages, one by one, those of bad sites last."""
        deadline = None if timeout is None else time.monotonic() + timeout
        bad = []
        for message in messages:
            fault = self._fault_of(message)
            if fault is None:
                yield from self._grid.send_and_receive([message], timeout=_left(deadline))
            else:
                bad.append((message, fault))
        for message, fault in bad:
            yield from self._spoiled(message, fault, _left(deadline))

    def send_in_blocks(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message | Block]:
        """As `send_and_receive`, with blocks among the replies of honest sites where the grid within gives some."""
        deadline = None if timeout is None else time.monotonic() + timeout
        faults = [(message, self._fault_of(message)) for message in messages]
        ask = self._grid.send_in_blocks if isinstance(self._grid, BlockGrid) else self._grid.send_and_receive
        yield from ask([message for message, fault in faults if fault is None], timeout=timeout)
        for message, fault in faults:
            if fault is not None:
                yield from self._spoiled(message, fault, _left(deadline))

    def _fault_of(self, message: Message) -> Faults | None:
        """What is wrong with the answer to this message; None where nothing is."""
        name = self._names[message.metadata.dst_node_id]
        fault, asked = self._faults.get(name), message.metadata.message_type
        if fault is None or asked != (MessageType.QUERY if fault.kind == "claimed-size" else MessageType.TRAIN):
            return None
        if fault.kind == "claimed-size":
            return fault
        task = decode(message.content, TrainTask)
        drawn = fault.share == 1.0 or generator(self._seed, "faults", name, task.fold, task.round).random() < fault.share
        return fault if task.round >= fault.from_round and drawn else None

    def _spoiled(self, message: Message, fault: Faults, timeout: float | None) -> Iterator[Message]:
        """What comes in the place of the site's answer. Who is late has worked, and been charged, in vain; who is silent has not been reached."""
        if fault.kind == "silent" or (timeout is not None and timeout <= 0):
            return
        for reply in self._grid.send_and_receive([message], timeout=timeout):
            honest = reply.has_error() or isinstance(decode(reply.content, Enrolled, Trained, Refused), Refused)  # nothing to spoil
            if honest or fault.kind == "duplicate":
                yield reply
            if not honest and fault.kind != "late":
                yield reply if fault.kind == "duplicate" else Message(_spoiled_record(reply.content, fault), reply_to=message)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()


def _spoiled_record(record: RecordDict, fault: Faults) -> RecordDict:
    content: Content = decode(record, Enrolled, Trained)
    match fault.kind:
        case "empty":
            return RecordDict()
        case "claimed-size":
            return encode(content.model_copy(update={"declared_size": BILLION if fault.claimed_size is None else fault.claimed_size}))
        case "other-round":
            assert isinstance(content, Trained)
            return RecordDict({**record, MESSAGE: encode(content.model_copy(update={"round": content.round - 1}))[MESSAGE]})
        case "other-study":
            return RecordDict({**record, MESSAGE: encode(content.model_copy(update={"study_hash": ANOTHER_STUDY}))[MESSAGE]})
        case _:
            update = from_array_record(record.array_records[PARAMETERS])
            return RecordDict({**record, PARAMETERS: to_array_record(spoiled_update(update, fault))})


def spoiled_update(update: Parameters, fault: Faults) -> Parameters:
    """What the fault makes of an update; one that is of the answer's form makes nothing of it."""
    first = next(iter(update))
    match fault.kind:
        case "nan" | "inf":
            return {name: np.full_like(value, float(fault.kind)) for name, value in update.items()}
        case "scaled":
            return scaled(update, MILLION if fault.factor is None else fault.factor)
        case "sign-flipped":
            return scaled(update, -1.0)
        case "wrong-shape":
            return {**update, first: np.stack([update[first], update[first]])}
        case "wrong-dtype":
            return {name: value.astype(np.float32 if value.dtype == np.float64 else np.float64) for name, value in update.items()}
        case "missing-tensor":
            return {name: value for name, value in update.items() if name != first}
        case "extra-tensor":
            return {**update, "extra": np.zeros(1, np.float32)}
        case _:
            return update


def scaled(update: Parameters, factor: float) -> Parameters:
    """Every entry times `factor`, in its own type."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, and refused as such
        return {name: np.asarray(value * factor, dtype=value.dtype) for name, value in update.items()}

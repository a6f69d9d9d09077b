"""How many answers are enough: for a study to begin, for a round to count, for a strategy's own promise; and the error where they are not."""

from collections.abc import Mapping

from server.strategies.answers import Answer
from shared.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    DataError,
    DeadlineMissedError,
    NotApprovedError,
    PolicyRefusedError,
    QuorumLostError,
    SiteFileError,
    StorageError,
    WardroundError,
    fixed_sentence,
)
from shared.strategy_options import FedBuff
from shared.study import Study

LATE = fixed_sentence(DeadlineMissedError)
MENDABLE = (
    "E101",
    "E103",
    "E104",
    SiteFileError.code,
    "E5",
    NotApprovedError.code,
    "E8",
    "E4",
)  # refusals that a hospital may mend while the study waits
MEND = "mend the named sites and resume the run, or ask fewer with [rounds] require"
COMMON_ERRORS: tuple[tuple[type[WardroundError], str, str], ...] = (
    (BudgetExhaustedError, "E7", "ask for less (epsilon, rounds), or let the hospitals raise their limits"),
    (NotApprovedError, NotApprovedError.code, "each hospital decides with 'wardround site approve'; then resume the study"),
    (PolicyRefusedError, "E6", "change the study to what the sites' policies allow"),
    (DataError, "E5", "the sites' own logs say what their data lack"),
    (ConfigurationError, "E3", "correct the study, or install the same version at both sides"),
    (StorageError, "E103", "free space, then resume the run"),
    (QuorumLostError, "E102", "if the updates grew without bound, lower training.learning_rate and start a new run"),
)


def is_final(reason: str) -> bool:
    """Whether a refusal stands however often the site is asked: of policy, budget or protocol."""
    return not reason.startswith(MENDABLE)


def hold_quorum(study: Study, num_usable: int, reasons: Mapping[str, str], *, what: str) -> None:
    """Return where the round counts.

    Raises:
        the error of the sites' own refusals where all refused alike (budget, policy, data), else QuorumLostError; it names them.
    """
    rounds = study.rounds
    complete = not reasons
    needed = 1 if rounds.require == "all" else rounds.require
    if num_usable >= needed and (complete or rounds.on_missing == "proceed" or rounds.require != "all"):
        return
    told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items())) or "no site answered"
    expected = "all sites" if rounds.require == "all" else plural_sites(needed)
    kind, remedy = common_error(reasons, num_usable)
    raise kind(f"{what}: expected usable answers of {expected}, got {num_usable}: {told}", remedy)


def hold_rule(study: Study, num_usable: int, *, what: str) -> None:
    """Return where the strategy's own promise holds with so many updates."""
    strategy = study.strategy
    if isinstance(strategy, FedBuff) and study.rounds.require != "all":
        return  # the study itself says how much of a buffer is enough
    if num_usable < strategy.least_updates:
        raise QuorumLostError(
            f"{what}: strategy {strategy.name} needs at least {strategy.least_updates} usable updates, got {num_usable}",
            "ask more sites, or let the strategy need fewer (tolerated, buffer_size)",
        )


def common_error(reasons: Mapping[str, str], num_usable: int) -> tuple[type[WardroundError], str]:
    """The error of the sites' own reasons and its remedy where no site can go on and all say alike, else `QuorumLostError`."""
    for kind, prefix, remedy in COMMON_ERRORS:
        if num_usable == 0 and reasons and all(reason.startswith(prefix) for reason in reasons.values()):
            return kind, remedy
    return QuorumLostError, MEND


def plural_sites(number: int) -> str:
    """So many sites, in words."""
    return "1 site" if number == 1 else f"{number} sites"


def reasons_of(answers: Mapping[str, Answer]) -> dict[str, str]:
    """Why answers do not count, by site."""
    return {name: answer.reason or answer.status for name, answer in answers.items() if answer.status != "ok"}

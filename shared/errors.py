"""One small hierarchy of errors. The first digit of a code is the process's exit code; codes are stable.

A message says what was expected, what came and where; the remedy says what to do. Neither ever holds a patient's value.
"""

INTERRUPTED_EXIT_CODE = 130


class WardroundError(Exception):
    """Something from outside went wrong; `what` tells what, `remedy` what to do about it, `rule` the key that decided, which alone may be told outside."""

    code = "E100"

    def __init__(self, what: str, remedy: str = "", *, rule: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.rule = rule

    @property
    def exit_code(self) -> int:
        """Exit code of the command line, 1 to 8."""
        return int(self.code[1])

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class SiteFailedError(WardroundError):
    """A site's own code failed; details stay in the site's log."""

    code = "E101"


class ProtocolError(WardroundError):
    """A message does not have the declared names, shapes, dtypes or finite values."""

    code = "E102"


class StorageError(WardroundError):
    """A file of ours could not be written or read (permissions, disk full, damaged)."""

    code = "E103"


class LedgerError(WardroundError):
    """A ledger is damaged, was lost or put back, or belongs to another site or cohort."""

    code = "E104"


class ClaimError(WardroundError):
    """A number about privacy says less than was charged."""

    code = "E105"


class SealError(WardroundError):
    """A message is not signed by who it should be, or is not the answer to what was asked."""

    code = "E107"


class BundleError(WardroundError):
    """A Flower run's bundle is not the one that this installation builds."""

    code = "E108"


class AuditError(WardroundError):
    """An audit log does not verify."""

    code = "E106"


class ConfinementError(WardroundError):
    """A process could not give up its power over the rest of the machine."""

    code = "E109"


class AlreadyRunningError(WardroundError):
    """Another process of ours already works in this folder."""

    code = "E110"


class StudyStoppedError(WardroundError):
    """Somebody stopped the study."""

    code = "E111"


class SiteFileError(WardroundError):
    """The site's own site.toml does not fit; its hospital must correct it."""

    code = "E112"


class WorkerFailedError(WardroundError):
    """A worker process of a simulation ended, or failed."""

    code = "E113"


class UsageError(WardroundError):
    """The command line was used wrongly."""

    code = "E200"


class ConfigurationError(WardroundError):
    """A study, site or task file says something that cannot be."""

    code = "E300"


class UnknownTaskError(ConfigurationError):
    """No task of that name."""

    code = "E301"


class ModelRefusedError(ConfigurationError):
    """The model cannot be trained with the privacy asked for."""

    code = "E302"


class PartitionError(ConfigurationError):
    """The patients cannot be divided among the sites as asked."""

    code = "E303"


class ModelMismatchError(ConfigurationError):
    """A saved model or checkpoint belongs to another study, task or architecture."""

    code = "E304"


class VersionMismatchError(ConfigurationError):
    """Coordinator and site run different versions of wardround."""

    code = "E305"


class ConnectionFailedError(WardroundError):
    """A host could not be reached, or TLS failed."""

    code = "E400"


class KitError(WardroundError):
    """A kit is damaged, altered, expired, or of another federation."""

    code = "E402"


class NodeRefusedError(ConnectionFailedError):
    """The coordinator does not let this node in."""

    code = "E401"


class DoorClosedError(ConnectionFailedError):
    """The site's daemon does not answer at its socket."""

    code = "E403"


class DataError(WardroundError):
    """Data are missing, unreadable, or not what the task's schema declares."""

    code = "E500"


class DataMissingError(DataError):
    """No data where data were expected."""

    code = "E501"


class DataAccessError(DataError):
    """Data are there, but may not be read: a permission, not bad data."""

    code = "E502"


class SchemaError(DataError):
    """Data were read but do not fit the schema."""

    code = "E503"


class PolicyRefusedError(WardroundError):
    """The site's policy does not allow what the study asks."""

    code = "E600"


class NotApprovedError(PolicyRefusedError):
    """The hospital has not approved this study."""

    code = "E601"


class BudgetExhaustedError(WardroundError):
    """The ledger has no room left for what was asked."""

    code = "E700"


class QuorumLostError(WardroundError):
    """Too few sites gave a usable answer in time."""

    code = "E800"


class DeadlineMissedError(QuorumLostError):
    """A site's answer did not come before the deadline."""

    code = "E801"


class StaleWorkError(QuorumLostError):
    """Work was stopped because its deadline passed, a newer round came, or the study was stopped."""

    code = "E802"


class BoundToSumError(QuorumLostError):
    """A secure sum of this round was signed for other sites; the site is in no second one."""

    code = "E803"


def fixed_sentence(kind: type[WardroundError]) -> str:
    """The code and the one sentence by which an error of this kind is told to others."""
    return f"{kind.code} {(kind.__doc__ or '').strip().splitlines()[0]}"


def is_fixed_sentence(text: str) -> bool:
    """True where `text` is exactly such a sentence, and so holds nothing of anybody's."""
    return text in {fixed_sentence(kind) for kind in _kinds(WardroundError)}


def _kinds(kind: type[WardroundError]) -> list[type[WardroundError]]:
    return [kind, *(found for below in kind.__subclasses__() for found in _kinds(below))]


def describe_exception(error: BaseException) -> tuple[str, str]:
    """The code and a fixed sentence for `error` that is safe to send outward, with the name of the rule: never the exception's own text."""
    if isinstance(error, WardroundError):
        summary = (type(error).__doc__ or "").strip().split("\n")[0]
        return error.code, f"{summary} Rule: {error.rule}." if error.rule else summary
    return SiteFailedError.code, "The site's own code failed; its log says why."

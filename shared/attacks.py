"""attacks.json in a run's folder: what was measured by attacking a study, beside what it promises."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from shared.errors import StorageError
from shared.files import json_text, write_atomic
from shared.results import SCHEMA_VERSION, Record

FILE = "attacks.json"


class CanaryAudit(Record):
    """A one-run audit: canaries that were in or out of training by a coin, guessed from the updates that a curious server sees.

    `epsilon_lower` (Steinke, Nasr, Jagielski 2023) and `epsilon_lower_fdp` (Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235) are lower
    bounds with `confidence`; `epsilon_claimed` is the promise of the same run, null where nothing is promised.
    """

    kind: Literal["canary"] = "canary"
    canary: Literal["gradient", "record"]
    site: str
    seed: int
    canaries: int
    guesses: int
    correct: int
    steps: int
    noise_multiplier: float | None
    sample_rate: float | None
    delta: float
    confidence: float = 0.95
    epsilon_lower: float
    epsilon_lower_fdp: float
    epsilon_claimed: float | None

    @property
    def exceeds(self) -> bool:
        """Whether more was found than is promised: then something is wrong, but for one audit in twenty."""
        return self.epsilon_claimed is not None and max(self.epsilon_lower, self.epsilon_lower_fdp) > self.epsilon_claimed


class MembershipAttack(Record):
    """Who was trained on, guessed from the final model: by the loss alone, or by LiRA (Carlini et al. 2022) with shadow models."""

    kind: Literal["membership"] = "membership"
    method: Literal["loss", "lira"]
    seed: int
    members: int
    non_members: int
    num_shadows: int
    auroc: float
    auroc_ci95: tuple[float, float] | None
    tpr_at_fpr: dict[str, float]  # "0.001", "0.01" -> true positive rate
    roc: list[tuple[float, float]]  # false and true positive rates, thinned
    epsilon_claimed: float | None
    delta: float | None = None  # of the claim


class InversionAttack(Record):
    """Records rebuilt from one update (Geiping et al. 2020); the pictures, grey or RGB in [0, 1], are there for synthetic patients alone."""

    kind: Literal["inversion"] = "inversion"
    protection: Literal["none", "dp", "secure aggregation"]
    seed: int
    num_records: int
    psnr: float
    ssim: float
    originals: list[list[object]] | None
    reconstructions: list[list[object]] | None


class PoisoningAttack(Record):
    """Some sites send what harms: the primary metric without and with them, and how often a backdoor's trigger gets its target."""

    kind: Literal["poisoning"] = "poisoning"
    method: Literal["label flip", "scaled update", "sign flip", "backdoor"]
    strategy: str
    seed: int
    sites: int
    attackers: int
    metric: str
    clean: float | None
    attacked: float | None
    trigger_success: float | None
    trigger_success_clean: float | None


Attack = Annotated[CanaryAudit | MembershipAttack | InversionAttack | PoisoningAttack, Field(discriminator="kind")]


class Attacks(Record):
    """attacks.json."""

    schema_version: int = SCHEMA_VERSION
    attacks: list[Attack]


def read_attacks(folder: Path) -> list[Attack]:
    """What was measured on this run; empty where nothing was.

    Raises:
        StorageError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        return Attacks.model_validate_json(path.read_bytes()).attacks
    except (OSError, ValidationError) as error:
        raise StorageError(f"{path}: expected attacks as 'wardround attack' writes them, got another file", "remove it, and attack again") from error


def add_attacks(folder: Path, attacks: list[Attack]) -> None:
    """Write these beside what was measured before, in place of earlier ones of the same kind and settings.

    Raises:
        StorageError: the file cannot be written, or is damaged.
    """
    new = {_settings(attack) for attack in attacks}
    kept = [attack for attack in read_attacks(folder) if _settings(attack) not in new]
    write_atomic(folder / FILE, json_text(Attacks(attacks=[*kept, *attacks]).model_dump(mode="json")))


def _settings(attack: Attack) -> tuple[object, ...]:
    """What was done, whatever came of it."""
    names = ("canary", "method", "protection", "strategy", "site", "seed", "attackers")
    return (attack.kind, *(getattr(attack, name, None) for name in names))

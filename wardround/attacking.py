"""Attacks on a study or on a run's study: which is run on what, and where the results go."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from server.run_folder import RunFolder
from shared.attacks import Attack, CanaryAudit, add_attacks
from shared.errors import ClaimError, ConfigurationError, ModelMismatchError
from shared.files import storage_errors, write_atomic
from shared.root_log import root_log_unchanged
from shared.study import Study
from wardround.quiet import quiet_flower_log, switch_off_telemetry
from wardround.run import check_places

AttackKind = Literal["canary", "membership", "inversion", "poisoning"]
KINDS: tuple[AttackKind, ...] = ("canary", "membership", "inversion", "poisoning")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """What was measured, in whose folder it is, and why each kind that does not suit the study was left out."""

    folder: Path
    attacks: list[Attack]
    left_out: dict[AttackKind, str]


def attack_study(
    study: Study, kinds: Sequence[AttackKind], *, run: Path | None = None, out: Path = Path("runs"), data: Path | None = None,
    seed: int = 0, canaries: int = 1000, canary: Literal["gradient", "record"] = "gradient",
    observe: Callable[[AttackKind], None] = lambda kind: None,
) -> Attacked:  # fmt: skip
    """What each kind of attack measures; each is in the folder's attacks.json, and its picture beside it, as soon as it has ended.

    Args:
        run: the folder of the run whose study it is; None: one is made in `out` once there is something to put into it.
        observe: called with the kind that is begun.

    Raises:
        ConfigurationError: the one attack asked for does not suit the study; of several, the others go on.
        WardroundError: what stops a simulation.
    """
    switch_off_telemetry()
    check_places(data, out if run is None else run)
    if run is not None and RunFolder.open(run).start.started_from is not None:
        raise ConfigurationError(
            f"{run}: expected a run that started from its seed, got one that started with another run's model; an attack runs the study again",
            "attack a run without --start-from",
        )
    with root_log_unchanged():
        import simulations.simulate  # noqa: F401  # Opacus comes with it
    quiet_flower_log()
    folder, found = run, list[Attack]()
    left_out: dict[AttackKind, str] = {}
    for kind in kinds:
        observe(kind)
        try:
            new, pictures = _attack(study, kind, data=data, seed=seed, canaries=canaries, canary=canary)
        except ConfigurationError as error:
            if kind == "canary" or len(kinds) == 1:
                raise
            left_out[kind] = error.what
            continue
        folder = folder or new_folder(study, out)
        add_attacks(folder, new)
        for name, picture in pictures.items():
            write_atomic(folder / name, picture)
        found += new
    assert folder is not None, "a kind that is the only one, and the canary audit, raise"
    return Attacked(folder=folder, attacks=found, left_out=left_out)


def _attack(
    study: Study, kind: AttackKind, *, data: Path | None, seed: int, canaries: int, canary: Literal["gradient", "record"]
) -> tuple[list[Attack], dict[str, bytes]]:
    """What one kind of attack measures, and its pictures (PNG) by file name."""
    match kind:
        case "canary":
            from simulations.attacks.canaries import audit

            return [audit(study, data, canaries=canaries, kind=canary, seed=seed)], {}
        case "membership":
            from simulations.attacks.membership import attack_membership, roc_picture

            guessed = attack_membership(study, data, seed=seed)
            return [*guessed], {"attack-membership.png": roc_picture(guessed)}
        case "inversion":
            from simulations.attacks.inversion import inversion_picture, invert_gradients

            rebuilt = invert_gradients(study, data, seed=seed)
            shown = any(attack.originals and attack.reconstructions for attack in rebuilt)  # of synthetic patients alone
            return [*rebuilt], {"attack-inversion.png": inversion_picture(rebuilt)} if shown else {}
        case "poisoning":
            from simulations.attacks.poisoning import attack_poisoning

            return [*attack_poisoning(study, data, seed=seed)], {}


def new_folder(study: Study, out: Path) -> Path:
    """A new `attack-<study>-<utc>-<4 hex>` in `out`, with the study in it.

    Raises:
        StorageError: it cannot be written.
    """
    folder = out / f"attack-{study.name}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}-{secrets.token_hex(2)}"
    with storage_errors(folder, "make the attack's folder"):
        folder.mkdir(parents=True)
    write_atomic(folder / "study.toml", study.to_toml())
    return folder


def check_same_patients(run: Path, data: Path | None) -> None:
    """Return where the run was a simulation on exactly these patients: only then is its study the one attacked.

    Raises:
        ModelMismatchError: they are others.
        StorageError: it is no run's folder.
    """
    check_places(data, run)
    with root_log_unchanged():
        from simulations.simulate import prepare, resume_run
    try:
        resume_run(prepare(RunFolder.open(run).study, data), run)
    except ModelMismatchError as error:
        raise ModelMismatchError(error.what, "give the same --data as the run had") from None


def check_gate(study: Study, kinds: Sequence[AttackKind]) -> None:
    """Raise `ConfigurationError` where there is nothing to hold against a promise: no promise, or no audit."""
    if "canary" not in kinds:
        raise ConfigurationError(
            f"--gate: expected --kind canary or all, got {', '.join(kinds)}", "the gate holds the canary audit against the claim"
        )
    if not study.private:
        raise ConfigurationError("--gate: expected a private study, got one that promises nothing", "give it an epsilon, or leave --gate out")


def hold_gate(attacks: Sequence[Attack]) -> None:
    """Raise `ClaimError` where an audit found more than its run claims."""
    for attack in attacks:
        if isinstance(attack, CanaryAudit) and attack.exceeds:
            raise ClaimError(
                f"canary audit of {attack.site}: expected at most the claimed epsilon {attack.epsilon_claimed:g}, found at least "
                f"{max(attack.epsilon_lower, attack.epsilon_lower_fdp):.3g} with {attack.confidence:.0%} confidence",
                "attack again with another --seed; where it stays, do not use this installation: noise, clipping, sampling or accounting is wrong",
            )

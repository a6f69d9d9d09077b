"""`wardround attack [RUN|STUDY]`: measured privacy beside promised privacy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wardround.cli.options import DebugOption, EpsilonOption, JsonOption, overrides

if TYPE_CHECKING:
    from rich.console import Console

    from shared.attacks import Attack, CanaryAudit
    from shared.study import Study
    from wardround.attacking import Attacked

TABLES = {
    "canary": ("canary audit", ["", "right", "epsilon at least", "by f-DP", "claimed"]),
    "membership": ("membership inference", ["", "in/out", "AUROC", "TPR at 0.1 % FPR", "at 1 % FPR"]),
    "inversion": ("gradient inversion", ["protection", "records", "PSNR (dB)", "SSIM"]),
    "poisoning": ("poisoning", ["", "attackers", "metric", "clean", "attacked", "trigger, clean", "trigger"]),
}
DOING = {
    "canary": "canaries: training with patients who are in or out by a coin ...",
    "membership": "membership: training shadow models ...",
    "inversion": "inversion: rebuilding records from an update ...",
    "poisoning": "poisoning: training with sites that turned ...",
}


def attack(
    run_or_study: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|STUDY]", help="A run's folder, a study's TOML file, or a shipped study; default: the embedded one.", show_default=False
        ),
    ] = None,
    kind: Annotated[Literal["canary", "membership", "inversion", "poisoning", "all"], typer.Option("--kind", help="Which attack.")] = "canary",
    canaries: Annotated[int, typer.Option("--canaries", metavar="M", help="Canaries, each in or out by a coin.")] = 1000,
    canary: Annotated[
        Literal["gradient", "record"], typer.Option("--canary", help="Patients with a gradient of their own, or synthetic ones with a wrong label.")
    ] = "gradient",
    epsilon: EpsilonOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Seed of the attack.")] = 0,
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="The cohort, as for simulate.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where a study's folder is made; a run keeps its own.")] = Path("runs"),
    gate: Annotated[bool, typer.Option("--gate", help="Fail where the canary audit finds more than is claimed.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Attack a study, trained again on virtual sites, and put what is measured beside what it promises."""
    from wardround.cli.output import console, print_envelope

    terminal = console(as_json=as_json)
    terminal.print("loading torch, Opacus and Flower ...", style="dim")
    from wardround.attacking import KINDS, attack_study, check_gate, check_same_patients, hold_gate

    kinds = KINDS if kind == "all" else (kind,)
    run = Path(run_or_study) if run_or_study is not None and Path(run_or_study).is_dir() else None
    study = run_study(run, epsilon) if run is not None else _study(run_or_study, epsilon)
    if gate:
        check_gate(study, kinds)
    if run is not None:
        check_same_patients(run, data)
    done = attack_study(
        study, kinds, run=run, out=out, data=data, seed=seed, canaries=canaries, canary=canary,
        observe=lambda begun: terminal.print(DOING[begun], style="dim"),
    )  # fmt: skip
    print_attacks(done, terminal)
    terminal.print(f"\nattacks  {done.folder / 'attacks.json'}", soft_wrap=True)
    if gate:
        hold_gate(done.attacks)
    if as_json:
        print_envelope({"attack_dir": str(done.folder), **measured(done)})


def run_study(run: Path, epsilon: str | None) -> "Study":
    """The study of a run.

    Raises:
        ConfigurationError: another budget was asked for, which would be another study.
    """
    from server.run_folder import RunFolder
    from shared.errors import ConfigurationError

    if epsilon is not None:
        raise ConfigurationError("--epsilon: expected none with a run, which has its own, got one", "attack the study instead, or leave it out")
    return RunFolder.open(run).study


def _study(name: str | None, epsilon: str | None) -> "Study":
    from wardround.cli.simulate import read_study

    return read_study(name, None, overrides(sites=None, rounds=None, epsilon=epsilon, task=None, seed=None))


def measured(done: "Attacked") -> dict[str, object]:
    """All attacks, with the numbers of the canary audit beside them (null where there was none)."""
    audit = next((attack for attack in done.attacks if attack.kind == "canary"), None)
    numbers = {name: getattr(audit, name, None) for name in ("epsilon_lower", "epsilon_lower_fdp", "epsilon_claimed")}
    return {**numbers, "attacks": [attack.model_dump(mode="json") for attack in done.attacks], "left_out": done.left_out}


def print_attacks(done: "Attacked", terminal: "Console") -> None:
    """A table for each kind of attack, and a sentence of what it means."""
    from wardround.cli.output import table

    for kind, (title, columns) in TABLES.items():
        rows = [row_of(attack) for attack in done.attacks if attack.kind == kind]
        if rows:
            terminal.print()
            terminal.print(table(title, columns, rows))
    for attack in done.attacks:
        if attack.kind == "canary":
            terminal.print(f"\n{meaning(attack)}", style="bold red" if attack.exceeds else None, soft_wrap=True)
    for kind, why in done.left_out.items():
        terminal.print(f"\n{kind} was left out: {why}", style="yellow", markup=False, soft_wrap=True)


def row_of(attack: "Attack") -> list[str]:
    """The row of an attack in its kind's table."""
    from wardround.cli.output import number, with_interval

    match attack.kind:
        case "canary":
            right = f"{attack.correct} of {attack.guesses}"
            numbers = [number(value, 2) for value in (attack.epsilon_lower, attack.epsilon_lower_fdp, attack.epsilon_claimed)]
            return [f"{attack.canaries} {attack.canary} canaries at {attack.site}", right, *numbers]
        case "membership":
            rates = [number(attack.tpr_at_fpr.get(rate)) for rate in ("0.001", "0.01")]
            return [attack.method, f"{attack.members}/{attack.non_members}", with_interval(attack.auroc, attack.auroc_ci95), *rates]
        case "inversion":
            return [attack.protection, str(attack.num_records), number(attack.psnr, 1), number(attack.ssim)]
        case "poisoning":
            values = [number(value) for value in (attack.clean, attack.attacked, attack.trigger_success_clean, attack.trigger_success)]
            return [f"{attack.method} against {attack.strategy}", f"{attack.attackers} of {attack.sites}", attack.metric, *values]


def meaning(audit: "CanaryAudit") -> str:
    """What an audit's numbers say, in words."""
    found = max(audit.epsilon_lower, audit.epsilon_lower_fdp)
    if audit.epsilon_claimed is None and not found:
        return "Nothing is promised, and nothing was found: no more guesses were right than luck explains. That proves nothing."
    if audit.epsilon_claimed is None:
        return (
            f"Nothing is promised, and who sees the updates was right about {audit.correct} of {audit.guesses} canaries: "
            f"whatever epsilon one would claim, it is not below {found:.2f} ({audit.confidence:.0%} confidence)."
        )
    if audit.exceeds:
        return (
            f"More was found than is promised: epsilon is at least {found:.2f} ({audit.confidence:.0%} confidence), and {audit.epsilon_claimed:.2f} is "
            "claimed. Of twenty correct runs one at most looks so; attack again with another --seed."
        )
    return (
        f"Found: epsilon is at least {found:.2f} ({audit.confidence:.0%} confidence). Claimed: at most {audit.epsilon_claimed:.2f}. The two do not contradict "
        "each other. An audit shows only large faults: a promise rests on its theorem, not on this."
    )

"""What the attacks find on breast cancer with and without privacy, and on synthetic pictures: membership, poisoning, inversion.

python benchmarks/attacks.py [--seed S] [--shadows K] [--json]
"""

import argparse
import functools
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from measuring import ROOT, Study, finish, with_privacy

from shared.attacks import InversionAttack, MembershipAttack, PoisoningAttack
from simulations.attacks.inversion import invert_gradients
from simulations.attacks.membership import attack_membership
from simulations.attacks.poisoning import attack_poisoning

EPSILONS = (None, 3.0)
IMAGES = Study.from_table(
    {
        "name": "images",
        "task": "workloads:image",
        "training": {"learning_rate": 0.1},
        "privacy": {"epsilon": 3.0},
        "federation": {"sites": 4, "num_patients": 1000},
    }
)
Attack = MembershipAttack | PoisoningAttack | InversionAttack


def describe(attack: Attack) -> str:
    """A line of the table."""
    match attack:
        case MembershipAttack():
            low, high = attack.auroc_ci95 or (float("nan"), float("nan"))
            rates = "  ".join(f"{100 * rate:5.2f} %" for rate in attack.tpr_at_fpr.values())
            return f"{attack.method:5} AUROC {attack.auroc:.3f} [{low:.3f}, {high:.3f}]  TPR at FPR 0.1 % and 1 %: {rates}"
        case PoisoningAttack():
            opened = "" if attack.trigger_success is None else f"  trigger {attack.trigger_success_clean or 0:.2f} -> {attack.trigger_success:.2f}"
            metrics = " -> ".join("none" if value is None else f"{value:.3f}" for value in (attack.clean, attack.attacked))
            return f"{attack.strategy:10} {attack.method:13} {attack.attackers} of {attack.sites} sites  {attack.metric} {metrics}{opened}"
        case InversionAttack():
            return f"{attack.protection:18} {attack.num_records} record(s)  {attack.psnr:5.1f} dB  SSIM {attack.ssim:5.2f}"


def measure(title: str, attack: Callable[[], Sequence[Attack]]) -> dict[str, object]:
    """Print what was found, and give it without curves and pictures."""
    started = time.perf_counter()
    found = attack()
    seconds = time.perf_counter() - started
    print(f"{title} ({seconds:.1f} s)", *(f"  {describe(each)}" for each in found), sep="\n", file=sys.stderr)
    attacks = [each.model_dump(mode="json", exclude={"roc", "originals", "reconstructions"}) for each in found]
    return {"title": title, "seconds": round(seconds, 2), "attacks": attacks}


def main() -> None:
    """Run all, print the tables, and the envelope where asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shadows", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # for workloads:image
    study, seed = Study.load(ROOT / "studies" / "breast-cancer.toml"), options.seed
    results = []
    for epsilon in EPSILONS:
        promise, variant = "no privacy" if epsilon is None else f"epsilon {epsilon:g}", with_privacy(study, epsilon)
        membership = functools.partial(attack_membership, variant, seed=seed, num_shadows=options.shadows)
        results.append(measure(f"membership, {promise}", membership))
        results.append(measure(f"poisoning, {promise}", functools.partial(attack_poisoning, variant, seed=seed)))
    for number in (1, 4):
        inversion = functools.partial(invert_gradients, IMAGES, seed=seed, num_records=number)
        results.append(measure(f"inversion, {number} record(s)", inversion))
    finish({"results": results}, as_json=options.json)


if __name__ == "__main__":
    main()

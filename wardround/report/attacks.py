"""What was measured by attacking a run (attacks.json), beside what the claim sheet allows: tables, ROC curves, pictures, and plain sentences."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from shared.attacks import Attack, CanaryAudit, InversionAttack, MembershipAttack, PoisoningAttack
from shared.privacy import attack_power
from wardround.plural import plural
from wardround.report.charts import Figure, Key
from wardround.report.document import Block, Drawing, Grid, Heading, Picture, Pictures, Prose, Series
from wardround.report.png import data_address, picture_array
from wardround.report.run_files import RunFiles
from wardround.report.svg import Axis, path, plot, share_axis, stretched
from wardround.report.tables import Cell, Row, Table
from wardround.report.wording import DASH, count, finite_interval, interval_text, lower_bound, metric_title, number, upper_bound

LOWEST = 1e-3  # the smallest rate on logarithmic axes
BOUND_POINTS = 200
COLOURS = ("c1", "c3", "c4", "c5", "c6")  # of curves; the bound is red
MOST_PICTURES = 8  # records whose originals and reconstructions are shown, of each attack
LIMITS = (
    "An attack shows what one attacker found, never that nobody can find more: that is what the claim is for. An audit finds large faults alone; "
    "noise at half its strength may pass it."
)
CANARY_NOTE = (
    "Canaries are made-up records or gradients that a coin puts into training or leaves out; who sees every update guesses which. “Found” are lower "
    "bounds of epsilon that hold with the stated confidence: with 95 %, one correct run in twenty shows more than it promises."
)
METHODS = {"loss": "by the model’s loss", "lira": "LiRA, with shadow models"}


def names_of(attack: MembershipAttack) -> str:
    """The attack in a legend or a row."""
    return f"Membership {METHODS[attack.method]} (seed {attack.seed})"


def attack_blocks(run: RunFiles) -> list[Block]:
    """Everything measured, kind by kind; empty where nothing was."""
    if not run.attacks:
        return []
    blocks: list[Block] = []
    if canaries := [attack for attack in run.attacks if isinstance(attack, CanaryAudit)]:
        blocks += [Heading(text="Canary audit"), _canary_grid(canaries)]
    if membership := [attack for attack in run.attacks if isinstance(attack, MembershipAttack)]:
        blocks += [Heading(text="Membership: who was trained on?"), _membership_grid(membership, claimed_delta(run)), *_roc_drawings(run, membership)]
    if inversion := [attack for attack in run.attacks if isinstance(attack, InversionAttack)]:
        blocks += [Heading(text="Rebuilding records from an update"), _inversion_grid(inversion), *_pictures(inversion)]
    if poisoning := [attack for attack in run.attacks if isinstance(attack, PoisoningAttack)]:
        blocks += [Heading(text="Poisoning by some sites"), _poisoning_grid(poisoning)]
    return [*blocks, Prose(text=LIMITS, css="note")]


def claimed_delta(run: RunFiles) -> float:
    """Delta of the claim, the largest of the sites'; 0 without a promise."""
    return max((site.delta for site in run.result.privacy.sites.values()), default=0.0)


def _canary_grid(audits: Sequence[CanaryAudit]) -> Grid:
    rows = tuple(
        Row(
            name=f"{audit.canary} canaries at {audit.site}",
            cells=(
                Cell(text=count(audit.canaries), below=f"seed {audit.seed}"),
                Cell(text=f"{audit.correct:,} of {audit.guesses:,}"),
                Cell(text=count(audit.steps)),
                Cell(text=number(audit.noise_multiplier), below="" if audit.sample_rate is None else f"sample rate {number(audit.sample_rate)}"),
                Cell(text=f"≥ {lower_bound(audit.epsilon_lower)}", below=f"{audit.confidence:.0%} sure".replace("%", " %")),
                Cell(text=f"≥ {lower_bound(audit.epsilon_lower_fdp)}", below=f"{audit.confidence:.0%} sure".replace("%", " %")),
                Cell(text="nothing" if audit.epsilon_claimed is None else f"≤ {upper_bound(audit.epsilon_claimed)}"),
                _verdict(audit),
            ),
        )
        for audit in audits
    )
    heads = ("Canaries", "Guessed right", "Steps", "Noise multiplier", "Found (Steinke 2023)", "Found (f-DP)", "Promised", "Verdict")
    return Grid(table=Table(heads=heads, rows=rows, note=CANARY_NOTE), caption="Epsilon found beside epsilon promised", corner="Audit")


def _verdict(audit: CanaryAudit) -> Cell:
    if audit.epsilon_claimed is None:
        return Cell(text="no promise", css="absent")
    return Cell(text="above the promise", css="loss") if audit.exceeds else Cell(text="within")


def _membership_grid(attacks: Sequence[MembershipAttack], delta: float) -> Grid:
    rates = sorted({rate for attack in attacks for rate in attack.tpr_at_fpr}, key=float)
    rows = tuple(
        Row(
            name=names_of(attack),
            cells=(
                Cell(text=count(attack.members)),
                Cell(text=count(attack.non_members)),
                Cell(text=count(attack.num_shadows) if attack.num_shadows else "none"),
                Cell(text=number(attack.auroc), below=interval_text(finite_interval(attack.auroc_ci95))),
                *(_rate_cell(attack, rate, delta) for rate in rates),
                Cell(text="nothing" if attack.epsilon_claimed is None else f"≤ {upper_bound(attack.epsilon_claimed)}"),
            ),
        )
        for attack in attacks
    )
    heads = ("Members", "Others", "Shadow models", "AUROC", *(f"TPR at {100 * float(rate):g} % FPR" for rate in rates), "Epsilon promised")
    note = (
        "AUROC 0.5 is a coin toss. TPR: the share of members recognised where that share of the others is wrongly named (FPR); below it the most that the "
        "promise allows. Where the others are too few for such a share, the rate is counted from none of them wrongly named."
    )
    return Grid(table=Table(heads=heads, rows=rows, note=note), caption="Members told from others by the final model", corner="Attack")


def _rate_cell(attack: MembershipAttack, rate: str, delta: float) -> Cell:
    found = attack.tpr_at_fpr.get(rate)
    if found is None:
        return Cell(text=DASH, css="absent")
    allowed = "" if attack.epsilon_claimed is None else f"at most {upper_bound(attack_power(attack.epsilon_claimed, delta, float(rate)))}"
    return Cell(text=number(found), below=allowed, mark="too few others" if float(rate) * attack.non_members < 1 else "")


def _roc_drawings(run: RunFiles, attacks: Sequence[MembershipAttack]) -> list[Drawing]:
    """The curves on linear and on logarithmic axes, where the few that are surely recognised are seen (Carlini et al. 2022)."""
    curves = {names_of(attack): sorted(attack.roc) for attack in attacks}
    bounds = {
        epsilon: bound_curve(epsilon, claimed_delta(run)) for epsilon in sorted({a.epsilon_claimed for a in attacks if a.epsilon_claimed is not None})
    }
    series: Series = {
        **{name: [(x, y) for x, y in points] for name, points in curves.items()},
        **{_bound_name(epsilon): [(x, y) for x, y in points] for epsilon, points in bounds.items()},
    }
    condition = " with fresh noise" if run.result.privacy.seeded_noise else ""
    note = (
        f"Dashed in red: no attack may lie above it{condition}, but for chance in finite samples."
        if bounds
        else "Nothing is promised, so there is no bound."
    )
    keys = (
        *(Key(css=COLOURS[index % len(COLOURS)], text=name) for index, name in enumerate(curves)),
        *(Key(css="bound", text=_bound_name(epsilon)) for epsilon in bounds),
    )
    drawings = []
    for title, scale in (("ROC", _linear), ("ROC on logarithmic axes", _logarithmic)):
        x, y = scale("False positive rate"), scale("True positive rate")
        lines = [
            _line(points, css=f"line {COLOURS[i % len(COLOURS)]}", title=name, log=scale is _logarithmic)
            for i, (name, points) in enumerate(curves.items())
        ]
        limits = [_line(points, css="line bound", title=_bound_name(epsilon), log=scale is _logarithmic) for epsilon, points in bounds.items()]
        chance = _line([(k / BOUND_POINTS, k / BOUND_POINTS) for k in range(BOUND_POINTS + 1)], css="chance", title="", log=scale is _logarithmic)
        label = f"{title} of membership inference: " + "; ".join(f"{names_of(attack)}, AUROC {number(attack.auroc)}" for attack in attacks) + "."
        figure = Figure(svg=plot(x, y, [stretched([chance, *limits, *lines])], label=label, css="square"), keys=keys)
        drawings.append(Drawing(figure=figure, title=title, note=note, series=series if scale is _linear else {}))
    return drawings


def bound_curve(epsilon: float, delta: float) -> list[tuple[float, float]]:
    """(FPR, largest TPR) of any test under (epsilon, delta)-differential privacy, dense where the rates are small."""
    rates = [0.0, *(10 ** (-4 + 4 * k / BOUND_POINTS) for k in range(BOUND_POINTS + 1))]
    return [(rate, attack_power(epsilon, delta, rate)) for rate in rates]


def _bound_name(epsilon: float) -> str:
    return f"most that epsilon {upper_bound(epsilon)} allows"


def _linear(title: str) -> Axis:
    return share_axis(title)


def _logarithmic(title: str) -> Axis:
    ticks = tuple((float(power), f"{10.0**power:g}") for power in range(round(math.log10(LOWEST)), 1))
    return Axis(title=title, low=math.log10(LOWEST), high=0.0, ticks=ticks)


def _line(points: Sequence[tuple[float, float]], *, css: str, title: str, log: bool) -> Markup:
    fraction = _log_fraction if log else _share
    return path([(fraction(x), fraction(y)) for x, y in points], css=css, title=title)


def _share(rate: float) -> float:
    return min(1.0, max(0.0, rate))


def _log_fraction(rate: float) -> float:
    return 1 - math.log10(max(min(rate, 1.0), LOWEST)) / math.log10(LOWEST)


def _inversion_grid(attacks: Sequence[InversionAttack]) -> Grid:
    rows = tuple(
        Row(
            name={"none": "No protection", "dp": "Differential privacy", "secure aggregation": "Secure aggregation"}[attack.protection],
            cells=(
                Cell(text=count(attack.num_records), below=f"seed {attack.seed}"),
                Cell(text=f"{attack.psnr:.1f} dB"),
                Cell(text=number(attack.ssim)),
            ),
        )
        for attack in attacks
    )
    note = "PSNR above some 20 dB and SSIM near 1: the picture is recognised; PSNR below some 10 dB and SSIM near 0: nothing of it is."
    return Grid(table=Table(heads=("Records", "PSNR", "SSIM"), rows=rows, note=note), caption="Records rebuilt from one update", corner="Protection")


def _pictures(attacks: Sequence[InversionAttack]) -> list[Block]:
    blocks: list[Block] = []
    for attack in attacks:
        pairs = list(zip(attack.originals or [], attack.reconstructions or [], strict=False))[:MOST_PICTURES]
        shown = []
        for index, pair in enumerate(pairs, start=1):
            for words, values in zip(("original", "rebuilt"), pair, strict=True):
                if (array := picture_array(values)) is not None:
                    shown.append(Picture(title=f"{words} {index}", data=data_address(array)))
        protection = {"none": "without protection", "dp": "with differential privacy"}.get(attack.protection, f"with {attack.protection}")
        if shown:
            caption = f"Synthetic records and what was rebuilt of them, {protection}: PSNR {attack.psnr:.1f} dB, SSIM {number(attack.ssim)}"
            blocks.append(Pictures(caption=caption, pictures=tuple(shown)))
    return blocks


def _poisoning_grid(attacks: Sequence[PoisoningAttack]) -> Grid:
    rows = tuple(
        Row(
            name=f"{attack.method} against {attack.strategy}",
            cells=(
                Cell(text=f"{attack.attackers} of {attack.sites}", below=f"seed {attack.seed}"),
                Cell(text=number(attack.clean), below=metric_title(attack.metric)),
                Cell(text=number(attack.attacked), below=metric_title(attack.metric)),
                Cell(text=number(attack.trigger_success_clean)),
                Cell(text=number(attack.trigger_success)),
            ),
        )
        for attack in attacks
    )
    heads = ("Attackers", "Without attack", "With attack", "Trigger, without attack", "Trigger, with attack")
    note = "Trigger: the share of records with a backdoor’s trigger that get the class that the attackers want."
    return Grid(table=Table(heads=heads, rows=rows, note=note), caption="What some sites can do to the model", corner="Attack")


# In plain sentences -------------------------------------------------------------------------------------------------------------


def attack_sentences(run: RunFiles) -> list[str]:
    """Each attack for a reader who knows no statistics, with its numbers of records."""
    return [_sentence(attack, run) for attack in run.attacks]


def _sentence(attack: Attack, run: RunFiles) -> str:
    match attack:
        case CanaryAudit():
            return _canary_sentence(attack)
        case MembershipAttack():
            return _membership_sentence(attack, claimed_delta(run), run.result.privacy.unit)
        case InversionAttack():
            return _inversion_sentence(attack)
        case PoisoningAttack():
            return _poisoning_sentence(attack)


def _canary_sentence(audit: CanaryAudit) -> str:
    found = max(audit.epsilon_lower, audit.epsilon_lower_fdp)
    promised = "nothing is promised" if audit.epsilon_claimed is None else f"promised is at most {upper_bound(audit.epsilon_claimed)}"
    verdict = " That is more than is promised: something is wrong, or this is the one audit in twenty that errs." if audit.exceeds else ""
    return (
        f"A test of the protection at {audit.site}: of {plural(audit.canaries, 'made-up entry')} a coin decided which were trained on, and "
        f"somebody who sees every update guessed. {audit.correct:,} of {audit.guesses:,} guesses were right. With {100 * audit.confidence:g} % confidence, epsilon "
        f"is therefore at least {lower_bound(found)}; {promised}.{verdict}"
    )


def _membership_sentence(attack: MembershipAttack, delta: float, unit: str) -> str:
    of = "records" if unit == "record" else "patients"
    rate = max(attack.tpr_at_fpr, key=float, default=None)
    recognised = ""
    if rate is not None:
        allowed = (
            ""
            if attack.epsilon_claimed is None
            else f"; the promise allows up to {_in_100(attack_power(attack.epsilon_claimed, delta, float(rate)))}"
        )
        recognised = f" Wrongly naming {100 * float(rate):g} in 100 of the others, it recognised {_in_100(attack.tpr_at_fpr[rate])} in 100 of those trained on{allowed}."
    return (
        f"Guessing from the final model ({METHODS[attack.method]}) who was trained on: told {attack.members:,} {of} who were from {attack.non_members:,} who were not, "
        f"the guess puts the right one first in {_in_100(attack.auroc)} of 100 pairs; 50 is a coin toss.{recognised}"
    )


def _inversion_sentence(attack: InversionAttack) -> str:
    protection = {"none": "without any protection", "dp": "with differential privacy"}.get(attack.protection, f"with {attack.protection}")
    return (
        f"Rebuilding {plural(attack.num_records, 'record')} from one update, {protection}: likeness to the original (SSIM, 1 is the same picture, 0 is unrelated) "
        f"{number(attack.ssim)}, PSNR {attack.psnr:.1f} dB."
    )


def _poisoning_sentence(attack: PoisoningAttack) -> str:
    trigger = "" if attack.trigger_success is None else f", and a hidden trigger works in {_in_100(attack.trigger_success)} of 100 records"
    return (
        f"If {attack.attackers} of {plural(attack.sites, 'hospital')} sent harmful updates ({attack.method}, against {attack.strategy}): {metric_title(attack.metric)} is "
        f"{number(attack.attacked)} instead of {number(attack.clean)}{trigger}."
    )


def _in_100(share: float) -> str:
    return f"{100 * share:.3g}"

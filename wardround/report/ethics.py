"""For an ethics board: what a study is for, what leaves a hospital, what each patient is promised and what not, in words that need no statistics."""

import math

from shared.results import SitePrivacy
from wardround.explanation import explain_run
from wardround.plural import plural
from wardround.report.attacks import LIMITS, attack_sentences
from wardround.report.document import Block, Bullets, Document, Facts, Grid, Heading, Prose, Section
from wardround.report.model_file import read_final_model
from wardround.report.run_files import RunFiles
from wardround.report.summary import SIMULATION_ENGINES, banners, lead, trained_sites
from wardround.report.tables import DESCRIPTIVE_NOTE, Cell, Row, Table, descriptive
from wardround.report.wording import DASH, count, finite, metric_title, number, upper_bound

MOST_SENTENCES = 6  # sites with a sentence each; of more, the one where most was spent, and all in the table

KEPT = (
    "patients’ records: no value, picture, text or label of any patient",
    "who the patients are: no identifier, name, date or key",
    "what the model says of a single patient",
    "the gradient of a single patient, before noise was added",
    "keys, logs and the hospital’s account of the privacy spent; of its last row a fingerprint alone leaves",
)
TITLES = {"What is promised": "In other words", "How": "How it is kept", "Hospital by hospital": "The numbers behind it, hospital by hospital"}
METRIC_WORDS = {
    "auroc": "the chance that the model ranks a patient with the condition above one without: 0.5 is a coin toss, 1 is always right",
    "auprc": "how rarely the model is wrong when it names a patient as having the condition, on average: 1 is never wrong",
    "accuracy": "the share of patients whom the model puts into the right class",
    "brier": "the mean squared distance between the predicted chance and what was so: 0 is best",
    "calibration_error": "how far predicted chances are from observed shares: 0 is best",
    "macro_f1": "how well each class is found, averaged over the classes: 1 is best",
    "mae": "the mean distance between prediction and truth: 0 is best",
    "rmse": "the root of the mean squared distance between prediction and truth: 0 is best",
    "r2": "the share of the differences between patients that the model explains: 1 is all of it",
}
WORDS = (
    ("Site", "a hospital that takes part"),
    ("Federated training", "the hospitals train one model together: the model travels, the patients’ data stay"),
    ("Update", "by how much a hospital’s training would change each number of the model: all that training sends out"),
    ("Round", "every hospital trains once, and the updates are averaged into the next model"),
    ("Differential privacy", "a mathematical bound on what can be learned about one patient, whatever else is known; noise is what keeps it"),
    (
        "Epsilon",
        "the size of that bound: odds change at most by the factor e (2.718…) to the power of epsilon. 0 is nothing at all; smaller protects more",
    ),
    ("Delta", "the chance, small, with which the bound may fail"),
    ("Noise, noise multiplier", "random numbers added to every update; the multiplier compares their size with the most that one patient can change"),
    ("Clipping, L2 norm", "the norm is the size of a change; clipping cuts what one patient can change down to a maximum"),
    ("DP-SGD", "training in small steps, each with clipping and noise"),
    ("Gradient", "how one patient’s data would change the model in one step"),
    ("Parameters", "the numbers that the model consists of"),
    ("Baselines", "models trained for comparison, such as that of one hospital alone"),
    ("Ledger", "a hospital’s lasting account of what was spent on its patients, over all studies"),
    ("Poisson sampling, sample rate", "in each step every patient is drawn by lot on its own; the rate is the chance to be drawn"),
    ("Accountant, PLD, PRV, Renyi filter", "programs that add up what all steps together cost; two independent ones check each other"),
    ("ChaCha20, Box-Muller", "where the noise comes from: a cipher that makes random bits, and a formula that shapes them"),
    ("Seeded noise", "noise that can be drawn again by whoever knows a number in the study file: good for repeating a simulation, no protection"),
    ("95 % interval", "where the true value would lie in 95 of 100 such studies; wide where patients are few"),
    ("Test patients", "patients kept out of training, on whom the model is judged"),
)


def ethics_document(run: RunFiles) -> Document:
    """The report for an ethics board.

    Raises:
        StorageError: a file of the run is damaged.
    """
    sections = (
        Section(id="purpose", title="Purpose and result", blocks=_purpose(run)),
        Section(id="patients", title="Hospitals and patients", blocks=_patients(run)),
        Section(id="leaves", title="What leaves a hospital, and what does not", blocks=_leaves(run)),
        Section(id="promise", title="What each patient is promised", blocks=_promise(run)),
        Section(id="risk", title="What risk remains", blocks=_risk(run)),
        Section(id="not-covered", title="What is not covered", blocks=_not_covered(run)),
        Section(id="decided", title="Who decided", blocks=_decided(run)),
        Section(id="words", title="Words used here", blocks=(Facts(pairs=(*_metric_pairs(run), *WORDS)),)),
    )
    return Document(
        reader="ethics",
        eyebrow="report for an ethics board",
        title=run.result.study,
        subtitle=run.study.purpose or run.result.task_title,
        run=run.result.run,
        lead=_lead(run),
        banners=tuple(banners(run)),
        sections=sections,
        tags=(run.result.outcome, "simulation" if _simulated(run) else "deployment"),
    )


def _simulated(run: RunFiles) -> bool:
    return run.result.engine in SIMULATION_ENGINES


def _lead(run: RunFiles) -> str:
    num_sites = len(trained_sites(run))
    size = "" if _simulated(run) else "about "
    patients = sum(site.num_patients for site in run.result.sites)
    who = (
        f"{plural(num_sites, 'hospital')} with {size}{patients:,} patients trained one model together" if num_sites else "No hospital trained a model"
    )
    if run.result.privacy.unit == "none":
        promise = "No patient was promised anything: the updates were sent without noise."
    elif not run.result.privacy.sites:
        promise = "No update was sent, so nothing was spent of any promise."
    elif run.result.privacy.seeded_noise:
        promise = "The noise was that of a simulation, which protects nobody; below stands what the same study would promise with real noise."
    else:
        promise = "What can be learned about any one of them from the model is bounded, as said below."
    where = "This was a simulation on one machine." if _simulated(run) else "Patients’ data stayed where they were."
    return f"{who}. {where} {promise}"


def _purpose(run: RunFiles) -> tuple[Block, ...]:
    purpose = (
        Prose(text=run.study.purpose)
        if run.study.purpose
        else Prose(text="The study file states no purpose ([study] purpose): ask the applicants for it.", css="gap-part")
    )
    return (
        purpose,
        Facts(
            pairs=(
                ("What the model predicts", run.result.task_title),
                ("Study", run.result.study),
                ("Fingerprint of the study file", run.study.fingerprint()),
            )
        ),
        Prose(text=lead(run)),
    )


def _metric_pairs(run: RunFiles) -> tuple[tuple[str, str], ...]:
    names = {name for values in run.result.metrics.values() for name in values} | {run.result.primary_metric}
    return tuple((metric_title(name), METRIC_WORDS[name]) for name in METRIC_WORDS if name in names)


def _patients(run: RunFiles) -> tuple[Block, ...]:
    primary, trained = run.result.primary_metric, trained_sites(run)
    rows = [
        Row(
            name=site.name,
            cells=(
                Cell(text=count(site.num_patients)),
                Cell(text=count(site.num_train)),
                Cell(text=count(site.num_test), mark=descriptive(run, site.name)),
                Cell(text=number(finite(run.result.per_site.get(site.name, {}).get(primary))), below=f"n = {count(site.num_test)}"),
                Cell(text="yes" if site.name in trained else "no update"),
            ),
        )
        for site in run.result.sites
    ]
    total = [sum(getattr(site, name) for site in run.result.sites) for name in ("num_patients", "num_train", "num_test")]
    rows.append(
        Row(
            name="All",
            cells=(*(Cell(text=count(size)) for size in total), Cell(text=""), Cell(text=f"{len(trained)} of {len(run.result.sites)}")),
            css="chief",
        )
    )
    few = DESCRIPTIVE_NOTE if any(descriptive(run, site.name) for site in run.result.sites) else ""
    sizes = (
        "The numbers are exact, as a simulation may show them."
        if _simulated(run)
        else "The numbers are those that hospitals declared, rounded; exact ones stay there."
    )
    heads = ("Patients", "For training", "For testing", metric_title(primary), "Took part")
    return (Grid(table=Table(heads=heads, rows=tuple(rows), note=f"{few}{sizes}"), caption="Hospitals and their patients", corner="Hospital"),)


def _leaves(run: RunFiles) -> tuple[Block, ...]:
    simulated = "This was a simulation on one machine: nothing left any hospital. " if _simulated(run) else ""
    introduction = f"{simulated}By this study, and the code that ran it, this and nothing else leaves a hospital:"
    return (
        Prose(text=introduction),
        Bullets(items=_leaving(run)),
        Heading(text="What does not leave"),
        Bullets(items=KEPT),
    )


def _leaving(run: RunFiles) -> tuple[str, ...]:
    """What `shared.messages` declares, of a study like this one."""
    study = run.study
    model = read_final_model(run.folder)
    numbers = f", {model.num_parameters:,} numbers" if model else ""
    noise = "with noise added at the hospital, before they leave" if study.private else "without noise"
    if study.noised_statistics:
        statistics = (
            "once, with the final model: how well it does on the hospital’s test patients, as sums over all of them, "
            f"with noise (epsilon {upper_bound(study.privacy.evaluation_epsilon)})"
        )
    elif run.result.per_site:
        statistics = "after every round: how well the model does on the hospital’s test patients, as exact sums over all of them, with no noise"
    else:
        statistics = "no measure of how well the model does on the hospital’s test patients: none is in this run"
    spent = ("after every round: how much of the promise was used (epsilon, delta, steps, noise)",) if study.private else ()
    return (
        "once: the hospital’s name in the study, and its numbers of patients for training and testing"
        + (" (rounded, as the hospital declared them)" if not _simulated(run) else ""),
        f"in each of up to {plural(study.rounds.count * study.evaluation.folds, 'round')}: one update{numbers}, {noise}",
        statistics,
        *spent,
        "where it takes no part: a code and a fixed sentence that says why",
    )


def _promise(run: RunFiles) -> tuple[Block, ...]:
    if run.claim is None:
        return (Prose(text="This run wrote no claim sheet (privacy.json): no promise stands behind it.", css="absent-part"),)
    privacy = run.result.privacy
    blocks: list[Block] = []
    if privacy.unit != "none" and privacy.sites:
        blocks += _in_odds(run)
    for section in explain_run(run):
        if section.title not in ("Not covered", "If this run was chosen among several"):
            blocks += [Heading(text=TITLES.get(section.title, section.title)), *_sentences(section.sentences)]
    return tuple(blocks)


def _sentences(sentences: tuple[str, ...]) -> list[Block]:
    return [Prose(text=sentences[0])] if len(sentences) == 1 else [Bullets(items=sentences)]


def _in_odds(run: RunFiles) -> list[Block]:
    """The promise as odds, a sentence a site.

    (epsilon, delta)-differential privacy is pure epsilon-privacy but for a chance of at most delta (Dwork and Roth 2014, lemma 3.17), and under the
    latter Bayes' rule bounds the change of anybody's odds by e^epsilon.
    """
    privacy = run.result.privacy
    worst = sorted(privacy.sites, key=lambda name: -_epsilon(run, privacy.sites[name]))
    named = worst[:1] if len(worst) > MOST_SENTENCES else list(privacy.sites)
    condition = "This simulation’s noise protects nobody; with fresh noise the same study would promise:" if privacy.seeded_noise else "The promise:"
    rows = tuple(
        Row(
            name=name,
            cells=(
                Cell(text=_size(run, name)),
                Cell(text=upper_bound(_epsilon(run, site))),
                Cell(text=f"{odds_factor(_epsilon(run, site))} times"),
                Cell(text=f"{fifty_fifty(_epsilon(run, site))} in 100"),
                Cell(text=chance_words(site.delta)),
            ),
        )
        for name, site in privacy.sites.items()
    )
    heads = (f"Training {privacy.unit}s", "Epsilon", "Odds change at most", "50 in 100 becomes at most", "May fail with a chance of")
    caption = f"The promise to any one {privacy.unit}, hospital by hospital"
    return [
        Prose(text=condition),
        Bullets(items=tuple(_odds_sentence(run, name, privacy.sites[name]) for name in named)),
        Grid(table=Table(heads=heads, rows=rows), caption=caption, corner="Hospital"),
    ]


def _epsilon(run: RunFiles, site: SitePrivacy) -> float:
    """What was spent; of a run that stopped early the whole plan, for the moment at which it stopped may depend on patients."""
    planned = site.epsilon_planned
    return site.epsilon if run.result.outcome == "completed" or planned is None else max(site.epsilon, planned)


def _size(run: RunFiles, site: str) -> str:
    claim = run.claim.sites.get(site) if run.claim else None
    return DASH if claim is None else count(claim.declared_size)


def _odds_sentence(run: RunFiles, name: str, site: SitePrivacy) -> str:
    unit, epsilon = run.result.privacy.unit, _epsilon(run, site)
    return (
        f"For any one {unit} of {name} (n = {_size(run, name)}): whatever anybody knows or computes, seeing the model, or every update that led to it, "
        f"changes the odds that this {unit} was trained on by at most a factor of {odds_factor(epsilon)}. Who held it for as likely as not, 50 in 100, "
        f"can come to hold it for at most {fifty_fifty(epsilon)} in 100 likely. The chance that this promise fails is at most {chance_words(site.delta)}."
    )


def odds_factor(epsilon: float) -> str:
    """e^epsilon, rounded up to three digits, for it is a bound."""
    if epsilon > 20:
        return "more than a hundred million"
    factor = math.exp(epsilon)
    digits = max(0, 2 - math.floor(math.log10(factor)))
    return f"{math.ceil(factor * 10**digits - 1e-9) / 10**digits:,.{digits}f}"


def fifty_fifty(epsilon: float) -> str:
    """What a chance of 50 in 100 can become, in 100: e^epsilon / (1 + e^epsilon), rounded up to a tenth."""
    share = 100 / (1 + math.exp(-epsilon))
    return f"{min(100.0, math.ceil(share * 10 - 1e-9) / 10):g}"


def chance_words(delta: float) -> str:
    """1e-4 is "1 in 10,000"; rounded so that it is no smaller."""
    return "0" if delta <= 0 else f"1 in {math.floor(1 / delta + 1e-9):,}"


def _risk(run: RunFiles) -> tuple[Block, ...]:
    if not run.attacks:
        none = "No attack was carried out on this run, so no risk was measured. The command 'wardround attack' with this run’s folder measures it."
        return (Prose(text=none, css="gap-part"),)
    introduction = "The promise holds whatever an attacker does. Beside it stands what attackers found who were set on this study:"
    return (Prose(text=introduction), Bullets(items=tuple(attack_sentences(run))), Prose(text=LIMITS, css="note"))


def _not_covered(run: RunFiles) -> tuple[Block, ...]:
    if run.claim is None:
        return (Prose(text="Nothing is covered.", css="absent-part"),)
    chosen = [section for section in explain_run(run) if section.title == "If this run was chosen among several"]
    extra: list[Block] = [block for section in chosen for block in (Heading(text=section.title), *_sentences(section.sentences))]
    return (Bullets(items=tuple(run.claim.not_covered)), *extra)


def _decided(run: RunFiles) -> tuple[Block, ...]:
    if _simulated(run):
        return (
            Prose(
                text="Nobody had to decide: a simulation asks no hospital. Where it rehearsed with hospitals’ own site files, their policies decided. In a "
                "federation each hospital trains what somebody there approved by name: this study, letter for letter, this model, this code and this budget."
            ),
        )
    trained, refused = trained_sites(run), _refusals(run)
    agreed = tuple(
        f"{site.name}: {'took part, so its policy and an approval given there allowed this very study' if site.name in trained else 'sent no update'}"
        + (f"; it refused in {plural(refused[site.name], 'round')}" if site.name in refused else "")
        for site in run.result.sites
    )
    note = (
        "Who signed an approval, and when, is kept by each hospital and never leaves it: 'wardround site approve KIT' shows it there, and so does the "
        "hospital’s audit log."
    )
    return (Bullets(items=agreed), Prose(text=note, css="note"))


def _refusals(run: RunFiles) -> dict[str, int]:
    found: dict[str, int] = {}
    for record in run.rounds:
        for site in record.sites:
            if site.status == "refused":
                found[site.name] = found.get(site.name, 0) + 1
    return found

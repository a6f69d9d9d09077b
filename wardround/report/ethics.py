"""For an ethics board: what a study is for, what leaves a hospital, what each patient is promised and what not, in words that need no statistics."""

import math

from shared.privacy import attack_power
from shared.results import SitePrivacy
from shared.view import View
from wardround.claim_in_words import claim_sections
from wardround.plural import plural
from wardround.report.attacks import LIMITS, attack_sentences
from wardround.report.document import Block, Bullets, Document, Facts, Grid, Heading, Prose, Section
from wardround.report.judged import judged
from wardround.report.model_file import read_final_model
from wardround.report.run_files import RunFiles
from wardround.report.summary import SIMULATION_ENGINES, banners, colluding, lead, trained_sites
from wardround.report.tables import DESCRIPTIVE_NOTE, Cell, Row, Table, descriptive
from wardround.report.wording import DASH, compact, count, finite, metric_title, number, upper_bound

MOST_SENTENCES = 6  # sites with a sentence each; of more, the one where most was spent, and all in the table

KEPT = (
    "patients’ records: no value, picture, text or label of any patient",
    "who the patients are: no identifier, name, date or key",
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
        "the size of that bound: 0 tells nothing at all, and smaller protects more. At 1 a coin that decided about a patient is guessed rightly at most 73.2 times in 100, at 3 at most 95.3",
    ),
    ("Delta", "a small allowance on top of that bound: of so large a share of cases nothing is promised; smaller protects more"),
    (
        "Noise, noise multiplier",
        "random numbers added before anything is seen; the multiplier compares their size with the most that one patient can change",
    ),
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
        Section(id="words", title="Words used here", blocks=(Facts(pairs=(*_metric_pairs(run), *WORDS, *_of_sums(run))),)),
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


def _of_sums(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """Words of a study with secure aggregation."""
    view = View.of(run.study)
    if not view.masked:
        return ()
    shared = "here the hospitals add shares of one noise, and their sum, not a single update, has all of it; the multiplier is that of the sum"
    return (
        (
            "Masks, secure aggregation",
            "random numbers that hide each hospital’s update and cancel in the sum of all: the coordinator can read the sum alone",
        ),
        *((("Distributed noise, share", shared),) if view.shared else ()),
    )


def _simulated(run: RunFiles) -> bool:
    return run.result.engine in SIMULATION_ENGINES


def _lead(run: RunFiles) -> str:
    num_sites = len(trained_sites(run))
    size = "" if _simulated(run) else "about "
    patients = sum(site.num_patients for site in run.result.sites)
    who = (
        f"{plural(num_sites, 'hospital')} with {size}{patients:,} patients trained {judged(run.study).made}"
        if num_sites
        else "No hospital trained a model"
    )
    if run.result.privacy.unit == "none":
        promise = f"No patient was promised anything: {View.of(run.study).plainly}."
    elif run.result.privacy.unit == "site":
        promise = (
            f"What can be learned about a whole hospital from the model is bounded, as said below. Patients are promised nothing against the coordinator: "
            f"{View.of(run.study).plainly}."
        )
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
    if study.noised_statistics:
        statistics = (
            "once, with the final model: how well it does on the hospital’s test patients, as sums over all of them, "
            f"with noise (epsilon {upper_bound(study.privacy.evaluation_epsilon)})"
        )
    elif run.result.per_site:
        statistics = (
            "after every round: how well the model does on the hospital’s test patients, as exact sums over all of them, with no noise; where they are few, such "
            "sums tell what the model says of single ones"
        )
    else:
        statistics = "no measure of how well the model does on the hospital’s test patients: none is in this run"
    spent = ("after every round: how much of the promise was used (epsilon, delta, steps, noise)",) if study.private else ()
    return (
        "once: the hospital’s name in the study, and its numbers of patients for training and testing"
        + (" (rounded, as the hospital declared them)" if not _simulated(run) else ""),
        f"in each of up to {plural(study.rounds.count * study.evaluation.folds, 'round')}: {View.of(study).leaving(numbers)}",
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
        blocks += _in_guesses(run)
    for section in claim_sections(run):
        if section.title not in ("Not covered", "If this run was chosen among several"):
            blocks += [Heading(text=TITLES.get(section.title, section.title)), *_sentences(section.sentences)]
    return tuple(blocks)


def _sentences(sentences: tuple[str, ...]) -> list[Block]:
    return [Prose(text=sentences[0])] if len(sentences) == 1 else [Bullets(items=sentences)]


def _in_guesses(run: RunFiles) -> list[Block]:
    """The promise as what anybody can guess, a sentence a site.

    (epsilon, delta)-differential privacy holds exactly where every test has TPR <= e^epsilon FPR + delta, and the like for its errors (`attack_power`).
    With both at their limit a fair coin is guessed rightly with chance (e^epsilon + delta) / (1 + e^epsilon), and no guess does better.
    """
    privacy = run.result.privacy
    worst = sorted(privacy.sites, key=lambda name: -_bound(run, privacy.sites[name])[0])
    named = worst[:1] if len(worst) > MOST_SENTENCES else list(privacy.sites)
    condition = "This simulation’s noise protects nobody; with fresh noise the same study would promise:" if privacy.seeded_noise else "The promise:"
    rows = tuple(
        Row(name=name, cells=(Cell(text=_size(run, name)), *_bound_cells(*_bound(run, site)), *_colluding_cells(run, name, site.delta)))
        for name, site in privacy.sites.items()
    )
    heads = (f"Training {privacy.unit}s", "Epsilon", "Delta", "A coin guessed rightly, at most", "Recognised at one false alarm in 100, at most")
    others = () if colluding(run) is None else ("Epsilon against all others together", "A coin guessed by all others together, at most")
    caption = f"The promise to any one {privacy.unit}, hospital by hospital"
    note = "A patient may be known to several hospitals, so what all of them spent counts for each." if run.study.privacy.patients_overlap else ""
    view = View.of(run.study)
    if view.shared:
        note = f"The first epsilon is {view.against}. “All others together”: the coordinator and every other hospital, who can take their own shares of the noise away."
        if run.result.outcome != "completed":
            note = f"{note} That is of what was spent; of the whole plan it would be more."
    return [
        Prose(text=condition),
        Bullets(items=tuple(_guess_sentence(run, name, privacy.sites[name]) for name in named)),
        Grid(table=Table(heads=(*heads, *others), rows=rows, note=note), caption=caption, corner="Hospital"),
    ]


def _bound_cells(epsilon: float, delta: float) -> tuple[Cell, ...]:
    return (
        Cell(text=upper_bound(epsilon)),
        Cell(text=compact(delta)),
        Cell(text=f"{coin_guessed(epsilon, delta)} in 100"),
        Cell(text=f"{recognised(epsilon, delta)} in 100"),
    )


def _colluding_cells(run: RunFiles, name: str, delta: float) -> tuple[Cell, ...]:
    """Against the coordinator and all other hospitals together, where noise was added in shares."""
    together = colluding(run)
    if together is None:
        return ()
    return Cell(text=upper_bound(together[name])), Cell(text=f"{coin_guessed(together[name], delta)} in 100")


def _bound(run: RunFiles, site: SitePrivacy) -> tuple[float, float]:
    """Epsilon and delta of the promise to a patient of the site; where hospitals may share patients, of all sites together.

    Of a run that stopped early the whole plans count, for the moment at which it stopped may depend on patients; these are simply added.
    """
    completed = run.result.outcome == "completed"
    if run.study.privacy.patients_overlap:
        if completed and run.claim is not None and run.claim.federation is not None:
            return run.claim.federation.epsilon, run.claim.federation.delta
        sites = run.result.privacy.sites.values()
        return sum(max(each.epsilon, each.epsilon_planned or 0.0) for each in sites), sum(each.delta for each in sites)
    return site.epsilon if completed or site.epsilon_planned is None else max(site.epsilon, site.epsilon_planned), site.delta


def _size(run: RunFiles, site: str) -> str:
    claim = run.claim.sites.get(site) if run.claim else None
    return DASH if claim is None else count(claim.declared_size)


def _guess_sentence(run: RunFiles, name: str, site: SitePrivacy) -> str:
    unit, (epsilon, delta), view = run.result.privacy.unit, _bound(run, site), View.of(run.study)
    together = colluding(run)
    others = (
        ""
        if together is None
        else f" The coordinator and all other hospitals together guess it rightly at most {coin_guessed(together[name], delta)} times in 100."
    )
    league = f", as long as {view.condition}" if view.shared else ""
    return (
        f"For any one {unit} of {name} (n = {_size(run, name)}): had a coin decided whether this {unit} is trained on, then whoever sees the model, or {view.evidence} that led to it, "
        f"whatever else they know and however they compute{league}, guesses the coin rightly at most {coin_guessed(epsilon, delta)} times in 100; without looking it is 50. And who wrongly "
        f"names one in 100 of those who were not trained on names at most {recognised(epsilon, delta)} in 100 of those who were.{others}"
    )


def coin_guessed(epsilon: float, delta: float) -> str:
    """How often, in 100, a fair coin is guessed rightly at most: (e^epsilon + delta) / (1 + e^epsilon), rounded up to a tenth."""
    share = 100 * (1 / (1 + math.exp(-min(epsilon, 700.0))) + delta / (1 + math.exp(min(epsilon, 700.0))))
    return _up(share)


def recognised(epsilon: float, delta: float) -> str:
    """`attack_power` at one false alarm in 100, in 100, rounded up to a tenth."""
    return _up(100 * attack_power(epsilon, delta, 0.01))


def _up(share: float) -> str:
    return f"{min(100.0, math.ceil(share * 10 - 1e-9) / 10):g}"


def _risk(run: RunFiles) -> tuple[Block, ...]:
    if not run.attacks:
        none = "No attack was carried out on this run, so no risk was measured. The command 'wardround attack' with this run’s folder measures it."
        return (Prose(text=none, css="gap-part"),)
    introduction = "The promise holds whatever an attacker does. Beside it stands what attackers found who were set on this study:"
    return (Prose(text=introduction), Bullets(items=tuple(attack_sentences(run))), Prose(text=LIMITS, css="note"))


def _not_covered(run: RunFiles) -> tuple[Block, ...]:
    if run.claim is None:
        return (Prose(text="Nothing is covered.", css="absent-part"),)
    chosen = [section for section in claim_sections(run) if section.title == "If this run was chosen among several"]
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

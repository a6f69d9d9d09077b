"""The claim sheet of a run (NIST SP 800-226): what is promised to whom, by which mechanism, and what is not covered."""

from collections.abc import Mapping

from shared.errors import ConfigurationError
from shared.privacy import PrivacyEvent, epsilon_if_all_others_collude, epsilon_of
from shared.results import FederationClaim, PrivacyClaim, RunPrivacy, SharedNoise, SharedNoiseSite, SiteClaim, SitePrivacy, StartedFrom
from shared.site_claim import ACCOUNTANTS as SITE_LEVEL_ACCOUNTANTS
from shared.site_claim import site_level_claim
from shared.strategy_options import PERSONAL, FedDyn, QFedAvg, Scaffold
from shared.study import Study
from shared.view import View
from shared.whole_promise import Unit, rounded_up, start_sentence

MAX_STEPS = 1_000_000  # of a site's own report; more would take the accountant minutes
MECHANISM = (
    "DP-SGD: the gradient of each unit clipped to L2 norm {clip:g} over all trainable parameters; their sum rounded to a public grid, and "
    "Gaussian noise of noise_multiplier x {clip:g} (a little more, for the rounding) added on the same grid"
)
SHARED_MECHANISM = (
    "DP-SGD with distributed noise: the gradient of each unit clipped to L2 norm {clip:g} over all trainable parameters; their sum at a site rounded to a public grid, and a "
    "rounded Gaussian share of the noise added on the same grid. {honest} shares or more are in every sum, and make up noise_multiplier x {clip:g} (a little more, for the "
    "rounding, and for what shares are other than one Gaussian); a share alone is {share:.3g} times that"
)
SAMPLING = "Poisson: every training {unit} independently with the site's sample rate in every step{records}"
RECORDS = {
    ("patient", "one"): "; one record of each sampled patient, drawn anew",
    ("patient", "all"): "; the mean gradient over all records of each sampled patient, clipped as one",
}
COMPOSITION = (
    "privacy loss distributions composed numerically over all steps of all rounds (dp-accounting, pessimistic), and by other code Opacus' PRV; "
    "both are upper bounds and the tighter one is the claim. Over several studies a hospital's limit is held by a Renyi filter"
)
ACCOUNTANTS = ["dp-accounting PLD (add/remove one)", "Opacus PRV (add/remove one)"]
NOISE = {
    False: "ChaCha20 is taken for random, and the evaluation of the Box-Muller transform in float64 for exact",
    True: "the noise of this simulation follows from its seed (ChaCha20, Box-Muller in float32), and protects nobody; a site's own is ChaCha20, in float64",
}
ASSUMED = [
    "a gradient has the same bits wherever its record stands in a batch of one public shape (kernels are tested for it, not proved)",
    "every site runs this code unchanged, on all records of its patients; nobody checks that from outside",
    "in the model a patient's gradient depends on that patient's records and the parameters alone (real sites probe for it before they train)",
]
NOT_COVERED = [
    "numbers of patients and of test patients at each site (exact in a simulation, declared in a deployment)",
    "baselines, which are trained beside the study",
    "whether a site took part, refused or was late, and how long it took",
    "what is true of everybody: a model may say of a patient what it says of any like patient, who took part or not",
]
WARM_START = (
    "the model of another run that this one started with: what it learnt of its patients is covered by that run's claim alone, if by any. {start}"
)
OWN_ALONE = "This is said of this run's own updates alone, and not of the model that it started with. {start} {statement}"
SECURE = (
    "secure aggregation (SecAgg+): the coordinator follows the protocol, and learns sums of updates over more than half of the sites that began, and no "
    "single one{leans}. A malicious site is outside this model: what it puts into a sum is checked by its own code alone. Who keeps the roster invents no site"
)
COLLUDING = (
    "a promise of that size to anybody in league with {few} of the {sites} sites, each other hospital counted, for it knows its own share of the noise; distributed_noise "
    "says what is promised against all others together"
)
LEANS = {False: "; the promise above holds without this", True: ": the promise above rests on it, for a single update has a share of the noise alone"}
EXACT_METRICS = "evaluation metrics on test patients, where they left a site: exact sums, without noise; test patients are covered by no epsilon here"
CHOICE = (
    "choosing among several runs by their results: every run costs, and the choice as well. The best of a random number of such runs, ten on "
    "average: wardround privacy epsilon --event {event} --delta {delta:g} --best-of 10"
)


def privacy_claim(
    study: Study, privacy: RunPrivacy, declared_sizes: Mapping[str, int], versions: dict[str, str], *,
    started_from: StartedFrom | None = None,
) -> PrivacyClaim:  # fmt: skip
    """The claim of a run, about its own updates. Without privacy it says that nothing is promised.

    Args:
        started_from: the model of another run that it started with, which it says nothing for; the statement begins with that.
    """
    unit, view = study.privacy.unit, View.of(study)
    warm = [] if started_from is None else [WARM_START.format(start=start_sentence(started_from, unit))]
    whole_sites = None if privacy.site_level is None else site_level_claim(study, privacy.site_level, seeded=privacy.seeded_noise)
    secure = (
        [] if study.secure_aggregation is None else [SECURE.format(leans=LEANS[study.distributed_noise] if study.private or study.site_level else "")]
    )
    if not study.private and whole_sites is not None:
        return PrivacyClaim(
            unit="site", neighbouring_relation=whole_sites.neighbouring_relation, mechanism=whole_sites.mechanism, sampling=whole_sites.sampling,
            composition=whole_sites.composition, protects=whole_sites.protects,
            statement=whole_sites.statement if started_from is None else _of_own_alone(started_from, unit, whole_sites.statement),
            covered=whole_sites.covered, not_covered=[*warm, *whole_sites.not_covered], assumed=[*whole_sites.assumed, *secure],
            accountants=SITE_LEVEL_ACCOUNTANTS, sites={}, site_level=whole_sites, started_from=started_from, versions=versions,
        )  # fmt: skip
    if not study.private:
        return PrivacyClaim(
            unit="none", neighbouring_relation=None, mechanism=None, sampling=None, composition=None, protects=False,
            statement=f"This run promises no differential privacy: {view.plainly}.",
            covered=[], not_covered=[*warm, _all_that_left(study)], assumed=secure, accountants=[], sites={}, versions=versions,
            started_from=started_from,
        )  # fmt: skip
    federation = across_sites(privacy.sites, overlap=study.privacy.patients_overlap)
    assumed = [NOISE[privacy.seeded_noise], *ASSUMED, *secure]
    statement = _statement(study, privacy, federation)
    if privacy.distributed_noise is not None:
        statement = f"{statement} {privacy.distributed_noise.statement}"
    return PrivacyClaim(
        unit=unit,
        neighbouring_relation=f"add or remove one {unit} of a site's training patients (to replace one by another costs more: up to twice epsilon)",
        mechanism=_mechanism(study, view),
        sampling=SAMPLING.format(unit=unit, records=RECORDS.get((unit, study.privacy.records_per_patient), "")),
        composition=COMPOSITION,
        statement=statement if started_from is None else _of_own_alone(started_from, unit, statement),
        protects=not privacy.seeded_noise,
        covered=_covered(study) if privacy.sites else [],
        not_covered=[*warm, *_not_covered(study, privacy)],
        assumed=assumed
        if federation is None or study.privacy.patients_overlap
        else [*assumed, "no patient is known to two sites (the study declares it)"],
        accountants=ACCOUNTANTS,
        sites={name: _site_claim(spent, declared_sizes[name], seeded=privacy.seeded_noise) for name, spent in privacy.sites.items()},
        federation=federation,
        site_level=whole_sites,
        distributed_noise=privacy.distributed_noise,
        evaluation_epsilon=study.privacy.evaluation_epsilon,
        started_from=started_from,
        versions=versions,
    )


def _of_own_alone(start: StartedFrom, unit: Unit, statement: str) -> str:
    return OWN_ALONE.format(start=start_sentence(start, unit), statement=statement)


def _mechanism(study: Study, view: View) -> str:
    text = SHARED_MECHANISM if view.shared else MECHANISM
    return text.format(clip=study.privacy.max_grad_norm, honest=view.honest, share=view.share if view.shared else 1.0)


def _all_that_left(study: Study) -> str:
    if study.secure_aggregation is None:
        return "everything that left the sites"
    return "sums of updates, the model, and whatever follows from them; masks keep single updates from a coordinator that follows the protocol, and promise no more"


def shared_noise(study: Study, sites: Mapping[str, SitePrivacy]) -> SharedNoise | None:
    """Both epsilons of every site, where noise is added in shares; None where it is not, or nothing was spent."""
    if not study.distributed_noise or not sites:
        return None
    view = View.of(study)
    told = {}
    for name, site in sites.items():
        colluding = epsilon_if_all_others_collude(
            site.noise_multiplier, sample_rate=site.sample_rate, steps=site.steps, delta=site.delta, honest=view.honest
        )
        told[name] = SharedNoiseSite(epsilon_against_coordinator=site.epsilon, epsilon_if_all_others_collude=colluding)
    worst = max(site.epsilon_if_all_others_collude for site in told.values())
    statement = (
        f"Epsilon {rounded_up(max(site.epsilon_against_coordinator for site in told.values()))} is against whoever sees "
        f"sums of updates alone, such as the coordinator, as long as {view.condition}; each other hospital counts as one in league, for it knows its own share of the "
        f"noise. Against the coordinator and every other site together it is epsilon {rounded_up(worst)} at worst, for then a site has its own share alone."
    )
    return SharedNoise(
        missing=view.missing, colluding=view.colluding, num_sites=view.sites, condition=view.condition, sites=told, statement=statement
    )


def across_sites(sites: Mapping[str, SitePrivacy], *, overlap: bool) -> FederationClaim | None:
    """What one patient of the federation is promised; None where no site spent anything.

    A patient of one site is touched by that site's releases alone (parallel composition), so the worst site's promise holds for everybody.
    A patient who may be known to several sites is touched by all their releases, which compose.
    """
    if not sites:
        return None
    delta = max(site.delta for site in sites.values())
    if not overlap:
        worst = max(site.epsilon for site in sites.values())
        return FederationClaim(epsilon=worst, delta=delta, basis="maximum, patients are disjoint by declaration")
    events = [event for event in map(event_of, sites.values()) if event is not None]
    if len(events) == len(sites):
        epsilon = epsilon_of(events, delta)
    else:  # basic composition needs no events
        epsilon, delta = sum(site.epsilon for site in sites.values()), sum(site.delta for site in sites.values())
    return FederationClaim(epsilon=epsilon, delta=delta, basis="composition, patients may be shared")


def event_of(spent: SitePrivacy | SiteClaim) -> PrivacyEvent | None:
    """What a site released, for the accountant; None where no mechanism has these numbers, for a site may say anything."""
    if spent.steps > MAX_STEPS:
        return None
    try:
        return PrivacyEvent(noise_multiplier=spent.noise_multiplier, sample_rate=spent.sample_rate, steps=spent.steps)
    except ConfigurationError:
        return None


def _site_claim(spent: SitePrivacy, declared_size: int, *, seeded: bool) -> SiteClaim:
    return SiteClaim(**spent.model_dump(), declared_size=declared_size, noise_source="seeded" if seeded else "os")


def _covered(study: Study) -> list[str]:
    rounds = study.rounds.count * study.evaluation.folds
    sent = "the sums of what sites sent" if study.distributed_noise else "the model updates that each site sent"
    covered = [f"{sent} in up to {rounds} rounds, and everything computed from them alone, the final model included"]
    if isinstance(study.strategy, PERSONAL):
        covered.append(
            "the models that each site keeps for itself, and what any metric of them says of training patients: every step that trains them is "
            "charged like one of the shared model"
        )
    if isinstance(study.strategy, QFedAvg):
        covered.append("the loss that each site sends with its update: a noised sum of losses clipped to [0, max_loss], charged as one step a round")
    if isinstance(study.strategy, Scaffold | FedDyn):
        covered.append("what each site keeps between rounds (strategy state): it is computed from its updates and from what it received")
    if study.privacy.evaluation_epsilon is not None:
        covered.append(
            "the test patients' statistics of the final model, released once by each site with discrete Gaussian noise: "
            f"epsilon {study.privacy.evaluation_epsilon:g} for any one test patient, apart from the training patients' epsilon"
        )
    return covered


def _not_covered(study: Study, privacy: RunPrivacy) -> list[str]:
    by_record = ["a patient with several records: the promise is for each record alone"] if study.privacy.unit == "record" else []
    exact = [EXACT_METRICS] if study.privacy.evaluation_epsilon is None else []
    view = View.of(study)
    colluding = [COLLUDING.format(few=f"more than {view.colluding}" if view.colluding else "any", sites=view.sites)] if view.shared else []
    return [*by_record, *colluding, *exact, *NOT_COVERED, _choice(privacy)]


def _choice(privacy: RunPrivacy) -> str:
    if not privacy.sites:
        return "choosing among several runs by their results"
    worst = max(privacy.sites.values(), key=lambda site: site.epsilon)
    return CHOICE.format(event=f"{worst.noise_multiplier:.6g},{worst.sample_rate:.6g},{worst.steps}", delta=worst.delta)


def _statement(study: Study, privacy: RunPrivacy, federation: FederationClaim | None) -> str:
    if privacy.seeded_noise:
        return (
            "The noise of this simulation was seeded and can be drawn again: it protects nobody. The numbers say what the same study would promise."
        )
    if federation is None:
        return "No site sent an update, so nothing was spent."
    unit = study.privacy.unit
    whom = f"any one {unit}, known to any number of the sites" if study.privacy.patients_overlap else f"any one {unit} of any one site"
    return (
        f"For {whom}: what the study's updates reveal would be nearly the same without that {unit}, in the sense of "
        f"({rounded_up(federation.epsilon)}, {federation.delta:g})-differential privacy at worst"
        f"{'' if study.privacy.patients_overlap else ', if hospitals share no patients'}.{_of_the_plan(privacy)}"
    )


def _of_the_plan(privacy: RunPrivacy) -> str:
    """For a run that stopped before its plan was used up."""
    planned = [
        site.epsilon_planned for site in privacy.sites.values() if site.epsilon_planned is not None and site.epsilon_planned > 1.01 * site.epsilon
    ]
    if not planned:
        return ""
    return (
        " Not all that was planned was spent. When a run stops may depend on the patients' data; the promise that holds whatever made "
        f"it stop is the whole plan's: epsilon {rounded_up(max(planned))} at each site at worst."
    )

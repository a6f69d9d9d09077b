"""The claim sheet of a run (NIST SP 800-226): what is promised to whom, by which mechanism, and what is not covered."""

from shared.results import PrivacyClaim, RunPrivacy, SiteClaim
from shared.study import Study

MECHANISM = (
    "DP-SGD: gradients of each unit clipped to L2 norm {clip:g} over all parameters, summed, Gaussian noise of noise_multiplier x {clip:g} added"
)
SAMPLING = {
    "patient": "Poisson: every training patient independently with the site's sample rate in every step; one record of each sampled patient",
    "record": "Poisson: every training record independently with the site's sample rate in every step",
}
COMPOSITION = "privacy loss distributions composed numerically over all steps of all rounds (dp-accounting, pessimistic); cross-check by Opacus' PRV"
NOT_COVERED = [
    "numbers of patients and of test patients at each site (exact in a simulation, declared in a deployment)",
    "evaluation metrics on test patients: exact sums, without noise; test patients are covered by no epsilon here",
    "baselines, which are trained beside the study",
    "the choice of settings by looking at results of earlier runs",
    "whether a site took part, refused or was late, and how long it took",
    "the low bits of floating-point noise",
]


def privacy_claim(study: Study, privacy: RunPrivacy, declared_sizes: dict[str, int], versions: dict[str, str]) -> PrivacyClaim:
    """The claim of a run. Without privacy it says that nothing is promised."""
    if not study.private:
        return PrivacyClaim(
            unit="none", neighbouring_relation=None, mechanism=None, sampling=None, composition=None, protects=False,
            statement="This run promises no differential privacy: every update was sent as it was.",
            covered=[], not_covered=["everything that left the sites"], accountants=[], sites={}, versions=versions,
        )  # fmt: skip
    rounds = study.rounds.count * study.evaluation.folds
    by_record = ["a patient with several records: the promise is for each record alone"] if study.privacy.unit == "record" else []
    return PrivacyClaim(
        unit=study.privacy.unit,
        neighbouring_relation=f"add or remove one {study.privacy.unit} of a site's training patients",
        mechanism=MECHANISM.format(clip=study.privacy.max_grad_norm),
        sampling=SAMPLING[study.privacy.unit],
        composition=COMPOSITION,
        statement=_statement(study, privacy),
        protects=not privacy.seeded_noise,
        covered=[
            f"the model updates that each site sent in up to {rounds} rounds, and everything computed from them alone, the final model included"
        ],
        not_covered=[*by_record, *NOT_COVERED],
        accountants=["dp-accounting PLD (add/remove one)", "Opacus PRV (cross-check)"],
        sites={
            name: SiteClaim(
                epsilon=spent.epsilon,
                delta=spent.delta,
                epsilon_cross_check=spent.epsilon_cross_check,
                noise_multiplier=spent.noise_multiplier,
                sample_rate=spent.sample_rate,
                steps=spent.steps,
                declared_size=declared_sizes[name],
                noise_source="seeded" if privacy.seeded_noise else "os",
            )
            for name, spent in privacy.sites.items()
        },
        versions=versions,
    )


def _statement(study: Study, privacy: RunPrivacy) -> str:
    if privacy.seeded_noise:
        return (
            "The noise of this simulation was seeded and can be drawn again: it protects nobody. The numbers say what the same study would promise."
        )
    if not privacy.sites:
        return "No site sent an update, so nothing was spent."
    worst = max(privacy.sites.values(), key=lambda site: site.epsilon)
    return (
        f"For any one {study.privacy.unit} of any one site: what the study's updates reveal would be nearly the same without that {study.privacy.unit}, "
        f"in the sense of ({worst.epsilon:.3g}, {worst.delta:g})-differential privacy at worst, if hospitals share no patients."
    )

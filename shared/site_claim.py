"""The part of a run's claim sheet that is about whole hospitals: what the coordinator's noise promises, to whom, against whom, and what it does not."""

from shared.results import SiteLevelClaim, SiteLevelPrivacy
from shared.strategy_options import PERSONAL
from shared.study import Study
from shared.whole_promise import rounded_up

RELATION = (
    "zero-out: one site's update replaced by zeros in every round, and all else the same (to replace it by another update counts as two such changes)"
)
MECHANISM = (
    "DP-FedAvg (McMahan et al. 2018): each site's update clipped to L2 norm {clip:g}{by}; the sum over the sites that answered, each counted once and alike, rounded to a "
    "public grid, with Gaussian noise of {noise:.4g} x {clip:g} (a little more, for the rounding) on the same grid, over the number of sites asked"
)
CLIPPED_BY = {False: "", True: " by the site's own installed code, what rounding adds included, before it is masked"}
SAMPLING = "none is counted on: every site is charged for every round, whether it was asked or not"
COMPOSITION = "privacy loss distributions composed numerically over all rounds (dp-accounting, pessimistic); the cross-check is by Renyi divergence (dp-accounting), which is wider"
ACCOUNTANTS = ["dp-accounting PLD (zero-out)", "dp-accounting RDP (zero-out)"]
COVERED = [
    "the model of every round and the final one, and whatever the coordinator computes of them: every hospital's part in them, with all of its patients",
    "a patient, with the patient's hospital: with one patient more or less a hospital sends another update, which counts as two changes of it",
]
PERSONAL_MODELS = "models that a site keeps for itself: they are trained on its patients without this noise, and must stay there"
NOT_COVERED = [
    "evaluation statistics, which a site lets out by its own policy, and the metrics made of them, also those that are shown by hospital",
    "which hospitals take part, their declared sizes, and whether one was asked, refused or was late",
    "baselines, which are trained beside the study",
    "other runs with the same hospitals: no ledger counts whole hospitals, so epsilons and deltas of all runs have to be added by hand",
]
ASSUMED = [
    "the coordinator runs this code unchanged and shows single updates to nobody; no hospital can check that from outside",
    "the number of sites, and who they are, is public",
]
ASSUMED_OF_SUMS = [
    "the coordinator runs this code unchanged and shows the sum of a round to nobody before its noise is in it; no hospital can check that from outside",
    "every site in a sum runs this code unchanged: its own installed code clips its update, and under masks the coordinator cannot see whether it did. A site "
    "that does not follow it is outside this promise, may move the model further than max_site_norm, and may undo the promise to others (by a sum that wraps)",
    "the number of sites, and who they are, is public",
]
NOISE = {
    False: "ChaCha20, with a key from the coordinator's operating system for every round, is taken for random",
    True: "the noise of this simulation follows from its seed, and protects nobody",
}


def site_level_claim(study: Study, spent: SiteLevelPrivacy, *, seeded: bool) -> SiteLevelClaim:
    """The promise to whole hospitals of a run that spent this."""
    personal = [PERSONAL_MODELS] if isinstance(study.strategy, PERSONAL) else []
    masked = study.secure_aggregation is not None
    return SiteLevelClaim(
        **spent.model_dump(),
        neighbouring_relation=RELATION,
        mechanism=MECHANISM.format(clip=spent.max_site_norm, by=CLIPPED_BY[masked], noise=spent.noise_multiplier),
        sampling=SAMPLING,
        composition=COMPOSITION,
        noise_source="seeded" if seeded else "os",
        protects=not seeded,
        statement=_statement(study, spent, seeded=seeded),
        covered=COVERED if spent.rounds else [],
        not_covered=[_coordinator(study), *personal, *NOT_COVERED],
        assumed=[NOISE[seeded], *(ASSUMED_OF_SUMS if masked else ASSUMED)],
    )


def _coordinator(study: Study) -> str:
    if study.secure_aggregation is not None:
        within = ", with that of the sites' promise to patients in it" if study.private else ""
        return f"anything against the coordinator, which gets the sum of each round before its own noise{within}, and no single update"
    kind = "with the noise of the site's own promise to patients" if study.private else "without any noise"
    return f"anything against the coordinator, which gets every site's update by itself, {kind}"


def _statement(study: Study, spent: SiteLevelPrivacy, *, seeded: bool) -> str:
    if seeded:
        return "The coordinator's noise was seeded and can be drawn again: it protects no hospital. The numbers say what the same study would promise to whole hospitals."
    if not spent.rounds:
        return "No round was completed, so no model was released and nothing was spent."
    alone = "" if study.private else " Nothing is promised to a patient against the coordinator."
    planned = (
        f" Not all that was planned was spent; the promise that holds whatever made the run stop is epsilon {rounded_up(spent.epsilon_planned)}."
        if spent.epsilon_planned > 1.01 * spent.epsilon
        else ""
    )
    return (
        "For any one hospital as a whole, against everybody but the coordinator: what the models of all rounds reveal would be nearly the same with nothing of that "
        f"hospital in them, in the sense of ({rounded_up(spent.epsilon)}, {spent.delta:g})-differential privacy.{planned}{alone}"
    )

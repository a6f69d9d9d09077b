"""How the patients of one cohort are divided among virtual sites. Deterministic from the seed; every minimum is held or refused by name.

Minima are held by construction (a floor is dealt out first, the rest is drawn), not by drawing again until it fits: nothing can loop.

Legend: P patients, K sites.
"""

import numpy as np
from numpy.typing import NDArray

from shared.cohort import Cohort, IntArray
from shared.errors import PartitionError
from shared.seeding import generator
from shared.study import Federation

MAX_ALPHA = 1e9  # beyond it all shares are equal, and a sum of gammas could overflow
NUM_QUANTILE_CLASSES = 5  # a label that is a number is skewed by these quantiles

Partition = dict[str, IntArray]  # site -> indices of its patients


def partition_cohort(cohort: Cohort, federation: Federation, *, seed: int) -> Partition:
    """Site -> patients, by the study's partition. Every patient is at exactly one site.

    Raises:
        PartitionError: the minima cannot be held; it says how many sites would work.
    """
    if federation.partition in ("natural", "column"):
        return _by_attribute(cohort, federation)
    num_sites = federation.sites if federation.sites is not None else 8
    check_minima(cohort, federation, num_sites)
    rng = generator(seed, "partition", federation.partition)
    match federation.partition:
        case "iid":
            parts = np.array_split(rng.permutation(cohort.num_patients), num_sites)
        case "dirichlet":
            parts = dirichlet_parts(classes_of(cohort), num_sites, federation, rng)
        case "quantity":
            parts = quantity_parts(cohort.num_patients, num_sites, federation, rng)
        case _:
            classes = classes_of(cohort)
            parts = top_up(shard_parts(classes, num_sites, federation.shards_per_site, rng), classes, federation)
    width = len(str(num_sites))
    return {f"site-{index + 1:0{width}d}": np.sort(part) for index, part in enumerate(parts)}


def check_minima(cohort: Cohort, federation: Federation, num_sites: int) -> None:
    """Return where K sites can each have the least number of patients, and of each class where the partition can choose.

    Raises:
        PartitionError: they cannot; it says how many sites could.
    """
    patients = cohort.num_patients
    by_class = federation.partition == "dirichlet" and federation.min_per_class > 0
    scarcest = int(np.bincount(classes_of(cohort)).min()) if by_class else patients
    possible = min(patients // federation.min_patients, scarcest // max(federation.min_per_class, 1) if by_class else num_sites)
    if num_sites * federation.min_patients > patients:
        remedy = f"at most {possible} sites would work" if possible else "give more patients"
        raise PartitionError(
            f"federation.sites: expected at least {federation.min_patients} patients at each of {num_sites} sites, got {patients} patients in all",
            f"{remedy}, or lower federation.min_patients",
        )
    if by_class and num_sites * federation.min_per_class > scarcest:
        raise PartitionError(
            f"federation.sites: expected at least {federation.min_per_class} patients of each class at each of {num_sites} sites, got {scarcest} of the rarest class",
            f"at most {possible} sites would work at any alpha, or set federation.min_per_class = 0"
            if possible
            else "set federation.min_per_class = 0",
        )


def classes_of(cohort: Cohort) -> IntArray:
    """`(P,)` class of each patient's first record; a number is cut at quantiles.

    Raises:
        PartitionError: the label is not one value for each record.
    """
    labels = cohort.label_of_patient()
    if labels.ndim != 1:
        raise PartitionError("federation.partition: expected a label of one value for a partition by label, got a tensor", "use 'iid' or 'quantity'")
    if np.issubdtype(labels.dtype, np.floating) and len(np.unique(labels)) > 2:
        numbers = labels.astype(np.float64)
        labels = np.searchsorted(np.quantile(numbers, np.linspace(0, 1, NUM_QUANTILE_CLASSES + 1)[1:-1]), numbers)
    return np.asarray(np.unique(labels, return_inverse=True)[1], dtype=np.int64)


def dirichlet_parts(classes: IntArray, num_sites: int, federation: Federation, rng: np.random.Generator) -> list[IntArray]:
    """Label skew (Hsu, Qi, Brown 2019): each class is divided by its own draw from Dirichlet(alpha), after the minima are dealt out."""
    parts: list[list[int]] = [[] for _ in range(num_sites)]
    for label in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == label))
        floor = np.full(num_sites, federation.min_per_class)
        shares = draw_shares(federation.alpha, num_sites, rng)
        counts = floor + largest_remainder(shares, len(members) - int(floor.sum()))
        for part, chunk in zip(parts, np.split(members, np.cumsum(counts)[:-1]), strict=True):
            part.extend(chunk.tolist())
    return top_up([np.array(part, dtype=np.int64) for part in parts], classes, federation)


def top_up(parts: list[IntArray], classes: IntArray, federation: Federation) -> list[IntArray]:
    """Move patients from the largest sites to those below `min_patients`; at most one move a missing patient, and no class minimum is broken."""
    while len(smallest := min(parts, key=len)) < federation.min_patients:
        largest = max(range(len(parts)), key=lambda index: len(parts[index]))
        donor = parts[largest]
        commonest = np.bincount(classes[donor]).argmax()
        position = int(np.flatnonzero(classes[donor] == commonest)[-1])
        receiver = next(index for index, part in enumerate(parts) if part is smallest)
        parts[receiver] = np.append(smallest, donor[position])
        parts[largest] = np.delete(donor, position)
    return parts


def quantity_parts(num_patients: int, num_sites: int, federation: Federation, rng: np.random.Generator) -> list[IntArray]:
    """Sizes by one draw from Dirichlet(alpha) above the minimum; patients at random."""
    spare = num_patients - num_sites * federation.min_patients
    counts = federation.min_patients + largest_remainder(draw_shares(federation.alpha, num_sites, rng), spare)
    return list(np.split(rng.permutation(num_patients), np.cumsum(counts)[:-1]))


def shard_parts(classes: IntArray, num_sites: int, shards_per_site: int, rng: np.random.Generator) -> list[IntArray]:
    """Patients sorted by class, cut into K x s shards, s dealt to each site (McMahan et al. 2017, section 3)."""
    shuffled = rng.permutation(len(classes))
    ordered = shuffled[np.argsort(classes[shuffled], kind="stable")]
    shards = np.array_split(ordered, num_sites * shards_per_site)
    dealt = rng.permutation(len(shards)).reshape(num_sites, shards_per_site)
    return [np.concatenate([shards[index] for index in row]) for row in dealt]


def draw_shares(alpha: float, num_sites: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A draw from Dirichlet(alpha, ..., alpha), `(K,)`; where every gamma underflows (a tiny alpha) one site takes all."""
    gammas = rng.standard_gamma(min(alpha, MAX_ALPHA), size=num_sites)
    total = gammas.sum()
    if not total > 1e-300:
        return np.asarray(np.eye(num_sites)[rng.integers(num_sites)])
    return np.asarray(gammas / total)


def largest_remainder(shares: NDArray[np.float64], total: int) -> IntArray:
    """Whole numbers `(K,)` that add up to `total`, as near to shares x total as can be."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:left]] += 1
    return counts


def _by_attribute(cohort: Cohort, federation: Federation) -> Partition:
    name = "site" if federation.partition == "natural" else str(federation.column)
    if name not in cohort.attributes:
        known = ", ".join(sorted(cohort.attributes)[:8]) or "none"
        what = "data that name their hospitals" if name == "site" else f"an attribute {name!r}"
        raise PartitionError(
            f"federation.partition {federation.partition!r}: expected {what}, got attributes: {known}",
            "choose another partition, for example 'iid', or another column",
        )
    values = cohort.attributes[name]
    kinds, first, kind = np.unique(values, return_index=True, return_inverse=True)
    of_kind = np.split(np.argsort(kind, kind="stable"), np.cumsum(np.bincount(kind))[:-1])
    parts = {str(kinds[number]): of_kind[number] for number in np.argsort(first)}  # in the order in which they first occur
    if len(parts) * federation.min_patients > cohort.num_patients:
        raise PartitionError(
            f"federation.partition {federation.partition!r}: expected at least {federation.min_patients} patients at every site, got {len(parts)} sites for {cohort.num_patients} patients",
            "choose a column with few values, or lower federation.min_patients",
        )
    small = [site for site, part in parts.items() if len(part) < federation.min_patients]
    if small:
        raise PartitionError(
            f"federation.partition {federation.partition!r}: expected at least {federation.min_patients} patients at every site, got fewer at {', '.join(small[:5])}",
            "lower federation.min_patients, or leave these out of the data",
        )
    return parts

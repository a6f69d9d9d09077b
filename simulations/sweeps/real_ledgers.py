"""A sweep over real sites: every cell is a release to be charged, so it begins only where every site's budget covers all of them."""

from client.ledger import Ledger, reading
from client.site import Site
from shared.errors import BudgetExhaustedError
from shared.privacy import filter_order, renyi_budget, renyi_divergence, renyi_epsilon
from shared.study import Study
from shared.task import resolve_task
from simulations.federation import real_sites, resolve_delta
from simulations.site_files import site_files
from simulations.sweeps.folder import SweepFolder
from simulations.sweeps.grid import Cell


def check_ledgers(folder: SweepFolder) -> None:
    """Return where the sites are virtual, or each one's ledger has room for every cell that is still to be run, as its filter counts.

    Raises:
        BudgetExhaustedError: a site has not; nothing was charged.
    """
    files = site_files(folder.data)
    waiting = folder.waiting()
    if not files or not waiting:
        return
    task = resolve_task(waiting[0].study.task)
    sites = real_sites(files, task)
    try:
        for site in sites.values():
            _check_site(site, waiting, [other.settings.declared_size for other in sites.values()])
    finally:
        for site in sites.values():
            site.close()


def _check_site(site: Site, cells: list[Cell], sizes: list[int]) -> None:
    limit, path = site.settings.limit, site.settings.ledger_path
    if limit is None:
        return
    order, spent = filter_order(limit.epsilon, limit.delta), {"training": 0.0, "evaluation": 0.0}
    if path.is_file():
        with reading(path) as ledger:
            order, spent = _spent(ledger, order)
    asked = dict(spent)
    for cell in cells:
        training, evaluation = site.plan_of(_as_real(cell.study, sizes))
        for name, event in (("training", training), ("evaluation", evaluation)):
            asked[name] += 0.0 if event is None else renyi_divergence(event, order)
    budget = renyi_budget(limit.epsilon, order=order, delta=limit.delta)
    for name, total in asked.items():
        if total > budget and total > spent[name]:
            before, after = (renyi_epsilon(value, order=order, delta=limit.delta) if value else 0.0 for value in (spent[name], total))
            raise BudgetExhaustedError(
                f"site {site.settings.name}: expected a budget for all {len(cells)} cells, each of which is a release: at most epsilon {limit.epsilon:g} at "
                f"delta {limit.delta:g} ({name} patients), spent {before:.3g}, with the whole sweep {after:.3g}",
                "sweep over virtual sites, over fewer settings, or with less epsilon in each; 'wardround privacy explain SWEEP' says what a sweep costs",
                rule="policy.max_epsilon",
            )


def _spent(ledger: Ledger, order: float) -> tuple[float, dict[str, float]]:
    genesis = ledger.account.genesis
    own = order if genesis is None or genesis.order is None else genesis.order
    if genesis is None or genesis.order is None:
        return own, {"training": 0.0, "evaluation": 0.0}
    return own, {"training": ledger.account.divergence("training"), "evaluation": ledger.account.divergence("evaluation")}


def _as_real(study: Study, sizes: list[int]) -> Study:
    resolved = resolve_delta(study, sizes)
    return resolved.replace(privacy={"noise_source": "os"}) if resolved.private else resolved

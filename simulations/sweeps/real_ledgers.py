"""A sweep over real sites: every cell is a release to be charged, so it begins only where every site's budget covers all of them."""

from shared.errors import BudgetExhaustedError
from shared.study import Study
from shared.task import resolve_task
from simulations.federation import real_sites, resolve_delta
from simulations.site_files import site_files
from simulations.sweeps.folder import SweepFolder


def check_ledgers(folder: SweepFolder) -> None:
    """Return where the sites are virtual, or each one's ledger has room for every cell that is still to be run, by its own filter.

    Raises:
        BudgetExhaustedError: a site's has not; nothing was charged.
    """
    files, waiting = site_files(folder.data), folder.waiting()
    if not files or not waiting:
        return
    sites = real_sites(files, resolve_task(waiting[0].study.task))
    sizes = [site.settings.declared_size for site in sites.values()]
    try:
        for site in sites.values():
            try:
                site.check_room_for([_as_real(cell.study, sizes) for cell in waiting])
            except BudgetExhaustedError as error:
                raise BudgetExhaustedError(
                    f"site {site.settings.name}: expected a budget for all {len(waiting)} cells, each of which is a release: {error.what}",
                    "sweep over virtual sites, over fewer settings, or with less epsilon in each; 'wardround privacy explain SWEEP' says what a sweep costs",
                    rule=error.rule,
                ) from None
    finally:
        for site in sites.values():
            site.close()


def _as_real(study: Study, sizes: list[int]) -> Study:
    resolved = resolve_delta(study, sizes)
    return resolved.replace(privacy={"noise_source": "os"}) if resolved.private else resolved

"""The risk table of a final model: what it said, by bands of risk, and what came true."""

import math

from shared.metrics import RiskBand, risk_bands
from wardround.report.charts import MIN_GROUP_PATIENTS
from wardround.report.document import Grid
from wardround.report.judged import judged
from wardround.report.run_files import RunFiles
from wardround.report.statistics import drawable
from wardround.report.tables import Cell, Row, Table
from wardround.report.wording import DASH, count, number

NOTE = (
    "{whose}. Below the observed share stands its 95 % interval (Wilson 1927). Acting from a band on: the share of "
    "all positives that are in this band or a higher one, and the share of positives among all patients there. Bands of fewer than four patients show no share."
)


def risk_grid(run: RunFiles) -> Grid | None:
    """Predicted against observed by band of risk; None where the task has no chances, or they carry noise."""
    histogram = drawable(run, "score_histogram").get("federated")
    if histogram is None:
        return None
    bands = risk_bands(histogram)
    rows = tuple(_row(band, bands[place:], float(histogram[1].sum())) for place, band in enumerate(bands))
    table = Table(
        heads=("Patients", "Predicted, mean", "Observed", "Positives found from here on", "Positive of those"),
        rows=rows,
        note=NOTE.format(whose=judged(run.study).at_risk),
    )
    return Grid(table=table, caption="Risk table", corner="Predicted risk")


def _row(band: RiskBand, from_here: list[RiskBand], num_positive: float) -> Row:
    patients, positives = round(band.patients), round(band.positives)
    name = f"{band.low:.0%} to {band.high:.0%}".replace("%", " %")
    known = patients >= MIN_GROUP_PATIENTS
    low, high = _interval(positives, patients) if known else (0.0, 1.0)
    found, above = sum(other.positives for other in from_here), sum(other.patients for other in from_here)
    return Row(
        name=name,
        cells=(
            Cell(text=count(patients)),
            Cell(text=number(band.mean) if patients else DASH),
            Cell(text=number(positives / patients), below=f"{number(low)} to {number(high)}") if known else Cell(text=DASH),
            Cell(text=number(found / num_positive) if num_positive else DASH),
            Cell(text=number(found / above) if round(above) >= MIN_GROUP_PATIENTS else DASH),
        ),
    )


def _interval(positives: int, patients: int) -> tuple[float, float]:
    """Of a share, at 95 %: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference"."""
    share, z = positives / patients, 1.959964
    middle, scale = share + z**2 / (2 * patients), 1 + z**2 / patients
    reach = z * math.sqrt(share * (1 - share) / patients + z**2 / (4 * patients**2))
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)

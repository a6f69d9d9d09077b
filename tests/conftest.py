"""What every test may use. Telemetry and update checks are switched off before flwr is imported anywhere."""

import os
import warnings

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors as small as ours two threads wait for each other, worst where cores are shared

from hypothesis import HealthCheck, settings

with warnings.catch_warnings():  # what other packages say while they are imported is not ours to mend; what they say afterwards is an error
    warnings.simplefilter("ignore")
    import typer  # noqa: F401

settings.register_profile(
    "wardround", derandomize=True, database=None, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("wardround")

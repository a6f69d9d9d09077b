"""The Flower ServerApp: the coordinator's loop, given whatever grid carries its messages."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.coordinator import Coordinator

app = ServerApp()  # of a deployment: named in the bundle of every study


@app.main()
def _deployed(grid: Grid, context: Context) -> None:
    from flwr.superlink.grid import HttpGrid  # with these come parts of Flower that a simulation need not wait for

    from server.deployed_run import run_deployed
    from shared.bundle import RUN

    assert isinstance(grid, HttpGrid), "a deployed run is started by Flower's SuperExec"
    run_deployed(grid, str(context.run_config[RUN]))


def server_app(coordinator: Coordinator) -> ServerApp:
    """The app that runs one study in this process; what it comes to is in `coordinator.history`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinator.run(grid)

    return app

"""The Flower ServerApp: the coordinator's loop, given whatever grid carries its messages."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.coordinator import Coordinator


def server_app(coordinator: Coordinator) -> ServerApp:
    """The app that runs one study; what it comes to is in `coordinator.history`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        coordinator.run(grid)

    return app

"""MLflow: one of its runs for each of ours."""

from collections.abc import Mapping
from typing import Any

from mlflow.tracking import MlflowClient


class MLflow:
    """Tells MLflow.

    Args:
        uri: of its store, such as "sqlite:///mlflow.db" or a server's address; its own default if empty.
        experiment: that the runs belong to; made if it is not there.
    """

    def __init__(self, uri: str = "", experiment: str = "adapterzoo") -> None:
        self._uri, self._experiment = uri, experiment

    def start(self, label: str, run: Mapping[str, Any]) -> None:
        """Begin a run of theirs, with our run's content as parameters."""
        self._client = MlflowClient(tracking_uri=self._uri or None)
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self._run = self._client.create_run(experiment, run_name=label, tags={"adapterzoo.run": run["id"]}).info.run_id
        for name, value in {**run, **run["task"], "task": run["task"]["name"]}.items():
            self._client.log_param(self._run, name, str(value)[:500])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points."""
        for name, value in metrics.items():
            self._client.log_metric(self._run, name, value, step=step)

    def finish(self, status: str, metrics: Mapping[str, float]) -> None:
        """Add the final metrics, and end it."""
        for name, value in metrics.items():
            self._client.log_metric(self._run, f"final/{name}", value)
        self._client.set_terminated(self._run, "FINISHED" if status == "done" else "FAILED")

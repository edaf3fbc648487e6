"""Numbers on their way to MLflow: what a run folder has beyond the cursor, in batches, each point once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_plasticity.tracking.mlflow_content import RunContent
from megatron_plasticity.tracking.mlflow_cursor import Cursor, Measurement
from megatron_plasticity.tracking.mlflow_models import is_headline

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_PER_BATCH = 1000
"""MLflow's limit of one request."""


def send_metrics(client: MlflowClient, cursor: Cursor, content: RunContent, answered: Callable[[], None]) -> Cursor:
    """Send what the files of metrics hold beyond `cursor`; returns where that leads. `answered` is called for each batch that the
    server has taken.

    Where it is in doubt what arrived, or a resumed run has rewritten a file, the store is asked which steps it has.
    """
    known, read_before = {}, dict(cursor.positions)
    if cursor.sending or not cursor.goes_on(content.folder):
        known = _known_steps(client, cursor.run_id)
        cursor = Cursor(cursor.run_id, doubtful=cursor.doubtful)
        cursor.take([Measurement(name, 0.0, 0.0, max(known[name])) for name in content.results if known.get(name)])
    new = cursor.take_new(content.folder, known)
    if new:
        _send(client, cursor, content, new, None, answered)
    elif cursor.positions != read_before:
        cursor.write(content.folder)
    return cursor


def send_results(
    client: MlflowClient, cursor: Cursor, content: RunContent, model_id: str | None, answered: Callable[[], None]
) -> None:
    """Send the scalars of the results that are not there yet. Headlines are put on the model with MLflow's id `model_id` as well,
    so that the table of models has them."""
    step = last_step(cursor, content)
    missing = {name: value for name, value in content.results.items() if name not in cursor.steps}
    new = cursor.take(Measurement(name, value, content.finished or 0.0, step) for name, value in missing.items())
    if new:
        _send(client, cursor, content, new, model_id, answered)


def last_step(cursor: Cursor, content: RunContent) -> int:
    """The last step that a metric was measured at; 0 for a run without steps."""
    return max((step for name, step in cursor.steps.items() if name not in content.results), default=0)


def parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    """`items` in lists of `size` and a last, shorter one."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _send(
    client: MlflowClient,
    cursor: Cursor,
    content: RunContent,
    new: list[Measurement],
    model_id: str | None,
    answered: Callable[[], None],
) -> None:
    from mlflow.entities import Metric

    cursor.sending = True
    cursor.write(content.folder)
    for part in parts(new, METRICS_PER_BATCH):
        metrics = [
            Metric(m.name, m.value, round(m.time * 1000), m.step, model_id=model_id if is_headline(m.name) else None)
            for m in part
        ]
        client.log_batch(cursor.run_id, metrics=metrics, synchronous=True)
        answered()
    cursor.sending = False
    cursor.write(content.folder)


def _known_steps(client: MlflowClient, run_id: str) -> dict[str, set[int]]:
    """Metric → the steps of it that the store has."""
    metrics = client.get_run(run_id).data.metrics
    return {name: {metric.step for metric in client.get_metric_history(run_id, name)} for name in metrics}

"""Tells people what became of an attempt: a summary beside its journal, in its MLflow run, and by webhook."""

import os

from components.scratch import scratch
from components.storage import Location
from pipeline.context import Reporter
from pipeline.errors import RegistryError
from pipeline.retraining.checks import PICTURE
from pipeline.retraining.config import RetrainConfig
from pipeline.retraining.summary import AttemptSummary, to_markdown, to_payload
from pipeline.retraining.webhook import post
from pipeline.tracking import connect

MARKDOWN, RECORD, ARTIFACTS = "summary.md", "summary.json", "retrain"
SECRET = "DDPM_WEBHOOK_SECRET"


def report(
    summary: AttemptSummary, config: RetrainConfig, *, place: Location, outbox: Location, storage: Location, run_id: str | None, reporter: Reporter
) -> str:
    """Writes the summary, logs it to the run, sends it; returns the Markdown file. What cannot be told is a warning: the attempt is what it is.

    Args:
        place: folder for the summary: the attempt's, or that of calls that made none.
        outbox: folder of messages that have not arrived.
        run_id: the attempt's run, None where it has none.
    """
    (place / RECORD).write_text(summary.model_dump_json(indent=2) + "\n")
    (place / MARKDOWN).write_text(to_markdown(summary))
    if run_id is not None:
        try:
            _log(place, storage, run_id)
        except RegistryError as error:
            reporter.line(f"  [yellow]warning[/] the run has no summary: {error}")
    if config.webhook is not None:
        sending = post(outbox, config.webhook, to_payload(summary), secret=os.environ.get(SECRET))
        for delivery in sending.wait():
            if delivery.outcome != "delivered":
                reporter.line(f"  [yellow]warning[/] {delivery.said}")
    return str(place / MARKDOWN)


def _log(place: Location, storage: Location, run_id: str) -> None:
    with scratch("summary") as folder:
        for name in (MARKDOWN, RECORD, PICTURE):
            if (place / name).is_file():
                (folder / name).write_bytes((place / name).read_bytes())
        connect(storage).log_files(run_id, Location.of(folder), ARTIFACTS)

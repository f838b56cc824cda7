"""The view of an experiment that ranks its runs by the number that decides.

MLflow keeps views that people share as tags of the experiment; nobody documents their format, so that a view is an offer: where a version
of MLflow reads it otherwise, its pages are what they are without it.
"""

import json
import re

from pipeline.artifacts import Evaluation
from pipeline.training.metrics_relay import PICTURES_KEY

VIEW_TAG = "mlflow.sharedViewState."
MOST_CHARACTERS = 5000
"""What a database keeps of a tag."""
MOST_COLUMNS = 12


def view_key(evaluation: Evaluation) -> str:
    """Returns the end of the view's address; numbers of other names are ranked in views of their own."""
    return "leaderboard-" + re.sub("[^A-Za-z0-9_-]", "-", evaluation.metric.name)


def view(evaluation: Evaluation, now_ms: int) -> str | None:
    """Returns the view as MLflow's page reads it; None where it would not fit."""
    name = evaluation.metric.name
    others = [f"eval/{metric.name}" for metric in (*evaluation.guards, *evaluation.scores)]
    metrics = [f"eval/{name}", f"eval/{name}_jackknifed", *others, "eval/copy_rate"][:MOST_COLUMNS]
    columns = ["attributes.`Dataset`", "attributes.`Models`", *(f"metrics.`{metric}`" for metric in metrics)]
    state = _ranking(columns) | _charts(f"eval/{name}")
    text = json.dumps({"name": f"Leaderboard: {name}", "createdAt": now_ms, "updatedAt": now_ms, "state": json.dumps(state)})
    return text if len(text) <= MOST_CHARACTERS else None


def _ranking(columns: list[str]) -> dict[str, object]:
    """Returns the table: the third column's runs from the smallest value on."""
    return {
        "searchFilter": "",
        "orderByKey": columns[2],
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "runsHiddenMode": "FIRST_10_RUNS",
        "hideEmptyCharts": True,
    }


def _charts(metric: str) -> dict[str, object]:
    """Returns the charts: the number of every run, and what its samples looked like from step to step, without the settings above them."""
    card = {"runsCountToCompare": 10, "deleted": False, "isGenerated": False, "metricSectionId": "leaderboard"}
    charts = [
        card | {"uuid": "deciding", "type": "BAR", "metricKey": metric, "displayName": metric},
        card | {"uuid": "samples", "type": "IMAGE", "imageKeys": [PICTURES_KEY], "step": 0, "showRunParams": False, "displayName": "Samples"},
    ]
    section = {"uuid": "leaderboard", "name": "Leaderboard", "display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"compareRunCharts": charts, "compareRunSections": [section], "isAccordionReordered": True}

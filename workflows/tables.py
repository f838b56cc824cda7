"""What the command prints for people: the summary of a run, the settings, the models."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from pipeline.artifacts import Evaluation, Metric, Registration, ShardSet, StageName, TrainedModel
from pipeline.config import RunConfig, config_digest, section_fields
from pipeline.run import StageReport


def print_summary(out: IO[str], reports: Mapping[StageName, StageReport], name: str, config: RunConfig) -> None:
    """Prints stages, times and results, and where to look."""
    console = Console(file=out, highlight=False, force_terminal=out.isatty(), width=None if out.isatty() else 140)
    table = Table(title=f"run {name}", title_justify="left")
    for column in ("stage", "time", "result"):
        table.add_column(column, overflow="fold")
    for stage, report in reports.items():
        table.add_row(stage, "skipped" if report.skipped else f"{report.seconds:.1f} s", _result(report))
    console.print(table)
    for line in _where_to_look(reports, config):
        console.print(line, soft_wrap=True, markup=False)


def _result(report: StageReport) -> str:
    receipt = report.receipt
    if isinstance(receipt, ShardSet):
        bad = f", {receipt.num_quarantined} quarantined" if receipt.num_quarantined else ""
        held_out = f", {receipt.num_rows - receipt.num_train} of them held out" if receipt.num_rows > receipt.num_train else ""
        known = f", {receipt.num_listed - receipt.num_opened} known before" if receipt.num_opened and receipt.num_opened < receipt.num_listed else ""
        return f"{receipt.num_rows} images{held_out} in {receipt.num_shards} shards{bad}{known}, dataset {receipt.digest}"
    if isinstance(receipt, TrainedModel):
        return f"{receipt.steps} steps, loss {receipt.loss:.4g}, {receipt.images_per_second:.0f} images/s, {receipt.num_workers} workers, {receipt.precision}"
    if isinstance(receipt, Evaluation):
        return ", ".join(f"{metric.name} = {metric.value:.4g}{_error(metric)}" for metric in (receipt.metric, *receipt.guards))
    assert isinstance(receipt, Registration)
    return f"{receipt.model_name} version {receipt.version}{', champion' if receipt.promoted else ''}: {receipt.decision}"


def _error(metric: Metric) -> str:
    return "" if metric.standard_error is None else f" ± {1.96 * metric.standard_error:.2g}"


def _where_to_look(reports: Mapping[StageName, StageReport], config: RunConfig) -> list[str]:
    lines = []
    for report in reports.values():
        if isinstance(report.receipt, ShardSet) and report.receipt.num_quarantined:
            lines.append(f"quarantine  {report.receipt.path}/quarantine.parquet")
        if isinstance(report.receipt, Evaluation):
            lines += [f"samples     {report.receipt.grid}", f"everything  {report.receipt.report}"]
        if isinstance(report.receipt, Registration):
            storage = "" if config.cluster.storage == "./storage" else f" --storage {config.cluster.storage}"
            lines += [f"pages       ddpm ui{storage}", f"more        ddpm sample models:/{report.receipt.model_name}@champion --num 64 --out grid.png{storage}"]
    return lines


def print_config(config: RunConfig) -> None:
    """Prints every setting as YAML, its meaning as a comment, and the digest."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        lines += [f"# {type(config).model_fields[section].description}", f"{section}:"]
        for key, value in values.items():
            lines += [f"  # {section_fields(section)[key].description}", f"  {key}: {json.dumps(value)}"]
        lines.append("")
    sys.stdout.write("\n".join([*lines, f"# digest {config_digest(config)} (of all but the cluster section)", ""]))


def print_models(out: IO[str], models: Sequence[Mapping[str, Any]]) -> None:
    """Prints registered models with their versions."""
    console = Console(file=out, highlight=False, force_terminal=out.isatty(), width=None if out.isatty() else 140)
    if not models:
        console.print("no models yet; ddpm run digits makes one")
    for model in models:
        table = Table(title=str(model["name"]), title_justify="left")
        for column in ("version", "aliases", "metric", "value", "run", "decision"):
            table.add_column(column, overflow="fold")
        for version in model["versions"]:
            value = "" if version["value"] is None else f"{version['value']:.4g}"
            table.add_row(str(version["version"]), ", ".join(version["aliases"]), version["metric"], value, version["run"], version["decision"])
        console.print(table)

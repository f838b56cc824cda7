"""What the command prints for people: the summary of a run, the settings, the models."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import IO
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from cluster.nodes import count
from components.counts import counted
from pipeline.artifacts import Evaluation, Metric, Registration, ShardSet, StageName, TrainedModel
from pipeline.config import RunConfig, config_digest, section_fields
from pipeline.registry.browse import VersionDiff, VersionFacts
from pipeline.registry.move import Move
from pipeline.run import StageReport
from pipeline.sweeping.results import SweepResult
from pipeline.tracking import public_uri, ui_fragment

LONG_S = 5.0


def print_summary(out: IO[str], reports: Mapping[StageName, StageReport], name: str, config: RunConfig, *, all_parts: bool = False) -> None:
    """Prints stages, their times with those of their longer parts, their results, and where to look.

    Args:
        all_parts: print the times of the shorter parts, too.
    """
    planned = any(report.planned_seconds is not None for report in reports.values())
    console, table = console_for(out), table_of(f"run {name}", "stage", "time", *(["planned"] if planned else []), "result")
    shards = reports["preprocess"].receipt if "preprocess" in reports else None
    noun = shards.space.noun if isinstance(shards, ShardSet) else "row"
    for stage, report in reports.items():
        beside = [] if not planned else ["" if report.planned_seconds is None else f"{report.planned_seconds:.1f} s"]
        table.add_row(stage, "skipped" if report.skipped else f"{report.seconds:.1f} s", *beside, _result(report, noun))
        for what, seconds in report.parts.items():
            if all_parts or seconds >= LONG_S:
                table.add_row("", f"{seconds:.1f} s", *([""] if planned else []), f"  {what}", style="dim")
    console.print(table)
    for line in _where_to_look(reports, config):
        console.print(line, soft_wrap=True, markup=False)


def print_sweep(out: IO[str], result: SweepResult) -> None:
    """Prints the trials of a sweep, the best one marked, and where its picture is."""
    keys = list(dict.fromkeys(key for trial in result.trials for key in trial.settings))
    numbers = list(dict.fromkeys([result.decides, result.metric]))
    table = table_of(f"sweep {result.name}", "run", *keys, "steps", *numbers, "state")
    for trial in result.trials:
        values = [trial.decided_by, trial.value][: len(numbers)]
        said = [_setting(trial.settings.get(key)) for key in keys] + [str(trial.steps), *("" if value is None else f"{value:.5g}" for value in values)]
        is_best = trial.trial == result.best
        table.add_row(
            trial.run, *said, "best" if is_best else f"{trial.state}{f': {trial.failure}' if trial.failure else ''}", style="bold" if is_best else None
        )
    console = console_for(out)
    console.print(table)
    if result.limit is not None:
        console.print(result.limit, soft_wrap=True, markup=False)


def _setting(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _result(report: StageReport, noun: str) -> str:
    receipt = report.receipt
    if isinstance(receipt, ShardSet):
        return _dataset(receipt)
    if isinstance(receipt, TrainedModel):
        how = f"{count(receipt.num_workers, 'worker')}, {receipt.precision}"
        if receipt.loss is None:
            return f"trained elsewhere: {receipt.start}"
        return f"{counted(receipt.steps, 'step')}, loss {receipt.loss:.4g}, {receipt.images_per_second:.0f} {noun}s/s, {how}"
    if isinstance(receipt, Evaluation):
        return ", ".join(f"{metric.name} = {metric.value:.4g}{_error(metric)}" for metric in (receipt.metric, *receipt.guards))
    assert isinstance(receipt, Registration)
    return f"{receipt.model_name} version {receipt.version}{', champion' if receipt.promoted else ''}: {receipt.decision}"


def _dataset(receipt: ShardSet) -> str:
    if receipt.space.kind == "latents":
        return f"{_images(receipt)}, {receipt.num_decoded} encoded now, {receipt.space.description} in {counted(receipt.num_shards, 'shard')}"
    bad = f", {receipt.num_quarantined} quarantined" if receipt.num_quarantined else ""
    known = f", {receipt.num_listed - receipt.num_opened} known before" if receipt.num_opened and receipt.num_opened < receipt.num_listed else ""
    return f"{_images(receipt)} in {counted(receipt.num_shards, 'shard')}{bad}{known}, dataset {receipt.digest}"


def _images(receipt: ShardSet) -> str:
    held_out = receipt.num_rows - receipt.num_train
    if receipt.holdout_split is not None:
        return f"{counted(receipt.num_train, receipt.space.noun)} of split {receipt.source_split}, {held_out} of {receipt.holdout_split} held out"
    split = "" if receipt.source_split is None else f" of split {receipt.source_split}"
    return f"{counted(receipt.num_rows, receipt.space.noun)}{split}{f', {held_out} of them held out' if held_out else ''}"


def _error(metric: Metric) -> str:
    return "" if metric.standard_error is None else f" ± {1.96 * metric.standard_error:.2g}"


def _where_to_look(reports: Mapping[StageName, StageReport], config: RunConfig) -> list[str]:
    lines = []
    for report in reports.values():
        if isinstance(report.receipt, ShardSet) and report.receipt.num_quarantined and report.receipt.space.kind != "latents":
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
            lines += [f"  # {' '.join(str(section_fields(section)[key].description).split())}", f"  {key}: {json.dumps(value)}"]
        lines.append("")
    sys.stdout.write("\n".join([*lines, f"# digest {config_digest(config)} (of all but the sections retrain and cluster)", ""]))


def console_for(out: IO[str]) -> Console:
    """Returns a console for a person where the output is a terminal, 140 columns wide elsewhere."""
    return Console(file=out, highlight=False, force_terminal=out.isatty(), width=None if out.isatty() else 140)


def table_of(title: str, *columns: str) -> Table:
    """Returns a table without rows."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_models(out: IO[str], models: Mapping[str, Sequence[VersionFacts]]) -> None:
    """Prints registered models with their versions."""
    console = console_for(out)
    if not models:
        console.print("no models yet; ddpm run digits makes one")
    for name, versions in models.items():
        table = table_of(name, "version", "aliases", "metric", "value", "run", "decision")
        for version in versions:
            name_of = version.metric.name if version.metric else ""
            table.add_row(str(version.version), ", ".join(version.aliases), name_of, _value(version.metric), version.run or "", version.decision or "")
        console.print(table)


def _value(metric: Metric | None) -> str:
    return "" if metric is None else f"{metric.value:.4g}{_error(metric)}"


def print_version(out: IO[str], facts: VersionFacts, moves: Sequence[Move], uri: str) -> None:
    """Prints all that is known of a version, the moves that concern it, and how to use it."""
    console, tags = console_for(out), facts.tags
    table = table_of(f"{facts.name} {facts.label}", "", "")
    table.show_header = False
    unit = facts.metric.unit if facts.metric else None
    rows = {
        "metric": f"{facts.metric.name} = {_value(facts.metric)}, lower is better; intervals of 95 %" if facts.metric else "none",
        "unit": f"{counted(unit.num_samples, 'sample')} from seed {unit.first_seed}, {unit.drawn_by}, "
        f"against {counted(unit.reference_count, 'image')} of {unit.reference_digest}"
        if unit
        else "",
        "decision": facts.decision or "none yet",
        "memorisation": tags.get("memorisation.verdict", ""),
        "dataset": f"{tags['dataset.digest']}: {_rows(tags)}, {tags.get('dataset.quarantined', '?')} quarantined" if "dataset.digest" in tags else "",
        "source": tags.get("dataset.source", ""),
        "run": f"{facts.run or ''} ({facts.run_id})" if facts.run_id else "",
        "weights": f"{tags['weights.average']} of {tags.get('weights.checkpoint')}" if "weights.average" in tags else "",
        "config": tags.get("config.digest", ""),
        "commit": tags.get("git.commit", ""),
        "created": datetime.fromtimestamp(facts.created_ms / 1000, UTC).isoformat(" ", "seconds"),
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    console.print(table)
    if moves:
        print_moves(out, f"moves of v{facts.version}", moves)
    page = ui_fragment(f"models/{quote(facts.name)}/versions/{facts.version}")
    where = f"{public_uri(uri).rstrip('/')}/{page}" if uri.startswith("http") else f"ddpm ui, then http://127.0.0.1:5000/{page}"
    console.print(f"page        {where}", soft_wrap=True, markup=False)
    console.print(f"draw        ddpm sample models:/{facts.name}/{facts.version} --num 64 --out grid.png", soft_wrap=True, markup=False)


def print_contrast(out: IO[str], name: str, found: VersionDiff) -> None:
    """Prints versions side by side: numbers, then the settings that differ."""
    console = console_for(out)
    table = table_of(name, "", *(version.label for version in found.versions))
    rows = {
        "metric": [version.metric.name if version.metric else "none" for version in found.versions],
        "value": [_value(version.metric) for version in found.versions],
        "decision": [version.decision or "" for version in found.versions],
        "dataset": [version.tags.get("dataset.digest", "") for version in found.versions],
        "memorisation": [version.tags.get("memorisation.verdict", "") for version in found.versions],
        "commit": [version.tags.get("git.commit", "")[:12] for version in found.versions],
    }
    for key, values in (rows | found.settings).items():
        table.add_row(key, *values)
    console.print(table)
    for version, unlike in zip(found.versions, found.unlike, strict=True):
        if unlike:
            console.print(f"v{version.version} is not comparable with v{found.versions[0].version}: {'; '.join(unlike)}", soft_wrap=True, markup=False)
    models = " ".join(f"models:/{name}/{version.version}" for version in found.versions)
    console.print(f"on the same seeds, with pictures: ddpm compare {models}", soft_wrap=True, markup=False)


def _rows(tags: Mapping[str, str]) -> str:
    rows = tags.get("dataset.rows", "?")
    return counted(int(rows), "row") if rows.isdecimal() else f"{rows} rows"


def print_moves(out: IO[str], name: str, moves: Sequence[Move]) -> None:
    """Prints the log of a model, oldest first."""
    table = table_of(name, "when", "what", "champion", "who", "why")
    for move in moves:
        about = "" if move.version is None else f"v{move.version} "
        table.add_row(move.when[:19].replace("T", " "), f"{about}{move.kind}", "none" if move.champion is None else f"v{move.champion}", move.who, move.why)
    console_for(out).print(table)


def print_data(out: IO[str], found: Sequence[tuple[VersionFacts, str | None]]) -> None:
    """Prints the datasets that a version and those that it started from were trained on, each with where it lies."""
    table = table_of("what it learned from", "version", "dataset", "source", "rows", "where it lies")
    for version, place in found:
        tags = version.tags
        known = (tags.get("dataset.digest", "unknown"), tags.get("dataset.source", ""), tags.get("dataset.rows", ""))
        table.add_row(f"{version.name}/{version.version}", *known, place or "no longer here")
    console_for(out).print(table)

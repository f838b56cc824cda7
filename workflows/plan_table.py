"""A plan as a person reads it."""

from typing import IO

from rich.table import Table

from pipeline.planning.history import age_s
from pipeline.planning.records import HOUR_S, Plan, Quantity
from pipeline.progress import duration
from workflows.tables import console_for, table_of

_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B"))


def print_plan(out: IO[str], plan: Plan) -> None:
    """Prints a plan: stages with their times, then what else it takes, each number with how it is known."""
    console = console_for(out)
    if plan.autoencoder is not None:
        console.print(_stages(plan.autoencoder, f"plan of {plan.autoencoder.run_name}, the autoencoder that is trained first"))
    console.print(_stages(plan, f"plan of {plan.run_name}"))
    table = table_of("", "what", "planned", "known how")
    for what, text, quantity in _facts(plan):
        table.add_row(what, text, "" if quantity is None else quantity.basis)
    console.print(table)
    console.print(_source(plan), soft_wrap=True, markup=False)


def _stages(plan: Plan, title: str) -> Table:
    table = table_of(title, "stage", "time", "device-hours", "known how", "of what")
    for stage in plan.stages:
        table.add_row(stage.stage, duration(stage.seconds.value), f"{stage.device_hours.value:.3g}", stage.seconds.basis, stage.note)
    together = "all, with the autoencoder" if plan.autoencoder is not None else "all"
    table.add_row(together, duration(plan.seconds.value), f"{plan.device_hours.value:.3g}", plan.seconds.basis, _budget(plan))
    return table


def _budget(plan: Plan) -> str:
    return f"{plan.seconds.value / HOUR_S:.3g} h on {plan.num_workers} x {plan.device}"


def _facts(plan: Plan) -> list[tuple[str, str, Quantity | None]]:
    facts: list[tuple[str, str, Quantity | None]] = [
        ("images to train on", f"{plan.images.value:,.0f}", plan.images),
        ("epochs", f"{plan.epochs.value:,.1f} in {plan.steps:,} steps", plan.epochs),
        ("images/s of a worker", f"{plan.images_per_second_per_worker.value:,.4g}", plan.images_per_second_per_worker),
        ("images/s in all", f"{plan.images_per_second.value:,.4g}", plan.images_per_second),
    ]
    sizes = {
        "memory of a worker": plan.host_bytes,
        "memory of its GPU": plan.gpu_bytes,
        "a checkpoint": plan.checkpoint_bytes,
        "checkpoints that are kept": plan.checkpoints_bytes,
        "dataset": plan.dataset_bytes,
        "storage, a run": plan.run_bytes,
        f"storage, a month of {plan.runs_per_month.value:g} runs": plan.month_bytes,
    }
    facts += [(what, in_bytes(size.value), size) for what, size in sizes.items() if size is not None]
    return facts + ([] if plan.cost is None else [("cost, in your currency", f"{plan.cost.value:,.2f}", plan.cost)])


def in_bytes(value: float) -> str:
    """Returns bytes in the largest unit that fits."""
    size, unit = next((size, unit) for size, unit in _SIZES if value >= size or size == 1)
    return f"{value / size:.3g} {unit}"


def _source(plan: Plan) -> str:
    if plan.speed_source == "none needed":
        return "every stage is done already; the speed is that of the training"
    if plan.speed_source == "probe":
        return f"speed: measured now, on {plan.device}"
    return f"speed: of the last training of these settings, {duration(age_s(plan.speed_measured))} ago ({plan.speed_measured}), on {plan.device}"

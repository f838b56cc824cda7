"""`ddpm show`: pictures of the process - what noise does to data, how samples rise from it, the schedules, a dataset."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from workflows.options import Commands, file_to_write, storage_of, writing
from workflows.preset_files import find_preset
from workflows.streams import stdout_to_stderr

show_app = Commands(
    name="show",
    help="Pictures of the process: forward, reverse, schedule, data.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Storage = Annotated[str, typer.Option("--storage", help="Storage root: a folder, or s3://BUCKET/PREFIX.")]
_DATASET = "A dataset's folder, or how its name or digest begins, as `ddpm data list` prints it."
_MODEL = "models:/NAME@champion, models:/NAME/VERSION, or a checkpoint folder."
FRAMES, COLUMNS, ROWS_FORWARD = 60, 4, 9


@show_app.command()
def forward(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help=_DATASET)],
    preset: Annotated[str, typer.Option(help="Preset whose diffusion process is shown.")] = "cifar10",
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="diffusion.KEY=VALUE", help="A setting of the process.")] = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="Picture to write: PNG. Its folder must be there.")] = "forward.png",
    storage: Storage = "./storage",
) -> None:
    """Show data at t = 0 to T, with the signal-to-noise ratio beneath."""
    import numpy as np

    from components.data.catalog import find_dataset
    from components.data.reader import RowReader
    from components.diffusion.process import make_process
    from components.process import forward_picture
    from pipeline.config import load_config

    file, found = file_to_write("--out", out, ".png"), find_dataset(dataset, storage_of(storage))
    diffusion, space = load_config(find_preset(preset), overrides or []).diffusion, found.manifest.space
    count = found.manifest.num_train
    numbers = np.linspace(0, count - 1, min(count, ROWS_FORWARD if space.one_tile_per_row else space.rows_in_a_picture)).round().astype(int)
    rows = RowReader(found.folder, found.manifest).rows(numbers)
    title = f"{found.manifest.source}, {diffusion.describe()}"
    _save(file, out, lambda: forward_picture(space, make_process(diffusion), rows, title).save(file))


@show_app.command()
def reverse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)],
    num: Annotated[int | None, typer.Option(min=1, max=10_000, help="Samples to draw; 16 images or 2,000 points by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations per sample.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample; sample i has seed + i.")] = 0,
    sampler: Annotated[str, typer.Option(help="ddim, ancestral, dpmpp_2m, unipc or heun.")] = "ddim",
    out: Annotated[str, typer.Option(metavar="FILE", help="Animation to write: GIF. Its folder must be there.")] = "reverse.gif",
    storage: Storage = "./storage",
) -> None:
    """Show how samples rise from noise: points in the colour of where they end, images as x_t beside the estimate of x_0."""
    file, root = file_to_write("--out", out, ".gif"), storage_of(storage)
    from components.process import gif_bytes, reverse_frames
    from workflows.sample import watch

    with stdout_to_stderr():
        space, moments = watch(model, num=num, steps=steps, seed=seed, sampler=sampler, frames=FRAMES, storage=root)
    _save(file, out, lambda: file.write_bytes(gif_bytes(reverse_frames(space, moments, COLUMNS))))


@show_app.command()
def schedule(
    steps: Annotated[int, typer.Option(min=2, max=10_000, help="T, the number of noise levels.")] = 1000,
    out: Annotated[str, typer.Option(metavar="FILE", help="Picture to write: PNG. Its folder must be there.")] = "schedule.png",
) -> None:
    """Show alpha_bar, signal-to-noise ratio and posterior variance of every schedule."""
    from components.process import all_schedules, save_schedules

    file = file_to_write("--out", out, ".png")
    _save(file, out, lambda: save_schedules(file, all_schedules(steps)))


@show_app.command()
def data(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help=_DATASET)],
    out: Annotated[str, typer.Option(metavar="FILE", help="Picture to write: PNG. Its folder must be there.")] = "data.png",
    storage: Storage = "./storage",
) -> None:
    """Show some of a dataset: images by label, points together. `ddpm data show` says more of it in words."""
    from components.data.catalog import find_dataset
    from components.data.summary import dataset_sheet

    file, found = file_to_write("--out", out, ".png"), find_dataset(dataset, storage_of(storage))
    sheet = dataset_sheet(found.folder, found.manifest)
    _save(file, out, lambda: sheet.save(file))


def _save(file: Path, named: str, write: Callable[[], object]) -> None:
    """Writes a picture and prints where it is."""
    with writing("--out", named):
        write()
    typer.echo(named)

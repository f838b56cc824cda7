"""The `ddpm` command. Heavy libraries are imported where they are used, so that help comes at once."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, NoReturn

import typer

from workflows.data import data_app
from workflows.jobs_command import INTERRUPTED, Address, detaching, jobs_app
from workflows.models import models_app
from workflows.options import Commands
from workflows.preset_files import find_preset
from workflows.schedule.command import schedule_app
from workflows.show import show_app
from workflows.status import status_command
from workflows.storage import prune_command, storage_command
from workflows.streams import open_missing, stdout_to_stderr, unread_is_fine
from workflows.termination import Terminated, handling_termination

if TYPE_CHECKING:
    from pipeline.artifacts import StageName
    from pipeline.config import RunConfig
    from pipeline.run import StageReport
    from workflows.submit import Packages

PACKAGES = ("components", "cluster", "pipeline", "workflows")
USER_ERROR, RESUME = 2, 75  # 75: EX_TEMPFAIL of sysexits.h, which asks for another try

app = Commands(
    name="ddpm",
    help="Train diffusion models on a folder of images and keep the best one in a registry.\n\nStart with [bold]ddpm run digits[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(jobs_app, rich_help_panel="Cluster")
app.add_typer(data_app, rich_help_panel="Look")
app.add_typer(show_app, rich_help_panel="Look")
app.add_typer(models_app, rich_help_panel="Look")
app.add_typer(schedule_app)

Preset = Annotated[
    str,
    typer.Argument(metavar="PRESET", help="A preset's name (digits, points, digits-latent, cifar10-small, photos-latent, ...) or the path of a YAML file."),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that override the preset's, such as train.steps=1000.")]
Name = Annotated[str | None, typer.Option("--name", help="What to call the run; the preset's name by default.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print the time of every part of the work at the end; by default of those of five seconds and more.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, the stages' receipts, as the only thing on stdout.")]
Storage = Annotated[str, typer.Option("--storage", help="Storage root whose MLflow store is used, unless MLFLOW_TRACKING_URI is set.")]


@app.callback()
def every_command(
    log_format: Annotated[str, typer.Option("--log-format", metavar="text|json", help="How stderr tells what happens, of any command.")] = "text",
) -> None:
    """Says how to tell what happens."""
    from pipeline.errors import ConfigError

    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format {log_format} is unknown; use text or json")
    if log_format == "json":
        from pipeline.context import Reporter

        Reporter.log_format = "json"


@app.command(rich_help_panel="Run")
def run(
    preset: Preset,
    overrides: Overrides = None,
    name: Name = None,
    start_from: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Run this stage and all later ones again, even if nothing changed.")] = None,
    plan_first: Annotated[
        bool, typer.Option("--plan-first", help="Make the plan first, print it, and refuse where it is over cluster.max_hours (exit code 2).")
    ] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Preprocess, encode, train, evaluate, register: finished stages are skipped, an interrupted one is resumed."""
    if plan_first:
        _plan_first(preset, overrides, name)
    _run(preset, overrides, name, "register", start_from, as_json, verbose)


def _plan_first(preset: str, overrides: list[str] | None, name: str | None) -> None:
    """Prints the plan of a run to stderr, beside the lines of its progress.

    Raises:
        ConfigError: if it is over `cluster.max_hours`.
    """
    config, run_name = _load(preset, overrides, name)
    from workflows.plan import check_budget, plan_run, say_plan

    with stdout_to_stderr() as stdout, _resumable(stdout, "interrupted; nothing was begun"):
        plan = plan_run(config, run_name)
    say_plan(sys.stderr, plan, as_json=False)
    check_budget(config, plan)


@app.command(rich_help_panel="Run")
def plan(
    preset: Preset,
    overrides: Overrides = None,
    name: Name = None,
    address: Annotated[str | None, typer.Option(metavar="URL", help="Of the run on a Ray cluster: its dashboard, such as http://HEAD:8265.")] = None,
    last: Annotated[
        bool, typer.Option("--last", help="Try nothing: take what the last training of these settings on such a device took, from MLflow.")
    ] = False,
    packages: Annotated[str, typer.Option(help="With --address: image or lock, as for submit.")] = "image",
    pass_env: Annotated[list[str] | None, typer.Option("--pass-env", metavar="VARIABLE", help="With --address: send a variable, visibly, too.")] = None,
    as_job: Annotated[bool, typer.Option("--job", hidden=True)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, the plan in SI units, as the only thing on stdout.")] = False,
) -> None:
    """Say what a run will take before it is begun: time, memory, storage, cost. Some steps of every stage are tried on the machines that would do it."""
    config, run_name = _load(preset, overrides, name)
    from workflows.plan import plan_on_cluster, plan_run, say_plan

    with stdout_to_stderr() as stdout:
        with _resumable(stdout, "interrupted; nothing was begun"):
            if address is None:
                made = plan_run(config, run_name, last=last)
            else:
                made = plan_on_cluster(config, run_name, address=address, last=last, packages=packages_of(packages), pass_env=pass_env or [])
        with unread_is_fine(stdout):
            say_plan(stdout, made, as_json=as_json, as_job=as_job)


@app.command(rich_help_panel="Run")
def preprocess(preset: Preset, overrides: Overrides = None, name: Name = None, verbose: Verbose = False, as_json: AsJson = False) -> None:
    """Turn a source of images into a dataset of parquet shards."""
    _run(preset, overrides, name, "preprocess", None, as_json, verbose)


@app.command(rich_help_panel="Run")
def encode(preset: Preset, overrides: Overrides = None, name: Name = None, verbose: Verbose = False, as_json: AsJson = False) -> None:
    """Encode the images of a run to latents, where data.autoencoder names an autoencoder (and preprocess, where that is not done)."""
    _run(preset, overrides, name, "encode", None, as_json, verbose)


@app.command(rich_help_panel="Run")
def train(preset: Preset, overrides: Overrides = None, name: Name = None, verbose: Verbose = False, as_json: AsJson = False) -> None:
    """Train the denoiser of a run (and preprocess, where that is not done)."""
    _run(preset, overrides, name, "train", None, as_json, verbose)


@app.command(rich_help_panel="Run")
def evaluate(preset: Preset, overrides: Overrides = None, name: Name = None, verbose: Verbose = False, as_json: AsJson = False) -> None:
    """Draw samples of a run's model and measure them (and do the stages before, where they are not done)."""
    _run(preset, overrides, name, "evaluate", None, as_json, verbose)


@app.command(rich_help_panel="Run")
def register(preset: Preset, overrides: Overrides = None, name: Name = None, verbose: Verbose = False, as_json: AsJson = False) -> None:
    """Register a run's model and decide about the champion (and do the stages before, where they are not done)."""
    _run(preset, overrides, name, "register", None, as_json, verbose)


@app.command(rich_help_panel="Run")
def retrain(
    preset: Preset,
    overrides: Overrides = None,
    name: Name = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help="Leave the attempt open after this stage; the same command resumes it.")] = "register",
    address: Annotated[str | None, typer.Option(metavar="URL", help="Have a Ray cluster do it, as a job: its dashboard, such as http://HEAD:8265.")] = None,
    tick: Annotated[str | None, typer.Option(help="With --address: what started this, such as a date; the same tick finds its job again.")] = None,
    packages: Annotated[str, typer.Option(help="With --address: image or lock, as for submit.")] = "image",
    pass_env: Annotated[list[str] | None, typer.Option("--pass-env", metavar="VARIABLE", help="With --address: send a variable, visibly, too.")] = None,
    as_job: Annotated[bool, typer.Option("--job", hidden=True)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, what became of it, as the only thing on stdout.")] = False,
) -> None:
    """Make one attempt at a better champion from what is new.

    Exit code 0: promoted, 10: kept, 11: skipped, 12: stopped by a guard, others: failure.
    """
    config, run_name = _load(preset, overrides, name)
    from pipeline.errors import ConfigError
    from workflows.retrain_command import make_attempt

    if address is None and tick is not None:
        raise ConfigError(f"--tick {tick} finds a cluster's job again, and there is no --address; name one, or leave the option out")
    if address is not None:
        if as_json or until != "register":
            raise ConfigError(f"{'--json' if as_json else f'--until {until}'} is not for --address, where the job's log is printed; leave it out")
        from workflows.retrain_job import retrain_on_cluster

        with detaching():
            raise typer.Exit(retrain_on_cluster(config, run_name, address=address, tick=tick, packages=packages_of(packages), pass_env=pass_env or []))
    with stdout_to_stderr() as stdout, _resumable(stdout, "interrupted; run the same command again to resume the attempt"):
        code = make_attempt(stdout, config, run_name, until, as_json=as_json, as_job=as_job)
    raise typer.Exit(code)


@app.command("sweep", rich_help_panel="Run")
def sweep_command(
    preset: Preset,
    settings: Annotated[
        list[str], typer.Argument(metavar="SECTION.KEY=VALUES...", help="What is varied, such as 'train.lr=[1e-4,2e-4]' or model.dropout=0..0.2, and settings.")
    ],
    trials: Annotated[int | None, typer.Option(min=1, help="Trials; by default all combinations of the choices.")] = None,
    metric: Annotated[str, typer.Option(help="What the best is lowest in: validation/loss, validation/distance or evaluation.")] = "validation/loss",
    search: Annotated[str, typer.Option(help="random, or optuna, which learns from the trials before (extra sweep).")] = "random",
    max_hours: Annotated[float | None, typer.Option("--max-hours", metavar="HOURS", help="Hours of work after which nothing more is begun.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Trials at once, on a cluster that has room for their workers.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Decides which settings are drawn.")] = 0,
    name: Annotated[str | None, typer.Option("--name", help="What to call the sweep; PRESET-sweep by default. Trials are called NAME-000 and so on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, the table, as the only thing on stdout.")] = False,
) -> None:
    """Try settings out by Ray Tune: each trial is an ordinary run, poor ones end early, the best is registered and competes like any other."""
    from workflows.sweep import run_sweep, wanted_of

    wanted = wanted_of(find_preset(preset), settings, name=name, trials=trials, metric=metric, search=search, max_hours=max_hours, parallel=parallel, seed=seed)
    with stdout_to_stderr() as stdout, _resumable(stdout, "interrupted; run the same command again to resume the sweep"):
        run_sweep(stdout, wanted, as_json=as_json)


def _run(preset: str, overrides: list[str] | None, name: str | None, until: "StageName", start_from: str | None, as_json: bool, verbose: bool) -> None:
    config, run_name = _load(preset, overrides, name)
    from pipeline.artifacts import STAGES
    from pipeline.errors import ConfigError
    from workflows.autoencoder_first import run_with_autoencoder

    stages = {stage: stage for stage in STAGES}
    if start_from is not None and start_from not in stages:
        raise ConfigError(f"--from {start_from} is no stage; use one of {', '.join(STAGES)}")
    with stdout_to_stderr() as stdout:
        with _resumable(stdout, "interrupted; run the same command again to resume from the last checkpoint"):
            reports = run_with_autoencoder(config, run_name, until=until, start_from=stages[start_from] if start_from else None)
        _print_reports(stdout, reports, run_name, config, as_json=as_json, all_parts=verbose)


def _print_reports(
    stdout: IO[str], reports: "Mapping[StageName, StageReport]", run_name: str, config: "RunConfig", *, as_json: bool, all_parts: bool = False
) -> None:
    """Prints what became of the stages, as a table or as one JSON object."""
    from workflows.tables import print_summary

    with unread_is_fine(stdout):
        if as_json:
            stdout.write(json.dumps({stage: report.to_json() for stage, report in reports.items()}, indent=2) + "\n")
        else:
            print_summary(stdout, reports, run_name, config, all_parts=all_parts)


@contextlib.contextmanager
def _resumable(stdout: IO[str], said: str) -> Iterator[None]:
    """Ends the command where its block is interrupted: with 75 where somebody or something asked for it, with 130 on Ctrl-C.

    Args:
        said: what a person is told.
    """
    try:
        with handling_termination(1, 2, stdout.fileno()):
            yield
    except KeyboardInterrupt as interrupt:
        with contextlib.suppress(OSError):  # who would have read it may have gone
            typer.echo(said, err=True)
        raise typer.Exit(RESUME if isinstance(interrupt, Terminated) else INTERRUPTED) from None


@app.command(rich_help_panel="Cluster")
def submit(
    preset: Preset,
    address: Address,
    overrides: Overrides = None,
    name: Name = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the job's log until it ends; Ctrl-C detaches.")] = False,
    packages: Annotated[str, typer.Option(help="image: the nodes have the packages of requirements.lock; lock: install them for this job by uv.")] = "image",
    pass_env: Annotated[list[str] | None, typer.Option("--pass-env", metavar="VARIABLE", help="Send a variable of this environment, visibly, too.")] = None,
    plan_first: Annotated[
        bool, typer.Option("--plan-first", help="Make the plan there first, print it, and refuse where it is over cluster.max_hours (exit code 2).")
    ] = False,
) -> None:
    """Run all stages on a Ray cluster; this machine may disconnect. Submitting the same name again attaches to a running job, or resumes the run."""
    settings, run_name = _load(preset, overrides, name)
    from workflows.submit import submit as submit_run

    if plan_first:
        from workflows.plan import check_budget, plan_on_cluster, say_plan

        made = plan_on_cluster(settings, run_name, address=address, last=False, packages=packages_of(packages), pass_env=pass_env or [])
        say_plan(sys.stderr, made, as_json=False)
        check_budget(settings, made)
    with detaching():
        raise typer.Exit(submit_run(settings, run_name, address=address, packages=packages_of(packages), pass_env=pass_env or [], follow=follow))


def packages_of(text: str) -> "Packages":
    """Returns where a cluster's packages come from.

    Raises:
        ConfigError: if it is none of the two.
    """
    from pipeline.errors import ConfigError

    known: dict[str, Packages] = {"image": "image", "lock": "lock"}
    if text not in known:
        raise ConfigError(f"--packages {text} is unknown; use image or lock")
    return known[text]


@app.command(rich_help_panel="Look")
def config(preset: Preset, overrides: Overrides = None) -> None:
    """Print every setting with its meaning, and the digest of those that decide the result."""
    from pipeline.config import load_config
    from workflows.tables import print_config

    print_config(load_config(find_preset(preset), overrides or []))


@app.command("import", rich_help_panel="Use")
def import_(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that diffusers wrote: a UNet2DModel, or a DDPMPipeline.")],
    name: Annotated[str, typer.Option("--name", help="Name in the registry, and of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings, such as data.source=FOLDER.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset on which the settings are laid: its images, and how samples are drawn.")] = None,
    as_json: AsJson = False,
) -> None:
    """Register a diffusers model as a version, measured against images: it may become champion like any other."""
    from workflows.import_model import import_model
    from workflows.options import run_name_of

    run_name = run_name_of(name, Path(name))
    with stdout_to_stderr() as stdout:
        with _resumable(stdout, "interrupted; run the same command again"):
            settings, reports = import_model(folder, run_name, overrides or [], preset)
        _print_reports(stdout, reports, run_name, settings, as_json=as_json)


@app.command(rich_help_panel="Use")
def ema(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/NAME@champion, models:/NAME/VERSION, or the name of a run.")],
    widths: Annotated[str, typer.Option(help="Widths of averages, as shares of the training, such as 0.03,0.06,0.1.")],
    samples: Annotated[int, typer.Option(min=2, help="Samples of each average, from the same seeds.")] = 1000,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings of evaluation that override the run's.")] = None,
    storage: Storage = "./storage",
    as_json: AsJson = False,
) -> None:
    """Make averages of other widths of a finished training, and register the best of all, as an election does."""
    from pipeline.errors import ConfigError
    from workflows.ema import search_widths
    from workflows.options import storage_of

    try:
        wanted = [float(width) for width in widths.split(",")]
    except ValueError as error:
        raise ConfigError(f"--widths {widths} is no list of numbers; write them as 0.03,0.06,0.1") from error
    root = storage_of(storage)
    with stdout_to_stderr() as stdout:
        with _resumable(stdout, "interrupted; run the same command again"):
            run_name, settings, reports = search_widths(model, wanted, samples, overrides or [], root)
        _print_reports(stdout, reports, run_name, settings, as_json=as_json)


@app.command(rich_help_panel="Use")
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/NAME@champion, models:/NAME/VERSION, or a checkpoint folder.")],
    num: Annotated[int, typer.Option(min=1, max=10_000, help="Images to draw.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Network evaluations per image.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; image i has seed + i.")] = 0,
    sampler: Annotated[str, typer.Option(help="ddim, ancestral, dpmpp_2m, unipc or heun.")] = "ddim",
    label: Annotated[str | None, typer.Option(help="Class to draw, by name or number, of a conditional model; all by turns by default.")] = None,
    guidance: Annotated[float, typer.Option(help="Weight of the class in classifier-free guidance; 1 is none.")] = 1.0,
    out: Annotated[str, typer.Option(metavar="FILE", help="Picture to write: PNG. Its folder must be there.")] = "grid.png",
    storage: Storage = "./storage",
) -> None:
    """Draw a grid of images from a registered model or a checkpoint."""
    from workflows.options import file_to_write, storage_of

    file, root = file_to_write("--out", out, ".png"), storage_of(storage)
    from workflows.sample import draw_grid

    with stdout_to_stderr() as stdout:
        draw_grid(model, num=num, steps=steps, seed=seed, sampler=sampler, out=file, storage=root, label=label, guidance=guidance)
        stdout.write(f"{out}\n")


@app.command("compare", rich_help_panel="Look")
def compare_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="models:/NAME@champion, models:/NAME/VERSION, or a checkpoint folder; differences are to the first.")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="Dataset to measure against; by default the one that the first registered model was measured against.")
    ] = None,
    samplers: Annotated[str, typer.Option(help="Samplers, separated by commas: ddim, ancestral, dpmpp_2m, unipc.")] = "",
    steps: Annotated[str, typer.Option(help="Numbers of steps, separated by commas; each with every sampler.")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="A setting of the sections evaluate and cluster.")] = None,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder for the page and its pictures, made in one that is there.")] = "compare",
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON, as the only thing on stdout.")] = False,
    storage: Storage = "./storage",
) -> None:
    """Draw models from the same seeds and measure them in one unit: a table with intervals, and a picture side by side."""
    from pipeline.errors import ConfigError
    from workflows.compare import Wanted, compare_models, print_comparison, to_json
    from workflows.options import folder_to_write, storage_of

    numbers = [part.strip() for part in steps.split(",") if part.strip()]
    if wrong := [part for part in numbers if not part.isdigit()]:
        raise ConfigError(f"--steps {wrong[0]} is no number; write such as 5,10,20")
    names = [part.strip() for part in samplers.split(",") if part.strip()]
    folder, _ = folder_to_write("--out", out), storage_of(storage)
    with stdout_to_stderr() as stdout:
        comparison, page = compare_models(Wanted(models, dataset, names, [int(number) for number in numbers], settings or [], folder, storage))
        stdout.write(to_json(comparison, page) + "\n") if as_json else print_comparison(stdout, comparison, page)


@app.command("verify-resume", rich_help_panel="Look")
def verify_resume_command(
    preset: Preset,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each training.")] = 200,
    kills: Annotated[int, typer.Option(min=0, help="SIGKILLs: of a training worker, and of the driver with all its processes, by turns.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Decides whom they hit, and when.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, as the only thing on stdout.")] = False,
) -> None:
    """Train undisturbed and the same with kills, and compare: weights, averages, optimiser, every point of the loss curve, what is left behind.

    Exit code 0: equal, 1: not.
    """
    settings, _ = _load(preset, overrides, None)
    path = str(find_preset(preset).resolve())
    from workflows.verify_resume import verify_resume

    with stdout_to_stderr() as stdout, _resumable(stdout, "interrupted; run the same command again to start over"):
        raise typer.Exit(verify_resume(stdout, settings, path, overrides or [], steps=steps, kills=kills, seed=seed, as_json=as_json))


@app.command(rich_help_panel="Look")
def reference(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="A dataset's folder, or how its name or digest begins.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="File to write, in a folder that is there, or s3://BUCKET/KEY: .npz of mu and sigma.")] = "stats.npz",
    split: Annotated[str, typer.Option(help="train or holdout.")] = "train",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Such as evaluate.extractor=inception.")] = None,
    storage: Storage = "./storage",
) -> None:
    """Write a dataset's feature statistics to a file, as the field exchanges them."""
    from workflows.options import address_to_write, storage_of

    target, _ = address_to_write("--out", out), storage_of(storage)
    from workflows.compare import write_statistics

    with stdout_to_stderr() as stdout:
        stdout.write(write_statistics(dataset, target, out, split, settings or [], storage) + "\n")


@app.command(rich_help_panel="Cluster")
def manifest(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="rayjob, raycluster, cronjob or raycronjob.")],
    preset: Preset,
    overrides: Overrides = None,
    name: Name = None,
    image: Annotated[str | None, typer.Option(help="Image of the dependencies.")] = None,
    namespace: Annotated[str, typer.Option(help="Namespace of every object.")] = "default",
    queue: Annotated[str | None, typer.Option(help="Kueue's LocalQueue; without one the cluster scales itself.")] = None,
    schedule: Annotated[str, typer.Option(help="When cronjob and raycronjob start: five cron fields.")] = "0 3 * * *",
    time_zone: Annotated[str, typer.Option(help="Time zone of the schedule.")] = "Etc/UTC",
    secret: Annotated[str | None, typer.Option(help="Secret whose keys become environment variables of the pods.")] = None,
    claim: Annotated[str | None, typer.Option(help="ReadWriteMany claim to mount at cluster.storage.")] = None,
    service_account: Annotated[str | None, typer.Option(help="Service account of head and workers.")] = None,
    gpus_per_pod: Annotated[int, typer.Option(min=1, help="GPUs, and with them training workers, of one pod.")] = 1,
    code: Annotated[str | None, typer.Option(metavar="ZIP", help="Write the code to this file, for kustomize, and not into the manifest.")] = None,
) -> None:
    """Print Kubernetes manifests of a run: the code travels in them, secrets do not."""
    config, run_name = _load(preset, overrides, name)
    from cluster.pods import DEFAULT_IMAGE
    from workflows.manifest import Options, print_manifest
    from workflows.options import file_to_write

    zip_file = None if code is None else file_to_write("--code", code)
    options = Options(image or DEFAULT_IMAGE, namespace, queue, schedule, time_zone, secret, claim, service_account, gpus_per_pod, zip_file)
    with stdout_to_stderr() as stdout:
        print_manifest(stdout, kind, config, run_name, options)


@app.command(rich_help_panel="Look")
def ui(port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 5000, storage: Storage = "./storage") -> None:
    """Serve MLflow's pages on this machine: runs, curves, pictures, models."""
    from workflows.options import storage_of
    from workflows.ui import serve

    serve(storage_of(storage), port)


app.command("status", rich_help_panel="Look")(status_command)
app.command("storage", rich_help_panel="Keep house")(storage_command)
app.command("prune", rich_help_panel="Keep house")(prune_command)


def _load(preset: str, overrides: list[str] | None, name: str | None) -> "tuple[RunConfig, str]":
    """Returns the validated config and the run's name."""
    from pipeline.config import load_config
    from workflows.options import run_name_of

    path = find_preset(preset)
    run_name = run_name_of(name, path)
    return load_config(path, overrides or []), run_name


def check_packages() -> None:
    """Ends the command where one of the four packages is not this project's: a namesake elsewhere on the path would win silently."""
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        place = Path(found.origin).resolve().parent.parent if found and found.origin else None
        if place != root:
            typer.echo(f"error: package {package} is found in {place}, not in {root}; remove the namesake, or run from the project's root", err=True)
            sys.exit(USER_ERROR)


def main() -> None:
    """Runs the command: a mistake that a person can mend is one message and exit code 2."""
    open_missing()
    try:
        check_packages()
        app(_log_format_first(sys.argv[1:]))
    except Exception as error:
        if not isinstance(error, _user_errors()):
            raise
        from pipeline.context import Reporter, json_line
        from workflows.messages import lines_of

        for line in lines_of(error):
            typer.echo(json_line(f"error: {line}") if Reporter.log_format == "json" else f"error: {line}", err=True, nl=Reporter.log_format == "text")
        _leave(error)


def _log_format_first(arguments: list[str]) -> list[str]:
    """Returns a command line with --log-format, which belongs to every command, before the command."""
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == "--log-format" or argument.startswith("--log-format="):
            end = index + (2 if argument == "--log-format" else 1)
            return [*arguments[index:end], *arguments[:index], *arguments[end:]]
    return arguments


def _leave(error: Exception) -> NoReturn:
    from cluster.config import HeadLostError

    if isinstance(error, HeadLostError):
        from cluster.connect import abandon

        sys.stdout.flush()
        abandon(RESUME)
    sys.exit(USER_ERROR)


def _user_errors() -> tuple[type[Exception], ...]:
    from cluster.config import ClusterError
    from components.errors import DataError
    from pipeline.errors import ConfigError, RegistryError

    return ConfigError, DataError, ClusterError, RegistryError

"""`ddpm ema`: averages of other widths, made after the training; the best of all on one block of seeds is measured and registered."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.scratch import scratch
from components.storage import Location
from pipeline.artifacts import ShardSet, StageName, TrainedModel
from pipeline.config import RunConfig, load_config
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.measurement.compare import shard_set_of
from pipeline.registry.versions import find_model
from pipeline.run import FixedInputs, StageReport, run
from pipeline.tracking import connect, translated


def search_widths(
    model: str, widths: Sequence[float], num_samples: int, overrides: list[str], storage: Location
) -> tuple[str, RunConfig, Mapping[StageName, StageReport]]:
    """Holds an election among a training's averages and those of some widths, and registers the winner; returns the run's name, settings and reports.

    Args:
        model: models:/NAME/VERSION or models:/NAME@ALIAS of a version, or the name of a run.
        num_samples: drawn for each average, from the same seeds.

    Raises:
        ConfigError: if there is no such training, or it kept no snapshots.
        DataError, ClusterError, RegistryError: like `run`.
    """
    training, name = _training_of(model, storage)
    receipt = TrainedModel.model_validate_json((training / "receipt.json").read_text())
    wanted = [f"evaluate.ema_widths=[{','.join(f'{width:g}' for width in widths)}]", f"evaluate.election_samples={num_samples}"]
    with scratch("ema") as folder:
        copy = Path(folder) / f"{name}.yaml"
        copy.write_text((storage / "runs" / name / "config.yaml").read_text(), encoding="utf-8")
        config = load_config(copy, [*overrides, *wanted, "retrain.webhook=null"])
    shards = _shards_of(receipt, storage)
    return name, config, run(config, name, reporter=Reporter(), given=FixedInputs(shards, None, receipt))


def _training_of(model: str, storage: Location) -> tuple[Location, str]:
    """Returns the folder of a training, and the name of its run."""
    if not model.startswith("models:/"):
        trainings = storage / "runs" / model / "train"
        finished = [trainings / each for each in trainings.folders() if (trainings / each / "receipt.json").is_file()]
        if not finished:
            raise ConfigError(f"{model} is no run of {storage} that was trained; name one of its runs, or models:/NAME@champion")
        return max(finished, key=lambda folder: (folder / "receipt.json").modified()), model
    tracking = connect(storage)
    version: Any = find_model(tracking, model)
    with translated(tracking.uri):
        folder = Location.of(str(tracking.client.get_run(str(version.run_id)).data.tags.get("ddpm.folder", "")))
    if not (folder / "receipt.json").is_file():
        raise ConfigError(f"{model} was trained in {folder}, which is gone; averages are made of what a training kept there")
    return folder, folder.parent.parent.name


def _shards_of(receipt: TrainedModel, storage: Location) -> ShardSet:
    from components.data.catalog import find_dataset

    return shard_set_of(find_dataset(receipt.dataset_digest, storage).folder)

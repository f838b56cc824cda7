"""A checkpoint that was trained elsewhere, as if a run of this project had trained it: so that it is measured and competes like any."""

from components.data.shards import read_manifest
from components.errors import DataError
from components.model.checkpoint import read_weights, write_checkpoint
from components.model.manifest import manifest_of
from components.model.retention import checkpoint_name
from components.model.spec import read_spec
from components.storage import Location
from pipeline.artifacts import ShardSet, TrainedModel


def adopt(checkpoint: Location, source: str, shards: ShardSet, folder: Location, inputs: str, config_digest: str) -> TrainedModel:
    """Puts a checkpoint's averaged weights into a training folder and returns the receipt, which says that nothing was trained.

    Args:
        source: where it comes from, in words.
        shards: the images that it is measured against.

    Raises:
        DataError: if its images or classes are not those of the dataset.
    """
    spec, labels = read_spec(checkpoint), tuple(read_manifest(Location.of(shards.path)).label_names)
    if (spec.space.kind, spec.shape) != (shards.space.kind, shards.space.shape):
        raise DataError(f"{source} draws {spec.space.description}, and {shards.source} is {shards.space.description}; set data.image_size and data.mode to fit")
    if spec.label_names:
        if len(spec.label_names) != len(labels):
            raise DataError(f"{source} is told {len(spec.label_names)} classes, and {shards.source} has {len(labels)}; use images in a folder for each class")
        spec = spec.model_copy(update={"label_names": labels})
    spec = spec.model_copy(update={"space": shards.space})
    with checkpoint.local_copy(["ema.safetensors"]) as copy:
        weights = read_weights(copy / "ema.safetensors")
    path = folder / checkpoint_name(0, 1)
    write_checkpoint(path, spec, weights)
    receipt = TrainedModel(
        inputs=inputs,
        path=str(path),
        folder=str(folder),
        weights_sha256=manifest_of(path)["ema.safetensors"][1],
        steps=0,
        parameters=sum(value.numel() for value in weights.values()),
        loss=None,
        images_per_second=0.0,
        precision="float32",
        num_workers=0,
        device="elsewhere",
        config_digest=config_digest,
        dataset_digest=shards.digest,
        tracking_uri="",
        mlflow_run_id="",
        start=source,
    )
    (folder / "receipt.json").write_text(receipt.model_dump_json(indent=2) + "\n")
    return receipt

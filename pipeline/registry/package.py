"""A model as MLflow keeps it: weights as safetensors, its own code, pinned requirements, no pickle."""

import hashlib
import re
import shutil
import tempfile
import warnings
from importlib.metadata import version as installed_version
from pathlib import Path

import components
from components.storage import Location
from pipeline.artifacts import Evaluation, TrainedModel


def log_model(name: str, model: TrainedModel, evaluation: Evaluation, run_id: str) -> str:
    """Logs a model that carries its own code and weights, without pickle; returns the logged model's id."""
    import mlflow

    from components.model.checkpoint import DenoiserSpec, read_weights, write_checkpoint

    with tempfile.TemporaryDirectory(prefix="ddpm-register-") as staging:
        folder = Path(staging)
        weights = f"{evaluation.weights}.safetensors"
        with Location.of(evaluation.checkpoint).local_copy(["denoiser.json", weights]) as source:
            spec = DenoiserSpec.model_validate_json((source / "denoiser.json").read_text(encoding="utf-8"))
            write_checkpoint(Location.of(folder / "checkpoint"), spec, read_weights(source / weights))
        package = _copy_components(folder)
        code = folder / "sampler.py"
        template = Path(__file__).with_name("served_model.py").read_text(encoding="utf-8")
        code.write_text(template.replace('COMPONENTS = "components"', f'COMPONENTS = "{package.name}"'), encoding="utf-8")
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            # MLflow advises an example of the input; the signature is written out in full instead.
            warnings.simplefilter("ignore", UserWarning)
            logged = mlflow.pyfunc.log_model(
                name=re.sub(r"[ .]", "-", name),
                python_model=str(code),
                artifacts={"checkpoint": str(folder / "checkpoint")},
                code_paths=[str(package)],
                pip_requirements=[
                    f"{package}=={installed_version(package).partition('+')[0]}" for package in ("mlflow", "torch", "numpy", "pillow", "pydantic")
                ],
                signature=_signature(),
                step=evaluation.step,
                model_type="image-generator",
            )
    return str(logged.model_id)


def _copy_components(folder: Path) -> Path:
    """Copies the `components` package under a name made of its content, so that versions never share code by accident."""
    source = Path(components.__file__).parent
    files = sorted(source.rglob("*.py"))
    digest = hashlib.sha256(b"".join(file.relative_to(source).as_posix().encode() + file.read_bytes() for file in files)).hexdigest()[:8]
    target = folder / f"ddpm_components_{digest}"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def _signature() -> object:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    optional = {"steps": DataType.long, "seed": DataType.long, "sampler": DataType.string, "format": DataType.string}
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.long, "num_images"), *(ColSpec(kind, name, required=False) for name, kind in optional.items())]
    return ModelSignature(inputs=Schema(columns))

"""A model as MLflow keeps it: weights as safetensors, the code that draws from them, pinned requirements, no pickle."""

import ast
import hashlib
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import components
from components.autoencoder.store import PACKED, find_autoencoder
from components.model.spec import DenoiserSpec
from components.scratch import scratch
from components.spaces.latents import LatentSpace
from components.storage import Location
from pipeline.artifacts import Evaluation, TrainedModel
from pipeline.tracking_client import again_after_races

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

SERVED_MODEL = Path(__file__).with_name("served_model.py")
REQUIREMENTS = ("mlflow-skinny", "numpy", "pandas", "pillow", "pydantic", "torch")
"""What a process needs to load and serve a version: all that the code in it imports, and pandas, without which MLflow serves nothing."""
FOR_LATENTS = ("diffusers",)
"""What it needs beside where the denoiser works on latents, which diffusers' network decodes."""


def log_model(name: str, model: TrainedModel, evaluation: Evaluation, run_id: str) -> str:
    """Logs a model that carries its own code and weights, without pickle; returns the logged model's id."""
    import mlflow

    with scratch("register") as folder:
        spec = _write_weights(folder, evaluation)
        requirements = (*REQUIREMENTS, *(FOR_LATENTS if isinstance(spec.space, LatentSpace) or spec.model.kind == "autoencoder_kl" else ()))
        package = copy_code(folder)
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            # MLflow advises type hints, which allow no more than one kind of input; the signature is written out in full instead.
            warnings.simplefilter("ignore", UserWarning)
            logged = again_after_races(mlflow.pyfunc.log_model)(
                name=re.sub(r"[ .]", "-", name),
                python_model=str(folder / "sampler.py"),
                artifacts={part: str(folder / part) for part in ("checkpoint", "diffusers")},
                code_paths=[str(package)],
                pip_requirements=[f"{each}=={installed_version(each).partition('+')[0]}" for each in requirements],
                signature=signature(spec),
                input_example={"num_images": 2, "steps": min(4, spec.diffusion.most_steps), "seed": 0},
                step=evaluation.step,
                model_type="image-generator",
            )
        _forget_this_machine(str(logged.model_id), folder)
    return str(logged.model_id)


def _write_weights(folder: Path, evaluation: Evaluation) -> "DenoiserSpec":
    """Writes the weights that were measured, in this project's format and in diffusers'."""
    from components.model.checkpoint import read_weights, write_checkpoint
    from components.model.diffusers_export import write_diffusers

    name = f"{evaluation.weights}.safetensors"
    with Location.of(evaluation.checkpoint).local_copy(["denoiser.json", name]) as source:
        spec, weights = DenoiserSpec.model_validate_json((source / "denoiser.json").read_text(encoding="utf-8")), read_weights(source / name)
    with _decoder(spec, Location.of(evaluation.checkpoint)) as files:
        write_checkpoint(Location.of(folder / "checkpoint"), spec, weights, more_files=files)
        write_diffusers(folder / "diffusers", spec, weights, {PACKED[name]: file for name, file in files.items()})
    return spec


@contextmanager
def _decoder(spec: DenoiserSpec, checkpoint: Location) -> Iterator[dict[str, Path]]:
    """Gives the files of the autoencoder of a denoiser that works on latents, by the names that they have in a checkpoint; else none."""
    if not isinstance(spec.space, LatentSpace):
        yield {}
        return
    found = find_autoencoder(spec.space.autoencoder, checkpoint)
    names = (found.config_name, found.weights_name)
    with found.folder.local_copy(names) as folder:
        yield {packed: folder / name for packed, name in zip(PACKED, names, strict=True)}


def copy_code(folder: Path) -> Path:
    """Writes the served model, and what it needs of `components` under a name made of its content, so that versions never share code by accident.

    Returns:
        The copied package, beside `sampler.py`.
    """
    source = Path(components.__file__).parent
    files = sorted(needed_files(source))
    digest = hashlib.sha256(b"".join(file.relative_to(source).as_posix().encode() + file.read_bytes() for file in files)).hexdigest()[:8]
    target = folder / f"ddpm_components_{digest}"
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    code = re.sub(rf"^(\s*)from {source.name}\b", rf"\1from {target.name}", SERVED_MODEL.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (folder / "sampler.py").write_text(code, encoding="utf-8")
    return target


def needed_files(package: Path) -> set[Path]:
    """Returns the files of a package that the served model imports, directly or by others of them, wherever in the file it does.

    All kinds of networks are among them: they are found by their place in the folder, which no import names.
    """
    found: set[Path] = set()
    waiting = {*_imported(SERVED_MODEL, package), *(package / "networks").rglob("*.py")}
    while waiting:
        file = waiting.pop()
        found.add(file)
        waiting |= set(_imported(file, package)) - found
    return found


def _imported(file: Path, package: Path) -> Iterator[Path]:
    """Yields the files of the package that a file imports by `from PACKAGE... import` or `from . import`, packages' own files too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            folder = file.parents[node.level - 1]
        elif parts[:1] == [package.name]:
            folder, parts = package, parts[1:]
        else:
            continue
        place = folder.joinpath(*parts)
        yield from (path for path in (place.with_suffix(".py"), *(place / f"{alias.name}.py" for alias in node.names)) if path.is_file())
        inside = place.relative_to(package)
        yield from (path for path in (package.joinpath(*inside.parts[:depth], "__init__.py") for depth in range(len(inside.parts) + 1)) if path.is_file())


def signature(spec: "DenoiserSpec") -> "ModelSignature":
    """Returns what a version says that it takes: every parameter as a column and as an MLflow parameter, none of them required; and PNGs.

    Columns are of any type because MLflow refuses guidance=2 in a column of type double and a missing value in one of type long, and cuts
    4.5 to 4 in the server; the model itself refuses what does not fit. The types are those of the parameters.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    from pipeline.registry.served_model import parameters

    known = parameters(spec.diffusion.most_steps, spec.space.noun)
    columns: list[Any] = [ColSpec(AnyType(), name, required=False) for name, _, _ in known]
    outputs = Schema([ColSpec(DataType.binary, "png")] if spec.space.noun == "image" else [TensorSpec(spec.space.dtype, (-1, *spec.shape))])
    return ModelSignature(Schema(columns), outputs, ParamSchema([ParamSpec(name, kind, default) for name, kind, default in known]))


def _forget_this_machine(model_id: str, folder: Path) -> None:
    """Takes the paths of the machine that logged a model out of its `MLmodel`; MLflow reads no more than the last part of them."""
    import mlflow
    from mlflow.models import Model

    record: Any = Model.load(f"models:/{model_id}")
    flavor = record.flavors["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    record.artifact_path = f"models:/{model_id}"
    record.save(str(folder / "MLmodel"))
    mlflow.MlflowClient().log_model_artifact(model_id, str(folder / "MLmodel"))

"""A run whose `data.autoencoder` names a preset: that autoencoder is trained first, as a run of its own on the same images.

It is trained once for its settings. More images later are encoded by the same autoencoder, or all that was encoded, and all denoisers, would be of no use.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from components.model.manifest import is_complete
from components.storage import Location
from pipeline.artifacts import Evaluation, StageName
from pipeline.autoencoder import PRESET
from pipeline.config import RunConfig, config_digest, load_config
from pipeline.context import Reporter
from pipeline.errors import ConfigError
from pipeline.preflight import check_storage
from pipeline.run import FixedInputs, StageReport, run
from workflows.preset_files import find_preset


def run_with_autoencoder(
    config: RunConfig,
    name: str,
    *,
    until: StageName = "register",
    start_from: StageName | None = None,
    reporter: Reporter | None = None,
    given: FixedInputs | None = None,
) -> Mapping[StageName, StageReport]:
    """Runs the stages of a run like `run`, behind those of the autoencoder that it names by a preset.

    Raises:
        ConfigError, DataError, ClusterError, RegistryError: like `run`.
    """
    reporter = reporter or Reporter()
    address = config.data.autoencoder
    if address is None or not address.startswith(PRESET) or until == "preprocess":
        return run(config, name, until=until, start_from=start_from, reporter=reporter, given=given)
    trained = _trained(config, address.removeprefix(PRESET), reporter)
    reporter.line(f"[bold]denoiser[/] {name}")
    return run(config, name, until=until, start_from=start_from, reporter=reporter, given=given, autoencoder=trained)


def _trained(config: RunConfig, preset: str, reporter: Reporter) -> str:
    """Returns the address of a preset's autoencoder, which is trained and registered the first time."""
    own, name = autoencoder_config(config, preset), Path(preset).stem
    folder, reporter_line = check_storage(config.cluster.storage) / "runs" / name, f"[bold]autoencoder[/] {name}"
    if (address := trained_address(own, folder)) is not None:
        reporter.line(f"{reporter_line} is trained")
        return address
    reporter.line(reporter_line)
    measured = run(own, name, reporter=reporter)["evaluate"].receipt
    assert isinstance(measured, Evaluation)
    kept = _Trained(checkpoint=measured.checkpoint, weights=measured.weights)
    _pin(own, folder).write_text(kept.model_dump_json(indent=2) + "\n")
    return kept.address


def trained_address(own: RunConfig, folder: Location) -> str | None:
    """Returns where the autoencoder of some settings lies, as `data.autoencoder` takes it; None where it is not trained.

    Args:
        folder: of its run.
    """
    with suppress(OSError, ValidationError):
        kept = _Trained.model_validate_json(_pin(own, folder).read_text())
        if is_complete(Location.of(kept.checkpoint)):
            return kept.address
    return None


def _pin(own: RunConfig, folder: Location) -> Location:
    return folder / f"trained-{config_digest(own)}.json"


class _Trained(BaseModel):
    """What a preset's autoencoder is, once it is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    weights: str

    @property
    def address(self) -> str:
        """As `data.autoencoder` takes it."""
        return f"{self.checkpoint}#{self.weights}"


def autoencoder_config(config: RunConfig, preset: str) -> RunConfig:
    """Returns the settings of the autoencoder of a preset, on the images and the cluster of a run.

    Raises:
        ConfigError: if the preset is none of an autoencoder, or takes no such images.
    """
    data = config.data.model_dump(mode="json", exclude={"autoencoder"})
    own = load_config(find_preset(preset), fixed={"data": data, "cluster": config.cluster.model_dump(mode="json")})
    if own.diffusion.process != "reconstruction":
        raise ConfigError(f"data.autoencoder={PRESET}{preset} is no preset of `kind: autoencoder`; name one, such as {PRESET}digits-autoencoder")
    return own

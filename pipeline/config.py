"""The configuration of a run: one section per stage, plus the cluster. Load, override, validate, digest."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.config import ClusterConfig
from components.diffusion.config import DiffusionConfig
from components.errors import DataError
from components.ingest.sources import DataConfig, address_of
from components.networks.config import NetworkConfig
from components.networks.kinds import DEFAULT, KINDS, AnyNetworkConfig
from components.networks.unet.config import UNetConfig
from pipeline.errors import ConfigError
from pipeline.measurement.config import EvaluateConfig
from pipeline.names import check_paths
from pipeline.register import RegistryConfig
from pipeline.retraining.config import RetrainConfig
from pipeline.training.config import TrainConfig

DIGEST_LENGTH = 16
LONGEST_SOURCE_NAME = 60
MIN_PERCEPTUAL_SIDE = 16
"""Pixels; VGG16 halves images four times before its last features."""
AUTOENCODER = "-autoencoder"
PRESET_KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "denoiser": {},
    "autoencoder": {"model": {"kind": "autoencoder_kl"}, "diffusion": {"process": "reconstruction"}, "evaluate": {"steps": 1}},
}
"""What `kind` of a preset stands for."""
MOST_SUGGESTED = 20
"""Settings of a section that a message names one by one."""


class RunConfig(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: DataConfig = Field(default_factory=DataConfig)
    """Which images, and what becomes of them."""
    model: AnyNetworkConfig = Field(default_factory=UNetConfig)
    """The denoiser's architecture: settings of the network that `model.kind` names."""
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    """The diffusion process."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The optimisation."""
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    """Samples and the numbers taken of them."""
    registry: RegistryConfig = Field(default_factory=RegistryConfig)
    """The registered model, and when its champion falls."""
    retrain: RetrainConfig = Field(default_factory=RetrainConfig)
    """When `ddpm retrain` trains, from what, and whom it tells."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    """Where it runs; never part of a result."""

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        self._check_kind()
        if self.data.autoencoder is None:
            self.model.check_shape(self.data.space.shape)
        else:
            self._check_latents()
        if (self.train.augments or self.train.augment_conditioning) and not self.data.space.can_mirror:
            raise ValueError(f"train: augmentation means nothing to {self.data.space.noun}s; leave rotation, translation, scaling and crop_jitter out")
        if self.train.flip and not self.data.space.can_mirror:
            raise ValueError(f"train.flip=true means nothing to {self.data.space.noun}s; use train.flip=false")
        train, workers = self.train, self.cluster.max_workers
        if train.global_batch_size % train.lanes:
            raise ValueError(f"train.global_batch_size={train.global_batch_size} is not a multiple of train.lanes={train.lanes}; use a multiple")
        if train.lanes % workers:
            raise ValueError(f"cluster.num_workers={workers} does not divide train.lanes={train.lanes}; use a divisor, or other lanes")
        self._check_recipe()
        files = {f"train.{key}": getattr(self.train, key) for key in ("perceptual_weights", "perceptual_layers")}
        check_paths({"data.source": self.data.source, "data.root": self.data.root, **files, **_paths(self.evaluate, self.cluster)})
        return self

    def _check_kind(self) -> None:
        trains = self.model.kind == "autoencoder_kl"
        if trains != (self.diffusion.process == "reconstruction"):
            raise ValueError(
                f"model.kind={self.model.kind} does not go with diffusion.process={self.diffusion.process}; an autoencoder is trained with "
                "model.kind=autoencoder_kl diffusion.process=reconstruction, which `kind: autoencoder` in a preset stands for"
            )
        if trains and self.data.autoencoder is not None:
            raise ValueError("data.autoencoder means nothing to an autoencoder, which is trained on images; leave it out")
        if self.train.perceptual_weights is not None:
            self._check_perceptual(trains=trains)
        if trains and self.evaluate.nll_images:
            raise ValueError(f"evaluate.nll_images={self.evaluate.nll_images} means nothing to an autoencoder; use 0")

    def _check_perceptual(self, *, trains: bool) -> None:
        height, width = self.data.space.shape[-2:]
        if not trains:
            raise ValueError("train.perceptual_weights means nothing to a denoiser; leave it out, or train an autoencoder")
        if self.data.normalisation != "fixed":
            raise ValueError(f"train.perceptual_weights needs images in -1..1, and data.normalisation={self.data.normalisation}; use fixed")
        if min(height, width) < MIN_PERCEPTUAL_SIDE:
            raise ValueError(
                f"train.perceptual_weights takes images of {MIN_PERCEPTUAL_SIDE} pixels a side and more, and these are {width}x{height}; leave it out"
            )

    def _check_latents(self) -> None:
        if self.data.space.kind != "pixels":
            raise ValueError("data.autoencoder takes images; leave it out")
        if self.data.normalisation != "fixed":
            raise ValueError(f"data.normalisation={self.data.normalisation} means nothing to an autoencoder, which takes -1..1; leave it out")
        train = self.train
        if train.rotation or train.translation or train.scaling or train.augment_conditioning:
            raise ValueError("train: of augmentation latents know mirrors and crop_jitter; leave rotation, translation, scaling and augment_conditioning out")
        if self.evaluate.nll_images:
            raise ValueError(f"evaluate.nll_images={self.evaluate.nll_images} is the likelihood of pixels, which latents have none of; use 0")

    def _check_recipe(self) -> None:
        try:
            self.evaluate.recipe.check_process(self.diffusion)
        except ValueError as error:
            raise ValueError(f"evaluate.{error}") from error
        if (self.evaluate.nll_images or self.diffusion.learned_variance) and self.data.normalisation != "fixed":
            setting = "diffusion.learned_variance=true" if self.diffusion.learned_variance else f"evaluate.nll_images={self.evaluate.nll_images}"
            raise ValueError(f"{setting} needs data.normalisation=fixed, for the likelihood is that of bytes scaled to -1..1; leave one of them out")
        if self.evaluate.nll_images and self.diffusion.process != "ddpm":
            raise ValueError(f"evaluate.nll_images={self.evaluate.nll_images} means nothing to diffusion.process={self.diffusion.process}; use 0")
        if self.evaluate.guidance != 1 and not self.model.conditional:
            raise ValueError(f"evaluate.guidance={self.evaluate.guidance} needs a conditional model; use 1, or model.conditional=true")
        if self.evaluate.guidance != 1 and self.train.label_dropout == 0:
            raise ValueError(f"evaluate.guidance={self.evaluate.guidance} needs labels that are left out at times; use 1, or train.label_dropout=0.1")


def load_config(path: Path | None, overrides: Sequence[str] = (), fixed: Mapping[str, Mapping[str, Any]] | None = None) -> RunConfig:
    """Reads a preset, lays `section.key=value` overrides on it, and validates once.

    Where an override names another kind of network, what the preset says of its own kind is left out.

    Args:
        path: None for the defaults.
        fixed: settings by section that nothing overrides; a section `model` takes the preset's place.

    Raises:
        ConfigError: naming the key or file that is wrong.
    """
    tree: dict[str, Any] = {} if path is None else _read_tree(path)
    own = _source(tree)
    _change_kind(tree, overrides)
    for override in overrides:
        _lay(tree, override)
    for section, values in (fixed or {}).items():
        tree[section] = {**(tree.get(section, {}) if section != "model" else {}), **values}
    given = _source(tree)
    name = f"ddpm-{path.stem}" if path is not None and _address(given) == _address(own) else model_name_of(given)
    if tree.get("diffusion", {}).get("process") == "reconstruction" and not name.endswith(AUTOENCODER):
        name += AUTOENCODER  # no competitor of the denoisers of the same images
    tree.setdefault("registry", {}).setdefault("model_name", name)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*(_explain(dict(detail)) for detail in error.errors())) from error


def _source(tree: Mapping[str, Mapping[str, Any]]) -> str:
    return str(tree.get("data", {}).get("source", DataConfig.model_fields["source"].default))


def _address(source: str) -> str:
    try:
        return address_of(source)
    except DataError:  # no path, which the validation names
        return source


def model_name_of(source: str) -> str:
    """Returns the default name of the registered model of all runs on a source.

    It is `ddpm-` and the name of a dataset, a bucket with its prefix, or the last two parts of a folder's path: so folders that are all called
    `images` are told apart, and one that is mounted elsewhere is not.
    """
    address = _address(source)
    scheme, _, rest = address.rpartition("://")
    parts = [part for part in rest.split("/") if part]
    said = "-".join(parts if scheme else parts[-2:])
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", said).strip("-.")
    if plain and plain == said and len(plain) <= LONGEST_SOURCE_NAME:
        return f"ddpm-{plain}"
    return "-".join(filter(None, ("ddpm", plain[:LONGEST_SOURCE_NAME].strip("-."), hashlib.sha256(os.fsencode(said)).hexdigest()[:8])))


def load_sections(base: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]) -> tuple[EvaluateConfig, ClusterConfig]:
    """Returns the evaluate and cluster sections of a command that has no preset.

    Args:
        base: settings by section, on which the overrides are laid.

    Raises:
        ConfigError: naming the key that is wrong.
    """
    tree: dict[str, Any] = {section: dict(values) for section, values in base.items()}
    for override in overrides:
        _lay(tree, override)
    try:
        sections = _Sections.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*(_explain(dict(detail)) for detail in error.errors())) from error
    return sections.evaluate, sections.cluster


class _Sections(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        check_paths(_paths(self.evaluate, self.cluster))
        return self


def _paths(evaluate: EvaluateConfig, cluster: ClusterConfig) -> dict[str, str | None]:
    """Returns the settings of two sections that name files, by key."""
    files = {f"evaluate.{key}": getattr(evaluate, key) for key in ("inception_weights", "dinov2_weights", "reference")}
    return {**files, "cluster.storage": cluster.storage, "cluster.cache": cluster.cache}


def _read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"preset {path} cannot be read ({error.strerror}); use the name of a preset or the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset {path} is not YAML ({' '.join(str(error).split())}); mend it") from error
    tree = {} if tree is None else tree
    if isinstance(tree, dict) and "kind" in tree:
        _lay_kind(tree, tree.pop("kind"), path)
    if not isinstance(tree, dict) or not all(isinstance(section, dict) for section in tree.values()):
        raise ConfigError(f"preset {path} is not a tree of sections; write `section:` and below it `  key: value`")
    return tree


def _lay_kind(tree: dict[str, Any], kind: object, path: Path) -> None:
    """Lays what the kind of a preset stands for beneath what it says itself."""
    if kind not in PRESET_KINDS:
        raise ConfigError(f"preset {path}: kind={kind!r} is unknown; use {' or '.join(PRESET_KINDS)}")
    for section, values in PRESET_KINDS[str(kind)].items():
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section] = {**values, **tree[section]}


def _lay(tree: dict[str, Any], override: str) -> None:
    address, equals, text = override.partition("=")
    section, dot, key = address.partition(".")
    if not (equals and dot and key and section):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, such as train.steps=1000")
    tree.setdefault(section, {})[key] = _parse(section, key, text)


def _change_kind(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Leaves out what a preset says of a network when an override names one of another kind."""
    named = [override.partition("=")[2] for override in overrides if override.startswith("model.kind=")]
    settings = tree.get("model", {})
    if named and named[-1] in KINDS and named[-1] != settings.get("kind", DEFAULT):
        tree["model"] = {name: value for name, value in settings.items() if name in NetworkConfig.model_fields and name != "kind"}


def _parse(section: str, key: str, text: str) -> Any:
    field = section_fields(section).get(key)
    if field is not None and field.annotation is str:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{section}.{key}={text} is not a YAML value; quote it, or mend its brackets") from error


def section_fields(section: str) -> Mapping[str, Any]:
    """Returns the fields of a section by name, none for an unknown section; those of all kinds where there are several."""
    if section == "model":
        return {name: field for config in KINDS.values() for name, field in config.model_fields.items()}
    field = RunConfig.model_fields.get(section)
    return getattr(field.annotation, "model_fields", {}) if field is not None else {}


def _explain(detail: dict[str, Any]) -> str:
    location = [str(part) for part in detail["loc"]]
    kind = ""
    if location[:1] == ["model"] and location[1:2] and location[1] in KINDS:
        kind = location.pop(1)  # which is a setting of its own
    address = ".".join(location)
    if detail["type"] == "extra_forbidden":
        of_kind = f" of model.kind={kind}" if kind else ""
        return f"{address} is not a setting{of_kind}; {_suggest(location, kind)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "unknown_kind":
        return f"{address}.kind={detail['input'].get('kind')!r} is unknown; use {' or '.join(sorted(KINDS))}"
    if detail["type"] == "value_error":
        return f"{address}: {message}" if address else message
    return f"{address}={detail['input']!r} is wrong: {message[0].lower()}{message[1:]}"


def _suggest(location: list[str], kind: str) -> str:
    fields = KINDS[kind].model_fields if kind else section_fields(location[0])
    known = list(RunConfig.model_fields) if len(location) == 1 else list(fields)
    prefix = "" if len(location) == 1 else f"{location[0]}."
    close = difflib.get_close_matches(location[-1], known, n=1)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    if len(known) > MOST_SUGGESTED:
        return f"`ddpm config PRESET` prints the {len(known)} settings of {location[0]} with their meaning"
    return f"use one of {', '.join(prefix + name for name in known)}"


def digest_of(*parts: object) -> str:
    """Returns a digest of JSON values and config sections: 16 hexadecimal digits. Fields marked `result: False` do not count."""
    plain = [result_fields(part) if isinstance(part, BaseModel) else part for part in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:DIGEST_LENGTH]


def result_fields(section: BaseModel) -> dict[str, Any]:
    """Returns the values of a section that can change a result.

    A setting whose field says `result: False` cannot; one that says `result: "unless default"` came later, and its default is what was done before.
    """
    skipped = set()
    for name, field in type(section).model_fields.items():
        result = field.json_schema_extra.get("result") if isinstance(field.json_schema_extra, dict) else True
        if result is False or (result == "unless default" and getattr(section, name) == field.default):
            skipped.add(name)
    return section.model_dump(mode="json", exclude=skipped)


def config_digest(config: RunConfig) -> str:
    """Returns the digest of all settings that can change a run's result: every section but the cluster's and that of retraining."""
    return digest_of(*(result_fields(getattr(config, name)) for name in RunConfig.model_fields if name not in ("cluster", "retrain")))


def public_tree(config: RunConfig) -> dict[str, Any]:
    """Returns all settings as they may be shown to others: of a webhook's address, which often is its own password, the host alone."""
    tree = config.model_dump(mode="json")
    if config.retrain.webhook is not None:
        tree["retrain"]["webhook"] = f"{urlsplit(config.retrain.webhook).hostname} (the address is not shown)"
    return tree


def flatten(config: RunConfig) -> dict[str, str]:
    """Returns every setting as `section.key` -> text."""
    tree = public_tree(config)
    return {f"{section}.{key}": _as_text(value) for section in tree for key, value in tree[section].items()}


def flat_result_fields(**sections: BaseModel) -> dict[str, str]:
    """Returns the settings of some sections that can change a result, as `section.key` -> text."""
    return {key: value for name, section in sections.items() for key, value in flat(name, result_fields(section)).items()}


def flat(section: str, fields: Mapping[str, Any]) -> dict[str, str]:
    """Returns fields of a section as `section.key` -> text."""
    return {f"{section}.{key}": _as_text(value) for key, value in fields.items()}


def _as_text(value: object) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else str(value)

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from components.networks.dit.config import DiTConfig
from components.networks.kinds import KINDS
from pipeline.config import RunConfig, config_digest, flatten, load_config, section_fields
from pipeline.errors import ConfigError
from workflows.preset_files import PRESETS, find_preset

DIGITS = PRESETS / "digits.yaml"


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_valid_and_states_only_what_differs_from_the_defaults(path: Path):
    loaded = load_config(path)
    config = loaded.model_dump(mode="json")
    defaults = RunConfig().model_dump(mode="json")
    defaults["model"] = {**KINDS[loaded.model.kind].model_validate({}).model_dump(mode="json"), "kind": "unet"}
    for section, values in yaml.safe_load(path.read_text()).items():
        for key in values if section != "kind" else ():
            assert config[section][key] != defaults[section][key], f"{section}.{key} repeats the default"


def test_the_cifar10_preset_is_the_run_of_the_paper():
    config = load_config(PRESETS / "cifar10.yaml")
    assert (config.train.steps, config.train.lr, config.train.global_batch_size, config.train.warmup_steps) == (800_000, 2e-4, 128, 5000)
    assert (config.train.ema_decay, config.train.grad_clip, config.train.flip, config.model.model_dump()["dropout"]) == (0.9999, 1.0, True, 0.1)
    assert (config.diffusion.num_steps, config.diffusion.betas, config.diffusion.prediction) == (1000, "linear", "eps")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], r"train\.stepz is not a setting; did you mean train\.steps\?"),
        (["trian.steps=3"], r"trian is not a setting; did you mean train\?"),
        (["train.steps=many"], r"train\.steps='many' is wrong: input should be a valid integer"),
        (["train.lr=-1"], r"train\.lr=-1 is wrong: input should be greater than 0"),
        (["train.steps"], r"override 'train\.steps' is not of the form section\.key=value"),
        (["model.channel_mults=[1,2"], r"model\.channel_mults=\[1,2 is not a YAML value"),
        (["data.image_size=9"], r"data\.image_size=9 cannot be halved 1 times; use a multiple of 2 such as 8"),
        (["cluster.num_workers=3"], r"cluster\.num_workers=3 does not divide train\.lanes=8; use a divisor"),
        (["train.global_batch_size=30"], r"train\.global_batch_size=30 is not a multiple of train\.lanes=8"),
        (["evaluate.steps=2000"], r"evaluate\.steps=2000 is out of range; use 1 to 1000"),
        (["model.num_groups=5"], r"model: base_channels=32 times 1 is 32, which num_groups=5 .* does not divide"),
        (["data.mode=CMYK"], r"data\.mode='CMYK' is wrong"),
        (["train.keep_every=500"], r"train: keep_every=500 is not a multiple of checkpoint_every=275; use a multiple"),
        (["train.seed=-1"], r"train\.seed=-1 is wrong"),
        (["train.label_dropout=1.1"], r"train\.label_dropout=1\.1 is wrong: input should be less than or equal to 1"),
        (["train.more_ema_decays=[0.9,1.0]"], r"train\.more_ema_decays\.1=1\.0 is wrong: input should be less than 1"),
        (["train.more_ema_decays=[0.9,0.5,0.9]"], r"train: more_ema_decays=\[0\.9, 0\.5, 0\.9\] holds 0\.9 twice, .*; state each decay once"),
        (["train.more_ema_decays=[0.9,0.995]"], r"train: more_ema_decays=\[0\.9, 0\.995\] holds 0\.995 twice, ema_decay=0\.995 counted"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(overrides: Sequence[str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_config(DIGITS, overrides)


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(DIGITS, ["train.lr=0", "train.stepz=1", "evaluate.batch_size=-1"])
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n- b\n", "is not a tree of sections"), ("a: [", "is not YAML"), ("train: 3\n", "is not a tree of sections")]
)
def test_a_file_that_is_no_preset_is_named(tmp_path: Path, content: str, message: str):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"mine\.yaml {message}"):
        load_config(tmp_path / "mine.yaml")


def test_an_arithmetic_that_is_left_to_the_hardware_is_no_part_of_a_digest_and_a_chosen_one_is():
    digests = [config_digest(load_config(DIGITS, overrides)) for overrides in ([], ["evaluate.precision=auto"], ["evaluate.precision=bfloat16"])]
    assert digests[0] == digests[1] != digests[2]


def test_a_preset_that_does_not_exist_is_told_with_those_that_do():
    with pytest.raises(ConfigError, match="preset digit is neither a file nor one of celeba64, cifar10, cifar10-small, digits, digits-autoencoder"):
        find_preset("digit")


def test_text_settings_are_taken_as_they_are_written():
    assert load_config(DIGITS, ["data.source=007", "cluster.storage=on"]).data.source == "007"
    assert load_config(DIGITS, ["train.lr=1e-4"]).train.lr == 1e-4


def test_placement_and_bookkeeping_change_no_digest():
    expected = config_digest(load_config(DIGITS))
    same = ["cluster.num_workers=1", "cluster.storage=/elsewhere", "train.log_every=7", "train.checkpoint_every=9", "train.keep_last=5", "train.sample_every=3"]
    for override in same:
        assert config_digest(load_config(DIGITS, [override])) == expected, override


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=1",
        "train.steps=9",
        "train.more_ema_decays=[0.9]",
        "train.label_dropout=0.2",
        "model.dropout=0.2",
        "model.conditional=true",
        "data.image_size=16",
        "evaluate.steps=3",
        "diffusion.betas=linear",
    ],
)
def test_whatever_decides_a_result_changes_the_digest(override: str):
    assert config_digest(load_config(DIGITS, [override])) != config_digest(load_config(DIGITS))


def test_the_registered_model_is_called_after_the_preset():
    assert load_config(DIGITS).registry.model_name == "ddpm-digits"
    assert load_config(DIGITS, ["registry.model_name=mine"]).registry.model_name == "mine"


def test_every_setting_says_what_it_means():
    for section in RunConfig.model_fields.values():
        assert section.description
    for section_name in RunConfig.model_fields:
        for name, field in section_fields(section_name).items():
            assert field.description, name


def test_flattened_settings_are_addresses_and_text():
    flat = flatten(load_config(DIGITS))
    assert flat["train.steps"] == str(load_config(DIGITS).train.steps)
    assert flat["model.channel_mults"] == "[1, 2]"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("digits", "ddpm-digits"),
        ("mnist", "ddpm-mnist"),
        ("/data/photos", "ddpm-data-photos"),
        ("/data/photos/", "ddpm-data-photos"),
        ("/mnt/team/data/photos", "ddpm-data-photos"),
        ("/srv/cats/images", "ddpm-cats-images"),
        ("/srv/dogs/images", "ddpm-dogs-images"),
        ("s3://bucket/team/faces", "ddpm-bucket-team-faces"),
        ("s3://bucket", "ddpm-bucket"),
        ("/", "ddpm-e3b0c442"),
    ],
)
def test_the_registered_model_follows_the_source_where_another_than_the_presets_is_given(source: str, name: str):
    assert load_config(DIGITS, [f"data.source={source}"]).registry.model_name == name


def test_recipes_and_presets_on_one_folder_have_one_registered_model(tmp_path: Path):
    other = tmp_path / "other.yaml"
    other.write_text("train:\n  steps: 7\n")
    names = {load_config(preset, ["data.source=/srv/cats/images", *more]).registry.model_name for preset in (DIGITS, other) for more in ([], ["train.lr=0.1"])}
    assert names == {"ddpm-cats-images"}


def test_a_presets_own_source_given_again_is_no_other(tmp_path: Path):
    preset = tmp_path / "cats.yaml"
    preset.write_text("data:\n  source: /srv/cats/images\n")
    assert load_config(preset, ["data.source=/srv/cats/images/"]).registry.model_name == "ddpm-cats"
    assert load_config(preset, ["data.source=/srv/dogs/images"]).registry.model_name == "ddpm-dogs-images"


@pytest.mark.parametrize("source", ["/data/写真", "/data/a b/c(1)", f"/data/{'x' * 200}"])
def test_a_source_whose_name_no_model_can_have_gives_a_name_of_its_own_all_the_same(source: str):
    name, other = (load_config(DIGITS, [f"data.source={each}"]).registry.model_name for each in (source, source + "y"))
    assert re.fullmatch(r"ddpm-([A-Za-z0-9._-]{1,60}-)?[0-9a-f]{8}", name)
    assert name != other


def test_another_kind_of_network_leaves_out_what_the_preset_says_of_its_own():
    config = load_config(PRESETS / "digits.yaml", ["model.kind=dit", "model.depth=2", "model.conditional=true"])
    assert config.model.model_dump() == DiTConfig(depth=2, conditional=True).model_dump()
    same = load_config(PRESETS / "digits.yaml", ["model.kind=unet"])
    assert same.model == load_config(PRESETS / "digits.yaml").model
    with pytest.raises(ConfigError, match=r"model.base_channels is not a setting of model.kind=dit; use one of model.kind, model.conditional, model.size"):
        load_config(PRESETS / "digits.yaml", ["model.kind=dit", "model.base_channels=8"])

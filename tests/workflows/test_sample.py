"""What can be asked for of `ddpm sample`, and what of a served model."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from components.diffusion.config import DiffusionConfig
from components.diffusion.recipe import SAMPLERS, Recipe
from components.model.checkpoint import load_denoiser, write_checkpoint
from components.model.request import BATCH_SIZE, Request
from components.model.request import draw as draw_pixels
from components.model.spec import DenoiserSpec
from components.networks.unet.config import UNetConfig
from components.spaces.pixels import PixelSpace
from components.storage import Location
from components.streams import MAX_SEED
from pipeline.errors import ConfigError
from workflows.sample import draw_grid

CLASSES = ("cat", "dog", "1")

pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")


def written(folder: Path, label_names: tuple[str, ...] = ()) -> str:
    """Writes a checkpoint of random weights, 20 noise levels, and returns its address."""
    model = UNetConfig(
        base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4, dropout=0.0, conditional=bool(label_names)
    )
    spec = DenoiserSpec(
        model=model, diffusion=DiffusionConfig(num_steps=20, prediction="x_0"), space=PixelSpace(image_size=8, mode="L"), label_names=label_names
    )
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = spec.build().state_dict()
    # A fresh network says 0 everywhere.
    weights = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in fresh.items()}
    write_checkpoint(Location.of(folder / "checkpoint"), spec, weights)
    return str(folder / "checkpoint")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("conditional"), CLASSES)


class Served:
    """A model as the scoring server calls it: rows, and params."""

    def __init__(self, checkpoint: str) -> None:
        from pipeline.registry.served_model import Sampler

        self._model: Any = Sampler()
        self._model.load_context(SimpleNamespace(artifacts={"checkpoint": checkpoint}))

    def __call__(self, *rows: dict[str, Any], **params: Any) -> Any:
        return self._model.predict(None, pd.DataFrame(list(rows)), {"steps": 3, **params})


@pytest.fixture(scope="module")
def served(checkpoint: str) -> Served:
    return Served(checkpoint)


@pytest.fixture(scope="module")
def served_classes(conditional: str) -> Served:
    return Served(conditional)


def draw(checkpoint: str, out: Path, sampler: str = "ddim", steps: int = 5, **options: Any) -> bytes:
    draw_grid(checkpoint, num=3, steps=steps, seed=0, sampler=sampler, out=out, storage=Location.of(out.parent), **options)
    return Image.open(out).tobytes()


def test_each_sampler_draws_its_own_picture(checkpoint: str, tmp_path: Path):
    assert len({draw(checkpoint, tmp_path / f"{sampler}.png", sampler) for sampler in SAMPLERS}) == len(SAMPLERS)


def test_an_unknown_sampler_and_too_many_steps_are_refused_by_option(checkpoint: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="--sampler euler is unknown; use ddim, ancestral, dpmpp_2m, unipc or heun"):
        draw(checkpoint, tmp_path / "grid.png", "euler")
    with pytest.raises(ConfigError, match="--steps=21 is out of range; use 1 to 20"):
        draw(checkpoint, tmp_path / "grid.png", "unipc", steps=21)


def test_a_class_is_drawn_by_name_or_number_and_by_turns_without_one(conditional: str, tmp_path: Path):
    by_turns, dogs, number = (draw(conditional, tmp_path / "grid.png", label=label) for label in (None, "dog", "0"))
    assert len({by_turns, dogs, number}) == 3
    assert draw(conditional, tmp_path / "grid.png", label="cat") == number


def test_a_class_with_a_number_for_a_name_is_meant_by_its_name(conditional: str):
    denoiser = load_denoiser(Location.of(conditional))
    assert [denoiser.spec.label_number(label) for label in ("cat", "dog", "1", "0", "2")] == [0, 1, 2, 0, 2]


def test_guidance_leads_away_from_what_is_drawn_without(conditional: str, tmp_path: Path):
    assert draw(conditional, tmp_path / "grid.png", guidance=3.0) != draw(conditional, tmp_path / "grid.png")


def test_label_and_guidance_are_refused_by_option_where_they_mean_nothing(checkpoint: str, conditional: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="--label=cat has no effect on a model without classes; leave it out"):
        draw(checkpoint, tmp_path / "grid.png", label="cat")
    with pytest.raises(ConfigError, match="--guidance=2 needs a conditional model, and this one has no classes; use guidance=1"):
        draw(checkpoint, tmp_path / "grid.png", guidance=2.0)
    with pytest.raises(ConfigError, match=r"--label=cow is unknown; use a class's name \(cat, dog, 1\) or a number from 0 to 2"):
        draw(conditional, tmp_path / "grid.png", label="cow")


def test_the_command_takes_a_label_and_a_guidance(run: Any, conditional: str):
    code, stdout, stderr = run("sample", conditional, "--num", "3", "--steps", "3", "--label", "dog", "--guidance", "2", "--out", "grid.png")
    assert (code, stdout) == (0, "grid.png\n"), stderr
    code, _, stderr = run("sample", conditional, "--steps", "3", "--label", "cow")
    assert code == 2
    assert stderr.startswith("error: --label=cow is unknown")


def test_an_image_depends_on_its_seed_only_across_batches_too(checkpoint: str):
    denoiser = load_denoiser(Location.of(checkpoint))
    many = draw_pixels(denoiser, Request(Recipe(steps=3), BATCH_SIZE + 2, seed=7))
    for index in (0, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1):
        assert np.array_equal(many[index], draw_pixels(denoiser, Request(Recipe(steps=3), seed=7 + index))[0])


def test_the_last_seeds_are_drawn_and_none_beyond(checkpoint: str):
    denoiser = load_denoiser(Location.of(checkpoint))
    assert len(draw_pixels(denoiser, Request(Recipe(steps=2), 2, seed=MAX_SEED - 1))) == 2
    with pytest.raises(ValueError, match=f"seed={MAX_SEED} is out of range; use 0 to {MAX_SEED - 1}"):
        draw_pixels(denoiser, Request(Recipe(steps=2), 2, seed=MAX_SEED))


def test_a_served_model_offers_every_sampler(served: Served):
    assert len({served({"sampler": sampler}, num_images=2, steps=5, format="array").tobytes() for sampler in SAMPLERS}) == len(SAMPLERS)
    assert served({"sampler": "ddim"}) == served()


def test_no_row_at_all_is_what_the_params_ask_for(served: Served):
    assert len(served()) == 1
    assert served(num_images=2, seed=5) == served({"num_images": 2, "seed": 5})


def test_a_column_wins_over_a_param_and_a_hole_in_it_does_not(served: Served):
    assert served({"seed": 5}, seed=4) == served(seed=5)
    assert served({"seed": 5}, {"seed": None}, seed=4) == served(seed=5) + served(seed=4)


def test_each_row_is_a_request_of_its_own_and_all_are_answered_in_order(served: Served):
    rows = [{"num_images": 2, "seed": 3}, {"sampler": "ancestral"}, {"num_images": 1, "seed": 9, "steps": 4}]
    assert served(*rows) == [image for row in rows for image in served(row)]
    assert served(*rows, format="array").shape == (4, 8, 8, 1)


def test_pngs_and_arrays_are_the_same_pixels(served: Served):
    pngs, arrays = served(num_images=3), served(num_images=3, format="array")
    assert arrays.dtype == np.uint8
    assert np.array_equal(np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs]), arrays[..., 0])


def test_steps_are_fifty_or_as_many_as_a_model_has(checkpoint: str):
    from pipeline.registry.served_model import parameters

    assert {name: default for name, _, default in parameters(1000)}["steps"] == 50
    assert Served(checkpoint)(steps=None) == Served(checkpoint)(steps=20)


def test_a_class_is_asked_for_by_name_or_number(served_classes: Served):
    dogs = served_classes({"label": "dog"})
    assert dogs != served_classes()
    assert served_classes({"label": 0}) == served_classes({"label": "cat"}) == served_classes(label="0")
    assert served_classes({"label": "dog"}, {"label": 0}) == dogs + served_classes(label="cat")
    assert served_classes({"label": "dog", "guidance": 3}) != dogs


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sampler": "euler"}, "sampler=euler is unknown; use ddim, ancestral, dpmpp_2m, unipc or heun"),
        ({"format": "jpeg"}, "format=jpeg is unknown; use png or array"),
        ({"steps": 21}, "steps=21 is out of range; use 1 to 20, the model's number of noise levels"),
        ({"steps": 4.5}, "steps=4.5 is no exact whole number; use one such as steps=1"),
        ({"seed": 2.0**60}, "seed=1.152921504606847e\\+18 is no exact whole number"),
        ({"num_images": 0}, "num_images=0 is out of range; use 1 to 10000"),
        ({"num_images": True}, "num_images=True is no exact whole number"),
        ({"num_images": "4"}, "num_images=4 is no exact whole number"),
        ({"seed": -1}, f"seed=-1 is out of range; use 0 to {MAX_SEED}"),
        ({"label": "cat"}, "label=cat has no effect on a model without classes; leave it out, or train with model.conditional=true"),
        ({"guidance": 2}, "guidance=2 needs a conditional model, and this one has no classes; use guidance=1"),
        ({"guidance": "much"}, "guidance=much is no number; use one such as guidance=1.5"),
        ({"guidance": -1.0}, "guidance=-1.0 is out of range; use 0 or more, 1 for none"),
    ],
)
def test_what_cannot_be_drawn_is_told_by_name_value_and_what_is_right(served: Served, row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        served(row)


def test_a_request_among_several_is_told_by_its_row_before_any_is_drawn(served: Served):
    with pytest.raises(ValueError, match=r"^row 1: steps=0 is out of range"):
        served({"num_images": 9000, "steps": 20}, {"steps": 0})
    with pytest.raises(ValueError, match=r"^num_images=12000 of all rows is out of range; use up to 10000 in one call"):
        served({"num_images": 6000}, {"num_images": 6000})
    with pytest.raises(ValueError, match=r"^format=array differs from the first row's png; ask for one format in one call"):
        served({"format": "png"}, {"format": "array"})

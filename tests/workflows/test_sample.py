"""Every sampler can be asked for from the command line and of a served model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from components.diffusion.recipe import SAMPLERS
from components.diffusion.schedule import DiffusionConfig
from components.model.checkpoint import DenoiserSpec, write_checkpoint
from components.model.unet import UNetConfig
from components.storage import Location
from pipeline.errors import ConfigError
from workflows.sample import draw_grid


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4, dropout=0.0)
    spec = DenoiserSpec(model=model, diffusion=DiffusionConfig(num_steps=20), image_size=8, channels=1)
    folder = Location.of(tmp_path_factory.mktemp("model") / "checkpoint")
    generator = torch.Generator().manual_seed(0)
    weights = {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in spec.build().state_dict().items()}
    write_checkpoint(folder, spec, weights)
    return str(folder)


def draw(checkpoint: str, out: Path, sampler: str, steps: int = 5) -> bytes:
    draw_grid(checkpoint, num=3, steps=steps, seed=0, sampler=sampler, out=out, storage="")
    return Image.open(out).tobytes()


def test_each_sampler_draws_its_own_picture(checkpoint: str, tmp_path: Path):
    assert len({draw(checkpoint, tmp_path / f"{sampler}.png", sampler) for sampler in SAMPLERS}) == len(SAMPLERS)


def test_an_unknown_sampler_and_too_many_steps_are_refused_by_option(checkpoint: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="--sampler euler is unknown; use ddim, ancestral, dpmpp_2m or unipc"):
        draw(checkpoint, tmp_path / "grid.png", "euler")
    with pytest.raises(ConfigError, match="--steps=21 is out of range; use 1 to 20"):
        draw(checkpoint, tmp_path / "grid.png", "unipc", steps=21)


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")
def test_a_served_model_offers_every_sampler_and_names_them_to_who_asks_for_another(checkpoint: str):
    from pipeline.registry.served_model import Sampler

    served: Any = Sampler()
    served.load_context(SimpleNamespace(artifacts={"checkpoint": checkpoint}))

    def predict(**row: Any) -> Any:
        return served.predict(None, pd.DataFrame([{"num_images": 2, "steps": 5, **row}]))

    assert len({predict(sampler=sampler, format="array").tobytes() for sampler in SAMPLERS}) == len(SAMPLERS)
    assert predict(sampler="ddim") == predict()
    with pytest.raises(ValueError, match="sampler=euler is unknown; use ddim, ancestral, dpmpp_2m or unipc"):
        predict(sampler="euler")
    with pytest.raises(ValueError, match="format=jpeg is unknown; use png or array"):
        predict(format="jpeg")

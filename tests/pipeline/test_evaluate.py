"""Drawing, measuring and comparing in this process, on a Ray of its own: who does the work, and what interrupts it, changes nothing."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from support import write_dataset

from cluster.config import ClusterConfig, ClusterError
from cluster.connect import connect, disconnect
from cluster.placement import Placement, place
from components.data.catalog import find_dataset
from components.data.reader import RowReader
from components.data.shards import Split, read_manifest
from components.diffusion.config import DiffusionConfig
from components.errors import DataError
from components.metrics.frechet import frechet_distance
from components.metrics.moments import FeatureStats
from components.metrics.reference import Reference
from components.model.checkpoint import write_checkpoint
from components.model.spec import DenoiserSpec
from components.networks.unet.config import UNetConfig
from components.spaces.pixels import PixelSpace
from components.storage import Location
from pipeline.context import Reporter, StageContext
from pipeline.measurement.actor_pool import ActorPool
from pipeline.measurement.compare import shard_set_of
from pipeline.measurement.config import EvaluateConfig
from pipeline.measurement.evaluator import Evaluator
from pipeline.measurement.extractors import check_extractor
from pipeline.measurement.measure import SampleFeatures, find_copies, paired_test
from pipeline.measurement.reference_statistics import RealFeatures
from pipeline.measurement.sample_dataset import keep_samples
from pipeline.measurement.sample_store import ROWS_PER_PART, SEEDS_PER_PART, Identity, RealSet, SampleSet, features_file, parts_of, pixels_file, write_array
from pipeline.measurement.sampling_actor import ExtractorChoice
from pipeline.registry.decide import unlike_parts

SPEC = DenoiserSpec(
    model=UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4, dropout=0.0),
    diffusion=DiffusionConfig(num_steps=20),
    space=PixelSpace(image_size=8, mode="L"),
)
CONFIG = EvaluateConfig(num_samples=600, steps=2, batch_size=64, extractor="dct8")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterConfig]:
    config = ClusterConfig(storage=str(tmp_path_factory.mktemp("ray")), num_workers=3)
    connect(config)
    yield config
    disconnect()


@pytest.fixture(scope="module")
def placement(cluster: ClusterConfig) -> Placement:
    return place(cluster, lambda line: None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Location:
    folder = Location.of(tmp_path_factory.mktemp("data") / "dataset")
    rng = np.random.default_rng(0)
    write_dataset(folder, [rng.integers(0, 256, (300, 1, 8, 8), dtype=np.uint8), rng.integers(0, 128, (300, 1, 8, 8), dtype=np.uint8)], ["a", "b"])
    return folder


def write_model(folder: Path, seed: int) -> Location:
    torch.manual_seed(seed)
    weights = {name: torch.randn_like(value) * 0.2 for name, value in SPEC.build().state_dict().items()}
    write_checkpoint(Location.of(folder), SPEC, weights)
    return Location.of(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Location]:
    root = tmp_path_factory.mktemp("models")
    return [write_model(root / str(seed), seed) for seed in (1, 2)]


@pytest.fixture
def evaluator(cluster: ClusterConfig, placement: Placement, dataset: Location, tmp_path: Path) -> Iterator[Callable[..., Evaluator]]:
    """Returns a function that opens an evaluator of some actors over a storage root, and closes the one before, whose CPUs they need."""
    teams: list[ActorPool] = []

    def opened(actors: int = 1, storage: str = "storage", config: EvaluateConfig = CONFIG) -> Evaluator:
        for before in teams:
            before.__exit__()
        teams.clear()
        actor_pool = ActorPool(replace(placement, num_samplers=actors), [ExtractorChoice("dct8")], cluster)
        teams.append(actor_pool)
        root = Location.of(tmp_path / storage)
        context = StageContext(root, root / "stage", "inputs", "run", cluster, Reporter())
        return Evaluator(config, shard_set_of(dataset), read_manifest(dataset), actor_pool, context)

    yield opened
    for actor_pool in teams:
        actor_pool.__exit__()


def evaluated(evaluator: Evaluator, model: Location) -> tuple[str, float]:
    samples = evaluator.samples_of(model, "ema")
    drawn = evaluator.draw(samples, CONFIG.seeds)
    return drawn.sha256, evaluator.measure(samples).frechet[0].value


def test_one_two_and_three_actors_draw_the_same_samples_and_measure_the_same_distance(evaluator: Callable[..., Evaluator], models: list[Location]):
    found = [evaluated(evaluator(actors, f"storage-{actors}"), models[0]) for actors in (1, 2, 3)]
    assert found[0] == found[1] == found[2]


def test_bfloat16_has_samples_and_a_unit_of_its_own(evaluator: Callable[..., Evaluator], models: list[Location]):
    config = CONFIG.model_copy(update={"num_samples": 64, "threshold": "dynamic"})
    one = evaluator(config=config)
    other = replace(one, config=config.model_copy(update={"precision": "bfloat16"}))
    samples, others = one.samples_of(models[0], "ema"), other.samples_of(models[0], "ema")
    assert samples.folder != others.folder
    assert one.draw(samples, config.seeds).sha256 != other.draw(others, config.seeds).sha256
    pixels, rounded = (one.pixels(which, range(64)).astype(float) for which in (samples, others))
    assert np.abs(pixels - rounded).mean() < 4
    assert unlike_parts(other.reference()[1], one.reference()[1]) == ["precision bfloat16 against float32"]


def test_auto_is_what_the_actors_hardware_says(evaluator: Callable[..., Evaluator]):
    actor_pool = evaluator().actor_pool
    assert [actor_pool.first("precision", wanted) for wanted in ("auto", "float32", "bfloat16")] == ["float32", "float32", "bfloat16"]


@pytest.mark.parametrize(("use_gpu", "device"), [(False, "cpu"), (True, "cuda")])
def test_pairs_are_compared_here_or_where_the_gpu_is(placement: Placement, cluster: ClusterConfig, use_gpu: bool, device: str):
    with ActorPool(replace(placement, num_samplers=1, use_gpu=use_gpu), [ExtractorChoice("dct8")], cluster) as actor_pool:
        process, where, given = actor_pool.compute(lambda given, device: (os.getpid(), device, given), 7)
    assert (process == os.getpid(), where, given) == (not use_gpu, device, 7)


def test_the_batch_is_no_part_of_a_sample(evaluator: Callable[..., Evaluator], models: list[Location]):
    one = evaluator()
    samples = one.samples_of(models[0], "ema")
    chosen, *others = (one.actor_pool.first("draw", samples, list(range(70)), size) for size in (0, 1, 64, 70))
    assert all(np.array_equal(chosen, other) for other in others)


def test_the_distance_is_that_of_all_samples_and_all_rows(evaluator: Callable[..., Evaluator], models: list[Location], dataset: Location):
    from components.metrics.features import DctExtractor

    one = evaluator()
    _, distance = evaluated(one, models[0])
    pixels = one.actor_pool.first("draw", one.samples_of(models[0], "ema"), list(CONFIG.seeds), 64)
    reader = RowReader(dataset, read_manifest(dataset))
    extract = DctExtractor()
    fake, real = (FeatureStats.of(np.asarray(extract(torch.from_numpy(images))), np.zeros(32)) for images in (pixels.copy(), reader.rows(np.arange(600))))
    assert distance == pytest.approx(frechet_distance(fake, real), rel=1e-6)


def test_an_actor_that_is_killed_changes_nothing(evaluator: Callable[..., Evaluator], models: list[Location]):
    undisturbed = evaluated(evaluator(2, "undisturbed"), models[0])
    other = evaluator(2, "disturbed")
    killed: list[int] = []

    def kill_one() -> None:
        folder = Path(str(other.context.storage))
        while not killed:
            begun = list(folder.glob("samples/*/fd_dct8_v1-*/*.npy"))
            actors = [process for process in psutil.Process().children(recursive=True) if "ray::Sampler.part" in " ".join(process.cmdline())]
            if begun and actors:
                actors[0].kill()
                killed.append(actors[0].pid)
            time.sleep(0.002)

    thread = threading.Thread(target=kill_one)
    thread.start()
    assert evaluated(other, models[0]) == undisturbed
    thread.join(timeout=1)
    assert killed


def test_work_that_kills_every_actor_ends_with_a_message(evaluator: Callable[..., Evaluator]):
    with pytest.raises(ClusterError, match="sampling actors died 5 times of one piece of work"):
        evaluator(2).actor_pool.first("__ray_terminate__")


def test_a_file_of_statistics_of_other_features_is_refused(evaluator: Callable[..., Evaluator], dataset: Location, tmp_path: Path):
    reference, _ = evaluator().reference()
    assert isinstance(reference, Reference)
    other = replace(reference, unit='{"extractor": "fd_clf_deadbeef", "extractor_digest": "deadbeef"}')
    other.save(Location.of(tmp_path / "other.npz"))
    config = CONFIG.model_copy(update={"reference": str(tmp_path / "other.npz")})
    with pytest.raises(DataError, match=r"other\.npz is of extractor fd_clf_deadbeef, and fd_dct8_v1 decides"):
        evaluator(config=config).reference()
    short = replace(reference, mean=reference.mean[:7], covariance=reference.covariance[:7, :7], root=np.sqrt(np.diag(np.diag(reference.covariance[:7, :7]))))
    replace(short, covariance=short.root @ short.root).save(Location.of(tmp_path / "short.npz"))
    config = CONFIG.model_copy(update={"reference": str(tmp_path / "short.npz")})
    with pytest.raises(DataError, match=r"evaluate\.reference=.*short\.npz has 7 features, and dct8 has 32"):
        check_extractor(config, shard_set_of(dataset), Location.of(tmp_path))


@pytest.mark.parametrize(
    ("copied", "verdict"), [(0, "no sign"), (30, "more samples next to training images than chance explains"), (150, "copies of training images")]
)
def test_copies_among_the_samples_are_told(tmp_path: Path, copied: int, verdict: str):
    rng, identity, folder = np.random.default_rng(0), Identity("fd_x", "0" * 64, ""), Location.of(tmp_path)
    training, unseen, samples = (rng.standard_normal((count, 16)).astype(np.float32) for count in (4096, 2048, 3000))
    samples[:copied] = training[:copied]
    for part in parts_of(range(3000), SEEDS_PER_PART):
        write_array(features_file(folder, identity, part), samples[part.start : part.stop])
    real_features = []
    splits: dict[Split, np.ndarray] = {"train": training, "holdout": unseen}
    for split, values in splits.items():
        real = RealSet(folder / "real", "", split)
        for part in parts_of(range(len(values)), ROWS_PER_PART):
            write_array(real.features_file(identity, part), values[part.start : part.stop])
        real_features.append(RealFeatures(real, identity, len(values), Reference.of(FeatureStats.of(values, np.zeros(16)))))
    found = find_copies(SampleFeatures(folder, identity, range(3000)), real_features[0], real_features[1])
    assert found is not None
    assert verdict in found[0].verdict
    assert (found[0].num_samples, found[0].num_searched, found[0].calibration) == (3000, 4096, "2,048 held-out images")
    if copied:
        assert all(pair.distance == 0 and pair.training_row == pair.sample for pair in found[1])


def test_classes_are_drawn_as_often_as_the_training_images_have_them(tmp_path: Path):
    samples = SampleSet(Location.of(tmp_path), "", "ema", CONFIG.recipe, (300, 0, 100))
    labels = samples.labels(range(2000))
    assert labels is not None
    counts = np.bincount(labels, minlength=3) / 2000
    assert counts[1] == 0
    assert abs(counts[0] - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    again = samples.labels([1999, 7])
    assert again is not None
    assert again.tolist() == labels[[1999, 7]].tolist()


def test_what_was_drawn_before_is_not_drawn_again_and_what_is_missing_is(evaluator: Callable[..., Evaluator], models: list[Location]):
    one = evaluator()
    samples, parts = one.samples_of(models[0], "ema"), parts_of(CONFIG.seeds, 256)
    work = [(samples, part, 64) for part in parts]
    whole = evaluated(one, models[0])
    assert [drawn for _, drawn in one.actor_pool.map("part", iter(work))] == [0, 0, 0]
    features_file(samples.folder, one.actor_pool.identities[0], parts[1]).remove()
    assert [drawn for _, drawn in one.actor_pool.map("part", iter(work))] == [0, 256, 0]
    assert evaluated(one, models[0]) == whole
    torn = features_file(samples.folder, one.actor_pool.identities[0], parts[2])
    torn.write_bytes(torn.read_bytes()[:-1])
    assert [drawn for _, drawn in one.actor_pool.map("part", iter(work))] == [0, 0, 88]
    assert evaluated(one, models[0]) == whole


def test_overlapping_blocks_share_their_parts():
    assert parts_of(range(600), 256) == [range(256), range(256, 512), range(512, 600)]
    assert parts_of(range(100, 700), 256) == [range(100, 256), range(256, 512), range(512, 700)]
    assert parts_of(range(5, 7), 256) == [range(5, 7)]
    assert parts_of(range(256, 512), 256) == [range(256, 512)]


def test_kept_samples_are_a_dataset_of_the_same_contract(evaluator: Callable[..., Evaluator], models: list[Location]):
    one = evaluator()
    samples = one.samples_of(models[0], "ema")
    pixels_folder = one.context.folder / "pixels"
    one.draw(samples, CONFIG.seeds, pixels_folder, need=True)
    folder = keep_samples(one.context.storage, samples, pixels_folder, CONFIG.seeds, one.manifest.space, [])
    manifest = find_dataset(str(folder), one.context.storage).manifest
    pixels = RowReader(folder, manifest).rows(np.arange(600))
    assert np.array_equal(pixels, one.actor_pool.first("draw", samples, list(CONFIG.seeds), 64))
    assert manifest.num_rows == 600
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    assert keep_samples(one.context.storage, samples, pixels_folder, CONFIG.seeds, one.manifest.space, []) == folder
    assert {path.name: path.read_bytes() for path in folder.path.iterdir()} == before


def test_pixels_that_were_kept_are_those_that_are_drawn_again(evaluator: Callable[..., Evaluator], models: list[Location]):
    one = evaluator()
    samples = one.samples_of(models[0], "ema")
    folder = one.context.folder / "pixels"
    one.draw(samples, CONFIG.seeds, folder)
    assert all(pixels_file(folder, part).is_file() for part in parts_of(CONFIG.seeds, 256))
    seeds = [511, 3, 3, 599]
    assert np.array_equal(one.pixels(samples, seeds, CONFIG.seeds, folder), one.pixels(samples, seeds))


def test_a_model_of_other_images_is_refused(evaluator: Callable[..., Evaluator], tmp_path: Path):
    spec = SPEC.model_copy(update={"space": PixelSpace(image_size=16, mode="L")})
    write_checkpoint(Location.of(tmp_path / "other"), spec, spec.build().state_dict())
    with pytest.raises(DataError, match=r"draws 16x16 grey, and dataset .* holds 8x8 grey; name one of the same shape"):
        evaluator().samples_of(Location.of(tmp_path / "other"), "ema")


def test_common_seeds_tell_a_small_difference_that_separate_errors_would_hide(evaluator: Callable[..., Evaluator], models: list[Location], tmp_path: Path):
    one = evaluator()
    torch.manual_seed(1)
    weights = {name: torch.randn_like(value) * 0.2 for name, value in SPEC.build().state_dict().items()}
    nearly = {name: value * (1.001 if "out" in name else 1.0) for name, value in weights.items()}
    write_checkpoint(Location.of(tmp_path / "nearly"), SPEC, nearly)
    sampled = []
    for model in (models[0], Location.of(tmp_path / "nearly")):
        samples = one.samples_of(model, "ema")
        one.draw(samples, CONFIG.seeds)
        sampled.append(SampleFeatures(samples.folder, one.actor_pool.identities[0], CONFIG.seeds))
    reference, _ = one.reference()
    test = paired_test(sampled[1], sampled[0], reference)
    alone = one.measure(one.samples_of(models[0], "ema")).frechet[0].standard_error
    assert alone is not None
    assert 0 < test.standard_error < alone / 3
    assert paired_test(sampled[0], sampled[1], reference).difference == pytest.approx(-test.difference)
    assert paired_test(sampled[0], sampled[0], reference).difference == 0

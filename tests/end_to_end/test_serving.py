"""A registered version stands alone: it loads and serves where this project is not, holds no pickle, and diffusers reads it too."""

import ast
import base64
import io
import json
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keeper
import numpy as np
import pytest
import torch
from PIL import Image
from servers import environment, fetch, free_ports
from support import TINY, Finished

from components.diffusion.recipe import Recipe
from components.diffusion.schedule import Schedule
from components.figures import grid
from components.model.checkpoint import load_denoiser
from components.model.request import Request, draw
from components.storage import Location

NAME = "ddpm-digits"
DISTRIBUTIONS = {"PIL": "pillow", "mlflow": "mlflow-skinny"}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
TYPE_HINTS = "ignore:.*(Add type hints to the|Any type hint is inferred):UserWarning"

pytestmark = pytest.mark.filterwarnings(TYPE_HINTS)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def registered(home: Path, command: Callable[..., Finished]) -> dict[str, Any]:
    """The receipts of a small conditional run."""
    done = command("run", "digits", *TINY, "model.conditional=true", "cluster.num_workers=1", "--json", cwd=home)
    assert done.code == 0, done.stderr
    return done.json


@pytest.fixture(scope="module")
def tracking_uri(home: Path, registered: dict[str, Any]) -> str:
    return f"sqlite:///{home / 'storage' / 'mlflow' / 'mlflow.db'}"


@pytest.fixture(scope="module")
def version(tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The champion's files, downloaded."""
    import mlflow

    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    return downloaded(tmp_path_factory.mktemp("version"))


def downloaded(folder: Path) -> Path:
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion", dst_path=str(folder)))


@pytest.fixture(scope="module")
def clean_python(version: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment that holds what the version's requirements.txt asks for, and nothing else."""
    from uv import find_uv_bin

    folder = tmp_path_factory.mktemp("clean") / "venv"
    network = [] if os.environ.get("DDPM_TEST_NETWORK") == "1" else ["--offline"]
    python = folder / "bin" / "python"
    subprocess.run([find_uv_bin(), "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, timeout=60)
    install = [find_uv_bin(), "pip", "install", "--quiet", *network, "--python", str(python), "-r", str(version / "requirements.txt")]
    done = subprocess.run(install, check=False, timeout=300, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"uv has not all wheels of the requirements in its cache; set DDPM_TEST_NETWORK=1 to fetch them ({done.stderr.strip()[-200:]})")
    yield python
    # pytest keeps its folders for a while, and torch for CUDA takes 5 GB where the cache is on another disk.
    shutil.rmtree(folder)


def drawn(version: Path, count: int, steps: int, seed: int, **more: Any) -> np.ndarray:
    """Returns the pixels (N, C, H, W) that this project draws of a version's checkpoint."""
    recipe = Recipe(steps=steps, guidance=more.pop("guidance", 1.0))
    return draw(load_denoiser(Location.of(version / "artifacts" / "checkpoint")), Request(recipe, count, seed, **more))


def pixels_of(pngs: list[str]) -> np.ndarray:
    """Returns the pixels (N, 1, H, W) of PNGs in base64."""
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))[None] for png in pngs])


DRAW_ELSEWHERE = """
import base64, importlib.util, json, sys
present = [name for name in ("components", "pipeline", "workflows", "cluster", "safetensors", "diffusers", "ray") if importlib.util.find_spec(name)]
import mlflow, uvicorn
from mlflow.pyfunc import scoring_server
model = mlflow.pyfunc.load_model(sys.argv[1])
pngs = model.predict({"num_images": 3, "steps": 4, "seed": 5, "label": "7", "guidance": 2})
scoring_server.init(model)
body = json.dumps({"inputs": {"num_images": 2, "steps": 4}})
answer = scoring_server.invocations(body, "application/json", model, model.metadata.get_input_schema())
array = model.predict({}, params={"num_images": 2, "steps": 4, "format": "array"})
said = {"present": present, "pngs": [base64.b64encode(png).decode() for png in pngs], "array": array.tolist()}
print(json.dumps(said | {"served": json.loads(answer.response), "imported": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def elsewhere(clean_python: Path, version: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process says that has the version's files and its requirements, an empty folder to work in and no way to any server."""
    folder = tmp_path_factory.mktemp("empty")
    env = QUIET | {"HOME": str(folder), "PATH": os.defpath, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    arguments = [str(clean_python), "-I", "-c", DRAW_ELSEWHERE, str(version)]
    done = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_where_only_its_requirements_are_installed_it_draws_what_the_project_draws(elsewhere: Any, version: Path):
    assert elsewhere["present"] == []
    assert np.array_equal(pixels_of(elsewhere["pngs"]), drawn(version, 3, 4, 5, label="7", guidance=2.0))
    assert np.array_equal(np.array(elsewhere["array"]).transpose(0, 3, 1, 2), drawn(version, 2, 4, 0))
    assert np.array_equal(pixels_of(elsewhere["served"]["predictions"]), drawn(version, 2, 4, 0))


def test_its_requirements_are_pinned_and_each_is_used(elsewhere: Any, version: Path):
    pins = dict(line.split("==") for line in (version / "requirements.txt").read_text().split())
    imported = {DISTRIBUTIONS.get(name, name) for name in elsewhere["imported"]}
    assert set(pins) <= imported
    stated = {DISTRIBUTIONS.get(name, name) for file in (version / "sampler.py", *(version / "code").rglob("*.py")) for name in imports_at_the_top(file)}
    assert stated - set(sys.stdlib_module_names) == set(pins)


def imports_at_the_top(file: Path) -> Iterator[str]:
    """Yields the names of the packages that a file imports when it is loaded."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_it_carries_the_code_that_sampling_needs_and_no_more(elsewhere: Any, version: Path):
    (package,) = (version / "code").iterdir()
    files = {file.relative_to(version / "code").with_suffix("") for file in package.rglob("*.py")}
    carried = {".".join(file.parts).removesuffix(".__init__") for file in files}
    # Kinds of networks are found by their place, whether this version is of them or not; what only pictures of points or latents need is not loaded.
    spare = {name for name in carried if name.startswith((f"{package.name}.networks.", f"{package.name}.autoencoder"))} | {f"{package.name}.spaces.scatter"}
    loaded = {name for name in elsewhere["imported"] if name.startswith(package.name)}
    assert loaded <= carried <= loaded | spare


def test_ddpm_sample_draws_the_same_picture(home: Path, command: Callable[..., Finished], version: Path, registered: dict[str, Any]):
    arguments = ["--num", "6", "--steps", "4", "--seed", "5", "--label", "7", "--guidance", "2", "--out", "six.png"]
    done = command("sample", f"models:/{NAME}@champion", *arguments, cwd=home)
    assert done.code == 0, done.stderr
    with Image.open(home / "six.png") as picture, grid(drawn(version, 6, 4, 5, label="7", guidance=2.0), 4) as expected:
        assert np.array_equal(np.asarray(picture), np.asarray(expected))


@pytest.fixture(scope="module")
def served(home: Path, tracking_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow models serve` for the champion."""
    port = str(free_ports(1)[0])
    serve = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion", "--env-manager", "local", "-h", "127.0.0.1", "-p", port]
    kept = keeper.start(serve, log=tmp_path_factory.mktemp("serve") / "log", env=environment(QUIET | {"MLFLOW_TRACKING_URI": tracking_uri}))
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", kept)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        kept.end()


def wait_for(url: str, kept: keeper.Kept) -> None:
    deadline = time.monotonic() + 180
    while True:
        try:
            fetch(url)
        except OSError:
            assert kept.is_running(), kept.tail()
            assert time.monotonic() < deadline, kept.tail()
            time.sleep(0.3)
        else:
            return


def curl(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Returns status and answer."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    arguments = ["curl", "-sS", "--noproxy", "*", "-w", "\n%{http_code}", "-H", "Content-Type: application/json", "-d", json.dumps(body), url]
    answer, _, status = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=120).stdout.rpartition("\n")
    return int(status), json.loads(answer)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"num_images": 3, "steps": 4, "seed": 5}},
        {"inputs": {}, "params": {"num_images": 3, "steps": 4, "seed": 5}},
        {"inputs": {"num_images": 3, "seed": 5}, "params": {"num_images": 9, "steps": 4}},
        {"dataframe_records": [{"num_images": 1, "seed": 5, "steps": 4}, {"num_images": 2, "seed": 6}], "params": {"steps": 4}},
        {"dataframe_split": {"columns": ["seed", "sampler"], "data": [[5, None], [6, "ddim"], [7, None]]}, "params": {"steps": 4}},
    ],
    ids=["inputs", "params", "both", "records", "split"],
)
def test_the_server_answers_curl_with_images(served: str, version: Path, body: dict[str, Any]):
    status, answer = curl(served, body)
    assert status == 200, answer
    assert np.array_equal(pixels_of(answer["predictions"]), drawn(version, 3, 4, 5))


def test_the_server_draws_a_class_with_guidance(served: str, version: Path):
    status, answer = curl(served, {"inputs": {"num_images": 2, "steps": 4, "label": "3", "guidance": 2}})
    assert status == 200, answer
    assert np.array_equal(pixels_of(answer["predictions"]), drawn(version, 2, 4, 0, label="3", guidance=2.0))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"steps": 0}, "steps=0 is out of range; use 1 to 1000, the model's number of noise levels"),
        ({"num_images": 2.5}, "num_images=2.5 is no exact whole number"),
        ({"num_images": 20_000}, "num_images=20000 is out of range; use 1 to 10000"),
        ({"sampler": "euler"}, "sampler=euler is unknown; use ddim, ancestral, dpmpp_2m, unipc or heun"),
        ({"label": "cat"}, "label=cat is unknown; use a class's name (0, 1, 2, 3, 4, 5, 6, 7, 8, 9) or a number from 0 to 9"),
    ],
)
def test_the_server_says_what_is_wrong_without_a_stack_trace(served: str, inputs: dict[str, Any], message: str):
    status, answer = curl(served, {"inputs": inputs})
    assert (status, answer["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
    assert message in answer["message"]
    assert "Traceback" not in json.dumps(answer)


def test_a_loaded_version_takes_dicts_rows_frames_and_params(version: Path):
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model(str(version))
    expected = model.predict({"num_images": 2, "steps": 2, "seed": 3})
    params = {"num_images": 2, "steps": 2, "seed": 3}
    assert model.predict([{"num_images": 1, "steps": 2, "seed": 3}, {"steps": 2, "seed": 4}]) == expected
    assert model.predict(pd.DataFrame([{"num_images": 2, "steps": 2, "seed": 3}])) == expected
    assert model.predict(pd.DataFrame(), params=params) == model.predict({}, params=params) == expected
    with pytest.raises(ValueError, match=r"^steps=1001 is out of range"):
        model.predict({"steps": 1001})


def test_its_signature_and_example_tell_what_it_takes(version: Path):
    from mlflow.models import Model

    model: Any = Model.load(str(version))
    known = ["num_images", "steps", "seed", "sampler", "label", "guidance", "format"]
    assert model.signature.inputs.input_names() == [param.name for param in model.signature.params] == known
    assert model.signature.inputs.required_input_names() == []
    assert {param.name: param.default for param in model.signature.params}["steps"] == 50
    assert model.load_input_example(str(version)) == {"num_images": 2, "steps": 4, "seed": 0}


def test_it_tells_nothing_of_the_machine_that_made_it(version: Path, home: Path):
    assert not [line for line in (version / "MLmodel").read_text().splitlines() if ": /" in line or "file:" in line]
    for place in (home, Path(__file__).parent.parent.parent, Path.home()):
        assert not [file for file in version.rglob("*") if file.is_file() and str(place).encode() + b"/" in file.read_bytes()]


def is_pickle(content: bytes) -> bool:
    """Tells whether bytes are a pickle, of any protocol, or a zip, which is what torch.save and numpy's savez put pickles into."""
    if content.startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        return True
    codes = []
    try:
        for code, _, _ in pickletools.genops(content):
            codes.append(code.name)
    except Exception:
        # joblib puts arrays between the codes, so that the first ones must do.
        return codes[:1] == ["PROTO"] and len(codes) > 2
    return len(codes) > 1


def test_the_scan_knows_a_pickle():
    value = {"weights": [1.5, "two"], "shape": (3, 4)}
    saved = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, saved)
    assert all(is_pickle(content) for content in (*(pickle.dumps(value, protocol) for protocol in range(6)), saved.getvalue(), pickle.dumps(value) + b"\0"))
    assert not any(is_pickle(content) for content in (b"", b"{}\n", b'{"weights": [1.5]}', b"\x80\x02\0\0\0\0\0\0{}", b"import pickle\n", b"# Title\n"))


def test_no_file_of_a_version_is_a_pickle(version: Path, tmp_path: Path):
    # Loading leaves compiled modules beside the code, so that this looks at files that nobody has loaded.
    files = [file for file in downloaded(tmp_path).rglob("*") if file.is_file()]
    assert {"MLmodel", "sampler.py", "ema.safetensors", "diffusion_pytorch_model.safetensors"} <= {file.name for file in files}
    assert [file for file in files if is_pickle(file.read_bytes())] == []
    assert {file.suffix for file in files} == {"", ".py", ".json", ".yaml", ".txt", ".md", ".safetensors"}


def test_diffusers_reads_the_version_and_computes_the_same(version: Path):
    from diffusers import DDPMPipeline

    theirs: Any = DDPMPipeline.from_pretrained(version / "artifacts" / "diffusers", low_cpu_mem_usage=False, local_files_only=True)
    ours = load_denoiser(Location.of(version / "artifacts" / "checkpoint"))
    x, t, labels = torch.randn(3, *ours.spec.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 17, 999]), torch.tensor([0, 9, 10])
    with torch.inference_mode():
        torch.testing.assert_close(theirs.unet(x, t, class_labels=labels).sample, ours.network(x, t, labels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.scheduler.alphas_cumprod.double(), Schedule(ours.spec.diffusion).alpha_bar, rtol=1e-4, atol=1e-7)

"""A version's page in Markdown."""

from pipeline.artifacts import Evaluation, Memorisation, ShardSet, TrainedModel
from pipeline.registry.decide import Decision
from pipeline.tracking import public_uri


def describe(decision: Decision, number: int, shards: ShardSet, model: TrainedModel, evaluation: Evaluation, name: str, uri: str, run_id: str) -> str:
    """Returns a version's page in Markdown: number, picture, data, recipe, how to load it."""
    metric, unit = evaluation.metric, evaluation.metric.unit
    guards = "".join(f"| {guard.name} | {guard.value:.4g} |\n" for guard in evaluation.guards)
    error = "" if metric.standard_error is None else f" ± {1.96 * metric.standard_error:.2g}"
    floor, copies = evaluation.floor, evaluation.memorisation
    real = "" if floor is None else f"| real images | {floor.value:.4g}: {floor.count} {floor.measured} |\n"
    memory = "" if copies is None else f"| memorisation | {_memory(copies)} |\n"
    return f"""{metric.name} {metric.value:.4g} - {decision.reason}

![samples](get-artifact?run_id={run_id}&path=evaluate%2Fgrid.png)

| | |
|---|---|
| {metric.name} | {metric.value:.4g}{error} (Frechet distance, lower is better) |
{guards}{real}{memory}| samples | {unit.num_samples}, {unit.sampler}, seeds from {unit.first_seed} |
| reference | dataset {unit.reference_digest}, {unit.reference_count} images |
| data | {shards.source}: {shards.num_rows} images of {shards.image_size}x{shards.image_size}x{shards.channels}, {shards.num_quarantined} quarantined |
| training | {evaluation.step} steps, loss {model.loss:.4g}, {model.parameters / 1e6:.2f} M parameters, {model.precision} |
| hardware | {model.num_workers} x {model.device}, {model.images_per_second:.0f} images/s |
| config | {model.config_digest} |

```python
import mlflow
mlflow.set_tracking_uri("{public_uri(uri)}")
images = mlflow.pyfunc.load_model("models:/{name}/{number}").predict({{"num_images": 16, "steps": 50, "seed": 0}})
```
"""


def _memory(copies: Memorisation) -> str:
    return f"{copies.verdict}: copy rate {copies.copy_rate:.2%}, about {copies.expected:.0%} expected"

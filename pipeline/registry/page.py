"""The pages of a version and of a registered model, in the Markdown that MLflow shows."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.counts import counted
from components.spaces.space import Space
from pipeline.artifacts import Evaluation, Memorisation, Metric, ShardSet, TrainedModel
from pipeline.progress import duration
from pipeline.registry.move import Move
from pipeline.tracking import ui_fragment

DESCRIPTION_LIMIT = 5000
_HEAD, _NO_HEAD = "Champion:", "There is no champion."
MOST_MOVES, MOST_WORDS, MOST_REASONS = 20, 160, 4


@dataclass(frozen=True)
class Made:
    """What a version is made of.

    Attributes:
        run_name: what a person calls the run.
    """

    shards: ShardSet
    model: TrainedModel
    evaluation: Evaluation
    run_name: str


@dataclass(frozen=True)
class Address:
    """Where a version is found.

    Attributes:
        uri: the tracking store, without a password.
    """

    uri: str
    name: str
    version: int
    experiment_id: str
    run_id: str


def version_page(made: Made, move: Move | None, address: Address) -> str:
    """Returns a version's page: number with unit and interval, decision, picture, what it was made of, how to load it.

    Args:
        move: the gate's decision, None before there is one.
    """
    metric, decision = made.evaluation.metric, move.why if move else "the gate has not decided yet"
    rows = [*_numbers(made, move), *_origins(made, address)]
    facts = "\n".join(f"- **{name}**: {value}" for name, value in rows)
    return f"""{_headline(metric, move)}

{decision}

![samples, seeds from {metric.unit.first_seed}](get-artifact?run_id={address.run_id}&path=evaluate%2Fgrid.png)

{facts}

{_how_to_load(address, made.shards.space)}"""[:DESCRIPTION_LIMIT]


def _headline(metric: Metric, move: Move | None) -> str:
    """Returns the one line that the list of versions shows."""
    unit = metric.unit
    before = f" (champion v{move.champion_test.champion_version}: {move.champion_test.test.champion:.4g})" if move and move.champion_test else ""
    became = {"promoted": ": became champion", "kept": ": champion kept"}.get(move.kind, "") if move else ""
    return f"{metric.name} {metric.value:.4g}{_error(metric)}{before}{became} - {counted(unit.num_samples, 'sample')}, {unit.drawn_by}"


def _error(metric: Metric) -> str:
    return "" if metric.standard_error is None else f" ± {1.96 * metric.standard_error:.2g}"


def _numbers(made: Made, move: Move | None) -> list[tuple[str, str]]:
    evaluation = made.evaluation
    metric, unit = evaluation.metric, evaluation.metric.unit
    rows = [
        (metric.name, f"{metric.value:.4g}{_error(metric)} (95 %), a squared Frechet distance; lower is better"),
        (
            "unit",
            f"{unit.extractor} ({unit.extractor_digest[:12]}), {counted(unit.num_samples, 'sample')} from seed {unit.first_seed}, {unit.drawn_by}, "
            f"against {counted(unit.reference_count, made.shards.space.noun)} ({unit.reference_split}) of {unit.reference_digest[:16]}",
        ),
    ]
    if move and move.champion_test:
        rows.append(("against the champion", move.champion_test.in_words))
    if evaluation.floor is not None:
        rows.append((f"real {made.shards.space.noun}s score", f"{evaluation.floor.value:.4g} ({evaluation.floor.count} {evaluation.floor.measured})"))
    rows += [(guard.name, f"{guard.value:.4g}{_error(guard)}") for guard in evaluation.guards]
    if evaluation.memorisation is not None:
        rows.append(("memorisation", _memory(evaluation.memorisation)))
    return rows


def _memory(copies: Memorisation) -> str:
    return f"{copies.verdict}: copy rate {copies.copy_rate:.2%}, about {copies.expected:.0%} expected"


def _origins(made: Made, address: Address) -> list[tuple[str, str]]:
    shards, model, evaluation = made.shards, made.model, made.evaluation
    run = ui_fragment(f"experiments/{address.experiment_id}/runs/{address.run_id}")
    artifacts = ui_fragment(f"experiments/{address.experiment_id}/runs/{address.run_id}/artifacts")
    held_out = shards.num_rows - shards.num_train
    return [
        (
            "dataset",
            f"[{shards.digest}]({artifacts}): {counted(shards.num_rows, shards.space.noun)}, {shards.space.description}"
            f"{f', {held_out} held out' if held_out else ''}, "
            f"{_quarantined(shards)}; from `{' '.join(shards.source.replace('`', ' ').split())}`",
        ),
        (
            "recipe",
            f"{_training(made)}, {model.parameters / 1e6:.2f} M parameters, {model.precision}, average `{evaluation.weights}`; config {model.config_digest}",
        ),
        ("hardware", _hardware(made)),
        ("run", f"[{made.run_name}]({run}): every setting, curves, [artifacts]({artifacts}) with report.html"),
    ]


def _training(made: Made) -> str:
    model = made.model
    if model.loss is None:
        return f"trained elsewhere: {model.start}"
    return f"{counted(made.evaluation.step, 'step')} from {model.start or 'fresh weights'}, loss {model.loss:.4g}"


def _hardware(made: Made) -> str:
    model = made.model
    if model.loss is None:
        return "not known"
    return f"{model.num_workers} x {model.device}, {model.images_per_second:.0f} {made.shards.space.noun}s/s, {duration(model.seconds)} of training"


def _quarantined(shards: ShardSet) -> str:
    if not shards.num_quarantined:
        return "none quarantined"
    worst = sorted(shards.quarantined.items(), key=lambda item: (-item[1], item[0]))
    reasons = ", ".join(f"{count} {reason}" for reason, count in worst[:MOST_REASONS])
    return f"{shards.num_quarantined} quarantined ({reasons}{', ...' if len(worst) > MOST_REASONS else ''})"


def _how_to_load(address: Address, space: Space) -> str:
    answer = "pngs" if space.one_tile_per_row else f"{space.noun}s"
    return f"""```python
import mlflow; mlflow.set_tracking_uri("{address.uri}")
model = mlflow.pyfunc.load_model("models:/{address.name}/{address.version}")
{answer} = model.predict({{"num_images": 16, "seed": 0}})
```
"""


def is_ours(page: str) -> bool:
    """Tells whether a registered model's page is one that `model_page` wrote."""
    return page.startswith((_HEAD, _NO_HEAD))


def model_page(name: str, champion_page: str, moves: Sequence[Move]) -> str:
    """Returns a registered model's page: the champion's, and the last moves, as many as fit.

    Args:
        champion_page: the page of its champion's version; empty where there is none.
        moves: the whole log, oldest first.
    """
    champion = moves[-1].champion if moves else None
    head = f"{_HEAD} version {champion}. {champion_page}" if champion else _NO_HEAD
    if champion:
        head = head.replace(f'"models:/{name}/{champion}"', f'"models:/{name}@champion"')
    lines = ["", "", "| when | who | what | why |", "|---|---|---|---|"]
    more = f"\nAll {counted(len(moves), 'move')}: `ddpm models log {name}`\n"
    room = DESCRIPTION_LIMIT - len("\n".join([head, *lines])) - len(more)
    for move in list(reversed(moves))[:MOST_MOVES]:
        cells = (move.when[:16].replace("T", " "), move.who, _what(move), move.why)
        line = f"| {' | '.join(_cell(text) for text in cells)} |"
        room -= len(line) + 1
        if room < 0:
            break
        lines.append(line)
    return "\n".join([head.rstrip(), *lines, more])[:DESCRIPTION_LIMIT]


def _what(move: Move) -> str:
    about = "" if move.version is None else f"v{move.version} "
    return f"{about}{move.kind}; champion {f'v{move.champion}' if move.champion else 'none'}"


def _cell(text: str) -> str:
    """Returns text as a cell; MLflow draws its tables without a gap between columns, so a wide space ends it."""
    text = " ".join(text.split()).replace("|", "\\|")
    return f"{text if len(text) <= MOST_WORDS else f'{text[: MOST_WORDS - 3]}...'}\u2003"

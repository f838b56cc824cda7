"""What a sweep varies: `key=[a,b,c]` is a choice, `key=a..b` a range, `key=a..b:log` a range of orders of magnitude."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin

import yaml

from components.networks.kinds import KINDS
from pipeline.config import RunConfig, section_fields
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from ray.tune.search.sample import Domain

Value = bool | int | float | str | list[Any] | None
Settings = Mapping[str, Value]
"""What a trial is told, by `section.key`."""
SECTIONS = ("model", "diffusion", "train")
DECIDED = ("train.steps", "train.validate_every", "train.validate_images", "train.validate_samples")
"""What makes trials comparable, and so is the same in all."""
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_WHOLE = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(_NUMBER)


@dataclass(frozen=True)
class Choice:
    """Some values, each as likely."""

    values: tuple[Value, ...]

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Values by which mistakes show."""
        return self.values

    def domain(self) -> "Domain":
        """Returns what Ray Tune samples from."""
        from ray import tune

        return tune.choice(list(self.values))


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both ends included where they are whole; with `log` every order of magnitude is as likely."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Values by which mistakes show."""
        return (self.low, self.high)

    def domain(self) -> "Domain":
        """Returns what Ray Tune samples from."""
        from ray import tune

        if self.whole:
            return (tune.lograndint if self.log else tune.randint)(int(self.low), int(self.high) + 1)
        return (tune.loguniform if self.log else tune.uniform)(self.low, self.high)


Space = Mapping[str, Choice | Range]
"""What is varied, by `section.key`."""


def parse_space(arguments: Sequence[str]) -> tuple[Space, list[str]]:
    """Returns what a command's `section.key=value` arguments vary, and those that give one value, which are ordinary settings.

    Raises:
        ConfigError: naming the first argument that cannot be varied so, or if none varies anything.
    """
    space: dict[str, Choice | Range] = {}
    plain: list[str] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        found = _parse(key, text) if equals else None
        if found is None:
            plain.append(argument)
        else:
            _check_key(key)
            space[key] = found
    if both := sorted(space.keys() & {argument.partition("=")[0] for argument in plain}):
        raise ConfigError(f"{both[0]} is given a value and varied, too; leave one of them out")
    if not space:
        raise ConfigError("nothing is varied; give a setting several values, such as 'train.lr=[1e-4,2e-4]' or train.lr=1e-4..1e-3:log")
    return space, plain


def _parse(key: str, text: str) -> Choice | Range | None:
    """Returns what an argument varies; None where it is one value."""
    if (match := _RANGE.fullmatch(text)) is not None:
        return _range(key, text, match)
    if not text.startswith("["):
        return None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{key}={text} is not a YAML value; quote it, or mend its brackets") from error
    if _is_list(key) and not (values and all(isinstance(value, list) for value in values)):
        return None
    if len(values) < 2:
        raise ConfigError(f"{key}={text} holds {'one value' if values else 'no value'}; {_one_value(key, values)}")
    values = [_number(value) for value in values]
    if len({json.dumps(value) for value in values}) < len(values):
        raise ConfigError(f"{key}={text} holds a value twice; state each once")
    return Choice(tuple(values))


def _one_value(key: str, values: Sequence[Value]) -> str:
    return f"write {key}={_text(values[0])} for one that is not varied" if values else "give several"


def _number(value: Value) -> Value:
    """Returns a number where YAML, which asks for a point in it, leaves text such as 1e-4."""
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _range(key: str, text: str, match: re.Match[str]) -> Range:
    low, high, log = float(match[1]), float(match[2]), bool(match[3])
    whole = all(_WHOLE.fullmatch(match[index]) for index in (1, 2)) and not _takes_fractions(key)
    if low >= high:
        right = f"write {key}={match[1]} for one value that is not varied" if low == high else f"write {match[2]}..{match[1]}"
        raise ConfigError(f"{key}={text} does not go from a lower number to a higher one; {right}")
    if log and low <= 0:
        raise ConfigError(f"{key}={text} begins at {match[1]}, which has no order of magnitude; begin above 0, or leave :log out")
    return Range(low, high, log, whole)


def _annotations(key: str) -> Iterator[Any]:
    """Yields the types that a setting may have."""
    section, _, name = key.partition(".")
    pending = [field.annotation for field in _fields(section, name)]
    while pending:
        annotation = pending.pop()
        yield annotation
        if get_origin(annotation) not in (tuple, list, dict):
            pending += get_args(annotation)


def _fields(section: str, name: str) -> list[Any]:
    """Returns the fields of a name; of a network's settings those of every kind that has one."""
    if section == "model":
        return [config.model_fields[name] for config in KINDS.values() if name in config.model_fields]
    return [field for key, field in section_fields(section).items() if key == name]


def _is_list(key: str) -> bool:
    """Tells whether a setting's own value is a list, so that only a list of lists varies it."""
    return any(get_origin(annotation) in (tuple, list) for annotation in _annotations(key))


def _takes_fractions(key: str) -> bool:
    return any(annotation is float for annotation in _annotations(key))


def _check_key(key: str) -> None:
    section = key.partition(".")[0]
    if section in RunConfig.model_fields and section not in SECTIONS:
        right = f"the settings of {', '.join(SECTIONS[:-1])} and {SECTIONS[-1]} can be"
        raise ConfigError(f"{key} is not varied, because all trials share one dataset, one measure and one cluster; {right}")
    if key in DECIDED:
        raise ConfigError(f"{key} is not varied, because trials are compared at equal steps by one measure; give it one value")


def draw(space: Space, trials: int | None, seed: int) -> list[dict[str, Value]]:
    """Returns the settings of so many trials, no two alike, drawn by Ray Tune's samplers; a further trial changes none of those before.

    Args:
        trials: as many as there are combinations, where it is None.

    Raises:
        ConfigError: if there are fewer combinations, or no number of them.
    """
    import numpy as np

    most, generator = combinations(space), np.random.RandomState(seed)
    if trials is None and most is None:
        raise ConfigError("--trials is needed, because a range has no number of combinations; give one, such as --trials 16")
    if most is not None and trials is not None and trials > most:
        raise ConfigError(f"--trials {trials} is more than the {most} combinations that there are; use up to {most}, or leave it out for all")
    domains = {key: values.domain() for key, values in space.items()}
    drawn: dict[str, dict[str, Value]] = {}
    while len(drawn) < (trials or most or 0):
        settings = {key: plain_value(domain.sample(random_state=generator)) for key, domain in domains.items()}
        drawn.setdefault(json.dumps(settings), settings)
    return list(drawn.values())


def combinations(space: Space) -> int | None:
    """Returns how many combinations of values there are; None where a range of fractions has no number."""
    count = 1
    for values in space.values():
        if isinstance(values, Choice):
            count *= len(values.values)
        elif values.whole:
            count *= int(values.high) - int(values.low) + 1
        else:
            return None
    return count


def plain_value(value: "np.generic | Value") -> Value:
    """Returns a value as JSON has it, without numpy's types."""
    return value.item() if hasattr(value, "item") else value  # pyrefly: ignore


def extremes(space: Space) -> Iterator[dict[str, Value]]:
    """Yields combinations in which every value of a choice and both ends of a range occur, for mistakes to show in."""
    first = {key: values.extremes[0] for key, values in space.items()}
    yield first
    for key, values in space.items():
        for value in values.extremes[1:]:
            yield first | {key: value}


def to_overrides(settings: Settings) -> list[str]:
    """Returns settings as a command takes them."""
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)

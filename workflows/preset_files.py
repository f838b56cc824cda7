"""Presets by name or path."""

import contextlib
from pathlib import Path

PRESETS = Path(__file__).with_name("presets")


def find_preset(preset: str) -> Path:
    """Returns the file of a preset given by name or path.

    Raises:
        ConfigError: if there is none.
    """
    from pipeline.errors import ConfigError

    for path in (Path(preset), PRESETS / f"{preset}.yaml"):
        with contextlib.suppress(OSError):  # too long for a name, or not to be looked at
            if path.is_file():
                return path
    names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
    raise ConfigError(f"preset {preset} is neither a file nor one of {names}; name one of these or the path of a YAML file")

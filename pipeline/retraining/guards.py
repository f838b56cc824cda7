"""What stops an attempt before it trains: too little that is new, data unlike those before, a plan over its budget. Pure, so that every case can be tested."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from components.counts import counted
from components.data.drift import CHANCE, Distance, Drift

MOST_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """What a guard says of an attempt.

    Attributes:
        kind: `skip` where there is too little to do and nothing is wrong, `stop` where a person must look, `note` where the attempt goes on.
        reason: one line, a sentence for each limit that is broken.
    """

    kind: Literal["skip", "stop", "note"]
    reason: str


def check_data(drift: Drift, *, min_new_images: int, max_quarantined_fraction: float, max_label_drift: float, max_brightness_drift: float) -> Finding | None:
    """Returns what is wrong with new data, all of it, or None where they may be trained on."""
    wrong = [
        sentence
        for sentence in (
            _quarantined(drift, max_quarantined_fraction),
            _labels(drift, max_label_drift),
            _distance(
                "brightness", drift.brightness, max_brightness_drift, f", their mean grey value {drift.grey.mean_new:.2f}, {drift.grey.mean_before:.2f} before"
            ),
        )
        if sentence
    ]
    few = _too_few(drift, min_new_images)
    if wrong:
        return Finding("stop", ". ".join([*wrong, *few]))
    return Finding("skip", few[0]) if few else None


def _too_few(drift: Drift, least: int) -> list[str]:
    if drift.new_images >= least:
        return []
    there = f"there {'is' if drift.new_images == 1 else 'are'} {drift.new_images:,}" if drift.new_images else "there are none"
    return [f"retrain.min_new_images={least} new images are needed, and {there}; wait for more, or lower it"]


def _quarantined(drift: Drift, limit: float) -> str:
    if drift.bad_fraction <= limit:
        return ""
    total = drift.new_images + drift.bad_files
    return (
        f"retrain.max_quarantined_fraction={limit:g} is exceeded: {drift.bad_files:,} of {counted(total, 'new file', ',')} "
        f"({drift.bad_fraction:.0%}) {'is' if drift.bad_files == 1 else 'are'} quarantined "
        f"({_counts(drift.quarantined)}); mend or remove them (`ddpm data show` names them), or raise it"
    )


def _labels(drift: Drift, limit: float) -> str:
    unseen = f"; labels that no image had before: {_counts(drift.unseen_labels, drift.num_unseen_labels)}" if drift.num_unseen_labels else ""
    return _distance("label", drift.labels, limit, unseen)


def _distance(what: str, distance: Distance, limit: float, more: str) -> str:
    if not distance.exceeds(limit):
        return ""
    return (
        f"retrain.max_{what}_drift={limit:g} is exceeded: the distance of new images from those before is {distance.value:.3g}, "
        f"by chance in fewer than {CHANCE:.1%} of cases{more}; look at the picture, and raise it if the images are as they should be"
    )


def _counts(counts: Mapping[str, int], total: int | None = None) -> str:
    """Returns the first few counts by name, and how many names are left out."""
    left = (total or len(counts)) - min(MOST_NAMED, len(counts))
    named = ", ".join(f"{count:,} {_one_line(name)}" for name, count in list(counts.items())[:MOST_NAMED])
    return f"{named} and {left:,} more" if left else named


def _one_line(name: str) -> str:
    return " ".join(name.split())[:60]


def planned_hours(*, steps: int, global_batch_size: int, images_per_second: float | None, num_workers: int) -> float | None:
    """Returns the device-hours that a training takes, None where its speed is not known.

    Args:
        images_per_second: of all workers together.
    """
    if images_per_second is None or not math.isfinite(images_per_second) or images_per_second <= 0:
        return None
    return steps * global_batch_size / images_per_second * num_workers / 3600


def check_budget(*, steps: int, global_batch_size: int, images_per_second: float | None, num_workers: int, max_hours: float | None) -> Finding | None:
    """Returns why a training is over its budget, a note where that cannot be told, or None.

    Args:
        images_per_second: of all workers together, as an earlier training of the same network measured it.
        max_hours: device-hours.
    """
    if max_hours is None:
        return None
    hours = planned_hours(steps=steps, global_batch_size=global_batch_size, images_per_second=images_per_second, num_workers=num_workers)
    if hours is None or images_per_second is None:
        return Finding(
            "note", f"retrain.max_hours={max_hours:g} cannot be held against a plan: no training of this network has measured its speed yet; the next one can"
        )
    if hours <= max_hours:
        return None
    affordable = math.floor(max_hours * 3600 / num_workers * images_per_second / global_batch_size)
    fewer = f"set retrain.steps to {affordable:,} or fewer, or raise it" if affordable else "not one step fits, so raise it"
    return Finding(
        "stop",
        f"retrain.max_hours={max_hours:g} is less than the plan of {hours:.3g} device-hours: "
        f"{counted(steps, 'step', ',')} of {counted(global_batch_size, 'image', ',')} at {images_per_second:.4g} images/s "
        f"on {counted(num_workers, 'worker')}; {fewer}",
    )

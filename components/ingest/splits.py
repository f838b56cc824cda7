"""Splits that a source names, as dataset hubs do: which one is trained on, which one is held out, which are left out.

A parquet file's split is named by its file name, else by the innermost of its folders that does, as Hugging Face `datasets` reads them:
`train-00000-of-00002.parquet`, `data/validation-0.parquet`, `default/test/0000.parquet`. Image files have splits where all first folders of the
source are called so, and by at least two names: `train/cat/1.jpg`, `test/cat/2.jpg`; the label is then the second folder.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from ..counts import counted
from ..errors import DataError
from .listing import LISTING_SCHEMA, Listing, label_of

SplitName = Literal["train", "validation", "test"]
_NAMES: Mapping[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
KEYWORDS: Mapping[str, SplitName] = {keyword: split for split, keywords in _NAMES.items() for keyword in keywords}
UNNAMED = "unnamed"
ALL = "all"
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]+")


@dataclass(frozen=True)
class SourceSplits:
    """The splits of a source.

    Attributes:
        files: files of each split; `unnamed` are those that belong to none.
        used: the one that is trained on.
        held_out: the one that is held out, None without one.
    """

    files: Mapping[str, int]
    used: str
    held_out: str | None = None

    def takes(self, split: str) -> bool:
        """Tells whether the images of a split are rows of the dataset."""
        return self.used == ALL or split in (self.used, self.held_out)

    @property
    def in_words(self) -> str:
        """What becomes of each."""
        fate = {self.used: "trained on", self.held_out: "held out"}
        return "; ".join(f"{split} ({counted(count, 'file', ',')}): {fate.get(split, 'left out')}" for split, count in self.files.items())


def split_of_file(path: str) -> str:
    """Returns the split that a parquet file's path names, `unnamed` where it names none."""
    *folders, name = path.split("/")
    for part in (os.path.splitext(name)[0], *reversed(folders)):
        for word in _BETWEEN_WORDS.split(part.lower()):
            if word in KEYWORDS:
                return KEYWORDS[word]
    return UNNAMED


def choose(source: str, files: Iterable[str], split: str | None, held_out: str | None) -> SourceSplits | None:
    """Returns what becomes of the splits of a source; None where all of it is one.

    Args:
        source: how a person named it.
        files: the split of every file.
        split, held_out: what a person asks for.

    Raises:
        DataError: if a split is asked for that is not there, or nobody says which one is to be trained on.
    """
    found = Counter(files)
    counts = {name: found[name] for name in (*_NAMES, UNNAMED) if found[name]}
    named = [name for name in counts if name != UNNAMED]
    if held_out is None and (split == ALL or (split is None and len(named) < 2)):
        return None
    for key, wanted in (("split", split), ("holdout_split", held_out)):
        if wanted is not None and wanted not in (*named, ALL):
            there = f"names the splits {', '.join(named)}" if named else "names no splits by its files or folders"
            raise DataError(f"data.{key}={wanted} is not in data.source={source}, which {there}; use one that is there, or leave it out")
    used = split or "train"
    if used not in counts and used != ALL:
        raise DataError(f"data.source={source} names the splits {', '.join(named)} and none to train on; set data.split to one of them, or to {ALL}")
    if used == held_out:
        raise DataError(f"data.holdout_split={held_out} is the split that is trained on; hold another one out, or set data.split")
    if used == ALL:
        counts = {ALL: sum(count for name, count in counts.items() if name != held_out), str(held_out): counts[str(held_out)]}
    return SourceSplits(counts, used, held_out)


def by_first_folder(listing: Listing, source: str, split: str | None, held_out: str | None) -> Listing:
    """Returns the listing of image files of the splits that are taken, labelled by the second folder; the same listing where there are no splits.

    Raises:
        DataError: as `choose`.
    """
    import pyarrow.compute as pc

    first = pc.call_function("replace_substring_regex", [listing.table["path"]], pc.ReplaceSubstringOptions(r"(?s)/.*", ""))
    first = first.combine_chunks().dictionary_encode()
    names = [KEYWORDS.get(os.fsdecode(name).lower(), UNNAMED) for name in first.dictionary.to_pylist()]
    are_splits = UNNAMED not in names and len(set(names)) > 1
    codes = first.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(names)) if are_splits else np.array([], int)
    files = Counter({name: 0 for name in names if are_splits})
    for name, count in zip(names, counts, strict=False):
        files[name] += int(count)
    chosen = choose(source, files.elements(), split, held_out)
    if not are_splits:
        return listing
    labels = [label_of(os.fsdecode(path).partition("/")[2]) for path in listing.table["path"].to_pylist()]
    table = listing.table.set_column(1, LISTING_SCHEMA.field("label"), pa.chunked_array([pa.array(labels, pa.string())]))
    return taken(replace(listing, table=table), np.array(names, object)[codes], chosen)


def by_file(listing: Listing, chosen: SourceSplits | None) -> Listing:
    """Returns the listing of parquet rows with those that are held out marked."""
    import pyarrow.compute as pc

    if chosen is None:
        return listing
    file = pc.call_function("replace_substring_regex", [listing.table["path"]], pc.ReplaceSubstringOptions(r"#[0-9]+$", ""))
    file = file.combine_chunks().dictionary_encode()
    splits = np.array([split_of_file(os.fsdecode(name)) for name in file.dictionary.to_pylist()], object)
    return taken(listing, splits[file.indices.to_numpy()], chosen)


def taken(listing: Listing, splits: np.ndarray, chosen: SourceSplits | None) -> Listing:
    """Returns the rows of a listing whose split is taken.

    Args:
        splits: (N,) the split of each row.
    """
    if chosen is None:
        return listing
    is_held = splits == chosen.held_out
    is_taken = is_held | (splits == chosen.used) | (chosen.used == ALL)
    held_out = is_held[is_taken] if chosen.held_out is not None else None
    return replace(listing, table=listing.table.filter(pa.array(is_taken)).combine_chunks(), splits=chosen, held_out=held_out)

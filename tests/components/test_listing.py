import random
from collections.abc import Sequence

import pyarrow as pa
import pytest

from components.ingest import listing
from components.ingest.listing import LISTING_SCHEMA, Item, Listing, ListingBuilder, items_of, printable


def build(items: Sequence[Item], ignored: dict[str, int] | None = None) -> Listing:
    builder = ListingBuilder()
    for item in items:
        builder.add(item)
    assert len(builder) == len(items)
    return builder.build(ignored or {})


ITEMS = [Item(f"c{number % 7}/{number}.png", f"c{number % 7}" if number % 5 else None, number, str(number)) for number in range(500)]


def test_a_listing_is_the_same_in_whatever_order_its_images_were_found(monkeypatch: pytest.MonkeyPatch):
    expected = build(ITEMS)
    monkeypatch.setattr(listing, "CHUNK_ROWS", 64)
    for seed in range(3):
        shuffled = build(random.Random(seed).sample(ITEMS, len(ITEMS)))
        assert shuffled.table.equals(expected.table)
        assert shuffled.digest() == expected.digest()
        assert [chunk.num_chunks for chunk in shuffled.table.columns] == [1] * 4


def test_a_listing_is_sorted_by_the_bytes_of_its_paths():
    paths = ["é.png", "z.png", "a/x.png", "a.png", "a-b.png", "\udcff.png", "Z.png", "図.png"]
    found = [item.path for item in items_of(build([Item(path, None, 1, "") for path in paths]).table)]
    assert found == sorted(paths, key=lambda path: path.encode("utf-8", "surrogateescape"))


def test_what_is_built_is_read_back():
    assert list(items_of(build(ITEMS).table)) == sorted(ITEMS)
    assert build(ITEMS).table.schema == LISTING_SCHEMA


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda items: items[:-1], id="removed"),
        pytest.param(lambda items: [*items, Item("new.png", None, 1, "1")], id="added"),
        pytest.param(lambda items: [items[0]._replace(path="c0/00.png"), *items[1:]], id="renamed"),
        pytest.param(lambda items: [items[0]._replace(label="c1"), *items[1:]], id="relabelled"),
        pytest.param(lambda items: [items[0]._replace(label=""), *items[1:]], id="an empty label is not none"),
        pytest.param(lambda items: [items[0]._replace(stamp="7"), *items[1:]], id="rewritten"),
        pytest.param(lambda items: [items[0]._replace(size=7), *items[1:]], id="grown"),
        pytest.param(lambda items: [items[0]._replace(stamp=items[0].stamp + "1"), items[1]._replace(stamp=""), *items[2:]], id="cut elsewhere"),
    ],
)
def test_the_digest_changes_with_every_part_of_an_image(change):
    assert build(ITEMS).digest() != build(change(ITEMS)).digest()


def test_the_digest_does_not_depend_on_how_rows_are_cut_or_what_a_null_hides():
    whole = build(ITEMS)
    pieces = pa.concat_tables([whole.table[:0], whole.table[:17], whole.table[17:18], whole.table[18:]])
    label = whole.table.column("label").chunk(0)
    hiding = pa.array([value or "hidden" for value in label.to_pylist()], pa.string())
    hiding = pa.StringArray.from_buffers(len(label), hiding.buffers()[1], hiding.buffers()[2], label.buffers()[0])
    assert hiding.equals(label)
    for table in (pieces, whole.table.set_column(1, LISTING_SCHEMA.field("label"), hiding)):
        assert Listing(table, {}).digest() == whole.digest()
    assert Listing(whole.table[5:30], {}).digest() == build(sorted(ITEMS)[5:30]).digest()


def test_nothing_and_one_image_are_listings():
    assert len(build([])) == 0
    assert len({build([]).digest(), build(ITEMS[:1]).digest()}) == 2


def test_a_path_found_twice_is_listed_once():
    assert list(items_of(build([*ITEMS, ITEMS[3], *ITEMS[8:20]]).table)) == sorted(ITEMS)


def test_counts_of_very_many_suffixes_stay_few_and_whole():
    ignored = {f".{number:05d}": 1 for number in range(5000)} | {".txt": 9, "no suffix": 0}
    kept = build(ITEMS, ignored).ignored
    assert len(kept) == listing.MOST_KINDS + 1
    assert sum(kept.values()) == 5009
    assert kept[".txt"] == 9
    assert list(kept) == sorted(kept)


def test_a_name_that_is_no_utf8_becomes_text():
    assert [printable(name) for name in ("a b.png", "図", "caf\udce9.png")] == ["a b.png", "図", r"caf\xe9.png"]

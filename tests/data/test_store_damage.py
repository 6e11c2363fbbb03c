"""Damage to a store shows when it is opened, or when the damaged image is read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_images import damage, make_store

from dpsgd.data import Store
from dpsgd.data.store import layout
from dpsgd.errors import DataError


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", 10).path


def rewrite(path: Path, **changes: Any) -> None:
    """Changes a manifest, with or without its checksum."""
    content = json.loads(path.read_text())
    digest = content.pop("digest")
    content |= changes
    if "digest" not in changes:
        digest = layout.digest_of(content)
    path.write_text(json.dumps({**content, "digest": digest}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damages() -> Iterator[Any]:
    def case(name: str, told: str, harm: Any) -> Any:
        return pytest.param(harm, told, id=name)

    yield case(
        "truncated_shard",
        r"is truncated: shard-00000\.bin has .* bytes of .*; copy",
        lambda store: cut(store / "shard-00000.bin"),
    )
    yield case(
        "missing_shard",
        r"is truncated: shard-00000\.bin has 0 bytes of",
        lambda store: (store / "shard-00000.bin").unlink(),
    )
    yield case(
        "truncated_index",
        r"is truncated: records\.bin has 239 bytes of 240",
        lambda store: cut(store / "records.bin"),
    )
    yield case(
        "damaged_index",
        r"records\.bin has a wrong checksum",
        lambda store: damage(store / "records.bin"),
    )
    yield case(
        "other_format",
        r"has format version 2, and 1 is read here; prepare it anew",
        lambda store: rewrite(store / "manifest.json", format=2),
    )
    yield case(
        "edited_manifest",
        r"manifest\.json has a wrong checksum",
        lambda store: rewrite(store / "manifest.json", digest="0", num_images=9),
    )
    yield case(
        "no_json",
        r"manifest\.json cannot be read",
        lambda store: (store / "manifest.json").write_text("{"),
    )
    yield case(
        "no_manifest",
        "is not a store",
        lambda store: (store / "manifest.json").unlink(),
    )
    yield case(
        "fewer_classes",
        r"has label 2, which must be in \[0, 2\); copy the store again",
        lambda store: rewrite(store / "manifest.json", class_names=["cat", "dog"]),
    )
    yield case(
        "fewer_shards",
        "index 0 lies beyond its shard",
        lambda store: rewrite(store / "manifest.json", shards=[]),
    )


@pytest.mark.parametrize(("harm", "told"), list(damages()))
def test_a_damaged_store_is_not_opened(store: Path, harm: Any, told: str) -> None:
    harm(store)
    place = rf"data\.train={store}(, index \d+)?"
    with pytest.raises(DataError, match=f"{place}: .*{told}"):
        Store(store, field="data.train")


def test_a_damaged_image_is_found_when_it_is_read(store: Path) -> None:
    whole = Store(store)
    damage(store / "shard-00000.bin", at=sum(map(len, map(whole.read, range(3)))))
    damaged = Store(store)

    assert damaged.verify() == [3]
    assert damaged.read(2) == whole.read(2)
    with pytest.raises(DataError, match=rf"{store}, index 3: has a wrong checksum"):
        damaged.read(3)

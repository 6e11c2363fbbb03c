"""Near-duplicates are found however they are framed, and chance is told from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from unwilling_disks import full_disk, lock

from dpsgd.cli import data
from dpsgd.data import FRAMINGS, Framing, Overlap, find_matches, open_source
from dpsgd.data.overlap import Matches, reframed

WHOLE = (1.0, 1.0)


def photographs(count: int, height: int, width: int, *, seed: int) -> Tensor:
    """(N, 3, H, W) uint8 noise with, like photographs, more of it at coarser scales."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, 3, height, width)
    for cells in (2, 4, 8, 16):
        noise = torch.rand(count, 3, cells, cells, generator=generator)
        size = (height, width)
        total += F.interpolate(noise, size, mode="bicubic") * 16 / cells**0.5
    low, high = total.amin((1, 2, 3), keepdim=True), total.amax((1, 2, 3), keepdim=True)
    return (255 * (total - low) / (high - low)).to(torch.uint8)


def squashed(wide: Tensor) -> Tensor:
    """Photographs as squares, the whole of them."""
    small = F.interpolate(wide.float(), (32, 32), mode="bilinear", antialias=True)
    return small.round().to(torch.uint8)


def cropped(wide: Tensor) -> Tensor:
    """The squares in their middle."""
    height, width = wide.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return squashed(wide[..., top : top + side, left : left + side])


@pytest.mark.parametrize(
    ("height", "width"), [(48, 64), (48, 72), (64, 48), (72, 48), (48, 48)]
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_photograph_is_found_whichever_set_crops_it(
    height: int, width: int, mirrored: bool
) -> None:
    shared = photographs(12, height, width, seed=1)
    theirs = shared.flip(-1) if mirrored else shared
    others = photographs(150, height, width, seed=2)
    crops = torch.cat([cropped(shared), cropped(others[:75])])
    wholes = torch.cat([squashed(others[75:]), squashed(theirs)])

    for public, private, rows in (
        (crops, wholes, 75 + torch.arange(12)),
        (wholes.flip(0), crops, torch.arange(12).flip(0)),
    ):
        matches = find_matches(public, private)
        control = find_matches(public.flip(2), private)
        assert torch.equal(matches.rows[:12], rows)
        best_by_chance = max(control.scores.max(), matches.scores[12:].max())
        assert matches.scores[:12].min() > best_by_chance + 0.1
        framing = FRAMINGS[int(matches.framings[:12].mode().values)]
        assert framing.mirrored == mirrored
        assert (framing.public == framing.private == WHOLE) == (height == width)


def test_every_pair_is_compared_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PUBLIC_BLOCK", "_PRIVATE_BLOCK", "_SCORE_BLOCK"):
        monkeypatch.setattr(f"dpsgd.data.overlap.{name}", 7)
    private = squashed(photographs(40, 48, 48, seed=3))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    framings = [Framing(WHOLE, WHOLE, mirrored=False)]
    matches = find_matches(private[order], private, framings=framings)

    assert torch.equal(matches.rows, order)
    torch.testing.assert_close(matches.scores, torch.ones(40))


def test_brightness_contrast_and_a_pixel_of_shift_do_not_hide_a_copy() -> None:
    private = squashed(photographs(60, 48, 48, seed=4))
    public = (0.7 * private[:20].float() + 20).roll(1, dims=-1).to(torch.uint8)
    matches = find_matches(public, private)

    assert torch.equal(matches.rows, torch.arange(20))
    assert matches.scores.min() > 0.8


def test_grey_and_larger_images_are_compared_too() -> None:
    grey = photographs(20, 64, 64, seed=5)[:, :1]
    matches = find_matches(grey, squashed(grey))

    assert torch.equal(matches.rows, torch.arange(20))
    assert matches.scores.min() > 0.8


def test_images_without_any_detail_match_nothing() -> None:
    flat = torch.full((3, 3, 32, 32), 128, dtype=torch.uint8)
    matches = find_matches(flat, squashed(photographs(10, 48, 48, seed=6)))

    assert matches.scores.abs().max() < 0.3


def test_reframing_cuts_the_middle() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    half = reframed(image, (1.0, 0.5))

    torch.testing.assert_close(half[0, 0, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]))
    assert torch.equal(reframed(image, WHOLE, mirrored=True), image.flip(-1))
    torch.testing.assert_close(
        reframed(image, (1.0, 0.5), mirrored=True), half.flip(-1)
    )


def test_chance_is_scaled_to_the_number_of_public_images() -> None:
    def matches(*scores: float) -> Matches:
        zeros = torch.zeros(len(scores), dtype=torch.int64)
        return Matches(scores=torch.tensor(scores), rows=zeros, framings=zeros)

    overlap = Overlap(
        matches=matches(0.9, 0.2, 0.7, 0.4),
        control=matches(0.42, 0.3),
        framings=FRAMINGS,
        threshold=0.42,
    )

    assert overlap.found.tolist() == [0, 2]
    assert overlap.ranked.tolist() == [0, 2, 3, 1]
    table = {
        round(score, 2): (pairs, chance) for score, pairs, chance in overlap.table()
    }
    assert table[0.4] == (2, 2.0)  # one of two, for four images
    assert table[0.85] == (1, 0.0)
    assert list(table) == sorted(table)


def written(folder: Path, images: Tensor) -> Path:
    """A folder of class folders."""
    for index, image in enumerate(images):
        (folder / "class").mkdir(parents=True, exist_ok=True)
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "class" / f"{index:03}.png")
    return folder


def images(folder: str) -> list[Path]:
    return sorted(Path(folder).rglob("*.png"))


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.array(image).transpose(2, 0, 1)


def test_the_command_leaves_pairs_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, others = (photographs(n, 48, 64, seed=n) for n in (5, 60))
    sets = {
        "public": torch.cat([cropped(others[:20]), cropped(shared)]),
        "private": torch.cat([squashed(shared), squashed(others[20:])]),
    }
    paths = [str(written(tmp_path / name, images)) for name, images in sets.items()]
    out = tmp_path / "new" / "report"
    arguments = ["overlap", *paths, "--crop", "private", "--out", str(out)]
    arguments += ["--threshold", "0.7"]

    assert data.main(arguments) == 0
    facts: dict[str, Any] = json.loads((out / "overlap.json").read_text())
    found = {(Path(p["public"]).stem, Path(p["private"]).stem) for p in facts["pairs"]}
    assert found == {(f"{20 + i:03}", f"{i:03}") for i in range(5)}
    assert all(pair["framing"].startswith("whole | ") for pair in facts["pairs"])
    assert (facts["public"], facts["private"], facts["control"]) == (25, 45, 25)
    assert facts["threshold"] == 0.7
    public = open_source(paths[0])
    assert facts["public_sha256"] == public.content_sha256()
    listed = facts["pairs"] + facts["below"]
    assert [pair["pair"] for pair in listed] == list(range(1, 26))
    assert [str(public.files[pair["public_row"]]) for pair in listed] == [
        pair["public"] for pair in listed
    ]
    scores = [pair["score"] for pair in listed]
    assert scores == sorted(scores, reverse=True)
    assert scores[4] > 0.7 >= scores[5]
    with Image.open(out / "overlap.png") as sheet:
        assert sheet.size == (2 * 10 * 66, 2 * 3 * 34)
    assert "5 pairs above" in capsys.readouterr().out

    before = (out / "overlap.json").read_bytes()
    assert data.main(arguments) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (out / "overlap.json").read_bytes() == before


def test_pairs_of_grey_and_colour_are_pictured(tmp_path: Path) -> None:
    images = photographs(12, 32, 32, seed=1)
    colour = written(tmp_path / "colour", images)
    for index, image in enumerate(images):
        grey = image.float().mean(0).to(torch.uint8).numpy()
        path = tmp_path / "grey" / "class" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(path)
    for pair in ([colour, tmp_path / "grey"], [tmp_path / "grey", colour]):
        out = tmp_path / f"report {pair[0].name}"
        arguments = ["overlap", *map(str, pair), "--threshold", "0.7"]
        assert data.main([*arguments, "--out", str(out)]) == 0
        with Image.open(out / "overlap.png") as sheet:
            assert sheet.width == 2 * 10 * 66


def test_what_is_left_out_is_what_was_found(tmp_path: Path) -> None:
    shared, others = (photographs(n, 48, 48, seed=n) for n in (4, 30))
    mixed = squashed(torch.cat([others[:7], shared, others[7:15]]))
    public = written(tmp_path / "public", mixed)
    private = written(tmp_path / "private", squashed(torch.cat([others[15:], shared])))
    report = tmp_path / "report"

    def search(folder: Path, out: Path) -> int:
        paths = [str(folder), str(private), "--out", str(out)]
        return data.main(["overlap", *paths, "--control", "5", "--threshold", "0.7"])

    assert search(public, report) == 0
    arguments = [str(public), str(report / "overlap.json"), "--keep", "2"]
    less = tmp_path / "less"
    assert data.main(["leave-out", *arguments, "--out", str(less)]) == 0

    facts = json.loads((report / "overlap.json").read_text())
    found = [Path(pair["public"]).name for pair in facts["pairs"]]
    assert sorted(found) == ["007.png", "008.png", "009.png", "010.png"]
    gone = {path.name for path in images(str(public))} - {
        path.name for path in images(str(less))
    }
    assert gone == {found[0], *found[2:]}
    assert search(less, tmp_path / "again") == 0
    (pair,) = json.loads((tmp_path / "again" / "overlap.json").read_text())["pairs"]
    assert Path(pair["public"]).name == found[1]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Two sets of a few images."""
    return [
        str(written(tmp_path / name, squashed(photographs(12, 48, 48, seed=seed))))
        for name, seed in (("public", 8), ("private", 9))
    ]


def test_the_threshold_is_the_best_score_of_the_control(
    paths: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    assert data.main(["overlap", *paths, "--control", "6", "--out", str(out)]) == 0
    facts = json.loads((out / "overlap.json").read_text())
    public, private = (
        torch.stack([torch.from_numpy(pixels(path)) for path in images(folder)])
        for folder in paths
    )
    control = find_matches(public[::2].flip(2), private)

    assert facts["control"] == 6
    assert facts["threshold"] == pytest.approx(float(control.scores.max()), abs=1e-5)


def test_a_locked_place_is_told_before_anything_is_compared(
    paths: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("mine")
    lock(monkeypatch, tmp_path / "locked", "mkdir")
    monkeypatch.setattr("dpsgd.cli.data.overlap.load_images", None)
    for name, reason in (
        ("locked", "Permission denied"),
        ("file", "Not a directory"),
    ):
        out = tmp_path / name / "report"
        assert data.main(["overlap", *paths, "--out", str(out)]) == 2
        assert capsys.readouterr().err == (
            f"--out={out}: cannot be written ({reason}); give access to it, "
            "or name a folder elsewhere; nothing was left\n"
        )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("limit", [300, 6000])  # not even the pairs, not the pictures
def test_a_full_disk_leaves_no_report(
    paths: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int
) -> None:
    before, out = sorted(tmp_path.rglob("*")), tmp_path / "new" / "report"
    arguments = ["overlap", *paths, "--out", str(out)]
    with full_disk(limit):
        assert data.main(arguments) == 2
    assert capsys.readouterr().err == (
        f"--out={out}: the disk is full; make room, or name a folder elsewhere; "
        "nothing was left\n"
    )
    assert sorted(tmp_path.rglob("*")) == before

    assert data.main(arguments) == 0
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    assert 300 < sizes["overlap.json"] <= 6000 < sizes["overlap.png"]
    assert (out / "overlap.json").stat().st_mode & 0o077 == 0


def test_a_search_that_fails_leaves_no_folder(paths: list[str], tmp_path: Path) -> None:
    before, out = sorted(tmp_path.rglob("*")), tmp_path / "new" / "report"
    arguments = [paths[0], str(tmp_path / "absent"), "--out", str(out)]

    assert data.main(["overlap", *arguments]) == 2
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (
            ["overlap", "absent.parquet", "absent.parquet"],
            "PUBLIC=absent.parquet: no su",
        ),
        (["overlap", "one"], "the following arguments are required: PRIVATE"),
        (["merge"], "invalid choice"),
    ],
)
def test_bad_input_is_told_in_a_line(
    arguments: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data.main(arguments) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert rule in line

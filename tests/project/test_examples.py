"""The demo as a user runs it, small; its data, and the errors for a wrong folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support.places import EXAMPLES

sys.path.append(str(EXAMPLES))

import characters_data as data


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "characters.py"), "--threads", "1", "--epochs", "1",
         "--stage2-epochs", "1", *arguments],
        capture_output=True, text=True, check=False, env={"COLUMNS": "140", "PATH": ""},
    )  # fmt: skip


def folder_of_images(root: Path, classes: int = 4, images: int = 6) -> Path:
    generator = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(images + 10 * (label == 0)):
            pixels = generator.integers(0, 60, (40, 30)).astype(np.uint8) + np.uint8(45 * label)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    return root


def test_a_run_prints_the_table_and_writes_the_plots(tmp_path: Path) -> None:
    run = demo("--data", str(folder_of_images(tmp_path / "data")), "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr[-2000:]
    for text in (
        "4 classes, 22 training images, most 13, fewest 3",
        "stage 1, cross-entropy", "logit adjustment post hoc, tau 1", "balanced softmax",
        "DisAlign, rho 1.2", "many > 100", "peak extra memory",
    ):  # fmt: skip
        assert text in run.stdout, text
    plots = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert plots == ["accuracy_by_count.png", "samples.png", "scale_and_bias.png"]
    for name in plots:
        with Image.open(tmp_path / "out" / name) as image:
            image.verify()


def test_counts_are_summed_over_the_words_of_the_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_text("中国 10 ns\n中 5\n\nAT&T 3 nz\n人人 2 n\n", encoding="utf-8")
    assert data.character_counts(path) == {"中": 10 + 5, "国": 10, "人": 2 * 2}
    path.write_text("中国 10 ns\n中 many\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"dict\.txt, line 2: must be 'word frequency"):
        data.character_counts(path)


def test_classes_are_spread_over_the_ranks_and_keep_their_proportions() -> None:
    counts = {chr(0x4E00 + i): 100_000 // (i + 1) for i in range(100)}
    chosen = data.choose_classes(counts, 10, lambda character: character != chr(0x4E00 + 10))
    drawable = [c for i, c in enumerate(counts) if i != 10]
    assert [c for c, _ in chosen] == [drawable[i * 99 // 10] for i in range(10)]
    assert chosen[0][1] == data.MOST_IMAGES
    assert all(
        n == max(data.FEWEST_IMAGES, round(data.MOST_IMAGES * counts[c] / 100_000))
        for c, n in chosen
    )
    with pytest.raises(ValueError, match=r"num_classes must be from 2 to 100, .*, got 101"):
        data.choose_classes(counts, 101, lambda _: True)


def test_rendered_characters_have_many_medium_and_few_and_a_test_font_of_their_own() -> None:
    training = {face.name for face in data.training_faces(Path("/nowhere"))}
    assert len(training) == 2
    assert data.held_out_face().name not in training
    rendered = data.CharacterData(60, seed=0)
    counts = rendered.counts
    for group in (counts > 100, (counts >= 20) & (counts <= 100), counts < 20):
        assert group.any()
    assert torch.bincount(rendered.test_targets).tolist() == [data.TEST_IMAGES] * 60
    assert (rendered.train_images.flatten(1).max(1).values > 0).all()  # no glyph is missing


def test_augmentation_is_fresh_and_keeps_the_range() -> None:
    images = torch.randint(0, 256, (8, 32, 32), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    once, again = data.augment(images, generator), data.augment(images, generator)
    assert once.shape == (8, 1, 32, 32)
    assert not torch.equal(once, again)
    assert 0 <= float(once.min()) <= float(once.max()) <= 1


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"missing is not a folder \(nothing there\)"):
        data.class_files(tmp_path / "missing")
    with pytest.raises(
        ValueError, match="at least 2 class directories, got 0 directories and 0 files"
    ):
        data.class_files(tmp_path)
    folder = folder_of_images(tmp_path / "data", classes=2, images=2)
    (folder / "class1" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"class1 must hold at least 2 images .*, got 1;"):
        data.class_files(folder)
    (folder / "class1" / "1.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        data.ImageFolderData(folder, seed=0)

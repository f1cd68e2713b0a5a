"""`prepare_data.py split`: a partition by image, with each category in its share."""

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from sam3_lora import coco, overview

THIRDS = {"train": 0.5, "val": 0.25, "test": 0.25}


@settings(max_examples=60, deadline=None)
@given(
    labels=st.dictionaries(st.text(max_size=3), st.sets(st.integers(1, 5)), max_size=40),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_a_partition_whatever_the_order(labels, parts, seed):
    names = list(THIRDS)[: len(parts)]
    fractions = {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}
    chosen = overview.divide_names(labels, fractions, seed)
    assert set(chosen) == set(labels) and set(chosen.values()) <= set(fractions)
    turned = dict(reversed(labels.items()))
    assert overview.divide_names(turned, fractions, seed) == chosen


@settings(max_examples=30, deadline=None)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), seed=st.integers(0, 9))
def test_one_label_a_name_gives_exact_shares(labels, seed):
    names = {str(position): {label} for position, label in enumerate(labels)}
    chosen = overview.divide_names(names, THIRDS, seed)
    for label, count in Counter(labels).items():
        of_label = Counter(chosen[name] for name, found in names.items() if found == {label})
        for split, fraction in THIRDS.items():
            assert abs(of_label[split] - fraction * count) < 1


@pytest.mark.parametrize("seed", range(5))
def test_many_labels_a_name_keep_their_shares(seed):
    draw = random.Random(seed)
    odds = [0.02, 0.05, 0.1, 0.3, 0.7]  # of a label in an image; some images have none
    labels = {str(i): {k for k, p in enumerate(odds) if draw.random() < p} for i in range(1000)}
    chosen = overview.divide_names(labels, THIRDS, seed)
    for split, fraction in THIRDS.items():
        members = [name for name in labels if chosen[name] == split]
        assert abs(len(members) - fraction * 1000) <= 10
        for label in range(len(odds)):
            count = sum(label in labels[name] for name in members)
            wanted = fraction * sum(label in found for found in labels.values())
            assert abs(count - wanted) <= 0.02 * wanted + 2


def test_the_seed_decides():
    labels = {str(position): {position % 3} for position in range(60)}
    first, again, other = (overview.divide_names(labels, THIRDS, seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.fixture
def command(tmp_path: Path, write_source) -> list[str]:
    """The command that divides a Roboflow export of 20 images in tmp_path/all into tmp_path."""
    folder = write_source(tmp_path / "all", 20)
    (folder / "source.json").rename(folder / "_annotations.coco.json")
    return ["split", "--data_dir", str(folder), "--output_dir", str(tmp_path)]


def test_split_writes_three_splits_that_validate(command, tmp_path, capsys):
    assert prepare_data.main([*command, "--fractions", "0.6,0.2,0.2", "--link"]) == 0
    out = capsys.readouterr().out
    assert "objects     24 (24 with a mask" in out or "objects     22 (22 with a mask" in out
    whole = coco.read_split(tmp_path / "all")
    names = Counter()
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        assert prepare_data.main(["validate", "--data_dir", str(tmp_path), "--split", split]) == 0
        part = coco.read_split(tmp_path / split)
        assert len(part.images) == count and part.categories == whole.categories
        names.update(image["file_name"] for image in part.images)
        assert all(part.image_path(i).samefile(whole.image_path(i)) for i in part.images)
    assert names == Counter(image["file_name"] for image in whole.images)
    assert prepare_data.main([*command, "--fractions", "0.6,0.2,0.2"]) == 0
    assert capsys.readouterr().err.count("is already there") == 3
    assert prepare_data.main([*command, "--seed", "1", "--overwrite"]) == 0


def test_a_fraction_of_zero_leaves_a_split_out(command, tmp_path):
    assert prepare_data.main([*command, "--fractions", "0.8,0.2,0"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "train", "val"]


@pytest.mark.parametrize("fractions", ["0.8,0.2", "0.8,0.1,x", "-1,1,1", "0.8,0.1,0.2", "nan,1,0"])
def test_fractions_that_are_refused(command, fractions, capsys):
    assert prepare_data.main([*command, f"--fractions={fractions}"]) == 2
    wanted = "expected --fractions for train,val,test, from 0 and with sum 1, found"
    assert f"{wanted} '{fractions}'; write such as 0.8,0.1,0.1" in capsys.readouterr().err


def test_a_split_without_an_image_is_refused(command, tmp_path, capsys):
    assert prepare_data.main([*command, "--fractions", "0.98,0.01,0.01"]) == 2
    err = capsys.readouterr().err
    assert "expected an image for each split, found none of 20 for test; raise its part" in err
    assert [path.name for path in tmp_path.iterdir()] == ["all"]


def test_all_splits_or_none(command, tmp_path, capsys):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "mine.txt").write_text("kept")
    assert prepare_data.main(command) == 2
    assert f"expected {tmp_path / 'test'} to be absent, empty" in capsys.readouterr().err
    file = tmp_path / "all" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "gone.png"
    file.write_text(json.dumps(content))
    assert prepare_data.main([*command, "--overwrite"]) == 2
    assert "gone.png, found none; put the file itself there" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "test"]


@pytest.mark.scripts
def test_many_names_and_labels_take_seconds():
    draw = random.Random(0)
    names = {str(i): {draw.randrange(2000) for _ in range(4)} for i in range(20_000)}
    started = time.perf_counter()
    assert len(overview.divide_names(names, THIRDS, 0)) == len(names)
    assert time.perf_counter() - started < 10


def test_a_split_that_stays_is_told(command, caplog):
    assert prepare_data.main([*command, "--fractions", "0.4,0.3,0.3"]) == 0
    assert prepare_data.main([*command, "--fractions", "0.6,0.4,0", "--overwrite"]) == 0
    assert "test stays as it is: its photos may be in the new splits too" in caplog.text


def test_examples_show_every_category():
    kinds = [set(), {1}, {1, 2}, {3}, {2}] + [{1}] * 30
    chosen = overview.choose_examples(kinds)
    assert chosen == overview.choose_examples(kinds)
    assert len(set(chosen)) == len(chosen) == overview.EXAMPLES
    assert {2, 3} <= set(chosen)
    assert sorted(overview.choose_examples(kinds[:3])) == [0, 1, 2]
    many = [{k} for k in range(40)]
    assert len(overview.choose_examples(many)) == overview.MAX_EXAMPLES
    assert overview.choose_examples([]) == []
    with_faults = overview.choose_examples(kinds, [34, 7])
    assert with_faults[:2] == [34, 7] and len(set(with_faults)) == overview.EXAMPLES
    assert overview.choose_examples(many, range(40))[: overview.EXAMPLES] == list(range(12))

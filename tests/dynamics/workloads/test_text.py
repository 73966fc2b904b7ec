import shutil

import pytest
import torch
from sharpscope.dynamics.workloads import text as module
from sharpscope.dynamics.workloads.text import text, text_windows


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    return path


def test_targets_are_the_characters_that_follow(book):
    windows = text_windows(book, length=16)
    train = windows.data.train
    assert torch.equal(train.inputs[:, 1:], train.targets[:, :-1])
    spelled = "".join(windows.vocabulary[i] for i in train.inputs[3].tolist() + train.targets[3, -1:].tolist())
    assert spelled in book.read_text()


def test_windows_do_not_overlap_and_the_last_tenth_is_held_out(tmp_path):
    path = tmp_path / "counter.txt"
    path.write_text("".join(map(chr, range(0x4E00, 0x4E00 + 2000))), encoding="utf-8")  # every character once
    data = text_windows(path, length=10).data
    seen = data.train.inputs.flatten().tolist()
    assert len(set(seen)) == len(seen)
    assert max(seen) < 1800 <= int(data.held_out.inputs.min())


def test_a_smaller_number_of_windows_is_spread_over_the_text(book):
    windows = text_windows(book, 5, length=16).data.train
    everything = text_windows(book, length=16).data.train
    assert windows.num == 5
    assert torch.equal(windows.inputs[1], everything.inputs[everything.num // 5])


def test_the_manual_of_python_is_always_there(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = text()
    assert "pydoc_data" in found.source
    assert len(found.text) > 300_000
    with pytest.raises(ValueError, match="bible-kjv"):
        text("kjv")


@pytest.mark.skipif(shutil.which("bible") is None, reason="needs the Debian package bible-kjv")
def test_the_bible_begins_and_ends_as_it_should():
    found = text("kjv").text
    assert found.startswith("In the beginning God created the heaven and the earth.")
    assert found.endswith("Amen.")
    assert len(found.splitlines()) == 31102


def test_another_output_of_the_program_is_refused(monkeypatch):
    monkeypatch.setattr(module, "KJV_COMMAND", ("echo", "Ge1:1 In the middle"))
    with pytest.raises(ValueError, match="printed another text"):
        text("kjv")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as text"):
        text(tmp_path / "missing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="UTF-8"):
        text(tmp_path / "binary")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="must have more than 64"):
        text_windows(tmp_path / "short.txt")


def test_more_windows_than_there_are_is_refused(book):
    with pytest.raises(ValueError, match="`num_examples` is 5000"):
        text_windows(book, 5000)

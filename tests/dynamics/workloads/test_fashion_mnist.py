import gzip
import hashlib

import numpy as np
import pytest
import torch
from sharpscope.dynamics.workloads import fashion_mnist as module
from sharpscope.dynamics.workloads.fashion_mnist import fashion_mnist, parse_idx


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def files():
    """Contents of the four files: 30 and 12 images of noise."""
    generator = np.random.default_rng(0)
    contents = {}
    for part, num in (("train", 30), ("t10k", 12)):
        contents[f"{part}-images-idx3-ubyte"] = idx(generator.integers(0, 256, (num, 28, 28), dtype=np.uint8))
        contents[f"{part}-labels-idx1-ubyte"] = idx(generator.integers(0, 10, num, dtype=np.uint8))
    return contents


@pytest.fixture
def folder(files, tmp_path):
    path = tmp_path / "idx"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def test_an_array_survives_the_idx_format():
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert parse_idx(idx(array), "x").tolist() == array.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with b''"),
        (b"\x1f\x8b\x08\x01", "starts with"),
        (b"\0\0\x0d\x01\0\0\0\x01....", "unsigned bytes"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "has 11 bytes; its header"),
    ],
)
def test_a_file_that_is_not_idx_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        parse_idx(content, "x")


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_is_read_packed_or_not(folder, files, packed):
    if packed:
        for name, content in files.items():
            (folder / name).unlink()
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    data = fashion_mnist(folder)
    assert data.train.inputs.shape == (30, 1, 28, 28)
    assert data.held_out.inputs.shape == (12, 1, 28, 28)
    pixels = data.train.inputs.squeeze(1) * 0.3530 + 0.2860
    raw = parse_idx(files["train-images-idx3-ubyte"], "x")
    assert torch.equal((pixels * 255).round().byte(), raw)
    assert data.train.targets.tolist() == list(files["train-labels-idx1-ubyte"][8:])


def test_a_subset_is_the_beginning(folder):
    assert torch.equal(fashion_mnist(folder, 7).train.inputs, fashion_mnist(folder).train.inputs[:7])
    with pytest.raises(ValueError, match="`num_examples` is 31; this data has 30"):
        fashion_mnist(folder, 31)


def test_what_is_wrong_with_a_folder_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        fashion_mnist(tmp_path / "nowhere")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(11, np.uint8)))
    with pytest.raises(ValueError, match=r"t10k files .* images \[12, 28, 28\] and labels \[11\]"):
        fashion_mnist(folder)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.full(12, 10, np.uint8)))
    with pytest.raises(ValueError, match="labels in .* go up to 10"):
        fashion_mnist(folder)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="has no file t10k-labels-idx1-ubyte"):
        fashion_mnist(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        fashion_mnist(folder)


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """A machine without the package whose "server" is a folder."""
    remote = tmp_path / "remote"
    remote.mkdir()
    for name, content in files.items():
        (remote / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(module, "PACKAGE_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(module, "URL", remote.as_uri() + "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return remote


def publish(files, monkeypatch):
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(module, "CONTENTS", hashes)


def test_a_download_is_verified_and_kept(server, files, monkeypatch):
    publish(files, monkeypatch)
    first = fashion_mnist()
    for path in server.iterdir():
        path.unlink()
    again = fashion_mnist()
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert first.train.num == 30


def test_a_download_with_other_contents_is_refused_and_not_kept(server, tmp_path):
    with pytest.raises(ValueError, match="is not the file that was published"):
        fashion_mnist()
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_without_network_the_error_offers_the_other_ways(server):
    for path in server.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"not on this machine.*dataset-fashion-mnist.*--data"):
        fashion_mnist()


def test_an_altered_package_file_is_refused(folder, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE_FOLDER", folder)
    with pytest.raises(ValueError, match="SHA-256"):
        fashion_mnist()


@pytest.mark.skipif(not module.PACKAGE_FOLDER.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_the_package_holds_what_was_published():
    data = fashion_mnist(num_examples=60000)
    assert data.train.num == 60000
    assert torch.bincount(data.train.targets).tolist() == [6000] * 10
    # Standardised with the published mean and deviation of the training images.
    assert abs(float(data.train.inputs.mean())) < 1e-3
    assert abs(float(data.train.inputs.std()) - 1) < 1e-3

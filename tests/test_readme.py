"""The examples of the README and of four pages run as they stand, one after the other."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert list(tmp_path.rglob("*.png"))
    assert names["top"].converged


def test_examples_of_the_kernels_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "kernels.md", "exec"), names)
    assert float(names["loss"].detach()) < 2.0
    loaded = torch.load("checkpoint.pt", weights_only=True)["states"]
    assert torch.equal(loaded[0].m.codes, names["states"][0].m.codes)
    assert names["weights"].sum(1).tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_examples_of_the_optimizers_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "optimizers.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "optimizers.md", "exec"), names)
    assert names["stability_threshold_of"](names["optimizer"]) == pytest.approx(38e3)
    assert names["P"].diagonal.shape == (names["objective"].num_parameters,)


def test_examples_of_the_performance_page_run(capsys):
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "performance.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "performance.md", "exec"), names)
    assert "spectral_density: 240 products" in capsys.readouterr().out
    assert float(names["v"].norm()) == pytest.approx(1.0)


def test_examples_of_the_noise_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "noise-and-stability.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "noise-and-stability.md", "exec"), names)
    assert names["noise"].noise_scale().trace > 0
    assert re.search("transient|saturation|sharpening|edge of stability|flattening", capsys.readouterr().out)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link

import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_rgb
from sharpscope.figures.style import COLORS, DASHES, SETTINGS, canvas, plain_or_power, save, style


def luminance(color: str) -> float:
    """Relative luminance of the WCAG: what remains in a grey print."""
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(color))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_settings_hold_inside_the_block_only():
    before = dict(matplotlib.rcParams)
    with style():
        assert all(matplotlib.rcParams[key] == value for key, value in SETTINGS.items())
    assert dict(matplotlib.rcParams) == before


def test_every_pair_of_line_styles_differs_without_colour():
    assert len({str(dash) for dash in DASHES}) == len(COLORS) == len(DASHES)


def test_every_colour_is_visible_on_white():
    """Contrast with white paper at least 1.9; yellow (1.3) is therefore not among the line colours."""
    assert all(1.05 / (luminance(color) + 0.05) >= 1.9 for color in COLORS)


def test_import_opens_nothing():
    """Importing the figures neither starts pyplot nor picks a backend."""
    code = (
        "import sys, matplotlib, sharpscope.figures.style, sharpscope.figures.trajectory, sharpscope.figures.spectrum, "
        "sharpscope.figures.blocks; "
        "assert 'matplotlib.pyplot' not in sys.modules; "
        "assert matplotlib.get_backend(auto_select=False) is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_canvas_makes_or_keeps_axes():
    with canvas(None, (3, 2)) as made:
        assert matplotlib.rcParams["font.size"] == SETTINGS["font.size"]
    assert made.figure.get_size_inches().tolist() == [3, 2]
    theirs = plt.figure().add_subplot()
    with matplotlib.rc_context({"font.size": 17}), canvas(theirs, (3, 2)) as kept:
        assert kept is theirs
        assert matplotlib.rcParams["font.size"] == 17
    with canvas(made, (3, 2)):  # what is added to a figure of ours looks like the rest
        assert matplotlib.rcParams["font.size"] == SETTINGS["font.size"]


@pytest.mark.parametrize("wrong", [plt, 3, "ax"])
def test_canvas_refuses_what_is_not_axes(wrong):
    with pytest.raises(TypeError, match="`ax` is a"), canvas(wrong, (3, 2)):
        pass


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (0.05, "0.05"), (-20, "-20"), (1e-5, "$10^{-5}$"), (-2e6, r"$-2\times10^{6}$")],
)
def test_plain_or_power(value, text):
    assert plain_or_power(value) == text


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_save(tmp_path, ending, magic):
    with canvas(None, (3, 2)) as ax:
        ax.plot([0, 1], [1, 2])
    path = tmp_path / f"figure.{ending}"
    save(ax, path)
    assert path.read_bytes().startswith(magic)
    assert not plt.get_fignums()


def test_save_can_keep_the_figure_open(tmp_path):
    with canvas(None, (3, 2)) as ax:
        pass
    save(ax, tmp_path / "a.png", tmp_path / "b.pdf", close=False)
    assert plt.get_fignums()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.pdf"]


def test_save_needs_a_path_and_a_figure():
    with canvas(None, (3, 2)) as ax:
        pass
    with pytest.raises(ValueError, match="`paths` is empty"):
        save(ax)
    ax.remove()
    with pytest.raises(ValueError, match="belongs to no figure"):
        save(ax, "x.png")

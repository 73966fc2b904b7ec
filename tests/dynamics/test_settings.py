import pytest
from sharpscope.dynamics.measurements import Loss
from sharpscope.dynamics.settings import chosen_measurements, measurement, measurement_names, parse_settings
from sharpscope.dynamics.spectra_measurements import BlockSpectra, BottomEigenvalue, Sharpness


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("lr=0.1", {"lr": 0.1}),
        ("betas=(0.9,0.99), lr=1e-3", {"betas": (0.9, 0.99), "lr": 1e-3}),
        ("nesterov=True,which=LM", {"nesterov": True, "which": "LM"}),
        ("lr=-1,name='a b'", {"lr": -1, "name": "a b"}),
    ],
)
def test_settings_are_keyword_arguments(text, expected):
    assert parse_settings(text) == expected


@pytest.mark.parametrize("text", ["lr", "lr:0.1", "lr=", "=1", "lr=__import__('os')", "**a", "lr=1)+(2", "a=1,a=2"])
def test_anything_else_is_refused_and_never_run(text):
    with pytest.raises(ValueError, match="cannot be read as key=value"):
        parse_settings(text)


def test_every_measurement_has_a_name():
    expected = {
        "loss", "gradient_norm", "gradient_curvature", "update_curvature", "stability_threshold",
        "sharpness", "bottom_eigenvalue", "trace", "density", "block_spectra",
        "preconditioned_sharpness", "threshold_ratio", "effective_sharpness", "optimizer_state_bytes", "codec_error",
        "sam_sharpness", "average_sharpness", "sam_edge", "second_moment_snr", "beta_condition",
        "gradient_snr", "gradient_noise_scale", "gradient_alignment", "gradient_tail_index", "batch_sharpness",
        "coherence",
    }  # fmt: skip
    assert set(measurement_names()) == expected
    for name in expected:
        assert measurement(name).name


def test_a_measurement_takes_a_period_or_settings():
    assert measurement("loss") == Loss()
    assert measurement("sharpness:20") == Sharpness(every=20)
    assert measurement("sharpness: num=3, every=10") == Sharpness(num=3, every=10)
    assert measurement("bottom-eigenvalue") == BottomEigenvalue()
    assert measurement("block_spectra:blocks=layer,every=50") == BlockSpectra(blocks="layer", every=50)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sharpnes", "`measure` names 'sharpnes'; near it: 'sharpness'"),
        ("sharpness:nun=3", r"sets 'nun' \(near: 'num'"),
        ("sharpness:0", "every=0; give a number of steps >= 1"),
        ("sharpness:every=often", "every='often'"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        measurement(spec)


def test_one_name_is_a_list_of_one_and_none_is_refused():
    assert chosen_measurements("loss") == [Loss()]
    with pytest.raises(ValueError, match="`measure` is empty"):
        chosen_measurements([])


@pytest.mark.parametrize("spec", ["heterogeneity:every=5", "BlockSpectra:5", "block-spectra:5"])
def test_a_class_and_the_name_of_its_rows_will_do(spec):
    assert measurement(spec) == BlockSpectra(every=5)


def test_names_stand_for_one_measurement():
    classes = [type(measurement(name)) for name in measurement_names()]
    rows = [kind.name for kind in classes]
    assert len(set(rows)) == len(rows)
    for kind in classes:
        assert type(measurement(kind.name)) is type(measurement(kind.__name__)) is kind

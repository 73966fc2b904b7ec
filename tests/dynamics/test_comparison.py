import pytest
from sharpscope.dynamics.comparison import compare
from sharpscope.dynamics.training import train

SHORT = dict(num_examples=40, steps=6, every=3, checkpoint_every=3, measure=("loss",), threads=1, progress=False)


def test_each_run_is_what_train_makes_of_it(tmp_path):
    found = compare("SGD,Adam:lr=0.01,betas=(0.8,0.9)", out=tmp_path / "both", **SHORT)
    assert list(found.results) == ["SGD", "Adam lr=0.01,betas=(0.8,0.9)"]
    alone = train(
        optimizer="Adam", optimizer_options={"lr": 0.01, "betas": (0.8, 0.9)}, out=tmp_path / "alone", **SHORT
    )
    with alone.trajectory() as one, found.results["Adam lr=0.01,betas=(0.8,0.9)"].trajectory() as other:
        assert one.series("loss").values.tolist() == other.series("loss").values.tolist()
    with found.results["SGD"].trajectory() as sgd, alone.trajectory() as adam:
        assert sgd.series("loss").values[0] == adam.series("loss").values[0]  # same weights and data
        assert sgd.series("loss").values[-1] != adam.series("loss").values[-1]


def test_settings_for_all_reach_those_that_take_them(tmp_path):
    found = compare("SGD:momentum=0.5,Adagrad,SGD", out=tmp_path, lr=0.01, momentum=0.9, **SHORT)
    options = {label: result.options.optimizer_options for label, result in found.results.items()}
    assert options["SGD momentum=0.5"] == {"lr": 0.01, "momentum": 0.5}
    assert options["Adagrad"] == {"lr": 0.01}
    assert options["SGD"] == {"lr": 0.01, "momentum": 0.9}


def test_a_comparison_that_was_stopped_goes_on(tmp_path):
    compare("SGD,Adam", out=tmp_path, **SHORT)
    again = compare("SGD,Adam,RMSprop", out=tmp_path, resume=True, **SHORT)
    assert [result.resumed_at for result in again.results.values()] == [6, 6, None]


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least two"):
        compare("SGD", out=tmp_path)
    with pytest.raises(ValueError, match="'SGD' twice"):
        compare("SGD,sgd", out=tmp_path)
    with pytest.raises(ValueError, match="`optimizer` is 'Adma'; near it: .*'adam'"):
        compare("SGD,Adma", out=tmp_path)
    with pytest.raises(ValueError, match="'learning_rate', which Adam does not take"):
        compare("SGD,Adam:learning_rate=1", out=tmp_path, **SHORT)


def test_an_option_for_all_must_fit_one_of_them_and_reaches_a_base(tmp_path):
    with pytest.raises(ValueError, match="'foo', which none of SGD, Adam takes"):
        compare("SGD,Adam", out=tmp_path / "a", optimizer_options={"foo": 1}, **SHORT)
    found = compare("Adam,SAM:base=Adam", out=tmp_path / "b", optimizer_options={"betas": (0.5, 0.6)}, **SHORT)
    assert all(tuple(r.options.optimizer_options["betas"]) == (0.5, 0.6) for r in found.results.values())

"""`jint8.analysis`: planted outliers keep the function and are found; statistics as table and plots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jint8
from jint8 import analysis
from jint8._ops.observe import Seen


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="mlp_norm")(x)
        return x + nn.Dense(16, name="down")(nn.tanh(nn.Dense(24, name="up")(h)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(4):
            x = Block(name=f"layers_{i}")(x)
        return x


X = jax.random.normal(jax.random.key(0), (3, 7, 16))
MODEL = Net()


@functools.cache
def plain():
    return MODEL.init(jax.random.key(1), X)


@functools.cache
def planted():
    return analysis.inject_outliers(plain(), [2, 9], 32.0, norms={"mlp_norm": ["up"]})


@functools.cache
def counted():
    return analysis.outlier_statistics(MODEL.apply, planted(), [X, -X])


def layers(outliers, largest=7.0):
    """`Seen` by path in a tree's order, in which layer 10 comes before layer 2, of counts `[layers, k]` out of 100."""
    counts = np.asarray(outliers, np.float64)
    seen = {}
    for number in sorted(range(len(counts)), key=str):
        ones = np.ones(counts.shape[1])
        size = np.where(counts[number] > 0, largest + number, 1.0)
        seen[f"layers_{number}/down/kernel"] = Seen(100 * ones, counts[number], counts[number] * size, ones, size)
    return analysis.Statistics.of(seen)


def test_layers_are_in_their_order():
    counts = np.zeros((12, 5))
    counts[2, :3], counts[10, :1] = 50, 20
    p = layers(counts).projections["layers_*/down/kernel"]
    np.testing.assert_array_equal(p.outliers, counts)
    assert p.numbers.tolist() == list(range(12))
    assert p.outlier_columns.tolist() == [0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert p.summary() == ("5", "2 of 12", "0", "3 in 2", "2.83%", "17.0 in 10")
    found = layers(counts).to_dict()["projections"]["layers_*/down/kernel"]
    assert (found["numbers"], found["largest"][10], found["largest"][2]) == (list(range(12)), 17, 9)


def test_layers_have_the_numbers_of_their_names():
    seen = {f"layers_{number}/up/kernel": Seen(*np.ones((5, 4))) for number in (13, 4)}
    seen |= {"stack/up/kernel": Seen(*np.ones((5, 3, 4)))}
    seen |= {
        f"layers_{number}/expert_{expert}/kernel": Seen(*np.ones((5, 4))) for number in (3, 4) for expert in (0, 1)
    }
    found = {name: p.numbers.tolist() for name, p in analysis.Statistics.of(seen).projections.items()}
    assert found == {
        "layers_*/up/kernel": [4, 13],
        "stack/up/kernel": [0, 1, 2],
        "layers_*/expert_*/kernel": [0, 1, 2, 3],
    }


def test_a_crowd_is_a_band():
    """Hundreds of dimensions: by layer the median and quantiles over those that have outliers."""
    pytest.importorskip("matplotlib")
    counts = np.zeros((3, 400))
    counts[0, :101] = np.arange(101)[::-1]  # of which one has none
    counts[2, :] = 40
    counts[2, 7] = 90
    figure = analysis.plot_features(layers(counts))
    ax = figure.axes[0]
    median, largest = ax.get_lines()
    np.testing.assert_allclose(median.get_xdata(), [0.505, np.nan, 0.4])
    np.testing.assert_allclose(largest.get_xdata(), [1.0, np.nan, 0.9])
    assert median.get_ydata().tolist() == [0, 1, 2]
    assert figure.axes[1].get_lines()[0].get_xdata().tolist() == [100, 0, 400]
    points = analysis.plot_features(layers(counts[:, :200])).axes[0].collections[0].get_offsets()
    assert len(points) == 300


def test_planted_outliers_keep_the_function():
    kernel = lambda tree: tree["params"]["layers_0"]["up"]["kernel"]
    assert not np.array_equal(kernel(planted()), kernel(plain()))
    np.testing.assert_allclose(MODEL.apply(planted(), X), MODEL.apply(plain(), X), rtol=1e-5, atol=1e-5)


def test_they_are_found():
    features = counted().features()
    assert {(f.projection, f.dimension) for f in features} == {("layers_*/up/kernel", 2), ("layers_*/up/kernel", 9)}
    assert all(f.layer_share == 1 and f.position_share > 0.5 and f.largest > 60 > f.mean > 6 for f in features)
    up = counted().projections["layers_*/up/kernel"]
    assert up.outliers.shape == (4, 16)
    assert up.outlier_columns.tolist() == [2] * 4
    assert (up.positions == 2 * 21).all()
    assert not analysis.outlier_statistics(MODEL.apply, plain(), [X]).features()


def test_relative_thresholds_know_the_scale():
    run = lambda x, **options: analysis.outlier_statistics(MODEL.apply, planted(), [x], **options).features()
    assert {f.dimension for f in run(X, threshold=4.0, relative=True) if "up" in f.projection} >= {2, 9}


def test_table_and_dict():
    text = str(counted())
    row = next(line for line in text.splitlines()[5:] if line.startswith("layers_*/up/kernel"))
    assert row.split()[1:8] == ["16", "4", "of", "4", "2", "2", "in"]
    assert "layers_*/up/kernel" in text
    assert "100%" in text
    found = counted().to_dict()
    assert found["threshold"] == 6
    assert {f["dimension"] for f in found["features"]} == {2, 9}
    assert found["projections"]["layers_*/up/kernel"]["outlier_columns"] == [2, 2, 2, 2]
    assert counted().to_dict(position_share=1.0)["features"] == []


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    figures = {
        "features": analysis.plot_features(counted()),
        "magnitudes": analysis.plot_magnitudes(counted()),
        "models": analysis.plot_models({"planted": counted(), "plain": counted()}),
    }
    for name, figure in figures.items():
        file = tmp_path / f"{name}.{suffix}"
        figure.savefig(file)
        assert file.stat().st_size > 1000
    number = list(counted().projections).index("layers_*/up/kernel")
    layers = figures["features"].axes[number].collections[0].get_offsets()
    assert {tuple(p) for p in np.asarray(layers)} == {(d, layer) for d in (2, 9) for layer in range(4)}
    assert figures["models"].axes[0].lines[0].get_ydata().tolist() == [100, 100]


def test_html_report(tmp_path):
    pytest.importorskip("matplotlib")
    page = analysis.html_report(counted(), title="<planted>")
    assert "<title>&lt;planted&gt;</title>" in page
    up = counted().projections["layers_*/up/kernel"]
    assert "<td>layers_*/up/kernel</td><td>16</td><td>4 of 4</td><td>2</td><td>2 in 0</td>" in page
    assert f"<td>{up.largest.max():.1f} in {up.largest.max(axis=1).argmax()}</td></tr>" in page
    rows = [line for line in page.splitlines() if line.startswith("<tr><td>layers_*/up/kernel</td><td>")]
    assert {row.split("<td>")[2] for row in rows} == {"2</td>", "9</td>", "16</td>"}
    assert page.count("<svg") == page.count("</svg>") == 2
    for absent in ("<?xml", "src=", "<!DOCTYPE svg"):  # nothing to fetch
        assert absent not in page
    assert analysis.html_report(counted(), position_share=1.0).count("<tr><td>") == len(counted().projections)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'jint8\[plots\]'"):
        analysis.plot_features(counted())


NORMS = {"mlp_norm": ["up"]}
ERRORS = {
    "no_norm": (lambda: analysis.inject_outliers(plain(), [1]), ValueError, "Expected 'attention_norm' to match"),
    "no_projection": (
        lambda: analysis.inject_outliers(plain(), [1], norms={"mlp_norm": ["gate"]}),
        ValueError,
        "'gate'",
    ),
    "dimension": (
        lambda: analysis.inject_outliers(plain(), [16], norms=NORMS),
        ValueError,
        "Expected dimensions from 0 to 15, got",
    ),
    "int8": (
        lambda: analysis.inject_outliers(jint8.quantize_params(plain()), [1], norms=NORMS),
        TypeError,
        "layers_0/up/kernel: Expected a float weight, got a QTensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_stacked_layers():
    params = {"mlp_norm": {"scale": jnp.ones((2, 3))}, "up": {"kernel": jnp.ones((2, 3, 4))}}
    planted = analysis.inject_outliers(params, [1], 4.0, norms=NORMS, plan={"up/kernel": (1,)})
    assert planted["up"]["kernel"][:, :, 0].tolist() == [[1, 0.25, 1]] * 2
    assert planted["mlp_norm"]["scale"].tolist() == [[1, 4, 1]] * 2

"""Mixers and the template: each is its matrix times its values, cheaply."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract.attention import TemplateRow
from attn.delta import Delta
from attn.lightning import Lightning
from attn.masks import Causal, Window
from attn.mixers import Depthwise, FNet, LongConv, MeanPool, Mixer, Static
from attn.recurrent.delta_rule import recurrence as delta_rule
from attn.softmax import Softmax
from attn.template import matrix, row
from experiments.cli import config
from models.lm import LM
from models.pixels import PixelNet
from experiments.measure import cost
from tests.compiled import apply, init
from tests.laws import ENTRIES, Learned, close
from tests.test_layering import ANALYSES, FAMILIES, LAYERS

L, E = 12, 6
MIXERS = (FNet(), Static(length=L), LongConv(length=L), LongConv(length=5),
          LongConv(length=20), Depthwise(), Depthwise(kernel=5), MeanPool(),
          MeanPool(causal=False))
EACH = pytest.mark.parametrize("mixer", MIXERS, ids=str)
# Delta reads silu(conv(v)): what it is linear in has a test of its own; SEA estimates
# its matrix from v too, and what a learned memory answers decides what it is taught
NAMES = [name for name, entry in ENTRIES.items() if entry.in_v]


def tokens(t=L, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), (2, t, E)).astype(dtype)


def drawn(mixer, x):
    return init(mixer, jax.random.key(1), x)


@EACH
@pytest.mark.parametrize("t", [L, 7, 1])
def test_a_mixer_is_its_matrix_times_its_values(mixer, t):
    if isinstance(mixer, Static):
        mixer = mixer.clone(length=t, parent=None)
    x = tokens(t)
    params = drawn(mixer, x)
    y = apply(mixer, params, x)
    close(y, apply(mixer, params, x, method="dense"))
    assert y.shape == x.shape and y.dtype == x.dtype
    a, v = (np.asarray(apply(mixer, params, x, method=m), np.complex128)
            for m in ("matrix", "values"))
    assert a.shape[1:] == (t, t) and v.shape[:2] == (2, t)
    close(np.einsum("gts,bsgw->btgw", a, v).real.reshape(x.shape), y)
    if isinstance(mixer, LongConv) or mixer == MeanPool():
        assert (np.triu(a, 1) == 0).all()
        assert np.abs(np.diagonal(a, axis1=1, axis2=2)).min() > 0


def oracle(mixer, params, x):
    """float64, by the definition, one token at a time."""
    x = np.asarray(x, np.float64)
    t = x.shape[1]
    weight = {n: np.asarray(a, np.float64) for n, a in params.get("params", {}).items()}
    y = np.zeros_like(x)
    n, m = np.arange(t), np.arange(E)
    for i in range(t):
        if isinstance(mixer, FNet):
            wave = np.exp(-2j * np.pi * (i * n[:, None, None] / t
                                         + m[:, None] * m[None] / E))
            y[:, i] = np.einsum("bsn,snm->bm", x, wave).real
        if isinstance(mixer, Static):
            y[:, i] = np.einsum("s,bse->be", weight["weight"][i], x)
        if isinstance(mixer, LongConv):
            for s in range(max(0, i - mixer.length + 1), i + 1):
                y[:, i] += weight["taps"][i - s] * x[:, s]
        if isinstance(mixer, Depthwise):
            for w in range(mixer.kernel):
                if 0 <= (s := i + w - mixer.kernel // 2) < t:
                    y[:, i] += weight["taps"][w] * x[:, s]
        if isinstance(mixer, MeanPool):
            y[:, i] = x[:, :i + 1].mean(1) if mixer.causal else x.mean(1)
    return y


@EACH
def test_a_mixer_is_its_definition_and_so_are_its_gradients(mixer):
    x = tokens()
    params = drawn(mixer, x)
    close(jax.jit(mixer.apply)(params, x), oracle(mixer, params, x))
    w = tokens(seed=2)
    f = lambda form: lambda params, x: (w * mixer.apply(params, x, method=form)).sum()
    have, want = (jax.grad(f(form), (0, 1))(params, x) for form in ("mix", "dense"))
    jax.tree.map(lambda a, b: close(a, b, "gradient"), have, want)
    # the definition is linear in x: its gradient is what it makes of basis vectors
    eye = np.eye(L * E).reshape(L * E // 2, 2, L, E)
    columns = [oracle(mixer, params, e) for e in eye]
    whole = np.stack(columns).reshape(L * E, L, E)
    grad = np.einsum("nte,bte->bn", whole, np.asarray(w, np.float64))
    close(have[1], grad.reshape(2, L, E), "gradient")


@EACH
def test_low_precision_is_float32_inside(mixer):
    x = tokens(dtype=jnp.bfloat16)
    params = drawn(mixer, x)
    y = apply(mixer, params, x)
    assert y.dtype == jnp.bfloat16
    exact = apply(mixer, params, x.astype(jnp.float32))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@EACH
def test_the_cost_of_a_mixer_is_its_row(mixer):
    work = []
    for t in (512, 1024, 2048):
        one = mixer.clone(length=t, parent=None) if hasattr(mixer, "length") else mixer
        x = jax.ShapeDtypeStruct((1, t, E), jnp.float32)
        params = jax.eval_shape(one.init, jax.random.key(0), x)
        work.append(cost.flops(one.apply, params, x))
    assert abs(cost.slope(work) - row(mixer).power) < 0.15, work


def test_every_attention_and_mixer_has_a_row():
    names = {path.stem for path in FAMILIES if path.stem not in ANALYSES | LAYERS}
    for name in names | {"softmax", "baseconv"}:
        found = vars(importlib.import_module(f"attn.{name}"))
        cls = next(c for n, c in found.items() if n.lower() == name)
        assert isinstance(cls.row, TemplateRow) and "L" in cls.row.cost, name
        # its own, or that of a mechanism: no family's row is another's by chance
        owner = next(c for c in cls.__mro__ if "row" in vars(c))
        assert owner is cls or owner.__module__.count(".") > 1, name
    assert all(isinstance(m, Mixer) and m.kind and "L" in m.cost for m in MIXERS)


@pytest.mark.parametrize("name", NAMES)
def test_an_attention_is_its_matrix_times_v(name):
    attention, t, heads, width = ENTRIES[name].attention, 9, 4, 3
    keys = jax.random.split(jax.random.key(5), 4)
    q, k = (jax.random.normal(n, (1, t, heads, 8)) for n in keys[:2])
    v = jax.random.normal(keys[2], (1, t, heads, width))
    x = jax.random.normal(keys[3], (1, t, E))
    if isinstance(attention, Learned):
        module = attention.module
        params = init(module, jax.random.key(1), q, k, v, x=x)
        f = jax.jit(lambda q, k, v: module.apply(params, q, k, v, x=x))
    else:
        f = jax.jit(attention)
    a = np.asarray(matrix(f, q, k, width=width), np.float64)
    assert a.shape == (1, heads, width, t, t)
    close(np.einsum("bhcts,bshc->bthc", a, np.asarray(v, np.float64)), f(q, k, v))
    if ENTRIES[name].ordered:
        assert (np.triu(a, 1) == 0).all()
    assert np.abs(a).max() > 0
    if not name.startswith(("rat",)):
        np.testing.assert_allclose(a, np.broadcast_to(a[:, :, :1], a.shape), atol=1e-6)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_power_of_a_row_is_what_the_laws_count(name):
    entry = ENTRIES[name]
    attention = getattr(entry.attention, "module", entry.attention)
    power = entry.flops if entry.default is None else entry.default
    assert row(attention).power == power


@pytest.mark.parametrize("gated", [False, True])
def test_the_delta_rule_is_a_matrix_times_silu_of_v(gated):
    q, k, v = (jax.random.normal(jax.random.key(n), (1, 9, 2, 8)) for n in range(3))
    gate = jax.random.normal(jax.random.key(3), (1, 9, 2))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    decay = jax.nn.log_sigmoid(gate) if gated else None
    rule = jax.jit(lambda q, k, v: delta_rule(q, k, v, jax.nn.sigmoid(gate), decay)[1])
    a = np.asarray(matrix(rule, q, k), np.float64)
    assert (np.triu(a, 1) == 0).all()
    close(np.einsum("bhts,bshc->bthc", a[:, :, 0], v), rule(q, k, v))
    x = tokens(9)[:1]
    params = Delta().init(jax.random.key(1), q, k, v, x=x)
    f = jax.jit(lambda q, k, v: Delta().apply(params, q, k, v, x=x))
    o = f(q, k, v)
    y = np.einsum("bhcts,bshc->bthc", matrix(f, q, k, width=8), v)
    assert np.linalg.norm(y - o) > 0.1 * np.linalg.norm(o)


def test_a_mask_moves_softmax_to_another_row():
    assert row(Softmax()).kind == "kernel, exact"
    assert row(Softmax(mask=Causal() & Window(4))).kind == "masked"
    assert row(Lightning()).power == 1
    with pytest.raises(ValueError, match="object has no row"):
        row(object())


def test_mixers_are_layers_of_models():
    layers = (FNet(), Static(length=24), LongConv(length=24), Depthwise(), MeanPool())
    model = PixelNet(attention=layers, width=8, heads=2)
    images = jax.random.normal(jax.random.key(0), (2, 4, 6, 1))
    logits = jax.jit(model.init_with_output)(jax.random.key(1), images)[0]
    assert logits.shape == (2, 10) and np.isfinite(logits).all()
    text = jnp.ones((1, 24), jnp.int32)
    lm = LM(vocab=9, attention=layers, width=8, heads=2)
    logits = jax.jit(lm.init_with_output)(jax.random.key(1), text)[0]
    assert logits.shape == (1, 24, 9)


def test_a_mixer_can_be_written_on_a_command_line():
    value = config.parse("(Static(length=64), FNet())")
    assert value == (Static(length=64), FNet())
    assert config.parse(config.format_value(value)) == value


def test_what_is_refused_is_refused_with_the_reason():
    x, run = tokens(), jnp.ones((2, L), jnp.int32)
    for options in ({"segments": run}, {"state": 1}, {"context": x}, {"pos": run}):
        with pytest.raises(NotImplementedError, match=f"FNet: {list(options)[0]}"):
            FNet().apply({}, x, **options)
    with pytest.raises(NotImplementedError, match="cannot be streamed"):
        FNet().init_state(4, x)
    for mixer, arg, message in (
        (FNet(), x[0], r"\[B,T,E\]"), (Static(length=9), x, "T=12 .* length=9"),
        (Depthwise(kernel=2), x, "kernel=2: expected an odd"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer.init(jax.random.key(0), arg)
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match="K=1"):
        matrix(Softmax(), q, q[:, :, :1])

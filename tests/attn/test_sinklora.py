"""SinkLoRA: groups that shift, sinks, what rolling lets through, golden vectors."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Full
from attn.sinklora import Groups, SinkLoRA
from attn.softmax import Softmax
from tests.compiled import attend
from tests.golden.__main__ import cases
from tests.laws import close, run
from tests.oracles.softmax import attention, oracle

B, T, H, K, D, V = 2, 24, 4, 2, 8, 12
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sinklora.npz"
FORMS = SinkLoRA(8), SinkLoRA(8, form="flash"), SinkLoRA(8, form="roll")


def inputs(t=T):
    keys = jax.random.split(jax.random.key(2), 4)
    shapes = (B, t, H, D), (B, t, K, D), (B, t, K, V), (B, t, H, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


@pytest.mark.parametrize("form", ["roll", "flash"])
def test_shifted_groups_are_those_of_longlora(form):
    case = cases(GOLDEN)["s2_0"]
    config = case["config"]
    assert config["shifted_heads"] == "last half"
    s2 = SinkLoRA(config["group"], form=form, scale=config["scale"])
    q, k, v, do = (jnp.asarray(case[name]) for name in ("q", "k", "v", "cotangent"))
    o, grads = run(s2, q, k, v, do=do)
    close(o, case["out_roll" if form == "roll" else "out_flash_semantics"])
    if form == "roll":
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            close(grad, case[name], "gradient")


def test_sinks_and_fewer_shifted_heads_are_the_golden_ones():
    case = cases(GOLDEN)["sf_0"]
    config = case["config"]
    sf = SinkLoRA(config["group"], sinks=config["sink"], scale=config["scale"],
                  shifted=config["shifted_heads"])
    q, k, v = (jnp.asarray(case[name]) for name in "qkv")
    close(attend(sf, q, k, v), case["out"])
    h, t = q.shape[2], q.shape[1]
    assert sf.mask(h) == SinkLoRA(config["group"], sinks=config["sink"]).mask(h)
    assert (sf.mask(h)(*np.ogrid[:h, :t, :t]) == case["mask"]).all()


@pytest.mark.parametrize("sinklora", [*FORMS, SinkLoRA(6, sinks=3, causal=False)],
                         ids=lambda a: f"{a.form}-{a.causal}")
def test_every_form_is_its_mask(sinklora):
    q, k, v, do = inputs()
    o, _, grads = oracle(q, k, v, do, mask=sinklora.mask(H, T))
    have, have_grads = run(sinklora, q, k, v, do=do)
    close(have, o)
    for name, grad in zip("qkv", have_grads, strict=True):
        close(grad, grads[name], "gradient")


@pytest.mark.parametrize("mask", [
    Groups(8, 2), Groups(8, 2, 3), Groups(6, 0, 2, False), Groups(8, 2, length=24),
    Groups(4, 3, 1),
], ids=str)
def test_bounds_are_never_wrong(mask):
    seen = mask(*np.ogrid[:H, :T, :T])
    cuts = [(a, b) for a in range(0, T, 3) for b in range(a, T, 4)]
    for i in cuts:
        for j in cuts:
            part = seen[:, i[0]:i[1] + 1, j[0]:j[1] + 1]
            some, every = mask.bounds(i, j)
            assert some or not part.any(), (i, j)
            assert part.all() or not every, (i, j)
    later = np.triu(np.ones((T, T), bool), 1)
    assert mask.causal == (not seen[:, later].any())
    if mask.causal:
        left, first = mask.reach()
        i, j = np.ogrid[:T, :T]
        assert ((i - j <= left) | (j < first))[seen.any(0)].all()


def test_rolling_shows_the_end_of_the_text_to_its_beginning():
    """By outputs, as only those of the class that says so."""
    q, k, v, _ = inputs()
    changed = [a.at[:, -1].multiply(-3.0) for a in (q, k, v)]
    for sinklora in FORMS:
        a, b = (attend(sinklora, *args) for args in ((q, k, v), changed))
        moved = (np.asarray(a) != np.asarray(b)).any((0, 3))[:-1]  # [T-1,H]
        assert moved.any() == (sinklora.form == "roll")
        if moved.any():  # half a group, of shifted heads
            assert moved[:4, 2:].all() and not moved[:, :2].any()
            assert not moved[4:].any()


def test_without_an_order_sinks_see_everything():
    sf = SinkLoRA(6, sinks=2, causal=False)
    q, k, v, _ = inputs()
    seen = sf.mask(H)(*np.ogrid[:H, :T, :T])
    assert seen[:, :2].all() and seen[:, :, :2].all()
    close(attend(sf, q, k, v), attention(q, k, v, seen))
    close(attend(SinkLoRA(2 * T, causal=False), q, k, v),
          attend(Softmax(mask=Full()), q, k, v))


def test_a_stream_keeps_a_group_and_the_sinks():
    q, k, v, _ = inputs()
    assert FORMS[0].init_state(10**6, q, k, v).k.shape[1] == 8 + 4


def test_a_group_is_a_share_of_the_text():
    assert SinkLoRA(None).mask(4, 32) == SinkLoRA(8).mask(4)
    assert SinkLoRA(8, form="flash").mask(5).shifted == 2  # of 5 heads 2 stay
    q, k, v, _ = inputs()
    for make, error, message in (
        (lambda: SinkLoRA(7), ValueError, "group=7: expected an even"),
        (lambda: SinkLoRA(form="roll", causal=False), ValueError, "expected form="),
        (lambda: SinkLoRA(form="other"), ValueError, "form='other'.*expected"),
        (lambda: SinkLoRA(None).mask(4, 20), ValueError, "group of 5 tokens of 20"),
        (lambda: SinkLoRA(None).init_state(9, q, k, v), ValueError, "group=None"),
        (lambda: SinkLoRA(10, form="roll")(q, k, v), ValueError, "24 tokens in groups"),
        (lambda: FORMS[2].init_state(9, q, k, v), NotImplementedError, "no stream"),
        (lambda: FORMS[2](q, k, v, segments=jnp.ones((B, T), jnp.int32)),
         NotImplementedError, "segments with form='roll'"),
    ):
        with pytest.raises(error, match=message):
            make()

"""A learned memory against its loop in float64, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.recurrent import memory_kernel
from attn.recurrent.memory import Gates, Where, answers, learn
from attn.recurrent.memory_axes import KL, Bias, Elastic, Lq, sigmoid
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_nets import MLP
from experiments.measure import cost
from tests.laws import close
from tests.oracles import memory as oracle

T, H, D, F, V = 7, 2, 4, 6, 5
PLAIN, DEEP, NORMED = MLP(1), MLP(3, F, "silu"), MLP(2, F, residual=True, norm=True)
l2 = lambda a, v, delta: 0.5 * ((a - v) ** 2).sum()


def huber(a, v, delta):
    """Of each channel, equation 14."""
    r = jnp.abs(a - v)
    return jnp.where(r <= delta, r * r / 2, delta * (r - delta / 2)).sum()


def huber_norm(a, v, delta):
    """Of the length, equation 15."""
    r = jnp.sqrt(((a - v) ** 2).sum())
    return jnp.where(r <= delta, r * r / 2, delta * (r - delta / 2))


def robust(a, v, delta):
    """Equation 17."""
    r = jnp.sqrt(((a - v) ** 2).sum())
    return r * r / 2 + delta * r + delta * delta / 2


lp = lambda a, v, delta: (jnp.abs(a - v) ** 3).sum()
# network, bias, its loss, link, chunk, gates beside step and keep
CASES = {
    "linear": (PLAIN, Bias(), l2, None, 3, ("momentum",)),
    "dot": (PLAIN, Bias("dot"), lambda a, v, delta: -(a * v).sum(), None, 2, ()),
    "deep": (DEEP, Bias(), l2, None, 3, ("momentum",)),
    "lp": (NORMED, Bias("lp"), lp, Lq(4.0), 3, ()),
    "kl": (NORMED, Bias(), l2, KL(), 3, ("momentum",)),
    "huber": (PLAIN, Bias("huber_coord"), huber, Elastic(0.1), 1, ("delta",)),
    "huber_norm": (PLAIN, Bias("huber_norm"), huber_norm, sigmoid, 4, ("delta",)),
    "robust": (PLAIN, Bias("robust"), robust, None, 7, ("delta",)),
}


def drawn(net, names, t=T, seed=0):
    """q, k, v and gates {name: [T,H,...]}, matrices, and vectors that stay."""
    rng = np.random.default_rng(seed)
    unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
    q, k = unit(rng.normal(size=(2, t, H, D)))
    args = {"q": q, "k": k, "v": rng.normal(size=(t, H, V)),
            "step": rng.uniform(0.05, 0.2, (t, H)),
            "keep": rng.uniform(0.8, 1.0, (t, H))}
    args |= {n: rng.uniform(0.3, 0.9, (t, H)) for n in names}
    initial = {n: rng.normal(size=(H, *s)) * 0.5
               for n, s in net.matrices(D, V).items()}
    fixed = {n: 1 + 0.1 * rng.normal(size=(H, *s)) for n, s in net.vectors(V).items()}
    single = lambda tree: {n: a.astype(np.float32) for n, a in tree.items()}
    return single(args), single(initial), single(fixed)


def run(rule, chunk, args, initial, fixed, **options):
    """o [T,H,V] and the memory."""
    row = {n: a[None] for n, a in args.items()}
    log = lambda name: jnp.log(row[name]) if name in row else None
    gates = Gates(row["step"], log("keep"), log("momentum"), row.get("delta"))
    pos = jnp.arange(row["q"].shape[1], dtype=jnp.int32)[None]
    memory, o = learn(rule, row["q"], row["k"], row["v"], gates, initial,
                      Where(pos, None), fixed=fixed, chunk=chunk, **options)
    return o[0], memory


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_loop_with_every_gradient(name):
    net, bias, loss, link, chunk, names = CASES[name]
    given = drawn(net, names)
    do = np.random.default_rng(1).normal(size=(T, H, V)).astype(np.float32)
    answer = functools.partial(
        oracle.mlp, activation=net.activation, residual=net.residual)
    want, wanted = oracle.heads(answer, loss, link, chunk, *given, do)
    f = functools.partial(run, Rule(net, bias, link), chunk)

    @jax.jit
    def both(*given):
        o, back, _ = jax.vjp(f, *given, has_aux=True)
        return o, back(do)

    o, grads = both(*given)
    close(o, want)
    pairs = [(a[n], b[n]) for a, b in zip(grads, wanted) for n in b]
    assert len(pairs) > 5
    for a, b in pairs:
        close(a, b, "gradient")


def test_a_decay_as_strong_as_can_be():
    """Nothing of what was before is left, and no number is lost."""
    args, initial, fixed = drawn(PLAIN, ("momentum",), t=6)
    f = lambda args, initial: run(Rule(PLAIN, Bias()), 6, args, initial, fixed)[0]
    gone = args | {"keep": args["keep"].copy()}
    gone["keep"][3] = 1e-37
    o, grads = jax.jit(jax.value_and_grad(
        lambda *a: (f(*a) ** 2).sum(), (0, 1)))(gone, initial)
    for a in jax.tree.leaves((o, grads)):
        assert np.isfinite(a).all()
    later = jax.jit(jax.grad(lambda w: (f(gone, w)[3:] ** 2).sum()))(initial)
    # momentum and the frozen weights remember it, the decayed ones do not
    early = jax.jit(jax.grad(lambda w: (f(args, w)[3:] ** 2).sum()))(initial)
    assert 0 < np.abs(later["W0"]).max() < 2 * np.abs(early["W0"]).max()


def test_the_lag_token_makes_a_step_of_its_own():
    """By hand: chunks of b have two parts, the first token and the others."""
    given = drawn(NORMED, (), t=8)
    rule = Rule(NORMED, Bias())
    have = jax.jit(lambda *a: run(rule, 4, *a, lag=True)[0])(*given)
    args, initial, fixed = given
    initial = jax.tree.map(jnp.asarray, initial)

    @jax.jit
    def parts(args, initial, fixed):
        outs = []
        for at, n in ((0, 1), (1, 3), (4, 1), (5, 3)):
            o, memory = run(
                rule, n, {k: a[at:at + n] for k, a in args.items()}, initial, fixed)
            initial = {k: a + memory.weights[k][0] for k, a in initial.items()}
            outs.append(o)
        return jnp.concatenate(outs)

    close(have, parts(args, initial, fixed))
    with pytest.raises(NotImplementedError, match="lag_token with segments"):
        learn(rule, *(np.zeros((1, 2, H, n), np.float32) for n in (D, D, V)),
              Gates(np.zeros((1, 2, H))), initial,
              Where(np.zeros((1, 2), int), np.ones((1, 2), int)), fixed=fixed, lag=True)


def test_cheaper_reads():
    """The norm, or all, of the chunk's beginning; with chunks of one token and steps of
    0 there is nothing to be stale."""
    given = drawn(NORMED, (), t=5)
    args = given[0]
    still = args | {"step": 0 * args["step"], "keep": 1 + 0 * args["keep"]}
    still = (still, *given[1:])
    exact, *cheap = (
        jax.jit(functools.partial(run, Rule(NORMED, Bias(), Lq(4.0), read), 1))
        for read in ("exact", "norm", "start"))
    for f in cheap:
        close(f(*still)[0], exact(*still)[0])
        assert np.abs(f(*given)[0] - exact(*given)[0]).max() > 1e-4


def test_what_it_answers_now():
    args, initial, fixed = drawn(NORMED, (), t=5)
    rule = Rule(NORMED, Bias())

    @jax.jit
    def both(args):
        o, memory = run(rule, 5, args, initial, fixed)
        return o, answers(rule, memory, initial, fixed, args["q"][None])[0]

    o, asked = both(args)
    close(asked[-1], o[-1])


def test_memory_of_t_tokens_is_what_chunks_begin_with():
    width, chunk = 32, 4
    rule = Rule(MLP(1), Bias())

    def loss(initial, q, step, keep):
        gates = Gates(step, keep, keep)
        pos = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        _, o = learn(
            rule, q, q, q, gates, {"W0": initial}, Where(pos, None), chunk=chunk)
        return (o ** 2).sum()

    def taken(t):
        like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        return cost.memory(jax.grad(loss), like(1, width, width),
                           like(1, t, 1, width), like(1, t, 1), like(1, t, 1))

    short, long = taken(512), taken(1024)
    states = 2 * 4 * width * width  # bytes of Z and S
    tokens = 12 * 4 * width * chunk  # of a dozen arrays like q
    assert (long - short) / (512 / chunk) < states + tokens


@pytest.mark.parametrize("capability, backend, chunk, widest, refused", (
    ("8.0", "triton", 16, 128, True), ("8.9", "triton", 32, 64, True),
    ("8.0", "triton", 16, 64, False), ("9.0", "triton", 64, 128, False),
    (None, "triton", 64, 128, False), ("8.0", "tpu", 64, 128, False)))
def test_wide_tiles_are_not_for_gpus_before_hopper(
    capability, backend, chunk, widest, refused, monkeypatch
):
    monkeypatch.setattr(memory_kernel.tables, "capability", lambda: capability)
    some = jnp.zeros((1, T, H))
    args = Rule(PLAIN, Bias("l2")), Gates(some, some, some), chunk, widest, backend
    if refused:
        with pytest.raises(NotImplementedError, match=f"chunk={chunk} and widths of "):
            memory_kernel.refuse(*args)
    else:
        memory_kernel.refuse(*args)

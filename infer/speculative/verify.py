"""Which drafts are taken. A rule walks from the root of a draft tree, and at every node says what the next token is.

`coupled`  draws the token with the noise that plain decoding would use, and follows it down the tree if some child
           guessed it. The output is that of plain decoding, token for token, with the same seed, whatever was drafted:
           even a drafter that knows the noise cannot change it. With temperature 0 it is greedy verification. The
           default; it needs no q.
`rejection` takes the children in the order they were drawn, each with the probability that makes up for how it was
           proposed (Leviathan 2211.17192; Chen 2302.01318; many rounds and draws without replacement as in EAGLE-1 and
           SpecInfer). Exact in law, not token for token. Can take more than `coupled` where q is close to p.
`k_seq`    k chains drawn independently of each other, and a threshold rho that shares p among them (SpecTr 2310.15141).
`judge`    another rule, and besides every draft that a linear head on the target's own hidden state finds good (Judge
           Decoding 2501.19309). Lossy: `lossless=False`.

A rule is made of its law: how likely each child is taken and what the token is drawn from if none is (`Law`). The laws
are exact functions, enumerated in the tests; drawing by them is the same few lines for all.

Greedy rows of a sampled batch are judged by `coupled` under every rule. Letters as in `tree.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...models.heads import judge_logit
from ..sampling import SamplingArrays, choose
from .tree import DraftTree, Proposal, child_index, children, take_row

TINY = 1e-12  # less mass than this in a residual means that the rejection had no probability to begin with
ACCEPT_STREAM, REST_STREAM = 0x5EED_ACCE, 0x5EED_4E57  # no position reaches them: keys never meet the target's noise


class Node(NamedTuple):
    """Where the walk stands in each row, and what the target says there."""

    tree: DraftTree
    at: Int[Array, " B"]  # the node
    alike: Bool[Array, "B C"]  # every node whose path holds the same tokens: the node, and its doubles in other chains
    warped: Float[Array, "B V"]  # logits that plain decoding would sample from at this node
    hidden: Float[Array, "B C D"]  # the target's last hidden states at all nodes
    sampling: SamplingArrays
    position: Int[Array, " B"]  # of the token to be chosen


class Choice(NamedTuple):
    """The next token, and the child that guessed it, -1 if none did."""

    token: Int[Array, " B"]
    child: Int[Array, " B"]


class Law(NamedTuple):
    """What a rule does at one node, before any draw."""

    accept: Float[Array, "B A"]  # how likely each child is taken once those before it were not
    rest: Float[Array, "B V"]  # what the token is drawn from if none is


class Verifier(NamedTuple):
    """A rule: static facts, and `choose_next(params, node) -> Choice`."""

    name: str
    lossless: bool  # the output has the law of plain sampling
    proposals: frozenset[Proposal]  # how a drafter may have drawn for this to hold
    needs_q: bool  # uses what children were drawn from; none of them may have been dropped then
    chains_only: bool  # needs independent chains
    most: int  # children of a node it looks at
    choose_next: Callable[[Any, Node], Choice]


ANY: frozenset[Proposal] = frozenset(("chosen", "without_replacement", "independent"))


# ------------------------------------------------------------------------------------------------------------- rules
def coupled() -> Verifier:
    """Follow the token that plain decoding would draw."""
    return _COUPLED


@functools.lru_cache
def rejection(most: int, proposal: Proposal) -> Verifier:
    """Accept or refuse the children one by one.

    Args:
      most: children a node has at most, A.
      proposal: how the drafter draws.
    """

    def law(node: Node, p: Array, kids: Array) -> Law:
        q = p if proposal == "chosen" else _proposed_from(node)
        return rejection_law(p, q, _tokens_of(node.tree, kids), kids >= 0, proposal)

    needs_q = proposal != "chosen"
    return Verifier(
        "rejection", True, frozenset((proposal,)), needs_q, False, most, functools.partial(_draw_by, law, most)
    )


@functools.lru_cache
def k_seq(chains: int) -> Verifier:
    """Share the target among `chains` independent chains."""

    def law(node: Node, p: Array, kids: Array) -> Law:
        return k_seq_law(p, _proposed_from(node), _tokens_of(node.tree, kids), kids >= 0)

    return Verifier(
        "k-seq", True, frozenset(("independent",)), True, True, chains, functools.partial(_draw_by, law, chains)
    )


@functools.lru_cache
def judge(base: Verifier, most: int) -> Verifier:
    """`base`, and where it refuses, the first child whose hidden state the judge finds good.

    Its parameters are those of the judge in `models/heads.py`, and `"threshold": []`: `{"weight": [D], "bias": [],
    "threshold": []}`. A child passes when `sigmoid(weight . hidden + bias) > threshold`. The paper's threshold and
    class weights were not published.
    """

    def choose_next(params: Any, node: Node) -> Choice:
        choice = base.choose_next(params, node)
        kids = child_index(node.tree, node.alike, most)
        good = jax.nn.sigmoid(judge_logit(params, node.hidden)) > params["threshold"]
        passes = jnp.take_along_axis(good, jnp.maximum(kids, 0), axis=1) & (kids >= 0)
        first = jnp.argmax(passes, axis=1)
        overruled = (choice.child < 0) & jnp.any(passes, axis=1)
        child = jnp.where(overruled, take_row(kids, first), choice.child)
        token = jnp.where(overruled, take_row(node.tree.tokens, jnp.maximum(child, 0)), choice.token)
        return Choice(token, child)

    return base._replace(name=f"judge over {base.name}", lossless=False, most=most, choose_next=choose_next)


# -------------------------------------------------------------------------------------------------------------- laws
def rejection_law(
    p: Float[Array, "B V"],
    q: Float[Array, "B V"],
    tokens: Int[Array, "B A"],
    valid: Bool[Array, "B A"],
    proposal: Proposal,
) -> Law:
    """Multi-round rejection: with r = p, take x_i with probability min(1, r(x_i) / q_i(x_i)), else r = (r - q_i)+.

    q_i is the law child i was really drawn from: one-hot for chosen children, q for independent ones, and q without
    the earlier siblings, scaled to 1, for draws without replacement. A child with q_i(x_i) = 0 was not drawn by it (q
    ran out of tokens, or out of float32) and is passed over.
    """
    r, left, accept = p, q, []
    for i in range(tokens.shape[1]):
        hot = jax.nn.one_hot(tokens[:, i], p.shape[-1], dtype=p.dtype)
        total = jnp.sum(left, axis=-1, keepdims=True)  # of a sharp q, what the first sibling leaves is far below TINY
        q_i = hot if proposal == "chosen" else left / jnp.where(total > 0, total, 1)
        r_x, q_x = (jnp.sum(d * hot, axis=-1) for d in (r, q_i))
        drawn = valid[:, i] & (q_x > 0)
        accept.append(jnp.where(drawn, _ratio(r_x, q_x), 0))
        r = jnp.where(drawn[:, None], _normalise(jnp.maximum(r - q_i, 0), p), r)
        if proposal == "without_replacement":
            left = jnp.where(drawn[:, None], left * (1 - hot), left)
    return Law(jnp.stack(accept, axis=1), r)


def k_seq_law(
    p: Float[Array, "B V"], q: Float[Array, "B V"], tokens: Int[Array, "B A"], valid: Bool[Array, "B A"]
) -> Law:
    """SpecTr's k-SEQ: take X_i with probability min(1, p(X_i) / (rho q(X_i))), k being how many candidates there are.

    With beta = sum_x min(q, p / rho), at least one of k is taken with probability 1 - (1 - beta)^k, and the rest is
    p less what was taken, scaled to 1. rho is the least that leaves no negative rest (`smallest_rho`).
    """
    k = jnp.sum(valid, axis=1)
    rho = smallest_rho(p, q, k)[:, None]
    taken = jnp.minimum(q, p / rho)
    beta = jnp.sum(taken, axis=-1)
    before = jnp.arange(tokens.shape[1])[None]
    reach = (1 - beta)[:, None] ** before.astype(p.dtype)  # the candidates before it were all refused
    rest = jnp.maximum(p - taken * jnp.sum(jnp.where(before < k[:, None], reach, 0), axis=1)[:, None], 0)
    p_x, q_x = (jnp.take_along_axis(d, tokens, axis=1) for d in (p, q))
    return Law(jnp.where(valid, _ratio(p_x, rho * q_x), 0), _normalise(rest, p))


def smallest_rho(p: Float[Array, "B V"], q: Float[Array, "B V"], k: Int[Array, " B"]) -> Float[Array, " B"]:
    """The smallest rho in [1, k] with 1 - (1 - beta)^k <= sum_x min(rho q, p), by bisection from the valid side."""
    k = jnp.maximum(k, 1).astype(p.dtype)

    def halve(_, bounds):
        low, high = bounds
        rho = (low + high) / 2
        beta = jnp.sum(jnp.minimum(q, p / rho[:, None]), axis=-1)
        enough = 1 - (1 - beta) ** k <= jnp.sum(jnp.minimum(rho[:, None] * q, p), axis=-1)
        return jnp.where(enough, low, rho), jnp.where(enough, rho, high)

    return jax.lax.fori_loop(0, 40, halve, (jnp.ones_like(k), k))[1]


def target_law(warped: Float[Array, "B V"], sampling: SamplingArrays) -> Float[Array, "B V"]:
    """The distribution of the next token: a softmax, or all mass on the mode of greedy rows."""
    greedy = jax.nn.one_hot(jnp.argmax(warped, axis=-1), warped.shape[-1], dtype=warped.dtype)
    return jnp.where(sampling.temperature[:, None] > 0, jax.nn.softmax(warped, axis=-1), greedy)


# ----------------------------------------------------------------------------------------------------------- private
def _follow(params: Any, node: Node) -> Choice:
    token = choose(node.warped, node.sampling, node.position)
    return Choice(token, _child_with(node, token))


_COUPLED = Verifier("coupled", True, ANY, False, False, 2**31, _follow)


def _draw_by(law: Callable[[Node, Array, Array], Law], most: int, params: Any, node: Node) -> Choice:
    """Draw by a law: the first child whose coin falls right, else a token from the rest."""
    p = target_law(node.warped, node.sampling)
    kids = child_index(node.tree, node.alike, most)
    accept, rest = law(node, p, kids)
    coins = jax.vmap(lambda key: jax.random.uniform(key, (most,)))(_keys(node, ACCEPT_STREAM))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, rest.shape[1:]))(_keys(node, REST_STREAM))
    taken = coins < accept
    first = jnp.argmax(taken, axis=1)
    drawn = jnp.argmax(jnp.log(rest) + noise, axis=-1).astype(jnp.int32)
    child = jnp.where(jnp.any(taken, axis=1), take_row(kids, first), -1)
    token = jnp.where(child >= 0, take_row(node.tree.tokens, jnp.maximum(child, 0)), drawn)
    greedy, plain = node.sampling.temperature == 0, _follow(params, node)
    return Choice(jnp.where(greedy, plain.token, token), jnp.where(greedy, plain.child, child))


def _keys(node: Node, stream: int) -> Array:
    """One key a row, of its seed, sample and position alone; a stream of its own beside the target's noise."""

    def key(seed, sample_index, position):
        base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample_index), stream)
        return jax.random.fold_in(base, position)

    return jax.vmap(key)(node.sampling.seed, node.sampling.sample_index, node.position)


def _child_with(node: Node, token: Int[Array, " B"]) -> Int[Array, " B"]:
    tree = node.tree
    fits = children(tree, node.alike) & (tree.tokens == token[:, None])
    return jnp.where(jnp.any(fits, axis=1), jnp.argmax(fits, axis=1), -1).astype(jnp.int32)


def _tokens_of(tree: DraftTree, kids: Int[Array, "B A"]) -> Int[Array, "B A"]:
    return jnp.take_along_axis(tree.tokens, jnp.maximum(kids, 0), axis=1)


def _proposed_from(node: Node) -> Float[Array, "B V"]:
    """The q that this node's children were drawn from."""
    if node.tree.q is None or node.tree.q_row is None:
        raise ValueError(
            "verify: found a draft tree without q; expected what its children were drawn from. "
            "Let the drafter hand over q, or judge by `coupled`."
        )
    return take_row(node.tree.q, take_row(node.tree.q_row, node.at)).astype(node.warped.dtype)


def _ratio(over: Array, under: Array) -> Array:
    """min(1, over / under), and 0 where both are."""
    return jnp.where(over >= under, jnp.where(over > 0, 1, 0), over / jnp.where(under > 0, under, 1)).astype(over.dtype)


def _normalise(mass: Float[Array, "B V"], otherwise: Float[Array, "B V"]) -> Float[Array, "B V"]:
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return jnp.where(total > TINY, mass / jnp.maximum(total, TINY), otherwise)

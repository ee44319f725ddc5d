"""Jakiro: two experts draft (2502.06282), in the growing tree of EAGLE-2.

Of a `contrastive` drafter the last level of the tree costs no reading: the second branch of the nodes two levels up
guessed it already. Its guesses hang under every child of the node that made them; the published code hangs row b's
under node b of the next beam, whichever parent that has, which is harmless for correctness and costs acceptance. A
tree of D levels takes D - 1 readings, where EAGLE's takes D.

Of a `mixture` drafter every level is read, its tokens are the likeliest of both experts together, and a child is read
with the feature of the expert that gave it most.

The published sampler of the decoupled variant scores drafts by probabilities they were not drawn from, and so emits
another law than the target's. It is not reproduced: trees are chosen, not drawn, and any rule here is exact on them.
"""

import functools

import jax.numpy as jnp

from ....models import jakiro
from ....models.decoder import lm_head
from ....models.jakiro import JakiroConfig
from ....sharding.rules import SERVING
from ..draw import Draw
from ..grow import Read
from ..loop import Drafter
from .eagle import Network, dynamic_drafter


@functools.lru_cache
def make_drafter(
    cfg: JakiroConfig, *, draw: Draw = "mode", nodes: int = 60, beam: int = 10, levels: int = 6
) -> Drafter:
    """The most probable `nodes - 1` guesses; arguments as in `eagle.make_drafter`."""
    if cfg.kind == "contrastive" and levels < 2:
        raise ValueError(f"jakiro: levels={levels}; expected at least 2, the last of which is never read.")
    net = _contrastive(cfg) if cfg.kind == "contrastive" else _mixture(cfg)
    return dynamic_drafter(net, draw, nodes, beam, levels, ahead=cfg.kind == "contrastive")


# ----------------------------------------------------------------------------------------------------------- private
def _contrastive(cfg: JakiroConfig) -> Network:
    def forward(params, target, features, tokens, positions, mask, cache):
        out = jakiro.forward(cfg, params, target, features, tokens, positions, mask, cache, rules=SERVING)
        assert out.cache is not None
        return (out.main, out.contrast), out.cache

    def read(params, target, out, cache) -> Read:
        main, contrast = out
        by_row = lambda row, token: jnp.take_along_axis(main, row[..., None], axis=1)
        head = lambda hidden: lm_head(cfg.target, target, hidden, rules=SERVING)  # free for a branch that nobody reads
        return Read(head(main), by_row, cache, head(contrast))

    return _network(cfg, "jakiro", forward, read)


def _mixture(cfg: JakiroConfig) -> Network:
    def forward(params, target, features, tokens, positions, mask, cache):
        out = jakiro.forward_mixture(cfg, params, target, features, tokens, positions, mask, cache, rules=SERVING)
        assert out.cache is not None
        return (out.branches, out.log_weights), out.cache

    def read(params, target, out, cache) -> Read:
        given = jakiro.branch_log_probs(cfg, target, jakiro.MixtureOutput(out[0], out[1], None), rules=SERVING)

        def feature_of(row, token):  # [B, m] each
            rows = lambda x: jnp.take_along_axis(x, row.reshape(*row.shape, *(1,) * (x.ndim - 2)), axis=1)
            of_rows = jakiro.MixtureOutput(rows(out[0]), rows(out[1]), None)
            return jakiro.winning_features(of_rows, rows(given), token[..., None])[:, :, 0]

        return Read(jakiro.mixture_log_probs(given), feature_of, cache)

    return _network(cfg, "jakiro mixture", forward, read)


def _network(cfg: JakiroConfig, name: str, forward, read) -> Network:
    new_cache = functools.partial(jakiro.new_cache, cfg)
    return Network(name, cfg.target.num_layers, cfg.target.vocab_size, new_cache, forward, read)

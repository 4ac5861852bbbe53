"""A tree LSTM that learns how to compose a sequence (Choi, Yoo & Lee 2018), with the baselines that put it in place.

    ids (B, T) --word vectors, dropout--> x --leaf LSTM--> h, c (B, T, d) --encoder--> h (B, d) --classifier--> (B, K)

The encoder is one of

    "latent"   merges two neighbours at a time; an estimator chooses which (`models.composition`, `models.linear_time`)
    "tree"     follows trees that it is given: left-branching, balanced, the parse of the brackets
    "lstm"     is the leaf LSTM's last state, with no tree

and the classifier dropout, a hidden layer of ReLUs, dropout, and a linear layer. The defaults are the published
settings of Fan et al. (2022) for ListOps.
"""

from __future__ import annotations

import numpy as np

from minigrad import Rng, Tensor, no_grad
from minigrad.backend import array_module, asarray_like, on_host
from minigrad.fused import cross_entropy
from minigrad.nn import LSTM, Embedding, Linear, Module, he_normal, normal, orthogonal, parameter
from minigrad.ops import dropout, split

from .composition import Draw, check_lengths, compose_given, compose_plain
from .linear_time import compose, compose_greedy

ENCODERS = ("latent", "tree", "lstm")
LEAVES = ("lstm", "affine")

# A device spends the step of a batch like the published one on launches, and `compose_plain` has a fifth fewer than the
# linear-time path. With more pairs than these its work and its memory, about 12 · dim numbers for each, would count.
PLAIN_PAIRS = 1 << 18


def small_uniform(rng, shape, dtype=np.float32):
    """U(±0.002), for the last layer: all classes are equally likely at first."""
    return (0.002 * (2.0 * rng.uniform(shape, like=np.empty(0, np.float64)) - 1.0)).astype(dtype)


class TreeLSTM(Module):
    """vocabulary: how many word ids there are, the padding included.  classes: K.  dim: d, of the word vectors and of
    the states.  hidden: the classifier's.  All ≥ 1.  dropout in [0, 1), on the word vectors and before both layers of
    the classifier.  leaves: "lstm", or "affine" for states [h, c] = x W + b that see their own token only.

    Initial values as published: word vectors and q from N(0, 0.01²), orthogonal W of the cell and of the leaf LSTM's
    recurrence, He's normal for the other layers and U(±0.002) for the last; biases 0, and 1 for the forget gates.
    ValueError for an unknown encoder, or a value out of range.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int = 10,
        *,
        dim: int = 300,
        hidden: int = 300,
        encoder: str = "latent",
        leaves: str = "lstm",
        dropout: float = 0.5,
        rng: Rng,
        dtype=np.float32,
    ):
        for name, value, known in (("encoder", encoder, ENCODERS), ("leaves", leaves, LEAVES)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; the known ones are {', '.join(known)}.")
        if min(vocabulary, classes, dim, hidden) < 1 or not 0.0 <= dropout < 1.0:
            raise ValueError(
                f"sizes must be at least 1 and dropout in [0, 1), got vocabulary {vocabulary}, classes {classes}, "
                f"dim {dim}, hidden {hidden}, dropout {dropout}."
            )
        if encoder == "lstm" and leaves != "lstm":
            raise ValueError("the encoder lstm is the leaf LSTM itself: it cannot have affine leaves, leave them out.")
        self.encoder, self.dropout = encoder, dropout
        self.word = Embedding(vocabulary, dim, rng.site("word"), dtype=dtype)
        if leaves == "lstm":
            self.leaf = LSTM(dim, dim, rng.site("leaf"), init_input=he_normal, dtype=dtype)
        else:
            self.leaf = Linear(dim, 2 * dim, rng.site("leaf"), init=he_normal, bias=0.0, dtype=dtype)
        if encoder != "lstm":
            self.cell_weight = parameter(orthogonal(rng.site("cell"), (2 * dim, 5 * dim), dtype))
            bias = np.zeros(5 * dim, dtype)
            bias[dim : 3 * dim] = 1.0  # both forget gates
            self.cell_bias = parameter(bias)
        if encoder == "latent":
            self.query = parameter(normal(rng.site("query"), (dim,), dtype))
        self.features = Linear(dim, hidden, rng.site("features"), relu=True, init=he_normal, bias=0.0, dtype=dtype)
        self.output = Linear(hidden, classes, rng.site("output"), init=small_uniform, bias=0.0, dtype=dtype)

    # -- the parts.  rng draws the dropout; None, for evaluation, drops nothing

    def _apply_dropout(self, x, rng: Rng | None):
        if rng is None or not self.dropout:
            return x
        return dropout(x, rng.uniform(x.shape, like=x.data) >= self.dropout, rate=self.dropout)

    def leaf_states(self, ids, rng: Rng | None = None) -> tuple[Tensor, Tensor]:
        """h, c of all tokens.   ids (B, T) integers on the model's device -> (B, T, d) each"""
        if isinstance(self.leaf, LSTM):
            x = self._apply_dropout(self.word(ids.T), rng)  # an LSTM goes along the first axis
            h, c = self.leaf(x)
            return h.transpose(1, 0, 2), c.transpose(1, 0, 2)
        return split(self.leaf(self._apply_dropout(self.word(ids), rng)), sections=2, axis=-1)

    def classify(self, root, rng: Rng | None = None) -> Tensor:
        """The logits of the classes.   root (B, d) -> (B, K)"""
        features = self.features(self._apply_dropout(root, rng and rng.site("root")))
        return self.output(self._apply_dropout(features, rng and rng.site("features")))

    def _composition_weights(self) -> tuple:
        return self.cell_weight, self.cell_bias, self.query

    # -- training and evaluation

    def cost(self, ids, lengths, labels, rng: Rng, estimator=None, trees=None, plain: bool | None = None) -> Tensor:
        """−log p(label) of each sequence (B,), with all gradients attached.

        ids (B, T) and labels (B,): integers on the model's device.  lengths (B,): integers on the host, 1 ≤ n ≤ T.
        estimator: for a latent tree, how its choices are made and differentiated (`Estimator.episode`; ValueError for
        one that cannot choose step by step, or is for bits).  trees (B, T−1): for an encoder that is given trees.
        plain: compose hard choices in O(T²) on the tape (True), or in linear time (False)? By default in linear time,
        but on a device with at most `PLAIN_PAIRS` pairs, see there.
        """
        dropout_rng = rng.site("dropout")
        h, c = self.leaf_states(ids, dropout_rng.site("words"))
        loss = lambda root: cross_entropy(self.classify(root, dropout_rng), labels)
        if self.encoder != "latent":
            return loss(self._encode_without_choices(h, c, lengths, trees))

        estimator.check_family("categorical")

        def play(sampler, rng):
            scored, sampler = sampler is None, sampler or Draw
            soft, (B, T, _) = getattr(sampler, "support", "hard") == "soft", h.shape
            few_launches = not on_host(h.data) and B * T * (T - 1) // 2 <= PLAIN_PAIRS
            evaluate = compose_plain if soft or (few_launches if plain is None else plain) else compose
            settings = {"lengths": lengths, "sampler": sampler, "rng": rng, "scored": scored}
            root, log_p = evaluate(h, c, *self._composition_weights(), **settings)
            return loss(root), log_p

        return estimator.episode(play, rng.site("tree"))

    def _encode_without_choices(self, h, c, lengths, trees):
        """h of the root (B, d), for an encoder that chooses nothing: "lstm" or "tree"."""
        if self.encoder == "lstm":
            B, T, _ = h.shape
            last = check_lengths(lengths, B, T) - 1
            return h[array_module(h.data).arange(B), asarray_like(last, h.data)]
        return compose_given(h, c, self.cell_weight, self.cell_bias, lengths=lengths, choices=trees)

    def predict(self, ids, lengths, trees=None):
        """Greedy and without dropout: (logits (B, K), choices (B, T−1)) as arrays; None for no choices."""
        with no_grad():
            h, c = self.leaf_states(ids)
            if self.encoder != "latent":
                return self.classify(self._encode_without_choices(h, c, lengths, trees)).data, None
            weights = (p.data for p in self._composition_weights())
            root, choices = compose_greedy(h.data, c.data, *weights, lengths=lengths)
            return self.classify(Tensor(root)).data, choices

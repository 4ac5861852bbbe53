"""The VAE of `train_vae.py`: its flags, and how it is built from them. `measure_gradients.py` builds it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from estimators import ESTIMATORS, create
from models.vae import BernoulliVAE, CategoricalVAE

from .errors import require
from .flags import at_least, at_most, flag, one_of, sizes
from .loop import Annealing, ImageConfig, ImageExperiment, Optimizing
from .memory import check_evaluations, check_memory, draws, weights

FAMILIES = ("", "categorical", "bernoulli")
PRIORS = ("uniform", "learned")
MOST_DRAWS = 1_000_000  # at the end of a run, where nobody sees how far they are


@dataclass(frozen=True)
class Config(Annealing, Optimizing, ImageConfig):
    estimator: str = flag("reinmax", f"one of {', '.join(ESTIMATORS)}; options as in rloo:samples=4")
    code: str = flag("", f"{' or '.join(FAMILIES[1:])}: the variables' family; else the first one of the estimator")
    variables: int | None = flag(None, "L, the number of variables; else 8 categorical ones or 24 bits", type=int)
    categories: int = flag(8, "K, the number of categories of each categorical variable")
    hidden: tuple = flag(
        (512, 256), "widths of the encoder's hidden layers, or none; mirrored by the decoder", type=sizes
    )
    slope: float = flag(0.0, "of leaky ReLUs below 0; 0 for plain ReLUs")
    prior: str = flag("uniform", f"{' or '.join(PRIORS)}: of the latent variables")
    epochs: int = flag(120, "passes over the training images")
    gradient_draws: int = flag(0, "N > 1: report the variance of the encoder's gradient over N draws at the end")
    bound_samples: int = flag(0, "M > 0: report the importance-weighted bound with M samples at the end")

    def check(self) -> None:
        super().check()
        at_least(1, self, "variables", "categories")
        at_least(0, self, "gradient_draws", "bound_samples")
        at_most(MOST_DRAWS, self, "gradient_draws", "bound_samples")
        require(self.gradient_draws != 1, "--gradient-draws must be 0 or at least 2, got 1.")
        one_of(self, code=FAMILIES, prior=PRIORS)
        require(min(self.hidden, default=1) >= 1, f"--hidden needs widths of at least 1, got {self.hidden}.")
        require(0.0 <= self.slope < 1.0, f"--slope must be at least 0 and below 1, got {self.slope}.")

    def unread(self, estimator: Any) -> dict[str, str]:
        found = super().unread(estimator)
        if estimator.family.name == "bernoulli":
            found["categories"] = "bits have no categories"
        if not self.hidden:
            found["slope"] = "a network without hidden layers has no ReLU"
        return found

    def create_estimator(self) -> Any:
        return create(self.estimator, self.tau, self.code or None)


class VAEExperiment(ImageExperiment):
    """The data on the device, the model, its estimator and its optimizer."""

    config_class = Config

    def build(self, c: Config) -> None:
        bits = self.estimator.family.name == "bernoulli"
        variables = c.variables or (24 if bits else 8)
        categories = 2 if bits else c.categories
        self.check_size(variables, categories)
        check_evaluations(self.estimator, variables, categories)
        self.load()
        pixels, latent = self.train.shape[1], variables if bits else variables * categories
        rows = min(c.batch, len(self.train)) * draws(self.estimator)
        numbers = 6 * weights(pixels, *c.hidden, latent) + rows * (latent + sum(c.hidden) + pixels)
        flags = "--variables, --categories, --hidden, --batch or fewer samples"
        check_memory(numbers, self.dtype, flags, self.backend.name)
        shape = (pixels, variables) if bits else (pixels, variables, c.categories)
        settings = {"hidden": c.hidden, "rng": self.rng.site("weights"), "dtype": self.dtype}
        settings |= {"slope": c.slope, "learned_prior": c.prior == "learned"}
        self.model = (BernoulliVAE if bits else CategoricalVAE)(*shape, **settings).to(self.backend)
        self.optimizer = c.optimizer_for(self.model)
        self.warn_of(self.estimator)

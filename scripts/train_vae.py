"""Train a VAE with a categorical or a Bernoulli code, with any of the estimators.

    python scripts/train_vae.py                                    # the embedded 8×8 digits, half a minute
    python scripts/train_vae.py --data mnist --estimator st-gs --tau 0.5 --epochs 20
    python scripts/train_vae.py --resume runs/NAME                 # goes on bit for bit where it stopped

All flags are listed by --help.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import sys
import time
from dataclasses import dataclass

from estimators import ESTIMATORS, create
from minigrad import Rng
from minigrad.backend import BACKENDS, get_backend
from minigrad.optim import OPTIMIZERS
from models.data import DATASETS, PIXELS, binarise, load_images
from models.vae import BernoulliVAE, CategoricalVAE
from pictures import curves, page
from run_folder import (
    Interrupt,
    RunFolder,
    UserError,
    default_folder,
    flag,
    parse_flags,
    report_errors,
    require,
    sizes,
    user_errors,
)

import numpy as np
from tqdm import tqdm

log = logging.getLogger(__name__)

DTYPES = ("float32", "float64")
CODES = ("categorical", "bernoulli")
CHECK_EVERY = 100  # steps between two looks at the losses; each look waits for the device
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Config:
    data: str = flag("digits", f"data set: {', '.join(DATASETS)}")
    data_dir: str = flag("", "a folder with one folder per data set; else MINIGRAD_DATA, else a download")
    pixels: str = flag("gray", f"{', '.join(PIXELS)}: gray values, binarised anew for every batch, or once")
    estimator: str = flag("reinmax", f"one of {', '.join(ESTIMATORS)}; options as in rloo:samples=4")
    tau: float | None = flag(None, "temperature, for estimators that have one", type=float)
    code: str = flag("", f"{' or '.join(CODES)}: the kind of variables; else the first that the estimator handles")
    variables: int | None = flag(None, "L, the number of variables; else 8 categorical ones or 24 bits", type=int)
    categories: int = flag(8, "K, the number of categories of each categorical variable")
    hidden: tuple = flag((512, 256), "widths of the encoder's hidden layers; the decoder mirrors them", type=sizes)
    epochs: int = flag(120, "passes over the training images")
    batch: int = flag(100, "images in a batch")
    lr: float = flag(1e-3, "learning rate")
    optimizer: str = flag("adam", f"one of {', '.join(OPTIMIZERS)}")
    momentum: float = flag(0.9, "momentum of sgd")
    seed: int = flag(0, "fixes the initial weights, the order of the images and all noise")
    backend: str = flag("numpy", f"one of {', '.join(BACKENDS)}")
    dtype: str = flag("float32", f"one of {', '.join(DTYPES)}")
    bound_samples: int = flag(0, "M > 0: report the importance-weighted bound with M samples at the end")

    def check(self) -> None:
        """UserError, one sentence, for the first value out of range; names are checked where they are looked up."""
        for name in ("variables", "categories", "epochs", "batch"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} must be at least 1, got {value}.")
        require(self.code in ("", *CODES), f"unknown code {self.code!r}; the known ones are {', '.join(CODES)}.")
        require(min(self.hidden) >= 1, f"--hidden needs widths of at least 1, got {self.hidden}.")
        require(self.bound_samples >= 0, f"--bound-samples must be at least 0, got {self.bound_samples}.")
        require(self.dtype in DTYPES, f"unknown dtype {self.dtype!r}; the known ones are {', '.join(DTYPES)}.")
        known = ", ".join(OPTIMIZERS)
        require(self.optimizer in OPTIMIZERS, f"unknown optimizer {self.optimizer!r}; the known ones are {known}.")


class Training:
    """One run: the data on the device, the model, and a loop that can stop after any step and go on elsewhere."""

    def __init__(self, config: Config):
        c = self.config = config
        with user_errors():
            c.check()
            self.backend = get_backend(c.backend)
            self.estimator = create(c.estimator, c.tau, c.code or None)
            if self.estimator.caution:
                log.warning("%s may not train the model: %s.", c.estimator, self.estimator.caution)
            bits = self.estimator.code.name == "bernoulli"
            variables = c.variables or (24 if bits else 8)
            self.estimator.check_size(variables, 2 if bits else c.categories)
            self.images = load_images(c.data, c.data_dir or None, c.pixels, np.dtype(c.dtype))
            self.rng = Rng(c.seed)
            self.train, self.test = (self.backend.to_device(x) for x in (self.images.train, self.images.test))
            if c.pixels == "dynamic":  # the test images are binarised once, the training images at every step
                self.test = binarise(self.test, self.rng.site("test pixels"))
            sizes = (self.train.shape[1], variables) if bits else (self.train.shape[1], variables, c.categories)
            settings = {"hidden": c.hidden, "rng": self.rng.site("weights"), "dtype": np.dtype(c.dtype)}
            self.model = (BernoulliVAE if bits else CategoricalVAE)(*sizes, **settings)
            self.model.to(self.backend)
            options = {"momentum": c.momentum} if c.optimizer == "sgd" else {}
            self.optimizer = OPTIMIZERS[c.optimizer](self.model.parameters(), c.lr, **options)
        self.steps_per_epoch = math.ceil(len(self.train) / c.batch)
        self.epoch = self.step_in_epoch = 0
        self.losses: list = []  # of this epoch's steps: (Σ reconstruction, Σ KL) over the batch, on the device

    # -- one step

    def step(self, index) -> None:
        """Update the parameters on the images `index` (an integer array on the device)."""
        rng = self.rng.at(self.epoch * self.steps_per_epoch + self.step_in_epoch)
        x = self.train[index]
        if self.config.pixels == "dynamic":
            x = binarise(x, rng.site("pixels"))
        self.optimizer.zero_grad()
        reconstruction, kl = self.model.negative_elbo(x, self.estimator, rng.site("code"))
        (reconstruction + kl).mean().backward()
        self.optimizer.step()
        self.estimator.update()
        self.losses.append((reconstruction.data.sum(), kl.data.sum()))
        self.step_in_epoch += 1

    def check_losses(self) -> np.ndarray:
        """The losses of this epoch on the host, (steps, 2) float64. UserError that names the first one not finite."""
        xp = self.backend.xp
        losses = np.zeros((0, 2))
        if self.losses:
            losses = self.backend.to_host(xp.stack([xp.stack(pair) for pair in self.losses])).astype(np.float64)
        bad = ~np.isfinite(losses).all(axis=1)
        if bad.any():
            self.fail(f"the loss became {losses[bad][0].sum()}", int(bad.argmax()) + 1)
        return losses

    def fail(self, what: str, step_in_epoch: int):
        step = self.epoch * self.steps_per_epoch + step_in_epoch
        raise UserError(
            f"{what} at step {step} (epoch {self.epoch + 1}): training stopped, the last good checkpoint is kept; "
            "try a smaller --lr or another --tau in a new run."
        )

    # -- evaluation, always with hard samples

    def evaluate(self, images, rng: Rng) -> tuple[float, float]:
        """(reconstruction, KL) per image over all `images`, one hard sample each."""
        parts = []
        for start in range(0, len(images), EVALUATION_BATCH):
            x, sharpness = images[start : start + EVALUATION_BATCH], self.estimator.sharpness
            reconstruction, kl = self.model.evaluate(x, rng.site(start), sharpness)
            parts.append((reconstruction.sum(), kl.sum()))
        xp = self.backend.xp
        totals = self.backend.to_host(xp.stack([xp.stack(p) for p in parts])).astype(np.float64).sum(axis=0) / len(
            images
        )
        return float(totals[0]), float(totals[1])

    def importance_bound(self) -> float:
        rng, total = self.rng.site("bound"), 0.0
        for start in range(0, len(self.test), 100):
            x, samples = self.test[start : start + 100], self.config.bound_samples
            bound = self.model.importance_bound(x, rng.site(start), samples, sharpness=self.estimator.sharpness)
            total += float(self.backend.to_host(bound).sum(dtype=np.float64))
        return total / len(self.test)

    # -- the state: everything that a step depends on and that is not addressed by (seed, step)

    def state(self):
        """(arrays, info) for a checkpoint. UserError, so that nothing is saved, if a parameter is not finite."""
        arrays = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if not all(np.isfinite(a).all() for a in arrays.values()):
            self.fail("a parameter became infinite or NaN", self.step_in_epoch)
        arrays |= {f"optimizer.{k}": v for k, v in self.optimizer.state_dict().items()}
        arrays |= {f"estimator.{k}": v for k, v in self.estimator.state_dict().items()}
        arrays["losses"] = self.check_losses()
        return arrays, {
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "config": dataclasses.asdict(self.config),
        }

    def restore(self, arrays, info) -> None:
        part = lambda name: {k[len(name) + 1 :]: v for k, v in arrays.items() if k.startswith(name + ".")}
        self.model.load_state_dict(part("model"))
        self.optimizer.load_state_dict(part("optimizer"))
        self.estimator.load_state_dict(part("estimator"))
        losses = self.backend.to_device(arrays["losses"], self.config.dtype)
        self.losses = [(pair[0], pair[1]) for pair in losses] if len(losses) else []
        self.epoch, self.step_in_epoch = info["epoch"], info["step_in_epoch"]

    # -- the loop

    def run(self, folder: RunFolder, quiet: bool) -> bool:
        """Train to the last epoch. False if the user interrupted; the checkpoint then holds the last step."""
        c, order_rng = self.config, self.rng.site("order")
        total = c.epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch + self.step_in_epoch
        progress = tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True, smoothing=0.05)
        # losses and parameters are looked at explicitly; NumPy's own warnings would only blur the message
        with progress, Interrupt() as interrupt, np.errstate(all="ignore"):
            if not done:
                folder.save(*self.state())
            while self.epoch < c.epochs:
                order = self.backend.to_device(order_rng.at(self.epoch).permutation(len(self.train)))
                start, first = time.perf_counter(), self.step_in_epoch
                while self.step_in_epoch < self.steps_per_epoch:
                    at = self.step_in_epoch * c.batch
                    self.step(order[at : at + c.batch])
                    progress.update()
                    if self.step_in_epoch % CHECK_EVERY == 0:
                        self.check_losses()
                    if interrupt.requested:
                        folder.save(*self.state())
                        return False
                line = self.finish_epoch(len(self.train) - first * c.batch, start)
                text = folder.log(line)
                folder.save(*self.state())
                if not quiet:
                    progress.write(text)
                    progress.set_postfix_str(f"test -ELBO {line['test']:.2f}")
                if interrupt.requested:
                    return self.epoch == c.epochs
        return True

    def finish_epoch(self, images_seen: int, start: float) -> dict:
        """The metrics of the epoch that has just ended; the next one begins."""
        reconstruction, kl = self.check_losses().sum(axis=0) / len(self.train)
        self.backend.synchronize()
        rate = images_seen / max(time.perf_counter() - start, 1e-9)
        line = {"epoch": self.epoch + 1}
        if self.estimator.support == "soft" or self.estimator.multi_sample:  # another objective than −ELBO was trained
            line["train_relaxed" if self.estimator.support == "soft" else "train_bound"] = reconstruction + kl
            reconstruction, kl = self.evaluate(self.train, self.rng.site("train, hard").at(self.epoch + 1))
        line |= {"train": reconstruction + kl, "train_reconstruction": reconstruction, "train_kl": kl}
        test_reconstruction, test_kl = self.evaluate(self.test, self.rng.site("test").at(self.epoch + 1))
        line["test"] = test_reconstruction + test_kl
        line |= {"test_reconstruction": test_reconstruction, "test_kl": test_kl, "images_per_second": round(rate, 1)}
        if not all(map(math.isfinite, line.values())):
            self.fail("the evaluation became infinite or NaN", self.step_in_epoch)
        self.epoch, self.step_in_epoch, self.losses = self.epoch + 1, 0, []
        return {k: float(v) if k != "epoch" else v for k, v in line.items()}

    def draw(self, folder: RunFolder) -> None:
        """The curve of −ELBO, a page of reconstructions, a page of samples from the prior."""
        to_host, rng = self.backend.to_host, self.rng.site("pictures")
        curves(folder.path / "curve.png", folder.metrics(), f"{self.config.estimator} on {self.config.data}")
        x = self.test[:50]
        reconstructed = self.model.reconstruct(x, rng, self.estimator.sharpness)
        pairs = np.stack([to_host(x), to_host(reconstructed)], axis=1).reshape(-1, x.shape[1])
        page(
            folder.path / "reconstructions.png",
            pairs,
            self.images.shape,
            "test images, each left of its reconstruction",
        )
        samples = to_host(self.model.sample(100, rng.site("prior")))
        page(folder.path / "samples.png", samples, self.images.shape, "samples from the prior")


@report_errors
def main(argv=None) -> int:
    extra = (
        ("--out", {"help": "the run folder to make (default: a new one below runs/)"}),
        ("--resume", {"help": "a run folder to go on with; only --epochs, --data-dir and --bound-samples may change"}),
        ("--quiet", {"action": "store_true", "default": False, "help": "print nothing but the last line"}),
    )
    given, other = parse_flags(Config, __doc__.split("\n\n")[0], argv, extra)
    quiet = other["quiet"]
    if "resume" in other:
        require("out" not in other, "--out and --resume exclude each other: a resumed run stays in its folder.")
        may_change = {"epochs", "data_dir", "bound_samples"}
        with user_errors():
            folder, config = RunFolder.resume(other["resume"], Config, given, may_change)
        training = Training(config)
        with user_errors():
            arrays, info = folder.load()
            try:
                training.restore(arrays, info)
            except KeyError as error:
                raise ValueError(f"{folder.path} has a checkpoint of another program ({error} is missing).") from error
            require(
                training.epoch <= config.epochs,
                f"{folder.path} is at epoch {training.epoch}: --epochs must not be less.",
            )
            saved = info["config"] | {"hidden": tuple(info["config"]["hidden"])}
            changed = [k for k, v in dataclasses.asdict(config).items() if v != saved[k] and k not in may_change]
            require(
                not changed, f"{folder.path} has a checkpoint of another configuration ({', '.join(changed)} differ)."
            )
            folder.rewind_metrics(info)
            folder.write_config(config, training.backend)  # --epochs may have changed
    else:
        config = dataclasses.replace(Config(), **given)
        training = Training(config)
        path = other.get("out") or default_folder(config.data, config.estimator.replace(":", "-"), f"s{config.seed}")
        with user_errors():
            folder = RunFolder.create(path, config, training.backend)
    if not quiet:
        print(f"run folder {folder.path}", file=sys.stderr)

    with user_errors():
        finished = training.run(folder, quiet)
    if not finished:
        at = f"epoch {training.epoch + 1}, step {training.step_in_epoch}"
        print(
            f"stopped at {at}; go on with: python {sys.argv[0]} --resume {shlex.quote(str(folder.path))}",
            file=sys.stderr,
        )
        return 130
    with user_errors():
        training.draw(folder)
        if not quiet:
            print(f"metrics, pictures and checkpoint are in {folder.path}", file=sys.stderr)
        if config.bound_samples:
            bound = training.importance_bound()
            text = folder.log({"epoch": training.epoch, "test_bound": bound, "bound_samples": config.bound_samples})
            if not quiet:
                print(text)
    last = [line for line in folder.metrics() if "train" in line][-1]
    print(f"final train -ELBO {last['train']:.4f} test -ELBO {last['test']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One network, every normalization: change one word, train again, compare.

A small convolutional network and an MLP learn scikit-learn's handwritten digits (8x8 pixels) in
plain array code, on NumPy or, with `--device gpu`, on CuPy. From run to run only the `method` given
to `normkit.layers.create` changes; the initial weights and the order of the samples stay the same.

    python swap_norms.py                                  # everything, in about a minute
    python swap_norms.py --model cnn --norm batch group   # one network, two norms
    python swap_norms.py --model mlp --batch-size 4       # hard on batch statistics
    python swap_norms.py --model mlp --batch-size 128     # hence a high learning rate

Needs scikit-learn, matplotlib and rich.
"""

import argparse
import contextlib
import importlib
import itertools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import rich
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits

import normkit as nk

NORMS = {  # and their lines in the plot, in colours that the colour-blind can tell apart
    "none": ("black", ":"),
    "batch": ("#0072b2", "-"),
    "batch_renorm": ("#56b4e9", "--"),
    "layer": ("#d55e00", "-"),
    "instance": ("#cc79a7", "-"),
    "group": ("#009e73", "-"),
    "rms": ("#e69f00", "--"),
}
LEARNING_RATE, MOMENTUM = 0.005, 0.9  # the rate is per sample of a batch
TEST_EVERY = 10  # steps
GOAL = 0.05  # test error


# --- Layers: forward(x, step) -> y, pullback; pullback(dy) -> dx and a gradient per parameter -----


class Layer(NamedTuple):
    """A differentiable function and its parameters. `step` is None at inference."""

    forward: Callable
    params: tuple = ()


def linear(w):
    def forward(x, step):
        return x @ w, lambda dy: (dy @ w.T, x.T @ dy)

    return Layer(forward, (w,))


def bias(b):
    def forward(x, step):
        spatial = tuple(range(2, x.ndim))
        return x + b.reshape(-1, *(1 for _ in spatial)), lambda dy: (dy, dy.sum((0, *spatial)))

    return Layer(forward, (b,))


def relu():
    def forward(x, step):
        positive = x > 0
        return x * positive, lambda dy: (dy * positive,)

    return Layer(forward)


def flatten():
    return Layer(lambda x, step: (x.reshape(len(x), -1), lambda dy: (dy.reshape(x.shape),)))


def mean_pool(xp):
    def forward(x, step):
        share = 1 / math.prod(x.shape[2:])
        return x.mean((2, 3)), lambda dy: (xp.broadcast_to(share * dy[..., None, None], x.shape),)

    return Layer(forward)


def conv3x3(xp, w, stride=1):
    """Convolve NCHW images with w, of shape (9 * channels in, channels out), as a matrix product.

    The product has its channels last, and a transposed view of it goes on: the norms take any
    strides, so nothing is ever copied into NCHW order.
    """

    def forward(x, step):
        height, width = x.shape[2:]
        padded = xp.pad(xp.moveaxis(x, 1, -1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [
            np.s_[:, i : i + height : stride, j : j + width : stride] for i, j in np.ndindex(3, 3)
        ]
        patches = xp.stack([padded[window] for window in windows], axis=3)
        columns = patches.reshape(-1, len(w))
        y = (columns @ w).reshape(*patches.shape[:3], -1)

        def pullback(dy):
            dy = xp.moveaxis(dy, 1, -1).reshape(len(columns), -1)
            dpatches = (dy @ w.T).reshape(patches.shape)
            dpadded = xp.zeros_like(padded)
            for k, window in enumerate(windows):
                dpadded[window] += dpatches[:, :, :, k]
            return xp.moveaxis(dpadded[:, 1:-1, 1:-1], -1, 1), columns.T @ dy

        return xp.moveaxis(y, -1, 1), pullback

    return Layer(forward, (w,))


def norm(xp, method, channels, steps, clock):
    """The layer this file is about: `method` is the one word that changes."""
    if method == "none":
        return bias(xp.zeros(channels, "float32"))
    # the paper's schedule, for fewer steps than its 50 000
    schedule = nk.RenormSchedule(steps // 10, r_steps=steps * 4 // 5, d_steps=steps // 2)
    layer = nk.layers.create(method, channels, num_groups=8, momentum=0.1, schedule=schedule, xp=xp)

    def forward(x, step):
        if step is None:
            return layer.eval()(x), None
        with clock:
            y, pullback = layer.train().vjp(x)
        return y, clock(pullback)

    return Layer(forward, (layer.gamma, layer.beta))


# --- Networks: no bias before a norm, which brings its own beta -----------------------------------


def mlp(xp, weight, norm):
    return [
        flatten(),
        *(linear(weight(64, 128)), norm(128), relu()),
        *(linear(weight(128, 128)), norm(128), relu()),
        *(linear(weight(128, 10)), bias(xp.zeros(10, "float32"))),
    ]


def cnn(xp, weight, norm):
    return [
        *(conv3x3(xp, weight(9 * 1, 16)), norm(16), relu()),
        *(conv3x3(xp, weight(9 * 16, 32), stride=2), norm(32), relu()),
        mean_pool(xp),
        *(linear(weight(32, 10)), bias(xp.zeros(10, "float32"))),
    ]


MODELS = {"mlp": mlp, "cnn": cnn}


def run(network, x, step=None):
    """Give the network's output, and the function from its gradient to those of all parameters."""
    pullbacks = []
    for layer in network:
        x, pullback = layer.forward(x, step)
        pullbacks.append(pullback)

    def gradients(dy):
        grads = []
        for pullback in reversed(pullbacks):
            dy, *dparams = pullback(dy)
            grads[:0] = dparams
        return grads

    return x, gradients


# --- Training -------------------------------------------------------------------------------------


class Clock(contextlib.ContextDecorator):
    """Adds up the seconds spent inside `with clock:` and in calls of `clock(function)`."""

    def __init__(self, xp):
        self.seconds = 0.0
        self.xp = xp

    def wait(self):
        if hasattr(self.xp, "cuda"):
            self.xp.cuda.get_current_stream().synchronize()

    def __enter__(self):
        self.wait()
        self.start = time.perf_counter()

    def __exit__(self, *exception):
        self.wait()
        self.seconds += time.perf_counter() - self.start


class Result(NamedTuple):
    curve: list[tuple[int, float]]  # (step, test error)
    ms_per_step: float
    share_in_norm: float

    @property
    def test_error(self):
        return self.curve[-1][1]

    @property
    def steps_to_goal(self):
        return next((step for step, error in self.curve if error <= GOAL), None)


def digits(xp, rng):
    """Load images (n, 1, 8, 8) in [-1, 1] and labels: three quarters to learn from, one to test."""
    x, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x = xp.asarray(x[order].reshape(-1, 1, 8, 8) / 8 - 1, "float32")
    labels = xp.asarray(labels[order])
    split = 3 * len(x) // 4
    return x[:split], labels[:split], x[split:], labels[split:]


def train(xp, model, method, epochs, batch_size, seed):
    rng = np.random.default_rng(seed)
    x, labels, x_test, labels_test = digits(xp, rng)
    targets = xp.eye(10, dtype="float32")[labels]
    batches_per_epoch = len(x) // batch_size
    steps = epochs * batches_per_epoch
    step_clock, norm_clock = Clock(xp), Clock(xp)

    def weight(n_in, n_out):  # He et al., 2015
        return xp.asarray(rng.normal(0, math.sqrt(2 / n_in), (n_in, n_out)), "float32")

    network = MODELS[model](xp, weight, lambda n: norm(xp, method, n, steps, norm_clock))
    params = [param for layer in network for param in layer.params]
    velocities = [xp.zeros_like(param) for param in params]

    def batches():
        for _ in range(epochs):
            order = xp.asarray(rng.permutation(len(x)))
            yield from order[: batches_per_epoch * batch_size].reshape(-1, batch_size)

    def update(batch, step):
        scores, gradients = run(network, x[batch], step)
        exp = xp.exp(scores - scores.max(1, keepdims=True))
        softmax = exp / exp.sum(1, keepdims=True)
        grads = gradients(softmax - targets[batch])  # of the cross-entropy, summed over the batch
        rate = LEARNING_RATE * (1 - step / steps)
        for param, velocity, grad in zip(params, velocities, grads, strict=True):
            velocity *= MOMENTUM
            velocity -= rate * grad
            param += velocity

    def test_error():
        scores, _ = run(network, x_test)
        return float((scores.argmax(1) != labels_test).mean())

    curve = []
    quiet = not rich.get_console().is_terminal
    progress = track(batches(), f"{model} {method}", steps, transient=True, disable=quiet)
    for step, batch in enumerate(progress):
        if step % TEST_EVERY == 0:
            curve.append((step, test_error()))
        if step == steps // 2:  # all kernels are compiled, batch renorm's for later steps too
            step_clock.seconds = norm_clock.seconds = 0.0
        with step_clock:
            update(batch, step)
    curve.append((steps, test_error()))
    ms_per_step = 1e3 * step_clock.seconds / (steps - steps // 2)
    return Result(curve, ms_per_step, norm_clock.seconds / step_clock.seconds)


# --- Report: of {(model, method): Result, or None where the two do not go together} ---------------


def tabulate(results):
    table = Table("model", "norm", title="Handwritten digits: one network, one word changed")
    for heading in ("test error", f"steps to {1 - GOAL:.0%}", "ms per step", "time in norm"):
        table.add_column(heading, justify="right")
    for names, result in results.items():
        if result:
            goal = str(result.steps_to_goal or "-")
            ms, share = f"{result.ms_per_step:.2f}", f"{result.share_in_norm:.0%}"
            table.add_row(*names, f"{result.test_error:.1%}", goal, ms, share)
        else:
            table.add_row(*names, *["n/a"] * 4)
            table.caption = "n/a: an MLP has no pixels, so instance norm has one element per group"
    return table


def smooth(values):
    size = min(5, len(values) // 2)
    return np.convolve(values, np.full(size, 1 / size), "valid")


def plot(results, path):
    models = list(dict.fromkeys(model for (model, _), result in results.items() if result))
    figure = Figure((5 * len(models), 4), layout="constrained")
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for model, panel in zip(models, axes, strict=True):
        for method, (color, style) in NORMS.items():
            if result := results.get((model, method)):
                steps, errors = map(smooth, np.transpose(result.curve))
                panel.plot(steps, 100 * errors, style, color=color, label=method)
        panel.set(title=model, xlabel="training step", yscale="log")
        panel.yaxis.set_major_formatter("{x:g} %")
        panel.grid(alpha=0.3)
        panel.legend()
    axes[0].set_ylabel("test error")
    figure.savefig(path, dpi=150)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--norm", nargs="+", choices=["all", *NORMS], default=["all"])
    parser.add_argument("--model", choices=["both", *MODELS], default="both")
    parser.add_argument("--epochs", type=int, help="15, or 2 with --quick")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few seconds in all")
    parser.add_argument("--plot", metavar="FILE.png", default="swap_norms.png")
    args = parser.parse_args()
    if args.epochs is None:
        args.epochs = 2 if args.quick else 15
    if args.epochs < 1 or not 2 <= args.batch_size <= 256:
        parser.error("--epochs must be at least 1 and --batch-size from 2 to 256")
    return args


def main():
    args = parse_arguments()
    xp = importlib.import_module("cupy" if args.device == "gpu" else "numpy")
    models = MODELS if args.model == "both" else [args.model]
    methods = NORMS if "all" in args.norm else args.norm
    results = {}
    for model, method in itertools.product(models, methods):
        result = None
        if (model, method) != ("mlp", "instance"):
            result = train(xp, model, method, args.epochs, args.batch_size, args.seed)
            rich.print(f"{model} {method}: {result.test_error:.1%} test error")
        results[model, method] = result
    rich.print(tabulate(results))
    if any(results.values()):
        plot(results, args.plot)
        print(f"learning curves: {args.plot}")


if __name__ == "__main__":
    main()

"""The ideas of normkit in six small steps, each printed, explained and checked.

    python first_steps.py                 # NumPy
    python first_steps.py --device gpu    # the same lines on CuPy

The last lines of each step are assertions: what it says holds, or it stops.
"""

import argparse
import importlib

import normkit as nk

parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
xp = importlib.import_module("cupy" if parser.parse_args().device == "gpu" else "numpy")
assert_allclose = importlib.import_module(f"{xp.__name__}.testing").assert_allclose


print("""
1. Normalize a batch
--------------------
Four samples of one feature, so a column: axis 0 is the batch. Their mean is 4, their variance 5.
Batch norm centres them, divides by sqrt(variance + eps), then multiplies by gamma and adds beta.
""")
x = xp.asarray([1.0, 3.0, 5.0, 7.0])[:, None]
gamma, beta = xp.asarray([2.0]), xp.asarray([1.0])
y = nk.batch_norm(x, gamma, beta, eps=0.001)
print("x =", x.ravel(), "   y =", y.ravel().round(2))
assert_allclose(y.ravel(), [-1.68, 0.11, 1.89, 3.68], atol=0.005)


print("""
2. gamma and beta can undo it
-----------------------------
With gamma = sqrt(variance + eps) and beta = mean the input comes back: a network that is better
off without the normalization can learn to switch it off.
""")
y = nk.batch_norm(x, xp.sqrt(x.var(0) + 0.001), x.mean(0), eps=0.001)
print("y =", y.ravel())
assert_allclose(y, x)


print("""
3. Training and inference
-------------------------
A single sample has no batch to take statistics from. So training keeps running ones, updated in
place, in which `momentum` is the weight of the new value; inference uses them and nothing else.
""")
rng = xp.random.default_rng(0)
running = {"running_mean": xp.zeros(3), "running_var": xp.ones(3)}
for _ in range(200):
    batch = 10 + 2 * rng.standard_normal((64, 3))
    before = running["running_mean"].copy()
    nk.batch_norm(batch, **running, momentum=0.1)
assert_allclose(running["running_mean"], 0.9 * before + 0.1 * batch.mean(0))
print("the data's mean is 10:     running_mean =", running["running_mean"].round(2))
print("and their variance is 4:   running_var  =", running["running_var"].round(2))

y = nk.batch_norm(xp.full((1, 3), 14.0), **running, training=False)
print("14 is two sigma above:     y =", y.ravel().round(2))
assert_allclose(y, xp.full((1, 3), 2.0), atol=0.3)


print("""
4. Any layout
-------------
Images are NCHW: batch, channel, height, width. Data that lie in memory with the channels last go
in as a transposed view, and come out as one: the same numbers and strides, no transposing copy.
""")
nhwc = rng.standard_normal((8, 5, 5, 16))
view = xp.moveaxis(nhwc, -1, 1)
y = nk.group_norm(view, num_groups=4)
print("shape", view.shape, "  strides in", view.strides, "  strides out", y.strides)
assert y.strides == view.strides
assert_allclose(y, nk.group_norm(xp.ascontiguousarray(view), num_groups=4), atol=1e-12)
assert_allclose(xp.moveaxis(y, 1, -1), nk.group_norm(nhwc, num_groups=4, channel_axis=-1))


print("""
5. One word swaps the norm
--------------------------
The norms differ in what they average over. `normalize` reads them all per channel and ignores the
options that a method has no use for. Below, the means over each set that should now be centred.
""")
images = 3 + rng.standard_normal((8, 16, 5, 5))
for method, axes in {
    "batch": (0, 2, 3),
    "layer": (1, 2, 3),
    "instance": (2, 3),
    "group": (2, 3, 4),
    "rms": (1, 2, 3),
}.items():
    y = nk.normalize(images, method, num_groups=4)
    sets = y.reshape(8, 4, 4, 5, 5) if method == "group" else y
    mean, square = abs(sets.mean(axes)).max(), (sets**2).mean(axes)
    print(f"{method:9} {square.size:3} sets   largest |mean| {float(mean):.2f}   mean square 1")
    assert (mean > 0.5) if method == "rms" else (mean < 1e-12)  # only RMS norm does not centre
    assert_allclose(square, xp.ones_like(square), rtol=1e-4)


print("""
6. Differentiate
----------------
`vjp` gives the result and a pullback, from the gradient of y to those of x, gamma and beta. Of the
loss sum(y * w) the gradient with respect to y is w. One entry of x, moved a little, confirms it.
""")
x = rng.standard_normal((4, 3))
w = rng.standard_normal((4, 3))
gamma, beta = xp.ones(3), xp.zeros(3)
y, pullback = nk.vjp(nk.layer_norm, x, gamma, beta)
dx, dgamma, dbeta = pullback(w)

step = xp.zeros((4, 3))
step[1, 2] = 1e-5
rise = ((nk.layer_norm(x + step) - nk.layer_norm(x - step)) * w).sum() / 2e-5
print(f"pullback {float(dx[1, 2]):.8f}   finite difference {float(rise):.8f}")
assert_allclose(dx[1, 2], rise, rtol=1e-6)
assert_allclose(dgamma, (w * y).sum(0))
assert_allclose(dbeta, w.sum(0))

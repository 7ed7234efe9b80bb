"""Results that other libraries or exact arithmetic computed, and how normkit's are judged by them.

The cases are those of ``golden.npz`` beside this file, or, where the environment variable
``NORMKIT_ORACLES`` names a folder, of every ``.npz`` file in it: same format, some 2,300 cases.
``python -m tests.oracles`` counts how often normkit and PyTorch give it exactly, rounded once.

A case's ``inputs`` and ``outputs`` are named x, dy, weight, bias, running_mean ... ; outputs are
exact to about float64, statistics as they are AFTER the call. ``tolerances`` hold two levels per
output: "pass" is careful float32 accumulation, "goal" the exact result rounded once, give or take
one unit in the last place.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # also makes np.dtype("bfloat16") known
import numpy as np

FOLDER = os.environ.get("NORMKIT_ORACLES")
GOLDEN = Path(__file__).with_name("golden.npz")
NORMS = "batch_norm", "batch_renorm", "layer_norm", "instance_norm", "group_norm", "rms_norm"
Arrays = dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    name: str
    source: str
    op: str
    dtype: str
    params: dict[str, Any]
    tags: list[str]
    inputs: Arrays
    outputs: Arrays
    native_outputs: Arrays  # what the source returned in `dtype`; absent where equal to outputs
    layout: dict[str, dict[str, Any]]
    tolerances: dict[str, dict[str, Any]]
    raises: dict[str, str] | None
    sequence: dict[str, Any] | None
    call: str

    def __repr__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        recipe = self.params.get("generate", {}).get("x")
        return tuple(recipe["shape"] if recipe else self.inputs["x"].shape)

    @property
    def training(self) -> bool:
        return self.params.get("training", self.params.get("use_input_stats", True))


# Reading


def load() -> list[Case]:
    paths = sorted(Path(FOLDER).glob("*.npz")) if FOLDER else [GOLDEN]
    return [case for path in paths for case in read(path)]


def read(path: Path) -> Iterator[Case]:
    with np.load(path) as archive:
        stored = {name: archive[name] for name in archive.files}

    def array(code: str, start: int, shape: list[int], dtype: str | None = None) -> np.ndarray:
        values = stored[f"buf_{code}"][start : start + math.prod(shape)].reshape(shape)
        return values if dtype is None else values.astype(dtype)

    for entry in json.loads(stored["index"].tobytes()):
        for field in "inputs", "outputs", "native_outputs":
            entry[field] = {name: array(*where) for name, where in entry[field].items()}
        yield Case(**entry)


def arrays(case: Case) -> Arrays:
    """The inputs, new at every call, in their own dtype and strides.

    The gaps of a strided array hold NaN, so that a kernel which ignores strides is found out.
    """
    made = {}
    recipes = case.params.get("generate", {})
    for name, values in (case.inputs | recipes).items():
        if name == "idx":
            continue
        made[name] = a = (
            generate(values) if name in recipes else np.array(values, dtype_of(case, name))
        )
        if a.size and (layout := case.layout.get(name)):
            buffer = np.full(layout["size"], np.nan, a.dtype)
            strides = [stride * a.itemsize for stride in layout["strides"]]
            made[name] = np.lib.stride_tricks.as_strided(buffer, a.shape, strides)
            made[name][...] = a
    return made


def dtype_of(case: Case, name: str) -> np.dtype:
    is_data = name in ("x", "dy")
    return np.dtype(case.dtype if is_data else case.params.get("param_dtype", case.dtype))


def generate(recipe: dict[str, Any]) -> np.ndarray:
    """An input too large to be stored."""
    size, dtype = math.prod(recipe["shape"]), np.dtype(recipe["dtype"])
    if recipe["kind"] == "uniform":
        unit = (splitmix64(size, recipe["seed"]) >> np.uint64(40)) * 2.0**-24
        a = recipe["loc"] + recipe["scale"] * 3.4641016151377544 * (unit - 0.5)
        if dtype == "bfloat16":
            a = a.astype(np.float32)  # the recipe rounds twice
        a = a.astype(dtype)
    else:  # the flat index modulo m, then single elements set
        assert recipe["kind"] == "mod"
        a = np.tile(np.arange(recipe["m"]).astype(dtype), size // recipe["m"] + 1)[:size]
        for index, value in recipe["spikes"]:
            a[index] = value
    return a.reshape(recipe["shape"])


def splitmix64(size: int, seed: int) -> np.ndarray:
    """Vigna's SplitMix64 as a hash of 0 ... size - 1."""
    offset = seed * 0x632BE59BD9B4E019 % 2**64
    z = (np.arange(size, dtype=np.uint64) + np.uint64(offset)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


# Calling normkit


def call(case: Case, inputs: Arrays) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The case in normkit's words: (name of the norm, positional arguments, options)."""
    params = case.params
    options = {"eps": params["eps"]}
    if "num_groups" in params:
        options["num_groups"] = params["num_groups"]
    if case.op in ("layer_norm", "rms_norm"):
        trailing = range(-len(params["normalized_shape"]), 0)
        options["axis"] = tuple(params.get("axes", trailing))
    else:
        axis = params.get("axis", 1)
        options["channel_axis"] = tuple(axis) if isinstance(axis, list) else axis
    if case.op in ("batch_norm", "instance_norm", "batch_renorm"):
        options["training"] = case.training
        if params["momentum"] is not None:
            options["momentum"] = params["momentum"]
        options |= running_statistics(case, inputs)
    if case.op == "batch_renorm":
        for limit in "r_max", "d_max":
            options[limit] = math.inf if params[limit] is None else params[limit]
        if params["variant"] == "std" and case.training:
            options["momentum"] = params["renorm_momentum"]
    return case.op, (inputs["x"], inputs.get("weight"), inputs.get("bias")), options


def running_statistics(case: Case, inputs: Arrays) -> Arrays:
    """The running statistics as options; Keras keeps a second pair, to train with batch renorm."""
    kind = "renorm" if case.params.get("variant") == "std" and case.training else "running"
    statistics = {
        name.replace("renorm", "running"): values if values.dtype.itemsize > 2 else widened(values)
        for name, values in inputs.items()
        if name.startswith(kind)
    }
    if case.op == "batch_renorm" and kind == "running":  # only float64 holds this root well enough
        variance = inputs["running_var"].astype(np.float64)
        statistics.pop("running_var")
        statistics["running_std"] = (variance + case.params["eps"]) ** 0.5
    return statistics


def widened(half: Any) -> Any:
    """Running statistics in half precision: normkit takes float32, which holds them exactly."""
    return half.astype(np.float32)


def run(case: Case, nk: Any, make: Callable[[Case], Arrays] = arrays) -> Arrays:
    """What normkit returns, named as in ``case.outputs``; "vjp y" and the like are vjp's.

    ``make`` gives new inputs at each call: in another layout, on another device.
    """
    name, args, options = call(case, make(case))
    norm = getattr(nk, name)
    got = {"y": norm(*args, **options)} | updated(case, options)
    inputs = make(case)
    if "dy" in inputs:
        _, args, options = call(case, inputs)
        y, pullback = nk.vjp(norm, *args, **options)
        got["dx"], got["dweight"], got["dbias"] = pullback(inputs["dy"])
        got |= {f"vjp {k}": v for k, v in ({"y": y} | updated(case, options)).items()}
    return got


def updated(case: Case, options: dict[str, Any]) -> Arrays:
    statistics = {name: a for name, a in options.items() if name.startswith("running")}
    if case.params.get("variant") == "std" and case.training:
        return {name.replace("running", "renorm"): a for name, a in statistics.items()}
    return statistics


# Judging


def expected(case: Case) -> Arrays:
    """``case.outputs``; where the source put the biased variance into running_var, the unbiased."""
    want = dict(case.outputs)
    if case.training and case.params.get("running_var_ddof") == 0 and "running_var" in want:
        kept = (1 - case.params["momentum"]) * case.inputs["running_var"].astype(np.float64)
        m = math.prod(case.shape) // kept.size
        want["running_var"] = kept + (want["running_var"] - kept) * m / (m - 1)
    return want


def failures(case: Case, got: Arrays, level: str = "pass") -> list[str]:
    """What is wrong with the results, a line each; outputs not in ``got`` are not judged."""
    want = expected(case)
    lines = []
    for name, result in got.items():
        output = name.removeprefix("vjp ")
        if output not in want:
            continue
        if result is None:
            lines.append(f"{case.name}: {name} is None")
            continue
        if case.params.get("sampled") and output in ("y", "dx"):
            result = result.reshape(-1)[case.inputs["idx"]]
        if wrong := mismatch(result, want[output], case.tolerances[output], level):
            lines.append(f"{case.name}: {name}: {wrong}")
    return lines


def mismatch(got: Any, want: np.ndarray, tolerance: dict[str, Any], level: str = "pass") -> str:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        return f"shape {got.shape} for {want.shape}"
    prefix = "" if level == "pass" else "goal_"
    rtol, atol = tolerance[prefix + "rtol"], tolerance[prefix + "atol"]
    largest = float(ml_dtypes.finfo(tolerance["dtype"]).max)
    with np.errstate(all="ignore"):
        rounded = want.astype(tolerance["dtype"]).astype(np.float64)
        error = np.abs(got - want)
        good = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
        good |= np.isfinite(want) & (error <= atol + rtol * np.abs(want))
        # a hair below the overflow threshold, infinity is as good
        good |= (got == np.copysign(np.inf, want)) & (np.abs(want) * (1 + rtol) >= largest)
    if good.all():
        return ""
    at = tuple(map(int, np.argwhere(~good)[0]))
    return (
        f"{np.sum(~good)} of {good.size} differ, first at {at}: {got[at]!r} for {want[at]!r}, "
        f"largest error {np.max(error[~good]):.3g} (rtol {rtol:.2g}, atol {atol:.2g})"
    )


# Cases that say nothing about normkit

SKIPS: dict[str, Callable[[Case], bool]] = {
    "normkit has no such norm": lambda c: c.op not in NORMS,
    "the arguments of a module's constructor": lambda c: "module_ctor" in c.tags,
    "normkit takes axes, not a shape to compare with": lambda c: "ln_leading" in c.name,
    "one value per channel gives beta, not an error": lambda c: (
        bool(c.raises) and c.raises["message"].startswith("Expected more than 1")
    ),
    "one value per channel updates no running_var, by ValueError": lambda c: (
        "one_value_per_channel" in c.tags and c.op == "batch_norm"
    ),
    "eps is negative": lambda c: "nonpositive_eps" in c.tags,
    "momentum is outside [0, 1]": lambda c: not 0 <= (c.params.get("momentum") or 0) <= 1,
    "batch norm of one axis is an error": lambda c: (
        c.op == "batch_norm" and not c.raises and len(c.shape) < 2
    ),
    "gamma and beta are per group": lambda c: c.params.get("affine_per") == "group",
    "a running std below sqrt(eps) is raised to it": lambda c: "std_floor" in c.tags,
    "r is clipped to other than [1/r_max, r_max]": lambda c: (
        c.training
        and c.params.get("r_max") is not None
        and not math.isclose(c.params["r_min"] * c.params["r_max"], 1)
    ),
}


def skip_reason(case: Case) -> str | None:
    return next((reason for reason, applies in SKIPS.items() if applies(case)), None)


# How often the exact result, rounded once, is reached

KINDS = {"y": ["y"], "dx": ["dx"], "params": ["dweight", "dbias"]}


def reaches_goal(case: Case, got: Arrays, kind: str) -> bool:
    return not failures(case, {name: got[name] for name in KINDS[kind] if name in got}, "goal")


def main() -> None:
    import normkit

    counts: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for case in load():
        # PyTorch's float64 is the oracle of its own cases
        own = case.dtype == "float64" and case.source.startswith("torch")
        if "torch" not in case.call or case.raises or own or skip_reason(case):
            continue
        if "huge_index" in case.tags:
            continue
        ours, theirs = run(case, normkit), case.outputs | case.native_outputs
        for kind, names in KINDS.items():
            if case.outputs.keys() & names:
                pair = reaches_goal(case, ours, kind), reaches_goal(case, theirs, kind)
                counts.setdefault((case.dtype, kind), []).append(pair)
    print("Share of cases that hold the exact result, rounded once, give or take one ulp\n")
    print(f"{'dtype':10}{'output':8}{'cases':>6}{'normkit':>10}{'PyTorch':>10}")
    for (dtype, kind), pairs in sorted(counts.items()):
        ours, theirs = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        print(f"{dtype:10}{kind:8}{len(pairs):6}{ours:10.1%}{theirs:10.1%}")


if __name__ == "__main__":
    main()

"""normkit against ONNX's own backend tests of the five normalization operators that it has too."""

import importlib
import pkgutil
from typing import Any

import numpy as np
import pytest

import normkit as nk

onnx = pytest.importorskip("onnx", reason="ONNX's backend tests come with the package onnx")
node_tests = importlib.import_module("onnx.backend.test.case.node")

NORMS = {
    "BatchNormalization": nk.batch_norm,
    "GroupNormalization": nk.group_norm,
    "InstanceNormalization": nk.instance_norm,
    "LayerNormalization": nk.layer_norm,
    "RMSNormalization": nk.rms_norm,
}


def collect() -> list[Any]:
    # to import a module is to make its tests: these five alone, as all take 10 s
    for module in pkgutil.iter_modules(node_tests.__path__):
        if module.name.replace("_", "") in [name.lower() for name in NORMS]:
            importlib.import_module(f"{node_tests.__name__}.{module.name}")
    return [
        pytest.param(test, id=test.name)
        for test in node_tests._NodeTestCases
        if [node.op_type for node in test.model.graph.node] in [[name] for name in NORMS]
    ]


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def run(node: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The node by normkit: y and, in training, the running statistics."""
    norm, given = NORMS[node.op_type], attributes(node)
    x, gamma, *rest = inputs
    beta = rest[0] if rest else None
    options: dict[str, Any] = {"eps": given.get("epsilon", 1e-5)}
    if "num_groups" in given:
        options["num_groups"] = given["num_groups"]
    if norm in (nk.layer_norm, nk.rms_norm):
        first = given.get("axis", -1)
        options["axis"] = tuple(range(first % x.ndim, x.ndim))
    if norm is not nk.batch_norm:
        return [norm(x, gamma, beta, **options)]

    mean, var = (statistic.copy() for statistic in rest[1:])
    training = bool(given.get("training_mode", 0))
    momentum = 1 - given.get("momentum", 0.9)  # ONNX weights the old value
    options |= {"running_mean": mean, "running_var": var}
    y = norm(x, gamma, beta, training=training, momentum=momentum, **options)
    if not training:
        return [y]
    # ONNX averages the biased variance: m - 1 of m parts of what normkit has added
    m, kept = x.size // var.size, (1 - momentum) * rest[2]
    return [y, mean, kept + (var - kept) * (m - 1) / m]


@pytest.mark.parametrize("test", collect())
def test_node(test: Any) -> None:
    (node,) = test.model.graph.node
    for inputs, outputs in test.data_sets:
        # of LayerNormalization's outputs normkit returns the first alone
        for got, want in zip(run(node, inputs), outputs, strict=False):
            assert got.dtype == want.dtype
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_every_operator_has_tests() -> None:
    tested = {param.values[0].model.graph.node[0].op_type for param in collect()}
    assert tested == set(NORMS)

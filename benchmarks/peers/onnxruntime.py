"""ONNX Runtime: inference by its own operators, on NCHW images and on rows."""

from __future__ import annotations

import os
from typing import Any

import onnxruntime
from onnx import TensorProto, helper

from benchmarks.cases import Array, Case
from benchmarks.peers import Contestant, Unsupported

OPERATORS = {
    "batch_norm": ("BatchNormalization", ("x", "gamma", "beta", "mean", "spread"), {}),
    "layer_norm": ("LayerNormalization", ("x", "gamma", "beta"), {"axis": -1}),
    "instance_norm": ("InstanceNormalization", ("x", "gamma", "beta"), {}),
    "group_norm": ("GroupNormalization", ("x", "gamma", "beta"), {}),
    "rms_norm": ("RMSNormalization", ("x", "gamma"), {"axis": -1}),
}
TYPES = {
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}


def _model(case: Case, given: dict[str, Array]) -> Any:
    operator, names, attributes = OPERATORS[case.norm]
    if case.norm == "group_norm":
        attributes = {"num_groups": case.groups}
    result = "scaled" if case.norm == "rms_norm" else "y"
    nodes = [helper.make_node(operator, names, [result], epsilon=1e-5, **attributes)]
    if case.norm == "rms_norm":
        nodes.append(helper.make_node("Add", ["scaled", "beta"], ["y"]))
        names = (*names, "beta")

    def value(name: str, like: Array) -> Any:
        return helper.make_tensor_value_info(name, TYPES[like.dtype.name], like.shape)

    graph = helper.make_graph(
        nodes, case.norm, [value(n, given[n]) for n in names], [value("y", given["x"])]
    )
    opsets = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), names


def contestant(case: Case, given: dict[str, Array]) -> Contestant:
    if case.direction != "inference":
        raise Unsupported("inference only")
    if case.norm not in OPERATORS or case.layout == "NHWC" or given["x"].ndim != len(case.layout):
        raise Unsupported("no such operator")
    if case.norm in ("layer_norm", "rms_norm") and case.layout != "NC":
        raise Unsupported("no such operator")
    model, names = _model(case, given)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.log_severity_level = 4  # what it lacks, it raises too
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers)
    make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    feed = {name: make(given[name], TYPES[given[name].dtype.name]) for name in names}
    return Contestant(
        lambda: session.run_with_ort_values(["y"], feed), lambda result: (result[0].numpy(),)
    )

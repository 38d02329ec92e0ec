"""Small judges of the published interfaces, for tests and for a first try: their scores say nothing of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kohaku_wrap.evaluation.judges import KINDS, OWN_FILE, WORST_TO_BEST, Kind
from kohaku_wrap.files import atomic_write, write_text
from kohaku_wrap.formats.toml_text import toml_text
from kohaku_wrap.streams import draws, stream_key

IR_VERSION, OPSET = 10, 17
FEATURES = 768
CELLS = 16
"""Of a picture, a side: what is seen of it are the means of these."""

THRESHOLD = 0.5
TITLE = "small {kind} judge, built for tests: its scores say nothing of pictures"


def build_small_judges(folder: Path, tags: Sequence[str]) -> list[Path]:
    """Write a small judge of each kind into folders of its name; `tags`: what the tagger knows."""
    made = []
    for name, kind in KINDS.items():
        out = folder / name
        out.mkdir(parents=True, exist_ok=True)
        labels = {"tagger": tuple(tags), "aesthetic": WORST_TO_BEST, "corruption": ("corrupted", "normal")}.get(
            name, ()
        )
        save(out / kind.files[0], build_looker(kind, len(labels)))
        if name == "ccip":
            save(out / "model_metrics.onnx", build_metric())
            write_text(out / "metrics.json", json.dumps({"threshold": THRESHOLD}) + "\n")
        elif name == "tagger":
            rows = [f"{number},{tag},0,1" for number, tag in enumerate(labels)]
            write_text(out / "selected_tags.csv", "\n".join(["tag_id,name,category,count", *rows]) + "\n")
        else:
            write_text(out / "meta.json", json.dumps({"labels": labels}) + "\n")
        write_text(out / OWN_FILE, toml_text({"kind": name, "title": TITLE.format(kind=name)}))
        made.append(out)
    return made


def draw_weights(kind: str, rows: int, columns: int) -> Any:
    """(rows, columns) float32 in -1 … 1, the same everywhere."""
    numbers = draws(stream_key("small-judge", kind), np.arange(rows * columns)) >> np.uint64(40)
    return (numbers.astype(np.float32) / np.float32(1 << 23) - np.float32(1)).reshape(rows, columns)


def build_looker(kind: Kind, labels: int) -> Any:
    """Means of the picture's cells, times fixed weights; for labels their shares."""
    side = kind.size
    shape = ["batch", 3, side, side] if kind.layout == "nchw" else ["batch", side, side, 3]
    outputs = labels or FEATURES
    scale = np.array([1 / 255], dtype=np.float32)
    weights = draw_weights(kind.name, 3 * CELLS * CELLS, outputs) / np.float32(CELLS)
    nodes = []
    if kind.layout == "nhwc":
        nodes.append(helper.make_node("Transpose", ["input"], ["planes"], perm=[0, 3, 1, 2]))
        nodes.append(helper.make_node("Mul", ["planes", "scale"], ["picture"]))
    else:
        nodes.append(helper.make_node("Identity", ["input"], ["picture"]))
    cell = side // CELLS
    nodes += [
        helper.make_node("AveragePool", ["picture"], ["means"], kernel_shape=[cell, cell], strides=[cell, cell]),
        helper.make_node("Flatten", ["means"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["sums"]),
    ]
    last = {"tagger": "Sigmoid", "ccip": "Identity"}.get(kind.name, "Softmax")
    nodes.append(helper.make_node(last, ["sums"], ["output"], **({"axis": 1} if last == "Softmax" else {})))
    graph = helper.make_graph(
        nodes,
        "small-judge",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(scale, "scale")],
    )
    return finish(graph)


def build_metric() -> Any:
    """Half of 1 less the cosine of each two features, between 0 and 1."""
    nodes = [
        helper.make_node("ReduceL2", ["input"], ["length"], axes=[1], keepdims=1),
        helper.make_node("Max", ["length", "least"], ["divisor"]),
        helper.make_node("Div", ["input", "divisor"], ["unit"]),
        helper.make_node("Transpose", ["unit"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["unit", "turned"], ["cosine"]),
        helper.make_node("Sub", ["one", "cosine"], ["apart"]),
        helper.make_node("Mul", ["apart", "half"], ["halved"]),
        helper.make_node("Clip", ["halved", "zero", "one"], ["output"]),
    ]
    numbers: dict[str, Any] = {"least": [1e-12], "half": [0.5], "one": 1.0, "zero": 0.0}
    graph = helper.make_graph(
        nodes,
        "small-metric",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "batch"])],
        [numpy_helper.from_array(np.array(value, dtype=np.float32), name) for name, value in numbers.items()],
    )
    return finish(graph)


def finish(graph: Any) -> Any:
    """The model of a graph, in a form that older readers take too."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="kwrap")
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return model


def save(path: Path, model: Any) -> None:
    """Write a model whole."""
    with atomic_write(path, "wb") as stream:
        stream.write(model.SerializeToString())

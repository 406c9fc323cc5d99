"""ONNX Runtime's and torch's products of int8, for `products.py`: a line "M K N" in, seconds out.

scripts/bench/peer peer_products.py
"""

# pyright: reportMissingImports=false

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

THREADS = 2


def main() -> None:
    torch.set_num_threads(THREADS)
    made: dict[str, dict[str, Callable[[], object]]] = {}
    for line in sys.stdin:
        if line not in made:
            made[line] = sides(*map(int, line.split()))
        print(json.dumps({name: seconds(call) for name, call in made[line].items()}), flush=True)


def sides(m: int, k: int, n: int) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((m, k), (k, n)))
    session, given = integers(w, m), {"x": (x.astype(np.int16) + 128).astype(np.uint8)}
    floats = [torch.from_numpy(a.astype(np.float32)) for a in (x, w)]
    return {
        "ONNX Runtime, uint8 × int8": lambda: session.run(None, given),
        "torch, float32": lambda: floats[0] @ floats[1],
    }


def integers(w: np.ndarray, m: int) -> onnxruntime.InferenceSession:
    """x · w with zero points of 128 and 0, as dynamic quantisation has it."""
    k, n = w.shape
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [m, n])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array(128, np.uint8), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def seconds(call: Callable[[], object], count: int = 6) -> float:
    """Of one call."""
    call()
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()

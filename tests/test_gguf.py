"""GGUF files: the model and the tokenizer they were written from, and nothing hostile believed."""

import dataclasses
import io
import json
import struct

import gguf
import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import decoders, models, pre_tokenizers, trainers

import fw
from fw import data, hub
from fw.errors import FwError
from fw.generation.text import _Text
from fw.gguf import open_gguf, parse
from fw.models.llama import LlamaConfig, hf_names, llama, speeds
from sharding import make_mesh, rules

NAMES = {"word": "token_embd", "norm": "output_norm", "head": "output"}
LAYER = {
    "attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "attention/query": "attn_q",
    "attention/key": "attn_k", "attention/value": "attn_v", "attention/out": "attn_output",
    "attention/query_norm": "attn_q_norm", "attention/key_norm": "attn_k_norm",
    "mlp/gate": "ffn_gate", "mlp/up": "ffn_up", "mlp/down": "ffn_down", "mlp": "ffn_gate_inp",
}  # fmt: skip
KINDS = {
    "llama": {"tie_word_embeddings": True},
    "llama-3": {"rope_type": "llama3", "rope_factor": 8.0, "rope_theta": 500_000.0,
                "original_max_position_embeddings": 8192},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3},
}  # fmt: skip
TYPE = gguf.GGMLQuantizationType


def make(kind):
    config = LlamaConfig(
        96, 64, 2, 4, 96, num_key_value_heads=2, max_position_embeddings=128, **KINDS[kind]
    )
    model, random = llama(config), np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(x + random.normal(0, 0.2, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    return hub.Loaded(model, variables, ())


def tokenizer():
    fast = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    fast.decoder = decoders.ByteLevel()
    words = ["the cat sat on the mat 12 times", "a cat and a hat", "the end of the tale"]
    trainer = trainers.BpeTrainer(
        vocab_size=60,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(set("".join(words).replace(" ", "Ġ"))),
    )
    fast.train_from_iterator(words, trainer)
    return fast


def add_tokenizer(out):
    fast = tokenizer()
    saved = json.loads(fast.to_str())["model"]
    vocabulary = sorted(saved["vocab"], key=saved["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(vocabulary)
    out.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in vocabulary])
    out.add_token_merges([" ".join(merge) for merge in saved["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_add_bos_token(False)
    out.add_chat_template("{{ messages[0]['content'] }}")


def write(path, loaded, quantised=TYPE.F32, scaling=None):
    """As llama.cpp's converter writes a Llama: pairs of a head side by side, and so on."""
    config = loaded.model.config
    name = "llama" if config.experts else config.model_type
    out = gguf.GGUFWriter(path, name)
    if config.experts:
        out.add_expert_count(config.experts.number)
        out.add_expert_used_count(config.experts.chosen)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.positions)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.key_heads)
    out.add_key_length(config.size)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_theta)
    add_tokenizer(out)
    if config.rope_type == "llama3":
        plain = dataclasses.replace(config, rope_type="default")
        out.add_tensor("rope_freqs.weight", (speeds(plain) / speeds(config)).astype(np.float32))

    def add(name, array):
        if array.ndim > 1 and quantised != TYPE.F32:
            packed = gguf.quantize(array, quantised)
            out.add_tensor(name, packed, raw_dtype=quantised)
        else:
            out.add_tensor(name, np.ascontiguousarray(array))

    stacks: dict[str, list[np.ndarray]] = {}
    for n in hf_names(config):
        array = np.asarray(dig(loaded.variables["params"], n.path))[n.index]
        array = array.T if n.transposed else array
        if ".experts." in n.tensor:
            part = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}[n.tensor.split(".")[-2]]
            stacks.setdefault(f"blk.{n.entry[0]}.{part}_exps.weight", []).append(array)
            continue
        own, leaf = n.path.rsplit("/", 1)
        kind = "bias" if leaf == "bias" else "weight"
        if own in NAMES:
            add(f"{NAMES[own]}.{kind}", array)
            continue
        part = own.removeprefix("stack/layers/")
        if name == "llama" and part in ("attention/query", "attention/key"):
            heads = config.num_attention_heads if part.endswith("query") else config.key_heads
            array = side_by_side(array, heads, config.size)
        add(f"blk.{n.entry[0]}.{LAYER[part]}.{kind}", array)
    for stacked, arrays in stacks.items():
        add(stacked, np.stack(arrays))
    if scaling:
        out.add_string(f"{name}.rope.scaling.type", scaling)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def side_by_side(array, heads, size):
    """Rows that rotary positions turn together, as neighbours."""
    halves = array.reshape(heads, 2, size // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def dig(tree, path):
    for part in path.split("/"):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_the_model_that_it_was_written_from(kind, tmp_path):
    made = make(kind)
    write(tmp_path / "m.gguf", made)
    for spec in ("data=1", "fsdp=2,tensor=2"):
        again = hub.load(tmp_path / "m.gguf", mesh=make_mesh(spec), rules=rules())
        assert (again.fresh, again.unused) == ((), ())
        jax.tree.map(np.testing.assert_array_equal, again.variables, made.variables)
    told, config = made.model.config, again.model.config
    for name in ("rms_norm_eps", "rope_theta", "rope_type", "rope_factor", "tie_word_embeddings",
                 "key_heads", "size", "positions", "qkv_bias", "head_norms", "experts",
                 "model_type"):  # fmt: skip
        assert getattr(config, name) == getattr(told, name), name


@pytest.mark.parametrize("kind", [TYPE.F16, TYPE.BF16, TYPE.Q8_0, TYPE.Q4_0, TYPE.Q4_1, TYPE.Q5_1])
def test_packed_numbers_are_read_row_by_row_as_whole(kind, tmp_path):
    made = make("qwen2")  # its queries are not reordered, so quantising commutes with writing
    write(tmp_path / "m.gguf", made, kind)
    again = hub.load(tmp_path, mesh=make_mesh("fsdp=2,tensor=2"), rules=rules())
    query = np.asarray(again.variables["params"]["stack"]["layers"]["attention"]["query"]["kernel"])
    plain = made.variables["params"]["stack"]["layers"]["attention"]["query"]["kernel"]
    for ours, whole in zip(query, plain, strict=True):
        expected = gguf.dequantize(gguf.quantize(np.ascontiguousarray(whole.T), kind), kind).T
        np.testing.assert_array_equal(ours, expected)
    assert np.abs(query - plain).max() < 0.2


def test_its_tokenizer_cuts_as_the_one_it_was_written_from(tmp_path):
    write(tmp_path / "m.gguf", make("llama"))
    found = data.load_tokenizer(tmp_path)
    for text in ("the cat sat on 12 mats", "  a  tale\n</s>the"):
        want = tokenizer()
        want.encode_special_tokens = True
        assert found.fast.encode(text).tokens == want.encode(text).tokens
    assert (found.end, found.prefix) == (1, ())
    assert data.Chat(found).render([{"role": "user", "content": "the cat"}]) == "the cat"
    loaded = fw.load(tmp_path / "m.gguf")
    fw.save(tmp_path / "saved", loaded)
    saved = data.load_tokenizer(tmp_path / "saved")
    assert saved.fast.encode("a cat").ids == found.fast.encode("a cat").ids
    assert saved.settings == found.settings
    jax.tree.map(np.testing.assert_array_equal, fw.load(tmp_path / "saved").variables,
                 loaded.variables)  # fmt: skip


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    """A SentencePiece tokenizer like that of Llama 2, by itself and from a GGUF file."""
    random = np.random.default_rng(0)
    roots = ["".join(random.choice(list("abcdeéo1"), 4)) for _ in range(40)]
    sentences = [" ".join(random.choice(roots, 12)) for _ in range(400)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=380, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>"], minloglevel=2,
    )  # fmt: skip
    theirs = SentencePieceProcessor(model_proto=model.getvalue())
    path = tmp_path_factory.mktemp("sentence_piece") / "m.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_tokenizer_model("llama")
    out.add_tokenizer_pre("default")
    ids = range(theirs.get_piece_size())
    out.add_token_list([theirs.id_to_piece(i) for i in ids])
    out.add_token_scores([theirs.get_score(i) for i in ids])
    out.add_token_types(
        [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i)
         else 4 if theirs.id_to_piece(i) == "<|user|>" else 1 for i in ids]
    )  # fmt: skip
    out.add_bos_token_id(theirs.bos_id())
    out.add_eos_token_id(theirs.eos_id())
    out.add_unk_token_id(theirs.unk_id())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return theirs, data.load_tokenizer(path)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("abcdeéo1  ▁zß\n字🙂"), min_size=1, max_size=40))
def test_sentence_piece_is_cut_and_spelled_as_by_itself(sentence_piece, text):
    theirs, ours = sentence_piece
    assert (ours.prefix, ours.suffix, ours.end) == ((theirs.bos_id(),), (), theirs.eos_id())
    ids = ours.fast.encode(text, add_special_tokens=False).ids
    assert ids == theirs.encode(text)
    assert ours.fast.decode(ids) == theirs.decode(ids)


def test_sentence_piece_text_goes_on_with_its_space(sentence_piece):
    _, tokenizer = sentence_piece
    whole = tokenizer.fast.encode("abcd eoab é🙂o 1", add_special_tokens=False).ids
    for cut in range(len(whole)):
        text = _Text(tokenizer, (), whole[:cut])
        for token in whole[cut:]:
            text.add(token)
        if not tokenizer.fast.decode(whole[:cut]).endswith("\ufffd"):
            assert tokenizer.fast.decode(whole[:cut]) + text.text == "abcd eoab é🙂o 1"


def test_damaged_headers_are_refused_or_harmless(tmp_path):
    """No count is believed that the file does not bear out, no byte causes a traceback."""
    write(tmp_path / "m.gguf", make("llama"))
    whole, random = (tmp_path / "m.gguf").read_bytes(), np.random.default_rng(0)
    head = whole.index(b"blk.1.ffn_down") + 200
    path, refused = tmp_path / "bad.gguf", 0
    for case in range(500):
        bad = bytearray(whole)
        if case % 4 == 0:
            del bad[int(random.integers(0, len(bad))) :]
        elif case % 4 == 1:  # a count or length that is absurd
            at = int(random.integers(4, head - 8))
            bad[at : at + 8] = struct.pack("<Q", int(random.integers(1, 2**63)))
        else:
            for at in random.integers(0, head, 1 + case % 3):
                bad[at] = random.integers(0, 256)
        path.write_bytes(bad)
        try:
            opened = open_gguf(path)
            for tensor in opened.tensors.values():
                tensor.read(tuple(slice(None) for _ in tensor.shape))
            data.load_tokenizer(path)
        except FwError as error:
            assert str(path) in str(error), error
            refused += 1
    assert refused > 250


def test_what_is_not_known_is_named(tmp_path):
    made = make("llama")
    write(tmp_path / "m.gguf", made, scaling="yarn")
    with pytest.raises(FwError, match=r"llama\.rope\.scaling\.type 'yarn' is not supported"):
        open_gguf(tmp_path / "m.gguf")
    (tmp_path / "n.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(FwError, match=r"n\.gguf: broken, or no GGUF file: version 0"):
        parse(tmp_path / "n.gguf")
    with pytest.raises(FwError, match=r"holds several models: m\.gguf, n\.gguf"):
        hub.load(tmp_path, mesh=make_mesh("data=1"), rules=rules())

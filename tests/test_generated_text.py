"""Texts in, texts out: what ends them, what is held back, and the command as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import fw
from fw import data, hub
from fw.cli import main
from fw.errors import FwError
from fw.generation import Decoder, Sampling, decode
from fw.generation.text import end_tokens
from fw.models.llama import LlamaConfig, llama

PROMPTS = ["ab", "a longer one", "x"]


pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder of bytes with random parameters, which says something else for each prompt."""
    path = tmp_path_factory.mktemp("decoder") / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<end>", special=True)])
    model = llama(LlamaConfig(len(letters) + 1, 32, 2, 4, 32, max_position_embeddings=600))
    random = np.random.default_rng(5)
    variables = jax.tree.map(
        lambda x: np.asarray(x + random.normal(0, 0.4, x.shape), np.float32),
        model.init(jax.random.key(0)),
    )
    fw.save(path, hub.Loaded(model, variables, ()))
    fast.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": "{{ messages[-1].content }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return fw.load(folder)


def plain(loaded, prompt, most=24):
    """The text that the tokens of `decode` spell, decoded at once."""
    tokenizer = data.load_tokenizer(loaded.folder)
    decoder, ids = Decoder(loaded.model, loaded.variables), tokenizer.fast.encode(prompt).ids
    ends = end_tokens(loaded, tokenizer)
    told = [t for (t,) in decode(decoder, [ids], [Sampling()], most=most, stops=ends) if t]
    return tokenizer.fast.decode([t for t in told if t not in ends])


def test_texts_are_what_their_tokens_spell_and_come_piece_by_piece(loaded):
    pieces: dict[int, list[str]] = {}
    found = fw.generate(
        loaded,
        PROMPTS,
        max_tokens=24,
        on_news=lambda i, news: pieces.setdefault(i, []).append(news),
    )
    assert found == ["".join(pieces[i]) for i in range(3)]
    assert max(map(len, pieces.values())) > 5
    for prompt, text in zip(PROMPTS, found, strict=True):
        # Bytes at the very end that are no whole character yet are left out.
        assert plain(loaded, prompt).rstrip("\ufffd").startswith(text.rstrip("\ufffd"))
        assert fw.generate(loaded, prompt, max_tokens=24) == text
    ids = data.load_tokenizer(loaded.folder).fast.encode(PROMPTS[0]).ids
    assert fw.generate(loaded, ids, max_tokens=24) == found[0]
    assert fw.generate(loaded, [], max_tokens=24) == []


def test_a_stop_is_left_out_and_no_part_of_it_was_told(loaded):
    whole = fw.generate(loaded, PROMPTS[1], max_tokens=24)
    stop = whole[7:10]
    told: list[str] = []
    text = fw.generate(loaded, PROMPTS[1], max_tokens=24, stop=["never there", stop],
                       on_news=lambda _, news: told.append(news))  # fmt: skip
    assert text == whole[: whole.index(stop)] == "".join(told)


def test_what_ends_a_text_is_read_from_every_place(loaded, folder, tmp_path):
    tokenizer = data.load_tokenizer(folder)
    end = tokenizer.fast.token_to_id("<end>")
    assert end_tokens(loaded, tokenizer) == (end,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    try:
        assert end_tokens(loaded, tokenizer) == (3, 7, end)
    finally:
        (folder / "generation_config.json").unlink()


def test_the_same_seed_gives_the_same_text_whatever_the_batch(loaded):
    warm = Sampling(temperature=1.0, top_p=0.9, seed=4)
    alone = fw.generate(loaded, "ab", max_tokens=24, sampling=warm)
    several = [Sampling(temperature=1.0, top_p=0.9, seed=seed) for seed in (3, 4, 5)]
    together = fw.generate(loaded, ["ab"] * 3, max_tokens=24, sampling=several)
    assert together[1] == alone
    assert len(set(together)) == 3
    assert fw.generate(loaded, "ab", max_tokens=24, sampling=warm, draft=loaded) == alone


def test_bad_settings_are_refused(loaded):
    with pytest.raises(FwError, match="2 texts, but 1 settings"):
        fw.generate(loaded, ["a", "b"], sampling=[Sampling()])
    with pytest.raises(FwError, match="stop: expected strings of one character"):
        fw.generate(loaded, "a", stop=[""])
    made = hub.Loaded(loaded.model, loaded.variables, ())
    with pytest.raises(FwError, match="came from no folder"):
        fw.generate(made, "a")


def test_the_command_prints_what_the_function_returns(loaded, folder, capsys):
    text = fw.generate(loaded, "ab", max_tokens=12)
    assert main(["generate", str(folder), "ab", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == f"{text}\n"
    assert main(["generate", str(folder), "ab", "--chat", "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == f"{text}\n"  # its template is the message alone
    small = fw.generate(loaded, "ab", max_tokens=12, cache="int8")
    assert main(["generate", str(folder), "ab", "--max-tokens", "12", "--cache", "int8"]) == 0
    assert capsys.readouterr().out == f"{small}\n"
    for words, message in (
        (["--temperature", "-1"], "temperature is -1.0; expected 0 or more"),
        (["--max-tokens", "0"], "max-tokens is 0; expected 1 or more"),
        (["--max-tokens", "900"], "900 more are asked for; the model has 600 positions"),
        (["--precision", "f8"], "precision 'f8' is unknown"),
        (["--cache", "int4"], "cache 'int4' is unknown; choose one of f32, int8"),
    ):
        assert main(["generate", str(folder), "ab", *words]) == 1
        assert message in capsys.readouterr().err


def test_the_command_reads_a_text_a_line(loaded, folder):
    done = subprocess.run(
        [Path(sys.executable).with_name("fw"), "generate", str(folder), "-", "--max-tokens", "9"],
        input="ab\n\nx\n", capture_output=True, text=True, check=True,
    )  # fmt: skip
    texts = fw.generate(loaded, ["ab", "x"], max_tokens=9)
    expected = "".join(f"{p}\n→ {t.strip()}\n\n" for p, t in zip(("ab", "x"), texts, strict=True))
    assert done.stdout == expected

"""Runs that prune, keep small moments and exchange small gradients: to the end, and resumed."""

import shutil

import jax
import numpy as np
import pytest

from compress.transform import named_leaves
from fw import hub, run
from fw.cli import main
from fw.errors import FwError
from fw.recipe import Finetune
from sharding import make_mesh, rules
from tests import tiny
from tests.marks import fast_are

COMMON = ("--task", "classify", "--length", "32", "--learning-rate", "1e-2", "--precision", "f32",
          "--log-every", "1", "--steps", "20", "--evaluate-every", "5")  # fmt: skip


def fw(where, folder, *more, status=0):
    words = [w for name, path in where.items() for w in (f"--{name}", path)]
    assert main([str(w) for w in ("finetune", *COMMON, *words, "--run", folder, *more)]) == status


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return {"model": tiny.make_model(root / "model", layers=2, seed=1),
            "data": tiny.make_reviews(root / "data")}  # fmt: skip


RUNS = {
    "anywhere": ("--sparsity", "0.6", "--moments", "8bit"),
    "2:4, two workers": ("--sparsity-pattern", "2:4", "--sparsity-on", "**/layers/**/kernel",
                         "--sparsity-by", "movement", "--mesh", "data=2", "--exchange", "int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", fast_are(["anywhere"], RUNS))
def test_a_run_prunes_and_resumes_to_the_same_bits(name, where, tmp_path):
    """The best model is of the steps after the last entry went."""
    fw(where, tmp_path / "one", *RUNS[name])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "two/checkpoints/20")
    fw(where, tmp_path / "two", *RUNS[name], "--resume")
    files = [tmp_path / n / "model/model.safetensors" for n in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert run.read_json(tmp_path / "one" / run.RESULT)["best_step"] >= 12
    model = hub.load(tmp_path / "one/model", mesh=make_mesh("data=1"), rules=rules())
    for path, leaf in named_leaves(model.variables["params"])[0]:
        chosen = path.endswith("kernel") and ("layers" in path or name == "anywhere")
        zero = float(np.mean(np.asarray(leaf) == 0))
        if not chosen:
            assert zero < 0.3 or leaf.ndim < 2, path
        elif name == "anywhere":
            assert zero == pytest.approx(0.6, abs=1 / leaf.size + 0.01), path
        else:
            groups = np.asarray(leaf).reshape(-1, leaf.shape[-2] // 4, 4, leaf.shape[-1])
            assert (np.sum(groups != 0, 2) == 2).all(), path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 1.5}, "sparsity is 1.5; expected a part between 0 and 1"),
        ({"sparsity": 0.5, "sparsity_pattern": "2:4"}, "expected no part where the pattern has"),
        ({"sparsity_pattern": "4:2"}, "sparsity_pattern: pattern '4:2'"),
        ({"sparsity_by": "movement"}, "sparsity_by is for pruning; give --sparsity a part"),
        ({"sparsity": 0.5, "sparsity_by": "luck"}, "choose one of magnitude, movement, gradient"),
        ({"sparsity": 0.5, "sparsity_until": 1.5}, "sparsity_until is 1.5; expected 0.1 to 1"),
        ({"sparsity": 0.5, "lora": 4}, "leave lora or it away"),
    ],
)
def test_options_that_are_refused(options, said):
    with pytest.raises(FwError, match=said):
        Finetune(data="somewhere", **options)


def test_rules_that_do_not_fit_are_told_before_a_run_is_made(where, tmp_path, capsys):
    for pattern, on, said in (
        ("2:3", "**/kernel", "groups of 3"),
        ("2:4", "**/kernels", "matches"),
    ):
        fw(where, tmp_path / "run", "--sparsity-pattern", pattern, "--sparsity-on", on, status=1)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert jax.device_count() == 8

"""What stages keep in scratch: who removes what and when, and a notebook that fails after all its work."""

import hashlib

import pytest

from dive_lib import files, image_runs, parameters, paths, run, stage_scratch
from tests.test_run import notebook

WORK = """
import torch
from dive_lib import image_runs, paths
from dive_lib.train import TrainingConfig, train

def note(text):
    with open(paths.scratch() / "work.txt", "a") as file:
        file.write(text)

class Runner:
    def __init__(self, spec):
        pass
    def results(self, image_ids):
        note(f"image {image_ids} ")
        return [{"image_id": i, "answer": 2 * i} for i in image_ids]

def loss_of(model, step, generator):
    note(f"step {step} ")
    return model(torch.randn(4, 2, generator=generator)).square().mean()

def answers(name, ids):
    results = image_runs.run(paths.runs(profile) / name, {"image_ids": ids, "batch": 1}, Runner)
    return [result["answer"] for result in results]
"""
CELLS = ['profile = "smoke"\nfail = False', WORK, "answers('first', [1, 2])", "answers('second', [3])",
         "torch.manual_seed(0)\nmodel = torch.nn.Linear(2, 1)\n"
         "config = TrainingConfig(steps=2, lr=0.1, batch_size=4)\n"
         "losses = train(model, loss_of, config, scratch=paths.scratch() / 'toy', identity='', keep_after=0)\n"
         "losses, model.weight.tolist(), torch.rand(1).item()",
         "if fail:\n    raise RuntimeError('bad luck')"]
DONE = "image [1] image [2] image [3] step 0 step 1 "


@pytest.fixture
def toy(tmp_path, monkeypatch):
    path = tmp_path / "params.yaml"
    path.write_text("smoke:\n  toy: {fail: false}\n")
    monkeypatch.setattr(parameters, "PARAMS", path)
    return notebook(tmp_path, CELLS)


def kept() -> list[str]:
    folders = (paths.scratch() / name for name in ("image_runs", "toy"))
    return sorted(path.name for folder in folders if folder.is_dir() for path in folder.iterdir())


def test_a_failed_notebook_keeps_its_work_and_the_next_execution_removes_it(toy, monkeypatch):
    monkeypatch.setenv("DIVE_STAGE", "mini-other@1")
    other, shared = paths.scratch() / "other", image_runs._scratch({"image_ids": [3], "batch": 1})
    files.write_text(other, "")
    for path in (other, shared):
        stage_scratch.keep(path)
    monkeypatch.delenv("DIVE_STAGE")

    with pytest.raises(run.NotebookFailed, match="bad luck"):
        run.run(toy, "smoke", {"fail": "true"})
    assert len(kept()) == 3 and (paths.scratch() / "work.txt").read_text() == DONE
    target = run.run(toy, "smoke")
    assert (paths.scratch() / "work.txt").read_text() == DONE, "nothing is computed twice"
    assert kept() == [shared.name] and other.exists(), "what another stage keeps stays"
    assert len(list((paths.scratch() / "stages").rglob("[!.]*.json"))) == 2

    continued = target.read_bytes()
    stage_scratch.forget("mini-other@1")
    assert not kept() and not other.exists()
    run.run(toy, "smoke")
    assert (paths.scratch() / "work.txt").read_text() == 2 * DONE, "a stage that ended well starts anew"
    assert target.read_bytes() == continued, "the failure left no trace"
    assert not kept() and not list((paths.scratch() / "stages").glob("[!.]*"))


def test_executions_of_a_stage_share_its_name_alone():
    target = paths.reports("mini") / "05_detection.ipynb"
    first, second, other = (stage_scratch.new_id(path) for path in (target, target, target.with_stem("06_ablation")))
    assert first != second and first.partition("@")[0] == second.partition("@")[0] != other.partition("@")[0]


def test_the_id_is_there_only_while_the_kernel_runs(toy, monkeypatch):
    monkeypatch.setenv("DIVE_STAGE", "outer@1")
    run.run(notebook(toy.parent, ["profile = 'smoke'\nfail = False", "import os\nassert 'DIVE_STAGE' in os.environ\n"
                                  "assert os.environ['DIVE_STAGE'].startswith('smoke-01_toy-')"]), "smoke")
    assert stage_scratch.current() == "outer@1"


def test_without_a_stage_nothing_is_written_down(monkeypatch):
    monkeypatch.delenv("DIVE_STAGE", raising=False)
    stage_scratch.keep(files.write_text(paths.scratch() / "a", ""))
    assert [path.name for path in paths.scratch().iterdir()] == ["a"]
    stage_scratch.discard(paths.scratch() / "a")
    stage_scratch.discard(paths.scratch() / "a")
    assert not (paths.scratch() / "a").exists()


def test_the_latest_execution_of_a_stage_and_other_stages_hold_a_path(monkeypatch):
    folder, gone = paths.scratch() / "run", paths.scratch() / "gone"
    files.write_text(folder / "1.json", "")
    for stage in ("a@1", "a@2", "b@1"):
        monkeypatch.setenv("DIVE_STAGE", stage)
        stage_scratch.keep(folder)
        stage_scratch.keep(gone)
    for stage in ("a@1", "never@1", "a@2"):
        stage_scratch.forget(stage)
        stage_scratch.discard(folder)
        assert folder.is_dir()
    stage_scratch.forget("b@1")
    assert not folder.exists()


def test_a_stage_of_dvc_keeps_its_work_until_it_is_recorded(toy, monkeypatch, tmp_path):
    """DVC copies and records the outputs after the notebook has ended, and empties them if it is stopped in this."""
    lock = tmp_path / "dvc.lock"
    monkeypatch.setenv("DVC_STAGE", "toy")
    target = run.run(toy, "smoke")
    work = kept()
    assert work
    stage_scratch.forget_recorded(lock)
    assert kept() == work, "nothing is recorded"
    run.run(toy, "smoke")
    assert (paths.scratch() / "work.txt").read_text() == DONE, "nothing was computed twice"
    lock.write_text(f"md5: {hashlib.md5(target.read_bytes()).hexdigest()}")
    stage_scratch.forget_recorded(lock)
    assert kept() == [] and not list((paths.scratch() / "stages").glob("[!.]*"))

"""The runner and the sweep, on toy notebooks that need no model: strict, clean, repeatable, and dead when killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from dive_lib import files, parameters, paths, run, sweep

PARAMS = """
smoke:
  toy: {steps: 2, rate: 0.5}
  long: {}
large:
  toy: {steps: 3, rate: 1}
  long: {}
"""

TOY = ['profile = "smoke"\nsteps = 2\nrate = 0.5',
       "import sys, warnings\nfrom dive_lib import files, paths\nfrom dive_lib.progress import Progress\n"
       "warnings.warn('careful')\n"
       "for i in range(40):\n    print('out', i, flush=True)\n    print('err', i, file=sys.stderr, flush=True)",
       "with Progress(steps, 'toy') as bar:\n    for _ in range(steps):\n        bar.update()",
       "print(paths.ROOT / 'data', sys.prefix + '/bin')\nobject()",
       "if steps == 13:\n    raise RuntimeError('bad luck')\n"
       "files.write_json(paths.metrics(profile, 'toy'), {'ap': steps * rate})"]

LONG = ['profile = "smoke"',
        "import os, pathlib, time\nfrom dive_lib import paths\n"
        "(paths.scratch() / 'pid').write_text(str(os.getpid()))\nwhile True:\n    sum(range(10000))"]


@pytest.fixture(autouse=True)
def toy_parameters(tmp_path, monkeypatch):
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    monkeypatch.setattr(parameters, "PARAMS", path)


def notebook(folder: Path, sources: list[str], name: str = "01_toy.ipynb") -> Path:
    cells = [nbformat.v4.new_code_cell(source, id=f"source-{n}") for n, source in enumerate(sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / name)
    return folder / name


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())
            if path.suffix in (".ipynb", ".html", ".json") and path.name != "timings.json"}


def test_two_runs_give_the_same_bytes(tmp_path):
    source = notebook(tmp_path, TOY)
    before = source.read_bytes()
    run.run(source, "large")
    first = content(paths.reports("large"))
    run.run(source, "large")
    assert content(paths.reports("large")) == first and set(first) == {"01_toy.ipynb", "01_toy.html"}
    assert source.read_bytes() == before
    assert files.read_json(paths.metrics("large", "toy")) == {"ap": 3.0}

    executed = nbformat.read(paths.reports("large") / "01_toy.ipynb", as_version=4)
    nbformat.validate(executed)
    assert [cell.id for cell in executed.cells][:3] == ["source-0", "injected-parameters", "source-1"]
    assert set(executed.metadata) <= {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in executed.cells)
    streams, bar, places = (cell.outputs for cell in executed.cells[2:5])
    assert [output.name for output in streams] == ["stdout", "stderr"]
    assert streams[0].text == "".join(f"out {i}\n" for i in range(40))
    assert streams[1].text.startswith("<cell>:4: UserWarning: careful")
    assert [output.data for output in bar] == [{"text/plain": "toy: done, 3 steps"}]
    assert str(paths.ROOT) not in json.dumps(executed) and places[0].text.startswith("data ")
    assert places[1].data["text/plain"] == "<object at 0x>"

    timings = files.read_json(paths.reports("large") / "timings.json")
    assert timings["stages"]["01_toy"] > 0 and timings["machines"]["01_toy"]["cores"] >= 1
    assert "commits" in timings


def test_the_page_has_the_alternative_texts_of_the_figures():
    shown = {"image/png": "iVBORw0KGgo=", "text/plain": "<Image>"}
    told = {"image/png": {"alt": 'AP "by" steps', "width": 3}, "scrolled": True}
    pictures = [nbformat.v4.new_output("display_data", shown, metadata=metadata) for metadata in ({}, told)]
    kept = [run._clean(output).metadata for output in pictures]
    assert kept == [{}, {"image/png": {"alt": 'AP "by" steps'}}]
    cells = [nbformat.v4.new_code_cell("show()", outputs=pictures)]
    page = run.to_html(nbformat.v4.new_notebook(cells=cells), "toy")
    assert page.count('alt="No description') == 1 and page.count('alt="AP &quot;by&quot; steps"') == 1


def test_a_failing_cell_keeps_the_old_report(tmp_path, capsys):
    source = notebook(tmp_path, TOY)
    old = files.write_text(paths.reports("smoke") / "01_toy.ipynb", "old")
    assert run.main([str(source), "smoke", "--set", "steps=13"]) == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: bad luck" in shown and "01_toy.ipynb: cell 6 raised RuntimeError" in shown
    assert old.read_text() == "old" and not old.with_suffix(".html").exists()
    kept = paths.scratch() / "failed" / "01_toy.ipynb"
    assert any(output.output_type == "error" for cell in nbformat.read(kept, as_version=4).cells
               for output in cell.get("outputs", []))
    assert not any((paths.scratch() / "executing").iterdir())


@pytest.mark.parametrize("arguments, message", [
    (["smoke", "--set", "stepz=3"], "stepz: unknown parameter"),
    (["smoke", "--set", "steps=many"], "'many' is of type str"),
    (["huge"], "no profile 'huge'; choose one of smoke, large"),
])
def test_wrong_parameters_stop_before_anything_is_made(tmp_path, capsys, arguments, message):
    began = time.monotonic()
    assert run.main([str(notebook(tmp_path, TOY)), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not paths.reports("smoke").exists() and time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_kernel_dies_with_the_runner(tmp_path, number):
    source = notebook(tmp_path, LONG, "02_long.ipynb")
    script = (f"import sys, pathlib; from dive_lib import parameters, run\n"
              f"parameters.PARAMS = pathlib.Path({str(parameters.PARAMS)!r})\n"
              f"sys.exit(run.main([{str(source)!r}, 'smoke']))")
    runner = subprocess.Popen([sys.executable, "-c", script], cwd=paths.ROOT, stderr=subprocess.DEVNULL)
    pid = paths.scratch() / "pid"
    try:
        wait_for(lambda: runner.poll() is not None or pid.is_file() and pid.read_text(), 60)
        runner.send_signal(number)
        status = runner.wait(20)
    finally:
        runner.kill()
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    wait_for(lambda: not alive(int(pid.read_text())), 15)
    assert not (paths.reports("smoke") / source.name).exists()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # An orphan that nobody has collected yet is dead all the same.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_kernels_of_one_folder_can_start_at_once(tmp_path):
    source = notebook(tmp_path, ['profile = "smoke"', "print(6 * 7)"])
    script = (f"from pathlib import Path; from dive_lib import run\n"
              f"print(run.execute(Path(r'{source}'), {{'profile': 'smoke'}}, 'an id').cells[-1].outputs[0].text)")
    processes = [subprocess.Popen([sys.executable, "-c", script], cwd=paths.ROOT, stdout=subprocess.PIPE, text=True)
                 for _ in range(3)]
    assert [process.communicate()[0].strip() for process in processes] == 3 * ["42"]


def test_kernels_keep_the_memory_of_tensors(tmp_path, monkeypatch):
    """The same values as `make lab` has; the caller's environment comes back."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with run._environment(tmp_path / "progress.txt", "stage"):
        own = {name: os.environ[name] for name in names}
    assert not any(name in os.environ for name in names)
    makefile = (paths.ROOT / "Makefile").read_text()
    assert all(f"export {name} := {value}\n" in makefile for name, value in own.items()) and len(own) == 2


def test_scrub():
    root, home = str(paths.ROOT), str(Path.home())
    assert run.scrub(f'File "{root}/dive_lib/x.py", in {root}') == 'File "dive_lib/x.py", in .'
    assert run.scrub(f"{home}/.cache/a") == ("~/.cache/a" if home != "/" else f"{home}/.cache/a")
    assert run.scrub("<a.B object at 0x7f0123456789>") == "<a.B object at 0x>"
    assert run.scrub("ratio 1/2, and/or, 0x1f") == "ratio 1/2, and/or, 0x1f"


@pytest.fixture
def fake_runs(monkeypatch):
    """In place of a kernel: writes metrics as the toy notebook does, and records what was run."""
    made = []

    def fake(source, profile, overrides):
        values = parameters.resolve(source, profile, overrides)
        if values["steps"] == 13:
            raise run.NotebookFailed("bad luck", source)
        made.append(values)
        files.write_json(paths.runs(profile) / "toy" / "model.json", values["steps"])
        seen = files.read_json(paths.runs(profile) / "data" / "scenes.json")
        files.write_json(paths.metrics(profile, "toy"),
                         {"dive": {"AP": values["steps"] * values["rate"], "ci": [0.1, 0.2]}, "seen": seen,
                          "curve": list(range(100))})

    monkeypatch.setattr(run, "run", fake)
    files.write_json(paths.runs("large") / "data" / "scenes.json", 7)
    files.write_json(paths.runs("large") / "toy" / "model.json", "the profile's own")
    return made


def test_sweep_gives_a_tidy_table_and_leaves_the_profile_alone(tmp_path, fake_runs):
    table = sweep.sweep(notebook(tmp_path, TOY), "large", {"steps": ["1", "2"], "rate": ["1", "0.5"]})
    assert table == paths.reports("large") / "sweeps" / "toy.csv"
    assert table.read_text() == ("steps,rate,dive.AP,dive.ci.0,dive.ci.1,seen\n"
                                 "1,1.0,1.0,0.1,0.2,7\n1,0.5,0.5,0.1,0.2,7\n2,1.0,2.0,0.1,0.2,7\n2,0.5,1.0,0.1,0.2,7\n")
    assert files.read_json(paths.runs("large") / "toy" / "model.json") == "the profile's own"
    assert not paths.metrics("large", "toy").exists()


def test_a_sweep_leaves_all_that_its_stage_writes_alone(tmp_path, fake_runs, monkeypatch):
    """Also what lies in the folder of another stage: 06_ablation writes into detection/."""
    source = notebook(tmp_path, TOY)
    monkeypatch.setattr(sweep, "outputs", lambda _: {"toy", "detection/without_prior", "prior_boxes"})
    for name in ("detection/dive", "detection/without_prior", "prior_boxes"):
        files.write_json(paths.runs("large") / name / "1.json", "the profile's own")
    sweep.sweep(source, "large", {"steps": ["1"]})
    own = paths.runs("large") / "sweeps" / source.stem / "steps=1" / "runs" / "large"
    assert (own / "detection" / "dive").is_symlink() and not (own / "detection").is_symlink()
    assert not (own / "detection" / "without_prior").exists() and not (own / "prior_boxes").exists()


def test_what_a_stage_writes_is_read_from_dvc_yaml():
    assert "detection/without_prior" in sweep.outputs(paths.ROOT / "notebooks" / "06_ablation.ipynb")
    assert {"layout_prior", "layout_prior_boxes"} <= sweep.outputs(paths.ROOT / "notebooks" / "04_layout_prior.ipynb")
    assert sweep.outputs(paths.ROOT / "elsewhere" / "09_mine.ipynb") == {"mine"}


def test_sweep_continues_and_notices_changes(tmp_path, fake_runs):
    source = notebook(tmp_path, TOY)
    with pytest.raises(run.NotebookFailed):
        sweep.sweep(source, "large", {"steps": ["1", "13"]})
    assert len(files.read_csv(paths.reports("large") / "sweeps" / "toy.csv")) == 1
    sweep.sweep(source, "large", {"steps": ["1", "4"]})
    assert [values["steps"] for values in fake_runs] == [1, 4]
    notebook(tmp_path, [*TOY, "1 + 1"])
    sweep.sweep(source, "large", {"steps": ["1", "4"]})
    assert [values["steps"] for values in fake_runs] == [1, 4, 1, 4]
    files.write_json(paths.metrics("large", "first_stage"), {"mse": 1})  # an earlier stage has a new result
    sweep.sweep(source, "large", {"steps": ["1"]})
    assert [values["steps"] for values in fake_runs] == [1, 4, 1, 4, 1]


def test_a_wrong_sweep_stops_before_the_first_run(tmp_path, fake_runs):
    for grid in ({"steps": ["1", "x"]}, {"stepz": ["1"]}, {"steps": ["1", "1"]}):
        with pytest.raises(parameters.ParameterError):
            sweep.sweep(notebook(tmp_path, TOY), "large", grid)
    assert fake_runs == []


def test_grid_and_flatten():
    assert sweep.grid_of(["steps=50,100", "sizes=[1,2],[3]", 'name="a,b",c']) == {
        "steps": ["50", "100"], "sizes": ["[1,2]", "[3]"], "name": ['"a,b"', "c"]}
    assert sweep.flatten({"a": {"b": 1, "c": [1, 2]}, "d": None, "long": [0] * 9}) == {
        "a.b": 1, "a.c.0": 1, "a.c.1": 2, "d": None}

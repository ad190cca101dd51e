"""Execute one notebook with the parameters of a profile; every stage of `dvc.yaml` is such a call.

    python -m dive_lib.run notebooks/05_detection.ipynb mini
    python -m dive_lib.run notebooks/05_detection.ipynb smoke --set steps=20 --set learning_rate=0.05

writes `reports/<profile>/05_detection.ipynb` and `.html`, each at once or not at all, and the seconds that it took to
`reports/<profile>/timings.json`.  The parameters are checked first (`dive_lib.parameters`); the notebook runs in its
own folder, as in JupyterLab and under nbval, in a kernel of the interpreter that runs this command.

An executed notebook keeps nothing that changes from run to run (times, process ids, memory addresses, the way a
stream was cut into messages, paths of this machine): equal results mean equal bytes, so DVC sees no change.

While the notebook runs, its progress line is shown here.  If a cell fails, the last lines of the traceback are
printed, the notebook as far as it came is kept under `scratch/failed/`, and the exit status is 1; what an earlier run
wrote to `reports/` stays.  Ctrl-C, SIGTERM, and even SIGKILL of this command end the kernel too.  What such a notebook
had trained and computed stays in scratch for the next execution; of one that ends well it goes (`stage_scratch`).
"""

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

# With this package jsonschema, which checks notebooks, parses a grammar of web addresses: a second at every start.
sys.modules.setdefault("rfc3987_syntax", None)

import nbformat
from nbformat import NotebookNode

from dive_lib import lanes, parameters, paths, provenance, stage_scratch
from dive_lib.files import merge_json, write_text
from dive_lib.progress import LiveLine

KERNEL = "python3"
PARENT = os.getppid()  # asked at once: a parent that dies while this loads must be missed
TRACEBACK_LINES = 25


class NotebookFailed(RuntimeError):
    """A cell raised.  `path` is the partly executed notebook; the message ends with the traceback's last lines."""

    def __init__(self, message: str, path: Path):
        super().__init__(message)
        self.path = path


def run(notebook: str | Path, profile: str, overrides: Mapping[str, str] | Iterable[str] = ()) -> Path:
    """Execute `notebook` as described above and return the path of the executed copy.

    Raises `parameters.ParameterError` before a kernel starts, `NotebookFailed` if a cell raises.
    """
    notebook = Path(notebook).absolute()
    values = parameters.resolve(notebook, profile, overrides)
    folder = paths.reports(profile)
    for needed in (folder, paths.runs(profile), paths.scratch()):
        needed.mkdir(parents=True, exist_ok=True)
    target = folder / notebook.name
    stage_scratch.forget_recorded(paths.ROOT / "dvc.lock")
    stage = stage_scratch.new_id(target)
    machine, began = provenance.machine(), time.monotonic()  # its share of the cores may grow
    executed = execute(notebook, values, stage)
    seconds = time.monotonic() - began
    write_text(target, nbformat.writes(executed) + "\n")
    write_text(target.with_suffix(".html"), to_html(executed, notebook.stem))
    merge_json(folder / "timings.json", {"stages": {notebook.stem: round(seconds, 1)},
                                         "commits": {notebook.stem: provenance.commit()},
                                         "machines": {notebook.stem: machine}})
    if "DVC_STAGE" in os.environ:
        stage_scratch.ended(stage, target)
    else:
        stage_scratch.forget(stage)
    return target


def execute(notebook: Path, values: Mapping[str, Any], stage: str) -> NotebookNode:
    """Run all cells of `notebook` with `values` as parameters and return the executed notebook, made `stable`.

    `stage` is the id under which the notebook keeps what it trains and computes (`stage_scratch`).
    """
    import papermill  # takes a second to load; a wrong parameter is told before that

    source = nbformat.read(notebook, as_version=4)
    # The HTML exporter takes seconds to load; meanwhile the kernel loads what the notebook needs.
    threading.Thread(target=importlib.import_module, args=("nbconvert.exporters.html",), daemon=True).start()
    work = Path(tempfile.mkdtemp(prefix=f"{notebook.stem}-", dir=_made(paths.scratch() / "executing")))
    live = work / "progress.txt"
    try:
        with _environment(live, stage), _tail(live), _kernel_config() as config:
            executed = papermill.execute_notebook(
                notebook, work / notebook.name, dict(values), kernel_name=KERNEL, language="python",
                cwd=notebook.parent, progress_bar=False, log_output=False, record_timing=False,
                request_save_on_cell_execute=False, autosave_cell_every=0,  # the copy is kept or thrown away as a whole
                # on a slow disk, or with both cores taken, a kernel may start or answer late
                start_timeout=600, iopub_timeout=120, shutdown_kernel="immediate", config=config)
    except papermill.PapermillExecutionError as error:
        kept = _made(paths.scratch() / "failed") / notebook.name
        shutil.move(work / notebook.name, kept)
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).splitlines()[-TRACEBACK_LINES:]
        raise NotebookFailed("\n".join([*trace, "", f"{paths.shorten(notebook)}: cell {error.exec_count} raised "
                                        f"{error.ename}; see {paths.shorten(kept)}"]), kept) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return stable(executed, source)


def stable(executed: NotebookNode, source: NotebookNode) -> NotebookNode:
    """Remove from an executed notebook (in place) what differs between two equal runs.

    `source` gives the cell ids; the cell that papermill injected is called `injected-parameters`.
    """
    executed.metadata = NotebookNode({key: executed.metadata[key] for key in ("kernelspec", "language_info")
                                      if key in executed.metadata})
    ids = iter([cell.get("id") if source.nbformat_minor >= 5 else None for cell in source.cells])
    for number, cell in enumerate(executed.cells):
        injected = "injected-parameters" in cell.metadata.get("tags", [])
        cell.id = "injected-parameters" if injected else next(ids, None) or f"cell-{number:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [_clean(output) for output in _joined(cell.outputs)]
    executed.nbformat_minor = max(5, executed.nbformat_minor)
    return executed


def to_html(notebook: NotebookNode, title: str) -> str:
    """The notebook as one HTML page with its images inside, each with its alternative text (`figures.show`)."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="lab")
    exporter.require_js_url = exporter.jquery_url = ""  # only widgets need them
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": title}})
    # The template leaves these texts out, and the exporter then writes this one; images keep their order.
    missing = 'alt="No description has been provided for this image"'
    texts = iter([output.metadata.get("image/png", {}).get("alt") for cell in notebook.cells
                  for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})])
    return re.sub(missing, lambda found: f'alt="{escape(text)}"' if (text := next(texts, None)) else found[0], page)


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with neighbouring pieces of a stream joined; where both streams alternate, stdout comes first.

    How a stream is cut, and how the two interleave between other outputs, depends on the kernel's flush timer.
    """
    result: list[NotebookNode] = []
    streams: dict[str, NotebookNode] = {}
    for output in [*outputs, None]:
        if output is not None and output.output_type == "stream":
            if output.name in streams:
                streams[output.name].text += output.text
            else:
                streams[output.name] = output
            continue
        result += [streams[name] for name in ("stdout", "stderr") if name in streams]
        streams = {}
        if output is not None:
            result.append(output)
    return result


def _clean(output: NotebookNode) -> NotebookNode:
    if output.output_type == "stream":
        output.text = scrub(output.text)
    elif output.output_type == "error":
        output.traceback = [scrub(line) for line in output.traceback]
    else:
        output.metadata = NotebookNode({kind: NotebookNode(alt=own["alt"]) for kind, own in output.metadata.items()
                                        if isinstance(own, Mapping) and "alt" in own})
        for kind, content in output.data.items():
            if isinstance(content, str) and (kind.startswith("text/") or kind == "image/svg+xml"):
                output.data[kind] = scrub(content)
    return output


def scrub(text: str) -> str:
    """`text` without what belongs to this machine or process: folders, kernel file names, memory addresses."""
    text = re.sub(r"[^\s\"'(<>=]*/ipykernel_\d+/\d+\.py", "<cell>", text)
    for folder, name in ((str(paths.ROOT), "."), (sys.prefix, "<environment>"), (sys.base_prefix, "<python>"),
                         (tempfile.gettempdir(), "<temporary>"), (str(Path.home()), "~")):
        if len(folder) > 1:  # a home of "/" names no one
            text = text.replace(folder + "/", "" if name == "." else name + "/")
            text = re.sub(re.escape(folder) + r"(?![\w./-])", name, text)
    return re.sub(r"\b0x[0-9a-f]{8,16}\b", "0x", text)


@contextlib.contextmanager
def _environment(live: Path, stage: str) -> Iterator[None]:
    """Environment of the kernel: this interpreter's, this checkout's code, nobody's personal settings."""
    changes = {
        "DIVE_PROGRESS": str(live),
        stage_scratch.VARIABLE: stage,
        "IPYTHONDIR": str(_made(paths.scratch() / "ipython")),      # no personal start-up files, no history
        "JUPYTER_PREFER_ENV_PATH": "1",                              # a user's own `python3` kernel must not win
        "JUPYTER_PATH": None,
        # glibc: memory of tensors below 32 MiB is kept for the next ones. By default it goes back to the system after
        # every operation and comes again page by page, which took a fifth of the time of the small models.
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(paths.ROOT), os.environ.get("PYTHONPATH")])),
        "PYTEST_CURRENT_TEST": None,
    }
    before = {name: os.environ.get(name) for name in changes}
    try:
        for name, value in changes.items():
            _put(name, value)
        yield
    finally:
        for name, value in before.items():
            _put(name, value)


@contextlib.contextmanager
def _kernel_config() -> Iterator[Any]:
    """Talk to the kernel through socket files, in a folder of its own: kernels that start at the same time cannot race
    for a TCP port, nor for a file; by default all that start in one folder take the same names there."""
    from traitlets.config import Config

    with tempfile.TemporaryDirectory(prefix="dive-") as folder:
        files_work = os.name == "posix" and len(folder) <= 80  # the system limits such a file's path to about 100
        yield Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"} if files_work else {})


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextlib.contextmanager
def _tail(live: Path) -> Iterator[None]:
    """Show the line that the notebook's `Progress` leaves in `live`, once per second, until the block ends."""
    finished = threading.Event()
    parent = PARENT if "DVC_STAGE" in os.environ else None
    starter = int(os.environ.get(lanes.STARTER, 0))

    def follow() -> None:
        shown, line = "", LiveLine()
        while True:
            last = finished.wait(1.0)
            with contextlib.suppress(OSError):
                text = live.read_text(encoding="utf-8")
                if text and text != shown:
                    shown = text
                    line.end(text.rstrip("\n")) if text.endswith("\n") else line.show(text)
            if last:
                return
            if parent is not None and os.getppid() != parent or starter and not _alive(starter) or lanes.ending():
                # DVC, or what started several of it, was killed or ends: go too, or a second one would train beside it.
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join(timeout=5)


def _alive(process: int) -> bool:
    """A zombie, which nobody waited for, is dead."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # someone else's, or no /proc
        return True


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stop_on_sigterm(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # unwinds through papermill, which ends the kernel


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dive_lib.run", description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", help="source notebook, for example notebooks/05_detection.ipynb")
    parser.add_argument("profile", help="a profile of params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides",
                        help="replace one parameter (repeatable); NAME may reach into a dict: model.width=32")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, stop_on_sigterm)
    # A command that a shell starts in the background inherits an ignored SIGINT; an explicit one must still end it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    name = Path(chosen.notebook).stem
    print(f"{name} ({chosen.profile}): running", file=sys.stderr, flush=True)
    try:
        target = run(chosen.notebook, chosen.profile, chosen.overrides)
    except (parameters.ParameterError, NotebookFailed) as error:
        print(f"\n{error}" if isinstance(error, NotebookFailed) else f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name} ({chosen.profile}): interrupted", file=sys.stderr)
        return 130
    print(f"{name} ({chosen.profile}): done in {time.monotonic() - began:.0f} s, "
          f"{paths.shorten(target.with_suffix('.html'))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A study and predictions over a Dask cluster: two worker processes of this machine, one of which is killed at work."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import joblib
import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from leukemia_nb.study import driver as study
from leukemia_nb.data.processes import ClusterError
from leukemia_nb.study.cluster import parallel
from leukemia_nb.study.command_line import app
from leukemia_nb.study.driver import run_study
from leukemia_nb.study.settings import StudyError
from leukemia_nb.testing import SMOKE, dummy_model_file
from leukemia_nb.data.synthetic import write_smears

distributed = pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")  # comes with distributed


@pytest.fixture(scope="module")
def cluster():
    """A scheduler and two worker processes, which are started in a folder of their own."""
    import dask

    here = Path.cwd()
    patient = {"distributed.scheduler.allowed-failures": 1, "distributed.deploy.lost-worker-timeout": "10 minutes"}
    with dask.config.set(patient):  # LocalCluster gives up workers that are not back after 15 s, which a busy machine may need
        os.chdir("/")
        try:
            cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL")
        finally:
            os.chdir(here)
        yield cluster
        with suppress(KeyError):  # LocalCluster's own, of a worker that died before it was noticed
            cluster.close()


@pytest.fixture()
def address(cluster):
    """The scheduler's address, once both workers are there: one that was killed takes its time on a busy machine."""
    with distributed.Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=300)
    return cluster.scheduler_address


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of thirty synthetic smears, one file that is none, and a model file beside it."""
    folder = tmp_path_factory.mktemp("predict")
    write_smears(folder / "smears", 10, height=192, width=256)
    (folder / "smears/broken.png").write_bytes(b"\x89PNG")
    dummy_model_file(folder / "model.onnx")
    return folder


def write_notebook(path, code):
    """A study notebook of one cell, beside its parameters."""
    cells = [nbformat.v4.new_code_cell("run = ''", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), path)
    return path


def _abort(_):
    os.abort()


def _process_number(_):
    return os.getpid()


def once(*calls):
    """What `Workers.map` asks for calls: these at first, then none."""
    left = list(calls)
    return lambda: [left.pop(0) for _ in calls if left]


def process(number, mark):
    if mark and not os.path.exists(mark):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid()


def test_tasks_run_in_the_workers_and_a_killed_one_loses_nothing(address, tmp_path):
    with parallel(cluster=address) as workers:
        assert (workers.n_jobs, workers.per_machine) == (-1, 2)
        calls = [(number, str(tmp_path / "killed") if number == 3 else "") for number in range(8)]
        found = list(workers.map(process, once(*calls)))
    assert sorted(number for number, _ in found) == list(range(8))
    assert os.getpid() not in {worker for _, worker in found}
    assert (tmp_path / "killed").exists()


def test_a_task_that_kills_its_workers_is_an_error_and_not_a_wait_for_ever(address):
    with pytest.raises(ClusterError, match="all 2 workers that had it died"), parallel(cluster=address) as workers:
        list(workers.map(_abort, once((1,))))


def test_an_error_of_a_task_is_the_same_error_here(address):
    with pytest.raises(ZeroDivisionError), parallel(cluster=address) as workers:
        list(workers.map(divmod, once((1, 0))))


def test_joblib_uses_the_same_workers(address):
    with parallel(cluster=address) as workers:
        found = joblib.Parallel(workers.n_jobs, batch_size=1)(joblib.delayed(process)(number, "") for number in range(4))
    assert [number for number, _ in found] == list(range(4)) and os.getpid() not in {worker for _, worker in found}


@pytest.mark.slow
def test_a_single_worker_does_the_work_too_and_its_gpu_is_what_a_step_sees(tmp_path):
    notebook = write_notebook(
        tmp_path / "gpu.ipynb",
        "import os\nfrom pathlib import Path\n(Path(run) / 'gpu.txt').write_text(os.environ['CUDA_VISIBLE_DEVICES'])",
    )
    step, run = study.Step("gpu", str(notebook), writes=("gpu.txt",)), study.Run(tmp_path)
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs="CRITICAL", env={"CUDA_VISIBLE_DEVICES": "1"}
        ) as cluster,
        parallel(cluster=cluster.scheduler_address) as workers,
    ):
        assert os.getpid() not in set(workers.map(_process_number, once((0,), (1,))))
        list(workers.map(study.run_step, once((step, run))))
    assert (tmp_path / "gpu.txt").read_text() == "1"


@pytest.mark.parametrize(
    ("bad", "message"),
    [("tcp://127.0.0.1:1", r"no Dask scheduler responds there.*dask scheduler"), ("tcp://127.0.0.1:x", "correct the address")],
)
def test_no_scheduler_is_one_clear_line(tmp_path, bad, message):
    answer = CliRunner().invoke(app, ["study", "--run", str(tmp_path / "run"), "--cluster", bad])
    assert isinstance(answer.exception, ClusterError)
    with pytest.raises(ClusterError, match=message), parallel(cluster=bad):
        pass


def test_no_dask_is_one_clear_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r"pip install '\.\[train\]'"), parallel(cluster="tcp://127.0.0.1:1"):
        pass


def test_dask_is_not_loaded_where_nobody_asks_for_it():
    code = (
        "import sys\nfrom leukemia_nb.study import driver, command_line\nfrom leukemia_nb.study.cluster import Workers, parallel\n"
        "with parallel(2) as workers: assert workers == Workers(2, 2)\nassert not {'dask', 'distributed'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def files_of(run):
    """What a run has written of what its steps promise, by name; the run folder's own name is left out of tables.

    `croissant.json` is left out, since it holds the checksums of the tables with that name.
    """
    names = {name for step in study.study_steps(SMOKE) for name in step.writes} - {"croissant.json"}
    paths = [path for name in names for path in [run.folder / name, *(run.folder / name).rglob("*.png")] if path.is_file()]
    return {str(path.relative_to(run.folder)): path.read_bytes().replace(bytes(run.folder), b"") for path in paths}


def kill_the_worker_of(step, run, over, killed):
    """Kill the worker that runs a step, once its kernel is at work; `killed` then holds worker and kernel."""
    while not killed and not over.wait(0.05):
        if (run / f"notebooks/{step}.partial.ipynb").exists():
            for kernel in psutil.process_iter(["cmdline", "cwd"]):
                if kernel.info["cwd"] == str(run) and "ipykernel_launcher" in kernel.info["cmdline"]:
                    assert not (run / f"steps/{step}.json").exists()
                    killed += [kernel.parent(), kernel]
                    killed[0].kill()


@pytest.mark.slow
def test_a_study_over_a_cluster_is_the_same_study_and_survives_a_killed_worker(address, tmp_path):
    here = run_study(SMOKE, tmp_path / "here", until=("cue-conflict",), log=lambda line: None)
    killed, said, over = [], [], threading.Event()
    killer = threading.Thread(target=kill_the_worker_of, args=("cue-conflict", tmp_path / "there", over, killed))
    killer.start()
    there = run_study(SMOKE, tmp_path / "there", until=("cue-conflict",), log=said.append, cluster=address)
    over.set()
    killer.join()
    assert len(killed) == 2 and not psutil.wait_procs(killed, timeout=60)[1]  # the kernel has not outlived its worker
    assert not list(there.folder.glob("notebooks/*.partial.ipynb"))
    assert files_of(there) == files_of(here)
    assert {"prepared/original/Pre-B/ori_Pre-B_001.png", "split.csv", "audit/cue_conflict.npy"} < files_of(there).keys()
    run_study(SMOKE, there.folder, until=("cue-conflict",), log=said.append)  # the cluster's records hold here
    assert [line.split(": ")[1] for line in said if line.startswith("[")][3:] == ["unchanged"] * 3


@pytest.mark.slow
def test_a_step_that_fails_in_a_worker_is_the_study_s_error(address, tmp_path):
    for label in ("Normal", "Pre-B", "Pro-B"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "data" / label / f"{number}.png").write_bytes(b"no image")
    settings = replace(SMOKE, data=str(tmp_path / "data"))
    with pytest.raises(StudyError, match=r"(?s)step prepare failed.*class Normal is empty.*Finished steps are kept"):
        run_study(settings, tmp_path / "run", until=("prepare",), log=lambda line: None, cluster=address)


def test_a_worker_that_does_not_see_the_run_folder_says_so(tmp_path):
    step = study.study_steps(SMOKE)[0]
    assert "Machines of a cluster must share a file system" in study._attempt(step, study.Run(tmp_path), False, {}, ())["error"]


def predict(*more):
    """`predict` with paths as a user writes them, which mean nothing to the workers."""
    return CliRunner().invoke(app, ["predict", "smears", "--model", "model.onnx", "--batch-size", "1", *more])


@pytest.mark.slow
def test_predictions_over_a_cluster_are_the_same_though_a_worker_is_killed(address, images, monkeypatch):
    monkeypatch.chdir(images)
    alone = predict("--out", "alone.csv")
    with distributed.Client(address, set_as_default=False) as client:
        victim = next(iter(client.run(os.getpid).values()))

    def kill_at_work():
        while not any(file.stat().st_size for file in images.glob("shared.csv.unfinished")):
            time.sleep(0.001)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill_at_work, daemon=True)
    killer.start()
    shared = predict("--out", "shared.csv", "--overlays", "found", "--cluster", address)
    killer.join(1)
    assert not killer.is_alive()
    assert alone.exit_code == shared.exit_code == 1  # of the broken file
    first, second = (pd.read_csv(images / name) for name in ("alone.csv", "shared.csv"))
    assert second.path.tolist() == [str(images / path) for path in first.path] and len(second) == 31
    pd.testing.assert_frame_equal(first.drop(columns=["path", "problem"]), second.drop(columns=["path", "problem"]))
    assert len(list((images / "found").glob("*-cells.jpg"))) == 30

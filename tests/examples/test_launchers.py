"""The launch scripts: the commands and variables they come to, and a Slurm job of four ranks that really train."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.cli.config_file import parse_pretrain
from megalite.train.runlog import read_records
from tests.helpers.ranks import free_port, wait_until
from tests.helpers.runs import ROOT, write_config
from tests.helpers.standins import SCONTROL, SRUN, Cluster
from tests.helpers.tiny import make_dataset, read_losses, tiny_values

STEPS = 30
TORCHRUN, SLURM = (str(ROOT / "examples" / f"pretrain_{name}.sh") for name in ("torchrun", "slurm"))


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "bin")


def run_script(cluster: Cluster, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    called = {"env": cluster.environment(**env), "cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run(["bash", *words], timeout=60, check=False, **called)


def test_torchrun_on_one_machine(cluster):
    cluster.install("torchrun")
    done = run_script(cluster, TORCHRUN, "c.toml", "--train.steps", "5")
    assert done.returncode == 0, done.stderr
    [call] = cluster.calls("torchrun")
    assert shlex.join(call["argv"]) == (
        "--standalone --nproc-per-node gpu --max-restarts 3 -m megalite pretrain c.toml --train.steps 5"
    )
    assert call["env"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "300"


def test_torchrun_on_several_machines(cluster):
    cluster.install("torchrun")
    done = run_script(cluster, TORCHRUN, "c.toml", NODES="4", HEAD="node1:29400", GPUS="2", RUN_ID="a b")
    assert done.returncode == 0, done.stderr
    [call] = cluster.calls("torchrun")
    assert shlex.join(call["argv"]) == (
        "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint node1:29400 --rdzv-id 'a b' --nproc-per-node 2 "
        "--max-restarts 3 -m megalite pretrain c.toml"
    )


def test_several_machines_need_a_place_to_meet(cluster):
    cluster.install("torchrun")
    done = run_script(cluster, TORCHRUN, "c.toml", NODES="4")
    assert done.returncode != 0
    assert "HEAD=host:port" in done.stderr
    assert not cluster.calls("torchrun")


def test_torchrun_knows_the_options_that_the_script_gives():
    from torch.distributed.run import get_args_parser

    words = ["--standalone", "--nproc-per-node=gpu", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=x"]
    options = get_args_parser().parse_args([*words, "--nnodes=2", "--rdzv-endpoint=a:1", "-m", "megalite"])
    assert (options.nproc_per_node, options.max_restarts, options.rdzv_id) == ("gpu", 3, "x")


def job(**changes: str) -> dict[str, str]:
    values = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
    }
    return {**values, **changes}


def test_the_slurm_job_starts_one_task_for_each_gpu(cluster):
    cluster.install("scontrol", SCONTROL)
    cluster.install("srun")
    done = run_script(cluster, SLURM, "c.toml", "--name", "two words", **job())
    assert done.returncode == 0, done.stderr
    [call] = cluster.calls("srun")
    assert call["argv"][:4] == ["--kill-on-bad-exit=0", "--wait=120", "bash", "-c"]
    assert call["argv"][5:] == ["rank", "c.toml", "--name", "two words"]
    expected = {
        "MASTER_ADDR": "node7",
        "MASTER_PORT": str(20000 + 123456 % 20000),
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "OMP_NUM_THREADS": "1",
    }
    assert {name: call["env"][name] for name in expected} == expected
    assert [call["argv"][0] for call in cluster.calls("scontrol")] == ["show"]


def test_a_slurm_task_becomes_the_rank_of_its_number(cluster):
    cluster.install("scontrol", SCONTROL)
    cluster.install("srun", SRUN)
    (cluster.folder / "python").unlink()
    cluster.install("python")
    done = run_script(cluster, SLURM, "c.toml", "--name", "two words", **job(SLURM_NTASKS="3"))
    assert done.returncode == 0, done.stderr
    calls = sorted(cluster.calls("python"), key=lambda call: call["env"]["RANK"])
    assert [(call["env"]["RANK"], call["env"]["LOCAL_RANK"]) for call in calls] == [
        (str(rank), str(rank)) for rank in range(3)
    ]
    assert all(
        call["argv"] == ["-m", "megalite", "pretrain", "c.toml", "--name", "two words"] for call in calls
    )


@pytest.mark.parametrize(
    ("codes", "last", "starts", "requeued"),
    [
        pytest.param([0], 0, 1, False, id="done"),
        pytest.param([75], 0, 1, True, id="preempted"),
        pytest.param([2], 2, 1, False, id="bad input"),
        pytest.param([137, 69, 0], 0, 3, False, id="two lost ranks"),
        pytest.param([69, 75], 0, 2, True, id="lost, then preempted"),
        pytest.param([137, 137, 137, 0], 137, 3, False, id="three lost ranks"),
    ],
)
def test_what_the_slurm_job_does_with_exit_codes(codes, last, starts, requeued, cluster):
    cluster.install("scontrol", SCONTROL)
    answers = cluster.folder / "codes"
    answers.write_text("\n".join(map(str, codes)))
    cluster.install(
        "srun",
        f"lines = open({str(answers)!r}).read().split()\n"
        f"open({str(answers)!r}, 'w').write('\\n'.join(lines[1:]))\n"
        "sys.exit(int(lines[0]))",
    )
    done = run_script(cluster, SLURM, "c.toml", **job())
    assert done.returncode == last, done.stderr
    assert len(cluster.calls("srun")) == starts
    again = [call["argv"] for call in cluster.calls("scontrol") if call["argv"][0] == "requeue"]
    assert again == ([["requeue", "123456"]] if requeued else [])


@contextlib.contextmanager
def slurm_run(cluster: Cluster, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A job of four ranks on this machine; whatever still runs at the end is killed."""
    here = job(
        SLURM_NTASKS="4",
        SLURM_NTASKS_PER_NODE="4",
        SLURM_JOB_NODELIST="here",
        SLURM_JOB_ID=str(free_port() - 20000),  # the script makes a port of it
    )
    process = subprocess.Popen(
        ["bash", SLURM, str(folder / "c.toml")],
        env=cluster.environment(**here),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def prepare(cluster: Cluster, folder: Path) -> Path:
    """Stand-ins, data, and a run; returns its folder."""
    cluster.install("scontrol", SCONTROL)
    cluster.install("srun", SRUN)
    values = tiny_values(
        make_dataset(folder / "data"),
        folder / "run",
        train={"steps": STEPS, "log_interval": 1},
        eval={"interval": 0, "samples": 0},
        checkpoint={"interval": 10},
    )
    values["parallel"] = {"timeout_s": 120.0, "pp": 2}
    write_config(folder / "c.toml", values)
    return folder / "run"


def records(run_dir: Path, name: str) -> list[dict]:
    path = run_dir / name
    return read_records(path) if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slurm_job_trains_is_preempted_requeued_and_finishes(cluster, tmp_path):
    run_dir = prepare(cluster, tmp_path)
    with slurm_run(cluster, tmp_path) as first:
        wait_until(lambda: len(records(run_dir, "metrics.jsonl")) >= 3, "the third step", [first])
        for pid in cluster.tasks_file.read_text().split():
            os.kill(int(pid), signal.SIGUSR1)  # Slurm's --signal
        said = first.communicate(timeout=300)[1]
    assert first.returncode == 0, said
    assert "run the same command again to continue" in said
    assert [call["argv"][0] for call in cluster.calls("scontrol")] == ["show", "requeue"]
    stopped = len(records(run_dir, "metrics.jsonl"))
    assert 3 <= stopped < STEPS
    assert records(run_dir, "events.jsonl")[-1]["signal"] == "SIGUSR1"

    with slurm_run(cluster, tmp_path) as second:
        said = second.communicate(timeout=300)[1]
    assert second.returncode == 0, said
    assert len(cluster.calls("scontrol")) == 3, "not requeued a second time"
    assert sorted(read_losses(run_dir)) == list(range(1, STEPS + 1))
    resume = next(event for event in records(run_dir, "events.jsonl") if event["kind"] == "resume")
    assert resume["step"] == stopped


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slurm_job_that_loses_a_rank_starts_again_in_its_place(cluster, tmp_path):
    run_dir = prepare(cluster, tmp_path)
    with slurm_run(cluster, tmp_path) as running:
        wait_until(lambda: any((run_dir / "checkpoints").glob("step_*")), "a checkpoint", [running])
        os.kill(int(cluster.tasks_file.read_text().split()[2]), signal.SIGKILL)
        said = running.communicate(timeout=300)[1]
    assert running.returncode == 0, said
    assert re.search(r"rank 2 on host \S+ is gone", said)
    assert "attempt 1 of 3: a rank was lost (exit code 137)" in said
    assert len(cluster.calls("srun")) == 2
    assert sorted(read_losses(run_dir)) == list(range(1, STEPS + 1))


def test_the_commands_in_the_readme_are_commands():
    """Every command line there is split as a shell would, and what follows `pretrain` or a script is parsed."""
    text = (ROOT / "examples" / "README.md").read_text()
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    found = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word == "pretrain" or word.endswith(".sh")]
        for start in starts:
            config, _ = parse_pretrain([str(ROOT / words[start + 1]), *words[start + 2 :]])
            assert config.preset
            found += 1
        for word in words:
            if word.endswith((".sh", ".py", ".toml")):
                assert (ROOT / word).exists(), line
    assert found >= 5

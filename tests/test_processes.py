"""One run in several processes, and runs that a signal ends: the same steps as one that is not."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import evaluate_sam3_lora
import inference
import prepare_data
import train_sam3_lora
from sam3_lora import processes
from sam3_lora.loader import build_loader, epoch_batches, share_steps

ROOT = Path(__file__).resolve().parent.parent
TIMED = {"it_per_s", "img_per_s", "memory_gb", "memory_percent"}


def test_a_step_is_shared_whole_and_evenly():
    steps = epoch_batches(11, 4, 2, 7, shuffle=True)
    for count in (1, 2, 3, 5):
        parts = [share_steps(steps, 2, rank, count) for rank in range(count)]
        for step, keys in enumerate(steps):
            own = []
            for batches, sizes in parts:
                assert len(sizes) == len(steps)
                start = sum(sizes[:step])
                own.append([key for b in batches[start : start + sizes[step]] for key in b])
            assert sorted(key for part in own for key in part) == sorted(keys)
            assert max(map(len, own)) - min(map(len, own)) <= 1
        assert all(len(batch) <= 2 for batches, _ in parts for batch in batches)
    assert share_steps(steps, 2, 4, 5) == ([], [0, 0, 0])
    assert share_steps(steps, 4, 0, 1) == (steps, [1, 1, 1])


def test_one_process_needs_no_connection():
    assert (processes.count(), processes.rank(), processes.is_main()) == (1, 0, True)
    with processes.joined():
        assert processes.gather({"a": 1}) == [{"a": 1}]
        assert processes.share([1, 2, 3]) == [1, 2, 3]
        losses = {"loss": torch.tensor(2.0)}
        assert processes.sum_gradients([torch.zeros(3)], losses) is losses


def test_the_command_to_go_on_is_that_of_the_start(monkeypatch):
    words = "train.py", Path("a run/config.yaml")
    rest = "train.py --config 'a run/config.yaml' --resume"
    assert processes.resume_command(*words) == f"python {rest}"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes.resume_command(*words) == f"torchrun --nproc_per_node 2 {rest}"


def test_the_command_names_a_script_on_another_drive_in_full(monkeypatch):
    def relpath(path: str) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    found = processes.resume_command("/d/train.py", Path("config.yaml"))
    assert found == "python /d/train.py --config config.yaml --resume"


@pytest.mark.parametrize(
    ("gpu", "nccl", "backend"),
    [(True, True, "cpu:gloo,cuda:nccl"), (True, False, "gloo"), (False, True, "gloo")],
)
def test_processes_are_connected_by_what_there_is(monkeypatch, gpu, nccl, backend):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("end"))
    with processes.joined():
        assert calls == [backend]
    assert calls == [backend, "end"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fork(work, folder: Path, count: int = 1) -> list[tuple[int, str]]:
    """Runs `work(rank)` in so many connected processes; exit code and stderr of each."""
    folder.mkdir(parents=True, exist_ok=True)
    children, port = [], str(free_port())
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if count > 1:
                    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK")
                    values = map(str, (count, count, rank, rank))
                    os.environ.update(zip(names, values, strict=True))
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                for stream, name in ((1, "out"), (2, "err")):
                    file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.dup2(file, stream)
                sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
                code = work(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, (folder / f"{rank}.err").read_text()) for rank, code in enumerate(codes)]


@pytest.fixture(scope="module")
def data_dir(write_source, tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    for split, count in (("train", 5), ("val", 3)):
        source = write_source(root / f"source_{split}", count)
        args = ["coco", "--coco_json", str(source / "source.json"), "--images_dir", str(source)]
        assert prepare_data.main([*args, "--output_dir", str(root / "data"), "--split", split]) == 0
    return root / "data"


@pytest.fixture
def train_args(tiny_model_dir, data_dir):
    """Arguments of a run of 6 steps in 3 epochs, the last step of each with one image."""

    def build(output: Path, *more: str) -> list[str]:
        return [
            *("--config", str(ROOT / "configs" / "minimal_lora_config.yaml")),
            *("--model_name", str(tiny_model_dir), "--train_data_path", str(data_dir / "train")),
            *("--output_dir", str(output), "--num_workers", "0", "--batch_size", "4"),
            *("--num_epochs", "3", "--logging_steps", "1", "--prompts_per_image", "3"),
            *("--lora_apply_to_mask_decoder", "true", "--learning_rate", "1e-3", *more),
        ]

    return build


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, two: Path, tolerance: float = 0.0) -> None:
    """The same figures logged, but of time and memory, and the same adapters."""
    rows, others = read_log(one), read_log(two)
    assert [r.keys() for r in rows] == [r.keys() for r in others]
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - TIMED:
            assert_close(row[name], other[name], tolerance, tolerance)
    for name in ("best_model", "last_model"):
        mine, theirs = (
            torch.load(run / name / "lora_weights.pt", weights_only=True)["lora"]
            for run in (one, two)
        )
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert float((value - theirs[key]).abs().max()) <= tolerance, key


@pytest.mark.scripts
class TestSeveral:
    def test_two_processes_are_one(self, train_args, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        assert fork(lambda _: train_sam3_lora.main(train_args(one)), tmp_path / "a") == [
            (0, (tmp_path / "a/0.err").read_text())
        ]
        args = train_args(two, "--batch_size", "2", "--max_rows_per_forward", "2")
        results = fork(lambda _: train_sam3_lora.main(args), tmp_path / "b", 2)
        assert [code for code, _ in results] == [0, 0], results
        assert "4 images a step in 2 processes" in results[0][1]
        assert results[1][1] == ""
        assert_same_run(one, two, tolerance=1e-5)
        largest = max(
            float(value.abs().max())
            for value in torch.load(two / "last_model/lora_weights.pt")["lora"].values()
        )
        assert largest > 1e-3

    @pytest.mark.parametrize("first, second", [(2, 1), (1, 3)])
    def test_a_run_goes_on_with_another_number(self, train_args, tmp_path, first, second):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert fork(lambda _: train_sam3_lora.main(train_args(whole)), tmp_path / "a")[0][0] == 0
        args = train_args(cut, "--batch_size", str(4 // first), "--save_steps", "3")

        def stopped(rank: int) -> int:
            stop_at(3, signal.SIGTERM if rank == first - 1 else None)
            return train_sam3_lora.main(args)

        results = fork(stopped, tmp_path / "b", first)
        assert [code for code, _ in results] == [143] * first, results
        rest = [*args, "--resume"]
        results = fork(lambda _: train_sam3_lora.main(rest), tmp_path / "c", second)
        assert [code for code, _ in results] == [0] * second, results
        assert_same_run(whole, cut, tolerance=1e-5)

    def test_fewer_validation_images_than_processes(self, train_args, data_dir, tmp_path):
        val = ["--val_data_path", str(data_dir / "val"), "--max_val_images", "1"]
        one, three = tmp_path / "one", tmp_path / "three"
        args = train_args(one, *val, "--num_epochs", "1", "--batch_size", "6")
        assert fork(lambda _: train_sam3_lora.main(args), tmp_path / "a")[0][0] == 0
        args = train_args(three, *val, "--num_epochs", "1", "--batch_size", "2")
        results = fork(lambda _: train_sam3_lora.main(args), tmp_path / "b", 3)
        assert [code for code, _ in results] == [0] * 3, results
        assert_same_run(one, three, tolerance=1e-5)

    def test_a_killed_process_ends_the_others(self, train_args, tmp_path):
        run = tmp_path / "run"

        def killed(rank: int) -> int:
            if rank == 1:
                stop_at(3, signal.SIGKILL)
            return train_sam3_lora.main(
                train_args(run, "--batch_size", "2", "--save_steps", "2", "--debug")
            )

        (code, text), (other, _) = fork(killed, tmp_path / "a", 2)
        assert (code, other) == (2, -signal.SIGKILL)
        line = text.splitlines()[-1]
        assert line.startswith("error: process 0: expected an answer from all 2 processes")
        assert "--resume" in line
        assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-2"]

    def test_a_second_signal_does_not_keep_them_from_saving(self, train_args, tmp_path):
        """As of a scheduler and torchrun, which both send one."""

        def stopped(_: int) -> int:
            for name in ("end_step", "save_now"):
                original = getattr(train_sam3_lora, name)

                def signalled(run, original=original):
                    os.kill(os.getpid(), signal.SIGTERM)
                    original(run)

                setattr(train_sam3_lora, name, signalled)
            return train_sam3_lora.main(train_args(tmp_path / "run", "--batch_size", "2"))

        results = fork(stopped, tmp_path / "a", 2)
        assert [code for code, _ in results] == [143, 143], results
        assert "finished and saved\n" in results[0][1]
        assert (tmp_path / "run/checkpoint-1").is_dir()

    def test_torchrun_starts_them_and_tells_the_first_error(self, train_args, tmp_path):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--master_port", str(free_port()), str(ROOT / "train_sam3_lora.py")]
        args = train_args(tmp_path / "run", "--batch_size", "2", "--num_epochs", "1")
        done = subprocess.run([*command, *args], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run/last_model/lora_weights.pt").exists()
        bad = subprocess.run(
            [*command, *args, "--lora_rank", "no"], capture_output=True, text=True, check=False
        )
        assert bad.returncode != 0
        assert bad.stderr.count("error: process 0: --lora_rank") == 1
        assert "error: process 1" not in bad.stderr

    def test_evaluation_and_a_folder_of_images(self, train_args, data_dir, tmp_path):
        run = tmp_path / "run"
        args = train_args(run, "--num_epochs", "1")
        assert fork(lambda _: train_sam3_lora.main(args), tmp_path / "a")[0][0] == 0
        weights = ["--lora_weights", str(run / "best_model"), "--device", "cpu"]
        for count in (1, 2):
            out = tmp_path / str(count)
            split = ["--data_dir", str(data_dir), "--split", "train", "--num_workers", "0"]
            flags = [*weights, *split, "--compare", "--output_dir", str(out / "eval")]
            results = fork(lambda _, f=flags: evaluate_sam3_lora.main(f), out / "e", count)
            assert [code for code, _ in results] == [0] * count, results
            tiled = [*weights, *split, "--tile", "0.5", "--output_dir", str(out / "tiled")]
            results = fork(lambda _, f=tiled: evaluate_sam3_lora.main(f), out / "t", count)
            assert [code for code, _ in results] == [0] * count, results
            photos = ["--image", str(data_dir / "train/images"), "--text_prompt", "red part"]
            photos += ["--threshold", "0.01", "--json", str(out / "all.json")]
            photos += ["--output", str(out / "photos")]
            results = fork(lambda _, f=weights + photos: inference.main(f), out / "i", count)
            assert [code for code, _ in results] == [0] * count, results
        one, two = tmp_path / "1", tmp_path / "2"
        for name in ("eval/metrics.json", "eval/detections.json", "eval/base_detections.json"):
            assert_close(*(json.loads((out / name).read_text()) for out in (one, two)))
        for name in ("tiled/detections.json", "all.json"):
            assert (one / name).read_text() == (two / name).read_text()
        assert (one / "e/0.out").read_text() == (two / "e/0.out").read_text() != ""
        assert (two / "e/1.out").read_text() == ""
        names = [sorted(p.name for p in (out / "photos").iterdir()) for out in (one, two)]
        assert names[0] == names[1] and len(names[0]) == 5
        lines = [sum((out / f"i/{r}.out").read_text().count("\n") for r in range(n))
                 for out, n in ((one, 1), (two, 2))]  # fmt: skip
        assert lines == [5, 5]


def assert_close(one, two, relative: float = 1e-9, absolute: float = 1e-12) -> None:
    """Equal JSON, numbers to rounding."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key], relative, absolute)
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_close(left, right, relative, absolute)
    elif isinstance(one, float):
        assert one == pytest.approx(two, rel=relative, abs=absolute)
    else:
        assert one == two


def stop_at(step: int, number: int | None) -> None:
    """Sends this process a signal as it logs a step."""
    original = train_sam3_lora.log_steps

    def log_steps(run, epoch):
        if run.at.step == step and number:
            os.kill(os.getpid(), number)
        return original(run, epoch)

    train_sam3_lora.log_steps = log_steps


@pytest.mark.scripts
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_stopped_run_is_saved_and_goes_on_as_if_it_had_not(
        self, train_args, data_dir, tmp_path, number
    ):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        more = ["--val_data_path", str(data_dir / "val"), "--eval_steps", "1"]
        more += ["--mask_loss", "points", "--lora_dropout", "0.2", "--save_total_limit", "1"]
        more += ["--logging_steps", "4", "--num_workers", "1"]
        assert train_sam3_lora.main(train_args(whole, *more)) == 0
        args = train_args(cut, *more)
        step = random.Random(number).choice([1, 2, 3])

        def stopped(_: int) -> int:
            original = train_sam3_lora.end_step

            def end_step(run):
                if run.at.step == step:  # within it: the evaluation of this step is left out
                    os.kill(os.getpid(), number)
                original(run)

            train_sam3_lora.end_step = end_step
            return train_sam3_lora.main(args)

        ((code, text),) = fork(stopped, tmp_path / "a")
        assert code == 128 + number
        assert "this step is finished and saved" in text
        last = text.splitlines()[-1]
        assert f"stopped at step {step}; to go on: python" in last
        assert (cut / f"checkpoint-{step}").is_dir()
        words = last.split("to go on: python ")[1].split()
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=False, cwd=Path.cwd()
        )
        assert done.returncode == 0, done.stderr
        assert_same_run(whole, cut)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_to_all_processes_of_a_run(self, train_args, tmp_path, number):
        def stopped(_: int) -> int:
            original = train_sam3_lora.log_steps

            def log_steps(run, epoch):
                if run.at.step == 2:
                    os.killpg(0, number)
                    time.sleep(0.5)
                return original(run, epoch)

            os.setpgrp()
            train_sam3_lora.log_steps = log_steps
            flags = ("--num_workers", "2", "--batch_size", "1", "--num_epochs", "4")
            return train_sam3_lora.main(train_args(tmp_path / "run", *flags))

        ((code, text),) = fork(stopped, tmp_path / "a")
        assert code == 128 + number
        assert text.count(f"{signal.Signals(number).name}:") == 1
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]

    def test_a_second_signal_ends_it_at_once(self, train_args, tmp_path):
        def stopped(_: int) -> int:
            def end_step(run):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

            train_sam3_lora.end_step = end_step
            return train_sam3_lora.main(train_args(tmp_path / "run"))

        ((code, text),) = fork(stopped, tmp_path / "a")
        assert code == 130
        assert text.endswith("interrupted\n")
        assert not list((tmp_path / "run").glob("*checkpoint*"))

    def test_what_is_ignored_stays_so(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with processes.watch() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                signals.check()
                assert signal.getsignal(signal.SIGTERM) == signals.receive
            assert signal.getsignal(signal.SIGTERM) != signals.receive
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_terminal_that_is_gone_does_not_keep_a_run_from_its_end(self, tmp_path):
        def stopped(_: int) -> int:
            reader, writer = os.pipe()
            os.close(reader)
            before = os.dup(2)
            os.dup2(writer, 2)  # writing to it fails
            with processes.watch() as watching:
                os.kill(os.getpid(), signal.SIGHUP)
                os.dup2(before, 2)
                watching.check()

        ((code, text),) = fork(stopped, tmp_path / "a")
        assert text.splitlines()[-1] == f"sam3_lora.processes.Stopped: {128 + signal.SIGHUP}"

    def test_a_killed_loader_process_ends_the_run_in_order(self, train_args, tmp_path):
        def killed(_: int) -> int:
            original = train_sam3_lora.log_steps

            def log_steps(run, epoch):
                if run.at.step == 3:
                    for child in Path("/proc/self/task").glob("*/children"):
                        for pid in child.read_text().split():
                            os.kill(int(pid), signal.SIGKILL)
                return original(run, epoch)

            train_sam3_lora.log_steps = log_steps
            args = train_args(tmp_path / "run", "--num_workers", "1", "--batch_size", "1")
            return train_sam3_lora.main([*args, "--num_epochs", "2"])

        if not Path("/proc/self/task").is_dir():
            pytest.skip("needs /proc to find the children")
        ((code, text),) = fork(killed, tmp_path / "a")
        assert code == 2
        lines = text.splitlines()
        assert lines[-1].startswith("error: expected 1 processes that load images")
        assert "to go on: python" in lines[-2]
        assert list((tmp_path / "run").glob("checkpoint-*"))


ITEM = {"image_id": 7, "original_size": (1, 1), "texts": [], "category_ids": [], "targets": []}


class Slow:
    """Items without prompts, each in a fifth of a second."""

    def __getitem__(self, key: tuple[int, int]) -> dict:
        time.sleep(0.2)
        return ITEM | {"image_id": key[1]}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_all_ends_no_process_that_loads_images(number):
    ids: list[int] = []
    for batch in build_loader(Slow(), [[(0, i)] for i in range(6)], num_workers=1):
        ids += batch["image_ids"]
        for child in multiprocessing.active_children() if len(ids) == 1 else ():
            os.kill(child.pid, number)
    assert ids == list(range(6))
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks at /proc for the processes")
def test_a_run_that_is_killed_leaves_no_process_that_loads_images(tmp_path):
    def killed(_: int) -> int:
        batches = iter(build_loader(Slow(), [[(0, i)] for i in range(99)], num_workers=2))
        next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    assert fork(killed, tmp_path)[0][0] == -signal.SIGKILL
    pids, until = [int(pid) for pid in (tmp_path / "0.out").read_text().split()], time.time() + 4
    while any(map(is_alive, pids)) and time.time() < until:
        time.sleep(0.1)
    assert len(pids) == 2 and not any(map(is_alive, pids))


@pytest.mark.scripts
def test_images_are_loaded_however_processes_are_started():
    """By a server too, Python's choice from 3.14 on: it is not the training process's child."""
    data = dict.fromkeys([(0, 0), (0, 1)], ITEM)
    code = "import multiprocessing; multiprocessing.set_start_method('forkserver'); "
    code += "from sam3_lora.loader import build_loader; "
    code += f"loader = build_loader({data}, [[(0, 0), (0, 1)]], 1); "
    code += "print([batch['image_ids'] for batch in loader])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout == "[[7, 7]]\n", done.stderr

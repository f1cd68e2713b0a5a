"""Runs that a signal, a kill or their data ends: saved, and gone on with as if they had not."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same_run, at_step, fork

import train_sam3_lora
from sam3_lora import processes
from sam3_lora.loader import build_loader

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.scripts
class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_stopped_run_is_saved_and_goes_on_as_if_it_had_not(
        self, train_args, run_data, tmp_path, number
    ):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        more = ["--val_data_path", str(run_data / "val"), "--eval_steps", "1"]
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
            os.setpgrp()
            at_step(2, lambda: (os.killpg(0, number), time.sleep(0.5)))
            flags = ("--num_workers", "2", "--batch_size", "1", "--num_epochs", "4")
            return train_sam3_lora.main(train_args(tmp_path / "run", *flags))

        ((code, text),) = fork(stopped, tmp_path / "a")
        assert code == 128 + number
        assert text.count(f"{signal.Signals(number).name}:") == 1
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]

    def test_two_runs_do_not_share_a_folder(self, train_args, tmp_path):
        run = tmp_path / "run"

        def start_another() -> None:
            command = [sys.executable, str(ROOT / "train_sam3_lora.py"), *train_args(run)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 2
            assert "error: output_dir: expected a folder that no other run" in done.stderr

        def first(_: int) -> int:
            at_step(2, start_another)
            return train_sam3_lora.main(train_args(run))

        ((code, text),) = fork(first, tmp_path / "a")
        assert code == 0, text
        assert not (tmp_path / "run.1").exists()
        # It is free again.
        assert fork(lambda _: train_sam3_lora.main(train_args(run)), tmp_path / "c")[0][0] == 0
        assert (tmp_path / "run.1").exists()

    def test_a_run_does_not_go_on_with_other_data(self, train_args, run_data, tmp_path, capsys):
        args = train_args(tmp_path / "run")
        assert train_sam3_lora.main(args) == 0
        more = ["--resume", "--num_epochs", "9", "--train_data_path", str(run_data / "val")]
        assert train_sam3_lora.main([*args, *more]) == 2
        assert "began with, of 5 images or tiles, found one of 3" in capsys.readouterr().err

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
        def kill_children() -> None:
            for children in Path("/proc/self/task").glob("*/children"):
                for pid in children.read_text().split():
                    os.kill(int(pid), signal.SIGKILL)

        def killed(_: int) -> int:
            at_step(3, kill_children)
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


@pytest.mark.scripts
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
@pytest.mark.scripts
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

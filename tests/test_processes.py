"""One run in several processes, and runs that a signal ends: the same steps as one that is not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_close, assert_same_run, at_step, fork, free_port

import evaluate_sam3_lora
import inference
import train_sam3_lora
from sam3_lora import processes
from sam3_lora.loader import epoch_batches, share_steps

ROOT = Path(__file__).resolve().parent.parent


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
            if rank == first - 1:
                at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
            return train_sam3_lora.main(args)

        results = fork(stopped, tmp_path / "b", first)
        assert [code for code, _ in results] == [143] * first, results
        rest = [*args, "--resume"]
        results = fork(lambda _: train_sam3_lora.main(rest), tmp_path / "c", second)
        assert [code for code, _ in results] == [0] * second, results
        assert_same_run(whole, cut, tolerance=1e-5)

    def test_fewer_validation_images_than_processes(self, train_args, run_data, tmp_path):
        val = ["--val_data_path", str(run_data / "val"), "--max_val_images", "1"]
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
                at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
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

    def test_evaluation_and_a_folder_of_images(self, train_args, run_data, tmp_path):
        run = tmp_path / "run"
        args = train_args(run, "--num_epochs", "1")
        assert fork(lambda _: train_sam3_lora.main(args), tmp_path / "a")[0][0] == 0
        weights = ["--lora_weights", str(run / "best_model"), "--device", "cpu"]
        for count in (1, 2):
            out = tmp_path / str(count)
            split = ["--data_dir", str(run_data), "--split", "train", "--num_workers", "0"]
            flags = [*weights, *split, "--compare", "--output_dir", str(out / "eval")]
            results = fork(lambda _, f=flags: evaluate_sam3_lora.main(f), out / "e", count)
            assert [code for code, _ in results] == [0] * count, results
            tiled = [*weights, *split, "--tile", "0.5", "--output_dir", str(out / "tiled")]
            results = fork(lambda _, f=tiled: evaluate_sam3_lora.main(f), out / "t", count)
            assert [code for code, _ in results] == [0] * count, results
            photos = ["--image", str(run_data / "train/images"), "--text_prompt", "red part"]
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

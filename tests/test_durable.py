"""What a kill, a full disk or a damaged file leaves of a run: always something to go on from."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch

import train_sam3_lora
from lora_layers import AdapterError, LoRAConfig, apply_lora
from sam3_lora.checkpoint import (
    ADAPTER_FILE,
    STATE_FILE,
    check_folder,
    checkpoints,
    read_adapter,
    read_checkpoint,
    remove_old_checkpoints,
    restore,
    rng_state,
    save_adapter,
    save_checkpoint,
)
from sam3_lora.files import set_aside, write_text
from sam3_lora.runlog import RunLog

LORA = LoRAConfig(rank=2, alpha=4.0, target_modules=("fc1",), components=("detr_decoder",))
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows cannot fork")


@pytest.fixture(scope="module")
def model(loaded):
    adapted = deepcopy(loaded[0])
    apply_lora(adapted, LORA)
    return adapted


def optimizer_of(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def adapter_of(model) -> dict:
    return {"model": model, "lora": LORA, "base_model": "somewhere"}


def save(run: Path, model, step: int, figure: list[float] | None = None) -> Path:
    state = {
        "optimizer": optimizer_of(model).state_dict(),
        "scaler": {},
        "best": None,
        "rng": [rng_state()],
    }
    return save_checkpoint(run, step, state | {"figure": figure}, adapter_of(model))


@pytest.fixture(scope="module")
def template(model, tmp_path_factory) -> Path:
    """A run with a best model and two checkpoints, of which the first is the better."""
    run = tmp_path_factory.mktemp("template") / "run"
    save(run, model, 10, [0.5])
    save(run, model, 20, [0.4])
    save_adapter(run / "best_model" / ADAPTER_FILE, **adapter_of(model))
    write_text(run / "train.log", "a line")
    return run


@pytest.fixture
def run(template, tmp_path) -> Path:
    return shutil.copytree(template, tmp_path / "run")


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """What a forked process's exit status was, and what its error said."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read().decode()
    return os.waitpid(child, 0)[1], said


# Killed at each operation -------------------------------------------------------------------------


def killed_at(count: int, work: Callable[[], object]) -> bool:
    """Does the work in a process that is killed before its count-th operation that changes the
    disk; whether it had so many."""
    left = count

    def tick() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, args: tuple) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            tick()

    def watched() -> None:
        real = os.fsync
        os.fsync = lambda handle: (tick(), real(handle))
        sys.addaudithook(watch)
        work()

    status, said = in_child(watched)
    assert not said
    return os.WIFSIGNALED(status)


def assert_whole(run: Path) -> None:
    """The best model and every checkpoint can be read, and there is one."""
    read_adapter(run / "best_model")
    assert checkpoints(run)
    for folder in checkpoints(run):
        read_adapter(folder)
        read_checkpoint(folder)


@pytest.mark.scripts
@forks
def test_a_kill_at_any_operation_leaves_a_run_to_go_on_with(model, template, tmp_path) -> None:
    def work(run: Path) -> None:
        save(run, model, 30)
        save_adapter(run / "best_model" / ADAPTER_FILE, **adapter_of(model))
        save(run, model, 30, [0.3])  # again, with the figure
        remove_old_checkpoints(run, 1)  # that of step 20

    count = 0
    while True:
        run = shutil.copytree(template, tmp_path / str(count))
        killed = killed_at(count, partial(work, run))
        assert_whole(run)
        names = [folder.name for folder in checkpoints(run)]
        assert names[0] == "checkpoint-10" and (killed or names[1:] == ["checkpoint-30"])
        save(run, model, 40)
        remove_old_checkpoints(run, 1)
        assert_whole(run)
        assert [folder.name for folder in checkpoints(run)] == ["checkpoint-10", "checkpoint-40"]
        assert leftovers(run) == []
        if not killed:
            break
        count += 1
    # 4 files of opening, writing to the disk and renaming; 1 folder renamed; 1 folder removed.
    assert count > 4 * 3 + 2 + 4


@pytest.mark.scripts
@forks
def test_a_kill_at_any_operation_of_replacing_a_run_leaves_it_or_none(template, tmp_path) -> None:
    count, killed = 0, True
    while killed:
        place = tmp_path / str(count)
        run = shutil.copytree(template, place / "run")
        killed = killed_at(count, partial(set_aside, run, replace=True))
        if run.exists():
            assert_whole(run)
            assert len(checkpoints(run)) == 2
        set_aside(run)
        assert leftovers(place) == []
        count += 1
    assert count > 10


# What cannot be written ---------------------------------------------------------------------------


@forks
def test_a_file_beyond_the_limit_leaves_the_checkpoint_before(run, model) -> None:
    import resource

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        save(run, model, 30)

    before = sorted(run.rglob("*"))
    _, said = in_child(work)
    assert said.startswith("OSError: ") and "checkpoint-30" in said and "File too large" in said
    assert said.endswith(f"then --resume goes on from {run / 'checkpoint-20'}")
    assert sorted(run.rglob("*")) == before
    assert_whole(run)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_the_system_says_is_told_with_the_file(run, model, number, monkeypatch) -> None:
    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as stream:
            stream.write(bytes(content)[: len(content) // 2])
        raise OSError(number, os.strerror(number))

    def add(path: Path) -> None:
        log = RunLog(path.parent)
        path.unlink()
        path.mkdir()  # what nobody can add a line to
        log.add_row({"step": 1})

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError) as error:
        save(run, model, 30)
    message = str(error.value)
    assert os.strerror(number) in message and ADAPTER_FILE in message and "make room" in message
    assert message.endswith(f"--resume goes on from {run / 'checkpoint-20'}")
    with pytest.raises(OSError, match=f"best_model.*{os.strerror(number)}"):
        save_adapter(run / "best_model" / ADAPTER_FILE, **adapter_of(model))
    with pytest.raises(OSError, match=f"checkpoint-20.*{os.strerror(number)}"):
        save(run, model, 20, [0.9])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before
    assert_whole(run)
    monkeypatch.undo()
    for name, work in (("train.log/below.txt", partial(write_text, text="x")), ("log.jsonl", add)):
        with pytest.raises(OSError, match=f"{name}: expected to write it, found: .*; make room"):
            work(run / name)


@pytest.mark.parametrize("place", ["/proc/none/run", "{}/file/run", "{}/file"])
def test_a_folder_that_cannot_hold_a_run_is_told_first(place, tmp_path, capsys) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("no place that nobody may write to")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert train_sam3_lora.main(["--output_dir", place.format(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "--output_dir" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_cannot_be_moved_is_told_first(run, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        "sam3_lora.checkpoint.check_writable", lambda folder, flag: seen.append(folder)
    )
    check_folder(run, resume=True)
    assert seen == [run]
    check_folder(run, resume=False)
    assert seen[1:] == [run, run.parent]


# What cannot be read ------------------------------------------------------------------------------


class Evil:
    """Runs a command when a loader allows code."""

    def __reduce__(self):
        return os.system, ("touch witness",)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(folder: Path, **changes: object) -> None:
    state = torch.load(folder / STATE_FILE, weights_only=True) | changes
    torch.save({k: v for k, v in state.items() if v is not None}, folder / STATE_FILE)


DAMAGES = {
    "state cut": lambda folder: cut(folder / STATE_FILE),
    "adapter cut": lambda folder: cut(folder / ADAPTER_FILE),
    "state gone": lambda folder: (folder / STATE_FILE).unlink(),
    "adapter gone": lambda folder: (folder / ADAPTER_FILE).unlink(),
    "empty": lambda folder: (folder / STATE_FILE).write_bytes(b""),
    "another's": lambda folder: torch.save(torch.zeros(2), folder / STATE_FILE),
    "of another step": lambda folder: change(folder, step=10),
    "without an optimizer": lambda folder: change(folder, optimizer=None),
    "another optimizer": lambda folder: change(folder, optimizer={"param_groups": []}),
    "no states of generators": lambda folder: change(folder, rng=[1]),
    "code": lambda folder: change(folder, figure=Evil()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_one_before(run, model, damage, monkeypatch) -> None:
    monkeypatch.chdir(run)
    DAMAGES[damage](run / "checkpoint-20")
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler(enabled=False)
    with pytest.raises(AdapterError) as error:
        restore(run / "checkpoint-20", model, optimizer, scaler)
    message = str(error.value)
    assert message.startswith("--resume: expected a complete checkpoint in ")
    assert str(run / "checkpoint-20") in message
    assert message.endswith("; remove that folder to go on from checkpoint-10")
    assert not (run / "witness").exists()
    restore(run / "checkpoint-10", model, optimizer, scaler)


def test_the_only_checkpoint_damaged(run, model) -> None:
    cut(run / "checkpoint-10" / STATE_FILE)
    with pytest.raises(AdapterError, match="; drop --resume$"):
        restore(
            run / "checkpoint-10", model, optimizer_of(model), torch.amp.GradScaler(enabled=False)
        )


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "optimizer" not in name])
def test_an_old_damaged_checkpoint_does_not_stop_a_run(run, model, damage, monkeypatch) -> None:
    monkeypatch.chdir(run)
    DAMAGES[damage](run / "checkpoint-20")
    save(run, model, 30)
    remove_old_checkpoints(run, 1)
    assert "checkpoint-10" in [folder.name for folder in checkpoints(run)]
    assert not (run / "witness").exists()

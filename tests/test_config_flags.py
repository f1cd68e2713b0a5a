"""Flags, and what surrounds every main: one line for a user's error, exit codes, the log."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sam3_lora import config as config_module
from sam3_lora.config import (
    Config,
    ConfigError,
    config_from_args,
    setup_logging,
    user_errors,
)
from sam3_lora.flags import FlagParser, add_config_flags

ROOT = Path(__file__).resolve().parent.parent


def parser() -> FlagParser:
    """A parser with the flag of every key."""
    made = FlagParser("A script.", prog="script.py")
    add_config_flags(made)
    return made


def from_flags(*words: str) -> Config:
    """The configuration of a command line."""
    return config_from_args(parser().parse_args(list(words)))


def parser_refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the parser says when it exits, with code 2 and one line."""
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(words)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("error: ")
    return message


def test_no_flag_is_the_defaults() -> None:
    assert from_flags() == Config()


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  batch_size: 2\n  num_epochs: 3\n", encoding="utf-8")
    config = from_flags("--config", str(path), "--batch_size", "8")
    training = config.training
    assert (training.batch_size, training.num_epochs, training.warmup_steps) == (8, 3, 100)


def test_a_component_flag_sets_only_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lora:\n  apply_to_detr_decoder: true\n", encoding="utf-8")
    config = from_flags("--config", str(path), "--lora_apply_to_mask_decoder")
    assert config.lora.apply_to_detr_decoder and config.lora.apply_to_mask_decoder
    assert not config.lora.apply_to_vision_encoder
    config = from_flags("--lora_apply_to_vision_encoder", "false")
    assert config.lora.apply_to_detr_decoder and not config.lora.apply_to_vision_encoder


def test_guide_overrides_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    line = "--batch_size 8 --learning_rate 2e-4 --num_epochs 20 --lora_rank 16"
    config = from_flags("--config", "configs/base_config.yaml", *line.split())
    training = config.training
    assert (training.batch_size, training.learning_rate) == (8, 2e-4)
    assert (training.num_epochs, config.lora.rank) == (20, 16)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--overwrite"], True),
        (["--overwrite", "true"], True),
        (["--overwrite=false"], False),
        (["--overwrite", "--seed", "1"], True),
        ([], False),
    ],
)
def test_boolean_flag_with_and_without_a_value(words: list[str], expected: bool) -> None:
    assert from_flags(*words).output.overwrite is expected


@pytest.mark.parametrize("words", [["q_proj", "v_proj"], ["q_proj,v_proj"], ["q_proj,", "v_proj"]])
def test_list_flag_takes_spaces_and_commas(words: list[str]) -> None:
    config = from_flags("--lora_target_modules", *words)
    assert config.lora.target_modules == ("q_proj", "v_proj")


def test_home_is_found_without_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(ROOT))
    made = FlagParser("A script.")
    made.add_argument_group("what to run on").add_argument("--image", type=Path)
    assert made.parse_args(["--image=~/a.jpg"]).image == ROOT / "a.jpg"
    assert made.parse_args(["--image", "~x/a.jpg"]).image == Path("~x/a.jpg")


def test_flag_takes_null() -> None:
    config = from_flags("--max_steps", "null", "--val_data_path", "none")
    assert config.training.max_steps is None and config.training.val_data_path is None


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--learing_rate", "did you mean --learning_rate?"),
        ("--learn", "unknown flag --learn"),
        ("--batch-size=4", "unknown flag --batch-size, did you mean --batch_size?"),
        ("--lr", "did you mean --learning_rate?"),
        ("--rank", "did you mean --lora_rank?"),
        ("--zzzz", "none is like it"),
    ],
)
def test_unknown_flag_names_the_nearest(
    word: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in parser_refusal([word, "4"], capsys)


def test_unknown_flag_is_reported_before_the_missing_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = FlagParser("A script.")
    made.add_argument("--image", required=True)
    with pytest.raises(SystemExit):
        made.parse_args(["--imge", "a.jpg"])
    assert "unknown flag --imge, did you mean --image?" in capsys.readouterr().err


def test_other_errors_of_the_parser_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected one argument" in parser_refusal(["--batch_size"], capsys)
    assert "unrecognized arguments: word" in parser_refusal(["word"], capsys)


def test_what_is_missing_is_told_as_all_errors_are(capsys: pytest.CaptureFixture[str]) -> None:
    made = FlagParser("A script.")
    made.add_argument("--source", required=True)
    either = made.add_mutually_exclusive_group(required=True)
    either.add_argument("--image")
    either.add_argument("--video")
    for words, told in (
        (["--image", "a"], "error: expected --source, found none (see "),
        (["--source", "a"], "error: expected one of --image --video, found none (see "),
    ):
        with pytest.raises(SystemExit):
            made.parse_args(words)
        assert capsys.readouterr().err.startswith(told)


def test_values_with_spaces_and_dashes_are_values() -> None:
    made = FlagParser("A script.")
    made.add_argument("--text_prompt")
    assert made.parse_args(["--text_prompt", "-- a dash"]).text_prompt == "-- a dash"


def test_sub_commands_have_debug_and_hints(capsys: pytest.CaptureFixture[str]) -> None:
    made = FlagParser("A script.")
    commands = made.add_subparsers(required=True)
    commands.add_parser("coco").add_argument("--coco_json")
    assert made.parse_args(["coco", "--coco_json", "a.json", "--debug"]).debug
    with pytest.raises(SystemExit):
        made.parse_args(["coco", "--coco_jsn", "a.json"])
    assert "unknown flag --coco_jsn, did you mean --coco_json?" in capsys.readouterr().err


def test_sections_choose_the_flags() -> None:
    made = FlagParser("A script.")
    add_config_flags(made, ["hardware"])
    made.add_argument("--seed", type=int, default=None)
    args = made.parse_args(["--device", "cpu"])
    assert config_from_args(args).hardware.device == "cpu"
    with pytest.raises(SystemExit):
        made.parse_args(["--batch_size", "4"])


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in config_module.KEYS:
        assert f"--{flag} " in text
    assert "images per micro-batch (default: 4)" in text


class DataError(ValueError):
    """Stands for an error of a module."""


def run_main(error: BaseException | None, argv: list[str] | None = None) -> int:
    """The exit code of a main that raises `error`."""

    @user_errors(DataError)
    def main(argv: list[str] | None = None) -> int:
        if error is not None:
            raise error
        return 0

    return main(argv)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (DataError("no images\n in a.json"), 2, "error: no images in a.json\n"),
        (ConfigError("bad"), 2, "error: bad\n"),
        (FileNotFoundError(2, "No such file or directory", "a.jpg"), 2, "a.jpg"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(0), 0, ""),
        (SystemExit(None), 0, ""),
        (SystemExit(2), 2, ""),
    ],
)
def test_user_errors_are_one_line_and_a_code(
    error: BaseException | None, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(error, []) == code
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == bool(line) and captured.out == ""


def test_debug_keeps_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(DataError("bad"), ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["script.py", "--debug"])
    assert run_main(DataError("bad")) == 2
    captured = capsys.readouterr().err
    assert "Traceback" in captured and captured.endswith("error: bad\n")
    monkeypatch.setattr(sys, "argv", ["script.py"])
    assert run_main(DataError("bad")) == 2
    assert capsys.readouterr().err == "error: bad\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(ZeroDivisionError(), [])


@pytest.mark.scripts
def test_interpreter_exits_with_one_line() -> None:
    code = (
        "import sys\n"
        "from sam3_lora.config import *\n"
        "from sam3_lora.flags import *\n"
        "@user_errors()\n"
        "def main(argv=None):\n"
        "    parser = FlagParser('x')\n"
        "    add_config_flags(parser)\n"
        "    config_from_args(parser.parse_args(argv))\n"
        "    return 0\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", code, "--lora_rank", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --lora_rank: lora.rank is 'x', expected a whole number")
    assert done.stderr.count("\n") == 1


def test_logging_goes_to_stderr_and_to_the_end_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    # Those of an earlier call, of another test, are replaced.
    before = [h for h in root.handlers if h.get_name() != setup_logging.__module__]
    path = tmp_path / "run" / "train.log"
    try:
        for _ in range(2):
            setup_logging(path)
            logging.getLogger("sam3_lora.test").info("one line")
        assert path.read_text(encoding="utf-8").count("INFO one line\n") == 2
        captured = capsys.readouterr()
        assert captured.err.count("one line") == 2 and captured.out == ""
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
        assert all(handler in root.handlers for handler in before)
    finally:
        for handler in [item for item in root.handlers if item not in before]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(logging.WARNING)

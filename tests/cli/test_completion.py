"""What TAB offers: in this process for all kinds of words, and in a real bash for the script."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import wait_until
from vlm.cli.completion import SHELLS, find_candidates
from vlm.cli.main import COMMANDS, main
from vlm.config.packaged import group_names, run_names

RUN = ["-cn", "finetune-smol"]


def offered(*words: str) -> list[str]:
    return find_candidates(words, COMMANDS)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, records and a YAML of the user's own, to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "first" / "final").mkdir(parents=True)
    (tmp_path / "records.json").write_text("[]")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dinov2.yaml").write_text("defaults: [pretrain-smol, _self_]")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_commands_and_options_begin_a_line():
    assert offered("") == [*COMMANDS, "-cn", "--config-dir", "--help", "--version"]
    assert offered("ge") == ["generate"]
    assert offered("-") == ["-cn", "--config-dir", "--help", "--version"]


def test_runs_follow_cn(files: Path):
    assert offered("-cn", "") == sorted(run_names())
    assert offered("launch", "--nproc", "2", "--", "-cn", "pretrain-sm") == ["pretrain-smol"]
    assert offered("--config-dir", "mine", "-cn", "din") == ["dinov2"]
    assert offered("--config-name=finetune-sm") == ["--config-name=finetune-smol"]
    assert offered("data", "show", "-cn", "finetune-sm") == ["finetune-smol"]
    assert offered("generate", "x", "-cn", "finetune-sm") == ["finetune-smol"]


def test_groups_come_with_their_choices():
    assert {f"{name}=" for name in group_names() if name.startswith("model/")} == set(offered(*RUN, "model/"))
    assert "model/language_model=qwen2.5-0.5b" in offered(*RUN, "model/language_model=qw")
    assert offered(*RUN, "trainer/deepspeed=zero") == [f"trainer/deepspeed=zero{stage}" for stage in range(4)]


def test_keys_are_offered_section_by_section():
    assert offered(*RUN, "tr") == ["trainer.", *(f"{name}=" for name in group_names() if name.startswith("trainer/"))]
    assert offered(*RUN, "trainer.learn") == ["trainer.learning_rate."]
    assert "trainer.learning_rate.connector_learning_rate=" in offered(*RUN, "trainer.learning_rate.")
    assert offered(*RUN, "trainer.num_train_e") == ["trainer.num_train_epochs="]
    assert offered(*RUN, "++trainer.num_train_e") == ["++trainer.num_train_epochs="]
    assert offered(*RUN, "trainer.nothing") == []


def test_values_are_those_that_a_key_may_have(files: Path):
    assert offered(*RUN, "trainer.bf16=") == ["trainer.bf16=true", "trainer.bf16=false"]
    assert offered(*RUN, "dataset.over_length=s") == ["dataset.over_length=skip", "dataset.over_length=split"]
    assert offered(*RUN, "dataset.path=rec") == ["dataset.path=records.json"]
    assert offered(*RUN, "trainer.from_pretrained=outputs/first/") == ["trainer.from_pretrained=outputs/first/final/"]
    assert offered(*RUN, "trainer.max_steps=") == []


def test_names_of_tables_are_offered(files: Path):
    assert offered(*RUN, "dataset.format=cap") == ["dataset.format=caption"]
    assert offered(*RUN, "dataset.format=rec") == ["dataset.format=records.json"]  # a reader of one's own
    assert offered(*RUN, "dataset.template=tok") == ["dataset.template=tokenizer"]
    assert offered("eval", "x", "--format", "cap") == ["caption"]
    assert offered("eval", "x", "--metrics", "exact_match,ci") == ["exact_match,cider"]
    assert offered("eval", "x", "--metrics", "lo") == ["loss"]


def test_checkpoints_are_paths(files: Path):
    assert offered("generate", "out") == ["outputs/"]
    assert offered("generate", "outputs/first/") == ["outputs/first/final/"]
    assert offered("chat", "./rec") == ["./records.json"]
    assert offered("chat", "nowhere/") == []
    assert ".hidden/" not in offered("chat", "")
    assert offered("chat", ".h") == [".hidden/"]


def test_options_of_a_command_come_with_their_choices(files: Path):
    assert offered("generate", "x", "--max-n") == ["--max-new-tokens"]
    assert offered("generate", "x", "--dtype", "f") == ["float32", "float16"]
    assert offered("generate", "x", "--dtype=f") == ["--dtype=float32", "--dtype=float16"]
    assert offered("export", "x", "y", "--format", "g") == ["gguf"]
    assert offered("generate", "x", "--image", "rec") == ["records.json"]
    assert offered("generate", "--overwrite", "rec") == ["records.json"]
    assert offered("completion", "") == list(SHELLS)
    assert "show" in offered("data", "")
    assert "qwen2.5-vl-3b" in offered("models", "qwen2.5-v")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "data"])
def test_every_command_offers_options(command: str):
    assert "--help" in offered(command, "--")


def test_an_answer_needs_neither_torch_nor_hydra():
    code = (
        "import sys; from vlm.cli.main import main\n"
        "for words in (['-cn', 'x', 'trainer.l'], ['verify', '--'], ['generate', 'x', '--dtype', ''], ['data', '']):\n"
        "    main(['__complete', *words])\n"
        "print([name for name in ('torch', 'hydra', 'omegaconf', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_has_a_script_that_asks_vlm(shell: str, capsys: pytest.CaptureFixture[str]):
    main(["completion", shell])
    script = capsys.readouterr().out
    assert "__complete" in script
    if interpreter := shutil.which(shell):
        subprocess.run([interpreter, "-n"], input=script, text=True, check=True)


ASK_BASH = """
vlm() {{ "{python}" -m vlm "$@"; }}
eval "$(vlm completion bash)"
ask() {{
    COMP_LINE=$1 COMP_POINT=${{#1}}
    compopt() {{ echo "compopt $*"; }}
    _vlm_complete vlm
    echo "${{COMPREPLY[*]}}"
}}
ask "vlm gene"
ask "vlm -cn finetune-smol model/language_model=qwen2.5-0"
ask "X=1 vlm -cn finetune-smol trainer.learn"
ask "vlm generate x --dtype "
ask 'vlm generate my\\ data/'
ask "vlm generate 'my"
"""


def test_a_real_bash_gets_what_follows_the_last_break_of_a_word(spaced: Path):
    """readline breaks words at = and : and puts in what the script returns behind the last one."""
    done = subprocess.run(
        ["bash", "--norc"], input=ASK_BASH.format(python=sys.executable), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "generate", "qwen2.5-0.5b", "compopt -o nospace", "trainer.learning_rate.", "auto float32 bfloat16 float16",
        "compopt -o filenames", "my data/a b.json", "compopt -o filenames", "compopt -o nospace", "my data/",
    ], done.stderr  # fmt: skip


@pytest.fixture
def spaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, whose only file has spaces in its path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "a b.json").write_text("[]")
    return tmp_path


TYPED = {
    "vlm gene": "vlm generate ",
    "vlm -cn finetune-sm": "vlm -cn finetune-smol ",
    "vlm -cn finetune-smol model/language_model=qwen2.5-0": (
        "vlm -cn finetune-smol model/language_model=qwen2.5-0.5b "
    ),
    "vlm -cn finetune-smol trainer.learn": "vlm -cn finetune-smol trainer.learning_rate.",
    "vlm -cn finetune-smol dataset.path=my": r"vlm -cn finetune-smol dataset.path=my\ data/",
    r"vlm generate my\ data/": r"vlm generate my\ data/a\ b.json ",
    "vlm generate ~/.bas": "vlm generate ~/.basis/",
}
"""A line as it is typed -> the line after TAB."""
ZSH = """
vlm() {{ "{python}" -m vlm "$@" }}
eval "$(vlm completion zsh)"
report() {{ print -r -- "$BUFFER" >> "$HOME/lines"; BUFFER= }}
zle -N report
bindkey '^X' report
print ready >> "$HOME/lines"
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_a_real_zsh_completes_what_is_typed(spaced: Path):
    """Without a ~/.zshrc that loads completions: the script does that."""
    home = spaced / ".home"
    (home / ".basis").mkdir(parents=True)
    (home / "init").write_text(ZSH.format(python=sys.executable))
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "HOME": str(home), "TERM": "dumb"})
    os.set_blocking(terminal, False)

    def has_lines(number: int) -> bool:
        """Whether there are so many lines; what the shell shows is read, so that it goes on."""
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 1 << 16)
        return (home / "lines").exists() and len((home / "lines").read_text().splitlines()) >= number

    try:
        os.write(terminal, b"source $HOME/init\n")
        wait_until(lambda: has_lines(1))
        for number, line in enumerate(TYPED, start=2):
            os.write(terminal, f"{line}\t\x18".encode())
            wait_until(lambda number=number: has_lines(number))
        assert (home / "lines").read_text().splitlines()[1:] == list(TYPED.values())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_a_real_fish_is_offered_what_fits(spaced: Path):
    script = f'function vlm; "{sys.executable}" -m vlm $argv; end; vlm completion fish | source\n'
    asked = {line: whole.split()[-1] for line, whole in TYPED.items() if "\\" not in whole and "~" not in line}
    asked["vlm generate my"] = "my data/"
    script += "".join(f"complete -C '{line}'\n" for line in asked)
    done = subprocess.run(
        ["fish", "--no-config"], input=script, capture_output=True, text=True, check=True,
        env={**os.environ, "HOME": str(spaced)},
    )  # fmt: skip
    assert done.stdout.splitlines() == list(asked.values()), done.stderr

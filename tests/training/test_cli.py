"""Commands: which values win, what is refused, how YAML becomes flags, and how errors become exit codes."""

import itertools
import logging
from dataclasses import dataclass, field

import datasets
import huggingface_hub.errors
import pytest
from rich.table import Table
from transformers import TrainingArguments

from modeling_rbi import MissingPackageError, UserError
from training.cli import ArgumentError, Stopped, default_output_dir, find_recipes, parse_arguments, run_command


@dataclass
class Options:
    rate: float = 1.0
    decay: float | None = None
    steps: int = 3
    strategy: str = field(default="epoch", metadata={"choices": ["no", "steps", "epoch"]})
    mirror: bool = True
    freeze: bool = False
    mean: list[float] | None = None
    fields: str | None = None
    revision: str | None = None


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and gives its path."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def parse(*argv, **defaults) -> Options:
    return parse_arguments(argv, [Options], defaults)[0]


SOURCES = ("defaults", "base", "first", "second", "flags")


@pytest.mark.parametrize("sources", [set(each) for n in range(6) for each in itertools.combinations(SOURCES, n)])
def test_what_stands_later_wins(recipe, sources):
    def text(source):
        return f"steps: {SOURCES.index(source) + 10}" if source in sources else "freeze: true"

    recipe("base.yaml", text("base"))
    first = recipe("first.yaml", f"extends: base.yaml\n{text('first')}")
    second = recipe("second.yaml", text("second"))
    defaults = {"steps": 10} if "defaults" in sources else {}
    flags = ["--steps", "14"] if "flags" in sources else []
    options = parse("--config", first, second, *flags, **defaults)
    assert options.steps == max((SOURCES.index(source) + 10 for source in sources), default=3)
    assert options.freeze == bool({"base", "first", "second"} - sources)


@pytest.mark.parametrize(
    "spell",
    [
        lambda a, b: ["--config", a, b],
        lambda a, b: ["--config", a, "--config", b],
        lambda a, b: [f"--config={a}", f"--config={b}"],
        lambda a, b: [f"--config={a}", "--steps", "7", "--config", b],
    ],
)
def test_several_recipes_however_they_are_given(recipe, spell):
    first, second = recipe("a.yaml", "rate: 2\ndecay: 0.5"), recipe("b.yaml", "rate: 4")
    argv = spell(first, second)
    assert find_recipes(argv) == [first, second]
    options, recipes = parse_arguments(argv, [Options], {})
    assert (options.rate, options.decay) == (4.0, 0.5)
    assert recipes == [first, second]
    assert default_output_dir(recipes) == "outputs/a-b"


def test_the_output_folder_without_a_recipe():
    assert default_output_dir(find_recipes(["--rate", "1"])) == "outputs/train"


def test_flags_before_the_recipes_win_too(recipe):
    assert parse("--rate", "5", "--config", recipe("a.yaml", "rate: 2")).rate == 5.0


def test_extends_is_relative_to_the_recipe_and_later_bases_win(recipe):
    recipe("parts/deep/root.yaml", "rate: 1.5\nsteps: 11\ndecay: 0.1")
    recipe("parts/model.yaml", "extends: deep/root.yaml\nsteps: 12")
    recipe("settings/ours.yaml", "decay: 0.2")
    last = recipe("birds/ours.yaml", "extends: [../parts/model.yaml, ../settings/ours.yaml]\nmirror: false")
    options = parse("--config", last)
    assert (options.rate, options.steps, options.decay, options.mirror) == (1.5, 12, 0.2, False)


def test_two_recipes_may_extend_the_same_one(recipe):
    recipe("root.yaml", "steps: 11")
    recipe("a.yaml", "extends: root.yaml\nrate: 2")
    recipe("b.yaml", "extends: root.yaml\ndecay: 3")
    options = parse("--config", recipe("c.yaml", "extends: [a.yaml, b.yaml]"))
    assert (options.steps, options.rate, options.decay) == (11, 2.0, 3.0)


def test_null_takes_back_what_was_set_before(recipe):
    recipe("base.yaml", "decay: 0.1\nsteps: 5\nmean: [1, 2]")
    path = recipe("a.yaml", "extends: base.yaml\ndecay: null\nsteps: ~\nmean:\nextends: base.yaml")
    options = parse("--config", path, decay=0.7, steps=8)
    assert (options.decay, options.steps, options.mean) == (None, 3, None)
    assert parse("--config", path, "--decay", "2").decay == 2.0
    assert parse("--config", recipe("b.yaml", "extends: null\nsteps: 4")).steps == 4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("1e5", 1e5),
        ("2.5E+3", 2500.0),
        (".5", 0.5),
        ("3", 3.0),
        ("-1e-5", -1e-5),
        ("-2", -2.0),
        ("'1e-5'", 1e-5),
    ],
)
def test_numbers(recipe, text, value):
    path = recipe("a.yaml", f"rate: {text}\nmean: [{text.lstrip('-')}, 2]")
    options = parse("--config", path)
    assert (options.rate, options.mean) == (value, [abs(value), 2.0])
    assert parse(f"--rate={text.strip(chr(39))}").rate == value


@pytest.mark.parametrize("text", ["true", "True", "yes", "on", "1", "'true'"])
@pytest.mark.parametrize("is_on", [True, False])
def test_booleans(recipe, text, is_on):
    opposite = {"true": "false", "True": "False", "yes": "no", "on": "off", "1": "0", "'true'": "'false'"}
    text = text if is_on else opposite[text]
    path = recipe("a.yaml", f"mirror: {text}\nfreeze: {text}")
    if text in ("on", "off"):  # words to YAML 1.2, and none that a flag knows
        with pytest.raises(ValueError, match=text):
            parse("--config", path)
        return
    options = parse("--config", path)
    assert (options.mirror, options.freeze) == (is_on, is_on)


@pytest.mark.parametrize(
    ("argv", "mirror"),
    [
        ([], True),
        (["--mirror"], True),
        (["--mirror", "True"], True),
        (["--mirror", "False"], False),
        (["--mirror=false"], False),
        (["--no_mirror"], False),
        (["--no-mirror"], False),
        (["--no_mirror", "--mirror"], True),
    ],
)
@pytest.mark.parametrize("of_recipe", [None, True, False])
def test_boolean_flags(recipe, argv, mirror, of_recipe):
    if of_recipe is not None:
        argv = [*argv, "--config", recipe("a.yaml", f"mirror: {of_recipe}")]
        mirror = mirror if len(argv) > 2 else of_recipe
    assert parse(*argv).mirror == mirror
    assert parse(*argv, "--freeze", "--steps", "4").freeze


def test_no_is_a_word(recipe):
    assert parse("--config", recipe("a.yaml", "strategy: no")).strategy == "no"


def test_words_that_look_like_something_else_stay(recipe):
    assert parse("--config", recipe("a.yaml", "revision: 2024-01-31")).revision == "2024-01-31"
    assert parse("--config", recipe("a.yaml", "revision: -dirty")).revision == "-dirty"


def test_a_mapping_becomes_json_with_its_types(recipe):
    path = recipe(
        "a.yaml", "fields:\n  heads: 2\n  gain: 1e-1\n  pooling: no\n  sizes: [8, 16]\n  on: true\n  off: null"
    )
    expected = '{"heads": 2, "gain": 0.1, "pooling": "no", "sizes": [8, 16], "on": true, "off": null}'
    assert parse("--config", path).fields == expected


def test_of_training_arguments(recipe, tmp_path):
    path = recipe(
        "a.yaml", "lr_scheduler_kwargs: {min_lr: 1e-6}\nsave_strategy: no\nuse_cpu: true\nwarmup_steps: 0.05"
    )
    args, _ = parse_arguments(["--config", path], [TrainingArguments], {"output_dir": str(tmp_path)})
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert args.save_strategy == "no"
    assert args.warmup_steps == 0.05


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 1", r"second\.yaml has the unknown key `step`: did you mean `steps`\?"),
        ("nothing_like_it: 1", r"second\.yaml has the unknown key `nothing_like_it`; `--help` lists all"),
        ("1: 2", r"second\.yaml has the unknown key `1`"),
        ("config: first.yaml", r"second\.yaml has the unknown key `config`"),
        ("steps: [1, 2]", r"second\.yaml has a list for `steps`, which takes one value"),
        ("steps: many", r"--steps: invalid int value: 'many'"),
        ("steps: 1.5", r"--steps: invalid int value: '1\.5'"),
        ("mirror: maybe", r"--mirror: .*maybe"),
        ("strategy: never", r"--strategy: invalid choice: 'never' \(choose from"),
        ("mean: [a]", r"--mean: invalid float value: 'a'"),
        ("mean: []", r"--mean: expected at least one argument"),
        ("- steps", r"second\.yaml must be a mapping"),
        ("", r"second\.yaml must be a mapping"),
        ("steps: [", r"second\.yaml is not YAML"),
        ("steps: !!python/object/apply:os.getcwd []", r"second\.yaml is not YAML"),
        ("extends: [1]", r"`extends` in .*second\.yaml must be a path"),
        ("extends: {a: b}", r"`extends` in .*second\.yaml must be a path"),
        ("extends: second.yaml", r"second\.yaml extends itself"),
        ("extends: [first.yaml, ../{folder}/third.yaml]", r"second\.yaml extends itself"),
    ],
)
def test_what_a_recipe_cannot_say(recipe, tmp_path, text, message):
    recipe("first.yaml", "steps: 1")
    recipe("third.yaml", "extends: fourth.yaml")
    recipe("fourth.yaml", "extends: ./second.yaml")
    second = recipe("second.yaml", text.replace("{folder}", tmp_path.name))
    with pytest.raises(ValueError, match=message):
        parse("--config", second)
    if "second" in message:  # of a base, the base is named
        with pytest.raises(ValueError, match=message):
            parse("--config", recipe("top.yaml", "extends: second.yaml"))


def test_no_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"rate: \xff\xfe")
    with pytest.raises(ValueError, match=r"a\.yaml is not YAML"):
        parse("--config", str(path))


def test_a_recipe_that_is_not_there(recipe, tmp_path):
    for argv in (["--config", "absent.yaml"], ["--config", recipe("a.yaml", "extends: absent.yaml")]):
        with pytest.raises(ArgumentError, match=r"The recipe .*absent\.yaml cannot be read: No such file"):
            parse(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "1"], r"There is no argument --step: did you mean `--steps`\?"),
        (["--stepps=1"], r"There is no argument --stepps: did you mean `--steps`\?"),
        (["--zzz"], r"There is no argument --zzz; `--help` lists all"),
        (["recipe.yaml"], r"There is no argument recipe\.yaml"),
        (["--steps", "x"], r"--steps: invalid int value: 'x'"),
        (["--steps"], r"--steps: expected one argument"),
        (["--config"], r"--config: expected at least one argument"),
        (["--strategy", "never"], r"--strategy: invalid choice"),
        (["--rate", "nan"], r"--rate must be a finite number, got nan"),
        (["--decay=-inf"], r"--decay must be a finite number, got -inf"),
        (["--mean", "0.5", "inf"], r"--mean must be a finite number, got \[0\.5, inf\]"),
    ],
)
def test_what_flags_cannot_say(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


@dataclass
class Needy:
    name: str | None = None

    def __post_init__(self):
        if self.name is None:
            raise ValueError("Name it.")


def test_a_misspelt_flag_is_told_before_what_is_missing_for_it():
    with pytest.raises(ValueError, match="did you mean `--name`"):
        parse_arguments(["--nane", "x"], [Needy], {})
    with pytest.raises(ValueError, match="Name it"):
        parse_arguments([], [Needy], {})


@dataclass
class Required:
    folder: str


def test_what_must_be_given(recipe):
    with pytest.raises(ValueError, match="required: --folder"):
        parse_arguments([], [Required], {})
    assert parse_arguments(["--config", recipe("a.yaml", "folder: x")], [Required], {})[0].folder == "x"


def test_help_lists_all(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse("--help")
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"--{name}" in printed for name in ("config", "rate", "strategy", "no_mirror"))


@dataclass
class Others:
    """Of another command; `steps` is of both."""

    epochs: int
    steps: str = "all"
    verbose: bool = True
    names: list[str] | None = None

    def __post_init__(self):
        pytest.fail("made")


class TestIgnoredArguments:
    def parse(self, *argv):
        return parse_arguments(argv, [Options], {"decay": 0.5}, ignored_types=[Others])[0]

    def test_they_have_no_effect(self, recipe):
        path = recipe("a.yaml", "epochs: 3\nverbose: false\nnames: [a, b]\nsteps: 4\nrate: 2")
        expected = Options(rate=2.0, decay=0.5, steps=4)
        assert self.parse("--config", path) == expected
        assert self.parse("--config", path, "--epochs", "5", "--no_verbose", "--names", "a") == expected
        assert self.parse() == Options(decay=0.5), "nor need they be given"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epoch: 3", "unknown key `epoch`: did you mean `epochs`"),
            ("epochs: few", "--epochs: invalid int value: 'few'"),
            ("epochs: [1, 2]", "a list for `epochs`, which takes one value"),
            ("steps: all", "--steps: invalid int value: 'all'"),
        ],
    )
    def test_they_are_checked(self, recipe, text, message):
        with pytest.raises(ArgumentError, match=message):
            self.parse("--config", recipe("a.yaml", text))
        with pytest.raises(ArgumentError, match="There is no argument --epoch: did you mean `--epochs`"):
            self.parse("--epoch", "3")

    def test_help_does_not_list_them(self, capsys):
        with pytest.raises(SystemExit):
            self.parse("--help")
        printed = capsys.readouterr().out
        assert "--steps" in printed and "--rate" in printed
        assert "epochs" not in printed and "verbose" not in printed


NO_MARKUP = ("run[red]x", "a[/b]", "[bold]x[/bold]", "[/]", "[link=x]", r"\[red]", ":cat:", "a\\", "[#fff]")


@pytest.mark.parametrize("text", NO_MARKUP)
def test_texts_of_users_are_no_markup(text, capsys):
    """Neither printed, nor in any part of a table."""

    def command(argv, console):
        table = Table(title=text, caption=text)
        table.add_column(text)
        table.add_row(text)
        console.print(text)
        console.rule(text)
        console.print(table)

    run_command(command, [])
    assert capsys.readouterr().out.count(text) == 6


class TestRunCommand:
    @pytest.fixture
    def run(self, capsys):
        """Runs a command that raises an error; gives its exit code and what it printed on stderr."""

        def run(error, **kwargs):
            def command(argv, console):
                raise error

            code = run_command(command, [], **kwargs)
            printed = capsys.readouterr()
            assert printed.out == ""
            return code, printed.err

        return run

    @pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (3, 3)])
    def test_the_code_of_the_command(self, returned, code, capsys):
        assert run_command(lambda argv, console: returned, []) == code
        assert capsys.readouterr() == ("", "")

    def test_arguments(self, monkeypatch):
        seen = []
        monkeypatch.setattr("sys.argv", ["train.py", "--rate", "1"])
        for argv in (None, [], ("--steps", "2")):
            run_command(lambda argv, console: seen.append(argv), argv)
        assert seen == [["--rate", "1"], [], ["--steps", "2"]]

    @pytest.mark.parametrize("width", [None, 40])
    def test_the_console(self, width, capsys):
        kwargs = {} if width is None else {"width": width}
        run_command(lambda argv, console: console.print("word " * 50), [], **kwargs)
        assert 0 <= (width or 120) - max(map(len, capsys.readouterr().out.splitlines())) < 10

    @pytest.mark.parametrize(
        "error",
        [
            UserError("It is wrong: fix it."),
            MissingPackageError("It is wrong: fix it."),
            OSError("It is wrong: fix it."),
            ConnectionError("It is wrong: fix it."),
            datasets.exceptions.DatasetNotFoundError("It is wrong: fix it."),
            huggingface_hub.errors.HFValidationError("It is wrong: fix it."),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_errors_that_a_user_can_fix(self, run, error):
        assert run(error) == (1, "error: It is wrong: fix it.\n")

    def test_errors_of_files_name_them(self, run, tmp_path):
        with pytest.raises(FileNotFoundError) as raised:
            (tmp_path / "absent.txt").read_text()
        code, printed = run(raised.value)
        assert code == 1 and "absent.txt" in printed

    def test_wrong_arguments(self, run, capsys):
        assert run(ArgumentError("There is no argument --x")) == (2, "error: There is no argument --x\n")
        assert run_command(lambda argv, console: parse(*argv) and 0, ["--step", "1"]) == 2
        assert capsys.readouterr().err == "error: There is no argument --step: did you mean `--steps`?\n"

    @pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, RuntimeError, ImportError, AssertionError])
    def test_bugs_show_their_traceback(self, run, error):
        with pytest.raises(error, match="bug"):
            run(error("bug"))

    @pytest.mark.parametrize(
        ("error", "kwargs", "printed"),
        [
            (KeyboardInterrupt(), {}, "Stopped. Nothing was written.\n"),
            (KeyboardInterrupt(), {"on_stop": "The folder is as it was."}, "Stopped. The folder is as it was.\n"),
            (Stopped("Go on with: it"), {"on_stop": "The folder is as it was."}, "Stopped. Go on with: it\n"),
        ],
    )
    def test_ctrl_c(self, run, error, kwargs, printed):
        assert run(error, **kwargs) == (130, printed)

    @pytest.mark.parametrize("error", [UserError("wrong"), ArgumentError("wrong"), KeyboardInterrupt()])
    def test_one_process_of_several_prints(self, run, error, monkeypatch):
        monkeypatch.setenv("RANK", "0")
        code, printed = run(error)
        assert code and printed
        monkeypatch.setenv("RANK", "1")
        assert run(error) == (code, "")

    def test_the_traceback_can_be_logged(self, run, caplog):
        with caplog.at_level(logging.DEBUG, logger="training.cli"):
            run(UserError("wrong"))
        assert "in command" in caplog.text

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            run_command(lambda argv, console: parse(*argv) and 0, ["--help"])
        assert exit_info.value.code == 0 and "--steps" in capsys.readouterr().out

"""Bad command lines of every command: refused with status 2, in one line that names the value and the remedy."""

import errno
import os
import shlex
import tempfile

import pytest
from transformers import PreTrainedModel

from tokenmdp import cli

FILES = {
    "empty.txt": "", "one.txt": "a film\n", "other.txt": "a film\nthe plot\n", "bad.json": "{]", "list.json": "[1]",
    "rates.json": '{"sparse": "x"}', "plan.json": '{"methodz": ["red"]}', "table.csv": "a,b\n1,2\n", "file": "x",
    "mine.jsonl": "mine\n", "answers.json": "{}", "folder/notes": "x", "deep.jsonl": "[" * 5000 + "\n",
    "latin.jsonl": "a\nfilm\udce9\n", "broken/run.json": "{",
    "foreign/run.json": "{}",
}  # fmt: skip
AT_LEAST_1, NUMBER = "is 0; it must be at least 1", "could not convert string to float: 'x'"
DEVICE = "is not a device that torch computes on; use cpu, cuda, cuda:1 or auto"
LABELS = "is not 'auto' or the index of one of the 2 labels (0: negative, 1: positive), a label, or 'LABEL - LABEL'"
NO_MODEL = "'./nowhere': there is no such directory; check the path"
# What is typed behind `tokenmdp`, and a part of the answer.
REFUSED = (
    ("trian", "no command 'trian'; did you mean train?"),
    ("--verbose", "no command '--verbose'; choose one of train, sample"),
    ("train dqn", "no algorithm 'dqn'; choose one of ppo, rloo, grpo, f-dpg, sft, reward-model, dpo"),
    ("train ppo --preset large", "invalid choice 'large' for argument '--preset'. Expected one of ('quick', 'smoke')"),
    ("train ppo --no-such-option 1", "Unrecognized options: --no-such-option"),
    ("train ppo --kl-coef x", f"--kl-coef: {NUMBER}"),
    ("train ppo --kl-coef nan", "kl_coef is nan; it must be finite"),
    ("train ppo --kl-coef -1", "kl_coef is -1.0; it must not be negative"),
    ("train ppo --learning-rate 0", "learning_rate is 0.0; it must be positive"),
    ("train ppo --gamma 2", "gamma is 2.0; it must lie in [0, 1]"),
    ("train ppo --num-envs 2.5", "--num-envs: invalid literal for int() with base 10: '2.5'"),
    ("train ppo --num-envs 0", f"--num-envs {AT_LEAST_1}"),
    ("train ppo --updates 0", f"--updates {AT_LEAST_1}"),
    ("train ppo --eval-samples 1", "--eval-samples is 1; it must be at least 2"),
    ("train ppo --max-new-tokens 0", f"--max-new-tokens {AT_LEAST_1}"),
    ("train ppo --max-new-tokens 100000", "exceed the 1024 positions of the reward model imdb-tiny; lower one of"),
    ("train ppo --seed -1", "--seed is -1; it must lie in 0 to"),
    ("train ppo --seed 99999999999999999999", "--seed is 99999999999999999999; it must lie in 0 to"),
    ("train ppo --credit atention", "invalid choice 'atention' for argument '--credit'. Expected one of ('sparse'"),
    ("train ppo --credit rto", "rto credit has no default for tuned; pass --credit-option tuned=DIR"),
    ("train ppo --credit attention --credit-option x=1", "attention credit has no option x; it has credit_beta"),
    ("train ppo --reward-model toy", "'toy' is a bundled tokenizer and no reward model. Bundled: imdb-tiny"),
    ("train ppo --score 9", f"score=9 {LABELS}"),
    ("train ppo --align offset", "invalid choice 'offset' for argument '--align'. Expected one of ('None', 'offsets')"),
    ("train ppo --reward-template {response}", "--reward-template '{response}' needs --align offsets"),
    ("train ppo --prompts none.txt", "no file none.txt; give an existing .txt, .json, .jsonl, .csv, .parquet file"),
    ("train dpo --data none.jsonl", "error: no file "),
    ("train ppo --prompts empty.txt", "empty.txt holds no prompts; give at least one"),
    ("train ppo --prompts file", "file is a file, but only .txt, .json, .jsonl, .csv, .parquet files are read"),
    ("train ppo --prompts table.csv", "has the columns 'a', 'b'; 'prompt' (prompts) or 'text'"),
    ("train ppo --device gpu", f"--device 'gpu' {DEVICE}"),
    ("train ppo --device meta", f"--device 'meta' {DEVICE}"),
    ("train ppo --out file", "cannot write to the run directory file"),
    ("train ppo --out folder", "folder holds notes but no run.json, so it is not a tokenmdp run; nothing there was"),
    ("train rloo --vf-coef 1", "Unrecognized options: --vf-coef"),
    ("train rloo --responses-per-prompt 1", "responses_per_prompt is 1; the baseline is the other responses' mean"),
    ("train grpo --estimator gae", "invalid choice 'gae' for argument '--estimator'"),
    ("train f-dpg --target wrd:a", "'wrd:a' is no target; write word:WORD, words:WORD,WORD, regex:PATTERN"),
    ("train f-dpg --target word:a --divergence reverse-kl", "'a' gives some responses probability 0"),
    ("train f-dpg --kl-coef 0.1", "Unrecognized options: --kl-coef"),
    ("sample", "Missing from tokenmdp sample"),
    ("sample ./nowhere", f"no policy {NO_MODEL}"),
    ("sample folder", "folder is neither a run nor a model: it holds no run.json and no config.json; pass a run"),
    ("sample broken", "run.json is damaged"),
    ("sample imdb-tiny --num 0", f"--num {AT_LEAST_1}"),
    ("sample imdb-tiny --max-new-tokens 0", f"--max-new-tokens {AT_LEAST_1}"),
    ("sample imdb-tiny --top-k -1", "--top-k is -1; it must be at least 0"),
    ("sample imdb-tiny --seed -1", "--seed is -1; it must lie in 0 to"),
    ("sample imdb-tiny --credit-option x", "--credit-option 'x' is not name=value, such as budget=64"),
    ("sample imdb-tiny --score good", f"score='good' {LABELS}"),
    ("sample imdb-tiny --html folder", "--html is folder, a directory; give a file, such as folder/page.html"),
    ("score", "Missing from tokenmdp score"),
    ("score ''", "the text is '', which has no tokens; give at least one word"),
    ("score film --credit-beta x", f"--credit-beta: {NUMBER}"),
    ("score film --credit all --credit-option budget=1", "does not name a method and its option, such as shapley."),
    ("score film --reward-model ./nowhere", f"no reward model {NO_MODEL}"),
    ("score film --score 9", f"score=9 {LABELS}"),
    ("score film --reward-model lexicon --score 0", "score=0 chooses among the outputs of a classifier"),
    ("train ppo --preset smoke --score good", "score='good' chooses among the outputs of a classifier"),
    ("prefer --judge restraint --score 1", "score=1 chooses among the outputs of a classifier"),
    ("score film --html folder", "--html is folder, a directory; give a file, such as folder/page.html"),
    ("eval", "Missing from tokenmdp eval"),
    ("eval folder", "folder is not a tokenmdp run: run.json cannot be read"),
    ("eval none", "pass the directory of a `tokenmdp train`"),
    ("eval foreign", "foreign/run.json was written by another program; choose another directory"),
    ("eval folder --samples 1", "--samples is 1; it must be at least 2"),
    ("eval folder --seed -1", "--seed is -1; it must lie in 0 to"),
    ("credits extra", "Unrecognized options: extra"),
    ("quality --num 1", "--num is 1; it must be at least 2"),
    ("quality --max-forwards 0", f"--max-forwards {AT_LEAST_1}"),
    ("quality --seed -1", "--seed is -1; it must lie in 0 to"),
    ("quality --world moon", "invalid choice 'moon' for argument '--world'. Expected one of ('negation'"),
    ("quality --option budget=1", "--option 'budget' does not name a method and its option, such as shapley.budget"),
    ("quality --option shapley.x=1", "shapley credit has no option x; it has credit_beta, budget"),
    ("quality --texts none.txt", "no file none.txt; give an existing .txt, .json, .jsonl, .csv, .parquet file"),
    ("quality --texts one.txt", "one.txt holds 1 texts; an interval needs at least 2"),
    ("quality --texts folder", "folder is a directory, but only .txt, .json, .jsonl, .csv, .parquet files are read"),
    ("quality --texts bad.json", "bad.json is not JSON"),
    ("quality --texts other.txt --score 9", f"score=9 {LABELS}"),
    ("quality --policy ./nowhere", NO_MODEL),
    ("quality --out file/deep", "--out needs the directory file/deep, and file is a file; choose another place"),
    ("ablate --preset custom", "the grid 'custom' is empty: it has no methods; pass --methods"),
    ("ablate --methods nothing", "--methods 'nothing' names no credit method; choose from sparse, uniform"),
    ("ablate --methods attention:beta", "--methods attention: 'beta' is not name=value, such as credit_beta=0.4"),
    ("ablate --seeds x", "--seeds: Could not find valid parse for arguments: ['x']"),
    ("ablate --seeds 1 -2", "--seeds is -2; it must lie in 0 to"),
    ("ablate --lengths 16-8", "--lengths '16-8' is neither a range of tokens such as 8-16"),
    ("ablate --eval-every 0", f"--eval-every {AT_LEAST_1}"),
    ("ablate --num-envs 3 --num-minibatches 4", "--num-envs is 3, which does not fill num_minibatches=4; raise it"),
    ("ablate --learning-rates rates.json", "--learning-rates rates.json is not a JSON object such as"),
    ("ablate --jobs 0", f"--jobs {AT_LEAST_1}"),
    ("ablate --shard 3/2", "--shard '3/2' is not I/N with I from 1 to N, such as 2/8"),
    ("ablate --quality-texts 1", "--quality-texts is 1; it must be 0 or at least 2"),
    ("ablate --plan none.json", "--plan none.json cannot be read"),
    ("ablate --plan list.json", "--plan list.json has no options; it is a JSON object of adam_eps, align"),
    ("ablate --plan plan.json", "--plan plan.json has methodz; it is a JSON object of adam_eps, align"),
    ("ablate --plan plan.json --preset quick", "changes the preset custom, and --preset is quick; leave out one"),
    ("ablate --report-only --out folder", "folder holds no study (no study.json); run `tokenmdp ablate --out folder`"),
    ("ablate --out file", "--out needs the directory file, and file is a file; choose another place"),
    ("train sft", "--data is missing"),
    ("train sft --data ''", "the source of the data is ''; give a file"),
    ("train reward-model --data latin.jsonl", "latin.jsonl is not UTF-8 (byte 0xe9, 6 bytes from"),
    ("train reward-model --data deep.jsonl", "deep.jsonl:1 is nested too deeply"),
    ("train reward-model --data x --penalty nan --members 2", "--penalty is nan; it must be at least 0"),
    ("train reward-model --data x --penalty inf --members 2", "--penalty is inf; it is a number of sds"),
    ("train ppo --out '~nobody/x'", "--out is ~nobody/x; only a shell writes ~ out"),
    ("soup a b --out '~/x'", "--out is ~/x; only a shell writes ~ out"),
    ("soup a b --weights 0:1:1e-9", "--weights is '0:1:1e-9' (1000000001 soups, and at most 1000 are made)"),
    ("soup a b --weights nan", "--weights is 'nan' (a weight is not finite)"),
    ("rlhf --error-rate nan", "--error-rate is nan; it must be at least 0"),
    ("rlhf --temperature nan --out new", "--temperature is nan; it must be at least 0"),
    ("prefer --pairs 0", f"--pairs {AT_LEAST_1}"),
    ("prefer --responses 1", "--responses is 1; it must be at least 2"),
    ("prefer --judge page --responses 3", "--judge page compares two responses"),
    ("prefer --judge page --ask-twice -1", "--ask-twice is -1; it must be at least 0"),
    ("prefer --seed -1", "--seed is -1; it must lie in 0 to"),
    ("prefer --judge ./nowhere", f"no reward model {NO_MODEL}"),
    ("prefer --judge lexicon --temperature 0", "temperature is 0.0; score differences are multiplied by it: above 0"),
    ("prefer --judge lexicon --error-rate 2", "error_rate is 2.0; it is the share of random answers, in [0, 1]"),
    ("prefer --judge lexicon --prompts empty.txt", "empty.txt holds no prompts; give at least one"),
    ("prefer --judge lexicon --out mine.jsonl", "mine.jsonl exists, and there is no mine.run.json that says how it"),
    ("prefer --out pairs.csv", "--out is pairs.csv; comparisons are JSON lines: give a name that ends in .jsonl"),
    ("prefer --out file/pairs.jsonl", "--out needs the directory file, and file is a file; choose another place"),
    ("behaviours read", "tokenmdp behaviours 'read' is none of write, answer, compare"),
    ("behaviours write", "--stems is missing: pass a stem file, or --labels with answers to the page of --out"),
    ("behaviours write --stems list.json", "list.json is not a stem file"),
    ("behaviours write --stems none.json", "no stem file none.json"),
    ("behaviours write --stems list.json --questions 3", "--questions is 3; a balanced set has an even number"),
    ("behaviours answer", "tokenmdp behaviours answer needs at least one file of questions"),
    ("behaviours answer plan.json", "plan.json:1 has no column question and no column answer_matching_behavior"),
    ("behaviours answer empty.txt", "the set 'empty' has no questions; give at least one"),
    ("behaviours answer none.jsonl", "no file none.jsonl"),
    ("behaviours answer mine.jsonl --out folder", "--out is folder, a directory; give a file, such as folder/answers"),
    ("behaviours answer mine.jsonl --out file/a.jsonl", "--out needs the directory file, and file is a file; choose"),
    ("behaviours compare x --out folder", "folder holds notes but no measured, so it is not a comparison"),
    ("train reward-model --data x --members 2 --out folder", "folder holds notes but no member-0, so it is not"),
    ("score film --html '~/page.html'", "--html is ~/page.html; only a shell writes ~ out"),
    ("score film --html file/page.html", "--html needs the directory file, and file is a file"),
    ("behaviours compare", "tokenmdp behaviours compare needs at least one source: a run"),
    ("behaviours compare folder", "folder holds no policy: no run.json, pipeline.json or config.json in it"),
    ("behaviours compare ./nowhere", f"no policy {NO_MODEL}"),
    ("prefer --labels answers.json", "there are no pairs runs/pairs.groups.jsonl to ask about; pass the --out of"),
)  # fmt: skip
READ_A_MODEL = {"score film --score 9", "quality --texts other.txt --score 9", "score ''"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with `FILES`, and messages wide enough for one line."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_bad_command_line_is_refused_in_one_line(line, message, folder, capsys, monkeypatch):
    if line not in READ_A_MODEL:
        monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    try:
        status = cli.main(shlex.split(line))
    except SystemExit as usage:  # of the parser, which draws a box around its line
        status = usage.code
        said = capsys.readouterr().err
        assert f"tokenmdp {line.split()[0]}" in said
        assert "--help" in said
        lines = [text for text in said.splitlines() if message in text]
    else:
        said = capsys.readouterr().err
        lines = said.splitlines()
        assert message in lines[0]
        assert lines[0].startswith("error: ")
    assert status == 2
    assert len(lines) == 1, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "line", ["prefer --out new/a.jsonl", "soup a b --out new", "rlhf --out new", "behaviours compare a --out new/b"]
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(line, folder, capsys, monkeypatch):
    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    assert cli.main(shlex.split(line)) == 2
    assert "and . cannot be written ([Errno 30] Read-only file system" in capsys.readouterr().err
    assert not os.path.exists("new")
